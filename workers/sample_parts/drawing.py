"""Pictures of a machined bracket on a conveyor belt, with and without defects, and their masks.

The demo, the documentation and the tests inspect this part, so that none of them needs a download.

    python -m workers.sample_parts --out data --sheet sheet.png

A picture is made the way a camera makes it: heights give slopes, slopes and a lamp give reflected
light, the part casts a shadow on the belt, a lens and a sensor record it. Lengths are fractions
of the picture's width unless a name ends in `_px`; angles are radians; x and u point right, y and
v down. A seed gives the same pixels every time with the same numpy, OpenCV and processor.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from engines.errors import EXIT_CODE, BadRequest, KensaError
from engines.files import write_atomically

Field = npt.NDArray[np.float32]  # (size, size), or (size, size, 3) for light and colour
Curve = npt.NDArray[np.float64]  # (points,)
Pixels = npt.NDArray[np.uint8]  # (size, size, 3) RGB, or (size, size) for a mask

CATEGORY = "sample_bracket"
SMALLEST_PX, LARGEST_PX = 64, 4096
MOST_PICTURES = 100_000  # of one group: its share of the seeds

# the bracket
HALF_WIDTH, HALF_HEIGHT, CORNER_RADIUS = 0.395, 0.300, 0.055
CHAMFER = 0.010
BOSS_RADIUS, BORE_RADIUS = 0.180, 0.098
HOLE_RADIUS, SINK_RADIUS = 0.031, 0.049  # the hole, and its countersink at the surface
HOLES = ((-0.315, -0.220), (0.315, -0.220), (-0.315, 0.220), (0.315, 0.220))
SLOTS, SLOT_RADIUS, SLOT_REACH = ((-0.290, 0.0), (0.290, 0.0)), 0.019, 0.052  # along v
PART_NUMBER = "KB-2046 A"
THICKNESS = 0.045  # of the plate: how far its shadow falls

STEEL = np.array([0.985, 1.0, 1.02], np.float32)  # reflectance of red, green, blue
RUBBER = np.array([0.125, 0.150, 0.142], np.float32)
RUST = np.array([0.76, 0.32, 0.09], np.float32)  # what a film of rust leaves of the light

VISIBLE = 3.0  # grey levels: a smaller change drowns in the sensor's noise
HARD_CONTRAST = {"scratch": (18.0, 28.0), "dent": (30.0, 40.0)}  # grey levels, least and most
HARD_DEFECTS: tuple[str, ...] = tuple(HARD_CONTRAST)


@dataclass(frozen=True)
class _Scene:
    """What differs from picture to picture although the part is good."""

    seed: int
    size: int
    angle: float
    shift: tuple[float, float]
    lamp: tuple[float, float, float]  # where it hangs: x, y, height above the part
    exposure: float  # 1 is nominal
    warmth: float  # of the lamp, -1 cold to 1 warm
    brush: float  # strength of the brushed texture, 1 is nominal
    turning: float  # from one turning mark to the next
    pitch: float  # from one thread of the belt to the next


@dataclass(frozen=True)
class _Flaw:
    """What a defect changes. The default changes nothing."""

    holes: tuple[tuple[float, float], ...] = HOLES
    growth: Field | float = 0.0  # how far the outline moves outward
    height: Field | float = 0.0  # added to the surface
    tint: Field | float = 1.0  # multiplies the light that the metal reflects


@dataclass(frozen=True)
class _Part:
    """The bracket's geometry, each (size, size)."""

    u: Field  # the part's own coordinates, from the axis of the bore
    v: Field
    radius: Field  # from the axis of the bore
    height: Field
    cover: Field  # 0 belt, 1 metal
    shadow: Field  # 0 lit, 1 in the part's shadow


