"""What drifts is named before the parts are rejected for it, and what does not drift is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest

from app.serving.drift import Drift
from app.watching.doctor.command import examine
from engines.camera import CODES, Camera, Learned, Values
from engines.image import resize
from engines.meta import Meta
from engines.serving.opening import Opening, open_model
from engines.serving.resident import Resident
from engines.verdict import Verdict, judge
from support.camera import SIDE, Picture, learned, measured, part, shifted
from support.fake_model import fake_model
from support.in_process import in_process, settings_of
from support.line import variant
from support.server import RAW

PARTS = 30
SCORE = Learned(24, 0.5, 0.1)  # of the fake model's training


@pytest.fixture(scope="module")
def known() -> Camera:
    found = learned(map(part, range(24)))
    return replace(found, statistics={**found.statistics, "score": SCORE})


def model(known: Camera | None, version: str = "0", score: float = SCORE.mean) -> Resident:
    found = fake_model(score)
    content = known.content() if known is not None else None
    return replace(found, meta=found.meta.with_(camera=content), version=version)


def after(
    known: Camera,
    pictures: Iterable[Picture],
    scores: Callable[[int], float] = lambda _: SCORE.mean,
) -> tuple[Drift, Resident]:
    drift, resident = Drift(PARTS), model(known)
    for number, picture in enumerate(pictures):
        drift.count(resident, measured(known, picture), scores(number))
    return drift, resident


def parts(count: int = PARTS, first: int = 100) -> list[Picture]:
    return [part(seed) for seed in range(first, first + count)]


def faded(picture: Picture, share: float) -> Picture:
    return (picture * share).astype(np.uint8)


def names(found: tuple[Drift, Resident]) -> list[str]:
    drift, resident = found
    return [one.statistic for one in drift.changes(resident)]


def test_parts_like_those_of_the_training_do_not_drift(known: Camera) -> None:
    draw = np.random.default_rng(0)
    found = after(known, parts(3 * PARTS), lambda _: draw.normal(SCORE.mean, SCORE.spread))
    assert names(found) == []
    assert max(abs(one.spreads) for one in found[0].look(found[1])) < 1


@pytest.mark.parametrize(
    ("change", "statistic", "words"),
    [
        (lambda one: faded(one, 0.85), "brightness", "brightness 0.2"),
        (lambda one: cv2.blur(one, (3, 3)), "sharpness", "sharpness -3."),
        (shifted(right=8), "shift_x", "shift to the right 3."),
        (lambda one: (one * [1.15, 1, 0.9]).clip(0, 255).astype(np.uint8), "red", "colour (red) +"),
    ],
)
def test_what_changed_is_named_and_by_how_much(
    known: Camera, change: Callable[[Picture], Picture], statistic: str, words: str
) -> None:
    drift, resident = after(known, map(change, parts()))
    found = {one.statistic: one.sentence for one in drift.changes(resident)}
    assert found[statistic].startswith(words)
    assert found[statistic].endswith(f" over the last {PARTS} parts")
    assert {one.statistic for one in drift.look(resident) if abs(one.spreads) > 1} >= {statistic}


def test_scores_that_rise_are_named_and_a_few_rejects_among_them_are_not(known: Camera) -> None:
    assert names(after(known, parts(), lambda _: 0.75)) == ["score"]
    assert names(after(known, parts(), lambda number: 9.0 if number % 4 == 0 else 0.5)) == []


def test_nothing_is_said_before_enough_parts_came_or_of_another_version(known: Camera) -> None:
    dark = [faded(one, 0.7) for one in parts()]
    drift, resident = after(known, dark[:-1])
    assert drift.changes(resident) == []
    assert drift.look(resident) == []
    drift.count(resident, measured(known, dark[-1]), SCORE.mean)
    assert drift.changes(resident)
    assert drift.changes(model(known, version="1")) == []
    drift.count(model(known, version="1"), measured(known, dark[0]), SCORE.mean)
    assert drift.changes(resident) == []
    drift.forget(resident.name)
    assert drift.changes(model(known, version="1")) == []


def test_of_what_varies_too_much_nothing_is_said(known: Camera) -> None:
    wild = {**known.statistics, "shift_x": Learned(24, 0.0, 0.2)}
    assert "shift_x" not in names(after(replace(known, statistics=wild), map(shifted(60), parts())))


def test_what_is_known_of_no_picture_is_not_counted() -> None:
    drift, resident = Drift(1), model(None)
    values: Values | None = None
    drift.count(resident, values, 0.5)
    assert drift.changes(resident) == []


# With a model, and in the server


def test_light_that_fades_is_named_before_the_parts_are_rejected_for_it(
    kensa_model: Path, tmp_path: Path
) -> None:
    """Of 30 parts in a row more than a fifth must be rejected, as KENSA_ROLLBACK_MAX_REJECTS."""
    resident = open_model(kensa_model, "part", "1", Opening(threads=1, batching=False))
    camera = resident.camera
    assert camera is not None
    drift, verdicts, warned = Drift(PARTS), list[Verdict](), list[int]()
    rejected_from: int | None = None
    with_light = [1.0] * 40 + [1 - 0.5 * n / 150 for n in range(150)]
    for number, share in enumerate(with_light):
        picture = faded(part(300 + number), share)
        picture = cv2.resize(picture, (320, 320), interpolation=cv2.INTER_CUBIC)
        pixels = resize(picture, resident.runtime.image_size, resident.meta.resize)
        scores, _ = resident.runtime.infer(pixels[None])
        verdicts.append(judge(float(scores[0]), resident.scale))
        drift.count(resident, camera.measure(picture, pixels), float(scores[0]))
        if any(one.statistic == "brightness" for one in drift.changes(resident)):
            warned.append(number)
        rejects = sum(one.is_anomalous for one in verdicts[-PARTS:])
        if number >= PARTS and rejects > 0.2 * PARTS and rejected_from is None:
            rejected_from = number
    resident.runtime.close()
    assert warned
    assert warned[0] >= 40, "before the light had changed"
    assert rejected_from is not None, "no part was rejected for it"
    assert warned[0] < rejected_from


def test_healthz_metrics_statistics_and_the_model_say_it(known: Camera, tmp_path: Path) -> None:
    def png(picture: Picture) -> bytes:
        data: bytes = cv2.imencode(".png", picture[..., ::-1])[1].tobytes()
        return data

    async def work(client: httpx.AsyncClient, app: Any) -> Any:
        app.state.inspector.residents.put(model(known))
        first = (await client.get("/metrics")).text
        for one in parts(5):
            await client.post("/infer", content=png(faded(one, 0.8)), headers=RAW)
        last = (await client.get("/metrics")).text
        health = (await client.get("/healthz")).json()["degraded"]
        return first, last, health, (await client.get("/statistics")).json()["drift"]

    first, last, health, drift = in_process(settings_of(tmp_path, drift_parts=5), work)
    assert 'kensa_drift_spreads{model="fake",statistic="brightness"} 0.0' in first
    assert 'kensa_drifting{model="fake"} 0.0' in first
    assert 'kensa_drifting{model="fake"} 0.0' not in last
    (sentence,) = [one for one in health if "brightness" in one]
    assert sentence.startswith("fake 0: brightness 0.26 instead of 0.32 ± 0.01 over the last 5")
    found = {one["statistic"]: one for one in drift}["brightness"]
    assert found["sentence"] in sentence
    assert (found["model"], found["version"], found["parts"]) == ("fake", "0", 5)
    off, *_ = in_process(settings_of(tmp_path / "off"), work)
    assert "kensa_drift" not in off


def test_a_model_says_what_was_learned_of_its_pictures_and_what_cannot_be_seen(
    kensa_model: Path, tmp_path: Path
) -> None:
    async def work(client: httpx.AsyncClient, _: Any) -> Any:
        return (await client.get("/models/part")).json()

    settings = settings_of(tmp_path, model_dir=kensa_model, model_name="part", drift_parts=5)
    body = in_process(settings, work)
    assert body["drift"] == []
    camera = body["versions"][0]["camera"]
    assert (camera["pictures"], camera["width"], camera["height"]) == (16, 320, 320)
    assert {*camera["sees"]} | {*camera["blind"]} == {*CODES}
    assert "camera_dark" in camera["sees"]
    brightness = camera["statistics"]["brightness"]
    assert 0 < brightness["low"] < brightness["mean"] < brightness["high"] < 1
    assert camera["statistics"]["score"]["low"] is None


def test_a_version_of_an_older_kensa_is_named_by_the_doctor_and_has_no_camera(
    kensa_model: Path, tmp_path: Path
) -> None:
    older = variant(kensa_model, tmp_path / "older", camera=None)

    async def work(client: httpx.AsyncClient, _: Any) -> Any:
        return (await client.get("/models/part")).json()

    settings = settings_of(tmp_path, model_dir=older, model_name="part")
    assert in_process(settings, work)["versions"][0]["camera"] is None
    for asked in ({"unusable": "dark"}, {"drift_parts": 9}, {}):
        report = examine(settings_of(tmp_path, **asked))
        notes = [one for one in report.findings if "look like" in one.what]
        assert len(notes) == bool(asked)
        assert all(one.level == "note" and "Train it again" in one.do for one in notes)


def test_a_meta_json_keeps_what_was_learned(known: Camera, tmp_path: Path) -> None:
    meta = Meta(model="vae", latent_dim=8, image_size=64).with_(camera=known.content())
    meta.write(tmp_path / "meta.json")
    again = Camera.of(Meta.read(tmp_path / "meta.json").camera)
    assert again is not None
    assert again.content() == known.content()
    assert SIDE == 256
