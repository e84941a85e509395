"""How long until a model judges: a first training, an update, and a start with four models.

    python -m benchmarks.to_live [--turns N] [--before FOLDER] [--pace full] [--only WORD ...]

A server and its worker do it, on drawn parts, with what `kensa learn` takes. --before names the
folder of another build, with which this one takes turns. docs/benchmarks.md says what the columns
mean.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import ROOT, begin, phase, print_load, print_machine, print_table

PICTURES, NEW = 200, 10
MODELS = 4
NAME = "part"
PORT = 8768
URL = f"http://127.0.0.1:{PORT}"
LIMIT_S = 900.0
SPARE_S = 90.0  # for a process that waits for the next job
BOUNDS = {"first": 90.0, "update": 10.0, "start": 4.0}  # seconds, on an idle machine
WORDS = {
    "first": f"first training of {PICTURES}",
    "update": f"update with {NEW}",
    "start": f"start with {MODELS} models",
}


@dataclass
class Found:
    """Seconds of each turn."""

    whole: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)  # for a CPU, of the thread that works


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.to_live", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--turns", type=int, default=3, help="of updates and starts (default 3)")
    add("--before", type=Path, help="the folder of another build")
    add("--pace", default="pause", help="KENSA_JOB_PACE; on a busy machine `full`")
    add("--only", nargs="+", default=[*BOUNDS], choices=[*BOUNDS], help="what to measure")
    flags = parser.parse_args()
    begin()
    print_machine(["torch", "anomalib", "openvino", "numpy"])
    builds = {"this": ROOT, **({"before": flags.before.resolve()} if flags.before else {})}
    with tempfile.TemporaryDirectory(prefix="kensa-to-live-") as name:
        place = Place(Path(name), flags.pace)
        rows = list(place.measured(builds, flags.turns, flags.only))
    head = ["what", "build", "seconds", "waited", "without", "bound"]
    print_table("Until it judges", head, rows)
    print_load("after")


class Place:
    """A folder with pictures, and what servers of several builds make of them."""

    def __init__(self, folder: Path, pace: str) -> None:
        from workers.sample_parts.write_dataset import CATEGORY, write_dataset

        self.folder, self.pace = folder, pace
        with phase(f"{PICTURES + NEW} drawn parts"):
            drawn = write_dataset(folder / "drawn", train=PICTURES + NEW, normal=1, per_kind=0)
        self.pictures = sorted((drawn / "train" / CATEGORY).iterdir())
        self.learned = folder / "learned"  # a data folder after the first training

    def measured(self, builds: dict[str, Path], turns: int, only: list[str]) -> Iterator[list[str]]:
        """A row for each measurement and build."""
        for what in [one for one in BOUNDS if one in only or one == "first"]:
            found = {build: Found() for build in builds}
            for turn in range(1 if what == "first" else turns):
                for build, root in builds.items():
                    with phase(f"{WORDS[what]}, build {build}, turn {turn + 1}"):
                        getattr(self, f"_{what}")(root, build, found[build])
            for build, one in found.items():
                whole, waited = statistics.median(one.whole), statistics.median(one.waited)
                least = [f"{whole:.1f}", f"{waited:.1f}", f"{whole - waited:.1f}"]
                yield [WORDS[what], build, *least, f"{BOUNDS[what]:.0f}"]

    def _first(self, root: Path, build: str, found: Found) -> None:
        data = self.folder / f"first-{build}"
        _put(self.pictures[:PICTURES], data)
        with server(root, data, self.pace) as (client, _):
            _job(client, data, found)
        if not self.learned.exists():
            shutil.copytree(data, self.learned)

    def _update(self, root: Path, _build: str, found: Found) -> None:
        data = self.folder / "update"
        shutil.rmtree(data, ignore_errors=True)
        shutil.copytree(self.learned, data)
        _put(self.pictures, data)
        with server(root, data, self.pace) as (client, _):
            _until_the_spare_waits(data)
            _job(client, data, found)

    def _start(self, root: Path, build: str, found: Found) -> None:
        data = self.folder / f"start-{build}"
        is_first = not data.exists()
        if is_first:
            self._take_in(data)
            with server(root, data, self.pace):
                pass  # which compiles
        began = time.perf_counter()
        with server(root, data, self.pace) as (_, process):
            found.whole.append(time.perf_counter() - began)
            found.waited.append(_delay_of_two(process))

    def _take_in(self, data: Path) -> None:
        from engines.store.versions import Store

        learned = Store(self.learned / "models")
        version = learned.versions(NAME)[0]
        store = Store(data / "models")
        for number in range(MODELS):
            name = f"{NAME}-{number}"
            source = self.folder / f"engine-{name}"
            if not source.exists():
                shutil.copytree(learned.folder(NAME, version), source)
            store.activate(name, store.take_in(name, source, {"benchmark": name}))


@contextmanager
def server(root: Path, data: Path, pace: str) -> Iterator[tuple[httpx.Client, int]]:
    """A build's server, ready, and its process; the cache of compiled networks is in `data`."""
    variables = {
        "KENSA_DATA_DIR": str(data),
        "KENSA_CACHE_DIR": str(data / "cache"),
        "KENSA_PORT": str(PORT),
        "KENSA_LOG_LEVEL": "error",
        "KENSA_JOB_PACE": pace,
        "KENSA_JOB_MEMORY": "off",  # a build that reckons too much does it all the same
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "app"], cwd=root, env={**os.environ, **variables}
    )
    try:
        with httpx.Client(base_url=URL, timeout=60, trust_env=False) as client:
            path = "/readyz" if (data / "models").exists() else "/jobs"
            _until(lambda: client.get(path).status_code == httpx.codes.OK)
            yield client, process.pid
    finally:
        process.terminate()
        process.wait()


