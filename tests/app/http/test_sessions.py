"""Claims about a browser's cookie, and about keys that are made and removed over HTTP."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.http.keys import ROLES, add_key, read_keys
from app.settings import Settings
from app.watching.doctor.command import examine
from engines.store.versions import Store
from support.server import Server, agreed, serving

PAGE = {"X-Kensa-Page": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sessions")


@pytest.fixture(scope="module")
def keys(folder: Path) -> dict[str, str]:
    """The text of a key for each role."""
    return {role: add_key(folder / "data" / "keys.json", f"the-{role}", role) for role in ROLES}


@pytest.fixture(scope="module")
def keyed(folder: Path, keys: dict[str, str]) -> Iterator[Server]:
    with serving(folder, KENSA_ORIGINS="http://gateway:8080") as running:
        yield running


@pytest.fixture
def browser(keyed: Server) -> Iterator[httpx.Client]:
    """Keeps cookies, and no key in a header."""
    with httpx.Client(base_url=keyed.url, timeout=60, trust_env=False) as client:
        yield client


def log_in(browser: httpx.Client, key: str) -> httpx.Response:
    answer = browser.post("/session", json={"key": key})
    assert answer.status_code == 200, answer.text
    return answer


def make(client: httpx.Client, name: str, role: str, key: str = "") -> httpx.Response:
    headers = {"X-API-Key": key} if key else {}
    return client.post("/keys", json={"name": name, "role": role}, headers=headers)


# The cookie


def test_where_no_key_is_needed_whoever_asks_is_an_admin_and_gets_no_cookie(
    tmp_path: Path,
) -> None:
    with serving(tmp_path) as open_to_all:
        open_body = {"keys": False, "key": None, "role": "admin"}
        assert open_to_all.client.get("/session").json() == open_body
        answer = open_to_all.client.post("/session", json={"key": "anything"})
        assert answer.json() == open_body
        assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("role", ROLES)
def test_a_browser_that_logged_in_is_known_until_it_logs_out(
    browser: httpx.Client, keys: dict[str, str], role: str
) -> None:
    nobody = {"keys": True, "key": None, "role": None}
    assert browser.get("/session").json() == nobody
    assert browser.get("/models").status_code == 401
    body = {"keys": True, "key": f"the-{role}", "role": role}
    assert log_in(browser, keys[role]).json() == body
    assert browser.get("/session").json() == body
    assert browser.get("/models").status_code == 200
    assert browser.get("/keys").status_code == (200 if role == "admin" else 403)
    answer = browser.delete("/session")
    assert (answer.status_code, answer.content) == (204, b"")
    assert not browser.cookies
    assert browser.get("/session").json() == nobody
    assert browser.get("/models").status_code == 401


def test_no_script_reads_the_cookie_and_no_foreign_page_sends_it(
    browser: httpx.Client, keys: dict[str, str]
) -> None:
    def said(answer: httpx.Response) -> set[str]:
        return {one.strip().lower() for one in answer.headers["set-cookie"].split(";")[1:]}

    usual = {"httponly", "samesite=strict", "path=/", "max-age=31536000"}
    assert said(log_in(browser, keys["line"])) == usual
    of_a_proxy = {"Origin": "https://kensa.factory", "Host": "localhost"}
    answer = browser.post("/session", json={"key": keys["line"]}, headers=of_a_proxy)
    assert answer.status_code == 403  # that page has another name
    own = {"Origin": "https://localhost", "Host": "localhost"}
    answer = browser.post("/session", json={"key": keys["line"]}, headers=own)
    assert said(answer) == usual | {"secure"}


def test_a_wrong_key_gets_a_sentence_and_no_cookie(
    browser: httpx.Client, keys: dict[str, str]
) -> None:
    for wrong in (keys["line"][:-1], "kensa_", "検査", "x" * 200):
        answer = browser.post("/session", json={"key": wrong})
        assert (answer.status_code, agreed(answer)) == (401, "unauthorized")
        assert "kensa keys list" in answer.json()["error"]
        assert "set-cookie" not in answer.headers


def test_a_cookie_whose_key_was_removed_is_refused_and_taken_back(
    keyed: Server, browser: httpx.Client, keys: dict[str, str]
) -> None:
    made = make(keyed.client, "tablet", "line", keys["admin"]).json()["key"]
    log_in(browser, made)
    admin = {"X-API-Key": keys["admin"]}
    assert keyed.client.delete("/keys/tablet", headers=admin).status_code == 204
    assert browser.get("/models").status_code == 401
    assert browser.get("/session").json()["role"] is None
    assert not browser.cookies


def test_a_cookie_stays_where_a_wrong_key_is_tried_in_another_tab(
    browser: httpx.Client, keys: dict[str, str]
) -> None:
    log_in(browser, keys["line"])
    answer = browser.get("/session", headers={"X-API-Key": keys["admin"][:-1], **PAGE})
    assert answer.json()["role"] is None
    assert browser.get("/session").json()["role"] == "line"
    browser.get("/session", headers={"Origin": "http://localhost:3000"})
    assert browser.get("/session").json()["role"] == "line"


def test_who_is_known_by_a_cookie_alone_changes_nothing_but_from_the_servers_own_page(
    browser: httpx.Client, keys: dict[str, str]
) -> None:
    log_in(browser, keys["admin"])
    for method, path in (("POST", "/infer"), ("DELETE", "/keys/none"), ("POST", "/keys")):
        body = {"name": "x", "role": "line"} if path == "/keys" else None
        for headers in ({}, {"X-Kensa-Page": "0"}, {"X-Kensa-Page": ""}):
            answer = browser.request(method, path, headers=headers, json=body)
            assert (answer.status_code, agreed(answer)) == (403, "foreign_origin"), path
        answer = browser.request(method, path, headers=PAGE, json=body)
        assert answer.status_code not in (401, 403), path
        by_key = {"X-API-Key": keys["admin"]}  # needs no such header
        assert browser.request(method, path, headers=by_key).status_code not in (401, 403), path
    assert browser.delete("/keys/x", headers=PAGE).status_code == 204


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://localhost:3000"}, {"Origin": "http://gateway:8080"}, {"Origin": "null"},
     {"Sec-Fetch-Site": "same-site"}, {"Sec-Fetch-Site": "cross-site"}],
    ids=str,
)  # fmt: skip
def test_a_cookie_does_not_count_when_the_page_of_another_server_asks(
    browser: httpx.Client, keys: dict[str, str], headers: dict[str, str]
) -> None:
    log_in(browser, keys["admin"])
    assert browser.get("/models", headers=headers).status_code == 401
    assert browser.get("/models", headers={**headers, **PAGE}).status_code == 401
    answer = browser.post("/infer", headers={**headers, **PAGE})
    assert answer.status_code in (401, 403)
    assert browser.get("/session", headers=headers).json()["role"] is None
    assert browser.get("/models").status_code == 200 or not browser.cookies


def test_a_key_in_a_header_goes_before_the_cookie(
    browser: httpx.Client, keys: dict[str, str]
) -> None:
    log_in(browser, keys["admin"])
    as_line = {"Authorization": f"Bearer {keys['line']}"}
    assert browser.get("/session", headers=as_line).json()["role"] == "line"
    assert browser.get("/keys", headers=as_line).status_code == 403
    assert browser.get("/models", headers={"X-API-Key": "wrong"}).status_code == 401
    assert browser.get("/models").status_code == 200


@pytest.mark.parametrize(
    "cookie", ["", "=", "kensa_key", "kensa_key=", 'kensa_key="', "kensa_key=\xff", "a=b;" * 3000]
)
def test_no_cookie_breaks_the_server(keyed: Server, cookie: str) -> None:
    answer = httpx.get(
        f"{keyed.url}/models", headers={b"Cookie": cookie.encode("latin-1")}, trust_env=False
    )
    assert (answer.status_code, agreed(answer)) == (401, "unauthorized")


def test_no_key_stands_in_the_log(keyed: Server, keys: dict[str, str]) -> None:
    made = make(keyed.client, "logged", "line", keys["admin"]).json()["key"]
    with httpx.Client(base_url=keyed.url, trust_env=False) as browser:
        log_in(browser, made)
        assert browser.get("/models").status_code == 200
    log = keyed.log.read_text()
    assert "/keys" in log
    assert made[15:] not in log


# Keys


def test_a_key_that_was_made_over_http_works_and_one_that_was_removed_does_not(
    keyed: Server, keys: dict[str, str]
) -> None:
    client, admin = keyed.client, {"X-API-Key": keys["admin"]}
    answer = make(client, "line-7", "operator", keys["admin"])
    assert answer.status_code == 201
    assert answer.headers["cache-control"] == "no-store"
    key = answer.json()["key"]
    assert answer.json() == {"name": "line-7", "role": "operator", "key": key}
    assert client.get("/session", headers={"X-API-Key": key}).json()["role"] == "operator"
    listed = client.get("/keys", headers=admin).json()
    assert listed["opens_without"] is True
    found = {one["name"]: one for one in listed["keys"]}["line-7"]
    assert found["id"] == key[6:14]
    assert set(found) == {"name", "role", "id", "created"}
    again = make(client, "line-7", "line", keys["admin"])
    assert (again.status_code, agreed(again)) == (409, "conflict")
    assert client.delete("/keys/line-7", headers=admin).status_code == 204
    assert client.get("/models", headers={"X-API-Key": key}).status_code == 401
    gone = client.delete("/keys/line-7", headers=admin)
    assert (gone.status_code, agreed(gone)) == (404, "unknown_key")


def test_the_audit_trail_says_who_made_and_removed_a_key(
    keyed: Server, keys: dict[str, str]
) -> None:
    admin = {"X-API-Key": keys["admin"]}
    make(keyed.client, "noted", "line", keys["admin"])
    keyed.client.delete("/keys/noted", headers=admin)
    lines: list[dict[str, Any]] = []
    for _ in range(100):
        asked = keyed.client.get("/trail", params={"subject": "noted"}, headers=admin)
        if len(lines := asked.json()["lines"]) == 2:
            break
    removed, added = lines
    assert (removed["what"], removed["key"]) == ("key_removed", "the-admin")
    assert (added["what"], added["key"]) == ("key_added", "the-admin")
    assert added["details"] == {"role": "line"}


@pytest.mark.parametrize("body", [
    {"name": "a b", "role": "line"}, {"name": "", "role": "line"}, {"name": "x", "role": "root"},
    {"name": "x"}, {"name": "x", "role": "line", "key": "mine"}, {"name": "a\n", "role": "line"},
])  # fmt: skip
def test_a_key_that_cannot_be_is_refused(
    keyed: Server, keys: dict[str, str], body: dict[str, str]
) -> None:
    answer = keyed.client.post("/keys", json=body, headers={"X-API-Key": keys["admin"]})
    assert (answer.status_code, agreed(answer)) == (422, "bad_request")


def test_the_last_admin_is_not_locked_out_while_there_are_other_keys(
    keyed: Server, keys: dict[str, str]
) -> None:
    answer = keyed.client.delete("/keys/the-admin", headers={"X-API-Key": keys["admin"]})
    assert (answer.status_code, agreed(answer)) == (409, "conflict")
    assert "make one with the role admin first" in answer.json()["error"]
    assert keyed.client.get("/keys", headers={"X-API-Key": keys["admin"]}).status_code == 200


def test_the_first_key_is_an_admins_and_the_last_one_opens_a_local_server_again(
    tmp_path: Path,
) -> None:
    path = tmp_path / "data" / "keys.json"
    with serving(tmp_path) as local:
        for role in ("line", "operator"):
            answer = make(local.client, "first", role)
            assert (answer.status_code, agreed(answer)) == (409, "conflict")
        assert not path.exists()
        key = make(local.client, "anna", "admin").json()["key"]
        assert local.client.get("/models").status_code == 401
        admin = {"X-API-Key": key}
        assert make(local.client, "line-3", "line", key).status_code == 201
        assert local.client.delete("/keys/anna", headers=admin).status_code == 409
        assert local.client.delete("/keys/line-3", headers=admin).status_code == 204
        assert local.client.delete("/keys/anna", headers=admin).status_code == 204
        assert read_keys(path) == []
        assert local.client.get("/session").json()["role"] == "admin"


def test_the_last_key_of_a_server_on_a_network_stays(tmp_path: Path) -> None:
    key = add_key(tmp_path / "data" / "keys.json", "anna", "admin")
    with serving(tmp_path, KENSA_HOST="0.0.0.0") as open_to_networks:
        admin = {"X-API-Key": key}
        assert open_to_networks.client.get("/keys", headers=admin).json()["opens_without"] is False
        answer = open_to_networks.client.delete("/keys/anna", headers=admin)
        assert (answer.status_code, agreed(answer)) == (409, "conflict")
        assert "kensa keys remove" in answer.json()["error"]
        assert open_to_networks.client.get("/keys", headers=admin).status_code == 200


def test_a_file_of_keys_that_cannot_be_written_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = {"KENSA_KEYS_FILE": str(tmp_path / "file" / "keys.json"), "KENSA_ACCESS": "anyone"}
    with serving(tmp_path, **settings) as running:
        answer = make(running.client, "anna", "admin")
        assert (answer.status_code, agreed(answer)) == (507, "read_only")
        assert "keys.json" in answer.json()["error"]


# How it is set up, and what is wrong


def test_settings_are_shown_as_they_are_and_passwords_never(tmp_path: Path) -> None:
    secret = "hunter2"
    hidden = {
        "KENSA_RECORD_URL": f"postgresql://kensa:{secret}@127.0.0.1:1/kensa",
        "KENSA_DRIFT_PARTS": "200",
    }
    with serving(tmp_path, **hidden) as running:
        answer = running.client.get("/settings")
        assert secret not in answer.text
        rows = {one["variable"]: one for one in answer.json()["settings"]}
    assert [re.sub(r"^KENSA_", "", name) for name in rows][:2] == ["DATA_DIR", "MODEL_DIR"]
    record = rows["KENSA_RECORD_URL"]
    assert (record["secret"], record["changed"], record["value"]) == (True, True, None)
    assert (rows["KENSA_QUEUE_URL"]["secret"], rows["KENSA_QUEUE_URL"]["changed"]) == (True, False)
    drift = rows["KENSA_DRIFT_PARTS"]
    assert (drift["value"], drift["default"], drift["unit"]) == ("200", "0", "parts")
    assert (drift["group"], drift["changed"]) == ("Parts", True)
    assert rows["KENSA_DATA_DIR"]["value"] == str(tmp_path / "data")
    assert rows["KENSA_KEYS_FILE"]["value"] == str(tmp_path / "data" / "keys.json")
    assert rows["KENSA_KEYS_FILE"]["changed"] is False
    assert rows["KENSA_MODEL_NAME"]["value"] is None


def test_the_doctor_of_a_server_finds_what_the_command_finds(
    tmp_path: Path, kensa_model: Path
) -> None:
    named = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_MODEL_NAME": "bracket"}
    with serving(tmp_path, **named, KENSA_RUNTIME="openvino") as running:
        good = running.client.get("/doctor").json()
        assert good["ok"] is True
        assert [(one["name"], one["fits"]) for one in good["models"]] == [("bracket", None)]
        assert "answers here" in good["facts"]["storage"]["server"]
        store = Store(tmp_path / "data" / "models")
        meta = store.folder("bracket", good["models"][0]["version"]) / "meta.json"
        meta.write_text(meta.read_text().replace("}", " }"))  # as somebody who finds the folder
        with ThreadPoolExecutor(4) as tabs:
            answers = tabs.map(
                lambda _: httpx.get(f"{running.url}/doctor", trust_env=False).json(), range(4)
            )
        found = examine(Settings(data_dir=tmp_path / "data", gate_found=0.0, port=1))
        assert found.ok is False
        said = [asdict(one) for one in found.findings if one.level == "wrong"]
        for answer in answers:
            assert answer["ok"] is False
            assert [one for one in answer["findings"] if one["level"] == "wrong"] == said
        assert "Traceback" not in running.log.read_text()
