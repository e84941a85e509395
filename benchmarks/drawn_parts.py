"""Pictures of drawn parts, good and defective, of which thresholds can be measured by the hundred.

Three kinds: `bracket` is the machined part of `workers.sample_parts`; of `gasket`, a rubber ring on
a plate, every good one looks nearly alike; of `biscuit` no good one looks like another, and faint
defects drown in that. Lengths are fractions of the picture's width unless a name ends in `_px`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np

from workers.sample_parts.defects import DEFECTS as BRACKET_DEFECTS
from workers.sample_parts.drawing import draw_part
from workers.sample_parts.fields import Curve, Field, Pixels, clouds, f32, ramp, soften, u8

KINDS: tuple[str, ...] = ("bracket", "gasket", "biscuit")
DEFECTIVE_FROM = 1_000_000  # the seed of the first part with a defect: none that is learned has one

LAMP = (-0.42, -0.55, 0.72)  # the direction it shines from: x right, y down, z to the camera
OUTER, INNER, HOLE = 0.40, 0.235, 0.026  # radii of the gasket and its holes
HOLES = tuple((0.3175 * np.cos(t), 0.3175 * np.sin(t)) for t in np.arange(6) * np.pi / 3.0)
PLATE = np.array([0.60, 0.63, 0.66], np.float32)  # reflectance of red, green, blue, as all colours
RUBBER = np.array([0.135, 0.140, 0.150], np.float32)
DIRT = np.array([0.62, 0.52, 0.38], np.float32)
TRAY = np.array([0.30, 0.31, 0.33], np.float32)
PALE = np.array([0.88, 0.68, 0.42], np.float32)
BROWN = np.array([0.52, 0.29, 0.12], np.float32)
FLOUR = np.array([0.93, 0.83, 0.66], np.float32)
CHOCOLATE = np.array([0.19, 0.10, 0.065], np.float32)
PLASTIC = np.array([[0.10, 0.42, 0.16], [0.10, 0.26, 0.62]], np.float32)  # green, blue


def normal(kind: str, seed: int, size: int = 256) -> Pixels:
    """A good part: uint8 RGB (size, size, 3), the same for the same seed."""
    return _draw(kind, seed, None, size)


def defective(kind: str, seed: int, size: int = 256) -> tuple[Pixels, str]:
    """A part with one defect, and the defect's name; seeds that follow each other take turns.

    It is the part `normal(kind, DEFECTIVE_FROM + seed)` but for the defect.
    """
    names = BRACKET_DEFECTS if kind == "bracket" else tuple(FLAWS[kind])
    what = names[seed % len(names)]
    return _draw(kind, DEFECTIVE_FROM + seed, what, size), what


def _draw(kind: str, seed: int, what: str | None, size: int) -> Pixels:
    if kind == "bracket":
        return draw_part(seed, what, size)[0]
    scene = MAKERS[kind](seed, size)
    if what is not None:
        scene = FLAWS[kind][what](scene, _stream(seed, 1))
    return _photograph(scene, _stream(seed, 2))


def _stream(seed: int, number: int) -> np.random.Generator:
    """Random numbers for one purpose, so that a defect changes nothing else of a part."""
    return np.random.default_rng([seed, number])


@dataclass(frozen=True)
class Scene:
    """A part on its ground, each field (size, size) and colours (size, size, 3)."""

    u: Field  # the part's own coordinates, from its middle
    v: Field
    solid: Field  # about the distance to the part's outline, negative on the part
    height: Field  # of the surface, without its bevelled edges
    colour: Field
    gloss: Field
    ground: Field  # (size, size, 3)
    bevel: float  # how wide and high the edge is
    exposure: float  # 1 is nominal

    @property
    def size(self) -> int:
        return len(self.u)


def _coordinates(size: int, turn: float, shift: Curve) -> tuple[Field, Field]:
    """A part's own coordinates at the centre of every pixel; `turn` in radians."""
    line = (np.arange(size) + 0.5) / size - 0.5
    x, y = line[None, :] - shift[0], line[:, None] - shift[1]
    return f32(x * np.cos(turn) + y * np.sin(turn)), f32(y * np.cos(turn) - x * np.sin(turn))


