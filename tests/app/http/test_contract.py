"""Whatever is sent, to whichever operation: the OpenAPI document names what is answered."""

from __future__ import annotations

import io
import json
import re
import socket
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis.strategies import binary, sampled_from
from pydantic import BaseModel
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    negative_data_rejection,
    positive_data_acceptance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from app.http.openapi import operations
from app.main import create_app
from app.routes.access import KeyRequest, SessionRequest
from app.routes.challenges import ReleaseBody
from app.routes.decisions import LabelBody
from app.routes.jobs import RetrainBody, ScheduleRequest
from app.routes.marked_parts import TeachBody
from app.routes.models import ChangeThresholdBody
from app.settings import Settings
from engines.errors import KensaError
from engines.queue.job_requests import ConvertRequest, TeacherRequest
from engines.store.versions import is_name
from support.damage import seeds
from support.project import ROOT
from support.server import Server, agreed, serving

FORESEEN = (503, 504, 507)  # no room, no time, no space


@schemathesis.check
def no_failure_of_the_server(ctx: Any, response: Any, case: Case) -> bool | None:
    if response.status_code in FORESEEN:  # whether it is documented is checked as for all others
        return None
    return not_a_server_error(ctx, response, case)


ALWAYS = [
    no_failure_of_the_server,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    allow_header_conformance,
    unsupported_method,
]
UNTIL_S = 10.0  # for one answer
DISCARD = "DELETE /models/{name}/versions/{version}"  # of the one that the others ask for
ENDLESS = "GET /line/events"  # test_line.py has its answers
_ASKED: set[str] = set()  # with names that exist
FILES = ("image/bmp", "image/tiff", "application/zip", "application/x-zip-compressed")


@schemathesis.serializer(*FILES)
def sent_as_it_is(_: Any, value: Any) -> dict[str, Any]:
    return {"data": value if isinstance(value, bytes) else str(value).encode()}


for media_type in FILES:
    schemathesis.openapi.media_type(media_type, sampled_from(list(seeds().values())) | binary())


@pytest.fixture(scope="module")
def server(kensa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("contract"), kensa_model) as running:
        yield running


@contextmanager
def served(folder: Path, model: Path, **settings: str) -> Iterator[Server]:
    """A server with a live model. Nothing that is asked may leave a traceback in its log."""
    named = {
        "KENSA_MODEL_DIR": str(model),
        "KENSA_MODEL_NAME": "bracket",
        "KENSA_ACCESS": "anyone",  # else the first key that is asked for would close the server
    }
    with serving(folder, **named, **settings) as running:
        yield running
    assert "Traceback" not in running.log.read_text()


def send_images(server: Server) -> None:
    files = [("file", (f"{number}.png", seeds()["png_colour"])) for number in (1, 2)]
    answer = server.client.post("/datasets/bolt/train", files=files)
    assert answer.status_code == 201, answer.text


def send_version(server: Server, model: Path) -> str:
    """Send a version for which every part is a defect; the gate holds it, and says for which."""
    meta = {**json.loads((model / "meta.json").read_text()), "image_threshold": 0.0}
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("meta.json", json.dumps(meta))
        for name in ("model.onnx", "memory_bank.npz", "golden.npz", "report.json"):
            archive.write(model / name, name)
    files = {"file": ("model.zip", zipped.getvalue())}
    answer = server.client.post("/models", params={"name": "bracket"}, files=files)
    assert answer.status_code == 201, answer.text
    version: str = answer.json()["version"]
    while not (gate := server.client.get(f"/models/bracket/versions/{version}").json()["gate"]):
        time.sleep(0.1)
    assert gate["flips"]
    assert server.client.post(f"/models/bracket/versions/{version}/activate").status_code == 200
    return version


@pytest.fixture(scope="module")
def known(server: Server, kensa_model: Path) -> dict[str, Any]:
    return what_there_is(server, kensa_model)


