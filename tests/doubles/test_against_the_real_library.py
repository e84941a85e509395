"""The double does what the real library does, wherever that can be asked without a GPU.

NVIDIA's TensorRT for RTX has the same API as TensorRT 11 and is a wheel. `support.observed` uses it
and the double in the same ways, each in a process of its own, and what came of it is compared: all
of it, but for the differences that stand here with their reasons. One that is not here fails, and
so does one that is here and is none any more.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from support import small_graphs
from support.double import RTX, VERSIONS
from support.observed import AREAS
from support.real_library import LIBRARY, needs_rtx, observed, only_numbers
from support.signatures import agree, overloads, own

NEWEST = VERSIONS[-1]  # which has the API of the real library

NO_DEVICE = "its limits are those of a device, and here is none"
NO_GPU = "RTX compiles nothing that is refittable, and strips nothing, without a GPU"
ONE_LOGGER = (
    "RTX has a logger for each builder; of TensorRT 10 it is documented that only the first counts,"
    " and the double keeps everything to that, since one logger for all is right in both"
)
HARDER = "the double is harder on purpose"
RTX_ALONE = "TensorRT for RTX alone has or lacks it"
SHAPES = "no declared size, and arithmetic on shapes that OpenVINO does not follow"
ONE_STEP = "of a file that is no plan: how plans of RTX begin, and of TensorRT, is not the same"

# area -> what was done, as a pattern -> why it is not the same. Of all versions.
DIFFERENT: dict[str, dict[str, str]] = {
    "values": {},
    "logging": {
        r"a builder keeps its logger": ONE_LOGGER,
        r"a second logger: (what|whose).*": ONE_LOGGER,
        r"a logger after the first: .*": ONE_LOGGER,
    },
    "configuring": {
        r"(WORKSPACE|TACTIC_DRAM) (by default|1125899906842624)": NO_DEVICE,
        r"config.hardware_compatibility_level": RTX_ALONE,
    },
    "parsing": {},
    "operators": {
        r"Shape, opset 1[78]: parsed": SHAPES,
        r"TopK of more than there are, opset 1[78]: parsed": SHAPES,
        r"QuantizeLinear (to uint8|without a zero point), opset 1[78]: (parsed|built)":
            f"{HARDER}: the real one computes as int8 what ONNX says is uint8",
        r"NonZero, opset 1[78]: (parsed|built)": f"{RTX_ALONE}: it is a plugin there is not",
    },
    "building": {
        r"flag (REFIT|STRIP_PLAN|REFIT_IDENTICAL)": NO_GPU,
        r"flag VERSION_COMPATIBLE": f"{RTX_ALONE}: a lean runtime that is not in its wheels",
        r"a workspace of \d+":
            "RTX builds nothing with too little; TensorRT skips kernels, and builds with others",
        r"for DLA": f"{RTX_ALONE}: it takes no notice; TensorRT refuses without a core",
        r"memoryview\(plan\).format": "Python cannot make a buffer of floats of one byte each",
    },
    "progress": {r"in one thread": f"{HARDER}: TensorRT documents that other threads report"},
    "running": {
        r"a timing cache of garbage": f"{RTX_ALONE}: timing caches do nothing there",
        r"deserialised: a plan": "there is no driver",
        r"deserialised: (garbage|an ONNX)": ONE_STEP,
        r"a plan begins with": ONE_STEP,
    },
}  # fmt: skip

# What is known of TensorRT 10 from its documentation, or was left as it was.
DIFFERENT_IN_10: dict[str, dict[str, str]] = {
    "values": {
        r"(DataType.|nptype\(DataType.)(FP4|E8M0).*": "10.3 lacks these types",
        r"BuilderFlag\(<DataType.FLOAT: 0>\)": "there 0 is FP16",
        r"Weights\((f8|u2|S1)\)": "seen of the bindings of 10.3: no number of bits",
    },
    "configuring": {r"network without flags": "TensorRT 10 has weakly typed networks"},
    "operators": {
        r"supports \w+": "the operators of ONNX-TensorRT 10.1, by its docs/operators.md",
        r"TopK unsorted, opset 1[78]: (parsed|built)": "refused by docs/operators.md of 10.1",
    },
    "running": {
        r"deserialised: (nothing|a plan without its end|half a plan|20 bytes of a plan)":
            "another line comes after it, as people who use TensorRT 10 have shown",
    },
}  # fmt: skip


def explained(what: str, known: dict[str, str]) -> bool:
    return any(re.fullmatch(pattern, what) for pattern in known)


@needs_rtx
@pytest.mark.parametrize("version", [*VERSIONS, RTX])
@pytest.mark.parametrize("area", [name for name in AREAS if name != "names"])
def test_the_same_comes_of_the_same_but_for_what_is_explained(area: str, version: str) -> None:
    module = LIBRARY if version == RTX else "tensorrt"
    real, double = observed(LIBRARY, area), observed(module, area, version)
    known = dict(DIFFERENT[area])
    if version.startswith("10."):
        known |= DIFFERENT_IN_10.get(area, {})
    other = {
        what
        for what in {*real, *double}
        if real.get(what, "not asked") != double.get(what, "not asked")
    }
    silent = {what: (real.get(what), double.get(what)) for what in sorted(other)
              if not explained(what, known)}  # fmt: skip
    assert silent == {}
    needed = known if version != "10.16.1.11" else DIFFERENT[area]  # 10.3 has what it has, and more
    stale = [one for one in needed if not any(re.fullmatch(one, what) for what in other)]
    assert stale == [], "these are no differences any more"
    assert len(real) > 30


# ---- names ------------------------------------------------------------------------------------

# enum -> members that are not the same, and why.
OTHER_MEMBERS = {
    "BuilderFlag": ({"REQUIRE_USER_ALLOCATION"}, RTX_ALONE),
    "NetworkDefinitionCreationFlag": (
        {"PREFER_JIT_PYTHON_PLUGINS", "PREFER_AOT_PYTHON_PLUGINS"}, "RTX has no plugins in Python",
    ),
}  # fmt: skip


@needs_rtx
def test_each_enum_of_the_double_has_the_members_of_the_real_one() -> None:
    real, double = observed(LIBRARY, "names"), observed("tensorrt", "names", NEWEST)
    enums = {name for name in double if name in real and only_numbers(real[name])}
    assert len(enums) > 40
    for name in enums:
        other = {
            member
            for member in {*real[name], *double[name]}
            if real[name].get(member) != double[name].get(member)
        }
        assert other == OTHER_MEMBERS.get(name, (set(), ""))[0], name


@needs_rtx
def test_each_name_of_the_double_is_in_the_real_one_with_the_same_arguments_and_defaults() -> None:
    real, double = observed(LIBRARY, "names"), observed("tensorrt", "names", NEWEST)
    functions = properties = 0
    other = set()
    for name, members in double.items():
        if name == "module" or name not in real or only_numbers(real[name]):
            continue
        for member, mine in members.items():
            theirs = real[name].get(member)
            if f"{name}.{member}" in OF_THE_CLASS:
                continue
            assert theirs is not None, f"{name}.{member} is not in the real library"
            if isinstance(mine, list):
                arguments = [own(*argument) for argument in mine]
                known = overloads(theirs, member)
                assert agree(arguments, known), (name, member, arguments, known)
                functions += 1
            else:
                other |= {f"{name}.{member}"} if mine != theirs else set()
                properties += 1
    assert other == {*CANNOT_BE_SET}
    assert functions > 60
    assert properties > 30


# What pybind11 has in another way in the class; support.observed looks what they are.
OF_THE_CLASS = {"Dims.MAX_DIMS", "ILogger.Severity", "Logger.Severity"}

CANNOT_BE_SET = {
    "ITensor.name": "nothing of ours renames a tensor: who tries finds out at once",
    "ITensor.shape": "nor gives it another shape",
}

# Names of TensorRT 11 that this library lacks; the double has them.
LACKING = {
    "IPluginV3QuickAOTBuild", "ISymExpr", "ISymExprs", "KernelLaunchParams",
    "QuickPluginCreationRequest",
}  # fmt: skip


@needs_rtx
def test_each_name_in_the_doubles_module_is_in_the_real_one() -> None:
    real, double = observed(LIBRARY, "names"), observed("tensorrt", "names", NEWEST)
    assert {*double["module"]} - {*real["module"]} - {"double_gpu"} <= LACKING


# ---- the corpus -------------------------------------------------------------------------------

SIZE = {"efficientad": 256}  # of a picture; the others take a small one
ABOUT: dict[str, dict[str, Any]] = {
    "patchcore": {"backbone": "resnet18", "layers": ["layer2", "layer3"], "coreset_ratio": 0.5},
    "padim": {"backbone": "resnet18", "layers": ["layer1", "layer2"], "n_features": 30},
    "vae": {"latent_dim": 8},
    "efficientad": {"model_size": "small"},
}


@pytest.mark.parametrize("half", [False, True], ids=["f32", "f16"])
@pytest.mark.parametrize(
    "kind",
    [
        *[one for one in ABOUT if one not in SIZE],
        pytest.param("efficientad", marks=pytest.mark.soak),
    ],
)
def test_every_operator_that_convtrt_writes_is_in_the_corpus(
    kind: str, half: bool, tmp_path: Path
) -> None:
    from engines.image import resize
    from engines.meta import Meta
    from workers import models
    from workers.converting.export import export_onnx
    from workers.progress import Progress
    from workers.sample_parts.drawing import draw_part

    meta = Meta(model=kind, image_size=SIZE.get(kind, 64), **ABOUT[kind])
    of_kind = importlib.import_module(f"workers.models.{kind}")
    pictures = np.stack([resize(draw_part(seed)[0], meta.image_size) for seed in range(6)])
    model = of_kind.build(meta, "untrained")
    learning = models.Training(epochs=1, batch=2)
    of_kind.train(model, meta, [pictures[:3], pictures[3:]], learning, Progress(quiet=True))
    export_onnx(*of_kind.graph(model, half=half), tmp_path / "model.onnx", 17)
    written = {node[0] for nodes, _ in small_graphs.WRITTEN.values() for node in nodes}
    assert {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node} <= written
