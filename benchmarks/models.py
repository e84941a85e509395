"""All kinds of models on the same photos: how well they judge, what they cost.

    python -m benchmarks.models [--kinds padim,vae] [--teacher F] [--category C ...]

docs/models.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import (
    ASSETS,
    ROOT,
    begin,
    memory_mib,
    phase,
    print_load,
    print_machine,
    print_table,
)

RUNS = 60  # images per engine
RESNET = {"backbone": "resnet18", "image_size": 256}
# What is trained: name, meta.json, epochs, batch.
PADIM = {**RESNET, "layers": ["layer1", "layer2", "layer3"], "n_features": 100}
CONTESTANTS: list[tuple[str, dict[str, Any], int, int]] = [
    ("patchcore", {**RESNET, "layers": ["layer2", "layer3"], "coreset_ratio": 0.1}, 1, 4),
    ("padim", PADIM, 1, 4),
    ("padim", {**PADIM, "channel_choice": "steady"}, 1, 4),
    ("efficientad", {"model_size": "small", "image_size": 256, "learning_rate": 5e-4}, 8, 2),
    ("vae", {"latent_dim": 64, "image_size": 256}, 80, 4),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--kinds", default="patchcore,padim,efficientad,vae", help="which ones")
    parser.add_argument("--teacher", type=Path, help="weights of EfficientAD's teacher; left out"
                        " without them")  # fmt: skip
    parser.add_argument("--category", action="append", help="of the photos; may be repeated"
                        " (default alien and hazelnut_toy)")  # fmt: skip
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child is not None:
        measure(flags.child)
        return
    begin()
    if not (ASSETS / "data").is_dir():
        sys.exit(f"{ASSETS} holds no photos: set KENSA_ASSETS.")
    print_machine(["anomalib", "torch", "openvino"])
    for category in flags.category or ["alien", "hazelnut_toy"]:
        rows = [
            learn_and_measure(kind, meta, epochs, batch, category, flags.teacher)
            for kind, meta, epochs, batch in CONTESTANTS
            if kind in flags.kinds.split(",") and (kind != "efficientad" or flags.teacher)
        ]
        print_table(
            category,
            ["model", "AUROC", "best F1", "learn s", "files to serve, MB", "ms per image",
             "process, MiB"],
            rows,
        )  # fmt: skip
    print_load("after")


def learn_and_measure(
    kind: str, meta: dict[str, Any], epochs: int, batch: int, category: str, teacher: Path | None
) -> list[str]:
    """A row of the table: from a folder of photos to an engine, in the way of the commands."""
    from workers.converting.convert import Convert, convert
    from workers.learning.retrain import Retrain, retrain
    from workers.progress import Progress

    resnet = ASSETS / "weights" / "resnet18.safetensors"
    weights = {"efficientad": str(teacher), "vae": None}.get(kind, str(resnet))
    quiet = Progress(quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model"
        start = Path(folder) / "meta.json"
        start.write_text(json.dumps({"model": kind, **meta}))
        name = kind + "".join(f", {meta[key]}" for key in ("channel_choice",) if key in meta)
        with phase(f"{category}: {name}"):
            report = retrain(
                Retrain(kind, category, ASSETS / "data", out, start, weights,
                        epochs=epochs, batch=batch), quiet)  # fmt: skip
            engine = Path(folder) / "engine"
            convert(Convert(kind, out / "model.pth", out / "meta.json", engine), quiet)
        size = sum(path.stat().st_size for path in engine.iterdir() if path.name != "golden.npz")
        words = [sys.executable, "-m", "benchmarks.models", "--child", str(engine)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
    calibration, seconds = report["calibration"], report["seconds"]["learn"]
    return [
        name,
        f"{calibration['auroc']:.4f}",
        f"{calibration['best_f1']:.3f}",
        f"{seconds:.1f}",
        f"{size / 1e6:.1f}",
        f"{found['ms']:.1f}",
        f"{found['mib']:.0f}",
    ]


def measure(engine: Path) -> None:
    """Infer in a fresh process that serves no HTTP, and print milliseconds and memory as JSON."""
    from engines.runtimes.openvino import OpenVINORuntime
    from engines.store.bundle import Bundle

    runtime = OpenVINORuntime.open(Bundle.open(engine))
    size = runtime.image_size
    image = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), np.uint8)
    taken = []
    for _ in range(RUNS):
        began = time.perf_counter()
        runtime.infer(image)
        taken.append((time.perf_counter() - began) * 1000)
    print(json.dumps({"ms": statistics.median(taken[5:]), "mib": memory_mib("VmRSS")}))


if __name__ == "__main__":
    main()
