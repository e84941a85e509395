"""What a picture costs before the engine, and what decoding at reduced scale would change.

    python -m benchmarks.decoding [--turns N]

Times are CPU time of one thread, which other work on the machine hardly changes. Scores are those
of PatchCore, trained and asked with JPEGs at reduced scale, beside the same pixels in a file of
another kind, which can only be decoded in full.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from benchmarks.common import ASSETS, begin, embeddings, phase, print_machine, print_table
from benchmarks.peer_models import photo
from engines import camera, image

Load = Callable[[bytes], NDArray[np.uint8]]  # what the model sees of a JPEG

SETS = (("alien", 128), ("cookie", 128), ("cookie", 256), ("hazelnut_toy", 128))
QUALITY = 90  # of pictures that are no JPEG yet


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decoding", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--turns", type=int, default=12, help="of each piece (default 12)")
    flags = parser.parse_args()
    begin()
    if not (ASSETS / "weights" / "resnet18.safetensors").is_file():
        sys.exit(f"This benchmark needs real photos and weights: {ASSETS} has none.")
    print_machine(["opencv-python-headless", "simplejpeg", "torch"])
    with phase("times"):
        rows = times(flags.turns)
    print_table("A JPEG of 1024 x 1024 for a model of 256", ["piece", "CPU ms"], rows)
    found = []
    for category, size in SETS:
        with phase(f"scores: {category} at {size}"):
            found += scores(category, size)
    head = ["pictures", "decoded to at least", "AUROC", "its other files", "apart, median",
            "apart, most", "verdicts that differ"]  # fmt: skip
    print_table("The same pixels as JPEG and as another kind of file", head, found)


def reduced(data: bytes, size: int, least: float) -> NDArray[np.uint8]:
    """A JPEG decoded at the smallest scale that leaves `least` times `size`, then resized."""
    side = int(least * size)
    pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True, min_height=side, min_width=side)
    return image.resize(pixels, size)


def times(turns: int) -> list[list[str]]:
    """CPU milliseconds of each piece, for a picture: medians of turns."""
    data = [photo(file) for file in _files("test", "alien", "normal")[:8]]
    whole = {one: image.decode(one) for one in data}
    small = {one: image.resize(whole[one], 256) for one in data}
    pieces: dict[str, Callable[[bytes], Any]] = {
        "decoded in full, as it is": image.decode,
        "resized": lambda one: image.resize(whole[one], 256),
        "at reduced scale and resized, at least 512": lambda one: reduced(one, 256, 2),
        "at reduced scale, 256": lambda one: reduced(one, 256, 1),
        "its SHA-256": lambda one: hashlib.sha256(one).hexdigest(),
        "copied twice": lambda one: bytes(bytearray(one)),
        "measured, where KENSA_UNUSABLE asks": lambda one: camera.measure(whole[one], small[one]),
    }
    taken: dict[str, list[float]] = {name: [] for name in pieces}
    for _ in range(turns):
        for name, work in pieces.items():
            began = time.thread_time()
            for one in data:
                work(one)
            taken[name].append((time.thread_time() - began) * 1000 / len(data))
    return [[name, f"{statistics.median(some):.2f}"] for name, some in taken.items()]


def scores(category: str, size: int) -> list[list[str]]:
    """A row for each way: as it is, and at reduced scale."""
    train = [_jpeg(path) for path in _files("train", category)]
    test = [[_jpeg(path) for path in _files("test", category, kind)] for kind in
            ("normal", "anomaly")]  # fmt: skip
    ways: dict[str, Load] = {
        "all of it": lambda one: image.load(one, size),
        "2 x the model's": lambda one: reduced(one, size, 2),
        "the model's": lambda one: reduced(one, size, 1),
    }
    rows = []
    for name, way in ways.items():
        model = _learned(np.stack([way(one) for one in train]), size)
        own = [_scored(model, way, some) for some in test]
        other = [_scored(model, ways["all of it"], some) for some in test]
        limit = own[0].max()  # rejects no normal part as it was sent
        apart = np.abs(np.concatenate(other) / np.concatenate(own) - 1)
        flips = sum(
            int(((a > limit) != (b > limit)).sum()) for a, b in zip(own, other, strict=True)
        )
        rows.append([f"{category}, {size} px", name, f"{_auroc(*own):.4f}", f"{_auroc(*other):.4f}",
                     f"{np.median(apart):.2%}", f"{apart.max():.2%}",
                     f"{flips} of {len(apart)}"])  # fmt: skip
    return rows


def _files(*names: str) -> list[Path]:
    return sorted((ASSETS / "data").joinpath(*names).iterdir())


def _jpeg(path: Path) -> bytes:
    data = path.read_bytes()
    if image.kind_of(data) == "JPEG":
        return data
    bgr = cv2.cvtColor(image.decode(data), cv2.COLOR_RGB2BGR)
    return bytes(cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1])


def _learned(train: NDArray[np.uint8], size: int) -> Any:
    """PatchCore with every fourth patch of the pictures, at random."""
    import torch

    from engines.meta import Meta
    from workers.models import patchcore

    known = {"model": "patchcore", "backbone": "resnet18", "layers": ["layer2", "layer3"],
             "coreset_ratio": 0.25, "image_size": size}  # fmt: skip
    weights = ASSETS / "weights" / "resnet18.safetensors"
    model = patchcore.build(Meta.model_validate(known), weights)
    patches = embeddings(model, train)
    order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))
    model.bank = patchcore.Bank(patches[order[: len(patches) // 4]].clone(), 0.0)
    return model


def _scored(model: Any, way: Load, files: list[bytes]) -> NDArray[np.float64]:
    from workers.models import patchcore

    return np.asarray(patchcore.scores(model, [np.stack([way(one) for one in files])]), np.float64)


def _auroc(normal: NDArray[np.float64], defective: NDArray[np.float64]) -> float:
    above = defective[:, None] > normal
    return float((above + 0.5 * (defective[:, None] == normal)).mean())


if __name__ == "__main__":
    main()
