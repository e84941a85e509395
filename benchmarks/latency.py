"""Latency and memory of our PatchCore beside anomalib's OpenVINO inferencer, on one trained model.

    python -m benchmarks.latency [--images N] [--bank 10000] [--skip-http]

docs/benchmarks.md says what the columns mean.
"""

from __future__ import annotations

import os

# As the server does, before numpy is loaded: OpenBLAS would take a thread from the engines.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import contextlib
import http.client
import io
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import Body, FastAPI, UploadFile
from numpy.typing import NDArray

from benchmarks.common import (
    BACKBONE,
    LAYERS,
    ROOT,
    SIDE,
    Subject,
    begin,
    embeddings,
    find_subject,
    memory_mib,
    phase,
    pictures,
    print_load,
    print_machine,
    print_table,
    times,
)

Score = Callable[[NDArray[np.uint8]], float]  # (SIDE, SIDE, 3) -> raw score

ANOMALIB, OURS = "anomalib, its default", "Kensa, its default"
IN_A_ROW = 5  # images per turn of a contestant: its bank is in the cache again, as when serving
WARM_UP = 10  # images
HTTP_TURNS = 3
CLIENTS = (1, 8)
BOUNDARY = "kensa-benchmark"
MEMORY_BANKS = (10_000, 40_000)  # rows
MEMORY_IMAGES = 10
START_LIMIT_S = 120.0
MIB = 2**20


def main() -> None:
    flags = _flags()
    begin()
    if flags.child == "serve":
        serve_anomalib(flags.folder, flags.port)
    elif flags.child:
        measure_memory(flags.folder, flags.child)
    else:
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), flags.images, flags.bank, skip_http=flags.skip_http)


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--images", type=int, default=100, help="per contestant (default 100)")
    parser.add_argument("--bank", type=int, default=10_000, help="rows (default 10000)")
    parser.add_argument("--skip-http", action="store_true", help="engines and memory only")
    # What this program starts as a process of its own.
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.images < 1 or flags.bank < 1:
        parser.error("--images and --bank take 1 or more")
    return flags


def compare(folder: Path, images: int, rows: int, *, skip_http: bool) -> None:
    """All phases, each with its table."""
    with phase("pictures and their patches"):
        subject = find_subject(folder)
        model, patches = _learned(subject)
    trained = _Trained.make(folder / f"{rows}", subject, model, patches, rows)
    print_machine(["openvino", "anomalib", "torch", "numpy", "fastapi", "uvicorn"])
    print(f"{subject.words}, {BACKBONE} {'+'.join(LAYERS)}, {SIDE} px, a bank of {rows:,} rows")
    compare_engines(trained, images)
    if not skip_http:
        compare_servers(trained, images)
    compare_memory(_banks(folder, trained, model, patches))
    print()
    print_load("after")


# ---- the contestants -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trained:
    """One model in both forms: what convtrt.py leaves, and what anomalib's to_onnx leaves."""

    folder: Path
    rows: int
    files: list[Path]  # to inspect: normal and defective in turn

    @property
    def bundle(self) -> Path:
        return self.folder / "engine"

    @classmethod
    def make(cls, folder: Path, subject: Subject, model: Any, patches: Any, rows: int) -> _Trained:
        _give_bank(model, patches, rows)
        with phase(f"bank of {rows:,} rows: calibrate and export with convtrt.py's code"):
            _export_ours(folder, subject, model)
        with phase(f"bank of {rows:,} rows: export with anomalib's to_onnx"):
            _export_anomalib(folder, model)
        category = subject.category
        pairs = zip(cycle(category.test_normal), category.test_anomaly, strict=False)
        return cls(folder, rows, [path for pair in pairs for path in pair])


def _give_bank(model: Any, patches: Any, rows: int) -> None:
    """Random patches: a coreset would take minutes, and changes no latency."""
    import torch

    from workers.models.patchcore import Bank

    if rows > len(patches):
        sys.exit(f"--bank {rows} is more than the {len(patches)} patches of these pictures.")
    order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))
    model.bank = Bank(patches[order[:rows]].clone(), 0.0)


