"""Claims about the first seconds: the port is open, says so, and signals are heard."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.project import ROOT
from support.server import serving

OPENS_SLOWLY = """
import asyncio, sys, time
from app.serving.rollout import Rollout
begin = Rollout.open
async def slowly(self):
    time.sleep(1)  # as an import does, which holds the thread of the event loop
    await asyncio.sleep(1)
    await begin(self)
Rollout.open = slowly
sys.argv = ["kensa"]
from app.__main__ import main
main()
"""


COUNTS_OBJECTS = """
import gc, sys
from app.http.starting import Starting
end = Starting.end
def counted(self):
    end(self)
    sys.stderr.write(f"passed over: {gc.get_freeze_count()}, others: {len(gc.get_objects())}\\n")
    sys.stderr.write(f"loaded: {' '.join(sys.modules)}\\n")
Starting.end = counted
sys.argv = ["kensa"]
from app.__main__ import main
main()
"""


@contextmanager
def starting(folder: Path, *before: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A server that takes two seconds to open its models, and its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {"KENSA_PORT": str(port), "KENSA_WORKER": "off", "KENSA_LOG_LEVEL": "error"}
    folders = {"KENSA_DATA_DIR": str(folder / "data"), "KENSA_CACHE_DIR": str(folder / "cache")}
    process = subprocess.Popen(
        [*before, sys.executable, "-c", OPENS_SLOWLY],
        cwd=ROOT,
        env={**os.environ, **variables, **folders},
        stderr=(folder / "log").open("wb"),
    )
    try:
        yield process, port
    finally:
        process.kill()
        process.wait()


def ask(port: int, method: str = "POST", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        client.request(method, "/infer?deadline_ms=200&part=A%2017", bytes(500_000), headers)
        answer = client.getresponse()
        return answer, answer.read()
    finally:
        client.close()


def until_open(port: int) -> None:
    for _ in range(1200):
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise AssertionError("nothing listens")


def test_until_it_is_ready_everybody_hears_so_at_once(tmp_path: Path) -> None:
    """From the first connection on nobody is kept waiting, closed out or reset."""
    with starting(tmp_path) as (_, port):
        until_open(port)
        waits, answers = [], []
        while True:
            began = time.monotonic()
            answer, body = ask(port, **{"Content-Type": "image/jpeg", "X-Request-ID": "Line-3.p1"})
            waits.append(time.monotonic() - began)
            found = json.loads(body)
            assert (answer.status, found["code"]) == (503, "not_ready")
            assert answer.headers["Retry-After"] == "2"
            back = answer.headers["X-Request-ID"], answer.headers["X-Kensa-Part"]
            assert back == ("Line-3.p1", "A 17")
            answers.append(found["error"])
            if "starting" not in found["error"]:  # the server itself, which has no model
                break
            time.sleep(0.02)
        assert len(answers) > 10
        assert max(waits) < 1, waits


def test_the_early_answer_is_a_line_for_who_wants_text_and_no_body_for_head(tmp_path: Path) -> None:
    with starting(tmp_path) as (_, port):
        until_open(port)
        answer, body = ask(port, Accept="text/plain")
        assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert body == b"ERR not_ready\n"
        answer, body = ask(port, "HEAD")
        assert (answer.status, body) == (503, b"")


def test_a_browser_that_comes_early_sees_a_page_that_looks_again(tmp_path: Path) -> None:
    with starting(tmp_path) as (_, port):
        until_open(port)
        answer, body = ask(port, "GET", Accept="text/html,application/xhtml+xml,*/*;q=0.8")
        assert (answer.status, answer.headers["Refresh"]) == (503, "2")
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        assert "起動中" in body.decode()
        assert body.endswith(b"</html>\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_starts_hears_that_it_should_stop(
    tmp_path: Path, number: signal.Signals
) -> None:
    with starting(tmp_path) as (process, port):
        until_open(port)
        process.send_signal(number)
        assert process.wait(timeout=30) == 0


def test_process_1_of_a_container_hears_it_too(tmp_path: Path) -> None:
    """Which the kernel passes no signal that it has no handler for."""
    unshare = shutil.which("unshare")
    alone = [unshare or "", "--pid", "--fork", "--kill-child"]
    if unshare is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("unshare may make no space of processes of its own here")
    with starting(tmp_path, *alone) as (process, port):
        until_open(port)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        os.kill(int(children), signal.SIGTERM)
        assert process.wait(timeout=30) == 0


def test_what_stays_as_long_as_the_server_is_not_searched_for_cycles(tmp_path: Path) -> None:
    """That stops all threads: a list of 500 jobs brought it on, and a part waited 0.1 s for it."""
    with serving(tmp_path, ("-c", COUNTS_OBJECTS)) as server:
        found = re.search(r"passed over: (\d+), others: (\d+)", server.log.read_text())
        assert found
        assert int(found[1]) > 100_000
        assert int(found[2]) < int(found[1]) / 20


def test_what_threads_need_is_imported_before_the_first_request(tmp_path: Path) -> None:
    """Anyio's took 35 ms of the event loop where a thread was first used."""
    with serving(tmp_path, ("-c", COUNTS_OBJECTS)) as server:
        assert " anyio._backends._asyncio" in server.log.read_text()