def what_there_is(server: Server, model: Path) -> dict[str, dict[str, str]]:
    """What the parameters in a path may be to name something, by the path's beginning.

    Two versions, one with flips; images; a job that has ended, so that its events end too.
    """
    version = send_version(server, model)
    send_images(server)
    asked = {"model": "bracket", "category": "bolt", "queue": True}
    while (job := server.client.post("/retrain", json=asked)).status_code == 503:
        time.sleep(0.1)  # the queue is being opened
    job_id = job.json()["id"]
    assert server.client.post(f"/jobs/{job_id}/cancel").status_code == 200
    return {"/models": {"name": "bracket", "version": version, "number": "0"},
            "/jobs": {"job_id": job_id},
            "/v2/models": {"model": "bracket", "version": version},
            "/datasets": {"category": "bolt", "split": "train", "name": "1.png"},
            "/schedules": {"name": "nightly"}}  # fmt: skip


def document() -> dict[str, Any]:
    """The OpenAPI document, without a server."""
    return create_app(Settings(data_dir=Path("unused"), worker="off")).openapi()


def answered() -> dict[str, Any]:
    """All operations whose answers end."""
    found = operations(document())
    assert found.pop(ENDLESS)
    return found


def test_the_docs_page_shows_values_that_can_be_sent_as_they_are() -> None:
    """Each parameter of a path has an example, and what is filled in beforehand harms nobody."""
    for path, item in document()["paths"].items():
        for method, operation in item.items():
            for parameter in operation.get("parameters", []):
                where, shape = f"{method} {path} {parameter['name']}", parameter["schema"]
                if parameter["in"] == "path":
                    assert shape.get("examples") or shape.get("enum"), where
                assert "deadline" not in parameter["name"] or "default" not in shape, where


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("post", "/retrain"),
        ("post", "/convert"),
        ("post", "/teacher"),
        ("put", "/schedules/{name}"),
    ],
)
def test_the_example_of_a_job_is_of_a_model_that_no_other_page_makes(
    method: str, path: str
) -> None:
    """So that one click on the docs page starts nothing: the tutorial's model is another one."""
    content = document()["paths"][path][method]["requestBody"]["content"]["application/json"]
    name = content["schema"]["$ref"].rpartition("/")[2]
    (example,) = document()["components"]["schemas"][name]["examples"]
    job = example.get("retrain", example)
    assert {job[key] for key in ("model", "category") if key in job} == {"my-part"}
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    assert "my-part" not in pages


def schema(max_examples: int) -> Any:
    """Requests out of the document: the edges of each field, and so many more for each operation.

    They are the same ones at each run.
    """
    found = schemathesis.openapi.from_dict(document())
    found.config.generation.update(
        deterministic=True, max_examples=max_examples, no_shrink=True, database="none"
    )
    return found


def named(path: str, known: dict[str, Any]) -> dict[str, str]:
    """A value for each parameter of a path; of something that exists, where that is known."""
    names = next((known[start] for start in known if path.startswith(start)), {})
    return {parameter: names.get(parameter, "x") for parameter in re.findall(r"{(\w+)}", path)}


def ask(case: Case, server: Server, known: dict[str, Any]) -> None:
    """Send a request as it was drawn; one that the document allows also with names that exist."""
    has_body = bool(case.operation.definition.raw.get("requestBody"))
    # The document cannot tell whether bytes are an image, or whether there is a category; nor that
    # of three parameters exactly one is to be there, or that no part came before 1970.
    is_exact = not (has_body or case.path.endswith("/threshold/preview") or "/stat" in case.path)
    checks = [*ALWAYS, positive_data_acceptance] if is_exact else [*ALWAYS]
    # One is a /datasets/{category}/{split}, too; the other a /parts/{part}.
    if case.path.endswith(("/from-decisions", "/views/{view}")):
        checks.remove(allow_header_conformance)
        checks.remove(unsupported_method)
        if is_name(case.path_parameters.get("category", "")):
            checks.remove(negative_data_rejection)  # for JSON Schema \w is ASCII, and 部品 is none
    case.call_and_validate(base_url=server.url, checks=checks, timeout=UNTIL_S)
    if case.path.endswith("/unload"):
        assert server.client.post("/v2/repository/models/bracket/load").status_code == 200
    if case.meta.generation.mode is not GenerationMode.POSITIVE:
        return
    if f"{case.method} {case.path}" == DISCARD:
        return
    names = named(case.path, known)
    case.path_parameters.update({key: names[key] for key in case.path_parameters})
    asked = case.body.get("retrain", case.body) if isinstance(case.body, dict) else {}
    if "model" in asked:
        there = {"model": "bracket", "category": "bolt", "version": None}
        asked.update({key: there[key] for key in there if key in asked})
    request = repr((server.url, case.method, case.formatted_path, case.query, case.body))
    if request in _ASKED:
        return
    _ASKED.add(request)
    send_images(server)
    case.call_and_validate(base_url=server.url, checks=checks, timeout=UNTIL_S)


