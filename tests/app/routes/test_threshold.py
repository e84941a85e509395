"""Claims about a threshold that is changed without training again. Over HTTP."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from engines.meta import Meta
from engines.serving.opening import Opening, open_model
from engines.store.versions import Store
from engines.verdict import Scale
from support.clients import Clients
from support.damage import picture, saved
from support.double import environment, reports
from support.line import NAME, Line, line, variant
from support.plans import tiny_bank, tiny_bundle, with_plan
from support.server import agreed
from support.waiting import until

SHARES = (0.001, 0.01, 0.1)
WHY = {"reason": "Too many good parts are rejected."}


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    images = [picture(300 + 20 * n, 256) for n in range(4)]
    return [
        saved(Image.fromarray(np.roll(image, 31 * n, 1)), "PNG") for n, image in enumerate(images)
    ]


@pytest.fixture(scope="module")
def model(kensa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a table of limits, as training writes it."""
    scale = Scale.of(Meta.read(kensa_model / "meta.json"))
    span = scale.raw_max - scale.raw_min
    limits = [
        {"false_rejects": share, "raw": scale.threshold_auto + at * span, "at_most": share + 0.1}
        for share, at in zip(SHARES, (0.2, 0.0, -0.2), strict=True)
    ]
    return variant(
        kensa_model, tmp_path_factory.mktemp("tabled") / "model",
        calibration={"false_rejects": 0.01, "limits": limits},
    )  # fmt: skip


def get(running: Line) -> dict[str, Any]:
    answer = running.server.client.get(f"/models/{NAME}/threshold")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def put(running: Line, **body: Any) -> httpx.Response:
    return running.server.client.put(f"/models/{NAME}/threshold", json={**WHY, **body})


