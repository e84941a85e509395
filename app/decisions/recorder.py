"""`Recorder`: writes decisions down, beside the line and never in its way."""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from starlette.requests import ClientDisconnect

from app.decisions.database import FILE, DecisionDatabase, Kept, Note, open_or_make
from app.decisions.decision import Decision, OfViews, Verdict, View, short_sha256
from app.decisions.newest import MINUTE_MS, MINUTES, Newest
from app.decisions.pictures import Map, Pictures
from app.serving.inspection import Inspection
from app.serving.views import MISSING, Look, Part
from app.settings import Settings
from engines.errors import Conflict, DeadlineExceeded, DiskFull, KensaError
from engines.verdict import Label

WAIT_S = 10.0  # for the record to be opened: a long one is looked through first
EVERY_S = 0.2  # lines are written together, and none is older than a second after a kill
AGAIN_AFTER_S = 2.0  # after the disk was full
PICTURES_AGAIN_AFTER_S = 10.0
TIDY_EVERY_S = 5.0
MOST_WAITING = 20_000  # decisions that wait for a disk; what comes then is lost, and counted
MOST_WAITING_BYTES = 64 * 1024**2  # of their pictures; what comes then is kept without
MOST_NAME = 64  # characters of a model's name, which may be any text that a client asked for
PRUNE_AT_ONCE = 20_000  # decisions
PRUNE_SHARE = 0.05  # of all lines, at once, when there are too many
MIB = 1024**2
DAY_MS = 86_400_000

_WORDS: dict[Label, Verdict] = {"Normal": "normal", "Anomaly": "anomaly", "Unusable": "unusable"}

log = logging.getLogger("kensa")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Asked:
    """What a request says of itself, besides its picture."""

    id: str
    part: str
    model: str  # as it was asked for; empty for the only one
    who: str


class _Picture(NamedTuple):
    image: bytes
    seen: Map | None = None
    view: str = ""  # of a part of several, but for the worst, which lies where others' do

    @property
    def bytes(self) -> int:
        """Of image and map, in memory."""
        return len(self.image) + (self.seen.raw.nbytes if self.seen is not None else 0)


class _Waiting(NamedTuple):
    entry: Decision | Note
    image: bytes | None = None
    seen: Map | None = None
    others: tuple[_Picture, ...] = ()  # of a part of several views

    @property
    def pictures(self) -> list[_Picture]:
        own = [] if not self.image else [_Picture(self.image, self.seen)]
        return [*own, *self.others]

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.pictures)


_Told = _Waiting | threading.Event  # which is set once all that was told before it is written


