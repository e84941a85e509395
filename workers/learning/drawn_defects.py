"""Defects drawn onto normal pictures, so that a model can be asked what it would find.

Nothing here is learned from: a picture with a drawn defect only asks a model that has been trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Literal, TypeVar, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

Kind = Literal["scratch", "stain", "dent", "missing piece"]
Strength = Literal["faint", "strong"]
Picture = NDArray[np.uint8]  # (S, S, 3) RGB
Field = NDArray[np.float32]
Number = TypeVar("Number", np.uint8, np.float32)

KINDS: tuple[Kind, ...] = get_args(Kind)
SIDES = (0.01, 0.03, 0.08)
CONTRAST: dict[Strength, float] = {"faint": 12.0, "strong": 90.0}  # grey levels
CENTRAL = 0.8  # share of the side where parts are looked for when nothing tells where they lie

_LENGTH, _WIDTH = 3.0, 0.15  # of a scratch, shares of its `side`
_SMALLEST_PX = 1.3  # radius; what is smaller falls between two pixels
_TINTS = ((0.6, 1.0, 1.4), (1.3, 1.0, 0.7), (1.0, 1.0, 1.0))  # of R, G, B: coffee, ink, soot
_OPAQUE = 0.95  # the most of the light that a stain takes
_SEEN_THROUGH = 30.0  # grey levels by which a background shows in a hole
_BORDER = 0.02  # width of the picture's border, a share of its side
_PLAIN = 10.0  # grey levels that the border of a plain background strays from its median


@dataclass(frozen=True)
class Drawn:
    """A defect to be drawn.

    Attributes:
        side: diameter as a share of the picture's side; a scratch is three times as long, and thin.
    """

    kind: Kind
    side: float
    strength: Strength


DEFECTS: tuple[Drawn, ...] = tuple(Drawn(*one) for one in product(KINDS, SIDES, CONTRAST))


@dataclass(frozen=True)
class _Place:
    """Where a defect is drawn, with what random numbers, onto what.

    Attributes:
        pixels: what lies there (h, w, 3), grey levels.
        dx, dy: from the defect's centre to each pixel (1, w) and (h, 1), pixels.
        radius: half the defect's size, pixels.
        grey: whether the picture has no colours, as a monochrome camera's.
    """

    pixels: Field
    dx: Field
    dy: Field
    radius: float
    contrast: float
    background: Field | None  # (3,), where it is plain
    grey: bool
    rng: np.random.Generator


def draw(
    picture: Picture, what: Drawn, seed: int, where: NDArray[np.bool_] | None = None
) -> Picture:
    """A copy of a picture (S, S, 3) RGB with one defect, centred on a place where `where` is true.

    A kind with the same seed lies at the same place in any size and strength. A `where` (S, S) must
    not be all false; without one, the defect lies in the middle `CENTRAL` of the picture.
    """
    size = len(picture)
    rng = np.random.default_rng([seed, KINDS.index(what.kind)])
    places = np.flatnonzero(_middle(size) if where is None else where)
    y, x = divmod(int(places[rng.integers(len(places))]), size)
    radius = max(what.side * size / 2, _SMALLEST_PX)
    reach = math.ceil((1.1 * _LENGTH if what.kind == "scratch" else 1.9) * radius) + 3
    rows = slice(max(y - reach, 0), y + reach + 1)
    columns = slice(max(x - reach, 0), x + reach + 1)
    pixels = picture[rows, columns].astype(np.float32)
    place = _Place(
        pixels,
        (np.arange(pixels.shape[1], dtype=np.float32) + (columns.start - x))[None, :],
        (np.arange(pixels.shape[0], dtype=np.float32) + (rows.start - y))[:, None],
        radius,
        CONTRAST[what.strength],
        _background(picture) if what.kind == "missing piece" else None,
        _is_grey(picture),
        rng,
    )
    drawn: Picture = picture.copy()
    drawn[rows, columns] = np.clip(np.rint(_DRAWING[what.kind](place)), 0, 255).astype(np.uint8)
    return drawn


def _scratch(place: _Place) -> Field:
    """A thin bow that fades at its ends, deeper here than there."""
    angle, bend = place.rng.uniform(0, math.pi), place.rng.uniform(-0.3, 0.3)
    prefers = place.rng.choice([-1, 1])
    half = _LENGTH * place.radius
    along = (place.dx * math.cos(angle) + place.dy * math.sin(angle)) / half  # -1 to 1
    across = place.dy * math.cos(angle) - place.dx * math.sin(angle)  # pixels
    across = across - bend * half * (along**2 - 0.3 * along**3)
    width = max(2 * place.radius * _WIDTH, 0.9)
    depth = np.interp(along, np.linspace(-1, 1, 9), place.rng.uniform(0.6, 1.0, 9))
    fading = _smooth((1 - np.abs(along)) * 2.5)
    profile = _peak_at_one(np.exp(-((across / width) ** 2) * 1.5) * depth * fading)
    sign = _direction(place, profile, prefers)
    return _f32(place.pixels + sign * place.contrast * profile[..., None])


def _stain(place: _Place) -> Field:
    """A blurred blob that takes a share of the light; on what is dark, it gives light instead."""
    away = _away(place, ragged=0.4, waves=7)
    soft = max(0.35 * place.radius, 1.0)  # pixels
    patches = place.rng.uniform(0.55, 1.0, (5, 5)).astype(np.float32)
    height, width = away.shape
    thick = cv2.resize(patches, (width, height), interpolation=cv2.INTER_CUBIC)
    cover = _peak_at_one(_smooth((1 - away) * place.radius / soft + 0.5) * thick)[..., None]
    tint = np.asarray((1, 1, 1) if place.grey else place.rng.choice(_TINTS), np.float32)
    sign = _direction(place, cover[..., 0], -1)
    light = place.pixels if sign < 0 else 255 - place.pixels
    share = min(place.contrast / max(_mean_at(light * tint, cover[..., 0]), 1.0), _OPAQUE)
    left = light * np.maximum(1 - share * cover * tint, 0)
    return _f32(left if sign < 0 else 255 - left)


def _dent(place: _Place) -> Field:
    """A hollow under a lamp from one side: its near wall lies in the shade, its far wall shines."""
    away = _away(place, ragged=0.12, waves=3)
    lamp = place.rng.uniform(0, 2 * math.pi)
    towards = (place.dx * math.cos(lamp) + place.dy * math.sin(lamp)) / place.radius
    slope = towards * np.maximum(1.2 - away, 0)  # flat outside, steep inside
    return _f32(place.pixels + place.contrast * _peak_at_one(slope)[..., None])


def _missing_piece(place: _Place) -> Field:
    """A hole through which the background is seen, or darkness where there is no plain one."""
    away = _away(place, ragged=0.5, waves=7)
    soft = max(0.15 * place.radius, 1.0)  # pixels
    cover = _smooth((1 - away) * place.radius / soft + 0.5)
    behind = _behind(place, cover)
    noise = place.rng.normal(0, 2, (*cover.shape, 1 if place.grey else 3))
    gap = _mean_at(np.abs(behind - place.pixels), cover)
    share = 1.0 if place.contrast == CONTRAST["strong"] else min(place.contrast / gap, 1.0)
    return _f32(place.pixels + share * cover[..., None] * (behind + noise - place.pixels))


_DRAWING: dict[Kind, Callable[[_Place], Field]] = {
    "scratch": _scratch,
    "stain": _stain,
    "dent": _dent,
    "missing piece": _missing_piece,
}


def _behind(place: _Place, cover: Field) -> Field:
    """The colour (3,) of a hole: the background's if it shows, or else dark, or else light."""
    if place.background is not None:
        gap = _mean_at(np.abs(place.background - place.pixels), cover)
        if gap >= _SEEN_THROUGH:
            return place.background
    here = np.median(place.pixels[cover >= 0.5], axis=0)
    return _f32(0.25 * here if here.mean() >= 80 else here + 100)


