"""Claims about the HTTP interface, against a server process of its own over real connections."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from PIL import Image

from app.http.accept import wanted
from app.main import create_app
from app.serving.inspection import Inspector
from app.settings import Settings
from engines.errors import KensaError
from engines.image import Resizing, decode, resize
from engines.meta import Meta
from engines.runtimes.compiled_cache import KEPT, seal_cache, usable_cache
from support.damage import damaged, picture, png, png_chunk, saved, seeds
from support.fake_model import FakeRuntime, fake_model
from support.mutations import mutations
from support.project import ROOT
from support.server import FORM, PART, RAW, Server, agreed, connected_socket, received, serving

TIMED_OUT = 28  # what curl exits with
DOCS = (ROOT / "docs" / "http.md").read_text(encoding="utf-8")
RECORD = (ROOT / "docs" / "record.md").read_text(encoding="utf-8")
MB = 1024 * 1024


@pytest.fixture(scope="module")
def server(kensa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_BATCHING": "on"}
    with serving(tmp_path_factory.mktemp("server"), **settings) as running:
        yield running


@pytest.fixture(scope="module")
def photo() -> bytes:
    return saved(Image.fromarray(picture(1024, 768)), "JPEG")  # 1024 high


# The answer


def test_a_verdict_says_all_that_belongs_to_it(server: Server, photo: bytes) -> None:
    answer = server.infer(photo)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert list(body) == [
        "id",
        "part",
        "repeat_of",
        "model_name",
        "model_version",
        "label",
        "is_anomalous",
        "unusable",
        "raw_score",
        "score",
        "threshold",
        "raw_threshold",
        "image",
        "hint",
        "heatmap",
        "timing",
    ]
    assert body["is_anomalous"] == (body["raw_score"] > body["raw_threshold"])
    assert body["label"] == ("Anomaly" if body["is_anomalous"] else "Normal")
    assert 0 <= body["score"] <= 1
    assert re.fullmatch(r"0001-[0-9a-f]{12}", body["model_version"])
    assert body["image"] == {"format": "JPEG", "width": 768, "height": 1024}
    assert body["hint"] is None
    assert body["heatmap"] is None
    timing = body["timing"]
    parts = timing["queue_ms"] + timing["decode_ms"] + timing["infer_ms"]
    assert 0 < parts <= timing["total_ms"] + 0.1


@pytest.mark.parametrize("name", seeds())
def test_a_form_and_a_raw_body_get_the_same_verdict(
    server: Server, kensa_model: Path, name: str
) -> None:
    data = seeds()[name]
    raw, form = server.infer(data), server.send_form(data)
    if _decodes(data, Meta.read(kensa_model / "meta.json").bit_depth):
        assert raw.status_code == form.status_code == 200, raw.text
        assert raw.json()["raw_score"] == form.json()["raw_score"]
    else:  # 16 bits, and the model learned from 8
        assert agreed(raw) == agreed(form) == "bad_image"


@pytest.mark.parametrize("kind", ["jpeg", "png", "bmp", "tiff"])
def test_every_form_of_a_file_and_every_damage_to_its_structure_gets_an_answer(
    server: Server, kind: str
) -> None:
    """A verdict that names the format, or a refusal in words."""
    for file in mutations(kind, 30):
        answer = server.infer(file.data)
        if answer.status_code == 200:
            assert answer.json()["image"]["format"] == kind.upper(), file.name
        else:
            assert agreed(answer) in ("bad_image", "unsupported_image", "image_too_large")


def test_a_picture_far_smaller_than_what_the_model_sees_is_judged_with_a_hint(
    server: Server,
) -> None:
    answer = server.infer(saved(Image.fromarray(picture(32, 32)), "PNG"))
    assert answer.status_code == 200
    assert answer.json()["hint"] == answer.headers["x-kensa-hint"]
    assert re.search(r"only 32 x 32 pixels.*Send it as the camera took it", answer.json()["hint"])
    assert answer.headers["x-kensa-image"] == "PNG 32x32"


def test_a_picture_beyond_4_to_1_is_judged_with_a_hint(server: Server) -> None:
    answer = server.infer(saved(Image.fromarray(picture(1300, 300)), "PNG"))
    assert answer.status_code == 200
    assert answer.json()["hint"] == answer.headers["x-kensa-hint"]
    assert re.search(r"300 x 1300 pixels, longer than 4:1.*into tiles", answer.json()["hint"])


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"RIFF\x1a\0\0\0WEBPVP8 ", "WebP"),
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\x1f\x8b\x08\0", "gzip"),
    ],
)
def test_other_kinds_are_named_whatever_the_request_calls_them(
    server: Server, start: bytes, said: str
) -> None:
    for media_type in ("image/webp", "image/jpeg", "application/octet-stream"):
        answer = server.client.post(
            "/infer", content=start + bytes(99), headers={"Content-Type": media_type}
        )
        assert (answer.status_code, agreed(answer)) == (415, "unsupported_image")
        assert said in answer.json()["error"]


def test_text_is_one_line_for_a_plc(server: Server, photo: bytes) -> None:
    body = server.infer(photo).json()
    answer = server.infer(photo, Accept="text/plain")
    word = "NG" if body["is_anomalous"] else "OK"
    assert answer.text == f"{word} {body['score']:.4f}\n"
    assert answer.headers["x-kensa-model-version"] == body["model_version"]
    assert answer.headers["x-kensa-id"]


def test_a_picture_is_the_uploaded_one_painted_over(server: Server, photo: bytes) -> None:
    answer = server.send_form(photo, Accept="image/png")
    assert answer.headers["content-type"] == "image/png"
    assert decode(answer.content).shape == (1024, 768, 3)
    body = server.infer(photo).json()
    assert answer.headers["x-kensa-label"] == body["label"]
    assert float(answer.headers["x-kensa-score"]) == pytest.approx(body["score"], abs=1e-5)


def test_a_heatmap_comes_when_asked_for(server: Server, photo: bytes) -> None:
    answer = server.client.post("/infer", params={"heatmap": "true"}, content=photo, headers=RAW)
    heatmap = answer.json()["heatmap"]
    heat = cv2.imdecode(
        np.frombuffer(base64.b64decode(heatmap["png"]), np.uint8), cv2.IMREAD_UNCHANGED
    )
    assert heat.shape == (heatmap["height"], heatmap["width"])
    assert heat.dtype == np.uint8


@pytest.mark.parametrize(
    ("accept", "answer"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("text/plain", "text/plain"),
        ("text/*, application/json;q=0.5", "text/plain"),
        ("image/png;q=0.2, application/json;q=0.8", "application/json"),
        ("IMAGE/PNG", "image/png"),
        ("text/html", "application/json"),
        ("text/html,application/xhtml+xml,image/webp,*/*;q=0.8", "application/json"),
        ("text/plain;q=0", "application/json"),
        (";;q=,,/", "application/json"),
    ],
)
def test_the_answer_has_the_form_that_accept_prefers(accept: str, answer: str) -> None:
    assert wanted(accept) == answer


def test_an_id_of_the_client_comes_back(server: Server, photo: bytes) -> None:
    answer = server.infer(photo, **{"X-Request-ID": "line-3.part_17"})
    assert answer.json()["id"] == answer.headers["x-request-id"] == "line-3.part_17"
    assert server.client.get("/nope", headers={"X-Request-ID": "a"}).headers["x-request-id"] == "a"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "<script>"])
def test_a_strange_id_is_replaced(server: Server, photo: bytes, given: str) -> None:
    answer = server.infer(photo, **{"X-Request-ID": given})
    assert re.fullmatch(r"[0-9a-f]{32}", answer.json()["id"])


def test_the_model_may_be_named(server: Server, photo: bytes) -> None:
    name = server.client.get("/healthz").json()["models"][0]["name"]
    known = server.client.post("/infer", params={"model": name}, content=photo, headers=RAW)
    assert known.json()["model_name"] == name
    other = server.client.post("/infer", params={"model": "other"}, content=photo, headers=RAW)
    assert other.status_code == 404
    assert agreed(other) == "unknown_model"
    assert name in other.json()["error"]


# Refusals


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "empty body": ({"headers": RAW}, 400, "bad_image"),
    "no content type, no body": ({}, 400, "bad_image"),
    "text": ({"content": b"x", "headers": {"Content-Type": "text/html"}}, 415, "unsupported_body"),
    "what curl sends": ({"data": {"file": "x"}}, 415, "unsupported_body"),
    "not an image": ({"content": b"hello", "headers": RAW}, 415, "unsupported_image"),
    "file part empty": ({"files": {"file": ("a", b"")}}, 400, "bad_image"),
    "file part misnamed": ({"files": {"image": ("a", b"x")}}, 422, "bad_request"),
    "two files": ({"files": [("file", ("a", b"x")), ("file", ("b", b"x"))]}, 422, "bad_request"),
    "a field, not a file": ({"files": {"file": (None, b"x")}}, 422, "bad_request"),
    "many fields": (
        {"files": [(f"f{n}", (None, b"x")) for n in range(50)]},
        422,
        "bad_request",
    ),
    "huge field": ({"files": {"f": (None, b"x" * 2 * MB)}}, 422, "bad_request"),
    "form: empty": ({"content": b"", "headers": FORM}, 422, "bad_request"),
    "form: no boundary": (
        {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}},
        422,
        "bad_request",
    ),
    "form: strange charset": (
        {"content": b"x", "headers": {"Content-Type": FORM["Content-Type"] + "; charset=utf-99"}},
        422,
        "bad_request",
    ),
    "form: noise": ({"content": os.urandom(3000), "headers": FORM}, 422, "bad_request"),
    "form: cut short": ({"content": PART + b"\xff\xd8\xff", "headers": FORM}, 422, "bad_request"),
    "form: nameless": (
        {
            "content": b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
            "headers": FORM,
        },
        422,
        "bad_request",
    ),
    "form: no disposition": (
        {"content": b"--b\r\nA: b\r\n\r\nx\r\n--b--\r\n", "headers": FORM},
        422,
        "bad_request",
    ),
    "form: endless header": (
        {"content": b"--b\r\n" + b"A" * MB, "headers": FORM},
        422,
        "bad_request",
    ),
    "heatmap=maybe": ({"params": {"heatmap": "maybe"}, "headers": RAW}, 422, "bad_request"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_request_is_refused_in_the_agreed_form(server: Server, name: str) -> None:
    request, status, code = REFUSED[name]
    answer = server.client.post("/infer", **request)
    assert (answer.status_code, agreed(answer)) == (status, code), answer.text


TEXT = {"Accept": "text/plain"}


def test_an_error_is_a_line_for_who_wants_text(server: Server) -> None:
    client, data = server.client, seeds()["png_colour"]
    answers = {
        "bad_image": client.post("/infer", content=data[:99], headers={**RAW, **TEXT}),
        "unsupported_image": client.post("/infer", content=b"hello", headers={**RAW, **TEXT}),
        "unknown_model": client.post("/infer?model=nut", content=data, headers={**RAW, **TEXT}),
        "bad_request": client.post("/infer?deadline_ms=0", headers=TEXT),
        "unsupported_body": client.post("/infer", headers={"Content-Type": "text/html", **TEXT}),
        "method_not_allowed": client.get("/infer", headers=TEXT),
        "not_found": client.get("/nope", headers=TEXT),
        "unknown_host": client.get("/livez", headers={"Host": "elsewhere.example", **TEXT}),
        "unknown_job": client.get("/jobs/train-000000000000", headers=TEXT),
    }
    for code, answer in answers.items():
        assert answer.status_code >= 400
        assert answer.text == f"ERR {code}\n"
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert answer.headers["x-kensa-error"].endswith(".")
        assert answer.headers["x-request-id"]
    for accept in ("application/json, text/plain", "*/*", "image/png"):
        answer = client.get("/nope", headers={"Accept": accept})
        assert agreed(answer) == "not_found"


def test_a_sentence_that_no_header_can_hold_is_escaped(server: Server) -> None:
    answer = server.client.post("/infer", params={"model": "検査\n"}, headers={**RAW, **TEXT})
    assert answer.text == "ERR unknown_model\n"
    assert "\\u691c" in answer.headers["x-kensa-error"]


def test_a_part_without_a_filename_is_told_how_to_be_a_file(server: Server) -> None:
    """Whether it is small, or larger than Starlette lets a field be."""
    for size in (1000, 3 * 1024 * 1024):
        part = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
        content = part + os.urandom(size) + b"\r\n--b--\r\n"
        answer = server.client.post("/infer", content=content, headers=FORM)
        assert (answer.status_code, agreed(answer)) == (422, "bad_request")
        assert "filename" in answer.json()["error"]
        assert "KB" not in answer.json()["error"]


def test_unknown_paths_and_methods_are_refused_in_the_agreed_form(server: Server) -> None:
    for path in ("/nope", "/infer/", "/static-offline-docs/nope", "/%00"):
        answer = server.client.get(path)
        assert (answer.status_code, agreed(answer)) == (404, "not_found")
    answer = server.client.get("/infer")
    assert (answer.status_code, agreed(answer)) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize("form", [False, True])
def test_a_body_that_says_it_is_too_large_is_refused_unread(server: Server, form: bool) -> None:
    head = (
        f"POST /infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {100 * MB}\r\n"
        f"Content-Type: {'multipart/form-data; boundary=b' if form else 'image/jpeg'}\r\n\r\n"
    )
    with connected_socket(server) as connection:
        connection.sendall(head.encode())
        answer = received(connection)
    assert answer.startswith("HTTP/1.1 413 ")
    assert '"code":"image_too_large"' in answer


@pytest.mark.parametrize("form", [False, True])
def test_a_body_without_a_length_is_read_up_to_the_limit(server: Server, form: bool) -> None:
    head = (
        "POST /infer HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        f"Content-Type: {'multipart/form-data; boundary=b' if form else 'image/jpeg'}\r\n\r\n"
    )
    chunk = b"%x\r\n" % MB + b"\0" * MB + b"\r\n"
    with connected_socket(server) as connection:
        connection.sendall(head.encode())
        if form:
            connection.sendall(b"%x\r\n" % len(PART) + PART + b"\r\n")
        for _ in range(34):  # the limit is 32, and there is no end
            connection.sendall(chunk)
        answer = received(connection)
    assert answer.startswith("HTTP/1.1 413 ")
    assert '"code":"image_too_large"' in answer


def test_a_png_bomb_is_refused_at_once(server: Server) -> None:
    header = png_chunk(b"IHDR", (30_000).to_bytes(4, "big") * 2 + b"\x08\x00\x00\x00\x00")
    rows = png_chunk(b"IDAT", bytes(100_000))
    bomb = b"\x89PNG\r\n\x1a\n" + header + rows + png_chunk(b"IEND", b"")
    began = server.cpu_seconds()
    answer = server.infer(bomb)
    assert server.cpu_seconds() - began < 1
    assert (answer.status_code, agreed(answer)) == (413, "image_too_large")


def test_damaged_files_get_no_verdict_and_no_memory(server: Server, kensa_model: Path) -> None:
    bit_depth = Meta.read(kensa_model / "meta.json").bit_depth
    server.infer(seeds()["png_colour"])
    highest = server.memory("VmHWM")
    for number, file in enumerate(damaged()):
        send = server.infer if number % 2 else server.send_form
        answer = send(file.data)
        assert (answer.status_code == 200) == _decodes(file.data, bit_depth), file.name
        if answer.status_code != 200:
            assert answer.status_code in (400, 413, 415), file.name
            agreed(answer)
    assert server.memory("VmHWM") - highest < 50 * MB


def _decodes(data: bytes, bit_depth: int | None) -> bool:
    try:
        decode(data, bit_depth=bit_depth)
    except KensaError:
        return False
    return True


def test_pictures_with_strange_notes_write_nothing_into_the_log(server: Server) -> None:
    """libpng and libtiff have lines of their own for these, and would write one per part."""
    strange = b"".join(png_chunk(kind, b"\xff\0") for kind in (b"iCCP", b"gAMA", b"tRNS", b"eXIf"))
    before = server.log.read_bytes()
    for data in (
        png(picture(), extra=strange),
        png(picture()[..., 0], extra=strange),
        saved(Image.fromarray(picture()), "TIFF", tiffinfo={40_000: "note", 274: 99}),
    ):
        answer = server.infer(data)
        assert answer.status_code == 200, answer.text
    assert server.log.read_bytes() == before


def test_a_client_that_leaves_while_sending_leaves_no_trace(server: Server, photo: bytes) -> None:
    before = server.log.read_text()
    for content_type in ("image/jpeg", "multipart/form-data; boundary=b"):
        head = (
            "POST /infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n"
            f"Content-Type: {content_type}\r\n\r\n"
        )
        with connected_socket(server) as connection:
            connection.sendall(head.encode() + PART)
            time.sleep(0.2)  # so that the server waits for the rest
    assert server.infer(photo).status_code == 200
    assert server.log.read_text() == before


# The process


@pytest.mark.alone
def test_the_event_loop_is_free_while_large_images_are_inspected(server: Server) -> None:
    # On the loop, decoding would hold up /livez. Machines differ, so the one is compared with the
    # other: how long does a probe wait that comes at any moment, and how long does decoding take?
    pixels = cv2.resize(picture(300, 300), (3000, 3000))
    large = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
    waits = []
    with ThreadPoolExecutor(4) as clients:
        requests = [clients.submit(_post, server.url, large) for _ in range(8)]
        while not all(request.done() for request in requests):
            began = time.perf_counter()
            assert server.client.get("/livez").status_code == 200
            waits.append((time.perf_counter() - began) * 1000)
    decode_ms = [request.result().json()["timing"]["decode_ms"] for request in requests]
    mean_wait = sum(wait * wait for wait in waits) / sum(waits)
    assert mean_wait < statistics.median(decode_ms) / 2


def _post(url: str, data: bytes) -> httpx.Response:
    return httpx.post(f"{url}/infer", content=data, headers=RAW, timeout=60, trust_env=False)


def test_decoding_and_inferring_have_threads_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoders = set()

    def noted(*arguments: Any) -> Any:
        decoders.add(threading.current_thread().name.rpartition("_")[0])
        return decode(*arguments)

    monkeypatch.setattr("app.serving.inspection.decode", noted)
    model = fake_model(1.5)

    async def inspect() -> None:
        inspector = Inspector(Settings())
        inspector.residents.put(model)
        for _ in range(4):
            await inspector.inspect(seeds()["png_colour"], "fake", "overlay")
        await inspector.close()

    asyncio.run(inspect())
    assert decoders == {"decode"}
    assert isinstance(model.runtime, FakeRuntime)
    assert model.runtime.threads == {"engine"}


@pytest.mark.parametrize("resizing", ["each_axis", None])
def test_a_part_is_resized_as_its_model_was_trained(resizing: Resizing | None) -> None:
    part = np.full((40, 1024, 3), 90, np.uint8)
    part[:, 500:503] = 250
    model = fake_model(1.5)
    model = replace(model, meta=model.meta.with_(resize=resizing))
    seen: list[Any] = []

    async def inspect() -> None:
        inspector = Inspector(Settings())
        inspector.residents.put(model)
        for image in (part, encoded(part)):
            await inspector.inspect(image, "fake")
        seen.extend(one.pixels for one in inspector.recent("fake"))
        await inspector.close()

    asyncio.run(inspect())
    assert len(seen) == 2
    for pixels in seen:
        assert np.array_equal(pixels, resize(part, 64, resizing))
    assert (seen[0].max() > 90) == (resizing == "each_axis")  # sampled, the streak is not there


def encoded(picture: Any) -> bytes:
    return cv2.imencode(".png", picture)[1].tobytes()


@pytest.mark.parametrize(
    ("score", "code"), [(float("nan"), "runtime_failed"), (-1, "internal_error")]
)
def test_a_failure_inside_is_a_500_without_its_details(
    score: float, code: str, tmp_path: Path
) -> None:
    app = create_app(Settings(data_dir=tmp_path, worker="off"))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            _lifespan(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost") as c,
        ):
            app.state.inspector.residents.put(fake_model(score))
            return await c.post("/infer", content=seeds()["png_colour"], headers=RAW)

    answer = asyncio.run(ask())
    assert (answer.status_code, agreed(answer)) == (500, code)
    assert "secret" not in answer.text


def _lifespan(app: Any) -> Any:
    return app.router.lifespan_context(app)


def test_torch_is_not_in_the_process(server: Server, photo: bytes) -> None:
    server.infer(photo)
    assert "torch" not in Path(f"/proc/{server.process.pid}/maps").read_text()


@pytest.mark.parametrize(
    ("packages", "why"),
    [
        (("torch", "onnx"), "they are for learning"),
        (("dbos", "sqlalchemy", "psycopg"), "the queue's are loaded beside what opens models"),
    ],
)
def test_a_start_does_not_wait_for_packages(packages: tuple[str, ...], why: str) -> None:
    program = f"import sys, app.__main__, app.main; assert not {{*{packages}}} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", program + f", {why!r}"], cwd=ROOT, check=True)


def test_memory_stays_below_400_mb(server: Server, photo: bytes) -> None:
    for _ in range(50):
        assert server.infer(photo).status_code == 200
    assert server.memory("VmRSS") < 400 * MB


def test_sigterm_ends_it_in_order_despite_an_open_connection(
    kensa_model: Path, tmp_path: Path
) -> None:
    settings = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_SHUTDOWN_GRACE_S": "300"}
    with serving(tmp_path, **settings) as running, connected_socket(running):
        assert running.client.get("/readyz").status_code == 200  # and keeps its connection
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=60) == 0  # without waiting for either
    assert "Traceback" not in running.log.read_text()


def test_a_stuck_upload_does_not_keep_it_from_ending(kensa_model: Path, tmp_path: Path) -> None:
    settings = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_SHUTDOWN_GRACE_S": "1",
                "KENSA_RECEIVE_S": "300"}  # fmt: skip
    with serving(tmp_path, **settings) as running, connected_socket(running) as connection:
        connection.sendall(b"POST /infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
        time.sleep(0.2)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=60) == 0


@pytest.mark.parametrize("damage", ["no model_dir", "no folder", "no meta.json", "wrong graph"])
def test_without_a_model_it_starts_and_says_why(
    damage: str, own_model: Path, tmp_path: Path, photo: bytes
) -> None:
    if damage == "wrong graph":
        (own_model / "model.onnx").write_bytes(b"no graph")
    elif damage == "no meta.json":
        (own_model / "meta.json").unlink()
    elif damage == "no folder":
        shutil.rmtree(own_model)
    settings = {} if damage == "no model_dir" else {"KENSA_MODEL_DIR": str(own_model)}
    expected = {"no model_dir": "KENSA_MODEL_DIR", "wrong graph": "model.onnx"}
    with serving(tmp_path, **settings) as running:
        assert running.client.get("/livez").json() == {"status": "ok"}
        for answer in (running.client.get("/readyz"), running.infer(photo)):
            assert (answer.status_code, agreed(answer)) == (503, "not_ready")
            assert expected.get(damage, "meta.json") in answer.json()["error"]
        health = running.client.get("/healthz")
        assert health.status_code == 503
        assert health.json()["status"] == health.json()["code"] == "not_ready"
        assert health.json()["models"] == []
    assert "Traceback" not in running.log.read_text()


def test_a_cache_that_cannot_be_written_only_costs_time(kensa_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    settings = {"KENSA_CACHE_DIR": str(tmp_path / "file"), "KENSA_MODEL_DIR": str(kensa_model)}
    with serving(tmp_path, **settings) as running:
        assert running.client.get("/readyz").status_code == 200
    assert "Starts will be slower" in running.log.read_text()


def test_a_damaged_cache_changes_no_score(kensa_model: Path, tmp_path: Path, photo: bytes) -> None:
    # OpenVINO reads zeros in a cached network, as a power cut leaves them, without complaint.
    scores, cache = [], tmp_path / "cache"
    settings = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_CACHE_DIR": str(cache)}
    for _ in range(3):
        with serving(tmp_path, **settings) as running:
            scores.append(running.infer(photo).json()["raw_score"])
        found = list(cache.glob("*.blob"))
        assert found
        for file in found:
            data = file.read_bytes()
            file.unlink()  # it is read-only
            file.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    assert scores[0] == scores[1] == scores[2]


def test_the_cache_keeps_sealed_files_the_newest_few(tmp_path: Path) -> None:
    for number in range(KEPT + 2):
        file = tmp_path / f"{number}.blob"
        file.write_bytes(b"network")
        os.utime(file, (number, number))
    seal_cache(tmp_path)
    (tmp_path / "5.blob").write_bytes(b"damaged")
    os.utime(tmp_path / "5.blob", (5, 5))
    (tmp_path / "new.blob").write_bytes(b"half written")
    assert usable_cache(tmp_path) == tmp_path
    left = {file.stem for file in tmp_path.glob("*.blob")}
    assert left == {str(number) for number in range(3, KEPT + 2)} - {"5"}
    assert {file.stem for file in tmp_path.glob("*.sha256")} == left


def test_health_says_what_is_running(server: Server, kensa_model: Path, photo: bytes) -> None:
    before = server.client.get("/healthz").json()
    server.infer(photo)
    server.infer(b"no image")
    after = server.client.get("/healthz").json()
    meta = Meta.read(kensa_model / "meta.json")
    assert after["status"] == "ok"
    assert after["models"][0]["kind"] == meta.model
    assert after["models"][0]["image_size"] == meta.image_size
    assert after["resident_bytes"] == pytest.approx(server.memory("VmRSS"), rel=0.1)
    assert sum(after["inspections"].values()) == sum(before["inspections"].values()) + 2
    assert after["inspections"]["refused"] == before["inspections"]["refused"] + 1


# The documentation


def test_the_docs_page_loads_nothing_from_elsewhere(server: Server) -> None:
    page = server.client.get("/docs")
    needed = re.findall(r"(?:src|href)=\"([^\"]+)\"", page.text)
    needed += re.findall(r"url: '([^']+)'", page.text)
    assert len(needed) == 4  # script, style, icon, openapi.json
    for address in needed:
        assert address.startswith("/")
        assert server.client.get(address).status_code == 200
    style = next(address for address in needed if address.endswith(".css"))
    assert not re.search(r"url\(['\"]?(?:https?:)?//", server.client.get(style).text)


def test_the_openapi_document_describes_what_is_sent(server: Server) -> None:
    document = server.client.get("/openapi.json").json()
    assert document["info"]["title"] == "Kensa"
    assert "HTTPValidationError" not in document["components"]["schemas"]
    infer = document["paths"]["/infer"]["post"]
    own = {"200", "400", "404", "413", "415", "422", "500", "503", "504"}
    assert own <= set(infer["responses"])
    assert {"401", "403", "408", "431"} <= set(infer["responses"])
    assert set(infer["responses"]["200"]["content"]) == {
        "application/json",
        "text/plain",
        "image/png",
    }
    assert {"multipart/form-data", "image/jpeg", "image/png", "image/bmp", "image/tiff"} < set(
        infer["requestBody"]["content"]
    )
    for status in set(infer["responses"]) - {"200"}:
        content = infer["responses"][status]["content"]["application/json"]
        assert content["schema"]["$ref"].endswith("/ErrorBody")
        for code, example in content["examples"].items():
            assert example["value"]["code"] == code


def test_the_page_names_every_route(server: Server) -> None:
    document = server.client.get("/openapi.json").json()
    routes = {
        f"{method.upper()} {path}" for path, item in document["paths"].items() for method in item
    }
    pages = DOCS + RECORD
    named = re.findall(r"^(?:## |\| )`([A-Z]+ /\S*)`", pages, re.MULTILINE)  # heading or table
    assert set(named) == routes


def test_the_page_names_every_code_of_an_error(server: Server) -> None:
    document = server.client.get("/openapi.json").json()
    codes = set(re.findall(r"^\| \d+ \| `(\w+)` \|", DOCS, re.MULTILINE))
    found = set()
    for path in document["paths"].values():
        for operation in path.values():
            for response in operation["responses"].values():
                body = response.get("content", {}).get("application/json", {})
                found |= set(body.get("examples", {}))
    assert len(found) > 10
    assert found <= codes


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_curl_lines_of_the_page_work(kensa_model: Path, photo: bytes, tmp_path: Path) -> None:
    """All but those of "Learn on the line", which test_job_queue.py goes through."""
    before, _, rest = DOCS.partition("## Learn on the line")
    blocks = re.findall(r"```sh\n(.*?)```", before + rest.partition("\n## ")[2], re.DOTALL)
    lines = [line for line in "".join(blocks).splitlines() if line.startswith("curl")]
    assert len(lines) >= 25
    for name in ("part", "good"):
        (tmp_path / f"{name}.jpg").write_bytes(photo)
    (tmp_path / "bad.jpg").write_bytes(photo + b"\0")  # the same to see: one of the two is wrong
    _zip(tmp_path / "photos.zip", {f"{n}.png": seeds()["png_colour"] for n in range(3)})
    _zip(tmp_path / "model.zip", {path.name: path.read_bytes() for path in kensa_model.iterdir()})
    settings = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_MODEL_NAME": "sample_bracket"}
    with serving(tmp_path, KENSA_WORKER="on", **settings) as running:
        version = running.infer(photo).json()["model_version"]
        while running.client.get("/jobs").status_code != 200:
            time.sleep(0.1)
        job = ""
        for line in lines:
            line = line.replace("http://localhost:8000", running.url)
            line = re.sub(r"\d{4}-[0-9a-f]{12}", version, line)
            words = shlex.split(re.sub(r"retrain-[0-9a-f]{12}", job, line))
            asked = [*words, "--silent", "--write-out", "\n%{http_code}", "--noproxy", "*"]
            endless = ["--max-time", "2"] if "/line/events" in line else []
            run = subprocess.run([*asked, *endless], cwd=tmp_path, capture_output=True, text=True)
            assert run.returncode == (TIMED_OUT if endless else 0), f"{line}\n{run.stderr}"
            assert re.fullmatch("20[0124]", run.stdout.splitlines()[-1]), f"{line}\n{run.stdout}"
            if found := re.search(r'"id":"(retrain-[0-9a-f]{12})"', run.stdout):
                job = found[1]


def _zip(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
