"""Thresholds and score range, from normal and, where there are any, defective images."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_auc_score

from engines.errors import BadDataset
from engines.limits import share
from engines.meta import Meta
from engines.store.known_scores import MOST, KnownScores
from workers.learning.normal_scores import (
    BUDGETS,
    NOT_FINITE,
    USUAL_SCALE,
    NormalScores,
    at_least,
    at_most,
    parts_for,
)

FALSE_REJECTS = 0.01  # share of normal parts that may be rejected
CAP = 0.05  # share that may be, where it finds more of the known defects

# Where the limit lies between the lowest that is allowed and the defect nearest to that: near the
# defect, since there the false rejects are fewer. It rises as well when a defect that cannot be
# found moves away downwards: so no limit jumps when one begins to be found.
TOWARDS_THE_DEFECT = 0.9


@dataclass(frozen=True)
class Budget:
    """How many good parts may be rejected."""

    false_rejects: float = FALSE_REJECTS
    cap: float = CAP  # with known defects

    @classmethod
    def asked(cls, meta: Meta, false_rejects: float | None, cap: float | None) -> Budget:
        """The one that somebody asks for; what they leave open is as meta.json has it."""
        known = meta.calibration or {}
        return cls(
            false_rejects or share(known.get("false_rejects")) or FALSE_REJECTS,
            cap or share(known.get("cap")) or CAP,
        )

    @property
    def most(self) -> float:
        """The cap, which is never below the budget."""
        return max(self.cap, self.false_rejects)


@dataclass(frozen=True)
class Calibration:
    """How raw scores of a model are to be read, and what that was found from.

    Attributes:
        threshold: raw score; above it is an anomaly. meta.json's `image_threshold_auto`.
        raw_min, raw_max: raw score range. meta.json's `raw_image_min` and `raw_image_max`.
        method: whose scores: "left_out" one part after the other, "held_out" ones, those of
            "test" images, or "kept" from before.
        normals, parts: pictures of normal parts, and of how many parts they are.
        defects: defective ones.
        false_rejects, cap: the budget.
        rejected: normal parts above the threshold.
        at_least, at_most: the share of false rejects that there are, each with 95 % confidence.
        parts_needed: how many normal parts would promise the budget.
        limits: the threshold for other budgets: false_rejects, raw and at_most of each.
        auroc, best_f1: of the model on these images; None where there are no defects.
        misses: defects at or below the threshold.
        defect_scores: theirs, for who changes the threshold later; of very many the lowest.
        drawn: how many drawn defects are found, see `eyesight`.
        weights: `untrained` where those of the backbone, or of the teacher, are random.
        before, moved: the threshold before an update, and how far it moved, in standard deviations
            of the scores of normal parts.
    """

    threshold: float
    raw_min: float
    raw_max: float
    method: str
    normals: int
    defects: int
    parts: int = 0
    false_rejects: float | None = None
    cap: float | None = None
    rejected: int | None = None
    at_least: float | None = None
    at_most: float | None = None
    parts_needed: int | None = None
    limits: list[dict[str, float]] = field(default_factory=list)
    auroc: float | None = None
    best_f1: float | None = None
    misses: int | None = None
    defect_scores: list[float] = field(default_factory=list)
    drawn: dict[str, Any] | None = None
    weights: str | None = None
    before: float | None = None
    moved: float | None = None

    @classmethod
    def kept(cls, meta: Meta) -> Calibration | None:
        """What meta.json says already; None where the model was never verified."""
        auto, low, high = meta.image_threshold_auto, meta.raw_image_min, meta.raw_image_max
        if auto is None or low is None or high is None:
            return None
        return cls(auto, low, high, "kept", normals=0, defects=0)

    def moved_from(self, before: float, normal: KnownScores) -> Calibration:
        """The same, with how far it lies from the threshold before an update."""
        spread = float(normal.scores.std())
        moved = round((self.threshold - before) / spread, 2) if spread else 0.0
        return replace(self, before=before, moved=moved)

    def record(self) -> dict[str, Any]:
        """As meta.json and report.json carry it."""
        return {key: value for key, value in asdict(self).items() if value not in (None, [])}

    def write_to(self, meta: Meta) -> Meta:
        """meta.json with this calibration in it."""
        return meta.with_(
            image_threshold_auto=self.threshold,
            raw_image_min=self.raw_min,
            raw_image_max=self.raw_max,
            calibration=self.record(),
        )


def calibrate(
    normal: KnownScores,
    defective: NDArray[np.float32],
    budget: Budget,
    method: str,
    usual_scale: float = USUAL_SCALE,
) -> Calibration:
    """Find threshold and score range.

    With normals only: the limit that the next normal part exceeds with the budget's probability
    (`NormalScores`). The range is as wide above the limit as it is below, so that 0.5 is in its
    middle. With defects as many of them are found as the cap on false rejects allows: the limit
    goes down for those near what is allowed, and no lower than they need. One picture that scores
    a little higher or lower never makes a jump.

    Args:
        normal: of images that the model did not learn.
        defective: raw scores (m,) of defective images, m may be 0.
        usual_scale: see `NormalScores.of`.

    Raises:
        BadDataset: too few images, or images that all score alike.
    """
    if not np.isfinite(normal.scores).all() or not np.isfinite(defective).all():
        raise BadDataset(NOT_FINITE)
    usual = NormalScores.of(normal.highest(), usual_scale=usual_scale)
    threshold = _threshold(usual, defective.astype(np.float64), budget)
    every = np.concatenate([normal.scores, defective])
    low = float(min(every.min(), threshold))
    high = float(max(every.max(), threshold + (threshold - low)))
    rejected = normal.rejected(threshold)
    return Calibration(
        threshold=threshold,
        raw_min=low,
        raw_max=high,
        method=method,
        normals=len(normal),
        parts=normal.count,
        defects=len(defective),
        false_rejects=budget.false_rejects,
        cap=budget.cap,
        rejected=rejected,
        at_least=round(at_least(rejected, normal.count), 4),
        at_most=round(at_most(rejected, normal.count), 4),
        parts_needed=parts_for(budget.false_rejects),
        limits=_table(usual, normal),
        **_found(normal, defective, threshold),
    )


def _threshold(usual: NormalScores, defective: NDArray[np.float64], budget: Budget) -> float:
    """The raw score above which parts are rejected."""
    limit, lowest_allowed = usual.limit(budget.false_rejects), usual.limit(budget.most)
    if not len(defective):
        return limit
    room = float(np.abs(defective - lowest_allowed).min())
    return min(limit, lowest_allowed + TOWARDS_THE_DEFECT * room)


def _table(usual: NormalScores, normal: KnownScores) -> list[dict[str, float]]:
    """The limits of other budgets, for who changes the threshold later."""
    limits = [usual.limit(budget) for budget in reversed(BUDGETS)]
    falling = np.maximum.accumulate(limits)[::-1]  # whatever the scores say of two neighbours
    return [
        {
            "false_rejects": budget,
            "raw": float(limit),
            "at_most": round(at_most(normal.rejected(limit), normal.count), 4),
        }
        for budget, limit in zip(BUDGETS, falling, strict=True)
    ]


def _found(normal: KnownScores, defective: NDArray[np.float32], threshold: float) -> dict[str, Any]:
    """What the known defects say; nothing where there are none."""
    if not len(defective):
        return {}
    scores = np.concatenate([normal.scores, defective]).astype(np.float64)
    truth = np.concatenate([np.zeros(len(normal)), np.ones(len(defective))])
    precision, recall, _ = precision_recall_curve(truth, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    misses = int((defective <= threshold).sum())
    return {
        "auroc": float(roc_auc_score(truth, scores)),
        "best_f1": float(f1.max()),
        "misses": misses,
        "defect_scores": [float(f"{one:.7g}") for one in np.sort(defective)[:MOST]],
    }
