"""`Views`: a part that several cameras see has one verdict, from all of its views."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, cast, get_args

import numpy as np

from app.serving.inspection import Inspection
from app.settings import Settings
from engines.errors import Conflict, LateView, NotReleased, Overloaded, UnknownDecision

MOST_VIEWS = 32  # of a part
MOST_OPEN = 1000  # parts whose views are awaited
MOST_DECIDED = 4000  # parts that are remembered, so that a late view begins no new one
MOST_HELD_BYTES = 64 * 1024**2  # of pictures until the verdict; what comes then is judged without
MISSING = "view_missing"  # the code of a part, and of a view of which nothing came
UNNAMED = "?"  # a missing view that nobody has named

State = Literal["pending", "normal", "anomaly", "unusable", "none"]
STATES: tuple[State, ...] = get_args(State)
_RANKS = {"Anomaly": 3, "Unusable": 1, "Normal": 0}  # between them, 2: that a view is missing


class Key(NamedTuple):
    """Whose part it is: lines that call their parts alike do not meet."""

    who: str  # the name of the API key; empty where none was needed
    line: str  # which of several lines of one key; empty where the request named none
    part: str


class Of(NamedTuple):
    """How many views a part has, and what they are called, where somebody said it."""

    total: int
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ",".join(self.names) or str(self.total)


@dataclass(eq=False)
class Look:
    """A picture of a view: being judged, judged, or the reason why it is not."""

    view: str
    id: str  # of its request
    model: str  # as it was asked for, or the only one
    sha256: str = ""
    at: int = field(default_factory=lambda: round(time.time() * 1000))  # ms since 1970
    image: bytes | None = None  # until the part is decided
    inspection: Inspection | None = None
    code: str = ""  # why it has no verdict
    held: int = 0  # bytes of picture and map
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def counts(self) -> bool:
        """Whether it has a verdict, or may still get one."""
        return self.inspection is not None or not self.ended.is_set()

    @property
    def is_stopped(self) -> bool:
        """Whether it is NG, or has no verdict, because its model was not released."""
        stopped = self.inspection is not None and self.inspection.not_released
        return stopped or self.code == NotReleased.code

    def is_passed_by(self, models: Collection[str]) -> bool:
        """Whether one of these models said that it is normal."""
        judged = self.inspection
        return (
            judged is not None and judged.verdict.label == "Normal" and judged.model.name in models
        )

    def shows(self, other: Look) -> bool:
        """Whether it is the same picture, for the same model."""
        return (self.sha256, self.model) == (other.sha256, other.model)

    @property
    def badness(self) -> tuple[int, float, float]:
        """The larger, the worse; of one that was judged. Scores of models differ: limits count."""
        assert self.inspection is not None
        verdict = self.inspection.verdict
        above, raw = verdict.score - verdict.threshold, verdict.raw_score - verdict.raw_threshold
        return _RANKS[verdict.label], above, raw


@dataclass(eq=False)
class Part:
    """A part and its views, as far as they have come."""

    key: Key
    id: str  # of its first request: the decision's
    of: Of
    until: float  # its deadline, on the event loop's clock
    deadline: asyncio.TimerHandle | None = None
    looks: dict[str, Look] = field(default_factory=dict)  # the one that counts of each view
    usual: tuple[str, ...] = ()  # what the views of the last whole part of its line were called
    decided: asyncio.Event = field(default_factory=asyncio.Event)
    ended: float = 0.0  # when it was decided, on the event loop's clock

    @property
    def is_decided(self) -> bool:
        return self.decided.is_set()

    @property
    def judged(self) -> list[Look]:
        return [look for look in self.looks.values() if look.inspection is not None]

    @property
    def missing(self) -> list[str]:
        """The views without a verdict, by their names where somebody said or sent them."""
        there = {look.view for look in self.judged}
        names = self.of.names
        if not names and len(self.usual) == self.of.total and there <= {*self.usual}:
            names = self.usual
        if names:
            return [name for name in names if name not in there]
        came = [name for name in self.looks if name not in there]
        return [*came, *[UNNAMED] * self.of.total][: self.of.total - len(there)]

    @property
    def worst(self) -> Look | None:
        """Of the views that were judged; None where none was."""
        return max(self.judged, key=lambda look: look.badness, default=None)

    @property
    def state(self) -> State:
        """Its verdict: an anomaly, whatever else there is; `none` where a view is missing."""
        if not self.is_decided:
            return "pending"
        worst = self.worst
        if worst is None or worst.inspection is None:
            return "none"
        label = worst.inspection.verdict.label
        return "none" if self.missing and label != "Anomaly" else cast(State, label.lower())

    @property
    def model(self) -> str:
        """Which judged the worst view, or was asked first."""
        if self.worst is not None and self.worst.inspection is not None:
            return self.worst.inspection.model.name
        return next((look.model for look in self.looks.values()), "")

    @property
    def decided_by(self) -> str:
        """The view whose verdict is the part's, or that is missing."""
        if self.state == "none":
            return self.missing[0]
        return self.worst.view if self.worst is not None else ""


