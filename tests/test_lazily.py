"""Claims about loading anomalib: only what is asked for, and all of it to whoever asks."""

from __future__ import annotations

import json
import sys

from conftest import run

KINDS = "import workers.models.patchcore, workers.models.padim, workers.models.efficientad\n"


def said_by(program: str) -> object:
    return json.loads(run(sys.executable, "-c", f"import json, sys\n{program}").stdout)


def test_learning_loads_no_lightning_and_no_other_models() -> None:
    loaded = said_by(f"{KINDS}print(json.dumps(list(sys.modules)))")
    assert isinstance(loaded, list)
    assert "anomalib.models.components.feature_extractors.timm" in loaded
    for name in ("lightning", "torchmetrics", "anomalib.models.image.dinomaly"):
        assert name not in loaded


def test_whoever_asks_anomalib_for_something_gets_it_as_ever() -> None:
    packages = ("anomalib.models", "anomalib.models.components", "anomalib.models.image.patchcore",
                "anomalib.data", "anomalib.data.dataclasses.torch")  # fmt: skip
    ask = f"""
from importlib import import_module
found = {{}}
for name in {packages}:
    package = import_module(name)
    for one in package.__all__:
        value = getattr(package, one)
        found[f"{{name}}.{{one}}"] = f"{{value.__module__}}.{{value.__qualname__}}"
print(json.dumps(found))
"""
    lazily, at_once = said_by(KINDS + ask), said_by(ask)
    assert lazily == at_once
    assert "anomalib.models.Patchcore" in at_once  # type: ignore[operator]


def test_what_a_package_makes_itself_and_takes_whole_is_there_too() -> None:
    found = said_by(f"""{KINDS}
from anomalib.models import get_model
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from anomalib.models.image.patchcore import *
import anomalib.models.image.padim.torch_model
model = get_model("Patchcore", pre_trained=False)
print(json.dumps([type(model) is Patchcore, type(model.model) is PatchcoreModel]))
""")
    assert found == [True, True]


def test_a_name_that_is_nowhere_is_an_error_as_ever() -> None:
    found = said_by(f"""{KINDS}
import anomalib.models.components as components
try:
    from anomalib.models import Nothing
except ImportError as error:
    print(json.dumps(["Nothing" in str(error), hasattr(components, "nothing")]))
""")
    assert found == [True, False]
