"""The record: what it costs the line, and how fast a million decisions are looked through.

    python -m benchmarks.decisions [--lines N ...] [--clients N] [--turns N] [--seconds S]

Two servers with the same PatchCore model, one with KENSA_RECORD=on and one with off, are asked in
turns by the same clients, each part with a name of its own; every picture is kept. All in one run,
because machines differ from one minute to the next. Then a server is asked that has the most
decisions, and a database as it grows.
"""

from __future__ import annotations

import argparse
import random
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timezone
from datetime import time as time_of_day
from itertools import count
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import httpx

from app.decisions.database import FILE, DecisionDatabase, Filter, open_or_make
from app.decisions.decision import Decision
from app.decisions.quarters import Spans
from app.decisions.shift import look
from app.decisions.shift_page import shift_page
from app.decisions.words import Words
from benchmarks.common import ASSETS, begin, phase, print_load, print_machine, print_table
from benchmarks.load import CATEGORY, WEIGHTS, ask, compare, learned, server

LINES = (1_000, 10_000, 100_000, 1_000_000)
MODELS = 4
SCORER = "5f0c8e6c0b1d"
BEGAN, BEAT_MS = 1_764_400_000_000, 100  # when the first was made, and each after the one before
DAY_MS = 86_400_000
_PARTS = count()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decisions", description=(__doc__ or "").split("\n")[0]
    )
    sizes = "of the database (default 1,000 to 1,000,000)"
    parser.add_argument("--lines", type=int, nargs="+", default=LINES, help=sizes)
    parser.add_argument("--clients", type=int, default=16, help="at once (default 16)")
    parser.add_argument("--turns", type=int, default=8, help="for each server (default 8)")
    parser.add_argument("--seconds", type=float, default=8, help="for each turn (default 8)")
    flags = parser.parse_args()
    begin()
    print_machine(["openvino"])
    with tempfile.TemporaryDirectory() as folder:
        if WEIGHTS.is_file():
            with phase("learning"):
                engine = learned("patchcore", Path(folder) / "patchcore")
            beside_the_line(engine, flags.clients, flags.turns, flags.seconds)
            over_http(engine, Path(folder) / "data", max(flags.lines))
        else:
            sys.stderr.write(f"No photos and weights in {ASSETS}: only lines are looked through.\n")
        many(Path(folder) / "decisions", flags.lines)
    print_load("after")


def beside_the_line(engine: Path, clients: int, turns: int, seconds: float) -> None:
    """Every picture is kept."""
    place = ASSETS / "data" / "test" / CATEGORY / "normal"
    photos = [path.read_bytes() for path in sorted(place.iterdir())[:8]]
    with ExitStack() as stack:
        ports = {
            name: stack.enter_context(server(engine, "on", KENSA_RECORD=name,
                                             KENSA_RECORD_SAMPLE="1"))[0]
            for name in ("off", "on")
        }  # fmt: skip
        compare("record", ports, photos, clients, turns, seconds, another_part)


def another_part() -> dict[str, str]:
    return {"X-Part": f"P-{next(_PARTS)}"}


# ---- many lines ----------------------------------------------------------------------------------


def many(folder: Path, sizes: Sequence[int]) -> None:
    """Fill a database, and ask it in every way that the routes do, at each of some sizes."""
    sizes, draw, lines = sorted({*sizes} - {0}), random.Random(1), 0
    taken: dict[str, list[str]] = {}
    each_us, mib = [], []
    with open_or_make(folder) as database:
        for size in sizes:
            with phase(f"writing {size:,} decisions"):
                began = time.perf_counter()
                for first in range(lines, size, 1000):
                    last = min(first + 1000, size)
                    database.append([_one(number, draw) for number in range(first, last)])
                each_us.append(f"{(time.perf_counter() - began) / (size - lines) * 1e6:.0f}")
            lines = size
            for what, ask in _ways(lines):
                taken.setdefault(what, []).append(_timed(lambda ask=ask: ask(database))[1])
            mib.append(f"{database.bytes_used() / 2**20:.1f}")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows = [[what, *medians] for what, medians in taken.items()]
    rows += [["writing one, us", *each_us], ["the file, MiB", *mib]]
    head = [f"{size:,}" for size in sizes]
    print_table("Decisions that there are: median ms", ["asked for", *head], rows)
    print(f"This process {memory:.0f} MiB")


