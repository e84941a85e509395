"""How well scores and maps tell defects from normal parts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta
from sklearn.metrics import (
    auc,
    average_precision_score,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from engines import image
from engines.errors import BadDataset, BadImage
from engines.regions import Regions
from engines.verdict import Label, Scale, heatmap
from workers.progress import Progress

AUPRO_LIMIT = 0.3  # share of defect-free pixels: up to here MVTec integrates the region overlap
MOST_PIXELS = 8_000_000  # compared at most: sorting more takes gigabytes

Group = Literal["normal", "anomaly"]
GROUPS: tuple[Group, ...] = ("normal", "anomaly")


@dataclass(frozen=True)
class Seen:
    """One test image, and what the model says of it."""

    path: Path
    name: str  # in the folder of its group: `scratch/000.png`
    group: Group  # what it is
    label: Label  # what it is taken for
    raw_score: float
    score: float  # normalised, [0, 1]
    anomaly_map: NDArray[np.float32]  # (h, w), raw
    size: tuple[int, int]  # height and width of the picture, px
    overlay: str  # file name
    decode_ms: float
    infer_ms: float

    @property
    def correct(self) -> bool:
        return (self.label == "Anomaly") == (self.group == "anomaly")


def scores_of(seen: list[Seen], group: Group) -> NDArray[np.float64]:
    return np.array([part.raw_score for part in seen if part.group == group])


def image_measures(
    normal: NDArray[np.float64], defective: NDArray[np.float64], threshold: float
) -> dict[str, Any]:
    """What raw scores say of whole images; None for what cannot be measured.

    Args:
        normal: (n,), may be empty.
        defective: (m,), may be empty.
        threshold: raw score; above it is an anomaly.

    Returns:
        auroc, average_precision, best_f1 and best_f1_threshold (half way to the next lower score,
        as `calibrate`); at `threshold`: f1, false_rejects, misses, and `*_at_most`: the
        rates that, with 95 % confidence, more images would not exceed (Clopper and Pearson, 1934).
    """
    false_rejects = int((normal > threshold).sum()) if len(normal) else None
    misses = int((defective <= threshold).sum()) if len(defective) else None
    measures: dict[str, Any] = {
        **dict.fromkeys(("auroc", "average_precision", "best_f1", "best_f1_threshold", "f1")),
        "false_rejects": false_rejects,
        "false_rejects_at_most": _at_most(false_rejects, len(normal)),
        "misses": misses,
        "misses_at_most": _at_most(misses, len(defective)),
    }
    if false_rejects is None or misses is None:
        return measures
    scores, truth = with_truth(normal, defective)
    best, at = _best_f1(scores, truth)
    found = len(defective) - misses
    return measures | {
        "auroc": float(roc_auc_score(truth, scores)),
        "average_precision": float(average_precision_score(truth, scores)),
        "best_f1": best,
        "best_f1_threshold": at,
        "f1": 2 * found / (2 * found + false_rejects + misses),
    }


def with_truth(
    normal: NDArray[np.float64], defective: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    truth = np.arange(len(normal) + len(defective)) >= len(normal)
    return np.concatenate([normal, defective]), truth


def _best_f1(scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> tuple[float, float]:
    """The best F1, and the threshold above which it is reached."""
    precision, recall, thresholds = precision_recall_curve(truth, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    at_least = float(thresholds[f1[:-1].argmax()])  # sklearn's thresholds are met, ours exceeded
    below = scores[scores < at_least]
    above = (at_least + below.max()) / 2 if len(below) else at_least - 1e-6 * abs(at_least)
    return float(f1.max()), float(above)


def _at_most(errors: int | None, images: int) -> float | None:
    """The one-sided 95 % limit of an error rate, None where nothing was seen."""
    if errors is None:
        return None
    return 1.0 if errors == images else float(beta.ppf(0.95, errors + 1, images - errors))


def pixel_measures(
    seen: list[Seen],
    masks: Path,
    size: int,
    progress: Progress,
    limits: image.ImageLimits = image.DEFAULT_LIMITS,
    never: Regions | None = None,
) -> dict[str, Any] | None:
    """Compare the maps with the masks, pixel by pixel, at the size of the masks.

    Normal images count as masks without a defect. Maps are smoothed and enlarged as they are drawn.
    From more than `MOST_PIXELS` pixels every `step`-th in both directions is taken. Pixels that
    `never` count for the model are left out.

    Returns:
        auroc, aupro (None where no mask can be used), fpr_limit, masks (how many were used),
        regions, step, missing and refused; None where no mask has the name of a defective image.
    """
    defective = [part for part in seen if part.group == "anomaly"]
    missing = [part.name for part in defective if not mask_path(masks, part.name).is_file()]
    if len(missing) == len(defective):
        return None
    used = [part for part in seen if part.name not in missing or part.group == "normal"]
    step = math.ceil(math.sqrt(sum(math.prod(part.size) for part in used) / MOST_PIXELS))
    whole = _range_of([part.anomaly_map for part in used])
    scores = [np.empty(0, np.float32)]
    regions = [np.empty(0, np.int32)]
    refused: dict[str, str] = {}
    count = 0  # regions so far: each has a number of its own
    tick = progress.phase("masks")
    for done, part in enumerate(used, 1):
        tick(done, len(used))
        try:
            labels = _regions_of(part, masks, limits)
        except (BadImage, BadDataset) as error:
            refused[part.name] = str(error)
            progress.say(f"left out of the pixel measures: {error}")
            continue
        heat = cv2.resize(heatmap(part.anomaly_map, whole, size), part.size[::-1])
        labels[labels > 0] += count
        count = max(count, int(labels.max()))
        counting = np.ones(part.size, bool) if never is None else ~never.white(part.size)
        scores.append(heat[::step, ::step][counting[::step, ::step]])
        regions.append(labels[::step, ::step][counting[::step, ::step]])
    every_score, every_region = np.concatenate(scores), np.concatenate(regions)
    measurable = bool((every_region > 0).any() and (every_region == 0).any())
    return {
        "auroc": float(roc_auc_score(every_region > 0, every_score)) if measurable else None,
        "aupro": aupro(every_score, every_region) if measurable else None,
        "fpr_limit": AUPRO_LIMIT,
        "masks": len(defective) - len(missing) - len(refused),
        "regions": len(np.unique(every_region[every_region > 0])),
        "step": step,
        "missing": missing,
        "refused": refused,
    }


def aupro(
    scores: NDArray[np.float32], regions: NDArray[np.int32], limit: float = AUPRO_LIMIT
) -> float:
    """Area under the per-region overlap curve up to `limit` false positives, divided by `limit`.

    As Bergmann et al. (MVTec AD, IJCV 2021) define it: the overlap is the share of a region above a
    threshold, averaged over all regions; false positives are the share of defect-free pixels above
    it. It is scikit-learn's ROC curve with weights that let every region count as one.

    Args:
        scores: of all pixels of all images, any shape.
        regions: of the same shape; 0 without a defect, else the number of the connected region.
            At least one pixel of each.
    """
    scores, regions = np.ravel(scores), np.ravel(regions)
    inside = regions > 0
    weights = np.ones(len(regions))
    weights[inside] = 1.0 / np.bincount(regions)[regions[inside]]
    false_positives, overlap, _ = roc_curve(inside, scores, sample_weight=weights)
    below = false_positives < limit
    x = np.append(false_positives[below], limit)
    y = np.append(overlap[below], np.interp(limit, false_positives, overlap))
    return float(auc(x, y) / limit)


def label_regions(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Number the connected regions of a mask (H, W), diagonal neighbours included, from 1."""
    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    return np.asarray(labels, np.int32)


