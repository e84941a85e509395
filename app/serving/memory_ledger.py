"""`MemoryLedger`: what fits into memory beside what is there, and who rests to make room.

What is being opened is not in memory yet, but its memory is promised; the ledger takes what was
promised off what is free.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable
from pathlib import Path

from app.serving.loader import Loader
from app.settings import Settings
from engines.errors import BadBundle, BadMeta, OutOfMemory
from engines.machine import job_memory
from engines.machine.memory import MIB, Free, Need, Short, total_bytes
from engines.serving.opening import gpu_memory, memory_needed
from engines.serving.resident import Residents

log = logging.getLogger("kensa")


class MemoryLedger:
    """Says what fits, and promises it. Its methods belong to the event loop's thread."""

    def __init__(
        self,
        residents: Residents,
        settings: Settings,
        loader: Loader,
        folder_of: Callable[[str, str], Path],
        is_changing: Callable[[str], bool],
        put_to_rest: Callable[[str, str], Awaitable[None]],
    ) -> None:
        """
        Args:
            folder_of: a model's name and a version -> its files.
            is_changing: whether a change of a model is under way: it does not rest then.
            put_to_rest: takes a model out of memory, and tells why to whoever asks for it.
        """
        self._residents = residents
        self._settings = settings
        self._loader = loader
        self._folder_of = folder_of
        self._is_changing = is_changing
        self._put_to_rest = put_to_rest
        self._admitting = asyncio.Lock()  # two at a time would count the same memory
        self._promised: dict[str, Need] = {}  # of versions that are being opened

    # ---- what fits ----------------------------------------------------------------------------

    async def fits(self, name: str, version: str) -> bool:
        """Whether a version fits beside what is in memory; others may be put to rest for it.

        Raises:
            OutOfMemory: it does not, and unloading first is not allowed.
        """
        found = await self._admit(name, version)
        if found is not None and self._settings.unload_first == "off":
            raise OutOfMemory(
                f"{name} {version} needs {found.needed} beside the live version, and {found.free}:"
                " set KENSA_UNLOAD_FIRST=on to let the live one go before."
            )
        return found is None

    async def must_fit(self, name: str, version: str, *, exchange: bool = True) -> None:
        """Raise OutOfMemory where there is no room for a model that is not in memory.

        Args:
            exchange: whether others may be put to rest for it.
        """
        found = await self._admit(name, version, exchange=exchange)
        if found is not None:
            what = self._why_none_rests(name) or "unload another model"
            raise OutOfMemory(f"{name} {version} needs {found.needed}, and {found.free}: {what}.")

    async def must_be_possible(self, name: str, version: str) -> None:
        """Raise OutOfMemory where a version needs more than there is at all, used or not.

        Also of the first model, which is tried else whatever is free. What is needed is reckoned,
        and may be too much: a limit that a person has set above what there is counts in its place.
        """
        most = max(total_bytes(), self._settings.model_memory_mib * MIB)

        def look() -> Short | None:
            needed = memory_needed(self._folder_of(name, version), self._loader.opening)
            return Need(needed.host).short_of(Free(most))

        with contextlib.suppress(BadMeta, BadBundle):  # opening says it
            if (found := await self._loader.do(look)) is not None:
                raise OutOfMemory(
                    f"{name} {version} needs {found.needed}, and this machine has no more than"
                    f" {total_bytes() // MIB} MiB: it is not opened. If you know that it fits, set"
                    f" KENSA_MODEL_MEMORY_MIB={found.wanted // MIB + 1}, and it is tried."
                )

    def settle(self, name: str) -> None:
        """What was promised to a model is taken, or no longer needed."""
        self._promised.pop(name, None)

    def owes_nothing(self) -> bool:
        """Whether no memory is promised to a version that is about to be opened."""
        return not self._promised

    async def job_short_of(self, request: job_memory.Request) -> Short | None:
        """What a job would be short of that began now, beside all that is in memory."""
        data, promised = self._settings.data, [*self._promised.values()]

        def look() -> Short | None:
            free = job_memory.free_for_jobs(data, gpu_memory(self._loader.opening))
            return job_memory.short_of(data, request, free.without(*promised))

        return await self._loader.do(look)

    async def _admit(self, name: str, version: str, *, exchange: bool = True) -> Short | None:
        """Promise a version its memory, others put to rest for it; or what it is short of.

        Not before the version that was replaced last has given its memory back: however fast
        changes follow, two versions of a model are in memory and never three.
        """
        await self._loader.until_gone(name)
        async with self._admitting:
            while True:
                needed, free = await self._room(name, version)
                found = needed.short_of(free)
                if found is None:
                    self._promised[name] = needed
                    return None
                if not exchange or not await self._make_room(name, found):
                    return found

    async def _room(self, name: str, version: str) -> tuple[Need, Free]:
        """Bytes that a version needs, and those that it may have."""
        held, opening = self._residents.all(), self._loader.opening
        promised = [need for other, need in self._promised.items() if other != name]
        limit = self._settings.model_memory_mib * MIB

        def look() -> tuple[Need, Free]:
            free = Free.now(gpu_memory(opening)).without(*promised)
            if limit:
                taken = sum(one.runtime.nbytes for one in held)
                free = free.at_most(limit - taken - sum(need.all for need in promised))
            return memory_needed(self._folder_of(name, version), opening), free

        return await self._loader.do(look)

    # ---- who rests ----------------------------------------------------------------------------

    async def _make_room(self, name: str, found: Short) -> bool:
        """Put the model to rest that got no part for longest, if that can help another one."""
        others = self._may_rest(name)
        sizes = [self._residents.get(other).runtime.nbytes for other in others]
        if not others or sum(sizes) < found.missing:
            return False
        other = others[0]
        log.warning("%s is put to rest, to make room for %s", other, name)
        await self._put_to_rest(
            other,
            f"{other} rests, because {name} needed its memory; a part for it brings it back:"
            " send it again in a few seconds.",
        )
        return True

    def _may_rest(self, name: str) -> list[str]:
        """Models that may be put to rest for another one, in the order in which they are."""
        if self._settings.rest == "off":
            return []
        return [
            other
            for other in self._residents.idle_first()
            if other not in (name, *self._settings.pinned_names)
            and self._residents.in_memory_s(other) >= self._settings.rest_s
            and not self._is_changing(other)
        ]

    def _why_none_rests(self, name: str) -> str | None:
        """Why no other model makes room, for the sentence of a refusal."""
        if self._settings.rest == "off":
            return None
        pinned = self._settings.pinned_names
        young = [
            (self._settings.rest_s - self._residents.in_memory_s(other), other)
            for other in self._residents.names()
            if other != name and other not in pinned
        ]
        if not young:
            return "all others are pinned; unload one"
        left, other = min(young)
        if left > 0:
            return f"{other} may be put to rest for it in {math.ceil(left)} s"
        return "putting the others to rest would not be enough; unload one that is pinned"
