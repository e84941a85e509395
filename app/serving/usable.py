"""`Usable`: whether the picture that came says anything of the part, where the settings ask."""

from __future__ import annotations

import hashlib
from collections import deque
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engines.camera import FEW, Fault, Values
from engines.serving.resident import Resident

FROZEN = 3  # the same picture so many times, of different parts ...
LAST = 8  # ... among so many is a camera that stands still


class Measured(NamedTuple):
    """What a picture is like."""

    values: Values | None  # None where the version does not know what its pictures look like
    pixels: str  # SHA-256 of what the model sees


def measured(picture: NDArray[np.uint8], pixels: NDArray[np.uint8], model: Resident) -> Measured:
    """Measure a picture (H, W, 3); `pixels` (S, S, 3) are the same as the model sees it."""
    camera = model.camera
    values = camera.measure(picture, pixels) if camera is not None else None
    return Measured(values, hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest())


class _Last:
    """The last pictures of a version."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.values: deque[Values] = deque(maxlen=FEW - 1)
        self.pictures: deque[tuple[str, str]] = deque(maxlen=LAST)  # SHA-256, part


class Usable:
    """Says why a picture is not usable. Only the event loop's thread calls this."""

    def __init__(self, asked: frozenset[str]) -> None:
        self.asked = asked
        self._last: dict[str, _Last] = {}  # by model

    def why_not(self, model: Resident, seen: Measured, part: str) -> Fault | None:
        """Why nobody should go by a picture; None where there is nothing, or nobody asked.

        Args:
            part: its name, where it has one: who sends a part again sends the same picture.
        """
        if not self.asked:
            return None
        last = self._last.get(model.name)
        if last is None or last.version != model.version:
            last = self._last[model.name] = _Last(model.version)
        faults = list(self._of_camera(model, seen, last))
        if self._is_frozen(seen.pixels, part, last):
            reason = (
                f"The camera sends the same picture again and again: {FROZEN} times within the"
                f" last {LAST} parts."
            )
            faults.append(Fault("camera_frozen", reason))
        return next((fault for fault in faults if fault.code in self.asked), None)

    def look(self, model: Resident, seen: Measured) -> Fault | None:
        """The same of a picture that is no part of the line: it is not remembered."""
        last = self._last.get(model.name)
        if seen.values is None or model.camera is None:
            return None
        before = last.values if last is not None and last.version == model.version else ()
        faults = model.camera.faults(seen.values, list(before))
        return next((fault for fault in faults if fault.code in self.asked), None)

    def forget(self, name: str) -> None:
        """Give back what is known of a model's last parts."""
        self._last.pop(name, None)

    def _of_camera(self, model: Resident, seen: Measured, last: _Last) -> list[Fault]:
        if seen.values is None or model.camera is None:
            return []
        found = model.camera.faults(seen.values, list(last.values))
        last.values.append(seen.values)
        return found

    def _is_frozen(self, pixels: str, part: str, last: _Last) -> bool:
        """Whether it came too often; sent again for the same part it counts once."""
        if not part or (pixels, part) not in last.pictures:
            last.pictures.append((pixels, part))
        return sum(known == pixels for known, _ in last.pictures) >= FROZEN