def _learned(subject: Subject) -> tuple[Any, Any]:
    """Our model without a bank, and all patches of its training images (n, C)."""
    from workers.models import patchcore

    model = patchcore.build(subject.meta, subject.weights)
    return model, embeddings(model, pictures(subject.category.train))


def _export_ours(folder: Path, subject: Subject, model: Any) -> None:
    """As retrain.py and convtrt.py do, with the bank at hand instead of a coreset."""
    from engines.store.golden import Golden
    from engines.store.known_scores import KnownScores
    from workers.converting.convert import Convert, convert
    from workers.learning.calibrate import Budget, calibrate
    from workers.models import patchcore
    from workers.progress import Progress

    normal = pictures(subject.category.test_normal)
    defective = pictures(subject.category.test_anomaly)
    scores = [patchcore.scores(model, [group]) for group in (normal, defective)]
    folder.mkdir()
    known = KnownScores(scores[0].astype(np.float64), np.arange(len(normal)))
    found = calibrate(known, scores[1], Budget(), "test")
    meta = found.write_to(subject.meta).with_(score_kind=patchcore.SCORE_KIND)
    weights, bank = patchcore.save(model, meta, folder)
    meta.write(folder / "meta.json")
    Golden.choose(normal, scores[0], defective, scores[1]).write(folder)
    request = Convert(
        "patchcore", folder / weights, folder / "meta.json", folder / "engine", folder / bank
    )
    convert(request, Progress(quiet=True))


def _export_anomalib(folder: Path, model: Any) -> None:
    from anomalib.models import Patchcore

    theirs = Patchcore(backbone=BACKBONE, layers=LAYERS, pre_trained=False, num_neighbors=9)
    theirs.model.feature_extractor.load_state_dict(model.features.state_dict())
    theirs.model.memory_bank = model.bank.embeddings
    # With its default for dynamic_shapes, anomalib 2.7 fixes PatchCore at batch 2: twice the work
    # for one image.
    chatter = io.StringIO()
    with contextlib.redirect_stdout(chatter), contextlib.redirect_stderr(chatter):
        theirs.to_onnx(folder / "anomalib", input_size=(SIDE, SIDE), dynamic_shapes=None)


def open_anomalib(folder: Path, precision: str | None = None) -> Score:
    """anomalib's inferencer as it comes, but for `post_process`."""
    from anomalib.deploy import OpenVINOInferencer

    config = None if precision is None else {"INFERENCE_PRECISION_HINT": precision}
    with _inside(folder):  # it keeps compiled graphs in openvino_cache of the current folder
        inferencer = OpenVINOInferencer("anomalib/weights/onnx/model.onnx", config=config)
    # A tensor has several names in this graph, and its post_process takes the first one of a set:
    # whether predict works depends on the hash seed. Asking by name does less work, not more.
    names = ("pred_score", "anomaly_map")
    inferencer.post_process = lambda found: {name: found[name] for name in names}
    return lambda image: float(inferencer.predict(image).pred_score.item())


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """contextlib.chdir, which Python 3.10 lacks."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def open_ours(bundle: Path, precision: Any) -> tuple[Score, str]:
    """Our runtime, and the precision that it has chosen."""
    from engines.runtimes.openvino import OpenVINORuntime
    from engines.store.bundle import Bundle

    runtime = OpenVINORuntime.open(Bundle.open(bundle), precision=precision)
    return lambda image: float(runtime.infer(image[None])[0][0]), runtime.precision


# ---- engines -------------------------------------------------------------------------------------


def compare_engines(trained: _Trained, count: int) -> None:
    """One image at a time through each engine, in turns."""
    with phase("engines: compile"):
        engines = _engines(trained)
    images = list(islice(cycle(pictures(trained.files[:count])), count))
    with phase(f"engines: {count} images each"):
        milliseconds, scores = _run_in_turns(engines, images)
    _print_engines(milliseconds, scores)


def _engines(trained: _Trained) -> dict[str, Score]:
    from engines.runtimes.openvino import cpu_has_bf16

    default = "bf16" if cpu_has_bf16() else "f32"  # OpenVINO's own choice
    engines = {f"{ANOMALIB} ({default})": open_anomalib(trained.folder)}
    engines["anomalib, f32"] = open_anomalib(trained.folder, "f32")
    ours, chosen = open_ours(trained.bundle, "auto")
    engines[f"{OURS} ({chosen})"] = ours
    for other in sorted({"f32", default} - {chosen}):
        engines[f"Kensa, {other}"] = open_ours(trained.bundle, other)[0]
    return engines


def _run_in_turns(
    engines: dict[str, Score], images: Sequence[NDArray[np.uint8]]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Milliseconds and raw scores of each engine; who begins changes from turn to turn."""
    milliseconds: dict[str, list[float]] = {name: [] for name in engines}
    scores: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        for image in images[:WARM_UP]:
            engine(image)
    for turn, start in enumerate(range(0, len(images), IN_A_ROW)):
        for name in _rotated(list(engines), turn):
            for image in images[start : start + IN_A_ROW]:
                began = time.perf_counter()
                scores[name].append(engines[name](image))
                milliseconds[name].append((time.perf_counter() - began) * 1000)
    return milliseconds, scores


