"""The bracket that is inspected: its geometry, and how it lies under the lamp in one picture.

Lengths are fractions of the picture's width unless a name ends in `_px`; angles are radians; x and
u point right, y and v down.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from workers.sample_parts.fields import Curve, Field, f32, odd_kernel, ramp, soften

HALF_WIDTH, HALF_HEIGHT, CORNER_RADIUS = 0.395, 0.300, 0.055
CHAMFER = 0.010
BOSS_RADIUS, BORE_RADIUS = 0.180, 0.098
HOLE_RADIUS, SINK_RADIUS = 0.031, 0.049  # the hole, and its countersink at the surface
HOLES = ((-0.315, -0.220), (0.315, -0.220), (-0.315, 0.220), (0.315, 0.220))
SLOTS, SLOT_RADIUS, SLOT_REACH = ((-0.290, 0.0), (0.290, 0.0)), 0.019, 0.052  # along v
THICKNESS = 0.045  # of the plate: how far its shadow falls


@dataclass(frozen=True)
class Scene:
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
class Flaw:
    """What a defect changes. The default changes nothing."""

    holes: tuple[tuple[float, float], ...] = HOLES
    growth: Field | float = 0.0  # how far the outline moves outward
    height: Field | float = 0.0  # added to the surface
    tint: Field | float = 1.0  # multiplies the light that the metal reflects


@dataclass(frozen=True)
class Part:
    """The bracket's geometry, each (size, size)."""

    u: Field  # the part's own coordinates, from the axis of the bore
    v: Field
    radius: Field  # from the axis of the bore
    height: Field
    cover: Field  # 0 belt, 1 metal
    shadow: Field  # 0 lit, 1 in the part's shadow


def new_scene(seed: int, size: int) -> Scene:
    """The scene that a seed makes."""
    rng = np.random.default_rng([seed, 0])
    azimuth, distance = np.radians(rng.uniform(-122.0, -100.0)), rng.uniform(1.20, 1.45)
    lamp = (distance * np.cos(azimuth), distance * np.sin(azimuth), rng.uniform(1.75, 1.95))
    return Scene(
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


def texture(scene: Scene, number: int) -> np.random.Generator:
    """A random stream for one texture alone, so that no defect moves another texture."""
    return np.random.default_rng([scene.seed, 1, number])


def make_part(scene: Scene, flaw: Flaw) -> Part:
    """The bracket as it lies in a scene, with what a flaw changes of its outline and surface."""
    u, v = coordinates(scene)
    radius = f32(np.hypot(u, v))
    plate = np.maximum(outside_plate(u, v), BORE_RADIUS - radius)
    height = 0.40 * CHAMFER * ramp(-outside_plate(u, v), 0.0, CHAMFER)
    height += 0.006 * ramp(-radius, -BOSS_RADIUS, -BOSS_RADIUS + 0.012)
    height += 0.0045 * ramp(radius, BORE_RADIUS - 0.002, BORE_RADIUS + 0.009)
    solid = plate - flaw.growth
    for hole_u, hole_v in flaw.holes:
        away = f32(np.hypot(u - hole_u, v - hole_v))
        solid = np.maximum(solid, HOLE_RADIUS - away)
        height -= 0.0085 * (1.0 - ramp(away, HOLE_RADIUS, SINK_RADIUS))
    for slot_u, slot_v in SLOTS:
        beyond = np.maximum(np.abs(v - slot_v) - SLOT_REACH, 0.0)
        away = f32(np.hypot(u - slot_u, beyond))
        solid = np.maximum(solid, SLOT_RADIUS - away)
        height -= 0.003 * (1.0 - ramp(away, SLOT_RADIUS, SLOT_RADIUS + 0.007))
    cover = f32(np.clip(0.5 - solid * scene.size, 0.0, 1.0))
    shadow = _shadow(scene, f32(plate < 0.0))
    return Part(u, v, radius, f32(height + flaw.height), cover, shadow)


def coordinates(scene: Scene) -> tuple[Field, Field]:
    """The part's own coordinates (u, v) at the centre of every pixel."""
    x, y = grid(scene)
    x, y = x - scene.shift[0], y - scene.shift[1]
    cos, sin = np.cos(scene.angle), np.sin(scene.angle)
    return f32(x * cos + y * sin), f32(y * cos - x * sin)


def grid(scene: Scene) -> tuple[Field, Field]:
    """x as (1, size) and y as (size, 1), both zero in the middle of the picture."""
    line = (np.arange(scene.size, dtype=np.float32) + 0.5) / scene.size - 0.5
    return f32(line[None, :]), f32(line[:, None])


def outside_plate(u: Field, v: Field) -> Field:
    """Signed distance to the plate's outline, negative on the plate."""
    du = np.abs(u) - (HALF_WIDTH - CORNER_RADIUS)
    dv = np.abs(v) - (HALF_HEIGHT - CORNER_RADIUS)
    beyond = np.hypot(np.maximum(du, 0.0), np.maximum(dv, 0.0))
    return f32(beyond + np.minimum(np.maximum(du, dv), 0.0) - CORNER_RADIUS)


def _shadow(scene: Scene, plate: Field) -> Field:
    """Where the plate keeps the lamp's light from the belt, with a soft border."""
    fall_px = [-THICKNESS * across / scene.lamp[2] * scene.size for across in scene.lamp[:2]]
    move = np.array([[1, 0, fall_px[0]], [0, 1, fall_px[1]]], np.float32)
    cast = cv2.warpAffine(plate, move, (scene.size, scene.size))
    near = cv2.blur(plate, odd_kernel(0.05 * scene.size), borderType=cv2.BORDER_REPLICATE)
    return f32(0.75 * soften(cast, 0.007 * scene.size) + 0.25 * near)


def to_picture(scene: Scene) -> Field:
    """The (2, 3) matrix that lays a canvas drawn for an unturned part over the picture."""
    cos, sin, middle = np.cos(scene.angle), np.sin(scene.angle), scene.size / 2.0
    move_x = middle * (1.0 - cos + sin) + scene.shift[0] * scene.size
    move_y = middle * (1.0 - cos - sin) + scene.shift[1] * scene.size
    return np.array([[cos, -sin, move_x], [sin, cos, move_y]], np.float32)


def to_pixels(scene: Scene, u: Curve, v: Curve) -> tuple[Curve, Curve]:
    """Part coordinates as (x, y) in px; the centre of the first pixel is 0."""
    cos, sin = np.cos(scene.angle), np.sin(scene.angle)
    x = u * cos - v * sin + scene.shift[0]
    y = u * sin + v * cos + scene.shift[1]
    return (x + 0.5) * scene.size - 0.5, (y + 0.5) * scene.size - 0.5
