"""TensorRT for RTX, without a GPU: every graph that the exporter makes is built for other machines.

    python -m benchmarks.builds [--gpus SM86 ...] [--only WORD ...]

The weights have learned nothing: times and sizes do not depend on what they are. Each build is one
process, with a profile, a limit for the workspace and a progress monitor, as `convtrt.py --target`
does it.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import ROOT, begin, phase, print_load, print_machine, print_table

if TYPE_CHECKING:
    from engines.meta import Meta
    from engines.store.plan_record import Precision
    from workers.converting.export import Opset

ROWS = 500  # of a memory bank; a plan takes others
LAYERS = {
    "resnet18": ["layer1", "layer2", "layer3"],
    "wide_resnet50_2": ["layer1", "layer2", "layer3"],
    "tf_efficientnet_lite0": ["blocks.1", "blocks.2", "blocks.4"],
}
KINDS: dict[str, dict[str, Any]] = {
    "patchcore": {"coreset_ratio": 0.1, "memory_bank": "memory_bank.npz"},
    "padim": {"n_features": 100, "stats": "stats.npz"},
    "efficientad": {"model_size": "small"},
    "vae": {"latent_dim": 64},
}
MATRIX = [
    *((kind, backbone) for kind in ("patchcore", "padim") for backbone in LAYERS),
    ("efficientad", None),
    ("vae", None),
]


@dataclass(frozen=True)
class Graph:
    """One that the exporter offers."""

    kind: str
    backbone: str | None
    precision: Precision
    opset: Opset
    side: int = 256  # pixels

    def __str__(self) -> str:
        words = (self.kind, self.backbone, self.precision, str(self.opset))
        return "-".join(word for word in words if word)

    @property
    def called(self) -> str:
        """What it is of."""
        return " ".join(word for word in (self.kind, self.backbone) if word)

    @property
    def meta(self) -> Meta:
        from engines.meta import Meta

        known = {"model": self.kind, "image_size": self.side, **KINDS[self.kind]}
        if self.backbone is not None:
            layers = LAYERS[self.backbone]  # PatchCore is usually without the first
            known["backbone"] = self.backbone
            known["layers"] = layers[1:] if self.kind == "patchcore" else layers
        return Meta.parse(known)


PRECISIONS: tuple[Precision, ...] = ("f32", "f16", "int8")
OPSETS: tuple[Opset, ...] = (17, 18)
EVERY = [
    Graph(kind, backbone, precision, opset)
    for kind, backbone in MATRIX
    for opset in OPSETS
    for precision in PRECISIONS
]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.builds", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--gpus", nargs="+", default=["SM86"], metavar="SM", help="as SM86 SM120")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="graphs with it")
    flags = parser.parse_args()
    begin()
    if find_spec("tensorrt_rtx") is None:
        sys.exit("TensorRT for RTX is not here: pip install '.[rtx]' first.")
    print_machine(["tensorrt-rtx-cu13", "onnx", "torch"])
    builds: dict[tuple[str, str], list[_Build]] = {}
    with tempfile.TemporaryDirectory() as place:
        for graph in [one for one in EVERY if any(word in str(one) for word in flags.only)]:
            with phase(str(graph)):
                made = _built(graph, Path(place), flags.gpus)
            builds.setdefault((graph.called, graph.precision), []).extend(made)
    each = [one for made in builds.values() for one in made]
    columns = list(dict.fromkeys(one.column for one in each))
    head = ["graph", "precision", "model.onnx MB", "model.plan MB", *columns, "memory MiB"]
    rows = [[*key, *_cells(made, columns)] for key, made in builds.items()]
    whole = sum(one.plan > 0 for one in each)
    print_table(f"{whole} of {len(each)} are built; seconds by opset and GPU", head, rows)
    print_load("after")


@dataclass(frozen=True)
class _Build:
    column: str  # opset and GPU
    onnx: float  # MB
    plan: float  # MB, 0 where it was refused
    seconds: float
    peak_mib: float


def _built(graph: Graph, folder: Path, gpus: list[str]) -> list[_Build]:
    write(graph, folder)
    onnx, plan = folder / "model.onnx", folder / "model.plan"
    builds = []
    for gpu in gpus:
        plan.unlink(missing_ok=True)
        found = build(graph, folder, gpu)
        if "error" in found:
            print(f"\n{graph}, {gpu}: {found['error']}", file=sys.stderr)
        size = plan.stat().st_size / 1e6 if plan.is_file() else 0
        took, peak = found.get("seconds", 0), found["peak_mib"]
        column = f"{graph.opset} {gpu}"
        builds.append(_Build(column, onnx.stat().st_size / 1e6, size, took, peak))
    return builds


def _cells(made: list[_Build], columns: list[str]) -> list[str]:
    taken = {one.column: f"{one.seconds:.1f}" if one.plan else "refused" for one in made}
    plans = [one.plan for one in made if one.plan] or [0.0]
    least, most = (f"{of(plans):.1f}" for of in (min, max))
    return [
        f"{made[0].onnx:.1f}",
        least if least == most else f"{least} to {most}",
        *(taken.get(column, "") for column in columns),
        f"{max(one.peak_mib for one in made):.0f}",
    ]


# ---- graphs ----------------------------------------------------------------------------------


def write(graph: Graph, folder: Path) -> None:
    """Put model.onnx, meta.json and, where it has one, the bank into a folder."""
    import torch

    from workers import models
    from workers.converting.export import export_onnx
    from workers.converting.quantise import convolutions, measure, quantise

    folder.mkdir(parents=True, exist_ok=True)
    module, path = models.module(graph.kind), folder / "model.onnx"
    model = copy.deepcopy(_learned(graph))  # half precision is for good
    bank = folder / "bank.npy"
    bank.unlink(missing_ok=True)
    if graph.kind == "patchcore":
        np.save(bank, model.bank.embeddings.numpy())
    torch.manual_seed(0)
    exported, inputs = module.graph(model, half=graph.precision == "f16")
    export_onnx(exported, inputs, path, graph.opset)
    if graph.precision == "int8":
        reach = measure(path, _pictures(graph.side)[:1], lambda done, total: None)
        quantise(path, reach, convolutions(path))
    graph.meta.write(folder / "meta.json")


_known: dict[tuple[str, str | None, int], Any] = {}


def _learned(graph: Graph) -> Any:
    """The model in float32, as far as a graph needs it; the last one is kept."""
    from workers import models
    from workers.models import Training
    from workers.models.backbone import UNTRAINED
    from workers.progress import Progress

    key = (graph.kind, graph.backbone, graph.side)
    if key not in _known:
        _known.clear()
        module = models.module(graph.kind)
        model = module.build(graph.meta, UNTRAINED)
        if graph.kind == "patchcore":
            _give_a_bank(model, graph.side)
        elif graph.kind == "padim":
            how, quiet = Training(), Progress(quiet=True)
            module.train(model, graph.meta, [_pictures(graph.side)], how, quiet)
        else:
            model.learned = True
        _known[key] = model
    return _known[key]


def _give_a_bank(model: Any, side: int) -> None:
    import torch

    from workers.models.patchcore import Bank

    with torch.inference_mode():
        patches = model.embed(torch.from_numpy(_pictures(side)))[0].flatten(0, 1)
    model.bank = Bank(torch.from_numpy(patches[:ROWS].numpy().copy()), 1.0)


def _pictures(side: int) -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 255, (4, side, side, 3), np.uint8)


# ---- builds ----------------------------------------------------------------------------------


def build(graph: Graph, folder: Path, gpus: str, cancel_at: int | None = None) -> dict[str, Any]:
    """What happened to one build, in a process of its own: see `benchmarks.one_build`."""
    words = [str(folder), gpus, graph.precision, *([] if cancel_at is None else [str(cancel_at)])]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.one_build", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        return {"error": f"ended with {done.returncode}: {done.stderr[-2000:]}", "peak_mib": 0}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