class Views:
    """The parts whose views are awaited, and those that were decided lately.

    It belongs to the event loop's thread. What is open when the process is killed is lost: nothing
    of it is recorded, and views that come afterwards begin the part anew.
    """

    def __init__(self, settings: Settings) -> None:
        self.on_decided: Callable[[Part], None] = lambda _: None  # pictures are there until then
        self._replaces = settings.view_repeats == "replace"
        self._remember_s = settings.repeat_s
        self._holds = settings.record == "on" and settings.record_pictures_mib > 0
        self._held = 0
        self._open: dict[Key, Part] = {}
        self._decided: OrderedDict[Key, Part] = OrderedDict()
        self._usual: OrderedDict[tuple[str, str, int], tuple[str, ...]] = OrderedDict()

    @property
    def open(self) -> int:
        """How many parts wait for views."""
        return len(self._open)

    def part(self, key: Key, of: Of, view: str, id_: str, within_s: float) -> Part:
        """The part that a view belongs to, which begins with its first request.

        Args:
            id_: the request's.
            within_s: until its deadline, where it begins.

        Raises:
            LateView: it was decided without this view.
            Conflict: it began with another `of`, or has as many views already.
            Overloaded: too many wait for views.
        """
        part = self._known(key)
        if part is None:
            if of.names and view not in of.names:
                raise _no_such_view(key.part, of, view)
            part = self._begin(key, of, id_, within_s)
        elif part.of != of:
            raise Conflict(
                f"The part {key.part!r} began with of={part.of}, and its view {view} says of={of}:"
                " say the same with each view, and give each part a name of its own."
            )
        if not part.is_decided or (look := part.looks.get(view)) is None or not look.counts:
            self._check_room(part, view)
        return part

    async def judge(
        self, part: Part, look: Look, image: bytes, inspect: Callable[[], Awaitable[Inspection]]
    ) -> tuple[Inspection, str | None]:
        """The inspection of a view, and the id of the one that it repeats, if it does.

        The same picture again gets the first answer again. With the last view the part is decided.

        Raises:
            LateView: the part was decided meanwhile, or before.
            Conflict: the view was judged by another picture, and repeats are refused.
        """
        while (known := part.looks.get(look.view)) is not None and known.shows(look):
            await known.ended.wait()
            if known.inspection is not None:
                return known.inspection, known.id
            if part.looks.get(look.view) is known:
                break  # it got no verdict: this one is the next try
        self._check_room(part, look.view)
        if known is not None and known.counts and not self._replaces:
            raise Conflict(
                f"The view {look.view} of the part {part.key.part!r} was sent before with another"
                " picture or model: KENSA_VIEW_REPEATS is refuse."
            )
        self._put(part, look)
        try:
            inspection = await inspect()
            if part.looks[look.view] is look and not part.is_decided:
                self._hold(look, image, inspection)
        finally:
            look.ended.set()
        if part.is_decided:
            raise _late(part, look.view, self._remember_s)
        if len(part.judged) == part.of.total:
            self._decide(part)
        return inspection, None

    def failed(self, part: Part, look: Look, code: str, image: bytes | None = None) -> None:
        """A view got no verdict, and may be sent again until the deadline.

        Args:
            image: a damaged one, which was the reason.
        """
        look.code = code
        look.ended.set()
        if part.is_decided:
            return
        known = part.looks.get(look.view)
        if known is None or not known.counts:  # what was judged stays: nobody knows what this was
            self._put(part, look)
        if part.looks[look.view] is look and image is not None:
            self._hold(look, image, None)

    def known(self, key: Key) -> Part:
        """A part that waits for views, or was decided lately. Raises UnknownDecision."""
        part = self._known(key)
        if part is None:
            said = f" with line={key.line}" if key.line else " without a line"
            raise UnknownDecision(
                f"No view of a part {key.part!r} came from you{said}, within the last"
                f" {self._remember_s} s or since its model was challenged. Say the same line as"
                " with its views; GET /parts/{part} has what was decided before."
            )
        return part

    def forget(self, not_released: Collection[str]) -> None:
        """It has changed which models are released: nobody gets an answer from before.

        A view that waits for others lost its verdict where its model is closed, and may be sent
        again. A part that passed before, or is NG because a model was closed, may begin anew.
        """
        for part in self._open.values():
            for look in part.judged:
                if look.is_passed_by(not_released):
                    self._release(look)
                    look.inspection, look.code = None, NotReleased.code
        for key, part in list(self._decided.items()):
            passed = part.state == "normal" and any(
                look.is_passed_by(not_released) for look in part.judged
            )
            if passed or any(look.is_stopped for look in part.looks.values()):
                del self._decided[key]

    def close(self) -> None:
        """Decide what is open: the views that have not come are missing."""
        for part in list(self._open.values()):
            self._decide(part)

    # ---- how a part goes ----------------------------------------------------------------------

    def _known(self, key: Key) -> Part | None:
        oldest = asyncio.get_running_loop().time() - self._remember_s
        while self._decided:
            first = next(iter(self._decided.values()))
            if first.ended > oldest and len(self._decided) <= MOST_DECIDED:
                break
            self._decided.popitem(last=False)
        return self._open.get(key) or self._decided.get(key)

    def _begin(self, key: Key, of: Of, id_: str, within_s: float) -> Part:
        if len(self._open) >= MOST_OPEN:
            raise Overloaded(
                f"{MOST_OPEN:,} parts wait for views already: send this one later, and say a"
                " shorter deadline_ms where views get lost."
            )
        loop = asyncio.get_running_loop()
        usual = self._usual.get((key.who, key.line, of.total), ())
        part = self._open[key] = Part(key, id_, of, loop.time() + within_s, usual=usual)
        part.deadline = loop.call_at(part.until, self._decide, part)
        return part

    def _check_room(self, part: Part, view: str) -> None:
        if part.is_decided:
            raise _late(part, view, self._remember_s)
        if part.of.names and view not in part.of.names:
            raise _no_such_view(part.key.part, part.of, view)
        others = [look for look in part.looks.values() if look.counts and look.view != view]
        if len(others) >= part.of.total:
            raise Conflict(
                f"The part {part.key.part!r} has {part.of.total} views already, and {view} is none"
                f" of them: {', '.join(look.view for look in others)}."
            )

    def _put(self, part: Part, look: Look) -> None:
        if (before := part.looks.get(look.view)) is not None and before is not look:
            self._release(before)
        part.looks[look.view] = look
        if len(part.looks) > MOST_VIEWS:  # each under another name, as of a sender that counts
            first = next((one for one in part.looks.values() if not one.counts), look)
            if first is not look:
                self._release(part.looks.pop(first.view))

    def _hold(self, look: Look, image: bytes, inspection: Inspection | None) -> None:
        """Keep picture and map for the record, where there is room."""
        look.inspection = inspection and replace(inspection, drawing=None)
        size = len(image) + (inspection.anomaly_map.nbytes if inspection is not None else 0)
        if self._holds and self._held + size <= MOST_HELD_BYTES:
            look.image, look.held = image, size
            self._held += size
        else:
            self._release(look)

    def _release(self, look: Look) -> None:
        self._held -= look.held
        look.image, look.held = None, 0
        if look.inspection is not None:
            nothing = np.empty((0, 0), np.float32)
            look.inspection = replace(look.inspection, anomaly_map=nothing)

    def _decide(self, part: Part) -> None:
        if part.deadline is not None:
            part.deadline.cancel()
        self._open.pop(part.key, None)
        part.ended = asyncio.get_running_loop().time()
        part.decided.set()
        if not part.missing:
            sender = part.key.who, part.key.line, part.of.total
            self._usual[sender] = tuple(part.looks) if not part.of.names else part.of.names
            self._usual.move_to_end(sender)
            while len(self._usual) > MOST_OPEN:
                self._usual.popitem(last=False)
        try:
            self.on_decided(part)
        finally:
            for look in part.looks.values():
                self._release(look)
            if self._remember_s:
                self._decided[part.key] = part


def _no_such_view(part: str, of: Of, view: str) -> Conflict:
    return Conflict(f"The part {part!r} has the views {of}, and no {view}: correct its name.")


def _late(part: Part, view: str, remember_s: int) -> LateView:
    said = {"none": "NG, because a view was missing", "anomaly": "NG"}.get(part.state, part.state)
    return LateView(
        f"The view {view} of the part {part.key.part!r} came too late: it was decided, {said}"
        f" (GET /decisions/{part.id}). Its name may begin anew {remember_s} s after that."
    )
