"""Claims about connections that are idle, slow, half closed, cut or too many; and stopping."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import random
import re
import resource
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import uvicorn
from PIL import Image
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from app.http import connection as connections
from app.http.connection import MAX_HEAD, MAX_PIPELINED, SLOWEST, Connection, room_for_connections
from app.settings import Settings
from support.damage import damaged, picture, saved
from support.server import Server, serving
from support.waiting import until

MIB = 1024 * 1024
THREADS_OF_THE_QUEUE = 4
RECEIVE_S = 1
SETTINGS = {"KENSA_RECEIVE_S": str(RECEIVE_S), "KENSA_BATCHING": "on"}
HOST = b"Host: localhost\r\n"
LIVEZ = b"GET /livez HTTP/1.1\r\n" + HOST + b"\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
JPEG = b"Content-Type: image/jpeg\r\n"


@pytest.fixture(scope="module")
def server(kensa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_MODEL_NAME": "part", **SETTINGS}
    with serving(tmp_path_factory.mktemp("server"), **settings, KENSA_KEEP_ALIVE_S="2") as running:
        yield running


@pytest.fixture(scope="module")
def photo() -> bytes:
    return saved(Image.fromarray(picture(320, 240)), "JPEG")


def post(path: str, body: bytes, *headers: bytes) -> bytes:
    head = b"POST %s HTTP/1.1\r\n%s%s" % (path.encode(), HOST, b"".join(headers))
    return head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


def in_chunks(data: bytes, size: int = 4000) -> bytes:
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def connect(server: Server, timeout: float = 15) -> socket.socket:
    port = int(server.url.rpartition(":")[2])
    return socket.create_connection(("127.0.0.1", port), timeout=timeout)


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes. A reset fails the test: it may take an answer away."""
    answer = b""
    while more := connection.recv(MIB):
        answer += more
    return answer


def read_one(connection: socket.socket) -> bytes:
    """One answer, whole where it says its length; else what has come of it."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        more = connection.recv(65536)
        assert more, answer
        answer += more
    length = re.search(rb"\r\ncontent-length: (\d+)\r\n", answer)
    whole = answer.index(b"\r\n\r\n") + 4 + int(length[1] if length else 0)
    while len(answer) < whole:
        answer += connection.recv(whole - len(answer))
    return answer


def ask(server: Server, data: bytes, *, shut: bool = False) -> bytes:
    """Send these bytes, then read until the server closes the connection."""
    with connect(server) as connection:
        connection.sendall(data)
        if shut:
            connection.shutdown(socket.SHUT_WR)
        return read_all(connection)


def statuses(answer: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


def refusal(answer: bytes) -> tuple[int, str]:
    """Status and code of an answer that the application did not give, in the agreed form."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:])
    assert headers["content-type"] == "application/json"
    assert headers["content-length"] == str(len(body))
    assert headers["connection"] == "close"
    assert headers["x-request-id"]
    found = json.loads(body)
    assert set(found) == {"error", "code"}
    assert found["error"].endswith(".")
    return statuses(answer)[0], found["code"]


def eventually(is_so: Callable[[], bool], within_s: float = 60) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if is_so():
            return True
        time.sleep(0.05)
    return is_so()


# Slow and idle


def trickle(server: Server, start: bytes, rest: bytes, stop: threading.Event) -> bytes:
    """One byte ten times a second, until the server has had enough: what it said."""
    with connect(server) as connection:
        connection.sendall(start)
        connection.settimeout(0.1)
        answer = b""
        for byte in rest:
            if stop.is_set():
                break
            with contextlib.suppress(TimeoutError):
                more = connection.recv(65536)
                if not more:
                    return answer
                answer += more
            with contextlib.suppress(OSError):
                connection.send(bytes([byte]))
        return answer + b"still open"


def cost(server: Server, photo: bytes) -> float:
    """CPU seconds of the server for ten times /livez and /infer, each answered before the next."""
    began = server.cpu_seconds()
    for _ in range(10):
        assert server.client.get("/livez").status_code == 200
        assert server.infer(photo).status_code == 200
    return server.cpu_seconds() - began


def test_20_idle_and_20_trickling_connections_change_nothing(
    kensa_model: Path, tmp_path: Path, photo: bytes
) -> None:
    """What comes meanwhile is answered before the first of them has had its time."""
    settings = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_RECEIVE_S": "10"}
    with serving(tmp_path, **settings) as server:
        cost(server, photo)
        before, stop = cost(server, photo), threading.Event()
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(20) as pool:
            stack.callback(stop.set)
            idle, slow = idle_and_slow(server, stack, pool, stop)
            during = cost(server, photo)
            assert not any(one.done() for one in slow)
            assert eventually(lambda: all(one.done() for one in slow))
            assert [refusal(one.result()) for one in slow] == [(408, "too_slow")] * 20
            for connection in idle:
                connection.settimeout(60)
                assert connection.recv(1) == b""  # nothing was asked, so nothing is said
    print(f"\nCPU seconds before: {before:.2f}, with 40 idle and slow clients: {during:.2f}")
    assert during < 3 * before + 0.2


