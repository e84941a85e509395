"""Peak memory of retrain.py and convtrt.py, beside what `engines.machine.memory_needs` predicts.

    python -m benchmarks.memory [--kinds padim,vae]

docs/benchmarks.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, phase, print_load, print_machine, print_table
from engines.machine.memory import MIB
from engines.machine.memory_needs import Learning, to_convert, to_learn
from engines.meta import FIRST, Meta

RESNET = {"backbone": "resnet18", "image_size": 256}
CORESET = {**RESNET, "layers": ["layer2", "layer3"], "coreset_ratio": 0.1}
THINNED = {**CORESET, "coreset_ratio": 0.01}
WIDE = {**THINNED, "backbone": "wide_resnet50_2"}
PADIM = {**RESNET, "layers": ["layer1", "layer2", "layer3"], "n_features": 100}
LITE = {key: value for key, value in FIRST.items() if key != "model"}
EFFICIENT = {"model_size": "small", "image_size": 256}
VAE = {"latent_dim": 64, "image_size": 256}

# kind, meta.json, images, batch
CASES: list[tuple[str, dict[str, Any], int, int]] = [
    ("patchcore", CORESET, 16, 4),
    ("patchcore", CORESET, 64, 4),
    ("patchcore", CORESET, 64, 16),
    ("patchcore", THINNED, 160, 4),
    ("patchcore", {**THINNED, "image_size": 512}, 16, 4),
    ("patchcore", WIDE, 16, 4),
    ("patchcore", WIDE, 16, 16),
    ("patchcore", LITE, 40, 4),
    ("patchcore", LITE, 200, 4),
    ("padim", PADIM, 16, 4),
    ("padim", PADIM, 64, 4),
    ("padim", PADIM, 64, 16),
    ("padim", {**PADIM, "n_features": 200}, 16, 4),
    ("padim", {**PADIM, "image_size": 384}, 16, 4),
    ("efficientad", EFFICIENT, 8, 1),
    ("efficientad", EFFICIENT, 8, 4),
    ("efficientad", {**EFFICIENT, "image_size": 384}, 8, 1),
    ("efficientad", {**EFFICIENT, "model_size": "medium"}, 8, 1),
    ("efficientad", {**EFFICIENT, "model_size": "medium"}, 8, 4),
    ("vae", VAE, 16, 4),
    ("vae", VAE, 160, 4),
    ("vae", VAE, 160, 64),
    ("vae", {**VAE, "image_size": 512}, 64, 16),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--kinds", default="patchcore,padim,efficientad,vae", help="which ones")
    kinds = parser.parse_args().kinds.split(",")
    print_machine(["torch", "anomalib", "openvino", "numpy"])
    with tempfile.TemporaryDirectory(prefix="kensa-memory-") as name:
        rows = [row for case in CASES if case[0] in kinds for row in measured(Path(name), *case)]
    head = ["model", "px", "images", "batch", "what", "MiB", "predicted"]
    print_table("Most memory at once", head, rows)
    print_load("after")


def measured(
    folder: Path, kind: str, meta: dict[str, Any], images: int, batch: int
) -> list[list[str]]:
    """A row for the training, and one for the conversion."""
    data, out, engine = folder / f"data-{images}", folder / "trained", folder / "engine"
    if not data.is_dir():
        _draw(data, images)
    for old in (out, engine):
        shutil.rmtree(old, ignore_errors=True)
    meta_json = folder / "meta.json"
    meta_json.write_text(json.dumps({"model": kind, "bit_depth": 8, **meta}))
    known = Meta.read(meta_json)
    what = f"{kind} {known.backbone or known.model_size or ''}"
    what += f" {known.coreset_ratio or known.n_features or ''}"
    row = [what.strip(), str(known.image_size), str(images), str(batch)]
    with phase(" ".join(row)):
        learned = _peak("retrain.py", "--model", kind, "--pretrained_pth", "untrained",
                        "--meta_json", meta_json, "--category", "sample_bracket", "--data_root",
                        data, "--batch", batch, "--out_dir", out)  # fmt: skip
        learning = Learning(known, images, 4, batch)
        predicted, convertible = to_learn(learning), to_convert(known, learning.bank)
        converted = _peak("convtrt.py", "--model", kind, "--weights_pth", out / "model.pth",
                          "--meta_json", out / "meta.json", "--out_dir", engine)  # fmt: skip
    return [
        [*row, "retrain", f"{learned / MIB:.0f}", f"{predicted / MIB:.0f}"],
        [*row, "convert", f"{converted / MIB:.0f}", f"{convertible / MIB:.0f}"],
    ]


def _draw(folder: Path, images: int) -> None:
    from workers.sample_parts.write_dataset import write_dataset

    write_dataset(folder, train=images, normal=2, per_kind=1, size=320)


def _peak(*command: Any) -> int:
    """Run a command of ours; the most that it had in memory, bytes."""
    words = [sys.executable, str(ROOT / command[0]), *map(str, command[1:])]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(words)} failed:\n{said}")
    return usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
