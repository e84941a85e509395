"""What the doctor found: facts, models and whether they fit, and what is wrong or worth knowing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from engines.machine.memory import MIB

Facts = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Finding:
    """What is wrong and must be mended, or is only worth knowing."""

    level: Literal["wrong", "note"]
    what: str
    do: str = ""  # what to type, or else to do


def wrong(what: str, do: str = "") -> Finding:
    return Finding("wrong", what, do)


def note(what: str, do: str = "") -> Finding:
    return Finding("note", what, do)


@dataclass(frozen=True)
class Fit:
    """A model of the store, and whether this machine can serve it."""

    name: str
    version: str
    kind: str
    plan: str  # good, stale, none, or why it does not matter
    needs_mib: int
    fits: bool | None  # None where a server runs, whose models are in memory already


@dataclass
class Report:
    """All that was found."""

    facts: Facts = field(default_factory=dict)  # section -> name -> value
    models: list[Fit] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(one.level == "wrong" for one in self.findings)


def free_of_total(free: int | None, total: int | None) -> str:
    if free is None or total is None:
        return "unknown"
    return f"{free // MIB:,} of {total // MIB:,} MiB free"
