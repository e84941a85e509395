"""Every name of TensorRT and pycuda that our code uses exists, in every version.

What exists is in tests/data/tensorrt: `dir()` of the real bindings of 10.3 (JetPack 6.2), 10.16
(JetPack 7.2) and 11.4, and the names in pycuda's source. Where the real bindings can be
downloaded, they are imported over empty libraries and asked.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from support.double import VERSIONS, doubled
from support.project import ROOT
from support.real_library import LIBRARY, needs_rtx, observed, only_numbers
from support.signatures import agree, default_of, overloads, own

DATA = ROOT / "tests" / "data" / "tensorrt"
API = {version: json.loads((DATA / f"{version}.json").read_text()) for version in VERSIONS}
PYCUDA = json.loads((DATA / "pycuda.json").read_text())

FOLDERS = ("app", "engines", "workers")
MODULES = {"trt", "cuda", "driver"}  # what our code calls tensorrt and pycuda.driver

# What a variable is called in our code -> whose attributes it may have.
RECEIVERS = {
    "builder": ["Builder"],
    "network": ["INetworkDefinition"],
    "parser": ["OnnxParser", "OnnxParserRefitter"],
    "config": ["IBuilderConfig", "IRuntimeConfig"],
    "profile": ["IOptimizationProfile"],
    "cache": ["ITimingCache"],
    "timing_cache": ["ITimingCache"],
    "engine": ["ICudaEngine"],
    "context": ["IExecutionContext", "Context"],
    "primary": ["Context"],
    "refitter": ["Refitter", "OnnxParserRefitter"],
    "inspector": ["EngineInspector"],
    "stream": ["Stream"],
    "event": ["Event"],
    "device": ["Device"],
}


# What TensorRT for RTX alone has, and our code asks for where that is what there is. The real one
# is looked at, where it is installed.
FOR_RTX = {
    "ComputeCapability", "num_compute_capabilities", "set_compute_capability",
    "create_runtime_config", "create_runtime_cache", "set_runtime_cache",
    "DynamicShapesKernelSpecializationStrategy", "dynamic_shapes_kernel_specialization_strategy",
}  # fmt: skip


# What our code uses


def users() -> list[Path]:
    """Our files that import TensorRT or pycuda, or use what another file of ours has imported."""
    files = [
        *ROOT.glob("*.py"),
        *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py")),
    ]
    pattern = re.compile(r"^\s*(import|from) (tensorrt|pycuda)\b|\btrt\.[A-Za-z]", re.MULTILINE)
    return sorted(path for path in files if pattern.search(path.read_text(encoding="utf-8")))


def chain(node: ast.expr) -> list[str]:
    """`self.trt.Logger.ERROR` -> its names; an empty list for anything that is not only names."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        before = chain(node.value)
        return [*before, node.attr] if before else []
    return []


