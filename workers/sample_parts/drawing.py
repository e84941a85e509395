"""Pictures of a machined bracket on a conveyor belt, with and without defects, and their masks.

The demo, the documentation and the tests inspect this part, so that none of them needs a download.

    python -m workers.sample_parts --out data --sheet sheet.png

A picture is made the way a camera makes it: heights give slopes, slopes and a lamp give reflected
light, the part casts a shadow on the belt, a lens and a sensor record it. A seed gives the same
pixels every time with the same numpy, OpenCV and processor.
"""

from __future__ import annotations

import cv2
import numpy as np

from engines.errors import BadRequest
from workers.sample_parts.bracket import (
    BOSS_RADIUS,
    Flaw,
    Part,
    Scene,
    grid,
    make_part,
    new_scene,
    texture,
    to_picture,
)
from workers.sample_parts.defects import DEFECTS, FLAWS, HARD_CONTRAST
from workers.sample_parts.fields import (
    Field,
    Pixels,
    clouds,
    f32,
    odd_kernel,
    ramp,
    soften,
    u8,
)

SMALLEST_PX, LARGEST_PX = 64, 4096

PART_NUMBER = "KB-2046 A"
STEEL = np.array([0.985, 1.0, 1.02], np.float32)  # reflectance of red, green, blue
RUBBER = np.array([0.125, 0.150, 0.142], np.float32)

VISIBLE = 3.0  # grey levels: a smaller change drowns in the sensor's noise


def draw_part(seed: int, defect: str | None = None, size: int = 512) -> tuple[Pixels, Pixels]:
    """Draw one part; the same seed with and without a defect is the same part under the same light.

    Returns the picture, uint8 RGB (size, size, 3), and the mask, uint8 (size, size): 255 where the
    defect changes what the camera sees, 0 elsewhere, where the pixels are those of the part without
    the defect. Raises BadRequest for a defect not in DEFECTS, a size outside SMALLEST_PX to
    LARGEST_PX, or a negative seed.
    """
    _check(seed, defect, size)
    scene = new_scene(seed, size)
    levels = _expose(scene, Flaw())
    mask = np.zeros((size, size), np.uint8)
    if defect is not None:
        rng = np.random.default_rng([seed, 2, DEFECTS.index(defect)])
        change = _expose(scene, FLAWS[defect](scene, rng)) - levels
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
    return u8(cv2.morphologyEx(seen, cv2.MORPH_CLOSE, disc))


# ---- the light -----------------------------------------------------------------------------------


def _expose(scene: Scene, flaw: Flaw) -> Field:
    """What falls on the sensor, (size, size, 3) in grey levels 0 to 255, before its noise."""
    part = make_part(scene, flaw)
    belt = _belt(scene)[..., None] * RUBBER * (1.0 - 0.80 * part.shadow)[..., None]
    metal = _metal(scene, part)[..., None] * STEEL * flaw.tint
    light = belt + part.cover[..., None] * (metal - belt)
    lamp = 1.0 + scene.warmth * np.array([0.025, 0.0, -0.035], np.float32)
    light = soften(f32(light * lamp), max(0.45, 0.0013 * scene.size))
    x, y = grid(scene)
    vignette = scene.exposure * (1.0 - 0.55 * (x * x + y * y))
    return f32(255.0 * (1.0 - np.exp(-1.35 * light * vignette[..., None])))


def _belt(scene: Scene) -> Field:
    """Light from a woven rubber belt, 1 on average."""
    x, y = grid(scene)
    rng = texture(scene, 0)
    pitch = max(scene.pitch, 3.0 / scene.size)
    drift = 0.10 * clouds(rng, scene.size, 24)
    across = np.pi * (x / pitch + rng.uniform(0.0, 2.0) + drift)
    along = np.pi * (y / pitch + rng.uniform(0.0, 2.0) + drift)
    warp_on_top = np.sin(across) * np.sin(along) > 0.0
    thread = np.where(warp_on_top, np.abs(np.sin(across)), np.abs(np.sin(along)) * 0.85)
    dirt = 1.0 + 0.13 * clouds(rng, scene.size, 9) + 0.10 * clouds(rng, scene.size, 90)
    fibre = 0.10 * rng.standard_normal((scene.size, scene.size), dtype=np.float32)
    return f32((0.55 + 0.75 * thread + fibre) * dirt)


