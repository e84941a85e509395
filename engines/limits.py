"""The limit between normal and anomalous, changed without training again.

meta.json's `calibration` may hold a table of limits: for shares of normal parts that may be
rejected ("false rejects", rising) the raw score to cut at. Anything in it may be missing, of an old
model, or damaged: then it is not known how many good parts a limit rejects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeGuard

import numpy as np

from engines.errors import BadRequest
from engines.meta import Meta
from engines.verdict import Scale

KEYS = ("threshold", "raw", "false_rejects")
LEAST_SHARE = 1e-9  # of parts: nobody has seen a billion
TRAINED = 0.5  # the normalised threshold that is the one that training found
ROUNDING = 1e-9  # of a normalised score: a raw score at an end of 0..1 may come out so far beyond


@dataclass(frozen=True)
class Limit:
    """One row of the table."""

    false_rejects: float  # share of normal parts above `raw`, in (0, 1)
    raw: float
    at_most: float | None = None  # 95 % upper bound of that share


@dataclass(frozen=True)
class Limits:
    """The table, false_rejects rising and raw scores not rising."""

    rows: tuple[Limit, ...]

    @classmethod
    def of(cls, meta: Meta) -> Limits | None:
        """The table of a meta.json; None where there is none that can be relied on."""
        found = (meta.calibration or {}).get("limits")
        if not isinstance(found, list) or not found:
            return None
        rows = [_row(one) for one in found]
        whole = tuple(row for row in rows if row is not None)
        pairs = list(pairwise(whole))
        is_sorted = all(a.false_rejects < b.false_rejects and a.raw >= b.raw for a, b in pairs)
        is_whole = is_sorted and len(whole) == len(rows)
        return cls(whole) if is_whole and math.isfinite(whole[0].raw - whole[-1].raw) else None

    def raw_for(self, false_rejects: float) -> float | None:
        """The raw score to cut at for a share; None outside of the table.

        Between two rows it goes linearly with log(false_rejects).
        """
        for low, high in self._spans():
            if low.false_rejects <= false_rejects <= high.false_rejects:
                if low == high:
                    return low.raw
                at = _log_share(low.false_rejects, high.false_rejects, false_rejects)
                return low.raw + at * (high.raw - low.raw)
        return None

    def false_rejects_at(self, raw: float) -> float | None:
        """The inverse, the least share that a limit is enough for; None outside of the table."""
        for low, high in self._spans():
            if high.raw <= raw <= low.raw:
                if raw == low.raw:
                    return low.false_rejects
                at = (raw - low.raw) / (high.raw - low.raw)
                ratio: float = (high.false_rejects / low.false_rejects) ** at
                return min(low.false_rejects * ratio, high.false_rejects)
        return None

    def at_most(self, raw: float) -> float | None:
        """What share of normal parts is above a raw score at most, 95 % sure; None where unknown.

        A bound for a lower limit holds for this one too.
        """
        bounds = [row.at_most for row in self.rows if row.raw <= raw]
        return bounds[0] if bounds else None

    def _spans(self) -> Sequence[tuple[Limit, Limit]]:
        return [*pairwise(self.rows)] or [(self.rows[0], self.rows[0])]


def _row(found: Any) -> Limit | None:
    if not isinstance(found, dict):
        return None
    budget, raw, at_most = share(found.get("false_rejects")), found.get("raw"), found.get("at_most")
    if budget is None or not is_number(raw):
        return None
    bound = float(at_most) if is_number(at_most) and 0 <= at_most <= 1 else None
    return Limit(budget, float(raw), bound)


def share(value: Any) -> float | None:
    """A share of parts, from `LEAST_SHARE` and below 1; None for anything else, such as an older
    file's count.
    """
    return float(value) if is_number(value) and LEAST_SHARE <= value < 1 else None


def at_training(meta: Meta) -> bool:
    """Whether the threshold is the one that training found, so that what it measured holds."""
    return meta.image_threshold == TRAINED


def is_number(value: Any) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _log_share(low: float, high: float, value: float) -> float:
    """Where a value lies between two others, 0 to 1, by their logarithms."""
    return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))


def share_at_most(count: int, of: int) -> float | None:
    """The share that so many of so many parts may stand for at most, 95 % sure; None of none.

    Clopper and Pearson's bound (Biometrika 26, 1934), by halving: a server has no scipy, which
    training asks for the same.
    """
    if of == 0:
        return None
    low, high = count / of, 1.0
    chosen = np.arange(count + 1)
    ways = [math.lgamma(of + 1) - math.lgamma(k + 1) - math.lgamma(of - k + 1) for k in chosen]
    while high - low > 1e-6:
        middle = (low + high) / 2
        odds = np.array(ways) + chosen * math.log(middle) + (of - chosen) * math.log1p(-middle)
        low, high = (middle, high) if np.exp(odds).sum() > 0.05 else (low, middle)
    return high


def asked_for(meta: Meta, wanted: dict[str, Any]) -> Meta:
    """A meta.json with the limit that somebody asks for, in exactly one of the `KEYS`.

    Raises:
        BadRequest: it is no number, outside of its range, or cannot be expressed with this model.
        BadMeta: the model was never verified.
    """
    scale, limits = Scale.of(meta), Limits.of(meta)
    given = {key: value for key, value in wanted.items() if value is not None}
    if len(given) != 1:
        raise BadRequest(
            f"Say exactly one of threshold ({_RANGE}), raw ({_raw_range(scale)}) and false_rejects"
            f" ({_budgets(limits)}), not {' and '.join(given) or 'none'}."
        )
    ((key, value),) = given.items()
    if key == "threshold":
        limit = _number(key, value, _RANGE)
        if not 0 <= limit <= 1:
            raise BadRequest(f"threshold is {limit:g}; it must be {_RANGE}.")
    elif key == "raw":
        raw = _number(key, value, _raw_range(scale))
        limit = _normalised(scale, raw)
        if not 0 <= limit <= 1:
            raise BadRequest(f"raw is {raw:g}; for this model it must be {_raw_range(scale)}.")
    else:
        limit = _for_budget(scale, limits, value)
    return meta.with_(image_threshold=limit)


_RANGE = "a number from 0 to 1"


def _for_budget(scale: Scale, limits: Limits | None, value: Any) -> float:
    if limits is None:
        raise BadRequest(
            "false_rejects cannot be asked for, because this version does not know how its normal"
            " parts score: train it again, or say threshold or raw."
        )
    budget = _number("false_rejects", value, _budgets(limits))
    raw = limits.raw_for(budget)
    if raw is None:
        raise BadRequest(f"false_rejects is {budget:g}; it must be {_budgets(limits)}.")
    limit = _normalised(scale, raw)
    if not 0 <= limit <= 1:
        raise BadRequest(
            f"false_rejects of {budget:g} needs a raw limit of {raw:g}; this model can express"
            f" {_raw_range(scale)}."
        )
    return limit


def _number(key: str, value: Any, allowed: str) -> float:
    if not is_number(value):
        raise BadRequest(f"{key} must be {allowed}, not {str(value)[:40]!r}.")
    return float(value)


def _normalised(scale: Scale, raw: float) -> float:
    limit = (raw - scale.threshold_auto) / (scale.raw_max - scale.raw_min) + 0.5
    is_end = -ROUNDING <= limit <= 1 + ROUNDING
    return min(max(limit, 0.0), 1.0) if is_end else limit


def raw_range(scale: Scale) -> tuple[float, float]:
    """Between which raw scores a limit may lie."""
    half = (scale.raw_max - scale.raw_min) / 2
    return scale.threshold_auto - half, scale.threshold_auto + half


def _raw_range(scale: Scale) -> str:
    low, high = raw_range(scale)
    return f"a number from {low:.6g} to {high:.6g}"


def _budgets(limits: Limits | None) -> str:
    if limits is None:
        return "which this version has no table for"
    low, high = limits.rows[0].false_rejects, limits.rows[-1].false_rejects
    return f"a number from {low:g} to {high:g}"


@dataclass(frozen=True)
class InForce:
    """The limit of a version in all its forms, and the table; what is not known is None."""

    threshold: float  # normalised
    raw: float
    false_rejects: float | None
    at_most: float | None
    rows: tuple[Limit, ...]


def in_force(meta: Meta) -> InForce:
    """The limit that a meta.json judges by.

    Raises:
        BadMeta: the model was never verified.
    """
    scale, limits = Scale.of(meta), Limits.of(meta)
    raw = scale.raw_threshold
    known = meta.calibration or {}
    at_most = known.get("at_most") if at_training(meta) else None
    measured = float(at_most) if is_number(at_most) else None
    if limits is None:
        return InForce(meta.image_threshold, raw, None, measured, ())
    rounding = ROUNDING * (scale.raw_max - scale.raw_min)
    # As the table has it, where only rounding has moved it: else the next row would be looked at.
    near = next((row.raw for row in limits.rows if abs(row.raw - raw) <= rounding), raw)
    rejects = limits.false_rejects_at(near)
    stated = share(known.get("false_rejects"))
    if stated is not None:  # of several shares with this very limit, that one
        at = limits.raw_for(stated)
        rejects = stated if at is not None and abs(at - raw) <= rounding else rejects
    bound = limits.at_most(near) if measured is None else measured
    return InForce(meta.image_threshold, raw, rejects, bound, limits.rows)