def _regions_of(part: Seen, masks: Path, limits: image.ImageLimits) -> NDArray[np.int32]:
    """The regions of an image (H, W); BadImage or BadDataset where its mask cannot be used."""
    if part.group == "normal":
        return np.zeros(part.size, np.int32)
    path = mask_path(masks, part.name)
    try:
        mask = image.decode(bytes_of(path), limits).max(axis=2) > 0
    except BadImage as error:
        raise BadDataset(f"{path}: {error}") from None
    (height, width), (its_height, its_width) = part.size, mask.shape
    if mask.shape != part.size:
        raise BadDataset(
            f"{path} is {its_width} x {its_height} pixels, but {part.name} is"
            f" {width} x {height}: a mask has the size of its picture."
        )
    if not mask.any():
        raise BadDataset(f"{path} is all black: it marks no defect.")
    return label_regions(mask)


def mask_path(masks: Path, picture: str) -> Path:
    """Where the mask of a picture is, by its name in the folder of its group."""
    return (masks / picture).with_suffix(".png")


def _range_of(maps: list[NDArray[np.float32]]) -> Scale:
    """A scale on which `heatmap` cuts nothing off: the range of all maps."""
    low, high = min(float(m.min()) for m in maps), max(float(m.max()) for m in maps)
    high = max(high, low + 1e-6)
    return Scale(threshold_auto=(low + high) / 2, raw_min=low, raw_max=high, threshold=0.5)


def bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror}") from error
