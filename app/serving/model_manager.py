"""`ModelManager`: which version of each model is in memory; how one comes there, and goes.

Which one it is to be, the store's pointer says, and `Rollout` decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

from app.serving.inspection import Inspector
from app.serving.loader import Loader
from app.serving.memory_ledger import MemoryLedger
from app.serving.stale_plans import StalePlans
from app.settings import Settings
from engines.errors import (
    BadBundle,
    BadMeta,
    Conflict,
    KensaError,
    NotReady,
    OutOfMemory,
    StalePlan,
    Unreadable,
)
from engines.serving.resident import Resident, held_back, in_its_place, nobody_instead
from engines.store.regions import REGIONS
from engines.store.versions import META, Store

# Of a version, as the clause of a sentence.
ENDED_IT = "ended the server while it was opened, so that it is not opened again by itself"

log = logging.getLogger("kensa")


class ModelManager:
    """Loads, exchanges and lets go. Its methods belong to the event loop's thread."""

    def __init__(
        self, store: Store, inspector: Inspector, settings: Settings, stale_plans: StalePlans
    ) -> None:
        self.loader = Loader(store, inspector, settings)
        self.memory = MemoryLedger(
            inspector.residents,
            settings,
            self.loader,
            store.folder,
            is_changing=lambda name: self._changes[name] > 0,
            put_to_rest=self._put_to_rest,
        )
        self.on_refused: Callable[[str], None] = lambda _: None  # a version that cannot be used
        self.on_rest: Callable[[str], None] = lambda _: None
        self.left_out: dict[str, str] = {}  # name -> why KENSA_MODEL_DIR was not taken in
        self._store = store
        self._inspector = inspector
        self._residents = inspector.residents
        self._residents.on_call = self._wake
        self._settings = settings
        self._stale_plans = stale_plans
        self._changing: dict[str, asyncio.Lock] = {}
        self._changes: Counter[str] = Counter()  # those under way, and those that wait
        self._waking: set[str] = set()  # models that rest and are being brought back
        self._unloaded: set[str] = set()  # models whose live version had to go first

    # ---- at the start -------------------------------------------------------------------------

    async def load_all(self) -> None:
        """Bring the live version of every model into memory that fits; pinned ones come first."""
        try:
            names = await self.loader.do(self._store.names)
        except OSError as error:
            names = []
            self._residents.problems["models"] = f"The models cannot be read: {error}."
            log.error("The models cannot be read: %s", error)
        pinned = self._settings.pinned_names
        for name in sorted(pinned.difference(names)):
            log.warning("KENSA_PINNED names %s, and there is no such model", name)
        with self.loader.trying_batches_later():  # parts wait for all of these models
            for name in sorted(names, key=lambda name: (name not in pinned, name)):
                try:
                    async with self.change(name):
                        await self._load_where_it_fits(name, exchange=False)
                except (KensaError, OSError) as error:  # noqa: PERF203 (the others judge)
                    self._not_ready(name, f"{name} cannot be read: {str(error).rstrip('.')}.")

    async def _load_where_it_fits(self, name: str, *, exchange: bool = True) -> None:
        """Bring the live version into memory beside the others; alone it is always tried.

        Args:
            exchange: whether others may be put to rest for it.
        """
        candidates = await self.loader.do(lambda: self._store.candidates(name))
        try:
            if candidates and self._residents.names():
                with contextlib.suppress(BadMeta, BadBundle):  # `_load_live` puts it aside
                    await self.memory.must_fit(name, candidates[0], exchange=exchange)
        except OutOfMemory as error:
            refused = f"{name} rests: "
            told = (self._residents.why_not(name) or "").startswith(refused)
            if self._settings.rest == "on":
                self._residents.put_to_rest(name, f"{refused}{error}")
            else:
                self._residents.take(name, str(error))
            log.log(  # a line for each part would wear out flash memory
                logging.DEBUG if told else logging.WARNING, "%s is not in memory: %s", name, error
            )
            return
        await self._load_live(name)

    async def _load_live(self, name: str, *, by_hand: bool = False) -> None:
        """Bring the live version into memory; where it cannot be used, one that was live before.

        That one stands in: the pointer stays, so that it is known, also after a restart, which
        version should serve. A version that is activated, or goes live through the gate, ends it.

        Args:
            by_hand: whether a person wants it, also where opening it ended the server before.
        """
        candidates, should, why = await self.loader.do(lambda: self._store.to_serve(name))
        left_out, tried = self.left_out.get(name), dict[str, str]()
        for version in candidates:
            if not by_hand and await self.loader.do(partial(self._did_not_end, name, version)):
                tried[version] = ENDED_IT
                continue
            try:
                model = await self._open(name, version, None)
            except (StalePlan, OutOfMemory) as error:  # the one before would be another model
                self._not_ready(name, str(error))
                return
            except (KensaError, OSError) as error:
                tried[version] = f"cannot be used: {str(error).rstrip('.')}"
                continue
            except Exception:
                log.exception("%s %s cannot be opened", name, version)
                tried[version] = "cannot be opened, for a reason that the log shows"
                continue
            why = tried.get(should or "", why)
            if version == should and left_out is None:
                self._residents.put(model)
            else:
                self._stand_in(model, should, why, left_out)
            self._note_plan(model)
            return
        why = tried.pop(should or "", why)
        if why is not None:
            sentence = nobody_instead(name, should, why, tried)
            self._not_ready(name, " ".join(filter(None, (left_out, sentence))))
        await self.note_held(name)

    async def note_held(self, name: str) -> None:
        """Say of a model that never judged why it does not."""
        if held := await self.loader.do(lambda: self._store.held(name)):
            self._residents.held[name] = held_back(name, *held)

    def _did_not_end(self, name: str, version: str) -> bool:
        return self._store.did_not_end(name, version)

    def _stand_in(
        self, model: Resident, should: str | None, why: str | None, left_out: str | None
    ) -> None:
        sentence = in_its_place(model.name, model.version, should, why) if why else ""
        sentence = " ".join(filter(None, (left_out, sentence)))
        if why is None:
            sentence += f" {model.name} is served from {model.version}, as before."
        self._residents.stand_in(model, sentence)
        log.warning("%s", sentence)

    def _not_ready(self, name: str, problem: str) -> None:
        self._residents.take(name, problem)
        log.error("Not ready: %s", problem)

    # ---- because a person says so -------------------------------------------------------------

    async def load(self, name: str) -> None:
        """Bring the live version of a model into memory, if it is not there.

        Raises:
            UnknownModel: there is no such model.
            Conflict: none of its versions was ever live.
            OutOfMemory: there is no room for it.
            NotReady: no version of it that was live can be used.
        """
        async with self.change(name):
            await self.loader.do(lambda: self._store.must_know(name))
            if self.live(name) is not None:
                return
            candidates = await self.loader.do(lambda: self._store.candidates(name))
            if not candidates:
                raise Conflict(
                    f"{name} has no live version: POST /models/{name}/versions/VERSION/activate"
                    " makes one live."
                )
            with contextlib.suppress(BadMeta, BadBundle):  # put aside, and the one before judges
                await self.memory.must_fit(name, candidates[0])
            await self._load_live(name, by_hand=True)
            if self.live(name) is None:
                raise NotReady(self._residents.problems[name])

    async def unload(self, name: str) -> None:
        """Answer no more requests for a model, and give its memory back when the last one ended.

        It stays so until a person loads it, activates a version or goes back to one, or the server
        is started again. Versions that are published wait.

        Raises:
            UnknownModel: there is no such model.
        """
        async with self.change(name):
            await self.loader.do(lambda: self._store.must_know(name))
            model = self.live(name)
            self._residents.put_away(
                name, f"{name} is unloaded: POST /v2/repository/models/{name}/load loads it again."
            )
            if model is not None:
                await asyncio.shield(self.loader.begin(self.loader.let_go(model)))
                self._inspector.forget(name)
                log.info("%s %s is unloaded, because somebody wanted it so", name, model.version)

    # ---- one in another's place ---------------------------------------------------------------

    @asynccontextmanager
    async def change(self, name: str) -> AsyncIterator[None]:
        """One change of a model at a time. One that failed after unloading is made good."""
        self._changes[name] += 1
        try:
            async with self._changing.setdefault(name, asyncio.Lock()):
                try:
                    yield
                finally:
                    self.memory.settle(name)
                    if name in self._unloaded:
                        self._unloaded.discard(name)
                        await self._load_live(name)
        finally:
            self._changes[name] -= 1

    def is_away(self, name: str) -> bool:
        """Whether a model is not in memory because a person, or another model, wants it so."""
        return name in self._residents.unloaded or name in self._residents.resting

    def live(self, name: str) -> Resident | None:
        """The version in memory; None where there is none."""
        return self._residents.get(name) if name in self._residents.names() else None

    def put(self, model: Resident) -> None:
        """Let a version answer from now on; the one that did is closed when nobody uses it."""
        self._unloaded.discard(model.name)
        self.left_out.pop(model.name, None)
        before = self._residents.put(model)
        self._note_plan(model)
        if before is not None and before is not model:
            self.loader.let_go_soon(before)

    def _note_plan(self, model: Resident) -> None:
        if model.stale is None:
            self._stale_plans.settle(model.name)
        else:
            self._stale_plans.note(model.name, model.version, model.stale)

    @asynccontextmanager
    async def opened(
        self,
        name: str,
        version: str,
        first: Callable[[Resident], Awaitable[None]] | None = None,
        *,
        exchange: bool = True,
    ) -> AsyncIterator[Resident]:
        """A version beside the live one.

        Unless it has taken the live one's place when the block ends, it is closed.

        Args:
            first: what is done with the live version before it may have to go.
            exchange: whether the live version or other models may have to go for it.

        Raises:
            BadBundle, BadMeta: it cannot be used, and is put aside.
            OutOfMemory: it does not fit, and the live one may not go first.
        """
        old = self.live(name)
        beside = old is not None and await self._takes_nothing(old, version)
        if not (exchange or beside):
            await self.memory.must_fit(name, version, exchange=False)
            beside = True
        elif self.is_away(name) or (old is None and self._residents.names()):
            await self.memory.must_fit(name, version)
        beside = beside or old is None
        beside = beside or await self.memory.fits(name, version)
        if old is not None and first is not None:
            await first(old)
        if not beside:
            await self._unload(name, version)
        model = await self._open(name, version, old if beside else None)
        try:
            yield model
        finally:
            if self.live(name) is not model:
                await self.loader.shut(model)

    async def _takes_nothing(self, old: Resident, version: str) -> bool:
        """Whether a version has the files of one in memory, but for its meta.json; or the regions,
        where there is no bank, which would be loaded for them once more.
        """
        small = {META} if old.meta.memory_bank else {META, REGIONS}

        def look() -> bool:
            with contextlib.suppress(KensaError):  # damaged, or gone since it was loaded
                return self._store.differences(old.name, old.version, version) <= small
            return False

        return await self.loader.do(look)

    async def _open(self, name: str, version: str, beside: Resident | None) -> Resident:
        """Open a version; one that cannot be used is put aside."""
        try:
            await self.memory.must_be_possible(name, version)
            return await self.loader.open(name, version, beside)
        except (BadBundle, BadMeta) as error:
            if not isinstance(error, Unreadable):
                self.on_refused(name)
            raise
        except StalePlan as error:
            self._stale_plans.note(name, version, str(error))
            raise
        finally:
            self.memory.settle(name)

    async def _unload(self, name: str, version: str) -> None:
        """Let the live version go, because another does not fit beside it."""
        old = self._residents.get(name)
        log.warning("%s is unloaded, because %s does not fit beside it", name, version)
        self._unloaded.add(name)
        self._residents.take(name, f"{name} is being exchanged; try again in a few seconds.")
        await self.loader.let_go(old)

    # ---- models that take turns ---------------------------------------------------------------

    async def _put_to_rest(self, name: str, reason: str) -> None:
        """Take a model out of memory, because another one needs it."""
        async with self.change(name):  # at once: nobody has it
            model = self._residents.put_to_rest(name, reason)
            assert model is not None
            self.on_rest(name)
            await asyncio.shield(self.loader.begin(self.loader.let_go(model)))

    def _wake(self, name: str) -> None:
        """A part came for a model that rests: bring it back for those that come later."""
        if name not in self._waking:
            self._waking.add(name)
            self.loader.begin(self._bring_back(name))

    async def _bring_back(self, name: str) -> None:
        try:
            async with self.change(name):
                if name in self._residents.resting:
                    await self._load_where_it_fits(name)
        except (KensaError, OSError) as error:
            log.error("%s cannot be brought back: %s", name, error)
        finally:
            self._waking.discard(name)
