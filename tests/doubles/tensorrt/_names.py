"""Which names exist, and how they behave: as pybind11 binds them in the version that is doubled.

The JSON files are what `dir()` shows of the real bindings. A class of the double loses every name
that its version lacks; enums are made of the JSON. What holds of all bound objects is here too: no
attribute can be set that does not exist, arguments of other types are refused with a TypeError,
a class without a constructor cannot be made. All of it was tried on the real bindings.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

VERSIONS = {  # as `__version__` says it -> the library's own version
    "10.3.0": "10.3.0.30",
    "10.16.1.11": "10.16.1.11",
    "11.4.0.106": "11.4.0.106",
}
VERSION = os.environ.get("KENSA_DOUBLE_TENSORRT", "10.3.0")
LIBRARY = VERSIONS[VERSION]
MAJOR = int(VERSION.split(".")[0])
DATA = Path(__file__).parents[2] / "data" / "tensorrt"
API: dict[str, Any] = json.loads((DATA / f"{VERSION}.json").read_text())

MOST_SIDES = 8

Type = TypeVar("Type", bound=type)


# Arguments


class Size:
    """An address or a size: `int` in the docstrings, size_t in C++, so never negative."""


class Bits:
    """Flags: `int` in the docstrings, uint32_t in C++."""


class Buffer:
    """Anything with the buffer protocol."""


class Text:
    """`str` in the docstrings, `char const*` in C++: None is a null pointer."""


LIMITS = {"int": (-(1 << 31), 1 << 31), "side": (-(1 << 63), 1 << 63), "Size": (0, 1 << 64),
          "Bits": (0, 1 << 32)}  # fmt: skip


def is_number(value: Any, kind: str = "int") -> bool:
    """pybind11 takes what has `__index__` or `__int__` and fits, but no float and no str."""
    if hasattr(value, "__index__") or (
        hasattr(value, "__int__") and not isinstance(value, float | str)
    ):
        least, beyond = LIMITS[kind]
        return least <= int(value) < beyond
    return False


def is_text(value: Any) -> bool:
    """No Path; and a str must be UTF-8."""
    if isinstance(value, bytes):
        return True
    try:
        return isinstance(value, str) and bool(value.encode() or True)
    except UnicodeEncodeError:
        return False


def is_truth(value: Any) -> bool:
    """None, or what Python itself can ask whether it is true by a method of its own."""
    return value is None or hasattr(value, "__bool__")


# Enums


class Enum:
    """A pybind11 enum: no int, though `int()` takes it, and unequal to every int."""

    __members__: ClassVar[dict[str, Enum]] = {}

    def __init__(self, *values: int) -> None:
        if len(values) != 1 or not is_number(values[0]):
            raise TypeError("__init__(): incompatible constructor arguments.")
        object.__setattr__(self, "value", int(values[0]))

    @property
    def name(self) -> str:
        return next((name for name, one in self.__members__.items() if one == self), "???")

    def __int__(self) -> int:
        return self.value

    __index__ = __hash__ = __int__

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and int(other) == int(self)

    def __le__(self, other: Enum) -> bool:
        return int(self) <= self._of_mine(other)

    def __lt__(self, other: Enum) -> bool:
        return int(self) < self._of_mine(other)

    def __ge__(self, other: Enum) -> bool:
        return int(self) >= self._of_mine(other)

    def __gt__(self, other: Enum) -> bool:
        return int(self) > self._of_mine(other)

    def _of_mine(self, other: object) -> int:
        if type(other) is not type(self):
            raise TypeError("Expected an enumeration of matching type!")
        return int(other)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}.{self.name}: {int(self)}>"

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"can't set attribute {name!r}")


def enum(name: str, values: dict[str, int]) -> Any:
    made: Any = type(name, (Enum,), {"__module__": "tensorrt", "__members__": {}})
    for member, value in values.items():
        made.__members__[member] = made(value)
        setattr(made, member, made.__members__[member])
    return made


ENUMS: dict[str, Any] = {
    name: enum(name, values) for name, values in API.items() if isinstance(values, dict)
}
_LEVELS = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
Severity = enum("Severity", {name: level for level, name in enumerate(_LEVELS)})


# Classes


class _Metaclass(type):
    """What pybind11 does when a class is called."""

    def __call__(cls, *args: Any, **named: Any) -> Any:
        bound = next(c for c in cls.__mro__ if c.__module__.startswith("tensorrt"))
        if "__init__" not in vars(bound):
            raise TypeError(f"tensorrt.tensorrt.{bound.__name__}: No constructor defined!")
        made = super().__call__(*args, **named)
        if not getattr(made, "_initialised", False):
            raise TypeError(
                f"tensorrt.tensorrt.{bound.__name__}.__init__() must be called when overriding"
                " __init__"
            )
        return made


class Bound(metaclass=_Metaclass):
    """The base of every bound class. What the double keeps to itself begins with `_`."""

    _initialised = False

    @classmethod
    def _new(cls, *args: Any) -> Any:
        """An object of a class that has no constructor for programs."""
        made = object.__new__(cls)
        made._initialised = True
        made._setup(*args)
        return made

    def __setattr__(self, name: str, value: object) -> None:
        ours = type(self).__module__.startswith("tensorrt") and name[0] != "_"
        if ours and not hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        object.__setattr__(self, name, value)


def _is_buffer(value: Any) -> bool:
    try:
        memoryview(value)
    except TypeError:
        return False
    return True


def accepts(value: Any, kind: Any) -> bool:
    if isinstance(kind, str):  # the type of an argument, as the annotation writes it
        kind = _resolve(kind)
    plain: dict[Any, Callable[[Any], bool]] = {
        Any: lambda value: True,
        int: is_number,
        Size: lambda value: is_number(value, "Size"),
        Bits: lambda value: is_number(value, "Bits"),
        float: lambda value: isinstance(value, float) or is_number(value, "side"),
        str: is_text,
        Text: lambda value: value is None or is_text(value),
        bool: is_truth,
        list: lambda value: hasattr(value, "__len__") and not isinstance(value, str | bytes),
        Buffer: _is_buffer,
        None: lambda value: value is None,
    }
    if kind in plain:
        return plain[kind](value)
    if isinstance(kind, tuple):
        return any(accepts(value, one) for one in kind)
    if getattr(kind, "__name__", "") == "Dims":
        return isinstance(value, kind) or are_sides(value)
    return isinstance(value, kind)


def are_sides(value: Any) -> bool:
    """What can become Dims."""
    return (
        hasattr(value, "__len__")
        and not isinstance(value, str | bytes)
        and len(value) <= MOST_SIDES
        and all(is_number(side, "side") for side in value)
    )


def as_given(value: Any, kind: Any) -> Any:
    """The argument as C++ gets it: text as text, truth as a bool."""
    first = str(kind).split(" | ")[0]
    if isinstance(value, bytes) and first in ("str", "Text"):
        return value.decode()
    return bool(value) if first == "bool" else value


def _resolve(text: str) -> Any:
    """`int | None`, `Dims`, `DataType` ... -> what `accepts` takes."""
    options = []
    for word in (word.strip() for word in text.split("|")):
        own = {"Any": Any, "Size": Size, "Bits": Bits, "Text": Text, "Buffer": Buffer,
               "None": None, "Severity": Severity}  # fmt: skip
        builtin = {"int": int, "float": float, "str": str, "bool": bool, "list": list}
        found = {**builtin, **own, **ENUMS, **CLASSES}
        options.append(found[word])
    return tuple(options) if len(options) > 1 else options[0]


CLASSES: dict[str, type] = {}


def _checked(function: Callable[..., Any], of: str) -> Callable[..., Any]:
    """Refuse arguments of other types, and number or name them wrongly, as pybind11 does."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapped(*args: Any, **named: Any) -> Any:
        try:
            given = signature.bind(*args, **named)
        except TypeError:
            refuse(args, named)
        for name, value in list(given.arguments.items())[1:]:
            kind = signature.parameters[name].annotation
            if not accepts(value, kind):
                refuse(args, named)
            given.arguments[name] = as_given(value, kind)
        return function(*given.args, **given.kwargs)

    def refuse(args: Any, named: Any) -> None:
        what = "constructor" if function.__name__ == "__init__" else "function"
        text = f"{function.__name__}(): incompatible {what} arguments. The following argument"
        text += f" types are supported:\n    1. {of}.{function.__name__}{signature}\n\n"
        raise TypeError(text + f"Invoked with: {args!r}, kwargs: {named!r}")

    return wrapped


