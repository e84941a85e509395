"""Claims about the name of a part: it comes back as it was sent, on every route, and is logged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest

from support.damage import seeds
from support.server import RAW, Server, agreed, serving

NAMES = ["KB-2046/A 17", "検査 部品　7", "100%41", "ÄÖ;,=\"'", "<b>🦀</b>", "x" * 200]
REFUSED = ["x" * 201, "a\nERROR forged", "a\x1b[2J", "a\u202eb", "a\u200bb", "\u2028"]
PIXELS: dict[str, Any] = {
    "name": "image", "datatype": "UINT8", "shape": [1, 2, 2, 3], "data": [7] * 12,
}  # fmt: skip


@pytest.fixture(scope="module")
def server(kensa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_MODEL_NAME": "part"}
    logged = {"KENSA_LOG_LEVEL": "debug", "KENSA_LOG_FORMAT": "json"}
    with serving(tmp_path_factory.mktemp("server"), **settings, **logged) as running:
        yield running


def asked(server: Server, way: str, name: str) -> tuple[Any, str | None]:
    """An answer, and the part's name in its body."""
    client, image = server.client, seeds()["png_colour"]
    if way == "query":
        answer = client.post("/infer", params={"part": name}, content=image, headers=RAW)
    elif way == "header":
        answer = client.post("/infer", content=image, headers={**RAW, "X-Part": quote(name)})
    elif way == "form":
        answer = client.post("/infer", files={"file": ("a", image)}, data={"part": name})
    elif way == "field behind the file":
        parts = [("file", ("a", image)), ("part", (None, name))]
        answer = client.post("/infer", files=parts)
    else:
        body = {"inputs": [PIXELS]}
        named: dict[str, Any] = {
            "v2": {"json": {**body, "parameters": {"part": name}}},
            "v2, query": {"json": body, "params": {"part": name}},
            "v2, header": {"json": body, "headers": {"X-Part": quote(name)}},
        }
        answer = client.post("/v2/models/part/infer", **named[way])
        return answer, answer.json().get("parameters", {}).get("part")
    return answer, answer.json().get("part")


WAYS = ["query", "header", "form", "field behind the file", "v2", "v2, query", "v2, header"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_a_name_comes_back_and_is_logged(server: Server, way: str, name: str) -> None:
    answer, back = asked(server, way, name)
    assert answer.status_code == 200, answer.text
    assert back == name
    assert unquote(answer.headers["X-Kensa-Part"]) == name
    line = json.loads(server.log.read_text().splitlines()[-1])
    assert (line["part"], line["status"]) == (name, 200)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_printed_is_refused_and_forges_no_line(
    server: Server, way: str, name: str
) -> None:
    answer, _ = asked(server, way, name)
    assert (answer.status_code, agreed(answer)) == (422, "bad_request")
    assert "part" in answer.json()["error"]
    for line in server.log.read_text().splitlines():
        json.loads(line)


@pytest.mark.parametrize("accept", ["text/plain", "image/png"])
def test_where_the_body_is_no_json_the_header_has_it(server: Server, accept: str) -> None:
    answer = server.client.post(
        "/infer?part=KB-2046/A 17", content=seeds()["png_colour"], headers={**RAW, "Accept": accept}
    )
    assert answer.headers["X-Kensa-Part"] == "KB-2046/A 17"


def test_without_a_name_there_is_none(server: Server) -> None:
    answer = server.client.post("/infer", content=seeds()["png_colour"], headers=RAW)
    assert answer.json()["part"] is None
    assert "X-Kensa-Part" not in answer.headers


def test_a_header_may_be_utf_8_as_it_is(server: Server) -> None:
    for sent, status in (("部品 7".encode(), 200), (b"\xff\xfe", 422)):
        answer = server.client.post(
            "/infer", content=seeds()["png_colour"], headers=[(b"x-part", sent), *RAW.items()]
        )
        assert answer.status_code == status
