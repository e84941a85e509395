"""`Keeper`: which version of each model is in memory, and how a new one gets there.

The worker only publishes versions. The keeper sees them in the store, shows them to the gate and
lets them go live, or holds them for a person. So it does not matter which process or machine made
a version, nor which of them was killed in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import cv2

from app.serving.inspection import Inspector
from app.serving.second_look import SecondLook
from app.serving.stale_plans import Plans
from app.settings import Settings
from engines.errors import (
    BadBundle,
    BadMeta,
    Conflict,
    DiskFull,
    KensaError,
    NotReady,
    OutOfMemory,
    StalePlan,
)
from engines.machine import admission
from engines.machine.memory import Free, Need, Short, give_back
from engines.meta import Meta
from engines.runtimes.compiled_cache import usable_cache
from engines.serving import gate
from engines.serving.gate import Replay, Replayed
from engines.serving.resident import (
    MIB,
    Opening,
    Resident,
    describe,
    gpu_memory,
    memory_needed,
    open_model,
)
from engines.store.bundle import ONNX, read_report
from engines.store.golden import Golden
from engines.store.versions import META, Manifest, Store
from engines.verdict import Verdict, judge

LOOK_EVERY_S = 0.5  # for versions that somebody published
RETRY_AFTER_S = 60.0  # what failed for a reason that may pass, such as a full disk

# What becomes of a version: by itself, or because a person says so.
How = Literal["live", "held", "refused", "failed", "rolled_back", "by_hand"]

log = logging.getLogger("kensa")
Result = TypeVar("Result")


@dataclass
class Trial:
    """The first parts of a version that went live by itself."""

    version: str
    parts: int = 0
    rejects: int = 0


class Keeper:
    """Loads, gates, swaps and rolls back. Its methods belong to the event loop's thread."""

    def __init__(
        self, store: Store, inspector: Inspector, settings: Settings, plans: Plans
    ) -> None:
        self.store = store
        self.plans = plans
        self._inspector = inspector
        self._residents = inspector.residents
        self._settings = settings
        self._opening = Opening(
            settings.precision,
            settings.threads,
            batching=settings.batching == "on",
            runtime=settings.runtime,
            fallback=settings.fallback,
            keep_warm_s=settings.keep_warm_s,
        )
        self._loader = ThreadPoolExecutor(1, "loader", initializer=_behind_the_line)
        self._changing: dict[str, asyncio.Lock] = {}
        self._changes: Counter[str] = Counter()  # those under way, and those that wait
        self._admitting = asyncio.Lock()  # two at a time would count the same memory
        self._promised: dict[str, Need] = {}  # of versions that are being opened
        self._waking: set[str] = set()  # models that rest and are being brought back
        self._leaving: dict[str, asyncio.Task[None]] = {}  # the version that was replaced last
        self._unloaded: set[str] = set()  # models whose live version had to go first
        self._trials: dict[str, Trial] = {}
        self._settled: set[tuple[str, str]] = set()  # published, but not to go live
        self._failed: dict[tuple[str, str], float] = {}  # when, on the monotonic clock
        self._tasks: set[asyncio.Task[None]] = set()
        inspector.on_verdict = self._on_verdict
        self._residents.on_call = self._wake
        self.on_swap: Callable[[str, How], None] = lambda *_: None  # see docs/metrics.md
        self.on_rest: Callable[[str], None] = lambda _: None

    # ---- starting and stopping ----------------------------------------------------------------

    async def open(self) -> None:
        """Take in KENSA_MODEL_DIR, load what is live, and look out for new versions."""
        cache = await self._load(lambda: usable_cache(self._settings.compiled_dir))
        self._opening = replace(self._opening, cache_dir=cache)
        if self._settings.model_dir is not None:
            await self._take_in_model_dir()
        try:
            names = await self._load(self.store.names)
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
        self._begin(self._look_out())
        self._begin(SecondLook(self._inspector, self._load, lambda: not self._promised).run())

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._loader.shutdown, wait=True, cancel_futures=True)

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
            await self._load(take_in)
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
        candidates = await self._load(lambda: self.store.candidates(name))
        try:
            if candidates and self._residents.names():
                with contextlib.suppress(BadMeta, BadBundle):  # `_load_live` puts it aside
                    await self._must_fit(name, candidates[0], exchange=exchange)
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
        pointer = await self._load(lambda: self.store.pointer(name))
        problem = self._residents.problems.get(name)
        for version in await self._load(lambda: self.store.candidates(name)):
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
                    await self._load(partial(self.store.activate, name, version))
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
                waiting = await self._load(self._waiting)
            except OSError as error:
                log.error("The models cannot be looked at: %s", error)
                await asyncio.sleep(RETRY_AFTER_S)
                continue
            for name, manifest in waiting:
                await self._consider(name, manifest)
            await self.plans.look()
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
                if await self._load(lambda: self._is_late(name, version)):
                    found = {"ok": False, "reasons": ["A newer version went live before it."]}
                else:
                    found = await self._through_the_gate(name, manifest)
            if not found["ok"]:
                await self._write(lambda: self.store.record_gate(name, version, found))
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
        images, report = await self._load(lambda: self._replays(name, against, version))
        async with self._opened(name, version, images) as (model, replayed):
            found = gate.weigh(replayed, report, against.version if against else None, limit)
            found["seconds"] = round(time.perf_counter() - began, 2)
            await self._write(lambda: self._keep_pictures(name, version, gate.flipped(replayed)))
            if found["ok"]:
                await self._go_live(model, found)
                if self._settings.rollback_parts:
                    self._trials[name] = Trial(version)
        return found

    def _replays(
        self, name: str, old: Resident | None, version: str
    ) -> tuple[list[Replay], dict[str, Any]]:
        """What to show to both, and the report of the new one."""
        folder = self.store.folder(name, version)
        report = read_report(folder)
        if old is None or Meta.read(folder / META).image_size != old.runtime.image_size:
            return [], report  # nothing to compare with, or no image that both could see
        size = old.runtime.image_size
        goldens = [_golden(one, size) for one in (self.store.folder(name, old.version), folder)]
        return list(gate.replays(goldens, self._inspector.recent(name), size)), report

    async def _ask(self, model: Resident, one: Replay) -> Verdict:
        pixels = one.image[None]
        scores, _ = await self._inspector.in_a_gap(lambda: model.runtime.infer(pixels))
        return judge(float(scores[0]), model.scale)

    def _keep_pictures(self, name: str, version: str, flips: list[Replayed]) -> None:
        """What the parts look like whose verdict changes, for the person who decides."""
        folder = self.store.gate_folder(name, version)
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.jpg"):
            old.unlink()
        for number, one in enumerate(flips):
            _, data = cv2.imencode(".jpg", one.replay.image[..., ::-1])
            (folder / f"{number}.jpg").write_bytes(data.tobytes())

    # ---- one in another's place ---------------------------------------------------------------

    async def activate(self, name: str, version: str) -> None:
        """Make a version live because a person says so, whatever the gate found.

        Raises:
            UnknownModel, UnknownVersion, BadBundle, BadMeta, OutOfMemory, DiskFull.
        """
        async with self._change(name):
            await self._load(lambda: self.store.folder(name, version))
            live = self._live(name)
            if live is not None and live.version == version:
                return
            self._trials.pop(name, None)
            async with self._opened(name, version) as (model, _):
                found = await self._load(lambda: self.store.gate(name, version))
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
        self._trials.pop(name, None)
        back = await self._load(lambda: self.store.pointer_back(name))

        def write() -> None:
            # With a record the gate does not look at it again and let it go live by itself.
            found = self.store.gate(name, back.previous) or {"ok": True, "reasons": []}
            if reason is not None:
                found = {**found, "ok": False, "reasons": [reason], "by_hand": False}
            self.store.record_gate(name, back.previous, found)
            self.store.roll_back(name)

        if reason is not None and self._is_away(name):
            await self._write(write)  # nobody wants it in memory
        else:
            async with self._opened(name, back.live) as (model, _):
                await self._write(write)
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
            await self._load(lambda: self.store.must_know(name))
            if self._live(name) is not None:
                return
            candidates = await self._load(lambda: self.store.candidates(name))
            if not candidates:
                raise Conflict(
                    f"{name} has no live version: POST /models/{name}/versions/VERSION/activate"
                    " makes one live."
                )
            with contextlib.suppress(BadMeta, BadBundle):  # put aside, and the one before judges
                await self._must_fit(name, candidates[0])
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
            await self._load(lambda: self.store.must_know(name))
            model = self._live(name)
            self._residents.put_away(
                name, f"{name} is unloaded: POST /v2/repository/models/{name}/load loads it again."
            )
            if model is not None:
                await asyncio.shield(self._begin(self._let_go(model)))
                self._inspector.forget(name)
                log.info("%s %s is unloaded, because somebody wanted it so", name, model.version)

    async def _go_live(self, model: Resident, found: dict[str, Any]) -> None:
        """On the disk first: after a power cut the version that was named last comes back."""
        name, version = model.name, model.version

        def write() -> None:
            self.store.activate(name, version)
            self.store.record_gate(name, version, found)

        await self._write(write)
        self._put(model)
        self.on_swap(name, "by_hand" if found.get("by_hand") else "live")
        log.info("Live: %s", describe(model))
        try:
            await self._load(lambda: self.store.prune(name, self._settings.keep_versions))
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
            await self._must_fit(name, version)
        beside = old is None or await self._fits(name, version)
        if old is not None:
            before = [await self._ask(old, one) for one in images]
        if not beside:
            await self._unload(name, version)
        model = await self._open(name, version, old if beside else None)
        try:
            after = [await self._ask(model, one) for one in images] if before else []
            three = zip(images, before, after, strict=False)
            yield model, [Replayed(*one) for one in three]
        finally:
            if self._live(name) is not model:
                await self._close(model)

    async def _unload(self, name: str, version: str) -> None:
        """Let the live version go, because another does not fit beside it."""
        old = self._residents.get(name)
        log.warning("%s is unloaded, because %s does not fit beside it", name, version)
        self._unloaded.add(name)
        self._residents.take(name, f"{name} is being exchanged; try again in a few seconds.")
        await self._let_go(old)

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
            self._leaving[model.name] = self._begin(self._let_go(before))

    def _note_plan(self, model: Resident) -> None:
        if model.stale is None:
            self.plans.settle(model.name)
        else:
            self.plans.note(model.name, model.version, model.stale)

    async def _let_go(self, model: Resident) -> None:
        await self._residents.until_unused(model)
        await self._close(model)

    async def _open(self, name: str, version: str, beside: Resident | None) -> Resident:
        """Check and open a version; one that cannot be used is put aside."""
        opening = self._opening

        def work() -> Resident:
            try:
                folder = self.store.check(name, version)
                return open_model(folder, name, version, opening, beside)
            except (BadBundle, BadMeta) as error:
                self.store.refuse(name, version, str(error))
                self.on_swap(name, "refused")
                raise

        began = time.perf_counter()
        try:
            model = await self._load(work)
        except StalePlan as error:
            self.plans.note(name, version, str(error))
            raise
        finally:
            self._promised.pop(name, None)
        log.info("Loaded %s, in %.2f s", describe(model), time.perf_counter() - began)
        return model

    async def _close(self, model: Resident) -> None:
        def close() -> None:
            model.runtime.close()
            give_back()

        # A request that was given up counts no longer, and its image may still be in the engine.
        await self._inspector.batcher.call(lambda: None)
        await self._load(close)
        log.debug("Closed %s %s", model.name, model.version)

    # ---- what fits into memory ----------------------------------------------------------------

    async def _fits(self, name: str, version: str) -> bool:
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

    async def _must_fit(self, name: str, version: str, *, exchange: bool = True) -> None:
        """Raise OutOfMemory where there is no room for a model that is not in memory."""
        found = await self._admit(name, version, exchange=exchange)
        if found is not None:
            what = self._why_none_rests(name) or "unload another model"
            raise OutOfMemory(f"{name} {version} needs {found.needed}, and {found.free}: {what}.")

    async def _admit(self, name: str, version: str, *, exchange: bool = True) -> Short | None:
        """Promise a version its memory, others put to rest for it; or what it is short of.

        Not before the version that was replaced last has given its memory back: however fast
        changes follow, two versions of a model are in memory and never three.
        """
        if name in self._leaving:
            await asyncio.wait([self._leaving.pop(name)])
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
        held = self._residents.all()
        promised = [need for other, need in self._promised.items() if other != name]
        limit = self._settings.model_memory_mib * MIB

        def look() -> tuple[Need, Free]:
            free = Free.now(gpu_memory(self._opening)).without(*promised)
            if limit:
                taken = sum(one.runtime.nbytes for one in held)
                free = free.at_most(limit - taken - sum(need.all for need in promised))
            return memory_needed(self.store.folder(name, version), self._opening), free

        return await self._load(look)

    async def job_short_of(self, request: admission.Request) -> Short | None:
        """What a job would be short of that began now, beside all that is in memory."""
        data, promised = self._settings.data, [*self._promised.values()]

        def look() -> Short | None:
            free = admission.free_for_jobs(gpu_memory(self._opening)).without(*promised)
            return admission.short_of(data, request, free)

        return await self._load(look)

    # ---- models that take turns ---------------------------------------------------------------

    async def _make_room(self, name: str, found: Short) -> bool:
        """Put the model to rest that got no part for longest, if that can help another one."""
        others = self._may_rest(name)
        sizes = [self._residents.get(other).runtime.nbytes for other in others]
        if not others or sum(sizes) < found.missing:
            return False
        other = others[0]
        async with self._change(other):  # at once: nobody has it
            log.warning("%s is put to rest, to make room for %s", other, name)
            model = self._residents.put_to_rest(
                other,
                f"{other} rests, because {name} needed its memory; a part for it brings it back:"
                " send it again in a few seconds.",
            )
            assert model is not None
            self.on_rest(other)
            await asyncio.shield(self._begin(self._let_go(model)))
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
            and not self._changes[other]
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

    def _wake(self, name: str) -> None:
        """A part came for a model that rests: bring it back for those that come later."""
        if name not in self._waking:
            self._waking.add(name)
            self._begin(self._bring_back(name))

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
        trial = self._trials.get(model.name)
        if trial is None or trial.version != model.version:
            return
        trial.parts += 1
        trial.rejects += verdict.is_anomalous
        if trial.parts >= self._settings.rollback_parts:
            del self._trials[model.name]
            low, high = self._settings.rollback_min_rejects, self._settings.rollback_max_rejects
            rate = trial.rejects / trial.parts
            if not low <= rate <= high:
                reason = (
                    f"Of its first {trial.parts} parts {rate:.1%} were rejected;"
                    f" allowed are {low:.1%} to {high:.1%}."
                )
                self._begin(self._roll_back_by_itself(model, reason))

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
        pointer = await self._load(lambda: self.store.pointer(model.name))
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
                    self._promised.pop(name, None)
                    if name in self._unloaded:
                        self._unloaded.discard(name)
                        await self._load_live(name)
        finally:
            self._changes[name] -= 1

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _load(self, work: Callable[[], Result]) -> Result:
        """Do work in the loader's thread, which gives way to the line."""
        return await asyncio.get_running_loop().run_in_executor(self._loader, work)

    async def _write(self, work: Callable[[], Result]) -> Result:
        """The same for writing to the store, where a full disk gets its name."""
        try:
            return await self._load(work)
        except OSError as error:
            raise DiskFull(f"Nothing was changed: {error.strerror}. Free some space.") from error


def _behind_the_line() -> None:
    thread = threading.get_native_id()
    already = os.getpriority(os.PRIO_PROCESS, thread)  # only root may go back to less
    os.setpriority(os.PRIO_PROCESS, thread, max(already, 10))


def _golden(folder: Path, size: int) -> Golden | None:
    try:
        return Golden.read(folder, size)
    except BadBundle:  # of another size: the version before was trained otherwise
        return None
