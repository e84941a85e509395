"""Claims about /v2: the real tritonclient against the real server, and bodies no client sends."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import random
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from app.main import create_app
from app.open_inference.tensors import InferRequest, read_request, write_answer
from app.serving.inspection import Inspection
from app.settings import Settings
from engines.errors import BadImage, BadRequest, RuntimeFailed
from engines.image import ImageLimits, decode
from engines.meta import Meta
from support.damage import damaged, png
from support.fake_model import fake_model
from support.oip_client import (
    Client,
    connected,
    files_input,
    outputs,
    photo,
    photo_file,
    pixels_input,
    raw_scores,
)
from support.project import ROOT
from support.server import Server, agreed, serving

DOCS = (ROOT / "docs" / "http.md").read_text(encoding="utf-8")
MIB = 1024 * 1024
NAME = "part"
MOST = 2 * 3 * MIB + 2 * MIB  # bytes of a request, with the limits below
LIMITS = {"KENSA_MAX_IMAGE_BYTES": str(MIB), "KENSA_MAX_IMAGE_PIXELS": str(MIB)}
ALL_BUT_MAP = ["score", "raw_score", "threshold", "raw_threshold", "is_anomalous", "label"]
LENGTH = "Inference-Header-Content-Length"


@pytest.fixture(scope="module")
def server(kensa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_MODEL_NAME": NAME, **LIMITS}
    settings["KENSA_BATCHING"] = "on"
    with serving(tmp_path_factory.mktemp("server"), **settings) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with connected(server) as connection:
        yield connection


# The server and its models


def test_it_is_alive_and_ready(client: Client) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(NAME)
    assert not client.is_model_ready("nope")


def test_metadata_name_the_server_and_what_it_can(client: Client, server: Server) -> None:
    metadata = client.get_server_metadata()
    assert metadata["name"] == "kensa"
    assert metadata["version"] == server.client.get("/healthz").json()["version"]
    assert "binary_tensor_data" in metadata["extensions"]


def test_metadata_and_config_describe_the_same_tensors(client: Client, server: Server) -> None:
    version = server.client.get("/healthz").json()["models"][0]["version"]
    metadata = client.get_model_metadata(NAME)
    assert metadata["versions"] == [version]
    assert metadata == client.get_model_metadata(NAME, version)
    config = client.get_model_config(NAME)
    assert config == client.get_model_config(NAME, version)
    assert config["max_batch_size"] == 64
    for side in ("input", "output"):
        described = {one["name"]: one["shape"] for one in metadata[f"{side}s"]}
        assert described == {one["name"]: [-1, *one["dims"]] for one in config[side]}


def test_every_output_is_as_the_metadata_say(client: Client) -> None:
    described = client.get_model_metadata(NAME)["outputs"]
    names = [one["name"] for one in described]
    answer = client.infer(
        NAME, [files_input([photo_file(0), photo_file(1)])], outputs=outputs(*names)
    )
    for expected, output in zip(described, answer.get_response()["outputs"], strict=True):
        assert output["name"] == expected["name"]
        assert output["datatype"] == expected["datatype"]
        assert len(output["shape"]) == len(expected["shape"])
        assert output["shape"][0] == 2


# Verdicts


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF"])
def test_a_file_gets_the_scores_that_infer_gives_it(
    client: Client, server: Server, kind: str, binary: bool
) -> None:
    file = photo_file(kind=kind)
    expected = server.infer(file).json()
    answer = client.infer(NAME, [files_input([file], binary=binary)])
    assert answer.get_response()["model_version"] == expected["model_version"]
    for name in ("score", "raw_score", "threshold", "raw_threshold"):
        assert answer.as_numpy(name).tolist() == [np.float32(expected[name])]
    assert answer.as_numpy("is_anomalous").tolist() == [expected["is_anomalous"]]
    assert answer.as_numpy("label").tolist() == [expected["label"].encode()]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(("height", "width"), [(300, 256), (256, 256), (90, 400), (7, 5), (1, 1)])
def test_pixels_get_the_scores_of_a_file_that_holds_them(
    client: Client, server: Server, height: int, width: int, binary: bool
) -> None:
    pixels = photo(height=height, width=width)
    expected = server.infer(png(pixels)).json()["raw_score"]
    answer = client.infer(NAME, [pixels_input(pixels[None], binary=binary)])
    assert raw_scores(answer) == [expected]


def test_what_speaks_against_a_picture_is_a_parameter_of_the_answer(
    client: Client, server: Server
) -> None:
    for height, width in [(32, 32), (100, 900), (300, 300)]:
        pixels = photo(height=height, width=width)
        hint = server.infer(png(pixels)).json()["hint"]
        found = client.infer(NAME, [pixels_input(pixels[None])]).get_response()
        assert found.get("parameters", {}).get("hint") == hint
        assert (hint is None) == (height == width == 300)
    files = [photo_file(0), png(photo(height=32, width=32)), png(photo(height=32, width=32))]
    said = client.infer(NAME, [files_input(files)]).get_response()["parameters"]["hint"]
    assert said.startswith("2 of 3 pictures, such as number 1: The picture is only 32 x 32")


def test_json_gets_json(server: Server) -> None:
    answer = server.client.post(f"/v2/models/{NAME}/infer", content=GOOD)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert LENGTH not in answer.headers
    outputs = answer.json()["outputs"]
    assert [one["name"] for one in outputs] == ALL_BUT_MAP
    assert [len(one["data"]) for one in outputs] == [2] * 6


def test_sixteen_images_in_one_request_get_their_own_verdicts_in_order(
    client: Client, server: Server
) -> None:
    files = [photo_file(number) for number in range(16)]
    expected = [server.infer(file).json()["raw_score"] for file in files]
    assert len(set(expected)) == 16
    assert raw_scores(client.infer(NAME, [files_input(files)])) == expected
    pixels = np.stack([photo(number) for number in range(16)])
    assert raw_scores(client.infer(NAME, [pixels_input(pixels)])) == expected


def test_a_map_comes_only_when_it_is_named(client: Client) -> None:
    files = [photo_file(0), photo_file(1)]
    plain = client.infer(NAME, [files_input(files)])
    assert [one["name"] for one in plain.get_response()["outputs"]] == ALL_BUT_MAP
    binary = client.infer(NAME, [files_input(files)], outputs=outputs("map")).as_numpy("map")
    text = client.infer(NAME, [files_input(files)], outputs=outputs("map", binary=False))
    assert binary.dtype == np.float32
    assert binary.ndim == 3
    np.testing.assert_array_equal(binary, text.as_numpy("map"))
    alone = client.infer(NAME, [files_input(files[1:])], outputs=outputs("map")).as_numpy("map")
    np.testing.assert_array_equal(alone[0], binary[1])
    assert not np.array_equal(binary[0], binary[1])


def test_binary_and_json_outputs_may_be_mixed(client: Client) -> None:
    wanted = [*outputs("raw_score", "is_anomalous"), *outputs("label", "score", binary=False)]
    answer = client.infer(NAME, [files_input([photo_file()])], outputs=wanted)
    described = {one["name"]: "data" in one for one in answer.get_response()["outputs"]}
    assert described == {"raw_score": False, "is_anomalous": False, "label": True, "score": True}
    assert answer.as_numpy("label")[0] == "Anomaly"
    assert answer.as_numpy("is_anomalous")[0]
    assert answer.as_numpy("map") is None


def test_the_id_comes_back_and_unknown_parameters_do_no_harm(client: Client) -> None:
    tensor = files_input([photo_file()])
    answer = client.infer(
        NAME, [tensor], request_id="検査 7", parameters={"line": 3}, priority=1, timeout=60_000_000
    )
    assert answer.get_response()["id"] == "検査 7"
    assert "id" not in client.infer(NAME, [tensor]).get_response()


def test_an_answer_is_not_compressed_where_the_client_would_take_it(client: Client) -> None:
    answer = client.infer(
        NAME, [files_input([photo_file()])], response_compression_algorithm="gzip"
    )
    assert answer.as_numpy("label") == [b"Anomaly"]


def test_asynchronous_requests_get_their_own_verdicts(server: Server) -> None:
    files = [photo_file(number) for number in range(6)]
    expected = [server.infer(file).json()["raw_score"] for file in files]
    with connected(server, concurrency=3) as client:
        waiting = [client.async_infer(NAME, [files_input([file])]) for file in files]
        assert [raw_scores(one.get_result())[0] for one in waiting] == expected


def test_the_client_for_asyncio_works_as_well(server: Server) -> None:
    async def ask() -> tuple[list[float], str]:
        async with triton_aio.InferenceServerClient(server.url.removeprefix("http://")) as client:
            assert await client.is_model_ready(NAME)
            answer = await client.infer(NAME, [files_input([photo_file()])])
            with pytest.raises(InferenceServerException) as refused:
                await client.infer("nope", [files_input([photo_file()])])
            return raw_scores(answer), refused.value.message()

    scores, sentence = asyncio.run(ask())
    assert scores == [server.infer(photo_file()).json()["raw_score"]]
    assert sentence == f"There is no model 'nope'; there is '{NAME}'."


def test_statistics_count_every_image_and_where_its_time_went(
    client: Client, server: Server
) -> None:
    before = client.get_inference_statistics(NAME)["model_stats"][0]
    began = time.time()
    client.infer(NAME, [files_input([photo_file(0), photo_file(1)])])
    server.infer(photo_file())
    with pytest.raises(InferenceServerException):
        client.infer(NAME, [files_input([b"no image"])])
    after = client.get_inference_statistics()["model_stats"][0]
    assert after == client.get_inference_statistics(NAME, after["version"])["model_stats"][0]
    assert after["inference_count"] - before["inference_count"] == 3
    assert began - 1 < after["last_inference"] / 1000 < time.time() + 1
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    spent = {}
    for name in ("success", "fail", *parts):
        old, new = before["inference_stats"][name], after["inference_stats"][name]
        assert new["count"] - old["count"] == (1 if name == "fail" else 3), name
        spent[name] = new["ns"] - old["ns"]
        assert spent[name] > 0, name
    assert sum(spent[name] for name in parts) == pytest.approx(spent["success"], rel=0.001)
    assert spent["success"] < (time.time() - began) * 1e9 * 3


# Refusals, as the client's own exception with our sentence


def bad_pixels(*shape: int, datatype: str = "UINT8") -> Callable[[], Any]:
    types = {"UINT8": np.uint8, "FP32": np.float32, "INT64": np.int64}

    def make() -> Any:
        tensor = triton.InferInput("image", list(shape), datatype)
        return tensor.set_data_from_numpy(np.zeros(shape, types[datatype]))

    return make


def renamed(name: str) -> Callable[[], Any]:
    def make() -> Any:
        tensor = triton.InferInput(name, [1, 8, 8, 3], "UINT8")
        return tensor.set_data_from_numpy(np.zeros((1, 8, 8, 3), np.uint8))

    return make


def shared() -> Any:
    tensor = triton.InferInput("image", [1, 8, 8, 3], "UINT8")
    tensor.set_shared_memory("region", 192)
    return tensor


REFUSED_TENSORS: dict[str, tuple[Callable[[], Any], int, str]] = {
    "grey": (bad_pixels(1, 8, 8, 1), 422, "image must be [N, height, width, 3], RGB, not [1, 8, 8"),
    "no batch": (bad_pixels(8, 8, 3), 422, "image must be [N, height, width, 3]"),
    "channels first": (bad_pixels(1, 3, 8, 8), 422, "image must be [N, height, width, 3]"),
    "no image": (bad_pixels(0, 8, 8, 3), 422, "image must be [N, height, width, 3]"),
    "no row": (bad_pixels(1, 0, 8, 3), 422, "image must be [N, height, width, 3]"),
    "floats": (bad_pixels(1, 8, 8, 3, datatype="FP32"), 422, "image must be UINT8, not 'FP32'."),
    "integers": (bad_pixels(1, 8, 8, 3, datatype="INT64"), 422, "image must be UINT8"),
    "many": (bad_pixels(65, 2, 2, 3), 422, "image has 65 images: send at most 64."),
    "large": (bad_pixels(1, 1025, 1024, 3), 413, "The image is 1024 x 1025 pixels; allowed are"),
    "long": (bad_pixels(1, 1, 65_536, 3), 413, "The image is 65536 x 1 pixels; allowed are"),
    "another name": (renamed("input0"), 422, "There is no input 'input0': send image or file."),
    "named file": (renamed("file"), 422, "file must be BYTES, not 'UINT8'."),
    "shared memory": (shared, 422, "Kensa shares no memory with its clients"),
    "no file": (lambda: files_input([b""]), 400, "file[0]: The image is empty: 0 bytes."),
    "text": (lambda: files_input([b"hello"]), 415, "file[0]: This is not a JPEG, PNG, BMP or TIFF"),
    "third damaged": (
        lambda: files_input([photo_file(), photo_file(), photo_file()[:-40], photo_file()]),
        400,
        "file[2]: The PNG image is cut short.",
    ),
    "a long file": (lambda: files_input([bytes(MIB + 1)]), 413, "file[0]: The image file has"),
    "65 files": (lambda: files_input([b"x"] * 65), 422, "file has 65 images: send at most 64."),
}


@pytest.mark.parametrize("name", REFUSED_TENSORS)
def test_a_wrong_tensor_is_refused_with_our_sentence(client: Client, name: str) -> None:
    make, status, sentence = REFUSED_TENSORS[name]
    with pytest.raises(InferenceServerException) as refused:
        client.infer(NAME, [make()])
    assert refused.value.status() == str(status)
    assert refused.value.message().startswith(sentence)
    assert refused.value.message().endswith(".")


REFUSED_CALLS: dict[str, tuple[Callable[[Client], Any], int, str]] = {
    "unknown model": (lambda c: c.infer("nope", [shared()]), 404, "There is no model 'nope'"),
    "its metadata": (lambda c: c.get_model_metadata("a/b"), 404, "There is no "),
    "its config": (lambda c: c.get_model_config("nope"), 404, "There is no model 'nope'"),
    "its statistics": (
        lambda c: c.get_inference_statistics("nope"), 404, "There is no model 'nope'",
    ),
    "another version": (
        lambda c: c.infer(NAME, [files_input([photo_file()])], "1"), 404, f"{NAME} serves 0001-",
    ),
    "its version's config": (lambda c: c.get_model_config(NAME, "9"), 404, f"{NAME} serves 0001-"),
    "two inputs": (
        lambda c: c.infer(NAME, [files_input([b"x"]), bad_pixels(1, 8, 8, 3)()]),
        422,
        "There are 2 input tensors: send one",
    ),
    "unknown output": (
        lambda c: c.infer(NAME, [files_input([b"x"])], outputs=outputs("heatmap")),
        422,
        "There is no output 'heatmap': score,",
    ),
    "an output twice": (
        lambda c: c.infer(NAME, [files_input([b"x"])], outputs=outputs("map", "map")),
        422,
        "The output map is asked for twice.",
    ),
    "classes": (
        lambda c: c.infer(
            NAME,
            [files_input([b"x"])],
            outputs=[triton.InferRequestedOutput("label", class_count=2)],
        ),
        422,
        "Kensa does not classify",
    ),
    "gzip": (
        lambda c: c.infer(
            NAME, [files_input([photo_file()])], request_compression_algorithm="gzip"
        ),
        415,
        "Kensa does not read a body that is compressed as gzip",
    ),
    "shared memory": (
        lambda c: c.register_system_shared_memory("a", "/a", 9), 422, "Kensa shares no memory",
    ),
    "shared memory of CUDA": (
        lambda c: c.get_cuda_shared_memory_status(), 422, "Kensa shares no memory",
    ),
    "traces": (lambda c: c.update_trace_settings(NAME, {}), 422, "Kensa keeps no traces"),
    "all traces": (lambda c: c.get_trace_settings(), 422, "Kensa keeps no traces"),
    "log settings": (lambda c: c.update_log_settings({}), 422, "Logging is set before the start"),
    "load unknown": (lambda c: c.load_model("nope"), 404, "There is no model 'nope'"),
    "load a config": (lambda c: c.load_model(NAME, config="{}"), 422, "Kensa loads models without"),
    "unload unknown": (lambda c: c.unload_model("nope"), 404, "There is no model 'nope'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_CALLS)
def test_what_cannot_be_done_is_refused_with_our_sentence(client: Client, name: str) -> None:
    call, status, sentence = REFUSED_CALLS[name]
    with pytest.raises(InferenceServerException) as refused:
        call(client)
    assert refused.value.status() == str(status)
    assert refused.value.message().startswith(sentence)
    assert refused.value.message().endswith(".")


def test_a_timeout_is_a_deadline(client: Client) -> None:
    with pytest.raises(triton.InferenceServerException, match=r"\[504\] .* within 1 ms"):
        client.infer(NAME, [files_input([photo_file()])], timeout=1000)


def busy(threads: ThreadPoolExecutor | None, tmp_path: Path, deadline_ms: int) -> httpx.Response:
    """What a part gets while these threads, or those that decode, have work for 3 s."""
    settings = Settings(data_dir=tmp_path, worker="off", deadline_ms=deadline_ms)
    app = create_app(settings)
    tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 8, 8, 3], "data": [7] * 192}

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
        ):
            inspector = app.state.inspector
            inspector.residents.put(fake_model(0.5))
            if threads is not None:
                asyncio.get_running_loop().set_default_executor(threads)
                work = [asyncio.to_thread(time.sleep, 3)]
            else:
                work = [inspector.beside(lambda: time.sleep(3)) for _ in range(2)]
            working = asyncio.gather(*work)
            await asyncio.sleep(0.1)
            began = time.monotonic()
            answer = await client.post("/v2/models/fake/infer", json={"inputs": [tensor]})
            assert time.monotonic() - began < 2
            await working
            return answer

    return asyncio.run(ask())


def test_a_part_does_not_wait_for_the_threads_that_lists_are_read_in(tmp_path: Path) -> None:
    assert busy(ThreadPoolExecutor(1), tmp_path, 5000).status_code == 200


def test_reading_and_writing_are_within_the_deadline_too(tmp_path: Path) -> None:
    answer = busy(None, tmp_path, 300)
    assert (answer.status_code, agreed(answer)) == (504, "deadline_exceeded")


def test_a_map_too_large_for_json_or_not_of_numbers_is_refused() -> None:
    def ask(fill: float, *, binary: bool) -> bytes:
        model = SimpleNamespace(name=NAME, version="1")
        anomaly_map = np.full((400, 400), fill, np.float32)
        seen = SimpleNamespace(hint=None)
        inspection: Any = SimpleNamespace(
            model=model, anomaly_map=anomaly_map, seen=seen,
            verdict=SimpleNamespace(unusable=None),
        )  # fmt: skip
        found: list[Inspection] = [inspection]
        return write_answer(InferRequest(None, "file", [], {"map": binary}), found)[0]

    assert len(ask(1.0, binary=True)) > 4 * 400 * 400
    with pytest.raises(BadRequest, match=r"160,000 numbers, more than .* ask for it with binary"):
        ask(1.0, binary=False)
    with pytest.raises(RuntimeFailed, match="not of numbers"):
        ask(math.nan, binary=True)


# Bodies that no client sends


def tensor(**changes: Any) -> dict[str, Any]:
    """A good input of 2 x 4 x 5 pixels; `None` takes a key away."""
    good = {"name": "image", "datatype": "UINT8", "shape": [2, 4, 5, 3], "data": [7] * 120}
    return {key: value for key, value in {**good, **changes}.items() if value is not None}


def body(*inputs: Any, **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **more}).encode()


def sized(size: Any, tail: bytes, **changes: Any) -> tuple[bytes, dict[str, str]]:
    changes = {"data": None, "parameters": {"binary_data_size": size}, **changes}
    head = body(tensor(**changes))
    return head + tail, {LENGTH: str(len(head))}


def of_files(data: bytes, count: int = 1) -> tuple[bytes, dict[str, str]]:
    return sized(len(data), data, name="file", datatype="BYTES", shape=[count])


FILE = {"name": "file", "datatype": "BYTES", "shape": [1]}
GOOD = body(tensor())
MALFORMED: dict[str, tuple[bytes, dict[str, str]] | bytes] = {
    "nothing": b"",
    "no JSON": b"hello",
    "half of it": GOOD[:-9],
    "more than it": GOOD + b" x",
    "a list": b"[]",
    "not UTF-8": GOOD.replace(b"image", b"im\xffge"),
    "a surrogate": body(tensor(), id="\ud800"),
    "UTF-16": GOOD.decode().encode("utf-16"),
    "nested deeply": b"[" * 100_000,
    "nested deeply inside": body(tensor()).replace(b"[7", b"[" * 5_000 + b"7"),
    "no inputs": b"{}",
    "empty inputs": body(),
    "inputs an object": b'{"inputs": {}}',
    "input a string": body("image"),
    "many inputs": body(*[tensor()] * 4_000),
    "no name": body(tensor(name=None)),
    "name a number": body(tensor(name=3)),
    "no datatype": body(tensor(datatype=None)),
    "unknown datatype": body(tensor(datatype="UINT9")),
    "no shape": body(tensor(shape=None)),
    "shape a number": body(tensor(shape=120)),
    "empty shape": body(tensor(shape=[])),
    "shape of strings": body(tensor(shape=["2", 4, 5, 3])),
    "shape of floats": body(tensor(shape=[2.0, 4, 5, 3])),
    "shape of bools": body(tensor(shape=[True, 8, 5, 3])),
    "shape of many": body(tensor(shape=[1] * 100_000)),
    "shape of many strings": body(tensor(shape=["1"] * 100_000)),
    "negative": body(tensor(shape=[-2, -4, 5, 3])),
    "minus one": body(tensor(shape=[-1, 4, 5, 3])),
    "zero": body(tensor(shape=[2, 0, 5, 3], data=[])),
    "overflow": body(tensor(shape=[2, 2**62, 2**62, 3])),
    "overflow to the right size": body(tensor(shape=[2, 2**63 + 4, 5, 3])),
    "huge digits": GOOD.replace(b"[2, 4", b"[2, " + b"9" * 4_000),
    "more digits": GOOD.replace(b"[2, 4", b"[2, " + b"9" * 50_000),
    "no data": body(tensor(data=None)),
    "data null": GOOD.replace(b"[" + b"7, " * 119 + b"7]", b"null"),
    "data a string": body(tensor(data="7" * 120)),
    "one too few": body(tensor(data=[7] * 119)),
    "one too many": body(tensor(data=[7] * 121)),
    "256": body(tensor(data=[7] * 119 + [256])),
    "-1": body(tensor(data=[7] * 119 + [-1])),
    "2^70": body(tensor(data=[7] * 119 + [2**70])),
    "floats": body(tensor(data=[7.0] * 120)),
    "one float": body(tensor(data=[7] * 119 + [7.5])),
    "NaN": body(tensor(data=[7] * 119 + [math.nan])),
    "infinity": body(tensor(data=[math.inf] * 120)),
    "true": body(tensor(data=[True] * 120)),
    "null": body(tensor(data=[7] * 119 + [None])),
    "strings": body(tensor(data=["7"] * 120)),
    "nested lists": body(tensor(data=np.full((2, 4, 5, 3), 7).tolist())),
    "lists of lists": body(tensor(data=[[7]] * 120)),
    "many lists of lists": body(tensor(data=[[7]] * 5_000)),
    "strings of pixels": body(tensor(data=["7"] * 60)),
    "base64 of pixels": body(tensor(data=[base64.b64encode(bytes(120)).decode()])),
    "parameters null": body(tensor(), parameters=None),
    "parameters a list": body(tensor(parameters=[])),
    "id a number": body(tensor(), id=7),
    "outputs a string": body(tensor(), outputs="score"),
    "output without name": body(tensor(), outputs=[{}]),
    "many outputs": body(tensor(), outputs=[{"name": "score"}] * 5_000),
    "binary_data a string": body(
        tensor(), outputs=[{"name": "score", "parameters": {"binary_data": "no"}}]
    ),
    "binary_data_output a number": body(tensor(), parameters={"binary_data_output": 1}),
    "an output in shared memory": body(
        tensor(), outputs=[{"name": "map", "parameters": {"shared_memory_region": "a"}}]
    ),
    "length too long": (GOOD, {LENGTH: str(len(GOOD) + 1)}),
    "length too short": (GOOD, {LENGTH: str(len(GOOD) - 1)}),
    "length zero": (GOOD, {LENGTH: "0"}),
    "length negative": (GOOD, {LENGTH: "-1"}),
    "length a word": (GOOD, {LENGTH: "all"}),
    "length of other digits": (GOOD, {LENGTH: "²".encode().decode("latin-1")}),
    "length enormous": (GOOD, {LENGTH: "9" * 5_000}),
    "data behind it that is nobody's": (GOOD + bytes(120), {LENGTH: str(len(GOOD))}),
    "binary without a length": sized(120, b"")[0] + bytes(120),
    "binary and JSON": sized(120, bytes(120), data=[7] * 120),
    "binary size too small": sized(119, bytes(120)),
    "binary size too large": sized(121, bytes(120)),
    "binary size negative": sized(-120, bytes(120)),
    "binary size a string": sized("120", bytes(120)),
    "binary size a float": sized(120.0, bytes(120)),
    "binary size true": sized(True, b"\0", shape=[1, 1, 1, 3]),
    "binary size null": sized(None, bytes(120)),
    "binary size enormous": sized(10**30, bytes(120)),
    "binary too short": sized(119, bytes(119)),
    "binary too long": sized(121, bytes(121)),
    "binary nothing": sized(0, b""),
    "binary of half the batch": sized(60, bytes(60)),
    "files: numbers": body({**FILE, "data": [7]}),
    "files: no base64": body({**FILE, "data": ["hello!"]}),
    "files: base64 cut short": body({**FILE, "data": ["aGVsbG8"]}),
    "files: other letters": body({**FILE, "data": ["検査"]}),
    "files: nested": body({**FILE, "data": [["aGVsbG8="]]}),
    "files: too many": body({**FILE, "data": ["aGVsbG8="] * 2}),
    "files: very many": body({**FILE, "data": [""] * 100_000}),
    "files: 65": body({**FILE, "shape": [65], "data": [""] * 65}),
    "files: letters as numbers": body({**FILE, "shape": [4], "data": [65, 65, 65, 65]}),
    "files: none": body({**FILE, "shape": [0], "data": []}),
    "files: two dimensions": body({**FILE, "shape": [1, 1], "data": ["aGVsbG8="]}),
    "files: no length": of_files(b"\1\0\0"),
    "files: length too long": of_files(b"\6\0\0\0hello"),
    "files: length too short": of_files(b"\4\0\0\0hello"),
    "files: length 2^32 - 1": of_files(b"\xff\xff\xff\xffhello"),
    "files: big-endian": of_files(b"\0\0\0\5hello"),
    "files: fewer than said": of_files(b"\5\0\0\0hello", 2),
    "files: more than said": of_files(b"\5\0\0\0hello" * 2, 1),
    "files: many empty ones": of_files(bytes(400_000), 64),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_body_is_refused_in_a_sentence(server: Server, name: str) -> None:
    sent = MALFORMED[name]
    content, headers = sent if isinstance(sent, tuple) else (sent, {})
    raw = {key: value.encode("latin-1") for key, value in headers.items()}
    answer = server.client.post(f"/v2/models/{NAME}/infer", content=content, headers=raw)
    assert (answer.status_code, agreed(answer)) == (422, "bad_request"), answer.text
    assert len(answer.json()["error"]) < 400


def test_the_good_bodies_among_them_are_taken(server: Server) -> None:
    for content, headers in ((GOOD, {}), sized(120, bytes([7]) * 120)):
        answer = server.client.post(f"/v2/models/{NAME}/infer", content=content, headers=headers)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "GZIP, identity"])
def test_a_compressed_body_is_refused(server: Server, encoding: str) -> None:
    headers = {"Content-Encoding": encoding}
    answer = server.client.post(f"/v2/models/{NAME}/infer", content=GOOD, headers=headers)
    assert (answer.status_code, agreed(answer)) == (415, "unsupported_body")


@pytest.mark.parametrize("path", [f"models/{NAME}/infer", "repository/index"])
@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_over_the_limit_is_refused_before_it_is_parsed(
    server: Server, path: str, chunked: bool
) -> None:
    server.client.post(f"/v2/models/{NAME}/infer", content=GOOD)
    highest = server.memory("VmHWM")
    most = MOST if path.endswith("infer") else 65_536
    block = b"[" * 65_536
    sent = 0

    def blocks() -> Iterator[bytes]:
        nonlocal sent
        while sent < 4 * MOST:
            sent += len(block)
            yield block

    headers = {} if chunked else {"Content-Length": str(4 * MOST)}
    try:
        answer = httpx.post(
            f"{server.url}/v2/{path}", content=blocks(), headers=headers, trust_env=False
        )
    except httpx.WriteError:  # it hung up, and the answer was lost on the way
        return
    finally:
        assert server.memory("VmHWM") - highest < most + 8 * MIB
        assert server.client.get("/livez").status_code == 200
    assert (answer.status_code, agreed(answer)) == (413, "image_too_large")


def test_json_over_its_own_limit_is_refused_and_asks_for_binary_data(server: Server) -> None:
    sent = body(tensor(shape=[1, 1000, 1000, 3], data=[200] * 3_000_000))
    assert 2 * MIB < len(sent) < 2 * MOST
    answer = server.client.post(f"/v2/models/{NAME}/infer", content=sent[: MOST - 1])
    assert (answer.status_code, agreed(answer)) == (413, "image_too_large")
    assert "binary data" in answer.json()["error"]


@pytest.mark.parametrize("value", ["[]", "[[]]", "{}", '{"a":1}', '""', '"a"', "7", "1.5"])
@pytest.mark.parametrize("key", ["data", "parameters"])
def test_nothing_in_json_costs_much_time(server: Server, key: str, value: str) -> None:
    """While they are read, nothing else runs in the server."""
    good = body(tensor(**{key: "PLACE"})).decode()
    values = ",".join([value] * (2_000_000 // (len(value) + 1)))
    whole = f"[{values}]" if key == "data" else f'{{"binary_data_size": [{values}]}}'
    began = server.cpu_seconds()
    answer = server.client.post(f"/v2/models/{NAME}/infer", content=good.replace('"PLACE"', whole))
    assert (answer.status_code, agreed(answer)) == (422, "bad_request")
    assert server.cpu_seconds() - began < 0.5


# The same claim for bodies that chance makes: an answer is either our refusal, or the verdict on
# exactly the tensor that another reader finds in the body.


def read_by_hand(content: bytes, headers: dict[str, str]) -> list[bytes] | None:
    """The images as files, None where the body is not exactly one whole tensor."""
    try:
        length = int(headers.get(LENGTH, len(content)))
        if not 0 <= length <= len(content):
            return None
        request = json.loads(content[:length].decode())
        (one,) = request["inputs"]
        shape, datatype, given = one["shape"], one["datatype"], one.get("parameters", {})
        size, numbers, tail = given.get("binary_data_size"), one.get("data"), content[length:]
        if not all(type(number) is int and number > 0 for number in shape):
            return None
        if (size is None) == (numbers is None) or (0 if size is None else size) != len(tail):
            return None
        if (one["name"], datatype) == ("image", "UINT8") and len(shape) == 4 and shape[3] == 3:
            if size is None and any(type(number) is not int for number in numbers):
                return None
            pixels = bytes(numbers) if size is None else tail
            if len(pixels) != math.prod(shape):
                return None
            return [png(one) for one in np.frombuffer(pixels, np.uint8).reshape(shape)]
        if (one["name"], datatype) == ("file", "BYTES") and len(shape) == 1:
            files = []
            if size is None:
                files = [base64.b64decode(text, validate=True) for text in numbers]
            while size is not None and tail:
                (bytes_of_file,) = struct.unpack_from("<I", tail)
                if len(tail) < 4 + bytes_of_file:
                    return None
                files.append(tail[4 : 4 + bytes_of_file])
                tail = tail[4 + bytes_of_file :]
            return files if len(files) == shape[0] else None
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None
    return None


def good_bodies() -> list[tuple[bytes, dict[str, str]]]:
    pixels = np.stack([photo(n, 4, 5) for n in range(2)])
    files = [png(photo(n, 9, 8)) for n in range(2)]
    packed = b"".join(struct.pack("<I", len(file)) + file for file in files)
    texts = [base64.b64encode(file).decode() for file in files]
    return [
        (body(tensor(data=pixels.ravel().tolist())), {}),
        (body({**FILE, "shape": [2], "data": texts}, outputs=[{"name": "raw_score"}]), {}),
        sized(120, pixels.tobytes()),
        of_files(packed, 2),
    ]


def mutated(chance: random.Random) -> tuple[bytes, dict[str, str]]:
    content, headers = chance.choice(good_bodies())
    length = int(headers.get(LENGTH, len(content)))
    if chance.random() < 0.4:  # a token of the JSON becomes another one
        tokens = re.split(rb'([][{},:]|"[^"]*"|[^][{},:"]+)', content[:length])
        place = chance.randrange(len(tokens))
        other = [*tokens, b"0", b"1", b"-1", b"3", b"1e400", b"null", b"true", b'"file"', b"[]"]
        tokens[place] = chance.choice(other)
        head, tail = b"".join(tokens), content[length:]
    else:
        head, tail = content[:length], content[length:]
    data, at = bytearray(head + tail), chance.randrange(len(content) + 1)
    match chance.randrange(6):
        case 0:
            del data[at:]
        case 1:
            del data[at : at + chance.randint(1, 8)]
        case 2:
            data[at:at] = chance.randbytes(chance.randint(1, 8))
        case 3:
            data[at : at + 1] = bytes([chance.randrange(256)])
    if headers:
        headers = {
            LENGTH: str(len(head) + chance.choice([0, 0, 0, 0, 1, -1, chance.randint(-60, 60)]))
        }
    return bytes(data), headers


def test_no_mutation_of_a_body_gets_a_verdict_on_a_wrong_tensor(server: Server) -> None:
    chance, statuses = random.Random(20260), []
    for number in range(150):
        content, headers = mutated(chance)
        answer = server.client.post(f"/v2/models/{NAME}/infer", content=content, headers=headers)
        statuses.append(answer.status_code)
        if answer.status_code != 200:
            assert answer.status_code in (400, 413, 415, 422), answer.text
            agreed(answer)
            continue
        files = read_by_hand(content, headers)
        assert files is not None, (number, content)
        found = answer.json()["outputs"]
        assert found[0]["shape"] == [len(files)]
        expected = [server.infer(file).json()["raw_score"] for file in files]
        assert [one["data"] for one in found if one["name"] == "raw_score"] in ([], [expected])
    assert 15 < statuses.count(200) < 75


def test_of_five_thousand_mutations_two_readers_find_the_same_images_or_none() -> None:
    chance, limits, found = random.Random(7), ImageLimits(MIB, MIB), 0
    for number in range(5_000):
        content, headers = mutated(chance)
        try:
            images = read_request(bytearray(content), headers.get(LENGTH), limits).images
        except (BadRequest, BadImage):
            continue
        files = read_by_hand(content, headers)
        seen = [one if isinstance(one, bytes) else png(one) for one in images]
        assert seen == files, (number, content)
        found += 1
    assert 500 < found < 2_500


def test_damaged_files_get_no_verdict(server: Server, kensa_model: Path) -> None:
    bit_depth = Meta.read(kensa_model / "meta.json").bit_depth
    limits = ImageLimits(MIB, MIB)
    for file in damaged()[::4]:
        try:
            decode(file.data, limits, bit_depth)
            expected = True
        except BadImage:
            expected = False
        content, headers = of_files(struct.pack("<I", len(file.data)) + file.data)
        answer = server.client.post(f"/v2/models/{NAME}/infer", content=content, headers=headers)
        assert (answer.status_code == 200) == expected, file.name
        if not expected:
            assert answer.status_code in (400, 413, 415)
            assert agreed(answer)
            assert answer.json()["error"].startswith("file[0]: ")


# The documentation


def test_the_python_of_the_page_works(kensa_model: Path, tmp_path: Path) -> None:
    part = DOCS.split("## Open Inference Protocol")[1].split("\n## ")[0]
    (program,) = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
    for number in range(2):
        (tmp_path / f"part{number}.jpg").write_bytes(photo_file(number, "JPEG"))
    settings = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_MODEL_NAME": "sample_bracket"}
    with serving(tmp_path, **settings) as server:
        program = program.replace("localhost:8000", server.url.removeprefix("http://"))
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    assert "Anomaly" in done.stdout


def test_the_page_has_every_tensor_as_the_metadata_say(client: Client) -> None:
    part = DOCS.split("## Open Inference Protocol")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (UINT8|BYTES|FP32|BOOL) \| (\[.*?\]) \|", part, re.M)
    metadata = client.get_model_metadata(NAME)
    tensors = [*metadata["inputs"], *metadata["outputs"]]
    assert [(name, datatype) for name, datatype, _ in rows] == [
        (one["name"], one["datatype"]) for one in tensors
    ]
    for (_, _, shape), one in zip(rows, tensors, strict=True):
        assert shape.count(",") + 1 == len(one["shape"])
