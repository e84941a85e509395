"""Several views of a part over HTTP: one verdict, one line of the record, and none mixed."""

from __future__ import annotations

import asyncio
import hashlib
import random
import signal
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import httpx
import pytest

from support.line import NAME, Line, line
from support.server import Server, agreed
from support.waiting import until

CATEGORY = "sample_bracket"
VIEWS = ("left", "right", "top", "rear")
TEXT = {"Accept": "text/plain"}


@pytest.fixture(scope="module")
def good(sample_data: Path) -> bytes:
    return (sample_data / "test" / CATEGORY / "normal" / "0000.png").read_bytes()


@pytest.fixture(scope="module")
def bad(sample_data: Path) -> bytes:
    return (sample_data / "test" / CATEGORY / "anomaly" / "stain_00.png").read_bytes()


@pytest.fixture(scope="module")
def running(
    kensa_model: Path, tmp_path_factory: pytest.TempPathFactory, good: bytes, bad: bytes
) -> Iterator[Line]:
    settings = {"KENSA_RECORD_NEAR": "0", "KENSA_RECORD_SAMPLE": "0"}
    with line(tmp_path_factory.mktemp("views"), kensa_model, **settings) as found:
        set_limit(found.server, good, bad)
        yield found


def set_limit(server: Server, good: bytes, bad: bytes) -> None:
    """Between the two: the model was made quickly."""
    scores = [server.infer(data).json()["raw_score"] for data in (good, bad)]
    body = {"raw": sum(scores) / 2, "reason": "as this test needs it"}
    answer = server.client.put(f"/models/{NAME}/threshold", json=body)
    assert answer.status_code == 200, answer.text


def tagged(png: bytes, text: str) -> bytes:
    """The same pixels in another file: a chunk of text before the end."""
    chunk = b"tEXt" + b"Comment\0" + text.encode()
    packed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return png[:-12] + packed + png[-12:]


def path_of(part: str, view: str) -> str:
    return f"/parts/{quote(part, safe='')}/views/{view}"


def send(
    server: Server,
    part: str,
    view: str,
    data: bytes,
    of: str = "2",
    headers: dict[str, str] | None = None,
    **query: Any,
) -> httpx.Response:
    sent = {"Content-Type": "image/png", **(headers or {})}
    return server.client.post(
        path_of(part, view), params={"of": of, **query}, content=data, headers=sent
    )


