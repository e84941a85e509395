"""Claims about masks of regions: what is read, what is refused, and in which words."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines.errors import BadBundle, BadImage, BadRequest, ImageTooLarge, UnsupportedImage
from engines.image import ImageLimits, decode
from engines.meta import Meta
from engines.regions import REACH, Regions
from engines.store.bundle import check_files
from engines.store.regions import (
    MOST_CORNERS,
    MOST_POLYGONS,
    REGIONS,
    as_png,
    drawn_over,
    learned_sizes,
    must_fit,
    never_counts,
    of_png,
    of_polygons,
    read_regions,
    without_regions,
    write_regions,
)
from engines.store.versions import Store
from support.damage import damaged, saved
from support.plans import tiny_bundle

META = Meta.parse({"model": "vae", "latent_dim": 8, "image_size": 64, "files": {"model.onnx": "0"}})


def mask(width: int = 40, height: int = 30) -> np.ndarray[Any, Any]:
    hidden = np.zeros((height, width), np.bool_)
    hidden[3:9, 10:25] = True
    return hidden


def grey(hidden: np.ndarray[Any, Any]) -> Image.Image:
    return Image.fromarray(np.where(hidden, 255, 0).astype(np.uint8))


# ---- a PNG ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "1", "RGB"], ids=["grey", "one bit", "as Paint saves"])
def test_white_never_counts_and_black_does(mode: str) -> None:
    found = of_png(saved(grey(mask()).convert(mode), "PNG"))
    assert (found.mask == mask()).all()
    assert found.share == pytest.approx(6 * 15 / (40 * 30))


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    meta = write_regions(tmp_path, Regions(mask()), META)
    data = (tmp_path / REGIONS).read_bytes()
    assert meta.regions == REGIONS
    assert meta.files == {"model.onnx": "0", REGIONS: hashlib.sha256(data).hexdigest()}
    found = read_regions(tmp_path, meta)
    assert found is not None
    assert (found.mask == mask()).all()
    assert as_png(found) == data
    assert without_regions(meta) == META
    assert read_regions(tmp_path, META) is None


def test_a_meta_json_without_hashes_gets_none_by_a_mask(tmp_path: Path) -> None:
    old = META.with_(files=None)
    assert write_regions(tmp_path, Regions(mask()), old).files is None
    assert without_regions(old.with_(regions=REGIONS)) == old


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (Image.new("RGB", (30, 40), (255, 0, 0)), "colours, a palette or alpha"),
        (grey(mask()).convert("RGBA"), "colours, a palette or alpha"),
        (grey(mask()).convert("P"), "colours, a palette or alpha"),
        (grey(mask()).convert("LA"), "colours, a palette or alpha"),
        (Image.fromarray(np.where(mask(), 65535, 0).astype(np.uint16)), "16 bits a pixel"),
        (Image.fromarray(np.where(mask(), 254, 0).astype(np.uint8)), "90 pixels .* such as 254"),
        (grey(np.ones((30, 40))), "leaves no pixel that counts"),
    ],
)
def test_a_png_that_would_have_to_be_guessed_at_is_refused(
    image: Image.Image, sentence: str
) -> None:
    with pytest.raises(BadRequest, match=sentence):
        of_png(saved(image, "PNG"))


def test_only_a_png_is_read_and_no_larger_one_than_other_pictures() -> None:
    with pytest.raises(UnsupportedImage, match="this is a JPEG image"):
        of_png(saved(grey(mask()), "JPEG"))
    with pytest.raises(UnsupportedImage, match="no image that Kensa knows"):
        of_png(b"hello")
    with pytest.raises(BadImage, match="empty"):
        of_png(b"")
    data = saved(grey(mask()), "PNG")
    with pytest.raises(ImageTooLarge, match="40 x 30"):
        of_png(data, ImageLimits(max_pixels=1199))
    with pytest.raises(ImageTooLarge, match="bytes"):
        of_png(data, ImageLimits(max_bytes=len(data) - 1))


def test_damage_is_refused_or_changes_nothing() -> None:
    """Whatever is done to a PNG, the mask is that of a whole file, or there is none."""
    seen = 0
    for name, data in damaged():
        if name.startswith("png_grey-"):
            seen += 1
            with pytest.raises((BadImage, BadRequest)):
                of_png(data)
    assert seen > 5
    whole = saved(grey(mask()), "PNG")
    for cut in range(0, len(whole), 7):
        with pytest.raises(BadImage):
            of_png(whole[:cut])


@pytest.mark.parametrize("content", [None, b"", b"hello", saved(grey(np.ones((9, 9))), "PNG")])
def test_a_bundle_whose_mask_is_missing_or_none_is_refused_by_name(
    content: bytes | None, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / REGIONS).write_bytes(content)
    with pytest.raises(BadBundle, match=r"regions\.png"):
        read_regions(tmp_path, META.with_(regions=REGIONS))


def test_the_share_is_read_once_for_all_versions_with_the_same_mask(tmp_path: Path) -> None:
    meta = write_regions(tmp_path, Regions(mask()), META)
    assert never_counts(tmp_path, META, {}) is None
    files = {REGIONS: f"of {tmp_path}"}
    assert never_counts(tmp_path, meta, files) == Regions(mask()).share
    assert never_counts(tmp_path / "another version", meta, files) == Regions(mask()).share
    with pytest.raises(BadBundle):
        never_counts(tmp_path / "another version", meta, {REGIONS: f"another in {tmp_path}"})


# ---- polygons ---------------------------------------------------------------------------------


def test_a_pixel_never_counts_whose_centre_is_inside_of_a_polygon() -> None:
    found = of_polygons(40, 30, [[(10, 3), (25, 3), (25, 9), (10, 9)]])
    assert (found.mask == mask()).all()
    touched = of_polygons(40, 30, [[(9.6, 2.6), (25.4, 2.6), (25.4, 9.4), (9.6, 9.4)]])
    assert (touched.mask == mask()).all()
    whole_but_one = of_polygons(2, 1, [[(0, 0), (1, 0), (1, 1), (0, 1)]])
    assert whole_but_one.mask.tolist() == [[True, False]]


def test_polygons_are_joined_and_the_edge_of_the_picture_belongs_to_it() -> None:
    left = [(0, 0), (20, 0), (20, 30), (0, 30)]
    both = of_polygons(40, 30, [left, [(10, 0), (40, 0), (40, 10), (10, 10)]])
    assert both.share == pytest.approx((20 * 30 + 20 * 10) / (40 * 30))
    assert both.mask[:10].all()
    assert not both.mask[10:, 20:].any()


def test_a_polygon_is_what_its_formula_says_whichever_way_it_turns() -> None:
    """Against the even-odd rule, pixel by pixel."""
    random = np.random.default_rng(0)
    for _ in range(30):
        corners = random.uniform(0, 20, (int(random.integers(3, 9)), 2))
        expected = [[inside(x + 0.5, y + 0.5, corners) for x in range(20)] for y in range(20)]
        if np.any(expected):
            for turned in (corners, corners[::-1]):
                found = of_polygons(20, 20, [turned.tolist()])
                assert found.mask.tolist() == expected


def inside(x: float, y: float, corners: np.ndarray[Any, Any]) -> bool:
    """By counting the edges to the left of a point."""
    crossings = 0
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if min(y0, y1) <= y < max(y0, y1):
            crossings += x0 + (y - y0) / (y1 - y0) * (x1 - x0) <= x
    return crossings % 2 == 1


def test_no_polygon_hides_nothing() -> None:
    assert of_polygons(40, 30, []).share == 0


@pytest.mark.parametrize(
    ("polygons", "sentence"),
    [
        ([[(0, 0), (10, 10)]], "Polygon 1 has 2 points"),
        ([[(0, 0), (9, 0), (9, 9)], [(0, 0), (41, 0), (0, 9)]], r"Polygon 2 .* \(41, 0\) outside"),
        ([[(0, 0), (-0.1, 0), (0, 9)]], "outside of the picture of 40 x 30"),
        ([[(0, 0), (0, 30.5), (9, 9)]], "outside"),
        ([[(0, 0), (float("nan"), 0), (0, 9)]], "no place"),
        ([[(0, 0), (9, float("inf")), (0, 9)]], "no place"),
        ([[(0, 0), (0.4, 0), (0.4, 0.4)]], "not shares of it"),
        ([[(3, 3), (3, 3), (3, 3)]], "covers the centre of no pixel"),
        ([[(0, 3), (40, 3), (0, 3)]], "covers the centre of no pixel"),
        ([[(0, 0), (40, 0), (40, 30), (0, 30)]], "leaves no pixel that counts"),
        ([[(0, 0), (9, 0), (9, 9)]] * (MOST_POLYGONS + 1), "101 polygons of up to 3 corners"),
        ([[(0, 0), (9, 0), (9, 9)] * (MOST_CORNERS // 3 + 1)], "send the mask as a PNG"),
    ],
)
def test_polygons_that_cannot_be_meant_are_refused(polygons: Any, sentence: str) -> None:
    with pytest.raises(BadRequest, match=sentence):
        of_polygons(40, 30, polygons)


def test_polygons_on_a_picture_that_is_too_large_are_refused_before_there_is_a_mask() -> None:
    with pytest.raises(ImageTooLarge, match="60000 x 60000"):
        of_polygons(60_000, 60_000, [])


# ---- in a version -----------------------------------------------------------------------------


def test_a_version_with_other_regions_has_all_other_files_and_says_whose(tmp_path: Path) -> None:
    store = Store(tmp_path / "models")
    base = store.take_in("part", tiny_bundle(tmp_path / "tiny"), {"category": "bolt"})
    first = store.publish_regions("part", base, Regions(mask()), {"reason": "a clamp"})
    second = store.publish_regions("part", first, Regions(~mask()), {})
    last = store.publish_regions("part", second, None, {})
    folders = {one: store.check("part", one) for one in (base, first, second, last)}
    for version, expected in ((first, mask()), (second, ~mask())):
        meta = Meta.read(folders[version] / "meta.json")
        check_files(folders[version], meta)
        found = read_regions(folders[version], meta)
        assert found is not None
        assert (found.mask == expected).all()
        assert (folders[version] / "model.onnx").samefile(folders[base] / "model.onnx")
    metas = [Meta.read(folders[one] / "meta.json") for one in (base, last)]
    assert metas[0] == metas[1]
    assert store.manifest("part", last).files == store.manifest("part", base).files
    assert store.manifest("part", second).origin == {
        "category": "bolt", "parent": first, "regions_of": base,
    }  # fmt: skip
    assert store.differences("part", first, second) == {"meta.json", REGIONS}
    assert store.differences("part", base, last) == set()
    other = store.take_in("part", tiny_bundle(tmp_path / "other", offset=1.0), {})
    assert store.differences("part", base, other) == {"meta.json", "model.onnx"}


def test_a_version_that_was_put_aside_before_it_judged_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "models")
    base = store.take_in("part", tiny_bundle(tmp_path / "tiny"), {})
    store.activate("part", base)
    made = store.publish_regions("part", base, Regions(mask()), {})
    store.refuse("part", made, "It leaves no place that counts.")
    assert [*store.refused("part")] == [made]
    for version in (made, base, made):
        store.withdraw("part", version)  # not the live one, whoever says so
    assert (store.versions("part"), store.refused("part")) == ([base], {})


# ---- its size, and how it looks ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("camera", "sizes"),
    [
        (None, set()),
        ({"size": [1280, 1024], "pictures": 24}, {(1280, 1024)}),
        ({"size": [1280]}, set()),
        ({"size": "1280x1024"}, set()),
        ({"pictures": 24}, set()),
    ],
)
def test_the_size_of_the_pictures_is_known_where_training_wrote_it_down(
    camera: Any, sizes: set[Any]
) -> None:
    assert learned_sizes(META.with_(camera=camera)) == sizes


def test_a_mask_is_as_large_as_the_pictures_where_these_are_known() -> None:
    must_fit(Regions(mask()), {(40, 30), (64, 48)}, "they")
    must_fit(Regions(mask()), set(), "nobody knows which")
    with pytest.raises(BadRequest, match=r"is 40 x 30 pixels, and they are 30 x 40 or 64 x 48"):
        must_fit(Regions(mask()), {(64, 48), (30, 40)}, "they")


def test_what_never_counts_is_seen_on_the_part_and_so_is_its_reach() -> None:
    part = np.full((60, 80, 3), 100, np.uint8)
    hidden = np.zeros((60, 80), np.bool_)
    hidden[10:20, 20:40] = True
    shown = decode(drawn_over(part, Regions(hidden), META))
    assert shown.shape == part.shape
    around = round(REACH[META.model] / META.image_size * 80)  # pixels of this picture, sideways
    assert shown[15, 30].tolist() == [171, 66, 66]
    assert shown[15, 40 + around // 2].tolist() == [126, 88, 88]
    assert (shown[15, 40 + around + 3 :] == 100).all()
    assert (shown[10 + 10 + around + 3 :] == 100).all()
    large = drawn_over(np.zeros((1, 1, 3), np.uint8), Regions(mask(4000, 3000)), META)
    assert max(decode(large).shape) <= 1024