def idle_and_slow(
    server: Server, stack: contextlib.ExitStack, pool: ThreadPoolExecutor, stop: threading.Event
) -> tuple[list[socket.socket], list[Future[bytes]]]:
    """20 connections that say nothing, and 20 that send a byte now and then."""
    head = LIVEZ[:10], LIVEZ[10:-4] + b"x" * 1000
    body = post("/infer", bytes(1000), JPEG)
    body = body[: body.index(b"\r\n\r\n") + 4], bytes(1000)
    idle = [stack.enter_context(connect(server)) for _ in range(20)]
    slow = [pool.submit(trickle, server, *(head, body)[n % 2], stop) for n in range(20)]
    time.sleep(0.2)
    return idle, slow


def test_a_slow_upload_that_moves_is_waited_for(server: Server) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)
    image = cv2.imencode(".bmp", noise)[1].tobytes()
    request = post("/datasets/slow/train?name=a.bmp", image, b"Content-Type: image/bmp\r\n")
    assert len(request) / (2 * SLOWEST) > 2 * RECEIVE_S
    began = time.monotonic()
    with connect(server) as connection:
        sent = 0
        while sent < len(request):  # by the clock: a machine that stops for a moment catches up
            due = int((time.monotonic() - began) * 2 * SLOWEST) + 1000
            connection.sendall(request[sent:due])
            sent = min(due, len(request))
            time.sleep(0.1)
        assert time.monotonic() - began > 2 * RECEIVE_S
        assert statuses(read_one(connection)) == [201]


def test_an_upload_that_stands_still_leaves_no_file(server: Server) -> None:
    uploads = server.log.parent / "data" / "datasets" / "uploads"
    head = post("/datasets/bolt/train?name=a.jpg", bytes(5 * MIB), JPEG)[: 3 * MIB]
    with connect(server) as connection:
        connection.sendall(head)
        assert eventually(lambda: any(uploads.rglob("0")))
        assert refusal(read_all(connection)) == (408, "too_slow")
        assert eventually(lambda: not any(uploads.iterdir()))


def test_what_the_connection_refuses_is_a_line_for_who_wants_text(server: Server) -> None:
    head = post("/infer", bytes(5 * MIB), JPEG, b"Accept: text/plain\r\n")[: 3 * MIB]
    with connect(server) as connection:
        connection.sendall(head)
        answer = read_all(connection)
    assert statuses(answer) == [408]
    assert answer.endswith(b"\r\n\r\nERR too_slow\n")
    assert b"x-kensa-error: The request did not arrive in time" in answer


def test_a_client_that_waits_to_be_asked_for_its_body_is_not_slow(
    server: Server, photo: bytes
) -> None:
    request = post("/infer", photo, JPEG, b"Expect: 100-continue\r\n")
    head, _, body = request.partition(b"\r\n\r\n")
    with connect(server) as connection:
        connection.sendall(head + b"\r\n\r\n")
        assert statuses(read_one(connection)) == [100]
        connection.sendall(body)
        assert statuses(read_one(connection)) == [200]


def test_what_is_left_of_a_refused_body_is_read_for_a_while_only(server: Server) -> None:
    head = b"POST /infer HTTP/1.1\r\n" + HOST + JPEG + b"Content-Length: %d\r\n\r\n" % (10**12)
    with connect(server) as connection:
        connection.sendall(head)
        assert statuses(read_one(connection)) == [413]

        def go_on() -> None:
            for _ in range(20 * 100 * RECEIVE_S):
                connection.sendall(bytes(65536))
                time.sleep(0.01)

        with pytest.raises(ConnectionError):  # it hangs up
            go_on()