def get(server: Server, path: str, **query: Any) -> Any:
    answer = server.client.get(path, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


# ---- verdicts --------------------------------------------------------------------------------


def test_the_request_that_brings_the_last_view_gets_the_part_s_verdict(
    running: Line, good: bytes, bad: bytes
) -> None:
    server, part = running.server, "KB-2046/A 17 検査"
    first = send(server, part, "left", bad, headers={"X-Request-ID": "viewed-1"})
    assert first.status_code == 200, first.text
    said = first.json()
    assert (said["verdict"], said["is_anomalous"], said["missing"]) == ("pending", None, ["?"])
    assert (said["view"], said["inspection"]["label"]) == ("left", "Anomaly")
    assert 0 < said["left_ms"] <= 5000
    last = send(server, part, "top", good)
    said = last.json()
    assert (said["id"], said["part"]) == ("viewed-1", part)
    assert (said["verdict"], said["is_anomalous"], said["decided_by"]) == ("anomaly", True, "left")
    assert (said["missing"], said["left_ms"]) == ([], 0)
    assert said["score"] == first.json()["inspection"]["score"]
    assert said["inspection"]["label"] == "Normal"
    assert unquote(last.headers["x-kensa-part"]) == part
    found = get(server, "/decisions/viewed-1")
    assert (found["part"], found["verdict"], found["score"]) == (part, "anomaly", said["score"])
    views = {one["view"]: one for one in found["views"]["views"]}
    assert {name: one["verdict"] for name, one in views.items()} == {
        "left": "anomaly", "top": "normal",
    }  # fmt: skip
    assert views["top"]["sha256"] == hashlib.sha256(good).hexdigest()
    assert views["top"]["id"] == last.headers["x-request-id"]
    assert len(get(server, f"/parts/{quote(part, safe='')}")["decisions"]) == 1


def test_a_plc_reads_one_line_and_whatever_is_no_ok_is_no_ok(
    running: Line, good: bytes, bad: bytes
) -> None:
    server = running.server
    lines = [send(server, "text-ok", view, good, "3", TEXT).text for view in VIEWS[:3]]
    score = server.infer(good).json()["score"]
    assert lines == ["PENDING 1/3\n", "PENDING 2/3\n", f"OK {score:.4f}\n"]
    answers = [
        send(server, "text-ng", view, data, headers=TEXT) for view, data in
        (("left", bad), ("top", good))
    ]  # fmt: skip
    assert answers[0].text == "PENDING 1/2\n"
    assert answers[1].text.startswith("NG 0.") or answers[1].text == "NG 1.0000\n"
    assert answers[1].headers["x-kensa-decided-by"] == "left"
    assert answers[1].headers["x-kensa-views"] == "2/2"
    assert "x-kensa-missing" not in answers[1].headers


def test_each_view_may_have_a_model_of_its_own(running: Line, good: bytes) -> None:
    server = running.server
    missing = send(server, "models", "left", good, model="bolt")
    assert agreed(missing) == "unknown_model"
    assert send(server, "models", "left", good, model=NAME).status_code == 200
    last = send(server, "models", "top", good).json()
    assert (last["verdict"], [one["model_name"] for one in last["views"]]) == (
        "normal", [NAME, NAME],
    )  # fmt: skip


def test_a_view_is_drawn_as_infer_draws_it(running: Line, bad: bytes) -> None:
    server = running.server
    for _ in range(2):  # also where it came before, and was not drawn
        drawn = send(server, "drawn", "left", bad, headers={"Accept": "image/png"})
        assert drawn.content[:8] == b"\x89PNG\r\n\x1a\n"
        assert drawn.headers["x-kensa-verdict"] == "pending"
        with_map = send(server, "drawn", "left", bad, heatmap=True).json()
        assert with_map["inspection"]["heatmap"]["png"]
        assert with_map["inspection"]["repeat_of"] == drawn.headers.get(
            "x-kensa-repeat-of", drawn.headers["x-kensa-id"]
        )


def test_a_form_is_read_as_infer_reads_it(running: Line, good: bytes) -> None:
    answer = running.server.client.post(
        path_of("form", "only"), params={"of": "1"}, files={"file": ("a.png", good)}
    )
    assert answer.json()["verdict"] == "normal"


# ---- what is missing, late, repeated -------------------------------------------------------------


def test_a_lost_view_is_ng_at_the_deadline_and_whoever_waits_learns_its_name(
    running: Line, good: bytes
) -> None:
    server, part = running.server, "lost"
    send(server, part, "left", good, "left,top", deadline_ms=2000)
    pending = server.client.get(f"/parts/{part}/verdict", headers=TEXT)
    assert pending.text == "PENDING 1/2\n"
    began = time.monotonic()
    found = server.client.get(f"/parts/{part}/verdict", params={"wait_ms": 20_000}, headers=TEXT)
    assert time.monotonic() - began < 10
    assert found.text == "NG view_missing\n"
    assert found.headers["x-kensa-missing"] == "top"
    said = get(server, f"/parts/{part}/verdict")
    assert (said["verdict"], said["code"], said["is_anomalous"], said["missing"]) == (
        "none", "view_missing", True, ["top"],
    )  # fmt: skip
    (kept,) = get(server, f"/parts/{part}")["decisions"]
    assert (kept["verdict"], kept["code"], kept["score"]) == ("none", "view_missing", None)
    assert kept["views"]["decided_by"] == "top"
    late = send(server, part, "top", good, "left,top")
    assert (late.status_code, agreed(late)) == (409, "late_view")
    assert said["id"] in late.json()["error"]
    assert len(get(server, f"/parts/{part}")["decisions"]) == 1


def test_who_waits_for_a_verdict_gets_it_with_the_last_view(running: Line, good: bytes) -> None:
    server, part = running.server, "awaited"
    send(server, part, "left", good)
    answers: list[str] = []

    def wait() -> None:
        found = httpx.get(
            f"{server.url}/parts/{part}/verdict", params={"wait_ms": 20_000}, headers=TEXT,
            timeout=30, trust_env=False,
        )  # fmt: skip
        answers.append(found.text)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.3)
    assert waiting.is_alive()
    last = send(server, part, "top", good, headers=TEXT)
    waiting.join(timeout=10)
    assert answers == [last.text]


