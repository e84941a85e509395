"""Every inspection leaves a record: found, shown, marked, judged again, and provably whole."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cv2
import numpy as np
import pytest

from support.line import NAME, Line, line
from support.project import ROOT
from support.server import Server, agreed

CATEGORY = "sample_bracket"


@pytest.fixture(scope="module")
def good(sample_data: Path) -> bytes:
    return (sample_data / "test" / CATEGORY / "normal" / "0000.png").read_bytes()


@pytest.fixture(scope="module")
def bad(sample_data: Path) -> bytes:
    return (sample_data / "test" / CATEGORY / "anomaly" / "stain_00.png").read_bytes()


@pytest.fixture(scope="module")
def running(kensa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    settings = {"KENSA_RECORD_NEAR": "0", "KENSA_RECORD_SAMPLE": "0"}
    with line(tmp_path_factory.mktemp("record"), kensa_model, **settings) as found:
        yield found


def get(server: Server, path: str, **query: Any) -> Any:
    answer = server.client.get(path, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def verify(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app", "verify", *flags], cwd=ROOT, capture_output=True, text=True,
        env={"KENSA_DATA_DIR": str(folder / "data"), "PATH": "/usr/bin:/bin"}, timeout=60,
    )  # fmt: skip


def with_limit(server: Server, **limit: float) -> None:
    body = {**limit, "reason": "as this test needs it"}
    answer = server.client.put(f"/models/{NAME}/threshold", json=body)
    assert answer.status_code == 200, answer.text


# ---- what is kept -------------------------------------------------------------------------------


def test_a_decision_is_found_by_its_id_with_all_that_the_answer_said(
    running: Line, good: bytes
) -> None:
    part = "KB-2046/A 17 検査"
    answer = running.server.client.post(
        "/infer", params={"part": part}, content=good,
        headers={"Content-Type": "image/png", "X-Request-ID": "line-1.first"},
    )  # fmt: skip
    said = answer.json()
    found = get(running.server, "/decisions/line-1.first")
    for name in ("raw_score", "score", "threshold", "raw_threshold", "part", "image"):
        assert found[name] == said[name]
    assert (found["model"], found["version"]) == (said["model_name"], said["model_version"])
    assert found["verdict"] == ("anomaly" if said["is_anomalous"] else "normal")
    assert found["sha256"] == hashlib.sha256(good).hexdigest()
    assert found["timing"]["total_ms"] > 0
    assert found["code"] is None
    assert found["label"] is None
    of_part = get(running.server, f"/parts/{part}")
    assert [one["id"] for one in of_part["decisions"]] == ["line-1.first"]


def test_what_got_no_verdict_is_recorded_with_the_reason_and_a_broken_picture_is_kept(
    running: Line, good: bytes
) -> None:
    broken = good[: len(good) // 2]
    sent = {"X-Request-ID": "broken", "X-Part": "B-1"}
    assert running.server.infer(broken, **sent).status_code == 400
    found = get(running.server, "/decisions/broken")
    assert (found["verdict"], found["code"]) == ("none", "bad_image")
    assert (found["version"], found["raw_score"], found["part"]) == (None, None, "B-1")
    assert running.server.client.get("/decisions/broken/image").content == broken
    version = running.server.infer(good).json()["model_version"]
    for by, code in ((version, "bad_image"), ("0009-nope", "unknown_version")):
        again = running.server.client.post("/decisions/broken/replay", params={"version": by})
        assert agreed(again) == code
    heatmap = running.server.client.get("/decisions/broken/heatmap")
    assert (heatmap.status_code, agreed(heatmap)) == (404, "unknown_decision")


def test_a_refusal_counts_under_the_only_model_also_where_the_request_named_none(
    running: Line, good: bytes
) -> None:
    late = running.server.client.post("/infer", params={"deadline_ms": 1}, content=good,
                                      headers={"X-Request-ID": "late"})  # fmt: skip
    assert late.status_code == 504
    assert running.server.infer(good[:99], **{"X-Request-ID": "cut"}).status_code == 400
    for change in ("unload", "load"):
        path = f"/v2/repository/models/{NAME}/{change}"
        assert running.server.client.post(path).status_code == 200
        if change == "unload":
            assert running.server.infer(good, **{"X-Request-ID": "away"}).status_code == 503
    said = {"late": "deadline_exceeded", "cut": "bad_image", "away": "not_ready"}
    for id_, code in said.items():
        found = get(running.server, f"/decisions/{id_}")
        assert (found["model"], found["code"]) == (NAME, code)
    spans = get(running.server, "/statistics", per="day")["spans"]
    assert {one["model"] for one in spans} == {NAME}


def test_an_image_sent_by_the_open_inference_protocol_is_recorded_too(
    running: Line, good: bytes
) -> None:
    import base64

    body = {
        "inputs": [{"name": "file", "shape": [1], "datatype": "BYTES",
                    "data": [base64.b64encode(good).decode()],
                    "parameters": {"content_type": "base64"}}],
    }  # fmt: skip
    answer = running.server.client.post(
        f"/v2/models/{NAME}/infer", json=body, headers={"X-Request-ID": "oip-1", "X-Part": "O-1"}
    )
    assert answer.status_code == 200, answer.text
    found = get(running.server, "/decisions/oip-1")
    assert (found["part"], found["sha256"]) == ("O-1", hashlib.sha256(good).hexdigest())


def test_pictures_of_rejects_are_kept_and_drawn_as_when_they_were_judged(
    running: Line, bad: bytes, good: bytes
) -> None:
    server = running.server
    scores = {name: server.infer(data).json()["raw_score"] for name, data in
              (("good", good), ("bad", bad))}  # fmt: skip
    with_limit(server, raw=(scores["good"] + scores["bad"]) / 2)
    drawn = server.client.post(
        "/infer", content=bad,
        headers={"Content-Type": "image/png", "Accept": "image/png", "X-Request-ID": "reject"},
    )  # fmt: skip
    server.infer(good, **{"X-Request-ID": "accept"})
    assert server.client.get("/decisions/reject/image").content == bad
    assert server.client.get("/decisions/reject/image").headers["content-type"] == "image/png"
    overlay = server.client.get("/decisions/reject/overlay").content
    assert overlay[:8] == b"\x89PNG\r\n\x1a\n"
    assert _alike(overlay, drawn.content)
    assert server.client.get("/decisions/reject/heatmap").content[:4] == b"\x89PNG"
    assert get(server, "/decisions/reject")["has_picture"]
    assert not get(server, "/decisions/accept")["has_picture"]
    missing = server.client.get("/decisions/accept/image")
    assert (missing.status_code, agreed(missing)) == (404, "unknown_decision")


def _alike(one: bytes, other: bytes) -> bool:
    import cv2
    import numpy as np

    first, second = (cv2.imdecode(np.frombuffer(data, np.uint8), 1) for data in (one, other))
    return bool(first.shape == second.shape and np.abs(first.astype(int) - second).mean() < 1)


def test_the_same_picture_of_a_part_sent_again_gets_its_first_decision_and_counts_once(
    running: Line, good: bytes, bad: bytes
) -> None:
    server = running.server

    def send(data: bytes, id_: str) -> dict[str, Any]:
        answer = server.infer(data, **{"X-Part": "again-1", "X-Request-ID": id_})
        assert answer.headers.get("x-kensa-repeat-of") == answer.json()["repeat_of"]
        found: dict[str, Any] = answer.json()
        return found

    first, second, other = send(good, "r1"), send(good, "r2"), send(bad, "r3")
    assert (first["repeat_of"], second["repeat_of"], other["repeat_of"]) == (None, "r1", None)
    assert second["raw_score"] == first["raw_score"]
    of_part = get(server, "/parts/again-1")["decisions"]
    assert [one["id"] for one in of_part] == ["r3", "r1"]
    counted = _inspected(server)
    drawn = server.infer(good, **{"X-Part": "again-1", "Accept": "image/png"})
    assert drawn.content[:4] == b"\x89PNG"
    assert counted
    assert _inspected(server) == counted
    assert drawn.headers["x-kensa-repeat-of"] == "r1"


def _inspected(server: Server) -> list[str]:
    lines = server.client.get("/metrics").text.splitlines()
    return [line for line in lines if line.startswith("kensa_verdicts_total{")]


def test_sent_again_while_the_first_is_being_judged_both_get_one_decision(
    running: Line, good: bytes
) -> None:
    answers = []

    def send() -> None:
        import httpx

        headers = {"Content-Type": "image/png", "X-Part": "twice"}
        answers.append(httpx.post(f"{running.server.url}/infer", content=good, headers=headers))

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.json()["repeat_of"] is None for answer in answers) == [False] * 5 + [True]
    assert len(get(running.server, "/parts/twice")["decisions"]) == 1


# ---- looking for it -----------------------------------------------------------------------------


def test_decisions_are_filtered_and_come_in_pages(running: Line, good: bytes) -> None:
    server = running.server
    for number in range(7):
        server.client.post("/infer", params={"part": f"paged-{number}"}, content=good,
                           headers={"Content-Type": "image/png"})  # fmt: skip
    since = get(server, "/decisions", limit=1)["decisions"][0]["time"]
    everything = get(server, "/decisions", limit=500)["decisions"]
    assert [one["number"] for one in everything] == sorted(
        (one["number"] for one in everything), reverse=True
    )
    pages, before = [], None
    while True:
        page = get(server, "/decisions", limit=3, **({"before": before} if before else {}))
        pages += page["decisions"]
        if (before := page["next"]) is None:
            break
    assert pages == everything
    assert get(server, "/decisions", part="paged-3")["decisions"][0]["part"] == "paged-3"
    assert {one["verdict"] for one in get(server, "/decisions", verdict="none")["decisions"]} <= {
        "none"
    }
    least = get(server, "/decisions", min_score=0.5, limit=500)["decisions"]
    assert all(one["score"] >= 0.5 for one in least)
    assert get(server, "/decisions", since=since)["decisions"][-1]["time"] >= since
    assert get(server, "/decisions", until="2020-01-01T00:00:00Z")["decisions"] == []
    for wrong in ("2026-11-29T06:00:00", "2026-11-29T06:00:00 09:00", "1764400000", "0.5", "today",
                  "2026-11-29"):  # fmt: skip
        answer = server.client.get("/decisions", params={"since": wrong})
        assert (answer.status_code, agreed(answer)) == (422, "bad_request")
        assert "with its zone" in answer.json()["error"]


def test_the_table_is_what_the_list_says_and_no_formula(running: Line, good: bytes) -> None:
    import csv
    import io

    running.server.infer(good[:99], **{"X-Part": "no picture"})
    running.server.infer(good, **{"X-Part": quote("＝HYPERLINK(2)")})
    running.server.infer(good, **{"X-Part": "=HYPERLINK(1)"})
    answer = running.server.client.get("/decisions.csv")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    listed = get(running.server, "/decisions", limit=500)["decisions"]
    assert [int(row["number"]) for row in rows] == [one["number"] for one in listed]
    assert [row["part"] for row in rows[:2]] == ["'=HYPERLINK(1)", "'＝HYPERLINK(2)"]
    assert float(rows[0]["raw_score"]) == listed[0]["raw_score"]
    assert (rows[2]["part"], rows[2]["width"], rows[2]["height"]) == ("no picture", "", "")


def test_statistics_count_what_the_list_shows(running: Line, good: bytes) -> None:
    server = running.server
    server.infer(good)
    server.infer(good[:100])
    listed = get(server, "/decisions", limit=500)["decisions"]
    for per in ("hour", "shift", "day"):
        spans = get(server, "/statistics", per=per)["spans"]
        assert sum(one["parts"] for one in spans) == sum(one["verdict"] != "none" for one in listed)
        assert sum(one["rejects"] for one in spans) == sum(
            one["verdict"] == "anomaly" for one in listed
        )
        reasons = sum(sum(one["no_verdict"].values()) for one in spans)
        assert reasons == sum(one["verdict"] == "none" for one in listed)
    table = server.client.get("/statistics.csv", params={"per": "day", "model": NAME}).text
    assert table.splitlines()[0].startswith("model,since,until,parts,rejects,")
    assert table.splitlines()[1].startswith(f"{NAME},")
    for since, until in (
        ("2020-01-01T00:00:00Z", "2026-01-01T00:00:00Z"),
        ("0001-01-01T00:00:00Z", "0001-01-01T06:00:00Z"),
        ("9999-12-31T12:00:00Z", "9999-12-31T23:00:00Z"),
        ("1970-01-01T00:00:00Z", None),  # no time at all would be the last day
        (None, "1970-01-01T00:00:00Z"),
    ):
        answer = server.client.get("/statistics", params={"since": since, "until": until})
        assert (answer.status_code, agreed(answer)) == (422, "bad_request")


def test_the_evidence_of_a_part_is_a_zip_with_all_of_it_and_its_hashes(
    running: Line, good: bytes, bad: bytes
) -> None:
    import io
    import zipfile

    server = running.server
    with_limit(server, threshold=0)
    for number, data in enumerate((good, bad)):  # of one id, as of a PLC that has a constant one
        server.infer(data, **{"X-Part": "E/1", "X-Request-ID": "evidence"})
        body = {"label": "defect", "defect": f"kind-{number}"}
        server.client.post("/decisions/evidence/label", json=body)
    second, first = (
        f"decisions/{one['number']}-evidence" for one in get(server, "/parts/E/1")["decisions"]
    )
    answer = server.client.get("/parts/E/1/evidence")
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as found:
        assert found.testzip() is None
        names = set(found.namelist())
        live = running.model()["live"]
        assert {f"{first}.json", f"{second}.json", f"{second}.overlay.png", "trail.json",
                "sha256.txt", f"versions/{NAME}/{live}/meta.json",
                f"versions/{NAME}/{live}/gate.json"} <= names  # fmt: skip
        assert len(found.namelist()) == len(names)
        assert (found.read(f"{first}.png"), found.read(f"{second}.png")) == (good, bad)
        trail = json.loads(found.read("trail.json"))
        assert [line["details"]["defect"] for line in trail] == ["kind-1", "kind-0"]
        hashes = dict(line.split("  ")[::-1] for line in
                      found.read("sha256.txt").decode().splitlines())  # fmt: skip
        assert hashes.keys() == names - {"sha256.txt"}
        for name, sha256 in hashes.items():
            assert hashlib.sha256(found.read(name)).hexdigest() == sha256
    of_first = {"number": first.removeprefix("decisions/").removesuffix("-evidence")}
    seen = server.client.get("/decisions/evidence/image", params=of_first)
    assert seen.content == good  # without a number, it is the last one
    assert server.client.get("/decisions/evidence/image").content == bad
    body = {"label": "good", "reason": "of the first one"}
    server.client.post("/decisions/evidence/label", params=of_first, json=body)
    labels = [one["label"] for one in get(server, "/parts/E/1")["decisions"]]
    assert labels == ["defect", "good"]
    other = server.client.get("/decisions/marked", params=of_first)
    assert (other.status_code, agreed(other)) == (404, "unknown_decision")
    number = of_first["number"]  # a power cut may leave an empty file
    (running.store.folder(NAME, live).parents[2] / "decisions" / "pictures" / "0" / f"{number}.map"
     ).write_bytes(b"")  # fmt: skip
    drawn = server.client.get("/decisions/evidence/overlay", params=of_first)
    assert (drawn.status_code, agreed(drawn)) == (404, "unknown_decision")
    assert "its map is damaged" in drawn.text
    answer = server.client.get("/parts/E/1/evidence")
    with zipfile.ZipFile(io.BytesIO(answer.content)) as found:
        assert names - set(found.namelist()) == {f"{first}.overlay.png"}
    nobody = server.client.get("/parts/nobody/evidence")
    assert (nobody.status_code, agreed(nobody)) == (404, "unknown_decision")


# ---- what people say of it ----------------------------------------------------------------------


def test_the_last_label_counts_and_all_that_was_said_is_kept(running: Line, good: bytes) -> None:
    server = running.server
    server.infer(good, **{"X-Request-ID": "marked"})

    def mark(**body: Any) -> Any:
        answer = server.client.post("/decisions/marked/label", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    mark(label="unusable", reason="x" * 500)
    mark(label="defect", defect="scratch", reason="seen under the lamp")
    found = mark(label="good")
    assert (found["label"], found["defect"]) == ("good", None)
    labels = [one["details"]["label"] for one in found["history"]]
    assert labels == ["good", "defect", "unusable"]
    assert found["history"][1]["reason"] == "seen under the lamp"
    assert "marked" in [one["id"] for one in get(server, "/decisions", label="good")["decisions"]]
    for body in ({"label": "fine"}, {"label": "good", "defect": "scratch"}, {}):
        assert server.client.post("/decisions/marked/label", json=body).status_code == 422
    found = mark(label="defect", defect="d" * 100, reason="r" * 500)
    assert (found["defect"], found["history"][0]["reason"]) == ("d" * 100, "r" * 500)
    for what, body in (("kind of defect", {"defect": "a\0b"}), ("reason", {"reason": "a\0b"})):
        unseen = server.client.post("/decisions/marked/label", json={"label": "defect", **body})
        assert unseen.status_code == 422
        assert (
            f"The {what} 'a\\x00b' holds characters that cannot be seen" in unseen.json()["error"]
        )
    missing = server.client.post("/decisions/nobody/label", json={"label": "good"})
    assert (missing.status_code, agreed(missing)) == (404, "unknown_decision")


def test_a_label_that_is_withdrawn_is_as_if_nobody_had_looked_but_for_the_trail(
    kensa_model: Path, good: bytes, tmp_path: Path
) -> None:
    with line(tmp_path, kensa_model) as running:
        client = running.server.client
        for id_ in ("slipped", "kept"):
            running.server.infer(good, **{"X-Request-ID": id_})
            body = {"label": "defect", "defect": "scratch"}
            assert client.post(f"/decisions/{id_}/label", json=body).status_code == 200

        def withdrawn(**query: Any) -> Any:
            answer = client.delete("/decisions/slipped/label", params=query)
            assert answer.status_code == 200, answer.text
            return answer.json()

        found = withdrawn(reason="the wrong key")
        assert (found["label"], found["defect"]) == (None, None)
        said = [(one["details"]["label"], one["reason"]) for one in found["history"]]
        assert said == [("", "the wrong key"), ("defect", None)]
        assert withdrawn() == found  # there is nothing left to withdraw
        labels = {one["id"]: one["label"] for one in get(running.server, "/decisions")["decisions"]}
        assert labels == {"slipped": None, "kept": "defect"}
        unmarked = get(running.server, "/decisions", label="none")["decisions"]
        assert [one["id"] for one in unmarked] == ["slipped"]
        missing = client.delete("/decisions/nobody/label")
        assert (missing.status_code, agreed(missing)) == (404, "unknown_decision")
        unseen = client.delete("/decisions/kept/label", params={"reason": "a\0b"})
        assert (unseen.status_code, agreed(unseen)) == (422, "bad_request")
    assert verify(tmp_path).returncode == 0


def test_an_undo_takes_back_nobody_elses_label(
    kensa_model: Path, good: bytes, tmp_path: Path
) -> None:
    with line(tmp_path, kensa_model) as running:
        client, at = running.server.client, "/decisions/seen/label"
        running.server.infer(good, **{"X-Request-ID": "seen"})
        mine = client.post(at, json={"label": "good"}).json()["history"][0]["number"]
        theirs = client.post(at, json={"label": "defect"}).json()["history"][0]["number"]
        refused = [
            client.delete(at, params={"after": mine}),
            client.post(at, json={"label": "unusable", "after": mine}),
        ]
        assert [(one.status_code, agreed(one)) for one in refused] == [(409, "conflict")] * 2
        found = client.get("/decisions/seen").json()
        assert (found["label"], found["history"][0]["number"]) == ("defect", theirs)
        again = client.post(at, json={"label": "good", "after": theirs})
        assert again.json()["label"] == "good"
        last = again.json()["history"][0]["number"]
        assert client.delete(at, params={"after": last}).json()["label"] is None


@pytest.mark.parametrize("count", [20, pytest.param(1_000, marks=pytest.mark.soak)])
def test_a_preview_is_what_a_replay_says_part_by_part(
    running: Line, sample_data: Path, count: int
) -> None:
    server, flipping = running.server, min(count // 5, 150)
    with_limit(server, threshold=0)  # all are rejected, so all pictures are kept
    pictures = [cv2.imread(str(path)) for path in
                sorted((sample_data / "test" / CATEGORY).rglob("*.png"))]  # fmt: skip
    sent = {}
    for number in range(count):
        turned, shift = divmod(number, len(pictures))[::-1]
        # None as it is: the lowest score of the test images is the limit itself, to rounding.
        _, data = cv2.imencode(".png", np.roll(pictures[turned], 5 * (shift + 1), axis=1))
        id_ = f"preview-{count}-{number}"
        sent[id_] = server.infer(data.tobytes(), **{"X-Request-ID": id_}).json()
    scores = sorted(one["raw_score"] for one in sent.values())
    wanted = (scores[flipping - 1] + scores[flipping]) / 2
    first = get(server, f"/decisions/preview-{count}-0")["time"]
    found = get(server, f"/models/{NAME}/threshold/preview", raw=wanted, since=first)
    assert (found["parts"], found["rejected"]) == (count, count)
    assert found["would_reject"] == count - flipping
    flips = {one["id"] for one in found["flips"]}
    with_limit(server, raw=wanted)
    version = running.model()["live"]
    for id_, was in sent.items():
        answer = server.client.post(f"/decisions/{id_}/replay", params={"version": version})
        again = answer.json()
        assert again["raw_score"] == was["raw_score"], answer.text
        assert (again["verdict"] == "normal") == (id_ in flips)
    assert len(flips) == flipping


def test_a_replay_by_the_version_that_judged_gives_the_same_score_and_counts_nowhere(
    running: Line, bad: bytes
) -> None:
    server = running.server
    with_limit(server, threshold=0)
    was = server.infer(bad, **{"X-Request-ID": "old"}).json()
    with_limit(server, threshold=0.1)
    judged = server.client.get("/metrics").text
    again = server.client.post("/decisions/old/replay").json()
    assert again["version"] == was["model_version"] != running.model()["live"]
    assert (again["raw_score"], again["threshold"]) == (was["raw_score"], was["threshold"])

    def verdicts(text: str) -> list[str]:
        return re.findall(r"kensa_verdicts_total\{.*", text)

    assert verdicts(server.client.get("/metrics").text) == verdicts(judged)
    assert len(get(server, "/decisions", limit=500)["decisions"]) > 0
    assert running.model()["live"] is not None


def test_a_picture_is_drawn_as_it_was_judged_also_when_its_version_is_gone(
    kensa_model: Path, bad: bytes, tmp_path: Path
) -> None:
    with line(tmp_path, kensa_model, KENSA_KEEP_VERSIONS="1") as running:
        with_limit(running.server, threshold=0)
        judged = running.server.infer(bad, **{"X-Part": "old", "X-Request-ID": "old"}).json()
        before = running.server.client.get("/decisions/old/overlay").content
        for threshold in (0.6, 0.7, 0.8):
            with_limit(running.server, threshold=threshold)
        left = [one["version"] for one in running.model()["versions"]]
        assert judged["model_version"] not in left
        assert running.server.client.get("/decisions/old/overlay").content == before
        assert running.server.client.get("/decisions/old/heatmap").status_code == 200
        again = running.server.client.post("/decisions/old/replay")
        assert (again.status_code, agreed(again)) == (404, "unknown_version")


# ---- who changed what, and whether it is whole --------------------------------------------------


def test_thresholds_versions_labels_and_keys_leave_a_line_with_who_and_why(
    kensa_model: Path, good: bytes, tmp_path: Path
) -> None:
    with line(tmp_path, kensa_model) as running:
        with_limit(running.server, threshold=0.7)
        assert running.server.client.post(f"/models/{NAME}/rollback").status_code == 200
        running.server.infer(good, **{"X-Request-ID": "one"})
        running.server.client.post("/decisions/one/label", json={"label": "good"})
        program = [sys.executable, "-m", "app", "keys", "add", "boss", "--role", "admin"]
        environment = {"KENSA_DATA_DIR": str(tmp_path / "data"), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        headers = {"X-API-Key": done.stdout.strip()}
        body = {"threshold": 0.6, "reason": "the boss says so"}
        changed = running.server.client.put(f"/models/{NAME}/threshold", json=body, headers=headers)
        assert changed.status_code == 200, changed.text
        lines = running.server.client.get("/trail", headers=headers).json()["lines"]
    said = [(one["what"], one["key"], one["reason"]) for one in reversed(lines)]
    assert [what for what, _, _ in said] == [
        "threshold", "live", "rollback", "label", "key_added", "threshold", "live",
    ]  # fmt: skip
    assert said[0] == ("threshold", None, "as this test needs it")
    assert said[5] == ("threshold", "boss", "the boss says so")
    assert verify(tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        ("UPDATE decisions SET raw_score = 0.1 WHERE number = 3", "Decision 3 was"),
        ("UPDATE decisions SET part = 'other' WHERE number = 3", "Decision 3 was"),
        ("DELETE FROM decisions WHERE number = 3", "Decision 3 is missing"),
        ("DELETE FROM decisions WHERE number = 5", "Decision 5 is missing"),
        ("DELETE FROM decisions WHERE number = 1", "Decision 1 is missing"),
        ("UPDATE decisions SET label = 'good' WHERE number = 4", "The label of decision 4"),
        ("UPDATE decisions SET label = '' WHERE number = 2", "The label of decision 2"),
        ("UPDATE trail SET who = 'other' WHERE number = 1", "Line 1 of the audit trail was"),
        ("DELETE FROM trail WHERE number = 1", "Line 1 of the audit trail is missing"),
        ("DELETE FROM trail WHERE number = 2", "Line 2 of the audit trail is missing"),
        ("UPDATE decisions SET number = 9 WHERE number = 5", "Decision 5 is missing"),
        ("INSERT INTO trail (number, at, who, what, subject, reason, details, decisions,"
         " decisions_hash, hash) SELECT 3, at, who, what, subject, reason, details, decisions,"
         " decisions_hash, hash FROM trail WHERE number = 2", "Line 3 of the audit trail was"),
    ],
)  # fmt: skip
def test_what_was_changed_afterwards_is_named(
    whole: Path, tmp_path: Path, harm: str, named: str
) -> None:
    shutil.copytree(whole / "data" / "decisions", tmp_path / "data" / "decisions")
    assert verify(tmp_path).returncode == 0
    with sqlite3.connect(tmp_path / "data" / "decisions" / "decisions.sqlite") as database:
        database.execute(harm)
    database.close()
    done = verify(tmp_path)
    assert (done.returncode, named in done.stderr) == (2, True), done.stderr


def test_a_decision_that_was_noted_on_paper_is_held_against_the_record(
    whole: Path, tmp_path: Path
) -> None:
    from app.decisions.database import open_or_make

    shutil.copytree(whole / "data" / "decisions", tmp_path / "data" / "decisions")
    with open_or_make(tmp_path / "data" / "decisions") as database:
        number, hash_ = database.last("decisions")
    noted = verify(tmp_path, "--decision", str(number), "--hash", hash_)
    assert (noted.returncode, noted.stdout.splitlines()[-1]) == (
        0, f"Decision {number} is the one that was noted.",
    )  # fmt: skip
    for other, words in (
        (number - 1, "is not the one that was noted"),
        (99, "is not in the"),
        (10**30, "is not in the"),
    ):
        wrong = verify(tmp_path, "--decision", str(other), "--hash", hash_)
        assert (wrong.returncode, words in wrong.stderr) == (2, True), wrong.stderr
    half = verify(tmp_path, "--decision", str(number))
    assert (half.returncode, "say both" in half.stderr) == (2, True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record of five decisions and two lines."""
    from app.decisions.database import Note, open_or_make
    from support.decisions import decision

    folder = tmp_path_factory.mktemp("whole")
    with open_or_make(folder / "data" / "decisions") as database:
        database.append([decision(id=f"d{number}") for number in range(1, 4)])
        second = database.one("d2")
        assert second is not None
        database.mark(second, "defect", "scratch", "anna", "")
        database.append([decision(id="d4"), decision(id="d5"),
                         Note.now("threshold", "anna", "part", "", {})])  # fmt: skip
    return folder


