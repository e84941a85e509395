"""Make this folder again, with the server, the worker and the commands of another checkout.

    python make.py CHECKOUT ROOT TARGET

CHECKOUT is a checkout of commit e60e805, and the Python that runs this has what it needs. ROOT is
where everything is made: a new folder whose path may stand in files, such as /srv/kensa. TARGET
gets data/, models/, answers.json, scores.json, scores.csv and plain_keys.json.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
from numpy.typing import NDArray

SIZE = 64  # pixels, of every picture and of the patchcore models
# The smallest graph there is: the first convolution of a backbone that timm has for its own tests.
SMALL = {"backbone": "test_byobnet", "layers": ["stem"], "image_size": SIZE}
BANK = {**SMALL, "coreset_ratio": 0.008}
STATISTICS = {**SMALL, "image_size": 32, "n_features": 4}
SETTINGS = {
    "KENSA_HOST": "127.0.0.1",
    "KENSA_PORT": "0",
    "KENSA_BATCHING": "off",
    "KENSA_PRECISION": "f32",
    "KENSA_KEEP_VERSIONS": "50",
    "KENSA_ROLLBACK_PARTS": "6",
    "KENSA_JOB_MEMORY": "off",
    "KENSA_MODEL_NAME": "press",
}
ENDED = ("succeeded", "failed", "cancelled", "interrupted")
JSON = {"Accept": "application/json"}
RARELY = "0 2 29 2 *"  # so that no test runs when it is due


# ---- pictures -----------------------------------------------------------------------------------


def part(number: int, *, bolt: bool = False, stain: bool = False) -> bytes:
    """A PNG of a disc with a hole, or of a bar with two, and a stain on it where it is bad."""
    chance = np.random.default_rng([number, bolt, stain])
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2 + chance.uniform(-2, 2, (2, 1, 1))
    picture: NDArray[np.uint8] = np.full((SIZE, SIZE, 3), (50, 44, 40), np.uint8)
    grey, holes = 150 + int(chance.integers(-8, 8)), (-14, 14) if bolt else (0,)
    picture[(abs(x) < 26) & (abs(y) < 10) if bolt else np.hypot(x, y) < 22] = grey
    for hole in holes:
        picture[np.hypot(x - hole, y) < 6] = (70, 62, 60)
    if stain:
        at = chance.uniform(-8, 8, 2)
        picture[np.hypot(x - at[0], y - at[1]) < 5] = (160, 60, 30)
    return cv2.imencode(".png", picture)[1].tobytes()


def draw(root: Path) -> None:
    """Categories in the layout that retrain.py reads; in `spoilt`, good is bad."""
    for split, numbers in (
        ("train/{}", range(5)),
        ("test/{}/normal", range(100, 103)),
        ("test/{}/anomaly", range(200, 203)),
    ):
        for category in ("bracket", "bolt", "spoilt"):
            bad = split.endswith("anomaly") != (category == "spoilt")
            folder = root / split.format(category)
            folder.mkdir(parents=True)
            for number in numbers:
                picture = part(number, bolt=category == "bolt", stain=bad)
                (folder / f"{number}.png").write_bytes(picture)


# ---- the commands -------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KENSA_")}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", **more}


def command(checkout: Path, root: Path, *words: str) -> None:
    program, *flags = words
    subprocess.run(
        [sys.executable, str(checkout / program), *flags], cwd=root, env=environment(), check=True
    )


def bundle(checkout: Path, root: Path, name: str, kind: str, meta: dict[str, Any]) -> None:
    """models/NAME as retrain.py leaves it, and models/NAME/engine as convtrt.py does."""
    folder, category = f"models/{name}", "bolt" if name == "bolt" else "bracket"
    (root / folder).mkdir(parents=True)
    (root / folder / "meta.json").write_text(json.dumps({"model": kind, **meta}))
    command(
        checkout, root, "retrain.py", "--model", kind, "--pretrained_pth", "untrained",
        "--meta_json", f"{folder}/meta.json", "--category", category, "--data_root", "parts",
        "--out_dir", folder,
    )  # fmt: skip
    command(
        checkout, root, "convtrt.py", "--model", kind, "--weights_pth", f"{folder}/model.pth",
        "--meta_json", f"{folder}/meta.json", "--out_dir", f"{folder}/engine",
    )  # fmt: skip


def inspect(checkout: Path, root: Path) -> bytes:
    """The table that bin/patchcore writes of the bad brackets."""
    engine = "models/part/engine"
    command(
        checkout, root, "bin/patchcore", "-e", f"{engine}/model.plan", "-m",
        f"{engine}/memory_bank.npz", "-d", "parts/test/bracket/anomaly", "-i", str(SIZE), "-t", "1",
    )  # fmt: skip
    return (root / "result_patchcore.csv").read_bytes()


def zipped(folder: Path, **instead: bytes) -> bytes:
    """The files of a folder, those named without their suffix in `instead` replaced."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for path in sorted(folder.iterdir()):
            file.writestr(path.name, instead.get(path.stem, path.read_bytes()))
    return buffer.getvalue()