def _put(pictures: list[Path], data: Path) -> None:
    train = data / "datasets" / "train" / NAME
    train.mkdir(parents=True, exist_ok=True)
    for path in pictures:
        shutil.copyfile(path, train / path.name)


def _job(client: httpx.Client, data: Path, found: Found) -> None:
    """From POST /retrain until the new version answers."""
    _until(lambda: client.get("/jobs").status_code == httpx.codes.OK)
    began = time.perf_counter()
    asked = client.post("/retrain", json={"model": NAME, "category": NAME, "max_flips": 1.0})
    asked.raise_for_status()
    waited, job = 0.0, dict[str, Any]()
    while job.get("outcome") != "live":
        time.sleep(0.1)
        with suppress(OSError, ValueError):
            running = (data / "jobs" / "running").read_text()
            waited = max(waited, _delay(Path(f"/proc/{running}")))
        job = client.get(f"/jobs/{asked.json()['id']}").json()
        if job["state"] not in ("queued", "running", "succeeded") or job["outcome"] == "held":
            sys.exit(f"It does not go live: {job}")
    found.whole.append(time.perf_counter() - began)
    found.waited.append(waited)
    picture = next((data / "datasets" / "train" / NAME).iterdir()).read_bytes()
    answer = client.post("/infer", content=picture, headers={"Content-Type": "image/png"}).json()
    assert answer["model_version"] == job["version"], answer


def _delay(process: Path) -> float:
    """Seconds for which a thread, or the first one of a process, had work and no CPU."""
    return int((process / "schedstat").read_text().split()[1]) / 1e9


def _delay_of_two(process: int) -> float:
    """The same of the first thread, and of that one of the others that worked most: the loader."""
    threads = [one / "schedstat" for one in Path(f"/proc/{process}/task").iterdir()]
    others = [one for one in threads if one.parent.name != str(process)]
    busiest = max(others, key=lambda one: int(one.read_text().split()[0]))
    return _delay(Path(f"/proc/{process}")) + _delay(busiest.parent)


def _until_the_spare_waits(data: Path) -> None:
    """Or, of a build that has none, for as long as it may take to have one."""
    end, jobs = time.monotonic() + 20, data / "jobs"
    while time.monotonic() < end:
        if (jobs / "waiting").exists():
            end = time.monotonic() + SPARE_S
            if not (jobs / "running").exists():  # it has loaded what it should
                return
        time.sleep(0.1)


def _until(true: Any) -> None:
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        with suppress(httpx.HTTPError):
            if true():
                return
        time.sleep(0.02)
    sys.exit("The server does not answer.")


if __name__ == "__main__":
    main()
