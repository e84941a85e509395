"""Thresholds and score range, from normal and, where there are any, defective images."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit  # quantiles of Student's t; scipy.stats takes long to load
from sklearn.metrics import precision_recall_curve, roc_auc_score

from engines.errors import BadDataset
from engines.meta import Meta

FALSE_REJECTS = 0.01  # share of normal parts that may be rejected, where no defects are known


@dataclass(frozen=True)
class Calibration:
    """How raw scores of a model are to be read, and what that was found from.

    Attributes:
        threshold: raw score; above it is an anomaly. meta.json's `image_threshold_auto`.
        raw_min, raw_max: raw score range. meta.json's `raw_image_min` and `raw_image_max`.
        method: "best_f1", "prediction_limit", or "kept" from before an update.
        normals, defects: how many images it was found from.
        auroc, f1: of the model on these images, f1 at its best; None where there are no defects.
        false_rejects, misses: at the threshold.
    """

    threshold: float
    raw_min: float
    raw_max: float
    method: str
    normals: int
    defects: int
    auroc: float | None = None
    f1: float | None = None
    false_rejects: int | None = None
    misses: int | None = None

    @classmethod
    def kept(cls, meta: Meta) -> Calibration | None:
        """What meta.json says already; None where the model was never verified."""
        auto, low, high = meta.image_threshold_auto, meta.raw_image_min, meta.raw_image_max
        if auto is None or low is None or high is None:
            return None
        return cls(auto, low, high, "kept", normals=0, defects=0)

    def record(self) -> dict[str, Any]:
        """As meta.json and report.json carry it."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def write_to(self, meta: Meta) -> Meta:
        """meta.json with this calibration in it."""
        return meta.with_(
            image_threshold_auto=self.threshold,
            raw_image_min=self.raw_min,
            raw_image_max=self.raw_max,
            calibration=self.record(),
        )


def calibrate(normal: NDArray[np.float32], defective: NDArray[np.float32]) -> Calibration:
    """Find threshold and score range.

    With defects: the threshold with the best F1, as anomalib's F1AdaptiveThreshold, but half way
    to the next lower score: anomalib's lies on a defect's own score, which it then calls normal.
    With normals only: the limit under which the next normal part lies with a probability of
    1 - `FALSE_REJECTS`, if scores are normally distributed (one-sided prediction limit,
    mean + t * s * sqrt(1 + 1/n)); the range is as wide above that limit as it is below.
    The same with defects that the model cannot tell from normals, where the best F1 is that of
    rejecting nearly everything: a threshold under which no line could run.

    Args:
        normal: raw scores (n,) of normal images that the model did not learn.
        defective: raw scores (m,) of defective images, m may be 0.

    Raises:
        BadDataset: too few images, or images that all score alike.
    """
    if not np.isfinite(normal).all() or not np.isfinite(defective).all():
        raise BadDataset("The model gives scores that are not finite: its weights are damaged.")
    if not len(defective) or not len(normal):
        return _prediction_limit(normal)
    best = _best_f1(normal, defective)
    if 2 * (best.false_rejects or 0) <= len(normal) or len(normal) < 2:
        return best
    limit = _prediction_limit(normal)
    return replace(
        best,
        threshold=limit.threshold,
        raw_min=min(best.raw_min, limit.raw_min),
        raw_max=max(best.raw_max, limit.raw_max),
        method=limit.method,
        false_rejects=int((normal > limit.threshold).sum()),
        misses=int((defective <= limit.threshold).sum()),
    )


def _best_f1(normal: NDArray[np.float32], defective: NDArray[np.float32]) -> Calibration:
    scores = np.concatenate([normal, defective]).astype(np.float64)
    truth = np.concatenate([np.zeros(len(normal)), np.ones(len(defective))])
    precision, recall, thresholds = precision_recall_curve(truth, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = float(thresholds[f1[:-1].argmax()])
    below = scores[scores < best]
    threshold = float((best + below.max()) / 2) if len(below) else best - 1e-6 * abs(best)
    if scores.min() == scores.max():
        raise BadDataset("All images score alike, normal and defective: check that they differ.")
    return Calibration(
        threshold=threshold,
        raw_min=float(scores.min()),
        raw_max=float(scores.max()),
        method="best_f1",
        normals=len(normal),
        defects=len(defective),
        auroc=float(roc_auc_score(truth, scores)),
        f1=float(f1.max()),
        false_rejects=int((normal > threshold).sum()),
        misses=int((defective <= threshold).sum()),
    )


def _prediction_limit(normal: NDArray[np.float32]) -> Calibration:
    n = len(normal)
    if n < 2:
        raise BadDataset(
            "A threshold needs at least 2 normal images that the model did not learn: add images to"
            " train/, or put normal images into test/<category>/normal."
        )
    scores = normal.astype(np.float64)
    spread = float(scores.std(ddof=1))
    if scores.min() == scores.max():
        raise BadDataset("All normal images score alike: check that they are not copies of one.")
    factor = float(stdtrit(n - 1, 1 - FALSE_REJECTS)) * math.sqrt(1 + 1 / n)
    threshold = float(scores.mean()) + factor * spread
    low = float(scores.min())
    return Calibration(
        threshold=threshold,
        raw_min=low,
        raw_max=threshold + (threshold - low),
        method="prediction_limit",
        normals=n,
        defects=0,
    )
