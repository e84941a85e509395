"""Claims about the lines of the log and the ids of requests, with the real server."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from app.http.request_log import LINES_A_SECOND
from engines.logs import Text, begin, note, printable
from engines.store.versions import Store
from support.damage import damaged, odd_streams, picture, saved
from support.mutations import mutations
from support.plans import tiny_bundle
from support.server import RAW, ROOT, Server, serving

# The server, with a route that fails as nobody foresaw.
BROKEN = """
import app.main, sys
make = app.main.create_app

def create_app(settings):
    made = make(settings)

    @made.get("/boom")
    async def boom():
        raise ValueError("a secret\\n2026-11-23 00:00:00,000 INFO forged")

    return made

app.main.create_app = create_app
sys.argv = ["kensa"]
from app.__main__ import main
main()
"""
TEXT_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR) .*")


class Log:
    """What a server logged since the block began."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._since = server.log.stat().st_size

    def text(self) -> str:
        return self._server.log.read_bytes()[self._since :].decode()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text().splitlines()]


@contextmanager
def server_with(folder: Path, model: Path, **settings: str) -> Iterator[Server]:
    known = {"KENSA_MODEL_DIR": str(model), "KENSA_MODEL_NAME": "bracket"}
    with serving(folder, ("-c", BROKEN), **known, **settings) as running:
        yield running


def boom(server: Server, headers: Any = None) -> httpx.Response:
    """What nobody foresaw. uvicorn closes the connection, and logs a traceback, afterwards."""

    def traced() -> int:
        lines = server.log.read_text().splitlines(keepends=True)
        return sum("ValueError: a secret" in line and line.endswith("\n") for line in lines)

    before = traced()
    answer = httpx.get(f"{server.url}/boom", headers=headers, trust_env=False)
    end = time.monotonic() + 10
    while traced() == before:
        assert time.monotonic() < end, server.log.read_text()
        time.sleep(0.01)
    return answer


@pytest.fixture(scope="module")
def json_server(kensa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"KENSA_LOG_FORMAT": "json", "KENSA_LOG_LEVEL": "debug", "KENSA_WORKER": "on",
                "KENSA_MAX_IMAGE_BYTES": "50000"}  # fmt: skip
    with server_with(tmp_path_factory.mktemp("json"), kensa_model, **settings) as running:
        yield running


@pytest.fixture(scope="module")
def text_server(kensa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """As it is when nothing is set."""
    with server_with(tmp_path_factory.mktemp("text"), kensa_model) as running:
        yield running


@pytest.fixture(scope="module")
def photo() -> bytes:
    return saved(Image.fromarray(picture(100, 100)), "PNG")


# Ids


def test_every_answer_carries_an_id(json_server: Server, photo: bytes) -> None:
    client = json_server.client
    asked: dict[int, list[Callable[[dict[str, str]], httpx.Response]]] = {
        200: [
            *(lambda h, path=path: client.get(path, headers=h) for path in (
                "/", "/livez", "/readyz", "/healthz", "/metrics", "/docs", "/openapi.json",
                "/models", "/static-offline-docs/swagger-ui.css", "/datasets",
            )),
            lambda h: client.post("/infer", content=photo, headers={**RAW, **h}),
            lambda h: client.post("/infer", content=photo,
                                  headers={**RAW, **h, "Accept": "image/png"}),
        ],
        400: [lambda h: client.post("/infer", headers={**RAW, **h})],
        404: [lambda h: client.get("/nope", headers=h),
              lambda h: client.get("/static-offline-docs/nope", headers=h),
              lambda h: client.get("/jobs/nope", headers=h)],
        405: [lambda h: client.delete("/infer", headers=h)],
        413: [lambda h: client.post("/infer", content=bytes(60_000), headers={**RAW, **h})],
        415: [lambda h: client.post("/infer", content=b"x", headers={"Content-Type": "a/b", **h})],
        422: [lambda h: client.post("/infer?heatmap=perhaps", headers=h),
              lambda h: client.post("/retrain", json={}, headers=h)],
        500: [lambda h: boom(json_server, h)],
    }  # fmt: skip
    while client.get("/jobs").status_code == 503:
        time.sleep(0.1)
    for status, asks in asked.items():
        for n, ask in enumerate(asks):
            given = f"part-{status}.{n}"
            answer = ask({"X-Request-ID": given})
            assert (answer.status_code, answer.headers.get_list("x-request-id")) == (
                status, [given],
            )  # fmt: skip
            assert re.fullmatch(r"[0-9a-f]{32}", ask({}).headers["x-request-id"])


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "<script>", "a\tb", "é"])
def test_a_strange_id_is_replaced_everywhere(json_server: Server, given: str) -> None:
    headers = {b"X-Request-ID": given.encode("latin-1")}
    answers = [json_server.client.get(path, headers=headers) for path in ("/livez", "/nope")]
    for answer in (*answers, boom(json_server, headers)):
        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])