def changed(running: Line, **body: Any) -> dict[str, Any]:
    answer = put(running, **body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def version_of(running: Line, version: str) -> dict[str, Any]:
    (found,) = (one for one in running.model()["versions"] if one["version"] == version)
    return dict(found)


# ---- what it is, and another one --------------------------------------------------------------


def test_the_threshold_is_told_in_all_its_forms(
    model: Path, photos: list[bytes], tmp_path: Path
) -> None:
    with line(tmp_path, model) as running:
        found, verdict = get(running), running.server.infer(photos[0]).json()
        assert found["model"] == NAME
        assert (found["version"], found["state"]) == (verdict["model_version"], "live")
        assert (found["threshold"], found["raw"]) == (
            verdict["threshold"],
            verdict["raw_threshold"],
        )
        assert (found["false_rejects"], found["at_most"]) == (0.01, pytest.approx(0.11))
        assert [row["false_rejects"] for row in found["limits"]] == [*SHARES]


@pytest.mark.parametrize("key", ["threshold", "raw", "false_rejects"])
def test_another_one_is_live_at_once_and_undone_by_a_rollback(
    key: str, model: Path, photos: list[bytes], tmp_path: Path
) -> None:
    with line(tmp_path, model) as running:
        before = get(running)
        scale = Scale.of(Meta.read(model / "meta.json"))
        raw = scale.threshold_auto + 0.1 * (scale.raw_max - scale.raw_min)
        wanted = {"threshold": 0.6, "raw": raw, "false_rejects": 0.005}[key]
        after = changed(running, **{key: wanted})
        assert after == get(running)
        assert after[key] == pytest.approx(wanted)
        assert after["threshold"] > before["threshold"]
        assert after["false_rejects"] < before["false_rejects"]
        verdict = running.server.infer(photos[0]).json()
        assert verdict["model_version"] == after["version"] != before["version"]
        assert verdict["raw_threshold"] == after["raw"]
        assert verdict["is_anomalous"] == (verdict["raw_score"] > after["raw"])
        made = version_of(running, after["version"])
        assert (made["state"], made["raw_threshold"]) == ("live", after["raw"])
        assert made["gate"]["by_hand"]
        assert made["origin"] == {
            "activate": False, "asked": {key: wanted}, "parent": before["version"],
            "threshold_of": before["version"], **WHY,
        }  # fmt: skip
        back = f"/models/{NAME}/rollback"
        made_since = {"live": before["version"]}, {"to": after["version"]}
        for wrong in made_since:
            answer = running.server.client.post(back, params=wrong)
            assert (answer.status_code, agreed(answer)) == (409, "conflict")
            assert get(running) == after
        wanted_back = {"live": after["version"], "to": before["version"]}
        assert running.server.client.post(back, params=wanted_back).status_code == 200
        assert get(running) == before
        assert running.server.client.post(back, params=wanted_back).status_code == 409
        assert get(running) == before
    with line(tmp_path) as again:
        assert get(again) == before


def test_it_has_the_very_files_and_shares_the_engine(
    model: Path, photos: list[bytes], tmp_path: Path
) -> None:
    with line(tmp_path, model, KENSA_MODEL_MEMORY_MIB="200") as running:  # no room for two
        old = get(running)["version"]
        score = running.score(photos[0])[1]
        new = changed(running, threshold=0.6)["version"]
        one, two = (running.store.folder(NAME, version) for version in (old, new))
        names = {path.name for path in one.iterdir()}
        assert names == {path.name for path in two.iterdir()}
        assert {"report.json", "golden.npz", "model.onnx", "memory_bank.npz"} < names
        for name in names - {"meta.json", "manifest.json"}:
            assert (one / name).samefile(two / name), name
        metas = [Meta.read(folder / "meta.json") for folder in (one, two)]
        assert metas[1] == metas[0].with_(image_threshold=0.6)
        assert running.score(photos[0]) == (new, score)
        for version in (old, new):  # back and forth as well
            assert running.activate(version).status_code == 200
            assert running.score(photos[0]) == (version, score)
        log = running.server.log.read_text().splitlines()
        loaded = ["the limit alone" in line for line in log if "Loaded " in line]
        assert loaded == [False, True, True, True]


def test_what_is_shared_is_closed_with_the_last_version_that_has_it(
    model: Path, kensa_model: Path, photos: list[bytes], tmp_path: Path
) -> None:
    other = variant(kensa_model, tmp_path / "other", bank=0.9)
    with line(tmp_path, other, model, KENSA_LOG_LEVEL="debug") as running:
        first = running.store.versions(NAME)[0]
        for threshold in (0.6, 0.7):
            changed(running, threshold=threshold)
            assert running.server.infer(photos[0]).status_code == 200
        assert "Closed " not in running.server.log.read_text()
        assert running.activate(first).status_code == 200
        until(lambda: running.server.log.read_text().count("Closed ") == 1)
        assert running.score(photos[0])[0] == first


def test_a_version_whose_files_were_damaged_since_it_was_loaded_can_still_be_left(
    model: Path, kensa_model: Path, photos: list[bytes], tmp_path: Path
) -> None:
    other = variant(kensa_model, tmp_path / "other", bank=0.9)
    with line(tmp_path, other, model) as running:
        first, live = running.store.versions(NAME)
        (running.store.folder(NAME, live) / "manifest.json").write_text("{")
        answer = put(running, threshold=0.6)
        assert (answer.status_code, agreed(answer)) == (422, "bad_bundle")
        assert "manifest.json" in answer.json()["error"]
        assert running.score(photos[0])[0] == live
        assert running.activate(first).status_code == 200
        assert running.score(photos[0])[0] == first


def test_where_files_cannot_have_two_names_they_are_copied(
    kensa_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    store = Store(tmp_path / "models")
    base = store.take_in(NAME, kensa_model, {})
    meta = Meta.read(kensa_model / "meta.json").with_(image_threshold=0.6)
    new = store.publish_threshold(NAME, base, meta, {})
    assert (
        not store.folder(NAME, base)
        .joinpath("model.onnx")
        .samefile(store.folder(NAME, new) / "model.onnx")
    )
    assert store.differences(NAME, base, new) == {"meta.json"}
    store.check(NAME, new)


def test_through_the_gate_it_is_held_where_known_parts_would_get_wrong_verdicts(
    model: Path, photos: list[bytes], tmp_path: Path
) -> None:
    with line(tmp_path, model) as running:
        before = running.score(photos[0])[0]
        strict = changed(running, threshold=0.0, gate=True)
        assert (strict["threshold"], strict["state"]) == (0.0, "at the gate")
        assert running.wait(strict["version"], "live", "held") == "held"
        assert (
            "known normals are rejected"
            in version_of(running, strict["version"])["gate"]["reasons"][0]
        )
        assert running.score(photos[0])[0] == before
        small = changed(running, threshold=0.501, gate=True)
        assert running.wait(small["version"], "live", "held") == "live"
        again = changed(running, threshold=0.0, gate=True)  # it is asked about anew
        assert running.wait(again["version"], "live", "held") == "held"
        assert again["version"] != strict["version"]
        assert version_of(running, again["version"])["gate"]["against"] == small["version"]


def test_the_same_threshold_again_is_a_version_of_its_own_with_its_reason(
    model: Path, photos: list[bytes], tmp_path: Path
) -> None:
    with line(tmp_path, model) as running:
        versions = [changed(running, threshold=at, reason=f"to {at}")["version"]
                    for at in (0.6, 0.5, 0.6)]  # fmt: skip
        assert len(set(versions)) == 3
        assert [version_of(running, one)["origin"]["reason"] for one in versions] == [
            "to 0.6", "to 0.5", "to 0.6"
        ]  # fmt: skip
        first = running.store.versions(NAME)[0]
        origins = [version_of(running, one)["origin"] for one in versions]
        assert [one["parent"] for one in origins] == [first, *versions[:2]]
        assert {one["threshold_of"] for one in origins} == {first}
        assert running.score(photos[0])[0] == versions[-1]


def test_many_changes_push_out_no_version_that_was_trained(
    model: Path, kensa_model: Path, tmp_path: Path
) -> None:
    with line(tmp_path, kensa_model, model, KENSA_KEEP_VERSIONS="2") as running:
        trained = running.store.versions(NAME)
        made = [changed(running, threshold=0.5 + n / 100)["version"] for n in range(1, 7)]
        assert running.store.versions(NAME) == [*trained, *made[-2:]]
        running.activate(trained[0])
        other = changed(running, threshold=0.6)["version"]
        assert running.store.versions(NAME) == [*trained, made[-1], other]


# ---- what cannot be ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "Say exactly one of threshold"),
        ({"threshold": 0.5, "raw": 1}, "not threshold and raw."),
        ({"threshold": 1.5}, "it must be a number from 0 to 1."),
        ({"threshold": True}, "must be a number from 0 to 1"),
        ({"threshold": "0.5"}, "must be a number from 0 to 1"),
        ({"threshold": None}, "Say exactly one of threshold"),
        ({"raw": 1e9}, "for this model it must be a number from "),
        ({"raw": [1]}, "must be a number from "),
        ({"false_rejects": 0.5}, "must be a number from 0.001 to 0.1."),
        ({"false_rejects": {}}, "must be a number from 0.001 to 0.1"),
        ({"threshold": 0.5, "reason": None}, "reason"),
        ({"threshold": 0.5, "reason": "  "}, "reason"),
        ({"threshold": 0.5, "reason": "x" * 501}, "at most 500 characters"),
        ({"threshold": 0.5, "gate": "yes"}, "gate"),
        ({"treshold": 0.5}, "treshold"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_what_can(
    body: dict[str, Any], sentence: str, tabled: Line
) -> None:
    versions = tabled.store.versions(NAME)
    answer = put(tabled, **body)
    assert (answer.status_code, agreed(answer)) == (422, "bad_request")
    assert sentence in answer.json()["error"]
    assert tabled.store.versions(NAME) == versions


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400])
def test_what_is_no_number_is_refused(number: str, tabled: Line) -> None:
    for key in ("threshold", "raw", "false_rejects"):
        text = f'{{"{key}": {number}, "reason": "why"}}'
        answer = tabled.server.client.put(
            f"/models/{NAME}/threshold", content=text, headers={"Content-Type": "application/json"}
        )
        assert (answer.status_code, agreed(answer)) == (422, "bad_request")
        assert "a number from" in answer.json()["error"]


@pytest.fixture(scope="module")
def tabled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    """A server that only refuses."""
    with line(tmp_path_factory.mktemp("tabled"), model) as running:
        yield running


def test_a_version_without_a_table_takes_no_budget_and_says_so(
    kensa_model: Path, tmp_path: Path
) -> None:
    old = variant(kensa_model, tmp_path / "old", calibration=None)
    with line(tmp_path, old) as running:
        found = get(running)
        assert (found["false_rejects"], found["at_most"], found["limits"]) == (None, None, [])
        answer = put(running, false_rejects=0.01)
        assert (answer.status_code, agreed(answer)) == (422, "bad_request")
        assert "train it again, or say threshold or raw" in answer.json()["error"]
        assert changed(running, threshold=0.6)["false_rejects"] is None


def test_without_a_live_version_there_is_no_threshold(model: Path, tmp_path: Path) -> None:
    with line(tmp_path) as running:
        client = running.server.client
        for answer in (put(running, threshold=0.5), client.get(f"/models/{NAME}/threshold")):
            assert (answer.status_code, agreed(answer)) == (404, "unknown_model")
        running.publish(model, activate=False)
        for answer in (put(running, threshold=0.5), client.get(f"/models/{NAME}/threshold")):
            assert (answer.status_code, agreed(answer)) == (409, "conflict")
            assert "has no live version" in answer.json()["error"]


def fill(ballast: Path) -> None:
    """Take what is left of a disk."""
    with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
        while file.write(bytes(4096)) == 4096:
            pass


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_on_a_full_disk_nothing_is_changed_and_it_says_so(
    model: Path, photos: list[bytes], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(data)]
    if subprocess.run(mount).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        with line(tmp_path, model) as running:
            before = get(running), running.store.versions(NAME), running.model()
            for spare in range(9):  # so that it fails at each step that writes
                fill(data / "ballast")
                os.truncate(data / "ballast", (data / "ballast").stat().st_size - 4096 * spare)
                answer = put(running, threshold=0.6)
                if answer.status_code == 200:
                    break
                assert (answer.status_code, agreed(answer)) == (507, "disk_full")
                assert answer.json()["error"].startswith("Nothing was changed: ")
                assert (get(running), running.store.versions(NAME), running.model()) == before
                assert not [*running.store.root.glob(".staging/tmp*")]
            assert spare > 0
            assert answer.status_code == 200, "there was room in the end"
            assert running.score(photos[0])[0] == answer.json()["version"]
    finally:
        subprocess.run(["umount", "-l", str(data)], check=True)


# ---- under load -------------------------------------------------------------------------------


def change_under_load(
    folder: Path, bundle: Path, photos: list[bytes], changes: int, **settings: str
) -> dict[str, Any]:
    """Change the threshold while parts come; every verdict is that of the version it names."""
    with line(folder, bundle, **settings) as running:
        limits = {(first := get(running))["version"]: first["raw"]}
        memory, took = [], []
        with Clients(running.server.url, photos) as clients:
            for number in range(changes):
                began = time.perf_counter()
                if number % 10 == 9:
                    answer = running.server.client.post(f"/models/{NAME}/rollback")
                    assert answer.status_code == 200, answer.text
                else:
                    made = changed(running, threshold=0.3 + 0.4 * (number % 97) / 97)
                    limits[made["version"]] = made["raw"]
                took.append(time.perf_counter() - began)
                memory.append(running.server.memory("VmRSS"))
        assert clients.failures == []
        wrong = [
            one for _, one in clients.seen
            if one["raw_threshold"] != limits[one["model_version"]]
            or one["is_anomalous"] != (one["raw_score"] > one["raw_threshold"])
        ]  # fmt: skip
        assert wrong == [], f"{len(wrong)} of {len(clients.seen)} verdicts"
        assert "Traceback" not in running.server.log.read_text()
        served = Counter(one["model_version"] for _, one in clients.seen)
        return {"verdicts": len(clients.seen), "versions": len(served), "memory": memory,
                "median_s": float(np.median(took))}  # fmt: skip


def test_changes_under_load_lose_no_part_and_mix_no_limits(
    model: Path, photos: list[bytes], tmp_path: Path
) -> None:
    found = change_under_load(tmp_path, model, photos, changes=20, KENSA_BATCHING="on")
    assert found["versions"] > 5


def test_a_person_does_not_wait_for_gaps_of_the_line_that_the_gate_waits_for(
    model: Path, photos: list[bytes], tmp_path: Path
) -> None:
    with line(tmp_path, model) as running:
        for photo in photos * 8:  # which the gate shows to the new version as well
            running.score(photo)
        with Clients(running.server.url, photos) as clients:
            changed(running, threshold=0.501, gate=True)
            time.sleep(1.0)  # the gate has begun, at a hundredth of the line
            began = time.perf_counter()
            versions = [changed(running, threshold=at)["version"] for at in (0.51, 0.52)]
            took = time.perf_counter() - began
        assert clients.failures == []
        print(f"two changes took {took:.1f} s")
        assert took < 30  # two minutes and more where the gate does not give way
        assert running.score(photos[0])[0] == versions[-1]


def test_a_version_that_is_pruned_while_it_waits_for_the_gate_is_no_failure(
    model: Path, photos: list[bytes], tmp_path: Path
) -> None:
    with line(tmp_path, model, KENSA_KEEP_VERSIONS="1") as running:
        with Clients(running.server.url, photos):
            waiting = [changed(running, threshold=0.6 + n / 100, gate=True) for n in range(4)]
            for n in range(3):
                changed(running, threshold=0.51 + n / 100)
        asked = {one["version"] for one in waiting}

        def settled() -> bool:
            left = [one for one in running.model()["versions"] if one["version"] in asked]
            return all(one["state"] in ("held", "live", "kept") for one in left)

        until(settled, running.server.log.read_text)
        time.sleep(1.0)
        assert "Traceback" not in running.server.log.read_text()


def test_changes_at_the_same_time_follow_each_other(
    model: Path, photos: list[bytes], tmp_path: Path
) -> None:
    with line(tmp_path, model, KENSA_KEEP_VERSIONS="50") as running:
        made: list[dict[str, Any]] = []

        def change(number: int) -> None:
            with httpx.Client(base_url=running.server.url, timeout=60, trust_env=False) as client:
                body = {"threshold": 0.4 + number / 100, **WHY}
                made.append(client.put(f"/models/{NAME}/threshold", json=body).json())

        threads = [threading.Thread(target=change, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        versions = sorted(one["version"] for one in made)
        parents = [version_of(running, one)["origin"]["parent"] for one in versions]
        assert parents == [running.store.versions(NAME)[0], *versions[:-1]]
        assert running.score(photos[0])[0] == versions[-1]
        raws = {one["version"]: one["raw"] for one in made}
        assert get(running)["raw"] == raws[versions[-1]]


@pytest.mark.soak
def test_five_hundred_changes_under_load_lose_no_part_and_no_memory(
    model: Path, photos: list[bytes], tmp_path: Path
) -> None:
    found = change_under_load(tmp_path, model, photos, changes=500, KENSA_BATCHING="on")
    memory = found["memory"]
    first, last = np.median(memory[45:55]), np.median(memory[-10:])
    print(
        f"{found['verdicts']} verdicts of {found['versions']} versions;"
        f" {first / 1e6:.1f} MB after 50 changes, {last / 1e6:.1f} MB after 500;"
        f" a change took {found['median_s'] * 1000:.0f} ms (median)"
    )
    assert last < 1.05 * first


# ---- how it is opened -------------------------------------------------------------------------


@pytest.mark.parametrize("with_bank", [True, False], ids=["with a bank", "without"])
def test_only_the_limit_is_new_whatever_the_kind(with_bank: bool, tmp_path: Path) -> None:
    bank = tiny_bank(1) if with_bank else None
    store = Store(tmp_path / "models")
    base = store.take_in(NAME, tiny_bundle(tmp_path / "tiny", bank), {})
    meta = Meta.read(store.folder(NAME, base) / "meta.json").with_(image_threshold=0.7)
    new = store.publish_threshold(NAME, base, meta, {})
    how = Opening(batching=False)
    first = open_model(store.folder(NAME, base), NAME, base, how)
    second = open_model(store.folder(NAME, new), NAME, new, how, beside=first)
    assert second.runtime is first.runtime
    assert (first.scale.threshold, second.scale.threshold) == (0.5, 0.7)
    assert (first.limit_alone, second.limit_alone) == (False, True)
    first.runtime.close()


def test_on_tensorrt_the_engine_and_the_bank_stay_where_they_are(
    photos: list[bytes], tmp_path: Path
) -> None:
    bundle = with_plan(tiny_bundle(tmp_path / "tiny", tiny_bank(1)), tmp_path / "planned")
    reported = tmp_path / "reported"
    reported.mkdir()
    settings = environment(KENSA_DOUBLE_REPORT=str(reported))
    change_under_load(tmp_path, bundle, photos, changes=12, **settings)
    (did,) = reports(reported)
    assert did["crashes"] == []
    assert (did["engines"], did["contexts"]) == (1, 1)
