"""`Repeats`: a part that is sent again, as a PLC does after a timeout, is judged once."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from app.serving.inspection import Inspection

MOST = 10_000  # that are remembered
Key = tuple[str, str, str]  # model, part, SHA-256 of the picture


class _First(NamedTuple):
    id: str
    since: float
    done: asyncio.Future[Inspection]


class Repeats:
    """Which pictures of which parts came lately. Only the event loop's thread calls this.

    The same picture gets the same score anyway; what is kept apart is that it counts once, and that
    its verdict stays that of the version which judged it first. Another picture of the part is
    another look at it.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._known: OrderedDict[Key, _First] = OrderedDict()

    async def once(
        self, key: Key, id_: str, inspect: Callable[[], Awaitable[Inspection]]
    ) -> tuple[Inspection, str | None]:
        """The inspection of a picture, and the id of the one that it repeats, if it does.

        Where the first one ended without a verdict, this one is the first.
        """
        self._forget_old()
        while (first := self._known.get(key)) is not None:  # of several that waited, one is next
            await asyncio.wait({first.done})
            if not first.done.cancelled() and first.done.exception() is None:
                return first.done.result(), first.id
        done: asyncio.Future[Inspection] = asyncio.get_running_loop().create_future()
        mine = self._known[key] = _First(id_, time.monotonic(), done)
        self._known.move_to_end(key)
        try:
            inspection = await inspect()
        except BaseException:
            done.cancel()
            if self._known.get(key) is mine:
                del self._known[key]
            raise
        nothing = np.empty((0, 0), np.float32)  # maps and pictures would be most of the memory
        done.set_result(replace(inspection, anomaly_map=nothing, drawing=None))
        return inspection, None

    def forget(self) -> None:
        """Forget all: what is sent again is judged anew."""
        self._known.clear()

    def _forget_old(self) -> None:
        too_old = time.monotonic() - self.seconds
        while self._known:
            first = next(iter(self._known.values()))
            if first.since > too_old and len(self._known) <= MOST:
                return
            self._known.popitem(last=False)
