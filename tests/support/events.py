"""Server-sent events, as a test reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx


class Event(NamedTuple):
    """An event of a stream."""

    kind: str
    id: str
    data: Any


class Stream:
    """A stream of events that is open."""

    def __init__(self, answer: httpx.Response) -> None:
        self.answer = answer
        self._events = self._read(answer.iter_lines())

    def next(self, kind: str = "decision") -> Any:
        """The data of the next event of a kind; others are passed over."""
        return next(one.data for one in self._events if one.kind == kind)

    def decisions(self, count: int) -> list[Any]:
        """The next so many."""
        return [self.next() for _ in range(count)]

    def rest(self) -> list[Event]:
        """All until it ends."""
        return list(self._events)

    @staticmethod
    def _read(lines: Iterator[str]) -> Iterator[Event]:
        known: dict[str, str] = {}
        for line in lines:
            if line:
                name, _, value = line.partition(": ")
                known[name] = value
            elif "data" in known:
                data = json.loads(known["data"])
                yield Event(known.get("event", ""), known.get("id", ""), data)
                known = {}


@contextmanager
def watching(url: str, *, timeout: float = 20, **asked: Any) -> Iterator[Stream]:
    """Watch the line of a server."""
    with (
        httpx.Client(base_url=url, timeout=timeout, trust_env=False) as client,
        client.stream("GET", "/line/events", **asked) as answer,
    ):
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield Stream(answer)
