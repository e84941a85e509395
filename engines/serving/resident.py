"""The models held in memory: which version answers, and who still uses the one before.

Engine, bank, thresholds and meta.json of a version are one object, `Resident`, and a request keeps
the one it began with. So a verdict always belongs to the version that it names.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from engines.camera import Camera
from engines.errors import NotReady, UnknownModel
from engines.meta import Meta
from engines.runtimes import Batches, Runtime
from engines.verdict import Scale


@dataclass(frozen=True, eq=False)
class Resident:
    """A version of a model held in memory, open and warm."""

    name: str
    version: str
    meta: Meta
    scale: Scale
    runtime: Runtime
    graph: str = ""  # SHA-256 of model.onnx: versions with the same one may differ in a bank alone
    made_of: tuple[str | None, ...] = ()  # the same of all files that its runtime comes from
    bank_alone: bool = False  # or regions: the engine is that of the version before
    limit_alone: bool = False  # is its own; the runtime is that of the version before
    stale: str | None = None  # why its plan cannot be used here, so that OpenVINO runs in its place
    unused: str | None = None  # why nobody needs its plan here: there is no GPU for TensorRT

    @cached_property
    def camera(self) -> Camera | None:
        """What its pictures look like; None where its training did not note that."""
        return Camera.of(self.meta.camera)


def describe(model: Resident) -> str:
    """A model in one line, for the log."""
    rows = model.runtime.bank_rows
    alone = "regions" if rows is None else "bank"
    bank = "no memory bank" if rows is None else f"memory bank of {rows:,}"
    return (
        f"{model.name} {model.version}: {model.meta.model}, {model.runtime.image_size} pixels,"
        f" {bank}, {model.runtime.name} {model.runtime.precision},"
        f" {at_once(model.runtime.batches)}"
        f"{f', the {alone} alone' if model.bank_alone else ''}"
        f"{', the limit alone' if model.limit_alone else ''}"
    )


def at_once(batches: Batches) -> str:
    """How many images run together, in words for the log."""
    number = f"up to {batches.size} at once" if batches.size > 1 else "one at a time"
    return f"{number} for now" if batches.provisional else number


class Residents:
    """Which version answers for a name. Only the event loop's thread calls this."""

    def __init__(self) -> None:
        self._models: dict[str, Resident] = {}
        self._users: dict[Resident, int] = {}
        self._unused: dict[Resident, asyncio.Event] = {}  # of those somebody waits for
        self.problems: dict[str, str] = {}  # name -> why it has no resident version
        self.unloaded: dict[str, str] = {}  # the same, because a person wanted it so
        self.resting: dict[str, str] = {}  # the same, because another model needed the memory
        self.held: dict[str, str] = {}  # name -> why none of its versions may judge yet
        self.standing_in: dict[str, str] = {}  # name -> why not the version answers that should
        self.on_call: Callable[[str], None] = lambda _: None  # a part came for one that rests
        self._called: dict[str, float] = {}  # when a request last came, on the monotonic clock
        self._since: dict[str, float] = {}  # when it came into memory
        self.stale: dict[str, str] = {}  # name -> why it has no plan, and what is done about it

    def names(self) -> list[str]:
        return sorted(self._models)

    def get(self, name: str | None = None) -> Resident:
        """The resident version of a model; without a name, of the only one.

        Raises:
            NotReady: it is not in memory; the sentence says why.
            UnknownModel: there is no such model, or several and no name.
        """
        if name is None:
            return self._only()
        if name in self._models:
            return self._models[name]
        if reason := self.why_not(name) or self.held.get(name):
            raise NotReady(reason)
        raise UnknownModel(f"There is no model {name[:100]!r}{self._there_is()}.")

    def version(self, name: str) -> str | None:
        """Which version of a model answers; None where none does. In any thread."""
        model = self._models.get(name)
        return model.version if model else None

    def is_live(self, model: Resident) -> bool:
        """Whether this very one answers. In any thread."""
        return self._models.get(model.name) is model

    def call(self, name: str | None = None) -> Resident:
        """The same for a part: a model that rests is brought back for those that come later.

        Raises:
            NotReady, UnknownModel: as `get`.
        """
        if name is not None and name in self._models:
            self._called[name] = time.monotonic()
        elif name in self.resting:
            self.on_call(name)
        return self.get(name)

    @property
    def only(self) -> str | None:
        """The name of the one model that there is, in memory or not; None where there are several.

        Not the one that is left when another is away: that one may be meant.
        """
        known = {*self._models, *self.unloaded, *self.resting, *self.problems}
        return known.pop() if len(known) == 1 else None

    def _only(self) -> Resident:
        if self.only in self._models:
            return self._models[self.only]
        if self._models:
            raise UnknownModel(f"Say which model, as ?model=NAME{self._there_is()}.")
        raise NotReady(self.missing() or NO_MODEL)

    def why_not(self, name: str) -> str | None:
        """Why a model is not in memory; None for one that is, and for one that nobody knows."""
        away = (self.problems, self.unloaded, self.resting)
        return next((found[name] for found in away if name in found), None)

    def problem(self, name: str) -> str | None:
        """Why a model is not in memory, or why another version of it is than should be."""
        return self.why_not(name) or self.held.get(name) or self.standing_in.get(name)

    def known(self) -> list[str]:
        """The models in memory, and those that are not for a reason."""
        return sorted({*self._models, *self.problems, *self.unloaded, *self.resting})

    def missing(self) -> str | None:
        """What keeps the server from being ready, None when nothing does.

        A model that was unloaded, rests or never judged is not missed, unless nothing else is left.
        """
        if self.problems:
            return " ".join(self.problems.values())
        if self._models:
            return None
        others = (self.unloaded, self.resting, self.held)
        return " ".join(why for reasons in others for why in reasons.values()) or NO_MODEL

    def stand_in(self, model: Resident, reason: str) -> None:
        """Let a version answer in the place of another one, which `reason` names."""
        self.put(model)
        self.standing_in[model.name] = reason

    def _there_is(self) -> str:
        known = sorted({*self._models, *self.unloaded, *self.resting})
        names = ", ".join(repr(name) for name in known)
        return f"; there is {names}" if names else "; there is none"

    @contextmanager
    def use(self, name: str | Resident | None = None) -> Iterator[Resident]:
        """The resident version, which is not closed before this block ends.

        Whoever holds one may use that one again, live or not: all images of a request get verdicts
        of the same version.
        """
        model = name if isinstance(name, Resident) else self.call(name)
        self._users[model] = self._users.get(model, 0) + 1
        try:
            yield model
        finally:
            self._users[model] -= 1
            if self._users[model] == 0:
                del self._users[model]
                if model in self._unused:
                    self._unused.pop(model).set()

    def put(self, model: Resident) -> Resident | None:
        """Let this version answer from now on; returns the one that did before."""
        before = self._away(model.name)
        self._models[model.name] = model
        if before is None:
            self._since[model.name] = time.monotonic()
        return before

    def take(self, name: str, reason: str) -> Resident | None:
        """Let nothing answer for a name, and say why; returns the version that did."""
        before = self._away(name)
        self.problems[name] = reason
        return before

    def put_away(self, name: str, reason: str) -> Resident | None:
        """The same, because a person wants it so: that is no problem."""
        before = self._away(name)
        self.unloaded[name] = reason
        return before

    def put_to_rest(self, name: str, reason: str) -> Resident | None:
        """The same, because another model needs the memory: the next part brings it back."""
        before = self._away(name)
        self.resting[name] = reason
        return before

    def _away(self, name: str) -> Resident | None:
        """The version that answered until now; nothing does, and there is no reason yet."""
        for reasons in (self.problems, self.unloaded, self.resting, self.held, self.standing_in):
            reasons.pop(name, None)
        return self._models.pop(name, None)

    def idle_first(self) -> list[str]:
        """The models in memory: first the one that got no part for longest, since it came in."""
        return sorted(
            self._models, key=lambda name: max(self._called.get(name, 0.0), self._since[name])
        )

    def in_memory_s(self, name: str) -> float:
        """For how long a model has been there, in whatever versions."""
        return time.monotonic() - self._since[name]

    async def until_unused(self, model: Resident) -> None:
        """Wait for the last request that a replaced version has to answer."""
        if model in self._users:
            await self._unused.setdefault(model, asyncio.Event()).wait()

    def all(self) -> list[Resident]:
        return [self._models[name] for name in self.names()]


