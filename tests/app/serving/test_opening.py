"""Claims about versions whose opening takes more than there is, or ends the server."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from app.serving import memory_ledger
from engines.errors import OutOfMemory
from engines.machine.memory import MIB
from engines.machine.memory_needs import bytes_needed, unpacked
from engines.meta import Meta
from engines.runtimes.cuda import LOST_EXIT_CODE
from engines.runtimes.openvino import OpenVINORuntime
from engines.serving import opening
from engines.store.bundle import ONNX, Bundle
from engines.store.versions import Store
from support.in_process import in_process, settings_of
from support.plans import seal, tiny_bank, tiny_bundle, tiny_onnx
from support.project import ROOT
from support.server import serving
from support.waiting import until


@pytest.fixture(autouse=True)
def hears_a_hang_up() -> Iterator[None]:
    """What is started hears SIGHUP, also where the tests themselves were started with nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


BOMB = 256 * MIB

# A server that ends, as the memory killer ends it, when it opens a version named in KILLS.
KILLED = """
import os, signal, sys
from app.serving import loader
really = loader.open_model
def open_model(folder, name, version, *others):
    if version in os.environ["KILLS"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return really(folder, name, version, *others)
loader.open_model = open_model
sys.argv = ["kensa"]
from app.__main__ import main
main()
"""

# One whose opening of a version takes for ever, and meanwhile may lose its GPU.
OPENS_FOR_EVER = """
import os, sys, time
from app.serving import loader
from engines.runtimes import cuda
def open_model(*_):
    open(os.environ["OPENING"], "w").close()
    while not os.path.exists(os.environ["OPENING"] + ".lost"):
        time.sleep(0.05)
    cuda._when_lost("The GPU is lost.")
    time.sleep(600)
loader.open_model = open_model
sys.argv = ["kensa"]
from app.__main__ import main
main()
"""


