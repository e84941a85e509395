"""`Rollout`: which version of each model serves: a new one comes, is gated, goes live, goes back.

The worker only publishes versions. The rollout sees them in the store, shows them to the gate and
lets them go live, or holds them for a person. So it does not matter which process or machine made
a version, nor which of them was killed in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Literal

from app.serving.batch_retrial import BatchRetrial
from app.serving.gate_replay import GateReplay
from app.serving.inspection import Inspector
from app.serving.loader import Loader
from app.serving.memory_ledger import MemoryLedger
from app.serving.probation import Probation
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
)
from engines.serving import gate
from engines.serving.gate import Replay, Replayed
from engines.serving.resident import Resident, describe
from engines.store.bundle import ONNX
from engines.store.versions import META, Manifest, Store
from engines.verdict import Verdict

LOOK_EVERY_S = 0.5  # for versions that somebody published
RETRY_AFTER_S = 60.0  # what failed for a reason that may pass, such as a full disk

# What becomes of a version: by itself, or because a person says so.
How = Literal["live", "held", "refused", "failed", "rolled_back", "by_hand"]

log = logging.getLogger("kensa")


class Rollout:
    """Loads, gates, swaps and rolls back. Its methods belong to the event loop's thread."""

    def __init__(
        self, store: Store, inspector: Inspector, settings: Settings, stale_plans: StalePlans
    ) -> None:
        self.store = store
        self._inspector = inspector
        self._residents = inspector.residents
        self._settings = settings
        self._stale_plans = stale_plans
        self._loader = Loader(store, inspector, settings)
        self.memory = MemoryLedger(
            inspector.residents,
            settings,
            self._loader,
            store.folder,
            is_changing=lambda name: self._changes[name] > 0,
            put_to_rest=self._put_to_rest,
        )
        self._replay = GateReplay(store, inspector)
        self._probation = Probation(settings)
        self._changing: dict[str, asyncio.Lock] = {}
        self._changes: Counter[str] = Counter()  # those under way, and those that wait
        self._waking: set[str] = set()  # models that rest and are being brought back
        self._unloaded: set[str] = set()  # models whose live version had to go first
        self._settled: set[tuple[str, str]] = set()  # published, but not to go live
        self._failed: dict[tuple[str, str], float] = {}  # when, on the monotonic clock
        inspector.on_verdict = self._on_verdict
        self._residents.on_call = self._wake
        self.on_swap: Callable[[str, How], None] = lambda *_: None  # see docs/metrics.md
        self.on_rest: Callable[[str], None] = lambda _: None

    # ---- starting and stopping ----------------------------------------------------------------

    async def open(self) -> None:
        """Take in KENSA_MODEL_DIR, load what is live, and look out for new versions."""
        await self._loader.start()
        if self._settings.model_dir is not None:
            await self._take_in_model_dir()
        try:
            names = await self._loader.do(self.store.names)
        except OSError as error:
            names = []
            self._residents.problems["models"] = f"The models cannot be read: {error}."
            log.error("The models cannot be read: %s", error)
        pinned = self._settings.pinned_names
        for name in sorted(pinned.difference(names)):
            log.warning("KENSA_PINNED names %s, and there is no such model", name)
        for name in sorted(names, key=lambda name: (name not in pinned, name)):
            async with self._change(name):
                await self._load_where_it_fits(name, exchange=False)
        self._loader.begin(self._look_out())
        retrial = BatchRetrial(self._inspector, self._loader.do, self.memory.owes_nothing)
        self._loader.begin(retrial.run())

    async def close(self) -> None:
        """Give up what is under way."""
        await self._loader.close()

    async def _take_in_model_dir(self) -> None:
        """Publish the folder, and make it live unless these very files were there before."""
        name, source = self._settings.served_name, self._settings.model_dir
        assert source is not None

        def take_in() -> None:
            known = self.store.versions(name)
            if not (source / ONNX).is_file() and (source / META).is_file():
                raise BadBundle(f"{source / ONNX} does not exist: make it with convtrt.py.")
            # Whoever sets the variable has the machine, so its plan is one of its own.
            version = self.store.take_in(name, source, {"folder": str(source)}, plan=True)
            if version not in known or not self.store.candidates(name):
                self.store.activate(name, version)

        problem = None
        try:
            await self._loader.do(take_in)
        except KensaError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{source} cannot be taken in: {error.strerror}."
        if problem is not None:
            self._residents.problems[name] = problem
            log.error("%s is not taken in: %s", source, problem)

    async def _load_where_it_fits(self, name: str, *, exchange: bool = True) -> None:
        """Bring the live version into memory beside the others; alone it is always tried.

        Args:
            exchange: whether others may be put to rest for it.
        """
        candidates = await self._loader.do(lambda: self.store.candidates(name))
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

    async def _load_live(self, name: str) -> None:
        """Bring the live version into memory; the one before where it cannot be used."""
        pointer = await self._loader.do(lambda: self.store.pointer(name))
        problem = self._residents.problems.get(name)
        for version in await self._loader.do(lambda: self.store.candidates(name)):
            try:
                model = await self._open(name, version, None)
            except (StalePlan, OutOfMemory) as error:  # the one before would be another model
                problem = str(error)
                break
            except (KensaError, OSError) as error:
                problem = f"{name} {version} cannot be used: {error}"
                continue
            except Exception:
                log.exception("%s %s cannot be opened", name, version)
                problem = f"{name} {version} cannot be opened, for a reason that the log shows."
                continue
            self._residents.put(model)
            self._note_plan(model)
            if pointer is None or version != pointer.live:
                log.warning("%s is served from %s", name, version)
                try:
                    await self._loader.do(partial(self.store.activate, name, version))
                except OSError as error:
                    log.error("That cannot be written down: %s", error.strerror)
            return
        if problem is None and pointer is not None:
            problem = f"{name} has no version {pointer.live}, and none before it."
        if problem is not None:
            self._residents.take(name, problem)
            log.error("Not ready: %s", problem)

    # ---- new versions -------------------------------------------------------------------------

    async def _look_out(self) -> None:
        """For ever: show the gate what was published to go live."""
        while True:
            try:
                waiting = await self._loader.do(self._waiting)
            except OSError as error:
                log.error("The models cannot be looked at: %s", error)
                await asyncio.sleep(RETRY_AFTER_S)
                continue
            for name, manifest in waiting:
                await self._consider(name, manifest)
            await self._stale_plans.look()
            await asyncio.sleep(LOOK_EVERY_S)

    def _waiting(self) -> list[tuple[str, Manifest]]:
        """Published to go live, and not seen by the gate; oldest first."""
        found = []
        for name in self.store.names():
            if self._is_away(name):  # it waits until the model is loaded again
                continue
            pointer = self.store.pointer(name)
            for version in self.store.versions(name):
                key = (name, version)
                failed = self._failed.get(key, -RETRY_AFTER_S)
                if key in self._settled or time.monotonic() - failed < RETRY_AFTER_S:
                    continue
                if pointer is not None and version == pointer.live:
                    continue
                if self.store.gate(name, version) is not None:
                    self._settled.add(key)
                    continue
                try:
                    manifest = self.store.manifest(name, version)
                except BadBundle as error:
                    self.store.refuse(name, version, str(error))
                    self.on_swap(name, "refused")
                    continue
                if manifest.origin.get("activate") is True:
                    found.append((name, manifest))
                else:
                    self._settled.add(key)
        return found

    async def _consider(self, name: str, manifest: Manifest) -> None:
        """Show a version to the gate; what passes goes live. Whatever happens, others follow."""
        version = manifest.version
        try:
            async with self._change(name):
                if self._is_away(name):  # since it was found
                    return
                found: dict[str, Any]
                if await self._loader.do(lambda: self._is_late(name, version)):
                    found = {"ok": False, "reasons": ["A newer version went live before it."]}
                else:
                    found = await self._through_the_gate(name, manifest)
            if not found["ok"]:
                await self._loader.write(lambda: self.store.record_gate(name, version, found))
                self.on_swap(name, "held")
                log.warning("%s %s is held: %s", name, version, " ".join(found["reasons"]))
        except (BadBundle, BadMeta) as error:
            log.error("%s %s is refused: %s", name, version, error)
        except (KensaError, OSError) as error:
            self._failed[name, version] = time.monotonic()
            self.on_swap(name, "failed")
            log.error("%s %s does not go live: %s", name, version, error)
        except Exception:
            self._failed[name, version] = time.monotonic()
            self.on_swap(name, "failed")
            log.exception("%s %s does not go live", name, version)

    def _is_late(self, name: str, version: str) -> bool:
        pointer, known = self.store.pointer(name), self.store.versions(name)
        return pointer is not None and pointer.live in known[known.index(version) + 1 :]

    async def _through_the_gate(self, name: str, manifest: Manifest) -> dict[str, Any]:
        """Replay images through the live version and this one; make it live where it may."""
        began, version = time.perf_counter(), manifest.version
        limit = manifest.origin.get("max_flips")
        limit = self._settings.gate_flips if limit is None else float(limit)
        against = self._live(name)
        images, report = await self._loader.do(lambda: self._replay.find(name, against, version))
        async with self._opened(name, version, images) as (model, replayed):
            found = gate.weigh(replayed, report, against.version if against else None, limit)
            found["seconds"] = round(time.perf_counter() - began, 2)
            await self._loader.write(lambda: self._replay.keep_pictures(name, version, replayed))
            if found["ok"]:
                await self._go_live(model, found)
                self._probation.begin(name, version)
        return found

    # ---- one in another's place ---------------------------------------------------------------

    async def activate(self, name: str, version: str) -> None:
        """Make a version live because a person says so, whatever the gate found.

        Raises:
            UnknownModel, UnknownVersion, BadBundle, BadMeta, OutOfMemory, DiskFull.
        """
        async with self._change(name):
            await self._loader.do(lambda: self.store.folder(name, version))
            live = self._live(name)
            if live is not None and live.version == version:
                return
            self._probation.end(name)
            async with self._opened(name, version) as (model, _):
                found = await self._loader.do(lambda: self.store.gate(name, version))
                found = found or {"ok": True, "reasons": []}
                await self._go_live(model, {**found, "by_hand": True})

    async def roll_back(self, name: str) -> None:
        """Let the version before the live one take over, at once.

        Raises:
            UnknownModel, Conflict, BadBundle, BadMeta, OutOfMemory, DiskFull.
        """
        async with self._change(name):
            await self._roll_back(name, None)

    async def _roll_back(self, name: str, reason: str | None) -> None:
        self._probation.end(name)
        back = await self._loader.do(lambda: self.store.pointer_back(name))

        def write() -> None:
            # With a record the gate does not look at it again and let it go live by itself.
            found = self.store.gate(name, back.previous) or {"ok": True, "reasons": []}
            if reason is not None:
                found = {**found, "ok": False, "reasons": [reason], "by_hand": False}
            self.store.record_gate(name, back.previous, found)
            self.store.roll_back(name)

        if reason is not None and self._is_away(name):
            await self._loader.write(write)  # nobody wants it in memory
        else:
            async with self._opened(name, back.live) as (model, _):
                await self._loader.write(write)
                self._put(model)
        self.on_swap(name, "by_hand" if reason is None else "rolled_back")
        log.warning("%s is rolled back to %s%s", name, back.live, f": {reason}" if reason else "")

    def answering(self, name: str) -> str | None:
        """The version that answers, or that would if it were not away for a reason. In any thread.

        A new one is written down first: until it is in memory, too, it is not live.
        """
        if (version := self._residents.version(name)) is not None:
            return version
        pointer = self.store.pointer(name) if self._residents.why_not(name) else None
        return pointer.live if pointer else None

    async def load(self, name: str) -> None:
        """Bring the live version of a model into memory, if it is not there.

        Raises:
            UnknownModel: there is no such model.
            Conflict: none of its versions was ever live.
            OutOfMemory: there is no room for it.
            NotReady: no version of it that was live can be used.
        """
        async with self._change(name):
            await self._loader.do(lambda: self.store.must_know(name))
            if self._live(name) is not None:
                return
            candidates = await self._loader.do(lambda: self.store.candidates(name))
            if not candidates:
                raise Conflict(
                    f"{name} has no live version: POST /models/{name}/versions/VERSION/activate"
                    " makes one live."
                )
            with contextlib.suppress(BadMeta, BadBundle):  # put aside, and the one before judges
                await self.memory.must_fit(name, candidates[0])
            await self._load_live(name)
            if self._live(name) is None:
                raise NotReady(self._residents.problems[name])

    async def unload(self, name: str) -> None:
        """Answer no more requests for a model, and give its memory back when the last one ended.

        It stays so until a person loads it, activates a version or goes back to one, or the server
        is started again. Versions that are published wait.

        Raises:
            UnknownModel: there is no such model.
        """
        async with self._change(name):
            await self._loader.do(lambda: self.store.must_know(name))
            model = self._live(name)
            self._residents.put_away(
                name, f"{name} is unloaded: POST /v2/repository/models/{name}/load loads it again."
            )
            if model is not None:
                await asyncio.shield(self._loader.begin(self._loader.let_go(model)))
                self._inspector.forget(name)
                log.info("%s %s is unloaded, because somebody wanted it so", name, model.version)

    async def _go_live(self, model: Resident, found: dict[str, Any]) -> None:
        """On the disk first: after a power cut the version that was named last comes back."""
        name, version = model.name, model.version

        def write() -> None:
            self.store.activate(name, version)
            self.store.record_gate(name, version, found)

        await self._loader.write(write)
        self._put(model)
        self.on_swap(name, "by_hand" if found.get("by_hand") else "live")
        log.info("Live: %s", describe(model))
        try:
            await self._loader.do(lambda: self.store.prune(name, self._settings.keep_versions))
        except OSError as error:
            log.warning("Old versions of %s cannot be deleted: %s", name, error)

    @asynccontextmanager
    async def _opened(
        self, name: str, version: str, images: Sequence[Replay] = ()
    ) -> AsyncIterator[tuple[Resident, list[Replayed]]]:
        """A version beside the live one, and what both say of images.

        Unless it has taken the live one's place when the block ends, it is closed.

        Raises:
            BadBundle, BadMeta: it cannot be used, and is put aside.
            OutOfMemory: it does not fit, and the live one may not go first.
        """
        old = self._live(name)
        before: list[Verdict] = []
        if self._is_away(name) or (old is None and self._residents.names()):
            await self.memory.must_fit(name, version)
        beside = old is None or await self.memory.fits(name, version)
        if old is not None:
            before = [await self._replay.ask(old, one) for one in images]
        if not beside:
            await self._unload(name, version)
        model = await self._open(name, version, old if beside else None)
        try:
            after = [await self._replay.ask(model, one) for one in images] if before else []
            three = zip(images, before, after, strict=False)
            yield model, [Replayed(*one) for one in three]
        finally:
            if self._live(name) is not model:
                await self._loader.shut(model)

    async def _open(self, name: str, version: str, beside: Resident | None) -> Resident:
        """Open a version; one that cannot be used is put aside."""
        try:
            return await self._loader.open(name, version, beside)
        except (BadBundle, BadMeta):
            self.on_swap(name, "refused")
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
        await self._loader.let_go(old)

    def _is_away(self, name: str) -> bool:
        """Whether a model is not in memory because a person, or another model, wants it so."""
        return name in self._residents.unloaded or name in self._residents.resting

    def _live(self, name: str) -> Resident | None:
        return self._residents.get(name) if name in self._residents.names() else None

    def _put(self, model: Resident) -> None:
        self._unloaded.discard(model.name)
        before = self._residents.put(model)
        self._note_plan(model)
        if before is not None and before is not model:
            self._loader.let_go_soon(before)

    def _note_plan(self, model: Resident) -> None:
        if model.stale is None:
            self._stale_plans.settle(model.name)
        else:
            self._stale_plans.note(model.name, model.version, model.stale)

    # ---- models that take turns ---------------------------------------------------------------

    async def _put_to_rest(self, name: str, reason: str) -> None:
        """Take a model out of memory, because another one needs it."""
        async with self._change(name):  # at once: nobody has it
            model = self._residents.put_to_rest(name, reason)
            assert model is not None
            self.on_rest(name)
            await asyncio.shield(self._loader.begin(self._loader.let_go(model)))

    def _wake(self, name: str) -> None:
        """A part came for a model that rests: bring it back for those that come later."""
        if name not in self._waking:
            self._waking.add(name)
            self._loader.begin(self._bring_back(name))

    async def _bring_back(self, name: str) -> None:
        try:
            async with self._change(name):
                if name in self._residents.resting:
                    await self._load_where_it_fits(name)
        except (KensaError, OSError) as error:
            log.error("%s cannot be brought back: %s", name, error)
        finally:
            self._waking.discard(name)

    # ---- the first parts of a new version -----------------------------------------------------

    def _on_verdict(self, model: Resident, verdict: Verdict) -> None:
        if reason := self._probation.count(model, verdict):
            self._loader.begin(self._roll_back_by_itself(model, reason))

    async def _roll_back_by_itself(self, model: Resident, reason: str) -> None:
        try:
            async with self._change(model.name):
                if await self._is_named_live(model):  # not replaced in the meantime
                    await self._roll_back(model.name, reason)
        except (KensaError, OSError) as error:
            log.error("%s should be rolled back (%s), but cannot be: %s", model.name, reason, error)

    async def _is_named_live(self, model: Resident) -> bool:
        """Whether it is the live one; perhaps it was unloaded with its last part."""
        if not self._is_away(model.name):
            return self._live(model.name) is model
        pointer = await self._loader.do(lambda: self.store.pointer(model.name))
        return pointer is not None and pointer.live == model.version

    # ---- how work is done ---------------------------------------------------------------------

    @asynccontextmanager
    async def _change(self, name: str) -> AsyncIterator[None]:
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
