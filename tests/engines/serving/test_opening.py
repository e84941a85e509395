"""A version that says what of pictures never counts, opened; on both runtimes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.errors import BadBundle
from engines.runtimes import cuda
from engines.serving.opening import Opening, open_model
from engines.serving.resident import Resident, describe
from engines.store.bundle import ONNX
from support.double import doubled
from support.plans import SIDE, seal, tiny_bank, tiny_bundle, tiny_onnx, with_plan, with_regions
from support.project import ROOT

OLD = ROOT / "tests/data/build_e60e805/data/models/bolt/0001-c8a165f98692"


@dataclass(frozen=True)
class Line:
    """A version of a kind, and how it is opened."""

    folder: Path
    how: Opening

    def opened(self, folder: Path, beside: Resident | None = None) -> Resident:
        return open_model(folder, "part", folder.name, self.how, beside)


@pytest.fixture(params=["openvino", "tensorrt"])
def runtime(request: pytest.FixtureRequest) -> Iterator[Literal["openvino", "tensorrt"]]:
    if request.param == "openvino":
        yield request.param
        return
    with doubled("10.3.0", "orin-nano") as double:
        yield request.param
        cuda.close()
        double.assert_clean()


@pytest.fixture(params=["with a bank", "without"])
def line(
    request: pytest.FixtureRequest, runtime: Literal["openvino", "tensorrt"], tmp_path: Path
) -> Line:
    bank = tiny_bank(0) if request.param == "with a bank" else None
    folder = tiny_bundle(tmp_path / "whole", bank)
    if runtime == "tensorrt":
        folder = with_plan(folder, tmp_path / "planned")
    return Line(folder, Opening(runtime=runtime, batching=False))


def left(share: float) -> NDArray[np.bool_]:
    mask = np.zeros((100, 100), bool)
    mask[:, : round(100 * share)] = True
    return mask


@pytest.fixture
def reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures are too small for that of real models."""
    monkeypatch.setattr("engines.runtimes.REACH", {"vae": 2, "patchcore": 2})


def parts(count: int = 5) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def test_a_version_is_opened_with_its_regions_and_the_engine_of_the_one_before(
    line: Line, reach: None, tmp_path: Path
) -> None:
    whole = line.opened(line.folder)
    other = line.opened(with_regions(line.folder, tmp_path / "half", left(0.5)), whole)
    alone = line.opened(tmp_path / "half")
    assert other.bank_alone
    assert not alone.bank_alone
    assert "alone" in describe(other)
    scores, maps = other.runtime.infer(parts())
    np.testing.assert_array_equal(alone.runtime.infer(parts())[0], scores)
    before, seen = whole.runtime.infer(parts())
    hit = seen.reshape(len(seen), -1).argmax(axis=1) % 8 < 5  # half, and two pixels of 32 more
    assert hit.any()
    assert not hit.all()
    assert (scores[hit] < before[hit]).all()
    np.testing.assert_array_equal(scores[~hit], before[~hit])
    assert (maps[:, :, :5] <= maps[:, :, 5:].min(axis=(1, 2))[:, None, None]).all()
    for one in (whole, other, alone):
        one.runtime.close()


def test_regions_make_other_scores_and_the_same_regions_the_same(
    line: Line, reach: None, tmp_path: Path
) -> None:
    """As the record compares versions by what their scores come from."""
    whole = line.opened(line.folder)
    half = line.opened(with_regions(line.folder, tmp_path / "half", left(0.5)), whole)
    third = line.opened(with_regions(line.folder, tmp_path / "third", left(0.3)), half)
    again = line.opened(with_regions(line.folder, tmp_path / "again", left(0.5)), half)
    back = line.opened(line.folder, half)
    assert len({whole.made_of, half.made_of, third.made_of}) == 3
    assert (again.made_of, back.made_of) == (half.made_of, whole.made_of)
    assert again.limit_alone
    assert again.runtime is half.runtime
    np.testing.assert_array_equal(back.runtime.infer(parts())[0], whole.runtime.infer(parts())[0])
    for one in (whole, half, third, back):
        one.runtime.close()


def test_an_empty_mask_changes_no_score_by_a_bit(line: Line, reach: None, tmp_path: Path) -> None:
    whole = line.opened(line.folder)
    empty = line.opened(with_regions(line.folder, tmp_path / "empty", left(0)))
    for found, expected in zip(
        empty.runtime.infer(parts()), whole.runtime.infer(parts()), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    for one in (whole, empty):
        one.runtime.close()


def test_regions_that_leave_nothing_are_refused_and_what_was_open_stays(
    line: Line, reach: None, tmp_path: Path
) -> None:
    whole = line.opened(line.folder)
    expected = whole.runtime.infer(parts())[0]
    with pytest.raises(BadBundle, match="no place that counts"):
        line.opened(with_regions(line.folder, tmp_path / "nothing", left(0.97)), whole)
    np.testing.assert_array_equal(whole.runtime.infer(parts())[0], expected)
    whole.runtime.close()


def test_a_graph_that_cannot_look_past_regions_is_refused_in_words(tmp_path: Path) -> None:
    how = Opening(runtime="openvino", batching=False)
    open_model(OLD, "bolt", "0001", how).runtime.close()
    old = with_regions(OLD, tmp_path / "old", left(0.3))
    with pytest.raises(BadBundle, match=r"model\.onnx was converted by an older Kensa.*convtrt"):
        open_model(old, "bolt", "0002", how)
    tiny = tiny_bundle(tmp_path / "tiny", tiny_bank(0))
    tiny_onnx(tiny / ONNX, bank=True, keep=False)
    seal(tiny)
    open_model(tiny, "part", "0001", how).runtime.close()
    with pytest.raises(BadBundle, match="older Kensa"):
        open_model(with_regions(tiny, tmp_path / "tiny2", left(0.3)), "part", "0002", how)


def test_a_mask_that_is_not_the_one_of_its_meta_json_is_refused(tmp_path: Path) -> None:
    how = Opening(runtime="openvino", batching=False)
    folder = with_regions(tiny_bundle(tmp_path / "whole"), tmp_path / "half", left(0.5))
    other = with_regions(tiny_bundle(tmp_path / "whole2"), tmp_path / "third", left(0.3))
    shutil.copyfile(other / "regions.png", folder / "regions.png")
    with pytest.raises(BadBundle, match=r"regions\.png is not the file"):
        open_model(folder, "part", "0001", how)
    (folder / "regions.png").unlink()
    with pytest.raises(BadBundle, match=r"regions\.png does not exist"):
        open_model(folder, "part", "0001", how)
