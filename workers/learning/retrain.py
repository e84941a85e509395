"""Learn from normal images: from nothing, or on top of what a model knows already."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.camera import Camera
from engines.errors import BadDataset, BadImage, BadMeta, BadRequest, Unreadable
from engines.files import sha256, staged
from engines.image import DEFAULT_LIMITS, ImageLimits, read
from engines.limits import TRAINED, is_number
from engines.machine import memory, memory_needs
from engines.meta import Meta, other_features
from engines.promise import UNTRAINED
from engines.regions import Regions
from engines.store.bundle import REPORT, STRANGE, check_hash, read_report, write_report
from engines.store.golden import Golden, evenly
from engines.store.known_scores import SCORES, KnownScores
from engines.store.regions import REGIONS, of_png, read_regions, write_regions
from engines.verdict import Scale
from workers import models
from workers.learning import camera
from workers.learning.calibrate import Budget, Calibration, calibrate
from workers.learning.dataset import Category, bit_depth_of, bytes_of
from workers.learning.eyesight import counted, eyesight
from workers.learning.normals import Course, Judged, Normals, hold_some_out, leave_each_out
from workers.learning.strange import SHOWN, sheet
from workers.models.origin import origin_of, said
from workers.progress import Progress

LEAST_PARTS = 4  # whose scores are enough for another threshold than the one that there is


@dataclass(frozen=True)
class Retrain:
    """What to learn: the flags of retrain.py."""

    model: str
    category: str
    data_root: Path
    out_dir: Path
    meta_json: Path
    pretrained_pth: str | None = None
    load_bank: Path | None = None
    load_stats: Path | None = None
    epochs: int = 1
    batch: int = 4
    penalty_dir: Path | None = None
    false_rejects: float | None = None  # None: as meta.json has it
    false_rejects_cap: float | None = None
    keep_strange: bool = False
    bit_depth: int | None = None  # of the camera; None: as meta.json has it
    regions: Path | None = None  # a PNG of what never counts; None: as meta.json has it, beside it
    limits: ImageLimits = DEFAULT_LIMITS  # of pictures

    @property
    def known(self) -> Path | None:
        """What it goes on from: a bank, or statistics."""
        return self.load_bank or self.load_stats


def retrain(request: Retrain, progress: Progress) -> dict[str, Any]:
    """Learn, verify, calibrate, and write the files of the model into `out_dir`.

    Returns:
        The report, as report.json holds it.

    Raises:
        KensaError: the flags, the files or the images do not allow it. `out_dir` is as it was.
    """
    started = time.perf_counter()
    meta = Meta.read(request.meta_json)
    if meta.model != request.model:
        raise BadMeta(
            f"{request.meta_json} describes a {meta.model} model, but --model says {request.model}."
        )
    category = Category.find(request.data_root, request.category)
    regions = _regions(request, meta, category)
    kind = models.module(meta.model)  # torch takes seconds to load
    if request.known is not None:
        _check_origin(request.known, meta, kind, request.meta_json)
    request, meta = _with_bit_depth(request, meta, category, progress)
    request = _anew_for_other_regions(request, regions, category, progress)
    learned_before = request.known
    if short := memory.warning(memory_needs.to_learn(_learning(request, meta, category))):
        progress.say(short)
    model = kind.build(meta, request.pretrained_pth)
    models.count_only(model, regions, meta)
    weights = origin_of(request.pretrained_pth, model.origin)
    progress.say(said(meta.backbone or meta.model, weights))
    if learned_before is not None:
        kind.load(model, learned_before)
    known = kind.summary(model) if kind.knows(model) else None
    if known is None:  # what goes on from a model sees pictures as that one does
        meta = meta.with_(resize="each_axis")
    loaded = time.perf_counter()
    learned = _learn(request, meta, kind, model, category, regions, progress)
    meta = learned.calibration.write_to(meta).with_(
        score_kind=kind.SCORE_KIND, camera=learned.camera and learned.camera.content()
    )
    if (request.false_rejects, request.false_rejects_cap) != (None, None):
        meta = meta.with_(image_threshold=TRAINED)  # whoever asks for a budget wants its threshold
    report = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": meta.model,
        "category": request.category,
        "images": {
            "learned": len(learned.normals.learned),
            "known": learned.normals.known,
            "strange": [str(path) for path in learned.normals.strange],
            "skipped": learned.broken,
        },
        "passed_over": {
            where: [str(path) for path in paths] for where, paths in category.passed_over.items()
        },
        "bit_depth": meta.bit_depth,
        **({"regions": {"share": regions.share, "digest": regions.digest}} if regions else {}),
        "notes": learned.notes,
        "tested": learned.tested,
        **({"weights": weights} if weights else {}),
        **({"before": known} if known else {}),
        **kind.summary(model),
        "calibration": learned.calibration.record(),
        "threshold": {"normalised": meta.image_threshold, "raw": Scale.of(meta).raw_threshold},
        "seconds": {
            "load": round(loaded - started, 2),
            "learn": round(learned.seconds, 2),
            "verify": round(time.perf_counter() - loaded - learned.seconds, 2),
        },
    }
    _write(request.out_dir, meta, kind, model, learned, regions, report)
    return report


def _regions(request: Retrain, meta: Meta, category: Category) -> Regions | None:
    """What never counts: as the request names it, or else beside the meta.json that names it.

    Raises:
        BadRequest, BadImage: the mask that was named is none, or of another size than the pictures.
        BadBundle: the other one is missing, or is not the one of this meta.json.
    """
    if request.regions is None:
        if meta.regions is not None and meta.regions in (meta.files or {}):
            hashed = (meta.files or {})[meta.regions]
            check_hash(request.meta_json.with_name(meta.regions), hashed)
        return read_regions(request.meta_json.parent, meta)
    try:
        regions = of_png(request.regions.read_bytes(), request.limits)
    except OSError as error:
        raise BadRequest(f"{request.regions} cannot be read: {error.strerror}.") from None
    except (BadImage, BadRequest) as error:
        raise type(error)(f"{request.regions}: {error}") from None
    sizes = set[tuple[int, int]]()
    for path in category.train:
        try:
            sizes.add(read(bytes_of(path), request.limits).shape[:2])
        except BadImage:  # which is said later
            continue
        if regions.mask.shape in sizes:
            return regions
    height, width = regions.mask.shape
    others = " or ".join(f"{wide} x {high}" for high, wide in sorted(sizes)[:3])
    raise BadRequest(
        f"{request.regions} is {width} x {height} pixels, and the pictures that are to be learned"
        f" are {others}: draw the mask on one of these."
    )


def _anew_for_other_regions(
    request: Retrain, regions: Regions | None, category: Category, progress: Progress
) -> Retrain:
    """A request that learns all anew where other regions count than when it was learned.

    What was hidden is not in a bank, and scores that are known are those of what counted.

    Raises:
        BadDataset: not all is there to be learned anew.
    """
    if request.known is None:
        return request
    before = read_report(request.known.parent).get("regions", {}).get("digest", "")
    if before == (regions.digest if regions is not None else ""):
        return request
    _check_all_are_there(request.known, category, "What never counts (the mask of regions)")
    progress.say(
        f"other regions never count than before: all {len(category.train)} pictures are learned"
        " anew"
    )
    return replace(request, load_bank=None, load_stats=None)


def _with_bit_depth(
    request: Retrain, meta: Meta, category: Category, progress: Progress
) -> tuple[Retrain, Meta]:
    """The camera's bits in meta.json; where they change, a request that learns all anew.

    What was learned at another bit depth knows another brightness, so nothing can be added to it.

    Raises:
        BadDataset: nobody says what the bits are, or they change and not all is there to be learned
            anew.
    """
    asked = request.bit_depth or meta.bit_depth
    if request.known is None:
        return request, meta.with_(bit_depth=asked or bit_depth_of(category.train, request.limits))
    before = read_report(request.known.parent).get("bit_depth") or meta.bit_depth
    if asked is None:  # nobody asks for another one
        return request, meta.with_(bit_depth=before)
    if asked == (before or 16):
        return request, meta
    _check_all_are_there(request.known, category, "bit_depth")
    progress.say(
        f"bit_depth was {before or 16} and is now {asked}: all {len(category.train)} pictures"
        " are learned anew"
    )
    return replace(request, load_bank=None, load_stats=None), meta.with_(bit_depth=asked)


def _check_all_are_there(learned: Path, category: Category, what: str) -> None:
    """Raise BadDataset where learning anew would forget pictures that are known."""
    known = KnownScores.read(learned.parent).learned
    there = {KnownScores.mark(path) for path in category.train}
    gone = sum(mark not in there for mark in known)
    if gone or not known:
        how_many = f"{gone} of {len(known)} pictures" if known else "which pictures, nobody knows,"
        raise BadDataset(
            f"{what} can only change where all is learned anew, and {how_many} that {learned}"
            " was learned from are no longer there: put them back, or learn without what is known"
            " (no --load_bank or --load_stats; a job: update=false)."
        )


def _learning(request: Retrain, meta: Meta, category: Category) -> memory_needs.Learning:
    """What is to be done, as far as memory goes."""
    known = request.known
    return memory_needs.Learning(
        meta,
        len(category.train),
        len(category.test_normal) + len(category.test_anomaly),
        request.batch,
        memory_needs.size(known) if known is not None else 0,
    )


@dataclass(frozen=True)
class _Learned:
    calibration: Calibration
    normals: Normals
    golden: Golden
    camera: Camera | None
    tested: dict[str, int]  # test images that the threshold was found with
    sheet: bytes | None  # a JPEG of the strange pictures
    broken: dict[str, str]
    notes: list[str]
    seconds: float  # spent on learning alone


def _learn(
    request: Retrain,
    meta: Meta,
    kind: Any,
    model: Any,
    category: Category,
    regions: Regions | None,
    progress: Progress,
) -> _Learned:
    """Train or update, and calibrate on images that the model has not learned at that time."""
    how = models.Training(request.epochs, request.batch, request.penalty_dir, request.limits)
    course = Course(kind, model, meta, how, progress, category, request.limits, regions)
    known = KnownScores.none()
    if kind.INCREMENTAL:
        if request.known is not None:
            known = KnownScores.read(request.known.parent)
        normals = leave_each_out(course, category, known, keep_strange=request.keep_strange)
    else:
        normals = hold_some_out(course, category)
    defective = course.judge(category.test_anomaly)
    calibration = _calibration(request, course, known, normals, defective)
    calibration = replace(calibration, weights=_weights(request))
    examples = _examples(course, normals)
    golden = Golden.choose(examples.pictures, examples.scores, defective.pictures, defective.scores)
    if not len(examples.paths) and request.known is not None:  # nothing new to choose from
        golden = Golden.read(request.known.parent, meta.image_size) or golden
    own = set(category.test_normal)
    tested = {
        "normal": sum(path in own for path in normals.paths),
        "anomaly": len(defective.paths),
    }
    strange = _sheet(course, normals.strange, calibration)
    notes = course.notes()
    for note in notes:
        progress.say(f"note: {note}")
    broken, seconds = course.broken(), course.seconds
    seen = _camera(request, meta, course, category, normals)
    return _Learned(calibration, normals, golden, seen, tested, strange, broken, notes, seconds)


def _camera(
    request: Retrain, meta: Meta, course: Course, category: Category, normals: Normals
) -> Camera | None:
    """What the pictures look like; an update counts those that are new."""
    before = Camera.of(meta.camera) if request.known is not None else None
    strange = {*normals.strange}
    paths = normals.learned if before else [one for one in category.train if one not in strange]
    scores = normals.scores.highest() if len(normals.scores) else np.empty(0)
    return camera.learn(course.looks(paths), before, scores)


def _sheet(course: Course, strange: list[Path], calibration: Calibration) -> bytes | None:
    """What strange pictures look like, and where the model that came of the others finds it."""
    paths, pictures = course.pictures(strange[:SHOWN])
    if not paths:
        return None
    raw, maps = models.look(course.kind, course.model, pictures)
    names = [path.name for path in paths]
    return sheet(names, pictures, raw, maps, Scale.of(calibration.write_to(course.meta)))


def _examples(course: Course, normals: Normals) -> Judged:
    """Normal pictures to prove later forms of the model with: none as it was learned.

    Of a picture that PatchCore has learned many patches lie as far from the bank as the coverage
    radius lets them, so that a rounding error may decide which is the farthest, and the score.
    Where there are no others, learned ones are moved by a part of a pixel.
    """
    learned = {*normals.learned}
    unknown = [number for number, path in enumerate(normals.paths) if path not in learned]
    chosen = unknown or [*range(len(normals.paths))]
    paths, pictures = course.pictures(
        [normals.paths[chosen[number]] for number in evenly(normals.own[chosen])]
    )
    if not unknown and len(pictures):
        pictures = np.stack([_moved(picture) for picture in pictures])
    return Judged(paths, pictures, course.kind.scores(course.model, [pictures]))


def _moved(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture (S, S, 3), a pixel and a half to the right and down."""
    move = np.array([[1, 0, 1.5], [0, 1, 1.5]], np.float32)
    size = picture.shape[1], picture.shape[0]
    moved = cv2.warpAffine(picture, move, size, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(moved, np.uint8)


def _calibration(
    request: Retrain, course: Course, known: KnownScores, normals: Normals, defective: Judged
) -> Calibration:
    """The threshold; as it was, where an update brought nothing to find another one from."""
    meta = course.meta
    before = Calibration.kept(meta) if request.known is not None else None
    if before is not None and normals.scores.count < LEAST_PARTS:
        found = before
    else:
        budget = Budget.asked(meta, request.false_rejects, request.false_rejects_cap)
        found = calibrate(
            normals.scores, defective.scores, budget, normals.method, normals.usual_scale
        )
        if before is not None and budget == Budget.asked(meta, None, None):
            found = found.moved_from(before.threshold, known if len(known) else normals.scores)
    if len(normals.on):
        drawn = normals.drawn(course.counting())
        return replace(found, drawn=eyesight(drawn, found.threshold))
    return replace(found, drawn=_drawn_before(meta, found.threshold) if before else None)


def _drawn_before(meta: Meta, threshold: float) -> dict[str, Any] | None:
    """What is found of the drawn defects that an earlier training had."""
    drawn = (meta.calibration or {}).get("drawn")
    if not isinstance(drawn, dict) or not isinstance(drawn.get("scores"), list):
        return None
    scores = drawn["scores"]
    return counted(drawn, threshold) if scores and all(map(is_number, scores)) else None


def _weights(request: Retrain) -> str | None:
    """`untrained` where the backbone is, or the teacher, now or since an earlier training.

    A VAE learns all its weights.
    """
    given = request.pretrained_pth
    if given is None or request.model == "vae":
        return None
    if given == UNTRAINED:
        return UNTRAINED
    beside = Path(given).with_name("meta.json")
    if not beside.is_file():
        return None
    made = Meta.read(beside)
    is_its = made.weights_pth == Path(given).name
    return (made.calibration or {}).get("weights") if is_its else None


def _check_origin(learned: Path, meta: Meta, kind: Any, meta_json: Path) -> None:
    """Raise unless a bank or statistics beside meta.json are those that it was written with, and
    what is known of scores as well.
    """
    name = getattr(meta, kind.LEARNED or "", None)
    if name is None:
        raise BadMeta(f"{learned} cannot be loaded: a {meta.model} model keeps all in its weights.")
    if meta.files and name in meta.files:
        beside = meta_json.parent / name
        if learned.resolve() == beside.resolve():
            check_hash(beside, meta.files[name])
            if SCORES in meta.files and beside.with_name(SCORES).exists():
                check_hash(beside.with_name(SCORES), meta.files[SCORES])
    _check_seen_alike(learned, name, meta, meta_json)


def _check_seen_alike(learned: Path, name: str, meta: Meta, meta_json: Path) -> None:
    """Raise where the meta.json that a bank or statistics were written with has other features."""
    try:
        before = Meta.read(learned.with_name("meta.json"))
    except (BadMeta, Unreadable):  # nothing is known of them
        return
    if (before.files or {}).get(name) != sha256(learned):
        return
    if other := other_features(before, meta):
        key, was, now = other
        raise BadMeta(
            f"{learned} was learned with {key} {was}, and {meta_json} says {now}: what they see"
            " cannot be compared. Pass the meta.json beside it, or learn anew (no --load_bank or"
            " --load_stats)."
        )


def _write(
    out_dir: Path,
    meta: Meta,
    kind: Any,
    model: Any,
    learned: _Learned,
    regions: Regions | None,
    report: dict[str, Any],
) -> None:
    with staged(out_dir) as folder:
        write_report(folder, report)
        names = [*kind.save(model, meta, folder), REPORT]
        if len(learned.golden.images):
            names.append(learned.golden.write(folder))
        if learned.sheet is not None:
            (folder / STRANGE).write_bytes(learned.sheet)
            names.append(STRANGE)
        if kind.INCREMENTAL:  # also without scores: others may lie in that folder
            names.append(learned.normals.learned_scores.write(folder))
        if regions is not None:
            meta = write_regions(folder, regions, meta)
            names.append(REGIONS)
        hashes = {name: sha256(folder / name) for name in names}
        meta.with_(files=hashes).write(folder / "meta.json")
