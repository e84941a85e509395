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
from engines.meta import FIRST

TURNS, IN_A_ROW = 12, 5  # images per engine, each with its bank in the cache, as when serving
RESNET = {"backbone": "resnet18", "image_size": 256}
LITE = {"backbone": "tf_efficientnet_lite0", "image_size": 256}
# What is trained: what is said of it, meta.json, epochs, batch.
PATCHCORE = {"model": "patchcore", "coreset_ratio": 0.1}
PADIM = {"model": "padim", "n_features": 100}
TWO, THREE = FIRST["layers"], ["blocks.1", "blocks.2", "blocks.4"]
OF_RESNET = ["layer1", "layer2", "layer3"]
CONTESTANTS: list[tuple[str, dict[str, Any], int, int]] = [
    ("resnet18", {**PATCHCORE, **RESNET, "layers": OF_RESNET[1:]}, 1, 4),
    ("the first", FIRST, 1, 4),
    ("the first, 320 px", {**FIRST, "image_size": 320}, 1, 4),
    ("lite0 as in anomalib", {**PATCHCORE, **LITE, "layers": TWO}, 1, 4),
    ("resnet18", {**PADIM, **RESNET, "layers": OF_RESNET}, 1, 4),
    ("resnet18, steady",
     {**PADIM, **RESNET, "layers": OF_RESNET, "channel_choice": "steady"}, 1, 4),
    ("lite0", {**PADIM, **LITE, "layers": THREE}, 1, 4),
    ("", {"model": "efficientad", "model_size": "small", "image_size": 256,
          "learning_rate": 5e-4}, 8, 2),
    ("", {"model": "vae", "latent_dim": 64, "image_size": 256}, 80, 4),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--kinds", default="patchcore,padim,efficientad,vae", help="which ones")
    parser.add_argument("--teacher", type=Path, help="weights of EfficientAD's teacher; left out"
                        " without them")  # fmt: skip
    parser.add_argument("--category", action="append", help="of the photos; may be repeated"
                        " (default alien and hazelnut_toy)")  # fmt: skip
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child is not None:
        print(json.dumps(measure(flags.child[0], [Path(one) for one in flags.child[1:]])))
        return
    begin()
    if not (ASSETS / "data").is_dir():
        sys.exit(f"{ASSETS} holds no photos: set KENSA_ASSETS.")
    print_machine(["anomalib", "torch", "openvino"])
    for category in flags.category or ["alien", "hazelnut_toy"]:
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), category, flags.kinds.split(","), flags.teacher)
    print_load("after")


def compare(folder: Path, category: str, kinds: list[str], teacher: Path | None) -> None:
    """Learn them all, then let their engines judge in turns."""
    rows, engines = [], []
    for words, meta, epochs, batch in CONTESTANTS:
        kind = meta["model"]
        if kind in kinds and (kind != "efficientad" or teacher):
            name = ", ".join(filter(None, (kind, words)))
            place = folder / str(len(engines))
            with phase(f"{category}: {name}"):
                row = learn_and_measure(place, meta, epochs, batch, category, teacher)
            rows.append([name, *row])
            engines.append(place / "engine")
    together = _in_a_process_of_its_own(category, engines)["ms"]
    alone = [_in_a_process_of_its_own(category, [engine])["mib"] for engine in engines]
    print_table(
        category,
        ["model", "AUROC", "misses", "false rejects", "learn s", "files to serve, MB",
         "ms per image", "of the first", "process, MiB"],
        [
            [*row, f"{ms:.1f}", f"{ms / together[0]:.2f}", f"{mib:.0f}"]
            for row, ms, mib in zip(rows, together, alone, strict=True)
        ],
    )  # fmt: skip


def learn_and_measure(
    place: Path, meta: dict[str, Any], epochs: int, batch: int, category: str, teacher: Path | None
) -> list[str]:
    """What training says, from a folder of photos to an engine, in the way of the commands."""
    from workers.converting.convert import Convert, convert
    from workers.learning.retrain import Retrain, retrain
    from workers.progress import Progress

    kind, quiet = meta["model"], Progress(quiet=True)
    weights = str(teacher) if kind == "efficientad" else None
    if meta.get("backbone") == "resnet18":
        weights = str(ASSETS / "weights" / "resnet18.safetensors")
    out, start = place / "model", place / "meta.json"
    place.mkdir()
    start.write_text(json.dumps(meta))
    report = retrain(
        Retrain(kind, category, ASSETS / "data", out, start, weights, epochs=epochs, batch=batch),
        quiet,
    )
    engine = place / "engine"
    convert(Convert(kind, out / "model.pth", out / "meta.json", engine), quiet)
    size = sum(path.stat().st_size for path in engine.iterdir() if path.name != "golden.npz")
    found = report["calibration"]
    return [
        f"{found['auroc']:.4f}",
        f"{found['misses']} of {found['defects']}",
        f"{found['rejected']} of {found['parts']}",
        f"{report['seconds']['learn']:.1f}",
        f"{size / 1e6:.1f}",
    ]


def _in_a_process_of_its_own(category: str, engines: list[Path]) -> dict[str, Any]:
    words = [sys.executable, "-m", "benchmarks.models", "--child", category, *map(str, engines)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(category: str, engines: list[Path]) -> dict[str, Any]:
    """Infer photos in turns: each engine's median milliseconds, and the memory of this process."""
    from engines.image import load
    from engines.runtimes.openvino import OpenVINORuntime
    from engines.store.bundle import Bundle
    from workers.learning.dataset import Category

    found = Category.find(ASSETS / "data", category)
    photos = [path.read_bytes() for path in (*found.test_normal[:6], *found.test_anomaly[:6])]

    runtimes = [OpenVINORuntime.open(Bundle.open(engine)) for engine in engines]
    taken: list[list[float]] = [[] for _ in engines]
    for turn in range(TURNS + 1):
        for runtime, times in zip(runtimes, taken, strict=True):
            image = load(photos[turn % len(photos)], runtime.image_size)[None]
            for _ in range(IN_A_ROW):
                began = time.perf_counter()
                runtime.infer(image)
                if turn:  # the first is to warm up
                    times.append((time.perf_counter() - began) * 1000)
    return {"ms": [statistics.median(times) for times in taken], "mib": memory_mib("VmRSS")}


if __name__ == "__main__":
    main()
