"""How well a model judges test images, measured with the runtime that serves it; and the page."""

from __future__ import annotations

import csv
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from engines import image
from engines.errors import BadBundle, BadDataset, BadImage, BadRequest
from engines.files import json_text, printable, staged
from engines.image import DEFAULT_LIMITS, ImageLimits
from engines.meta import Meta
from engines.regions import Regions
from engines.runtimes import Runtime
from engines.runtimes.openvino import OpenVINORuntime
from engines.store.bundle import ONNX, Bundle, check_hash, read_strange
from engines.verdict import Scale, decide, overlay
from workers.evaluation.measures import (
    GROUPS,
    Group,
    Seen,
    bytes_of,
    image_measures,
    mask_path,
    pixel_measures,
    scores_of,
)
from workers.evaluation.page import evaluation_page
from workers.evaluation.threshold_origin import origin_facts, origin_notes
from workers.learning.dataset import find_tests, notes_on_passed_over
from workers.progress import Progress

PREDICTIONS = "predictions.csv"
EVALUATION = "evaluation.json"
PAGE = "evaluation.html"
OVERLAYS = "overlays"
SEPARATORS = r"[/\\]"


@dataclass(frozen=True)
class Evaluate:
    """What to measure: the flags of evaluate.py."""

    model_dir: Path
    category: str
    data_root: Path
    out_dir: Path
    masks: Path | None = None
    threshold: float | None = None  # raw score; None: the model's own
    worst: int = 8
    limits: ImageLimits = DEFAULT_LIMITS  # of pictures


def evaluate(request: Evaluate, progress: Progress) -> dict[str, Any]:
    """Judge every test image, measure, and write the tables, overlays and page into `out_dir`.

    Returns:
        The measures, as evaluation.json holds them.

    Raises:
        KensaError: the flags, the model or the folders do not allow it. `out_dir` is as it was.
    """
    _check_out_dir(request.out_dir)
    tests, passed_over = _test_images(request)
    masks = _masks_folder(request, tests)
    with tempfile.TemporaryDirectory() as scratch, _in_whole(request.out_dir) as folder:
        model = _open(request.model_dir, Path(scratch), progress)
        threshold = model.scale.raw_threshold if request.threshold is None else request.threshold
        facts = _facts(request.model_dir, model)
        try:
            seen, skipped = _look_at(request, tests, model, threshold, folder / OVERLAYS, progress)
        finally:
            model.runtime.close()
        pixel = None
        if masks:
            size = model.meta.image_size
            pixel = pixel_measures(seen, masks, size, progress, request.limits, model.regions)
        report: dict[str, Any] = {
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "category": request.category,
            "model": facts,
            "images": {group: len(scores_of(seen, group)) for group in GROUPS}
            | {"skipped": skipped},
            "threshold": {"raw": threshold, "of": _whose(request, model)},
            "calibration": model.meta.calibration or {},
            "origin": origin_facts(model.meta, threshold),
            "image": image_measures(
                scores_of(seen, "normal"), scores_of(seen, "anomaly"), threshold
            ),
            "pixel": pixel,
            "milliseconds": {
                "decode": round(median(part.decode_ms for part in seen), 2),
                "infer": round(median(part.infer_ms for part in seen), 2),
            },
        }
        report["notes"] = [*passed_over, *_notes(request, model, report)]
        _write_predictions(folder / PREDICTIONS, seen)
        (folder / EVALUATION).write_text(json_text(report), encoding="utf-8")
        page = evaluation_page(
            report,
            seen,
            folder / OVERLAYS,
            request.worst,
            model.meta,
            read_strange(request.model_dir, model.meta),
            request.limits,
        )
        (folder / PAGE).write_text(printable(page), encoding="utf-8")
    return report


def summarise_evaluation(report: dict[str, Any], out_dir: Path) -> list[str]:
    """What was measured, for a person."""
    images, found, pixel = report["images"], report["image"], report["pixel"]
    skipped = f", {len(images['skipped'])} broken ones skipped" if images["skipped"] else ""
    lines = [
        "",
        f"judged       {images['normal']} normal and {images['anomaly']} defective images{skipped},"
        f" {report['milliseconds']['infer']:.1f} ms each",
    ]
    if found["auroc"] is not None:
        lines.append(
            f"ranking      AUROC {found['auroc']:.4f},"
            f" average precision {found['average_precision']:.4f}: of no threshold"
        )
    lines.append(
        f"threshold    {report['threshold']['raw']:.4f} on the raw score"
        f" ({report['threshold']['of']}), and at this threshold"
    )
    lines += [f"             {words}" for words in _errors(report)]
    if found["best_f1"] is not None:
        lines.append(
            f"another one  best F1 {found['best_f1']:.4f} would be reached at"
            f" {found['best_f1_threshold']:.4f}"
        )
    lines += [f"{name:<12} {words}" for name, words in report["origin"].items()]
    if pixel is not None and pixel["auroc"] is not None:
        lines.append(
            f"pixels       AUROC {pixel['auroc']:.4f}, AUPRO {pixel['aupro']:.4f}"
            f" over {pixel['masks']} masks"
        )
    lines += [f"note         {note}" for note in report["notes"]]
    return [*lines, f"written to   {out_dir / PAGE}"]