def _grain(rng: np.random.Generator, size: int, sigma_px: float) -> Field:
    """Fine noise of about unit strength, as wide as `sigma_px` of a picture of 256 px."""
    white = rng.standard_normal((size, size), dtype=np.float32)
    fine = soften(white, sigma_px * size / 256)
    return f32(fine / max(float(fine.std()), 1e-6))


# ---- the camera ----------------------------------------------------------------------------------


def _photograph(scene: Scene, rng: np.random.Generator) -> Pixels:
    """Light the scene from LAMP, and see it through a lens and a sensor with noise."""
    cover = f32(np.clip(0.5 - scene.solid * scene.size, 0.0, 1.0))[..., None]
    light = scene.ground * (1.0 - 0.6 * _shadow(cover[..., 0]))[..., None]
    shade, shine = _reflect(scene)
    light = light + cover * (scene.colour * shade[..., None] + shine[..., None] - light)
    levels = 235.0 * scene.exposure * soften(f32(light), 0.0022 * scene.size)
    noise = rng.standard_normal(levels.shape, dtype=np.float32)
    return u8(np.clip(np.rint(levels + noise * np.sqrt(0.9 + 0.014 * levels)), 0, 255))


def _shadow(cover: Field) -> Field:
    """Where the part keeps the lamp's light from the ground, with a soft border."""
    size = len(cover)
    move = np.array([[1, 0, 0.012 * size], [0, 1, 0.016 * size]], np.float32)
    return soften(f32(cv2.warpAffine(cover, move, (size, size))), 0.008 * size)


def _reflect(scene: Scene) -> tuple[Field, Field]:
    """Diffuse light (1 where the surface is flat) and highlights, (size, size) each."""
    height = scene.height + scene.bevel * ramp(-scene.solid, 0.0, 2.0 * scene.bevel)
    scale = scene.size / 8.0  # Sobel's weights add up to 8
    x = cv2.Sobel(height, cv2.CV_32F, 1, 0, ksize=3, scale=scale)
    y = cv2.Sobel(height, cv2.CV_32F, 0, 1, ksize=3, scale=scale)
    facing = (LAMP[2] - x * LAMP[0] - y * LAMP[1]) / (LAMP[2] * np.sqrt(1.0 + x * x + y * y))
    tilt_x, tilt_y = LAMP[0] / (LAMP[2] + 1.0) + x, LAMP[1] / (LAMP[2] + 1.0) + y
    shine = scene.gloss * np.exp(-(tilt_x**2 + tilt_y**2) / 0.16**2)
    return f32(0.25 + 0.75 * np.maximum(facing, 0.0)), f32(shine)


# ---- the gasket ----------------------------------------------------------------------------------


def _gasket(seed: int, size: int) -> Scene:
    """A moulded rubber ring with six holes and a bead, on a plain plate."""
    rng = _stream(seed, 0)
    u, v = _coordinates(size, np.radians(rng.uniform(-0.5, 0.5)), rng.uniform(-0.005, 0.005, 2))
    radius = f32(np.hypot(u, v))
    solid = np.maximum(radius - OUTER, INNER - radius)
    for hole_u, hole_v in HOLES:
        solid = np.maximum(solid, HOLE - np.hypot(u - hole_u, v - hole_v))
    beads = [
        0.006 * np.exp(-(((radius - at) / 0.007) ** 2)) for at in (INNER + 0.025, OUTER - 0.025)
    ]
    rubber = 1.0 + 0.05 * _grain(rng, size, 0.8) + 0.03 * clouds(rng, size, 12)
    plate = 1.0 + 0.012 * _grain(rng, size, 0.8) + 0.008 * clouds(rng, size, 6)
    return Scene(
        u=u,
        v=v,
        solid=f32(solid),
        height=f32(beads[0] + beads[1] + 0.0006 * _grain(rng, size, 1.0)),
        colour=f32(rubber[..., None] * RUBBER),
        gloss=np.full((size, size), 0.22, np.float32),
        ground=f32(plate[..., None] * PLATE),
        bevel=0.007,
        exposure=float(rng.uniform(0.97, 1.03)),
    )


def _nick(scene: Scene, rng: np.random.Generator) -> Scene:
    """A small notch in the outer or the inner edge."""
    edge = OUTER if rng.random() < 0.6 else INNER
    at_u, at_v = _polar(edge, rng.uniform(0.0, 2.0 * np.pi))
    away = np.hypot(scene.u - at_u, scene.v - at_v)
    return replace(scene, solid=f32(np.maximum(scene.solid, rng.uniform(0.012, 0.026) - away)))


