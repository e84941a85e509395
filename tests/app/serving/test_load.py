"""More requests than the machine can answer: some are refused at once, the others are in time.

What is claimed is counted, or compared with what the same server did at the same time.
"""

from __future__ import annotations

import contextlib
import re
import socket
import statistics
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from support.server import RAW, Server, agreed, serving
from support.waiting import until

pytestmark = pytest.mark.alone
MB = 1024 * 1024
QUEUE, DEADLINE_MS = 16, 10_000


@pytest.fixture(scope="module")
def server(kensa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("load")
    limits = {"KENSA_QUEUE_SIZE": str(QUEUE), "KENSA_DEADLINE_MS": str(DEADLINE_MS)}
    limits["KENSA_REPEAT_S"] = "0"  # all send the same part
    settings = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_BATCHING": "on", **limits}
    with serving(folder, **settings) as running:
        yield running


NAMED = {"X-Request-ID": "line.1", "X-Part": "A/17"}


@pytest.fixture(scope="module")
def photo(sample_data: Path) -> bytes:
    return next((sample_data / "test").glob("*/normal/*")).read_bytes()


@dataclass
class Load:
    """What clients got who send one request after another."""

    waits: dict[int, list[float]] = field(default_factory=dict)  # by status, milliseconds
    codes: Counter[str] = field(default_factory=Counter)
    without_retry_after: int = 0
    without_names: int = 0
    memory: list[int] = field(default_factory=list)

    @property
    def statuses(self) -> dict[int, int]:
        return {status: len(waits) for status, waits in self.waits.items()}


def under_load(server: Server, data: bytes, clients: int, seconds: float, query: str = "") -> Load:
    """Clients with a connection each, which do what `Retry-After` says only in part."""
    load, stop, lock = Load(), threading.Event(), threading.Lock()

    def send() -> None:
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
            while not stop.is_set():
                began = time.perf_counter()
                answer = client.post(f"/infer{query}", content=data, headers={**RAW, **NAMED})
                waited = (time.perf_counter() - began) * 1000
                with lock:
                    load.waits.setdefault(answer.status_code, []).append(waited)
                    if answer.status_code != 200:
                        load.codes[agreed(answer)] += 1
                        load.without_retry_after += "retry-after" not in answer.headers
                    back = answer.headers["x-request-id"], answer.headers["x-kensa-part"]
                    load.without_names += back != ("line.1", "A/17")
                if answer.status_code == 503:
                    stop.wait(0.2)

    with ThreadPoolExecutor(clients) as pool:
        sending = [pool.submit(send) for _ in range(clients)]
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(0.25)
            load.memory.append(server.memory("VmRSS"))
        stop.set()
        for one in sending:
            one.result()
    return load


def p99(waits: list[float]) -> float:
    return sorted(waits)[int(len(waits) * 0.99)]


def overload(server: Server, photo: bytes, seconds: float) -> Load:
    """The promise under load beyond capacity, for so many seconds."""
    while inspected(server) < 200:  # what so many clients take is taken once, however slowly
        under_load(server, photo, 64, 1)
    before = inspected(server)
    load = under_load(server, photo, 64, seconds)

    assert inspected(server) - before == load.statuses[200]  # and nothing is left to do
    assert set(load.statuses) == {200, 503}
    assert set(load.codes) == {"overloaded"}
    assert load.without_retry_after == 0
    assert load.without_names == 0
    assert p99(load.waits[200]) < DEADLINE_MS
    grown = statistics.mean(load.memory[-4:]) - statistics.mean(load.memory[2:6])
    assert grown < 8 * MB
    print(f"\n{load.statuses}, 200 in {statistics.median(load.waits[200]):.0f} ms (p99"
          f" {p99(load.waits[200]):.0f}), 503 in {statistics.median(load.waits[503]):.0f} ms,"
          f" memory {load.memory[2] / MB:.0f} to {load.memory[-1] / MB:.0f} MB")  # fmt: skip
    return load


def test_beyond_capacity_every_answer_is_a_verdict_in_time_or_an_honest_503(
    server: Server, photo: bytes
) -> None:
    overload(server, photo, 5)


@pytest.mark.soak
def test_two_minutes_beyond_capacity_change_nothing(server: Server, photo: bytes) -> None:
    overload(server, photo, 120)


def test_health_is_answered_beyond_capacity(server: Server, photo: bytes) -> None:
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(under_load, server, photo, 32, 2)
        waits: dict[str, list[float]] = {"/livez": [], "/readyz": []}
        while not loading.done():
            for path, waited in waits.items():
                began = time.perf_counter()
                assert server.client.get(path).status_code == 200
                waited.append((time.perf_counter() - began) * 1000)
            time.sleep(0.05)
    load = loading.result()
    assert load.statuses[503] > 0
    for waited in waits.values():  # not behind those that wait for a verdict
        assert statistics.median(waited) < statistics.median(load.waits[200]) / 3


def test_a_request_may_ask_for_a_deadline_of_its_own(server: Server, photo: bytes) -> None:
    assert server.client.post("/infer?deadline_ms=60000", content=photo, headers=RAW).is_success
    usual = statistics.median(under_load(server, photo, QUEUE, 2).waits[200])
    load = under_load(server, photo, QUEUE, 2, f"?deadline_ms={usual / 4:.0f}")
    assert set(load.statuses) <= {200, 504}
    assert load.codes["deadline_exceeded"] > 0
    # They hear of it when their time is up, and not when their turn comes.
    assert statistics.median(load.waits[504]) < usual / 2


@pytest.mark.parametrize("wrong", ["0", "-1", "soon", "1.5"])
def test_a_deadline_that_is_none_is_refused(server: Server, photo: bytes, wrong: str) -> None:
    answer = server.client.post(f"/infer?deadline_ms={wrong}", content=photo, headers=RAW)
    assert (answer.status_code, agreed(answer)) == (422, "bad_request")


def inspected(server: Server) -> int:
    counts = server.client.get("/healthz").json()["inspections"]
    return int(counts["normal"] + counts["anomaly"])


def counted(server: Server, metric: str) -> int:
    said = server.client.get("/metrics").text
    return int(sum(float(one) for one in re.findall(rf"^{metric}(?:{{.*}})? (\S+)$", said, re.M)))


def computed(server: Server) -> int:
    """Images that the engine took, also for those who have gone."""
    return counted(server, "kensa_batch_size_sum")


def test_what_nobody_waits_for_any_more_is_not_computed(server: Server, photo: bytes) -> None:
    for _ in range(10):  # now and then a server is done before its clients can leave
        before = computed(server)
        connections = [_connect(server) for _ in range(QUEUE)]
        for connection in connections:
            connection.sendall(_request(photo))
        # What has not been read goes with its connection: all of them must be in the queue.
        until(lambda: computed(server) - before + counted(server, "kensa_queue_length") >= QUEUE)  # noqa: B023
        for connection in connections:  # a reset, as from a program that was killed
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        until(lambda: server.infer(photo).status_code == 200)  # what came before is done with
        if (taken := computed(server) - before - 1) <= QUEUE // 2:
            break
    assert taken <= QUEUE // 2
    assert not _errors(server)


def _connect(server: Server) -> socket.socket:
    host, port = httpx.URL(server.url).host, httpx.URL(server.url).port
    return socket.create_connection((host, port), timeout=10)


def _request(data: bytes) -> bytes:
    head = f"POST /infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def _errors(server: Server) -> list[str]:
    return [line for line in server.log.read_text().splitlines() if "Traceback" in line]


def test_bodies_that_arrive_together_take_a_bounded_memory(
    kensa_model: Path, tmp_path: Path
) -> None:
    limits = {"KENSA_MAX_IMAGE_BYTES": str(2 * MB)}
    with serving(tmp_path, KENSA_MODEL_DIR=str(kensa_model), **limits) as running:
        before = running.memory("VmRSS")
        connections = []
        head = f"POST /infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {2 * MB}\r\n\r\n"
        for _ in range(40):  # 80 MB that never end
            connection = _connect(running)
            connection.sendall(head.encode())
            connection.setblocking(False)
            connections.append(connection)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.settimeout(2)
                connection.sendall(bytes(2 * MB - 1))
        refused: set[int] = set()

        def ask() -> bool:
            for number, connection in enumerate(connections):
                connection.setblocking(False)
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    if b" 503 " in connection.recv(100):
                        refused.add(number)
            return len(refused) >= 20

        until(ask)
        assert running.memory("VmRSS") - before < 60 * MB
        for connection in connections:
            connection.close()
        data = bytes(2 * MB)
        until(lambda: running.infer(data).status_code in (400, 415))  # and there is room again
