"""Decisions as a test needs them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from app.decisions.decision import Decision

_COUNT = itertools.count(1_764_400_000_000, 100)  # milliseconds: each a tenth of a second later
_ONE = Decision(
    id="one", part="", at=0, model="part", version="0001-3f9a0c41d2e8", scorer="5f0c8e6c0b1d",
    verdict="normal", code="", raw_score=1.25, score=0.25, threshold=0.5, raw_threshold=1.5,
    queue_ms=0.1, decode_ms=2.0, infer_ms=20.5, total_ms=23.25, sha256="0" * 64, format="PNG",
    width=320, height=320, who="",
)  # fmt: skip


def decision(**changes: Any) -> Decision:
    """One that differs in these."""
    return replace(_ONE, **{"at": next(_COUNT), **changes})
