"""What the benchmarks share: pictures, weights, an untrained PatchCore, tables."""

from __future__ import annotations

import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from engines.meta import Meta
    from workers.learning.dataset import Category

ROOT = Path(__file__).resolve().parent.parent
ASSETS = Path(os.environ.get("KENSA_ASSETS", ROOT.parent / "shared" / "assets"))

BACKBONE, LAYERS, RATIO, SIDE = "resnet18", ["layer2", "layer3"], 0.1, 256
SAMPLE_PARTS = 40  # pictures to learn from where there are no photos: as many as alien has


@dataclass(frozen=True)
class Subject:
    """What is learned and inspected."""

    words: str
    category: Category
    weights: Path | str
    meta: Meta


def begin() -> None:
    """End with one sentence where anomalib or torch is missing; silence deprecation warnings."""
    warnings.simplefilter("ignore")
    if find_spec("torch") is None or find_spec("anomalib") is None:
        sys.exit("The benchmarks compare with anomalib on torch: pip install -e '.[train]' first.")


def find_subject(folder: Path) -> Subject:
    """The alien photos and the resnet18 of the assets, else sample parts drawn into `folder`."""
    from engines.meta import Meta
    from workers.learning.dataset import Category
    from workers.models.backbone import UNTRAINED
    from workers.sample_parts.write_dataset import CATEGORY, write_dataset

    known = {"backbone": BACKBONE, "layers": LAYERS, "coreset_ratio": RATIO, "image_size": SIDE}
    meta = Meta.model_validate({"model": "patchcore", "bit_depth": 8, **known})
    weights = ASSETS / "weights" / "resnet18.safetensors"
    if weights.is_file() and (ASSETS / "data" / "train" / "alien").is_dir():
        category = Category.find(ASSETS / "data", "alien")
        return Subject(f"alien photos, {weights.name}", category, weights, meta)
    data = write_dataset(folder / "data", train=SAMPLE_PARTS, normal=16, per_kind=8)
    category = Category.find(data, CATEGORY)
    return Subject(f"drawn sample parts (no {ASSETS}), no weights", category, UNTRAINED, meta)


def pictures(paths: Sequence[Path]) -> NDArray[np.uint8]:
    """Image files as the model sees them, (n, SIDE, SIDE, 3)."""
    from engines.image import load

    return np.stack([load(path.read_bytes(), SIDE) for path in paths])


def embeddings(model: Any, images: NDArray[np.uint8]) -> Any:
    """All patches of images (n, SIDE, SIDE, 3) as a tensor (n * h * w, C)."""
    import torch

    with torch.inference_mode():
        batches = torch.split(torch.from_numpy(images), 4)
        return torch.cat([model.embed(batch)[0].flatten(0, 1) for batch in batches])


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Say on stderr what is under way, and how long it took."""
    began = time.perf_counter()
    print(f"... {name}", end="", file=sys.stderr, flush=True)
    yield
    print(f": {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)


def machine(packages: Sequence[str]) -> dict[str, str]:
    """The processor, its cores, how busy they are, and the versions of what is compared."""
    import openvino as ov

    cpu = ov.Core()
    name = cpu.get_property("CPU", "FULL_DEVICE_NAME")
    bf16 = "BF16" in cpu.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return {
        "CPU": f"{name}, {os.cpu_count()} cores, bf16: {'yes' if bf16 else 'no'}",
        "Versions": f"Python {platform.python_version()}, {versions}",
        "Load average before": _load(),
    }


def print_machine(packages: Sequence[str]) -> None:
    """What `machine` says."""
    for name, said in machine(packages).items():
        print(f"{name}: {said}")


def _load() -> str:
    return ", ".join(f"{load:.2f}" for load in os.getloadavg())


def print_load(when: str) -> None:
    print(f"Load average {when}: {_load()}")


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table whose columns stand under each other; the first is text, the rest numbers"""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    print(f"\n{title}\n")
    for row in (head, rule, *rows):
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print(f"| {' | '.join(cells)} |")
    sys.stdout.flush()


def memory_mib(field: str, process: str = "self") -> float:
    """VmRSS (in memory now) or VmHWM (the most so far) of a process, MiB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def times(value: float) -> str:
    """A ratio, such as 2.13x."""
    return f"{value:.2f}x"
