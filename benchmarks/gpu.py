"""A GPU, tried with all that Kensa does with one: plans, parity, threads, banks, swaps, speed.

    python -m benchmarks.gpu prepare FOLDER [--kinds K ...]
    python -m benchmarks.gpu run FOLDER [--calls N] [--threads N] [--swaps N] [--out FILE]

`prepare` learns and converts small models of all kinds, on any PC with the extra `train`. `run`
needs a GPU and TensorRT (or TensorRT for RTX), but no torch and no internet: it builds the plans of
that folder for this GPU and goes on with the next step where one fails, in the library's own words.
It ends with 1 if anything that is promised did not hold. `docker/check_gpu.sh` does both installs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import phase, print_load, print_table

CATEGORY = "sample_bracket"
KINDS: dict[str, dict[str, Any]] = {
    "patchcore": {"backbone": "resnet18", "layers": ["layer2", "layer3"], "coreset_ratio": 0.1},
    "padim": {"backbone": "resnet18", "layers": ["layer2", "layer3"], "n_features": 50},
    "efficientad": {"model_size": "small"},
    "vae": {"latent_dim": 64},
}
PRECISIONS = {"f32": 1e-3, "f16": 1e-2}  # by how much raw scores may differ from OpenVINO's
PICTURES = 16
MIB = 1024 * 1024
Images = NDArray[np.uint8]
Scores = NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("prepare", help="learn and convert the models")
    made.add_argument("folder", type=Path)
    made.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    ran = commands.add_parser("run", help="build their plans, and try them")
    ran.add_argument("folder", type=Path)
    ran.add_argument("--calls", type=int, default=10_000, help="of all threads (default 10000)")
    ran.add_argument("--threads", type=int, default=16, help="(default 16)")
    ran.add_argument("--swaps", type=int, default=200, help="of versions (default 200)")
    ran.add_argument("--out", type=Path, metavar="FILE", help="all figures, as JSON")
    flags = parser.parse_args()
    if flags.command == "prepare":
        prepare(flags.folder, flags.kinds)
        return
    tried = Trial(flags.calls, flags.threads, flags.swaps)
    with tempfile.TemporaryDirectory() as plans:
        tried.run(flags.folder, Path(plans))
    print_load("after")
    if flags.out:
        flags.out.write_text(json.dumps(tried.found, indent=2) + "\n")
    sys.exit(tried.say())


# ---- before: on a PC -----------------------------------------------------------------------------


def prepare(folder: Path, kinds: list[str]) -> None:
    """The models, KIND-PRECISION each, and pictures that they have not seen."""
    from benchmarks.load import run
    from engines.image import load
    from workers.sample_parts.write_dataset import write_dataset

    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        data = write_dataset(work / "data", CATEGORY, train=8, normal=8, per_kind=4, size=256)
        paths = sorted((data / "test" / CATEGORY).rglob("*.png"))[:PICTURES]
        images = np.stack([load(path.read_bytes(), 256) for path in paths])
        np.save(folder / "pictures.npy", images)
        for kind in kinds:
            with phase(f"{kind}: learning and converting"):
                meta, out = work / f"{kind}.json", work / kind
                meta.write_text(json.dumps({"image_size": 256, **KINDS[kind]}))
                run("retrain.py", "--model", kind, "--pretrained_pth", "untrained", "--meta_json",
                    meta, "--category", CATEGORY, "--data_root", data, "--epochs", "1",
                    "--batch", "1" if kind == "efficientad" else "4", "--out_dir", out)  # fmt: skip
                for precision in PRECISIONS:
                    run("convtrt.py", "--model", kind, "--weights_pth", out / "model.pth",
                        "--meta_json", meta, "--out_dir", folder / f"{kind}-{precision}",
                        *(["--fp16"] if precision == "f16" else []))  # fmt: skip


# ---- on the machine with the GPU -----------------------------------------------------------------


@dataclass
class Opened:
    """A model whose plan was built here."""

    name: str  # "padim-f16"
    precision: str
    folder: Path
    bank: NDArray[np.float32] | None
    images: Images

    def on_gpu(self, bank: NDArray[np.float32] | None = None) -> Any:
        """Its runtime, with another bank if one is given."""
        from engines.runtimes.tensorrt import TensorRTRuntime

        given = self.bank if bank is None else bank
        return TensorRTRuntime(self.folder / "model.plan", given, precision=self.precision)


@dataclass
class Trial:
    """All steps, each of which says what it found. What fails is written down, in its own words."""

    calls: int
    threads: int
    swaps: int
    found: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def run(self, folder: Path, plans: Path) -> None:
        images: Images = np.load(folder / "pictures.npy")
        with self.step("the machine"):
            self.machine()
        if self.failed:
            return
        models = []
        for source in sorted(folder.iterdir()):
            if (source / "meta.json").is_file():
                with self.step(f"{source.name}: the plan"):
                    models.append(self.plan(source, plans / source.name, images))
        for model in models:
            with self.step(f"{model.name}: parity"):
                self.parity(model)
            with self.step(f"{model.name}: latency"):
                self.latency(model, folder / model.name)
        banked = [model for model in models if model.bank is not None]
        for step in (self.load, self.banks, self.too_large):
            for model in banked[:1]:
                with self.step(f"{model.name}: {step.__name__}"):
                    step(model)
        if len(models) > 1:
            with self.step("two versions side by side, and swaps"):
                self.swap(models[0], models[-1])

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        with phase(name):
            try:
                yield
            except Exception as error:  # noqa: BLE001 (the other steps still say something)
                self.failed.append(f"{name}: {type(error).__name__}: {error}")

    def holds(self, what: str, is_so: bool) -> None:
        """A promise; the trial goes on where it does not hold."""
        if not is_so:
            self.failed.append(what)

    def say(self) -> int:
        """What failed; the exit code."""
        print(f"\n{json.dumps(self.found.get('machine', {}))}")
        head = ["model", "plan s", "MiB", "differs by", "flips", "1 image ms", "batch", "batch ms",
                "torch ms"]  # fmt: skip
        rows = [
            [name, *(str(one.get(key, "")) for key in
                     ("seconds", "mib", "differs", "flips", "one_ms", "batch", "batch_ms",
                      "torch_ms"))]
            for name, one in self.found.get("models", {}).items()
        ]  # fmt: skip
        if rows:
            print_table("Engines on this GPU", head, rows)
        for name in ("load", "banks", "too_large", "swaps"):
            if name in self.found:
                print(f"\n{name}: {json.dumps(self.found[name], ensure_ascii=False)}")
        for one in self.failed:
            print(f"\nFAILED {one}")
        print(f"\n{'Something failed, see above.' if self.failed else 'All of it held.'}")
        return 1 if self.failed else 0

    # ---- the steps -----------------------------------------------------------------------------

    def machine(self) -> None:
        from engines.runtimes.cuda import gpu
        from engines.store.plan_record import Machine

        free, total = gpu().memory()
        self.found["machine"] = vars(Machine.read()) | {
            "free_mib": free // MIB,
            "total_mib": total // MIB,
        }

    def plan(self, source: Path, target: Path, images: Images) -> Opened:
        """Build it for this GPU, as the worker does for a version that has none."""
        from engines.store.bundle import Bundle
        from workers.converting.plan.rebuild import rebuild
        from workers.progress import Progress

        report = rebuild(
            source, target, Progress(quiet=True), workspace=1024, use_dla=False, cache=None
        )
        about = {"seconds": report["plan"]["seconds"],
                 "mib": round((target / "model.plan").stat().st_size / MIB, 1)}  # fmt: skip
        self.found.setdefault("models", {})[source.name] = about
        precision = source.name.rpartition("-")[2]
        return Opened(source.name, precision, target, Bundle.open(target).memory_bank(), images)

    def parity(self, model: Opened) -> None:
        """Raw scores beside OpenVINO's, of the same graph in float32 on the CPU."""
        from engines.runtimes.openvino import OpenVINORuntime
        from engines.store.bundle import Bundle
        from engines.verdict import Scale

        bundle = Bundle.open(model.folder)
        reference = OpenVINORuntime(bundle.onnx, model.bank)
        expected = one_by_one(reference, model.images)
        reference.close()
        runtime = model.on_gpu()
        scores = one_by_one(runtime, model.images)
        together = np.concatenate(
            [runtime.infer(model.images[at : at + 4], 4)[0] for at in range(0, PICTURES, 4)]
        )
        runtime.close()
        limit = Scale.of(bundle.meta).raw_threshold
        differs = float(np.max(np.abs(scores - expected) / np.abs(expected)))
        flips = int(((scores > limit) != (expected > limit)).sum())
        self.found["models"][model.name] |= {"differs": f"{differs:.1e}", "flips": flips}
        most = PRECISIONS[model.precision]
        self.holds(f"{model.name}: raw scores differ by {differs:.1e}", differs <= most)
        self.holds(f"{model.name}: {flips} verdicts flip", flips == 0)
        apart = float(np.max(np.abs(together - scores) / np.abs(scores)))
        self.holds(f"{model.name}: four together differ by {apart:.1e}", apart <= most)

    def latency(self, model: Opened, source: Path) -> None:
        """Medians, milliseconds: one image, the largest batch, and torch on the same card."""
        runtime = model.on_gpu()
        most = max((1, *runtime.batch_sizes))
        batch = np.concatenate([model.images] * -(-most // PICTURES))[:most]
        about = {
            "one_ms": timed(lambda: runtime.infer(model.images[:1])),
            "batch": most,
            "batch_ms": timed(lambda: runtime.infer(batch, most)),
        }
        runtime.close()
        if (ms := torch_ms(source, model.precision)) is not None:
            about["torch_ms"] = ms
        self.found["models"][model.name] |= about

    def load(self, model: Opened) -> None:
        """Many threads at one engine: each score is that of its picture, and nothing is left."""
        from engines.runtimes.cuda import gpu

        runtime = model.on_gpu()
        expected = one_by_one(runtime, model.images)
        before, began = gpu().memory()[0], time.perf_counter()

        def ask(number: int) -> float:
            score = runtime.infer(model.images[number : number + 1])[0][0]
            return float(abs(score - expected[number]) / expected[number])

        with ThreadPoolExecutor(self.threads) as pool:
            worst = max(pool.map(ask, islice(cycle(range(PICTURES)), self.calls)))
        took = time.perf_counter() - began
        lost = before - gpu().memory()[0]
        runtime.close()
        self.found["load"] = {
            "calls": self.calls,
            "threads": self.threads,
            "per_second": round(self.calls / took, 1),
            "differs": f"{worst:.1e}",
            "bytes_lost": lost,
        }
        self.holds(f"a score under load differs by {worst:.1e}", worst <= 1e-5)
        self.holds(f"{lost:,} bytes of the GPU are gone after the load", lost <= 0)

    def banks(self, model: Opened) -> None:
        """Another bank beside the first, in the same engine, while it is at work."""
        assert model.bank is not None
        runtime = model.on_gpu()
        half = np.ascontiguousarray(model.bank[::2])
        fresh = model.on_gpu(half)
        expected = [one_by_one(one, model.images) for one in (runtime, fresh)]
        fresh.close()
        takes, is_same = [], True
        with ThreadPoolExecutor(1) as pool:
            for turn in range(20):
                working = pool.submit(one_by_one, runtime, model.images)
                began = time.perf_counter()
                other = runtime.with_bank(half if turn % 2 == 0 else model.bank, model.precision)
                takes.append((time.perf_counter() - began) * 1000)
                is_same &= np.allclose(working.result(), expected[turn % 2], rtol=1e-5)
                runtime.close()
                runtime = other
                is_same &= np.allclose(
                    one_by_one(runtime, model.images), expected[(turn + 1) % 2], rtol=1e-5
                )
        runtime.close()
        self.found["banks"] = {"swaps": 20, "median_ms": round(statistics.median(takes), 1)}
        self.holds("each score is that of its bank", bool(is_same))

    def too_large(self, model: Opened) -> None:
        """Memory that is not there has a name, and the GPU goes on."""
        from engines.errors import OutOfMemory
        from engines.runtimes.cuda import Bank, gpu

        _, total = gpu().memory()
        bank = Bank(gpu(), total // 4, 2)  # twice of what there is
        try:
            gpu().call(bank.take)
        except OutOfMemory as error:
            self.found["too_large"] = str(error)
        self.holds("memory that is not there was given", "too_large" in self.found)
        runtime = model.on_gpu()
        one_by_one(runtime, model.images)
        runtime.close()

    def swap(self, one: Opened, other: Opened) -> None:
        """Two versions at once, opened and closed in turns; the memory of the GPU stays."""
        from engines.runtimes.cuda import gpu

        pair = (one, other)
        expected = []
        for model in pair:
            runtime = model.on_gpu()
            expected.append(one_by_one(runtime, model.images[:4]))
            runtime.close()
        before = gpu().memory()[0]
        live, is_same = one.on_gpu(), True
        for turn in range(self.swaps):
            after = pair[(turn + 1) % 2].on_gpu()
            for runtime, known in ((live, expected[turn % 2]), (after, expected[(turn + 1) % 2])):
                is_same &= np.allclose(one_by_one(runtime, one.images[:4]), known, rtol=1e-5)
            live.close()
            live = after
        live.close()
        lost = before - gpu().memory()[0]
        self.found["swaps"] = {"swaps": self.swaps, "of": [one.name, other.name],
                               "bytes_lost": lost}  # fmt: skip
        self.holds("each score is that of its version", bool(is_same))
        self.holds(f"{lost:,} bytes of the GPU are gone after the swaps", lost <= 0)


def one_by_one(runtime: Any, images: Images) -> Scores:
    """Raw scores (n,), each image by itself."""
    return np.concatenate([runtime.infer(image[None])[0] for image in images])


def timed(work: Callable[[], object], times: int = 30) -> float:
    """The median of so many, milliseconds, after three that are not counted."""
    taken = []
    for turn in range(times + 3):
        began = time.perf_counter()
        work()
        if turn >= 3:
            taken.append((time.perf_counter() - began) * 1000)
    return round(statistics.median(taken), 2)


def torch_ms(source: Path, precision: str, device: str = "cuda") -> float | None:
    """One image through the same graph in torch, from the host and back; None without torch."""
    if find_spec("torch") is None or find_spec("anomalib") is None:
        return None
    import torch

    from engines.meta import Meta
    from workers import models

    if device == "cuda" and not torch.cuda.is_available():
        return None
    meta = Meta.read(source / "meta.json")
    kind: Any = models.module(meta.model)
    model = kind.build(meta, source / (meta.weights_pth or "model.pth"))
    if kind.LEARNED is not None:
        kind.load(model, source / getattr(meta, kind.LEARNED))
    graph, inputs = kind.graph(model, half=precision == "f16")
    graph = graph.eval().to(device)
    image = inputs.pop("image")[:1]
    more = {name: value.to(device) for name, value in inputs.items()}

    def once() -> None:
        with torch.inference_mode():
            for found in graph(image.to(device), **more):
                found.cpu()

    return timed(once)


if __name__ == "__main__":
    main()