def all_that_end(fixture: str) -> Any:
    """The requests of a fixture, drawn in the test: not by each process that collects tests."""
    return schemathesis.pytest.from_fixture(fixture).exclude(path=ENDLESS.split()[1])


@pytest.fixture
def ten(request: pytest.FixtureRequest) -> Any:
    request.node._nodeid = request.node.nodeid  # as schemathesis 4 knows it from an older pytest
    return schema(10)


@pytest.fixture
def three_hundred(request: pytest.FixtureRequest) -> Any:
    request.node._nodeid = request.node.nodeid
    return schema(300)


@all_that_end("ten").parametrize()
def test_no_request_gets_an_answer_that_the_document_does_not_name(
    case: Case, server: Server, known: dict[str, Any]
) -> None:
    ask(case, server, known)


@pytest.mark.soak
@all_that_end("three_hundred").parametrize()
def test_many_more_requests_get_no_such_answer_either(
    case: Case, learning: tuple[Server, dict[str, Any]]
) -> None:
    ask(case, *learning)


@pytest.fixture(scope="module")
def learning(
    kensa_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, dict[str, Any]]]:
    """A server whose worker does what the requests ask for."""
    with served(tmp_path_factory.mktemp("learning"), kensa_model, KENSA_WORKER="on") as running:
        yield running, what_there_is(running, kensa_model)


# What no document generates


NASTY = [
    "%00",
    "..",
    "%2e%2e",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "..%5c..%5cwindows",
    "a%2fb",
    "%2f",
    "%ff%fe",  # not UTF-8
    "%ed%a0%80",  # half a character
    "%c0%ae%c0%ae",  # dots, written too long
    "%0a",
    "bracket%0a",
    "a%0d%0aX-Evil:%20yes",
    "%F0%9F%98%80",
    "%",
    "%zz",
    "1.png%00.txt",
    "-1",
    "NaN",
    "9" * 19,
    "9" * 400,
    "a" * 300,
    "a" * 20_000,
    "\xff",  # as a byte, not escaped
]


def exchange(server: Server, method: str, target: str, head: str = "", body: bytes = b"") -> Any:
    """An HTTP request, byte for byte; the answer as httpx has it."""
    host, port = server.url.removeprefix("http://").split(":")
    length = "" if "length" in head.lower() else f"Content-Length: {len(body)}\r\n"
    lines = f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n{length}{head}\r\n"
    with socket.create_connection((host, int(port)), timeout=UNTIL_S) as connection:
        connection.sendall(lines.encode("latin-1") + body)
        answer = HTTPResponse(connection, method=method)
        answer.begin()
        headers = [(name, value.encode("latin-1")) for name, value in answer.getheaders()]
        return httpx.Response(answer.status, headers=headers, content=answer.read())


def refused_or_served(answer: httpx.Response) -> None:
    """The contract, without a document: 2xx, or a refusal in the agreed form; never a failure."""
    assert answer.status_code < 500, answer.text
    if answer.content == b"Invalid HTTP request received.":  # what is no HTTP
        assert answer.status_code == 400
    elif answer.status_code >= 400:
        agreed(answer)