def draw_part(seed: int, defect: str | None = None, size: int = 512) -> tuple[Pixels, Pixels]:
    """Draw one part; the same seed with and without a defect is the same part under the same light.

    Returns the picture, uint8 RGB (size, size, 3), and the mask, uint8 (size, size): 255 where the
    defect changes what the camera sees, 0 elsewhere, where the pixels are those of the part without
    the defect. Raises BadRequest for a defect not in DEFECTS, a size outside SMALLEST_PX to
    LARGEST_PX, or a negative seed.
    """
    _check(seed, defect, size)
    scene = _scene(seed, size)
    levels = _expose(scene, _Flaw())
    mask = np.zeros((size, size), np.uint8)
    if defect is not None:
        rng = np.random.default_rng([seed, 2, DEFECTS.index(defect)])
        change = _expose(scene, _FLAWS[defect](scene, rng)) - levels
        if defect in HARD_CONTRAST:
            change *= rng.uniform(*HARD_CONTRAST[defect]) / _contrast(change)
        mask = _visible(change)
        levels += change * (mask[..., None] > 0)
    return _sense(scene, levels), mask


def _check(seed: int, defect: str | None, size: int) -> None:
    if defect is not None and defect not in DEFECTS:
        raise BadRequest(f"No defect is called {defect!r}: choose from {', '.join(DEFECTS)}.")
    if not SMALLEST_PX <= size <= LARGEST_PX:
        raise BadRequest(f"A size of {size} px is not between {SMALLEST_PX} and {LARGEST_PX} px.")
    if seed < 0:
        raise BadRequest(f"A seed is zero or more, not {seed}.")


def _contrast(change: Field) -> float:
    """The strongest change of brightness, in grey levels, but for the 2 % of pixels above it."""
    grey = np.abs(change.mean(axis=2))
    return float(np.percentile(grey[grey > 0.1 * grey.max()], 98))


def _visible(change: Field) -> Pixels:
    """255 where any channel changes by VISIBLE grey levels, and in the gaps between such places."""
    seen = (np.abs(change).max(axis=2) >= VISIBLE).astype(np.uint8) * 255
    reach = max(3, round(len(seen) * 0.012) | 1)  # px, odd: closes the dark line across a dent
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach))
    return _u8(cv2.morphologyEx(seen, cv2.MORPH_CLOSE, disc))


# ---- the scene -----------------------------------------------------------------------------------


def _scene(seed: int, size: int) -> _Scene:
    rng = np.random.default_rng([seed, 0])
    azimuth, distance = np.radians(rng.uniform(-122.0, -100.0)), rng.uniform(1.20, 1.45)
    lamp = (distance * np.cos(azimuth), distance * np.sin(azimuth), rng.uniform(1.75, 1.95))
    return _Scene(
        seed=seed,
        size=size,
        angle=float(np.radians(rng.uniform(-3.0, 3.0))),
        shift=(float(rng.uniform(-0.018, 0.018)), float(rng.uniform(-0.018, 0.018))),
        lamp=(float(lamp[0]), float(lamp[1]), float(lamp[2])),
        exposure=float(rng.uniform(0.93, 1.07)),
        warmth=float(rng.uniform(-1.0, 1.0)),
        brush=float(rng.uniform(0.8, 1.15)),
        turning=float(rng.uniform(0.0075, 0.0105)),
        pitch=float(rng.uniform(0.0125, 0.0150)),
    )


def _texture(scene: _Scene, number: int) -> np.random.Generator:
    """A random stream for one texture alone, so that no defect moves another texture."""
    return np.random.default_rng([scene.seed, 1, number])


