"""Waiting for what another process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def until(
    true: Callable[[], object],
    otherwise: str | Callable[[], str] = "it does not come true",
    within_s: float = 60.0,
) -> None:
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end, otherwise if isinstance(otherwise, str) else otherwise()
        time.sleep(0.02)


def alive(process: int) -> bool:
    """Whether it runs; one that has ended and was not waited for does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