def paths(known: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """All methods and paths, with each of their parameters replaced by each nasty word."""
    for name in answered():
        method, path = name.split(" ")
        for parameter in re.findall(r"{(\w+)}", path):
            pattern = path.format(**{**named(path, known), parameter: "{}"})
            yield from ((method, pattern.format(word)) for word in NASTY)


def test_no_word_in_a_path_breaks_the_server_or_leaves_its_folder(
    server: Server, known: dict[str, Any]
) -> None:
    send_images(server)
    asked = list(paths(known))
    assert len(asked) > 500
    for method, path in asked:
        answer = exchange(server, method, path)
        refused_or_served(answer)
        assert answer.status_code >= 400, f"{method} {path[:100]}"
        assert "x-evil" not in answer.headers


def test_no_word_in_a_query_breaks_the_server(server: Server, known: dict[str, Any]) -> None:
    for name, operation in answered().items():
        method, path = name.split(" ")
        there = known if name != DISCARD else {}
        target = path.format(**named(path, there))
        for parameter in operation.get("parameters", []):
            if parameter["in"] == "query":
                key = parameter["name"]
                # A deadline of 2 ms may be over: that is an answer, and not what is looked for.
                twice = f"1&{key}=2" if key != "deadline_ms" else f"60000&{key}=60001"
                for word in [*NASTY, "", twice, f"&{key}", "=", "&" * 5000]:
                    answer = exchange(server, method, f"{target}?{key}={word}")
                    refused_or_served(answer)


@pytest.mark.parametrize(
    "head",
    [
        "Content-Length: abc",
        "Content-Length: -1",
        "Content-Length: " + "9" * 30,
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Content-Type: \xff\xfe",
        "Content-Type:",
        "Content-Type: ,;=",
        "Content-Type: multipart/form-data; boundary=\xff",
        'Content-Type: multipart/form-data; boundary="',
        "Content-Type: multipart/form-data; boundary=b; charset=\xff",
        "Content-Type: multipart/form-data; boundary=" + "b" * 5000,
        "Content-Type: image/" + "x" * 5000,
        "Content-Encoding: gzip",
        "Accept: \xff",
        "Accept: " + ",;q=" * 5000,
        "X-Request-ID: \xff\xfe",
        "Range: bytes=9-1,-5",
        "If-None-Match: \xff",
        "Cookie: " + "a=b;" * 5000,
        "A" * 300 + ": b",
    ],
)
def test_no_header_breaks_the_server(server: Server, known: dict[str, Any], head: str) -> None:
    for name in answered():
        method, path = name.split(" ")
        target = path.format(**named(path, known))
        if not (method == "POST" and target.startswith("/models")):  # each of these makes a version
            refused_or_served(exchange(server, method, target, f"{head}\r\n", b"hello"))


DEEP = "[" * 10_000 + "]" * 10_000
JSON_BODIES = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "a word": b'"x"',
    "a number": b"1",
    "cut short": b'{"model"',
    "a null byte": b"\0",
    "not UTF-8": b'{"model": "\xff"}',
    "UTF-16": '{"model": "nope", "category": "nope"}'.encode("utf-16-le"),
    "deep": DEEP.encode(),
    "deep inside": f'{{"model": {DEEP}}}'.encode(),
    "a key of half a character": b'{"model": "bracket", "category": "bolt", "\\ud800": 1}',
    "a null byte in a name": b'{"model": "bracket", "category": "bolt", "version": "\\u0000"}',
    "a long name": b'{"model": "bracket", "category": "bolt", "version": "' + b"a" * 99_999 + b'"}',
    "a line end": b'{"model": "bracket\\n", "category": "bolt"}',
    "another folder": b'{"model": "../bracket", "category": "../bolt"}',
    "NaN": b'{"model": "bracket", "category": "bolt", "max_flips": NaN}',
    "too large": b'{"model": "bracket", "category": "bolt", "max_flips": 1e999}',
    "4,000 digits": b'{"model": "bracket", "category": "bolt", "epochs": ' + b"9" * 4000 + b"}",
    "9,000 digits": b'{"model": "bracket", "category": "bolt", "epochs": ' + b"9" * 9000 + b"}",
    "the same key again": b'{"model": "bracket", "category": "bolt", "model": "../x"}',
}
METAS = {
    "NaN": b'{"x": NaN}',
    "Infinity": b'{"x": [1e999]}',
    "half a character": b'{"x": "\\ud800"}',
    "a key of half a character": b'{"x": {"\\ud800": 1}}',
    "300 levels": b'{"x": ' + b"[" * 300 + b"]" * 300 + b"}",
    "9 levels": b'{"x": ' + b"[" * 8 + b"]" * 8 + b"}",
}
JSON = "Content-Type: application/json\r\n"


