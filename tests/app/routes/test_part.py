"""Claims about the name of a part: it comes back as it was sent, on every route, and is logged."""

from __future__ import annotations

import json
import time
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
    small = {"KENSA_MAX_IMAGE_BYTES": "100000"}
    with serving(tmp_path_factory.mktemp("server"), **settings, **logged, **small) as running:
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


# The code of a refusal -> what is sent to be refused so.
REFUSALS: dict[str, dict[str, Any]] = {
    "unknown_model": {"params": {"model": "nut"}, "content": b"", "headers": RAW},
    "bad_image": {"content": seeds()["png_colour"][:-40], "headers": RAW},
    "unsupported_image": {"content": b"no image at all", "headers": RAW},
    "unsupported_body": {"content": b"", "headers": {"Content-Type": "text/html"}},
    "image_too_large": {"content": bytes(100_001), "headers": RAW},
    "bad_request": {"files": {"image": ("a", b"under another name")}, "headers": {}},
}


@pytest.mark.parametrize("accept", ["application/json", "text/plain"])
@pytest.mark.parametrize("way", ["query", "header"])
@pytest.mark.parametrize("code", REFUSALS)
def test_a_refusal_gives_the_id_and_the_part_back(
    server: Server, code: str, way: str, accept: str
) -> None:
    name, sent = "検査 A/17", REFUSALS[code]
    headers = {**sent["headers"], "X-Request-ID": f"{code}-1", "Accept": accept}
    params = dict(sent.get("params", {}))
    if way == "query":
        params["part"] = name
    else:
        headers["X-Part"] = quote(name)
    answer = server.client.post("/infer", **{**sent, "params": params, "headers": headers})
    said = answer.text.split()[1] if accept == "text/plain" else answer.json()["code"]
    assert said == code
    assert answer.headers["X-Request-ID"] == f"{code}-1"
    assert unquote(answer.headers["X-Kensa-Part"]) == name


@pytest.mark.parametrize("id_", [".", ".."])
def test_an_id_that_no_path_can_hold_is_replaced(server: Server, id_: str) -> None:
    answer = server.client.get("/livez", headers={"X-Request-ID": id_})
    assert len(answer.headers["X-Request-ID"]) == 32
    assert (
        server.client.get("/livez", headers={"X-Request-ID": "..."}).headers["X-Request-ID"]
        == "..."
    )


def test_the_line_of_a_refusal_has_both(server: Server) -> None:
    time.sleep(1.1)  # of refusals 20 a second have a line
    headers = {"Content-Type": "text/html", "X-Request-ID": "p.1"}
    server.client.post("/infer?part=A/17", headers=headers)
    line = json.loads(server.log.read_text().splitlines()[-1])
    assert (line["request_id"], line["part"], line["status"]) == ("p.1", "A/17", 415)


def test_a_part_in_a_form_comes_back_where_the_file_beside_it_is_refused(server: Server) -> None:
    files, data = {"file": ("a", b"no image")}, {"part": "A 17"}
    answer = server.client.post("/infer", files=files, data=data)
    assert (answer.status_code, answer.headers["X-Kensa-Part"]) == (415, "A 17")


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
