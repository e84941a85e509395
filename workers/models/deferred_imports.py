"""anomalib, timm and torchvision without what nobody asks them for.

`import anomalib.models...` brings every model there is, Lightning and torchmetrics; timm and
torchvision bring torch's compiler. That is most of what passes before a retraining looks at its
first picture. `defer_imports`, called before them, lets packages load what they only pass on when
somebody asks for that (as PEP 562 has it), and the compiler when something is to be compiled.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import resolve_name
from pathlib import Path
from types import ModuleType
from typing import Any

# Those in them, too.
PACKAGES = ("anomalib.models", "anomalib.data", "torchvision.models", "torchvision.ops")


@cache
def defer_imports() -> None:
    """Let PACKAGES load what they pass on when somebody asks for it; to be called before them."""
    sys.meta_path.insert(0, _DeferringFinder())


class _DeferringFinder(MetaPathFinder):
    """Finds these packages as Python does, and has them loaded by `_DeferringLoader`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in ("timm", "torchvision"):
            _leave_the_compiler_unloaded()
        if not any(name == one or name.startswith(f"{one}.") for one in PACKAGES):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.submodule_search_locations is None or spec.origin is None:
            return None  # a module, or nothing at all: as ever
        spec.loader = _DeferringLoader(name, spec.origin)
        return spec


class _DeferringLoader(SourceFileLoader):
    """Loads a package without its `__init__`, which runs when it is needed after all."""

    def exec_module(self, module: ModuleType) -> None:
        passed_on = _names_passed_on(Path(self.path), self.name)
        folder = Path(self.path).parent
        run = super().exec_module

        def load_now(name: str) -> Any:
            if name in passed_on:
                source, original = passed_on[name]
                value = getattr(import_module(source), original)
                setattr(module, name, value)
                return value
            special = name.startswith("__") and name != "__all__"
            if not special and not _has_submodule(folder, name):
                del module.__getattr__
                run(module)  # it makes more than it passes on, or takes all there is of another
                if hasattr(module, name):
                    return getattr(module, name)
            raise AttributeError(f"module {self.name!r} has no attribute {name!r}")

        module.__getattr__ = load_now  # type: ignore[method-assign]


def _names_passed_on(init: Path, package: str) -> dict[str, tuple[str, str]]:
    """What a package's `__init__` imports: name -> the module it is from, and its name there."""
    found = {}
    for line in ast.parse(init.read_bytes()).body:
        if isinstance(line, ast.ImportFrom):
            source = resolve_name("." * line.level + (line.module or ""), package)
            for one in line.names:
                found[one.asname or one.name] = (source, one.name)
    return found


def _has_submodule(folder: Path, name: str) -> bool:
    return (folder / name).is_dir() or (folder / f"{name}.py").is_file()


@cache
def _leave_the_compiler_unloaded() -> None:
    """Let torch.compiler.disable, where nothing was compiled yet, leave a function as it is.

    It marks what torch.compile shall not touch, and loads torch._dynamo for that: 150 MB. Whoever
    compiles here, and nobody does, gets functions compiled too that were marked before.
    """
    import torch.compiler

    mark = torch.compiler.disable

    def disable(fn: Any = None, recursive: bool = True, **more: Any) -> Any:
        if "torch._dynamo" in sys.modules:
            return mark(fn, recursive, **more)  # type: ignore[no-untyped-call]
        return fn or (lambda function: function)

    torch.compiler.disable = disable
