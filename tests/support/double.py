"""TensorRT and pycuda as doubles: for a test in its own process, and for one it starts."""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

DOUBLES = Path(__file__).parents[1] / "doubles"
VERSIONS = ("10.3.0", "10.16.1.11", "11.4.0.106")  # JetPack 6.2, JetPack 7.2, the newest
RTX = "1.7.1.116"  # of TensorRT for RTX, whose double is on cuda-bindings
OURS = ("tensorrt", "tensorrt_rtx", "pycuda", "cuda", "double_gpu")
KEEPS = "engines.nvidia.cuda_bindings"  # keeps the driver that it found
PLAN = Path(__file__).parents[2] / "workers/converting/plan"  # what imports TensorRT to make one
BUILDING = tuple(f"workers.converting.plan.{path.stem}" for path in PLAN.glob("[a-z]*.py"))


@dataclass(frozen=True)
class Double:
    """The two packages as a program imports them, and the GPU under them."""

    trt: Any
    cuda: Any
    gpu: Any  # alive(), fail(), report(), crashes, counts, threads, free, lowest_free

    def assert_clean(self) -> None:
        """Nothing that was made is left, and nothing was done that hardware would not forgive."""
        gc.collect()
        assert not self.gpu.crashes, self.gpu.crashes
        assert not self.gpu.alive(), self.gpu.alive()


def environment(
    version: str = "10.3.0",
    device: str = "orin-nano",
    memory_mib: tuple[int, int] | None = None,  # in all, and free
    **more: str,
) -> dict[str, str]:
    """Variables for a process that is to find the doubles; see their docstrings for `more`."""
    path = os.pathsep.join([_folder(version), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {
        "PYTHONPATH": path,
        "KENSA_DOUBLE_TENSORRT": version,
        "KENSA_DOUBLE_DEVICE": device,
        "KENSA_DOUBLE_CRASH": "abort",
        **more,
    }
    if memory_mib is not None:
        variables["KENSA_DOUBLE_MEMORY_MIB"] = f"{memory_mib[0]},{memory_mib[1]}"
    return variables


@contextmanager
def doubled(
    version: str = "10.3.0",
    device: str = "orin-nano",
    memory_mib: tuple[int, int] | None = None,
    users: tuple[str, ...] = (),
    **more: str,
) -> Iterator[Double]:
    """Fresh doubles in this process, and fresh modules of those named in `users`.

    A module that imported TensorRT keeps the double that it found: name it, and import it in the
    block.
    """
    variables = environment(version, device, memory_mib, KENSA_DOUBLE_CRASH="raise", **more)
    kept = {name: os.environ.get(name) for name in variables}
    modules = _forget(users)
    gc.collect()
    gc.freeze()  # so that `assert_clean` looks at what came since, and not at all of torch
    os.environ.update(variables)
    sys.path.insert(0, _folder(version))
    names = ("tensorrt", "pycuda.driver") if version != RTX else ("tensorrt_rtx", KEEPS)
    try:
        yield Double(_load(names[0]), _load(names[1]), _load("double_gpu").gpu)
    finally:
        sys.path.remove(_folder(version))
        sys.modules["double_gpu"].gpu.stack().clear()  # pycuda would end the process
        _forget(users)
        sys.modules.update(modules)
        if KEEPS in modules:
            _set_in_its_package(modules[KEEPS])
        for name, value in kept.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def reports(folder: Path) -> list[dict[str, Any]]:
    """What the processes say that ran with KENSA_DOUBLE_REPORT; see `gpu.report()`."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def _folder(version: str) -> str:
    return str(DOUBLES / "rtx" if version == RTX else DOUBLES)


def _load(name: str) -> ModuleType:
    return importlib.import_module(name)


def _set_in_its_package(module: ModuleType | None) -> None:
    """A package has its modules as attributes, where `from package import module` looks first."""
    package, _, name = KEEPS.rpartition(".")
    if module is not None:
        setattr(sys.modules[package], name, module)
    elif package in sys.modules:
        vars(sys.modules[package]).pop(name, None)


def _forget(users: tuple[str, ...]) -> dict[str, ModuleType]:
    """Take the modules away, so that the next import makes new ones."""
    _set_in_its_package(None)
    names = [name for name in sys.modules if name.split(".")[0] in OURS or name in (*users, KEEPS)]
    return {name: sys.modules.pop(name) for name in names}