class Recorder:
    """Decisions wait in memory for at most a moment, until a thread of its own has written them."""

    def __init__(self, settings: Settings) -> None:
        self.is_on = settings.record == "on"
        self.folder = settings.data / "decisions"
        self.pictures = Pictures(self.folder)
        self.newest = Newest()
        self.written = 0
        self.lost = 0  # decisions that no disk took
        self._settings = settings
        self._waiting: deque[_Told] = deque()
        self._bytes_in, self._bytes_out = 0, 0  # of pictures: each has one thread that counts it
        self._normals = 0
        self._problem: str | None = None
        self._pictures_problem: str | None = None
        self._pictures_again = 0.0  # when they are tried again
        self._lost_noted = 0
        self._picture_bytes = 0  # as far as `_is_counted`
        self._is_counted = False
        self._wake = threading.Event()
        self._ending = False
        self.opened = threading.Event()  # once the record is there, and whole
        self._of_thread = threading.local()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    @property
    def problem(self) -> str | None:
        """Why nothing, or no picture, is recorded at the moment; None where all is well."""
        return self._problem or self._pictures_problem

    def start(self) -> None:
        if self.is_on:
            self._thread.start()

    def close(self) -> None:
        """Write what waits, and end."""
        self._ending = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    # ---- what is told, in the event loop -----------------------------------------------------

    def verdict(self, asked: Asked, done: Inspection, image: bytes | None) -> None:
        """Keep a verdict, and the picture where it may be wanted again."""
        decision = _decision(asked, done)
        self.newest.saw(decision, image, _map(done))
        if not self.is_on:
            self.newest.decided(decision)
        elif image is not None and self._is_wanted(decision):
            self._add(_Waiting(decision, image, _map(done)))
        else:
            self._add(_Waiting(decision))

    def no_verdict(self, asked: Asked, code: str, image: bytes | None = None) -> None:
        """Keep that a request got no verdict, and its picture where that was the reason."""
        decision = _no_decision(asked, code)
        if self.is_on:
            self._add(_Waiting(decision, image))
        else:
            self.newest.decided(decision)

    def viewed(self, part: Part) -> None:
        """Keep what was decided of a part from all of its views, as one line.

        It has the numbers of the worst view, and none where one is missing. Pictures are kept of
        each view by the rules for a part; and that of the worst, where one of them is.
        """
        who = part.key.who
        each = {look.view: _of_look(look, who) for look in part.looks.values()}
        for name in part.missing:  # also "?", of which there may be several
            each.setdefault(name, _no_decision(Asked("", "", "", who), MISSING))
        code = MISSING if part.state == "none" else ""
        of_views = OfViews(
            part.key.line, part.of.total, part.decided_by,
            tuple(View.of(name, one) for name, one in each.items()),
        )  # fmt: skip
        if code:
            decision = _no_decision(Asked(part.id, "", part.model, who), code)
        else:
            decision = replace(each[part.decided_by], id=part.id, at=_now())
        decision = replace(decision, part=part.key.part, views=of_views.text())
        if part.worst is not None:
            self.newest.saw(decision, part.worst.image, _map(part.worst.inspection))
        if self.is_on:
            self._add(self._with_pictures(decision, part, each))
        else:
            self.newest.decided(decision)

    def _with_pictures(self, decision: Decision, part: Part, each: dict[str, Decision]) -> _Waiting:
        wanted = [
            look for look in part.looks.values()
            if look.inspection is None or self._is_wanted(each[look.view])
        ]  # fmt: skip
        if wanted and part.worst is not None and part.worst not in wanted:
            wanted.append(part.worst)
        found = {
            look.view: _Picture(look.image, _map(look.inspection), look.view)
            for look in wanted if look.image is not None
        }  # fmt: skip
        own = found.pop(part.decided_by, _Picture(b""))
        return _Waiting(decision, own.image or None, own.seen, tuple(found.values()))

    def note(self, what: str, who: str, subject: str, reason: str = "", **details: Any) -> None:
        """Add a line to the audit trail. In any thread."""
        if self.is_on:
            self._waiting.append(_Waiting(Note.now(what, who, subject, reason, details)))

    def _is_wanted(self, decision: Decision) -> bool:
        """Whether its picture is kept: not normal, near the limit, or of a sample."""
        assert decision.score is not None
        assert decision.threshold is not None
        stopped = decision.verdict == "anomaly" and decision.code  # then it is as its score is
        if decision.verdict != "normal" and not stopped:
            return True
        if decision.threshold - decision.score <= self._settings.record_near:
            return True
        before, share = self._normals, self._settings.record_sample
        self._normals += 1
        return int(before * share) != int(self._normals * share)

    def _add(self, one: _Waiting) -> None:
        if len(self._waiting) >= MOST_WAITING:
            self.lost += 1
            return
        is_too_much = self._bytes_in - self._bytes_out + one.bytes > MOST_WAITING_BYTES
        if is_too_much:
            one = _Waiting(one.entry)
        self._bytes_in += one.bytes
        self._waiting.append(one)

    # ---- what is asked, in other threads -----------------------------------------------------

    def read(self, work: Callable[[DecisionDatabase], Result]) -> Result:
        """Ask the database, in a thread that may block. What was told before is in it.

        Raises:
            Conflict: nothing is recorded here, or cannot be.
        """
        if not self.is_on:
            raise Conflict("Nothing is recorded here: set KENSA_RECORD=on and start Kensa again.")
        if not self.opened.wait(timeout=0 if self._problem else WAIT_S):
            raise Conflict(self._problem or f"The record in {self.folder} is still being opened.")
        self.flush()
        try:
            return work(self._mine())
        except sqlite3.Error as error:
            raise _said(error, self.folder) from error

    def flush(self, within_s: float = 2.0) -> bool:
        """Wait until what was told before is written, whatever comes meanwhile; whether it is.

        A disk that is full is not waited for.
        """
        if not self._thread.is_alive() or self._problem is not None:
            return False
        written = threading.Event()
        self._waiting.append(written)
        self._wake.set()
        return written.wait(within_s)

    def _mine(self) -> DecisionDatabase:
        """The connection of this thread."""
        known: DecisionDatabase | None = getattr(self._of_thread, "database", None)
        if known is None:
            known = self._of_thread.database = DecisionDatabase(self.folder / FILE)
        return known

    def delete_before(self, at: int, who: str, why: str) -> int:
        """Delete the decisions before a time, milliseconds since 1970, and their pictures.

        Raises:
            Conflict, DiskFull: as `read`.
        """
        return self.read(lambda it: self._prune(it, it.last_before(at), why, self.flush, who))

    def delete_picture(self, kept: Kept, who: str, why: str) -> None:
        """Delete the picture and the map of a decision, which stays.

        Raises:
            Conflict, DiskFull: as `read`.
        """
        note = Note.now("deleted", who, kept.decision.id, why, {"number": kept.number})
        self.read(lambda it: it.forget_pictures([kept.number], note))
        self.pictures.delete(kept.number)
        self._is_counted = False

    # ---- what is done, in its own thread -----------------------------------------------------

    def _run(self) -> None:
        database, tidied = None, 0.0
        while True:
            self._wake.wait(EVERY_S)
            self._wake.clear()
            ending = self._ending
            try:
                if database is None:
                    database = self._open()
                self._write(database)
                if time.monotonic() - tidied > TIDY_EVERY_S:
                    self._tidy(database)
                    tidied = time.monotonic()
                self._is_well()
            except Exception as error:  # noqa: BLE001 (whatever it is, it may pass, and is logged)
                self._fails(error)
                if not ending:
                    time.sleep(AGAIN_AFTER_S)
            if ending:
                break
        if database is not None:
            database.close()

    def _open(self) -> DecisionDatabase:
        database = open_or_make(self.folder)
        self.pictures.sweep(set(database.with_pictures()))
        since = _now() - MINUTES * MINUTE_MS
        self.newest.begin(database.last("decisions")[0], database.by_minute(since, MINUTE_MS))
        self.opened.set()
        return database

    def _write(self, database: DecisionDatabase) -> None:
        told = list(self._waiting)
        try:
            self._write_these(database, told)
        except (OSError, sqlite3.OperationalError):  # the disk, which may have room later
            raise
        except Exception:  # noqa: BLE001 (one of them; the others must not wait for it)
            for one in told:
                self._write_or_leave_out(database, one)

    def _write_or_leave_out(self, database: DecisionDatabase, one: _Told) -> None:
        try:
            self._write_these(database, [one])
        except (OSError, sqlite3.OperationalError):
            raise
        except Exception:
            log.exception("A line of the record cannot be written, and is left out")
            self._take_off([one])
            self.lost += 1

    def _write_these(self, database: DecisionDatabase, told: list[_Told]) -> None:
        """Write the first of those that wait, and take them off."""
        batch = [one for one in told if isinstance(one, _Waiting)]
        if batch:
            self._write_batch(database, batch)
            self.written += len(batch)
        self._take_off(told)

    def _take_off(self, told: list[_Told]) -> None:
        for one in told:
            self._waiting.popleft()
            if isinstance(one, _Waiting):
                self._bytes_out += one.bytes
            else:
                one.set()

    def _write_batch(self, database: DecisionDatabase, batch: list[_Waiting]) -> None:
        kept: dict[int, int] = {}  # number -> bytes
        numbers: dict[int, int] = {}  # number -> its place in the batch

        def keep(place: int, number: int) -> int:
            numbers[number] = place
            pictures = batch[place].pictures
            if not pictures or self._settings.record_pictures_mib == 0:
                return 0
            kept[number] = self._keep(number, pictures)
            return kept[number]

        try:
            entries = [_with_sha256(one) for one in batch]
            database.append(entries, keep)
        except BaseException:
            with suppress(OSError):  # it is logged why nothing can be written
                for number in kept:  # they would lie there uncounted, on a disk that is full
                    self.pictures.delete(number)
            raise
        self._picture_bytes += sum(kept.values())
        self.newest.add(
            Kept(number, entry, "", "", "", kept.get(number, 0))
            for number, place in numbers.items()
            if isinstance(entry := entries[place], Decision)
        )

    def _keep(self, number: int, pictures: Sequence[_Picture]) -> int:
        """Keep pictures; 0 where the disk has no room for them: their line may find some."""
        if self._pictures_problem is not None and time.monotonic() < self._pictures_again:
            return 0
        try:
            taken = sum(self.pictures.keep(number, *one) for one in pictures)
        except OSError as error:
            with suppress(OSError):
                self.pictures.delete(number)
            if self._pictures_problem is None:
                log.error("Pictures of decisions are not kept: %s. The decisions are.", error)
            self._pictures_problem = f"Pictures of decisions are not kept: {error}."
            self._pictures_again = time.monotonic() + PICTURES_AGAIN_AFTER_S
            return 0
        if self._pictures_problem is not None:
            log.info("Pictures of decisions are kept again")
        self._pictures_problem = None
        return taken

    def _tidy(self, database: DecisionDatabase) -> None:
        """Keep within the bounds of days and bytes; what waits is written between the steps."""
        # No picture may come for hours, and nobody would know that there is room again.
        if self._pictures_problem is not None and self._keep(0, [_Picture(bytes(MIB))]):
            self.pictures.delete(0)
        write = partial(self._write, database)
        if not self._is_counted:
            self._is_counted = True
            self._picture_bytes = database.picture_bytes()
        most = self._settings.record_pictures_mib * MIB
        while self._picture_bytes > most and (oldest := database.oldest_pictures(200)):
            gone, size = [], 0
            for number, taken in oldest:
                if self._picture_bytes - size <= most:
                    break
                gone.append(number)
                size += taken
            database.forget_pictures(gone)
            for number in gone:
                self.pictures.delete(number)
            self._picture_bytes -= size
            write()
        days = self._settings.record_days
        if days and (up_to := database.last_before(_now() - days * DAY_MS)):
            self._prune(database, up_to, f"older than {days} days", write)
        if database.bytes_used() > self._settings.record_mib * MIB:
            first, last = database.span()
            up_to = first + max(1, round((last - first) * PRUNE_SHARE))
            self._prune(database, up_to, f"more than {self._settings.record_mib} MiB", write)

    def _prune(
        self,
        database: DecisionDatabase,
        up_to: int,
        why: str,
        write: Callable[[], object],
        who: str = "",
    ) -> int:
        """Delete the decisions up to a number. In any thread; how many those were.

        Args:
            write: sees to it, between two steps, that what waits is written.
        """
        first, _ = database.span()
        count = 0
        while first and first <= up_to:
            last = min(first + PRUNE_AT_ONCE - 1, up_to)
            pictures = database.with_pictures(last)
            count += database.prune(last, why, who)
            for number in pictures:
                self.pictures.delete(number)
            write()
            first = last + 1
        self._is_counted = False
        return count

    def _is_well(self) -> None:
        if self.lost > self._lost_noted:
            self.note("lost", "", "decisions", "no disk took them",
                      count=self.lost - self._lost_noted)  # fmt: skip
            self._lost_noted = self.lost
        if self._problem is not None:
            log.info("Decisions are recorded again")
        self._problem = None

    def _fails(self, error: Exception) -> None:
        problem = f"Decisions are not recorded: {error}."
        if problem != self._problem:
            log.error("%s Inspecting goes on.", problem, exc_info=not isinstance(
                error, OSError | sqlite3.Error))  # fmt: skip
        self._problem = problem