# One that is started with nohup.
NO_HANG_UP = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
sys.argv = ["kensa"]
from app.__main__ import main
main()
"""


def bomb(folder: Path, size: int = BOMB) -> Path:
    """A model whose bank is small as a file and large in memory."""
    bundle = tiny_bundle(folder, tiny_bank(0))
    rows = np.zeros((size // 4 // 8, 8), np.float32)
    np.savez_compressed(bundle / "memory_bank.npz", embeddings=rows, coverage_radius=1.0)
    seal(bundle)
    return bundle


def test_a_bank_is_reckoned_as_it_is_in_memory(tmp_path: Path) -> None:
    bundle = bomb(tmp_path / "bomb")
    path = bundle / "memory_bank.npz"
    assert path.stat().st_size < BOMB / 100
    assert unpacked(path) >= BOMB
    assert bytes_needed(bundle) >= BOMB


def test_a_bank_is_reckoned_by_what_its_header_says_too(tmp_path: Path) -> None:
    """numpy takes the memory before it reads the numbers."""
    path = tmp_path / "bank.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("embeddings.npy", "w") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 28, 8)}
        np.lib.format.write_array_header_1_0(file, header)
    assert unpacked(path) == (1 << 28) * 8 * 4


@pytest.mark.parametrize(("side", "took"), [(256, 140), (512, 270), (1024, 788)])
def test_what_is_reckoned_lies_above_what_a_patchcore_took_at_any_size(
    tmp_path: Path, side: int, took: int
) -> None:
    """MiB, with resnet18, a bank of 200 rows and batches of four: VmHWM of a process of its own."""
    bundle = tiny_bundle(tmp_path / "part", np.zeros((200, 384), np.float32))
    (bundle / ONNX).write_bytes(bytes(11_143_252))
    Meta.read(bundle / "meta.json").with_(image_size=side).write(bundle / "meta.json")
    assert took < bytes_needed(bundle) / MIB < 3 * took


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\3\4"])
def test_what_is_no_bank_is_reckoned_as_a_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bank.npz").write_bytes(content)
    assert unpacked(tmp_path / "bank.npz") == len(content)


def test_a_version_that_cannot_ever_fit_is_not_opened_even_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_ledger, "total_bytes", lambda: BOMB)
    store = Store(tmp_path / "data" / "models")
    version = store.take_in("part", bomb(tmp_path / "bomb"), {})
    store.activate("part", version)

    async def ask(client: httpx.AsyncClient, _: Any) -> None:
        found = (await client.get("/models/part")).json()
        assert found["live"] is None
        assert "this machine has no more than 256 MiB" in found["problem"]
        answer = await client.post(f"/models/part/versions/{version}/activate")
        assert (answer.status_code, answer.json()["code"]) == (507, "out_of_memory")

    in_process(settings_of(tmp_path), ask)


def test_a_person_who_knows_that_it_fits_lets_it_be_opened_by_what_the_sentence_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a model needs is reckoned, and lies above what it takes."""
    monkeypatch.setattr(memory_ledger, "total_bytes", lambda: MIB)
    store = Store(tmp_path / "data" / "models")
    version = store.take_in("part", tiny_bundle(tmp_path / "part"), {})
    store.activate("part", version)

    async def look(client: httpx.AsyncClient, _: Any) -> Any:
        return (await client.get("/models/part")).json()

    refused = in_process(settings_of(tmp_path), look)
    assert refused["live"] is None
    named = re.search(r"set KENSA_MODEL_MEMORY_MIB=(\d+), and it is tried", refused["problem"])
    assert named
    too_little = in_process(settings_of(tmp_path, model_memory_mib=int(named[1]) // 2), look)
    assert too_little["live"] is None
    assert (
        in_process(settings_of(tmp_path, model_memory_mib=int(named[1])), look)["live"] == version
    )


def test_a_bank_that_is_larger_than_what_is_free_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "free_bytes", lambda: BOMB // 2)
    monkeypatch.setattr(Bundle, "memory_bank", lambda _: pytest.fail("it is read"))
    with pytest.raises(OutOfMemory, match="256 MiB unpacked, and 128 MiB are free"):
        opening.open_model(bomb(tmp_path / "bomb"), "part", "1", opening.Opening())


def test_a_graph_that_makes_more_than_what_is_free_is_not_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_onnx(tmp_path / "model.onnx", bank=False)
    model = onnx.load(path)
    assert OpenVINORuntime(path).image_size == 32
    many = numpy_helper.from_array(np.array([BOMB // 4], np.int64), "many")
    model.graph.initializer.append(many)
    value = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.0])
    model.graph.node[-1].output[0] = "score_"
    model.graph.node.extend(
        [
            helper.make_node("ConstantOfShape", ["many"], ["large"], value=value),
            helper.make_node("ReduceMax", ["large"], ["nothing"], keepdims=0),
            helper.make_node("Add", ["score_", "nothing"], ["score"]),
        ]
    )
    onnx.save(model, path)
    assert path.stat().st_size < 10_000
    monkeypatch.setattr("engines.runtimes.openvino.free_bytes", lambda: BOMB // 2)
    with pytest.raises(OutOfMemory, match="a tensor of 256 MiB, and 128 MiB are free"):
        OpenVINORuntime(path)


def killed(folder: Path, version: str) -> int:
    """Start a server that is killed when it opens a version; how it ended."""
    command, environment = starting(folder, version, KILLED)
    return subprocess.run(command, cwd=ROOT, env=environment, timeout=60, check=False).returncode


def starting(folder: Path, version: str, program: str) -> tuple[list[str], dict[str, str]]:
    environment = {
        "KENSA_DATA_DIR": str(folder / "data"), "KENSA_PORT": "0", "KENSA_WORKER": "off",
        "KENSA_GATE_FOUND": "0", "KENSA_CACHE_DIR": str(folder / "cache"), "KILLS": version,
        "OPENING": str(folder / "opening"),
    }  # fmt: skip
    return [sys.executable, "-c", program], {**os.environ, **environment}


def test_a_version_whose_opening_ended_the_server_is_left_until_a_person_wants_it(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path / "data" / "models")
    good = store.take_in("part", tiny_bundle(tmp_path / "good"), {})
    bad = store.take_in("part", tiny_bundle(tmp_path / "bad", offset=1.0), {})
    for version in (good, bad):
        store.activate("part", version)
    assert killed(tmp_path, bad) == -9
    for _ in range(2):  # not the next start alone
        with serving(tmp_path) as server:
            found = server.client.get("/models/part").json()
            assert found["live"] == good
            assert f"in place of {bad}, which ended the server while it was opened" in str(found)
            assert server.client.get("/readyz").status_code == 200
    with serving(tmp_path) as server:
        answer = server.client.post(f"/models/part/versions/{bad}/activate")
        assert (answer.status_code, answer.json()["live"]) == (200, bad)
    with serving(tmp_path) as server:  # it has proved itself
        assert server.client.get("/models/part").json()["live"] == bad


def test_the_only_version_whose_opening_ended_the_server_is_named_and_may_be_loaded(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path / "data" / "models")
    only = store.take_in("part", tiny_bundle(tmp_path / "only"), {})
    store.activate("part", only)
    assert killed(tmp_path, only) == -9
    with serving(tmp_path) as server:
        found = server.client.get("/models/part").json()
        assert found["live"] is None
        assert "ended the server while it was opened" in found["problem"]
        assert "activate makes one live" in found["problem"]
        assert server.client.post("/v2/repository/models/part/load").status_code == 200


def test_a_version_that_opened_well_before_is_tried_once_more_after_a_kill(tmp_path: Path) -> None:
    """Nobody knows whether it was to blame: `kill -9`, or the memory killer, came just then."""
    store = Store(tmp_path / "data" / "models")
    only = store.take_in("part", tiny_bundle(tmp_path / "only"), {})
    store.activate("part", only)
    for kills in (1, 1, 2):  # each start that ends well makes up for the kill before it
        with serving(tmp_path) as server:
            found = server.client.get("/models/part").json()
            assert (found["live"], found["problem"]) == (only, None)
        for _ in range(kills):
            assert killed(tmp_path, only) == -9
    with serving(tmp_path) as server:  # twice, with nothing in between
        found = server.client.get("/models/part").json()
        assert found["live"] is None
        assert "ended the server while it was opened" in found["problem"]
        assert server.client.post("/v2/repository/models/part/load").status_code == 200
    with serving(tmp_path) as server:
        assert server.client.get("/models/part").json()["live"] == only


def test_a_server_that_is_killed_between_two_openings_blames_no_version(tmp_path: Path) -> None:
    store = Store(tmp_path / "data" / "models")
    store.activate("part", store.take_in("part", tiny_bundle(tmp_path / "only"), {}))
    for _ in range(3):
        with serving(tmp_path) as server:
            assert server.client.get("/models/part").json()["live"]
            server.process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_who_is_told_to_end_and_killed_while_it_opens_a_version_blames_none(
    tmp_path: Path, number: signal.Signals
) -> None:
    """As `docker stop` does it where opening takes longer than its 10 s; or a terminal closes."""
    store = Store(tmp_path / "data" / "models")
    only = store.take_in("part", tiny_bundle(tmp_path / "only"), {})
    store.activate("part", only)
    command, environment = starting(tmp_path, only, OPENS_FOR_EVER)
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        try:
            until((tmp_path / "opening").exists)
            assert store.did_not_end("part", only)
            process.send_signal(number)
            until(lambda: not store.did_not_end("part", only), within_s=10)
        finally:
            process.kill()
    with serving(tmp_path) as server:
        assert server.client.get("/models/part").json()["live"] == only


def test_a_gpu_that_is_lost_while_a_version_is_opened_is_not_that_versions_fault(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path / "data" / "models")
    only = store.take_in("part", tiny_bundle(tmp_path / "only"), {})
    store.activate("part", only)
    command, environment = starting(tmp_path, only, OPENS_FOR_EVER)
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        until((tmp_path / "opening").exists)
        assert store.did_not_end("part", only)
        (tmp_path / "opening.lost").touch()
        assert process.wait(timeout=30) == LOST_EXIT_CODE
    assert not store.did_not_end("part", only)


def test_a_hang_up_stops_a_server_in_good_order_unless_nobody_is_to_hear_it(
    tmp_path: Path,
) -> None:
    with serving(tmp_path) as server:
        server.process.send_signal(signal.SIGHUP)
        assert server.process.wait(timeout=30) == 0
    with serving(tmp_path, ("-c", NO_HANG_UP)) as server:
        server.process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert server.client.get("/livez").status_code == 200


def test_a_version_that_ended_the_server_at_the_gate_is_held(tmp_path: Path) -> None:
    store = Store(tmp_path / "data" / "models")
    good = store.take_in("part", tiny_bundle(tmp_path / "good"), {})
    store.activate("part", good)
    bad = store.take_in("part", tiny_bundle(tmp_path / "bad", offset=1.0), {"activate": True})
    assert killed(tmp_path, bad) == -9

    async def ask(client: httpx.AsyncClient, app: Any) -> str:
        while app.state.store.gate("part", bad) is None:
            await asyncio.sleep(0.05)
        return str((await client.get("/models/part")).json()["versions"][0])

    found = in_process(settings_of(tmp_path), ask)
    assert "'state': 'held'" in found
    assert "ended the server while it was opened" in found


def test_after_a_restart_of_the_machine_it_is_tried_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut while a version was opened says nothing of the version."""
    store = Store(tmp_path / "models")
    version = store.take_in("part", tiny_bundle(tmp_path / "bundle"), {})
    mark = store.gate_folder("part", version) / "opening"
    for boot, refused in (("one", False), ("two", True)):
        monkeypatch.setattr("engines.store.versions._boot", lambda boot=boot: boot)
        under_way = store.opening("part", version)
        under_way.__enter__()
        kept = mark.read_bytes()
        under_way.__exit__(None, None, None)
        mark.with_name("opened").unlink()
        mark.write_bytes(kept)  # as a process leaves it that ends meanwhile
        assert store.did_not_end("part", version), "of this very boot"
        monkeypatch.setattr("engines.store.versions._boot", lambda: "another")
        assert store.did_not_end("part", version) == refused
