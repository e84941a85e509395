"""Kensa's engines and its server beside others', each in an environment of its own.

    python -m benchmarks.peers [--turns N] [--seconds S] [--bank N] [--only NAME ...] [--cache DIR]

The first run builds three environments in the cache folder: it downloads 3 GB for each, which take
7 GB of disk. docs/benchmarks.md says what is compared, and what columns mean.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.common import (
    ROOT,
    begin,
    machine,
    memory_mib,
    phase,
    print_load,
    print_table,
    times,
)
from benchmarks.peer_models import learn

PEER = ROOT / "benchmarks" / "peer.py"
OURS = ""  # this environment
ENVIRONMENTS = {
    "anomalib": ["anomalib[openvino]", "fastapi", "uvicorn"],
    "litserve": ["anomalib[openvino]", "litserve", "python-multipart"],
    "anomavision": ["anomavision[cpu]"],
}
BASE = "anomalib-openvino"  # what the others are compared with
IN_A_ROW = 5  # images per turn of an engine: its bank is in the cache again, as when serving
SHARE = 0.8  # of the full load
START_LIMIT_S = 300.0
BOUNDARY = "kensa-benchmark"


@dataclass(frozen=True)
class Engine:
    """What scores decoded pictures, one after the other."""

    name: str
    words: str
    model: str
    environment: str = OURS
    prepared: str = ""  # by which name `peer.py prepare` makes what it opens


@dataclass(frozen=True)
class Service:
    """What scores pictures over HTTP, and the engine inside."""

    name: str
    words: str
    engine: str
    environment: str = OURS
    body: str = "raw"


ENGINES = [
    Engine(BASE, "anomalib, OpenVINO inferencer", "PatchCore", "anomalib", BASE),
    Engine(f"{BASE}-f32", "anomalib, OpenVINO inferencer in f32", "PatchCore", "anomalib", BASE),
    Engine("anomalib-torch", "anomalib, torch inferencer", "PatchCore", "anomalib",
           "anomalib-torch"),
    Engine("kensa", "Kensa", "PatchCore"),
    Engine("anomavision-onnx", "AnomaVision, ONNX Runtime", "PaDiM", "anomavision", "anomavision"),
    Engine("anomavision-torch", "AnomaVision, torch", "PaDiM", "anomavision", "anomavision"),
    Engine("kensa-padim", "Kensa", "PaDiM"),
]  # fmt: skip
SERVICES = [
    Service("fastapi", "FastAPI around anomalib", BASE, "anomalib"),
    Service("litserve", "LitServe around anomalib", BASE, "litserve", "form"),
    Service("kensa", "Kensa", "kensa"),
]


def main() -> None:
    flags = _flags()
    begin()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers end with it
    report = Report(machine(["openvino", "torch", "numpy", "fastapi", "uvicorn"]))
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        report.begin(learn(Path(name), flags.bank))
        peers = Peers(Path(name), flags.cache, flags.only, report)
        engines = peers.open_engines(stack)
        report.add("Engines", compare_engines(engines, flags.images))
        if not flags.skip_http and (servers := peers.start_servers(stack)):
            for clients in flags.clients:
                found = compare_servers(servers, engines, clients, flags.turns, flags.seconds)
                report.add(f"HTTP, clients: {clients}", found)
            paced = pace_servers(servers, clients, flags.turns, flags.seconds)
            report.add(f"HTTP, clients: {clients}, at {SHARE:.0%} of that", paced)
            memory = [[one.of.words, f"{one.resident_mib():.0f}"] for one in servers]
            report.add("Resident memory after these requests", (["server", "MiB"], memory))
    report.end()
    report.write(flags.json or flags.cache / "peers.json")


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=(__doc__ or "").split("\n")[0]
    )
    names = [one.name for one in (*ENGINES, *SERVICES)]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kensa-peers"
    add = parser.add_argument
    add("--images", type=int, default=50, help="per engine (default 50)")
    add("--bank", type=int, default=10_240, help="rows (default 10240)")
    add("--clients", type=int, nargs="+", default=[1, 16], help="at once (default 1 16)")
    add("--turns", type=int, default=5, help="of each server (default 5)")
    add("--seconds", type=float, default=5, help="for each turn (default 5)")
    add("--only", nargs="+", choices=names, default=names, metavar="NAME",
        help=f"of {', '.join(dict.fromkeys(names))}")  # fmt: skip
    add("--skip-http", action="store_true", help="engines only")
    add("--cache", type=Path, default=cache, help=f"where environments are kept ({cache})")
    add("--json", type=Path, help="where results are written (peers.json in the cache)")
    return parser.parse_args()


# ---- environments --------------------------------------------------------------------------------


def environment(name: str, cache: Path) -> Path:
    """The Python of an environment of its own, built where it is not there yet.

    Raises:
        Absent: its packages cannot be installed.
    """
    if name == OURS:
        return Path(sys.executable)
    packages = ENVIRONMENTS[name]
    this = f"{' '.join(packages)}, Python {sys.version_info[0]}.{sys.version_info[1]}"
    folder = cache / name
    python, whole = folder / "bin" / "python", folder / "installed.txt"
    if whole.is_file() and whole.read_text() == this:
        return python
    with phase(f"building an environment for {name}, once: {' '.join(packages)}"):
        if not python.is_file():
            _run([sys.executable, "-m", "venv", folder])
        _run([python, "-m", "pip", "install", "--quiet", *packages])
    whole.write_text(this)
    return python


class Absent(Exception):
    """A contestant that does not take part, and why."""


def _run(command: Sequence[str | Path]) -> str:
    """What a command prints; Absent where it fails."""
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Absent(_reason(done.stderr))
    return done.stdout


def _reason(said: str) -> str:
    """The last thing that a program said before it ended."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line]
    return (errors or lines or ["it said nothing"])[-1][:300]