def _errors(report: dict[str, Any]) -> list[str]:
    """What goes wrong at the threshold in force, each with how far these images prove it."""
    found, images = report["image"], report["images"]
    sides = (
        ("false_rejects", "normal", "normal images rejected"),
        ("misses", "anomaly", "defective images missed"),
    )
    errors = [
        f"{found[error]} of {images[group]} {what}"
        f" (at most {100 * found[f'{error}_at_most']:.1f} %, 95 % sure)"
        for error, group, what in sides
        if found[error] is not None
    ]
    return errors if found["f1"] is None else [*errors, f"F1 {found['f1']:.4f}"]


# ---- what is judged ------------------------------------------------------------------------------


class _Test(NamedTuple):
    """A test image: what it is, and what it is called in the folder of its group."""

    path: Path
    group: Group
    name: str


def _test_images(request: Evaluate) -> tuple[list[_Test], list[str]]:
    """The test images of the category, and what was passed over; BadDataset where none are."""
    if not request.data_root.is_dir():
        raise BadDataset(
            f"{request.data_root} does not exist: --data_root takes the folder that holds test/."
        )
    folder = request.data_root / "test" / request.category
    found = find_tests(request.data_root, request.category)
    groups: dict[Group, list[Path]] = {"normal": found.test_normal, "anomaly": found.test_anomaly}
    tests = [
        _Test(path, group, path.relative_to(folder / group).as_posix())
        for group in GROUPS
        for path in groups[group]
    ]
    if not tests:
        there = sorted(path.name for path in folder.parent.glob("*") if path.is_dir())
        known = f" Categories that are there: {', '.join(there)}." if there else ""
        raise BadDataset(
            f"{folder}/normal and {folder}/anomaly hold no images: put test images there.{known}"
            f" {' '.join(notes_on_passed_over(found.passed_over))}".rstrip()
        )
    return tests, notes_on_passed_over(found.passed_over)


def _masks_folder(request: Evaluate, tests: list[_Test]) -> Path | None:
    """Where the masks are, None where there are none.

    Raises:
        BadDataset: a folder was named, and it is not there, or holds no mask of these images.
    """
    if request.masks is None:
        usual = request.data_root / "masks" / request.category
        return usual if usual.is_dir() else None
    if not request.masks.is_dir():
        raise BadDataset(f"{request.masks} does not exist: --masks takes a folder of PNG files.")
    defective = [test.name for test in tests if test.group == "anomaly"]
    if defective and not any(mask_path(request.masks, name).is_file() for name in defective):
        raise BadDataset(
            f"{request.masks} holds no mask of these images: that of {defective[0]} would be"
            f" {mask_path(Path(), defective[0])}."
        )
    return request.masks


@dataclass(frozen=True)
class _Model:
    """A bundle, open."""

    meta: Meta
    scale: Scale
    runtime: Runtime
    report: dict[str, Any]  # report.json
    regions: Regions | None  # what of pictures never counts
    converted: bool  # here, for this evaluation


def _open(root: Path, scratch: Path, progress: Progress) -> _Model:
    """Open what convtrt.py left, or convert what retrain.py left into `scratch` and open that.

    Raises:
        BadMeta, BadBundle: it is neither, or its files do not fit together.
    """
    if not root.is_dir():
        raise BadBundle(f"{root} does not exist: --model_dir takes a folder that convtrt.py left.")
    bundle_root = root
    if not (root / ONNX).is_file():
        bundle_root = scratch / "engine"
        _convert(root, bundle_root, progress)
    bundle = Bundle.open(bundle_root)
    scale = Scale.of(bundle.meta)
    runtime = OpenVINORuntime.open(bundle)
    size = runtime.image_size
    if size != bundle.meta.image_size:
        raise BadBundle(
            f"{bundle.onnx} takes images of {size} pixels, but meta.json says"
            f" {bundle.meta.image_size}: they are from different trainings. Run convtrt.py again."
        )
    for _ in range(2):  # so that the first image does not wait for buffers to be made
        runtime.infer(np.full((1, size, size, 3), 128, np.uint8))
    regions, converted = bundle.regions(), bundle_root != root
    return _Model(bundle.meta, scale, runtime, bundle.report(), regions, converted)


