"""Whoever watches the line sees every part as it comes, and costs the line nothing."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.decisions.newest import MINUTE_MS, MOST_BYTES, Newest
from app.http.keys import add_key, remove_key
from support.decisions import decision
from support.events import watching
from support.line import NAME, Line, line
from support.server import RAW, Server, agreed, serving

CATEGORY = "sample_bracket"


@pytest.fixture(scope="module")
def good(sample_data: Path) -> bytes:
    return (sample_data / "test" / CATEGORY / "normal" / "0000.png").read_bytes()


@pytest.fixture(scope="module")
def bad(sample_data: Path) -> bytes:
    return (sample_data / "test" / CATEGORY / "anomaly" / "stain_00.png").read_bytes()


@pytest.fixture(scope="module")
def running(kensa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    settings = {"KENSA_RECORD_NEAR": "0", "KENSA_RECORD_SAMPLE": "0", "KENSA_REPEAT_S": "0"}
    with line(tmp_path_factory.mktemp("watched"), kensa_model, **settings) as found:
        yield found


def send(server: Server, picture: bytes, part: str = "", **headers: str) -> dict[str, Any]:
    answer = server.client.post(
        "/infer", params={"part": part}, content=picture, headers={**RAW, **headers}
    )
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def nobody_watches(server: Server) -> None:
    """A client that leaves is found by the next write to it, two seconds later at most."""
    for _ in range(400):
        if server.client.get("/line/picture").status_code == 404:
            return
        time.sleep(0.05)
    raise AssertionError("somebody watches still")


# ---- parts as they come --------------------------------------------------------------------------


def test_a_part_is_told_within_a_second_as_the_record_has_it(running: Line, good: bytes) -> None:
    with watching(running.server.url) as stream:
        assert stream.next("state")["models"][0]["name"] == NAME
        began = time.monotonic()
        said = send(running.server, good, "KB-2046/A 17 検査 <b>")
        told = stream.next()
        assert time.monotonic() - began < 1
    kept = running.server.client.get(f"/decisions/{said['id']}").json()
    assert told.pop("in_memory") is True
    assert told == {key: kept[key] for key in told}
    assert told["part"] == "KB-2046/A 17 検査 <b>"


def test_what_had_no_verdict_is_told_with_its_reason(running: Line, good: bytes) -> None:
    with watching(running.server.url) as stream:
        stream.next("state")
        assert running.server.infer(good[:99]).status_code == 400
        told = stream.next()
    assert (told["verdict"], told["code"]) == ("none", "bad_image")
    assert told["in_memory"] is False


def test_who_comes_again_gets_what_was_missed_and_nothing_twice(running: Line, good: bytes) -> None:
    with watching(running.server.url) as stream:
        stream.next("state")
        last = send(running.server, good, "before")["id"]
        told = stream.next()
        assert told["id"] == last
    nobody_watches(running.server)
    missed = [send(running.server, good, f"missed {number}")["id"] for number in range(3)]
    for asked in (
        {"params": {"after": told["number"]}},
        {"headers": {"Last-Event-ID": str(told["number"])}},
    ):
        with watching(running.server.url, **asked) as stream:
            found = stream.decisions(len(missed))
            assert found[0]["in_memory"] is False
            assert [one["id"] for one in found] == missed
            missed.append(send(running.server, good, "new")["id"])
            assert stream.next()["id"] == missed[-1]


def test_who_joins_another_who_watches_gets_what_comes_from_then_on(
    running: Line, good: bytes
) -> None:
    with watching(running.server.url) as first:
        first.next("state")
        for knows_it in (False, True) * 4:
            said = send(running.server, good)
            kept = running.server.client.get(f"/decisions/{said['id']}").json()  # it is written
            asked = {"after": kept["number"]} if knows_it else {}
            with watching(running.server.url, params=asked) as second:
                second.next("state")
                assert send(running.server, good)["id"] == second.next()["id"]


def test_of_a_long_gap_the_newest_200_are_told(running: Line, good: bytes) -> None:
    for _ in range(210):
        assert running.server.infer(good[:20]).status_code in (400, 415)
    with watching(running.server.url, params={"after": 0}) as stream:
        found = [one["number"] for one in stream.decisions(200)]
    (last,) = running.server.client.get("/decisions", params={"limit": 1}).json()["decisions"]
    newest = last["number"]
    assert found == list(range(newest - 199, newest + 1))


def test_a_number_that_is_not_there_yet_is_of_another_record_and_all_is_told(
    running: Line, good: bytes
) -> None:
    said = send(running.server, good)
    with watching(running.server.url, params={"after": 10**9}) as stream:
        stream.next("state")
        newest = running.server.client.get("/decisions", params={"limit": 1}).json()["decisions"][0]
        found = stream.decisions(min(200, newest["number"]))
    assert found[-1]["id"] == said["id"]


def test_the_state_says_which_version_judges_and_what_the_last_minutes_were(
    running: Line, good: bytes, bad: bytes
) -> None:
    with watching(running.server.url) as stream:
        (before,) = stream.next("state")["models"]
        said = send(running.server, good)
        send(running.server, bad)
        while True:
            state = stream.next("state")
            (now,) = state["models"]
            if sum(now["minutes"]["parts"]) == sum(before["minutes"]["parts"]) + 2:
                break
    assert sum(now["minutes"]["rejects"]) == sum(before["minutes"]["rejects"]) + 1
    assert now["version"] == said["model_version"]
    assert now["threshold"] == said["threshold"]
    assert (now["released"], now["has_challenge"], now["problem"]) == (True, False, None)
    assert state["recorded"] is True


def test_many_watch_and_each_part_is_told_to_each(running: Line, good: bytes) -> None:
    from contextlib import ExitStack

    with ExitStack() as stack:
        streams = [stack.enter_context(watching(running.server.url)) for _ in range(8)]
        for stream in streams:
            stream.next("state")
        sent = [send(running.server, good)["id"] for _ in range(10)]
        for stream in streams:
            assert [one["id"] for one in stream.decisions(10)] == sent
    nobody_watches(running.server)


def test_one_who_does_not_read_is_dropped_and_the_others_go_on(
    kensa_model: Path, tmp_path: Path, good: bytes
) -> None:
    settings = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_RECEIVE_S": "1"}
    with serving(tmp_path, **settings) as server, watching(server.url) as stream:
        host, port = server.url.removeprefix("http://").split(":")
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        deaf.connect((host, int(port)))
        deaf.sendall(f"GET /line/events HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        stream.next("state")
        sent = 0
        before = server.memory("VmRSS")
        long = "x" * 200
        ended = time.monotonic() + 60
        while time.monotonic() < ended and connections(server) > 2:
            for _ in range(40):
                assert server.client.post("/infer", params={"part": long}, content=good[:20],
                                          headers=RAW).status_code in (400, 415)  # fmt: skip
            stream.decisions(40)
            sent += 40
        deaf.close()
        assert connections(server) == 2, f"after {sent} parts"
        assert server.memory("VmRSS") - before < 64 * 2**20


def connections(server: Server) -> int:
    """How many sockets the server has open to clients."""
    port = int(server.url.rpartition(":")[2])
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = [one.split() for one in lines]
    return sum(int(one[1].split(":")[1], 16) == port and one[3] == "01" for one in fields)


def test_the_servers_stop_ends_the_streams(kensa_model: Path, tmp_path: Path) -> None:
    with serving(tmp_path, KENSA_MODEL_DIR=str(kensa_model)) as server:
        with watching(server.url) as stream:
            stream.next("state")
            began = time.monotonic()
            server.process.terminate()
            stream.rest()
            server.process.wait(10)
        assert time.monotonic() - began < 5
        assert "Traceback" not in server.log.read_text()


def test_without_a_record_parts_are_told_from_memory(
    kensa_model: Path, tmp_path: Path, good: bytes
) -> None:
    with serving(tmp_path, KENSA_MODEL_DIR=str(kensa_model), KENSA_RECORD="off") as server:
        sent = [send(server, good)["id"] for _ in range(2)]
        with watching(server.url, params={"after": 0}) as stream:
            assert stream.next("state")["recorded"] is False
            sent.append(send(server, good)["id"])
            found = stream.decisions(3)
        assert [one["id"] for one in found] == sent
        assert [one["number"] for one in found] == [1, 2, 3]
        assert not any(one["has_picture"] for one in found)


def test_after_a_start_the_minutes_are_those_of_the_record(
    kensa_model: Path, tmp_path: Path, good: bytes
) -> None:
    settings = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_MODEL_NAME": NAME}
    for expected in (2, 4):
        with serving(tmp_path, **settings) as server:
            for _ in range(2):
                send(server, good)
            with watching(server.url, params={"after": 0}) as stream:
                stream.decisions(expected)
            with watching(server.url) as stream:
                (model,) = stream.next("state")["models"]
            assert sum(model["minutes"]["parts"]) == expected


@pytest.mark.parametrize("after", ["-1", "x", str(2**70)])
def test_a_number_that_is_none_is_refused(running: Line, after: str) -> None:
    answer = running.server.client.get("/line/events", params={"after": after})
    assert (answer.status_code, agreed(answer)) == (422, "bad_request")


# ---- pictures ------------------------------------------------------------------------------------


def test_the_last_picture_is_seen_though_nobody_keeps_it(running: Line, good: bytes) -> None:
    client = running.server.client
    nobody_watches(running.server)
    with watching(running.server.url) as stream:
        stream.next("state")
        first, last = (send(running.server, good)["id"] for _ in range(2))
        assert not stream.next()["has_picture"]
        plain = client.get("/line/picture", params={"paint": False})
        assert (plain.content, plain.headers["x-kensa-id"]) == (good, last)
        painted = client.get("/line/picture", params={"model": NAME, "id": first})
        assert painted.headers["x-kensa-id"] == first
        assert painted.headers["content-type"] == "image/png"
    nobody_watches(running.server)
    assert agreed(client.get("/line/picture")) == "unknown_decision"


def test_a_reject_is_painted_as_its_overlay(running: Line, bad: bytes) -> None:
    client = running.server.client
    with watching(running.server.url) as stream:
        stream.next("state")
        said = send(running.server, bad)
        painted = client.get("/line/picture", params={"id": said["id"]}).content
    accept = {**RAW, "Accept": "image/png"}
    drawn = client.post("/infer", content=bad, headers=accept).content
    assert painted == drawn


def test_pictures_of_a_model_that_there_is_not_are_refused(running: Line) -> None:
    answer = running.server.client.get("/line/picture", params={"model": "bolt"})
    assert (answer.status_code, agreed(answer)) == (404, "unknown_decision")


def test_pictures_in_memory_are_bounded_and_each_model_has_its_last() -> None:
    import numpy as np

    from app.decisions.pictures import Map
    from engines.verdict import Scale

    newest = Newest()
    seen = Map(np.zeros((8, 8), np.float32), Scale(1, 0, 2, 0.5), 8, None)
    newest.saw(decision(id="unwatched"), b"x", seen)
    assert newest.picture("part") is None
    newest.watch(1)
    newest.saw(decision(model="slow", id="slow"), b"x" * 1000, seen)
    for number in range(40):
        newest.saw(decision(model="fast", id=f"{number}"), bytes(MOST_BYTES // 3), seen)
    held = [newest.picture("fast", f"{number}") for number in range(40)]
    assert sum(one is not None for one in held) == 2
    assert newest.picture("slow") is not None
    newest.watch(-1)
    assert newest.picture("slow") is None


def test_minutes_are_counted_by_model_and_old_ones_forgotten() -> None:
    newest, now = Newest(), round(time.time() * 1000)
    for ago, verdict in ((90, "anomaly"), (1, "normal"), (0, "anomaly"), (0, "unusable")):
        newest.decided(decision(at=now - ago * MINUTE_MS, verdict=verdict))
    newest.decided(decision(at=now, verdict="none", model="whatever a client asked for"))
    found = newest.minutes("part")
    assert (sum(found.parts), sum(found.rejects), sum(found.unusable)) == (2, 1, 1)
    assert found.parts[-1] + found.parts[-2] == 2
    assert len(newest._counts) == 3


# ---- to try a picture ----------------------------------------------------------------------------


def test_a_picture_that_is_tried_is_judged_alike_and_counted_nowhere(
    running: Line, good: bytes, bad: bytes
) -> None:
    client = running.server.client
    said = send(running.server, bad)
    assert client.get(f"/decisions/{said['id']}").status_code == 200  # it is written, and told
    with watching(running.server.url) as stream:
        stream.next("state")
        for picture in (bad, good, bad[:99], bad):
            answer = client.post(
                "/infer", params={"record": False, "heatmap": True, "part": "T-1"},
                content=picture, headers=RAW,
            )  # fmt: skip
        tried = answer.json()
        assert send(running.server, good)["id"] == stream.next()["id"]  # the next one is this
    for key in ("raw_score", "score", "label", "threshold", "model_version", "image"):
        assert tried[key] == said[key]
    assert tried["heatmap"]["png"]
    assert (tried["part"], tried["repeat_of"]) == ("T-1", None)
    assert tried["timing"]["infer_ms"] > 0


def test_what_is_tried_is_counted_nowhere_at_all(running: Line, bad: bytes) -> None:
    client = running.server.client

    def metrics() -> list[str]:
        others = ("requests", "failures", "cpu_busy", "memory", "disk")  # not of parts
        lines = client.get("/metrics").text.splitlines()
        return [
            one
            for one in lines
            if one.startswith("kensa_") and not any(word in one for word in others)
        ]

    def statistics() -> Any:
        return client.get("/statistics", params={"per": "day"}).json()["spans"]

    stats, spans, before = client.get("/v2/models/stats").json(), statistics(), metrics()
    assert any(one.startswith("kensa_score") for one in before)
    refused = client.post("/infer", params={"record": False}, content=bad[:99], headers=RAW)
    assert agreed(refused) in ("bad_image", "unsupported_image")
    for accept in ("application/json", "text/plain", "image/png"):
        answer = client.post("/infer", params={"record": False}, content=bad,
                             headers={**RAW, "Accept": accept})  # fmt: skip
        assert answer.status_code == 200
        assert answer.headers["x-kensa-label"] == "Anomaly"
    assert metrics() == before
    assert statistics() == spans
    assert client.get("/v2/models/stats").json() == stats


def test_only_an_operator_may_try(kensa_model: Path, tmp_path: Path, bad: bytes) -> None:
    keys = {role: add_key(tmp_path / "data" / "keys.json", role, role)
            for role in ("line", "operator", "admin")}  # fmt: skip
    with serving(tmp_path, KENSA_MODEL_DIR=str(kensa_model)) as server:
        for role, status in (("line", 403), ("operator", 200), ("admin", 200)):
            answer = httpx.post(
                f"{server.url}/infer", params={"record": False}, content=bad,
                headers={**RAW, "X-API-Key": keys[role]}, timeout=60, trust_env=False,
            )  # fmt: skip
            assert answer.status_code == status
        assert server.client.get("/line/events").status_code == 401


@pytest.mark.parametrize("first", [False, True], ids=["its key is removed", "a first key is made"])
def test_who_is_not_let_in_any_more_hears_nothing_more(
    kensa_model: Path, tmp_path: Path, good: bytes, first: bool
) -> None:
    file = tmp_path / "data" / "keys.json"
    admin = {} if first else {"X-API-Key": add_key(file, "anna", "admin")}
    tablet = {} if first else {"X-API-Key": add_key(file, "tablet", "line")}
    with serving(tmp_path, KENSA_MODEL_DIR=str(kensa_model)) as server:
        with watching(server.url, headers=tablet) as stream:
            send(server, good, "seen", **admin)
            assert stream.next()["part"] == "seen"
            if first:
                admin = {"X-API-Key": add_key(file, "anna", "admin")}
            else:
                remove_key(file, "tablet")
            send(server, good, "not for them", **admin)
            with pytest.raises(StopIteration):  # it ends
                stream.next()
        assert httpx.get(f"{server.url}/line/events", headers=tablet).status_code == 401
