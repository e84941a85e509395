"""Long lists beside the line: what they take, and what parts and /livez notice of it.

    python -m benchmarks.lists [--turns N] [--seconds S] [--rate N] [--pause MS] [--streams N]
                               [--folder FOLDER]
    python -m benchmarks.lists --growth

A server with a PatchCore model that has 1,000 versions, a category of 20,000 pictures and 5,000
jobs. A camera sends parts at a steady rate; by turns nobody else asks, and somebody asks for one
list after the other. All in one run, because machines differ from one minute to the next. With
--growth servers that have a hundredth, a tenth and all of that are asked, with no parts.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import shutil
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

from benchmarks.common import ASSETS, begin, phase, print_load, print_machine, print_table
from benchmarks.load import CATEGORY, WEIGHTS, learned, percentile, server

NAME, MANY = "part", "many"
VERSIONS, PICTURES, JOBS, ENDED = 1_000, 20_000, 5_000, 500
LISTS = (
    "/models",
    f"/models/{NAME}?limit=200&offset=700",
    "/datasets",
    f"/datasets/{MANY}/train?limit=1000&offset=15000",
    "/jobs",
    "/jobs?limit=500",
    "/healthz",
    "/metrics",
)
SHARES, AGAIN = (0.01, 0.1, 1.0), 20  # of it; how often a list is asked for
LOOK_EVERY_S = 0.05  # at /livez


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lists", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--turns", type=int, default=6, help="of each kind (default 6)")
    parser.add_argument("--seconds", type=float, default=10, help="for each turn (default 10)")
    parser.add_argument("--rate", type=float, default=8, help="parts a second (default 8)")
    parser.add_argument("--pause", type=float, default=100, help="ms between lists (default 100)")
    parser.add_argument("--streams", type=int, default=0, help="of events, instead of lists")
    parser.add_argument("--folder", type=Path, help="for the data, which are made where it is new")
    parser.add_argument("--growth", action="store_true", help="how long lists take as they grow")
    flags = parser.parse_args()
    begin()
    if not WEIGHTS.is_file():
        sys.exit(f"This benchmark needs real photos and weights: {WEIGHTS} does not exist.")
    print_machine(["openvino"])
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = flags.folder or Path(temporary)
        engine, data = folder / "model" / "engine", folder / "data"
        if flags.growth:
            growth(Path(temporary))
            return
        if not data.exists():
            folder.mkdir(exist_ok=True)
            with phase("learning"):
                learned("patchcore", folder / "model")
            with phase("filling"):
                fill(data, engine)
        more = {"KENSA_DATA_DIR": str(data), "KENSA_KEEP_VERSIONS": str(VERSIONS)}
        port, _ = stack.enter_context(server(engine, "off", **more, KENSA_MODEL_NAME=NAME))
        measure(port, flags)
    print_load("after")


# ---- what there is -------------------------------------------------------------------------------


def fill(data: Path, engine: Path, share: float = 1.0) -> None:
    """A data folder with all of it, or a share; files of versions and pictures are hard links."""
    fill_models(data, engine, round(share * VERSIONS))
    folder = data / "datasets" / "train" / MANY
    folder.mkdir(parents=True)
    photo = next((ASSETS / "data" / "train" / CATEGORY).iterdir())
    first = folder / f"{0:05}{photo.suffix}"
    shutil.copyfile(photo, first)
    for number in range(1, round(share * PICTURES)):
        (folder / f"{number:05}{photo.suffix}").hardlink_to(first)
    fill_jobs(data, round(share * JOBS), round(share * ENDED))


def fill_models(data: Path, engine: Path, count: int) -> None:
    """One that was trained, and a change of its threshold for each other version."""
    from engines.meta import Meta
    from engines.store.versions import Store

    store = Store(data / "models")
    base = store.take_in(NAME, engine, {"folder": str(engine.resolve()), "activate": True})
    meta = Meta.read(store.folder(NAME, base) / "meta.json")
    for number in range(1, count):
        changed = meta.model_copy(update={"image_threshold": 0.4 + number / 10_000})
        store.publish_threshold(NAME, base, changed, {"reason": f"try {number}"})
    store.activate(NAME, base, {"ok": True, "reasons": []})
    store.note_folder(NAME, base)


def fill_jobs(data: Path, count: int, have_ended: int) -> None:
    """The newest have ended and published a version; the others wait."""
    from app.jobs.job_queue import JobQueue
    from engines.queue.job_requests import RetrainRequest
    from engines.queue.protocol import enqueue_options
    from engines.store.versions import Store

    store = Store(data / "models")
    versions, jobs = store.versions(NAME), JobQueue(data, store)
    jobs.open()
    meta = {"backbone": "resnet18", "layers": ["layer2", "layer3"], "image_size": 256}
    request = RetrainRequest(model=NAME, category=MANY, meta=meta).model_dump(exclude_none=True)
    ids = [f"retrain-{number:012x}" for number in range(count)]
    for one in ids:
        jobs._client.enqueue(enqueue_options(one, None, []), "retrain", request)
    jobs.close()
    images = {"learned": 40, "known": 0, "strange": 2, "names": ["a.png", "b.png"], "skipped": 0}
    with closing(sqlite3.connect(data / "jobs.sqlite")) as database:
        for one, version in zip(ids[-have_ended:], itertools.cycle(versions), strict=False):
            ended = {"state": "succeeded", "version": version, "attempts": 1, "images": images}
            database.execute(
                "UPDATE workflow_status SET status = 'SUCCESS', output = ?, completed_at ="
                " created_at + 60000, queue_name = NULL WHERE workflow_uuid = ?",
                [json.dumps(ended), one],
            )
        database.commit()


# ---- as it grows ---------------------------------------------------------------------------------


def growth(folder: Path) -> None:
    """How long each list takes of servers that have less and more, asked one after the other."""
    with phase("learning"):
        learned("patchcore", folder / "model")
    taken: dict[str, list[str]] = {path: [] for path in LISTS}
    for share in SHARES:
        data = folder / f"data-{share}"
        with phase(f"filling {share:.0%}"):
            fill(data, folder / "model" / "engine", share)
        more = {"KENSA_DATA_DIR": str(data), "KENSA_KEEP_VERSIONS": str(VERSIONS)}
        with server(folder / "model" / "engine", "off", **more, KENSA_MODEL_NAME=NAME) as (port, _):
            connection = connect(port)
            for path in LISTS:
                some = path.split("&offset")[0]  # the first page: a late one, smaller lists lack
                waits = [ask(connection, some) for _ in range(AGAIN + 1)][1:]
                taken[path].append(f"{statistics.median(waits):.1f}")
    head = [f"{share:.0%}" for share in SHARES]
    rows = [[path.split("&offset")[0], *medians] for path, medians in taken.items()]
    print_table("Median ms, by the share of what there is", ["list", *head], rows)
    print_load("after")


# ---- who asks ------------------------------------------------------------------------------------


def measure(port: int, flags: argparse.Namespace) -> None:
    """Turns alternate; the first of each is not counted."""
    parts: dict[str, list[float]] = {"alone": [], "beside": []}
    looks: dict[str, list[float]] = {"alone": [], "beside": []}
    lists: dict[str, list[float]] = {path: [] for path in LISTS}
    firsts = {path: ask(connect(port), path) for path in LISTS}
    photos = ASSETS / "data" / "test" / CATEGORY / "normal"
    photo = next(photos.iterdir()).read_bytes()
    for turn in range(flags.turns + 1):
        for name in ("alone", "beside") if turn % 2 else ("beside", "alone"):
            others = [] if name == "alone" else askers(port, flags, lists if turn else {})
            seconds = flags.seconds if turn else 2
            taken, looked = one_turn(port, photo, flags.rate, seconds, others)
            if turn:
                parts[name] += taken
                looks[name] += looked
    if not flags.streams:
        rows = [[path, f"{firsts[path]:.0f}", *figures(lists[path])] for path in LISTS]
        print_table("Lists", ["list", "first ms", "p50 ms", "p99 ms", "worst ms", "asked"], rows)
    rows = []
    for name in parts:
        rows.append([f"/infer, {name}", *figures(parts[name])])
        rows.append([f"/livez, {name}", *figures(looks[name])])
    print_table("Beside", ["", "p50 ms", "p99 ms", "worst ms", "asked"], rows)
    ratios = {p: percentile(parts["beside"], p) / percentile(parts["alone"], p) for p in (50, 99)}
    print("\n/infer, beside / alone: " + ", ".join(f"p{p} {r:.2f}" for p, r in ratios.items()))


def askers(
    port: int, flags: argparse.Namespace, lists: dict[str, list[float]]
) -> list[Callable[[threading.Event], None]]:
    """Who else asks, until an event is set."""
    if flags.streams:
        return [lambda over: watch(port, flags.streams, over)]

    def one_after_the_other(over: threading.Event) -> None:
        connection = connect(port)
        for path in itertools.cycle(LISTS):
            taken = ask(connection, path)
            lists.get(path, []).append(taken)
            if over.wait(flags.pause / 1000):
                return

    return [one_after_the_other]


def watch(port: int, streams: int, over: threading.Event) -> None:
    """Many streams of events on one job that waits; nobody reads more than the system does."""
    job = f"retrain-{0:012x}"
    open_ones = []
    for _ in range(streams):
        connection = connect(port)
        connection.request("GET", f"/jobs/{job}/events")
        open_ones.append((connection, connection.getresponse()))
    over.wait()
    for connection, _ in open_ones:
        connection.close()


def one_turn(
    port: int,
    photo: bytes,
    rate: float,
    seconds: float,
    others: list[Callable[[threading.Event], None]],
) -> tuple[list[float], list[float]]:
    """How long each part waited, and each look at /livez, milliseconds."""
    over, looked = threading.Event(), []

    def look() -> None:
        connection = connect(port)
        while not over.wait(LOOK_EVERY_S):
            looked.append(ask(connection, "/livez"))

    threads = [threading.Thread(target=work, args=[over]) for work in others]
    for thread in threads:
        thread.start()
    time.sleep(1.0)  # they have begun
    threads.append(threading.Thread(target=look))
    threads[-1].start()
    taken = send(port, photo, rate, seconds)
    over.set()
    for thread in threads:
        thread.join()
    return taken, looked


def send(port: int, photo: bytes, rate: float, seconds: float) -> list[float]:
    """Parts at a steady beat; how long each waited, milliseconds."""
    connection, taken = connect(port), []
    due = time.perf_counter()
    for _ in range(round(rate * seconds)):
        time.sleep(max(0.0, due - time.perf_counter()))
        taken.append(ask(connection, "/infer", photo))
        due += 1 / rate
    return taken


def ask(connection: http.client.HTTPConnection, path: str, photo: bytes | None = None) -> float:
    """One request; how long it took, milliseconds."""
    began = time.perf_counter()
    if photo is None:
        connection.request("GET", path)
    else:
        connection.request("POST", path, photo, {"Content-Type": "image/jpeg"})
    answer = connection.getresponse()
    body = answer.read()
    assert answer.status == 200, body
    return (time.perf_counter() - began) * 1000


def connect(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=60)


def figures(waits: list[float]) -> list[str]:
    """p50, p99, the longest, and how many."""
    found = (statistics.median(waits), percentile(waits, 99), max(waits))
    return [*(f"{one:.1f}" for one in found), str(len(waits))]


if __name__ == "__main__":
    main()