def _part(scene: _Scene, flaw: _Flaw) -> _Part:
    u, v = _coordinates(scene)
    radius = _f32(np.hypot(u, v))
    plate = np.maximum(_outside_plate(u, v), BORE_RADIUS - radius)
    height = 0.40 * CHAMFER * _ramp(-_outside_plate(u, v), 0.0, CHAMFER)
    height += 0.006 * _ramp(-radius, -BOSS_RADIUS, -BOSS_RADIUS + 0.012)
    height += 0.0045 * _ramp(radius, BORE_RADIUS - 0.002, BORE_RADIUS + 0.009)
    solid = plate - flaw.growth
    for hole_u, hole_v in flaw.holes:
        away = _f32(np.hypot(u - hole_u, v - hole_v))
        solid = np.maximum(solid, HOLE_RADIUS - away)
        height -= 0.0085 * (1.0 - _ramp(away, HOLE_RADIUS, SINK_RADIUS))
    for slot_u, slot_v in SLOTS:
        beyond = np.maximum(np.abs(v - slot_v) - SLOT_REACH, 0.0)
        away = _f32(np.hypot(u - slot_u, beyond))
        solid = np.maximum(solid, SLOT_RADIUS - away)
        height -= 0.003 * (1.0 - _ramp(away, SLOT_RADIUS, SLOT_RADIUS + 0.007))
    cover = _f32(np.clip(0.5 - solid * scene.size, 0.0, 1.0))
    shadow = _shadow(scene, _f32(plate < 0.0))
    return _Part(u, v, radius, _f32(height + flaw.height), cover, shadow)


def _coordinates(scene: _Scene) -> tuple[Field, Field]:
    """The part's own coordinates (u, v) at the centre of every pixel."""
    x, y = _grid(scene)
    x, y = x - scene.shift[0], y - scene.shift[1]
    cos, sin = np.cos(scene.angle), np.sin(scene.angle)
    return _f32(x * cos + y * sin), _f32(y * cos - x * sin)


def _grid(scene: _Scene) -> tuple[Field, Field]:
    """x as (1, size) and y as (size, 1), both zero in the middle of the picture."""
    line = (np.arange(scene.size, dtype=np.float32) + 0.5) / scene.size - 0.5
    return _f32(line[None, :]), _f32(line[:, None])


def _outside_plate(u: Field, v: Field) -> Field:
    """Signed distance to the plate's outline, negative on the plate."""
    du = np.abs(u) - (HALF_WIDTH - CORNER_RADIUS)
    dv = np.abs(v) - (HALF_HEIGHT - CORNER_RADIUS)
    beyond = np.hypot(np.maximum(du, 0.0), np.maximum(dv, 0.0))
    return _f32(beyond + np.minimum(np.maximum(du, dv), 0.0) - CORNER_RADIUS)


def _shadow(scene: _Scene, plate: Field) -> Field:
    """Where the plate keeps the lamp's light from the belt, with a soft border."""
    fall_px = [-THICKNESS * across / scene.lamp[2] * scene.size for across in scene.lamp[:2]]
    move = np.array([[1, 0, fall_px[0]], [0, 1, fall_px[1]]], np.float32)
    cast = cv2.warpAffine(plate, move, (scene.size, scene.size))
    near = cv2.blur(plate, _odd(0.05 * scene.size), borderType=cv2.BORDER_REPLICATE)
    return _f32(0.75 * _soften(cast, 0.007 * scene.size) + 0.25 * near)


# ---- the light -----------------------------------------------------------------------------------


def _expose(scene: _Scene, flaw: _Flaw) -> Field:
    """What falls on the sensor, (size, size, 3) in grey levels 0 to 255, before its noise."""
    part = _part(scene, flaw)
    belt = _belt(scene)[..., None] * RUBBER * (1.0 - 0.80 * part.shadow)[..., None]
    metal = _metal(scene, part)[..., None] * STEEL * flaw.tint
    light = belt + part.cover[..., None] * (metal - belt)
    lamp = 1.0 + scene.warmth * np.array([0.025, 0.0, -0.035], np.float32)
    light = _soften(_f32(light * lamp), max(0.45, 0.0013 * scene.size))
    x, y = _grid(scene)
    vignette = scene.exposure * (1.0 - 0.55 * (x * x + y * y))
    return _f32(255.0 * (1.0 - np.exp(-1.35 * light * vignette[..., None])))