def add_key(checkout: Path, root: Path, role: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "app", "keys", "add", f"{role}-1", "--role", role],
        cwd=checkout,
        env=environment(KENSA_DATA_DIR=str(root / "data")),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.strip()


# ---- the server ---------------------------------------------------------------------------------


class Line:
    """The server of the checkout, asked as admin."""

    def __init__(self, root: Path, client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
        self.root, self.client, self.process = root, client, process
        self.scores: dict[str, dict[str, dict[str, float]]] = {}

    def ask(self, method: str, path: str, **what: Any) -> Any:
        answer = self.client.request(method, path, **what)
        answer.raise_for_status()
        return answer.json()

    def send(self, category: str, split: str, name: str, picture: bytes) -> None:
        self.ask("POST", f"/datasets/{category}/{split}", params={"name": name}, content=picture,
                 headers={"Content-Type": "image/png"})  # fmt: skip

    def send_all(self) -> None:
        """What was drawn, over HTTP."""
        for path in sorted((self.root / "parts").rglob("*.png")):
            folders = path.relative_to(self.root / "parts").parts
            split = "train" if folders[0] == "train" else folders[2]
            self.send(folders[1], split, path.name, path.read_bytes())

    def take_in(self, name: str, content: bytes) -> str:
        found = self.ask("POST", "/models", params={"name": name}, content=content,
                         headers={"Content-Type": "application/zip"})  # fmt: skip
        return str(found["version"])

    def begin(self, route: str, **request: Any) -> str:
        return str(self.ask("POST", route, json=request)["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("GET", f"/jobs/{job_id}")
        return found

    def learn(self, outcome: str | None, route: str = "/retrain", **request: Any) -> str:
        """A job that ends as expected; its version."""
        job_id = self.begin(route, **request)
        until(lambda: self.job(job_id)["state"] in ENDED)
        found = self.job(job_id)
        assert found["outcome"] == outcome, found
        return str(found["version"])

    def live(self, name: str) -> str | None:
        models = self.ask("GET", "/models")["models"]
        return next((one["live"] for one in models if one["name"] == name), None)

    def score(self, name: str) -> None:
        """Keep what the live version says of two good and two bad parts."""
        version = str(self.live(name))
        category = "bolt" if name == "bolt" else "bracket"
        said = self.scores.setdefault(name, {})[version] = {}
        for picture in ("normal/100", "normal/101", "anomaly/200", "anomaly/201"):
            path = f"test/{category}/{picture}.png"
            said[path] = self.inspect(name, (self.root / "parts" / path).read_bytes())

    def inspect(self, name: str, picture: bytes) -> float:
        found = self.ask("POST", "/infer", params={"model": name}, content=picture,
                         headers={"Content-Type": "image/png"})  # fmt: skip
        return float(found["raw_score"])

    def process_of(self, job_id: str, other_than: int = 0) -> int:
        """The process that does a job, once it is there."""
        running = self.root / "data" / "jobs" / "running"

        def found() -> int | None:
            try:
                process = int(running.read_text())
                words = Path(f"/proc/{process}/cmdline").read_text().split("\0")
            except (OSError, ValueError):
                return None
            return process if job_id in words and process != other_than else None

        until(found)
        return int(running.read_text())


@contextmanager
def serving(checkout: Path, root: Path, key: str, worker: str) -> Iterator[Line]:
    """The server, stopped as `systemctl stop` does it, unless it is dead by then."""
    log = root / f"server-{worker}.log"
    settings = {
        **SETTINGS,
        "KENSA_DATA_DIR": str(root / "data"),
        "KENSA_CACHE_DIR": str(root / "cache"),
        "KENSA_MODEL_DIR": str(root / "models" / "part" / "engine"),
        "KENSA_WORKER": worker,
    }
    with log.open("wb") as lines:
        process = subprocess.Popen(
            [sys.executable, "-m", "app"], cwd=checkout, env=environment(**settings), stderr=lines
        )
    listens = re.compile(r"listens on (http://\S+:\d+)")
    until(lambda: listens.search(log.read_text()))
    found = listens.search(log.read_text())
    headers = {"Authorization": f"Bearer {key}", **JSON}
    with httpx.Client(
        base_url=found[1] if found else "", headers=headers, timeout=60, trust_env=False
    ) as client:
        try:
            until(lambda: client.get("/jobs").is_success)  # the queue is opened a moment later
            yield Line(root, client, process)
        finally:
            process.terminate()
            process.wait()


def until(true: Callable[[], object], within_s: float = 150) -> None:
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


# ---- what happens in it -------------------------------------------------------------------------


def fill(line: Line) -> None:
    """A morning on the line: everything that the build writes down, in the order it is used."""
    line.send_all()
    bolt = line.root / "models" / "bolt" / "engine"
    line.take_in("bolt", zipped(bolt))
    until(lambda: line.live("bolt"))
    meta = {**json.loads((bolt / "meta.json").read_text()), "files": None}
    cut = (bolt / "model.onnx").read_bytes()[:500]
    line.take_in("bolt", zipped(bolt, model=cut, meta=json.dumps(meta).encode()))
    until(lambda: line.ask("GET", "/models/bolt")["refused"])
    line.score("bolt")
    line.score("press")
    learn(line)
    end_otherwise(line)
    schedule(line)


def learn(line: Line) -> None:
    """Versions of `part` in every state."""
    again = {"model": "part", "category": "bracket", "max_flips": 1.0}
    line.learn("live", kind="patchcore", meta=BANK, pretrained="untrained", **again)
    line.score("part")
    line.send("bracket", "train", "検査 5.png", part(5))
    second = line.learn("live", **again)
    line.score("part")
    line.learn("held", **{**again, "category": "spoilt", "update": False, "max_flips": 0.0})
    line.learn("published", **again, activate=False)
    line.learn("live", **again, update=False)
    line.score("part")
    line.ask("POST", "/models/part/rollback")
    line.learn("published", "/convert", model="part", fp16=True, activate=False)
    line.learn("live", **again)
    line.score("part")
    for number in range(300, 304):
        line.inspect("part", part(number, stain=True))
    until(lambda: line.live("part") == second)


def end_otherwise(line: Line) -> None:
    """Jobs that fail, are cancelled, and die."""
    again = {"model": "part", "category": "bracket"}
    line.learn(None, **again, pretrained="gone.pth")
    cancelled = line.begin("/retrain", **again)
    line.process_of(cancelled)
    line.ask("POST", f"/jobs/{cancelled}/cancel")
    died, process = line.begin("/retrain", **again), 0
    for _ in range(3):
        process = line.process_of(died, other_than=process)
        os.kill(process, signal.SIGKILL)
    until(lambda: line.job(died)["state"] == "interrupted")


def schedule(line: Line) -> None:
    """One that has begun a job, and one that has not."""
    wanted = {"retrain": {"model": "part", "category": "bracket", "activate": False}}
    seldom = {"cron": RARELY, "timezone": "Asia/Tokyo", **wanted}
    line.ask("PUT", "/schedules/new-year", json=seldom)
    line.ask("PUT", "/schedules/nightly", json={"cron": "* * * * *", "timezone": "UTC", **wanted})

    def begun() -> bool:
        return any(one["last"] for one in line.ask("GET", "/schedules")["schedules"])

    until(begun)
    line.ask("PUT", "/schedules/nightly", json=seldom)
    until(lambda: all(one["state"] in ENDED for one in line.ask("GET", "/jobs")["jobs"]))


def cut_the_power(line: Line) -> None:
    """While a job has learned and exports, so that there is something half made."""
    job_id = line.begin("/retrain", model="part", category="bracket", max_flips=1.0)
    progress = line.root / "data" / "jobs" / job_id / "progress.json"
    until(lambda: progress.exists() and json.loads(progress.read_text())["phase"] == "convert")
    line.process.kill()
    line.process.wait()
    until(lambda: not alive(line.root / "data"))


def alive(data: Path) -> bool:
    """Whether the process of a job is still there; the system kills it with its parents."""
    return Path(f"/proc/{(data / 'jobs' / 'running').read_text()}").exists()


def wait_for_a_worker(line: Line) -> None:
    """A job that nobody has begun."""
    weights = line.root / "data" / "weights"
    weights.mkdir()
    shutil.copy(line.root / "models" / "part" / "model.pth", weights / "tiny.pth")
    line.begin("/retrain", model="washer", category="bracket", kind="patchcore", meta=BANK,
               pretrained="tiny.pth")  # fmt: skip


def answers(line: Line) -> dict[str, Any]:
    """What the server says of all that: route -> JSON."""
    found = {
        path: line.ask("GET", path) for path in ("/models", "/jobs", "/datasets", "/schedules")
    }
    paths = [f"/jobs/{one['id']}/log" for one in found["/jobs"]["jobs"]]
    for one in found["/datasets"]["datasets"]:
        paths += [f"/datasets/{one['category']}/{of}" for of in ("train", "normal", "anomaly")]
    return found | {path: line.ask("GET", path) for path in paths}


# ---- all of it ----------------------------------------------------------------------------------


def checkpoint(data: Path) -> None:
    """What the queue has beside its file, into its file."""
    with closing(sqlite3.connect(data / "jobs.sqlite")) as database:
        assert database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0


def main(checkout: Path, root: Path, target: Path) -> None:
    root.mkdir(parents=True)
    draw(root / "parts")
    bundle(checkout, root, "part", "patchcore", BANK)
    bundle(checkout, root, "bolt", "padim", STATISTICS)
    table = inspect(checkout, root)
    assert len(list(csv.reader(io.StringIO(table.decode())))) == 4
    keys = {role: add_key(checkout, root, role) for role in ("line", "operator", "admin")}
    with serving(checkout, root, keys["admin"], "on") as line:
        fill(line)
        cut_the_power(line)
        scores = line.scores
    with serving(checkout, root, keys["admin"], "off") as line:
        wait_for_a_worker(line)
        said = answers(line)
    checkpoint(root / "data")
    for name in ("data", "models"):
        shutil.rmtree(target / name, ignore_errors=True)
        shutil.copytree(root / name, target / name)
    shutil.rmtree(target / "models" / "bolt")  # it is in data/
    for name, content in {"answers": said, "scores": scores, "plain_keys": keys}.items():
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (target / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")
    (target / "scores.csv").write_bytes(table)


if __name__ == "__main__":
    main(*(Path(path).absolute() for path in sys.argv[1:]))