# JSON


def test_every_line_is_an_object_with_the_id_that_the_answer_carries(
    json_server: Server, photo: bytes
) -> None:
    time.sleep(1)  # many failed just now, and not each of them has a line
    log = Log(json_server)
    good = json_server.infer(photo)
    bad = json_server.infer(b"no image", **{"X-Request-ID": "line-3.part_17"})
    gone = json_server.client.get("/models/nope")
    by_id = {line["request_id"]: line for line in log.lines() if "request_id" in line}
    for answer in (good, bad, gone):
        line = by_id[answer.headers["x-request-id"]]
        assert line["status"] == answer.status_code
        assert line["logger"] == "kensa.http"
        assert line["ms"] > 0
        stamped = datetime.fromisoformat(line["time"])
        assert abs(datetime.now(timezone.utc) - stamped) < timedelta(seconds=60)
        assert stamped.utcoffset() == timedelta(0)
    ok, failed = by_id[good.json()["id"]], by_id["line-3.part_17"]
    assert (ok["level"], ok["method"], ok["route"]) == ("DEBUG", "POST", "/infer")
    assert (ok["model"], ok["version"], ok["label"]) == (
        "bracket", good.json()["model_version"], good.json()["label"],
    )  # fmt: skip
    assert (failed["level"], failed["code"]) == ("WARNING", bad.json()["code"])
    assert failed["error"] == bad.json()["error"]
    missing = by_id[gone.headers["x-request-id"]]
    assert (missing["route"], missing["path"]) == ("/models/{name}", "/models/nope")


def test_the_whole_log_is_json_also_of_the_worker_and_of_uvicorn(json_server: Server) -> None:
    time.sleep(1)
    log = Log(json_server)
    answer = boom(json_server, {"X-Request-ID": "the-one"})
    assert answer.json()["code"] == "internal_error"
    assert "secret" not in answer.text
    line, traced = (one for one in log.lines() if one.get("request_id") == "the-one")
    assert (line["level"], line["status"], line["code"]) == ("ERROR", 500, "internal_error")
    assert traced["logger"] == "uvicorn.error"
    assert "ValueError: a secret" in traced["exception"]
    end = time.monotonic() + 30
    while "Waiting for jobs" not in json_server.log.read_text():
        assert time.monotonic() < end
        time.sleep(0.1)
    every = [json.loads(line) for line in json_server.log.read_text().splitlines()]
    assert all({"level", "logger", "message", "time"} <= set(line) for line in every)
    assert {"kensa", "kensa.http", "kensa.worker", "uvicorn.error"} <= {
        line["logger"] for line in every
    }


def test_dbos_and_warnings_speak_as_the_others_do() -> None:
    program = (
        "import logging, warnings; from engines.logs import set_up; set_up('info', 'json')\n"
        "from dbos._logger import init_logger; init_logger()\n"
        "logging.getLogger('dbos').warning('a row\\nis lost')\n"
        "warnings.warn('this goes away', DeprecationWarning)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", program],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["logger"] for line in lines] == ["dbos", "py.warnings"]
    assert lines[0]["message"] == "a row\nis lost"


def test_damaged_pictures_leave_no_line_that_is_not_the_logs_own(
    tmp_path: Path,
) -> None:
    """libpng and libtiff write to stderr by themselves, in their own form."""
    store = Store(tmp_path / "data" / "models")
    store.activate("part", store.take_in("part", tiny_bundle(tmp_path / "part"), {}))
    files = [*damaged(), *odd_streams(), *mutations("png", 60), *mutations("tiff", 60)]
    with serving(tmp_path, KENSA_LOG_FORMAT="json", KENSA_LOG_LEVEL="debug") as server:
        found = {server.client.post("/infer", content=one.data).status_code for one in files}
        assert found >= {400, 415}
        assert found <= {200, 400, 413, 415}
        uploads = [("file", (f"{number}.png", one.data)) for number, one in enumerate(files)]
        server.client.post("/datasets/part/train", files=uploads)
        lines = server.log.read_text().splitlines()
    assert len(lines) > 10
    for line in lines:
        assert {"level", "logger", "message", "time"} <= set(json.loads(line)), line