def bound(cls: Type) -> Type:
    """Make a class as the bindings of this version have it."""
    name = cls.__name__
    names = API.get(name)
    CLASSES[name] = cls
    if names is None:
        return cls
    for attribute, value in list(vars(cls).items()):
        if attribute == "__init__":
            setattr(cls, attribute, _initialising(_checked(value, name)))
        elif attribute.startswith("_"):
            continue
        elif attribute not in names:
            delattr(cls, attribute)
        elif inspect.isfunction(value):
            setattr(cls, attribute, _checked(value, name))
        elif isinstance(value, property) and value.fset is not None:
            setattr(cls, attribute, value.setter(_checked(value.fset, name)))
    return cls


def _initialising(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **named: Any) -> None:
        init(self, *args, **named)
        object.__setattr__(self, "_initialised", True)

    return wrapped


# Callbacks of the program


def call_back(what: str, function: Callable[..., Any], *args: Any) -> Any:
    """What Python raises in a callback never leaves TensorRT: it is said on stderr.

    `python/src/infer/pyCore.cpp`: step_complete then returns False, which cancels the build.
    """
    try:
        return function(*args)
    except Exception as error:
        said = str(error)
        if not isinstance(error, _FromC):
            frames = reversed(traceback.extract_tb(error.__traceback__))
            lines = "".join(
                f"  {one.filename}({one.lineno}): {one.name}\n"
                for one in frames
                if Path(one.filename).parent != Path(__file__).parent
            )
            said = f"{type(error).__name__}: {error}\n\nAt:\n{lines}"
        print(f"[ERROR] Exception caught in {what}(): {said}", file=sys.stderr, flush=True)
        return None


class _FromC(RuntimeError):
    """Raised by the bindings themselves, not by Python."""


def truth(value: Any) -> bool:
    """What a callback returned where C++ wants a bool."""
    if not is_truth(value):
        raise _FromC(f"Unable to cast Python instance of type {type(value)} to C++ type '?'")
    return bool(value)


def pure(what: str) -> None:
    raise _FromC(f'Tried to call pure virtual function "{what}"')