def _tear(scene: Scene, rng: np.random.Generator) -> Scene:
    """A gap from the outer edge inwards, as wide as a thread and jagged."""
    angle, length = rng.uniform(0.0, 2.0 * np.pi), rng.uniform(0.06, 0.13)
    reach = np.linspace(0.01, -length, 14)
    bent = angle + np.cumsum(rng.normal(0.0, 0.016, len(reach)))
    gap = _line(scene, *_polar(OUTER + reach, bent), rng.uniform(1.0, 2.2))
    return replace(scene, solid=f32(np.maximum(scene.solid, (gap - 0.5) / scene.size)))


def _dirt(scene: Scene, rng: np.random.Generator) -> Scene:
    """A grain of sand on the rubber."""
    depth = _blob(scene, rng, _polar(0.3175, _between_holes(rng)), rng.uniform(0.008, 0.016), 0.25)
    return _covered(scene, ramp(depth, 0.0, 0.3), rng.uniform(0.6, 1.2) * DIRT, 0.006)


def _smear(scene: Scene, rng: np.random.Generator) -> Scene:
    """A film of grease that somebody wiped over the rubber: pale and dull, with streaks."""
    at = _polar(0.3175, rng.uniform(0.0, 2.0 * np.pi))
    depth = _blob(scene, rng, at, rng.uniform(0.05, 0.08), 0.35)
    film = (
        rng.uniform(0.10, 0.22) * ramp(depth, 0.0, 0.5) * (1.0 + 0.3 * _grain(rng, scene.size, 2.0))
    )
    return _covered(scene, f32(np.clip(film, 0.0, 1.0)), f32(1.2) * PLATE, 0.0)


def _missing_hole(scene: Scene, rng: np.random.Generator) -> Scene:
    """One of the six holes was never punched."""
    hole_u, hole_v = HOLES[rng.integers(len(HOLES))]
    away = np.hypot(scene.u - hole_u, scene.v - hole_v)
    return replace(scene, solid=f32(np.minimum(scene.solid, away - 2.2 * HOLE)))


def _between_holes(rng: np.random.Generator) -> float:
    """The angle of a place on the ring that is not at one of its holes."""
    return float((rng.integers(6) + rng.uniform(0.25, 0.75)) * np.pi / 3.0)


# ---- the biscuit ---------------------------------------------------------------------------------


def _biscuit(seed: int, size: int) -> Scene:
    """A glazed biscuit with chocolate chips, of which everything differs from one to the next."""
    rng = _stream(seed, 0)
    u, v = _coordinates(size, rng.uniform(0.0, 2.0 * np.pi), rng.uniform(-0.03, 0.03, 2))
    solid = f32(np.hypot(u, v) - _outline(rng, u, v) + 0.004 * clouds(rng, size, 40))
    crumbs = (
        0.7 * clouds(rng, size, 22) + 0.55 * clouds(rng, size, 48) + 0.3 * _grain(rng, size, 0.9)
    )
    height = 0.05 * ramp(-solid, 0.0, 0.16) + rng.uniform(0.0025, 0.0045) * crumbs
    baked = rng.uniform(0.15, 0.45) + 0.5 * rng.uniform(0.5, 1.0) * (1.0 - ramp(-solid, 0.0, 0.11))
    baked += rng.uniform(-0.8, 0.8) * u + 0.07 * clouds(rng, size, 7) + 0.05 * crumbs
    dough = PALE + np.clip(baked, 0.0, 1.0)[..., None] * (BROWN - PALE)
    tray = rng.uniform(0.9, 1.1) * (1.0 + 0.03 * _grain(rng, size, 0.8))
    bare = Scene(
        u=u,
        v=v,
        solid=solid,
        height=f32(height),
        colour=f32(dough * rng.uniform(0.93, 1.07, 3)),
        gloss=f32(rng.uniform(0.25, 0.4) * (1.0 + 0.3 * clouds(rng, size, 10))),
        ground=f32(tray[..., None] * TRAY),
        bevel=0.008,
        exposure=float(rng.uniform(0.94, 1.06)),
    )
    return _with_chips(bare, rng)