# Text


def test_what_is_logged_at_which_level(text_server: Server, photo: bytes) -> None:
    log = Log(text_server)
    client = text_server.client
    for path in ("/livez", "/readyz", "/healthz", "/metrics", "/models", "/docs"):
        assert client.get(path).status_code == 200
    for _ in range(3):
        assert text_server.infer(photo).status_code == 200
    assert log.text() == "", "at the usual level neither parts nor looks are news"
    version = text_server.infer(photo).json()["model_version"]
    client.post(f"/models/bracket/versions/{version}/activate")
    changed = log.text()
    assert changed.count("\n") == 1
    assert f" INFO POST /models/bracket/versions/{version}/activate 200 in " in changed
    client.get("/nope")
    boom(text_server)
    assert " WARNING GET /nope 404 in " in log.text()
    assert " ERROR GET /boom 500 in " in log.text()


def test_a_probe_that_fails_again_and_again_is_no_news(tmp_path: Path) -> None:
    with serving(tmp_path) as empty:
        log = Log(empty)
        for path in ("/readyz", "/healthz") * 3:
            assert empty.client.get(path).status_code == 503
        assert log.text() == ""


def test_a_client_cannot_forge_a_line(text_server: Server) -> None:
    log = Log(text_server)
    forged = "2026-11-23%2000:00:00,000%20INFO%20all%20is%20well"
    paths = [f"/nope%0A{forged}", f"/nope%0D%0A{forged}", f"/nope%E2%80%A8{forged}",
             f"/nope%C2%85{forged}", "/nope%1B[2J%1B[31m", f"/models/a%0A{forged}",
             f"/infer?model=a%0A{forged}"]  # fmt: skip
    for path in paths:
        text_server.client.post(path, headers={"X-Request-ID": "a\tb"})
    boom(text_server)  # a traceback whose message has two lines
    said = log.text()
    lines = said.split("\n")[:-1]
    assert lines == said.splitlines()
    heads = [line for line in lines if not line.startswith("    ")]
    assert len(heads) == len(paths) + 2  # the traceback has a line of uvicorn's
    assert all(TEXT_LINE.fullmatch(line) for line in heads)
    assert all(" POST " in line for line in heads[:-2])
    assert not any(line.startswith("2026-11-23 00:00:00") for line in lines)
    assert "\x1b" not in said


def test_nothing_of_a_request_but_its_path_is_logged(
    json_server: Server, text_server: Server
) -> None:
    secrets = ("kensa_key_1", "kensa_key_2", "kensa_key_3", "kensa_key_4", "IMAGEBYTES")
    for server in (json_server, text_server):
        log = Log(server)
        for path in ("/infer", "/models", "/retrain", "/nope"):
            server.client.post(
                path,
                params={"key": secrets[0]},
                headers={"Authorization": f"Bearer {secrets[1]}", "X-API-Key": secrets[2],
                         "Cookie": f"a={secrets[3]}"},
                content=b"IMAGEBYTES" * 50,
            )  # fmt: skip
        said = log.text()
        assert said.count("/retrain") >= 1
        assert not [secret for secret in secrets if secret in said]


def test_many_failures_do_not_fill_the_disk(text_server: Server) -> None:
    time.sleep(1)  # what failed in the second before counts, too
    log = Log(text_server)
    n, began = 300, time.monotonic()
    for _ in range(n):
        text_server.infer(b"no image")
    seconds = time.monotonic() - began
    time.sleep(1)
    text_server.client.get("/nope")  # the next failure says how many had no line
    said = log.text()
    listed = said.count(" POST /infer 415 ")
    assert LINES_A_SECOND <= listed <= LINES_A_SECOND * (seconds + 2)
    left_out = sum(int(one) for one in re.findall(r"(\d+) more requests failed", said))
    assert listed + left_out == n


def test_lines_outside_of_a_request_have_no_id() -> None:
    note(model="bracket")  # there is nothing to add to, and that is no error
    record = logging.LogRecord("kensa", logging.INFO, "", 0, "Loaded %s", ("検査 1",), None)
    assert Text("worker").format(record).endswith(" INFO worker: Loaded 検査 1")
    assert begin("a") == {"request_id": "a"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("検査 é \\", "検査 é \\"),
        ("a\nb\r\x1b[0m", r"a\nb\r\x1b[0m"),
        ("\u2028\ud800", r"\u2028\ud800"),
    ],
)
def test_control_characters_are_shown_as_python_writes_them(text: str, shown: str) -> None:
    assert printable(text) == shown
