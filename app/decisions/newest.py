"""`Newest`: the last decisions, as they come, in memory: for whoever watches the line."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable
from typing import NamedTuple

from app.decisions.database import Kept
from app.decisions.decision import Decision
from app.decisions.pictures import Map

MOST = 200  # decisions, of all models
MINUTES = 30  # that are counted
MINUTE_MS = 60_000
MOST_PICTURES = 32  # of a model: one is asked for up to a second after it came
MOST_BYTES = 32 * 1024**2  # of pictures, of all models; there is always room for one
_COUNTED = ("normal", "anomaly", "unusable")  # the model of others may be any text


class Shown(NamedTuple):
    """A picture that was judged just now."""

    id: str  # of its decision
    image: bytes
    seen: Map

    @property
    def bytes(self) -> int:
        """Of picture and map, in memory."""
        return len(self.image) + self.seen.raw.nbytes


class Minutes(NamedTuple):
    """How many parts came in each of the last `MINUTES`, the running one last."""

    first: int  # minutes since 1970
    parts: list[int]  # with a verdict
    rejects: list[int]
    unusable: list[int]  # in neither of these


class Newest:
    """One thread tells it what was decided: the recorder's, or the event loop's without a record.

    Any may ask; pictures belong to the event loop's thread.
    """

    def __init__(self) -> None:
        self.number = 0  # of the last decision
        self.watchers = 0
        self._last: deque[Kept] = deque(maxlen=MOST)
        self._counts: Counter[tuple[str, int, str]] = Counter()  # model, minute, verdict -> parts
        self._counted_from = 0  # the first minute that is kept
        self._pictures: dict[str, deque[Shown]] = {}

    # ---- what is told -------------------------------------------------------------------------

    def begin(self, number: int, counts: Iterable[tuple[str, int, str, int]]) -> None:
        """What the record knew before: its last number, and parts by model, minute and verdict."""
        self.number = number
        for model, minute, verdict, parts in counts:
            if verdict in _COUNTED:
                self._counts[model, minute, verdict] += parts

    def add(self, kept: Iterable[Kept]) -> None:
        """These were decided, and written down."""
        for one in kept:
            decision = one.decision
            self._last.append(one)
            self.number = one.number
            if decision.verdict in _COUNTED:
                self._count(decision)

    def decided(self, decision: Decision) -> None:
        """This was decided where nothing is written down: it is counted from the start on."""
        self.add([Kept(self.number + 1, decision, "", "", "", 0)])

    def _count(self, decision: Decision) -> None:
        minute = decision.at // MINUTE_MS
        self._counts[decision.model, minute, decision.verdict] += 1
        if minute - MINUTES > self._counted_from:
            self._counted_from = minute - MINUTES
            for key in [key for key in list(self._counts) if key[1] <= self._counted_from]:
                del self._counts[key]

    def saw(self, decision: Decision, image: bytes | None, seen: Map | None) -> None:
        """Hold a picture for a moment, where somebody watches."""
        if not self.watchers or image is None or seen is None:
            return
        of_model = self._pictures.setdefault(decision.model, deque(maxlen=MOST_PICTURES))
        of_model.append(Shown(decision.id, image, seen))
        sizes = [one.bytes for each in self._pictures.values() for one in each]
        taken, count = sum(sizes), len(sizes)
        while taken > MOST_BYTES and count > 1:
            taken -= max(self._pictures.values(), key=len).popleft().bytes
            count -= 1

    # ---- who watches, and what they ask -------------------------------------------------------

    def watch(self, by: int) -> None:
        """So many more watch, or fewer; the last one gives back the memory of the pictures."""
        self.watchers += by
        if not self.watchers:
            self._pictures.clear()

    def since(self, number: int) -> list[Kept]:
        """The last ones after a number, oldest first, `MOST` at most."""
        return [one for one in list(self._last) if one.number > number]

    def picture(self, model: str, id_: str = "") -> Shown | None:
        """The last picture of a model, or of this decision; None where it is not held."""
        held = self._pictures.get(model, ())
        return next((one for one in reversed(held) if id_ in ("", one.id)), None)

    def minutes(self, model: str) -> Minutes:
        """How many parts a model judged lately."""
        now = round(time.time() * 1000) // MINUTE_MS
        first = now - MINUTES + 1
        counted = {verdict: [self._counts[model, minute, verdict]
                             for minute in range(first, now + 1)]
                   for verdict in _COUNTED}  # fmt: skip
        parts = [sum(pair) for pair in zip(counted["normal"], counted["anomaly"], strict=True)]
        return Minutes(first, parts, counted["anomaly"], counted["unusable"])
