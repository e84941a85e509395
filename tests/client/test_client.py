"""Claims about `kensa_client`, for both of its clients, with a real server and a hostile one."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.routes import challenges, datasets, decisions, jobs, models, threshold_preview
from kensa_client import (
    AsyncKensa,
    DecisionFilter,
    Kensa,
    KensaRefused,
    NoAnswer,
    NoVerdict,
    SafeVerdict,
    Try,
    answers,
    asynchronous,
)
from kensa_client.asking import pause_before_next
from kensa_client.verdict import read_part
from support.hostile import (
    Step,
    closing,
    garbage,
    half,
    hostile,
    late,
    passing,
    saying,
    swallowing,
    trickling,
    verdict,
)
from support.line import NAME, Line, line
from support.project import ROOT

CATEGORY = "sample_bracket"
SLACK_S = 0.5  # of a busy machine
PICTURE = b"a picture"
OVERLOADED = {"error": "64 parts wait for their verdict already.", "code": "overloaded"}


class Caller:
    """Either client, called in the same way; an iterator comes back as a list."""

    def __init__(self, is_async: bool, url: str, **settings: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = (AsyncKensa if is_async else Kensa)(url, **settings)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            found = getattr(self._client, name)(*arguments, **named)
            if hasattr(found, "__aiter__"):
                return self._loop.run_until_complete(_all(found))
            if hasattr(found, "__next__"):
                return list(found)
            if asyncio.iscoroutine(found):
                return self._loop.run_until_complete(found)
            return found

        return call

    def end(self) -> None:
        self.close()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()


async def _all(found: Any) -> list[Any]:
    return [one async for one in found]


@pytest.fixture(params=[False, True], ids=["Kensa", "AsyncKensa"])
def client(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    made: list[Caller] = []

    def make(url: str, **settings: Any) -> Caller:
        made.append(Caller(request.param, url, **settings))
        return made[-1]

    yield make
    for one in made:
        one.end()


@pytest.fixture(scope="module")
def running(kensa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    with line(tmp_path_factory.mktemp("client"), kensa_model) as found:
        yield found


@pytest.fixture(scope="module")
def good(sample_data: Path) -> Path:
    return sample_data / "test" / CATEGORY / "normal" / "0000.png"


@pytest.fixture(scope="module")
def bad(sample_data: Path) -> Path:
    return sample_data / "test" / CATEGORY / "anomaly" / "stain_00.png"


def unused_url() -> str:
    with hostile(closing) as gone:
        return gone.url


# ---- a real server -------------------------------------------------------------------------------


def test_a_part_of_several_views_is_true_only_where_all_of_them_are_normal(
    client: Any, running: Line, good: Path, bad: Path, request: pytest.FixtureRequest
) -> None:
    scores = [running.server.infer(path.read_bytes()).json()["raw_score"] for path in (good, bad)]
    body = {"raw": sum(scores) / 2, "reason": "as this test needs it"}
    assert running.server.client.put(f"/models/{NAME}/threshold", json=body).status_code == 200
    kensa, name = client(running.server.url), f"KB/検査 {request.node.name}"
    for last, ok in ((good, True), (bad, False)):
        part = f"{name} {ok}"
        first = kensa.inspect_view(good, part, "left", ["left", "top"], NAME)
        assert (first.decided, bool(first), first.missing) == (False, False, ("top",))
        found = kensa.inspect_view(last, part, "top", ["left", "top"])
        assert (found.decided, found.ok, bool(found), found.missing) == (True, ok, ok, ())
        assert found.view is not None
        assert (found.view.ok, found.view.part, found.decided_by is not None) == (ok, part, True)
        again = kensa.part_verdict(part)
        assert (again.ok, again.id, again.score, again.view) == (ok, first.id, found.score, None)
        kept = kensa.decision(first.id)
        assert kept["views"] is not None
        assert {one["view"] for one in kept["views"]["views"]} == {"left", "top"}


def test_a_part_that_lacks_a_view_is_not_true_and_who_waits_learns_why(
    client: Any, running: Line, good: Path, request: pytest.FixtureRequest
) -> None:
    kensa, part = client(running.server.url), f"lost {request.node.name}"
    kensa.inspect_view(good, part, "left", 2, line="A", part_deadline_s=2)
    found = kensa.part_verdict(part, line="A", wait_s=10)
    assert (found.decided, bool(found), found.verdict) == (True, False, "none")
    assert (found.missing, found.score) == (("?",), None)
    with pytest.raises(KensaRefused) as refused:
        kensa.inspect_view(good, part, "top", 2, line="A")
    assert refused.value.code == "late_view"


PART = {
    "id": "r1", "part": "P", "verdict": "normal", "is_anomalous": False, "missing": [],
    "score": 0.25, "threshold": 0.5, "decided_by": "left", "of": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"verdict": "fine"}, {"is_anomalous": True}, {"is_anomalous": None},
        {"verdict": "pending"}, {"missing": ["top"]}, {"missing": None}, {"part": "Q"},
        {"score": "0.25"}, {"id": None}, {"of": None},
    ],
)  # fmt: skip
def test_an_answer_about_a_part_that_contradicts_itself_is_none(changes: dict[str, Any]) -> None:
    assert read_part(json.dumps(PART).encode(), "P").ok
    with pytest.raises(ValueError, match=" is "):
        read_part(json.dumps({**PART, **changes}).encode(), "P")


def test_a_verdict_says_what_the_server_says(
    client: Any, running: Line, good: Path, bad: Path, request: pytest.FixtureRequest
) -> None:
    kensa, part = client(running.server.url), f"KB-2046/A 17 検査 {request.node.name}"
    for path in (good, bad):
        found = kensa.inspect(path, part, NAME)
        plain = running.server.infer(path.read_bytes()).json()
        assert found.ok is (not plain["is_anomalous"])
        assert bool(found) is found.ok
        for name in ("label", "raw_score", "score", "threshold", "raw_threshold"):
            assert getattr(found, name) == plain[name]
        assert (found.model, found.version) == (NAME, plain["model_version"])
        assert found.part == part
        assert found.timing.total_ms >= found.timing.infer_ms > 0
        assert kensa.decision(found.id)["part"] == part


def test_a_part_whose_answer_was_lost_is_asked_for_again_and_counted_once(
    client: Any, running: Line, bad: Path, request: pytest.FixtureRequest
) -> None:
    part = f"lost {request.node.name}"
    with hostile(swallowing(running.server.url), passing(running.server.url)) as between:
        found = client(between.url).inspect(bad.read_bytes(), part)
    first, second = (one.header("X-Request-ID") for one in between.requests)
    assert (found.id, found.repeat_of) == (second, first)
    kensa = client(running.server.url)
    assert [one["id"] for one in kensa.decisions(DecisionFilter(part=part))] == [first]


def test_without_a_part_a_lost_answer_may_count_twice(
    client: Any, running: Line, bad: Path
) -> None:
    with hostile(swallowing(running.server.url), passing(running.server.url)) as between:
        found = client(between.url).inspect(bad)
    assert found.repeat_of is None
    kensa = client(running.server.url)
    ids = [one.header("X-Request-ID") for one in between.requests]
    assert [kensa.decision(id_)["verdict"] for id_ in ids] == ["anomaly", "anomaly"]


def test_what_would_be_refused_again_is_not_sent_again(client: Any, running: Line) -> None:
    with hostile(passing(running.server.url)) as between:
        kensa = client(between.url)
        with pytest.raises(KensaRefused) as damaged:
            kensa.inspect(b"\x89PNG\r\n\x1a\n")
        with pytest.raises(KensaRefused) as unknown:
            kensa.inspect(PICTURE, model="bolt")
        assert len(between.requests) == 2
    assert (damaged.value.code, damaged.value.status) == ("bad_image", 400)
    assert (unknown.value.code, unknown.value.status) == ("unknown_model", 404)
    assert unknown.value.sentence.startswith("There is no model 'bolt'")


def test_decisions_come_page_by_page_and_marked_ones_are_left_out(
    client: Any, running: Line, bad: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asynchronous, "PAGE", 2)
    kensa, since = client(running.server.url), datetime.now(timezone.utc)
    ids = [kensa.inspect(bad.read_bytes() + bytes([n])).id for n in range(5)]
    wanted = DecisionFilter(verdict="anomaly", label="none", since=since)
    assert [one["id"] for one in kensa.decisions(wanted)] == ids[::-1]
    marked = kensa.label(ids[2], "defect", "stain", "Seen under the lamp.")
    assert (marked["label"], marked["defect"]) == ("defect", "stain")
    assert marked["history"][0]["reason"] == "Seen under the lamp."
    left = [one["id"] for one in kensa.decisions(wanted)]
    assert left == [id_ for id_ in reversed(ids) if id_ != ids[2]]
    assert list(kensa.decisions(DecisionFilter(until=since - timedelta(days=900)))) == []


def test_a_time_without_a_zone_is_not_guessed(client: Any, running: Line) -> None:
    with pytest.raises(ValueError, match="has no zone"):
        list(client(running.server.url).decisions(DecisionFilter(since=datetime(2026, 11, 29))))


def test_another_threshold_is_tried_on_what_came(client: Any, running: Line, bad: Path) -> None:
    kensa = client(running.server.url)
    kensa.inspect(bad)
    found = kensa.preview(NAME, threshold=1.0)
    assert found["rejected"] > found["would_reject"] == 0
    assert len(found["flips"]) == found["rejected"]
    (model,) = kensa.models()
    assert (model["name"], model["live"]) == (NAME, found["version"])


def test_pictures_and_zips_are_taken_and_a_damaged_one_is_named(
    client: Any, running: Line, good: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    category = "bolt-" + str(request.node.callspec.id)
    named, damaged, zipped = (tmp_path / name for name in ("検査 1.png", "cut.png", "more.zip"))
    named.write_bytes(good.read_bytes())
    damaged.write_bytes(good.read_bytes()[:999])
    with zipfile.ZipFile(zipped, "w") as more:
        more.write(good, "2.png")
    found = client(running.server.url).upload(category, "train", [named, damaged, zipped])
    assert sorted(found["added"]) == ["2.png", "検査 1.png"]
    assert [(one["name"], one["code"]) for one in found["refused"]] == [("cut.png", "bad_image")]


def test_known_pictures_close_a_line_and_a_person_or_a_challenge_that_passes_opens_it(
    client: Any, running: Line, good: Path, bad: Path
) -> None:
    kensa = client(running.server.url, retries=0)
    known = kensa.put_challenges(NAME, [bad], [good], "mixed up", at_shifts=False)
    assert [one["name"] for one in known["pictures"]] == ["good/stain_00.png", "bad/0000.png"]
    outcome = kensa.challenge(NAME)
    assert (outcome["passed"], outcome["right"], outcome["released"]) == (False, 0, False)
    with pytest.raises(KensaRefused) as refused:
        kensa.inspect(good)
    assert refused.value.code == "not_released"
    assert kensa.release(NAME, "They were mixed up.")["released"]
    assert kensa.inspect(good)
    with pytest.raises(KensaRefused, match="there is nothing to let through"):
        kensa.release(NAME, "Again.")
    kensa.put_challenges(NAME, [good], [bad], "put right")
    assert kensa.challenge(NAME)["passed"]
    assert kensa.challenges(NAME)["last"]["right"] == 2


def test_many_threads_may_share_a_client_and_each_gets_its_own_verdict(
    running: Line, good: Path, bad: Path
) -> None:
    pictures = {True: good.read_bytes(), False: bad.read_bytes()}
    with Kensa(running.server.url) as kensa:
        expected = {is_good: kensa.inspect(data).raw_score for is_good, data in pictures.items()}

        def ask(number: int) -> None:
            found = kensa.inspect(pictures[number % 2 == 0], f"thread {number}")
            assert (found.part, found.raw_score) == (f"thread {number}", expected[number % 2 == 0])

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, range(24)))


def test_a_training_is_queued_once_and_what_is_wrong_with_another_is_told(
    client: Any, running: Line, good: Path, request: pytest.FixtureRequest
) -> None:
    kensa, name = client(running.server.url), f"nut-{request.node.callspec.id}"
    with pytest.raises(KensaRefused, match=f"The category {name} has no training images"):
        kensa.retrain(name, name)
    kensa.upload(name, "train", [good])
    job = kensa.retrain(name, name, pretrained="untrained")
    assert (job["state"], job["request"]["pretrained"]) == ("queued", "untrained")
    with pytest.raises(KensaRefused) as second:
        kensa.retrain(name, name)
    assert (second.value.code, second.value.status) == ("conflict", 409)
    assert job["id"] in second.value.sentence
    with pytest.raises(NoAnswer, match="it is queued"):
        kensa.wait(job["id"], 0.2)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize(
    ("language", "shell", "in_time"),
    [("sh", ["sh", "-c"], {"--max-time 0.35": "--max-time 20", "=300": "=4000"}),
     ("python", [sys.executable, "-c"], {"deadline_s=0.3": "deadline_s=20"})],
)  # fmt: skip
def test_the_programs_of_the_page_stop_a_defect_and_what_got_no_verdict(
    running: Line, bad: Path, tmp_path: Path, language: str, shell: list[str],
    in_time: dict[str, str],
) -> None:  # fmt: skip
    part = (ROOT / "docs" / "http.md").read_text().split("## Notes for a PLC gateway")[1]
    (program,) = re.findall(rf"```{language}\n(.*?)```", part, re.DOTALL)
    for fast, slow in in_time.items():
        assert fast in program
        program = program.replace(fast, slow)

    def said(url: str) -> str:
        words = [*shell, program.replace("http://localhost:8000", url)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.stdout

    (tmp_path / "part.jpg").write_bytes(bad.read_bytes())
    assert re.match(r"stop \((NG|Anomaly)", said(running.server.url))
    assert said(unused_url()).startswith("stop (")
    with hostile(half) as server:
        assert said(server.url).startswith("stop (")
    body = {"reason": "as this test needs it", "threshold": 1.0}
    assert running.server.client.put(f"/models/{NAME}/threshold", json=body).status_code == 200
    (tmp_path / "part.jpg").write_bytes(bad.read_bytes() + b"2")  # else it is the same again
    try:
        assert said(running.server.url).startswith("pass")
    finally:
        assert running.server.client.post(f"/models/{NAME}/rollback").status_code == 200


# ---- what may go wrong on the way ---------------------------------------------------------------


@pytest.mark.parametrize("step", [closing, half, garbage], ids=lambda step: step.__name__)
def test_what_brought_no_answer_is_sent_again_with_the_same_part_and_picture(
    client: Any, step: Step
) -> None:
    with hostile(step, verdict()) as server:
        found = client(server.url, key="kensa_1").inspect_safely(PICTURE, "A 17")
    assert found
    assert found.verdict.part == "A 17"
    assert [one.query["part"] for one in server.requests] == ["A 17", "A 17"]
    assert [one.body for one in server.requests] == [PICTURE, PICTURE]
    assert {one.header("Authorization") for one in server.requests} == {"Bearer kensa_1"}
    assert len({one.header("X-Request-ID") for one in server.requests}) == 2


def test_after_so_many_tries_there_is_no_verdict_and_each_is_told(client: Any) -> None:
    with hostile(closing) as server:
        kensa = client(server.url, retries=2)
        with pytest.raises(NoVerdict) as error:
            kensa.inspect(PICTURE, "A 17")
    ids = [one.header("X-Request-ID") for one in server.requests]
    assert [one.id for one in error.value.tries] == ids
    assert len(ids) == 3
    assert "part 'A 17'" in str(error.value)
    assert all(one in str(error.value) for one in ids)


@pytest.mark.parametrize("step", [late(1.2), trickling], ids=["late", "trickling"])
def test_a_normal_verdict_after_the_deadline_is_none(client: Any, step: Step) -> None:
    with hostile(step) as server:
        began = time.monotonic()
        found = client(server.url, deadline_s=0.3).inspect_safely(PICTURE)
        assert time.monotonic() - began < 0.3 + SLACK_S
    assert not found
    assert found.verdict is None
    assert "No answer" in found.reason


def test_the_deadline_holds_where_the_network_takes_no_more_of_the_picture(client: Any) -> None:
    def deaf(connection: Any, _: Any) -> bool:
        raise AssertionError("nothing arrives whole")

    with hostile(deaf) as server:
        server.serve = lambda connection: time.sleep(2)  # type: ignore[method-assign]
        began = time.monotonic()
        assert not client(server.url, deadline_s=0.3).inspect_safely(bytes(30_000_000))
        assert time.monotonic() - began < 0.3 + SLACK_S


def test_the_deadline_holds_while_a_name_is_looked_up(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: time.sleep(1))
    kensa = client("http://kensa-3.local:8000", deadline_s=0.2)
    began = time.monotonic()
    with pytest.raises(NoVerdict):
        kensa.inspect(PICTURE)
    assert time.monotonic() - began < 0.2 + SLACK_S


def test_a_late_answer_is_never_taken_for_that_of_the_next_part(client: Any) -> None:
    with hostile(late(0.5), verdict(label="Anomaly", is_anomalous=True)) as server:
        kensa = client(server.url, deadline_s=0.25)
        assert kensa.inspect_safely(PICTURE, "1").verdict is None
        time.sleep(0.4)
        found = kensa.inspect_safely(PICTURE, "2")
    assert not found
    assert found.verdict.part == "2"
    assert found.reason == "Anomaly: the score is 0.2500, the limit 0.5000."


def test_an_overloaded_server_is_asked_again_when_it_says(client: Any) -> None:
    with hostile(saying(503, OVERLOADED, "Retry-After: 1"), verdict()) as server:
        assert client(server.url).inspect(PICTURE).ok
    first, second = (one.at for one in server.requests)
    assert 1 <= second - first < 1 + SLACK_S


def test_a_model_that_is_not_released_is_not_asked_again(client: Any) -> None:
    closed = {"error": "part is not released: POST ...", "code": "not_released"}
    with hostile(saying(503, closed, "Retry-After: 1"), verdict()) as server:
        found = client(server.url).inspect_safely(PICTURE)
    assert len(server.requests) == 1
    assert found.reason == "part is not released: POST ... (not_released, 503)"


def test_a_reject_that_the_model_did_not_make_has_the_servers_reason(client: Any) -> None:
    hint = "The model failed its challenge, so every part is NG."
    with hostile(verdict(label="Anomaly", is_anomalous=True, score=0.1, raw_score=0.1,
                         raw_threshold=0.5, hint=hint)) as server:  # fmt: skip
        found = client(server.url).inspect_safely(PICTURE)
    assert not found
    assert found.reason == hint


def test_what_would_take_longer_than_is_left_is_not_waited_for(client: Any) -> None:
    with hostile(saying(503, OVERLOADED, "Retry-After: 2")) as server:
        began = time.monotonic()
        with pytest.raises(NoVerdict, match="64 parts wait") as error:
            client(server.url, deadline_s=1.5).inspect(PICTURE)
        assert time.monotonic() - began < SLACK_S
    assert [one.code for one in error.value.tries] == ["overloaded"]


def test_each_try_tells_the_server_what_is_left_of_the_one_deadline(client: Any) -> None:
    wait = saying(503, OVERLOADED, "Retry-After: 0")

    def slow(connection: Any, request: Any) -> bool:
        time.sleep(0.2)
        return wait(connection, request)

    with hostile(slow, slow, verdict()) as server:
        assert client(server.url, deadline_s=2).inspect(PICTURE)
    first, second, third = (int(one.query["deadline_ms"]) for one in server.requests)
    assert 1900 < first <= 2000
    assert second <= first - 200
    assert third <= second - 200


def test_a_connection_that_was_closed_while_idle_is_no_failed_try(client: Any) -> None:
    with hostile(verdict(), closing, verdict()) as server:
        kensa = client(server.url, retries=0)
        assert kensa.inspect(PICTURE)
        assert kensa.inspect(PICTURE)  # the second request is closed; the third is another one
    assert len(server.requests) == 3
    assert server.requests[2].at - server.requests[1].at < 0.05 + SLACK_S


def test_a_server_that_is_away_is_named_in_time(client: Any) -> None:
    kensa = client(unused_url(), deadline_s=1, retries=1)
    with pytest.raises(NoVerdict) as error:
        kensa.inspect(PICTURE)
    assert [one.did_nothing for one in error.value.tries] == [True, True]
    assert "ConnectError" in str(error.value)
    assert not kensa.inspect_safely(PICTURE)


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "of-another"}, {"part": "of another"}, {"model_name": "another"},
        {"label": "Normal", "is_anomalous": True}, {"label": "OK"}, {"is_anomalous": None},
        {"is_anomalous": 0}, {"score": float("nan")}, {"raw_score": "1.25"}, {"threshold": None},
        {"score": 10**400}, {"timing": None}, {"model_version": None},
    ],
    ids=str,
)  # fmt: skip
def test_an_answer_that_is_not_as_it_must_be_passes_no_part(
    client: Any, changes: dict[str, Any]
) -> None:
    with hostile(verdict(**changes)) as server:
        found = client(server.url).inspect_safely(PICTURE, "A 17", NAME)
    assert found == SafeVerdict(False, found.reason, None)
    assert "the answer cannot be used" in found.reason


@pytest.mark.parametrize("body", ["[]", "[" * 100_000, "", "OK 0.1\n", "\ufffe"])
@pytest.mark.parametrize("status", [200, 302, 500])
def test_what_is_not_kensas_passes_no_part(client: Any, status: int, body: str) -> None:
    def step(connection: Any, _: Any) -> bool:
        data = body.encode()
        connection.sendall(b"HTTP/1.1 %d No\r\nContent-Length: %d\r\n\r\n" % (status, len(data)))
        connection.sendall(data)
        return False

    with hostile(step) as server:
        found = client(server.url).inspect_safely(PICTURE)
    assert not found
    assert found.reason


def test_a_picture_or_a_part_that_cannot_be_sent_passes_no_part(
    client: Any, tmp_path: Path
) -> None:
    with hostile(verdict()) as server:
        kensa = client(server.url)
        assert not kensa.inspect_safely(tmp_path / "gone.png")
        assert not kensa.inspect_safely(PICTURE, "half a character: \ud800")
        with pytest.raises(FileNotFoundError):
            kensa.inspect(tmp_path / "gone.png")
    assert not server.requests


def test_a_training_whose_answer_was_lost_is_not_begun_twice(client: Any) -> None:
    with hostile(closing) as server:
        with pytest.raises(NoAnswer):
            client(server.url).retrain("bolt", "bolt")
        assert len(server.requests) == 1


def test_a_job_is_looked_at_until_it_ends(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asynchronous, "LOOK_EVERY_S", 0.05)
    under_way, ended = ({"id": "retrain-1", "state": one} for one in ("running", "failed"))
    with hostile(*3 * [saying(200, under_way)], saying(200, ended)) as server:
        assert client(server.url).wait("retrain-1")["state"] == "failed"
        assert len(server.requests) == 4
    with hostile(saying(200, under_way)) as server, pytest.raises(NoAnswer, match="it is running"):
        client(server.url).wait("retrain-1", 0.2)


def test_a_proxy_of_the_environment_gets_no_part(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, unused_url())
    with hostile(verdict()) as server:
        assert client(server.url).inspect(PICTURE)


def test_a_process_that_was_forked_asks_by_itself() -> None:
    program = """