def attributes(source: str) -> Iterator[tuple[int, list[str]]]:
    """Line, and the names, of each attribute that is taken; the receiver may be anything."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            yield node.lineno, chain(node) or ["", node.attr]


def members(api: dict[str, Any], name: str) -> set[str]:
    """Of a class or an enum, in TensorRT or in pycuda."""
    known = api.get(name)
    return {*(known if isinstance(known, list | dict) else []), *PYCUDA["classes"].get(name, [])}


@cache
def own_names() -> set[str]:
    """What our code defines itself, as a function, a class, a field or an attribute."""
    found = set()
    for path in (path for name in FOLDERS for path in (ROOT / name).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found |= {node.attr} if chain(node.value) == ["self"] else set()
    return found


def wrong_names(source: str, apis: dict[str, dict[str, Any]] = API) -> list[str]:
    """What does not exist, or not in all versions."""
    words = {
        version: {*api}.union(*(members(api, name) for name in api))
        for version, api in apis.items()
    }
    anywhere = set.union(*words.values())
    found = []
    for line, names in attributes(source):
        *before, last = (name.lstrip("_") or name for name in names)
        for version, api in apis.items():
            of_ours = before[-1:] == ["driver"] and last in own_names()  # a file, no pycuda.driver
            if of_ours or (version != LIBRARY and FOR_RTX & {*names}):
                good = True
            elif MODULES & {*before}:
                start = next(place for place, name in enumerate(before) if name in MODULES)
                good = is_known(api, before[start], names[start + 1 :])
            elif last in own_names():
                good = True
            elif before and before[-1] in RECEIVERS:
                good = any(last in members(api, kind) for kind in RECEIVERS[before[-1]])
            else:
                good = last not in anywhere or last in words[version]
            if not good:
                found.append(f"line {line}: {'.'.join(names)} is not in {version}")
    return sorted(set(found))


def is_known(api: dict[str, Any], module: str, path: list[str]) -> bool:
    """Whether `trt.A.B` or `cuda.A.B` exists; what comes after B is not looked at."""
    first, rest = path[0], path[1:]
    if first == "__version__":
        return True
    there = first in (api if module == "trt" else PYCUDA["module"])
    closed = isinstance(api.get(first), list | dict) or first in PYCUDA["classes"]
    always = {"__members__", "__init__"}  # which the lists leave out
    return there and (not (rest and closed) or rest[0] in {*members(api, first), *always})


@pytest.mark.parametrize("path", users() or [None], ids=str)
def test_every_name_that_we_use_exists_in_all_versions(path: Path | None) -> None:
    if path is None:
        pytest.skip("nothing imports TensorRT yet")
    assert wrong_names(path.read_text(encoding="utf-8")) == []


@needs_rtx
@pytest.mark.parametrize("path", users(), ids=str)
def test_every_name_that_we_use_exists_in_tensorrt_rtx(path: Path) -> None:
    real = observed(LIBRARY, "names")
    api = {
        name: "" if name not in real else real[name] if only_numbers(real[name]) else [*real[name]]
        for name in real["module"]
    }
    assert wrong_names(path.read_text(encoding="utf-8"), {LIBRARY: api}) == []


@pytest.mark.parametrize("path", users() or [None], ids=str)
def test_no_version_is_asked_for(path: Path | None) -> None:
    """One code path: nothing is done for one version and left out for another."""
    if path is None:
        pytest.skip("nothing imports TensorRT yet")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and chain(node.func)[-1:] in (["hasattr"], ["getattr"]):
            asked = chain(node.args[0])
            assert "trt" not in asked or asked[-1] in FOR_RTX, f"line {node.lineno}"
        if isinstance(node, ast.Compare):
            sides = [chain(side) for side in (node.left, *node.comparators)]
            ordered = any(isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE) for op in node.ops)
            asks = any(side[-1:] == ["__version__"] for side in sides)
            assert not (ordered and asks), f"line {node.lineno}"


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("trt.BuilderFlag.FP16", "11.4.0.106"),
        ("config.set_flag(trt.BuilderFlag.STRONGLY_TYPED)", "10.3.0"),
        ("1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)", "11.4.0.106"),
        ("self._engine.device_memory_size", "11.4.0.106"),
        ("context.all_shape_inputs_specified", "11.4.0.106"),
        ("builder.build_engine_with_config(network, config)", "10.3.0"),
        ("config.max_workspace_size = 1", "10.3.0"),
        ("whatever().platform_has_fast_fp16", "11.4.0.106"),
        ("context.set_input_shapes(name, shape)", "10.3.0"),
        ("cuda.mem_allocate(1)", "10.3.0"),
        ("cuda.host_alloc_flags.DEVICE_MAP", "10.3.0"),
        ("stream.sync()", "10.3.0"),
    ],
)
def test_a_name_that_is_not_everywhere_would_be_found(line: str, version: str) -> None:
    assert any(f"is not in {version}" in found for found in wrong_names(line))


@pytest.mark.parametrize(
    "line",
    [
        "trt.BuilderFlag.REFIT",
        "trt.Logger.Severity",
        "config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1)",
        "self._engine.device_memory_size_v2",
        "context.execute_async_v3(stream.handle)",
        "cuda.Device(0).retain_primary_context()",
        "cuda.pagelocked_empty(1, kind, mem_flags=cuda.host_alloc_flags.DEVICEMAP)",
        "array.base.get_device_pointer()",
        "numpy.zeros(1)",
    ],
)
def test_a_name_that_is_everywhere_is_let_through(line: str) -> None:
    assert wrong_names(line) == []


# The doubles have no name of their own


def public(thing: Any) -> set[str]:
    return {name for name in vars(thing) if not name.startswith("_")}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_double_has_no_name_that_tensorrt_lacks(version: str) -> None:
    api = API[version]
    with doubled(version) as double:
        assert public(double.trt) - {*api} == set()
        for name in public(double.trt):
            kind = getattr(double.trt, name)
            if isinstance(kind, type):
                assert {*public(kind)} - {*api[name], "name", "value", "itemsize"} == set(), name
            if isinstance(api[name], dict) and name != "Dims":
                assert {one: int(member) for one, member in kind.__members__.items()} == api[name]


def test_the_double_has_no_name_that_pycuda_lacks() -> None:
    own = {"gpu", "Crash"}
    with doubled() as double:
        module = sys.modules["pycuda.driver"]
        for name in public(module):
            thing = getattr(module, name)
            if getattr(thing, "__module__", "") == "pycuda.driver":
                assert name in PYCUDA["module"], name
                if name in PYCUDA["classes"]:
                    assert public(thing) <= {*PYCUDA["classes"][name]}, name
        assert own <= public(double.cuda)


# The real bindings

BINDINGS = {"10.3.0": "tensorrt-cu12-bindings", "11.4.0.106": "tensorrt-cu13-bindings"}
EXPORTS = [
    *(f"create{name}_INTERNAL" for name in ("InferBuilder", "InferRefitter", "InferRuntime")),
    *(f"create{name}_INTERNAL" for name in ("NvOnnxParserRefitter", "NvOnnxParser")),
    *("getBuilderPluginRegistry", "getPluginRegistry", "initLibNvInferPlugins"),
    "getNvOnnxParserVersion",
]
ASK = """
import json, tensorrt_bindings as trt
def ask(thing):
    said = {name: getattr(getattr(thing, name, None), "__doc__", None) for name in dir(thing)}
    return {name: text if isinstance(text, str) else None for name, text in said.items()}
