"""What bindings of TensorRT do when they are used rightly and wrongly: real ones, or the double.

    python -m support.observed MODULE AREA FOLDER

Its last line is JSON: what was done -> what came of it. Only what needs no GPU. What the logger
heard stands beside it: errors and warnings, without places in NVIDIA's source. See `Seen.see`.

Left out, because the real library does not survive it: a timing cache combined with itself (it
waits for ever), two parsers for one network (it dies at the end), a parser whose network nobody
else holds (it dies), None as a text for `Logger.log` (C++ writes nothing to stdout any more).
"""

from __future__ import annotations

import collections.abc
import gc
import hashlib
import importlib
import inspect
import json
import operator
import os
import re
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from support import small_graphs
from support.graphs import graph

Json = Any
TRT: Any = None  # the module

NO_DRIVER = re.compile(r"catchCudaError|cudaError 35|\bThread context has not been set\b")
PLACE = re.compile(r"\s+In \w+ at /\S+|(?<=\.[ch]pp:)\d+|\[?\w+\.cpp::\w+::\d+\]? ")


class Seen(dict[str, Json]):
    """What was done -> what came of it, with a logger that hears everything meanwhile."""

    def __init__(self) -> None:
        heard: list[str] = []
        self.heard = heard

        class Log(TRT.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                TRT.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity <= TRT.ILogger.WARNING and not NO_DRIVER.search(msg):
                    heard.append(f"{severity.name}: {said(msg)}")

        self.log = Log()

    def see(self, what: str, call: Callable[[], Any]) -> Any:
        """Keep the result, or the kind of exception, with what the logger heard.

        The words of a TypeError or AttributeError are Python's or pybind11's own: not kept.
        """
        self.heard.clear()
        found = None
        try:
            found = call()
            result = plain(found)
        except (TypeError, AttributeError) as error:
            result = type(error).__name__
        except Exception as error:  # noqa: BLE001
            result = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if what in self:
            what += ", again"
        self[what] = {"is": result, "heard": list(self.heard)} if self.heard else result
        return found


def said(text: str) -> str:
    """Without the places in NVIDIA's source, and what is left open behind them."""
    found = PLACE.sub("", text).replace("tensorrt_rtx_bindings.tensorrt_rtx.", "")
    return found.strip().rstrip(" .)")


def plain(value: Any) -> Json:
    """As JSON: what belongs to the bindings by its name and what it prints."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes | bytearray) and type(value) in (bytes, bytearray):
        return f"{len(value)} bytes"
    if isinstance(value, TRT.Dims):
        return f"Dims{tuple(value)}"
    if hasattr(type(value), "__members__"):
        return str(value)
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, type):
        return value.__name__
    return f"a {type(value).__name__}"


def put(thing: Any, name: str, value: Any) -> Any:
    """Set an attribute, and read it."""
    setattr(thing, name, value)
    return getattr(thing, name)


# Names


def names(seen: Seen, _: Path) -> None:
    """Each class and enum: what is in it, what can be set, and what is called with what."""
    for name in dir(TRT):
        kind = getattr(TRT, name)
        if name.startswith("_") or not isinstance(kind, type) or kind.__module__ == "builtins":
            continue
        members = getattr(kind, "__members__", None)
        if members is not None:
            seen[name] = {one: int(member) for one, member in members.items()}
            continue
        seen[name] = {
            one: described(inspect.getattr_static(kind, one))
            for base in kind.__mro__
            if base.__module__ != "builtins"
            for one in vars(base)
            if not one.startswith("_") or one == "__init__"
        }
    seen["module"] = sorted(name for name in dir(TRT) if not name.startswith("_"))


def described(thing: Any) -> Json:
    """A property, or what it is called with: pybind11 has it in its docstring alone."""
    if isinstance(thing, property):
        return "a property" if thing.fset is not None else "a property that cannot be set"
    if inspect.isfunction(thing):
        return [
            [one.name, one.annotation, None if one.default is one.empty else repr(one.default)]
            for one in [*inspect.signature(thing).parameters.values()][1:]
        ]
    return thing.__doc__ if callable(thing) else "a value"


# Building blocks


def values(seen: Seen, _: Path) -> None:
    _dims(seen, TRT.Dims)
    _enums(seen, TRT.BuilderFlag, TRT.ILogger.Severity)
    see = seen.see
    for name in ("float32", "float16", "int8", "int32", "int64", "uint8", "bfloat16", "bool"):
        see(f"trt.{name}", lambda name=name: getattr(TRT, name))
    for name, kind in TRT.DataType.__members__.items():
        see(f"DataType.{name}.itemsize", lambda kind=kind: kind.itemsize)
        see(f"nptype(DataType.{name})", lambda kind=kind: TRT.nptype(kind))
    for wrong in (None, 0, "FLOAT"):
        see(f"nptype({wrong!r})", lambda wrong=wrong: TRT.nptype(wrong))
    for sides in ((2, 3), (), TRT.Dims((2, 3)), (1.5, 2)):
        see(f"volume({sides})", lambda sides=sides: TRT.volume(sides))
    _weights(seen)


def _dims(seen: Seen, dims: Any) -> None:
    see, two = seen.see, TRT.Dims((1, 2))
    for sides in ((), (1, 2), [3], (-1,), np.array([1, 2]), (np.int64(1),), range(3), two, "12",
                  (1,) * 8, (1,) * 9, (1.0,), b"12", None, 3, (1 << 40,), (1 << 70,)):  # fmt: skip
        see(f"Dims({sides!r})", lambda sides=sides: dims(sides))
    see("Dims(shape=...)", lambda: dims(shape=(1,)))
    see("Dims()", lambda: dims())
    for other in ((1, 2), [1, 2], (1, 3), two, None, 1, np.array([1, 2])):
        see(f"Dims == {type(other).__name__} {other!r}", lambda other=other: two == other)
        see(f"Dims != {type(other).__name__} {other!r}", lambda other=other: two != other)
    see("tuple == Dims", lambda: operator.eq((1, 2), two))
    for index in (0, 1, -1, -2, 2, -3, "0", None, slice(1, None)):
        see(f"Dims[{index!r}]", lambda index=index: two[index])
    see("hash(Dims)", lambda: hash(two))
    see("tuple(Dims)", lambda: tuple(two))
    see("len(Dims)", lambda: len(two))
    see("1 in Dims", lambda: 1 in two)
    see("bool(Dims())", lambda: bool(dims()))
    see("str(Dims)", lambda: [str(two), repr(two), str(dims((1,)))])
    see("Dims + tuple", lambda: operator.add(two, (3,)))
    see("Dims.MAX_DIMS", lambda: dims.MAX_DIMS)

    def changed() -> Any:
        other = dims((1, 2))
        other[0] = 5
        return other

    see("Dims[0] = 5", changed)


def _enums(seen: Seen, flag: Any, severity: Any) -> None:
    see, refit = seen.see, flag.REFIT
    see("an enum in words", lambda: [repr(refit), str(refit), f"{refit}", refit.name])
    see("int(enum)", lambda: [int(refit), refit.value, hash(refit), float(refit)])
    see("list[enum]", lambda: list(range(99))[refit])
    see("enum == int", lambda: refit == int(refit))
    see("enum == None", lambda: refit is None or refit == None)  # noqa: E711
    see("enum == another enum's", lambda: TRT.DataType.FLOAT == TRT.DeviceType.GPU)
    see("enum != enum", lambda: refit != flag.TF32)
    for name, call in {
        "<": lambda other: refit < other, "<=": lambda other: refit <= other,
        ">": lambda other: refit > other, ">=": lambda other: refit >= other,
        "|": lambda other: refit | other,
    }.items():  # fmt: skip
        for other in (flag.TF32, 9, TRT.DataType.FLOAT, None):
            see(f"enum {name} {other}", lambda call=call, other=other: call(other))
    see("1 << enum", lambda: 1 << refit)
    for wrong in ("REFIT", 4.0, None, TRT.DataType.FLOAT, 99):
        see(f"BuilderFlag({wrong!r})", lambda wrong=wrong: repr(flag(wrong)))
    see("BuilderFlag()", lambda: flag())
    see("BuilderFlag['REFIT']", lambda: flag["REFIT"])
    see("list(BuilderFlag)", lambda: list(flag))
    see("enum.name = ...", lambda: put(refit, "name", "x"))
    see("enum.other = ...", lambda: put(refit, "other", 1))
    see("{enum: 1}.get(int)", lambda: {refit: 1}.get(int(refit)))
    see("severities", lambda: {one: int(severity.__members__[one]) for one in
                               severity.__members__}.__repr__())  # fmt: skip
    see("max of severities", lambda: max(severity.ERROR, severity.INFO))
    see("Logger.ERROR", lambda: TRT.Logger.ERROR == severity.ERROR == TRT.ILogger.ERROR)
    see("Logger.Severity", lambda: TRT.Logger.Severity is severity)


def _weights(seen: Seen) -> None:
    def told(array: Any) -> Any:
        found = TRT.Weights(array)
        return [found.dtype, found.size, found.nbytes, len(found), found.numpy().shape]

    arrays: dict[str, Any] = {
        kind: np.zeros((2, 3), kind)
        for kind in ("f4", "f2", "i1", "i4", "i8", "?", "u1", "f8", "u2", "S1")
    }
    arrays["every second"] = np.zeros((4, 4), np.float32)[:, ::2]
    arrays["transposed"] = np.zeros((4, 2), np.float32).T
    arrays["none"] = np.zeros(0, np.float32)
    arrays |= {"a list": [1.0], "None": None, "a float": 1.0, "a str": "x"}
    for name, array in arrays.items():
        seen.see(f"Weights({name})", lambda array=array: told(array))
    seen.see("Weights(a type)", lambda: told(TRT.DataType.FLOAT))

    def shared() -> Any:
        array = np.zeros(3, np.float32)
        found = TRT.Weights(array)
        array[0] = 9
        return float(found.numpy()[0])

    seen.see("Weights share the array's memory", shared)


# Logging


@contextmanager
def written(number: int = 2) -> Iterator[Callable[[], str]]:
    """What goes to stdout or stderr meanwhile, also from C++."""
    stream = {1: sys.stdout, 2: sys.stderr}[number]
    with tempfile.TemporaryFile() as file:
        before = os.dup(number)
        stream.flush()
        os.dup2(file.fileno(), number)

        def read() -> str:
            stream.flush()
            file.seek(0)
            return file.read().decode()

        try:
            yield read
        finally:
            os.dup2(before, number)
            os.close(before)


def logging(seen: Seen, _: Path) -> None:
    see = seen.see
    for name, kind in _loggers().items():

        def use(kind: Any = kind) -> Any:
            logger = kind()
            builder = TRT.Builder(logger)
            network = builder.create_network(0)
            parser = TRT.OnnxParser(network, logger)
            return [parser.parse(b"no ONNX"), parser.num_errors]

        with written() as read:
            see(f"a logger {name}", use)
            lines = [line for line in read().splitlines() if line.startswith("[ERROR]")]
            see(f"a logger {name}: stderr", lambda lines=lines: said(lines[0]) if lines else None)
        gc.collect()
    logger = TRT.Logger()
    see("Logger().min_severity", lambda: logger.min_severity)
    see("Logger(...)", lambda: TRT.Logger(min_severity=TRT.Logger.ERROR).min_severity)
    for value in (TRT.Logger.INFO, 3, None, "INFO"):
        see(f"min_severity = {value}", lambda value=value: put(logger, "min_severity", value))
    see("Logger(1)", lambda: TRT.Logger(1))
    see("Logger.log(1, ...)", lambda: logger.log(1, "x"))
    see("logger.other = ...", lambda: put(logger, "other", 1))
    for name in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"):
        with written(1) as out, written(2) as err:
            logger.log(getattr(TRT.Logger, name), "words")
            lines = [re.sub(r"\d", "0", read()) for read in (out, err)]
        see(f"Logger.log({name}): stdout, stderr", lambda lines=lines: lines)
    builder = TRT.Builder(seen.log)
    see("builder.logger", lambda: builder.logger is seen.log)

    def outlives() -> Any:
        builder = TRT.Builder(TRT.Logger())
        gc.collect()
        return builder.logger

    see("a builder keeps its logger", outlives)
    _second_logger(seen)


def _loggers() -> dict[str, Any]:
    def wrong(self: Any, severity: Any, msg: str) -> None:
        raise ValueError("of the program's own")

    def begin(self: Any) -> None:
        TRT.ILogger.__init__(self)

    begun = {"__init__": begin}
    return {
        "that fails": type("Wrong", (TRT.ILogger,), {**begun, "log": wrong}),
        "without log": type("Without", (TRT.ILogger,), begun),
        "with too few arguments": type("Few", (TRT.ILogger,), {**begun, "log": lambda self: None}),
        "without __init__": type("Plain", (TRT.ILogger,), {"log": lambda self, severity, msg: 0}),
        "that forgets __init__": type("Not", (TRT.ILogger,), {"__init__": lambda self: None}),
        "of the bindings": TRT.ILogger,
    }


def _second_logger(seen: Seen) -> None:
    other = Seen()
    alive = [TRT.Builder(seen.log)]
    alive.append(seen.see("a second logger: what the first hears", lambda: TRT.Builder(other.log)))
    seen.see("a second logger: what it hears", lambda: list(other.heard))
    other.heard.clear()
    seen.see("a second logger: whose is heard", lambda: alive[1].create_network(1 << 20))
    seen.see("a second logger: whose is heard itself", lambda: list(other.heard))
    seen.see("a second logger: builder.logger", lambda: alive[1].logger is other.log)
    alive.clear()
    gc.collect()
    third = TRT.Builder(other.log)
    other.heard.clear()
    seen.see("a logger after the first: heard by the first", lambda: third.create_network(1 << 20))
    seen.see("a logger after the first: heard itself", lambda: list(other.heard))


# Networks, profiles and configurations

NUMBERS = (0, 2, -1, "2", None, 1.5, np.float32(2), np.int8(2), True, 1 << 31, 1 << 40, 1 << 70)


def configuring(seen: Seen, _: Path) -> None:
    see = seen.see
    for wrong in (None, "x", seen):
        see(f"Builder({type(wrong).__name__})", lambda wrong=wrong: TRT.Builder(wrong))
    see("Builder()", lambda: TRT.Builder())
    builder = TRT.Builder(seen.log)
    see("num_DLA_cores", lambda: builder.num_DLA_cores)
    for value in NUMBERS:
        see(f"max_threads = {value!r}", lambda value=value: put(builder, "max_threads", value))
        see(f"create_network({value!r})", lambda value=value: builder.create_network(value)
            if value != 2 and not isinstance(value, np.number) else "not asked")  # fmt: skip
    see("create_network(flags=1)", lambda: builder.create_network(flags=1))
    see("create_network(1, 2)", lambda: builder.create_network(1, 2))
    see("create_network(other=1)", lambda: builder.create_network(other=1))
    see("create_network(1 << 20)", lambda: builder.create_network(1 << 20))
    see("builder.other = 1", lambda: put(builder, "other", 1))
    see("builder.other", lambda: builder.other)
    see("builder.num_DLA_cores = 1", lambda: put(builder, "num_DLA_cores", 1))
    for kind in ("IBuilderConfig", "INetworkDefinition", "IOptimizationProfile", "ITensor",
                 "ICudaEngine", "IExecutionContext", "ParserError", "ITimingCache",
                 "IHostMemory", "EngineInspector"):  # fmt: skip
        see(f"{kind}()", lambda kind=kind: getattr(TRT, kind)())
    _network(seen, TRT.Builder(seen.log))
    _config(seen, builder)
    _pools(seen, builder)
    _profiles(seen, builder)


def _network(seen: Seen, builder: Any) -> None:
    see, typed = seen.see, TRT.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(typed))
    see("network.get_flag", lambda: [network.get_flag(typed), network.flags >> int(typed) & 1])
    see("network.get_flag(0)", lambda: network.get_flag(0))
    untyped = builder.create_network(0)
    see("network without flags", lambda: [untyped.get_flag(typed), untyped.flags])
    see("network.name", lambda: [network.name, untyped.name, builder.create_network().name])
    for name in ("x", "", b"bytes", "検", None, 3, Path("x"), "\udcff"):
        see(f"network.name = {name!a}", lambda name=name: put(network, "name", name))
    see("an empty network", lambda: [network.num_layers, network.num_inputs, network.num_outputs])
    for index in (0, -1, "0", None, 1.0):
        see(f"get_input({index!r})", lambda index=index: network.get_input(index))
        see(f"get_output({index!r})", lambda index=index: network.get_output(index))
    see("network.other = 1", lambda: put(network, "other", 1))
    see("network.num_layers = 1", lambda: put(network, "num_layers", 1))
    see("network.builder", lambda: network.builder is builder)


def _config(seen: Seen, builder: Any) -> None:
    see, flags = seen.see, TRT.BuilderFlag
    config = builder.create_builder_config()
    for name in ("builder_optimization_level", "avg_timing_iterations", "max_aux_streams",
                 "default_device_type", "engine_capability", "profiling_verbosity",
                 "progress_monitor", "num_optimization_profiles", "DLA_core",
                 "hardware_compatibility_level", "profile_stream"):  # fmt: skip
        see(f"config.{name}", lambda name=name: getattr(config, name))
    by_default = [name for name, flag in flags.__members__.items() if config.get_flag(flag)]
    see("flags by default", lambda: by_default)
    for name in ("REFIT", "TF32", "GPU_FALLBACK", "STRIP_PLAN", "VERSION_COMPATIBLE"):
        flag = getattr(flags, name)
        see(f"set_flag({name})", lambda flag=flag: [config.set_flag(flag), config.get_flag(flag)])
        see(f"clear_flag({name})", lambda f=flag: [config.clear_flag(f), config.get_flag(f)])
    for wrong in (0, "REFIT", None, TRT.DataType.FLOAT):
        see(f"set_flag({wrong!r})", lambda wrong=wrong: config.set_flag(wrong))
    for value in (1 << int(flags.REFIT), -1, "x", None, 1.5, 1 << 31, 1 << 40):
        see(f"config.flags = {value!r} (of 1 << REFIT)", lambda value=value: put(
            config, "flags", value) == 1 << int(flags.REFIT))  # fmt: skip
    config.reset()
    see("after reset", lambda: [config.get_flag(flags.TF32), config.num_optimization_profiles])
    for value in (*NUMBERS, 5, 6):
        see(f"builder_optimization_level = {value!r}", lambda value=value: put(
            config, "builder_optimization_level", value))  # fmt: skip
    for name in ("default_device_type", "profiling_verbosity", "progress_monitor"):
        for wrong in (0, "x", TRT.BuilderFlag.REFIT, object()):
            see(f"{name} = a {type(wrong).__name__}", lambda name=name, wrong=wrong: put(
                config, name, wrong))  # fmt: skip
    see("config.other = 1", lambda: put(config, "other", 1))
    see("config.max_workspace_size = 1", lambda: put(config, "max_workspace_size", 1))


def _pools(seen: Seen, builder: Any) -> None:
    config, pools = builder.create_builder_config(), TRT.MemoryPoolType

    def limit(pool: Any, size: Any) -> Any:
        config.set_memory_pool_limit(pool, size)
        return config.get_memory_pool_limit(pool)

    for name in ("WORKSPACE", "TACTIC_DRAM"):
        pool = getattr(pools, name)
        seen.see(f"{name} by default", lambda pool=pool: limit.__name__ and
                 config.get_memory_pool_limit(pool))  # fmt: skip
        for size in (1 << 20, 3 << 20, 4096, 2048, 0, np.int64(1 << 21), True, -1, "x", None,
                     1.5, 1 << 50, 1 << 70):  # fmt: skip
            seen.see(f"{name} {size!r}", lambda pool=pool, size=size: limit(pool, size))
    seen.see("a pool's number", lambda: limit(0, 1))
    seen.see("a pool by name", lambda: config.set_memory_pool_limit(pool=pools.WORKSPACE,
                                                                    pool_size=1 << 20))  # fmt: skip


OK = ((1, 4, 4, 3), (2, 4, 4, 3), (8, 4, 4, 3))


def _profiles(seen: Seen, builder: Any) -> None:
    see = seen.see
    shapes: dict[str, tuple[Any, ...]] = {
        "that fit": OK, "in no order": ((3,), (2,), (8,)), "whose best is too large": ((1,), (9,),
        (8,)), "negative": ((-1,), (2,), (8,)), "negative at most": ((1,), (2,), (-8,)), "of zero":
        ((0,), (2,), (8,)), "of other lengths": ((1,), (1, 2), (1, 2)), "of nine sides":
        (((1,) * 9,) * 3), "empty": ((),) * 3, "of 2**40": (((1 << 40,),) * 3), "of 2**70":
        (((1 << 70,),) * 3), "as lists": ([1],) * 3, "as Dims": (TRT.Dims((1,)),) * 3, "as arrays":
        (np.array([1]),) * 3, "of NumPy's numbers": ((np.int64(1),),) * 3, "of floats":
        ((1.0,),) * 3, "as text": ("1",) * 3, "as numbers": (1,) * 3, "as None": (None,) * 3,
        "of only two": ((1,),) * 2,
    }  # fmt: skip
    for what, three in shapes.items():
        profile = builder.create_optimization_profile()
        see(f"shapes {what}: set", lambda p=profile, three=three: p.set_shape("image", *three))
        see(f"shapes {what}: get", lambda p=profile: p.get_shape("image"))
        see(f"shapes {what}: bool", lambda p=profile: bool(p))
        config = builder.create_builder_config()
        see(f"shapes {what}: add", lambda c=config, p=profile: c.add_optimization_profile(p))
        see(f"shapes {what}: added", lambda c=config: c.num_optimization_profiles)
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    see("shapes by name", lambda: profile.set_shape(input="k", min=(1,), opt=(1,), max=(1,)))
    for name in (None, 3, b"bytes", Path("x")):
        see(f"shapes of {name!r}", lambda name=name: profile.set_shape(name, (1,), (1,), (1,)))
    see("shapes of 'bytes'", lambda: profile.get_shape("bytes"))
    see("shapes set twice", lambda: [profile.set_shape("k", *OK), profile.get_shape("k")])
    see("one profile, two times", lambda: [config.add_optimization_profile(profile)
                                           for _ in range(2)])  # fmt: skip
    for wrong in (None, 3, config):
        see(f"a profile that is a {type(wrong).__name__}", lambda wrong=wrong:
            config.add_optimization_profile(wrong))  # fmt: skip


# Parsing


def errors(parser: Any) -> Json:
    return [
        [error.code().name, error.node(), error.node_name(), error.node_operator(), error.func(),
         error.file(), said(error.desc()), said(str(error)), type(error.line()).__name__]
        for error in (parser.get_error(number) for number in range(parser.num_errors))
    ]  # fmt: skip


def filled(network: Any) -> Json:
    """Inputs, outputs, and whether there are layers: their number is not that of the nodes."""
    found = [network.get_input(number) for number in range(network.num_inputs)]
    made = [network.get_output(number) for number in range(network.num_outputs)]
    tensors = [
        [one.name, plain(one.dtype), plain(one.shape), one.is_network_input, one.is_network_output]
        for one in (*found, *made)
    ]
    return [network.num_layers > 0, tensors]


def new_parser(seen: Seen) -> tuple[Any, Any, Any]:
    """A builder, which must be kept, a network and a parser."""
    builder = TRT.Builder(seen.log)
    network = builder.create_network(1 << int(TRT.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    return builder, network, TRT.OnnxParser(network, seen.log)


def parsing(seen: Seen, folder: Path) -> None:
    unique = helper.make_node("Unique", ["map"], ["unused"], "unique", sorted=1)
    see, good, bad = seen.see, graph(), graph(extra=[unique])
    for name, data in {"good": good, "empty": b"", "garbage": b"no ONNX" * 50, "cut": good[:-1],
                       "half": good[: len(good) // 2], "bad": bad}.items():  # fmt: skip
        (folder / f"{name}.onnx").write_bytes(data)
    outside = _with_weights_outside(folder)
    path = str(folder)
    calls: dict[str, Callable[[Any], Any]] = {
        "nothing": lambda p: p.parse(b""),
        "an empty model": lambda p: p.parse(onnx.ModelProto(ir_version=8).SerializeToString()),
        "None": lambda p: p.parse(None),
        "a str": lambda p: p.parse("x"),
        "a bytearray": lambda p: p.parse(bytearray(good)),
        "a memoryview": lambda p: p.parse(memoryview(good)),
        "an array": lambda p: p.parse(np.frombuffer(good, np.uint8)),
        "with a path that is not there": lambda p: p.parse(good, f"{path}/no/model.onnx"),
        "with a Path": lambda p: p.parse(good, folder),
        "with None": lambda p: p.parse(good, None),
        "by names": lambda p: p.parse(model=good, path="x"),
        "good, twice": lambda p: [p.parse(good), p.parse(good)],
        "garbage, then good": lambda p: [p.parse(b"no ONNX" * 50), p.parse(good)],
        "bad, then good": lambda p: [p.parse(bad), p.parse(good)],
        "nothing, then good": lambda p: [p.parse(b""), p.parse(good)],
        "weights beside it": lambda p: p.parse(outside, f"{path}/outside.onnx"),
        "weights beside it, no path": lambda p: p.parse(outside),
        "weights that are gone": lambda p: p.parse(outside, f"{path}/gone/outside.onnx"),
        "weights that are gone, then good": lambda p: [p.parse(outside), p.parse(good)],
        "opset 6": lambda p: p.parse(graph(opset=6)),
        "opset 7": lambda p: p.parse(graph(opset=7)),
        "opset 99": lambda p: p.parse(
            small_graphs.small_graph(*small_graphs.WRITTEN["Relu"], opset=99)),
        **{f"a file that is {name}": lambda p, name=name: p.parse_from_file(f"{path}/{name}.onnx")
           for name in ("good", "empty", "garbage", "cut", "half", "bad", "outside", "absent")},
        "no file, then good": lambda p: [p.parse_from_file(f"{path}/absent.onnx"), p.parse(good)],
        "no file, forgotten, then good": lambda p: [
            p.parse_from_file(f"{path}/absent.onnx"), p.clear_errors(), p.parse(good)],
        "garbage, forgotten, then good": lambda p: [
            p.parse(b"no ONNX" * 50), p.clear_errors(), p.parse(good)],
        "get_error of none, then good": lambda p: [p.get_error(0), p.parse(good)],
        "a folder": lambda p: p.parse_from_file(path),
        "a Path": lambda p: p.parse_from_file(folder / "good.onnx"),
        "a file named by bytes": lambda p: p.parse_from_file(f"{path}/good.onnx".encode()),
        "a file named None": lambda p: p.parse_from_file(None),
    }  # fmt: skip
    for what, call in calls.items():
        builder, network, parser = new_parser(seen)
        see(f"{what}: parsed", lambda call=call, parser=parser: call(parser))
        see(f"{what}: errors", lambda parser=parser: errors(parser))
        see(f"{what}: network", lambda network=network: filled(network))
        del parser, network, builder
    for one in list(seen):
        seen[one] = json.loads(json.dumps(seen[one]).replace(path, "FOLDER"))
    _about_the_parser(seen, bad)


def _with_weights_outside(folder: Path) -> bytes:
    model = onnx.load_from_string(graph())
    path = folder / "outside.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    return path.read_bytes()


def _about_the_parser(seen: Seen, bad: bytes) -> None:
    see = seen.see
    builder, network, parser = new_parser(seen)
    parser.parse(bad)
    for index in (0, 5, -1, None, "0"):
        see(f"get_error({index!r})", lambda index=index: parser.get_error(index) is not None)
    see("num_errors after those", lambda: parser.num_errors)
    see("clear_errors", lambda: [parser.clear_errors(), parser.num_errors])
    for name, flag in TRT.OnnxParserFlag.__members__.items():
        if flag == TRT.OnnxParserFlag.NATIVE_INSTANCENORM:
            see(f"parser flag {name}", lambda f=flag: [parser.get_flag(f), parser.clear_flag(f),
                                                       parser.flags])  # fmt: skip
    see("parser.flags = 1", lambda: put(parser, "flags", 1))
    for wrong in (-1, None, "x", 1 << 40):
        see(f"parser.flags = {wrong!r}", lambda wrong=wrong: put(parser, "flags", wrong))
    see("supports_operator(None)", lambda: parser.supports_operator(None))
    see("supports_operator(3)", lambda: parser.supports_operator(3))
    for wrong in ((None, seen.log), (network, None), (network,), ("x", seen.log)):
        see(f"OnnxParser{tuple(type(one).__name__ for one in wrong)}", lambda wrong=wrong:
            TRT.OnnxParser(*wrong))  # fmt: skip
    del builder


def operators(seen: Seen, _: Path) -> None:
    """What is said of each operator of ONNX, and what becomes of small graphs of some."""
    _, _, parser = kept = new_parser(seen)
    for name in sorted({schema.name for schema in onnx.defs.get_all_schemas()}):
        seen.see(f"supports {name}", lambda name=name: parser.supports_operator(name))
    for name in ("", "conv", "Nonsense"):
        seen.see(f"supports {name!r}", lambda name=name: parser.supports_operator(name))
    for opset in (17, 18):
        graphs = {**small_graphs.WRITTEN, **small_graphs.NEIGHBOURS}
        for name, (nodes, constants) in graphs.items():
            data = small_graphs.small_graph(nodes, constants, opset)
            _small(seen, f"{name}, opset {opset}", data)
    del kept


def _small(seen: Seen, name: str, data: bytes) -> None:
    builder, network, parser = new_parser(seen)
    if parser.parse(data):
        seen[f"{name}: parsed"] = [filled(network), errors(parser)]
        config = configured(builder)
        profile = builder.create_optimization_profile()
        for number in range(network.num_inputs):
            one = network.get_input(number)
            sides = tuple(one.shape)[1:]
            profile.set_shape(one.name, (1, *sides), (2, *sides), (4, *sides))
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        seen[f"{name}: built"] = plan is not None
    else:
        first = parser.get_error(0)
        seen[f"{name}: parsed"] = [first.code().name, first.node(), first.node_operator()]


# Building


def configured(builder: Any) -> Any:
    """Of tensorrt_rtx, which is told for which GPU: here is none that it could ask."""
    config = builder.create_builder_config()
    if hasattr(config, "num_compute_capabilities"):
        config.num_compute_capabilities = 1
        config.set_compute_capability(TRT.ComputeCapability.SM86, 0)
    return config


class Building:
    """A builder with a network that is parsed, and a configuration with a profile."""

    def __init__(self, seen: Seen, data: bytes | None = None, **shapes: Any) -> None:
        self.builder, self.network, parser = new_parser(seen)
        assert parser.parse(data or graph())
        self.config = configured(self.builder)
        self.add(**(shapes or {"image": OK}))

    def add(self, **shapes: Any) -> int:
        profile = self.builder.create_optimization_profile()
        for name, three in shapes.items():
            profile.set_shape(name, *three)
        found: int = self.config.add_optimization_profile(profile)
        return found

    def plan(self) -> Any:
        return self.builder.build_serialized_network(self.network, self.config)


def building(seen: Seen, _: Path) -> None:
    see, each = seen.see, (4, 4, 3)
    for what, shapes in {
        "shapes that fit": {"image": OK},
        "other ranks": {"image": ((1, 4),) * 3},
        "another fixed side": {"image": ((1, 5, 4, 3), (2, 5, 4, 3), (8, 5, 4, 3))},
        "another fixed side at most": {"image": (OK[0], OK[1], (8, 4, 4, 4))},
        "none for the input": {"other": OK},
        "one input more": {"image": OK, "other": OK},
        "zero at least": {"image": ((0, *each), *OK[1:])},
        "zero": {"image": ((0, *each),) * 3},
        "one": {"image": ((1, *each),) * 3},
    }.items():
        see(f"a profile with {what}", lambda shapes=shapes: Building(seen, **shapes).plan())
    see("no profile", lambda: _without_profile(Building(seen)))
    see("two profiles", lambda: _two(Building(seen), image=OK))
    see("two profiles, one incomplete", lambda: _two(Building(seen), other=OK))
    see("a bank without a profile", lambda: Building(seen, graph(bank=True)).plan())
    bank = {"image": OK, "memory_bank": ((2, 2), (16, 2), (64, 2))}
    see("a bank", lambda: Building(seen, graph(bank=True), **bank).plan())
    see("half precision", lambda: Building(seen, graph(half=True)).plan())
    for name in ("REFIT", "VERSION_COMPATIBLE", "STRIP_PLAN", "GPU_FALLBACK", "REFIT_IDENTICAL",
                 "REFIT_INDIVIDUAL", "DISABLE_TIMING_CACHE"):  # fmt: skip
        see(f"flag {name}", lambda name=name: _flagged(Building(seen), name))
    see("without TF32", lambda: _changed(seen, lambda c: c.clear_flag(TRT.BuilderFlag.TF32)))
    for size in (0, 64, 1 << 20):
        see(f"a workspace of {size}", lambda size=size: _changed(seen, lambda c:
            c.set_memory_pool_limit(TRT.MemoryPoolType.WORKSPACE, size)))  # fmt: skip
    see("for DLA", lambda: _changed(seen, lambda c: put(c, "default_device_type",
                                                        TRT.DeviceType.DLA)))  # fmt: skip
    see(
        "optimised least", lambda: _changed(seen, lambda c: put(c, "builder_optimization_level", 0))
    )
    _failed_and_again(seen)
    _plan(seen)


def _without_profile(made: Building) -> Any:
    made.config = configured(made.builder)
    return made.plan()


def _two(made: Building, **shapes: Any) -> Any:
    made.add(**shapes)
    return made.plan()


def _flagged(made: Building, name: str) -> Any:
    made.config.set_flag(getattr(TRT.BuilderFlag, name))
    return made.plan()


def _changed(seen: Seen, change: Callable[[Any], Any]) -> Any:
    made = Building(seen)
    change(made.config)
    return made.plan()


def _failed_and_again(seen: Seen) -> None:
    see = seen.see
    builder = TRT.Builder(seen.log)
    network = builder.create_network()
    see("an empty network", lambda: builder.build_serialized_network(network, configured(builder)))
    made = Building(seen)
    see("a network that is None", lambda: made.builder.build_serialized_network(None, made.config))
    see("a config that is None", lambda: made.builder.build_serialized_network(made.network, None))
    see("by names", lambda: made.builder.build_serialized_network(
        network=made.network, config=made.config))  # fmt: skip
    see("the same again", lambda: made.plan())
    see(
        "is_network_supported", lambda: made.builder.is_network_supported(made.network, made.config)
    )
    see("is_network_supported, no profile", lambda: made.builder.is_network_supported(
        made.network, configured(made.builder)))  # fmt: skip
    right, made.config = made.config, configured(made.builder)
    see("a build that fails", lambda: made.plan())
    made.config = right
    see("the same builder after it", lambda: made.plan())
    see("builder.reset", lambda: made.builder.reset())
    builder, network, parser = new_parser(seen)
    parser.parse(graph(extra=[helper.make_node("Unique", ["map"], ["unused"], "u", sorted=1)]))
    seen.heard.clear()
    see("what a parser left that refused", lambda: builder.build_serialized_network(
        network, configured(builder)))  # fmt: skip


def _plan(seen: Seen) -> None:
    see, plan = seen.see, Building(seen).plan()
    gc.collect()
    see("plan", lambda: [plan.nbytes > 0, type(plan.nbytes), plan.dtype, bool(plan)])
    see("plan: the only names", lambda: [name for name in dir(plan) if name[0] != "_"])
    see("bytes(plan)", lambda: len(bytes(plan)) == plan.nbytes)
    view = memoryview(plan)
    see("memoryview(plan)", lambda: [view.itemsize, view.ndim, view.readonly, view.c_contiguous,
                                     view.nbytes == plan.nbytes])  # fmt: skip
    see("memoryview(plan).format", lambda: view.format)
    see("numpy.frombuffer(plan)", lambda: np.frombuffer(plan, np.uint8).size == plan.nbytes)
    see("sha256(plan)", lambda: hashlib.sha256(plan).digest() == hashlib.sha256(
        bytes(plan)).digest())  # fmt: skip
    see("isinstance(plan, bytes)", lambda: isinstance(plan, bytes))
    see("plan == its bytes", lambda: plan == bytes(plan))
    see("hash(plan)", lambda: isinstance(hash(plan), collections.abc.Hashable))
    for what, call in {
        "len(plan)": len, "plan[0]": lambda plan: plan[0], "iter(plan)": iter,
        "plan + b''": lambda plan: plan + b"", "b'x' in plan": lambda plan: b"x" in plan,
        "plan.hex()": lambda plan: plan.hex(), "plan.other = 1": lambda plan: put(plan, "other", 1),
        "plan.nbytes = 1": lambda plan: put(plan, "nbytes", 1),
        "plan[0] = 1": lambda plan: operator.setitem(plan, 0, 1),
    }.items():  # fmt: skip
        see(what, lambda call=call: call(plan))


# Progress


def monitor(until: int | None = None, fails: str = "", answer: Any = True) -> Any:
    """One that tells what it was told in `events`; `until`: after how many steps it says no."""
    events: list[Any] = []
    threads: set[int] = set()

    class Monitor(TRT.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            TRT.IProgressMonitor.__init__(self)
            self.events, self.threads = events, threads

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            tell("start", phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> Any:
            tell("step", phase_name, step)
            steps = len([one for one in events if one[0] == "step"])
            return answer if until is None else steps < until

        def phase_finish(self, phase_name: str) -> None:
            tell("finish", phase_name)

    def tell(*event: Any) -> None:
        events.append(event)
        threads.add(threading.get_ident())
        if fails == event[0]:
            raise ValueError("of the program's own")

    return Monitor()


def progress(seen: Seen, _: Path) -> None:
    watching = monitor()
    made = Building(seen)
    seen.see("monitor = ...", lambda: put(made.config, "progress_monitor", watching) is watching)
    seen.see("a build that is watched", lambda: made.plan())
    _phases(seen, watching.events)
    seen.see("in one thread", lambda: watching.threads == {threading.get_ident()})
    for until in (1, 2, 5):
        made, watching = Building(seen), monitor(until)
        made.config.progress_monitor = watching
        seen.see(f"cancelled at {until}", lambda made=made: made.plan())
        seen.see(f"cancelled at {until}: events", lambda watching=watching: [
            list(event) for event in watching.events if event[0] != "start"])  # fmt: skip
    seen.see("the monitor again after it", lambda: [made.plan(), len(watching.events) > 0])
    made.config.progress_monitor = None
    seen.see("the same builder after it", lambda: made.plan())
    for fails in ("start", "step", "finish"):
        _watched(seen, f"a monitor that fails at {fails}", monitor(fails=fails))
    for answer in (None, 0, 1, 1.5, "yes", "", [], [1], np.bool_(True), object()):
        words = "an object" if type(answer) is object else f"{type(answer).__name__} {answer!r}"
        _watched(seen, f"a monitor that answers {words}", monitor(answer=answer))
    begin = {"__init__": lambda self: TRT.IProgressMonitor.__init__(self)}
    _watched(seen, "a monitor without methods", type("Empty", (TRT.IProgressMonitor,), begin)())
    seen.see("a monitor that forgets __init__", lambda: type(
        "Not", (TRT.IProgressMonitor,), {"__init__": lambda self: None})())  # fmt: skip

    def forgotten() -> Any:
        made = Building(seen)
        made.config.progress_monitor = monitor()
        gc.collect()
        return [type(made.config.progress_monitor).__name__, made.plan()]

    seen.see("a config keeps its monitor", forgotten)


def _phases(seen: Seen, events: list[Any]) -> None:
    """Which there are, in which order and within which, and how their steps are counted."""
    started = [event[1:3] for event in events if event[0] == "start"]
    seen["phases, as they start first"] = [
        list(one) for number, one in enumerate(started) if one not in started[:number]
    ]
    seen["phases that come again and again"] = sorted({one[0] for one in started
                                                       if started.count(one) > 1})  # fmt: skip
    first, last = events[0], events[-1]
    seen["the first and the last event"] = [list(first), list(last)]
    counted: dict[str, list[int]] = {}
    open_phases: dict[str, list[Any]] = {}
    parents_that_go_on = set()
    for kind, name, *more in events:
        if kind == "start":
            assert name not in open_phases, name
            open_phases[name] = [more[0], more[1], []]
        elif kind == "step":
            open_phases[name][2].append(more[0])
            parents_that_go_on |= {(one, name) for one, (parent, _, steps) in open_phases.items()
                                   if parent == name and steps}  # fmt: skip
        else:
            _, announced, steps = open_phases.pop(name)
            assert steps == list(range(len(steps))), name
            assert len(steps) <= announced, name
            counted[name] = [announced, len(steps)]
    seen["phases that are left open"] = sorted(open_phases)
    seen["a phase is open while its parent goes on"] = sorted(map(list, parents_that_go_on))
    seen["steps fewer than announced"] = sorted(name for name, (announced, steps) in
                                                counted.items() if steps < announced)  # fmt: skip
    seen["steps of the whole"] = counted["Building engine"]


def _watched(seen: Seen, what: str, watching: Any) -> None:
    made = Building(seen)
    made.config.progress_monitor = watching
    with written() as read:
        seen.see(what, lambda: made.plan())
        lines = [line for line in read().splitlines() if line.startswith("[ERROR]")]
    words = re.sub(r"\(#define .*", "", lines[0]).strip() if lines else None
    seen[f"{what}: stderr"] = words


# Timing caches, and what can be run without a GPU


def running(seen: Seen, _: Path) -> None:
    see = seen.see
    warnings.simplefilter("ignore", DeprecationWarning)  # of tensorrt_rtx, of all timing caches
    builder = TRT.Builder(seen.log)
    config = builder.create_builder_config()
    see("get_timing_cache", lambda: config.get_timing_cache())
    for what, data in {"nothing": b"", "a bytearray": bytearray(), "garbage": b"garbage" * 9,
                       "None": None, "a str": ""}.items():  # fmt: skip
        see(f"a timing cache of {what}", lambda data=data: config.create_timing_cache(data))
    cache = config.create_timing_cache(b"")
    see("cache.serialize", lambda: [type(cache.serialize()), cache.serialize().nbytes > 0])
    see("set_timing_cache", lambda: config.set_timing_cache(cache, False))
    named = {"cache": cache, "ignore_mismatch": True}
    see("set_timing_cache by names", lambda: config.set_timing_cache(**named))
    for wrong in (1, None, "x", 1.5):
        see(f"ignore_mismatch={wrong!r}", lambda wrong=wrong: config.set_timing_cache(cache, wrong))
    see("set_timing_cache(None)", lambda: config.set_timing_cache(None, False))
    see("get_timing_cache after it", lambda: config.get_timing_cache())
    see("cache.reset", lambda: cache.reset())
    other = config.create_timing_cache(b"")
    see("cache.combine", lambda: cache.combine(other, False))
    see("cache.combine(None)", lambda: cache.combine(None, False))
    made = Building(seen)
    plan = made.plan()
    for wrong in (None, "x", builder):
        see(f"Runtime({type(wrong).__name__})", lambda wrong=wrong: TRT.Runtime(wrong))
    runtime = TRT.Runtime(seen.log)
    see("runtime.logger", lambda: runtime.logger is seen.log)
    data = bytes(plan)
    for what, given in {"a plan": plan, "nothing": b"", "garbage": b"no plan" * 50, "an ONNX":
                        graph(), "a plan without its end": data[:-1], "half a plan":
                        data[: len(data) // 2], "20 bytes of a plan": data[:20], "None": None,
                        "a str": "x"}.items():  # fmt: skip
        see(f"deserialised: {what}", lambda given=given: runtime.deserialize_cuda_engine(given))
    see("a plan begins with", lambda: data[:4].decode())
    for value in (4, 0, -1, None, "x"):
        see(f"runtime.max_threads = {value!r}", lambda v=value: put(runtime, "max_threads", v))
    for value in (True, 1, "x", False):
        see(f"engine_host_code_allowed = {value!r}", lambda value=value: put(
            runtime, "engine_host_code_allowed", value))  # fmt: skip
    see("runtime.other = 1", lambda: put(runtime, "other", 1))
    for kind in (TRT.Refitter, TRT.OnnxParserRefitter):
        see(f"{kind.__name__}(None, log)", lambda kind=kind: kind(None, seen.log))
    see("init_libnvinfer_plugins", lambda: TRT.init_libnvinfer_plugins(seen.log, ""))


AREAS = {one.__name__: one for one in (names, values, logging, configuring, parsing, operators,
                                       building, progress, running)}  # fmt: skip


def main(module: str, area: str, folder: str) -> None:
    global TRT
    TRT = importlib.import_module(module)
    seen = Seen()
    AREAS[area](seen, Path(folder))
    print(f"\n{json.dumps(seen)}")  # the last line: C++ may have written before


if __name__ == "__main__":
    main(*sys.argv[1:])
