"""`AsyncKensa`: asks, and asks again as long as the deadline allows."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import quote

import httpx

from kensa_client.answers import (
    Challenge,
    Challenges,
    Decision,
    Decisions,
    Job,
    Label,
    Model,
    Models,
    Preview,
    Split,
    Upload,
    WholeDecision,
)
from kensa_client.asking import Asked, DecisionFilter, as_text, note_answer, pause_before_next
from kensa_client.errors import KensaError, Try
from kensa_client.verdict import PartVerdict, SafeVerdict, Verdict, read_part, read_verdict

IDLE_S = 60.0  # an idle connection is kept for; the server closes it after 75
PAGE = 500  # decisions at once
ENDED = ("succeeded", "failed", "cancelled", "interrupted")
LOOK_EVERY_S = 0.5  # at a job
NO_LIMIT: DecisionFilter = DecisionFilter()

Answer = TypeVar("Answer")
logger = logging.getLogger("kensa_client")


class AsyncKensa:
    """A Kensa server. Close it in the end, or use it in `async with`.

    Args:
        url: such as http://kensa-3.local:8000.
        key: an API key, where the server wants one.
        deadline_s: how long an inspection may take, all its tries together.
        retries: how often to ask again, after the first time.
        tls: for https with a certificate of your own.

    Proxies that the environment names are not used: a line's parts must not depend on them.
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
        if not deadline_s > 0 or retries < 0:
            raise ValueError("deadline_s must be above 0, and retries 0 or more")
        if httpx.URL(url).scheme not in ("http", "https"):
            raise ValueError(f"{url!r} must begin with http:// or https://")
        self.deadline_s = deadline_s
        self.retries = retries
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(keepalive_expiry=IDLE_S),
            verify=tls or url.startswith("https"),
            trust_env=False,
        )

    async def __aenter__(self) -> AsyncKensa:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close its connections."""
        await self._client.aclose()

    # Inspecting

    async def inspect(
        self, image: bytes | Path, part: str = "", model: str | None = None
    ) -> Verdict:
        """The verdict on a part, by a JPEG, PNG, BMP or TIFF image of it.

        With `part`, a picture that is sent again because no answer came is counted once. Without,
        the server cannot know that it is the same part: it may count and record it twice.

        Raises:
            KensaRefused: the picture is damaged, there is no such model ...
            NoVerdict: the deadline has passed, or the server is away or overloaded.
            OSError: the file cannot be read.
        """
        query = {"part": part or None, "model": model}
        asked = Asked("POST", "/infer", self.deadline_s, query=query, picture=image, inspects=True)
        return await self._ask(asked, lambda body, id_: read_verdict(body, id_, part, model))

    async def inspect_safely(
        self, image: bytes | Path, part: str = "", model: str | None = None
    ) -> SafeVerdict:
        """As `inspect`, and anything but a Normal verdict within the deadline is not ok.

        Whatever is wrong with the server, the network or the picture is logged, and not raised.
        """
        try:
            verdict = await self.inspect(image, part, model)
        except (KensaError, OSError, ValueError) as error:  # such as half a character in `part`
            logger.warning("No verdict on part %r: %s", part, error)
            return SafeVerdict(False, str(error), None)
        if verdict.ok:
            return SafeVerdict(True, "", verdict)
        reason = f"Anomaly: the score is {verdict.score:.4f}, the limit {verdict.threshold:.4f}."
        if verdict.unusable:
            reason = f"The picture is not usable: {verdict.unusable}."
        elif verdict.hint and verdict.raw_score <= verdict.raw_threshold:  # not what the model says
            reason = verdict.hint
        return SafeVerdict(False, reason, verdict)

    async def inspect_view(
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
        """The verdict on one view of a part, and on the part once it has all of them.

        Args:
            of: how many views the part has, or their names.
            line: which of several lines that call their parts alike, and have the same key.
            part_deadline_s: how long the part waits for its views, from the first one on;
                `deadline_s`, which is that of this call, if left out.

        Raises:
            KensaRefused, NoVerdict, OSError: as `inspect`; `late_view` where the part was decided.
        """
        query: dict[str, Any] = {"of": of if isinstance(of, int) else ",".join(of),
                                 "model": model, "line": line}  # fmt: skip
        if part_deadline_s is not None:
            query["deadline_ms"] = max(1, int(part_deadline_s * 1000))
        asked = Asked("POST", f"/parts/{_quoted(part)}/views/{_quoted(view)}", self.deadline_s,
                      query=query, picture=image, inspects=True, part=part)  # fmt: skip
        return await self._ask(asked, lambda body, id_: read_part(body, part, (id_, view, model)))

    async def part_verdict(
        self, part: str, *, line: str | None = None, wait_s: float = 0.0
    ) -> PartVerdict:
        """What is known of a part of several views: once it is decided, or after `wait_s`.

        Raises:
            KensaRefused: no view of it came lately.
            NoAnswer: the server is away.
        """
        query = {"line": line, "wait_ms": int(wait_s * 1000)}
        asked = Asked("GET", f"/parts/{_quoted(part)}/verdict", wait_s + self.deadline_s,
                      query=query, part=part)  # fmt: skip
        return await self._ask(asked, lambda body, _: read_part(body, part))

    # The record

    async def decisions(self, wanted: DecisionFilter = NO_LIMIT) -> AsyncIterator[Decision]:
        """All that the filter finds, newest first; a page is fetched when it is needed."""
        before: int | None = None
        while True:
            query = {**wanted.query(), "limit": PAGE, "before": before}
            page = await self._json(Decisions, Asked("GET", "/decisions", query=query))
            for one in page["decisions"]:
                yield one
            if (before := page["next"]) is None:
                return

    async def decision(self, id: str) -> WholeDecision:  # noqa: A002 (its name in the answers)
        """What was decided, and who marked it how."""
        return await self._json(WholeDecision, Asked("GET", f"/decisions/{_quoted(id)}"))

    async def label(
        self,
        id: str,  # noqa: A002
        label: Label,
        defect: str = "",
        reason: str = "",
    ) -> WholeDecision:
        """Say what it really was."""
        body = {"label": label, "defect": defect, "reason": reason}
        asked = Asked("POST", f"/decisions/{_quoted(id)}/label", json=body, may_repeat=False)
        return await self._json(WholeDecision, asked)

    async def preview(
        self,
        model: str,
        *,
        raw: float | None = None,
        threshold: float | None = None,
        false_rejects: float | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Preview:
        """What another threshold would have said; one of raw, threshold and false_rejects."""
        query = {"raw": raw, "threshold": threshold, "false_rejects": false_rejects,
                 "since": as_text(since), "until": as_text(until)}  # fmt: skip
        path = f"/models/{_quoted(model)}/threshold/preview"
        return await self._json(Preview, Asked("GET", path, query=query))

    # Known pictures

    async def challenges(self, model: str) -> Challenges:
        """What a model is challenged with, and whether it is released."""
        return await self._json(Challenges, Asked("GET", f"/models/{_quoted(model)}/challenges"))

    async def put_challenges(
        self,
        model: str,
        good: Sequence[Path],
        bad: Sequence[Path],
        reason: str,
        *,
        at_shifts: bool = False,
    ) -> Challenges:
        """Name all pictures that a model is challenged with from now on."""
        files = [*(("good", path) for path in good), *(("bad", path) for path in bad)]
        fields = {"reason": reason, "at_shifts": str(at_shifts).lower()}
        asked = Asked("PUT", f"/models/{_quoted(model)}/challenges", named_files=files,
                      fields=fields)  # fmt: skip
        return await self._json(Challenges, asked)

    async def challenge(self, model: str, deadline_s: float = 600.0) -> Challenge:
        """Let a model judge its known pictures: look at `passed`."""
        path = f"/models/{_quoted(model)}/challenge"
        return await self._json(Challenge, Asked("POST", path, deadline_s))

    async def release(self, model: str, reason: str) -> Challenges:
        """Let parts pass though a challenge failed."""
        path = f"/models/{_quoted(model)}/release"
        asked = Asked("POST", path, json={"reason": reason}, may_repeat=False)
        return await self._json(Challenges, asked)

    # Learning

    async def models(self) -> list[Model]:
        """All models, each with its newest versions."""
        return (await self._json(Models, Asked("GET", "/models")))["models"]

    async def upload(
        self, category: str, split: Split, files: Sequence[Path], deadline_s: float = 3600.0
    ) -> Upload:
        """Send training images, or zips of them. All are open at once: some hundreds at a time."""
        path = f"/datasets/{_quoted(category)}/{split}"
        return await self._json(Upload, Asked("POST", path, deadline_s, files=files))

    async def retrain(self, model: str, category: str, **more: Any) -> Job:
        """Begin to learn; `more` are further keys of POST /retrain, which the server checks."""
        body = {"model": model, "category": category, **more}
        return await self._json(Job, Asked("POST", "/retrain", json=body, may_repeat=False))

    async def job(self, id: str) -> Job:  # noqa: A002
        """How a job is."""
        return await self._json(Job, Asked("GET", f"/jobs/{_quoted(id)}"))

    async def wait(self, id: str, deadline_s: float = 3600.0) -> Job:  # noqa: A002
        """A job once it has ended, however: look at its state.

        Raises:
            NoAnswer: it has not by then, or the server does not say.
        """
        began = time.monotonic()
        while (job := await self.job(id))["state"] not in ENDED:
            if time.monotonic() - began + LOOK_EVERY_S > deadline_s:
                last = Try(id="", problem=f"it is {job['state']}")
                raise Asked("GET", f"/jobs/{id}").failed(deadline_s, [last])
            await asyncio.sleep(LOOK_EVERY_S)
        return job

    # Asking

    async def _json(self, kind: type[Answer], asked: Asked) -> Answer:
        """The answer as it was sent, which is a TypedDict."""
        return await self._ask(asked, lambda body, _: cast(Answer, _object(body)))

    async def _ask(self, asked: Asked, read: Callable[[bytes, str], Answer]) -> Answer:
        """An answer within the deadline, whatever the server, the network or a name server do."""
        began = time.monotonic()
        tries: list[Try] = []

        def failed() -> KensaError:
            return asked.failed(time.monotonic() - began, tries)

        try:
            body = await asyncio.wait_for(
                self._until_answered(asked, began + asked.deadline_s, tries), asked.deadline_s
            )
        except asyncio.TimeoutError:
            raise failed() from None
        if body is None:
            raise failed()
        try:
            answer = read(body, tries[-1].id)
        except (ValueError, RecursionError) as error:
            tries[-1].problem = f"the answer cannot be used: {error}"
            raise failed() from None
        if time.monotonic() > began + asked.deadline_s:
            raise failed()
        return answer

    async def _until_answered(self, asked: Asked, until: float, tries: list[Try]) -> bytes | None:
        """The body of a success; None: no try brought one."""
        if isinstance(asked.picture, Path):  # in a thread: it may lie on another machine
            asked = replace(asked, picture=await asyncio.to_thread(asked.picture.read_bytes))
        while True:
            one = Try(uuid.uuid4().hex)
            tries.append(one)
            body = await self._send(asked, one, until - time.monotonic())
            if body is not None:
                return body
            pause = pause_before_next(
                tries, may_repeat=asked.may_repeat, retries=self.retries,
                left_s=until - time.monotonic(),
            )  # fmt: skip
            if pause is None:
                return None
            logger.info("Asking %s again in %.2f s: %s", asked.path, pause, one.problem)
            await asyncio.sleep(pause)

    async def _send(self, asked: Asked, one: Try, left_s: float) -> bytes | None:
        """One try: the body of a success, or None and what `one` says then."""
        seen: set[str] = set()

        async def trace(event: str, _: dict[str, Any]) -> None:
            seen.add(event)

        with ExitStack() as stack:
            parts = [*(("file", path) for path in asked.files), *asked.named_files]
            files = [
                (name, (path.name, stack.enter_context(path.open("rb")))) for name, path in parts
            ]
            try:
                answer = await self._client.request(
                    asked.method, asked.path, params=asked.query_with(left_s),
                    content=cast("bytes | None", asked.picture), json=asked.json,
                    files=files or None, data=asked.fields or None,
                    headers=_headers(asked, one), timeout=max(left_s, 0.001),
                    extensions={"trace": trace},
                )  # fmt: skip
            except httpx.RequestError as error:
                one.problem = f"{type(error).__name__}: {error}"
                is_new = "connection.connect_tcp.started" in seen
                was_sent = "http11.send_request_headers.started" in seen
                was_answered = "http11.receive_response_headers.complete" in seen
                was_cut = isinstance(error, (httpx.NetworkError, httpx.RemoteProtocolError))
                one.did_nothing = not was_sent
                one.was_idle = was_sent and was_cut and not is_new and not was_answered
                return None
        if answer.is_success:
            return answer.content
        note_answer(one, answer)
        return None


def _headers(asked: Asked, one: Try) -> dict[str, str]:
    kind = {"Content-Type": "application/octet-stream"} if asked.picture is not None else {}
    return {"Accept": "application/json", "X-Request-ID": one.id, **kind}


def _object(body: bytes) -> Any:
    found = json.loads(body)
    if not isinstance(found, dict):
        raise ValueError("it is no object")
    return found


def _quoted(name: str) -> str:
    return quote(name, safe="")