# ---- contestants ---------------------------------------------------------------------------------


@dataclass
class OpenEngine:
    """The process of an engine, asked on its stdin."""

    of: Engine
    process: subprocess.Popen[str]
    memory: dict[str, float]  # MiB: opening, inferring
    ms: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def ask(self, **what: float) -> dict[str, list[float]]:
        """See `benchmarks.peer.answer`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        found: dict[str, list[float]] = json.loads(self.process.stdout.readline())
        return found

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


@dataclass
class OpenServer:
    """A server that is ready, and how long its requests took."""

    of: Service
    process: subprocess.Popen[bytes]
    port: int
    photos: list[bytes]
    ms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def resident_mib(self) -> float:
        """Of its processes together."""
        group = os.getpgid(self.process.pid)
        every = [int(one.name) for one in Path("/proc").iterdir() if one.name.isdecimal()]
        return sum(memory_mib("VmRSS", str(one)) for one in every if _group(one) == group)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # LitServe's workers
            self.process.wait()


def _group(process: int) -> int | None:
    try:
        return os.getpgid(process)
    except ProcessLookupError:
        return None


T = TypeVar("T", Engine, Service)
B = TypeVar("B", OpenEngine, OpenServer)


class Peers:
    """Starts contestants; one that cannot be is named with its reason, and the rest goes on."""

    def __init__(self, folder: Path, cache: Path, only: list[str], report: Report) -> None:
        self._folder, self._cache, self._only, self._report = folder, cache.resolve(), only, report
        self._prepared: set[str] = set()

    def open_engines(self, stack: contextlib.ExitStack) -> list[OpenEngine]:
        """Those that can be opened, the one that others are compared with first."""
        return self._begun(ENGINES, self._engine, stack)

    def start_servers(self, stack: contextlib.ExitStack) -> list[OpenServer]:
        return self._begun(SERVICES, self._server, stack)

    def _begun(
        self, every: Sequence[T], begin_one: Callable[[T], B], stack: contextlib.ExitStack
    ) -> list[B]:
        found = []
        for one in every:
            if one.name not in self._only:
                continue
            with phase(f"starting {one.words}"), self._names_absent(one):
                found.append(begin_one(one))
                stack.callback(found[-1].end)
        return found

    @contextlib.contextmanager
    def _names_absent(self, one: Engine | Service) -> Iterator[None]:
        try:
            yield
        except Absent as error:
            self._report.absent[one.words] = str(error)

    def _engine(self, one: Engine) -> OpenEngine:
        python = self._prepare(one.environment, one.prepared)
        log = self._folder / f"{one.name}.log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                self._command(python, "engine", one.name), cwd=self._folder, env=_variables(),
                text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        assert process.stdout is not None
        said = process.stdout.readline()
        if not said:
            process.wait()
            raise Absent(_reason(log.read_text(errors="replace")))
        found = json.loads(said)
        return OpenEngine(one, process, found["memory"])

    def _server(self, one: Service) -> OpenServer:
        port, variables = _free_port(), _variables()
        if one.environment == OURS:
            command = [sys.executable, "-m", "app"]
            variables |= {
                "KENSA_MODEL_DIR": str(self._folder / "patchcore" / "engine"),
                "KENSA_PORT": str(port),
                "KENSA_CACHE_DIR": str(self._folder / "cache"),
                "KENSA_DATA_DIR": str(self._folder / "data-of-kensa"),
                "KENSA_WORKER": "off",
            }
        else:
            python = self._prepare(one.environment, BASE)
            command = [*self._command(python, "serve", one.name), str(port)]
        log = self._folder / f"{one.name}-server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=variables, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        photos = [path.read_bytes() for path in sorted((self._folder / "photos").iterdir())]
        server = OpenServer(one, process, port, photos)
        _wait_until_ready(server, log)
        return server

    def _prepare(self, name: str, what: str) -> Path:
        """The Python of an environment, once the contestant's files are made by it."""
        python = environment(name, self._cache)
        if (named := name or "Kensa") not in self._report.versions:
            self._report.versions[named] = json.loads(_run([python, PEER, "versions"]))
        if what and what not in self._prepared:
            _run(self._command(python, "prepare", what))
            self._prepared.add(what)
        return python

    def _command(self, python: Path, work: str, name: str) -> list[str]:
        return [str(python), str(PEER), work, name, str(self._folder)]