def _convert(trained: Path, engine: Path, progress: Progress) -> None:
    """Convert what retrain.py left, so that what is measured is what would be served."""
    meta = Meta.read(trained / "meta.json")
    weights = trained / meta.weights_pth
    if not weights.is_file():
        raise BadBundle(
            f"{trained} holds neither {ONNX} nor {meta.weights_pth}: --model_dir takes a folder"
            " that convtrt.py or retrain.py left."
        )
    for name, expected in (meta.files or {}).items():
        check_hash(trained / name, expected)
    progress.say(f"{trained} has no {ONNX}: converting it into a temporary folder")
    from workers.converting.convert import Convert, convert  # torch takes seconds to load

    convert(Convert(meta.model, weights, trained / "meta.json", engine), progress)


def _look_at(
    request: Evaluate,
    tests: list[_Test],
    model: _Model,
    threshold: float,
    overlays: Path,
    progress: Progress,
) -> tuple[list[Seen], dict[str, str]]:
    """Judge every image and draw its overlay; broken ones come back with the reason.

    Raises:
        BadDataset: all are broken.
        RuntimeFailed: the runtime gave up, or a score is not a number.
    """
    overlays.mkdir()
    names = _overlay_names(tests)
    seen: list[Seen] = []
    skipped: dict[str, str] = {}
    rt = model.runtime
    progress.say(f"judging {len(tests)} images with {rt.name} in {rt.precision}")
    tick = progress.phase("images")
    for done, test in enumerate(tests, 1):
        try:
            seen.append(_look(test, model, request.limits, threshold, overlays / names[test.path]))
        except BadImage as error:
            skipped[str(test.path)] = str(error)
            progress.say(f"skipped {test.path}: {error}")
        tick(done, len(tests))
    if not seen:
        raise BadDataset(f"None of the {len(tests)} test images can be read; see above.")
    return seen, skipped


def _look(test: _Test, model: _Model, limits: ImageLimits, threshold: float, painted: Path) -> Seen:
    """From the bytes of a file to a verdict, as serving does it, and to the overlay on disk."""
    began = time.perf_counter()
    picture = image.decode(bytes_of(test.path), limits, model.meta.bit_depth)  # (H, W, 3)
    pixels = image.resize(picture, model.runtime.image_size, model.meta.resize)  # (S, S, 3)
    decoded = time.perf_counter()
    scores, maps = model.runtime.infer(pixels[None])  # (1,), (1, h, w)
    inferred = time.perf_counter()
    raw = float(scores[0])
    label = decide(raw, threshold)
    limit, size = model.scale.normalise(threshold), model.runtime.image_size
    painted.write_bytes(overlay(picture, maps[0], model.scale, size, limit))
    return Seen(
        path=test.path,
        name=test.name,
        group=test.group,
        label=label,
        raw_score=raw,
        score=model.scale.normalise(raw),
        anomaly_map=maps[0],
        size=(picture.shape[0], picture.shape[1]),
        overlay=painted.name,
        decode_ms=(decoded - began) * 1000,
        infer_ms=(inferred - decoded) * 1000,
    )


def _overlay_names(tests: list[_Test]) -> dict[Path, str]:
    """A file name per image, with the group before it; the ending stays where a stem is twice."""
    flat = {
        test.path: f"{test.group}_{re.sub(SEPARATORS, '_', printable(test.name))}" for test in tests
    }
    stems = Counter(Path(name).stem for name in flat.values())
    names, taken = {}, set[str]()
    for path, name in flat.items():
        stem = Path(name).stem if stems[Path(name).stem] == 1 else name
        while stem in taken:  # a/b.png and a_b.png
            stem += "_"
        taken.add(stem)
        names[path] = f"{stem}.png"
    return names


def _facts(root: Path, model: _Model) -> dict[str, Any]:
    """What the model is, for report and page; without what its kind does not have."""
    facts = {
        "dir": str(root),
        "kind": model.meta.model,
        "backbone": model.meta.backbone,
        "layers": model.meta.layers,
        "n_features": model.meta.n_features,
        "model_size": model.meta.model_size,
        "latent_dim": model.meta.latent_dim,
        "image_size": model.meta.image_size,
        "bank_rows": model.runtime.bank_rows,
        "never_counts": round(model.regions.share, 4) if model.regions is not None else None,
        "exported": model.report.get("export", {}).get("precision"),
        "runtime": model.runtime.name,
        "precision": model.runtime.precision,
        "trained": model.report.get("created"),
        "converted_for_this": model.converted,
    }
    return {key: value for key, value in facts.items() if value is not None}