import os, sys
from kensa_client import Kensa
kensa = Kensa(sys.argv[1])
assert kensa.inspect_safely(b"a picture")
child = os.fork()
if child == 0:
    os._exit(0 if kensa.inspect_safely(b"a picture") else 1)
assert os.waitpid(child, 0)[1] == 0
assert kensa.inspect_safely(b"a picture")
kensa.close()
"""
    with hostile(verdict()) as server:
        done = subprocess.run(
            [sys.executable, "-c", program, server.url], cwd=ROOT, capture_output=True, timeout=30
        )
    assert done.returncode == 0, done.stderr.decode()


def test_a_client_that_was_closed_says_so_and_has_left_no_thread() -> None:
    with hostile(verdict()) as server:
        before = threading.active_count()
        kensa = Kensa(server.url)
        kensa.close()
        kensa.close()
        assert threading.active_count() <= before
        with pytest.raises(RuntimeError, match="was closed"):
            kensa.inspect_safely(PICTURE)


@pytest.mark.parametrize(
    ("url", "settings"),
    [("kensa-3.local:8000", {}), ("http://kensa", {"deadline_s": 0.0}),
     ("http://kensa", {"retries": -1})],
)  # fmt: skip
def test_what_cannot_work_is_said_when_it_is_made(
    client: Any, url: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"http://|deadline_s"):
        client(url, **settings)


# ---- without a server ----------------------------------------------------------------------------

LOST = Try("1", problem="cut")
AWAY = Try("2", did_nothing=True)
FULL = Try("3", did_nothing=True, retry_after_s=2.0)
IDLE = Try("4", was_idle=True)


@pytest.mark.parametrize(
    ("tries", "may_repeat", "left_s", "pause"),
    [
        ([LOST], True, 5.0, 0.05), ([LOST, LOST], True, 5.0, 0.1), ([LOST] * 3, True, 5.0, None),
        ([LOST], True, 0.04, None), ([LOST], False, 5.0, None), ([AWAY], False, 5.0, 0.05),
        ([FULL], True, 2.1, 2.0), ([FULL], True, 1.9, None), ([FULL], False, 5.0, 2.0),
        ([IDLE], True, 5.0, 0.0), ([IDLE] * 9, True, 0.1, 0.0), ([IDLE], False, 5.0, None),
        ([IDLE], True, 0.0, None), ([IDLE, LOST, LOST], True, 5.0, 0.1),
    ],
)  # fmt: skip
def test_when_to_ask_again(
    tries: list[Try], may_repeat: bool, left_s: float, pause: float | None
) -> None:
    found = pause_before_next(tries, may_repeat=may_repeat, retries=2, left_s=left_s)
    assert found == pause


def test_waiting_does_not_grow_without_end() -> None:
    assert pause_before_next([LOST] * 5000, may_repeat=True, retries=9999, left_s=9.0) == 1.6


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (answers.Decision, decisions.DecisionBody), (answers.Decisions, decisions.DecisionsBody),
        (answers.WholeDecision, decisions.WholeDecisionBody), (answers.Line, decisions.LineBody),
        (answers.Preview, threshold_preview.FlipsBody), (answers.Image, decisions.ImageBody),
        (answers.Model, models.StoredModelBody), (answers.Models, models.ModelsBody),
        (answers.Version, models.VersionBody), (answers.Upload, datasets.UploadBody),
        (answers.Refused, datasets.RefusedBody), (answers.Job, jobs.JobBody),
        (answers.Views, decisions.ViewsBody), (answers.View, decisions.ViewDecisionBody),
        (answers.Challenges, challenges.ChallengesBody),
        (answers.KnownPicture, challenges.KnownBody),
        (answers.JudgedPicture, challenges.JudgedBody),
        (answers.Challenge, challenges.OutcomeBody),
        (answers.LastChallenge, models.LastChallengeBody),
    ],
    ids=lambda one: one.__name__,
)  # fmt: skip
def test_the_types_have_the_keys_that_the_server_sends(ours: Any, theirs: Any) -> None:
    assert inspect.get_annotations(ours).keys() <= ours.__required_keys__
    assert ours.__required_keys__ == theirs.model_fields.keys()


def test_every_filter_of_the_record_can_be_asked_for() -> None:
    known = inspect.signature(decisions.asked_for_by).parameters
    assert DecisionFilter().query().keys() == known.keys()


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, Any]:
        return {
            name: [(one.name, one.default, one.kind, one.annotation)
                   for one in inspect.signature(found).parameters.values()]
            for name, found in vars(kind).items()
            if inspect.isfunction(found) and (not name.startswith("_") or name == "__init__")
        }  # fmt: skip

    assert methods(Kensa) == methods(AsyncKensa)
    assert len(methods(Kensa)) == 19


def test_httpx_names_what_it_does_as_the_client_expects() -> None:
    """Else a connection that was closed while idle would count as a failed try."""
    seen: list[str] = []
    with hostile(verdict()) as server, httpx.Client(trust_env=False) as plain:
        trace = {"trace": lambda event, _: seen.append(event)}
        plain.post(server.url, content=PICTURE, extensions=trace)
    assert {"connection.connect_tcp.started", "http11.send_request_headers.started",
            "http11.receive_response_headers.complete"} <= {*seen}  # fmt: skip