def _variables() -> dict[str, str]:
    """For all alike: nobody asks the internet, and Kensa's own engine finds its packages."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _wait_until_ready(server: OpenServer, log: Path) -> None:
    """Until it has judged a picture."""
    until = time.monotonic() + START_LIMIT_S
    while server.process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(OSError, http.client.HTTPException, Refused):
            _post(server, 1, 0)
            return
        time.sleep(0.5)
    server.end()
    raise Absent(_reason(log.read_text(errors="replace")))


# ---- engines -------------------------------------------------------------------------------------

Table = tuple[list[str], list[list[str]]]


def compare_engines(engines: list[OpenEngine], count: int) -> Table:
    """Decoded pictures through each engine, one after the other, in turns of a few."""
    with phase(f"engines: {count} images each"):
        for turn, begin_at in enumerate(range(0, count, IN_A_ROW)):
            for one in _rotated(engines, turn):
                found = one.ask(begin=begin_at, count=min(IN_A_ROW, count - begin_at))
                one.ms += found["ms"]
                one.scores += found["scores"]
    firsts = {one.of.model: one for one in reversed(engines)}
    exact = {one.of.name: np.array(one.scores) for one in engines}.get(f"{BASE}-f32")
    rows = []
    for one in engines:
        low, median, high = np.percentile(one.ms, [5, 50, 95])
        apart = ""
        if exact is not None and one.of.model == "PatchCore":
            apart = f"{np.abs(np.array(one.scores) / exact - 1).max():.1e}"
        speed = times(statistics.median(firsts[one.of.model].ms) / median)
        memory = [f"{one.memory[key]:.0f}" for key in ("opening", "inferring")]
        rows.append([one.of.words, one.of.model, f"{median:.1f}", f"{low:.1f} to {high:.1f}", speed,
                     apart, *memory])  # fmt: skip
    head = ["engine, one image", "model", "median ms", "5 % to 95 %", "speed",
            "raw score differs by", "opening MiB", "inferring MiB"]  # fmt: skip
    return head, rows


def _rotated(some: list[Any], by: int) -> list[Any]:
    by %= max(1, len(some))
    return some[by:] + some[:by]


# ---- HTTP ----------------------------------------------------------------------------------------


class Refused(Exception):
    """An answer that is no verdict."""


def compare_servers(
    servers: list[OpenServer], engines: list[OpenEngine], clients: int, turns: int, seconds: float
) -> Table:
    """As much as so many clients can ask, in turns with the engines that are inside, alone."""
    inside = [one for one in engines if one.of.name in {server.of.engine for server in servers}]
    bare: dict[str, list[float]] = {one.of.name: [] for one in inside}
    for server in servers:
        server.ms, server.rates = [], []
    with phase(f"HTTP: {clients} clients, {turns} turns"):
        for turn in range(turns):
            for one in _rotated([*servers, *inside], turn):
                if isinstance(one, OpenEngine):
                    taken = one.ask(seconds=seconds)["ms"]
                    bare[one.of.name].append(1000 * len(taken) / sum(taken))
                else:
                    began = time.perf_counter()
                    taken = _post(one, clients, seconds)
                    one.ms += taken
                    one.rates.append(len(taken) / (time.perf_counter() - began))
    return _of_servers(servers, bare)


def _of_servers(servers: list[OpenServer], bare: dict[str, list[float]]) -> Table:
    rows = []
    for one in servers:
        rate = statistics.median(one.rates)
        first = statistics.median(
            [ours / base for ours, base in zip(one.rates, servers[0].rates, strict=True)]
        )
        of_engine = ""
        if found := bare.get(one.of.engine):
            ratios = [ours / alone for ours, alone in zip(one.rates, found, strict=True)]
            of_engine = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        p50, p99 = np.percentile(one.ms, [50, 99])
        rows.append(
            [
                one.of.words,
                one.of.body,
                f"{p50:.1f}",
                f"{p99:.1f}",
                f"{rate:.1f}",
                f"{min(one.rates):.1f} to {max(one.rates):.1f}",
                times(first),
                of_engine,
            ]
        )
    head = [
        "server",
        "body",
        "p50 ms",
        "p99 ms",
        "requests/s",
        "least to most",
        "throughput",
        "of the bare engine",
    ]
    return head, rows


def pace_servers(servers: list[OpenServer], clients: int, turns: int, seconds: float) -> Table:
    """A share of the load that `compare_servers` found; each client sends at a steady beat."""
    waits: dict[str, list[float]] = {one.of.name: [] for one in servers}
    beats = {one.of.name: clients / (SHARE * statistics.median(one.rates)) for one in servers}
    with phase(f"HTTP: {clients} clients at a steady beat, {turns} turns"):
        for turn in range(turns):
            for one in _rotated(servers, turn):
                waits[one.of.name] += _post(one, clients, seconds, beats[one.of.name])
    rows = []
    for one in servers:
        p50, p99 = np.percentile(waits[one.of.name], [50, 99])
        rate = clients / beats[one.of.name]
        rows.append([one.of.words, f"{rate:.1f}", f"{p50:.1f}", f"{p99:.1f}", f"{p99 / p50:.2f}"])
    return ["server", "requests/s", "p50 ms", "p99 ms", "p99 / p50"], rows


def _post(server: OpenServer, clients: int, seconds: float, beat: float = 0) -> list[float]:
    """Milliseconds of all requests of so many clients.

    Args:
        beat: seconds from one request of a client to its next; a wait begins when it was due. 0:
            each sends when it has the answer to the last one.
    """
    taken: list[float] = []
    problems: list[Exception] = []
    begin_at = time.perf_counter()
    phases = random.Random(0)
    starts = [begin_at + phases.random() * beat for _ in range(clients)]

    def send(number: int) -> None:
        try:
            for ms in _client(server, number, begin_at + seconds, starts[number], beat):
                taken.append(ms)  # noqa: PERF402 (others append, too)
        except (OSError, http.client.HTTPException, Refused) as error:
            problems.append(error)

    threads = [threading.Thread(target=send, args=[number]) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    return taken


def _client(
    server: OpenServer, number: int, until: float, due: float, beat: float
) -> Iterator[float]:
    """One connection, and one request after the other."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    requests = [_request(photo, server.of.body) for photo in server.photos]
    with contextlib.closing(connection):
        for body, content_type in cycle(_rotated(requests, number)):
            time.sleep(max(0.0, due - time.perf_counter()))
            began = due if beat else time.perf_counter()
            connection.request("POST", "/infer", body, {"Content-Type": content_type})
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                raise Refused(f"{answer.status}: {text.decode(errors='replace')[:200]}")
            yield (time.perf_counter() - began) * 1000
            due += beat
            if max(due, time.perf_counter()) >= until:
                return


