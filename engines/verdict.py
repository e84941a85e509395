"""From raw scores to a verdict, and from an anomaly map to a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.camera import Fault
from engines.errors import BadMeta, RuntimeFailed
from engines.meta import Meta

Label = Literal["Normal", "Anomaly", "Unusable"]

# anomalib blurs its maps with sigma 4 pixels of the model's input; ours come at that input's size.
BLUR_SIGMA = 4.0
OVERLAY_SIDE = 1024  # the longer side of an overlay, pixels: what a tablet shows
RING = 0.04  # the radius of a ring, of that side


@dataclass(frozen=True)
class Scale:
    """How raw scores of one model are read: the three numbers of its calibration, and the hand."""

    threshold_auto: float  # raw score
    raw_min: float
    raw_max: float
    threshold: float  # normalised score, set by hand; 0.5 is `threshold_auto`

    @classmethod
    def of(cls, meta: Meta) -> Scale:
        """The scale in a meta.json; BadMeta when the model was never verified."""
        auto, low, high = meta.image_threshold_auto, meta.raw_image_min, meta.raw_image_max
        if auto is None or low is None or high is None:
            raise BadMeta(
                "meta.json has no image_threshold_auto, raw_image_min and raw_image_max, so no"
                " score can be judged: run retrain.py, which finds them."
            )
        return cls(auto, low, high, meta.image_threshold)

    def normalise(self, raw: float) -> float:
        """Raw score -> [0, 1] with 0.5 at the automatic threshold, as anomalib's PostProcessor."""
        return min(max((raw - self.threshold_auto) / (self.raw_max - self.raw_min) + 0.5, 0.0), 1.0)

    @property
    def raw_threshold(self) -> float:
        """The threshold set by hand, as a raw score."""
        return self.threshold_auto + (self.threshold - 0.5) * (self.raw_max - self.raw_min)


@dataclass(frozen=True)
class Verdict:
    """What Kensa says of one part."""

    label: Label
    raw_score: float
    score: float  # normalised, [0, 1]
    threshold: float  # normalised: above it is an anomaly
    raw_threshold: float
    unusable: Fault | None = None  # why nobody should go by the picture, where somebody asked

    @property
    def is_anomalous(self) -> bool:
        """Whether the part may not pass: also where its picture says nothing of it."""
        return self.label != "Normal"

    def on_unusable(self, fault: Fault | None) -> Verdict:
        """The same of a picture that is not usable; the score is the model's all the same."""
        return self if fault is None else replace(self, label="Unusable", unusable=fault)


def decide(raw_score: float, raw_threshold: float) -> Label:
    """Anomaly above the threshold, Normal at it and below, as anomalib.

    Raises:
        RuntimeFailed: the score is not a finite number, or is NaN because the map is not (see
            `engines.runtimes.only_whole`), so nothing can be said of the part.
    """
    if not math.isfinite(raw_score):
        raise RuntimeFailed(
            f"The model gave the score {raw_score}, or a map with values that are no numbers: no"
            " verdict. Convert it again."
        )
    return "Anomaly" if raw_score > raw_threshold else "Normal"


def judge(raw_score: float, scale: Scale) -> Verdict:
    """The verdict on a raw score; RuntimeFailed when it is not finite."""
    return Verdict(
        label=decide(raw_score, scale.raw_threshold),
        raw_score=raw_score,
        score=scale.normalise(raw_score),
        threshold=scale.threshold,
        raw_threshold=scale.raw_threshold,
    )


def heatmap(anomaly_map: NDArray[np.float32], scale: Scale, size: int) -> NDArray[np.float32]:
    """Raw anomaly map (h, w) -> (size, size) in [0, 1], 0.5 at the automatic threshold.

    Upsampled and smoothed as anomalib's AnomalyMapGenerator does; `size` is the model's input side.
    """
    smooth = cv2.resize(anomaly_map, (size, size), interpolation=cv2.INTER_NEAREST)
    smooth = cv2.GaussianBlur(smooth, (0, 0), BLUR_SIGMA)
    span = scale.raw_max - scale.raw_min
    heat: NDArray[np.float32] = np.clip((smooth - scale.threshold_auto) / span + 0.5, 0, 1)
    return heat.astype(np.float32)


def overlay(
    image: NDArray[np.uint8],
    anomaly_map: NDArray[np.float32],
    scale: Scale,
    size: int,
    threshold: float | None = None,
) -> bytes:
    """A PNG of the part with what is anomalous in its raw map (h, w) painted over it.

    Args:
        image: (H, W, 3) RGB, as uploaded.
        size: the model's input side.
        threshold: normalised; the scale's where it is not given.
    """
    limit = scale.threshold if threshold is None else threshold
    is_hot = scale.normalise(float(anomaly_map.max())) > limit
    return overlay_png(image, heatmap(anomaly_map, scale, size), limit, is_hot=is_hot)


def overlay_png(
    image: NDArray[np.uint8],
    heat: NDArray[np.float32],
    threshold: float,
    *,
    is_hot: bool = False,
) -> bytes:
    """A PNG of the part with what is anomalous painted over it and outlined.

    Args:
        image: (H, W, 3) RGB, as uploaded.
        heat: (size, size) in [0, 1], from `heatmap`.
        threshold: normalised; the outline stands where `heat` crosses it.
        is_hot: the map was above it before it was smoothed: a ring stands where `heat` is highest
            if it crosses the threshold nowhere, so that no reject goes without a place to look at.
    """
    part = within(image, OVERLAY_SIDE)
    heat = cv2.resize(heat, part.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    colour = cv2.applyColorMap((heat * 255).astype(np.uint8), cv2.COLORMAP_TURBO)  # BGR
    opacity = np.clip(2 * heat - 0.8, 0, 0.6)[..., None]  # the part stays visible below
    picture = (part[..., ::-1] * (1 - opacity) + colour * opacity).astype(np.uint8)
    outlines, _ = cv2.findContours(
        (heat > threshold).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE
    )
    cv2.drawContours(picture, outlines, -1, (255, 255, 255), 2, cv2.LINE_AA)
    if is_hot and not outlines:
        top, left = np.unravel_index(int(heat.argmax()), heat.shape)
        radius = max(round(RING * max(heat.shape)), 4)
        for tone, thick in ((0, 4), (255, 2)):  # to be seen on any part
            cv2.circle(
                picture, (int(left), int(top)), radius, (tone, tone, tone), thick, cv2.LINE_AA
            )
    return png(picture)


def within(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """A picture (H, W, 3), made smaller where its longer side has more pixels than `side`."""
    scale = min(1.0, side / max(image.shape[:2]))
    width, height = (max(1, round(one * scale)) for one in (image.shape[1], image.shape[0]))
    small: NDArray[np.uint8] = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return small


def jpeg(picture: NDArray[np.uint8], quality: int) -> bytes:
    """Encode (H, W, 3) RGB for a browser."""
    _, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return data.tobytes()


def png(picture: NDArray[np.uint8]) -> bytes:
    """Encode (H, W) grey or (H, W, 3) BGR as PNG, fast rather than small."""
    _, data = cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    return data.tobytes()
