"""A version over HTTP: its report, and how it is discarded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.clients import Clients
from support.line import NAME, Line, line, variant
from support.server import agreed
from support.waiting import until

WHY = "Trained on the wrong parts."


@pytest.fixture
def running(kensa_model: Path, tmp_path: Path) -> Iterator[Line]:
    """With three versions: the last one is live."""
    others = [
        variant(kensa_model, tmp_path / f"model{n}", image_threshold=0.5 + n / 100)
        for n in range(3)
    ]
    with line(tmp_path, *others) as found:
        yield found


@pytest.fixture(scope="module")
def good(sample_data: Path) -> bytes:
    return (sample_data / "test" / "sample_bracket" / "normal" / "0000.png").read_bytes()


def discard(running: Line, version: str, **query: str) -> httpx.Response:
    path = f"/models/{NAME}/versions/{version}"
    return running.server.client.delete(path, params={"reason": WHY, **query})


def versions(running: Line) -> list[str]:
    """Newest first."""
    return [one["version"] for one in running.model()["versions"]]


def trail(running: Line, what: str) -> list[dict[str, Any]]:
    found = running.server.client.get("/trail", params={"subject": NAME}).json()["lines"]
    return [one for one in found if one["what"] == what]


# ---- the report ---------------------------------------------------------------------------------


def test_the_report_of_a_version_is_what_its_making_wrote(running: Line) -> None:
    newest = versions(running)[0]
    answer = running.server.client.get(f"/models/{NAME}/versions/{newest}/report")
    written = running.store.folder(NAME, newest) / "report.json"
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == json.loads(written.read_text())
    assert answer.json()["parity"]


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (None, 404, "unknown_version"),
        ("{", 422, "bad_bundle"),
        ("[]", 422, "bad_bundle"),
        ('{"parity": NaN}', 422, "bad_bundle"),
        ('{"deep": ' + "[" * 5000 + "]" * 5000 + "}", 422, "bad_bundle"),
    ],
)
def test_a_report_that_is_missing_or_damaged_is_told_so(
    running: Line, content: str | None, status: int, code: str
) -> None:
    oldest = versions(running)[-1]
    path = running.store.folder(NAME, oldest) / "report.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    answer = running.server.client.get(f"/models/{NAME}/versions/{oldest}/report")
    assert (answer.status_code, agreed(answer)) == (status, code)


# ---- discarding ---------------------------------------------------------------------------------


def test_a_discarded_version_is_gone_and_the_trail_says_why(running: Line, good: bytes) -> None:
    *newer, oldest = versions(running)
    answer = discard(running, oldest)
    assert (answer.status_code, answer.content) == (204, b"")
    assert versions(running) == newer
    gone = discard(running, oldest)
    assert (gone.status_code, agreed(gone)) == (404, "unknown_version")
    until(lambda: bool(trail(running, "discarded")))
    (told,) = trail(running, "discarded")
    assert (told["subject"], told["reason"]) == (NAME, WHY)
    assert told["details"]["version"] == oldest
    assert running.score(good)[0] == newer[0]


def test_neither_what_judges_nor_what_a_rollback_goes_to_is_discarded(running: Line) -> None:
    live, previous, oldest = versions(running)
    for version in (live, previous):
        answer = discard(running, version)
        assert (answer.status_code, agreed(answer)) == (409, "conflict")
    assert running.activate(oldest).status_code == 200
    assert discard(running, previous).status_code == 204
    assert discard(running, live).status_code == 409
    assert versions(running) == [live, oldest]


def test_a_reason_must_be_given(running: Line) -> None:
    oldest = versions(running)[-1]
    for reason in ("", "  ", "\u200b"):
        answer = discard(running, oldest, reason=reason)
        assert (answer.status_code, agreed(answer)) == (422, "bad_request")
    answer = running.server.client.delete(f"/models/{NAME}/versions/{oldest}")
    assert (answer.status_code, agreed(answer)) == (422, "bad_request")
    assert oldest in versions(running)


def test_the_trained_version_may_go_and_its_thresholds_go_on(running: Line, good: bytes) -> None:
    """They share its large files, and the engine in memory that was opened from them."""
    trained, path = versions(running)[0], f"/models/{NAME}/threshold"
    score = running.score(good)[1]
    for limit in (0.6, 0.7):
        body = {"threshold": limit, "reason": "as this test needs it"}
        assert running.server.client.put(path, json=body).status_code == 200
    assert discard(running, trained).status_code == 204
    assert running.score(good) == (versions(running)[0], score)
    assert running.server.client.post(f"/models/{NAME}/rollback").status_code == 200
    assert running.score(good)[1] == score
    for version in versions(running)[:2]:
        running.store.check(NAME, version)


def test_a_held_version_is_discarded_and_its_number_is_not_given_again(
    running: Line, kensa_model: Path, tmp_path: Path, good: bytes
) -> None:
    running.score(good)
    other = variant(kensa_model, tmp_path / "other", image_threshold=0.0)
    held = running.publish(other)
    assert running.wait(held, "held", "live") == "held"
    assert discard(running, held).status_code == 204
    again = running.publish(other)
    assert int(again[:4]) == int(held[:4]) + 1
    assert running.wait(again, "held") == "held"  # the gate looks at it anew


def test_a_version_at_the_gate_is_discarded_without_waiting_for_it(
    kensa_model: Path, tmp_path: Path, good: bytes
) -> None:
    """And parts get their verdicts all the while."""
    with line(tmp_path, kensa_model) as running:
        with Clients(running.server.url, [good]) as clients:  # the gate waits for gaps
            until(lambda: len(clients.seen) > 32)
            new = running.publish(variant(kensa_model, tmp_path / "other", bank=1.01))
            until(lambda: running.state(new) == "at the gate")
            assert discard(running, new).status_code == 204
            assert new not in versions(running)
            seen = len(clients.seen)
            until(lambda: len(clients.seen) > seen + 32)
        assert not clients.failures
        assert versions(running) == [running.model()["live"]]
    assert "Traceback" not in running.server.log.read_text()


def test_a_version_that_stands_in_for_a_damaged_one_is_not_discarded(
    kensa_model: Path, tmp_path: Path
) -> None:
    with line(tmp_path, kensa_model, variant(kensa_model, tmp_path / "b", bank=1.01)) as running:
        live, before = versions(running)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    (running.store.folder(NAME, live) / "memory_bank.npz").write_bytes(b"damaged")
    with line(tmp_path) as running:
        assert running.model()["live"] == before
        answer = discard(running, before)
        assert (answer.status_code, agreed(answer)) == (409, "conflict")
        assert versions(running) == [before]
