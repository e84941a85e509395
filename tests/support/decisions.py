"""Decisions as a test needs them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from app.decisions.database import Note, open_or_make
from app.decisions.decision import Decision
from app.decisions.pictures import Map, Pictures
from engines.verdict import Scale

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


def write_record(
    folder: Path,
    entries: Sequence[Decision | Note],
    picture: Callable[[Decision], bytes | None] = lambda _: None,
) -> None:
    """Write a record as a server would have, thousands of lines in a second, before it starts.

    Args:
        folder: the server's data folder.
        picture: the image of a decision that is kept, with a map that is bright in its middle.
    """
    pictures = Pictures(folder / "decisions")

    def keep(place: int, number: int) -> int:
        entry = entries[place]
        image = picture(entry) if isinstance(entry, Decision) else None
        return pictures.keep(number, image, _map()) if image is not None else 0

    with open_or_make(folder / "decisions") as database:
        database.append(entries, keep)


def _map() -> Map:
    side = np.linspace(-1, 1, 32, dtype=np.float32)
    far = np.hypot(side[:, None], side[None, :])  # (32, 32), 0 in the middle
    return Map(np.clip(3 - 4 * far, 0, 3), Scale(1.5, 0.5, 2.5, 0.5), 256, None)
