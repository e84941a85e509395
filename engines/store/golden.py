"""A few images kept with a model: what every later form of it must score as the first one did."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import BadBundle, Unreadable
from engines.files import write_atomically

GOLDEN = "golden.npz"
GOLDEN_SCORES = "golden_scores"  # in report.json: what the torch model said of them
EACH = 8  # normals, and defects where there are any


@dataclass(frozen=True)
class Golden:
    """Images as the model sees them."""

    images: NDArray[np.uint8]  # (n, S, S, 3) RGB
    defective: NDArray[np.bool_] | None = None  # (n,); None in files of older tools

    @classmethod
    def choose(
        cls,
        normal: NDArray[np.uint8],
        normal_scores: NDArray[np.float32],
        defective: NDArray[np.uint8],
        defective_scores: NDArray[np.float32],
    ) -> Golden:
        """From the lowest to the highest score of each group, evenly: both ends are in it."""
        chosen = [normal[evenly(normal_scores)], defective[evenly(defective_scores)]]
        defective_ones = np.repeat([False, True], [len(group) for group in chosen])
        return cls(np.concatenate(chosen), defective_ones)

    def write(self, folder: Path) -> str:
        """Write golden.npz into a folder, and return its name."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {"images": self.images}
        if self.defective is not None:
            arrays["defective"] = self.defective
        np.savez_compressed(buffer, **arrays)
        write_atomically(folder / GOLDEN, buffer.getvalue())
        return GOLDEN

    @classmethod
    def read(cls, folder: Path, size: int) -> Golden | None:
        """golden.npz of a folder, None where there is none.

        Raises:
            BadBundle: it is damaged, or its images have another size than the model's.
        """
        path = folder / GOLDEN
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                images, defective = file["images"], file.get("defective")
        except Exception as error:  # zip and npy readers raise what they like
            Unreadable.check(path, error)
            raise BadBundle(f"{path} is damaged: {error}. Run retrain.py again.") from error
        if images.dtype != np.uint8 or images.shape[1:] != (size, size, 3) or not len(images):
            raise BadBundle(f"{path} holds {images.dtype} {images.shape}, not {size} x {size} RGB.")
        if defective is not None and (defective.dtype, defective.shape) != (bool, images.shape[:1]):
            raise BadBundle(f"{path} does not say of each image whether it is defective.")
        return cls(images, defective)


def torch_scores(report: dict[str, Any], count: int) -> NDArray[np.float32] | None:
    """Raw scores (n,) of the golden images, when the model was exported; None where a report.json
    does not say them. It may have come from anybody.
    """
    known = report.get(GOLDEN_SCORES)
    if not isinstance(known, list) or len(known) != count:
        return None
    if not all(isinstance(one, float) for one in known):
        return None
    return np.asarray(known, np.float32)


def evenly(scores: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """Which of scores (n,) to keep the images of: `EACH`, or all where there are not more."""
    if len(scores) <= EACH:
        return np.arange(len(scores))
    chosen = np.linspace(0, len(scores) - 1, EACH).round().astype(int)
    return np.asarray(np.argsort(scores)[chosen], np.int64)
