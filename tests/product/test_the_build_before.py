"""A data folder and a model that the build before left, opened by this one.

tests/data/build_e60e805 was made by that build over HTTP, and holds what it said of it. Its
README.md says how.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from engines.queue.protocol import DATABASE
from engines.store.bundle import read_bank
from support.project import ROOT, run
from support.server import RAW, Server, serving
from support.waiting import until

BEFORE = ROOT / "tests" / "data" / "build_e60e805"
SAID: dict[str, Any] = json.loads((BEFORE / "answers.json").read_text())
SCORES: dict[str, dict[str, dict[str, float]]] = json.loads((BEFORE / "scores.json").read_text())
MODELS: dict[str, dict[str, Any]] = {one["name"]: one for one in SAID["/models"]["models"]}
for _name, _side in {"bolt": 32, "part": 64, "press": 64}.items():
    # It is an estimate: since then 124 MiB instead of 112 are reckoned for buffers at 256 pixels.
    MODELS[_name]["resident_bytes"] += 12 * 2**20 * _side**2 // 256**2
    # What it did not know: no model was challenged, no version had regions, or knew its pictures.
    MODELS[_name] |= {"released": True, "challenge": None, "drift": [], "plan_unused": None}
    for _one in MODELS[_name]["versions"]:
        _one |= {"never_counts": None, "camera": None}
        if _one.get("gate"):  # which has shown no decisions: there was no record
            _one["gate"] |= {"record": None, "regions": None}
SAID["/jobs"]["no_worker"] = "KENSA_WORKER is off: jobs wait for a worker that somebody starts."
JOBS: dict[str, dict[str, Any]] = {one["id"]: one for one in SAID["/jobs"]["jobs"]}
CUT, WAITED = (
    next(job_id for job_id, one in JOBS.items() if one["state"] == state)
    for state in ("running", "queued")  # when the power went; when no worker was there
)
PICTURES = list(SCORES["part"][MODELS["part"]["live"]])  # in datasets/
# Made for this folder, and good for no other.
KEYS: dict[str, str] = json.loads((BEFORE / "plain_keys.json").read_text())
BUNDLE = BEFORE / "models" / "part"

# As the build before was asked; bf16 is left out, as not every CPU has it.
SETTINGS = {"KENSA_PRECISION": "f32", "KENSA_KEEP_VERSIONS": "50", "KENSA_JOB_MEMORY": "off"}
CLOSE = 1e-5  # of raw scores, relative: another CPU adds up in another order
# What a start may write: the queue's database is opened to be asked, and changes beside itself.
QUEUE = {DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm"}

Files = dict[str, tuple[str, int, int]]  # path -> SHA-256, inode, time of the last change


@dataclass
class Opened:
    """A copy of the data folder, what it held before the start, and the server that has it."""

    server: Server
    data: Path
    before: Files

    def get(self, path: str) -> Any:
        answer = self.server.client.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def change(self, path: str) -> None:
        answer = self.server.client.post(path)
        assert answer.status_code == 200, answer.text

    def states(self, name: str) -> dict[str, str]:
        versions = self.get(f"/models/{name}")["versions"]
        return {one["version"]: one["state"] for one in versions}

    def scores(self, name: str, pictures: Iterable[str]) -> dict[str, float]:
        """What the live version says of images of the datasets."""
        found = {}
        for path in pictures:
            picture = (self.data / "datasets" / path).read_bytes()
            answer = self.server.client.post(
                "/infer", params={"model": name}, content=picture, headers=RAW
            )
            assert answer.status_code == 200, answer.text
            found[path] = answer.json()["raw_score"]
        return found


def copied(folder: Path) -> Path:
    data = Path(shutil.copytree(BEFORE / "data", folder / "data"))
    (data / "keys.json").chmod(0o600)  # as it was; git keeps no such modes
    return data


@contextmanager
def opened(data: Path, **settings: str) -> Iterator[Opened]:
    """This build on a copy of the folder; the client is the admin, and reads JSON."""
    before = files(data)
    with serving(data.parent, **{**SETTINGS, **settings}) as server:
        server.client.headers.update(auth("admin") | {"Accept": "application/json"})
        until(lambda: server.client.get("/jobs").status_code != 503)  # the queue comes a bit later
        yield Opened(server, data, before)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """The folder with a server that is only asked."""
    with opened(copied(tmp_path_factory.mktemp("before"))) as found:
        yield found


def auth(role: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[role]}"}


def files(data: Path) -> Files:
    return {
        str(path.relative_to(data)): (sha256(path), path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(data.rglob("*"))
        if path.is_file()
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def table(text: str) -> dict[str, tuple[float, str]]:
    """A CSV of bin/patchcore: picture -> raw score and decision."""
    rows = csv.DictReader(text.splitlines())
    return {row["filename"]: (float(row["raw_score"]), row["decision"]) for row in rows}


# ---- opened, and asked --------------------------------------------------------------------------


def test_the_folder_holds_one_of_everything() -> None:
    """Else the claims below would say less than they seem to."""
    states = {one["state"] for model in MODELS.values() for one in model["versions"]}
    assert states == {"live", "held", "kept"}
    assert {MODELS["part"]["live"], MODELS["part"]["previous"]} < SCORES["part"].keys()
    assert [*MODELS["bolt"]["refused"].values()] != []
    assert {one["kind"] for model in MODELS.values() for one in model["versions"]} == {
        "patchcore",
        "padim",
    }
    assert {(one["kind"], one["state"], one["outcome"]) for one in JOBS.values()} == {
        ("retrain", "succeeded", "live"),
        ("retrain", "succeeded", "replaced"),
        ("retrain", "succeeded", "held"),
        ("retrain", "succeeded", "published"),
        ("convert", "succeeded", "published"),
        ("retrain", "failed", None),
        ("retrain", "cancelled", None),
        ("retrain", "interrupted", None),
        ("retrain", "running", None),
        ("retrain", "queued", None),
    }


@pytest.mark.parametrize("path", SAID)
def test_it_is_said_what_the_build_before_said(line: Opened, path: str) -> None:
    assert line.get(path) == SAID[path]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_and_its_versions_are_the_same_asked_alone(line: Opened, name: str) -> None:
    assert line.get(f"/models/{name}") == MODELS[name]
    for one in MODELS[name]["versions"]:
        assert line.get(f"/models/{name}/versions/{one['version']}") == one


@pytest.mark.parametrize("name", MODELS)
def test_the_live_version_scores_as_before(line: Opened, name: str) -> None:
    expected = SCORES[name][MODELS[name]["live"]]
    assert line.scores(name, expected) == pytest.approx(expected, rel=CLOSE)


def test_pictures_come_back_with_the_bytes_that_were_kept(line: Opened) -> None:
    client, datasets = line.server.client, line.data / "datasets"
    flips = [
        (f"/models/part/versions/{one['version']}/flips/{flip['number']}",
         f"models/part/gates/{one['version']}/{flip['number']}.jpg")
        for one in MODELS["part"]["versions"]
        for flip in (one["gate"] or {"flips": []})["flips"]
    ]  # fmt: skip
    assert len(flips) > 3
    for route, path in flips:
        assert client.get(route).content == (BEFORE / "data" / path).read_bytes()
    for name in ("0.png", "検査 5.png"):
        kept = (datasets / "train" / "bracket" / name).read_bytes()
        assert client.get(f"/datasets/bracket/train/{name}").content == kept


@pytest.mark.parametrize(
    ("role", "may"),
    [(None, (401, 401, 401)), ("line", (200, 403, 403)), ("operator", (200, 404, 403)),
     ("admin", (200, 404, 415))],
)  # fmt: skip
def test_the_keys_admit_as_before(line: Opened, role: str | None, may: tuple[int, ...]) -> None:
    with httpx.Client(base_url=line.server.url, trust_env=False) as client:
        client.headers.update(auth(role) if role else {})
        looked = client.get("/models")
        cancelled = client.post("/jobs/retrain-000000000000/cancel")
        sent = client.post("/models", params={"name": "x"}, headers={"Content-Type": "text/plain"})
    assert (looked.status_code, cancelled.status_code, sent.status_code) == may


def test_opening_rewrites_no_file_and_leaves_none_but_marks_of_what_was_opened(
    line: Opened,
) -> None:
    """Not even with what it held: neither content, nor inode, nor time."""
    now = files(line.data)
    assert {path: now.get(path) for path in line.before if path not in QUEUE} == {
        path: kept for path, kept in line.before.items() if path not in QUEUE
    }
    live = {name: line.get(f"/models/{name}")["live"] for name in MODELS}
    marks = {f"models/{name}/gates/{one}/opened" for name, one in live.items() if one}
    ours = {path for path in now if path == "address" or path.startswith("decisions/")}
    assert now.keys() - line.before.keys() - QUEUE - ours == marks
    assert line.get("/healthz")["queue"] == "ok"


# ---- opened, and used ---------------------------------------------------------------------------


def test_every_version_can_be_made_live_and_left_again(tmp_path: Path) -> None:
    """Also one that was held, rolled back or only kept; those that judged score as they did."""
    live, previous = MODELS["part"]["live"], MODELS["part"]["previous"]
    with opened(copied(tmp_path)) as line:
        line.change("/models/part/rollback")
        assert line.get("/models/part")["live"] == previous
        scores = line.scores("part", PICTURES)
        assert scores == pytest.approx(SCORES["part"][previous], rel=CLOSE)
        line.change("/models/part/rollback")
        assert line.get("/models/part")["live"] == live
        for one in MODELS["part"]["versions"]:
            line.change(f"/models/part/versions/{one['version']}/activate")
            assert line.states("part")[one["version"]] == "live"
            found = line.scores("part", PICTURES)
            expected = SCORES["part"].get(one["version"], found)  # some never judged
            assert found == pytest.approx(expected, rel=CLOSE)
        assert line.states("part").keys() == {one["version"] for one in MODELS["part"]["versions"]}
        assert line.get("/models/bolt") == MODELS["bolt"]


def test_without_its_pointer_the_version_that_was_live_last_serves(tmp_path: Path) -> None:
    """Not a newer one that was held, only kept or rolled back."""
    data = copied(tmp_path)
    (data / "models" / "part" / "live").unlink()
    with opened(data) as line:
        assert line.get("/models/part")["live"] == MODELS["part"]["live"]


@dataclass
class Worked:
    """What is said once this build's worker has done what was left in the queue."""

    data: Path
    jobs: dict[str, dict[str, Any]]
    part: dict[str, Any]
    washer: dict[str, Any]
    scores: dict[str, float]  # of washer


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> Worked:
    with opened(copied(tmp_path_factory.mktemp("worked")), KENSA_WORKER="on") as line:
        for job_id in (CUT, WAITED):
            until(
                lambda job_id=job_id: line.get(f"/jobs/{job_id}")["outcome"],
                lambda: line.server.log.read_text(),
                within_s=120,
            )
        jobs = {one["id"]: one for one in line.get("/jobs")["jobs"]}
        part, washer = line.get("/models/part"), line.get("/models/washer")
        return Worked(line.data, jobs, part, washer, line.scores("washer", PICTURES))


