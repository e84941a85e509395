"""`GateReplay`: images that the live version and a new one are shown, in the gaps of the line."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import cv2

from app.serving.inspection import Inspector
from engines.errors import BadBundle
from engines.meta import Meta
from engines.serving import gate
from engines.serving.gate import Replay, Replayed
from engines.serving.resident import Resident
from engines.store.bundle import read_report
from engines.store.golden import Golden
from engines.store.versions import META, Store
from engines.verdict import Verdict, judge

_SAME_BITS = ({None, 8}, {None, 16})  # of meta.json, where None is all 16 bits of a 16-bit file


class GateReplay:
    """Finds the images, asks a version about them, and keeps what the parts look like."""

    def __init__(self, store: Store, inspector: Inspector) -> None:
        self._store = store
        self._inspector = inspector

    def find(
        self, name: str, old: Resident | None, version: str
    ) -> tuple[list[Replay], dict[str, Any]]:
        """What to show to both, and the report of the new one. Blocks."""
        folder = self._store.folder(name, version)
        report = read_report(folder)
        new = Meta.read(folder / META)
        if old is None or not _see_alike(old.meta, new):
            return [], report  # nothing to compare with, or no image that both could see
        size, parts = old.runtime.image_size, self._inspector.recent(name)
        recent = [
            one.pixels for one in parts if one.is_as_seen_by(old.meta) and one.is_as_seen_by(new)
        ]
        goldens = [_golden(one, size) for one in (self._store.folder(name, old.version), folder)]
        if old.meta.resize != new.resize and not all(one.either_way for one in parts):
            goldens = []  # nobody knows of which size they were, and the line's parts are such
        return list(gate.replays(goldens, recent, size)), report

    async def ask(self, model: Resident, images: list[Replay]) -> list[Verdict]:
        """What a version says of images, each while no part is being inspected."""
        verdicts = []
        for one in images:
            infer = partial(model.runtime.infer, one.image[None])
            scores, _ = await self._inspector.in_a_gap(infer)
            verdicts.append(judge(float(scores[0]), model.scale))
        return verdicts

    def keep_pictures(self, name: str, version: str, replayed: list[Replayed]) -> None:
        """What the parts look like whose verdict changes, for the person who decides. Blocks."""
        folder = self._store.gate_folder(name, version)
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.jpg"):
            old.unlink()
        for number, one in enumerate(gate.flipped(replayed)):
            _, data = cv2.imencode(".jpg", one.replay.image[..., ::-1])
            (folder / f"{number}.jpg").write_bytes(data.tobytes())


def _see_alike(old: Meta, new: Meta) -> bool:
    """Whether what one version sees of a file is what the other one would: as large and as bright.

    Of 8-bit files each sees the same. Which files come, a model that has 8 bits, or none, may tell.
    """
    bits = {old.bit_depth, new.bit_depth}
    return old.image_size == new.image_size and (len(bits) == 1 or bits in _SAME_BITS)


def _golden(folder: Path, size: int) -> Golden | None:
    try:
        return Golden.read(folder, size)
    except BadBundle:  # of another size: the version before was trained otherwise
        return None