def _rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def _print_engines(milliseconds: dict[str, list[float]], scores: dict[str, list[float]]) -> None:
    exact = np.array(scores["anomalib, f32"])
    base = statistics.median(next(iter(milliseconds.values())))
    rows = []
    for name, taken in milliseconds.items():
        median = statistics.median(taken)
        apart = np.abs(np.array(scores[name]) / exact - 1).max()
        row = [name, f"{median:.1f}", f"{np.percentile(taken, 95):.1f}", times(base / median)]
        rows.append([*row, f"{apart:.1e}"])
    head = ["engine, one image", "median ms", "p95 ms", "speed", "raw score differs by"]
    print_table("Engines", head, rows)


# ---- HTTP ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Server:
    name: str
    process: subprocess.Popen[bytes]
    port: int
    paths: dict[str, str]  # raw and form -> where to post it

    def resident_mib(self) -> float:
        return memory_mib("VmRSS", str(self.process.pid))


def compare_servers(trained: _Trained, count: int) -> None:
    """Original files through both servers, in turns, over connections that stay open."""
    files = [path.read_bytes() for path in trained.files[:count]]
    with contextlib.ExitStack() as stack:
        with phase("HTTP: start both servers"):
            servers = [stack.enter_context(_their_server(trained.folder))]
            servers.append(stack.enter_context(_our_server(trained)))
        rows = []
        for body in ("raw", "form"):
            for clients in CLIENTS:
                with phase(f"HTTP: {body}, {clients} clients, {HTTP_TURNS} turns"):
                    rows += _post_in_turns(servers, files, body, clients, count)
        head = ["server", "body", "clients", "p50 ms", "p99 ms", "requests/s", "p50 speed"]
        print_table("HTTP", [*head, "throughput"], rows)
        memory = [[server.name, f"{server.resident_mib():.0f}"] for server in servers]
        print_table("Resident memory after these requests", ["server", "MiB"], memory)


def _their_server(folder: Path) -> contextlib.AbstractContextManager[_Server]:
    port = _free_port()
    command = [*_child("serve", folder), "--port", str(port)]
    paths = {"raw": "/raw", "form": "/form"}
    return _serving("anomalib in FastAPI", command, port, paths, folder, {})


