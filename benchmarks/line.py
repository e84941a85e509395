"""The line comes first: how long a part waits for its verdict while a job learns.

    python -m benchmarks.line [--seconds N] [--every MS] [--bank N]

A camera sends a part every so many milliseconds, first without a job, then while a model is
retrained again and again, with each of the paces that KENSA_JOB_PACE knows; then without a job
once more. All in one run, because machines differ from one minute to the next.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import ASSETS, ROOT, begin, phase, print_load, print_machine, print_table
from kensa_client import Kensa
from kensa_client.answers import Split

CATEGORY = "alien"
SETTINGS = {"backbone": "resnet18", "layers": ["layer2", "layer3"], "coreset_ratio": 0.1,
            "image_size": 256}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.line", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seconds", type=float, default=60, help="for each pace (default 60)")
    parser.add_argument("--every", type=float, default=100, help="ms from part to part (100)")
    flags = parser.parse_args()
    begin()
    print_machine(["openvino", "torch"])
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), flags.seconds, flags.every)
    head = ["pace", "p50 ms", "p99 ms", "worst ms", "p99 ratio", "jobs", "s for a job"]
    print_table(f"A part every {flags.every:.0f} ms", head, rows)
    print_load("after")


def measure(folder: Path, seconds: float, every: float) -> list[list[str]]:
    """One row for each pace, compared with the waits without a job just before."""
    rows = []
    for pace in ("full", "idle", "pause"):
        with phase(pace), server(folder, pace) as client:
            if pace == "full":
                first_training(client)
            photo = next((ASSETS / "data" / "test" / CATEGORY / "normal").iterdir()).read_bytes()
            line(client, photo, 3, every)
            alone, _ = line(client, photo, seconds / 2, every)
            beside, jobs = line(client, photo, seconds, every, retrain=True)
        base = percentile(alone, 99)
        for name, waits in ((f"{pace}: no job", alone), (f"{pace}: a job", beside)):
            ended = [job for job in jobs if name.endswith("a job")]
            rows.append(
                [
                    name,
                    f"{statistics.median(waits):.1f}",
                    f"{percentile(waits, 99):.1f}",
                    f"{max(waits):.1f}",
                    f"{percentile(waits, 99) / base:.2f}",
                    str(len(ended)) if ended else "",
                    f"{statistics.mean(ended):.1f}" if ended else "",
                ]
            )
    return rows


def line(
    client: httpx.Client, photo: bytes, seconds: float, every: float, *, retrain: bool = False
) -> tuple[list[float], list[float]]:
    """Send parts at a steady beat. How long each waited, ms, and how long each job took, s."""
    waits: list[float] = []
    jobs: list[float] = []
    job, began = None, 0.0
    end = time.perf_counter() + seconds
    due = time.perf_counter()
    while (now := time.perf_counter()) < end or (retrain and not jobs):
        if retrain and (job is None or len(waits) % 10 == 0):
            if job is not None and client.get(f"/jobs/{job}").json()["state"] == "succeeded":
                jobs.append(now - began)
                job = None
            if job is None:
                body = {"model": CATEGORY, "category": CATEGORY, "update": False}
                job, began = client.post("/retrain", json=body).json()["id"], time.perf_counter()
            due = max(due, time.perf_counter())
        time.sleep(max(0.0, due - time.perf_counter()))
        sent = time.perf_counter()
        answer = client.post("/infer", content=photo, headers={"Content-Type": "image/jpeg"})
        answer.raise_for_status()
        waits.append((time.perf_counter() - sent) * 1000)
        due += every / 1000
    if job is not None:
        client.post(f"/jobs/{job}/cancel")
    return waits, jobs


def first_training(client: httpx.Client) -> None:
    """Upload the photos, and learn them."""
    data = ASSETS / "data"
    test = data / "test" / CATEGORY
    places: dict[Split, Path] = {
        "train": data / "train" / CATEGORY,
        "normal": test / "normal",
        "anomaly": test / "anomaly",
    }
    with Kensa(str(client.base_url)) as kensa:
        for split, place in places.items():
            kensa.upload(CATEGORY, split, sorted(place.iterdir()))
        job = kensa.retrain(CATEGORY, CATEGORY, kind="patchcore", meta=SETTINGS,
                            pretrained="resnet18.safetensors")  # fmt: skip
        ended = kensa.wait(job["id"])
    if ended["outcome"] != "live":
        sys.exit(f"The first training failed: {ended}")


@contextmanager
def server(folder: Path, pace: str) -> Iterator[httpx.Client]:
    """Kensa with a worker; its data stay in `folder` from one pace to the next."""
    weights = folder / "data" / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    source = ASSETS / "weights" / "resnet18.safetensors"
    if not source.is_file():
        sys.exit(f"This benchmark needs real photos and weights: {source} does not exist.")
    (weights / source.name).write_bytes(source.read_bytes())
    variables: dict[str, Any] = {
        "KENSA_DATA_DIR": str(folder / "data"),
        "KENSA_CACHE_DIR": str(folder / "cache"),
        "KENSA_PORT": "8765",
        "KENSA_JOB_PACE": pace,
        "KENSA_LOG_LEVEL": "error",
        "KENSA_GATE_FLIPS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "app"], cwd=ROOT, env={**os.environ, **variables}
    )
    try:
        with httpx.Client(base_url="http://127.0.0.1:8765", timeout=60, trust_env=False) as client:
            until_ready(client)
            yield client
    finally:
        process.terminate()
        process.wait()


def until_ready(client: httpx.Client) -> None:
    for _ in range(300):
        try:
            if client.get("/healthz").json().get("worker") == "running":
                client.get("/jobs").raise_for_status()
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    sys.exit("The server does not start.")


def percentile(waits: list[float], percent: int) -> float:
    return statistics.quantiles(waits, n=100)[percent - 1]


if __name__ == "__main__":
    main()