@pytest.mark.parametrize("name", JSON_BODIES)
def test_no_json_breaks_the_server(server: Server, known: dict[str, Any], name: str) -> None:
    send_images(server)
    body = JSON_BODIES[name]
    schedule = b'{"cron": "0 2 * * *", "retrain": ' + body + b"}"
    for method, target, sent in (
        ("POST", "/retrain", body),
        ("POST", "/convert", body),
        ("POST", "/teacher", body),
        ("PUT", "/schedules/nightly", body),
        ("PUT", "/schedules/nightly", schedule),
    ):
        answer = exchange(server, method, target, JSON, sent)
        refused_or_served(answer)
        assert answer.status_code in (404, 422), answer.text
        assert len(answer.json()["error"]) < 400


@pytest.mark.parametrize(
    ("content_type", "body", "sentence"),
    [
        ("application/json", b"", "The body is wrong: Field required."),
        ("application/json", b'{"cron": }', "The body is not JSON, at character 9: .*"),
        ("application/json", b"\xff", "The body cannot be read: send JSON in UTF-8.*"),
        ("application/json", b"[]", "The body is wrong: .*dictionary.*"),
        ("application/json", b'{"cron": "", "nigthly": 1, "retrain": {"model": 1}}',
         "The body parameter retrain.model is wrong: Input should be a valid string."),
        ("application/x-www-form-urlencoded", b"{}",
         "Kensa does not read a body of type application/x-www-form-urlencoded here: send JSON"
         " with Content-Type application/json."),
    ],
)  # fmt: skip
def test_a_sentence_says_what_is_wrong_with_a_body(
    server: Server, content_type: str, body: bytes, sentence: str
) -> None:
    headers = {"Content-Type": content_type}
    answer = server.client.put("/schedules/nightly", content=body, headers=headers)
    assert agreed(answer) == ("bad_request" if answer.status_code == 422 else "unsupported_body")
    assert re.fullmatch(sentence, answer.json()["error"]), answer.text


@pytest.mark.parametrize("name", METAS)
def test_a_meta_that_no_answer_could_hold_is_refused(
    server: Server, known: dict[str, Any], name: str
) -> None:
    """One that was queued would break the list of jobs, for everybody, as long as it is there."""
    send_images(server)
    body = b'{"model": "bracket", "category": "bolt", "queue": true, "meta": ' + METAS[name] + b"}"
    answer = exchange(server, "POST", "/retrain", JSON, body)
    assert (answer.status_code, agreed(answer)) == (422, "bad_request")
    assert "meta" in answer.json()["error"]
    assert server.client.get("/jobs").status_code == 200


def test_a_cron_expression_is_read_in_no_time(server: Server, known: dict[str, Any]) -> None:
    """Letters that can be read in many ways took a second for 40 of them, and years for 80."""
    send_images(server)
    retrain = {"model": "bracket", "category": "bolt"}
    for cron in ("L" * 90 + "!", "LMONL" * 18, "* " * 45, "1," * 45, "*/1" * 30):
        began = server.cpu_seconds()
        answer = server.client.put("/schedules/x", json={"cron": cron, "retrain": retrain})
        assert (answer.status_code, agreed(answer)) == (422, "bad_request"), cron
        assert server.cpu_seconds() - began < 1
    for cron in ("0 2 * * *", "*/5 0-6,22 1,L * mon-FRI", "0 0 * JAN L5", " 0  2 * * sun "):
        answer = server.client.put("/schedules/x", json={"cron": cron, "retrain": retrain})
        assert answer.status_code == 200, f"{cron}: {answer.text}"
    assert server.client.delete("/schedules/x").status_code == 204


