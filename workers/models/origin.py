"""Where the weights came from that a training began with: for its log, and for report.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines.files import sha256
from engines.meta import Meta
from engines.promise import UNTRAINED
from engines.store.bundle import read_report

Origin = dict[str, Any]


def origin_of(given: str | Path | None, found: Origin | None) -> Origin | None:
    """What is known of weights; None where a model begins without any.

    Args:
        given: the file that somebody named, or the word "untrained".
        found: what is known of those that were found where nobody named any.
    """
    if given is None:
        return found
    if str(given) == UNTRAINED:
        return {UNTRAINED: True}
    path = Path(given)
    origin: Origin = {"file": path.name, "sha256": sha256(path)}
    before = _of_the_training_before(path, origin["sha256"])
    return {**origin, "origin": before} if before else origin


def _of_the_training_before(weights: Path, digest: str) -> Origin | None:
    """What a model.pth of ours was made from, by the report beside it."""
    meta = weights.with_name("meta.json")
    if not meta.is_file() or (Meta.read(meta).files or {}).get(weights.name) != digest:
        return None
    before = read_report(weights.parent).get("weights")
    if not isinstance(before, dict):
        return None
    origin = before.get("origin", before)
    return origin if isinstance(origin, dict) else None


def said(whose: str, origin: Origin | None) -> str:
    """One line for a person: where they came from, and what was looked into before."""
    if origin is None:
        return f"Weights of the {whose}: none to begin with, all are learned"
    return f"Weights of {whose}: {_said(origin)}"


def _said(origin: Origin) -> str:
    licence = f" ({origin['licence']})" if origin.get("licence") else ""
    if UNTRAINED in origin:
        return "random, as asked for"
    if "package" in origin:
        return f"{origin['package']} {origin['version']}{licence}"
    if "cache" in origin:
        return f"{origin['cache']}'s cache, {origin['model']}{licence}; no package has them"
    if "hub" in origin:
        where = f"{origin['hub']}, {origin['model']}{licence}"
        return f"{where}; neither a package nor timm's cache has them"
    before = f", made from {_said(origin['origin'])}" if "origin" in origin else ""
    return f"the file {origin['file']}{before}"