def _outline(rng: np.random.Generator, u: Field, v: Field) -> Field:
    """The radius of an uneven circle in the direction of every pixel."""
    waves = np.arange(1, 9)
    parts = rng.normal(0.0, 0.016, len(waves)) / waves**0.8
    angles = np.linspace(-np.pi, np.pi, 721)
    uneven = np.sin(angles[:, None] * waves + rng.uniform(0.0, 2.0 * np.pi, len(waves))) @ parts
    return f32(rng.uniform(0.33, 0.38) + np.interp(np.arctan2(v, u), angles, uneven))


def _with_chips(scene: Scene, rng: np.random.Generator) -> Scene:
    """The biscuit with 6 to 14 chocolate chips that are half sunk into the dough."""
    chips, tones = np.zeros_like(scene.u), np.ones_like(scene.u)
    for _ in range(rng.integers(6, 15)):
        at = _polar(0.31 * rng.uniform(0.0, 1.0) ** 0.5, rng.uniform(0.0, 2.0 * np.pi))
        chip = ramp(_blob(scene, rng, at, rng.uniform(0.016, 0.036), 0.12), 0.0, 0.25)
        tones += (chip > 0.0) * (f32(rng.uniform(0.7, 1.7)) - tones)
        chips = np.maximum(chips, chip)
    return _covered(scene, chips, tones[..., None] * CHOCOLATE, 0.007)


def _crack(scene: Scene, rng: np.random.Generator) -> Scene:
    """A jagged cleft that runs through the dough and the chips alike."""
    angle, length = rng.uniform(0.0, 2.0 * np.pi), rng.uniform(0.25, 0.5)
    along = np.linspace(-length / 2.0, length / 2.0, 24)
    aside = np.cumsum(rng.normal(0.0, 0.008, len(along))) + rng.uniform(-0.12, 0.12)
    u, v = (
        along * np.cos(angle) - aside * np.sin(angle),
        along * np.sin(angle) + aside * np.cos(angle),
    )
    cleft = rng.uniform(0.6, 0.95) * _line(scene, u, v, rng.uniform(1.2, 3.2))
    colour = scene.colour * (1.0 - cleft)[..., None]
    return replace(scene, colour=f32(colour), gloss=f32(scene.gloss * (1.0 - cleft)))


def _bite(scene: Scene, rng: np.random.Generator) -> Scene:
    """A piece of the edge is gone, in arcs as of teeth; pale crumb shows where it broke."""
    angle, gone = rng.uniform(0.0, 2.0 * np.pi), np.full_like(scene.solid, -1.0)
    for tooth in (-1, 0, 1):
        at_u, at_v = _polar(0.36, angle + 0.22 * tooth)
        away = np.hypot(scene.u - at_u, scene.v - at_v)
        gone = f32(np.maximum(gone, rng.uniform(0.06, 0.10) - away))
    broken = ramp(gone, -rng.uniform(0.015, 0.035), 0.0)
    torn = _covered(scene, f32(rng.uniform(0.5, 1.0) * broken), FLOUR, 0.0)
    return replace(torn, solid=f32(np.maximum(scene.solid, gone)))


def _hair(scene: Scene, rng: np.random.Generator) -> Scene:
    """A thin, smoothly curved, dark line that lies on top of everything."""
    t = np.linspace(0.0, 1.0, 40)
    heading = rng.uniform(0.0, 2.0 * np.pi) + rng.normal(0.0, 2.0) * t + rng.normal(0.0, 3.0) * t**2
    step = rng.uniform(0.35, 0.6) / len(t)
    u, v = step * np.cumsum(np.cos(heading)), step * np.cumsum(np.sin(heading))
    u, v = u - u.mean() + rng.uniform(-0.1, 0.1), v - v.mean() + rng.uniform(-0.1, 0.1)
    hair = rng.uniform(0.6, 1.0) * _line(scene, u, v, rng.uniform(0.8, 1.4))
    return _covered(scene, f32(hair), f32(0.7) * CHOCOLATE, 0.0)