@pytest.mark.parametrize(
    "method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"]
)
def test_a_method_that_a_path_does_not_take_is_refused_with_all_that_it_takes(
    server: Server, known: dict[str, Any], method: str
) -> None:
    found = operations(document())
    for path in {name.split(" ")[1] for name in found}:
        target = path.format(**named(path, known))
        # Also as another path: /datasets/a/from-decisions is one of /datasets/a/{split}.
        takes = {name.split(" ")[0] for name in found if _matches(name.split(" ")[1], target)}
        if "GET" in takes:
            takes.add("HEAD")
        if method not in takes:
            answer = exchange(server, method, target)
            assert answer.status_code == 405, f"{method} {target}"
            assert set(answer.headers["allow"].split(", ")) == takes
            if method != "HEAD":  # has no body
                assert agreed(answer) == "method_not_allowed"
                assert all(one in answer.json()["error"] for one in takes)


def _matches(template: str, target: str) -> bool:
    part = ".+" if template.startswith("/parts/") else "[^/]+"
    pattern = re.sub(r"\\\{\w+\\\}", part, re.escape(template))
    return re.fullmatch(pattern, target) is not None


def test_a_body_is_read_by_the_types_that_the_document_names_and_no_other(
    server: Server, known: dict[str, Any]
) -> None:
    foreign = ["text/plain", "text/html", "application/x-www-form-urlencoded", "application/xml"]
    for name, operation in operations(document()).items():
        types = operation.get("requestBody", {}).get("content", {})
        method, path = name.split(" ")
        if not types or path.startswith("/v2/"):  # there nobody says what it sends
            continue
        target = path.format(**named(path, known))
        if target == "/models":
            target += "?name=bolt"
        if "/views/" in target:  # of a part that nobody has asked about
            target = "/parts/types/views/x?of=2"
        for media_type in [*types, *foreign]:
            answer = exchange(server, method, target, f"Content-Type: {media_type}\r\n", b"hello")
            refused_or_served(answer)
            read = answer.json()["code"] != "unsupported_body"
            assert read == (media_type in types), f"{name}: {media_type}: {answer.text}"


def test_a_damaged_record_of_the_gate_or_of_a_schedule_breaks_no_list(
    server: Server, known: dict[str, Any]
) -> None:
    data = server.log.parent / "data"
    version = known["/models"]["version"]
    record = data / "models" / "bracket" / "gates" / version / "gate.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    before = record.read_bytes() if record.exists() else None
    (data / "schedules").mkdir(exist_ok=True)
    strange = data / "schedules" / "strange.json"
    for text in ("{}", "[]", '{"ok": 1}', '{"ok": true, "reasons": [1]}', DEEP,
                 '{"ok": true, "reasons": [], "groups": 5, "flips": [{}]}'):  # fmt: skip
        record.write_text(text)
        strange.write_text(f'{{"cron": "0 2 * * *", "timezone": "UTC", "retrain": {text}}}')
        for path in ("/models", "/models/bracket", f"/models/bracket/versions/{version}",
                     "/schedules", "/jobs"):  # fmt: skip
            answer = server.client.get(path)
            assert answer.status_code == 200, answer.text
    found = server.client.get(f"/models/bracket/versions/{version}").json()
    assert "gate" in found["problem"]
    assert not any(one["name"] == "strange" for one in answer.json().get("schedules", []))
    record.unlink() if before is None else record.write_bytes(before)
    strange.unlink()


# The document itself


def test_the_document_is_an_openapi_document() -> None:
    schema(1).validate()


def test_the_server_gives_this_document(server: Server) -> None:
    assert server.client.get("/openapi.json").json() == document()


def test_every_operation_says_what_it_is_for() -> None:
    found = operations(document())
    assert len(found) >= 29
    for name, operation in found.items():
        assert operation["summary"], name
        assert operation["description"].endswith("."), name
        assert len(operation["tags"]) == 1, name
        for parameter in operation.get("parameters", []):
            assert parameter["description"].endswith("."), f"{name}: {parameter['name']}"
            told = {"default", "enum", "examples"} & parameter["schema"].keys()
            assert told or "examples" in parameter, f"{name}: {parameter['name']} has no example"


