"""evaluate.py measures what serves, says what it cannot measure, and leaves one page."""

from __future__ import annotations

import base64
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from html import escape, unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

import evaluate as command
import retrain
from engines import image
from engines.files import sha256
from engines.meta import Meta
from engines.promise import FEW_FOUND
from engines.regions import Regions
from engines.runtimes.openvino import OpenVINORuntime
from engines.store.bundle import STRANGE, Bundle
from engines.verdict import BLUR_SIGMA, Scale
from support.project import ASSETS, ROOT, run, write_meta
from workers.evaluation.measures import (
    Seen,
    aupro,
    image_measures,
    label_regions,
    pixel_measures,
)
from workers.evaluation.threshold_origin import drawn_chart, limits_of, origin_facts, origin_notes
from workers.progress import Progress

CATEGORY = "sample_bracket"


@dataclass(frozen=True)
class Result:
    """What an evaluation left."""

    out_dir: Path
    said: str  # on stdout

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out_dir / "evaluation.json").read_text())
        return found

    @property
    def rows(self) -> list[dict[str, str]]:
        with (self.out_dir / "predictions.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    @property
    def page(self) -> str:
        return (self.out_dir / "evaluation.html").read_text()


def flags_of(model: Path, data: Path, out_dir: Path, **changes: str | Path | float) -> list[str]:
    flags = {"model_dir": model, "category": CATEGORY, "data_root": data, "out_dir": out_dir}
    return [
        str(word) for key, value in {**flags, **changes}.items() for word in (f"--{key}", value)
    ]


@pytest.fixture(scope="module")
def result(
    kensa_model: Path, sample_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Result:
    """The drawn parts, judged by the model that learned them, in a process of its own."""
    out_dir = tmp_path_factory.mktemp("evaluated") / "out"
    done = run("evaluate.py", *flags_of(kensa_model, sample_data, out_dir))
    return Result(out_dir, done.stdout)


@pytest.fixture
def own_data(sample_data: Path, tmp_path: Path) -> Path:
    """A copy of the drawn parts that a test may damage."""
    return Path(shutil.copytree(sample_data, tmp_path / "data"))


def test_folder(data: Path, group: str) -> Path:
    return data / "test" / CATEGORY / group


test_folder.__test__ = False  # type: ignore[attr-defined]


def evaluated(flags: list[str], capsys: pytest.CaptureFixture[str]) -> Result:
    assert command.main(flags) == 0
    return Result(Path(flags[flags.index("--out_dir") + 1]), capsys.readouterr().out)


def refusal(flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence of an evaluation that was refused."""
    assert command.main(flags) == 2
    out_dir = Path(flags[flags.index("--out_dir") + 1])
    assert not (out_dir / "evaluation.json").exists()
    assert staging(out_dir) == []
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def staging(out_dir: Path) -> list[Path]:
    return list(out_dir.parent.glob(f".{out_dir.name}.*"))


# ---- the measures --------------------------------------------------------------------------------


def test_the_measures_are_those_that_sklearn_finds_in_the_table(result: Result) -> None:
    report, rows = result.report, result.rows
    truth = np.array([row["group"] == "anomaly" for row in rows])
    scores = np.array([float(row["raw_score"]) for row in rows])
    found = report["image"]
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, scores))
    assert found["average_precision"] == pytest.approx(average_precision_score(truth, scores))
    assert found["f1"] == pytest.approx(f1_score(truth, scores > report["threshold"]["raw"]))
    every_f1 = [f1_score(truth, scores >= score) for score in scores]
    assert found["best_f1"] == pytest.approx(max(every_f1))
    assert f1_score(truth, scores > found["best_f1_threshold"]) == pytest.approx(max(every_f1))
    rejected = scores > report["threshold"]["raw"]
    assert found["false_rejects"] == (rejected & ~truth).sum()
    assert found["misses"] == (~rejected & truth).sum()


def test_the_scores_are_those_of_the_runtime_that_serves(
    result: Result, kensa_model: Path, sample_data: Path
) -> None:
    bundle = Bundle.open(kensa_model)
    runtime, scale = OpenVINORuntime.open(bundle), Scale.of(bundle.meta)
    for row in result.rows[::5]:
        data = (test_folder(sample_data, row["group"]) / row["file"]).read_bytes()
        pixels = image.load(data, runtime.image_size, bit_depth=bundle.meta.bit_depth)
        raw = float(runtime.infer(pixels[None])[0][0])
        assert float(row["raw_score"]) == pytest.approx(raw, rel=1e-5)
        assert float(row["score"]) == pytest.approx(scale.normalise(raw), abs=1e-5)
    assert result.report["threshold"]["raw"] == scale.raw_threshold
    runtime.close()


def test_the_table_has_a_row_per_image_with_its_verdict(result: Result, sample_data: Path) -> None:
    rows, threshold = result.rows, result.report["threshold"]["raw"]
    assert list(rows[0]) == ["file", "group", "raw_score", "score", "label", "correct"]
    there = {
        (path.name, group)
        for group in ("normal", "anomaly")
        for path in test_folder(sample_data, group).iterdir()
    }
    assert {(row["file"], row["group"]) for row in rows} == there
    assert len(rows) == len(there) == 16
    for row in rows:
        assert row["label"] == ("Anomaly" if float(row["raw_score"]) > threshold else "Normal")
        assert (
            row["correct"]
            == str((row["label"] == "Anomaly") == (row["group"] == "anomaly")).lower()
        )


def test_few_images_prove_little_and_the_report_says_how_little() -> None:
    none_of_six = image_measures(np.zeros(6), np.ones(17), 0.5)
    assert none_of_six["false_rejects"] == 0
    assert none_of_six["false_rejects_at_most"] == pytest.approx(1 - 0.05 ** (1 / 6))
    assert none_of_six["misses_at_most"] == pytest.approx(1 - 0.05 ** (1 / 17))
    assert image_measures(np.ones(6), np.ones(1), 0.5)["false_rejects_at_most"] == 1.0


def test_a_part_at_the_threshold_is_normal_as_in_serving() -> None:
    found = image_measures(np.array([1.0]), np.array([1.0, 2.0]), 1.0)
    assert (found["false_rejects"], found["misses"]) == (0, 1)


def test_images_that_all_score_alike_have_measures_too() -> None:
    found = image_measures(np.ones(3), np.ones(3), 1.0)
    assert found["auroc"] == 0.5
    assert found["best_f1_threshold"] < 1.0


# ---- pixels --------------------------------------------------------------------------------------


def blots(seed: int, size: int = 40) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """A map and a mask of three blots, of which two touch at a corner."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((size, size), bool)
    mask[4:9, 4:20] = mask[9:14, 20:24] = mask[25:38, 10:12] = True
    rough = rng.normal(size=(size, size)) + 1.2 * mask
    return cv2.GaussianBlur(rough, (0, 0), 1.0).round(2).astype(np.float32), mask


def numbered(masks: list[NDArray[np.bool_]]) -> NDArray[np.int32]:
    """The regions of all masks, no number twice."""
    labels = [label_regions(mask) for mask in masks]
    before = np.cumsum([0, *(found.max() for found in labels)])
    return np.stack(
        [np.where(found > 0, found + n, 0) for found, n in zip(labels, before, strict=False)]
    ).astype(np.int32)


def aupro_by_definition(
    maps: NDArray[np.float32], regions: NDArray[np.int32], limit: float
) -> float:
    """Threshold by threshold and region by region; the area in trapezia, cut off at the limit."""
    curve = [(0.0, 0.0)]
    for threshold in sorted(set(maps.ravel().tolist()), reverse=True):
        above = maps >= threshold
        overlaps = [above[regions == n].mean() for n in range(1, regions.max() + 1)]
        curve.append((float(above[regions == 0].mean()), float(np.mean(overlaps))))
    area = 0.0
    for (x1, y1), (x2, y2) in pairwise(curve):
        if x1 < limit < x2:
            x2, y2 = limit, y1 + (y2 - y1) * (limit - x1) / (x2 - x1)
        if x2 <= limit:
            area += (x2 - x1) * (y1 + y2) / 2
    return area / limit


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_aupro_is_what_its_definition_says(limit: float) -> None:
    maps, masks = zip(*(blots(seed) for seed in range(3)), strict=True)
    stack, regions = np.stack(maps), numbered(list(masks))
    assert regions.max() == 6  # of each mask two regions: corners connect
    expected = aupro_by_definition(stack, regions, limit)
    assert 0.1 < expected < 0.99
    assert aupro(stack, regions, limit) == pytest.approx(expected, abs=1e-9)


def test_aupro_is_anomalibs() -> None:
    import torch
    from anomalib.metrics.aupro import _AUPRO

    maps, masks = zip(*(blots(seed) for seed in range(4)), strict=True)
    theirs = _AUPRO(fpr_limit=0.3)
    theirs.update(torch.from_numpy(np.stack(maps)), torch.from_numpy(np.stack(masks)).int())
    ours = aupro(np.stack(maps), numbered(list(masks)))
    assert ours == pytest.approx(float(theirs.compute()), abs=1e-5)


def test_a_perfect_map_gets_1_and_an_inverted_one_0() -> None:
    _, mask = blots(0)
    regions, perfect = numbered([mask])[0], mask.astype(np.float32)
    assert aupro(perfect, regions) == pytest.approx(1.0)
    assert aupro(-perfect, regions) == pytest.approx(0.0)
    assert aupro(np.zeros_like(perfect), regions) == pytest.approx(0.15)  # chance: half the limit


def test_a_small_region_counts_as_much_as_a_large_one() -> None:
    regions = np.zeros((20, 20), np.int32)
    regions[:10, :10], regions[15, 15] = 1, 2
    found = (regions == 1).astype(np.float32)  # 100 of 101 pixels; the last one only by chance
    assert aupro(found, regions) == pytest.approx(0.5 + 0.5 * 0.15)


def test_pixels_that_never_count_are_in_no_measure(tmp_path: Path) -> None:
    """A map that is right but for a lamp in the corner."""
    mask = np.zeros((64, 64), np.uint8)
    mask[30:50, 30:50] = 255
    cv2.imwrite(str(tmp_path / "0.png"), mask)
    strange = mask.astype(np.float32)
    strange[:12, :12] = 1000
    part = Seen(
        path=tmp_path / "0.jpg", name="0.jpg", group="anomaly", label="Anomaly", raw_score=1.0,
        score=1.0, anomaly_map=strange, size=(64, 64), overlay="", decode_ms=0, infer_ms=0,
    )  # fmt: skip
    quiet, lamp = Progress(quiet=True), np.zeros((64, 64), bool)
    lamp[:24, :24] = True
    whole = pixel_measures([part], tmp_path, 64, quiet)
    found = pixel_measures([part], tmp_path, 64, quiet, never=Regions(lamp))
    assert whole is not None
    assert found is not None
    assert whole["auroc"] < 0.97 < found["auroc"]
    assert (whole["regions"], found["regions"]) == (1, 1)
    lamp[:] = True
    lamp[0, 0] = False
    nothing = pixel_measures([part], tmp_path, 64, quiet, never=Regions(lamp))
    assert nothing is not None
    assert (nothing["auroc"], nothing["regions"]) == (None, 0)


def test_the_pixel_measures_are_those_of_the_maps_and_masks(
    result: Result, kensa_model: Path, sample_data: Path
) -> None:
    """By hand: raw map, smoothed as it is drawn, enlarged to the mask."""
    runtime = OpenVINORuntime.open(Bundle.open(kensa_model))
    maps, masks = [], []
    for group in ("normal", "anomaly"):
        for path in image.files_in(test_folder(sample_data, group)):
            pixels = image.load(path.read_bytes(), 256)
            raw = runtime.infer(pixels[None])[1][0]
            large = cv2.resize(raw, (256, 256), interpolation=cv2.INTER_NEAREST)
            maps.append(cv2.resize(cv2.GaussianBlur(large, (0, 0), BLUR_SIGMA), (320, 320)))
            mask = sample_data / "masks" / CATEGORY / path.name
            marked = cv2.imread(str(mask), cv2.IMREAD_GRAYSCALE) if group == "anomaly" else None
            masks.append(np.zeros((320, 320), bool) if marked is None else marked > 0)
    runtime.close()
    pixel = result.report["pixel"]
    truth = np.stack(masks)
    assert pixel["auroc"] == pytest.approx(roc_auc_score(truth.ravel(), np.ravel(maps)), abs=1e-4)
    assert pixel["aupro"] == pytest.approx(aupro(np.stack(maps), numbered(masks)), abs=1e-4)
    assert (pixel["masks"], pixel["step"], pixel["missing"]) == (10, 1, [])
    assert pixel["regions"] == numbered(masks).max()


def test_masks_that_are_missing_or_wrong_are_named_and_their_images_left_out(
    kensa_model: Path, own_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masks = own_data / "masks" / CATEGORY
    (masks / "burr_00.png").unlink()
    cv2.imwrite(str(masks / "burr_01.png"), np.full((64, 48), 255, np.uint8))
    cv2.imwrite(str(masks / "dent_00.png"), np.zeros((320, 320), np.uint8))
    (masks / "dent_01.png").write_bytes(b"torn")
    result = evaluated(flags_of(kensa_model, own_data, tmp_path / "out"), capsys)
    pixel = result.report["pixel"]
    assert pixel["masks"] == 6
    assert pixel["missing"] == ["burr_00.png"]
    assert set(pixel["refused"]) == {"burr_01.png", "dent_00.png", "dent_01.png"}
    assert "is 48 x 64 pixels, but burr_01.png is 320 x 320" in pixel["refused"]["burr_01.png"]
    assert "marks no defect" in pixel["refused"]["dent_00.png"]
    assert result.report["images"]["anomaly"] == 10  # they are judged all the same
    for words in ("No mask, left out of the pixel measures: 1 (burr_00.png)", "Mask refused"):
        assert words in result.said
        assert words in result.page


def test_many_pixels_are_thinned_and_the_page_says_so(
    kensa_model: Path,
    sample_data: Path,
    result: Result,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("workers.evaluation.measures.MOST_PIXELS", 500_000)
    thin = evaluated(flags_of(kensa_model, sample_data, tmp_path / "out"), capsys)
    assert thin.report["pixel"]["step"] == 2  # 16 images of 320 x 320 are 1.6 million
    assert "one of every 2 x 2 was compared" in thin.page
    for measure in ("auroc", "aupro"):
        whole = result.report["pixel"][measure]
        assert thin.report["pixel"][measure] == pytest.approx(whole, abs=0.03)


def test_without_masks_images_are_measured_and_pixels_are_not(
    kensa_model: Path, own_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(own_data / "masks")
    result = evaluated(flags_of(kensa_model, own_data, tmp_path / "out"), capsys)
    assert result.report["pixel"] is None
    assert result.report["image"]["auroc"] is not None
    assert "pixels are not measured" in result.said
    assert "AUPRO" not in result.page


# ---- what it leaves ------------------------------------------------------------------------------


def test_every_image_has_an_overlay_that_is_a_picture(result: Result) -> None:
    overlays = sorted((result.out_dir / "overlays").iterdir())
    names = {f"{row['group']}_{Path(row['file']).stem}.png" for row in result.rows}
    assert {path.name for path in overlays} == names
    assert len(overlays) == len(result.rows)
    for path in overlays:
        assert image.decode(path.read_bytes()).shape == (320, 320, 3)


def test_images_of_one_stem_have_an_overlay_each(
    kensa_model: Path, own_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = test_folder(own_data, "normal")
    picture = cv2.imread(str(folder / "0000.png"))
    cv2.imwrite(str(folder / "0000.jpg"), picture)
    result = evaluated(flags_of(kensa_model, own_data, tmp_path / "out"), capsys)
    names = {path.name for path in (result.out_dir / "overlays").iterdir()}
    assert {"normal_0000.png.png", "normal_0000.jpg.png", "normal_0001.png"} <= names
    assert len(names) == len(result.rows) == 17


def test_defects_in_folders_are_judged_measured_and_shown_each_by_its_own_name(
    kensa_model: Path, own_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    defects, masks = test_folder(own_data, "anomaly"), own_data / "masks" / CATEGORY
    for kind in ("burr", "dent"):
        for number in ("00", "01"):
            for folder in (defects, masks):
                (folder / kind).mkdir(exist_ok=True)
                (folder / f"{kind}_{number}.png").rename(folder / kind / f"{number}.png")
    (masks / "dent" / "01.png").unlink()
    windows = os.fsdecode("検査.png".encode("cp932"))
    for folder in (defects, masks):
        (folder / "burr" / "01.png").rename(folder / "burr" / windows)
    (defects / "later.webp").touch()
    result = evaluated(flags_of(kensa_model, own_data, tmp_path / "out"), capsys)
    assert result.report["images"]["anomaly"] == 10
    files = {"burr/00.png", "dent/00.png", r"burr/\x8c\x9f\x8d\xb8.png"}
    assert files <= {row["file"] for row in result.rows}
    names = {path.name for path in (result.out_dir / "overlays").iterdir()}
    assert {"anomaly_burr_00.png", "anomaly_dent_00.png"} <= names
    assert len(names) == len(result.rows)
    pixel = result.report["pixel"]
    assert (pixel["masks"], pixel["missing"], pixel["refused"]) == (9, ["dent/01.png"], {})
    assert f"Passed over 1 in {defects} that end in .webp" in result.said
    assert "later.webp" in result.page


class Loads(HTMLParser):
    """Everything in a page that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        loading = {"src", "srcset", "href", "xlink:href", "data", "poster", "action"}
        self.sources += [value or "" for name, value in attrs if name in loading]


def test_the_page_loads_nothing_and_its_pictures_are_in_it(result: Result) -> None:
    loads = Loads()
    loads.feed(result.page)
    assert not re.search(r"https?:|//\w|url\(|@import", re.sub(r"base64,[\w+/=]+", "", result.page))
    assert not {"script", "link", "iframe", "object"} & set(loads.tags)
    assert len(loads.sources) == loads.tags.count("img") > 0
    assert all(source.startswith("data:image/jpeg;base64,") for source in loads.sources)
    assert "default-src 'none'" in result.page


def test_the_numbers_of_the_report_stand_on_the_page_and_in_the_summary(result: Result) -> None:
    report = result.report
    measured = {
        **report["image"],
        "pixel auroc": report["pixel"]["auroc"],
        "aupro": report["pixel"]["aupro"],
    }
    for name, value in measured.items():
        if isinstance(value, float) and "at_most" not in name:
            assert f"{value:.4f}" in result.page, name
            assert f"{value:.4f}" in result.said, name
    assert f"{report['threshold']['raw']:.4f}" in result.page
    for errors, of in (("misses", "anomaly"), ("false_rejects", "normal")):
        assert f"<b>{report['image'][errors]} of {report['images'][of]}</b>" in result.page
        at_most = 100 * report["image"][f"{errors}_at_most"]
        assert f"at most {at_most:.1f} %" in result.page
    for fact in ("patchcore", "resnet18 layer2, layer3", "256 x 256 px"):
        assert fact in result.page


def test_the_page_shows_the_worst_mistakes_first_and_names_are_text_not_markup(
    kensa_model: Path, own_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a threshold below all scores every normal is a mistake, the highest first."""
    for path in test_folder(own_data, "normal").iterdir():
        path.rename(path.with_name(f"<img src=x>{path.name}"))
    flags = flags_of(kensa_model, own_data, tmp_path / "out", threshold=-1, worst=3)
    result = evaluated(flags, capsys)
    normal = [row for row in result.rows if row["group"] == "normal"]
    worst = sorted(normal, key=lambda row: -float(row["raw_score"]))[:3]
    shown = re.findall(r"False reject</b> normal/(.+?)<small>raw score ([\d.]+)", result.page)
    assert [(unescape(name), score) for name, score in shown] == [
        (row["file"], f"{float(row['raw_score']):.4f}") for row in worst
    ]
    assert "The worst mistakes (3 of 6)" in result.page
    assert result.page.count("<img") == 6


def test_where_there_are_no_mistakes_the_page_shows_the_closest_calls(
    kensa_model: Path, own_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(test_folder(own_data, "anomaly"))
    flags = flags_of(kensa_model, own_data, tmp_path / "out", threshold=1000, worst=2)
    result = evaluated(flags, capsys)
    assert "No mistakes; the closest calls" in result.page
    closest = max(result.rows, key=lambda row: float(row["raw_score"]))
    assert re.findall(r"Good part, passed</b> normal/(\S+?)<", result.page)[0] == closest["file"]
    assert "further right" in result.page  # the threshold is far beyond the histogram


def test_another_threshold_changes_the_verdicts_and_not_the_scores(
    kensa_model: Path,
    sample_data: Path,
    result: Result,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scores = sorted(float(row["raw_score"]) for row in result.rows)
    middle = (scores[4] + scores[5]) / 2
    flags = flags_of(kensa_model, sample_data, tmp_path / "out", threshold=middle)
    other = evaluated(flags, capsys)
    assert sum(row["label"] == "Anomaly" for row in other.rows) == len(scores) - 5
    assert sorted(float(row["raw_score"]) for row in other.rows) == pytest.approx(scores)
    assert other.report["threshold"] == {"raw": middle, "of": "--threshold"}
    assert other.report["image"]["auroc"] == pytest.approx(result.report["image"]["auroc"])
    assert not any("threshold was found with" in note for note in other.report["notes"])


def test_it_says_which_of_the_images_the_threshold_was_found_with(
    result: Result,
    kensa_model: Path,
    own_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Training saw all of them; so far as there are others now, it says nothing of those."""
    words = "The threshold was found with as many {} test images of this category"
    assert words.format("normal and defective") in result.said
    (test_folder(own_data, "normal") / "0000.png").unlink()
    fewer = evaluated(flags_of(kensa_model, own_data, tmp_path / "fewer"), capsys)
    assert words.format("defective") in fewer.said
    (test_folder(own_data, "anomaly") / "stain_00.png").unlink()
    others = evaluated(flags_of(kensa_model, own_data, tmp_path / "others"), capsys)
    assert "threshold was found with" not in others.said


def test_each_figure_says_of_which_threshold_it_is(result: Result) -> None:
    """Those of the threshold stand together, the best F1 with a threshold of its own."""
    found, threshold = result.report["image"], result.report["threshold"]["raw"]
    own, best = result.said.index(f"threshold    {threshold:.4f}"), result.said.index("another one")
    assert own < best
    at_it, elsewhere = result.said[own:best], result.said[best:].splitlines()[0]
    assert f"{found['false_rejects']} of 6 normal images rejected" in at_it
    assert f"{found['misses']} of 10 defective images missed" in at_it
    assert f"(at most {100 * found['misses_at_most']:.1f} %, 95 % sure)" in at_it
    assert f"F1 {found['f1']:.4f}" in at_it
    assert "best" not in at_it
    best_f1, at = found["best_f1"], found["best_f1_threshold"]
    assert f"best F1 {best_f1:.4f} would be reached at {at:.4f}" in elsewhere
    assert f"<b>{best_f1:.4f}</b><small>would be reached at {at:.4f}</small>" in result.page
    assert (
        f"<b>{found['f1']:.4f}</b><small>at {threshold:.4f}, the threshold</small>" in result.page
    )


def test_page_and_summary_say_from_what_the_threshold_comes_and_what_it_can_promise(
    result: Result, kensa_model: Path
) -> None:
    calibration = Meta.read(kensa_model / "meta.json").calibration
    assert result.report["calibration"] == calibration
    assert calibration is not None
    origin = result.report["origin"]
    assert f"{calibration['normals']} normal pictures" in origin["found from"]
    assert "and 10 defective ones" in origin["found from"]
    assert f"at most {100 * calibration['at_most']:.1f} % false rejects" in origin["promise"]
    assert f"for 1 % show it {calibration['parts_needed']} parts" in origin["promise"]
    assert f"{10 - calibration['misses']} of the 10" in origin["defects"]
    drawn = calibration["drawn"]
    assert f"{drawn['found']} of {drawn['of']} found" in origin["drawn ones"]
    for words in origin.values():
        assert words in result.said
        assert escape(words) in result.page


def test_every_drawn_defect_is_a_dot_on_the_page(result: Result) -> None:
    cells = re.findall(r"<td.*?</span></td>", result.page)
    counts = [scores for row in result.report["calibration"]["drawn"]["by"].values()
              for scores in row.values()]  # fmt: skip
    threshold = result.report["threshold"]["raw"]
    assert sorted(
        (cell.count('<i class="found"></i>'), cell.count("<i")) for cell in cells
    ) == sorted((sum(score > threshold for score in scores), len(scores)) for scores in counts)
    must = [cell for cell in cells if "extra" not in cell]
    drawn = result.report["calibration"]["drawn"]
    assert sum(cell.count("<i") for cell in must) == drawn["of"]
    assert sum(cell.count('"found"') for cell in must) == drawn["found"]


def test_a_threshold_set_by_hand_is_told_from_the_one_that_training_found(
    own_model: Path, sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own_model / "meta.json"
    meta = Meta.read(path).with_(image_threshold=0.75)
    meta.write(path)
    scale = Scale.of(meta)
    result = evaluated(flags_of(own_model, sample_data, tmp_path / "out"), capsys)
    assert result.report["threshold"] == {
        "raw": scale.raw_threshold,
        "of": f"set by hand; training found {scale.threshold_auto:.4f}",
    }
    origin = result.report["origin"]
    assert f"and {scale.raw_threshold:.4f} is in force" in origin["found from"]
    assert origin["promise"].endswith(f"at {scale.raw_threshold:.4f}")  # of this one
    drawn = (meta.calibration or {})["drawn"]["scores"]
    found = sum(score > scale.raw_threshold for score in drawn)
    assert origin["drawn ones"].startswith(f"{found} of 16 found at {scale.raw_threshold:.4f}")
    assert f"{found} of 16" in result.page or found / 16 >= FEW_FOUND
    assert "threshold was found with" not in result.said


# ---- what a calibration says ---------------------------------------------------------------------

RECORD: dict[str, Any] = {
    "threshold": 2.6, "raw_min": 1.4, "raw_max": 3.8, "method": "left_out", "normals": 45,
    "parts": 15, "defects": 40, "false_rejects": 0.01, "cap": 0.05, "rejected": 1, "at_most": 0.28,
    "parts_needed": 299, "auroc": 0.94, "best_f1": 0.9, "misses": 15, "before": 2.1, "moved": 2.25,
    "limits": [{"false_rejects": 0.01, "raw": 3.5, "at_most": 0.2},
               {"false_rejects": 0.05, "raw": 2.5, "at_most": 0.28}],
    "drawn": {"found": 3, "of": 16, "share": 0.188, "scores": [2.0] * 13 + [2.65, 2.8, 2.8],
              "by": {"faint": {"1%": [1.9] * 4},
                     "strong": {"1%": [2.0] * 8, "8%": [2.0] * 13 + [2.65, 2.8, 2.8]}}},
}  # fmt: skip


def meta_with(tmp_path: Path, calibration: dict[str, Any] | None) -> Meta:
    scale = {"image_threshold_auto": 2.6, "raw_image_min": 1.4, "raw_image_max": 3.8}
    return Meta.read(write_meta(tmp_path / "meta.json")).with_(calibration=calibration, **scale)


def test_what_makes_a_threshold_doubtful_is_a_note(tmp_path: Path) -> None:
    blind, few, moved = origin_notes(meta_with(tmp_path, RECORD), 2.6)
    assert "only 15 parts: show the model 20 or more" in few
    assert "Only 3 of 16 drawn defects" in blind
    assert "moved from 2.1000 to 2.6000, 2.2 standard deviations of normal scores up" in moved
    sound = RECORD | {"parts": 45, "moved": -0.9, "drawn": {"found": 16, "of": 16, "share": 1.0}}
    assert origin_notes(meta_with(tmp_path, sound), 2.6) == []
    (other,) = origin_notes(meta_with(tmp_path, RECORD), 2.7)  # of parts and moves nothing is said
    assert "Only 2 of 16 drawn defects" in other


def test_pictures_of_the_same_parts_are_told_from_parts(tmp_path: Path) -> None:
    facts = origin_facts(meta_with(tmp_path, RECORD), 2.6)
    assert facts["found from"].startswith("45 normal pictures of 15 parts, each judged by a model")
    assert "(1 of 15 parts above it)" in facts["promise"]
    assert "15 more would cost over 5 % of the good parts" in facts["defects"]


OLD = Meta.read(ROOT / "tests" / "data" / "build_e60e805" / "models" / "part" / "meta.json")


@pytest.mark.parametrize(
    ("calibration", "says"),
    [
        (None, "nothing says how parts scored"),
        ({}, "nothing says how parts scored"),
        (OLD.calibration, "best F1, by an older Kensa"),
        ({"method": "prediction_limit", "normals": 4, "defects": 0}, "an older Kensa"),
        ({"method": "anomalib", "threshold": 2.6}, "anomalib"),
        ({"method": "kept", "threshold": 2.6, "normals": 0, "defects": 0}, "an earlier training"),
    ],
)
def test_an_older_calibration_and_anomalibs_are_told_as_far_as_they_go(
    calibration: dict[str, Any] | None, says: str, tmp_path: Path
) -> None:
    meta = meta_with(tmp_path, calibration)
    facts = origin_facts(meta, 2.6)
    assert says in facts["found from"]
    assert not {"promise", "drawn ones", "moved"} & set(facts)
    assert (origin_notes(meta, 2.6), drawn_chart(meta, 2.6), limits_of(meta)) == ([], "", {})


@pytest.mark.parametrize("key", RECORD)
@pytest.mark.parametrize("threshold", [2.6, 2.7])
def test_any_key_of_a_calibration_may_be_missing(
    key: str, threshold: float, tmp_path: Path
) -> None:
    meta = meta_with(tmp_path, {name: value for name, value in RECORD.items() if name != key})
    told = [*origin_facts(meta, threshold).values(), *origin_notes(meta, threshold)]
    assert told
    assert not any("None" in words for words in [*told, drawn_chart(meta, 2.6), *limits_of(meta)])


def test_the_limits_of_budget_and_cap_stand_in_the_histogram_as_far_as_they_are_in_sight(
    result: Result, kensa_model: Path, tmp_path: Path
) -> None:
    limits = limits_of(meta_with(tmp_path, RECORD))
    assert limits == {"1 %": 3.5, "5 %": 2.5}
    assert limits_of(meta_with(tmp_path, RECORD | {"defects": 0})) == {"1 %": 3.5}
    shown = limits_of(Meta.read(kensa_model / "meta.json"))
    scores = [float(row["raw_score"]) for row in result.rows]
    for share, score in shown.items():
        if min(scores) < score < max(scores):
            assert result.page.count(f">limit for {share} of good parts<") == 1
    assert "5 %" in shown


def test_a_second_evaluation_replaces_the_first_as_a_whole(
    kensa_model: Path,
    own_data: Path,
    result: Result,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out_dir = Path(shutil.copytree(result.out_dir, tmp_path / "out"))
    (test_folder(own_data, "normal") / "0000.png").unlink()
    again = evaluated(flags_of(kensa_model, own_data, out_dir), capsys)
    assert len(again.rows) == len(list((out_dir / "overlays").iterdir())) == 15
    assert staging(out_dir) == []


# ---- models and data as they come ----------------------------------------------------------------


def test_what_retrain_left_is_converted_and_measured_the_same(
    trained: Path,
    sample_data: Path,
    result: Result,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(path.name for path in trained.iterdir())
    assert command.main(flags_of(trained, sample_data, tmp_path / "out")) == 0
    said = capsys.readouterr()
    assert "converting it into a temporary folder" in said.err
    again = Result(tmp_path / "out", said.out)
    assert again.report["model"]["converted_for_this"] is True
    assert "converted for this evaluation" in again.page
    ours, theirs = ([float(row["raw_score"]) for row in r.rows] for r in (again, result))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert sorted(path.name for path in trained.iterdir()) == before


def test_pictures_that_were_not_learned_stand_on_the_page(
    kensa_model: Path, sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(kensa_model, model)
    _, sheet = cv2.imencode(".jpg", np.full((20, 30, 3), 90, np.uint8))
    (model / STRANGE).write_bytes(sheet.tobytes())
    meta = Meta.read(model / "meta.json")
    meta.with_(files={**(meta.files or {}), STRANGE: sha256(model / STRANGE)}).write(
        model / "meta.json"
    )
    page = evaluated(flags_of(model, sample_data, tmp_path / "out"), capsys).page
    assert "Not learned: unlike the others" in page
    assert base64.b64encode(sheet.tobytes()).decode() in page


def test_without_defects_the_rest_is_measured_and_it_says_what_is_not(
    kensa_model: Path, own_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(test_folder(own_data, "anomaly"))
    result = evaluated(flags_of(kensa_model, own_data, tmp_path / "out"), capsys)
    found = result.report["image"]
    assert [found[name] for name in ("auroc", "average_precision", "f1", "misses")] == [None] * 4
    assert found["false_rejects"] is not None
    assert len(result.rows) == len(list((result.out_dir / "overlays").iterdir())) == 6
    assert "No defective images" in result.said
    assert "cannot be measured" in result.page
    assert "None" not in result.said


def test_without_normals_the_rest_is_measured_and_it_says_what_is_not(
    kensa_model: Path, own_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(test_folder(own_data, "normal"))
    result = evaluated(flags_of(kensa_model, own_data, tmp_path / "out"), capsys)
    found = result.report["image"]
    assert (found["auroc"], found["false_rejects"]) == (None, None)
    assert found["misses"] is not None
    assert result.report["pixel"]["aupro"] is not None  # there is background in every picture
    assert "No normal images" in result.said
    assert "None" not in result.said


def test_a_broken_image_is_named_and_left_out_and_the_others_are_judged(
    kensa_model: Path, own_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = test_folder(own_data, "anomaly") / "stain_00.png"
    torn.write_bytes(torn.read_bytes()[:-100])
    (test_folder(own_data, "normal") / "folder.png").mkdir()
    assert command.main(flags_of(kensa_model, own_data, tmp_path / "out")) == 0
    said = capsys.readouterr()
    result = Result(tmp_path / "out", said.out)
    assert f"skipped {torn}: " in said.err
    assert "folder.png" not in said.err, "a folder of that name is a folder"
    assert list(result.report["images"]["skipped"]) == [str(torn)]
    assert result.report["images"]["anomaly"] == 9
    assert "1 broken ones skipped" in result.said
    assert "stain_00.png" in result.page
    assert "stain_00.png" not in {row["file"] for row in result.rows}


def test_what_is_wrong_is_said_in_a_sentence_and_nothing_is_written(
    kensa_model: Path, sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    untrained = write_meta(tmp_path / "untrained" / "meta.json").parent
    for changes, says in (
        ({"model_dir": tmp_path / "nowhere"}, "nowhere does not exist: --model_dir"),
        ({"model_dir": empty}, "meta.json does not exist"),
        ({"model_dir": untrained}, "holds neither model.onnx nor model.pth"),
        ({"data_root": tmp_path / "nowhere"}, "--data_root takes the folder that holds test/"),
        ({"category": "unknown"}, f"Categories that are there: {CATEGORY}"),
        ({"masks": tmp_path / "nowhere"}, "nowhere does not exist: --masks"),
        ({"masks": empty}, "that of burr_00.png would be burr_00.png"),
    ):
        flags = {"model_dir": kensa_model, "data_root": sample_data, **changes}
        model, data = flags.pop("model_dir"), flags.pop("data_root")
        assert says in refusal(flags_of(model, data, tmp_path / "out", **flags), capsys)
    assert not (tmp_path / "out").exists()


def test_a_model_whose_files_do_not_belong_together_is_refused(
    trained: Path,
    own_model: Path,
    sample_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mixed = Path(shutil.copytree(trained, tmp_path / "mixed"))
    for model, name in ((mixed, "model.pth"), (own_model, "model.onnx")):
        (model / name).write_bytes((model / name).read_bytes() + b"\0")
        assert "SHA-256 differs" in refusal(flags_of(model, sample_data, tmp_path / "out"), capsys)


def test_a_folder_with_other_files_in_it_is_never_replaced(
    own_model: Path, sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in own_model.iterdir())
    says = refusal(flags_of(own_model, sample_data, own_model), capsys)
    assert "name a new folder" in says
    assert sorted(path.name for path in own_model.iterdir()) == before
    (tmp_path / "file").write_text("notes")
    assert "is a file" in refusal(flags_of(own_model, sample_data, tmp_path / "file"), capsys)


def test_ctrl_c_leaves_nothing(kensa_model: Path, own_data: Path, tmp_path: Path) -> None:
    folder = test_folder(own_data, "normal")
    for n in range(1000):  # so that there is time to stop it
        os.link(folder / "0000.png", folder / f"more_{n:04d}.png")
    before = sorted(path.name for path in tmp_path.iterdir())
    process = subprocess.Popen(
        [sys.executable, ROOT / "evaluate.py", *flags_of(kensa_model, own_data, tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert "judging 1016 images" in process.stderr.readline()
    assert len(staging(tmp_path / "out")) == 1
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err.strip()) == ("", "error: Stopped. Nothing was changed.")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_full_disk_leaves_the_old_evaluation(
    kensa_model: Path,
    sample_data: Path,
    result: Result,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out_dir = Path(shutil.copytree(result.out_dir, tmp_path / "out"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("workers.evaluation.evaluate._write_predictions", full)
    assert command.main(flags_of(kensa_model, sample_data, out_dir)) == 2
    assert "disk is full; nothing was changed" in capsys.readouterr().err
    assert (out_dir / "evaluation.json").read_text() == json.dumps(
        result.report, indent=2, ensure_ascii=False
    ) + "\n"
    assert staging(out_dir) == []


def test_a_threshold_that_is_no_number_and_a_negative_count_are_refused(tmp_path: Path) -> None:
    for words, says in (("--threshold nan", "finite"), ("--worst -1", "at least 0")):
        flags = flags_of(tmp_path, tmp_path, tmp_path / "out")
        done = run("evaluate.py", *flags, *words.split(), check=False)
        assert done.returncode == 2
        assert says in done.stderr


# ---- real photos ---------------------------------------------------------------------------------


def test_real_photos_are_told_apart_and_their_defects_found(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The toy hazelnuts, with masks in a folder of their own, and trained weights."""
    meta = write_meta(tmp_path / "seed" / "meta.json", coreset_ratio=0.02)
    learned = retrain.main([str(word) for word in (
        "--model", "patchcore", "--meta_json", meta, "--category", "hazelnut_toy",
        "--pretrained_pth", ASSETS / "weights" / "resnet18.safetensors",
        "--data_root", assets / "data", "--out_dir", tmp_path / "model")])  # fmt: skip
    assert learned == 0
    flags = flags_of(tmp_path / "model", assets / "data", tmp_path / "out",
                     category="hazelnut_toy", masks=assets / "masks" / "hazelnut_toy")  # fmt: skip
    result = evaluated(flags, capsys)
    assert result.report["image"]["auroc"] > 0.99
    assert result.report["pixel"]["auroc"] > 0.95
    assert result.report["pixel"]["aupro"] > 0.85
    assert result.report["pixel"]["masks"] == 17