def test_a_line_end_after_a_body_is_no_request(server: Server, photo: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(post("/infer", photo, JPEG) + b"\r\n")
        assert statuses(read_one(connection)) == [200]
        assert connection.recv(1) == b""  # closed as any idle one, without a 408


def is_held(server: Server, connection: socket.socket) -> bool:
    """Whether the server process still has its side of a connection."""
    here, there = int(server.url.rpartition(":")[2]), connection.getsockname()[1]
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, *others = line.split()
        if (int(local[-4:], 16), int(remote[-4:], 16)) == (here, there):
            return others[6] != "0"  # the inode of a descriptor
    return False


PAGE = b"GET /static-offline-docs/swagger-ui-bundle.js HTTP/1.1\r\n" + HOST + b"\r\n"


@contextlib.contextmanager
def slow_reader(server: Server) -> Iterator[socket.socket]:
    """A connection that takes little at a time."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        yield connection


def test_a_client_that_reads_slowly_gets_all_of_its_answer(server: Server) -> None:
    page = server.client.get("/static-offline-docs/swagger-ui-bundle.js").content
    with slow_reader(server) as connection:
        connection.sendall(PAGE.replace(HOST, HOST + b"Connection: close\r\n"))
        answer, began = b"", time.monotonic()
        while more := connection.recv(len(page) // 40):
            answer += more
            time.sleep(0.05 if time.monotonic() - began < 2 * RECEIVE_S else 0)
    assert time.monotonic() - began > 2 * RECEIVE_S
    assert answer.endswith(page)


def test_a_client_that_never_reads_its_answers_is_closed(server: Server) -> None:
    with slow_reader(server) as connection:
        connection.sendall(PAGE * 8)
        assert eventually(lambda: is_held(server, connection))
        assert eventually(lambda: not is_held(server, connection))


# Half closed


def test_a_client_that_has_shut_down_its_side_gets_its_answer(server: Server, photo: bytes) -> None:
    chunked = b"POST /infer HTTP/1.1\r\n" + HOST + JPEG + CHUNKED + b"\r\n" + in_chunks(photo)
    for data, expected in (
        (LIVEZ, [200]),
        (post("/infer", photo, JPEG), [200]),
        (chunked, [200]),
        (LIVEZ.replace(b"1.1", b"1.0"), [200]),
        (LIVEZ + post("/infer", photo, JPEG) + LIVEZ, [200, 200, 200]),
        (LIVEZ + LIVEZ[:20], [200]),
        (b"GET /nope HTTP/1.1\r\n" + HOST + b"\r\n", [404]),
    ):
        answer = ask(server, data, shut=True)
        assert [one for one in statuses(answer) if one != 100] == expected, data[:80]
        assert answer.endswith((b"}", b"0\r\n\r\n"))


@pytest.mark.parametrize("sent", [1, 20, -1])
def test_an_end_in_mid_request_closes_at_once(small: Server, photo: bytes, sent: int) -> None:
    """And not when its time is up, which is half a minute here."""
    began = time.monotonic()
    for data in (LIVEZ, post("/datasets/bolt/train?name=a.jpg", photo, JPEG)):
        assert ask(small, data[:sent], shut=True) == b""
    assert time.monotonic() - began < 20


@dataclass
class Patient:
    """An application that waits, then answers, and notes what it was told meanwhile."""

    wait_s: float
    began: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        self.began.set()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(receive(), self.wait_s)
            self.left.set()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})


@contextlib.contextmanager
def within(application: Any) -> Iterator[int]:
    """uvicorn with `Connection`, in a thread: the port it listens on."""
    protocol = partial(Connection, settings=Settings(), most=8)
    config = uvicorn.Config(application, http=protocol, loop="asyncio", ws="none", lifespan="off",
                            log_config=None)  # type: ignore[arg-type] # fmt: skip
    running = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=running.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            running.should_exit = running.force_exit = True
            thread.join()


def test_an_answer_on_a_kept_connection_is_not_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """By 40 ms: Nagle's algorithm on this side, delayed acknowledgements on the other."""
    undelayed: list[int] = []
    made = Connection.connection_made

    def noted(self: Connection, transport: Any) -> None:
        made(self, transport)
        at = transport.get_extra_info("socket")
        undelayed.append(at.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(Connection, "connection_made", noted)
    with within(Patient(wait_s=0)) as port:
        connection = socket.create_connection(("127.0.0.1", port), timeout=30)
        connection.sendall(LIVEZ)
        assert statuses(read_one(connection)) == [204]
        connection.close()
    assert undelayed == [1]


@pytest.mark.parametrize("is_there", [True, False])
def test_one_that_waits_is_told_from_one_that_left(is_there: bool) -> None:
    """Both have sent the same: a request, and that there is no more to come."""
    application = Patient(wait_s=60 if not is_there else 0.8)
    with within(application) as port:
        connection = socket.create_connection(("127.0.0.1", port), timeout=10)
        connection.sendall(LIVEZ)
        if is_there:
            connection.shutdown(socket.SHUT_WR)
            assert statuses(read_all(connection)) == [100, 204]
            assert not application.left.is_set()
        connection.close()
        assert is_there or application.left.wait(30)


def test_every_request_of_a_connection_that_is_lost_hears_of_it() -> None:
    """uvicorn tells the last one alone."""
    application = Patient(wait_s=60)
    with within(application) as port:
        connection = socket.create_connection(("127.0.0.1", port), timeout=10)
        connection.sendall(LIVEZ * 3)
        assert application.began.wait(30)
        time.sleep(0.2)  # the others arrive
        reset(connection)
        assert application.left.wait(30)


@pytest.mark.parametrize("is_answered", [True, False])
def test_a_body_that_nobody_will_read_takes_no_memory(
    monkeypatch: pytest.MonkeyPatch, is_answered: bool
) -> None:
    """uvicorn keeps it until the next request; of a lost connection, until Python collects it."""
    answer, cycles = threading.Event(), list[RequestResponseCycle]()
    start = Connection._start_asgi_task

    def noted(self: Connection, cycle: RequestResponseCycle, app: Any) -> None:
        cycles.append(cycle)
        start(self, cycle, app)

    async def reads_nothing(scope: Any, receive: Any, send: Any) -> None:
        while not answer.is_set():
            await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    monkeypatch.setattr(Connection, "_start_asgi_task", noted)
    with within(reads_nothing) as port:
        connection = socket.create_connection(("127.0.0.1", port), timeout=30)
        connection.sendall(post("/infer", bytes(60_000)))  # of more, uvicorn reads no more
        until(lambda: cycles and len(cycles[0].body) > 0)
        if is_answered:
            answer.set()
            assert statuses(read_one(connection)) == [204]
        else:
            reset(connection)
            until(lambda: cycles[0].disconnected)
        until(lambda: len(cycles[0].body) == 0)
        answer.set()
        connection.close()


# What is no request


PIECES = b"POST /infer HTTP/1.1\r\n" + HOST + JPEG + CHUNKED + b"\r\n"
HEADS = {
    "a long header": b"GET /livez HTTP/1.1\r\n" + HOST + b"A: " + b"x" * MAX_HEAD + b"\r\n\r\n",
    "an endless header": b"GET /livez HTTP/1.1\r\n" + HOST + b"A: " + b"x" * MIB,
    "many headers": b"GET /livez HTTP/1.1\r\n" + HOST + b"A: b\r\n" * MAX_HEAD + b"\r\n",
    "endless headers": b"GET /livez HTTP/1.1\r\n" + HOST + b"A: b\r\n" * MAX_HEAD,
    "a long path": b"GET /" + b"x" * MAX_HEAD + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    "an endless path": b"GET /" + b"x" * MIB,
    "nothing but line ends": b"\r\n" * MAX_HEAD,
    "an endless chunk head": PIECES + b"5;" + b"x" * MIB,
    "an endless trailer": PIECES + b"0\r\nA: " + b"x" * MIB,
}  # fmt: skip


@pytest.mark.parametrize("name", ["a long header", "many headers", "a long path"])
def test_a_refused_head_has_no_body(server: Server, name: str) -> None:
    with connect(server) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(HEADS[name].replace(b"GET", b"HEAD", 1))
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert statuses(head) == [431]
    assert body == b""


@pytest.mark.parametrize("head", HEADS)
def test_a_head_has_an_end(server: Server, head: str) -> None:
    answer = b""
    with connect(server) as connection:
        with contextlib.suppress(ConnectionError):  # it may close before all is sent
            connection.sendall(HEADS[head])
        answer = read_all(connection)
    assert refusal(answer) == (431, "head_too_large")


def test_a_head_of_almost_64_kib_is_read(server: Server) -> None:
    padding = b"A: " + b"x" * (MAX_HEAD - 200) + b"\r\n"
    data = b"GET /livez HTTP/1.1\r\n" + HOST + b"Connection: close\r\n" + padding + b"\r\n"
    assert statuses(ask(server, data)) == [200]


def test_small_chunks_are_no_large_head(server: Server, photo: bytes) -> None:
    head = b"POST /infer HTTP/1.1\r\n" + HOST + JPEG + CHUNKED + b"Connection: close\r\n\r\n"
    assert statuses(ask(server, head + in_chunks(photo * 4, 1))) == [200]


@pytest.mark.parametrize("whole", [True, False])
def test_what_comes_behind_a_body_is_no_header(server: Server, photo: bytes, whole: bool) -> None:
    """Whether it arrives with the head or later: no key, part or encoding of the request."""
    trailers = b"X-Part: 17\r\nX-Request-ID: mine\r\nContent-Encoding: gzip\r\n"
    head = b"POST /infer HTTP/1.1\r\n" + HOST + JPEG + CHUNKED + b"Connection: close\r\n\r\n"
    chunks = in_chunks(photo, len(photo)).removesuffix(b"\r\n")
    with connect(server) as connection:
        if whole:
            connection.sendall(head + chunks + trailers + b"\r\n")
        else:
            for piece in (head, chunks, trailers + b"\r\n"):
                connection.sendall(piece)
                time.sleep(0.05)
        answer = read_all(connection)
    assert statuses(answer) == [200]
    assert b"x-kensa-part" not in answer
    assert b"x-request-id: mine" not in answer


GARBAGE = {
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "noise": b"\x00\xff\x80\x81" * 100,
    "text": b"hello, is it me you're looking for?\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "CONNECT": b"CONNECT localhost:22 HTTP/1.1\r\n" + HOST + b"\r\n",
    "a WebSocket": b"GET /livez HTTP/1.1\r\n" + HOST
    + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n",
    "two lengths": b"POST /infer HTTP/1.1\r\n" + HOST
    + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
    "length and chunks": PIECES[:-2] + b"Content-Length: 1\r\n\r\n",
    "a bad length": b"POST /infer HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n",
    "a bad chunk": b"POST /infer HTTP/1.1\r\n" + HOST + CHUNKED + b"\r\nxyz\r\n",
    "a control character": b"GET /livez HTTP/1.1\r\n" + HOST + b"A: \x01\r\n\r\n",
    "a path that is none": b"GET livez HTTP/1.1\r\n" + HOST + b"\r\n",
}  # fmt: skip


@pytest.mark.parametrize("garbage", GARBAGE)
def test_what_is_not_http_is_refused_in_the_agreed_form(server: Server, garbage: str) -> None:
    assert refusal(ask(server, GARBAGE[garbage])) == (400, "bad_http")


def test_garbage_after_a_request_does_not_take_its_answer(server: Server, photo: bytes) -> None:
    for garbage in (b"\x01\x02\r\n\r\n", HEADS["an endless header"][: 3 * MAX_HEAD]):
        data = post("/infer", photo, JPEG) + garbage
        assert statuses(ask(server, data)) == [200]


def test_requests_one_after_the_other_are_answered_in_order(server: Server, photo: bytes) -> None:
    paths = [b"/livez", b"/nope", b"/healthz", b"/models"] * 4
    ends = [b""] * 15 + [b"Connection: close\r\n"]
    data = b"".join(
        b"GET %s HTTP/1.1\r\n%s%s\r\n" % (path, HOST, end)
        for path, end in zip(paths, ends, strict=True)
    )
    assert statuses(ask(server, data)) == [200, 404, 200, 200] * 4


def test_requests_that_wait_in_a_connection_are_counted(server: Server) -> None:
    answered = statuses(ask(server, LIVEZ * 5000))
    assert answered == [200] * (MAX_PIPELINED + 1)


def test_javas_client_is_answered_and_its_body_is_read(server: Server, photo: bytes) -> None:
    upgrade = (
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAA\r\n"
    )
    request = post("/infer", photo, JPEG, upgrade)
    with connect(server) as connection:
        for cut in (len(request), 100, request.index(b"\r\n\r\n") + 4, 5000):
            connection.sendall(request[:cut])
            time.sleep(0.1)
            connection.sendall(request[cut:])
            answer = read_one(connection)
            assert statuses(answer) == [200], answer
            assert b'"label"' in answer


# Too many


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for eight connections, without a model."""
    settings = {"KENSA_MAX_CONNECTIONS": "8", "KENSA_RECEIVE_S": "30"}
    with serving(tmp_path_factory.mktemp("small"), **settings) as running:
        running.client.close()
        yield running


def is_open(connection: socket.socket) -> bool:
    connection.settimeout(0.05)
    try:
        return connection.recv(65536) != b""
    except TimeoutError:
        return True


def test_the_connection_that_is_idle_longest_makes_room(small: Server) -> None:
    with contextlib.ExitStack() as stack:
        first = [stack.enter_context(connect(small)) for _ in range(8)]
        for connection in first[::-1]:  # so the last of them has been idle longest
            connection.sendall(LIVEZ)
            assert statuses(read_one(connection)) == [200]
        more = [stack.enter_context(connect(small)) for _ in range(3)]
        for connection in more:
            connection.sendall(LIVEZ)
            assert statuses(read_one(connection)) == [200]
        assert eventually(lambda: not any(is_open(one) for one in first[5:]))
        assert all(is_open(one) for one in first[:5])


def test_when_all_are_at_work_one_more_is_refused(small: Server) -> None:
    upload = post("/datasets/bolt/train?name=a.jpg", bytes(MIB), JPEG)[: 1024 * 900]
    with contextlib.ExitStack() as stack:
        busy = [stack.enter_context(connect(small)) for _ in range(8)]
        for connection in busy:
            connection.sendall(upload)
        uploads = small.log.parent / "data" / "datasets" / "uploads"
        assert eventually(lambda: len([*uploads.rglob("0")]) == 8)
        answer = ask(small, LIVEZ)
        assert refusal(answer) == (503, "too_many_connections")
        assert b"\r\nretry-after: " in answer
        for _ in range(4):  # nor do those take a place who stay after they were refused
            more = stack.enter_context(connect(small))
            assert refusal(read_one(more)) == (503, "too_many_connections")
        assert all(is_open(one) for one in busy)
        busy[3].close()
        assert eventually(lambda: statuses(ask(small, LIVEZ, shut=True)) == [200])


def test_a_flood_of_connections_does_not_use_up_the_files(small: Server) -> None:
    files = Path(f"/proc/{small.process.pid}/fd")
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connect(small))
        most = 8 + connections.SPARE + 60
        assert eventually(lambda: len(list(files.iterdir())) < most)
        answer = ask(small, LIVEZ, shut=True)
    assert statuses(answer) == [200]


@pytest.mark.parametrize(
    ("soft", "hard", "raised_to", "fit"),
    [(2048, 4096, None, 512), (256, 4096, 1088, 512), (256, 600, 600, 24), (64, 100, 100, 8)],
)
def test_the_limit_of_open_files_is_raised_to_fit(
    soft: int, hard: int, raised_to: int | None, fit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    assert room_for_connections(512) == fit
    assert asked == ([] if raised_to is None else [(raised_to, hard)])


# Stopping


def test_it_stops_within_its_time_and_answers_what_it_can(
    kensa_model: Path, tmp_path: Path, photo: bytes
) -> None:
    """Within KENSA_SHUTDOWN_GRACE_S, 5 unless it is set, and the moment that the rest takes."""
    settings = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_MODEL_NAME": "part",
                "KENSA_RECEIVE_S": "300"}  # fmt: skip
    large = cv2.imencode(".png", np.zeros((3000, 3000, 3), np.uint8))[1].tobytes()
    upload = post("/datasets/bolt/train?name=a.jpg", photo, JPEG)
    stuck = post("/datasets/bolt/train?name=b.jpg", photo + bytes(9), JPEG)[:-9]
    with serving(tmp_path, **settings) as running, contextlib.ExitStack() as stack:
        job = queued_job(running)
        idle, head, late, never, engine, follower = (
            stack.enter_context(connect(running)) for _ in range(6)
        )
        idle.sendall(LIVEZ)
        assert statuses(read_one(idle)) == [200]
        head.sendall(LIVEZ[:20])
        late.sendall(upload[:-100])
        never.sendall(stuck)
        follower.sendall(b"GET /jobs/%s/events HTTP/1.1\r\n%s\r\n" % (job.encode(), HOST))
        assert statuses(read_one(follower)) == [200]
        engine.sendall(post("/infer", large, b"Content-Type: image/png\r\n"))
        uploads = tmp_path / "data" / "datasets" / "uploads"
        assert eventually(lambda: len([*uploads.rglob("0")]) == 2)
        running.client.get("/livez")  # what came before has arrived as well
        running.client.close()
        began = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        late.sendall(upload[-100:])
        assert statuses(read_all(late)) == [201]
        assert statuses(read_all(engine)) == [200]
        assert read_all(follower).endswith(b"0\r\n\r\n")
        assert read_all(idle) == read_all(head) == b""
        assert refusal(read_all(never)) == (503, "not_ready")
        assert running.process.wait(timeout=60) == 0
        took = time.monotonic() - began
    print(f"\nstopped after {took:.2f} s")
    assert took < 15  # three times as long as it may
    assert "Traceback" not in running.log.read_text()


def queued_job(server: Server) -> str:
    """A job that waits for ever: this server has no worker."""
    answer = server.client.post("/convert", json={"model": "part"})
    for _ in range(100):
        if answer.status_code == 202:
            break
        time.sleep(0.1)
        answer = server.client.post("/convert", json={"model": "part"})
    assert answer.status_code in (202, 409), answer.text
    found = re.search(r"convert-[0-9a-f]{12}", answer.text)
    assert found
    return found[0]


# Everything at once


def reset(connection: socket.socket) -> None:
    """Close with a TCP reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


class Mixture:
    """Requests of every kind, chosen at random; what was answered is counted."""

    def __init__(self, server: Server, photo: bytes, job: str) -> None:
        self.server, self.photo = server, photo
        self.events = b"GET /jobs/%s/events HTTP/1.1\r\n%s\r\n" % (job.encode(), HOST)
        self.damaged = [file.data for file in damaged()]
        self.kinds: list[Callable[[random.Random], bytes]] = [
            self.kept, self.kept, self.fresh, self.half_closed, self.reset_after, self.reset_within,
            self.vanish, self.vanish_in_upload, self.chunked, self.too_long, self.too_long_chunked,
            self.too_much_json, self.damaged_image, self.wrong_route, self.form, self.upload,
            self.pipelined, self.garbage, self.foreign, self.unread, self.follower, self.h2c,
        ]  # fmt: skip
        self.counts: Counter[tuple[str, int]] = Counter()
        self._lock = threading.Lock()
        self._own = threading.local()

    def run(self, count: int, seed: int, threads: int = 8) -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(
                pool.map(
                    self._some, [(seed, thread, count // threads) for thread in range(threads)]
                )
            )

    def _some(self, part: tuple[int, int, int]) -> None:
        seed, thread, count = part
        chance = random.Random(f"{seed}.{thread}")
        for number in range(count):
            kind = chance.choice(self.kinds)
            if seed == 0:  # each, one after the other
                kind = self.kinds[(number + thread * count) % len(self.kinds)]
            try:
                answered = statuses(kind(chance))
            except (ConnectionError, http.client.HTTPException):
                answered = [0]  # closed or reset under the client's hands
            with self._lock:
                self.counts.update((kind.__name__, status) for status in answered or [0])
        if hasattr(self._own, "connection"):
            self._own.connection.close()
            del self._own.connection

    def _ask(self, data: bytes, answers: int = 1) -> bytes:
        """Send this, read so many whole answers, close."""
        with connect(self.server) as connection:
            connection.sendall(data)
            answer = b""
            while answer.count(b"\r\n\r\n") < answers or not answer.endswith((b"}", b"\n")):
                more = connection.recv(MIB)
                if not more:
                    break
                answer += more
            return answer

    def kept(self, chance: random.Random) -> bytes:
        if not hasattr(self._own, "connection"):
            port = int(self.server.url.rpartition(":")[2])
            self._own.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        kept: http.client.HTTPConnection = self._own.connection
        try:
            if chance.random() < 0.5:
                kept.request("GET", chance.choice(["/livez", "/healthz", "/models", "/jobs"]))
            else:
                kept.request("POST", "/infer", self.photo, {"Content-Type": "image/jpeg"})
            answer = kept.getresponse()
            answer.read()
            return b"HTTP/1.1 %d " % answer.status
        except (ConnectionError, http.client.HTTPException):  # it had been idle too long
            kept.close()
            raise

    def fresh(self, chance: random.Random) -> bytes:
        path = chance.choice([b"/livez", b"/readyz", b"/models", b"/datasets", b"/openapi.json"])
        return self._ask(b"GET %s HTTP/1.1\r\n%sConnection: close\r\n\r\n" % (path, HOST))

    def half_closed(self, chance: random.Random) -> bytes:
        data = chance.choice([LIVEZ, post("/infer", self.photo, JPEG)])
        return ask(self.server, data, shut=True)

    def reset_after(self, chance: random.Random) -> bytes:
        connection = connect(self.server)
        connection.sendall(chance.choice([LIVEZ, post("/infer", self.photo, JPEG), self.events]))
        time.sleep(chance.random() * 0.02)
        reset(connection)
        return b""

    def reset_within(self, chance: random.Random) -> bytes:
        data = post("/infer", self.photo, JPEG)
        connection = connect(self.server)
        connection.sendall(data[: chance.randrange(len(data))])
        time.sleep(chance.random() * 0.02)
        reset(connection)
        return b""

    def vanish(self, chance: random.Random) -> bytes:
        data = post("/infer", self.photo, JPEG)
        with connect(self.server) as connection:
            connection.sendall(data[: chance.randrange(len(data) + 1)])
        return b""

    def vanish_in_upload(self, chance: random.Random) -> bytes:
        form = b"Content-Type: multipart/form-data; boundary=b\r\n"
        start = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n'
        body = start + bytes(3 * MIB)
        path = chance.choice(["/datasets/bolt/train", "/models?name=bolt", "/infer"])
        data = post(path, body, form)
        with connect(self.server) as connection:
            connection.sendall(data[: chance.randrange(2 * MIB)])
            if chance.random() < 0.5:
                reset(connection)
        return b""

    def chunked(self, chance: random.Random) -> bytes:
        head = b"POST /infer HTTP/1.1\r\n" + HOST + JPEG + CHUNKED + b"\r\n"
        return self._ask(head + in_chunks(self.photo, chance.randrange(500, 9000)))

    def too_long(self, chance: random.Random) -> bytes:
        path = chance.choice([b"/infer", b"/datasets/bolt/train?name=a.jpg"])
        length = b"Content-Length: %d\r\n\r\n" % (10 * 1024**3)
        return self._ask(b"POST %s HTTP/1.1\r\n%s%s%s" % (path, HOST, JPEG, length) + bytes(5000))

    def too_long_chunked(self, chance: random.Random) -> bytes:
        head = b"POST /convert HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
        return self._ask(head + CHUNKED + b"\r\n" + in_chunks(bytes(MIB + 1), 65536))

    def too_much_json(self, chance: random.Random) -> bytes:
        return self._ask(post("/retrain", bytes(MIB + 1), b"Content-Type: application/json\r\n"))

    def damaged_image(self, chance: random.Random) -> bytes:
        return self._ask(post("/infer", chance.choice(self.damaged), JPEG))

    def wrong_route(self, chance: random.Random) -> bytes:
        method, path = chance.choice([(b"GET", b"/nope"), (b"PUT", b"/infer"), (b"GET", b"/infer"),
                                      (b"DELETE", b"/models"), (b"GET", b"/jobs/x")])  # fmt: skip
        return self._ask(b"%s %s HTTP/1.1\r\n%s\r\n" % (method, path, HOST))

    def form(self, chance: random.Random) -> bytes:
        start = b'--b\r\nContent-Disposition: form-data; name="%s"; filename="a"\r\n\r\n'
        name = chance.choice([b"file", b"file", b"image"])
        body = start % name + self.photo + b"\r\n--b--\r\n"
        return self._ask(post("/infer", body, b"Content-Type: multipart/form-data; boundary=b\r\n"))

    def upload(self, chance: random.Random) -> bytes:
        path = f"/datasets/bolt/train?name={chance.randrange(20)}.jpg&replace=true"
        return self._ask(post(path, self.photo, JPEG))

    def pipelined(self, chance: random.Random) -> bytes:
        count = chance.randrange(2, 6)
        data = (LIVEZ + post("/infer", self.photo, JPEG)) * count
        return ask(self.server, data + LIVEZ.replace(HOST, HOST + b"Connection: close\r\n"))

    def garbage(self, chance: random.Random) -> bytes:
        start = chance.choice([b"", LIVEZ[:20], LIVEZ])
        return ask(self.server, start + b"\x00\xff" + chance.randbytes(200) + b"\r\n\r\n")

    def foreign(self, chance: random.Random) -> bytes:
        header = chance.choice([b"Origin: http://evil.example\r\n", b"Host: evil.example\r\n"])
        return self._ask(post("/infer", self.photo, JPEG, header))

    def unread(self, chance: random.Random) -> bytes:
        with connect(self.server) as connection:
            connection.sendall(PAGE)
            connection.recv(chance.randrange(1, 5000))
        return b""

    def follower(self, chance: random.Random) -> bytes:
        with connect(self.server) as connection:
            connection.sendall(self.events)
            answer = connection.recv(65536)
            reset(connection)
        return answer

    def h2c(self, chance: random.Random) -> bytes:
        upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"
        return self._ask(post("/infer", self.photo, JPEG, upgrade))


@dataclass(frozen=True)
class Held:
    """What a server process holds."""

    threads: int
    files: Counter[str]
    database: int  # connections to the queue, a pool of as many as there are threads for it
    temporary: int

    @classmethod
    def by(cls, server: Server) -> Held:
        process = Path(f"/proc/{server.process.pid}")
        files: Counter[str] = Counter()
        for one in (process / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                files[re.sub(r"\d+", "N", str(one.readlink()))] += 1
        uploads = server.log.parent / "data" / "datasets" / "uploads"
        database = sum(files.pop(name) for name in [*files] if "/jobs.sqlite" in name)
        threads = len(list((process / "task").iterdir()))
        return cls(threads, files, database, len(list(uploads.iterdir())))


def settled(server: Server, within_s: float) -> Held:
    """What it holds once no connection is open but the listening one, and nothing changes."""
    last, since = Held.by(server), time.monotonic()
    end = since + within_s
    while time.monotonic() < end and time.monotonic() - since < 1.5:
        time.sleep(0.1)
        now = Held.by(server)
        if now != last or now.temporary:
            last, since = now, time.monotonic()
    return last


def mix(server: Server, photo: bytes, count: int) -> None:
    server.client.close()
    with contextlib.closing(http.client.HTTPConnection(server.url.removeprefix("http://"))) as one:
        for _ in range(100):  # the queue is there a moment after the server
            one.request("GET", "/jobs")
            if one.getresponse().read().startswith(b'{"jobs"'):
                break
            time.sleep(0.1)
        one.request("POST", "/convert", b'{"model": "part"}', {"Content-Type": "application/json"})
        found = re.search(r"convert-[0-9a-f]{12}", one.getresponse().read().decode())
        assert found
    mixture = Mixture(server, photo, found[0])
    with ThreadPoolExecutor(16) as pool:  # of threads and of database connections: to their size
        for path in (b"/jobs", b"/models", b"/datasets"):
            request = LIVEZ.replace(b"/livez", path)
            list(pool.map(lambda data: ask(server, data, shut=True), [request] * 48))
    mixture.run(8 * len(mixture.kinds), seed=0, threads=16)
    before, memory = settled(server, 60), server.memory("VmRSS")
    mixture.counts.clear()
    seed = random.randrange(1, 10**6)
    began = time.monotonic()
    mixture.run(count, seed)
    took = time.monotonic() - began
    after = settled(server, 60)
    print(
        f"\n{count} requests, seed {seed}, in {took:.1f} s: {sum(mixture.counts.values())} answers"
    )
    by_kind: dict[str, dict[int, int]] = {}
    for (kind, status), number in sorted(mixture.counts.items()):
        by_kind.setdefault(kind, {})[status] = number
    for kind, answered in by_kind.items():
        print(f"  {kind:18} {answered}")
    print(f"before: {before.threads} threads, {before.files.total()} files; "
          f"after: {after.threads} threads, {after.files.total()} files, "
          f"{after.temporary} temporary; memory {memory / MIB:.0f} -> "
          f"{server.memory('VmRSS') / MIB:.0f} MiB")  # fmt: skip
    assert (after.files, after.temporary) == (before.files, 0)
    assert after.threads <= before.threads + 2  # of pools that had never been that busy
    assert after.database <= 3 * THREADS_OF_THE_QUEUE
    assert set(by_kind) == {kind.__name__ for kind in mixture.kinds}
    failures = {status for _, status in mixture.counts if status >= 500}
    assert failures <= {503}
    for kind in ("kept", "fresh", "half_closed", "chunked", "form", "upload", "pipelined", "h2c"):
        assert by_kind[kind].get(200, 0) + by_kind[kind].get(201, 0) > 0
    assert "Traceback" not in server.log.read_text()


def test_300_requests_of_every_kind_leave_nothing_behind(
    kensa_model: Path, tmp_path: Path, photo: bytes
) -> None:
    settings = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_MODEL_NAME": "part", **SETTINGS}
    with serving(tmp_path, **settings, KENSA_KEEP_ALIVE_S="1") as running:
        mix(running, photo, 300)


@pytest.mark.soak
def test_10000_requests_of_every_kind_leave_nothing_behind(
    kensa_model: Path, tmp_path: Path, photo: bytes
) -> None:
    settings = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_MODEL_NAME": "part", **SETTINGS}
    with serving(tmp_path, **settings, KENSA_KEEP_ALIVE_S="1") as running:
        mix(running, photo, 10_000)