def _belt(scene: _Scene) -> Field:
    """Light from a woven rubber belt, 1 on average."""
    x, y = _grid(scene)
    rng = _texture(scene, 0)
    pitch = max(scene.pitch, 3.0 / scene.size)
    drift = 0.10 * _clouds(rng, scene.size, 24)
    across = np.pi * (x / pitch + rng.uniform(0.0, 2.0) + drift)
    along = np.pi * (y / pitch + rng.uniform(0.0, 2.0) + drift)
    warp_on_top = np.sin(across) * np.sin(along) > 0.0
    thread = np.where(warp_on_top, np.abs(np.sin(across)), np.abs(np.sin(along)) * 0.85)
    dirt = 1.0 + 0.13 * _clouds(rng, scene.size, 9) + 0.10 * _clouds(rng, scene.size, 90)
    fibre = 0.10 * rng.standard_normal((scene.size, scene.size), dtype=np.float32)
    return _f32((0.55 + 0.75 * thread + fibre) * dirt)


def _metal(scene: _Scene, part: _Part) -> Field:
    """Light from the metal, (size, size): a diffuse part and a highlight that follows the grooves.

    The highlight is Ward's anisotropic lobe ("Measuring and modeling anisotropic reflection", 1992)
    without its normalisation.
    """
    boss = _ramp(-part.radius, -BOSS_RADIUS, -BOSS_RADIUS + 0.004)
    grain = _brushed(scene) * (1.0 - boss) + _turned(scene, part.radius) * boss
    groove_x, groove_y = _grooves(scene, part, boss)
    slope_x, slope_y = _slopes(part.height)
    slope_x, slope_y = slope_x - 0.055 * grain * groove_y, slope_y + 0.055 * grain * groove_x
    x, y = _grid(scene)
    to_x, to_y, to_z = scene.lamp[0] - x, scene.lamp[1] - y, np.float32(scene.lamp[2])
    far = np.sqrt(to_x**2 + to_y**2 + to_z**2)
    steep = np.sqrt(1.0 + slope_x**2 + slope_y**2)
    diffuse = np.maximum(to_z - slope_x * to_x - slope_y * to_y, 0.0) / (far * steep)
    half_x, half_y, half_z = to_x / far, to_y / far, to_z / far + 1.0
    tilt_x, tilt_y = half_x / half_z + slope_x, half_y / half_z + slope_y
    with_groove = (tilt_x * groove_x + tilt_y * groove_y) / 0.22
    over_groove = (tilt_y * groove_x - tilt_x * groove_y) / 0.40
    highlight = np.exp(-(with_groove**2) - over_groove**2)
    sheen = np.exp(-(tilt_x**2 + tilt_y**2) / 0.30**2)
    light = 0.08 + 0.22 * diffuse + 0.22 * sheen + highlight
    return _f32(light * (1.0 + 0.05 * grain) * _etched(scene))


def _grooves(scene: _Scene, part: _Part, boss: Field) -> tuple[Field, Field]:
    """The direction of the tool marks as unit vectors: straight on the plate, round on the boss."""
    cos, sin = np.cos(scene.angle), np.sin(scene.angle)
    along_u = np.where(boss > 0.5, -part.v / part.radius, 1.0)
    along_v = np.where(boss > 0.5, part.u / part.radius, 0.0)
    return _f32(along_u * cos - along_v * sin), _f32(along_u * sin + along_v * cos)


def _brushed(scene: _Scene) -> Field:
    """Streaks along the plate, of about unit strength times `scene.brush`."""
    rng = _texture(scene, 1)
    fine = rng.standard_normal((scene.size, scene.size), dtype=np.float32)
    long_px, short_px = _odd(0.16 * scene.size)[0], _odd(0.04 * scene.size)[0]
    streaks = cv2.blur(fine, (long_px, 1)) * long_px**0.5
    streaks += 0.7 * cv2.blur(fine, (short_px, 1)) * short_px**0.5
    whole = (scene.size, scene.size)
    laid = cv2.warpAffine(streaks, _to_picture(scene), whole, borderMode=cv2.BORDER_REFLECT)
    return _f32(scene.brush * 0.8 * laid * (1.0 + 0.2 * _clouds(rng, scene.size, 5)))


