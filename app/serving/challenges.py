"""`Challenger`: is a model released? Known pictures are judged, and one wrong verdict closes it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Literal, TypeVar

from app.serving.inspection import Inspector
from engines.errors import (
    BadBundle,
    BadImage,
    Conflict,
    GpuLost,
    KensaError,
    RuntimeFailed,
    Unreadable,
)
from engines.serving.resident import Resident
from engines.store.challenges import (
    Challenges,
    ChallengeSet,
    Judged,
    Known,
    Offered,
    Outcome,
    named,
    not_released,
)
from engines.store.versions import Store
from engines.verdict import Label

LOOK_EVERY_S = 1.0  # whether a shift has begun
RETRY_AFTER_S = 10.0  # a challenge that could not be made, such as of a model that is away

RIGHT: dict[str, Label] = {"good": "Normal", "bad": "Anomaly"}

# What became of a model, who wanted it, why, and what else is to be known.
OnNote = Callable[[str, str, str, str, dict[str, Any]], None]
Result = TypeVar("Result")

log = logging.getLogger("kensa")


class Challenger:
    """Challenges models, and knows which are released. Its methods belong to the event loop's
    thread.

    Which are not, the inspector is told, since every part passes there. What closes a model counts
    at once, and is written down; what opens one is written down before it counts.
    """

    def __init__(self, store: Store, inspector: Inspector, shift_began: Callable[[], int]) -> None:
        """`shift_began`: when the shift began that is running, milliseconds since 1970."""
        self._store = store
        self._kept = Challenges(store)
        self.on_note: OnNote = lambda *_: None
        self.on_change: Callable[[], None] = lambda: None  # one was closed, or opened
        self._inspector = inspector
        self._residents = inspector.residents
        self._shift_began = shift_began
        self._sets: dict[str, ChallengeSet] = {}
        self._changing: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._running: dict[str, asyncio.Task[Outcome]] = {}
        self._unwritten: set[str] = set()  # closed, and no disk has taken it yet
        self._unread: set[str] = set()  # of which nobody knows yet where they stand
        self._again: dict[str, float] = {}  # when to try again, on the monotonic clock

    async def open(self) -> None:
        """Read what the disk says. To be called before a part is let in."""
        try:
            names = await asyncio.to_thread(self._store.names)
        except OSError:  # no model is opened either, and it is said why
            names = []
        for name in names:
            await asyncio.to_thread(self._kept.sweep, name)
            await self._read(name)
            await self._note_what_was_cut_short(name)

    async def _note_what_was_cut_short(self, name: str) -> None:
        """The record is to say what closed a model, also where that challenge was killed."""
        found = self._sets.get(name)
        if found is None or found.begun is None:
            return
        self._note_begun(name, found)
        found = found.model_copy(update={"begun": None})
        with suppress(KensaError, OSError):  # it is noted again at the next start
            await asyncio.to_thread(self._kept.write, name, found)
            self._sets[name] = found

    def _note_begun(self, name: str, found: ChallengeSet | None) -> None:
        if found is not None and found.begun is not None:
            self._note_failed(name, found.begun)

    def _note_failed(self, name: str, outcome: Outcome) -> None:
        self.on_note("challenge_failed", outcome.who, name, named(outcome.wrong), _details(outcome))

    async def _read(self, name: str) -> None:
        """Where a model stands; one of which that cannot be read does not pass a part."""
        try:
            found = await asyncio.to_thread(self._kept.read, name)
            self._unread.discard(name)
        except Unreadable as error:
            found = ChallengeSet(released=False, why=f"{name} is not released: {error}")
            self._unread.add(name)
        self._sets.pop(name, None)
        if found is not None:
            self._sets[name] = found
        if found is None or found.released:
            self._open(name)
        elif self._inspector.not_released.get(name) != found.why:
            self._inspector.not_released[name] = found.why
            self.on_change()
            log.warning("%s", found.why)

    async def close(self) -> None:
        """Give up what is under way."""
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    def of(self, name: str) -> ChallengeSet | None:
        """The known pictures of a model, and where it stands; None where it has none. In any
        thread.
        """
        return self._sets.get(name)

    def picture(self, name: str, known: Known) -> bytes:
        """A known picture as it was sent. Blocks; in any thread.

        Raises:
            BadBundle, Unreadable: as `Challenges.picture`.
        """
        return self._kept.picture(name, known)

    # ---- which pictures -----------------------------------------------------------------------

    async def put(
        self, name: str, offered: Iterable[Offered], who: str, reason: str, *, at_shifts: bool
    ) -> None:
        """Let these be the known pictures of a model. Whether it is released stays as it is.

        Raises:
            BadRequest, BadImage, UploadTooLarge, DiskFull, ReadOnly: as `Challenges.put`.
            Unreadable: what is there cannot be read at the moment; so all that changes it.
        """
        async with self._changing[name]:
            self._must_be_read(name)
            before = self._sets.get(name) or ChallengeSet()
            about = ChallengeSet(
                at_shifts=at_shifts, changed=_now(), who=who, reason=reason,
                released=before.released, why=before.why,
            )  # fmt: skip
            limits = self._inspector.limits
            found = await asyncio.to_thread(self._kept.put, name, offered, about, limits)
            self._sets[name] = found
            self._unwritten.discard(name)
            self._note_begun(name, before)
            told = [{"name": one.called, "sha256": one.sha256} for one in found.pictures]
            counts = {expected: sum(one.expected == expected for one in found.pictures)
                      for expected in RIGHT}  # fmt: skip
            details = {**counts, "at_shifts": at_shifts, "pictures": told}
            self.on_note("challenges", who, name, reason, details)

    async def delete(self, name: str, who: str, reason: str) -> None:
        """Challenge a model no more; without known pictures it is released.

        Raises:
            Conflict: it has none.
            DiskFull, ReadOnly: nothing was changed.
        """
        async with self._changing[name]:
            self._must_be_read(name)
            if name not in self._sets:
                raise Conflict(f"{name} has no known pictures that could be deleted.")
            await asyncio.to_thread(self._kept.delete, name)
            self._note_begun(name, self._sets.pop(name))
            self._unwritten.discard(name)
            was_closed = self._open(name)
            details = {"good": 0, "bad": 0, "opened": was_closed}
            self.on_note("challenges", who, name, reason, details)

    # ---- a challenge --------------------------------------------------------------------------

    async def challenge(self, name: str, who: str, by: Literal["request", "shift"]) -> Outcome:
        """Let the live version judge all known pictures of a model, in gaps of the line.

        Whoever asks while one is under way gets what that one finds.

        Raises:
            Conflict: it has none.
            NotReady, UnknownModel: as `Residents.get`.
            DiskFull, ReadOnly: it was passed, and that cannot be written down: nothing has changed.
        """
        task = self._running.get(name)
        if task is None:
            task = asyncio.create_task(self._challenge(name, who, by))
            self._running[name] = task
            task.add_done_callback(lambda _: self._running.pop(name, None))
        return await asyncio.shield(task)

    async def _challenge(self, name: str, who: str, by: Literal["request", "shift"]) -> Outcome:
        while True:  # until version and pictures were the same from its beginning to its end
            found = self._must_have(name)
            # A model that rests is brought back for a person or a PLC, as for a part.
            live = self._residents.call(name) if by == "request" else self._residents.get(name)
            judged: list[Judged] = []
            with self._residents.use(live):
                for one in found.pictures:
                    judged.append(await self._judge(name, one, live))
                    if not judged[-1].right and name not in self._inspector.not_released:
                        outcome = _outcome(judged, live, who, by)
                        await self._close_early(name, found, live, outcome)
                async with self._changing[name]:
                    if self._holds(name, found, live):
                        return await self._conclude(name, _outcome(judged, live, who, by))

    def _must_be_read(self, name: str) -> None:
        if name in self._unread:
            raise Unreadable(self._sets[name].why)

    def _must_have(self, name: str) -> ChallengeSet:
        self._must_be_read(name)
        found = self._sets.get(name) or ChallengeSet()
        if not found.pictures:
            none = f"{name} has no known pictures: PUT /models/{name}/challenges names some."
            raise Conflict(found.why or none)
        return found

    def _holds(self, name: str, found: ChallengeSet, live: Resident) -> bool:
        """Whether what was found is of the pictures and of the version that count now."""
        return found.is_as(self._sets.get(name)) and self._residents.is_live(live)

    async def _judge(self, name: str, one: Known, model: Resident) -> Judged:
        """What a version says of a picture; one that cannot be judged is not judged rightly."""
        about = one.model_dump(include={"name", "expected", "sha256"})
        try:
            data = await asyncio.to_thread(self._kept.picture, name, one)
            verdict = await self._inspector.look(data, model)
        except GpuLost:  # nobody is judged any more
            raise
        except (BadBundle, BadImage, RuntimeFailed) as error:
            return Judged(**about, right=False, problem=str(error))
        return Judged(
            **about, right=verdict.label == RIGHT[one.expected], label=verdict.label,
            score=verdict.score, threshold=verdict.threshold, raw_score=verdict.raw_score,
            raw_threshold=verdict.raw_threshold,
        )  # fmt: skip

    async def _close_early(
        self, name: str, found: ChallengeSet, live: Resident, outcome: Outcome
    ) -> None:
        """One wrong verdict is enough: no part has to pass while the others are judged."""
        async with self._changing[name]:
            if self._holds(name, found, live):
                why = not_released(name, outcome)
                begun = self._sets[name].model_copy(update={"begun": outcome})
                await self._shut(name, begun, why)

    async def _conclude(self, name: str, outcome: Outcome) -> Outcome:
        before = self._sets[name]
        found = before.model_copy(update={"last": outcome, "begun": None})
        if outcome.passed:
            found = found.model_copy(update={"released": True, "why": ""})
            await asyncio.to_thread(self._kept.write, name, found)
            self._sets[name] = found
            self._open(name)
            self._note_begun(name, before)  # by a version that is not live any more
            self.on_note("challenge_passed", outcome.who, name, "", _details(outcome))
            of = len(outcome.pictures)
            log.info("%s %s passed its challenge: %d pictures", name, outcome.version, of)
            return outcome
        await self._shut(name, found, not_released(name, outcome))
        self._note_failed(name, outcome)
        log.error("%s", self._sets[name].why)
        return outcome

    # ---- released, or not ---------------------------------------------------------------------

    async def release(self, name: str, who: str, reason: str) -> None:
        """Let parts pass because a person says so, until the next challenge fails.

        Raises:
            Conflict: it is released.
            DiskFull, ReadOnly: nothing was changed.
        """
        async with self._changing[name]:
            self._must_be_read(name)
            found = self._sets.get(name)
            if found is None or found.released:
                raise Conflict(f"{name} is released: there is nothing to let through.")
            found = found.model_copy(update={"released": True, "why": ""})
            await asyncio.to_thread(self._kept.write, name, found)
            self._sets[name] = found
            self._unwritten.discard(name)
            self._open(name)
            details = {"version": found.last.version} if found.last else {}
            self.on_note("release", who, name, reason, details)
            log.warning("%s is released because a person says so: %s", name, reason)

    async def _shut(self, name: str, found: ChallengeSet, why: str) -> None:
        """Let no part pass, whether or not a disk takes it."""
        self._sets[name] = found.model_copy(update={"released": False, "why": why})
        self._inspector.not_released[name] = why
        self.on_change()
        self._unwritten.add(name)
        await self._write_down(name)

    async def _write_down(self, name: str) -> None:
        try:
            await asyncio.to_thread(self._kept.write, name, self._sets[name])
            self._unwritten.discard(name)
        except (KensaError, OSError) as error:
            self._inspector.not_released[name] = (
                f"{self._sets[name].why} This is not on the disk yet, so that a restart would open"
                f" it: {error}"
            )
            log.error("%s is not released, and that cannot be written down: %s", name, error)

    def _open(self, name: str) -> bool:
        """Let parts pass; whether they did not."""
        was_closed = self._inspector.not_released.pop(name, None) is not None
        if was_closed:
            self.on_change()
        return was_closed

    # ---- when nobody asks ---------------------------------------------------------------------

    async def look_out(self) -> None:
        """For ever: challenge models whose known pictures want it at the beginning of each shift.

        What was missed, because the server or the model was away, is made up for.
        """
        while True:
            for name in [*self._unread, *self._unwritten]:
                await self._try_again(name)
            for name in [one for one in self._sets if self._is_due(one)]:
                await self._challenge_for_shift(name)
            pause = RETRY_AFTER_S if self._unread or self._unwritten else LOOK_EVERY_S
            await asyncio.sleep(pause)

    async def _try_again(self, name: str) -> None:
        """To read, or to write, what could not be."""
        async with self._changing[name]:
            if name in self._unread:
                await self._read(name)
            elif name in self._unwritten:
                self._inspector.not_released[name] = self._sets[name].why
                await self._write_down(name)

    async def _challenge_for_shift(self, name: str) -> None:
        try:
            await self.challenge(name, "", "shift")
        except (KensaError, OSError) as error:
            self._again[name] = time.monotonic() + RETRY_AFTER_S
            log.warning("%s cannot be challenged for its shift yet: %s", name, error)

    def _is_due(self, name: str) -> bool:
        found = self._sets[name]
        if not found.at_shifts or time.monotonic() < self._again.get(name, 0.0):
            return False
        # One in the future is of a clock that was wrong.
        return found.last is None or not self._shift_began() <= found.last.at <= _now()

    async def doubts(self, model: Resident) -> list[str]:
        """What speaks against a version that is to go live: known pictures that it misjudges."""
        while (found := self._sets.get(model.name)) is not None:
            judged = [await self._judge(model.name, one, model) for one in found.pictures]
            if found.is_as(self._sets.get(model.name)):  # else those before are gone from the disk
                break
        else:
            return []
        wrong = [one for one in judged if not one.right]
        if not wrong:
            return []
        return [
            f"{len(wrong)} of the {len(judged)} known pictures of its challenge are judged wrongly:"
            f" {named(wrong)}."
        ]


def _outcome(
    judged: list[Judged], live: Resident, who: str, by: Literal["request", "shift"]
) -> Outcome:
    return Outcome(at=_now(), version=live.version, who=who, by=by, pictures=tuple(judged))


def _details(outcome: Outcome) -> dict[str, Any]:
    """What the audit trail says of it."""
    return {
        "version": outcome.version, "right": outcome.right, "of": len(outcome.pictures),
        "by": outcome.by, "pictures": [one.model_dump() for one in outcome.pictures],
    }  # fmt: skip


def _now() -> int:
    return round(time.time() * 1000)
