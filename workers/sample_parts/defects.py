"""The defects that a bracket may have: what each changes of its outline, surface or colour."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from workers.sample_parts.bracket import (
    BOSS_RADIUS,
    CHAMFER,
    CORNER_RADIUS,
    HALF_HEIGHT,
    HALF_WIDTH,
    HOLES,
    SINK_RADIUS,
    SLOT_RADIUS,
    SLOT_REACH,
    SLOTS,
    Flaw,
    Scene,
    coordinates,
    outside_plate,
    to_pixels,
)
from workers.sample_parts.fields import Curve, Field, clouds, f32, ramp

RUST = np.array([0.76, 0.32, 0.09], np.float32)  # what a film of rust leaves of the light
HARD_CONTRAST = {"scratch": (18.0, 28.0), "dent": (30.0, 40.0)}  # grey levels, least and most
HARD_DEFECTS: tuple[str, ...] = tuple(HARD_CONTRAST)


def _scratch(scene: Scene, rng: np.random.Generator) -> Flaw:
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
    return Flaw(tint=f32(1.0 + 0.30 * bright - 0.15 * dark)[..., None])


def _line(scene: Scene, u: Curve, v: Curve, depth: Curve) -> Field:
    """A line through part coordinates, one `depth` per point, (size, size) from 0 to 1."""
    canvas = np.zeros((scene.size, scene.size), np.uint8)
    width_px = max(1, round(scene.size / 400))
    points = (np.stack(to_pixels(scene, u, v), axis=-1) * 16).round().astype(np.int32)  # 1/16 px
    for here, there, strength in zip(points[:-1], points[1:], depth, strict=False):
        cv2.line(canvas, here, there, 255.0 * strength, width_px, cv2.LINE_AA, shift=4)
    return f32(canvas / 255.0)


def _dent(scene: Scene, rng: np.random.Generator) -> Flaw:
    """A shallow bowl, as from a blow with something round."""
    (at_u, at_v), turn = _flat_spot(rng, 0.030), rng.uniform(0.0, np.pi)
    wide, narrow = rng.uniform(0.034, 0.044), rng.uniform(0.026, 0.034)
    u, v = coordinates(scene)
    u, v = u - at_u, v - at_v
    along = (u * np.cos(turn) + v * np.sin(turn)) / wide
    beside = (v * np.cos(turn) - u * np.sin(turn)) / narrow
    return Flaw(height=f32(-0.0015 * np.maximum(1.0 - along**2 - beside**2, 0.0) ** 1.5))


def _stain(scene: Scene, rng: np.random.Generator) -> Flaw:
    """Rust: brown, with a ragged outline and a darker rim."""
    at_u, at_v = _flat_spot(rng, 0.052)
    reach = rng.uniform(0.066, 0.084)
    u, v = coordinates(scene)
    ragged = 0.16 * clouds(rng, scene.size, 16) + 0.07 * clouds(rng, scene.size, 50)
    depth = f32(1.0 - np.hypot(u - at_u, v - at_v) / reach + ragged)
    film = ramp(depth, 0.0, 0.12) * (0.75 + 0.25 * (1.0 - ramp(depth, 0.08, 0.35)))
    return Flaw(tint=f32(1.0 - film[..., None] * (1.0 - RUST)))


def _missing_hole(scene: Scene, rng: np.random.Generator) -> Flaw:
    """One of the four holes was never drilled: the brushed plate goes on."""
    forgotten = int(rng.integers(len(HOLES)))
    return Flaw(holes=HOLES[:forgotten] + HOLES[forgotten + 1 :])


def _burr(scene: Scene, rng: np.random.Generator) -> Flaw:
    """Jagged metal that the cutter left hanging from one straight edge."""
    u, v = coordinates(scene)
    side, length = int(rng.integers(4)), rng.uniform(0.12, 0.18)
    upright = side < 2
    outward, along = (u, v) if upright else (v, u)
    edge, room = (HALF_WIDTH, HALF_HEIGHT) if upright else (HALF_HEIGHT, HALF_WIDTH)
    outward = outward if side % 2 else -outward
    middle = rng.uniform(-1.0, 1.0) * (room - CORNER_RADIUS - length / 2.0)
    teeth = np.concatenate([[0.0], rng.uniform(0.3, 1.0, 12), [0.0]])
    places = middle + np.linspace(-length / 2.0, length / 2.0, len(teeth))
    reach = f32(np.interp(along, places, teeth)) * np.float32(rng.uniform(0.030, 0.042))
    crumpled = 1.0 + 0.5 * clouds(rng, scene.size, 60)
    rolled = 0.30 * reach * ramp(outward, edge - 0.016, edge + 0.012) * crumpled
    return Flaw(growth=f32(np.where(outward > edge - 0.03, reach, 0.0)), height=f32(rolled))


def _flat_spot(rng: np.random.Generator, margin: float) -> tuple[float, float]:
    """A random place on the flat of the plate, `margin` or more from every hole and edge."""
    while True:
        u = rng.uniform(margin - HALF_WIDTH, HALF_WIDTH - margin)
        v = rng.uniform(margin - HALF_HEIGHT, HALF_HEIGHT - margin)
        rooms = [np.hypot(u - hole_u, v - hole_v) - SINK_RADIUS for hole_u, hole_v in HOLES]
        beyond = max(abs(v) - SLOT_REACH, 0.0)
        rooms += [np.hypot(u - slot_u, beyond) - SLOT_RADIUS for slot_u, _ in SLOTS]
        rooms += [np.hypot(u, v) - BOSS_RADIUS, -outside_plate(f32(u), f32(v)) - CHAMFER]
        if min(rooms) > margin:
            return float(u), float(v)


FLAWS: dict[str, Callable[[Scene, np.random.Generator], Flaw]] = {
    "scratch": _scratch,
    "dent": _dent,
    "stain": _stain,
    "missing_hole": _missing_hole,
    "burr": _burr,
}
DEFECTS: tuple[str, ...] = tuple(FLAWS)
