"""The gate: does a new version judge as it should, before it judges parts?

It replays images through the live version and the new one. Three groups are looked at by
themselves: known normals and known defects, kept with both versions when they were trained, and the
last parts of the line, of which nobody knows what they are. Of the known ones only a verdict that
became wrong counts; of the last parts every verdict that changed. Decisions of the record are asked
about again besides: of those that a person has marked, what became wrong counts as well. What
training measured may speak against a version too, also a first one: see `engines.promise`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engines.store.golden import Golden
from engines.verdict import Verdict

Group = Literal["normal", "defect", "recent"]
GROUPS: tuple[Group, ...] = ("normal", "defect", "recent")
MOST_NAMED = 5  # decisions, in a sentence; the gate's record has all of them


@dataclass(frozen=True)
class Replay:
    """An image that both versions are asked about."""

    group: Group
    image: NDArray[np.uint8]  # (S, S, 3) RGB


@dataclass(frozen=True)
class Replayed:
    """What they said."""

    replay: Replay
    old: Verdict
    new: Verdict

    @property
    def flipped(self) -> bool:
        """Whether the verdict changed, and of a known part: for the worse."""
        if self.old.label == self.new.label:
            return False
        right = {"normal": "Normal", "defect": "Anomaly"}.get(self.replay.group)
        return right is None or self.old.label == right


@dataclass(frozen=True)
class Past:
    """A decision of the record that both versions are asked about again."""

    number: int
    id: str
    part: str  # empty where the request named none
    label: Literal["good", "defect", ""]  # as a person marked it; empty where nobody has
    defect: str  # its kind, where it is one
    sha256: str  # of the picture
    picture: Callable[[], bytes]  # as it was sent; blocks, OSError where it is gone


@dataclass(frozen=True)
class Rejudged:
    """What both versions say of a decision of the record."""

    past: Past
    old: Verdict
    new: Verdict

    @property
    def flipped(self) -> bool:
        return self.old.label != self.new.label

    @property
    def became_wrong(self) -> bool:
        """Whether the verdict changed away from what a person said; never of one not marked."""
        right = {"good": "Normal", "defect": "Anomaly"}.get(self.past.label)
        return self.flipped and self.old.label == right


@dataclass
class Record:
    """The decisions of the record that both versions are asked about, and what they say."""

    past: list[Past] = field(default_factory=list)
    without_picture: int = 0  # marked, but their picture is not kept
    problem: str | None = None  # why there are none; a sentence
    known: set[str] = field(default_factory=set)  # SHA-256 of pictures of which a person has spoken
    old: dict[int, Verdict] = field(default_factory=dict)  # by the decisions' numbers
    new: dict[int, Verdict] = field(default_factory=dict)

    def judged(self) -> list[Rejudged]:
        """Those that both versions could be asked about."""
        both = self.old.keys() & self.new.keys()
        return [
            Rejudged(one, self.old[one.number], self.new[one.number])
            for one in self.past
            if one.number in both
        ]


class OtherRegions(NamedTuple):
    """The share of a picture that never counts, where other pixels count than until now; 0 to 1."""

    was: float  # by the live version
    becomes: float


def overtaken(
    origin: Mapping[str, Any], against: str | None, regions: OtherRegions | None
) -> list[str]:
    """What speaks against a version that a job made of another one than is live: a person has
    changed the regions since, and it would take that back.
    """
    if regions is None or "job" not in origin or origin.get("parent") == against:
        return []
    return [
        f"It was made of {origin.get('parent')}, whose regions are not those of {against}, which is"
        f" live: of a picture {regions.becomes:.1%} never count, and not {regions.was:.1%}. Make it"
        " again, or activate it and send the regions again."
    ]


def replays(
    goldens: list[Golden | None], recent: list[NDArray[np.uint8]], size: int
) -> Iterator[Replay]:
    """The images to replay, those of other sizes than `size` left out; golden ones once."""
    seen: set[bytes] = set()  # both versions may keep the same
    for golden in goldens:
        if golden is None:
            continue
        labels = golden.defective
        for number, image in enumerate(golden.images):
            group: Group = "recent"
            if labels is not None:
                group = "defect" if labels[number] else "normal"
            if len(image) == size and image.tobytes() not in seen:
                seen.add(image.tobytes())
                yield Replay(group, image)
    for image in recent:
        if len(image) == size:
            yield Replay("recent", image)


def weigh(
    replayed: list[Replayed],
    report: dict[str, Any],
    against: str | None,
    limit: float,
    doubts: Sequence[str] = (),
    record: Record | None = None,
    regions: OtherRegions | None = None,
) -> dict[str, Any]:
    """What the gate found, as gate.json holds it.

    Args:
        report: report.json of the new version.
        against: the live version.
        limit: the share of a group whose verdicts may change.
        doubts: what else speaks against it, a sentence each.
        record: None where there is no live version to compare with.
        regions: None where they are those of the live version.
    """
    reasons = [*_parity_problems(report), *doubts]
    groups: dict[str, dict[str, int]] = {}
    for group in GROUPS:
        of_group = [one for one in replayed if one.replay.group == group]
        flips = sum(one.flipped for one in of_group)
        groups[group] = {"images": len(of_group), "flips": flips}
        if flips > _allowed(limit, len(of_group)):
            reasons.append(_too_many(group, flips, len(of_group), limit))
    if record is not None:
        reasons += _against_marks(record.judged(), limit)
    return {
        "ok": not reasons,
        "reasons": reasons,
        "against": against,
        "limit": limit,
        "groups": groups,
        "flips": [_described(number, one) for number, one in enumerate(flipped(replayed))],
        "record": None if record is None else _of_record(record),
        "regions": None if regions is None else regions._asdict(),
    }


def flipped(replayed: list[Replayed]) -> list[Replayed]:
    return [one for one in replayed if one.flipped]


def _parity_problems(report: dict[str, Any]) -> list[str]:
    parity = report.get("parity")
    if not isinstance(parity, dict) or not parity:
        return ["It was never compared with the trained model: convert it with this Kensa."]
    served = parity.get("openvino_f32")
    if not isinstance(served, dict) or served.get("ok") is not True:
        return ["Its graph does not agree with the trained model."]
    return []


def _allowed(limit: float, images: int) -> float:
    return round(limit * images, 9)  # 0.29 * 100 is a little less than 29


def _too_many(group: Group, flips: int, images: int, limit: float) -> str:
    what = {
        "normal": f"{flips} of {images} known normals are rejected now",
        "defect": f"{flips} of {images} known defects pass now",
        "recent": f"{flips} of the last {images} parts get another verdict",
    }[group]
    return f"{what} (allowed: {limit:.0%})."


def _described(number: int, one: Replayed) -> dict[str, Any]:
    return {
        "number": number,
        "group": one.replay.group,
        "was": one.old.label,
        "becomes": one.new.label,
        "old_score": round(one.old.score, 4),
        "new_score": round(one.new.score, 4),
        "old_raw_score": one.old.raw_score,
        "new_raw_score": one.new.raw_score,
    }


def _against_marks(judged: list[Rejudged], limit: float) -> list[str]:
    """What speaks against a version by what people said of parts.

    A defect that somebody marked, and that was found, is to be found: whatever the limit.
    """
    reasons = []
    defects, good = _marked(judged, "defect"), _marked(judged, "good")
    if missed := [one for one in defects if one.became_wrong]:
        reasons.append(
            f"{len(missed)} of {len(defects)} parts that were marked as defects were found, and"
            f" pass now: {_named(missed)}."
        )
    rejected = [one for one in good if one.became_wrong]
    if len(rejected) > _allowed(limit, len(good)):
        reasons.append(
            f"{len(rejected)} of {len(good)} parts that were marked as good are rejected now"
            f" (allowed: {limit:.0%}): {_named(rejected)}."
        )
    return reasons


def _marked(judged: list[Rejudged], label: str) -> list[Rejudged]:
    return [one for one in judged if one.past.label == label]


def _named(judged: list[Rejudged]) -> str:
    names = [one.past.id for one in judged[:MOST_NAMED]]
    more = len(judged) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _of_record(record: Record) -> dict[str, Any]:
    judged = record.judged()
    good, defects = _marked(judged, "good"), _marked(judged, "defect")
    rejects = _marked(judged, "")
    return {
        "good": {
            "marked": len(good),
            "rejected_before": sum(one.old.is_anomalous for one in good),
            "rejected_now": sum(one.new.is_anomalous for one in good),
        },
        "defect": {
            "marked": len(defects),
            "missed_before": sum(not one.old.is_anomalous for one in defects),
            "missed_now": sum(not one.new.is_anomalous for one in defects),
        },
        "unmarked": {"rejects": len(rejects), "flips": sum(one.flipped for one in rejects)},
        "left_out": record.without_picture + len(record.past) - len(judged),
        "problem": record.problem,
        "flips": [_described_past(one) for one in judged if one.flipped],
    }


def _described_past(one: Rejudged) -> dict[str, Any]:
    """As POST /decisions/{id}/replay says it, of both: nothing is rounded."""
    past, old, new = one.past, one.old, one.new
    return {
        "number": past.number, "id": past.id, "part": past.part or None,
        "label": past.label or None, "defect": past.defect or None,
        "was": old.label, "becomes": new.label,
        "old_score": old.score, "new_score": new.score,
        "old_threshold": old.threshold, "new_threshold": new.threshold,
        "old_raw_score": old.raw_score, "new_raw_score": new.raw_score,
        "old_raw_threshold": old.raw_threshold, "new_raw_threshold": new.raw_threshold,
    }  # fmt: skip
