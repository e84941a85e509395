"""Claims about known pictures: one that is judged wrongly closes the line, until it is mended."""

from __future__ import annotations

import asyncio
import errno
import json
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from app.http.keys import add_key
from app.settings import Settings
from app.watching.doctor.command import examine
from engines.errors import Unreadable
from engines.meta import Meta
from engines.store.challenges import Challenges
from engines.store.versions import Store
from support.damage import png
from support.failing import failing
from support.in_process import in_process, settings_of
from support.line import NAME, Line, line
from support.plans import SIDE, tiny_bundle, tiny_score
from support.server import RAW, Server, agreed
from support.waiting import until

SEES, BLIND = 110, 240  # the lightest grey that passes
GOOD, BAD = 90, 200
TEXT = {"Accept": "text/plain"}
WHY = {"reason": "The master parts."}


def grey(value: int) -> bytes:
    return png(np.full((SIDE, SIDE, 3), value, np.uint8))


def model(folder: Path, limit: int) -> Path:
    """It rejects what is lighter than a limit."""
    offset = float(limit)  # another graph for each, so that none is the version of another
    bundle = tiny_bundle(folder, offset=offset)
    auto = tiny_score(np.full((SIDE, SIDE, 3), limit, np.uint8), offset=offset)
    Meta.read(bundle / "meta.json").with_(image_threshold_auto=auto).write(bundle / "meta.json")
    return bundle


