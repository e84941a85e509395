"""The exported graph: its form, the proof that it agrees, and what happens when it does not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from engines.errors import BadBundle
from engines.meta import Meta
from engines.runtimes.openvino import choose_precision
from engines.runtimes.parity import FLOAT32_LIMIT, HALF_LIMIT
from engines.store.bundle import Bundle, read_bank
from engines.store.golden import EACH, GOLDEN, Golden
from support.project import PATCHCORE
from workers.converting.convert import Convert, convert
from workers.converting.export import export_onnx, parity
from workers.learning.retrain import Retrain, retrain
from workers.models import patchcore
from workers.progress import Progress

QUIET = Progress(quiet=True)

Pictures = NDArray[np.uint8]


@pytest.fixture(scope="module")
def meta(trained: Path) -> Meta:
    return Meta.read(trained / "meta.json")


@pytest.fixture(scope="module")
def golden(trained: Path, meta: Meta) -> Pictures:
    found = Golden.read(trained, meta.image_size)
    assert found is not None
    return found.images


@pytest.fixture(scope="module")
def expected(trained: Path, meta: Meta, golden: Pictures) -> NDArray[np.float32]:
    """Raw scores of the torch model in float32."""
    model = patchcore.build(meta, trained / meta.weights_pth)
    patchcore.load(model, trained / "memory_bank.npz")
    return patchcore.scores(model, [golden])


def exported(trained: Path, meta: Meta, path: Path, opset: Any = 17, *, half: bool = False) -> Path:
    model = patchcore.build(meta, trained / meta.weights_pth)
    patchcore.load(model, trained / "memory_bank.npz")
    graph, inputs = patchcore.graph(model, half=half)
    export_onnx(graph, inputs, path, opset)
    return path


@pytest.fixture(scope="module")
def graph(trained: Path, meta: Meta, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(trained, meta, tmp_path_factory.mktemp("graph") / "model.onnx")


def described(values: Any) -> dict[str, tuple[int, list[str | int]]]:
    """name -> element type and dimensions, dynamic ones by name."""
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
        )
        for value in values
    }


# ---- form -------------------------------------------------------------------------------------


def test_the_graph_takes_uint8_pictures_and_a_bank_and_gives_raw_scores_and_maps(
    graph: Path,
) -> None:
    model = onnx.load(graph)
    u8, f32 = onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT
    inputs, outputs = described(model.graph.input), described(model.graph.output)
    assert inputs == {
        "image": (u8, ["n", 256, 256, 3]),
        "memory_bank": (f32, ["m", 384]),
        "keep": (f32, [32, 32]),
    }
    assert outputs == {"score": (f32, ["n"]), "map": (f32, ["n", 32, 32])}


def test_the_embedding_is_a_tensor_with_a_name_and_no_output(graph: Path) -> None:
    made = [name for node in onnx.load(graph).graph.node for name in node.output]
    assert made.count("embedding") == 1


def test_the_bank_is_not_in_the_graph_so_a_new_one_needs_no_new_graph(
    graph: Path, trained: Path
) -> None:
    rows = len(read_bank(trained / "memory_bank.npz"))
    shapes = [list(weight.dims) for weight in onnx.load(graph).graph.initializer]
    assert [rows, 384] not in shapes


def test_the_graph_is_one_file(graph: Path) -> None:
    assert [path.name for path in graph.parent.iterdir()] == ["model.onnx"]
    weights = onnx.load(graph, load_external_data=False).graph.initializer
    assert not any(weight.data_location for weight in weights)


def test_a_folder_whose_name_is_not_utf_8_takes_an_engine_that_opens(
    trained: Path, meta: Meta, tmp_path: Path
) -> None:
    folder = tmp_path / os.fsdecode("検査".encode("cp932"))  # Windows in Japanese
    convert(
        Convert(meta.model, trained / meta.weights_pth, trained / "meta.json", folder),
        Progress(quiet=True),
    )
    assert Bundle.open(folder).meta.backbone == meta.backbone


@pytest.mark.parametrize("opset", [17, 18])
def test_both_opsets_load_and_agree(
    trained: Path, meta: Meta, golden: Pictures, expected: Any, tmp_path: Path, opset: int
) -> None:
    path = exported(trained, meta, tmp_path / "model.onnx", opset)
    assert [o.version for o in onnx.load(path).opset_import if o.domain == ""] == [opset]
    bank = read_bank(trained / "memory_bank.npz")
    agreement = parity(path, expected, golden, bank, meta, precision="f32")
    assert agreement["onnx"]["max_relative"] <= FLOAT32_LIMIT
    assert agreement["openvino_f32"]["max_relative"] <= FLOAT32_LIMIT


def test_half_precision_is_in_the_backbone_alone(
    trained: Path, meta: Meta, golden: Pictures, expected: Any, tmp_path: Path
) -> None:
    path = exported(trained, meta, tmp_path / "model.onnx", half=True)
    model = onnx.load(path)
    types = {weight.name: weight.data_type for weight in model.graph.initializer}
    for node in model.graph.node:  # equal weights stand once in the file
        if node.op_type == "Identity" and node.input[0] in types:
            types[node.output[0]] = types[node.input[0]]
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 15
    assert {types[node.input[1]] for node in convolutions} == {onnx.TensorProto.FLOAT16}
    assert described(model.graph.input)["memory_bank"][0] == onnx.TensorProto.FLOAT
    bank = read_bank(trained / "memory_bank.npz")
    agreement = parity(path, expected, golden, bank, meta, precision="f16")
    assert 0 < agreement["openvino_f32"]["max_relative"] <= HALF_LIMIT


# ---- agreement --------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [1.01, 0.9])
def test_a_graph_that_scores_otherwise_than_the_model_is_refused(
    graph: Path, trained: Path, meta: Meta, golden: Pictures, expected: Any, change: float
) -> None:
    bank = read_bank(trained / "memory_bank.npz")
    with pytest.raises(BadBundle, match="does not agree with the torch model"):
        parity(graph, expected * np.float32(change), golden, bank, meta, precision="f32")


def test_a_verdict_that_flips_is_counted_and_refused(
    graph: Path, trained: Path, meta: Meta, golden: Pictures, expected: Any
) -> None:
    """A threshold within rounding of a score, which lies on its other side."""
    shifted = expected * np.float32(1 + 2e-4)  # within the limit
    between = (float(expected[3]) + float(shifted[3])) / 2
    strict = meta.with_(image_threshold_auto=between, image_threshold=0.5)
    bank = read_bank(trained / "memory_bank.npz")
    with pytest.raises(BadBundle, match=r"[1-9]\d* of \d+ verdicts flip"):
        parity(graph, shifted, golden, bank, strict, precision="f32")


def test_a_refused_conversion_leaves_the_old_engine_and_no_staging_folder(
    trained: Path, own_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in own_model.iterdir()}
    scores = patchcore.scores
    monkeypatch.setattr(patchcore, "scores", lambda model, batches: scores(model, batches) * 1.1)
    with pytest.raises(BadBundle, match="nothing was written"):
        convert(
            Convert("patchcore", trained / "model.pth", trained / "meta.json", own_model), QUIET
        )
    assert {path.name: path.read_bytes() for path in own_model.iterdir()} == before
    assert [path for path in own_model.parent.iterdir() if path.name.startswith(".")] == []


def test_without_golden_images_no_faster_precision_is_allowed(
    trained: Path, tmp_path: Path
) -> None:
    bare = Path(shutil.copytree(trained, tmp_path / "bare"))
    (bare / GOLDEN).unlink()
    made = json.loads((bare / "meta.json").read_text())
    del made["files"]  # as an older tool leaves it
    (bare / "meta.json").write_text(json.dumps(made))
    report = convert(
        Convert("patchcore", bare / "model.pth", bare / "meta.json", tmp_path / "engine"), QUIET
    )
    assert "drawn sample parts" in report["parity_images"]
    assert choose_precision(report) == "f32"
    assert not (tmp_path / "engine" / GOLDEN).exists()
    Bundle.open(tmp_path / "engine")


def test_the_report_says_how_near_what_is_served_comes_to_what_was_learned(
    kensa_model: Path,
) -> None:
    report = Bundle.open(kensa_model).report()
    assert set(report["parity"]) == {"onnx", "openvino_f32"}  # with a bank there is no bf16
    found = report["parity"]["openvino_f32"]
    assert found["max_relative"] <= FLOAT32_LIMIT / 2
    assert found["ok"]


# ---- golden images ----------------------------------------------------------------------------


def test_golden_images_reach_from_the_lowest_to_the_highest_score_of_each_group() -> None:
    def group(count: int, value: int) -> tuple[Pictures, NDArray[np.float32]]:
        pictures = np.full((count, 4, 4, 3), value, np.uint8)
        pictures[:, 0, 0, 0] = np.arange(count)
        return pictures, np.arange(count, dtype=np.float32)[::-1].copy()

    chosen = Golden.choose(*group(50, 100), *group(3, 200)).images
    assert len(chosen) == EACH + 3
    assert chosen[0, 0, 0, 0] == 49  # the last one has the lowest score
    assert chosen[EACH - 1, 0, 0, 0] == 0
    assert (chosen[EACH:, 1, 1, 0] == 200).all()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half of a zip", b"no zip at all"])
def test_damaged_golden_images_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / GOLDEN).write_bytes(content)
    with pytest.raises(BadBundle, match=r"golden\.npz is damaged"):
        Golden.read(tmp_path, 256)


def test_golden_images_of_another_size_are_refused(tmp_path: Path) -> None:
    Golden(np.zeros((2, 64, 64, 3), np.uint8)).write(tmp_path)
    assert Golden.read(tmp_path, 64) is not None
    with pytest.raises(BadBundle, match="not 256 x 256"):
        Golden.read(tmp_path, 256)


# ---- learning from good parts alone -----------------------------------------------------------


def test_with_good_parts_alone_all_are_learned_and_left_out_to_find_the_threshold(
    sample_data: Path, tmp_path: Path
) -> None:
    good = sample_data / "train" / "sample_bracket"
    shutil.copytree(good, tmp_path / "data" / "train" / "bracket")
    (tmp_path / "meta.json").write_text(json.dumps({**PATCHCORE, "coreset_ratio": 0.02}))
    report = retrain(
        Retrain("patchcore", "bracket", tmp_path / "data", tmp_path / "out",
                tmp_path / "meta.json", "untrained"), QUIET)  # fmt: skip
    assert report["images"]["learned"] == len(list(good.iterdir())) == 16
    found = report["calibration"]
    assert (found["method"], found["normals"], found["defects"]) == ("left_out", 16, 0)
    assert "auroc" not in found
    meta = Meta.read(tmp_path / "out" / "meta.json")
    model = patchcore.build(meta, tmp_path / "out" / "model.pth")
    patchcore.load(model, tmp_path / "out" / "memory_bank.npz")
    golden = Golden.read(tmp_path / "out", 256)
    assert golden is not None
    # They are known: none of them lies above the threshold that they gave when they were not.
    assert patchcore.scores(model, [golden.images]).max() <= found["threshold"]
