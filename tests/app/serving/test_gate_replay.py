"""Claims about what the gate shows to two versions: only what each of them would see of a file."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from engines.meta import Meta
from engines.store.golden import Golden
from engines.store.versions import Store
from support.damage import png
from support.in_process import in_process, settings_of
from support.plans import SIDE, seal, tiny_bundle
from support.server import RAW

NAME = "part"
AS_LARGE, LARGER, LONG = (
    (SIDE, SIDE),
    (3 * SIDE, 2 * SIDE),
    (SIDE // 2, 4 * SIDE),
)  # LONG: one grows


def version_of(folder: Path, resize: str | None, offset: float) -> Path:
    """A model as a Kensa trained it that knew of no way to resize, or as one does today."""
    bundle = tiny_bundle(folder, offset=offset)
    images = np.random.default_rng(int(offset)).integers(0, 255, (2, SIDE, SIDE, 3), np.uint8)
    Golden(images, np.array([False, True])).write(bundle)
    Meta.read(bundle / "meta.json").with_(resize=resize).write(bundle / "meta.json")
    seal(bundle)
    return bundle


def shown(tmp_path: Path, ways: tuple[str | None, str | None], sizes: list[Any]) -> dict[str, int]:
    """How many images of each group the gate shows, once parts of these sizes were inspected."""
    store = Store(tmp_path / "data" / "models")
    old = store.take_in(NAME, version_of(tmp_path / "old", ways[0], 1.0), {})
    store.activate(NAME, old)

    async def learn(client: httpx.AsyncClient, _: Any) -> dict[str, int]:
        for size in sizes:
            picture = png(np.zeros((*size, 3), np.uint8))
            assert (await client.post("/infer", content=picture, headers=RAW)).is_success
        origin = {"activate": True, "max_flips": 1.0}
        new = store.take_in(NAME, version_of(tmp_path / "new", ways[1], 2.0), origin)
        while (found := store.gate(NAME, new)) is None:
            await asyncio.sleep(0.05)
        return {group: one["images"] for group, one in found["groups"].items()}

    return in_process(settings_of(tmp_path), learn)


@pytest.mark.parametrize("ways", [(None, None), ("each_axis", "each_axis")])
def test_versions_that_resize_alike_are_shown_all(
    tmp_path: Path, ways: tuple[str | None, str | None]
) -> None:
    found = shown(tmp_path, ways, [AS_LARGE, LARGER, LONG])
    assert found == {"defect": 2, "normal": 2, "recent": 3}


def test_one_that_resizes_otherwise_is_shown_all_where_that_makes_no_difference(
    tmp_path: Path,
) -> None:
    found = shown(tmp_path, (None, "each_axis"), [AS_LARGE, LARGER])
    assert found == {"defect": 2, "normal": 2, "recent": 2}


def test_a_new_way_of_resizing_is_not_held_against_the_first_version_that_has_it(
    tmp_path: Path,
) -> None:
    """Of a long picture it would see other pixels than those that the live version kept."""
    found = shown(tmp_path, (None, "each_axis"), [AS_LARGE, LONG, LARGER, LONG])
    assert found == {"defect": 0, "normal": 0, "recent": 2}
