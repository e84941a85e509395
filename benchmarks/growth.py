"""How long one picture takes, and how much memory, as a memory bank grows, and as models join.

    python -m benchmarks.growth [--rows 1000 10240 102400 1000000] [--models 1 4 16] [--images N]

The banks are patches of real photos (of drawn parts without the assets); where there are too few,
points between two of them. docs/benchmarks.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import (
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
)

if TYPE_CHECKING:
    from engines.runtimes.openvino import OpenVINORuntime

ROWS = (1_000, 10_240, 102_400, 1_000_000)
MODELS, EACH = (1, 4, 16), 10_240  # models that are open at once, and the rows of each
AT_ONCE = 50_000  # rows that are made at once
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="of the banks")
    parser.add_argument("--models", type=int, nargs="+", default=MODELS, help="open at once")
    parser.add_argument("--images", type=int, default=40, help="for each size (default 40)")
    flags = parser.parse_args()
    begin()
    print_machine(["openvino", "numpy"])
    with tempfile.TemporaryDirectory() as folder:
        subject = find_subject(Path(folder))
        with phase("patches of the training images, and the graph"):
            growing = Growing.of(subject, Path(folder), flags.images)
        banks = growing.banks(flags.rows)
        models = growing.models(flags.models)
    head = ["opened s", "ms per picture", "p95 ms", "of the first"]
    print_table(
        f"{subject.words}: rows of the bank",
        ["rows", "bank MiB", *head, "memory MiB"],
        banks,
    )
    print_table(
        f"Models that are asked in turns, a bank of {EACH:,} rows each, compiled before",
        ["models", *head, "memory MiB"],
        models,
    )
    print_load("after")


@dataclass(frozen=True)
class Growing:
    """One graph, and what is put beside it and through it."""

    onnx: Path
    patches: NDArray[np.float32]  # (n, C)
    images: NDArray[np.uint8]  # (n, S, S, 3)

    @classmethod
    def of(cls, subject: Subject, folder: Path, count: int) -> Growing:
        from workers.converting.export import export_onnx
        from workers.models import patchcore

        model = patchcore.build(subject.meta, subject.weights)
        patches = embeddings(model, pictures(subject.category.train)).numpy()
        model.bank = patchcore.Bank(torch_of(bank_of(patches, 100)), 0.0)
        graph, inputs = patchcore.graph(model, half=False)
        export_onnx(graph, inputs, folder / "model.onnx", 17)
        tests = [*subject.category.test_normal, *subject.category.test_anomaly]
        return cls(folder / "model.onnx", patches, pictures(list(islice(cycle(tests), count))))

    def banks(self, sizes: Sequence[int]) -> list[list[str]]:
        """A row for each size of bank."""
        rows, first = [], 0.0
        for size in sizes:
            with phase(f"a bank of {size:,} rows"):
                bank = bank_of(self.patches, size)
                opened, runtimes, grown = self._open([bank])
                median, p95 = self._judge(runtimes)
            first, mib = first or median, bank.nbytes / MIB
            rows.append([
                f"{size:,}", f"{mib:.1f}", f"{opened:.2f}", f"{median:.1f}", f"{p95:.1f}",
                f"{median / first:.2f}", f"{grown:.0f}",
            ])  # fmt: skip
        return rows

    def models(self, counts: Sequence[int]) -> list[list[str]]:
        """A row for each number of models."""
        bank, rows, first = bank_of(self.patches, EACH), list[list[str]](), 0.0
        for count in counts:
            with phase(f"{count} models"):
                opened, runtimes, grown = self._open([bank] * count)
                median, p95 = self._judge(runtimes)
            first = first or median
            rows.append([
                f"{count}", f"{opened:.2f}", f"{median:.1f}", f"{p95:.1f}",
                f"{median / first:.2f}", f"{grown:.0f}",
            ])  # fmt: skip
        return rows

    def _open(self, banks: list[NDArray[np.float32]]) -> tuple[float, list[OpenVINORuntime], float]:
        """The seconds, the runtimes, and by how many MiB the process has grown."""
        from engines.runtimes.openvino import OpenVINORuntime

        cache = self.onnx.parent
        OpenVINORuntime(self.onnx, banks[0][:100], cache_dir=cache).close()
        gc.collect()
        before, began = memory_mib("VmRSS"), time.perf_counter()
        found = [OpenVINORuntime(self.onnx, bank, cache_dir=cache) for bank in banks]
        return time.perf_counter() - began, found, memory_mib("VmRSS") - before

    def _judge(self, runtimes: list[OpenVINORuntime]) -> tuple[float, float]:
        """Median and 95th percentile of the milliseconds that a picture takes."""
        milliseconds = []
        for runtime in runtimes:
            runtime.infer(self.images[:1])
        for image, runtime in zip(self.images, cycle(runtimes), strict=False):
            began = time.perf_counter()
            runtime.infer(image[None])
            milliseconds.append(1000 * (time.perf_counter() - began))
        for runtime in runtimes:
            runtime.close()
        return statistics.median(milliseconds), float(np.percentile(milliseconds, 95))


def torch_of(bank: NDArray[np.float32]) -> Any:
    import torch

    return torch.from_numpy(bank)


def bank_of(patches: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
    """So many rows: patches (n, C) by chance, and points up to a fifth of the way to another."""
    random = np.random.default_rng(0)
    bank = np.empty((rows, patches.shape[1]), np.float32)
    for start in range(0, rows, AT_ONCE):
        some = bank[start : start + AT_ONCE]
        some[:] = patches[random.integers(0, len(patches), len(some))]
        if rows > len(patches):
            way = random.random((len(some), 1), np.float32) / 5
            some += way * (patches[random.integers(0, len(patches), len(some))] - some)
    return bank


if __name__ == "__main__":
    main()
