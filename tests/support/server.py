"""A server process of its own, and what tests do with it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from support.forking import forked
from support.project import ROOT

RAW = {"Content-Type": "application/octet-stream"}


class Compiled:
    """What one server has compiled, the next one need not: a folder of this run (conftest.py)."""

    folder: Path | None = None


@dataclass
class Server:
    """A server process, and a client that keeps its connection."""

    process: subprocess.Popen[bytes]
    client: httpx.Client
    url: str
    log: Path

    def infer(self, data: bytes, **headers: str) -> httpx.Response:
        return self.client.post("/infer", content=data, headers={**RAW, **headers})

    def send_form(self, data: bytes, **headers: str) -> httpx.Response:
        return self.client.post("/infer", files={"file": ("part", data)}, headers=headers)

    def cpu_seconds(self) -> float:
        """What all its threads have computed until now, however long that took."""
        return cpu_seconds(self.process.pid)

    def memory(self, line: str) -> int:
        """VmRSS (memory now) or VmHWM (its highest), bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"{line}:\s+(\d+) kB", status)
        assert found
        return int(found[1]) * 1024


def cpu_seconds(process: int) -> float:
    """CPU time that a process has used until now."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(folder: Path, program: Sequence[str] = (), **settings: str) -> Iterator[Server]:
    """A server at a free port, with its log in `folder`; stopped in the end.

    Args:
        program: what Python runs instead of `-m app`.
    """
    log = folder / "server.log"
    variables = {
        "KENSA_PORT": "0",
        "KENSA_CACHE_DIR": str(Compiled.folder or folder / "cache"),
        "KENSA_DATA_DIR": str(folder / "data"),
        "KENSA_WORKER": "off",
        "KENSA_JOB_SPARE": "off",  # a job is all that a worker of the tests does
        "KENSA_GATE_FOUND": "0",  # models of the tests see little, so that they are quick to make
        "KENSA_BATCHING": "off",  # whether batches pay is tried for a second at each start
        "KENSA_THREADS": "1",  # several that wait for each other on a busy core burn it meanwhile
        **settings,
    }
    with log.open("ab") as lines:
        since = lines.tell()
        process = (None if program else forked(variables, log)) or subprocess.Popen(
            [sys.executable, *(program or ("-m", "app"))],
            cwd=ROOT, env={**os.environ, **variables}, stderr=lines,
        )  # fmt: skip
    try:
        url = _url(process, log, since)
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            client.get("/livez")  # answered once the models were tried
            yield Server(process, client, url, log)
    finally:
        process.kill()
        process.wait()


def _url(process: subprocess.Popen[bytes], log: Path, since: int) -> str:
    for _ in range(600):
        found = re.search(r"listens on (http://\S+:\d+)", log.read_text()[since:])
        if found:
            return found[1]
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError("the server does not start")


def agreed(answer: httpx.Response) -> str:
    """The code of an error; fails where it is not in the agreed form."""
    assert answer.headers["content-type"] == "application/json", answer.text
    body = answer.json()
    assert set(body) == {"error", "code"}
    assert re.fullmatch(r"[a-z_]+", body["code"])
    assert body["error"].endswith(".")
    assert "Traceback" not in body["error"]
    assert answer.headers["x-request-id"]
    code: str = body["code"]
    return code


FORM = {"Content-Type": "multipart/form-data; boundary=b"}


PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'


def connected_socket(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def received(connection: socket.socket) -> str:
    """An answer with a JSON object, head and all."""
    answer = b""
    while not answer.endswith(b"}"):
        more = connection.recv(65536)
        assert more, answer
        answer += more
    return answer.decode()