def test_a_damaged_view_may_be_sent_again_and_is_missing_where_it_is_not(
    running: Line, good: bytes
) -> None:
    server, broken = running.server, good[: len(good) // 2]
    for part in ("mended", "broken"):
        assert agreed(send(server, part, "left", broken, deadline_ms=3000)) == "bad_image"
        assert send(server, part, "top", good).json()["missing"] == ["left"]
    assert send(server, "mended", "left", good).json()["verdict"] == "normal"
    said = get(server, "/parts/broken/verdict", wait_ms=20_000)
    assert (said["verdict"], said["missing"], said["decided_by"]) == ("none", ["left"], "left")
    assert {one["view"]: one["code"] for one in said["views"]} == {"left": "bad_image", "top": None}
    (kept,) = get(server, "/parts/broken")["decisions"]
    assert server.client.get(f"/decisions/{kept['id']}/image").content == broken


def test_the_same_picture_again_gets_the_same_answer_and_counts_once(
    running: Line, good: bytes, bad: bytes
) -> None:
    server, part = running.server, "again"
    sends = [("left", bad), ("left", bad), ("top", good), ("top", good), ("left", bad)]
    answers = [send(server, part, view, data) for view, data in sends]
    said = [one.json() for one in answers]
    assert [one["verdict"] for one in said] == ["pending"] * 2 + ["anomaly"] * 3
    assert [one["inspection"]["repeat_of"] for one in said] == [
        None, said[0]["inspection"]["id"], None, said[2]["inspection"]["id"], said[0]["id"],
    ]  # fmt: skip
    assert len(get(server, f"/parts/{part}")["decisions"]) == 1
    other = send(server, part, "top", tagged(good, "another"))
    assert agreed(other) == "late_view"


def test_what_does_not_fit_is_refused_in_words(running: Line, good: bytes) -> None:
    server = running.server
    send(server, "fits", "left", good, "2")
    for view, of, code in (
        ("top", "3", "conflict"), ("top", "left,top", "conflict"), ("a b", "2", "bad_request"),
        ("top", "0", "bad_request"), ("top", "33", "bad_request"), ("top", "", "bad_request"),
        ("top", "top,top", "bad_request"), ("x" * 33, "2", "bad_request"),
    ):  # fmt: skip
        answer = send(server, "fits", quote(view), good, of)
        assert agreed(answer) == code, answer.text
    assert agreed(send(server, "x" * 201, "left", good)) == "bad_request"
    nobody = server.client.get("/parts/nobody/verdict")
    assert (nobody.status_code, agreed(nobody)) == (404, "unknown_decision")
    assert send(server, "fits", "top", good).json()["verdict"] == "normal"


def test_lines_that_call_their_parts_alike_say_which_they_are(
    running: Line, good: bytes, bad: bytes
) -> None:
    server = running.server
    for name, data in (("A", good), ("B", bad)):
        send(server, "twin", "left", data, line=name)
    for name, verdict in (("A", "normal"), ("B", "anomaly")):
        said = send(server, "twin", "top", good, line=name).json()
        assert (said["line"], said["verdict"]) == (name, verdict)
    found = get(server, "/parts/twin")["decisions"]
    assert {one["views"]["line"]: one["verdict"] for one in found} == {
        "A": "normal", "B": "anomaly",
    }  # fmt: skip
    for query, said in (("", "without a line"), ("?line=C", "with line=C")):
        answer = server.client.get(f"/parts/twin/verdict{query}")
        assert answer.status_code == 404
        assert (
            f"came from you {said}, within the last 60 s or since its model was challenged. Say"
            in (answer.json()["error"])
        )


# ---- what is kept ----------------------------------------------------------------------------


def test_pictures_of_views_are_shown_drawn_and_judged_again(
    running: Line, good: bytes, bad: bytes
) -> None:
    server, also_bad = running.server, tagged(bad, "another")
    for view, data in (("left", good), ("top", bad), ("rear", also_bad)):
        said = send(server, "kept", view, data, "3").json()
    base = f"/decisions/{said['id']}"
    worst = said["decided_by"]
    (other,) = {"top", "rear"} - {worst}
    data = {"top": bad, "rear": also_bad}
    client = server.client
    assert client.get(f"{base}/image").content == data[worst]
    assert client.get(f"{base}/image", params={"view": worst}).content == data[worst]
    assert client.get(f"{base}/image", params={"view": other}).content == data[other]
    assert client.get(f"{base}/image").headers["content-type"] == "image/png"
    for kind in ("overlay", "heatmap"):
        for query in ({}, {"view": other}):
            assert client.get(f"{base}/{kind}", params=query).content[:4] == b"\x89PNG"
    refused = [client.get(f"{base}/image", params={"view": view}) for view in ("left", "none")]
    assert [agreed(one) for one in refused] == ["unknown_decision"] * 2
    for query, view in (({}, worst), ({"view": other}, other)):
        again = client.post(f"{base}/replay", params=query).json()
        (was,) = (one for one in said["views"] if one["view"] == view)
        assert (again["view"], again["raw_score"]) == (view, was["raw_score"])
    rows = client.get("/decisions.csv", params={"part": "kept"}).text.splitlines()
    assert rows[0].endswith(",views")
    assert '""decided_by""' in rows[1]
    deleted = client.delete(f"{base}/image", params={"reason": "a person is in it"})
    assert deleted.status_code == 204, deleted.text
    assert agreed(client.get(f"{base}/image", params={"view": other})) == "unknown_decision"


def test_parts_are_counted_as_parts_and_views_as_inspections(running: Line, good: bytes) -> None:
    server = running.server

    def metrics() -> dict[str, str]:
        text = server.client.get("/metrics").text
        return dict(one.rsplit(" ", 1) for one in text.splitlines() if not one.startswith("#"))

    def counted() -> tuple[float, float, int]:
        rows = metrics()
        spans = get(server, "/statistics", per="day")["spans"]
        return (
            float(rows['kensa_parts_total{verdict="normal"}']),
            float(rows[f'kensa_verdicts_total{{label="Normal",model="{NAME}"}}']),
            sum(one["parts"] for one in spans),
        )

    until(lambda: float(metrics()["kensa_parts_open"]) == 0)  # of the tests before
    before = counted()
    for view in VIEWS[:3]:
        send(server, "counted", view, good, "3")
    assert [now - then for now, then in zip(counted(), before, strict=True)] == [1, 3, 1]


def test_a_server_that_ends_decides_what_is_open_and_one_that_is_killed_forgets_it(
    kensa_model: Path, tmp_path: Path, good: bytes
) -> None:
    for end, decisions in ((signal.SIGTERM, 1), (signal.SIGKILL, 0)):
        part = f"open-{end}"
        with line(tmp_path, kensa_model, KENSA_VIEW_REPEATS="refuse") as found:
            send(found.server, part, "left", good, deadline_ms=60_000)
            other = send(found.server, part, "left", tagged(good, "another"))
            assert (other.status_code, agreed(other)) == (409, "conflict")
            found.server.process.send_signal(end)
            found.server.process.wait(20)
        with line(tmp_path, kensa_model) as found:
            kept = found.server.client.get("/decisions", params={"part": part}).json()["decisions"]
            assert [one["code"] for one in kept] == ["view_missing"] * decisions
            # Never OK by a view that nobody remembers.
            said = send(found.server, part, "top", good, deadline_ms=2000).json()
            assert said["verdict"] == "pending"
            said = get(found.server, f"/parts/{part}/verdict", wait_ms=20_000)
            assert (said["verdict"], said["missing"]) == ("none", ["?"])


# ---- many parts at once --------------------------------------------------------------------------


def test_many_parts_of_two_lines_are_decided_once_each_and_none_is_mixed(
    running: Line, good: bytes, bad: bytes
) -> None:
    two_lines(running.server, good, bad, parts=20, at_once=2, lossy_s=5)


@pytest.mark.soak
@pytest.mark.alone
def test_a_thousand_parts_of_two_lines_are_decided_once_each_and_none_is_mixed(
    running: Line, good: bytes, bad: bytes
) -> None:
    two_lines(running.server, good, bad, parts=500, at_once=2, lossy_s=20)


def two_lines(
    server: Server, good: bytes, bad: bytes, *, parts: int, at_once: int, lossy_s: int
) -> None:
    """Both send parts of the same names, each view a file of its own, in any order.

    One part in five loses a view, one view in eight is sent twice, one in twenty is first another
    picture.

    Args:
        lossy_s: how long a part that loses a view waits for it.
    """
    draw = random.Random(parts)
    plans = {
        (name, f"{parts}/P-{number}"): plan(draw, f"{name} {number}", good, bad)
        for number in range(parts) for name in ("A", "B")
    }  # fmt: skip

    async def all_of_them() -> None:
        room = {name: asyncio.Semaphore(at_once) for name in ("A", "B")}
        async with httpx.AsyncClient(base_url=server.url, timeout=120, trust_env=False) as client:

            async def one(key: tuple[str, str], planned: dict[str, Any]) -> None:
                async with room[key[0]]:
                    await send_part(client, *key, planned, lossy_s)
                query = {"line": key[0], "wait_ms": 60_000}
                path = f"/parts/{quote(key[1], safe='')}/verdict"
                said = (await client.get(path, params=query)).json()
                assert said["verdict"] == planned["verdict"]

            await asyncio.gather(*(one(*item) for item in plans.items()))

    asyncio.run(all_of_them())
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    before: int | None = None
    while True:
        query: dict[str, Any] = (
            {"limit": 500} if before is None else {"limit": 500, "before": before}
        )
        page = get(server, "/decisions", **query)
        for kept in page["decisions"]:
            if kept["views"] and (kept["part"] or "").startswith(f"{parts}/"):
                found.setdefault((kept["views"]["line"], kept["part"]), []).append(kept)
        if (before := page["next"]) is None:
            break
    assert found.keys() == plans.keys()
    for key, decisions in found.items():
        (kept,), planned = decisions, plans[key]
        came = {one["view"]: one for one in kept["views"]["views"] if one["verdict"] != "none"}
        hashes = {view: hashlib.sha256(data).hexdigest() for view, data in planned["came"].items()}
        assert {view: one["sha256"] for view, one in came.items()} == hashes
        assert kept["verdict"] == planned["verdict"], key
        missing = {one["view"] for one in kept["views"]["views"]} - came.keys()
        assert missing == {*planned["lost"]}


def plan(draw: random.Random, tag: str, good: bytes, bad: bytes) -> dict[str, Any]:
    """Which picture of each view comes, in which order, and what has to come of it."""
    lost = [draw.choice(VIEWS)] if draw.random() < 0.2 else []
    is_bad = {view: draw.random() < 0.1 for view in VIEWS}
    came = {
        view: tagged(bad if is_bad[view] else good, f"{tag} {view}")
        for view in VIEWS if view not in lost
    }  # fmt: skip
    first = [
        (view, tagged(good, f"{tag} {view} first")) for view in came if draw.random() < 0.05
    ]  # fmt: skip
    sends = [*came.items(), *(one for one in came.items() if draw.random() < 0.125)]
    draw.shuffle(sends)
    verdict = "none" if lost else "normal"
    if any(is_bad[view] for view in came):
        verdict = "anomaly"
    return {"came": came, "lost": lost, "first": first, "sends": sends, "verdict": verdict}


async def send_part(
    client: httpx.AsyncClient, name: str, part: str, planned: dict[str, Any], lossy_s: int
) -> None:
    """All views of a part at once, those that are taken again after their first pictures."""
    deadline_ms = lossy_s * 1000 if planned["lost"] else 120_000
    query: dict[str, Any] = {"of": ",".join(VIEWS), "line": name, "deadline_ms": deadline_ms}

    async def view(which: str, data: bytes) -> dict[str, Any]:
        while True:
            answer = await client.post(path_of(part, which), params=query, content=data,
                                       headers={"Content-Type": "image/png"})  # fmt: skip
            if answer.status_code not in (503, 504):  # of a busy machine: a PLC asks again
                break
        assert answer.status_code == 200, answer.text
        said: dict[str, Any] = answer.json()
        assert (said["part"], said["line"], said["view"]) == (part, name, which)
        return said

    for first in planned["first"]:
        await view(*first)
    answers = await asyncio.gather(*(view(*one) for one in planned["sends"]))
    decided = [one for one in answers if one["verdict"] != "pending"]
    assert bool(decided) is not bool(planned["lost"])
    assert {one["verdict"] for one in decided} <= {planned["verdict"]}