print(json.dumps({name: ask(getattr(trt, name)) for name in dir(trt)}))
"""


@cache
def real(version: str) -> tuple[dict[str, dict[str, str | None]], dict[str, Any]]:
    """Of the real bindings: class -> name -> docstring, and what came of using their values."""
    compiler, package = shutil.which("cc"), BINDINGS[version]
    if compiler is None:
        pytest.skip("no C compiler to make empty libraries with")
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        reach = ["--retries", "0", "--timeout", "5", "--target", folder, f"{package}=={version}"]
        done = subprocess.run([*download, *reach], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{package} {version} is not to be had here: {done.stderr.strip()[-200:]}")
        source = Path(folder, "empty.c")
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in EXPORTS))
        for library in ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser"):
            target = Path(folder, f"{library}.so.{version.split('.')[0]}")
            subprocess.run([compiler, "-shared", "-fPIC", "-o", target, source], check=True)
        path = os.pathsep.join([folder, str(ROOT / "tests")])
        where = {**os.environ, "LD_LIBRARY_PATH": folder, "PYTHONPATH": path}
        ask = [sys.executable, "-c", ASK]
        asked = subprocess.run(ask, env=where, capture_output=True, text=True)
        if "ImportError" in asked.stderr:
            pytest.skip(f"{package} {version} cannot be imported: {asked.stderr[-200:]}")
        assert asked.returncode == 0, asked.stderr
        ask[1:] = ["-m", "support.observed", "tensorrt_bindings", "values", folder]
        used = subprocess.run(ask, env=where, capture_output=True, text=True)
        assert used.returncode == 0, used.stderr
        return dict(json.loads(asked.stdout)), dict(json.loads(used.stdout.splitlines()[-1]))


@pytest.mark.parametrize("version", BINDINGS)
def test_the_lists_of_names_are_those_of_the_real_bindings(version: str) -> None:
    found, _ = real(version)
    for name, names in API[version].items():
        assert name in found
        if isinstance(names, list | dict):
            assert {*names} - {*found[name]} == set(), name


@pytest.mark.parametrize("version", BINDINGS)
def test_arguments_and_defaults_are_those_of_the_real_bindings(version: str) -> None:
    (found, _), checked = real(version), 0
    with doubled(version) as double:
        for name in public(double.trt):
            kind = getattr(double.trt, name)
            if not isinstance(kind, type) or not isinstance(API[version][name], list):
                continue
            for method, function in inspect.getmembers(kind, inspect.isfunction):
                if method.startswith("_") and method != "__init__":
                    continue
                known = found[name].get(method)
                if known is None or method not in vars(kind):
                    continue
                parameters = [*inspect.signature(function).parameters.values()][1:]
                mine = [own(one.name, one.annotation, default_of(one)) for one in parameters]
                signatures = overloads(known, method)
                assert agree(mine, signatures), (name, method, mine, signatures)
                checked += 1
    assert checked > 60


@pytest.mark.parametrize("version", BINDINGS)
def test_shapes_enums_types_and_weights_behave_as_in_the_real_bindings(version: str) -> None:
    """What `support.observed` does with them needs no library under the bindings."""
    _, used = real(version)
    assert len(used) > 140
    assert observed("tensorrt", "values", version) == used