# ---- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [2, pytest.param(100, marks=pytest.mark.soak)])
def test_after_a_kill_nothing_older_than_a_second_is_lost_and_the_chains_are_whole(
    kills: int, kensa_model: Path, good: bytes, tmp_path: Path
) -> None:
    for _ in range(kills):
        killed_under_load(kensa_model, good, tmp_path)


def killed_under_load(model: Path, photo: bytes, folder: Path) -> None:
    answered: list[tuple[float, str]] = []
    with line(folder, **({} if (folder / "data").exists() else {"KENSA_MODEL_DIR": str(model),
                         "KENSA_MODEL_NAME": NAME})) as running:  # fmt: skip
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            id_ = running.server.infer(photo).json()["id"]
            answered.append((time.monotonic(), id_))
        running.server.process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        running.server.process.wait()
    done = verify(folder)
    assert done.returncode == 0, done.stderr
    with sqlite3.connect(folder / "data" / "decisions" / "decisions.sqlite") as database:
        kept = {row[0] for row in database.execute("SELECT id FROM decisions")}
    database.close()
    assert [id_ for when, id_ in answered if when < killed - 1 and id_ not in kept] == []
    assert len(answered) > 5


def test_a_file_that_was_cut_is_repaired_at_the_start_in_words(
    kensa_model: Path, good: bytes, tmp_path: Path
) -> None:
    settings = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_MODEL_NAME": NAME}
    with line(tmp_path, **settings) as running:
        for number in range(40):
            running.server.infer(good, **{"X-Part": f"P{number}"})
        get(running.server, "/decisions")
        running.server.process.terminate()
        running.server.process.wait()
    path = tmp_path / "data" / "decisions" / "decisions.sqlite"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - size // 4)
    with line(tmp_path, **settings) as running:
        assert running.server.infer(good).status_code == 200
        found = get(running.server, "/decisions", limit=500)["decisions"]
        assert len(found) > 1
        repaired = get(running.server, "/trail")["lines"]
        assert "repair" in [one["what"] for one in repaired]
    assert "decisions.sqlite was damaged" in (tmp_path / "server.log").read_text()


