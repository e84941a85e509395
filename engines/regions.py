"""`Regions`: which pixels of a picture never count."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Regions:
    """A mask that a model carries: what it hides is not looked at, neither learned nor judged."""

    mask: NDArray[np.bool_]  # (H, W); True: never counts

    @property
    def share(self) -> float:
        """Of the picture's pixels, how many never count; 0 to 1."""
        return float(self.mask.mean())
