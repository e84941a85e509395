"""Claims about GET /metrics and GET /healthz: what they count, and that they never wait."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from PIL import Image
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as text_metrics
from sqlalchemy.exc import OperationalError

from app.http.request_log import RequestLog
from app.main import create_app
from app.serving.inspection import Timing
from app.settings import Settings
from app.watching import health
from app.watching.health import JobCounts, State
from app.watching.metrics import Metrics
from engines.logs import note
from engines.machine.sensors import Device
from engines.meta import Meta
from support.damage import picture, saved, seeds
from support.fake_model import fake_model
from support.jetson import ORIN, laid_down
from support.line import NAME, line, variant
from support.server import RAW, ROOT, Server, serving
from support.waiting import until

PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
DASHBOARD = json.loads((ROOT / "docs" / "grafana" / "kensa.json").read_text(encoding="utf-8"))
STAGES = {"queue": "queue_ms", "decode": "decode_ms", "infer": "infer_ms", "inspection": "total_ms"}
NOT_EVERYWHERE = {
    *("kensa_gpu_load_ratio", "kensa_gpu_memory_bytes", "kensa_temperature_celsius"),
    *("kensa_drift_spreads", "kensa_drifting"),  # where KENSA_DRIFT_PARTS asks
    *("kensa_power_info", "kensa_throttled", "kensa_over_currents_total"),
}
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="needs Prometheus's promtool")


@pytest.fixture(scope="module")
def server(kensa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    settings = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_MODEL_NAME": "bracket"}
    settings |= {"KENSA_WORKER": "on", "KENSA_BATCHING": "on"}
    with serving(folder, **settings) as running:
        yield running


@pytest.fixture(scope="module")
def photo() -> bytes:
    return saved(Image.fromarray(picture(320, 320)), "PNG")


class Scrape:
    """What /metrics said at a moment."""

    def __init__(self, text: str) -> None:
        self.families = list(text_metrics(text))
        self.samples = {
            (one.name, frozenset(one.labels.items())): one.value
            for family in self.families
            for one in family.samples
        }

    def get(self, name: str, **labels: str) -> float:
        return self.samples.get((name, frozenset(labels.items())), 0.0)

    def having(self, name: str) -> list[dict[str, str]]:
        """The labels of all series of a name."""
        return [dict(labels) for known, labels in self.samples if known == name]


def scrape(server: Server) -> Scrape:
    answer = server.client.get("/metrics")
    assert answer.status_code == 200, answer.text
    return Scrape(answer.text)


def inside(app: Any, work: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    """Do work with a client of an application in this process."""

    async def go() -> Any:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
        ):
            app.state.inspector.residents.put(fake_model(1.5))
            return await work(client)

    return asyncio.run(go())


# What happened


def test_after_n_inspections_the_counters_say_n(server: Server, photo: bytes) -> None:
    before, n = scrape(server), 12
    answers = [(server.send_form if one % 2 else server.infer)(photo) for one in range(n)]
    bodies, after = [answer.json() for answer in answers], scrape(server)

    def grown(name: str, **labels: str) -> float:
        return after.get(name, **labels) - before.get(name, **labels)

    assert grown("kensa_requests_total", route="/infer", method="POST", status="200") == n
    assert grown("kensa_batch_size_sum", model="bracket") == n
    for label in ("Normal", "Anomaly"):
        judged = sum(body["label"] == label for body in bodies)
        assert grown("kensa_verdicts_total", model="bracket", label=label) == judged
    scores = sum(body["score"] for body in bodies)
    assert grown("kensa_score_sum", model="bracket") == pytest.approx(scores)
    for name, stage in STAGES.items():
        assert grown(f"kensa_{name}_seconds_count", model="bracket") == n
        took_ms = sum(body["timing"][stage] for body in bodies)  # each rounded to 0.01
        assert grown(f"kensa_{name}_seconds_sum", model="bracket") == pytest.approx(
            took_ms / 1000, abs=n * 0.006 / 1000
        )
    assert grown("kensa_infer_seconds_bucket", model="bracket", le="10.0") == n
    assert grown("kensa_infer_seconds_bucket", model="bracket", le="0.0005") == 0


def test_failures_are_counted_by_their_code(server: Server) -> None:
    asked: dict[tuple[str, str], Callable[[], httpx.Response]] = {
        ("/infer", "bad_image"): lambda: server.infer(b""),
        ("/infer", "unsupported_image"): lambda: server.infer(b"no image"),
        ("/infer", "unknown_model"): lambda: server.client.post("/infer?model=nope", headers=RAW),
        ("/infer", "bad_request"): lambda: server.client.post("/infer?heatmap=perhaps"),
        ("/infer", "method_not_allowed"): lambda: server.client.get("/infer"),
        ("/models/{name}", "unknown_model"): lambda: server.client.get("/models/nope"),
        ("none", "not_found"): lambda: server.client.get("/nope"),
    }
    before = scrape(server)
    statuses = [ask().status_code for ask in asked.values()]
    assert statuses == [400, 415, 404, 422, 405, 404, 404]
    after = scrape(server)
    for route, code in asked:
        labels = {"route": route, "code": code}
        grown = after.get("kensa_failures_total", **labels) - before.get(
            "kensa_failures_total", **labels
        )
        assert grown == 1, labels


def test_a_client_that_leaves_is_counted_and_is_no_failure(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    left = {"route": "/infer", "method": "POST", "status": "499"}
    before = scrape(server).get("kensa_requests_total", **left)
    head = b"POST /infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
    with closing(socket.create_connection((host, int(port)))) as connection:
        connection.sendall(head)
        time.sleep(0.2)
    until(lambda: scrape(server).get("kensa_requests_total", **left) == before + 1)


def test_an_answer_of_an_inner_middleware_is_counted_and_has_an_id() -> None:
    metrics, sent = Metrics("0"), []

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 403, "headers": []})
        await send({"type": "http.response.body", "body": b"no"})

    async def keep(message: Any) -> None:
        sent.append(message)

    scope: Any = {"type": "http", "method": "POST", "path": "/infer", "headers": []}
    asyncio.run(RequestLog(refuse, metrics)(scope, None, keep))  # type: ignore[arg-type]
    assert [name for name, _ in sent[0]["headers"]] == [b"x-request-id"]
    now = {
        (one.name, *one.labels.values()): one.value
        for family in metrics.registry.collect()
        for one in family.samples
    }
    assert now["kensa_requests_total", "none", "POST", "403"] == 1
    assert now["kensa_failures_total", "none", "other"] == 1


def test_names_that_nobody_knows_make_no_series(server: Server, photo: bytes) -> None:
    def ask(n: int) -> None:
        server.client.post("/infer", params={"model": f"nope{n}"}, content=photo, headers=RAW)
        server.client.get(f"/nope{n}")
        server.client.get(f"/models/nope{n}")
        server.client.get(f"/datasets/nope{n}/train/a.png")
        server.client.request(f"BREW{n}", "/infer")
        server.infer(photo, **{"X-Request-ID": f"nope{n}", "User-Agent": f"nope{n}"})

    ask(0)
    scrape(server)  # which is counted, too
    until(lambda: any(name == "kensa_jobs" for name, _ in scrape(server).samples))  # read by now
    before = scrape(server)
    for n in range(1, 20):
        ask(n)
    after = scrape(server)
    assert after.samples.keys() == before.samples.keys()
    assert not any("nope" in value for _, labels in after.samples for _, value in labels)


def test_swaps_are_counted_by_what_became_of_the_version(
    kensa_model: Path, photo: bytes, tmp_path: Path
) -> None:
    meta = Meta.read(kensa_model / "meta.json")
    limit, highest = meta.image_threshold_auto or 0, meta.raw_image_max or 0
    lenient = {"image_threshold_auto": limit * 100, "raw_image_max": highest * 100}
    strict = {"image_threshold_auto": limit / 100}
    settings = {"KENSA_ROLLBACK_PARTS": "5", "KENSA_ROLLBACK_MAX_REJECTS": "0.5"}
    with line(tmp_path, kensa_model, **settings) as running:
        (first,) = running.store.versions(NAME)
        held = running.publish(variant(kensa_model, tmp_path / "held", **lenient))
        damaged = variant(kensa_model, tmp_path / "damaged", bank=0.99)
        cut = running.publish(damaged, activate=False)
        bank = running.store.folder(NAME, cut) / "memory_bank.npz"
        bank.write_bytes(bank.read_bytes()[:-1] + b"?")
        assert running.activate(cut).status_code == 422
        assert running.wait(held, "live", "held") == "held"
        bad = running.publish(variant(kensa_model, tmp_path / "bad", **strict), max_flips=1.0)
        running.wait(bad, "live")
        for _ in range(5):
            assert running.server.infer(photo).json()["model_version"] == bad
        running.wait(bad, "held")
        assert running.activate(held).status_code == 200
        assert running.server.client.post(f"/models/{NAME}/rollback").status_code == 200
        assert _swaps(running.server) == {
            "live": 1, "held": 1, "refused": 1, "rolled_back": 1, "by_hand": 2, "failed": 0,
        }  # fmt: skip
        live = scrape(running.server).having("kensa_model_info")
        assert [one["version"] for one in live] == [first]


def _swaps(server: Server) -> dict[str, int]:
    now = scrape(server)
    return {
        labels["how"]: int(now.get("kensa_swaps_total", **labels))
        for labels in now.having("kensa_swaps_total")
    }


# How things are


def test_what_is_looked_up_is_what_the_machine_says(server: Server, tmp_path: Path) -> None:
    now, usage = scrape(server), shutil.disk_usage(tmp_path)
    body = server.client.get("/healthz").json()
    assert now.get("kensa_ready") == now.get("kensa_job_queue_up") == 1
    assert now.get("kensa_disk_size_bytes") == usage.total == body["disk"]["size_bytes"]
    assert now.get("kensa_disk_free_bytes") == pytest.approx(usage.free, rel=0.05)
    assert now.get("process_resident_memory_bytes") == pytest.approx(
        server.memory("VmRSS"), rel=0.1
    )
    assert now.get("kensa_cpus") == os.cpu_count()
    (model,) = now.having("kensa_model_info")
    live = body["models"][0]
    assert model == {
        "model": "bracket", **{k: live[k] for k in ("version", "kind", "runtime", "precision")}
    }  # fmt: skip
    taken = now.get("kensa_model_resident_bytes", model="bracket")
    assert 0 < taken < now.get("process_resident_memory_bytes")
    assert now.get("kensa_queue_length") == 0


def test_parts_that_wait_are_seen_while_they_wait(server: Server) -> None:
    large = saved(Image.fromarray(picture(1000, 1000)), "PNG")
    clients = [threading.Thread(target=server.infer, args=[large]) for _ in range(6)]
    for client in clients:
        client.start()
    longest = 0.0
    while any(client.is_alive() for client in clients):
        answer = httpx.get(f"{server.url}/metrics", trust_env=False)
        longest = max(longest, Scrape(answer.text).get("kensa_queue_length"))
    assert 2 <= longest <= 6


def test_a_worker_that_dies_is_named_and_counted(server: Server) -> None:
    until(lambda: scrape(server).get("kensa_worker_up") == 1)
    assert server.client.get("/healthz").json()["degraded"] == []
    pid = server.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    workers = [
        int(one) for one in children if "workers.jobs" in Path(f"/proc/{one}/cmdline").read_text()
    ]
    assert len(workers) == 1
    os.kill(workers[0], signal.SIGKILL)
    until(lambda: scrape(server).get("kensa_worker_restarts_total") == 1)
    until(lambda: scrape(server).get("kensa_worker_up") == 1)
    body = server.client.get("/healthz")
    assert body.status_code == 200
    assert body.json()["status"] == "ok"
    (sentence,) = body.json()["degraded"]
    assert sentence.startswith("The worker ended by itself and is started again")
    assert sentence.endswith("That makes 1 since the server's start.")


def test_a_scrape_does_not_wait_for_a_locked_queue(server: Server, tmp_path: Path) -> None:
    until(lambda: scrape(server).get("kensa_job_queue_up") == 1)
    (database,) = server.log.parent.glob("data/jobs.sqlite")
    with closing(sqlite3.connect(database, timeout=30)) as queue:
        queue.execute("BEGIN EXCLUSIVE")
        _is_quick(server)
        queue.execute("ROLLBACK")
    (tmp_path / "data").mkdir()
    with closing(sqlite3.connect(tmp_path / "data" / "jobs.sqlite")) as queue:
        queue.execute("CREATE TABLE something (x)")
        queue.execute("BEGIN EXCLUSIVE")
        with serving(tmp_path) as late:  # who finds it locked at its start
            _is_quick(late)
            now = scrape(late)
            assert now.get("kensa_job_queue_up") == 0
            assert not now.having("kensa_jobs")


def _is_quick(server: Server) -> None:
    for path in ("/metrics", "/healthz", "/metrics"):
        server.client.get(path, timeout=15)  # SQLite waits for 30, and the lock is never given back


class SlowJobs:
    """A queue that answers when it is let."""

    problem: str | None = None
    is_open = True

    def __init__(self) -> None:
        self.may_answer = threading.Event()
        self.asked = 0

    def count(self) -> dict[str, int]:
        self.asked += 1
        assert self.may_answer.wait(60)
        return {"queued": self.asked}


def test_a_queue_that_hangs_is_asked_once_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "WAIT_S", 30)
    jobs: Any = SlowJobs()

    async def go() -> None:
        now = 100.0
        queue = JobCounts(jobs, lambda: now)
        jobs.may_answer.set()
        assert await queue.look() == ({"queued": 1}, None)
        assert await queue.look() == ({"queued": 1}, None)  # fresh, so it is not asked again
        jobs.may_answer.clear()
        monkeypatch.setattr(health, "WAIT_S", 0.01)
        now += health.FRESH_S + 0.1
        known, problem = await queue.look()  # it comes though the queue does not answer
        assert (known, problem) == ({"queued": 1}, None)  # the last that is known
        now += health.STALE_S
        known, problem = await queue.look()
        assert known is None  # too old by now
        assert problem is not None
        assert re.fullmatch(r"The queue has not answered for \d s: something locks it.", problem)
        monkeypatch.setattr(health, "WAIT_S", 30)
        jobs.may_answer.set()
        assert await queue.look() == ({"queued": 2}, None)
        assert jobs.asked == 2

    asyncio.run(go())


def test_a_queue_that_cannot_be_read_is_named_until_it_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(health, "FRESH_S", 0.0)
    monkeypatch.setattr(health, "WAIT_S", 30)
    jobs: Any = SlowJobs()
    jobs.may_answer.set()
    failures: list[Exception] = [OperationalError("SELECT 1", {}, Exception("no\nroute"))]
    count = jobs.count

    def fail_once() -> dict[str, int]:
        if failures:
            raise failures.pop()
        return dict(count())

    jobs.count = fail_once

    async def go() -> None:
        queue = JobCounts(jobs)
        known, problem = await queue.look()
        assert known is None
        assert problem is not None
        assert re.fullmatch(r"The queue does not answer: .*no route.*\.", problem)
        assert await queue.look() == ({"queued": 1}, None)

    asyncio.run(go())


def test_a_queue_that_cannot_be_opened_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: Any = SlowJobs()
    jobs.is_open = False

    async def go() -> None:
        queue = JobCounts(jobs)
        assert await queue.look() == (None, None)  # it is being opened
        monkeypatch.setattr(health, "OPENING_S", 0.0)
        _, problem = await queue.look()
        assert problem is not None
        assert "is not open" in problem
        jobs.problem = "The queue is damaged."
        assert await queue.look() == (None, "The queue is damaged.")

    asyncio.run(go())


def test_two_applications_in_a_process_do_not_meet(tmp_path: Path) -> None:
    one, other = (
        create_app(Settings(data_dir=tmp_path / name, worker="off")) for name in ("1", "2")
    )

    async def infer(client: httpx.AsyncClient) -> Scrape:
        await client.post("/infer", content=seeds()["png_colour"], headers=RAW)
        return Scrape((await client.get("/metrics")).text)

    async def look(client: httpx.AsyncClient) -> Scrape:
        return Scrape((await client.get("/metrics")).text)

    counted, alone = inside(one, infer), inside(other, look)
    anomalous = {"model": "fake", "label": "Anomaly"}
    assert counted.get("kensa_verdicts_total", **anomalous) == 1
    assert alone.get("kensa_verdicts_total", **anomalous) == 0
    assert alone.having("kensa_verdicts_total"), "a series begins before its first part"


def test_a_short_disk_and_short_memory_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(Settings(data_dir=tmp_path, worker="off"))
    monkeypatch.setattr(health, "LOW_DISK", 1 << 62)
    monkeypatch.setattr(health, "LOW_MEMORY", 1 << 63)
    answer = inside(app, lambda client: client.get("/healthz"))
    assert answer.status_code == 200
    disk, memory = answer.json()["degraded"]
    assert disk.startswith(f"The disk of {tmp_path} has ")
    assert memory.startswith("Memory is short: ")


# A Jetson


def test_a_jetson_tells_its_gpu_memory_and_temperatures(tmp_path: Path) -> None:
    device = Device.read(laid_down(tmp_path, ORIN))
    assert device.gpu_load == 0.421
    assert device.gpu_memory == 805068 * 1024
    assert (device.memory_total, device.memory_available) == (7620840 * 1024, 3120000 * 1024)
    assert device.temperatures == {"cpu-thermal": 53.0, "gpu-thermal": 49.5}
    assert device.cpus == 2
    assert device.cpu_busy_s == (200 + 10 + 90 + 5) / os.sysconf("SC_CLK_TCK")
    assert device.power_mode == "25W"
    assert device.throttled == {"cpu": False, "gpu": True}
    assert device.over_currents == 38


def test_a_power_mode_without_a_name_is_its_number(tmp_path: Path) -> None:
    assert Device.read(laid_down(tmp_path, {"var/lib/nvpmodel/status": "pmode:0003"})) == Device(
        power_mode="3"
    )


@pytest.mark.parametrize(
    "path",
    ["sys/devices/platform/17000000.gpu/load", "sys/devices/platform/bus@0/17000000.gpu/load",
     "sys/devices/gpu.0/load"],
)  # fmt: skip
def test_the_load_of_a_gpu_is_found_where_other_boards_have_it(path: str, tmp_path: Path) -> None:
    assert Device.read(laid_down(tmp_path, {path: "1000"})).gpu_load == 1.0


def test_a_machine_that_tells_nothing_is_no_error(tmp_path: Path) -> None:
    assert Device.read(tmp_path) == Device()
    garbage = dict.fromkeys(ORIN, "ÿ garbage")
    assert Device.read(laid_down(tmp_path, garbage)) == Device()


def test_the_pages_show_a_jetson_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jetson = Device.read(laid_down(tmp_path / "root", ORIN))
    monkeypatch.setattr(health, "Device", SimpleNamespace(read=lambda: jetson))
    app = create_app(Settings(data_dir=tmp_path / "data", worker="off"))

    async def look(client: httpx.AsyncClient) -> tuple[Scrape, Any]:
        pages = [await client.get(path) for path in ("/metrics", "/healthz")]
        return Scrape(pages[0].text), pages[1].json()

    now, body = inside(app, look)
    assert now.get("kensa_gpu_load_ratio") == body["device"]["gpu_load"] == 0.421
    assert now.get("kensa_gpu_memory_bytes") == 805068 * 1024
    assert now.get("kensa_temperature_celsius", zone="cpu-thermal") == 53.0
    assert body["device"]["temperatures"]["gpu-thermal"] == 49.5
    assert now.get("kensa_power_info", mode="25W") == 1
    assert body["device"]["power_mode"] == "25W"
    assert [now.get("kensa_throttled", part=part) for part in ("cpu", "gpu")] == [0, 1]
    assert now.get("kensa_over_currents_total") == body["device"]["over_currents"] == 38
    assert "Too hot, and slowed down for it: gpu." in body["degraded"][0]


# The form


def test_open_metrics_come_where_they_are_asked_for(server: Server) -> None:
    accept = "application/openmetrics-text;version=1.0.0;q=0.9,text/plain;version=0.0.4;q=0.5"
    answer = server.client.get("/metrics", headers={"Accept": accept})
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert len(list(open_metrics(answer.text))) > 20
    for other in ("*/*", "text/html", "", "text/plain;version=0.0.4"):
        plain = server.client.get("/metrics", headers={"Accept": other})
        assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


def everything() -> Scrape:
    """All there is to say, as no single machine says it."""
    metrics = Metrics("0.1.0")
    metrics.request("/infer", "POST", 400)
    metrics.failure("/infer", "bad_image")
    jetson = Device(1, 1, 1, 0.5, 1, 1.0, {"gpu": 50.0}, "15W", {"gpu": False}, 0)
    state = State(
        models=[fake_model(1.0)], standing_in={"fake": None}, problems={},
        model_bytes={"fake": 1}, worker="running", learns=True, restarts=0,
        held_back=0.0, jobs={"queued": 0}, queue=None, disk_free=1,
        disk_size=1, device=jetson, drift={"fake": {"brightness": 0.5}}, drifting={"fake": 0},
    )  # fmt: skip
    return Scrape(metrics.expose(state, "")[0].decode())


def test_the_page_has_every_metric_as_it_is() -> None:
    rows = re.findall(r"^\| `(kensa_\w+)` \| (\w+) \|([^|]*)\|", PAGE, re.MULTILINE)
    written = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    there = {}
    for family in everything().families:
        if family.name.startswith("kensa_"):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels = {label for one in family.samples for label in one.labels} - {"le"}
            there[name] = family.type, labels
    assert written == there


def test_a_running_server_has_every_metric_of_the_page(server: Server) -> None:
    server.infer(b"no image")  # a failure, so that there is one
    now = scrape(server)
    names = {re.sub(r"_(bucket|sum|count)$", "", name) for name, _ in now.samples}
    written = set(re.findall(r"^\| `(kensa_\w+)`", PAGE, re.MULTILINE))
    assert written - names <= NOT_EVERYWHERE
    assert {name for name in names if name.startswith("kensa_")} <= written


@needs_promtool
def test_prometheus_finds_nothing_to_complain_of(server: Server) -> None:
    text = "\n".join(
        one for one in server.client.get("/metrics").text.splitlines() if "process_" not in one
    )
    done = subprocess.run(
        [str(PROMTOOL), "check", "metrics"], input=text + "\n", capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


# The dashboard and the alerts


def expressions() -> list[str]:
    targets = [target for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    notes = [one for one in DASHBOARD["annotations"]["list"] if "expr" in one]
    return [one["expr"] for one in [*targets, *notes]]


def test_every_metric_of_the_dashboard_and_the_alerts_is_exported(server: Server) -> None:
    server.infer(b"no image")
    exported = {name for name, _ in scrape(server).samples} | NOT_EVERYWHERE
    asked = [*expressions(), *(one["query"] for one in DASHBOARD["templating"]["list"])]
    asked.append(PAGE.split("## Alerts")[1].split("## Grafana")[0])
    named = {name for one in asked for name in re.findall(r"\b(?:kensa|process)_\w+", one)}
    assert len(named) > 25
    assert named <= exported


def test_the_dashboard_imports_as_it_is() -> None:
    assert "__inputs" not in DASHBOARD
    assert DASHBOARD["id"] is None
    variables = {one["name"] for one in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "instance", "model"}
    panels = DASHBOARD["panels"]
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["The line", "The models", "The machine", "The jobs"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"])
                 for y in range(at["y"], at["y"] + at["h"])}  # fmt: skip
        assert not cells & taken, panel["title"]
        taken |= cells
        for source in (panel, *panel.get("targets", [])):
            if panel["type"] != "row":
                assert source["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for used in re.findall(r"\$(?!__)\{?(\w+)", json.dumps(DASHBOARD)):
        assert used in variables


@needs_promtool
def test_prometheus_reads_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    plain = [
        one.replace("$__rate_interval", "1m").replace("$instance", ".*").replace("$model", ".*")
        for one in expressions()
    ]
    rules = [{"record": f"panel:{n}", "expr": one} for n, one in enumerate(plain)]
    path = tmp_path / "rules.yml"  # JSON is YAML
    path.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(plain)} rules found" in _checked("rules", path)


@needs_promtool
def test_prometheus_reads_the_examples_of_the_page(tmp_path: Path) -> None:
    scraping, alerts = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "key").write_text("secret")
    (tmp_path / "prometheus.yml").write_text(
        scraping.replace("/etc/prometheus/kensa.key", str(tmp_path / "key"))
    )
    (tmp_path / "alerts.yml").write_text(alerts)
    _checked("config", tmp_path / "prometheus.yml")
    assert f"{alerts.count('- alert:')} rules found" in _checked("rules", tmp_path / "alerts.yml")


def _checked(what: str, path: Path) -> str:
    done = subprocess.run([str(PROMTOOL), "check", what, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# What it costs


def test_what_counting_costs_is_little() -> None:
    """CPU time for each part, µs, beside a request that takes 270 and an inspection of 20,000."""
    metrics = Metrics("0")
    model = SimpleNamespace(name="part", version="0001-aaaaaaaaaaaa")
    verdict = SimpleNamespace(score=0.97, label="Anomaly", unusable=None)
    timing = Timing(queue_ms=0.2, decode_ms=4.0, infer_ms=18.0, total_ms=22.2)
    part: Any = SimpleNamespace(model=model, verdict=verdict, timing=timing)

    async def bare(scope: Any, receive: Any, send: Any) -> None:
        scope["route"] = SimpleNamespace(path="/infer")
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")] * 9})
        await send({"type": "http.response.body", "body": b""})

    async def counted(scope: Any, receive: Any, send: Any) -> None:
        metrics.batch("part", 1)
        metrics.inspected(part)
        note(model="part", version="0001-aaaaaaaaaaaa", label="Anomaly")
        await bare(scope, receive, send)

    async def took_us(app: Any, n: int = 1000) -> float:
        headers = [(b"host", b"x"), (b"content-type", b"image/jpeg"), (b"accept", b"*/*")]
        began = time.thread_time()
        for _ in range(n):
            scope = {"type": "http", "method": "POST", "path": "/infer", "headers": headers}
            await app(scope, None, _nowhere)
        return (time.thread_time() - began) / n * 1e6

    def least(app: Any) -> float:
        return min(asyncio.run(took_us(app)) for _ in range(10))

    cost = least(RequestLog(counted, metrics)) - least(bare)
    print(f"an id, a line that is not logged, and 8 metrics: {cost:.1f} µs")
    assert cost < 100


async def _nowhere(_: Any) -> None:
    pass