def _metal(scene: Scene, part: Part) -> Field:
    """Light from the metal, (size, size): a diffuse part and a highlight that follows the grooves.

    The highlight is Ward's anisotropic lobe ("Measuring and modeling anisotropic reflection", 1992)
    without its normalisation.
    """
    boss = ramp(-part.radius, -BOSS_RADIUS, -BOSS_RADIUS + 0.004)
    grain = _brushed(scene) * (1.0 - boss) + _turned(scene, part.radius) * boss
    groove_x, groove_y = _grooves(scene, part, boss)
    slope_x, slope_y = _slopes(part.height)
    slope_x, slope_y = slope_x - 0.055 * grain * groove_y, slope_y + 0.055 * grain * groove_x
    x, y = grid(scene)
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
    return f32(light * (1.0 + 0.05 * grain) * _etched(scene))


def _grooves(scene: Scene, part: Part, boss: Field) -> tuple[Field, Field]:
    """The direction of the tool marks as unit vectors: straight on the plate, round on the boss."""
    cos, sin = np.cos(scene.angle), np.sin(scene.angle)
    along_u = np.where(boss > 0.5, -part.v / part.radius, 1.0)
    along_v = np.where(boss > 0.5, part.u / part.radius, 0.0)
    return f32(along_u * cos - along_v * sin), f32(along_u * sin + along_v * cos)


def _brushed(scene: Scene) -> Field:
    """Streaks along the plate, of about unit strength times `scene.brush`."""
    rng = texture(scene, 1)
    fine = rng.standard_normal((scene.size, scene.size), dtype=np.float32)
    long_px, short_px = odd_kernel(0.16 * scene.size)[0], odd_kernel(0.04 * scene.size)[0]
    streaks = cv2.blur(fine, (long_px, 1)) * long_px**0.5
    streaks += 0.7 * cv2.blur(fine, (short_px, 1)) * short_px**0.5
    whole = (scene.size, scene.size)
    laid = cv2.warpAffine(streaks, to_picture(scene), whole, borderMode=cv2.BORDER_REFLECT)
    return f32(scene.brush * 0.8 * laid * (1.0 + 0.2 * clouds(rng, scene.size, 5)))


def _turned(scene: Scene, radius: Field) -> Field:
    """Turning marks round the axis, of about unit strength."""
    rng = texture(scene, 2)
    step = max(scene.turning, 3.0 / scene.size)
    uneven = rng.standard_normal(scene.size, dtype=np.float32)  # one value per pixel of radius
    random_part = uneven[np.minimum((radius * scene.size).astype(np.intp), scene.size - 1)]
    return f32(0.8 * np.sin(2.0 * np.pi * radius / step) + 0.8 * random_part)


def _etched(scene: Scene) -> Field:
    """The part number, as a factor of the light that the plate reflects."""
    canvas = np.zeros((scene.size, scene.size), np.uint8)
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, 0.0012 * scene.size
    width_px = max(1, round(0.0035 * scene.size))
    (text_px, _), _ = cv2.getTextSize(PART_NUMBER, font, scale, width_px)
    corner = ((scene.size - text_px) // 2, round(0.765 * scene.size))
    cv2.putText(canvas, PART_NUMBER, corner, font, scale, 255, width_px, cv2.LINE_AA)
    ink = cv2.warpAffine(canvas, to_picture(scene), (scene.size, scene.size))
    return f32(1.0 - 0.38 / 255.0 * ink.astype(np.float32))


def _slopes(height: Field) -> tuple[Field, Field]:
    scale = len(height) / 8.0  # Sobel's weights add up to 8
    return (
        f32(cv2.Sobel(height, cv2.CV_32F, 1, 0, ksize=3, scale=scale)),
        f32(cv2.Sobel(height, cv2.CV_32F, 0, 1, ksize=3, scale=scale)),
    )


def _sense(scene: Scene, levels: Field) -> Pixels:
    """Add the sensor's shot and read noise, and round to uint8."""
    noise = texture(scene, 3).standard_normal(levels.shape, dtype=np.float32)
    return u8(np.clip(np.rint(levels + noise * np.sqrt(0.9 + 0.014 * levels)), 0, 255))