def test_a_job_that_nobody_had_begun_is_done_and_goes_live(worked: Worked) -> None:
    """A first training, with weights of the data folder."""
    found = worked.jobs[WAITED]
    assert (found["state"], found["outcome"], found["attempts"]) == ("succeeded", "live", 1)
    assert found["request"] == JOBS[WAITED]["request"]
    assert worked.washer["live"] == found["version"]
    assert all(score > 0 for score in worked.scores.values())


def test_a_job_that_ran_when_the_power_went_is_begun_again_and_goes_live(worked: Worked) -> None:
    assert (BEFORE / "data" / "jobs" / CUT / "work" / "trained").is_dir()
    found = worked.jobs[CUT]
    assert (found["state"], found["outcome"], found["attempts"]) == ("succeeded", "live", 2)
    assert found["request"] == JOBS[CUT]["request"]
    assert not [*worked.data.glob("jobs/*/work")]


def test_what_is_learned_stands_on_what_the_build_before_learned(worked: Worked) -> None:
    live, before = worked.part["versions"][0], MODELS["part"]["live"]
    assert worked.part["live"] == live["version"] == worked.jobs[CUT]["version"]
    assert worked.part["previous"] == live["origin"]["parent"] == before
    known, learned = (
        read_bank(worked.data / "models" / "part" / version / "memory_bank.npz")
        for version in (before, live["version"])
    )
    np.testing.assert_array_equal(learned[: len(known)], known)


