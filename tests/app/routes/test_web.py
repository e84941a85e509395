"""Claims about the files of the screen, and how the server gives them to a browser."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.routes.web import FOLDER, files
from support.project import ROOT
from support.server import Server, agreed, serving

MOST_BYTES = 300_000  # all of the screen, as it goes over the wire
ELSEWHERE = re.compile(r"(?:src|href|url\(|import\(|from|fetch\()[ ]*[=('\"]*[ ]*(?:https?:)?//")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as found:
        yield found


def test_the_first_page_is_the_screen(server: Server) -> None:
    answer = server.client.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert '<script type="module" src="/web/app.js">' in answer.text


def test_everything_that_the_page_names_is_there(server: Server) -> None:
    named = re.findall(r'(?:src|href)="(/web/[^"]+)"', server.client.get("/").text)
    assert len(named) > 5
    assert {server.client.get(one).status_code for one in named} == {200}


def test_everything_that_a_module_imports_is_there(server: Server) -> None:
    for name in files():
        if not name.endswith(".js") or name.startswith("lib/"):
            continue
        of = httpx.URL(f"{server.url}/web/{name}")
        for found in re.findall(r"from '(\.[^']+)'", files()[name].data.decode()):
            assert server.client.get(of.join(found)).status_code == 200, (name, found)


def test_a_browser_loads_nothing_of_other_servers_and_runs_nothing_inline(server: Server) -> None:
    for path in ("/", "/web/app.js"):
        policy = server.client.get(path).headers["content-security-policy"]
        rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
        assert rules["default-src"] == "'none'"
        assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
        assert rules["frame-ancestors"] == "'none'"
        assert "unsafe" not in policy


def test_no_file_names_another_server() -> None:
    for path in FOLDER.rglob("*"):
        if path.suffix in (".html", ".css", ".js") and "lib" not in path.parts:
            assert not ELSEWHERE.search(path.read_text()), path


def test_what_the_browser_has_is_not_sent_again(server: Server) -> None:
    first = server.client.get("/web/app.js")
    again = server.client.get("/web/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = server.client.get("/web/app.js", headers={"If-None-Match": '"another"'})
    assert other.content == first.content


def test_files_are_packed_for_whoever_unpacks_them(server: Server) -> None:
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        packed = client.get("/web/parts.js", headers={"Accept-Encoding": "gzip"})
        plain = client.get("/web/parts.js", headers={"Accept-Encoding": "identity"})
    assert packed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    assert packed.content == plain.content == (FOLDER / "parts.js").read_bytes()


def test_the_whole_screen_is_small() -> None:
    assert sum(len(gzip.compress(one.data)) for one in files().values()) < MOST_BYTES


def test_a_file_that_is_not_there_is_said_so(server: Server) -> None:
    for path in ("/web/nothing.js", "/web/../main.py", "/web/%2e%2e/main.py", "/web/", "/web/lib"):
        answer = server.client.get(path)
        assert (answer.status_code, agreed(answer)) == (404, "not_found")


def test_every_file_of_the_screen_is_installed_with_the_server() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert 'app = ["web/**"]' in project
    kinds = {path.suffix for path in FOLDER.rglob("*") if path.is_file()}
    assert kinds == {Path(name).suffix for name in files()}


def test_the_licence_of_every_library_lies_beside_it() -> None:
    for path in (FOLDER / "lib").glob("*.js"):
        assert "Permission is hereby granted" in path.with_suffix(".LICENSE.txt").read_text()
