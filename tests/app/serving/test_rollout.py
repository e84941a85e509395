"""Claims about versions in memory: swapped under load, gated, rolled back, refused. Over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
import weakref
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from engines.files import sha256
from engines.meta import Meta
from engines.store.versions import Store
from support.clients import Clients
from support.damage import picture, saved
from support.double import environment, reports
from support.in_process import in_process, settings_of
from support.line import NAME, SLOW_DISK, Line, line, variant
from support.plans import tiny_bank, tiny_bundle, with_bank, with_plan
from support.project import run, write_meta
from support.server import RAW, Server, agreed, serving
from support.waiting import until


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    images = [picture(300 + 20 * n, 256) for n in range(4)]
    return [
        saved(Image.fromarray(np.roll(image, 31 * n, 1)), "PNG") for n, image in enumerate(images)
    ]


@pytest.fixture(scope="module")
def other(kensa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same graph with another bank, and so with other scores."""
    return variant(kensa_model, tmp_path_factory.mktemp("other") / "model", bank=0.9)


@pytest.fixture(scope="module")
def regraphed(kensa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another graph, which needs another engine: as after a training of the network itself."""
    import onnx

    target = tmp_path_factory.mktemp("regraphed") / "model"
    shutil.copytree(kensa_model, target)
    model = onnx.load(target / "model.onnx")
    model.doc_string = "another one"
    onnx.save(model, target / "model.onnx")
    return variant(target, target.parent / "hashed", bank=1.1)


# ---- a swap -----------------------------------------------------------------------------------


def swap_under_load(
    folder: Path, bundles: list[Path], photos: list[bytes], swaps: int, **settings: str
) -> dict[str, Any]:
    """Swap between versions while clients send parts; check every verdict they got."""
    settings |= {"KENSA_GATE_RECENT": "4", "KENSA_LOG_LEVEL": "debug", "KENSA_BATCHING": "on"}
    with line(folder, *bundles, **settings) as running:
        versions = running.store.versions(NAME)
        expected = {}
        for version in versions:
            assert running.activate(version).status_code == 200
            expected |= {(n, version): running.score(photo)[1] for n, photo in enumerate(photos)}
        assert len(set(expected.values())) == len(expected), "versions must be told apart"
        with Clients(running.server.url, photos) as clients, watched(running.server) as memory:
            for swap in range(swaps):
                version = versions[swap % len(versions)]
                assert running.activate(version).status_code == 200
        assert clients.failures == []
        wrong = [
            body
            for photo, body in clients.seen
            if expected[photo, body["model_version"]] != body["raw_score"]
        ]
        assert wrong == [], f"{len(wrong)} of {len(clients.seen)} verdicts are not of their version"
        served = Counter(body["model_version"] for _, body in clients.seen)
        assert set(served) == set(versions)
        assert "Traceback" not in running.server.log.read_text()
        assert most_in_memory(running.server) == 2
        return {"verdicts": len(clients.seen), "memory": memory}


@contextmanager
def watched(server: Server) -> Iterator[list[int]]:
    """The memory of a server, bytes, twenty times a second: between swaps, and amid them."""
    memory: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            memory.append(server.memory("VmRSS"))

    thread = threading.Thread(target=watch)
    thread.start()
    yield memory
    done.set()
    thread.join()


def most_in_memory(server: Server) -> int:
    """How many versions were in memory at once, by the log."""
    lines = server.log.read_text().splitlines()
    changes = [("Loaded " in line) - ("Closed " in line) for line in lines]
    return int(np.cumsum(changes).max())


def test_swaps_under_load_lose_no_part_and_mix_no_versions(
    kensa_model: Path, other: Path, regraphed: Path, photos: list[bytes], tmp_path: Path
) -> None:
    """To the same graph with another bank, to another graph, and back."""
    swap_under_load(tmp_path, [kensa_model, other, regraphed], photos, swaps=4)


@pytest.mark.soak
def test_a_thousand_swaps_under_load_lose_no_part_and_no_memory(
    kensa_model: Path, other: Path, regraphed: Path, photos: list[bytes], tmp_path: Path
) -> None:
    bundles = [kensa_model, other, regraphed]
    found = swap_under_load(tmp_path, bundles, photos, swaps=1000)
    # Of one version: amid a swap there are two, for longer the busier the machine is.
    tenth = len(found["memory"]) // 10
    first, last = (
        np.percentile(part, 10) for part in (found["memory"][:tenth], found["memory"][-tenth:])
    )
    print(f"{found['verdicts']} verdicts; {first / 1e6:.1f} MB, then {last / 1e6:.1f} MB")
    assert last < 1.02 * first


# On TensorRT's double, with models so small that what is measured is the swapping.


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two banks of one graph, and a graph of its own; each with a plan for a Jetson."""
    folder = tmp_path_factory.mktemp("planned")
    first = with_plan(tiny_bundle(folder / "1", tiny_bank(1)), folder / "first")
    second = with_bank(first, folder / "second", tiny_bank(2, rows=250))
    third = with_plan(tiny_bundle(folder / "3", tiny_bank(3), offset=9.0), folder / "third")
    return [first, second, third]


def on_the_double(folder: Path) -> dict[str, str]:
    reported = folder / "reported"
    reported.mkdir()
    return environment(KENSA_DOUBLE_REPORT=str(reported))


def in_good_order(folder: Path) -> dict[str, Any]:
    """What the server did with its GPU; fails where it did what hardware would not forgive."""
    (found,) = reports(folder / "reported")
    assert found["crashes"] == []
    assert found["threads"] == 2, "the one that deserialises, and the one for everything else"
    return found


@pytest.mark.parametrize("graph", ["the same", "another"])
def test_swaps_on_tensorrt_lose_no_part_and_mix_no_versions(
    graph: str, planned: list[Path], photos: list[bytes], tmp_path: Path
) -> None:
    first, second, third = planned
    bundles = [first, second if graph == "the same" else third]
    swap_under_load(tmp_path, bundles, photos, swaps=12, **on_the_double(tmp_path))
    did = in_good_order(tmp_path)
    if graph == "the same":
        assert did["engines"] == 1, "a bank alone leaves the engine as it is"
        assert did["contexts"] > 12
    assert did["alive"]["engines"] <= 2


@pytest.mark.soak
def test_a_thousand_swaps_on_tensorrt_lose_no_part_and_no_memory(
    planned: list[Path], photos: list[bytes], tmp_path: Path
) -> None:
    found = swap_under_load(tmp_path, planned, photos, swaps=1000, **on_the_double(tmp_path))
    first, last = (np.median(part) for part in (found["memory"][:100], found["memory"][-100:]))
    print(f"{found['verdicts']} verdicts; {first / 1e6:.1f} MB, then {last / 1e6:.1f} MB")
    did = in_good_order(tmp_path)
    assert did["alive"]["engines"] <= 2
    assert last < 1.1 * first


def test_a_bank_alone_is_swapped_without_a_new_engine(
    kensa_model: Path, other: Path, regraphed: Path, tmp_path: Path
) -> None:
    with line(tmp_path, other, kensa_model) as running:
        first, _ = running.store.versions(NAME)
        third = running.store.take_in(NAME, regraphed, {})
        for version in (first, third):
            assert running.activate(version).status_code == 200
        log = running.server.log.read_text()
        loaded = ["the bank alone" in line for line in log.splitlines() if "Loaded" in line]
        assert loaded == [False, True, False]


# ---- the gate ---------------------------------------------------------------------------------


def test_a_version_leaves_memory_without_a_search_for_cycles(
    kensa_model: Path, regraphed: Path, tmp_path: Path
) -> None:
    """What was opened at the start is passed over by it, so it would stay for ever."""
    settings = settings_of(tmp_path)
    store = Store(settings.data / "models")
    first, second = (store.take_in(NAME, bundle, {}) for bundle in (kensa_model, regraphed))
    store.activate(NAME, first)

    async def swap(client: httpx.AsyncClient, app: Any) -> None:
        model = app.state.inspector.residents.get(NAME)
        left = [weakref.ref(model), weakref.ref(model.runtime)]
        del model
        gc.disable()
        try:
            answer = await client.post(f"/models/{NAME}/versions/{second}/activate")
            assert answer.status_code == 200, answer.text
            for _ in range(100):
                await asyncio.sleep(0.1)
                if not any(one() for one in left):
                    return
            raise AssertionError([gc.get_referrers(one()) for one in left if one() is not None])
        finally:
            gc.enable()

    in_process(settings, swap)


def test_what_is_published_to_go_live_goes_live(
    kensa_model: Path, photos: list[bytes], tmp_path: Path
) -> None:
    slightly = variant(kensa_model, tmp_path / "new", bank=1.0001)
    with line(tmp_path, kensa_model) as running:
        before, score = running.score(photos[0])
        version = running.publish(slightly)
        assert running.wait(version, "live", "held") == "live"
        after, new_score = running.score(photos[0])
        assert (before, after) == (running.store.versions(NAME)[0], version)
        assert score != new_score
        gate = running.model()["versions"][0]["gate"]
        assert gate["ok"]
        assert gate["against"] == before
        assert gate["groups"]["normal"]["images"] >= 6
        assert gate["groups"]["defect"]["images"] >= 8
        assert gate["groups"]["recent"]["images"] == 1


def test_a_version_that_is_said_to_be_live_answers(
    kensa_model: Path, photos: list[bytes], tmp_path: Path
) -> None:
    # It is written down first: on a slow disk that is a while before it is in memory.
    with serving(tmp_path, ("-c", SLOW_DISK)) as server:
        running = Line(server, Store(tmp_path / "data" / "models"))
        version = running.publish(kensa_model)
        assert running.wait(version, "live") == "live"
        assert running.score(photos[0])[0] == version


def test_a_version_that_is_not_to_go_live_is_only_kept(
    kensa_model: Path, other: Path, tmp_path: Path
) -> None:
    with line(tmp_path, kensa_model) as running:
        version = running.publish(other, activate=False)
        time.sleep(1.5)
        assert running.state(version) == "kept"


def test_flipped_verdicts_hold_a_version_for_a_person_who_can_look_at_them(
    kensa_model: Path, photos: list[bytes], tmp_path: Path
) -> None:
    meta = Meta.read(kensa_model / "meta.json")
    assert meta.image_threshold_auto is not None
    assert meta.raw_image_max is not None
    lenient = variant(
        kensa_model, tmp_path / "lenient",
        image_threshold_auto=meta.image_threshold_auto * 100, raw_image_max=meta.raw_image_max * 100
    )  # fmt: skip
    with line(tmp_path, kensa_model) as running:
        before, _ = running.score(photos[0])
        version = running.publish(lenient)
        assert running.wait(version, "live", "held") == "held"
        assert running.score(photos[0])[0] == before
        gate = running.model()["versions"][0]["gate"]
        assert not gate["ok"]
        assert any("known defects pass now" in reason for reason in gate["reasons"])
        assert {flip["becomes"] for flip in gate["flips"]} == {"Normal"}
        for flip in gate["flips"]:
            answer = running.server.client.get(
                f"/models/{NAME}/versions/{version}/flips/{flip['number']}"
            )
            assert answer.headers["content-type"] == "image/jpeg"
            assert Image.open(io.BytesIO(answer.content)).size == (256, 256)
        missing = running.server.client.get(f"/models/{NAME}/versions/{version}/flips/999")
        assert agreed(missing) == "unknown_version"
        assert running.activate(version).status_code == 200
        assert running.score(photos[0])[0] == version
        assert running.model()["versions"][0]["gate"]["by_hand"]


def test_the_last_parts_of_the_line_are_shown_to_a_new_version(
    kensa_model: Path, photos: list[bytes], tmp_path: Path
) -> None:
    meta = Meta.read(kensa_model / "meta.json")
    shutil.copytree(kensa_model, tmp_path / "blind")
    (tmp_path / "blind" / "golden.npz").unlink()
    files = {k: v for k, v in (meta.files or {}).items() if k != "golden.npz"}
    blind = meta.with_(files=files)
    blind.write(tmp_path / "blind" / "meta.json")
    with line(tmp_path, tmp_path / "blind", KENSA_GATE_RECENT="3") as running:
        scores = [running.score(photo)[1] for photo in photos]
        between = float(np.mean(sorted(scores)[1:3]))
        was_normal = [score <= float(meta.image_threshold_auto or 0) for score in scores]
        flips = sum(
            (score <= between) != normal for score, normal in zip(scores, was_normal, strict=True)
        )
        assert flips, "the photos must not all be judged as before"
        strict = variant(tmp_path / "blind", tmp_path / "new", image_threshold_auto=between)
        version = running.publish(strict)
        running.wait(version, "live", "held")
        recent = running.model()["versions"][0]["gate"]["groups"]["recent"]
        assert recent["images"] == 3


@pytest.mark.parametrize("damage", ["a weight is no number", "never compared", "a changed file"])
def test_what_cannot_be_trusted_never_judges(
    damage: str, kensa_model: Path, photos: list[bytes], tmp_path: Path
) -> None:
    new = variant(
        kensa_model, tmp_path / "new", bank=0.99, finite=damage != "a weight is no number"
    )
    if damage == "never compared":
        (new / "report.json").write_text("{}")
        meta = Meta.read(new / "meta.json")
        hashes = {**(meta.files or {}), "report.json": sha256(new / "report.json")}
        meta.with_(files=hashes).write(new / "meta.json")
    with line(tmp_path, kensa_model) as running:
        before = running.score(photos[0])
        version = running.publish(new, activate=damage != "a changed file")
        if damage == "a changed file":
            bank = running.store.folder(NAME, version) / "memory_bank.npz"
            bank.write_bytes(bank.read_bytes()[:-1] + b"?")
            answer = running.activate(version)
            assert (answer.status_code, agreed(answer)) == (422, "bad_bundle")
        expected = "held" if damage == "never compared" else "refused"
        assert running.wait(version, "live", "held", "refused") == expected
        assert running.score(photos[0]) == before
        assert running.server.client.get("/readyz").status_code == 200


def test_no_flip_at_all_may_be_asked_for(
    kensa_model: Path, photos: list[bytes], tmp_path: Path
) -> None:
    meta = Meta.read(kensa_model / "meta.json")
    assert meta.image_threshold_auto is not None
    lenient = variant(
        kensa_model, tmp_path / "new", image_threshold_auto=meta.image_threshold_auto * 3,
        raw_image_max=float(meta.raw_image_max or 1) * 3,
    )  # fmt: skip
    with line(tmp_path, kensa_model, KENSA_GATE_FLIPS="1") as running:
        running.score(photos[0])
        version = running.publish(lenient, max_flips=0.0)
        assert running.wait(version, "live", "held") == "held"
        gate = running.model()["versions"][0]["gate"]
        assert gate["limit"] == 0
        assert gate["flips"]


def test_an_older_version_does_not_take_the_place_of_a_newer_one(
    kensa_model: Path, other: Path, photos: list[bytes], tmp_path: Path
) -> None:
    """Such as one that could not be loaded at its time, because the disk was full."""
    store = Store(tmp_path / "data" / "models")
    store.activate(NAME, store.take_in(NAME, kensa_model, {}))
    late = store.take_in(
        NAME, variant(kensa_model, tmp_path / "late", bank=1.01), {"activate": True}
    )
    newer = store.take_in(NAME, other, {})
    store.activate(NAME, newer)
    with line(tmp_path) as running:
        assert running.wait(late, "live", "held") == "held"
        assert running.score(photos[0])[0] == newer


def test_a_version_of_another_image_size_is_not_shown_images_it_cannot_see(
    kensa_model: Path, trained: Path, sample_data: Path, photos: list[bytes], tmp_path: Path
) -> None:
    meta = write_meta(tmp_path / "meta.json", image_size=128)
    run(
        "retrain.py",
        "--model",
        "patchcore",
        "--pretrained_pth",
        "untrained",
        "--meta_json",
        meta,
        "--category",
        "sample_bracket",
        "--data_root",
        sample_data,
        "--out_dir",
        tmp_path / "small",
    )
    run(
        "convtrt.py",
        "--model",
        "patchcore",
        "--weights_pth",
        tmp_path / "small" / "model.pth",
        "--meta_json",
        tmp_path / "small" / "meta.json",
        "--out_dir",
        tmp_path / "engine",
    )
    with line(tmp_path, kensa_model) as running:
        running.score(photos[0])
        version = running.publish(tmp_path / "engine")
        assert running.wait(version, "live", "held") == "live"
        assert running.score(photos[0])[0] == version
        groups = running.model()["versions"][0]["gate"]["groups"]
        assert {group["images"] for group in groups.values()} == {0}


# ---- going back -------------------------------------------------------------------------------


def test_one_call_goes_back_and_another_one_forward(
    kensa_model: Path, other: Path, photos: list[bytes], tmp_path: Path
) -> None:
    with line(tmp_path, kensa_model, other) as running:
        old, new = running.store.versions(NAME)
        scores = {}
        for expected in (old, new, old):
            answer = running.server.client.post(f"/models/{NAME}/rollback")
            assert answer.status_code == 200, answer.text
            assert answer.json()["live"] == expected
            version, score = running.score(photos[0])
            assert version == expected
            assert scores.setdefault(version, score) == score
    with line(tmp_path) as again:
        assert again.score(photos[0])[0] == old, "a restart forgot the rollback"


def test_without_a_version_before_there_is_nothing_to_go_back_to(
    kensa_model: Path, tmp_path: Path
) -> None:
    with line(tmp_path, kensa_model) as running:
        answer = running.server.client.post(f"/models/{NAME}/rollback")
        assert (answer.status_code, agreed(answer)) == (409, "conflict")
        unknown = running.server.client.post("/models/nope/rollback")
        assert (unknown.status_code, agreed(unknown)) == (404, "unknown_model")
        assert agreed(running.activate("0009-aaaaaaaaaaaa")) == "unknown_version"


def test_a_version_that_rejects_too_much_is_taken_back_by_itself(
    kensa_model: Path, photos: list[bytes], tmp_path: Path
) -> None:
    meta = Meta.read(kensa_model / "meta.json")
    assert meta.raw_image_max is not None
    assert meta.raw_image_min is not None
    strict = variant(kensa_model, tmp_path / "strict", image_threshold_auto=meta.raw_image_min / 10)
    settings = {"KENSA_ROLLBACK_PARTS": "5", "KENSA_ROLLBACK_MAX_REJECTS": "0.5"}
    with line(tmp_path, kensa_model, **settings) as running:
        before = running.score(photos[0])[0]
        version = running.publish(strict, max_flips=1.0)
        running.wait(version, "live")
        for _ in range(5):
            running.server.infer(photos[0])
        assert running.wait(version, "held") == "held"
        assert running.score(photos[0])[0] == before
        reasons = running.model()["versions"][0]["gate"]["reasons"]
        assert "Of its first 5 parts 100.0% were rejected" in reasons[0]


# ---- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("unload_first", ["off", "on"])
def test_where_two_do_not_fit_it_says_so_or_lets_the_old_one_go_first(
    unload_first: str, kensa_model: Path, other: Path, photos: list[bytes], tmp_path: Path
) -> None:
    settings = {"KENSA_MODEL_MEMORY_MIB": "200", "KENSA_UNLOAD_FIRST": unload_first}
    with line(tmp_path, other, kensa_model, **settings) as running:
        new, old = running.store.versions(NAME)
        assert running.score(photos[0])[0] == old
        answer = running.activate(new)
        if unload_first == "off":
            assert (answer.status_code, agreed(answer)) == (507, "out_of_memory")
            assert "KENSA_UNLOAD_FIRST" in answer.json()["error"]
            assert running.score(photos[0])[0] == old
        else:
            assert answer.status_code == 200, answer.text
            assert running.score(photos[0])[0] == new
            assert "is unloaded" in running.server.log.read_text()


def test_unloaded_first_the_old_one_comes_back_where_the_new_one_cannot_be_used(
    kensa_model: Path, photos: list[bytes], tmp_path: Path
) -> None:
    broken = variant(kensa_model, tmp_path / "broken", bank=0.99, finite=False)
    settings = {"KENSA_MODEL_MEMORY_MIB": "200", "KENSA_UNLOAD_FIRST": "on"}
    with line(tmp_path, kensa_model, **settings) as running:
        before = running.score(photos[0])
        version = running.publish(broken)
        running.wait(version, "refused")
        until(lambda: running.server.client.get("/readyz").status_code == 200)
        assert running.score(photos[0]) == before


# ---- the start --------------------------------------------------------------------------------


def garbage(path: Path) -> None:
    path.write_bytes(b"\x00garbage\xff" * 9)


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_live_version_is_put_aside_and_the_one_before_judges(
    kensa_model: Path, other: Path, photos: list[bytes], tmp_path: Path
) -> None:
    """Five models, each with another file damaged."""
    damages: dict[str, tuple[str, Callable[[Path], Any]]] = {
        "meta": ("meta.json", garbage),
        "graph": ("model.onnx", half),
        "bank": ("memory_bank.npz", garbage),
        "manifest": ("manifest.json", Path.unlink),
        "report": ("report.json", half),
    }
    store = Store(tmp_path / "data" / "models")
    for name, (file, damage) in damages.items():
        for bundle in (kensa_model, other):
            store.activate(name, store.take_in(name, bundle, {}))
        damage(store.folder(name, store.versions(name)[1]) / file)
    known = {name: store.versions(name) for name in damages}
    for _ in range(2):  # a second start is no different
        with line(tmp_path) as running:
            client = running.server.client
            assert client.get("/readyz").status_code == 200
            for name, (good, bad) in known.items():
                answer = client.post(f"/infer?model={name}", content=photos[0], headers=RAW)
                assert answer.json()["model_version"] == good
                assert set(client.get(f"/models/{name}").json()["refused"]) == {bad}
            assert "Traceback" not in running.server.log.read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_with_a_damaged_live_version_and_a_full_disk_the_one_before_judges(
    kensa_model: Path, other: Path, photos: list[bytes], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(data)]
    if subprocess.run(mount).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        store = Store(data / "models")
        for bundle in (kensa_model, other):
            store.activate(NAME, store.take_in(NAME, bundle, {}))
        good, bad = store.versions(NAME)
        garbage(store.folder(NAME, bad) / "model.onnx")
        with contextlib.suppress(OSError), (data / "ballast").open("wb", buffering=0) as ballast:
            while ballast.write(bytes(4096)) == 4096:
                pass
        with line(tmp_path) as running:
            assert running.score(photos[0])[0] == good
            assert running.server.client.get("/readyz").status_code == 200
    finally:
        subprocess.run(["umount", "-l", str(data)], check=True)


def test_a_damaged_pointer_costs_no_model(
    kensa_model: Path, other: Path, photos: list[bytes], tmp_path: Path
) -> None:
    store = Store(tmp_path / "data" / "models")
    texts = [b"", b"\xff\xfe", b"0001-nonsense\n\n", b"0009-aaaaaaaaaaaa\n\n"]
    for name, text in zip("abcd", texts, strict=True):
        for bundle in (kensa_model, other):
            store.activate(name, store.take_in(name, bundle, {}))
        (store.root / name / "live").write_bytes(text)
    with line(tmp_path) as running:
        for name in "abcd":
            answer = running.server.client.post(
                f"/infer?model={name}", content=photos[0], headers=RAW
            )
            assert answer.json()["model_version"] == store.versions(name)[-1]


def test_a_model_that_cannot_be_saved_is_named_and_the_others_judge(
    kensa_model: Path, other: Path, photos: list[bytes], tmp_path: Path
) -> None:
    store = Store(tmp_path / "data" / "models")
    for name in ("bolt", "nut"):
        store.activate(name, store.take_in(name, kensa_model, {}))
    garbage(store.folder("bolt", store.versions("bolt")[0]) / "model.onnx")
    with line(tmp_path) as running:
        ready = running.server.client.get("/readyz")
        assert (ready.status_code, agreed(ready)) == (503, "not_ready")
        assert "bolt" in ready.json()["error"]
        url = "/infer?model="
        good = running.server.client.post(f"{url}nut", content=photos[0], headers=RAW)
        assert good.status_code == 200
        bad = running.server.client.post(f"{url}bolt", content=photos[0], headers=RAW)
        assert (bad.status_code, agreed(bad)) == (503, "not_ready")
        # It is mended while the server runs.
        version = running.publish(other, "bolt")
        running.wait(version, "live", name="bolt")
        assert running.server.client.get("/readyz").status_code == 200


def test_with_several_models_a_part_says_which_one(
    kensa_model: Path, photos: list[bytes], tmp_path: Path
) -> None:
    store = Store(tmp_path / "data" / "models")
    for name in ("bolt", "nut"):
        store.activate(name, store.take_in(name, kensa_model, {}))
    with line(tmp_path) as running:
        answer = running.server.infer(photos[0])
        assert (answer.status_code, agreed(answer)) == (404, "unknown_model")
        assert "bolt" in answer.json()["error"]
        assert "nut" in answer.json()["error"]


def test_a_folder_that_was_taken_in_before_does_not_replace_what_was_learned_since(
    kensa_model: Path, photos: list[bytes], tmp_path: Path
) -> None:
    settings = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_MODEL_NAME": NAME}
    learned = variant(kensa_model, tmp_path / "new", bank=1.0001)
    with line(tmp_path, **settings) as running:
        first = running.score(photos[0])[0]
        version = running.publish(learned)
        running.wait(version, "live")
    with line(tmp_path, **settings) as running:
        assert running.score(photos[0])[0] == version
        assert running.store.versions(NAME) == [first, version]


def test_a_folder_whose_name_is_not_utf_8_is_taken_in_and_known_again(
    kensa_model: Path, other: Path, photos: list[bytes], tmp_path: Path
) -> None:
    folder = tmp_path / os.fsdecode("検査bolt".encode("cp932"))  # Windows in Japanese
    shutil.copytree(kensa_model, folder)
    with line(tmp_path, KENSA_MODEL_DIR=str(folder)) as running:
        version = running.score(photos[0])[0]
        told = running.server.client.get(f"/models/bolt/versions/{version}").json()
        assert told["origin"]["folder"].endswith(r"/\x8c\x9f\x8d\xb8bolt")
    shutil.rmtree(folder)
    shutil.copytree(other, folder)
    with line(tmp_path, KENSA_MODEL_DIR=str(folder)) as running:
        assert running.score(photos[0])[0] != version
        assert "which has changed" in running.server.log.read_text()
    (folder / "meta.json").unlink()
    with line(tmp_path, KENSA_MODEL_DIR=str(folder)) as running:
        problem = running.server.client.get("/models/bolt").json()["problem"]
        assert r"\x8c\x9f" in problem


# ---- taking in --------------------------------------------------------------------------------


def zipped(folder: Path) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for path in folder.iterdir():
            archive.write(path, f"engine/{path.name}")
    return data.getvalue()


@pytest.mark.parametrize("form", [False, True])
def test_a_zip_of_a_model_is_taken_in_and_goes_live(
    form: bool, kensa_model: Path, photos: list[bytes], tmp_path: Path
) -> None:
    data = zipped(kensa_model)
    with line(tmp_path) as running:
        client = running.server.client
        if form:
            answer = client.post("/models?name=bolt", files={"file": ("bolt.zip", data)})
        else:
            kind = {"Content-Type": "application/zip"}
            answer = client.post("/models?name=bolt", content=data, headers=kind)
        assert answer.status_code == 201, answer.text
        version = answer.json()["version"]
        assert answer.headers["location"] == f"/models/bolt/versions/{version}"
        assert not answer.json()["needs_conversion"]
        running.wait(version, "live", name="bolt")
        assert running.score(photos[0])[0] == version
        assert not list((tmp_path / "data" / "datasets" / "uploads").glob("*"))


def test_weights_without_an_engine_are_kept_until_they_are_converted(
    trained: Path, tmp_path: Path
) -> None:
    with line(tmp_path) as running:
        answer = running.server.client.post(
            "/models?name=bolt",
            content=zipped(trained),
            headers={"Content-Type": "application/zip"},
        )
        assert answer.status_code == 201, answer.text
        assert answer.json()["needs_conversion"]
        assert running.state(answer.json()["version"], "bolt") == "kept"


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"", 422, "bad_request"),
        (b"PK\x03\x04nonsense", 422, "bad_request"),
        (b"hello", 422, "bad_request"),
    ],
)
def test_what_is_no_model_is_refused(data: bytes, status: int, code: str, tmp_path: Path) -> None:
    with line(tmp_path) as running:
        answer = running.server.client.post(
            "/models?name=bolt", content=data, headers={"Content-Type": "application/zip"}
        )
        assert (answer.status_code, agreed(answer)) == (status, code), answer.text
        bad = running.server.client.post("/models?name=../x", content=data)
        assert (bad.status_code, agreed(bad)) == (422, "bad_request")
        assert running.server.client.get("/models").json() == {"models": []}


