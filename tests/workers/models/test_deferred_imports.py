"""Claims about loading anomalib and timm: what is asked for, and all of it to whoever asks."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from support.project import run

KINDS = "import workers.models.patchcore, workers.models.padim, workers.models.efficientad\n"
PACKAGES = ("anomalib.models", "anomalib.models.components", "anomalib.models.image.patchcore",
            "anomalib.data", "anomalib.data.dataclasses.torch", "torchvision.ops")  # fmt: skip
ALL = f"""
import json
from importlib import import_module
promised = {{}}
for name in {PACKAGES}:
    package = import_module(name)
    for one in package.__all__:
        value = getattr(package, one)
        promised[f"{{name}}.{{one}}"] = f"{{value.__module__}}.{{value.__qualname__}}"
"""
SOME = """
import sys, torch, torchvision
from engines.machine.backbones import package_of
from engines.meta import FIRST, Meta
if package_of(FIRST["backbone"]).find():
    workers.models.patchcore.build(Meta.model_validate(FIRST), None)
loaded = list(sys.modules)
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from anomalib.models.image.patchcore import *
import anomalib.models.components as components
import anomalib.models.image.padim.torch_model
try:
    from anomalib.models import Nothing
except ImportError as error:
    said = str(error)
from anomalib.models import get_model
model = get_model("Patchcore", pre_trained=False)
same = [type(model) is Patchcore, type(model.model) is PatchcoreModel]

network, picture = torchvision.models.resnet18().eval(), torch.rand(1, 3, 64, 64)
compiled = torch.compile(network, backend="eager")
compiles = torch.equal(compiled(picture), network(picture))
marked = torch.compiler.disable(lambda value: value + 1)
breaks = torch._dynamo.explain(lambda value: marked(value * 3) * 2)(picture).graph_break_count
"""
FOUND = """
print(json.dumps({"loaded": loaded, "said": said, "nothing": hasattr(components, "nothing"),
                  "same": same, "promised": promised, "compiler": [compiles, breaks]}))
"""


def said_by(program: str) -> Any:
    return json.loads(run(sys.executable, "-W", "ignore", "-c", program).stdout)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What a process found that loaded what learning needs, and then asked for more."""
    answer: dict[str, Any] = said_by(KINDS + SOME + ALL + FOUND)
    return answer


def test_learning_loads_what_it_asks_for(found: dict[str, Any]) -> None:
    assert "anomalib.models.components.feature_extractors.timm" in found["loaded"]
    unasked = ("lightning", "torchmetrics", "anomalib.models.image.dinomaly", "torch._dynamo",
               "torchvision.models.resnet")  # fmt: skip
    assert not set(unasked) & set(found["loaded"])


def test_whoever_asks_for_more_gets_it(found: dict[str, Any]) -> None:
    assert found["same"] == [True, True], "the same classes, whichever way they are asked for"
    assert "cannot import name 'Nothing' from 'anomalib.models'" in found["said"]
    assert not found["nothing"]


def test_all_that_a_package_promises_is_there_as_ever(found: dict[str, Any]) -> None:
    at_once = said_by(ALL + "print(json.dumps(promised))")
    assert found["promised"] == at_once
    assert "anomalib.models.Patchcore" in at_once


def test_who_compiles_gets_the_compiler_and_its_marks(found: dict[str, Any]) -> None:
    assert found["compiler"] == [True, 1]
