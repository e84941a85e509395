"""With what the bindings' functions are called, as their docstrings and as the double say it."""

from __future__ import annotations

import inspect
import re

Argument = tuple[str, str, str | None]  # name, type as the double writes it, default


def overloads(docstring: str, name: str) -> list[list[Argument]]:
    """The arguments of each signature in a docstring of pybind11's."""
    found = []
    for signature in re.findall(rf"^(?:\d+\. )?{name}\((self: .*)\) ->", docstring, re.MULTILINE):
        parts = [""]
        depth = 0
        for letter in signature:
            depth += (letter in "[(<") - (letter in "])>")
            if letter == "," and not depth:
                parts.append("")
            else:
                parts[-1] += letter
        found.append([argument(part) for part in parts[1:]])
    return found


def agree(mine: list[Argument], known: list[list[Argument]]) -> bool:
    """Also where two signatures are one with a default."""
    least = [one for one in mine if one[2] is None]
    most = [(name, kind, None) for name, kind, _ in mine]
    return mine in known or (least in known and most in known)


def argument(text: str) -> Argument:
    """`flags: typing.SupportsInt = 0` -> flags, int, 0."""
    name, kind = text.split(":", 1)
    kind, _, default = kind.partition(" = ")
    return name.strip(), plain(kind), default.strip() or None


def plain(kind: str) -> str:
    """`tensorrt_bindings.tensorrt.Dims`, `typing.SupportsInt`, `List[int]` -> Dims, int, list."""
    kind = re.sub(r"\b(?:\w+(?:::|\.))+", "", kind.strip().split("[")[0])
    same = {"SupportsInt": "int", "SupportsIndex": "int", "SupportsFloat": "float", "List": "list",
            "tuple": "Dims", "Sequence": "list", "buffer": "Buffer", "ndarray": "Any"}  # fmt: skip
    return same.get(kind, kind)


def own(name: str, annotation: str, default: str | None) -> Argument:
    """An argument of the double, which tells sizes and flags from other numbers."""
    kind = str(annotation).split(" | ")[0]
    return name, {"Size": "int", "Bits": "int", "Text": "str"}.get(kind, kind), default


def default_of(parameter: inspect.Parameter) -> str | None:
    return None if parameter.default is parameter.empty else repr(parameter.default)