def _turned(scene: _Scene, radius: Field) -> Field:
    """Turning marks round the axis, of about unit strength."""
    rng = _texture(scene, 2)
    step = max(scene.turning, 3.0 / scene.size)
    uneven = rng.standard_normal(scene.size, dtype=np.float32)  # one value per pixel of radius
    random_part = uneven[np.minimum((radius * scene.size).astype(np.intp), scene.size - 1)]
    return _f32(0.8 * np.sin(2.0 * np.pi * radius / step) + 0.8 * random_part)


def _etched(scene: _Scene) -> Field:
    """The part number, as a factor of the light that the plate reflects."""
    canvas = np.zeros((scene.size, scene.size), np.uint8)
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, 0.0012 * scene.size
    width_px = max(1, round(0.0035 * scene.size))
    (text_px, _), _ = cv2.getTextSize(PART_NUMBER, font, scale, width_px)
    corner = ((scene.size - text_px) // 2, round(0.765 * scene.size))
    cv2.putText(canvas, PART_NUMBER, corner, font, scale, 255, width_px, cv2.LINE_AA)
    ink = cv2.warpAffine(canvas, _to_picture(scene), (scene.size, scene.size))
    return _f32(1.0 - 0.38 / 255.0 * ink.astype(np.float32))


def _to_picture(scene: _Scene) -> Field:
    """The (2, 3) matrix that lays a canvas drawn for an unturned part over the picture."""
    cos, sin, middle = np.cos(scene.angle), np.sin(scene.angle), scene.size / 2.0
    move_x = middle * (1.0 - cos + sin) + scene.shift[0] * scene.size
    move_y = middle * (1.0 - cos - sin) + scene.shift[1] * scene.size
    return np.array([[cos, -sin, move_x], [sin, cos, move_y]], np.float32)


def _pixel(scene: _Scene, u: Curve, v: Curve) -> tuple[Curve, Curve]:
    """Part coordinates as (x, y) in px; the centre of the first pixel is 0."""
    cos, sin = np.cos(scene.angle), np.sin(scene.angle)
    x = u * cos - v * sin + scene.shift[0]
    y = u * sin + v * cos + scene.shift[1]
    return (x + 0.5) * scene.size - 0.5, (y + 0.5) * scene.size - 0.5


def _slopes(height: Field) -> tuple[Field, Field]:
    scale = len(height) / 8.0  # Sobel's weights add up to 8
    return (
        _f32(cv2.Sobel(height, cv2.CV_32F, 1, 0, ksize=3, scale=scale)),
        _f32(cv2.Sobel(height, cv2.CV_32F, 0, 1, ksize=3, scale=scale)),
    )


def _sense(scene: _Scene, levels: Field) -> Pixels:
    """Add the sensor's shot and read noise, and round to uint8."""
    noise = _texture(scene, 3).standard_normal(levels.shape, dtype=np.float32)
    return _u8(np.clip(np.rint(levels + noise * np.sqrt(0.9 + 0.014 * levels)), 0, 255))


# ---- the defects ---------------------------------------------------------------------------------


def _scratch(scene: _Scene, rng: np.random.Generator) -> _Flaw:
    """A thin curved line, bright where the tool cut and dark beside it, fading towards its ends."""
    middle, length = _flat_spot(rng, 0.010), rng.uniform(0.16, 0.30)
    course, bend = rng.uniform(0.15 * np.pi, 0.85 * np.pi), rng.normal(0.0, 0.8)
    t = np.linspace(-0.5, 0.5, 40)
    headings = course + bend * t
    u = length * np.cumsum(np.cos(headings)) / len(t)
    v = length * np.cumsum(np.sin(headings)) / len(t)
    u, v = u - u.mean() + middle[0], v - v.mean() + middle[1]
    depth = np.sqrt(np.maximum(np.cos(np.pi * t), 0.0)) * rng.uniform(0.6, 1.0, len(t))
    bright = _line(scene, u, v, depth)
    dark = _line(scene, u + 1.5 / 512, v + 1.5 / 512, depth)
    return _Flaw(tint=_f32(1.0 + 0.30 * bright - 0.15 * dark)[..., None])


def _line(scene: _Scene, u: Curve, v: Curve, depth: Curve) -> Field:
    """A line through part coordinates, one `depth` per point, (size, size) from 0 to 1."""
    canvas = np.zeros((scene.size, scene.size), np.uint8)
    width_px = max(1, round(scene.size / 400))
    points = (np.stack(_pixel(scene, u, v), axis=-1) * 16).round().astype(np.int32)  # 1/16 px
    for here, there, strength in zip(points[:-1], points[1:], depth, strict=False):
        cv2.line(canvas, here, there, 255.0 * strength, width_px, cv2.LINE_AA, shift=4)
    return _f32(canvas / 255.0)


def _dent(scene: _Scene, rng: np.random.Generator) -> _Flaw:
    """A shallow bowl, as from a blow with something round."""
    (at_u, at_v), turn = _flat_spot(rng, 0.030), rng.uniform(0.0, np.pi)
    wide, narrow = rng.uniform(0.034, 0.044), rng.uniform(0.026, 0.034)
    u, v = _coordinates(scene)
    u, v = u - at_u, v - at_v
    along = (u * np.cos(turn) + v * np.sin(turn)) / wide
    beside = (v * np.cos(turn) - u * np.sin(turn)) / narrow
    return _Flaw(height=_f32(-0.0015 * np.maximum(1.0 - along**2 - beside**2, 0.0) ** 1.5))


def _stain(scene: _Scene, rng: np.random.Generator) -> _Flaw:
    """Rust: brown, with a ragged outline and a darker rim."""
    at_u, at_v = _flat_spot(rng, 0.052)
    reach = rng.uniform(0.066, 0.084)
    u, v = _coordinates(scene)
    ragged = 0.16 * _clouds(rng, scene.size, 16) + 0.07 * _clouds(rng, scene.size, 50)
    depth = _f32(1.0 - np.hypot(u - at_u, v - at_v) / reach + ragged)
    film = _ramp(depth, 0.0, 0.12) * (0.75 + 0.25 * (1.0 - _ramp(depth, 0.08, 0.35)))
    return _Flaw(tint=_f32(1.0 - film[..., None] * (1.0 - RUST)))


def _missing_hole(scene: _Scene, rng: np.random.Generator) -> _Flaw:
    """One of the four holes was never drilled: the brushed plate goes on."""
    forgotten = int(rng.integers(len(HOLES)))
    return _Flaw(holes=HOLES[:forgotten] + HOLES[forgotten + 1 :])


def _burr(scene: _Scene, rng: np.random.Generator) -> _Flaw:
    """Jagged metal that the cutter left hanging from one straight edge."""
    u, v = _coordinates(scene)
    side, length = int(rng.integers(4)), rng.uniform(0.12, 0.18)
    upright = side < 2
    outward, along = (u, v) if upright else (v, u)
    edge, room = (HALF_WIDTH, HALF_HEIGHT) if upright else (HALF_HEIGHT, HALF_WIDTH)
    outward = outward if side % 2 else -outward
    middle = rng.uniform(-1.0, 1.0) * (room - CORNER_RADIUS - length / 2.0)
    teeth = np.concatenate([[0.0], rng.uniform(0.3, 1.0, 12), [0.0]])
    places = middle + np.linspace(-length / 2.0, length / 2.0, len(teeth))
    reach = _f32(np.interp(along, places, teeth)) * np.float32(rng.uniform(0.030, 0.042))
    crumpled = 1.0 + 0.5 * _clouds(rng, scene.size, 60)
    rolled = 0.30 * reach * _ramp(outward, edge - 0.016, edge + 0.012) * crumpled
    return _Flaw(growth=_f32(np.where(outward > edge - 0.03, reach, 0.0)), height=_f32(rolled))


def _flat_spot(rng: np.random.Generator, margin: float) -> tuple[float, float]:
    """A random place on the flat of the plate, `margin` or more from every hole and edge."""
    while True:
        u = rng.uniform(margin - HALF_WIDTH, HALF_WIDTH - margin)
        v = rng.uniform(margin - HALF_HEIGHT, HALF_HEIGHT - margin)
        rooms = [np.hypot(u - hole_u, v - hole_v) - SINK_RADIUS for hole_u, hole_v in HOLES]
        beyond = max(abs(v) - SLOT_REACH, 0.0)
        rooms += [np.hypot(u - slot_u, beyond) - SLOT_RADIUS for slot_u, _ in SLOTS]
        rooms += [np.hypot(u, v) - BOSS_RADIUS, -_outside_plate(_f32(u), _f32(v)) - CHAMFER]
        if min(rooms) > margin:
            return float(u), float(v)


_FLAWS: dict[str, Callable[[_Scene, np.random.Generator], _Flaw]] = {
    "scratch": _scratch,
    "dent": _dent,
    "stain": _stain,
    "missing_hole": _missing_hole,
    "burr": _burr,
}
DEFECTS: tuple[str, ...] = tuple(_FLAWS)


# ---- files and the command -----------------------------------------------------------------------


def write_dataset(
    root: Path,
    category: str = CATEGORY,
    train: int = 24,
    normal: int = 8,
    per_kind: int = 4,
    size: int = 512,
    seed: int = 0,
) -> Path:
    """Write PNG files in the layout that retrain reads, masks beside them, and return `root`.

    `<root>/train/<category>/NNNN.png` and `<root>/test/<category>/normal/NNNN.png` show good parts,
    `<root>/test/<category>/anomaly/<kind>_NN.png` bad ones, `<root>/masks/<category>/<kind>_NN.png`
    where. Every picture has a seed of its own: a higher count adds pictures and changes none. A
    file of the same name is replaced, other files stay. Raises BadRequest for counts, sizes, seeds
    or names that cannot be, OSError where a file cannot be written.
    """
    for picture in _plan(Path(root), category, (train, normal, per_kind), seed):
        image, mask = draw_part(picture.seed, picture.defect, size)
        _write_png(picture.path, image)
        if picture.mask_path is not None:
            _write_png(picture.mask_path, mask)
    return Path(root)


@dataclass(frozen=True)
class _Planned:
    """One picture to be drawn."""

    seed: int
    defect: str | None
    path: Path
    mask_path: Path | None


def _plan(root: Path, category: str, counts: tuple[int, int, int], seed: int) -> Iterator[_Planned]:
    train, normal, per_kind = counts
    if Path(category).name != category or category in ("", ".."):
        raise BadRequest(f"A category is the name of one folder, not {category!r}.")
    if min(counts) < 0 or max(counts) > MOST_PICTURES:
        raise BadRequest(f"A count is from 0 to {MOST_PICTURES}, not {counts}.")
    test, first = root / "test" / category, seed * (2 + len(DEFECTS)) * MOST_PICTURES
    for n in range(train):
        yield _Planned(first + n, None, root / "train" / category / f"{n:04d}.png", None)
    for n in range(normal):
        path = test / "normal" / f"{n:04d}.png"
        yield _Planned(first + MOST_PICTURES + n, None, path, None)
    for group, kind in enumerate(DEFECTS, start=2):
        for n in range(per_kind):
            name = f"{kind}_{n:02d}.png"
            path, mask_path = test / "anomaly" / name, root / "masks" / category / name
            yield _Planned(first + group * MOST_PICTURES + n, kind, path, mask_path)


def _write_png(path: Path, pixels: Pixels) -> None:
    """Write RGB or grey pixels to `path`, whose folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _, png = cv2.imencode(".png", pixels[..., ::-1] if pixels.ndim == 3 else pixels)
    write_atomically(path, png.tobytes())


def draw_sheet(seed: int = 0, size: int = 512, columns: int = 4) -> Pixels:
    """A contact sheet: a row of normals, then per defect kind a row, its mask outlined in red.

    Returns uint8 RGB (rows * (size + 28), columns * size, 3).
    """
    rows = []
    for kind in (None, *DEFECTS):
        cells = [_framed(*draw_part(seed + n, kind, size)) for n in range(columns)]
        label = np.full((28, columns * size, 3), 255, np.uint8)
        words = "normal" if kind is None else kind + " (hard)" * (kind in HARD_DEFECTS)
        cv2.putText(label, words, (8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
        rows += [label, np.hstack(cells)]
    return _u8(np.vstack(rows))


def _framed(image: Pixels, mask: Pixels) -> Pixels:
    """The picture with a thin red box round what the mask covers."""
    framed: Pixels = image.copy()
    if mask.any():
        x, y, width, height = cv2.boundingRect(mask)
        cv2.rectangle(framed, (x - 6, y - 6), (x + width + 5, y + height + 5), (220, 40, 40), 1)
    return framed


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m workers.sample_parts",
        description="Draw pictures of a machined bracket, good and defective, with masks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--category", default=CATEGORY, help="<dataset>_<class>")
    parser.add_argument("--train", type=int, default=24, help="normal pictures to learn from")
    parser.add_argument("--normal", type=int, default=8, help="normal pictures to test with")
    parser.add_argument("--per-kind", type=int, default=4, help="pictures of each defect")
    parser.add_argument("--size", type=int, default=512, help="width and height, px")
    parser.add_argument("--seed", type=int, default=0, help="other parts for another seed")
    parser.add_argument("--sheet", type=Path, help="also draw a contact sheet to this PNG file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _arguments(argv)
    began = time.monotonic()
    try:
        write_dataset(
            args.out, args.category, args.train, args.normal, args.per_kind, args.size, args.seed
        )
        if args.sheet is not None:
            _write_png(args.sheet, draw_sheet(args.seed, args.size))
    except KensaError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    except OSError as error:
        print(f"error: cannot write the pictures: {error}", file=sys.stderr)
        return EXIT_CODE
    print(_summary(args, time.monotonic() - began))
    return 0


def _summary(args: argparse.Namespace, took_s: float) -> str:
    defective = args.per_kind * len(DEFECTS)
    return (
        f"{args.out}: {args.train} pictures to learn from, {args.normal} normal and {defective} "
        f"defective ones to test with ({args.size} px, category {args.category}, {took_s:.1f} s)"
    )


# ---- small helpers -------------------------------------------------------------------------------


def _f32(values: Any) -> Field:
    return np.asarray(values, dtype=np.float32)


def _u8(values: Any) -> Pixels:
    return np.asarray(values, dtype=np.uint8)


def _odd(length_px: float) -> tuple[int, int]:
    """The nearest odd kernel size, both ways."""
    return (int(length_px) | 1, int(length_px) | 1)


def _ramp(values: Any, low: float, high: float) -> Field:
    """0 up to `low`, 1 from `high`, smooth between."""
    t = np.clip((values - low) / (high - low), 0.0, 1.0)
    return _f32(t * t * (3.0 - 2.0 * t))


def _soften(values: Field, sigma_px: float) -> Field:
    return _f32(cv2.GaussianBlur(values, (0, 0), sigma_px))


def _clouds(rng: np.random.Generator, size: int, cells: int) -> Field:
    """Smooth noise of about unit strength, (size, size), with `cells` bumps across the picture."""
    grid = rng.standard_normal((cells, cells), dtype=np.float32)
    return _f32(cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC))
