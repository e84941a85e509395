"""The gate: does a new version judge as it should, before it judges parts?

It replays images through the live version and the new one. Three groups are looked at by
themselves: known normals and known defects, kept with both versions when they were trained, and the
last parts of the line, of which nobody knows what they are. Of the known ones only a verdict that
became wrong counts; of the last parts every verdict that changed. What training measured may speak
against a version too, also a first one: see `engines.promise`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engines.store.golden import Golden
from engines.verdict import Verdict

Group = Literal["normal", "defect", "recent"]
GROUPS: tuple[Group, ...] = ("normal", "defect", "recent")


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
) -> dict[str, Any]:
    """What the gate found, as gate.json holds it.

    Args:
        report: report.json of the new version.
        against: the live version.
        limit: the share of a group whose verdicts may change.
        doubts: what else speaks against it, a sentence each.
    """
    reasons = [*_parity_problems(report), *doubts]
    groups: dict[str, dict[str, int]] = {}
    for group in GROUPS:
        of_group = [one for one in replayed if one.replay.group == group]
        flips = sum(one.flipped for one in of_group)
        groups[group] = {"images": len(of_group), "flips": flips}
        if flips > round(limit * len(of_group), 9):  # 0.29 * 100 is a little less than 29
            reasons.append(_too_many(group, flips, len(of_group), limit))
    return {
        "ok": not reasons,
        "reasons": reasons,
        "against": against,
        "limit": limit,
        "groups": groups,
        "flips": [_described(number, one) for number, one in enumerate(flipped(replayed))],
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
