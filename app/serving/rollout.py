"""`Rollout`: which version of each model serves: a new one comes, is gated, goes live, goes back.

The worker only publishes versions. The rollout sees them in the store, shows them to the gate and
lets them go live, or holds them for a person. So it does not matter which process or machine made
a version, nor which of them was killed in between.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from app.background import Background
from app.serving.batch_retrial import BatchRetrial
from app.serving.gate_replay import GateReplay
from app.serving.inspection import Inspector
from app.serving.model_manager import ENDED_IT, ModelManager
from app.serving.probation import Probation
from app.serving.stale_plans import StalePlans
from app.settings import Settings
from engines import promise
from engines.errors import (
    BadBundle,
    BadMeta,
    Conflict,
    KensaError,
    UnknownModel,
    UnknownVersion,
    Unreadable,
)
from engines.files import name_of_folder, printable
from engines.limits import asked_for
from engines.meta import Meta
from engines.regions import Regions
from engines.serving import gate
from engines.serving.gate import Record, Replayed
from engines.serving.resident import Resident, describe
from engines.store.bundle import ONNX
from engines.store.regions import learned_sizes, must_fit
from engines.store.versions import META, Manifest, Store
from engines.verdict import Verdict

LOOK_EVERY_S = 0.5  # for versions that somebody published
RETRY_AFTER_S = 60.0  # what failed for a reason that may pass, such as a full disk

# What becomes of a version: by itself, or because a person says so.
How = Literal["live", "held", "refused", "failed", "rolled_back", "by_hand"]
# What became of which version of a model, why, and what else is to be known.
OnChange = Callable[[str, str, str, str, dict[str, Any]], None]
DoubtsOf = Callable[[Resident], Awaitable[list[str]]]

log = logging.getLogger("kensa")


class Rollout:
    """Loads, gates, swaps and rolls back. Its methods belong to the event loop's thread."""

    def __init__(
        self,
        store: Store,
        models: ModelManager,
        inspector: Inspector,
        settings: Settings,
        stale_plans: StalePlans,
        background: Background,
    ) -> None:
        self.on_swap: Callable[[str, How], None] = lambda *_: None  # see docs/metrics.md
        self.on_change: OnChange = lambda *_: None
        self.doubts_of: DoubtsOf = _none  # what its challenge says of a version
        self._store = store
        self._models = models
        self._loader = models.loader
        self._inspector = inspector
        self._residents = inspector.residents
        self._settings = settings
        self._stale_plans = stale_plans
        self._background = background
        self._urgent: Counter[str] = Counter()  # changes that no gate may keep waiting
        self._replaying: dict[str, asyncio.Task[Any]] = {}  # gates that may be given up
        self._unread: dict[str, str] = {}  # models that cannot be looked at, and why
        self._pruned: dict[str, list[str]] = {}  # the versions that were left
        self.replay = GateReplay(store, inspector)
        self._probation = Probation(settings)
        self._settled: set[tuple[str, str]] = set()  # published, but not to go live
        self._going_live: set[tuple[str, str]] = set()  # being written down
        self._failed: dict[tuple[str, str], float] = {}  # when, on the monotonic clock
        inspector.on_verdict = self._on_verdict
        models.on_refused = lambda name: self.on_swap(name, "refused")

    # ---- starting and stopping ----------------------------------------------------------------

    async def open(self) -> None:
        """Take in KENSA_MODEL_DIR, load what is live, and look out for new versions."""
        await self._loader.start()
        if self._settings.model_dir is not None:
            await self._take_in_model_dir()
        await self._models.load_all()
        keep, begin = self._background.keep, self._loader.begin
        begin(keep("looks for new versions", self._look_out))
        retrial = BatchRetrial(self._inspector, self._loader.do, self._models.memory.owes_nothing)
        begin(keep("tries batches again", retrial.run))

    async def close(self) -> None:
        """Give up what is under way."""
        await self._loader.close()

    async def _take_in_model_dir(self) -> None:
        """Publish the folder, and make it live unless these very files were taken in last time."""
        source = self._settings.model_dir
        assert source is not None
        name = self._settings.served_name

        def take_in() -> None:
            nonlocal name
            name = self._name_of(source)
            before = self._keeps_apart(name, source)
            if not (source / ONNX).is_file() and (source / META).is_file():
                raise BadBundle(f"{source / ONNX} does not exist: make it with convtrt.py.")
            # Whoever sets the variable has the machine, so its plan is one of its own.
            known, live = self._store.versions(name), self._store.pointer(name)
            origin = {"folder": str(source.absolute())}
            version = self._store.take_in(name, source, origin, plan=True)
            if self._store.is_news(name, version, is_there=version in known):
                self._store.activate(name, version)
                if live is not None and live.live != version:
                    log.warning("%s", _another_judges(name, version, source, before))
            elif live is not None and live.live != version:
                log.warning(
                    "%s %s judges, as before, and not %s, which KENSA_MODEL_DIR names: its files"
                    " have not changed since. POST /models/%s/versions/%s/activate lets it judge.",
                    *(name, live.live, version, name, version),
                )
            self._store.note_folder(name, version)

        problem = None
        try:
            await self._loader.do(take_in)
        except KensaError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{source} cannot be taken in: {error.strerror}."
        if problem is not None:
            problem = printable(problem)  # it names the folder, and goes into answers
            self._residents.problems[name] = self._models.left_out[name] = problem
            log.error("%s is not taken in: %s", source, problem)

    def _name_of(self, source: Path) -> str:
        """What the folder's model is called; as an older Kensa called it, where that had no name
        for letters other than those of ASCII.
        """
        name, old = self._settings.served_name, "default"
        ours = {printable(str(path)) for path in (source, source.absolute())}
        was_it = ours & {*self._store.folders(old).values()}
        is_new = self._settings.model_name is None and name not in self._store.names()
        return old if is_new and was_it else name

    def _keeps_apart(self, name: str, source: Path) -> str | None:
        """The folder from which the model was taken in at the start before, if known.

        Raises:
            BadBundle: it is the folder of another model, of whose name the same was made.
        """
        now = printable(source.absolute().name)
        for folder in self._store.folders(name).values():
            other = Path(folder)
            if self._settings.model_name is not None or other.name == now:
                continue
            if name_of_folder(other) == name:
                raise BadBundle(
                    f"The model {name} was made of {other}, whose name makes the same name: set"
                    " KENSA_MODEL_NAME."
                )
        return self._store.last_folder(name)

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
            for name, manifest in waiting:  # each in a task of its own, which may be given up
                await asyncio.wait([self._loader.begin(self._consider(name, manifest))])
            await self._prune()
            await self._stale_plans.look()
            await asyncio.sleep(LOOK_EVERY_S)

    def _waiting(self) -> list[tuple[str, Manifest]]:
        """Published to go live, and not seen by the gate; oldest first.

        Nothing that is wrong with one model keeps the others waiting.
        """
        found = []
        for name in self._store.names():
            if self._models.is_away(name):  # it waits until the model is loaded again
                continue
            try:
                found += [(name, manifest) for manifest in self._waiting_of(name)]
                self._unread.pop(name, None)
            except (KensaError, OSError) as error:
                if self._unread.get(name) != str(error):  # not twice a second
                    log.error("%s cannot be looked at: %s", name, error)
                self._unread[name] = str(error)
        return found

    def _waiting_of(self, name: str) -> list[Manifest]:
        found, pointer = [], self._store.pointer(name)
        for version in self._store.versions(name):
            key = (name, version)
            failed = self._failed.get(key, -RETRY_AFTER_S)
            if key in self._settled or time.monotonic() - failed < RETRY_AFTER_S:
                continue
            if pointer is not None and version == pointer.live:
                continue
            if self._store.gate(name, version) is not None:
                self._settled.add(key)
                continue
            try:
                manifest = self._store.manifest(name, version)
            except UnknownVersion:  # somebody deleted it just now
                continue
            except Unreadable:  # nothing is known against it
                raise
            except BadBundle as error:
                self._refuse(name, version, str(error))
                continue
            if manifest.origin.get("activate") is True:
                found.append(manifest)
            else:
                self._settled.add(key)
        return found

    def _refuse(self, name: str, version: str, reason: str) -> None:
        try:
            self._store.refuse(name, version, reason)
            self.on_swap(name, "refused")
        except OSError as error:  # such as a full disk: it is not used all the same
            self._settled.add((name, version))
            log.error("%s %s cannot be put aside (%s): %s", name, version, error.strerror, reason)

    async def _prune(self) -> None:
        """Delete old versions also where none went live: those that were held, or only kept."""

        def changed() -> list[str]:
            names = {*self._store.names()} - {*self._unread}
            here = [name for name in names if not self._models.is_away(name)]
            return [one for one in here if self._store.versions(one) != self._pruned.get(one)]

        for name in await self._loader.do(changed):
            async with self._models.change(name):
                await self._prune_one(name)

    async def _prune_one(self, name: str) -> None:
        """Delete old versions of a model, unless one of them still waits for the gate.

        To be called while nobody else changes it.
        """

        def prune() -> None:
            if self._models.is_away(name) or self._waiting_of(name):
                return
            self._pruned[name] = self._store.versions(name)  # one that fails is not tried for ever
            self._store.prune(name, self._settings.keep_versions)
            self._pruned[name] = self._store.versions(name)

        try:
            await self._loader.do(prune)
        except (KensaError, OSError) as error:
            log.warning("Old versions of %s cannot be deleted: %s", name, error)

    async def _consider(self, name: str, manifest: Manifest) -> None:
        """Show a version to the gate; what passes goes live. Whatever happens, others follow."""
        version = manifest.version
        try:
            async with self._models.change(name):
                if self._models.is_away(name) or self._urgent[name]:  # since it was found
                    return
                if (task := asyncio.current_task()) is not None:  # before it waits for anything
                    self._replaying[name] = task
                found: dict[str, Any]
                if await self._loader.do(lambda: self._is_late(name, version)):
                    found = {"ok": False, "reasons": ["A newer version went live before it."]}
                elif await self._loader.do(lambda: self._store.did_not_end(name, version)):
                    found = {"ok": False, "reasons": [f"It {ENDED_IT}."]}
                else:
                    found = await self._through_the_gate(name, manifest)
            if not found["ok"]:
                await self._loader.write(lambda: self._store.record_gate(name, version, found))
                await self._models.note_held(name)
                self.on_swap(name, "held")
                self.on_change("held", name, version, " ".join(found["reasons"]), {})
                log.warning("%s %s is held: %s", name, version, " ".join(found["reasons"]))
        except (UnknownModel, UnknownVersion) as error:
            log.warning("%s %s is gone before the gate has seen it: %s", name, version, error)
        except (KensaError, OSError) as error:
            if isinstance(error, BadBundle | BadMeta) and not isinstance(error, Unreadable):
                log.error("%s %s is refused: %s", name, version, error)
                return
            self._failed[name, version] = time.monotonic()
            self.on_swap(name, "failed")
            log.error("%s %s does not go live: %s", name, version, error)
        except Exception:
            self._failed[name, version] = time.monotonic()
            self.on_swap(name, "failed")
            log.exception("%s %s does not go live", name, version)
        finally:
            self._replaying.pop(name, None)

    @asynccontextmanager
    async def _at_once(self, name: str) -> AsyncIterator[None]:
        """A change of a model that waits for no gate: one under way is given up, and begins again
        afterwards.
        """
        self._urgent[name] += 1
        try:
            if (replaying := self._replaying.pop(name, None)) is not None:
                replaying.cancel()
                log.info("The gate of %s is given up for a change that somebody wants now", name)
            async with self._models.change(name):
                yield
        finally:
            self._urgent[name] -= 1

    def _is_late(self, name: str, version: str) -> bool:
        self._store.folder(name, version)  # raises where somebody deleted it
        pointer, known = self._store.pointer(name), self._store.versions(name)
        return pointer is not None and pointer.live in known[known.index(version) + 1 :]

    async def _through_the_gate(self, name: str, manifest: Manifest) -> dict[str, Any]:
        """Read what it can promise, and show images and decisions to the live version and this one;
        make it live where it may.
        """
        began, version = time.perf_counter(), manifest.version
        limit = manifest.origin.get("max_flips")
        limit = self._settings.gate_flips if limit is None else float(limit)
        against = self._models.live(name)
        record = await self.replay.recall(name) if against else Record()
        images, report = await self._loader.do(
            lambda: self.replay.find(name, against, version, record.known)
        )
        said: list[Verdict] = []  # by the live version

        async def ask_it(live: Resident) -> None:
            said.extend(await self.replay.ask(live, images))
            record.old = await self.replay.ask_again(live, record.past)

        async with self._models.opened(name, version, ask_it) as model:
            says = await self.replay.ask(model, images) if said else []
            again = [one for one in record.past if one.number in record.old]
            record.new = await self.replay.ask_again(model, again)
            replayed = [Replayed(*one) for one in zip(images, said, says, strict=False)]
            regions = await self._loader.do(
                lambda: self.replay.other_regions(name, against, version)
            )
            doubts = [
                *promise.doubts(model.meta, self._settings.gate_found),
                *promise.movement(model.meta, against.meta if against else None),
                *gate.overtaken(manifest.origin, against.version if against else None, regions),
                *await self.doubts_of(model),
            ]
            found = gate.weigh(
                replayed,
                report,
                against.version if against else None,
                limit,
                doubts,
                record if against else None,
                regions,
            )
            self._replaying.pop(name, None)  # what follows is short, and done whole
            found["seconds"] = round(time.perf_counter() - began, 2)
            await self._loader.write(lambda: self.replay.keep_pictures(name, version, replayed))
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
        async with self._at_once(name):
            await self._loader.do(lambda: self._store.folder(name, version))
            live = self._models.live(name)
            is_it = live is not None and live.version == version
            if is_it and name not in self._residents.standing_in:
                return
            self._probation.end(name)
            async with self._models.opened(name, version) as model:
                found = await self._loader.do(lambda: self._store.gate(name, version))
                found = found or {"ok": True, "reasons": []}
                await self._go_live(model, {**found, "by_hand": True})

    async def discard(self, name: str, version: str, reason: str) -> None:
        """Delete a version because a person says so; also one that is at the gate just now.

        Raises:
            UnknownModel, UnknownVersion, Conflict, OSError: as `Store.discard`.
        """
        async with self._at_once(name):
            if version == self._residents.version(name):  # also one that only stands in
                raise Conflict(
                    f"{name} {version} judges, so it is not discarded: activate another one first."
                )
            await self._loader.write(lambda: self._store.discard(name, version))
            self.on_change("discarded", name, version, reason, {})
            log.info("%s %s is discarded: %s", name, version, reason)

    async def change_threshold(
        self, name: str, wanted: dict[str, Any], reason: str, *, gate: bool
    ) -> str:
        """Make a version that differs from the one that answers only in the threshold; its name.

        Args:
            wanted: one of the keys of `engines.limits`.
            gate: whether it goes live through the gate, as any new version, or at once.

        Raises:
            UnknownModel, Conflict, BadRequest, BadBundle, BadMeta, OutOfMemory, DiskFull.
        """

        def publish(base: str) -> str:
            meta = asked_for(Meta.read(self._store.folder(name, base) / META), wanted)
            origin = {"activate": gate, "reason": reason, "asked": wanted}
            return self._store.publish_threshold(name, base, meta, origin)

        return await self._change("threshold", name, publish, reason, wanted, gate=gate)

    async def change_regions(
        self,
        name: str,
        regions: Regions | None,
        reason: str,
        *,
        gate: bool,
        seen: Collection[tuple[int, int]] = (),
    ) -> str:
        """Make a version that differs from the one that answers only in its regions; its name.

        Args:
            regions: None where every pixel is to count.
            gate: whether it goes live through the gate, as any new version, or at once.
            seen: sizes of the last parts, for models that do not know what they learned from.

        Raises:
            UnknownModel, Conflict, BadRequest, BadBundle, BadMeta, OutOfMemory, DiskFull.
        """
        share = 0.0 if regions is None else regions.share

        def publish(base: str) -> str:
            meta = Meta.read(self._store.folder(name, base) / META)
            if regions is None and meta.regions is None:
                raise Conflict(f"{name} {base} has no regions: every pixel counts already.")
            if regions is not None and (learned := learned_sizes(meta)):
                must_fit(regions, learned, f"the pictures that {name} learned")
            elif regions is not None:
                must_fit(regions, seen, f"the last parts of {name}")
            origin = {"activate": gate, "reason": reason, "never_counts": share}
            return self._store.publish_regions(name, base, regions, origin)

        told = {"never_counts": share}
        return await self._change("regions", name, publish, reason, told, gate=gate)

    async def _change(
        self,
        what: str,
        name: str,
        publish: Callable[[str], str],
        reason: str,
        told: dict[str, Any],
        *,
        gate: bool,
    ) -> str:
        """Publish a version that differs little from the one that answers, and let it go live.

        Args:
            what: differs, as the audit trail calls it.
            publish: is given the one that answers, and makes the new one.
            told: what the trail says of it.
        """
        by_hand = {"ok": True, "reasons": [], "by_hand": True}

        def published(base: str) -> str:
            version = publish(base)
            if not gate:  # with a record the gate does not look at it again
                try:
                    self._store.record_gate(name, version, by_hand)
                except OSError:
                    self._store.withdraw(name, version)
                    raise
            return version

        async with self._at_once(name):
            base = await self._loader.do(lambda: self.that_judges(name, what))
            version = await self._loader.write(lambda: published(base))

            def changed() -> None:
                self.on_change(what, name, version, reason, {**told, "gate": gate})

            if gate:
                changed()
                return version
            try:
                async with self._models.opened(name, version) as model:
                    await self._go_live(model, by_hand, changed)
            except (KensaError, OSError):
                await self._loader.do(lambda: self._store.withdraw(name, version))
                raise
            self._probation.end(name)
            return version

    def that_judges(self, name: str, what: str) -> str:
        """The version whose threshold, or regions, are in force. Blocks.

        Raises:
            UnknownModel: there is no such model.
            Conflict: no version of it is live, or that one cannot be used.
        """
        self._store.must_know(name)
        version = self.answering(name)
        if version is None or version not in self._store.versions(name):
            why = self._residents.problem(name) or f"{name} has no live version."
            is_or_are = "are" if what == "regions" else "is"
            raise Conflict(f"There {is_or_are} no {what} to speak of: {why}")
        return version

    async def roll_back(self, name: str, live: str | None = None, to: str | None = None) -> None:
        """Let the version before the live one take over, at once.

        Args:
            live, to: only where this one is live still, and where that one takes over.

        Raises:
            UnknownModel, Conflict, BadBundle, BadMeta, OutOfMemory, DiskFull.
        """
        async with self._at_once(name):
            back = await self._loader.do(lambda: self._store.pointer_back(name))
            if live not in (None, back.previous) or to not in (None, back.live):
                raise Conflict(
                    f"{back.previous} is live by now, and {back.live} was before it: somebody"
                    f" changed {name} meanwhile, so look again first."
                )
            await self._roll_back(name, None)

    async def _roll_back(self, name: str, reason: str | None) -> None:
        self._probation.end(name)
        back = await self._loader.do(lambda: self._store.pointer_back(name))
        if reason is not None and back.live not in await self._loader.do(
            lambda: self._store.candidates(name)
        ):
            raise Conflict(f"{back.live} was rolled back from itself, so a person must decide.")

        def write() -> None:
            # With a record the gate does not look at it again and let it go live by itself.
            found = self._store.gate(name, back.previous) or {"ok": True, "reasons": []}
            if reason is not None:
                found = {**found, "ok": False, "reasons": [reason], "by_hand": False}
            self._store.roll_back(name, found)

        if reason is not None and self._models.is_away(name):
            await self._loader.write(write)  # nobody wants it in memory
        else:
            async with self._models.opened(name, back.live) as model:
                await self._loader.write(write)
                self._models.put(model)
        self.on_swap(name, "by_hand" if reason is None else "rolled_back")
        self.on_change("rollback", name, back.live, reason or "", {"from": back.previous})
        log.warning("%s is rolled back to %s%s", name, back.live, f": {reason}" if reason else "")

    def answering(self, name: str) -> str | None:
        """The version that answers, or that would if it were not away for a reason. In any thread.

        A new one is written down first: until it is in memory, too, it is not live.
        """
        if (version := self._residents.version(name)) is not None:
            return version
        pointer = self._store.pointer(name) if self._residents.why_not(name) else None
        return pointer.live if pointer else None

    def coming(self, name: str) -> set[str]:
        """What is written down as the live version, and may not be in memory yet. In any thread.

        Also while it is being written down: what the gate found stands there first. Not where it
        cannot be used, so that another one stands in.
        """
        found = {version for model, version in [*self._going_live] if model == name}
        pointer = self._store.pointer(name)
        if pointer is not None and name not in self._residents.standing_in:
            found.add(pointer.live)
        return found

    async def _go_live(
        self, model: Resident, found: dict[str, Any], done: Callable[[], None] = lambda: None
    ) -> None:
        """On the disk first: after a power cut the version that was named last comes back.

        Args:
            done: is called once it is so, before anybody hears that it is live.
        """
        name, version = model.name, model.version
        self._going_live.add((name, version))
        try:
            await self._loader.write(lambda: self._store.activate(name, version, found))
            self._models.put(model)
        finally:
            self._going_live.discard((name, version))
        done()
        how: How = "by_hand" if found.get("by_hand") else "live"
        self.on_swap(name, how)
        self.on_change("live", name, version, "", {"by_hand": how == "by_hand"})
        log.info("Live: %s", describe(model))
        await self._prune_one(name)

    # ---- the first parts of a new version -----------------------------------------------------

    def _on_verdict(self, model: Resident, verdict: Verdict) -> None:
        if reason := self._probation.count(model, verdict):
            self._loader.begin(self._roll_back_by_itself(model, reason))

    async def _roll_back_by_itself(self, model: Resident, reason: str) -> None:
        try:
            async with self._at_once(model.name):
                if await self._is_named_live(model):  # not replaced in the meantime
                    await self._roll_back(model.name, reason)
        except (KensaError, OSError) as error:
            log.error("%s should be rolled back (%s), but cannot be: %s", model.name, reason, error)

    async def _is_named_live(self, model: Resident) -> bool:
        """Whether it is the live one; perhaps it was unloaded with its last part."""
        if not self._models.is_away(model.name):
            return self._models.live(model.name) is model
        pointer = await self._loader.do(lambda: self._store.pointer(model.name))
        return pointer is not None and pointer.live == model.version


async def _none(_: Resident) -> list[str]:
    return []


def _another_judges(name: str, version: str, source: Path, before: str | None) -> str:
    """A sentence for a model that KENSA_MODEL_DIR exchanges."""
    sentence = f"{name} {version} judges from now on: KENSA_MODEL_DIR names {source}"
    if before is None or before == printable(str(source.absolute())):
        return f"{sentence}, which has changed. POST /models/{name}/rollback goes back."
    return (
        f"{sentence}. Until now {name} was the model of {before}: where these are different parts,"
        " set KENSA_MODEL_NAME, so that each has a name of its own."
    )
