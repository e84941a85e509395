"""One file per model kind, each reading straight down. All have the same names:

- `build(meta, weights)`: the torch model.
- `knows(model)`: whether it has learned anything that an update would go on from.
- `train(model, meta, batches, how, progress)` and `update(...)`: learn from nothing, or on top.
- `scores(model, batches)`: raw scores.
- `summary(model)`, `save(model, meta, folder)`: for report.json, and the files to retrain from.
- `model.origin`: where the weights were found that it begins with, if nobody named any.
- `graph(model, half)`: the module and the inputs that are exported.
- `model.keep`: which places of its map count, all at first; see `count_only`.
- `SCORE_KIND`: what a score means. `LEARNED`: the key of meta.json that names the file of what was
  learned beside the weights, which `load(model, path)` reads; None where the weights are all.
- `INCREMENTAL`: whether an update with a few images is quick and leaves other scores as they were.
- `USUAL_SCALE`: how far scores of normal parts are expected to spread, as a share of the median.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.image import DEFAULT_LIMITS, ImageLimits
from engines.meta import Meta
from engines.regions import REACH, Regions, hide, shown
from workers.models.deferred_imports import defer_imports

defer_imports()  # before the first import of anomalib, timm or torchvision

KINDS = ("patchcore", "padim", "efficientad", "vae")
FAR_BELOW = 1e30  # any score, and no more than what `engines.runtimes.NO_NUMBER` takes for NaN


@dataclass(frozen=True)
class Training:
    """How to learn. Kinds that see each image once have no use for epochs."""

    epochs: int = 1
    batch: int = 4
    penalty_dir: Path | None = None  # natural images that an EfficientAD student must not imitate
    limits: ImageLimits = DEFAULT_LIMITS  # of these


def module(kind: str) -> Any:
    """The module of a model kind; imported only now, because torch takes seconds to load."""
    return import_module(f"workers.models.{kind}")


def count_only(model: Any, regions: Regions | None, meta: Meta) -> None:
    """Let a model look past regions from now on, where it learns and where it scores.

    Raises:
        BadBundle: nothing is left that counts.
    """
    import torch

    if regions is not None:
        cells = regions.cells(meta.image_size, tuple(model.keep.shape), REACH[meta.model])
        model.keep = torch.from_numpy(cells)


def that_count(found: Any, keep: Any) -> Any:
    """What was found (N, ..., h, w), to take the largest of: as it is, to the bit, where `keep`
    (h, w) is 1, and below anything where it is 0. NaN stays NaN.
    """
    return found + (keep - 1) * FAR_BELOW


def look(
    kind: Any, model: Any, pictures: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Raw scores (n,) and maps (n, h, w) as they are served, of pictures (n, S, S, 3), n > 0."""
    import torch

    graph, inputs = kind.graph(model, half=False)
    _, *learned = inputs.values()
    with torch.inference_mode():  # one by one: distances of a batch would not fit in the cache
        seen = [graph(torch.from_numpy(picture[None]), *learned)[:2] for picture in pictures]
    scores, maps = (torch.cat(one).numpy() for one in zip(*seen, strict=True))
    return scores, hide(maps, shown(model.keep.numpy(), maps.shape[1:]))