# ---- kills ------------------------------------------------------------------------------------


def kill_while_swapping(
    folder: Path, bundles: list[Path], photos: list[bytes], kills: int, seed: int = 0
) -> Counter[str]:
    """Kill the server at random moments of swaps; the next one must serve a whole version."""
    chance = random.Random(seed)
    live: Counter[str] = Counter()
    store = Store(folder / "data" / "models")
    for bundle in bundles:
        store.activate(NAME, store.take_in(NAME, bundle, {}))
    versions = store.versions(NAME)
    expected: dict[str, float] = {}
    for _ in range(kills):
        with line(folder) as running:
            version, score = running.score(photos[0])
            assert version in versions
            assert expected.setdefault(version, score) == score
            assert running.model()["refused"] == {}
            live[version] += 1

            def swap(url: str = running.server.url) -> None:
                with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
                    try:
                        for one in versions * 50:
                            client.post(f"/models/{NAME}/versions/{one}/activate")
                    except httpx.HTTPError:
                        pass  # it was killed

            swapper = threading.Thread(target=swap)
            swapper.start()
            time.sleep(chance.uniform(0, 0.6))
            running.server.process.send_signal(signal.SIGKILL)
            swapper.join()
    assert store.versions(NAME) == versions, "a version was lost"
    return live


def test_a_server_that_is_killed_while_swapping_comes_back_with_a_whole_version(
    kensa_model: Path, other: Path, photos: list[bytes], tmp_path: Path
) -> None:
    kill_while_swapping(tmp_path, [kensa_model, other], photos, kills=4)


@pytest.mark.soak
def test_a_hundred_kills_while_swapping_lose_no_version(
    kensa_model: Path, other: Path, regraphed: Path, photos: list[bytes], tmp_path: Path
) -> None:
    live = kill_while_swapping(tmp_path, [kensa_model, other, regraphed], photos, kills=100)
    print(json.dumps(live))
    assert len(live) == 3