def test_what_cannot_be_written_stops_no_inspection_and_is_said(
    kensa_model: Path, good: bytes, tmp_path: Path
) -> None:
    """The folder of decisions is a file: as good as a disk that takes nothing."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "decisions").write_text("in the way")
    settings = {"KENSA_MODEL_DIR": str(kensa_model), "KENSA_MODEL_NAME": NAME}
    with line(tmp_path, **settings) as running:
        assert running.server.infer(good).status_code == 200
        for _ in range(100):
            degraded = get(running.server, "/healthz")["degraded"]
            if any("Decisions are not recorded" in one for one in degraded):
                break
            time.sleep(0.1)
        else:
            raise AssertionError(degraded)
        (tmp_path / "data" / "decisions").unlink()
        for _ in range(100):
            if not any(
                "not recorded" in one for one in get(running.server, "/healthz")["degraded"]
            ):
                break
            time.sleep(0.1)
        assert len(get(running.server, "/decisions")["decisions"]) == 1


def test_it_can_be_turned_off(kensa_model: Path, good: bytes, tmp_path: Path) -> None:
    with line(tmp_path, kensa_model, KENSA_RECORD="off") as running:
        assert running.server.infer(good).status_code == 200
        for path in ("/decisions", "/decisions.csv", "/decisions/x", "/parts/x", "/trail"):
            answer = running.server.client.get(path)
            assert (answer.status_code, agreed(answer)) == (409, "conflict")
        assert not (tmp_path / "data" / "decisions").exists()


def key_of(folder: Path, name: str, role: str) -> dict[str, str]:
    program = [sys.executable, "-m", "app", "keys", "add", name, "--role", role]
    environment = {"KENSA_DATA_DIR": str(folder / "data"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    return {"X-API-Key": done.stdout.strip()}


def test_a_lines_key_writes_no_label(kensa_model: Path, good: bytes, tmp_path: Path) -> None:
    with line(tmp_path, kensa_model) as running:
        plc = key_of(tmp_path, "plc-3", "line")
        operator = key_of(tmp_path, "anna", "operator")
        running.server.infer(good, **plc, **{"X-Request-ID": "k"})
        mark = {"url": "/decisions/k/label", "json": {"label": "good"}}
        assert running.server.client.post(**mark, headers=plc).status_code == 403  # type: ignore[arg-type]
        assert running.server.client.post(**mark, headers=operator).status_code == 200  # type: ignore[arg-type]
        found = running.server.client.get("/decisions/k", headers=plc).json()
    assert found["key"] == "plc-3"
    assert found["history"][0]["key"] == "anna"


def test_an_admin_deletes_pictures_and_old_decisions_with_a_reason_and_the_rest_stays_provable(
    kensa_model: Path, good: bytes, bad: bytes, tmp_path: Path
) -> None:
    with line(tmp_path, kensa_model, KENSA_RECORD_NEAR="1") as running:
        client = running.server.client
        operator = key_of(tmp_path, "anna", "operator")
        boss = key_of(tmp_path, "boss", "admin")
        for number in range(3):
            running.server.infer(good, **boss, **{"X-Request-ID": f"d{number}"})
        third = client.get("/decisions/d2", headers=boss).json()
        why = f"ten years are over: {'r' * 400}"
        old = {"until": third["time"], "reason": why}
        picture = {"url": "/decisions/d2/image", "params": {"reason": "a hand is in it"}}
        assert client.delete("/decisions", params=old, headers=operator).status_code == 403
        assert client.delete(**picture, headers=operator).status_code == 403
        for more in ("model", "since"):  # which would delete less, if there were such a thing
            asked = {**old, more: third[{"since": "time"}.get(more, more)]}
            assert agreed(client.delete("/decisions", params=asked, headers=boss)) == "bad_request"
        for wrong in (" ", "\0", "r" * 501):
            asked = {**old, "reason": wrong}
            assert client.delete("/decisions", params=asked, headers=boss).status_code == 422
        assert client.delete("/decisions", params=old, headers=boss).json() == {"decisions": 2}
        assert client.get("/decisions/d1", headers=boss).status_code == 404
        assert client.get("/decisions/d2/image", headers=boss).content == good
        assert client.delete(**picture, headers=boss).status_code == 204
        for again in (client.delete(**picture, headers=boss),
                      client.get("/decisions/d2/overlay", headers=boss)):  # fmt: skip
            assert (again.status_code, agreed(again)) == (404, "unknown_decision")
            assert "was deleted" in again.json()["error"]
        assert not list((tmp_path / "data" / "decisions").glob("pictures/*/*"))
        files = [("files", ("a.png", good)), ("files", ("b.png", bad))]
        sent = client.post("/datasets/bolt/train", files=files, headers=operator)
        assert sent.status_code == 201, sent.text
        for path in ("/datasets/bolt/train/a.png", "/datasets/bolt"):
            assert client.delete(path, headers=operator).status_code == 204
        lines = client.get("/trail", headers=boss).json()["lines"][::-1]
        spans = client.get("/statistics", headers=boss).json()["spans"]
    said = [(one["what"], one["key"], one["subject"], one["reason"]) for one in lines]
    assert said[2:] == [
        ("prune", "boss", "decisions", why),
        ("deleted", "boss", "d2", "a hand is in it"),
        ("deleted", "anna", "bolt", None),
        ("deleted", "anna", "bolt", None),
    ]
    assert [one["details"] for one in lines[-2:]] == [{"split": "train", "name": "a.png"}, {}]
    assert sum(one["parts"] for one in spans) == 3
    done = verify(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 decisions from number 3 on" in done.stdout
