"""Drawn parts as files: in the layout that retrain.py reads, and as a contact sheet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from engines.errors import BadRequest
from engines.files import write_atomically
from workers.progress import Progress
from workers.sample_parts.defects import DEFECTS, HARD_DEFECTS
from workers.sample_parts.drawing import draw_part
from workers.sample_parts.fields import Pixels, u8

CATEGORY = "sample_bracket"
MOST_PICTURES = 100_000  # of one group: its share of the seeds


def write_dataset(
    root: Path,
    category: str = CATEGORY,
    train: int = 24,
    normal: int = 8,
    per_kind: int = 4,
    size: int = 512,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write PNG files in the layout that retrain reads, masks beside them, and return `root`.

    `<root>/train/<category>/NNNN.png` and `<root>/test/<category>/normal/NNNN.png` show good parts,
    `<root>/test/<category>/anomaly/<kind>_NN.png` bad ones, `<root>/masks/<category>/<kind>_NN.png`
    where. Every picture has a seed of its own: a higher count adds pictures and changes none. A
    file of the same name is replaced, other files stay. Raises BadRequest for counts, sizes, seeds
    or names that cannot be, OSError where a file cannot be written.
    """
    planned = list(_plan(Path(root), category, (train, normal, per_kind), seed))
    tick = (progress or Progress(quiet=True)).phase("draw")
    for done, picture in enumerate(planned, start=1):
        image, mask = draw_part(picture.seed, picture.defect, size)
        write_png(picture.path, image)
        if picture.mask_path is not None:
            write_png(picture.mask_path, mask)
        tick(done, len(planned))
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


def write_png(path: Path, pixels: Pixels) -> None:
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
    return u8(np.vstack(rows))


def _framed(image: Pixels, mask: Pixels) -> Pixels:
    """The picture with a thin red box round what the mask covers."""
    framed: Pixels = image.copy()
    if mask.any():
        x, y, width, height = cv2.boundingRect(mask)
        cv2.rectangle(framed, (x - 6, y - 6), (x + width + 5, y + height + 5), (220, 40, 40), 1)
    return framed