NO_MODEL = (
    "There is no model yet: kensa learn FOLDER makes one of pictures of good parts, as do POST"
    " /datasets/CATEGORY/train and POST /retrain; POST /models takes one in, and KENSA_MODEL_DIR"
    " names one that convtrt.py made."
)


def held_back(name: str, version: str, reasons: list[str]) -> str:
    """A sentence for a model none of whose versions has judged yet, because the gate holds them."""
    return (
        f"No version of {name} judges yet: {version} is held."
        f" {' '.join(reasons) or 'Its gate record gives no reason.'}"
        f" POST /models/{name}/versions/{version}/activate lets it judge."
    )


def in_its_place(name: str, version: str, should: str | None, why: str) -> str:
    """A sentence for a model that is served from `version`, because another one cannot be.

    Args:
        should: the version that is live; None where nobody knows which one is.
        why: what is wrong with it, as a clause.
    """
    place = f"in place of {should}, which {why}" if should else f"because {why}"
    return (
        f"{name} is served from {version} {place}."
        f" POST /models/{name}/versions/{version}/activate keeps it so; or train or activate"
        " another one."
    )


def nobody_instead(name: str, should: str | None, why: str, tried: dict[str, str]) -> str:
    """A sentence for a model whose live version cannot be used, and there is none in its place.

    Args:
        tried: other versions that might have stood in -> why they cannot either.
    """
    what = f"its live version {should} {why}" if should else why
    others = "".join(f"; {version} {reason}" for version, reason in tried.items())
    return (
        f"{name} is not served: {what}{others}. No other version was let through by the gate or a"
        f" person. See GET /models/{name}; POST /models/{name}/versions/VERSION/activate makes one"
        " live."
    )