def _our_server(trained: _Trained) -> contextlib.AbstractContextManager[_Server]:
    port = _free_port()
    settings = {
        "KENSA_MODEL_DIR": str(trained.bundle),
        "KENSA_PORT": str(port),
        "KENSA_CACHE_DIR": str(trained.folder / "cache"),
        "KENSA_DATA_DIR": str(trained.folder / "kensa"),
        "KENSA_WORKER": "off",
    }
    paths = {"raw": "/infer", "form": "/infer"}
    command = [sys.executable, "-m", "app"]
    return _serving("Kensa", command, port, paths, trained.folder, settings)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _serving(
    name: str,
    command: list[str],
    port: int,
    paths: dict[str, str],
    folder: Path,
    settings: dict[str, str],
) -> Iterator[_Server]:
    """A server that is ready; stopped at the end."""
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **settings}, stdout=output, stderr=output
        )
    try:
        _wait_until_ready(process, port, log)
        yield _Server(name, process, port, paths)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + START_LIMIT_S
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.2)
    sys.exit(f"a server did not start:\n{log.read_text()}")


def _post_in_turns(
    servers: list[_Server], files: list[bytes], body: str, clients: int, count: int
) -> list[list[str]]:
    """Rows of the table, one for each server; the first is what the others are compared with."""
    milliseconds: dict[str, list[float]] = {server.name: [] for server in servers}
    rates: dict[str, list[float]] = {server.name: [] for server in servers}
    for server in servers:
        _post(server, files[:2], body, clients, 2 * clients)
    for turn in range(HTTP_TURNS):
        for server in servers if turn % 2 == 0 else servers[::-1]:
            taken, seconds = _post(server, files, body, clients, count)
            milliseconds[server.name] += taken
            rates[server.name].append(len(taken) / seconds)
    first = servers[0].name
    rows = []
    for name, taken in milliseconds.items():
        p50, rate = statistics.median(taken), statistics.median(rates[name])
        speed = times(statistics.median(milliseconds[first]) / p50)
        row = [name, body, str(clients), f"{p50:.1f}", f"{np.percentile(taken, 99):.1f}"]
        rows.append([*row, f"{rate:.1f}", speed, times(rate / statistics.median(rates[first]))])
    return rows


def _post(
    server: _Server, files: list[bytes], body: str, clients: int, count: int
) -> tuple[list[float], float]:
    """Milliseconds of `count` requests from so many clients, and seconds for all of them."""
    requests = [_request(file, body) for file in islice(cycle(files), count)]
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        shares = [requests[i::clients] for i in range(clients)]
        taken = list(pool.map(lambda share: _post_share(server, body, share), shares))
    return [one for share in taken for one in share], time.perf_counter() - began


