"""Claims about who may ask: keys and roles, names and web pages, and how much is read of a body."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.http.access import Access
from app.http.body_limit import MAX_BODY
from app.http.keys import ROLES, Role, add_key, command, fingerprint, read_keys, remove_key
from app.main import create_app
from app.settings import Settings
from engines.errors import (
    BadKeys,
    BadSettings,
    Conflict,
    Forbidden,
    KensaError,
    Unauthorized,
    UnknownKey,
)
from support.project import ROOT
from support.server import RAW, Server, agreed, serving

JSON = {"Content-Type": "application/json"}
PUBLIC = {"/v2/health/live", "/v2/health/ready", "/", "/livez", "/readyz", "/session"}
PAGES = {"/docs", "/docs/oauth2-redirect", "/openapi.json"}
SCREEN = {"/web/{name:path}"}


def role_of(method: str, path: str) -> Role | None:
    """What docs/http.md promises: whoever adds a route that differs decides about it here."""
    if path in PUBLIC | PAGES | SCREEN:
        return None
    if path.endswith("/archive"):  # a model whole, to be taken away
        return "admin"
    if path in ("/trail", "/settings", "/doctor"):  # who did what; how the machine is set up
        return "operator"
    if path.startswith("/keys"):  # who may do what
        return "admin"
    if method == "DELETE" and path.startswith("/decisions"):  # what was decided, or said of it
        return "operator" if path.endswith("/label") else "admin"
    if path.endswith("/challenge"):  # a PLC asks for it at the beginning of a shift
        return "line"
    if method == "GET" or path.endswith("/infer") or path == "/v2/repository/index":
        return "line"
    if path.startswith("/parts/"):  # a view of one, to be judged
        return "line"
    return "admin" if (method, path) == ("POST", "/models") else "operator"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keyed")


@pytest.fixture(scope="module")
def keys(folder: Path) -> dict[str, str]:
    """The text of a key for each role."""
    return {role: add_key(folder / "data" / "keys.json", f"the-{role}", role) for role in ROLES}


@pytest.fixture(scope="module")
def keyed(folder: Path, keys: dict[str, str]) -> Iterator[Server]:
    """A server that demands keys, on every network."""
    with serving(folder, KENSA_HOST="0.0.0.0") as running:
        yield running


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without keys, with a name and an origin of its own."""
    settings = {
        "KENSA_HOSTS": "kensa.factory, Line-3.Factory",
        "KENSA_ORIGINS": "http://gateway:8080, https://console.factory",
    }
    with serving(tmp_path_factory.mktemp("local"), **settings) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def kensa(folder: Path, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """`kensa ARGUMENTS`, with its data in `folder`."""
    done = subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        cwd=ROOT,
        env={**os.environ, "KENSA_DATA_DIR": str(folder / "data"), "KENSA_PORT": "0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


# Roles


def operations(server: Server) -> list[tuple[str, str, dict[str, Any]]]:
    document = server.client.get("/openapi.json").json()
    return [
        (method.upper(), path, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
    ]


def test_every_operation_lets_in_the_roles_that_it_names_and_no_others(
    keyed: Server, keys: dict[str, str]
) -> None:
    asked = 0
    for method, path, operation in operations(keyed):
        needed = role_of(method, path)
        ways = operation.get("security", [])
        named = {role for way in ways for roles in way.values() for role in roles}
        assert named == ({needed} if needed else set()), f"{method} {path}"
        url = re.sub(r"\{\w+\}", "nothing", path)
        below = ROLES[: ROLES.index(needed)] if needed else ()
        for role in (None, *below, needed or "line", "admin"):
            headers = bearer(keys[role]) if role else {}
            asking = keyed.client.stream(method, url, headers=headers, params={"name": "x"})
            with asking as answer:  # those of an event stream never end
                if answer.status_code != 200:
                    answer.read()
            if needed is None or (role and ROLES.index(role) >= ROLES.index(needed)):
                assert answer.status_code not in (401, 403), f"{role}: {method} {path}"
            else:
                status, code = (403, "forbidden") if role else (401, "unauthorized")
                assert (answer.status_code, agreed(answer)) == (status, code), f"{method} {path}"
                assert str(status) in operation["responses"], f"{method} {path}"
            asked += 1
    assert asked > 80


def routes(of: Any) -> Iterator[tuple[str, str]]:
    """Method and path of all routes, also of those that the OpenAPI document leaves out."""
    for route in of:
        if hasattr(route, "effective_candidates"):  # a router, in newer versions of FastAPI
            yield from routes(route.effective_candidates())
        else:
            for method in getattr(route, "methods", None) or ():
                yield method, route.path


def test_no_route_is_open_without_having_been_decided_to_be(keyed: Server, tmp_path: Path) -> None:
    found = {*routes(create_app(Settings(data_dir=tmp_path)).routes)}
    assert {("GET", "/docs"), ("POST", "/infer"), ("DELETE", "/datasets/{category}")} < found
    for method, path in found:
        answer = keyed.client.request(method, re.sub(r"\{\w+\}", "nothing", path))
        is_open = answer.status_code != 401
        assert is_open == (path in PUBLIC | PAGES | SCREEN), f"{method} {path}"


def test_the_docs_page_has_both_ways_to_send_a_key(keyed: Server) -> None:
    document = keyed.client.get("/openapi.json").json()
    schemes = document["components"]["securitySchemes"]
    assert schemes["bearer"]["scheme"] == "bearer"
    assert schemes["header"]["name"] == "X-API-Key"
    assert document["paths"]["/retrain"]["post"]["security"] == [
        {"bearer": ["operator"]},
        {"header": ["operator"]},
    ]


@pytest.mark.parametrize(
    "path", sorted(PUBLIC | PAGES | {"/static-offline-docs/favicon.png", "/web/app.js"})
)
def test_health_and_documentation_need_no_key(keyed: Server, path: str) -> None:
    assert keyed.client.get(path).status_code in (200, 307, 503)


def test_a_key_may_come_in_either_header(keyed: Server, keys: dict[str, str]) -> None:
    for headers in (
        bearer(keys["line"]),
        {"Authorization": f"bearer {keys['line']}"},
        {"X-API-Key": keys["line"]},
        {"Authorization": "Basic YTpi", "X-API-Key": keys["line"]},
    ):
        assert keyed.client.get("/models", headers=headers).status_code == 200, headers


WRONG = {
    "none": lambda key: {},
    "empty": lambda key: {"X-API-Key": ""},
    "another secret": lambda key: bearer(key[:-1] + ("0" if key[-1] != "0" else "1")),
    "cut short": lambda key: bearer(key[:-1]),
    "longer": lambda key: bearer(key + "0"),
    "another id": lambda key: bearer("kensa_00000000_" + key[15:]),
    "only the id": lambda key: bearer(key[:15]),
    "upper case": lambda key: bearer(key.upper()),
    "its fingerprint": lambda key: bearer(fingerprint(key)),
    "another scheme": lambda key: {"Authorization": f"Basic {key}"},
    "no scheme": lambda key: {"Authorization": key},
    "not ASCII": lambda key: {b"X-API-Key": "検査".encode()},
    "huge": lambda key: {"X-API-Key": "x" * 60_000},
    "in the query": lambda key: {},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_key_that_is_not_known_is_refused(
    keyed: Server, keys: dict[str, str], wrong: str
) -> None:
    headers: Any = WRONG[wrong](keys["admin"])
    query = {"X-API-Key": keys["admin"], "key": keys["admin"]} if wrong == "in the query" else {}
    answer = keyed.client.get("/models", headers=headers, params=query)
    assert (answer.status_code, agreed(answer)) == (401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert keys["admin"] not in answer.text


@pytest.mark.parametrize("path", ["/infer", "/retrain", "/models", "/datasets/bolt/train"])
def test_a_body_is_not_read_before_the_key_is(keyed: Server, path: str) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert b" 401 " in raw(keyed, head.encode() + b"Content-Length: 999999\r\n\r\n{")


def test_no_key_stands_in_the_log_or_in_the_file(keyed: Server, keys: dict[str, str]) -> None:
    kept = (keyed.log.parent / "data" / "keys.json").read_text()
    for key in keys.values():
        assert keyed.client.get("/models", headers=bearer(key)).status_code == 200
        assert key[15:] not in kept + keyed.log.read_text()
        assert fingerprint(key) in kept


# The file of keys


def test_a_key_is_192_random_bits_and_its_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    made = [add_key(path, f"k{number}", "line") for number in range(4)]
    assert all(re.fullmatch(r"kensa_[0-9a-f]{8}_[0-9a-f]{48}", key) for key in made)
    assert len({key[15:] for key in made}) == 4
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_keys_that_are_made_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    names = [f"k{number}" for number in range(24)]
    with ProcessPoolExecutor(4) as processes:
        list(processes.map(partial(add_key, path, role="line"), names))
    assert sorted(key.name for key in read_keys(path) or []) == sorted(names)


def test_two_keys_cannot_have_one_name(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add_key(path, "line-3", "line")
    with pytest.raises(Conflict, match="line-3"):
        add_key(path, "line-3", "admin")
    assert [key.role for key in read_keys(path) or []] == ["line"]


def test_the_comparison_takes_the_same_time_for_known_and_unknown_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = add_key(tmp_path / "keys.json", "one", "line")
    compared = []

    def compare(one: str, other: str) -> bool:
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr("app.http.access.hmac.compare_digest", compare)
    access = Access(Settings(data_dir=tmp_path))
    assert access.check(key, "line") is not None
    for wrong in (key[:-1] + "x", "kensa_ffffffff_" + key[15:], "x"):
        with pytest.raises(Unauthorized):
            access.check(wrong, "line")
    assert compared == [(64, 64)] * 4


def test_the_file_is_read_when_it_changes_and_not_at_each_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys.json"
    key = add_key(path, "one", "line")
    reads = []
    monkeypatch.setattr(
        "app.http.access.read_keys", lambda path: reads.append(path) or read_keys(path)
    )
    access = Access(Settings(data_dir=tmp_path))
    for _ in range(100):
        access.check(key, "line")
    assert len(reads) == 1
    remove_key(path, "one")
    add_key(path, "two", "line")
    with pytest.raises(Unauthorized):
        access.check(key, "line")
    assert len(reads) == 2


DAMAGE = {
    "no JSON": b"keys",
    "cut short": b'{"keys": [{"name": "the-admin", "id": "01',
    "empty": b"",
    "a list": b"[]",
    "a role that is none": b'{"keys": [{"name": "a", "id": "00000000", "role": "root", "sha256": "'
    + b"0" * 64
    + b'", "created": ""}]}',
    "an empty fingerprint": b'{"keys": [{"name": "a", "id": "00000000", "role": "admin",'
    b' "sha256": "", "created": ""}]}',
    "gone": None,
    "a folder": None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_of_keys_lets_nobody_in_until_it_is_mended(
    keyed: Server, keys: dict[str, str], damage: str
) -> None:
    path = keyed.log.parent / "data" / "keys.json"
    good, lines = path.read_bytes(), len(keyed.log.read_text().splitlines())
    assert keyed.client.get("/models", headers=bearer(keys["line"])).status_code == 200
    data = DAMAGE[damage]
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    elif damage == "a folder":
        path.mkdir()
    try:
        for headers in ({}, bearer(keys["admin"])):
            answer = keyed.client.get("/models", headers=headers)
            assert (answer.status_code, agreed(answer)) == (503, "bad_keys")
            assert answer.headers["retry-after"]
            assert str(path) not in answer.text
        said = [line for line in keyed.log.read_text().splitlines()[lines:]
                if " ERROR Nobody is let in" in line]  # fmt: skip
        assert len(said) == 1
        assert str(path) in said[0]
        assert keyed.client.get("/livez").status_code == 200
    finally:
        if path.is_dir():
            path.rmdir()
        path.write_bytes(good)
    assert keyed.client.get("/models", headers=bearer(keys["line"])).status_code == 200


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_of_keys_that_may_not_be_read_lets_nobody_in(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.json", "one", "line")
    (tmp_path / "keys.json").chmod(0)
    with pytest.raises(BadKeys):
        Access(Settings(data_dir=tmp_path)).check(key, "line")


def test_a_damaged_file_is_damaged_for_the_command_too(tmp_path: Path) -> None:
    path = tmp_path / "data" / "keys.json"
    path.parent.mkdir()
    path.write_bytes(DAMAGE["cut short"] or b"")
    said = kensa(tmp_path, "keys", "add", "a", "--role", "line", status=2).stderr
    assert re.fullmatch(rf"kensa: {path} is damaged .*\n", said)
    with pytest.raises(BadKeys):
        remove_key(path, "a")
    assert path.read_bytes() == DAMAGE["cut short"]


# From the first key to the last


def test_the_first_key_closes_a_running_server_and_a_removed_key_is_refused_at_once(
    tmp_path: Path,
) -> None:
    with serving(tmp_path) as running:
        ask = running.client.get
        assert ask("/models").status_code == 200
        made = kensa(tmp_path, "keys", "add", "line-3", "--role", "line")
        key = made.stdout.strip()
        assert "only now" in made.stderr
        assert ask("/models").status_code == 401
        assert ask("/models", headers=bearer(key)).status_code == 200
        other = add_key(tmp_path / "data" / "keys.json", "anna", "admin")
        listed = kensa(tmp_path, "keys", "list").stdout
        assert re.search(rf"^line-3 +line +{key[6:14]} ", listed, re.M)
        assert re.search(rf"^anna +admin +{other[6:14]} ", listed, re.M)
        assert key[15:] not in listed
        remove_key(tmp_path / "data" / "keys.json", "line-3")
        assert ask("/models", headers=bearer(key)).status_code == 401
        assert ask("/models", headers=bearer(other)).status_code == 200
        assert "lets everybody in" in kensa(tmp_path, "keys", "remove", "anna").stderr
        assert ask("/models").status_code == 200


def test_the_command_refuses_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KENSA_KEYS_FILE", str(tmp_path / "keys.json"))
    with pytest.raises(UnknownKey, match="There is no key nobody; there is: none"):
        command(["remove", "nobody"])
    for wrong, says in ((["add", "a b", "--role", "line"], "letters"), (["add", "a"], "--role")):
        with pytest.raises(SystemExit, match="2"):
            command(wrong)
        assert says in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KENSA_KEYS_FILE", str(tmp_path / "file" / "keys.json"))
    with pytest.raises(BadSettings, match="Cannot write "):
        command(["add", "a", "--role", "line"])


def test_without_a_key_it_does_not_listen_on_a_network(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "app"],
        cwd=ROOT,
        env={**os.environ, "KENSA_DATA_DIR": str(tmp_path), "KENSA_HOST": "::"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert re.fullmatch(r"kensa: KENSA_HOST opens .*\n", done.stderr)
    assert "kensa keys add NAME --role admin" in done.stderr  # the one way out
    assert "KENSA_ACCESS=anyone" in done.stderr  # the other


@pytest.mark.parametrize(
    ("host", "is_local"),
    [("127.0.0.1", True), ("127.0.0.53", True), ("::1", True), ("localhost", True)]
    + [(host, False) for host in ("0.0.0.0", "::", "10.0.0.7", "kensa", "0", "localhost.a")],
)
def test_only_addresses_of_this_machine_are_local(host: str, is_local: bool) -> None:
    assert Settings(host=host).is_local == is_local


@pytest.mark.parametrize("access", ["auto", "keys"])
def test_when_the_last_key_is_removed_a_server_on_a_network_does_not_open(
    access: str, tmp_path: Path
) -> None:
    path = tmp_path / "keys.json"
    key = add_key(path, "one", "admin")
    gate = Access(Settings(data_dir=tmp_path, host="0.0.0.0", access=access))
    gate.must_be_safe()
    assert gate.check(key, "admin")
    remove_key(path, "one")
    for given in (key, None):
        with pytest.raises(Unauthorized):
            gate.check(given, "line")
    path.unlink()
    for given in (key, None):
        with pytest.raises(KensaError):
            gate.check(given, "line")


def test_a_file_of_keys_that_vanishes_does_not_open_a_local_server(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = add_key(path, "one", "line")
    gate = Access(Settings(data_dir=tmp_path))
    assert gate.check(key, "line")
    path.unlink()
    with pytest.raises(BadKeys):
        gate.check(None, "line")
    other = add_key(path, "two", "line")
    assert gate.check(other, "line")
    with pytest.raises(Unauthorized):
        gate.check(key, "line")


def test_keys_may_be_demanded_from_the_start(tmp_path: Path) -> None:
    gate = Access(Settings(data_dir=tmp_path, access="keys", keys_file=tmp_path / "k" / "k.json"))
    gate.must_be_safe()
    with pytest.raises(Unauthorized):
        gate.check(None, "line")
    key = add_key(tmp_path / "k" / "k.json", "one", "line")
    assert gate.check(key, "line")
    with pytest.raises(Forbidden, match="operator or admin"):
        gate.check(key, "operator")


def test_anyone_means_anyone_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_key(tmp_path / "keys.json", "one", "line")
    gate = Access(Settings(data_dir=tmp_path, access="anyone", host="0.0.0.0"))
    gate.must_be_safe()
    assert "everybody" in caplog.text
    assert gate.check(None, "admin") is None


# Names


def hostname() -> str:
    return socket.gethostname().lower()


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1", "192.168.7.9:8000", "[::1]",
     "[fe80::1]:8000", "kensa.factory", "line-3.factory:8000", hostname(),
     f"{hostname().partition('.')[0]}.local"],
)  # fmt: skip
def test_it_answers_to_its_own_names(local: Server, host: str) -> None:
    assert local.client.get("/livez", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example",
     "evil.factory", "a b", "user@localhost", "localhost:", "localhost:x", "localhost/evil", "",
     "[localhost]x", "::1", "http://localhost"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/livez", "/models", "/docs"])
def test_it_does_not_answer_to_other_names(local: Server, host: str, path: str) -> None:
    answer = local.client.get(path, headers={"Host": host})
    assert (answer.status_code, agreed(answer)) == (400, "unknown_host")


@pytest.mark.parametrize("head", [b"", b"Host: localhost\r\nHost: localhost\r\n"])
def test_a_request_names_one_host(local: Server, head: bytes) -> None:
    answer = raw(local, b"GET /livez HTTP/1.1\r\n" + head + b"Connection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"unknown_host" in answer


def raw(server: Server, data: bytes) -> bytes:
    """The error that comes when these bytes are sent."""
    port = int(server.url.rpartition(":")[2])
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(data)
        while not answer.endswith(b"}"):
            more = connection.recv(65536)
            assert more, answer
            answer += more
    return answer


# Web pages


FOREIGN = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "file://"},
    {"Origin": "http://localhost:1"},
    {"Origin": "http://gateway"},  # another port of a known one
    {"Origin": "https://gateway:8080"},
    {"Origin": "http://gateway:8080.evil.example"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"},
]
OWN: list[dict[str, str]] = [
    {},
    {"Origin": "http://localhost:8000", "Sec-Fetch-Site": "same-origin"},
    {"Origin": "https://localhost:8000"},  # a proxy with TLS
    {"Origin": "http://gateway:8080", "Sec-Fetch-Site": "cross-site"},
    {"Origin": "https://console.factory"},
    {"Sec-Fetch-Site": "none"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_a_page_of_another_server_changes_nothing(local: Server, headers: dict[str, str]) -> None:
    headers = {"Host": "localhost:8000", **headers}
    for method, path in (("POST", "/infer"), ("DELETE", "/datasets/x"), ("OPTIONS", "/infer")):
        answer = local.client.request(method, path, headers=headers)
        assert (answer.status_code, agreed(answer)) == (403, "foreign_origin")
        assert "access-control-allow-origin" not in answer.headers
    answer = local.client.get("/livez", headers=headers)
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("headers", OWN, ids=str)
def test_its_own_pages_and_those_of_known_servers_may(
    local: Server, headers: dict[str, str]
) -> None:
    answer = local.client.post("/infer", headers={"Host": "localhost:8000", **headers})
    assert answer.status_code == 503  # no model: so it came through
    known = headers.get("Origin", "")
    if known.startswith(("http://gateway", "https://console")):
        assert answer.headers["access-control-allow-origin"] == known


def test_a_known_page_may_ask_beforehand_with_a_key(local: Server) -> None:
    answer = local.client.options(
        "/infer",
        headers={
            "Origin": "http://gateway:8080",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type, x-request-id",
        },
    )
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "http://gateway:8080"
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()


@pytest.mark.parametrize(
    ("name", "value"),
    [("origins", "*"), ("origins", "gateway"), ("origins", "http://a/b"), ("hosts", "a b"),
     ("hosts", "http://a"), ("hosts", "*"), ("access", "none")],
)  # fmt: skip
def test_a_setting_that_would_never_match_is_refused(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"KENSA_{name.upper()}", value)
    with pytest.raises(BadSettings, match=f"KENSA_{name.upper()}"):
        Settings.read()


# Bodies


def in_pieces(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), 65536):
        yield data[start : start + 65536]


def body(size: int) -> bytes:
    """A request to convert a model that is not there, of so many bytes."""
    start = b'{"model": "nothing", "version": "'
    return start + b"0" * (size - len(start) - 2) + b'"}'


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/convert"), ("POST", "/retrain"), ("POST", "/teacher"), ("PUT", "/schedules/x")],
)
def test_a_json_body_is_read_up_to_a_limit(
    local: Server, method: str, path: str, is_chunked: bool
) -> None:
    for size, is_read in ((MAX_BODY, True), (MAX_BODY + 1, False), (3 * MAX_BODY, False)):
        data: Any = in_pieces(body(size)) if is_chunked else body(size)
        answer = httpx.request(
            method, f"{local.url}{path}", content=data, headers=JSON, trust_env=False
        )
        if is_read:
            assert answer.status_code in (404, 422), answer.text
        else:
            assert (answer.status_code, agreed(answer)) == (413, "body_too_large")
    operation = local.client.get("/openapi.json").json()["paths"]
    assert "413" in operation[path.replace("/x", "/{name}")][method.lower()]["responses"]


def test_a_body_that_says_it_is_too_long_is_refused_before_it_is_sent(local: Server) -> None:
    head = (
        b"POST /convert HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Expect: 100-continue\r\nContent-Length: 1048577\r\n\r\n"
    )
    assert raw(local, head).startswith(b"HTTP/1.1 413 ")


def test_images_and_uploads_have_limits_of_their_own(local: Server) -> None:
    large = os.urandom(2 * MAX_BODY)
    answer = local.client.post("/infer", content=large, headers=RAW)
    assert agreed(answer) == "not_ready"
    answer = local.client.post("/datasets/bolt/train?name=a.png", content=large, headers=RAW)
    assert agreed(answer) == "unsupported_image"


def test_the_names_of_keys_that_are_kept_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add_key(path, "good", "line")
    kept = json.loads(path.read_text())
    kept["keys"][0]["name"] = "../bad"
    path.write_text(json.dumps(kept))
    with pytest.raises(BadKeys, match=r"keys\.0\.name"):
        read_keys(path)
