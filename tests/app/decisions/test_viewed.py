"""What the record keeps of a part of several views: one line, the worst view first."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from app.decisions.decision import OfViews
from app.decisions.evidence import write_evidence
from app.decisions.recorder import Recorder
from app.serving.inference_statistics import Timing
from app.serving.inspection import Inspection, Seen
from app.serving.views import MISSING, Key, Look, Of, Part
from app.settings import Settings
from engines.image import ImageLimits
from engines.store.versions import Store
from engines.verdict import judge
from support.damage import seeds
from support.fake_model import fake_model

MODEL = fake_model(0.5)
TIMING = Timing(0.1, 2.0, 20.0, 22.1)
PICTURE = seeds()["png_colour"]


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    found = Recorder(Settings(data_dir=tmp_path, record_near=0, record_sample=0))
    found.start()
    yield found
    found.close()


def look(view: str, raw: float | None, image: bytes | None = PICTURE) -> Look:
    """A view with a raw score, whose limit is 1; without one it was damaged."""
    found = Look(view, f"id-{view}", "fake", "0" * 64, 1_764_400_000_000, image)
    found.ended.set()
    if raw is None:
        found.code = "bad_image"
        return found
    sha256 = hashlib.sha256(image or b"").hexdigest()
    seen = Seen("PNG", 320, 200, None, sha256)
    heat = np.full((8, 8), raw, np.float32)
    found.inspection = Inspection(MODEL, seen, judge(raw, MODEL.scale), heat, None, TIMING)
    return found


def part(*looks: Look, of: int | None = None) -> Part:
    found = Part(Key("plc-3", "A", "P 1"), "first", Of(of or len(looks)), 0.0)
    found.looks = {one.view: one for one in looks}
    found.decided.set()
    return found


def test_a_part_is_one_line_with_the_numbers_of_its_worst_view(recorder: Recorder) -> None:
    recorder.viewed(part(look("left", 0.2), look("top", 1.7), look("rear", 1.1)))
    kept = recorder.read(lambda it: it.one("first"))
    assert kept is not None
    one = kept.decision
    assert (one.id, one.part, one.who, one.verdict, one.code) == (
        "first", "P 1", "plc-3", "anomaly", "",
    )  # fmt: skip
    assert (one.raw_score, one.width, one.model) == (1.7, 320, "fake")
    found = OfViews.read(one.views)
    assert found is not None
    assert (found.line, found.of, found.decided_by) == ("A", 3, "top")
    said = {view.view: (view.id, view.verdict, view.raw_score) for view in found.views}
    assert said == {
        "left": ("id-left", "normal", 0.2), "top": ("id-top", "anomaly", 1.7),
        "rear": ("id-rear", "anomaly", 1.1),
    }  # fmt: skip
    assert recorder.read(lambda it: it.span()) == (1, 1)
    quarters = recorder.read(lambda it: list(it.quarters(0, 2**60)))
    assert [(quarter.parts, quarter.rejects) for *_, quarter in quarters] == [(1, 1)]


def test_a_part_that_lacks_a_view_has_no_score_and_says_which(recorder: Recorder) -> None:
    recorder.viewed(part(look("left", 0.2), look("top", None), of=3))
    kept = recorder.read(lambda it: it.one("first"))
    assert kept is not None
    one = kept.decision
    assert (one.verdict, one.code, one.raw_score, one.model) == ("none", MISSING, None, "fake")
    found = OfViews.read(one.views)
    assert found is not None
    codes = {view.view: (view.verdict, view.code) for view in found.views}
    assert codes == {
        "left": ("normal", ""), "top": ("none", "bad_image"), "?": ("none", MISSING),
    }  # fmt: skip
    assert one.sha256 == hashlib.sha256(PICTURE).hexdigest()  # of the damaged one, which is kept
    assert recorder.pictures.image(kept.number) == PICTURE


def test_an_anomaly_that_lacks_a_view_is_recorded_as_one(recorder: Recorder) -> None:
    recorder.viewed(part(look("left", 1.2), of=2))
    kept = recorder.read(lambda it: it.one("first"))
    assert kept is not None
    assert (kept.decision.verdict, kept.decision.raw_score) == ("anomaly", 1.2)


def test_a_view_that_is_still_judged_at_the_deadline_says_so(recorder: Recorder) -> None:
    running = look("top", None, None)
    running.code = ""
    running.ended.clear()
    recorder.viewed(part(look("left", 0.2), running))
    kept = recorder.read(lambda it: it.one("first"))
    assert kept is not None
    found = OfViews.read(kept.decision.views)
    assert found is not None
    assert found.views[1].code == "deadline_exceeded"


def test_pictures_are_kept_of_views_by_the_rules_and_of_the_worst_where_any_is(
    recorder: Recorder,
) -> None:
    limits = ImageLimits()
    recorder.viewed(part(look("left", 0.2), look("top", 1.7), look("rear", 1.1)))
    recorder.viewed(part(look("left", 0.2), look("top", 0.3)))
    assert recorder.flush()
    pictures = recorder.pictures
    assert pictures.image(1) == PICTURE
    assert pictures.image(1, "rear") == PICTURE
    for view in ("", "rear"):
        assert pictures.drawn(1, limits, over_picture=True, view=view)[:4] == b"\x89PNG"
    for number, view in ((1, "left"), (1, "top"), (2, ""), (2, "left")):
        with pytest.raises(FileNotFoundError):
            pictures.image(number, view)
    kept = recorder.read(lambda it: it.one("first", 1))
    assert kept is not None
    assert kept.picture_bytes == sum(
        path.stat().st_size for path in recorder.folder.rglob("pictures/**/*") if path.is_file()
    )
    recorder.delete_picture(kept, "anna", "a person is in it")
    assert not list(recorder.folder.glob("pictures/*/*"))


def test_pictures_of_views_that_belong_to_nothing_are_swept_at_the_start(tmp_path: Path) -> None:
    recorder = Recorder(Settings(data_dir=tmp_path))
    recorder.pictures.keep(7, PICTURE, None)
    recorder.pictures.keep(7, PICTURE, None, "left")
    recorder.start()
    recorder.read(lambda it: it.span())
    recorder.close()
    assert not list(recorder.folder.rglob("pictures/*/*"))


def test_the_evidence_has_each_view_that_is_kept(recorder: Recorder, tmp_path: Path) -> None:
    recorder.viewed(part(look("left", 0.2), look("top", 1.7), look("rear", 1.1)))
    kept = recorder.read(lambda it: it.one("first"))
    assert kept is not None
    path = tmp_path / "evidence.zip"
    with path.open("wb") as file:
        write_evidence(file, "P 1", [(kept, [])], recorder, Store(tmp_path), ImageLimits())
    with zipfile.ZipFile(path) as found:
        assert {name for name in found.namelist() if name.startswith("decisions")} == {
            "decisions/1-first.json", "decisions/1-first.png", "decisions/1-first.overlay.png",
            "decisions/1-first.rear.png", "decisions/1-first.rear.overlay.png",
        }  # fmt: skip
        assert '"views"' in found.read("decisions/1-first.json").decode()
    ordinary = kept._replace(decision=replace(kept.decision, views=""))
    with path.open("wb") as file:
        write_evidence(file, "P 1", [(ordinary, [])], recorder, Store(tmp_path), ImageLimits())
    with zipfile.ZipFile(path) as found:
        assert '"views"' not in found.read("decisions/1-first.json").decode()


def test_nothing_is_recorded_where_that_is_off(tmp_path: Path) -> None:
    recorder = Recorder(Settings(data_dir=tmp_path, record="off"))
    recorder.viewed(part(look("left", 0.2)))
    assert not recorder._waiting