def _post_share(server: _Server, body: str, requests: list[tuple[bytes, str]]) -> list[float]:
    """One client: a connection, and one request after the other."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    milliseconds = []
    for data, content_type in requests:
        began = time.perf_counter()
        connection.request("POST", server.paths[body], data, {"Content-Type": content_type})
        answer = connection.getresponse()
        text = answer.read()
        milliseconds.append((time.perf_counter() - began) * 1000)
        if answer.status != 200:
            sys.exit(f"{server.name} answered {answer.status}: {text.decode(errors='replace')}")
    connection.close()
    return milliseconds


def _request(file: bytes, body: str) -> tuple[bytes, str]:
    """Body and content type."""
    if body == "raw":
        return file, "image/png"
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="part.png"\r\n'
        "Content-Type: image/png\r\n\r\n"
    )
    form = head.encode() + file + f"\r\n--{BOUNDARY}--\r\n".encode()
    return form, f"multipart/form-data; boundary={BOUNDARY}"


def serve_anomalib(folder: Path, port: int) -> None:
    """A plain FastAPI app around anomalib's inferencer, as one writes it in an afternoon."""
    import threading

    import cv2
    import uvicorn

    app = FastAPI()
    score = open_anomalib(folder)
    alone = threading.Lock()  # its inferencer has one infer request: two threads would collide

    def inspect(data: bytes) -> dict[str, float]:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        small = cv2.resize(picture, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        with alone:
            return {"score": score(cv2.cvtColor(small, cv2.COLOR_BGR2RGB))}

    @app.post("/raw")
    def raw(data: Annotated[bytes, Body(media_type="image/png")]) -> dict[str, float]:
        return inspect(data)

    @app.post("/form")
    def form(file: UploadFile) -> dict[str, float]:
        return inspect(file.file.read())

    @app.get("/readyz")
    def ready() -> dict[str, float]:
        return {}

    inspect(cv2.imencode(".png", np.zeros((SIDE, SIDE, 3), np.uint8))[1].tobytes())
    uvicorn.run(app, port=port, access_log=False, log_level="warning")


def _child(work: str, folder: Path) -> list[str]:
    """The command for a part of this program that needs a process of its own."""
    return [sys.executable, "-m", "benchmarks.latency", "--child", work, "--folder", str(folder)]


# ---- memory --------------------------------------------------------------------------------------


def _banks(folder: Path, trained: _Trained, model: Any, patches: Any) -> dict[int, Path]:
    """A folder for each size of bank: what measure_memory opens."""
    from engines.store.bundle import ONNX, write_bank

    folders = {}
    for rows in MEMORY_BANKS:
        folders[rows] = folder / f"memory-{rows}"
        folders[rows].mkdir()
        with phase(f"memory: export with a bank of {rows:,} rows"):
            _give_bank(model, patches, rows)
            _export_anomalib(folders[rows], model)
        write_bank(folders[rows] / "memory_bank.npz", model.bank.embeddings.numpy(), 0.0)
        (folders[rows] / ONNX).symlink_to(trained.bundle / ONNX)  # the same graph for any bank
    return folders


def compare_memory(banks: dict[int, Path]) -> None:
    """Peak memory of each engine with a small and a large bank, in fresh processes."""
    from engines.runtimes.openvino import cpu_has_bf16

    works = [
        "ours f32",
        *(["ours bf16"] if cpu_has_bf16() else []),
        "anomalib default",
    ]
    rows = []
    for work in works:
        with phase(f"memory: {work}, banks of {' and '.join(f'{rows:,}' for rows in banks)}"):
            found = {count: _measured(bank, work) for count, bank in banks.items()}
        smallest = min(found)
        for count, memory in found.items():
            row = [work, f"{count:,}", *(f"{memory[key]:.0f}" for key in ("bank", *_PEAKS))]
            grown = memory["bank"] - found[smallest]["bank"]
            more = [
                (memory[key] - found[smallest][key]) / grown if grown else None for key in _PEAKS
            ]
            rows.append([*row, *("" if ratio is None else f"{ratio:.2f}" for ratio in more)])
    head = ["engine", "bank rows", "bank MiB", "opening, peak MiB", "inferring, peak MiB"]
    growth = ["opening, MiB per bank MiB", "inferring, MiB per bank MiB"]
    print_table("Memory of a process with one engine", [*head, *growth], rows)


_PEAKS = ("opening", "inferring")


def _measured(folder: Path, work: str) -> dict[str, float]:
    done = subprocess.run(
        _child(work, folder), cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"the process for {work} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_memory(folder: Path, work: str) -> None:
    """Open one engine, infer, and print the peaks as JSON; the process must be a fresh one."""
    with tempfile.TemporaryDirectory() as empty:
        score = _open_without_cache(folder, work, Path(empty))
        image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        opening = memory_mib("VmHWM")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        for _ in range(MEMORY_IMAGES):
            score(image)
    inferring = memory_mib("VmHWM")
    with np.load(folder / "memory_bank.npz") as file:
        bank = file["embeddings"].nbytes / MIB
    print(json.dumps({"bank": bank, "opening": opening, "inferring": inferring}))


def _open_without_cache(folder: Path, work: str, empty: Path) -> Score:
    """As on a machine that has never opened this model."""
    who, precision = work.split()
    if who == "ours":
        from engines.runtimes.openvino import OpenVINORuntime
        from engines.store.bundle import ONNX, read_bank

        chosen: Any = precision
        bank = read_bank(folder / "memory_bank.npz")
        runtime = OpenVINORuntime(folder / ONNX, bank, precision=chosen)
        return lambda image: float(runtime.infer(image[None])[0][0])
    (empty / "anomalib").symlink_to(folder / "anomalib")
    return open_anomalib(empty)


if __name__ == "__main__":
    main()