def _decision(asked: Asked, done: Inspection) -> Decision:
    verdict, timing, seen = done.verdict, done.timing, done.seen
    return Decision(
        id=asked.id, part=asked.part, at=_now(), model=done.model.name,
        version=done.model.version, scorer=short_sha256(done.model.made_of),
        verdict=_WORDS[verdict.label], code=done.code,
        raw_score=verdict.raw_score, score=verdict.score, threshold=verdict.threshold,
        raw_threshold=verdict.raw_threshold, queue_ms=round(timing.queue_ms, 2),
        decode_ms=round(timing.decode_ms, 2), infer_ms=round(timing.infer_ms, 2),
        total_ms=round(timing.total_ms, 2), sha256=seen.sha256, format=seen.kind,
        width=seen.width, height=seen.height, who=asked.who,
    )  # fmt: skip


def _no_decision(asked: Asked, code: str) -> Decision:
    nothing: dict[str, Any] = dict.fromkeys(
        ("raw_score", "score", "threshold", "raw_threshold",
         "queue_ms", "decode_ms", "infer_ms", "total_ms")
    )  # fmt: skip
    return Decision(
        id=asked.id, part=asked.part, at=_now(), model=asked.model[:MOST_NAME], version="",
        scorer="", verdict="none", code=code, **nothing, sha256="", format="", width=0,
        height=0, who=asked.who,
    )  # fmt: skip