@pytest.fixture(scope="module")
def sees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("sees") / "model", SEES)


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It passes every defect."""
    return model(tmp_path_factory.mktemp("blind") / "model", BLIND)


def put(client: Any, *, key: str | None = None, **fields: str) -> Any:
    files = [("good", ("g.png", grey(GOOD))), ("bad", ("b.png", grey(BAD)))]
    headers = {"X-API-Key": key} if key else {}
    return client.put(f"/models/{NAME}/challenges", files=files, data={**WHY, **fields},
                      headers=headers)  # fmt: skip


def challenged(server: Server) -> str:
    answer = server.client.post(f"/models/{NAME}/challenge", headers=TEXT)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain")
    return answer.text.strip()


def shown(server: Server) -> dict[str, Any]:
    answer = server.client.get(f"/models/{NAME}/challenges")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def trail(server: Server, key: str | None = None) -> list[dict[str, Any]]:
    headers = {"X-API-Key": key} if key else {}
    answer = server.client.get("/trail", params={"subject": NAME}, headers=headers)
    lines: list[dict[str, Any]] = answer.json()["lines"]
    return lines[::-1]


@contextmanager
def closed(folder: Path, *bundles: Path, **settings: str) -> Iterator[Line]:
    """A line whose live version failed its challenge."""
    with line(folder, *bundles, **settings) as running:
        assert put(running.server.client).status_code == 200
        assert challenged(running.server) == "NG 1/2 bad/b.png"
        yield running


# ---- closed, and opened --------------------------------------------------------------------------


def test_one_wrong_verdict_closes_the_line_within_one_request_and_a_kill_does_not_open_it(
    sees: Path, blind: Path, tmp_path: Path
) -> None:
    """Over all routes that judge parts; it is opened by passing the challenge."""
    with line(tmp_path, sees, blind) as running:
        first, _ = running.store.versions(NAME)
        assert put(running.server.client).status_code == 200
        assert running.server.infer(grey(GOOD)).status_code == 200
        assert challenged(running.server) == "NG 1/2 bad/b.png"
        assert refused(running.server)
    with line(tmp_path) as again:  # the one before was killed
        assert refused(again.server)
        assert again.activate(first).status_code == 200  # which would pass
        assert refused(again.server)
        assert challenged(again.server) == "OK 2/2"
        answer = again.server.infer(grey(GOOD))
        assert (answer.status_code, answer.json()["label"]) == (200, "Normal")
        found = shown(again.server)
        assert (found["released"], found["problem"]) == (True, None)
    with line(tmp_path) as once_more:
        assert once_more.server.infer(grey(GOOD)).status_code == 200


def refused(server: Server) -> bool:
    answer = server.infer(grey(GOOD))
    assert (answer.status_code, agreed(answer)) == (503, "not_released")
    assert "1 of 2 known pictures wrongly (bad/b.png)" in answer.json()["error"]
    assert server.infer(grey(GOOD), **TEXT).text == "ERR not_released\n"
    body = {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, SIDE, SIDE, 3],
                        "data": [GOOD] * (SIDE * SIDE * 3)}]}  # fmt: skip
    answer = server.client.post(f"/v2/models/{NAME}/infer", json=body)
    assert (answer.status_code, agreed(answer)) == (503, "not_released")
    return True


def test_or_it_says_ng_of_every_part_and_of_none_as_the_models_own_verdict(
    sees: Path, blind: Path, tmp_path: Path
) -> None:
    ng = {"KENSA_NOT_RELEASED": "ng", "KENSA_RECORD_SAMPLE": "0", "KENSA_RECORD_NEAR": "0"}
    with closed(tmp_path, sees, blind, **ng) as running:
        is_ng(running.server)
    with line(tmp_path, **ng) as again:
        is_ng(again.server)
        kept = again.server.client.get("/decisions").json()["decisions"][0]
        assert (kept["verdict"], kept["code"]) == ("anomaly", "not_released")
        assert kept["score"] < kept["threshold"]
        assert not kept["has_picture"]  # it is none of the model's rejects
        preview = again.server.client.get(f"/models/{NAME}/threshold/preview?threshold=0.5").json()
        assert (preview["parts"], preview["flips"]) == (0, [])
        assert again.activate(again.store.versions(NAME)[0]).status_code == 200
        assert challenged(again.server) == "OK 2/2"
        assert again.server.infer(grey(GOOD), **TEXT).text.startswith("OK ")


def test_ng_that_is_said_so_takes_no_new_version_back(
    sees: Path, blind: Path, tmp_path: Path
) -> None:
    """The first parts of a version are counted when they get its own verdict."""
    settings = {"KENSA_NOT_RELEASED": "ng", "KENSA_ROLLBACK_PARTS": "2", "KENSA_GATE_RECENT": "0"}
    with closed(tmp_path, blind, **settings) as running:
        version = running.publish(sees)
        assert running.wait(version, "live", "held") == "live"
        for _ in range(4):
            is_ng(running.server)
        assert challenged(running.server) == "OK 2/2"
        assert running.server.infer(grey(GOOD)).json()["label"] == "Normal"
        assert running.model()["live"] == version
        for _ in range(2):  # now they count
            assert running.server.infer(grey(BAD)).json()["label"] == "Anomaly"
        until(lambda: running.model()["live"] != version)


def is_ng(server: Server) -> None:
    assert server.infer(grey(GOOD), **TEXT).text.startswith("NG 0.")
    answer = server.infer(grey(GOOD))
    said = answer.json()
    assert (answer.status_code, said["label"], said["is_anomalous"]) == (200, "Anomaly", True)
    assert said["score"] < said["threshold"]
    assert "failed its challenge" in said["hint"]
    assert "failed its challenge" in answer.headers["X-Kensa-Hint"]
    part = server.client.post(
        "/parts/one/views/top?of=1", content=grey(GOOD), headers={"Content-Type": "image/png"}
    ).json()
    assert (part["verdict"], part["code"]) == ("anomaly", "not_released")
    assert part["views"][0]["code"] == "not_released"


def test_only_an_operators_key_with_a_reason_lets_a_model_through_and_the_record_says_who(
    sees: Path, blind: Path, tmp_path: Path
) -> None:
    keys = {role: add_key(tmp_path / "data" / "keys.json", f"the-{role}", role)
            for role in ("line", "operator")}  # fmt: skip
    plc, person = ({"X-API-Key": keys[role]} for role in ("line", "operator"))
    release, path = f"/models/{NAME}/release", f"/models/{NAME}/challenge"
    with line(tmp_path, sees, blind) as running:
        client = running.server.client
        assert put(client, key=keys["line"]).status_code == 403
        assert put(client, key=keys["operator"]).status_code == 200
        assert client.post(path, headers={**plc, **TEXT}).text == "NG 1/2 bad/b.png\n"
        assert client.post(release, json=WHY, headers=plc).status_code == 403
        for body in ({}, {"reason": ""}, {"reason": "  "}, {"reason": "\u202e"}):
            assert client.post(release, json=body, headers=person).status_code == 422
        assert running.server.infer(grey(GOOD), **plc).status_code == 503
        answer = client.post(release, json={"reason": "b.png is worn."}, headers=person)
        assert (answer.status_code, answer.json()["released"]) == (200, True)
        assert running.server.infer(grey(GOOD), **plc).status_code == 200
        answer = client.post(release, json=WHY, headers=person)
        assert (answer.status_code, agreed(answer)) == (409, "conflict")
        lines = {one["what"]: one for one in trail(running.server, keys["operator"])}
        assert [(what, lines[what]["key"]) for what in lines] == [
            ("challenges", "the-operator"), ("challenge_failed", "the-line"),
            ("release", "the-operator"),
        ]  # fmt: skip
        assert lines["release"]["reason"] == "b.png is worn."
        assert lines["challenges"]["reason"] == WHY["reason"]
        good, bad = lines["challenge_failed"]["details"]["pictures"]
        told = lines["challenges"]["details"]["pictures"]
        assert [good["sha256"], bad["sha256"]] == [one["sha256"] for one in told]
        assert (good["right"], good["label"]) == (True, "Normal")
        assert (bad["right"], bad["label"], bad["expected"]) == (False, "Normal", "bad")
        assert bad["score"] < bad["threshold"]
    with line(tmp_path) as again:
        assert again.server.infer(grey(GOOD), **plc).status_code == 200


def test_a_part_that_is_sent_again_gets_no_answer_from_before(
    sees: Path, blind: Path, tmp_path: Path
) -> None:
    """Neither OK from before it was closed, nor NG from before it was opened."""
    named = {"X-Part": "KB-1"}
    with line(tmp_path, sees, blind, KENSA_NOT_RELEASED="ng") as running:
        server = running.server
        put(server.client)
        assert server.infer(grey(GOOD), **TEXT, **named).text.startswith("OK ")
        challenged(server)
        assert server.infer(grey(GOOD), **TEXT, **named).text.startswith("NG ")
        assert server.client.post(f"/models/{NAME}/release", json=WHY).status_code == 200
        assert server.infer(grey(GOOD), **TEXT, **named).text.startswith("OK ")


def test_the_record_says_what_closed_a_line_also_where_that_challenge_was_killed(
    blind: Path, tmp_path: Path
) -> None:
    """Once, however often the server starts."""
    with closed(tmp_path, blind) as running:
        path = running.store.root / NAME / "challenges" / "challenges.json"
        kept = json.loads(path.read_text())
        assert trail(running.server)[-1]["what"] == "challenge_failed"  # and it is written
    wrong = kept["last"]["pictures"][1]
    kept["begun"], kept["last"] = {**kept["last"], "pictures": [wrong]}, None
    path.write_text(json.dumps(kept))
    for _ in range(2):
        with line(tmp_path) as again:
            assert refused(again.server)
            failed = [one for one in trail(again.server) if one["what"] == "challenge_failed"]
            assert [one["reason"] for one in failed] == ["bad/b.png"] * 2
            assert [one["details"]["of"] for one in failed] == [2, 1]


@pytest.mark.parametrize("way", ["refuse", "ng"])
def test_no_part_of_several_views_passes_by_what_was_said_before_its_model_was_closed(
    way: str, sees: Path, blind: Path, tmp_path: Path
) -> None:
    """Neither one that is decided, nor one that waits for a view by a model that is released."""
    with line(tmp_path, blind, KENSA_NOT_RELEASED=way) as running:
        server = running.server
        running.publish(sees, "other")
        until(lambda: server.client.get("/v2/models/other/ready").status_code == 200)

        def send(part: str, view: str, model: str = NAME) -> str:
            answer = server.client.post(
                f"/parts/{part}/views/{view}?of=2&model={model}&deadline_ms=4000",
                content=grey(GOOD), headers={**RAW, **TEXT},
            )  # fmt: skip
            return answer.text.strip()

        put(server.client)
        assert [send("KB-1", "left"), send("KB-1", "top")][1].startswith("OK ")
        assert send("KB-2", "left") == "PENDING 1/2"
        challenged(server)
        again = [send("KB-1", "left"), send("KB-1", "top")]
        refused = ["ERR not_released"] * 2
        assert again == refused if way == "refuse" else again[1].startswith("NG ")
        assert send("KB-2", "top", "other") == "PENDING 1/2"
        said = server.client.get("/parts/KB-2/verdict?wait_ms=6000")
        assert (said.json()["verdict"], said.json()["missing"]) == ("none", ["left"])
        assert said.json()["views"][0]["code"] == "not_released"
        assert server.client.post(f"/models/{NAME}/release", json=WHY).status_code == 200
        assert [send("KB-3", "left"), send("KB-3", "top")][1].startswith("OK ")


def test_a_model_that_is_challenged_no_more_is_released(blind: Path, tmp_path: Path) -> None:
    with closed(tmp_path, blind) as running:
        client, path = running.server.client, f"/models/{NAME}/challenges"
        assert client.delete(path).status_code == 422  # without a reason
        assert client.delete(path, params=WHY).status_code == 204
        assert running.server.infer(grey(GOOD)).status_code == 200
        assert shown(running.server)["pictures"] == []
        assert client.delete(path, params=WHY).status_code == 409
        answer = client.post(f"/models/{NAME}/challenge", headers=TEXT)
        assert (answer.status_code, answer.text) == (409, "ERR conflict\n")


def test_other_pictures_open_no_line(blind: Path, tmp_path: Path) -> None:
    with closed(tmp_path, blind) as running:
        assert put(running.server.client).json()["released"] is False
        assert running.server.infer(grey(GOOD)).status_code == 503
        dark = [("good", ("g.png", grey(GOOD))), ("bad", ("b.png", grey(250)))]
        answer = running.server.client.put(
            f"/models/{NAME}/challenges", files=dark, data={**WHY, "at_shifts": "false"}
        )
        assert answer.json()["last"] is None  # nothing is known of these
        assert running.server.infer(grey(GOOD)).status_code == 503
        assert challenged(running.server) == "OK 2/2"
        assert running.server.infer(grey(GOOD)).status_code == 200


# ---- which pictures ------------------------------------------------------------------------------


def test_known_pictures_outlive_what_they_were_copied_from(sees: Path, tmp_path: Path) -> None:
    with line(tmp_path, sees) as running:
        client = running.server.client
        running.server.infer(grey(BAD), **{"X-Request-ID": "reject-1"})
        files = [("file", ("01.png", grey(GOOD)))]
        assert client.post("/datasets/bolt/normal", files=files).status_code == 201
        body = {
            **WHY, "good": [{"category": "bolt", "split": "normal", "name": "01.png"}],
            "bad": [{"decision": "reject-1"}],
        }  # fmt: skip
        answer = client.put(f"/models/{NAME}/challenges", json=body)
        assert answer.status_code == 200, answer.text
        assert [one["name"] for one in answer.json()["pictures"]] == ["good/01.png", "bad/reject-1"]
        assert client.delete("/datasets/bolt").status_code == 204
        gone = client.delete("/decisions", params={"until": "2999-01-01T00:00:00Z", **WHY})
        assert gone.json() == {"decisions": 1}
        assert challenged(running.server) == "OK 2/2"
        good, bad = shown(running.server)["pictures"]
        path = f"/models/{NAME}/challenges/{bad['sha256']}"
        picture = client.get(path)
        assert (picture.content, picture.headers["content-type"]) == (grey(BAD), "image/png")
        assert good["origin"] == body["good"][0]
        known = {"good": [{"sha256": good["sha256"]}], "bad": [{"sha256": bad["sha256"]}], **WHY}
        assert client.put(f"/models/{NAME}/challenges", json=known).status_code == 200
        assert [one["origin"] for one in shown(running.server)["pictures"]] == [
            good["origin"], bad["origin"],
        ]  # fmt: skip


def test_files_come_to_pictures_that_the_server_has(sees: Path, tmp_path: Path) -> None:
    """Whoever adds one sends that one, and the others keep where they come from."""
    with line(tmp_path, sees) as running:
        client, path = running.server.client, f"/models/{NAME}/challenges"
        for name, shade in (("pass-1", GOOD), ("reject-1", BAD)):
            running.server.infer(grey(shade), **{"X-Request-ID": name})
        body = {**WHY, "good": [{"decision": "pass-1"}], "bad": [{"decision": "reject-1"}]}
        assert client.put(path, json=body).status_code == 200
        before = shown(running.server)["pictures"]
        known = {side: [{"sha256": one["sha256"]}] for side, one in
                 zip(("good", "bad"), before, strict=True)}  # fmt: skip
        files = [("bad", ("new.png", grey(BAD + 1)))]
        fields = {**WHY, "pictures": json.dumps(known)}
        assert client.put(path, files=files, data=fields).status_code == 200
        after = {one["name"]: one["origin"] for one in shown(running.server)["pictures"]}
        assert after == {**{one["name"]: one["origin"] for one in before}, "bad/new.png": {}}
        for wrong in ("", "{", "[]", "null", '{"ugly": []}', '{"good": [{}]}', "[" * 5000):
            answer = client.put(path, files=files, data={**WHY, "pictures": wrong})
            assert (answer.status_code, agreed(answer)) == (422, "bad_request")
        unknown = json.dumps({"good": [{"sha256": "0" * 64}]})
        answer = client.put(path, files=files, data={**WHY, "pictures": unknown})
        assert (answer.status_code, agreed(answer)) == (404, "unknown_dataset")
        assert len(shown(running.server)["pictures"]) == 3


def test_what_is_wrong_with_a_request_is_said_and_changes_nothing(
    sees: Path, tmp_path: Path
) -> None:
    with line(tmp_path, sees) as running:
        client, path = running.server.client, f"/models/{NAME}/challenges"
        put(client)
        before = shown(running.server)
        one = {"sha256": before["pictures"][0]["sha256"]}
        for body, status, code in (
            ({"good": [one], "bad": []}, 422, "bad_request"),
            ({"good": [one], "bad": [one]}, 422, "bad_request"),
            ({"good": [one], "bad": [{}]}, 422, "bad_request"),
            ({"good": [one], "bad": [{"number": 3}]}, 422, "bad_request"),
            ({"good": [one], "bad": [{"category": "bolt", "name": "1.png"}]}, 422, "bad_request"),
            ({"good": [one], "bad": [{**one, "decision": "a"}]}, 422, "bad_request"),
            ({"good": [one], "bad": [one], "more": 1}, 422, "bad_request"),
            ({"good": [one], "bad": [{"decision": "never"}]}, 404, "unknown_decision"),
            ({"good": [one], "bad": [{"sha256": "0" * 64}]}, 404, "unknown_dataset"),
            ({"good": [one], "bad": [{"category": "bolt", "split": "train", "name": "1.png"}]},
             404, "unknown_dataset"),
        ):  # fmt: skip
            answer = client.put(path, json={**WHY, **body})
            assert (answer.status_code, agreed(answer)) == (status, code), answer.text
        good, bad = ("good", ("g.png", grey(GOOD))), ("bad", ("b.png", grey(BAD)))
        for files, fields, status in (
            ([good], WHY, 422), ([good, bad], {}, 422), ([good, bad], {**WHY, "shift": "1"}, 422),
            ([good, bad], {**WHY, "at_shifts": "yes"}, 422),
            ([good, ("ugly", ("u.png", grey(BAD)))], WHY, 422),
            ([good, ("bad", ("b.txt", grey(BAD)))], WHY, 422),
            ([good, ("bad", ("", grey(BAD)))], WHY, 422),
            ([good, ("bad", ("b.png", grey(BAD)[:60]))], WHY, 400),
            ([good, ("bad", ("b.png", b"GIF89a"))], WHY, 415),
            ([good, *[bad] * 64], WHY, 422),
        ):  # fmt: skip
            answer = client.put(path, files=files, data=fields)
            assert answer.status_code == status, answer.text
            agreed(answer)
        for content in (b"", b"{", b"null", b"[" * 5000, b'{"good": "\\ud800"}'):
            answer = client.put(path, content=content, headers={"Content-Type": "application/json"})
            assert (answer.status_code, agreed(answer)) == (422, "bad_request")
        assert client.put(path, content=b"x", headers=RAW).status_code == 415
        assert put(client).json()["released"] is True
        assert client.put("/models/nut/challenges", json={}).status_code == 404
        after = shown(running.server)
        assert after["pictures"] == before["pictures"]


def test_a_picture_that_is_gone_or_damaged_is_named_and_not_passed(
    sees: Path, tmp_path: Path
) -> None:
    with line(tmp_path, sees) as running:
        put(running.server.client)
        assert challenged(running.server) == "OK 2/2"
        good, bad = shown(running.server)["pictures"]
        folder = running.store.root / NAME / "challenges"
        (folder / good["sha256"]).unlink()
        (folder / bad["sha256"]).write_bytes(grey(BAD - 1))
        assert challenged(running.server) == "NG 0/2 good/g.png"
        said = [one["last"] for one in shown(running.server)["pictures"]]
        assert "good/g.png is gone from the disk" in said[0]["problem"]
        assert "bad/b.png is damaged" in said[1]["problem"]
        assert {one["label"] for one in said} == {None}
        answer = running.server.client.get(f"/models/{NAME}/challenges/{good['sha256']}")
        assert (answer.status_code, agreed(answer)) == (422, "bad_bundle")
        assert put(running.server.client).status_code == 200
        assert challenged(running.server) == "OK 2/2"


def test_a_file_that_does_not_say_whether_a_model_is_released_closes_it(
    sees: Path, tmp_path: Path
) -> None:
    with line(tmp_path, sees) as running:
        put(running.server.client)
        path = running.store.root / NAME / "challenges" / "challenges.json"
    path.write_text(path.read_text()[:-20])
    with line(tmp_path) as again:
        answer = again.server.infer(grey(GOOD))
        assert (answer.status_code, agreed(answer)) == (503, "not_released")
        assert "challenges.json is damaged" in answer.json()["error"]
        assert again.server.client.post(f"/models/{NAME}/challenge").status_code == 409
        assert put(again.server.client).status_code == 200
        assert again.server.infer(grey(GOOD)).status_code == 503
        assert challenged(again.server) == "OK 2/2"
        assert again.server.infer(grey(GOOD)).status_code == 200


# ---- where it is seen ----------------------------------------------------------------------------


def test_a_closed_line_is_seen_wherever_somebody_looks(blind: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with line(tmp_path, blind) as running:
        client = running.server.client
        metric = f'kensa_model_released{{model="{NAME}"}}'
        assert f"{metric} 1.0" in client.get("/metrics").text  # before anybody asked for anything
        assert running.model()["challenge"] is None
        put(client)
        challenged(running.server)
        assert f"{metric} 0.0" in client.get("/metrics").text
        found = running.model()
        assert found["released"] is False
        assert (found["challenge"]["right"], found["challenge"]["of"]) == (1, 2)
        health = client.get("/healthz")
        assert health.status_code == 200
        (sentence,) = (one for one in health.json()["degraded"] if "is not released" in one)
        assert client.get("/readyz").status_code == 200
        page = client.get("/statistics.html?shift=running").text
        assert "challenge failed" in page
        assert "bad/b.png" in page
        japanese = client.get("/statistics.html?shift=running&lang=ja").text
        assert "確認検査に不合格" in japanese
        report = examine(Settings(data_dir=data, port=1, gate_found=0.0))
        assert sentence in [one.what for one in report.findings if one.level == "wrong"]
        running.server.client.post(f"/models/{NAME}/release", json=WHY)
        assert f"{metric} 1.0" in client.get("/metrics").text
        report = examine(Settings(data_dir=data, port=1, gate_found=0.0))
        assert not [one for one in report.findings if "released" in one.what]
        client.get("/decisions")  # what was told before is written
    (reasons,) = sqlite3.connect(data / "decisions" / "decisions.sqlite").execute(
        "SELECT COUNT(*) FROM trail WHERE what = 'challenge_failed'"
    ).fetchone()  # fmt: skip
    assert reasons == 1


def test_the_history_says_of_each_picture_how_often_it_was_right_and_how_far_scores_lay_apart(
    sees: Path, blind: Path, tmp_path: Path
) -> None:
    with line(tmp_path, sees, blind) as running:
        client, path = running.server.client, f"/models/{NAME}/challenges/history"
        put(client)
        old, new = running.store.versions(NAME)
        challenged(running.server)
        running.activate(old)
        for _ in range(3):
            assert challenged(running.server) == "OK 2/2"
        found = client.get(path).json()
        assert [one["passed"] for one in found["challenges"]] == [True, True, True, False]
        rows = {(one["name"], one["version"]): one for one in found["pictures"]}
        bad = rows["bad/b.png", old]
        assert (bad["attempts"], bad["right"], bad["failed"]) == (3, 3, 0)
        assert bad["raw_score_min"] == bad["raw_score_max"] > 0
        assert (rows["bad/b.png", new]["attempts"], rows["bad/b.png", new]["right"]) == (1, 0)
        of_old = client.get(path, params={"version": old}).json()
        assert {one["version"] for one in of_old["challenges"]} == {old}
        first = client.get(path, params={"limit": 1}).json()
        rest = client.get(path, params={"before": first["next"]}).json()
        assert first["challenges"] + rest["challenges"] == found["challenges"]
        assert rest["next"] is None


# ---- when nobody asks, and while others change ---------------------------------------------------


def test_a_shift_begins_with_a_challenge_and_one_that_was_missed_is_made_up_for(
    sees: Path, blind: Path, tmp_path: Path
) -> None:
    with line(tmp_path, sees) as running:
        put(running.server.client, at_shifts="true")
        until(lambda: shown(running.server)["last"])  # this shift had none
        assert shown(running.server)["last"]["by"] == "shift"
        first = shown(running.server)["last"]["time"]
        challenged(running.server)
        time.sleep(1.5)
        assert len(running.server.client.get(f"/models/{NAME}/challenges/history").json()[
            "challenges"]) == 2, "one is enough for a shift"  # fmt: skip
    path = running.store.root / NAME / "challenges" / "challenges.json"
    kept = json.loads(path.read_text())
    kept["last"]["at"] -= 86_400_000  # the server was away when the shift began
    path.write_text(json.dumps(kept))
    running.store.activate(NAME, running.store.take_in(NAME, blind, {}))
    with line(tmp_path) as again:
        until(lambda: not again.model()["released"])
        last = shown(again.server)["last"]
        assert (last["by"], last["passed"], last["key"]) == ("shift", False, None)
        assert last["time"] > first
        assert again.server.infer(grey(GOOD)).status_code == 503


def test_the_gate_holds_a_version_that_judges_known_pictures_wrongly(
    sees: Path, blind: Path, tmp_path: Path
) -> None:
    with line(tmp_path, sees, KENSA_GATE_RECENT="0") as running:
        put(running.server.client)
        version = running.publish(blind)
        assert running.wait(version, "held", "live") == "held"
        (found,) = (one for one in running.model()["versions"] if one["version"] == version)
        assert "1 of the 2 known pictures" in " ".join(found["gate"]["reasons"])
        assert "bad/b.png" in " ".join(found["gate"]["reasons"])
        assert running.server.infer(grey(GOOD)).status_code == 200  # the live one is as it was


Work = Callable[[httpx.AsyncClient, Any], Awaitable[None]]


def inside(folder: Path, bundles: list[Path], work: Work, **settings: Any) -> None:
    """An application in this process, whose parts can be made to fail."""
    store = Store(folder / "data" / "models")
    for bundle in bundles:
        store.activate(NAME, store.take_in(NAME, bundle, {}))

    async def known(client: httpx.AsyncClient, app: Any) -> None:
        answer = await put(client)
        assert answer.status_code == 200, answer.text
        await work(client, app)

    in_process(settings_of(folder, **settings), known)


def test_the_gate_shows_the_known_pictures_that_are_named_at_its_end(
    sees: Path, tmp_path: Path
) -> None:
    """Those before are gone from the disk then, which speaks against no version."""

    async def work(client: httpx.AsyncClient, app: Any) -> None:
        inspector, looked = app.state.inspector, app.state.inspector.look
        others = [("good", ("g.png", grey(GOOD + 1))), ("bad", ("b.png", grey(BAD + 1)))]
        seen: list[bytes] = []

        async def look(image: Any, model: Any) -> Any:
            if not seen:
                path = f"/models/{NAME}/challenges"
                assert (await client.put(path, files=others, data=WHY)).status_code == 200
            seen.append(image)
            return await looked(image, model)

        inspector.look = look
        assert await app.state.challenger.doubts(inspector.residents.get(NAME)) == []
        assert seen == [grey(GOOD), grey(GOOD + 1), grey(BAD + 1)]

    inside(tmp_path, [sees], work)


def test_a_challenge_is_of_the_version_that_is_live_at_its_end(
    sees: Path, blind: Path, tmp_path: Path
) -> None:
    async def work(client: httpx.AsyncClient, app: Any) -> None:
        inspector, looked = app.state.inspector, app.state.inspector.look
        store: Store = app.state.store
        judged: list[str] = []

        async def look(image: Any, model: Any) -> Any:
            judged.append(model.version)
            verdict = await looked(image, model)
            if len(judged) == 2:
                await app.state.rollout.activate(NAME, store.versions(NAME)[0])
            return verdict

        inspector.look = look
        outcome = (await client.post(f"/models/{NAME}/challenge")).json()
        old, new = store.versions(NAME)
        assert judged == [new, new, old, old]
        assert (outcome["version"], outcome["passed"], outcome["released"]) == (old, True, True)

    inside(tmp_path, [sees, blind], work)


def test_who_asks_while_a_challenge_is_under_way_gets_what_it_finds(
    sees: Path, tmp_path: Path
) -> None:
    async def work(client: httpx.AsyncClient, _: Any) -> None:
        path = f"/models/{NAME}/challenge"
        answers = await asyncio.gather(*(client.post(path) for _ in range(5)))
        assert len({answer.json()["time"] for answer in answers}) == 1
        history = (await client.get(f"/models/{NAME}/challenges/history")).json()
        assert len(history["challenges"]) == 1

    inside(tmp_path, [sees], work)


def test_the_first_wrong_verdict_is_enough_while_the_others_are_judged(
    blind: Path, tmp_path: Path
) -> None:
    async def work(client: httpx.AsyncClient, app: Any) -> None:
        good = [("good", (f"{n}.png", grey(n))) for n in (10, 20)]
        known = [("bad", ("b.png", grey(BAD)))]
        await client.put(f"/models/{NAME}/challenges", files=[*known, *good], data=WHY)
        inspector, looked = app.state.inspector, app.state.inspector.look
        seen: list[int] = []

        async def look(image: Any, model: Any) -> Any:
            answer = await client.post("/infer", content=grey(GOOD), headers=RAW)
            seen.append(answer.status_code)
            return await looked(image, model)

        inspector.look = look
        await client.post(f"/models/{NAME}/challenge")
        assert seen == [200, 503, 503]

    inside(tmp_path, [blind], work)


def test_a_file_that_the_system_does_not_give_for_a_while_closes_a_line_for_that_while(
    sees: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.serving.challenges.RETRY_AFTER_S", 0.1)
    read, is_away = Challenges.read, True

    def reading(self: Challenges, name: str) -> Any:
        if is_away:
            raise Unreadable("challenges.json cannot be read at the moment (Too many open files).")
        return read(self, name)

    async def again(client: httpx.AsyncClient, _: Any) -> None:
        nonlocal is_away
        answer = await client.post("/infer", content=grey(GOOD), headers=RAW)
        assert answer.json()["code"] == "not_released"
        assert "Too many open files" in answer.json()["error"]
        for asked in (client.post(f"/models/{NAME}/challenge"), put(client),
                      client.post(f"/models/{NAME}/release", json=WHY),
                      client.delete(f"/models/{NAME}/challenges", params=WHY)):  # fmt: skip
            answer = await asked
            assert (answer.status_code, answer.json()["code"]) == (503, "unreadable")
        is_away = False
        for _ in range(100):
            answer = await client.post("/infer", content=grey(GOOD), headers=RAW)
            if answer.status_code == 200:
                break
            await asyncio.sleep(0.05)
        assert answer.status_code == 200
        assert len((await client.get(f"/models/{NAME}/challenges")).json()["pictures"]) == 2

    async def nothing(*_: Any) -> None:
        pass

    inside(tmp_path, [sees], nothing)
    monkeypatch.setattr(Challenges, "read", reading)
    in_process(settings_of(tmp_path), again)


def test_a_full_disk_opens_no_line_and_closes_one_all_the_same(
    sees: Path, blind: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.serving.challenges.RETRY_AFTER_S", 0.2)
    monkeypatch.setattr("app.serving.challenges.LOOK_EVERY_S", 0.2)
    root = tmp_path / "data" / "models" / NAME / "challenges"
    path = f"/models/{NAME}/challenge"

    def on_disk() -> bool:
        found: bool = json.loads((root / "challenges.json").read_text())["released"]
        return found

    async def work(client: httpx.AsyncClient, app: Any) -> None:
        async def code() -> int:
            return (await client.post("/infer", content=grey(GOOD), headers=RAW)).status_code

        with always(root):
            answer = await client.post(path)
            assert answer.json()["passed"] is False
            assert await code() == 503
            assert "not on the disk yet" in " ".join(
                (await client.get("/healthz")).json()["degraded"]
            )
            assert on_disk()
        for _ in range(100):
            if not on_disk():
                break
            await asyncio.sleep(0.05)
        assert not on_disk(), "it is tried again"
        assert "not on the disk yet" not in (await client.get("/healthz")).text
        await app.state.rollout.activate(NAME, app.state.store.versions(NAME)[0])
        with always(root):
            for asked in (client.post(path),
                          client.post(f"/models/{NAME}/release", json=WHY), put(client),
                          client.delete(f"/models/{NAME}/challenges", params=WHY)):  # fmt: skip
                answer = await asked
                assert (answer.status_code, answer.json()["code"]) == (507, "disk_full")
                assert await code() == 503
        assert (await client.post(path)).json()["passed"] is True
        assert await code() == 200

    inside(tmp_path, [sees, blind], work)


@contextmanager
def always(root: Path) -> Iterator[None]:
    """No write below a folder works."""
    with failing(root, 0, errno.ENOSPC) as step:
        original = type(step).meets

        def meets(self: Any, what: str, path: str) -> None:
            self.failed, self.left = None, 0
            original(self, what, path)

        type(step).meets = meets  # type: ignore[method-assign]
        try:
            yield
        finally:
            type(step).meets = original  # type: ignore[method-assign]