def _away(place: _Place, ragged: float, waves: int) -> Field:
    """How far each pixel is from the centre of a ragged blob (h, w); its outline lies at 1."""
    bearing = np.arctan2(place.dy, place.dx)
    phases = place.rng.uniform(0, 2 * math.pi, waves)
    sizes = ragged * place.rng.uniform(0.3, 1.0, waves) / np.arange(2, waves + 2)
    outline = 1 + sum(
        size * np.cos(count * bearing + phase)
        for count, (size, phase) in enumerate(zip(sizes, phases, strict=True), 2)
    )
    return _f32(np.hypot(place.dx, place.dy) / (place.radius * outline))


def _direction(place: _Place, weight: Field, prefers: int) -> int:
    """1 for lighter, -1 for darker: as preferred, if most of the contrast has room there."""
    darker = _mean_at(np.minimum(place.pixels, place.contrast), weight)
    lighter = _mean_at(np.minimum(255 - place.pixels, place.contrast), weight)
    if (lighter if prefers > 0 else darker) >= 0.7 * place.contrast:
        return prefers
    return 1 if lighter > darker else -1


def _mean_at(values: Field, weight: Field) -> float:
    """Mean of values (h, w, 3) where a weight (h, w) is at least half."""
    return float(values[weight >= 0.5].mean())


