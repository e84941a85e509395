"""A server that answers as a script says: late, half, nonsense, or not at all."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx


@dataclass(frozen=True)
class Request:
    """One that came, and when."""

    head: str
    body: bytes
    at: float

    @property
    def target(self) -> str:
        return self.head.split()[1]

    @property
    def query(self) -> dict[str, str]:
        return {name: found[0] for name, found in parse_qs(urlsplit(self.target).query).items()}

    def header(self, name: str) -> str | None:
        found = re.search(rf"^{name}: (.*?)\r?$", self.head, re.M | re.I)
        return found[1] if found else None


Step = Callable[[socket.socket, Request], bool]  # whether the connection stays open


@dataclass
class Hostile:
    """Does with each request what the next step says; the last step is for all that follow."""

    url: str
    steps: list[Step]
    requests: list[Request] = field(default_factory=list)

    def serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while (request := received(connection)) is not None:
                self.requests.append(request)
                step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
                if not step(connection, request):
                    return


def received(connection: socket.socket) -> Request | None:
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := connection.recv(65536)):
            return None
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.I)
    while len(body) < int(length[1] if length else 0):
        body += connection.recv(65536)
    return Request(head.decode(), body, time.monotonic())


@contextmanager
def hostile(*steps: Step) -> Iterator[Hostile]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        found = Hostile(f"http://127.0.0.1:{listening.getsockname()[1]}", list(steps))

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    threading.Thread(target=found.serve, args=[connection], daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield found
        listening.shutdown(socket.SHUT_RDWR)


# Steps


def answer(status: int, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def saying(status: int, body: Any, *headers: str) -> Step:
    """An answer in JSON."""

    def step(connection: socket.socket, _: Request) -> bool:
        connection.sendall(answer(status, json.dumps(body).encode(), *headers))
        return True

    return step


def said(request: Request, **changes: Any) -> bytes:
    """A verdict on what was asked."""
    return json.dumps({
        "id": request.header("X-Request-ID"), "part": request.query.get("part"), "repeat_of": None,
        "model_name": request.query.get("model", "part"), "model_version": "0001-3f9a0c41d2e8",
        "label": "Normal", "is_anomalous": False, "raw_score": 1.25, "score": 0.25,
        "threshold": 0.5, "raw_threshold": 1.5, "hint": None,
        "timing": {"queue_ms": 0.1, "decode_ms": 2.0, "infer_ms": 20.5, "total_ms": 23.25},
        **changes,
    }).encode()  # fmt: skip


def verdict(**changes: Any) -> Step:
    def step(connection: socket.socket, request: Request) -> bool:
        connection.sendall(answer(200, said(request, **changes)))
        return True

    return step


def closing(connection: socket.socket, request: Request) -> bool:
    return False


def half(connection: socket.socket, request: Request) -> bool:
    connection.sendall(answer(200, said(request))[:-40])
    return False


def garbage(connection: socket.socket, request: Request) -> bool:
    connection.sendall(bytes(range(128, 256)) + b"\r\n\r\n" + said(request))
    return False


def late(seconds: float) -> Step:
    """A verdict, after a while."""

    def step(connection: socket.socket, request: Request) -> bool:
        time.sleep(seconds)
        return verdict()(connection, request)

    return step


def trickling(connection: socket.socket, request: Request) -> bool:
    """A verdict, a byte at a time: none of them is late for the one before."""
    for byte in answer(200, said(request)):
        connection.sendall(bytes([byte]))
        time.sleep(0.05)
    return True


def swallowing(url: str) -> Step:
    """The server at `url` judges, and its answer is lost on the way."""

    def step(connection: socket.socket, request: Request) -> bool:
        passed_on(url, request)
        return False

    return step


def passing(url: str) -> Step:
    """What the server at `url` answers."""

    def step(connection: socket.socket, request: Request) -> bool:
        found = passed_on(url, request)
        connection.sendall(answer(found.status_code, found.content))
        return True

    return step


def passed_on(url: str, request: Request) -> httpx.Response:
    headers = {"X-Request-ID": request.header("X-Request-ID") or ""}
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        return client.post(request.target, content=request.body, headers=headers)
