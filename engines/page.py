"""What the pages of Kensa share: their look, tiles, axes, and pictures that are inside of them.

A page is one file that loads nothing: it may be sent on, printed, and opened in ten years.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

SHOWN_PX = 480  # the longer side of a picture in a page
LOADS_NOTHING = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # for a browser

STYLE = "\n" + Path(__file__).with_name("page.css").read_text("utf-8")  # the screen's too

GRID = 'stroke="var(--line)" stroke-width="1"'
CURVE = 'stroke="var(--normal)" stroke-width="2.5" stroke-linejoin="round"'
DOTTED = 'stroke="var(--soft)" stroke-width="1.2" stroke-dasharray="1.5 3.5"'
DASHED = 'stroke="var(--ink)" stroke-width="1.5" stroke-dasharray="5 4"'


def document(title: str, body: str, style: str = "", lang: str = "en") -> str:
    """The whole file.

    Args:
        title: as the browser shows it; HTML, as `body` is.
        style: CSS after the common one.
        lang: of its sentences, as browsers and fonts know it.
    """
    return f"""<!doctype html>
<html lang="{lang}"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{LOADS_NOTHING}">
<title>{title}</title><style>{STYLE}{style}</style></head><body>
{body}
</body></html>
"""


def tile(name: str, value: str, *details: str, look: str = "") -> str:
    """A number that is seen first: HTML of its name, value, and what is said of it below."""
    small = "".join(f"<small>{one}</small>" for one in details)
    kind = f"tile {look}".strip()
    return f'<div class="{kind}"><span>{name}</span><b>{value}</b>{small}</div>'


def data_uri(picture: Any) -> str:
    """A small JPEG of a picture (H, W, 3) BGR, as a URI that holds it."""
    scale = min(1.0, SHOWN_PX / max(picture.shape[:2]))
    width, height = (max(1, round(side * scale)) for side in (picture.shape[1], picture.shape[0]))
    small = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 85])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


@dataclass(frozen=True)
class Axes:
    """A rectangle of an SVG, in px, and the values that its sides stand for."""

    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Values -> px."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + across * self.width, self.top + (1 - up) * self.height

    def line(self, x: NDArray[np.float64], y: NDArray[np.float64], look: str) -> str:
        points = " ".join(
            "{:.1f},{:.1f}".format(*self.at(*point)) for point in zip(x, y, strict=True)
        )
        return f'<polyline points="{points}" fill="none" {look}/>'

    def dot(self, x: float, y: float, words: str) -> str:
        """A point with a label that stays inside the rectangle."""
        px, py = self.at(x, y)
        right = px > self.left + 0.6 * self.width
        above = py > self.top + 0.75 * self.height
        anchor, shift = ("end", -9) if right else ("start", 9)
        return (
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" fill="var(--ink)"/>'
            f'<text x="{px + shift:.1f}" y="{py + (-9 if above else 18):.1f}"'
            f' text-anchor="{anchor}">{words}</text>'
        )

    def levels(self, values: Iterable[float]) -> str:
        """A grid line at each of these heights, and its number at the left."""
        parts = []
        for value in values:
            _, py = self.at(self.x[0], value)
            right = self.left + self.width
            parts.append(
                f'<line x1="{self.left}" y1="{py:.1f}" x2="{right}" y2="{py:.1f}" {GRID}/>'
                f'<text x="{self.left - 7}" y="{py + 4:.1f}" text-anchor="end">{value:g}</text>'
            )
        return "".join(parts)

    def bar(self, left: float, width: float, y: float, colour: str, words: str) -> str:
        """A bar from the bottom up to a value; `left` and `width` are px, of which one is a gap."""
        _, top = self.at(self.x[0], y)
        return (
            f'<rect x="{left + 0.5:.1f}" y="{top:.1f}" width="{width - 1:.1f}"'
            f' height="{self.top + self.height - top:.1f}" fill="var(--{colour})">'
            f"<title>{words}</title></rect>"
        )

    def frame(self, x_name: str, y_name: str) -> str:
        """Grid lines, ticks and the names of both sides."""
        bottom, right = self.top + self.height, self.left + self.width
        parts = []
        for value in ticks(*self.x):
            px, _ = self.at(value, self.y[0])
            parts.append(
                f'<line x1="{px:.1f}" y1="{bottom}" x2="{px:.1f}" y2="{bottom + 4}" {GRID}/>'
                f'<text x="{px:.1f}" y="{bottom + 17}" text-anchor="middle">{value:g}</text>'
            )
        parts.append(self.levels(ticks(*self.y)))
        middle = self.top + self.height / 2
        parts.append(
            f'<text x="{right}" y="{bottom + 33}" text-anchor="end">{x_name}</text>'
            f'<text transform="translate({self.left - 36} {middle}) rotate(-90)"'
            f' text-anchor="middle">{y_name}</text>'
        )
        return "".join(parts)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`."""
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]
