"""The statistics of a PaDiM on disk: stats.npz, ours or an older one with an inverse covariance."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engines.errors import BadBundle
from engines.files import write_atomically
from engines.store.bundle import read_array
from workers.models.padim_gaussians import RIDGE, Stats


def read_stats(
    path: Path, positions: int, n: int, layers: list[str]
) -> tuple[Stats, NDArray[Any] | None]:
    """The statistics of a file in its own order of channels, and which channels these are.

    The older files call their inverse covariance `inv_cov` or `cov_inv`, (P, n, n) with anomalib's
    RIDGE in it. They do not say of how many images they are, and some not of which channels: None.

    Raises:
        BadBundle: the file is damaged, or was made with another backbone, layers or n_features.
    """
    mean = _array(path, "mean", (n, positions))
    index, named = read_array(path, "index"), read_array(path, "layers")
    count = _count(path)
    if named is not None and named.tolist() != layers:
        raise BadBundle(f"{path} was made with layers {named.tolist()}, not {layers}.")
    if (packed := read_array(path, "covariance")) is not None:
        packed = _array(path, "covariance", (positions, n * (n + 1) // 2))
        covariance = torch.empty(positions, n, n)
        rows, columns = torch.tril_indices(n, n)
        covariance[:, rows, columns] = covariance[:, columns, rows] = torch.from_numpy(packed)
    else:
        name = "inv_cov" if read_array(path, "inv_cov") is not None else "cov_inv"
        inverse = torch.from_numpy(_array(path, name, (positions, n, n)))
        inverted, failed = torch.linalg.inv_ex(inverse)
        if failed.any():
            raise BadBundle(f"{path}: {name} holds what is no inverse of a covariance.")
        covariance = inverted - RIDGE * torch.eye(n)
    return Stats(count, torch.from_numpy(mean.T.copy()), covariance), index


def write_stats(
    path: Path, stats: Stats, index: torch.Tensor, layers: list[str], seed: int
) -> None:
    """Write what `read_stats` reads: of each covariance the lower triangle."""
    rows, columns = torch.tril_indices(len(index), len(index))
    buffer = io.BytesIO()
    np.savez(
        buffer,
        count=np.int64(stats.count),
        mean=stats.mean.T.numpy(),
        covariance=stats.covariance[:, rows, columns].numpy(),
        index=index.numpy(),
        seed=np.int64(seed),
        layers=np.array(layers),
    )
    write_atomically(path, buffer.getvalue())


def _count(path: Path) -> int:
    """Of how many images statistics are; 0 where the file does not say."""
    count = read_array(path, "count")
    if count is None:
        return 0
    if count.shape != () or not np.issubdtype(count.dtype, np.integer) or count < 0:
        raise BadBundle(f"{path}: count must be a number of images, got {count}.")
    return int(count)


def _array(path: Path, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A finite float array of that shape from a stats.npz."""
    found = read_array(path, name)
    if found is None:
        raise BadBundle(f"{path} has no array named {name}, so it holds no PaDiM statistics.")
    if found.shape != shape or not np.issubdtype(found.dtype, np.floating):
        raise BadBundle(
            f"{path} does not fit meta.json: {name} is {found.dtype} {found.shape}, and backbone,"
            f" layers, n_features and image_size make {shape}. Pass the meta.json that was written"
            " with it."
        )
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(found, dtype=np.float32)  # of which some may be too large
    if not np.isfinite(found).all():
        raise BadBundle(f"{path}: {name} holds values that are not finite.")
    return found
