"""`GateReplay`: what the live version and a new one are shown, in the gaps of the line."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from app.serving.inspection import Inspector
from engines.errors import BadBundle, BadImage, KensaError
from engines.meta import Meta
from engines.serving import gate
from engines.serving.gate import OtherRegions, Past, Record, Replay, Replayed
from engines.serving.resident import Resident
from engines.store.bundle import read_report
from engines.store.golden import Golden
from engines.store.regions import read_regions
from engines.store.versions import META, Store
from engines.verdict import Verdict, judge

_SAME_BITS = ({None, 8}, {None, 16})  # of meta.json, where None is all 16 bits of a 16-bit file
# For which the record may keep a version waiting: to be read, and to be judged by each version.
AT_MOST_S = 60.0

log = logging.getLogger("kensa")


class GateReplay:
    """Finds the images, asks a version about them, and keeps what the parts look like."""

    def __init__(self, store: Store, inspector: Inspector) -> None:
        self.decisions_of: Callable[[str], Record] = lambda _: Record()  # of a model; blocks
        self._store = store
        self._inspector = inspector

    async def recall(self, name: str) -> Record:
        """Decisions to show to both; none, and why, where anything is wrong with the record."""
        found = asyncio.to_thread(self.decisions_of, name)
        try:
            return await asyncio.wait_for(found, AT_MOST_S)
        except KensaError as error:
            problem = str(error)
        except asyncio.TimeoutError:
            problem = f"The record did not answer within {AT_MOST_S:.0f} s."
        except Exception as error:
            log.exception("The record cannot be read for the gate")
            problem = f"The record cannot be read: {error}."
        log.info("The gate shows no decisions of %s: %s", name, problem)
        return Record(problem=problem)

    async def ask_again(self, model: Resident, past: Iterable[Past]) -> dict[int, Verdict]:
        """What a version says of decisions, by their numbers, as POST /decisions/{id}/replay.

        One picture is in memory at a time. What cannot be read, or not in time, is left out.
        """
        said: dict[int, Verdict] = {}
        until = time.monotonic() + AT_MOST_S
        for one in past:
            picture = asyncio.to_thread(one.picture)
            try:
                data = await asyncio.wait_for(picture, max(0.0, until - time.monotonic()))
                said[one.number] = await self._inspector.look(data, model)
            except asyncio.TimeoutError:
                log.info("The gate has no time for decision %s and those before it", one.id)
                break
            except (BadImage, OSError, MemoryError) as error:
                log.info("The gate leaves out decision %s: %s", one.id, error)
        return said

    def find(
        self, name: str, old: Resident | None, version: str, known: set[str]
    ) -> tuple[list[Replay], dict[str, Any]]:
        """The images to show to both, and the report of the new one. Blocks.

        Args:
            known: SHA-256 of pictures of which a person said what they are: they are shown by
                themselves, and are none of the last parts, of which nobody knows.
        """
        folder = self._store.folder(name, version)
        report = read_report(folder)
        new = Meta.read(folder / META)
        if old is None or not _see_alike(old.meta, new):
            return [], report  # nothing to compare with, or no image that both could see
        size, parts = old.runtime.image_size, self._inspector.recent(name)
        recent = [
            one.pixels
            for one in parts
            if one.is_as_seen_by(old.meta) and one.is_as_seen_by(new) and one.sha256 not in known
        ]
        goldens = [_golden(one, size) for one in (self._store.folder(name, old.version), folder)]
        if old.meta.resize != new.resize and not all(one.either_way for one in parts):
            goldens = []  # nobody knows of which size they were, and the line's parts are such
        return list(gate.replays(goldens, recent, size)), report

    def other_regions(self, name: str, old: Resident | None, version: str) -> OtherRegions | None:
        """What never counts by the live version, and by a new one. Blocks.

        None where their regions are the same, or nothing is live.
        """
        if old is None:
            return None
        try:
            folders = [self._store.folder(name, one) for one in (old.version, version)]
            before, now = (read_regions(one, Meta.read(one / META)) for one in folders)
        except KensaError as error:  # of the live one, damaged since: the new one is open
            log.info("The gate cannot compare the regions of %s: %s", name, error)
            return None
        was, becomes = (0.0 if one is None else one.share for one in (before, now))
        if before is not None and now is not None:
            same = np.array_equal(before.mask, now.mask)
        else:
            same = was == becomes == 0
        return None if same else OtherRegions(was, becomes)

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