def test_the_ids_of_operations_come_from_what_clients_rely_on() -> None:
    ids = {name: one["operationId"] for name, one in operations(document()).items()}
    assert len(set(ids.values())) == len(ids)
    assert ids["POST /infer"] == "post_infer"
    assert ids["GET /jobs/{job_id}/log"] == "get_jobs_job_id_log"
    assert all(re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", one) for one in ids.values()), ids


def test_every_example_of_a_request_is_one_that_is_read() -> None:
    known = (RetrainBody, ConvertRequest, ScheduleRequest, TeacherRequest, ChangeThresholdBody,
             LabelBody, TeachBody, ReleaseBody, SessionRequest, KeyRequest)  # fmt: skip
    models: dict[str, type[BaseModel]] = {model.__name__: model for model in known}
    schemas = document()["components"]["schemas"]
    for operation in operations(document()).values():
        body = operation.get("requestBody", {}).get("content", {}).get("application/json")
        if "$ref" in str(body):
            name = body["schema"]["$ref"].rpartition("/")[2]
            (example,) = schemas[name]["examples"]
            models[name].model_validate(example)


def test_every_example_of_an_error_is_of_an_error_with_that_status() -> None:
    statuses = {error.code: error.status for error in errors()}
    for name, operation in operations(document()).items():
        for status, answer in operation["responses"].items():
            if status >= "400" and "HealthBody" not in str(answer):
                body = answer["content"]["application/json"]
                assert body["schema"]["$ref"].endswith("/ErrorBody"), f"{name}: {status}"
                assert body["examples"], f"{name}: {status}"
                for code, example in body["examples"].items():
                    assert example["value"]["code"] == code
                    assert statuses[code] == int(status), f"{name}: {code}"


def errors(base: type[KensaError] = KensaError) -> Iterator[type[KensaError]]:
    yield base
    for child in base.__subclasses__():
        yield from errors(child)


def test_what_any_route_may_answer_stands_on_every_operation() -> None:
    for name, operation in operations(document()).items():
        answers = operation["responses"]
        assert "internal_error" in answers["500"]["content"]["application/json"]["examples"], name
        has_input = "parameters" in operation or "requestBody" in operation
        assert ("422" in answers) >= has_input, name
    infer = operations(document())["POST /infer"]["responses"]["500"]
    assert set(infer["content"]["application/json"]["examples"]) == {
        "runtime_failed",
        "internal_error",
    }
    assert "Or: " in infer["description"]


def test_head_works_wherever_get_does(server: Server, known: dict[str, Any]) -> None:
    """The head of GET, and no body; a stream of events ends there."""
    asked = 0
    for name in operations(document()):
        method, path = name.split(" ")
        if method != "GET":
            continue
        asked += 1
        target = path.format(**named(path, known))
        got, head = None, server.client.head(target)
        if not path.endswith("/events"):
            got = server.client.get(target)
        assert head.content == b""
        assert head.status_code == (got.status_code if got is not None else 200), target
        if got is not None:
            assert head.headers["content-type"] == got.headers["content-type"]
    assert asked > 20
    assert server.client.head("/docs").status_code == 200
    refused = server.client.head("/infer")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert "HEAD" in server.client.put("/livez").headers["allow"]


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br"])
def test_a_compressed_body_is_refused_by_name_wherever_there_is_one(
    server: Server, known: dict[str, Any], encoding: str
) -> None:
    server.client.post("/v2/repository/models/bracket/load")  # others may have unloaded it
    version = known["/models"]["version"]  # or have let another one judge
    assert server.client.post(f"/models/bracket/versions/{version}/activate").status_code == 200
    for name, operation in operations(document()).items():
        media_types = operation.get("requestBody", {}).get("content", {})
        if not media_types:
            continue
        method, path = name.split(" ")
        headers = {"Content-Encoding": encoding, "Content-Type": next(iter(media_types))}
        if "multipart/form-data" in media_types:
            headers["Content-Type"] = "multipart/form-data; boundary=b"
        target = path.format(**named(path, known)).replace("/parts/x/", f"/parts/{encoding}/")
        query = {"name": "a", "of": "2"}
        answer = server.client.request(
            method, target, params=query, content=b"\x1f\x8b", headers=headers
        )
        assert (answer.status_code, agreed(answer)) == (415, "unsupported_body"), name
        assert f"compressed as {encoding}" in answer.json()["error"]
