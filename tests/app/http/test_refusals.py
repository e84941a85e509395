"""Claims about refusals: each reaches its client, whoever is between, and however much it sends."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from app.http import connection as connections
from app.http.keys import add_key
from support.server import Server, connected_socket, serving

BODY = bytes(900_000)  # nginx lets 1 MB through
JPEG, JSON = "image/jpeg", "application/json"
UPLOAD = "/datasets/bolt/train?name=a.jpg"
# What is asked of a server without a model: path, content type, role of the key; the refusal
KINDS = {
    "unauthorized": ("/infer", JPEG, None, 401),
    "forbidden": (UPLOAD, JPEG, "line", 403),
    "not_found": ("/inspect", JPEG, "line", 404),
    "unknown_model": ("/v2/models/nut/infer", JSON, "line", 404),
    "method_not_allowed": ("/livez", JPEG, "line", 405),
    "upload_too_large": (UPLOAD, JPEG, "operator", 413),
    "unsupported_body": (UPLOAD, "text/html", "operator", 415),
    "bad_request": ("/infer?deadline_ms=0", JPEG, "line", 422),
    "not_ready": ("/infer", JPEG, "line", 503),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("refusing")


@pytest.fixture(scope="module")
def keys(folder: Path) -> dict[str, str]:
    return {
        role: add_key(folder / "data" / "keys.json", role, role) for role in ("line", "operator")
    }


@pytest.fixture(scope="module")
def server(folder: Path, keys: dict[str, str]) -> Iterator[Server]:
    settings = {"KENSA_ACCESS": "keys", "KENSA_MAX_UPLOAD_BYTES": "100000"}
    with serving(folder, **settings, KENSA_MAX_CONNECTIONS="64") as running:
        yield running


def head(kind: str, keys: dict[str, str], length: int, version: str = "1.1") -> bytes:
    path, media_type, role, _ = KINDS[kind]
    key = f"X-API-Key: {keys[role]}\r\n" if role else ""
    lines = f"POST {path} HTTP/{version}\r\nHost: localhost\r\nContent-Type: {media_type}\r\n{key}"
    return f"{lines}Content-Length: {length}\r\nConnection: close\r\n\r\n".encode()


def read_whole(connection: socket.socket) -> tuple[int, str]:
    """Status and code; a reset fails the test."""
    answer = b""
    while more := connection.recv(65536):
        answer += more
    begin, _, body = answer.partition(b"\r\n\r\n")
    found = json.loads(body)
    assert found["error"].endswith(".")
    return int(begin.split()[1]), found["code"]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("kind", KINDS)
def test_who_sends_everything_before_it_reads_gets_the_refusal(
    server: Server, keys: dict[str, str], kind: str, version: str
) -> None:
    """Nothing but a body that still arrives, on a connection that is to be closed."""
    for _ in range(10):
        with connected_socket(server) as connection:
            connection.sendall(head(kind, keys, 20 * len(BODY), version))
            time.sleep(0.02)  # so that the answer is there before most of the body
            for _ in range(20):
                connection.sendall(BODY)
            assert read_whole(connection) == (KINDS[kind][3], kind)


@pytest.mark.parametrize("accept", ["*/*", "text/plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_before_anything_is_read_names_its_request_and_its_part(
    server: Server, keys: dict[str, str], kind: str, accept: str
) -> None:
    path, media_type, role, status = KINDS[kind]
    key = {"X-API-Key": keys[role]} if role else {}
    sent = {"Content-Type": media_type, "Accept": accept, "X-Request-ID": "p.1", "X-Part": "A/17 x"}
    answer = server.client.post(path, content=BODY, headers={**sent, **key})
    assert (answer.status_code, answer.text.startswith("ERR ")) == (status, accept == "text/plain")
    assert (answer.headers["X-Request-ID"], answer.headers["X-Kensa-Part"]) == ("p.1", "A/17 x")


@pytest.mark.parametrize(
    "rest", [b"X: " + bytes(100_000), b"Transfer-Encoding: chunked\r\n\r\nx\r\n"]
)
def test_so_does_one_that_the_connection_itself_refuses(server: Server, rest: bytes) -> None:
    """A head without end; a body that is no HTTP."""
    first = b"POST /infer?part=A/17%20x HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: p.2\r\n"
    with connected_socket(server) as connection:
        connection.sendall(first + rest)
        answer = b""
        while more := connection.recv(65536):
            answer += more
    begin = answer.partition(b"\r\n\r\n")[0].lower()
    assert b"x-request-id: p.2" in begin, answer
    assert b"x-kensa-part: a/17 x" in begin


def test_what_was_read_after_one_refusal_does_not_count_for_the_next(
    server: Server, keys: dict[str, str]
) -> None:
    """A camera with a wrong key that keeps its connection: each refusal reaches it."""
    asked = head("unauthorized", keys, 20 * len(BODY)).replace(b"close", b"keep-alive")
    with connected_socket(server) as connection:
        for _ in range(connections.READ_ON // (20 * len(BODY)) + 2):
            connection.sendall(asked)
            for _ in range(20):
                connection.sendall(BODY)
            answer = b""
            while not answer.endswith(b"}"):
                more = connection.recv(65536)
                assert more, answer
                answer += more
            assert answer.startswith(b"HTTP/1.1 401 ")


def test_a_body_that_comes_slowly_is_read_on_after_its_refusal(
    server: Server, keys: dict[str, str]
) -> None:
    with connected_socket(server) as connection:
        connection.sendall(head("unauthorized", keys, 500_000))
        for _ in range(25):  # longer than a client may be quiet
            connection.sendall(bytes(20_000))
            time.sleep(2.5 * connections.LINGER_S / 25)
        assert read_whole(connection) == (401, "unauthorized")


def test_who_is_quiet_after_its_refusal_is_closed(server: Server, keys: dict[str, str]) -> None:
    with connected_socket(server) as connection:
        connection.sendall(head("unauthorized", keys, 500_000) + b"x")
        assert read_whole(connection) == (401, "unauthorized")

        def go_on() -> None:
            for _ in range(10):
                time.sleep(2 * connections.LINGER_S)
                connection.sendall(b"x")

        with pytest.raises(ConnectionError):
            go_on()


def test_what_is_read_after_a_refusal_is_bounded(server: Server, keys: dict[str, str]) -> None:
    """In bytes, as here, and in time."""
    with connected_socket(server) as connection:
        connection.sendall(head("unauthorized", keys, 10**12))

        def go_on() -> None:
            for _ in range(4 * connections.READ_ON // len(BODY)):
                connection.sendall(BODY)

        with pytest.raises(ConnectionError):
            go_on()


def test_the_refused_keep_nobody_out(server: Server, keys: dict[str, str]) -> None:
    """All places are taken by clients that were refused and send on: the next one gets one."""
    with ExitStack() as stack:
        for _ in range(64):
            connection = stack.enter_context(connected_socket(server))
            connection.sendall(head("unauthorized", keys, 10**9) + bytes(1000))
        assert httpx.get(f"{server.url}/livez").status_code == 200


# Behind a proxy


@pytest.fixture(scope="module")
def proxy(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an nginx with its defaults, before the server."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed: apt-get install nginx")
    folder = tmp_path_factory.mktemp("nginx")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"  {kind}_temp_path {folder / kind};\n" for kind in kinds)
    (folder / "nginx.conf").write_text(  # no more than where it writes, listens and asks
        f"pid {folder}/pid;\nerror_log {folder}/error.log;\nuser {getpass.getuser()};\n"
        "events {}\nhttp {\n  access_log off;\n"
        f"{places}  server {{\n    listen 127.0.0.1:{port};\n"
        f"    location / {{ proxy_pass {server.url}; }}\n  }}\n}}\n"
    )
    arguments = ["-p", str(folder), "-c", "nginx.conf", "-e", "error.log", "-g", "daemon off;"]
    process = subprocess.Popen([program, *arguments], stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as one:
                if one.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        assert process.poll() is None, (folder / "error.log").read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("kind", KINDS)
def test_200_refusals_behind_nginx_are_all_what_they_were(
    proxy: str, keys: dict[str, str], kind: str
) -> None:
    path, media_type, role, status = KINDS[kind]
    headers = {"Content-Type": media_type, **({"X-API-Key": keys[role]} if role else {})}
    found: Counter[tuple[int, str]] = Counter()

    def ask(client: httpx.Client) -> tuple[int, str]:
        answer = client.post(path, content=BODY, headers=headers)
        code = re.search(r'"code":"(\w+)"', answer.text)
        return answer.status_code, code[1] if code else answer.text

    with httpx.Client(base_url=proxy, timeout=30) as client, ThreadPoolExecutor(8) as threads:
        found.update(threads.map(ask, [client] * 200))
    assert found == {(status, kind): 200}