def _request(file: bytes, body: str) -> tuple[bytes, str]:
    """Body and content type."""
    if body == "raw":
        return file, "image/jpeg"
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="part.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n"
    )
    form = head.encode() + file + f"\r\n--{BOUNDARY}--\r\n".encode()
    return form, f"multipart/form-data; boundary={BOUNDARY}"


# ---- what was found ------------------------------------------------------------------------------


@dataclass
class Report:
    """Tables, and on what machine and with which versions they were made."""

    machine: dict[str, str]
    subject: str = ""
    tables: dict[str, Table] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)  # who does not take part, and why

    def begin(self, subject: str) -> None:
        """Say on what machine what is compared; everything here is Markdown."""
        self.subject = subject
        for name, said in {**self.machine, "Compared": subject}.items():
            print(f"{name}: {said}")

    def add(self, title: str, table: Table) -> None:
        """Keep a table, and print it at once: whoever is tired of waiting has it."""
        self.tables[title] = table
        print_table(title, *table)

    def end(self) -> None:
        """Say which versions took part, and who did not, and why."""
        print()
        for name, found in self.versions.items():
            print(f"{name}: {', '.join(f'{one} {number}' for one, number in found.items())}")
        for name, reason in self.absent.items():
            print(f"{name} does not take part: {reason}")
        print_load("after")

    def write(self, path: Path) -> None:
        """As JSON."""
        tables = {
            title: [dict(zip(head, row, strict=True)) for row in rows]
            for title, (head, rows) in self.tables.items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**vars(self), "tables": tables}, indent=2) + "\n")
        print(f"Written to {path}")


if __name__ == "__main__":
    main()
