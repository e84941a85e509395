"""How long one picture takes as a memory bank grows, and what the bank takes of memory.

    python -m benchmarks.growth [--rows 1000 10240 102400 1000000] [--images N]

The banks are patches of real photos (of drawn parts without the assets); where there are too few,
points between two of them. docs/benchmarks.md says what the columns mean.
"""

from __future__ import annotations

import os

# As the server does, before numpy is loaded: OpenBLAS would take a thread from the engines.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import gc
import statistics
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

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

ROWS = (1_000, 10_240, 102_400, 1_000_000)
AT_ONCE = 50_000  # rows that are made at once
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="of the banks")
    parser.add_argument("--images", type=int, default=40, help="for each bank (default 40)")
    flags = parser.parse_args()
    begin()
    print_machine(["openvino", "numpy"])
    with tempfile.TemporaryDirectory() as folder:
        subject = find_subject(Path(folder))
        rows = measure(subject, Path(folder) / "model.onnx", flags.rows, flags.images)
    head = ["bank rows", "bank MiB", "opened s", "ms per picture", "p95 ms", "of the first"]
    print_table(subject.words, [*head, "memory, MiB per MiB of bank"], rows)
    print_load("after")


def measure(subject: Subject, onnx: Path, sizes: list[int], count: int) -> list[list[str]]:
    """A row for each size of bank."""
    from engines.runtimes.openvino import OpenVINORuntime
    from workers.converting.export import export_onnx
    from workers.models import patchcore

    with phase("patches of the training images, and the graph"):
        model = patchcore.build(subject.meta, subject.weights)
        patches = embeddings(model, pictures(subject.category.train)).numpy()
        bank = bank_of(patches, 100)
        model.bank = patchcore.Bank(_tensor(bank), 0.0)
        graph, inputs = patchcore.graph(model, half=False)
        export_onnx(graph, inputs, onnx, 17)
    tests = [*subject.category.test_normal, *subject.category.test_anomaly]
    images = pictures(list(islice(cycle(tests), count)))
    small = OpenVINORuntime(onnx, bank)
    rows, first = [], 0.0
    for size in sizes:
        with phase(f"{size:,} rows"):
            bank = bank_of(patches, size)
            gc.collect()
            before, began = memory_mib("VmRSS"), time.perf_counter()
            runtime = small.with_bank(bank, small.precision)
            assert runtime is not None
            opened = time.perf_counter() - began
            grown = memory_mib("VmRSS") - before
            milliseconds = []
            for image in images[:3]:
                runtime.infer(image[None])
            for image in images:
                began = time.perf_counter()
                runtime.infer(image[None])
                milliseconds.append(1000 * (time.perf_counter() - began))
            runtime.close()
            del runtime
        median = statistics.median(milliseconds)
        first = first or median
        mib = bank.nbytes / MIB
        p95 = np.percentile(milliseconds, 95)
        rows.append([
            f"{size:,}", f"{mib:.1f}", f"{opened:.2f}", f"{median:.1f}", f"{p95:.1f}",
            f"{median / first:.2f}", f"{grown / mib:.2f}",
        ])  # fmt: skip
    return rows


def _tensor(bank: NDArray[np.float32]) -> object:
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
