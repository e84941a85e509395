"""Fields of numbers over a picture, and the few things that are done to them everywhere."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Field = npt.NDArray[np.float32]  # (size, size), or (size, size, 3) for light and colour
Curve = npt.NDArray[np.float64]  # (points,)
Pixels = npt.NDArray[np.uint8]  # (size, size, 3) RGB, or (size, size) for a mask


def f32(values: Any) -> Field:
    return np.asarray(values, dtype=np.float32)


def u8(values: Any) -> Pixels:
    return np.asarray(values, dtype=np.uint8)


def odd_kernel(length_px: float) -> tuple[int, int]:
    """The nearest odd kernel size, both ways."""
    return (int(length_px) | 1, int(length_px) | 1)


def ramp(values: Any, low: float, high: float) -> Field:
    """0 up to `low`, 1 from `high`, smooth between."""
    t = np.clip((values - low) / (high - low), 0.0, 1.0)
    return f32(t * t * (3.0 - 2.0 * t))


def soften(values: Field, sigma_px: float) -> Field:
    return f32(cv2.GaussianBlur(values, (0, 0), sigma_px))


def clouds(rng: np.random.Generator, size: int, cells: int) -> Field:
    """Smooth noise of about unit strength, (size, size), with `cells` bumps across the picture."""
    grid = rng.standard_normal((cells, cells), dtype=np.float32)
    return f32(cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC))