def _burnt(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scorched spot whose edge is sharp, where browning fades."""
    at = _polar(rng.uniform(0.0, 0.24), rng.uniform(0.0, 2.0 * np.pi))
    spot = ramp(_blob(scene, rng, at, rng.uniform(0.03, 0.07), 0.25), 0.0, 0.06)
    scorched = 1.0 - rng.uniform(0.4, 0.8) * spot
    return replace(scene, colour=f32(scene.colour * scorched[..., None]))


def _foreign(scene: Scene, rng: np.random.Generator) -> Scene:
    """A chip of green or blue plastic."""
    at = _polar(rng.uniform(0.0, 0.26), rng.uniform(0.0, 2.0 * np.pi))
    depth = _blob(scene, rng, at, rng.uniform(0.014, 0.034), 0.1)
    colour = rng.uniform(0.7, 1.2) * PLASTIC[rng.integers(len(PLASTIC))]
    return _covered(scene, ramp(depth, 0.0, 0.2), colour, 0.004)


def _bare(scene: Scene, rng: np.random.Generator) -> Scene:
    """A patch that the glaze missed: dull, smooth and floury."""
    at = _polar(rng.uniform(0.0, 0.22), rng.uniform(0.0, 2.0 * np.pi))
    patch = ramp(_blob(scene, rng, at, rng.uniform(0.08, 0.13), 0.3), 0.0, 0.15)
    floury = _covered(scene, f32(rng.uniform(0.15, 0.6) * patch), FLOUR, 0.0)
    smooth = scene.height + patch * (soften(scene.height, 0.02 * scene.size) - scene.height)
    return replace(floury, height=f32(smooth), gloss=f32(scene.gloss * (1.0 - patch)))


# ---- what both are made with ---------------------------------------------------------------------


def _polar(radius: Curve | float, angle: Curve | float) -> tuple[Curve, Curve]:
    return np.asarray(radius * np.cos(angle)), np.asarray(radius * np.sin(angle))


def _blob(
    scene: Scene, rng: np.random.Generator, at: tuple[Curve, Curve], reach: float, ragged: float
) -> Field:
    """How deep a pixel lies in an uneven ellipse: 1 in its middle, 0 on its outline."""
    turn, squeeze = rng.uniform(0.0, np.pi), rng.uniform(0.65, 1.0)
    u, v = scene.u - float(at[0]), scene.v - float(at[1])  # float: the fields stay float32
    cos, sin = float(np.cos(turn)), float(np.sin(turn))
    along, beside = u * cos + v * sin, (v * cos - u * sin) / squeeze
    uneven = ragged * clouds(rng, scene.size, max(4, round(1.2 / reach)))
    return f32(1.0 - np.sqrt(along * along + beside * beside) / reach + uneven)


def _covered(scene: Scene, film: Field, colour: Field, raised: float) -> Scene:
    """The scene with a film (0 to 1) of another colour over it, which may stand out."""
    mixed = scene.colour + film[..., None] * (colour - scene.colour)
    return replace(scene, colour=f32(mixed), height=f32(scene.height + raised * film))


def _line(scene: Scene, u: Curve, v: Curve, width_px: float) -> Field:
    """A line through part coordinates, 0 to 1; `width_px` of a picture of 256 px."""
    size = scene.size
    middle = size // 2
    # The part is only turned and shifted: its axes are the same all over the picture.
    across = (scene.u[middle, middle], scene.v[middle, middle])
    cos = (scene.u[middle, -1] - scene.u[middle, 0]) * size / (size - 1)
    sin = (scene.v[middle, 0] - scene.v[middle, -1]) * size / (size - 1)
    du, dv = u - across[0], v - across[1]
    points = np.stack([du * cos - dv * sin, du * sin + dv * cos], axis=-1) * size + middle
    finer = 4  # lines have whole widths, so they are drawn larger and made smaller
    canvas = np.zeros((finer * size, finer * size), np.uint8)
    thick = max(1, round(finer * width_px * size / 256))
    fixed = (((points + 0.5) * finer - 0.5) * 16).round().astype(np.int32)  # 1/16 px
    cv2.polylines(canvas, [fixed], False, 255, thick, cv2.LINE_AA, shift=4)
    return f32(cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA) / 255.0)


MAKERS: dict[str, Callable[[int, int], Scene]] = {"gasket": _gasket, "biscuit": _biscuit}
FLAWS: dict[str, dict[str, Callable[[Scene, np.random.Generator], Scene]]] = {
    "gasket": {
        "nick": _nick,
        "tear": _tear,
        "dirt": _dirt,
        "smear": _smear,
        "missing_hole": _missing_hole,
    },
    "biscuit": {
        "crack": _crack,
        "bite": _bite,
        "hair": _hair,
        "burnt": _burnt,
        "foreign": _foreign,
        "bare": _bare,
    },
}