def _whose(request: Evaluate, model: _Model) -> str:
    """Who set the threshold."""
    scale = model.scale
    if request.threshold is not None:
        return "--threshold"
    if scale.raw_threshold == scale.threshold_auto:
        return "the model's own"
    return f"set by hand; training found {scale.threshold_auto:.4f}"


def _notes(request: Evaluate, model: _Model, report: dict[str, Any]) -> list[str]:
    """What a reader must know to read the numbers rightly; one sentence each."""
    images, pixel, notes = report["images"], report["pixel"], []
    test = request.data_root / "test" / request.category
    if not images["anomaly"]:
        notes.append(
            f"No defective images in {test / 'anomaly'}: AUROC, average precision, F1 and misses"
            " cannot be measured."
        )
    if not images["normal"]:
        notes.append(
            f"No normal images in {test / 'normal'}: AUROC, average precision, F1 and false rejects"
            " cannot be measured."
        )
    if used := _used_for_the_threshold(request, model, images):
        notes.append(
            f"The threshold was found with as many {used} test images of this category, so probably"
            " with these: on new parts expect more errors than here."
        )
    notes += origin_notes(model.meta, report["threshold"]["raw"])
    if images["skipped"]:
        notes.append(
            f"Broken and left out: {_list(Path(path).name for path in images['skipped'])}."
        )
    if pixel is None or pixel["auroc"] is None:
        if images["anomaly"]:
            where = request.masks or request.data_root / "masks" / request.category
            notes.append(
                f"No mask in {where} fits a defective image (same name, .png):"
                " pixels are not measured."
            )
    elif pixel["step"] > 1:
        step = pixel["step"]
        notes.append(f"So many pixels that one of every {step} x {step} was compared.")
    if pixel is not None and pixel["missing"]:
        notes.append(f"No mask, left out of the pixel measures: {_list(pixel['missing'])}.")
    if pixel is not None and pixel["refused"]:
        notes.append(
            f"Mask refused, left out of the pixel measures: {_list(pixel['refused'].values())}"
        )
    return notes


def _used_for_the_threshold(request: Evaluate, model: _Model, images: dict[str, Any]) -> str:
    """Which of these images the threshold was probably found with, in words; of none, nothing.

    Training notes how many test images it saw. An older one did not, and used them for a best F1.
    """
    calibration = model.meta.calibration or {}
    own = request.threshold is None and model.scale.raw_threshold == model.scale.threshold_auto
    if not own or model.report.get("category") != request.category:
        return ""
    tested = model.report.get("tested", {}) if calibration.get("method") != "kept" else {}
    if calibration.get("method") == "best_f1":
        tested = {"normal": calibration.get("normals"), "anomaly": calibration.get("defects")}
        if any(tested[group] != images[group] for group in GROUPS):
            return ""
    return " and ".join(
        {"normal": "normal", "anomaly": "defective"}[group]
        for group in GROUPS
        if images[group] and tested.get(group) == images[group]
    )


def _list(things: Iterable[str], most: int = 5) -> str:
    """How many there are, and the first of them."""
    things = list(things)
    more = f" and {len(things) - most} more" if len(things) > most else ""
    return f"{len(things)} ({'; '.join(things[:most])}{more})"


# ---- the files -----------------------------------------------------------------------------------


def _check_out_dir(out_dir: Path) -> None:
    """Raise BadRequest where the folder holds what an evaluation would not have left there."""
    if out_dir.exists() and not out_dir.is_dir():
        raise BadRequest(f"{out_dir} is a file: --out_dir takes a folder.")
    ours = {PREDICTIONS, EVALUATION, PAGE, OVERLAYS}
    others = sorted(path.name for path in out_dir.glob("*") if path.name not in ours)
    if others:
        raise BadRequest(
            f"{out_dir} holds {others[0]}, which no evaluation left there, and would be replaced as"
            " a whole: name a new folder as --out_dir."
        )


@contextmanager
def _in_whole(target: Path) -> Iterator[Path]:
    """As `staged`, for a folder that has folders in it: the old one goes when the new one comes.

    When the body raises, or the process dies before its end, `target` is as it was. (A process that
    is killed between the two renames leaves none.)
    """
    target = target.resolve()
    with staged(target) as staging:
        new, old = staging / "new", staging / "old"
        new.mkdir()
        yield new
        for path in new.rglob("*"):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        try:
            if target.exists():
                target.rename(old)
            new.rename(target)
        finally:
            if old.exists() and not target.exists():
                old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _write_predictions(path: Path, seen: list[Seen]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", "group", "raw_score", "score", "label", "correct"])
        for part in seen:
            numbers = f"{part.raw_score:.9g}", f"{part.score:.6f}"  # 9 digits: float32 in full
            correct = str(part.correct).lower()
            table.writerow([printable(part.name), part.group, *numbers, part.label, correct])