def _of_look(look: Look, who: str) -> Decision:
    """What was decided of a view, as if it were a part."""
    asked = Asked(look.id, "", look.model, who)
    if look.inspection is not None:
        return replace(_decision(asked, look.inspection), at=look.at)
    code = look.code or DeadlineExceeded.code  # it is still being judged
    return replace(_no_decision(asked, code), at=look.at, sha256=look.sha256)


def _map(done: Inspection | None) -> Map | None:
    if done is None:
        return None
    model = done.model
    size, bit_depth = model.runtime.image_size, model.meta.bit_depth
    return Map(done.anomaly_map, model.scale, size, bit_depth)


def _with_sha256(one: _Waiting) -> Decision | Note:
    """Of a damaged picture, which nobody has hashed yet: in the event loop it would delay parts."""
    if one.image is None or isinstance(one.entry, Note) or one.entry.sha256:
        return one.entry
    return replace(one.entry, sha256=hashlib.sha256(one.image).hexdigest())


def why_none(error: Exception) -> str:
    """The code of a decision that is none, as the answer says it."""
    if isinstance(error, ClientDisconnect):
        return "client_left"
    return error.code if isinstance(error, KensaError) else KensaError.code


def _said(error: sqlite3.Error, folder: Path) -> Exception:
    if "full" in str(error):
        return DiskFull("Nothing was changed: the disk is full. Free some space.")
    return Conflict(f"The record in {folder} cannot be used at the moment: {error}.")


def _now() -> int:
    return round(time.time() * 1000)
