"""Regions on real photos: what lies in one never counts, for all kinds and on both runtimes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from engines.image import files_in, load
from engines.meta import Meta
from engines.regions import REACH, Regions, shown
from engines.runtimes import cuda
from engines.serving.opening import Opening, open_model
from engines.serving.resident import Resident
from engines.verdict import decide
from support.double import doubled
from support.plans import with_plan, with_regions
from workers.converting.convert import Convert, convert
from workers.learning.retrain import Retrain, retrain
from workers.progress import Progress

CATEGORY, SIZE = "hazelnut_toy", 256
RESNET = {"backbone": "resnet18", "layers": ["layer2", "layer3"]}
KINDS: dict[str, dict[str, Any]] = {
    "patchcore": {**RESNET, "coreset_ratio": 0.05},
    "padim": {**RESNET, "layers": ["layer1", "layer2", "layer3"], "n_features": 50},
    "efficientad": {"model_size": "small", "learning_rate": 3e-4},
    "vae": {"latent_dim": 32},
}
EPOCHS = {"efficientad": 2, "vae": 30}
MOST = 6  # pictures of a group, for the sake of time
QUIET = Progress(quiet=True)


@dataclass(frozen=True)
class Line:
    """A model of the toy hazelnut, open on one runtime."""

    folder: Path
    how: Opening
    whole: Resident
    pictures: NDArray[np.uint8]  # (n, S, S, 3): defective ones, then good ones
    masks: list[NDArray[np.bool_]]  # (H, W) of each defective one

    def masked(self, target: Path, mask: NDArray[np.bool_]) -> Resident:
        folder = with_regions(self.folder, target, mask)
        return open_model(folder, CATEGORY, folder.name, self.how, self.whole)


@pytest.fixture(
    scope="module",
    params=["patchcore", "padim", "vae", pytest.param("efficientad", marks=pytest.mark.soak)],
)
def engine(
    request: pytest.FixtureRequest, assets: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What retrain.py and convtrt.py leave."""
    kind, root = request.param, tmp_path_factory.mktemp(request.param)
    Meta.parse({"model": kind, "image_size": SIZE, **KINDS[kind]}).write(root / "meta.json")
    weights = str(assets / "weights/resnet18.safetensors") if "backbone" in KINDS[kind] else None
    if kind == "efficientad":
        weights = "untrained"
    trained = root / "trained"
    retrain(
        Retrain(
            kind, CATEGORY, assets / "data", trained, root / "meta.json", weights,
            epochs=EPOCHS.get(kind, 1), batch=1 if kind == "efficientad" else 4,
        ),
        QUIET,
    )  # fmt: skip
    convert(
        Convert(kind, trained / "model.pth", trained / "meta.json", root / "engine"),
        QUIET,
    )
    return root / "engine"


@pytest.fixture(scope="module", params=["openvino", "tensorrt"])
def line(
    request: pytest.FixtureRequest,
    engine: Path,
    assets: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Line]:
    defective = files_in(assets / "data/test" / CATEGORY / "anomaly")[:MOST]
    good = files_in(assets / "data/test" / CATEGORY / "normal")[:MOST]
    pictures = np.stack([load(path.read_bytes(), SIZE) for path in (*defective, *good)])
    names = [assets / "masks" / CATEGORY / f"{path.stem}.png" for path in defective]
    masks = [cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 0 for path in names]
    how = Opening(runtime=request.param, batching=False)
    if request.param == "openvino":
        whole = open_model(engine, CATEGORY, "whole", how)
        yield Line(engine, how, whole, pictures, masks)
        whole.runtime.close()
        return
    folder = with_plan(engine, tmp_path_factory.mktemp("planned") / "whole")
    with doubled("10.3.0", "orin-nano") as double:
        whole = open_model(folder, CATEGORY, "whole", how)
        yield Line(folder, how, whole, pictures, masks)
        whole.runtime.close()
        cuda.close()
        double.assert_clean()


def test_a_region_over_its_defect_makes_a_part_normal(line: Line, tmp_path: Path) -> None:
    limit = line.whole.scale.raw_threshold
    rejected = 0
    for number, (picture, mask) in enumerate(zip(line.pictures, line.masks, strict=False)):
        if decide(float(line.whole.runtime.infer(picture[None])[0][0]), limit) == "Normal":
            continue
        rejected += 1
        model = line.masked(tmp_path / str(number), mask)
        scores, _ = model.runtime.infer(picture[None])
        model.runtime.close()
        assert model.bank_alone, "it has an engine of its own"
        assert decide(float(scores[0]), limit) == "Normal", f"{number}: {scores[0]} over {limit}"
    assert rejected >= MOST // 2


def test_an_empty_mask_changes_no_score_and_no_map_by_a_bit(line: Line, tmp_path: Path) -> None:
    empty = line.masked(tmp_path / "empty", np.zeros((512, 512), bool))
    for found, expected in zip(
        empty.runtime.infer(line.pictures), line.whole.runtime.infer(line.pictures), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    empty.runtime.close()


def test_where_the_worst_place_is_out_of_reach_a_score_is_the_same_to_the_bit(
    line: Line, tmp_path: Path
) -> None:
    corner = np.zeros((512, 512), bool)
    corner[:130, :130] = True
    model = line.masked(tmp_path / "corner", corner)
    before, maps = line.whole.runtime.infer(line.pictures)
    scores, masked = model.runtime.infer(line.pictures)
    places = model.runtime.places
    assert places is not None
    keep = Regions(corner).cells(SIZE, places, REACH[model.meta.model])
    seen = shown(keep, maps.shape[1:])
    most, hidden = maps[:, seen].max(axis=1), maps[:, ~seen].max(axis=1)
    lowest = maps.min(axis=(1, 2))
    clear = hidden - lowest < 0.8 * (most - lowest)  # of pixels, too, of which a map has the mean
    assert clear.sum() >= len(clear) // 2
    np.testing.assert_array_equal(scores[clear], before[clear])
    assert (scores <= before).all()
    np.testing.assert_array_equal(masked[:, seen], maps[:, seen])
    assert (masked[:, ~seen] <= masked[:, seen].min(axis=1)[:, None]).all()
    model.runtime.close()