def test_no_job_that_had_ended_is_touched(worked: Worked) -> None:
    """Only what was live has been replaced, and no job has come."""
    expected = {
        job_id: {**job, "outcome": "replaced" if job["outcome"] == "live" else job["outcome"]}
        for job_id, job in JOBS.items()
    }
    assert worked.jobs.keys() == JOBS.keys()
    for job_id in JOBS.keys() - {CUT, WAITED}:
        assert worked.jobs[job_id] == expected[job_id]


# ---- the folders of the commands ----------------------------------------------------------------


def test_the_bundle_is_taken_in_as_the_version_that_it_was(tmp_path: Path) -> None:
    """A version's name has a hash over its files, so the same name says the same files."""
    expected = SCORES["press"][MODELS["press"]["live"]]
    model = {"KENSA_MODEL_DIR": str(BUNDLE / "engine"), "KENSA_MODEL_NAME": "press"}
    with opened(copied(tmp_path), **model) as line:
        assert line.get("/models/press") == MODELS["press"]  # known, so it is not taken in again
    shutil.rmtree(tmp_path / "data" / "models")
    with serving(tmp_path, **SETTINGS, **model) as server:
        server.client.headers.update(auth("admin"))
        assert server.client.get("/models/press").json()["live"] == MODELS["press"]["live"]
        found = Opened(server, BEFORE / "data", {}).scores("press", expected)
    assert found == pytest.approx(expected, rel=CLOSE)