def over_http(engine: Path, data: Path, lines: int) -> None:
    """Ask a server that has so many decisions of its model, while nothing else is asked."""
    photo = next((ASSETS / "data" / "test" / CATEGORY / "normal").iterdir()).read_bytes()
    with server(engine, "on", KENSA_DATA_DIR=str(data)) as (port, _):
        ask(port, [photo], 1, 0.5)
    with DecisionDatabase(data / "decisions" / FILE) as database:
        (judged,) = database.find(Filter(), 1)
    known = {name: getattr(judged.decision, name) for name in ("model", "version", "scorer")}
    draw = random.Random(1)
    with open_or_make(data / "decisions") as database, phase(f"writing {lines:,} decisions"):
        first = round(time.time() * 1000) - BEAT_MS * lines
        for number in range(0, lines, 1000):
            some = [_one(one, draw, first) for one in range(number, number + 1000)]
            database.append([replace(one, **known) for one in some])
        since = [datetime.fromtimestamp((first + BEAT_MS * (lines - many)) / 1000, timezone.utc)
                 for many in (100_000, 864_000)]  # fmt: skip
    preview = f"/models/{judged.decision.model}/threshold/preview"
    ways: list[tuple[str, str, dict[str, Any]]] = [
        ("the newest 50", "/decisions", {}),
        ("the newest 500", "/decisions", {"limit": 500}),
        ("rejects that nobody has marked", "/decisions", {"verdict": "anomaly", "label": "none"}),
        ("near the threshold", "/decisions", {"min_score": 0.49, "max_score": 0.51}),
        ("of a version that there is not", "/decisions", {"version": "0009"}),
        ("one, by its id", f"/decisions/line-{lines // 3}", {}),
        ("of a part", "/parts/KB-2046", {}),
        ("statistics of a day", "/statistics", {}),
        ("preview of 100,000", preview, {"raw": 1.4, "since": since[0].isoformat()}),
        ("preview of a day: 864,000", preview, {"raw": 1.4, "since": since[1].isoformat()}),
    ]
    # Its own lines are more than the setting's MiB would keep.
    more = {"KENSA_DATA_DIR": str(data), "KENSA_RECORD_MIB": "4096"}
    with (
        server(engine, "on", **more) as (port, _),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        memory = [_resident(client)]
        rows = []
        for what, path, query in ways:
            rows.append([what, *_timed(lambda path=path, query=query: _get(client, path, query))])
            memory.append(_resident(client))
        for _ in range(100):
            for _, path, query in ways[:-2]:
                _get(client, path, query)
        memory.append(_resident(client))
    print_table(f"{lines:,} decisions, over HTTP", ["asked for", "first ms", "median ms"], rows)
    print(f"The server: {memory[0]:.0f} MiB before, at most {max(memory):.0f},"
          f" {memory[-1]:.0f} after 800 more")  # fmt: skip


def _get(client: httpx.Client, path: str, query: dict[str, Any]) -> str:
    answer = client.get(path, params=query)
    assert answer.status_code == 200, answer.text
    return answer.text


def _resident(client: httpx.Client) -> float:
    """What the server has of the memory, MiB."""
    found = re.search(r"^process_resident_memory_bytes (\S+)", _get(client, "/metrics", {}), re.M)
    assert found is not None
    return float(found[1]) / 2**20


def _one(number: int, draw: random.Random, began: int = BEGAN) -> Decision:
    raw = draw.gauss(1, 0.2)
    return Decision(
        id=f"line-{number}", part=f"KB-{number // 2}", at=began + BEAT_MS * number,
        model=f"m{number % MODELS}", version="0001-3f9a0c41d2e8", scorer=SCORER,
        verdict="anomaly" if raw > 1.5 else "normal", code="", raw_score=raw,
        score=min(max(raw / 3, 0), 1), threshold=0.5, raw_threshold=1.5, queue_ms=0.1,
        decode_ms=2.0, infer_ms=20.5, total_ms=23.25, sha256=f"{number:064x}", format="JPEG",
        width=1024, height=1024, who="plc-3",
    )  # fmt: skip


def _ways(lines: int) -> list[tuple[str, Callable[[DecisionDatabase], Any]]]:
    middle = BEGAN + BEAT_MS * lines // 2
    day = Filter(model="m1", since=BEGAN + BEAT_MS * lines - DAY_MS)

    def find(asked: Filter, limit: int = 50) -> Callable[[DecisionDatabase], Any]:
        return lambda database: database.find(asked, limit)

    return [
        ("the newest 50", find(Filter())),
        ("the newest 500", find(Filter(), 500)),
        ("50 in the middle", lambda database: database.find(Filter(), 50, lines // 2)),
        ("one, by its id", lambda database: database.one(f"line-{lines // 3}")),
        ("of a part", find(Filter(part="KB-2046"))),
        ("of a model", find(Filter(model="m2"))),
        ("of a model, from the middle on", find(Filter(model="m2", since=middle))),
        ("rejects that nobody has marked", find(Filter(verdict="anomaly", label="none"))),
        ("marked as good", find(Filter(label="good"))),
        ("near the threshold", find(Filter(score_from=0.49, score_to=0.51))),
        ("of a version that there is not", find(Filter(model="m2", version="0009"))),
        ("preview over a day of a model", lambda it: it.count_flips(day, SCORER, 1.4)),
        ("preview over all of a model", lambda it: it.count_flips(Filter(model="m1"), SCORER, 1.4)),
        ("the 200 newest flips", lambda it: it.flips(Filter(model="m1"), SCORER, 1.4, 200)),
        (f"the report of a shift of 8 hours, {MODELS} models", _report(lines)),
    ]


def _report(lines: int) -> Callable[[DecisionDatabase], Any]:
    """The whole page but for its pictures, of the shift before the last line."""
    zone, last = ZoneInfo("UTC"), BEGAN + BEAT_MS * lines
    spans = Spans(zone, [time_of_day(6), time_of_day(14), time_of_day(22)])
    before = round(spans.around(last)[0].timestamp() * 1000) - 1
    made = datetime.fromtimestamp(last / 1000, zone)

    def ask(database: DecisionDatabase) -> str:
        shift = look(database, spans, before, made, None)
        return shift_page(shift, None, lambda _: None, Words("en"), "0")

    return ask


def _timed(work: Callable[[], Any]) -> list[str]:
    taken = []
    for _ in range(7):
        began = time.perf_counter()
        work()
        taken.append((time.perf_counter() - began) * 1000)
    return [f"{taken[0]:.1f}", f"{statistics.median(taken):.2f}"]


if __name__ == "__main__":
    main()
