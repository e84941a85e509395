"""What a version can promise, as its training measured it, and what speaks against it.

meta.json's `calibration` says so. Anything in it may be missing, of an older Kensa or another tool,
or damaged: then it is not known, and holds nothing back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engines.limits import at_training, in_force, is_number, share
from engines.meta import Meta
from engines.verdict import Scale

UNTRAINED = "untrained"  # in `weights` of the calibration
FEW_FOUND = 0.2  # share of the drawn defects below which a model may be blind
MOST = 2**53  # parts: beyond it is no count
MOVED = 1.0  # standard deviations of normal scores that a threshold may move in an update


@dataclass(frozen=True)
class Promise:
    """What was measured of a version, at the threshold that is in force; None is not known.

    Attributes:
        normals, parts: pictures of normal parts, and of how many parts they are.
        false_rejects: the share of good parts that may be rejected.
        rejected: of `parts`, which training had not shown to the model.
        at_least, at_most: the share of good parts that is rejected, each with 95 % confidence.
        parts_needed: how many parts without a false reject would promise `false_rejects`.
        defects, misses: known ones, and how many of them pass.
        drawn, found: defects drawn onto normal parts that any model has to find, and does.
        untrained: the backbone's weights are random.
    """

    normals: int | None
    parts: int | None
    false_rejects: float | None
    rejected: int | None
    at_least: float | None
    at_most: float | None
    parts_needed: int | None
    defects: int | None
    misses: int | None
    drawn: int | None
    found: int | None
    untrained: bool


def promise(meta: Meta) -> Promise | None:
    """What a meta.json says; None where parts were not counted, or nothing was measured."""
    known = meta.calibration or {}
    parts = _count(known.get("parts"))
    if parts is None or None in (meta.image_threshold_auto, meta.raw_image_min, meta.raw_image_max):
        return None
    as_trained = known if at_training(meta) else {}  # of another threshold it says nothing
    drawn, found = drawn_found(meta)
    return Promise(
        normals=_count(known.get("normals")),
        parts=parts,
        false_rejects=share(known.get("false_rejects")),
        rejected=_count(as_trained.get("rejected")),
        at_least=_bound(as_trained.get("at_least")),
        at_most=in_force(meta).at_most,
        parts_needed=_count(known.get("parts_needed")),
        defects=_count(known.get("defects")),
        misses=_count(as_trained.get("misses")),
        drawn=drawn,
        found=found,
        untrained=known.get("weights") == UNTRAINED,
    )


def drawn_found(meta: Meta, threshold: float | None = None) -> tuple[int | None, int | None]:
    """How many defects were drawn, and how many of them lie above a threshold; None: not known.

    Args:
        threshold: raw score; None is the one in force.
    """
    drawn = (meta.calibration or {}).get("drawn")
    if not isinstance(drawn, dict):
        return None, None
    scale, scores = Scale.of(meta), drawn.get("scores")
    limit = scale.raw_threshold if threshold is None else threshold
    if isinstance(scores, list) and scores and all(map(is_number, scores)):
        return len(scores), sum(score > limit for score in scores)
    found, of = _count(drawn.get("found")), _count(drawn.get("of"))
    if limit != scale.threshold_auto or found is None or not of or found > of:
        return None, None
    return of, found


def doubts(meta: Meta, least_found: float, *, live: bool = False) -> list[str]:
    """Why a version should not judge parts before a person said so, a sentence each.

    Args:
        live: it judges already, so nobody has to be told how to let it.
        least_found: the share of drawn defects that it has to find; at 0 it is not asked whether
            the model sees at all.
    """
    known = promise(meta)
    if known is None:
        return []
    sentences, let = [], "" if live else "activate it, and "
    if least_found > 0:
        if known.drawn and known.found is not None and known.found / known.drawn < least_found:
            sentences.append(
                f"It finds only {known.found} of {known.drawn} drawn defects: it may be blind."
                " Train it with more or other pictures, another backbone, other layers or a larger"
                f" image_size; or {let}lower its threshold with PUT /models/NAME/threshold."
            )
        if known.untrained:
            sentences.append(
                "The weights of its backbone are untrained, so it sees strong colours and little"
                " else: train it with pretrained ones."
            )
    sentences += _rejects_too_many(meta, known, let)
    return sentences


def _rejects_too_many(meta: Meta, known: Promise, let: str) -> list[str]:
    cap = share((meta.calibration or {}).get("cap"))
    budget = max(known.false_rejects or 0.0, cap or 0.0)
    if not budget or known.at_least is None or known.at_least <= budget:
        return []
    return [
        f"It rejects {known.rejected} of {known.parts} good parts that it has not learned, at least"
        f" {known.at_least:.1%} of all, 95 % sure, where {100 * budget:g} % may be: train it with"
        f" more pictures of good parts; or {let}raise its threshold with PUT"
        " /models/NAME/threshold."
    ]


def movement(meta: Meta, live: Meta | None) -> list[str]:
    """Whether an update moved the threshold far, in a sentence; nothing where it did not.

    Args:
        live: of the version that judges; one with the same threshold has been let through.
    """
    known = meta.calibration or {}
    before, moved = known.get("before"), known.get("moved")
    if not is_number(before) or not is_number(moved) or abs(moved) <= MOVED:
        return []
    now = meta.image_threshold_auto
    if now is None or (live is not None and live.image_threshold_auto == now):
        return []
    if not at_training(meta) or (live is not None and not at_training(live)):  # set by hand
        now = Scale.of(meta).raw_threshold
        before = Scale.of(live).raw_threshold if live is not None else before
    what = "normal parts pass more easily now, and defects too" if moved > 0 else "more is rejected"
    return [
        f"The threshold moved from {before:.4g} to {now:.4g}, by {abs(moved):.1f} standard"
        f" deviations of normal scores: {what}. Look at the good parts and the known defects that"
        " it comes from, and activate it if they are what they should be."
    ]


def _count(value: Any) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST
    return value if is_count else None


def _bound(value: Any) -> float | None:
    return float(value) if is_number(value) and 0 <= value <= 1 else None
