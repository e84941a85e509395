"""The line as it runs: every part as it comes, to whoever watches, and the last pictures."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from typing import Annotated, NamedTuple

import numpy as np
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field

from app.background import Background
from app.decisions.database import Kept
from app.decisions.newest import MOST, Newest, Shown
from app.decisions.recorder import Recorder
from app.http.access import may_still, needs
from app.http.base_body import Body, error_response
from app.routes.decisions import DecisionBody, decision_body
from app.routes.record import ask
from app.serving.challenges import Challenger
from app.serving.inspection import Inspector, draw
from app.watching.health import Health
from engines.errors import KensaError, UnknownDecision
from engines.image import ImageLimits, decode, kind_of
from engines.verdict import overlay_png

LOOK_EVERY_S = 0.1  # for new decisions, while somebody watches
STATE_EVERY_S = 1.0  # no more often, and only where something is another
HEALTH_EVERY_S = 5.0
ALIVE_EVERY_S = 2.0  # a comment keeps proxies from closing a stream, and finds who has left it
MOST_BEHIND = 100  # pieces of news; who is further behind is dropped, comes again and catches up
MOST_DRAWN = 8  # pictures that are drawn already
MOST_AS_IT_IS = 2 * 1024**2  # bytes of a file that is shown as it was sent

_SHOWN = {"JPEG": "image/jpeg", "PNG": "image/png", "BMP": "image/bmp"}  # by any browser
_PNG_DEPTH = 24  # where a PNG says how many bits a value has
_NOTHING = np.zeros((1, 1), np.float32)


class MinutesBody(Body):
    """The last minutes of a model, one number each; the running minute is the last."""

    first: int = Field(description="Minutes since 1970, UTC.")
    parts: list[int] = Field(description="With a verdict.")
    rejects: list[int]
    unusable: list[int] = Field(description="Pictures that were not usable; in neither of these.")


class LineModelBody(Body):
    """A model as it stands."""

    name: str
    version: str | None = Field(description="Which judges; null while none is in memory.")
    threshold: float | None = Field(description="The limit for `score`.")
    problem: str | None = Field(description="Why none judges, or another one than should.")
    released: bool = Field(description="False: it failed a challenge, and no part passes.")
    has_challenge: bool = Field(description="Whether it has known pictures.")
    drift: list[str] = Field(description="What of the last parts is no more as it was learned.")
    minutes: MinutesBody


class LineStateBody(Body):
    """How the line stands: the data of an event `state`."""

    newest: int = Field(description="Number of the last decision; 0 for none.")
    recorded: bool = Field(
        description="False where KENSA_RECORD is off: numbers count from the server's start then."
    )
    models: list[LineModelBody]
    degraded: list[str] = Field(description="As GET /healthz says it.")


class LineDecisionBody(DecisionBody):
    """A part as it comes: the data of an event `decision`."""

    in_memory: bool = Field(description="Whether GET /line/picture has its picture.")


class _Event(NamedTuple):
    number: int  # of a decision; 0 for any other
    text: bytes


class _News(NamedTuple):
    """What happened between two looks, as all who watch get it."""

    events: list[_Event]
    whole: bytes

    @classmethod
    def of(cls, events: list[_Event]) -> _News:
        return cls(events, b"".join(one.text for one in events))

    def after(self, number: int) -> bytes:
        """Without decisions up to a number."""
        if all(one.number == 0 or one.number > number for one in self.events):
            return self.whole
        return b"".join(one.text for one in self.events if one.number not in range(1, number + 1))


class Watched:
    """One look for all who watch the line, written once.

    A part costs nothing here: what is new is looked for ten times a second, and only while somebody
    watches. It belongs to the event loop's thread.
    """

    def __init__(
        self,
        recorder: Recorder,
        inspector: Inspector,
        challenger: Challenger,
        health: Health,
        background: Background,
        stopping: asyncio.Event,
    ) -> None:
        self._recorder, self._inspector = recorder, inspector
        self._challenger, self._health = challenger, health
        self._keep, self._stopping = background.keep, stopping
        self._newest: Newest = recorder.newest
        self._tasks: list[asyncio.Task[None]] = []  # while somebody watches
        self._news: deque[_News] = deque(maxlen=MOST_BEHIND)
        self._told = 0  # pieces of news
        self._seen = 0  # the last decision among them
        self._woken = asyncio.Event()
        self._state, self._state_due = b"", 0.0
        self._degraded: list[str] = []
        self._drift: dict[str, list[str]] = {}  # by model
        self._silent_since = 0.0
        self._drawn: dict[tuple[str, bool], asyncio.Task[bytes]] = {}

    # ---- who watches ---------------------------------------------------------------------------

    async def follow(
        self, after: int | None, may_still: Callable[[], bool]
    ) -> AsyncGenerator[bytes, None]:
        """What one who watches gets, until it leaves, falls behind, or the server stops.

        Args:
            after: the last decision that it knows; None: only those that come from now on.
            may_still: whether its key is good still; it gets nothing more where it is not.
        """
        self._come()
        try:
            told, sent = self._told, self._newest.number  # those before may yet be told to others
            yield _event("state", self._state_now())
            if after is not None:
                missed = await self._missed(after)
                if missed:
                    sent = missed[-1].number
                    yield b"".join(self._decision(one).text for one in missed)
            while not self._stopping.is_set():
                if told == self._told:
                    await self._woken.wait()
                    continue
                count = self._told - told
                if count > len(self._news) or not may_still():
                    return
                news = [one.after(sent) for one in list(self._news)[-count:]]
                told = self._told
                yield b"".join(news)
        finally:
            self._leave()

    def _come(self) -> None:
        self._newest.watch(1)
        if not self._tasks:
            self._seen = self._newest.number
            self._degraded, self._drift, self._state = [], {}, b""
            looks = (self._keep("shows the line", self._look_out),
                     self._keep("shows what the line needs", self._look_at_health))  # fmt: skip
            self._tasks = [asyncio.get_running_loop().create_task(one) for one in looks]

    def _leave(self) -> None:
        self._newest.watch(-1)
        if not self._newest.watchers:
            for task in self._tasks:
                task.cancel()
            self._tasks = []
            self._drawn.clear()

    async def _missed(self, after: int) -> list[Kept]:
        """The newest decisions after a number, oldest first, as the record has them."""
        newest, recorder = self._newest, self._recorder
        if recorder.is_on:
            try:
                return await ask(recorder.read, lambda it: it.after(after, MOST))
            except KensaError:  # it cannot be read now, which /healthz says
                pass
        return newest.since(after if after <= newest.number else 0)

    # ---- the look ------------------------------------------------------------------------------

    async def _look_out(self) -> None:
        """Tell what is new, until nobody watches any more."""
        while True:
            if self._stopping.is_set():
                self._tell([])
                return
            now = time.monotonic()
            events = self._decisions()
            if now >= self._state_due:
                self._state_due = now + STATE_EVERY_S
                if (state := self._state_now()) != self._state:
                    self._state = state
                    events.append(_Event(0, _event("state", state)))
            if events:
                self._silent_since = now
            elif now - self._silent_since > ALIVE_EVERY_S:
                self._silent_since = now
                events = [_Event(0, b": still here\n\n")]
            if events:
                self._tell(events)
            await asyncio.sleep(LOOK_EVERY_S)

    def _decisions(self) -> list[_Event]:
        if self._newest.number == self._seen:
            return []
        found = self._newest.since(self._seen)
        self._seen = found[-1].number if found else self._newest.number
        return [self._decision(one) for one in found]

    def _decision(self, kept: Kept) -> _Event:
        one = kept.decision
        in_memory = self._newest.picture(one.model, one.id) is not None
        body = LineDecisionBody(**vars(decision_body(kept)), in_memory=in_memory)
        data = _event("decision", body.model_dump_json().encode())
        return _Event(kept.number, b"id: %d\n%s" % (kept.number, data))

    def _tell(self, events: list[_Event]) -> None:
        self._news.append(_News.of(events))
        self._told += 1
        woken, self._woken = self._woken, asyncio.Event()
        woken.set()

    async def _look_at_health(self) -> None:
        """What takes longer, so that no part waits for it to be told."""
        while not self._stopping.is_set():
            state, drift = await self._health.look(), self._inspector.drift
            self._degraded = state.degraded
            if drift.parts:
                self._drift = {
                    model.name: [one.sentence for one in drift.changes(model)]
                    for model in state.models
                }
            await asyncio.sleep(HEALTH_EVERY_S)

    def _state_now(self) -> bytes:
        residents = self._inspector.residents
        names = sorted({*residents.known(), *residents.names(), *residents.problems})
        return LineStateBody(
            newest=self._newest.number,
            recorded=self._recorder.is_on,
            models=[self._model(name) for name in names],
            degraded=self._degraded,
        ).model_dump_json().encode()  # fmt: skip

    def _model(self, name: str) -> LineModelBody:
        residents = self._inspector.residents
        live = residents.get(name) if name in residents.names() else None
        return LineModelBody(
            name=name,
            version=live.version if live else None,
            threshold=live.scale.threshold if live else None,
            problem=residents.why_not(name) or residents.standing_in.get(name),
            released=name not in self._inspector.not_released,
            has_challenge=self._challenger.of(name) is not None,
            drift=self._drift.get(name, []),
            minutes=MinutesBody(**self._newest.minutes(name)._asdict()),
        )

    # ---- pictures ------------------------------------------------------------------------------

    async def drawn(self, shown: Shown, paint: bool, limits: ImageLimits) -> bytes:
        """A picture as a PNG, painted over or not: drawn once for all who ask."""
        key = shown.id, paint
        if key not in self._drawn:
            while len(self._drawn) >= MOST_DRAWN:
                del self._drawn[next(iter(self._drawn))]
            work: Callable[[], Awaitable[bytes]] = partial(ask, _draw, shown, paint, limits)
            self._drawn[key] = asyncio.ensure_future(work())
            self._drawn[key].add_done_callback(lambda done: done.cancelled() or done.exception())
        task = self._drawn[key]
        if not task.done():
            await asyncio.wait([task])  # it goes on where one who asks leaves
        return task.result()


def _event(name: str, data: bytes) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), data)


def _draw(shown: Shown, paint: bool, limits: ImageLimits) -> bytes:
    seen = shown.seen
    picture = decode(shown.image, limits, seen.bit_depth)
    if not paint:
        return overlay_png(picture, _NOTHING, 1.0)
    return draw(seen.raw, seen.scale, seen.size, picture)


def _as_it_is(image: bytes) -> str | None:
    """The media type of a file that a browser shows as Kensa sees it; None of any other."""
    kind = kind_of(image)
    is_deep = kind == "PNG" and image[_PNG_DEPTH : _PNG_DEPTH + 1] > b"\x08"
    return None if is_deep or len(image) > MOST_AS_IT_IS else _SHOWN.get(kind)


router = APIRouter(tags=["inspection"], dependencies=[needs("line")])


class _Stream(StreamingResponse):
    """Server-sent events."""

    media_type = "text/event-stream"


@router.get(
    "/line/events",
    summary="Watch the line",
    response_class=_Stream,
    responses={
        200: {
            "content": {
                "text/event-stream": {
                    "schema": {"type": "string"},
                    "example": 'id: 481\nevent: decision\ndata: {"number": 481, ...}\n\n',
                }
            }
        }
    },
)
async def events(
    request: Request,
    after: Annotated[
        int | None,
        Query(
            ge=0, le=2**62, examples=[481],
            description="The `number` of the last decision that is known: first come those that"
            f" were missed, the newest {MOST} at most. 0: of none. Without it, or `Last-Event-ID`,"
            " only those that come from now on.",
        ),
    ] = None,
    last_event_id: Annotated[
        str, Header(description="The same, as a browser sends it when it comes again.")
    ] = "",
) -> StreamingResponse:  # fmt: skip
    """Server-sent events: `decision` with a line of GET /decisions, whose number is the event's id,
    and `state` with how the models stand, at the beginning and when something changes.

    It ends when the server stops, and where somebody reads too slowly: come again, with `after`.
    It ends as well when the key is removed.
    """
    if after is None and last_event_id.isascii() and last_event_id.isdigit():
        after = min(int(last_event_id[:19]), 2**62)
    may = await may_still(request, "line")
    return _Stream(_watched(request).follow(after, may), headers={"Cache-Control": "no-store"})


@router.get(
    "/line/picture",
    summary="See a part that came just now",
    response_class=Response,
    responses={
        200: {
            "headers": {
                "X-Kensa-Id": {"description": "Of which decision.", "schema": {"type": "string"}}
            },
            "content": {
                media_type: {"schema": {"type": "string", "format": "binary"}}
                for media_type in _SHOWN.values()
            },
        },
        404: error_response(
            "No such picture is in memory.",
            unknown_decision="No picture of bracket is in memory: the last ones are, while ...",
            unknown_model="There is no model 'bolt'; there is 'bracket'.",
        ),
        503: error_response(
            "There is no model.", not_ready="There is no model yet: kensa learn FOLDER makes ..."
        ),
    },
)
async def picture(
    request: Request,
    model: Annotated[
        str, Query(description="The model's name; may be left out where there is only one.")
    ] = "",
    id: Annotated[  # noqa: A002 (its public name)
        str, Query(description="Of this decision; of the last one, if left out.")
    ] = "",
    paint: Annotated[
        bool,
        Query(description="With what is anomalous painted over it; false: as it came."),
    ] = True,
) -> Response:
    """The last pictures of each model, also those that the record does not keep, while somebody
    watches GET /line/events.
    """
    inspector: Inspector = request.app.state.inspector
    recorder: Recorder = request.app.state.recorder
    name = model or inspector.residents.get().name
    shown = recorder.newest.picture(name, id)
    if shown is None:
        raise UnknownDecision(
            f"No picture of {name[:64]} is in memory: the last ones are, while somebody watches"
            " GET /line/events. See GET /decisions for those that are kept."
        )
    media_type = None if paint else _as_it_is(shown.image)
    data = shown.image
    if media_type is None:
        media_type = _SHOWN["PNG"]
        data = await _watched(request).drawn(shown, paint, inspector.limits)
    headers = {"X-Kensa-Id": shown.id, "Cache-Control": "no-store"}
    headers["X-Content-Type-Options"] = "nosniff"
    return Response(data, media_type=media_type, headers=headers)


def _watched(request: Request) -> Watched:
    found: Watched = request.app.state.line
    return found
