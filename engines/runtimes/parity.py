"""How far raw scores may lie from the torch model's, and whether they do. No torch in here."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.meta import Meta
from engines.store.plan_record import Precision
from engines.verdict import Scale, decide

# Largest relative difference of raw scores from the float32 torch model that is accepted.
FLOAT32_LIMIT = 1e-3
HALF_LIMIT = 1e-2  # of a graph or a runtime with half precision in its backbone
INT8_LIMIT = 8e-2
INT8_MEAN_LIMIT = 3e-2  # of the mean of the differences
LIMITS: dict[Precision, float] = {"f32": FLOAT32_LIMIT, "f16": HALF_LIMIT, "int8": INT8_LIMIT}


def compare(
    expected: NDArray[np.float32],
    found: NDArray[np.float32],
    meta: Meta,
    limit: float,
    mean_limit: float | None = None,
) -> dict[str, Any]:
    """max_relative, mean_relative, flips (verdicts that change) and ok, of raw scores (n,)."""
    relative = np.abs(found - expected) / np.maximum(np.abs(expected), 1e-12)
    if not np.isfinite(found).all():
        return {"max_relative": 1e9, "mean_relative": 1e9, "flips": len(found), "ok": False}
    flips = 0
    if meta.image_threshold_auto is not None and meta.raw_image_max is not None:
        threshold = Scale.of(meta).raw_threshold
        pairs = zip(expected, found, strict=True)
        flips = sum(decide(float(a), threshold) != decide(float(b), threshold) for a, b in pairs)
    near = relative.max() <= limit and (mean_limit is None or relative.mean() <= mean_limit)
    return {
        "max_relative": float(relative.max()),
        "mean_relative": float(relative.mean()),
        "flips": flips,
        "ok": bool(near and flips == 0),
    }


def compare_in(
    precision: Precision, expected: NDArray[np.float32], found: NDArray[np.float32], meta: Meta
) -> dict[str, Any]:
    """`compare` with the limits of a precision."""
    mean_limit = INT8_MEAN_LIMIT if precision == "int8" else None
    return compare(expected, found, meta, LIMITS[precision], mean_limit)