def test_the_command_scores_with_the_bundle_as_before(tmp_path: Path) -> None:
    engine, pictures = BUNDLE / "engine", BEFORE / "data/datasets/test/bracket/anomaly"
    run(
        sys.executable, ROOT / "bin/patchcore", "-e", engine / "model.plan",
        "-m", engine / "memory_bank.npz", "-d", pictures, "-i", "64", "-t", "1", cwd=tmp_path,
    )  # fmt: skip
    found = table((tmp_path / "result_patchcore.csv").read_text())
    expected = table((BEFORE / "scores.csv").read_text())
    assert list(found) == list(expected)
    for name, (score, decision) in expected.items():
        assert found[name] == (pytest.approx(score, rel=CLOSE), decision)


def test_retraining_goes_on_from_the_bank(tmp_path: Path) -> None:
    run(
        "retrain.py", "--model", "patchcore", "--pretrained_pth", BUNDLE / "model.pth",
        "--meta_json", BUNDLE / "meta.json", "--load_bank", BUNDLE / "memory_bank.npz",
        "--category", "bolt", "--data_root", BEFORE / "data/datasets",
        "--out_dir", tmp_path / "new",
    )  # fmt: skip
    before = read_bank(BUNDLE / "memory_bank.npz")
    after = read_bank(tmp_path / "new" / "memory_bank.npz")
    assert len(after) > len(before)
    np.testing.assert_array_equal(after[: len(before)], before)
    assert sha256(tmp_path / "new" / "model.pth") == sha256(BUNDLE / "model.pth")
