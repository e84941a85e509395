"""`Kensa`: the same for programs without an event loop."""

from __future__ import annotations

import asyncio
import os
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from kensa_client.answers import (
    Challenge,
    Challenges,
    Decision,
    Job,
    Label,
    Model,
    Preview,
    Split,
    Upload,
    WholeDecision,
)
from kensa_client.asking import DecisionFilter
from kensa_client.asynchronous import NO_LIMIT, AsyncKensa
from kensa_client.verdict import PartVerdict, SafeVerdict, Verdict

Answer = TypeVar("Answer")


class Kensa:
    """As `AsyncKensa`, which says what each method does; any number of threads may share one.

    It works in an event loop in a thread of its own: only so does a deadline hold whatever happens,
    also while a name is looked up, or where a network takes a picture a byte at a time.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        deadline_s: float = 5.0,
        retries: int = 2,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._make: Callable[[], AsyncKensa] = lambda: AsyncKensa(
            url, key, deadline_s=deadline_s, retries=retries, tls=tls
        )
        self._start()

    def __enter__(self) -> Kensa:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections, and end its thread."""
        if self._loop.is_closed():
            return
        self._run(AsyncKensa.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def inspect(self, image: bytes | Path, part: str = "", model: str | None = None) -> Verdict:
        return self._run(lambda kensa: kensa.inspect(image, part, model))

    def inspect_safely(
        self, image: bytes | Path, part: str = "", model: str | None = None
    ) -> SafeVerdict:
        return self._run(lambda kensa: kensa.inspect_safely(image, part, model))

    def inspect_view(
        self,
        image: bytes | Path,
        part: str,
        view: str,
        of: int | Sequence[str],
        model: str | None = None,
        *,
        line: str | None = None,
        part_deadline_s: float | None = None,
    ) -> PartVerdict:
        return self._run(lambda kensa: kensa.inspect_view(
            image, part, view, of, model, line=line, part_deadline_s=part_deadline_s
        ))  # fmt: skip

    def part_verdict(
        self, part: str, *, line: str | None = None, wait_s: float = 0.0
    ) -> PartVerdict:
        return self._run(lambda kensa: kensa.part_verdict(part, line=line, wait_s=wait_s))

    def decisions(self, wanted: DecisionFilter = NO_LIMIT) -> Iterator[Decision]:
        async def begun(kensa: AsyncKensa) -> AsyncIterator[Decision]:
            return kensa.decisions(wanted)

        async def following(_: AsyncKensa) -> Decision | None:
            return await anext(pages, None)

        pages = self._run(begun)
        while (one := self._run(following)) is not None:
            yield one

    def decision(self, id: str) -> WholeDecision:  # noqa: A002
        return self._run(lambda kensa: kensa.decision(id))

    def label(
        self,
        id: str,  # noqa: A002
        label: Label,
        defect: str = "",
        reason: str = "",
    ) -> WholeDecision:
        return self._run(lambda kensa: kensa.label(id, label, defect, reason))

    def preview(
        self,
        model: str,
        *,
        raw: float | None = None,
        threshold: float | None = None,
        false_rejects: float | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Preview:
        return self._run(lambda kensa: kensa.preview(
            model, raw=raw, threshold=threshold, false_rejects=false_rejects, since=since,
            until=until,
        ))  # fmt: skip

    def challenges(self, model: str) -> Challenges:
        return self._run(lambda kensa: kensa.challenges(model))

    def put_challenges(
        self,
        model: str,
        good: Sequence[Path],
        bad: Sequence[Path],
        reason: str,
        *,
        at_shifts: bool = False,
    ) -> Challenges:
        return self._run(
            lambda kensa: kensa.put_challenges(model, good, bad, reason, at_shifts=at_shifts)
        )

    def challenge(self, model: str, deadline_s: float = 600.0) -> Challenge:
        return self._run(lambda kensa: kensa.challenge(model, deadline_s))

    def release(self, model: str, reason: str) -> Challenges:
        return self._run(lambda kensa: kensa.release(model, reason))

    def models(self) -> list[Model]:
        return self._run(lambda kensa: kensa.models())

    def upload(
        self, category: str, split: Split, files: Sequence[Path], deadline_s: float = 3600.0
    ) -> Upload:
        return self._run(lambda kensa: kensa.upload(category, split, files, deadline_s))

    def retrain(self, model: str, category: str, **more: Any) -> Job:
        return self._run(lambda kensa: kensa.retrain(model, category, **more))

    def job(self, id: str) -> Job:  # noqa: A002
        return self._run(lambda kensa: kensa.job(id))

    def wait(self, id: str, deadline_s: float = 3600.0) -> Job:  # noqa: A002
        return self._run(lambda kensa: kensa.wait(id, deadline_s))

    def _start(self) -> None:
        self._process = os.getpid()
        self._async = self._make()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="kensa_client", daemon=True
        )
        self._thread.start()

    def _run(self, call: Callable[[AsyncKensa], Coroutine[Any, Any, Answer]]) -> Answer:
        if self._process != os.getpid():  # threads do not come along with a fork
            self._start()
        if self._loop.is_closed():
            raise RuntimeError("This Kensa was closed.")
        future = asyncio.run_coroutine_threadsafe(call(self._async), self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C: nobody waits for it any more
            future.cancel()
            raise