def _smooth(x: NDArray[np.floating]) -> Field:
    """0 below 0, 1 above 1, and an S between."""
    x = np.clip(x, 0, 1)
    return _f32(x * x * (3 - 2 * x))


def _peak_at_one(values: NDArray[np.floating]) -> Field:
    """So that also the smallest defect reaches its contrast, wherever it lies between pixels."""
    return _f32(values / np.abs(values).max())


def _f32(values: NDArray[np.floating]) -> Field:
    return values.astype(np.float32)


def _is_grey(picture: Picture) -> bool:
    red, green, blue = cv2.split(picture)
    return bool((red == green).all() and (green == blue).all())


def _border(picture: NDArray[Number]) -> NDArray[Number]:
    """The pixels (n, 3) or (n,) along the edge of a picture (S, S, 3) or (S, S)."""
    width = max(1, round(_BORDER * len(picture)))
    inner = ~np.pad(np.zeros(len(picture) - 2 * width, bool), width, constant_values=True)
    edge: NDArray[Number] = picture[~np.outer(inner, inner)]
    return edge


def _background(picture: Picture) -> Field | None:
    """The border's colour (3,), None where the border has no single one."""
    border = _border(picture)
    colour = np.median(border, axis=0)
    return _f32(colour) if _strays(border, colour) <= _PLAIN else None


def _strays(border: Picture, colour: NDArray[np.floating]) -> float:
    """How far three quarters of the border's pixels (n, 3) stay within from a colour (3,)."""
    return float(np.quantile(np.abs(border - colour).mean(axis=1), 0.75))


def on_the_part(pictures: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where parts lie (S, S) in most of some normal pictures (n, S, S, 3); never all false.

    That is where they differ from the colour of their border, or are more structured than it. When
    this says nothing, the middle `CENTRAL` of the picture. Parts that lie differently in each
    picture are found more exactly in one at a time.
    """
    size = pictures.shape[1]
    middle = _middle(size)
    if not len(pictures):
        return middle
    share = np.mean([_stands_out(picture) for picture in pictures], axis=0)
    most = (share >= 0.5).astype(np.uint8)
    inside = cv2.erode(most, _disc(0.02 * size), borderValue=0).astype(bool)
    return inside if 0.01 <= inside.mean() <= 0.9 else middle


def _stands_out(picture: Picture) -> NDArray[np.bool_]:
    """Where a picture differs from its border in colour or structure (S, S)."""
    size = len(picture)
    border = _border(picture)
    colour = np.median(border, axis=0)
    blurred = cv2.GaussianBlur(picture, (0, 0), 0.006 * size).astype(np.float32)
    colours = np.abs(blurred - colour).max(axis=2) > max(15.0, 3 * _strays(border, colour))
    edges = _structure(picture)
    structured = edges > max(8.0, 3 * float(np.quantile(_border(edges), 0.9)))
    closed = cv2.morphologyEx(structured.astype(np.uint8), cv2.MORPH_CLOSE, _disc(0.015 * size))
    inside = cv2.erode(closed, _disc(0.02 * size))  # blurring made it wider than the part
    found = cv2.morphologyEx(inside | colours, cv2.MORPH_CLOSE, _disc(0.025 * size))
    return np.asarray(cv2.morphologyEx(found, cv2.MORPH_OPEN, _disc(0.01 * size)), bool)


def _structure(picture: Picture) -> Field:
    """Standard deviation of the grey levels around each pixel (S, S)."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32)
    sigma = 0.01 * len(picture)
    mean = cv2.GaussianBlur(grey, (0, 0), sigma)
    return _f32(np.sqrt(np.maximum(cv2.GaussianBlur(grey**2, (0, 0), sigma) - mean**2, 0)))


def _disc(radius: float) -> NDArray[np.uint8]:
    side = 2 * round(radius) + 1
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)), np.uint8)


def _middle(size: int) -> NDArray[np.bool_]:
    """True in the middle `CENTRAL` of a picture (S, S)."""
    margin = round((1 - CENTRAL) / 2 * size)
    middle = np.zeros((size, size), bool)
    middle[margin : size - margin, margin : size - margin] = True
    return middle
