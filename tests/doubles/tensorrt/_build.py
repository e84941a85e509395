"""From an ONNX to a plan: parser, network, configuration, builder."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from double_gpu import MIB, Fault, gpu

from ._core import ONNX_TYPES as TYPES
from ._core import DataType, Dims, ILogger, host_memory, register_on_a_device, say, write
from ._names import (
    DATA,
    ENUMS,
    LIBRARY,
    MAJOR,
    Bound,
    Buffer,
    Severity,
    Size,
    bound,
    call_back,
    pure,
)
from ._plan import Plan, Tensor, constants_of, network, weights_of

BuilderFlag, DeviceType = ENUMS["BuilderFlag"], ENUMS["DeviceType"]
MemoryPoolType, ErrorCode = ENUMS["MemoryPoolType"], ENUMS["ErrorCode"]
NetworkDefinitionCreationFlag = ENUMS["NetworkDefinitionCreationFlag"]
OnnxParserFlag, ProfilingVerbosity = ENUMS["OnnxParserFlag"], ENUMS["ProfilingVerbosity"]
EngineCapability, PreviewFeature = ENUMS["EngineCapability"], ENUMS["PreviewFeature"]
HardwareCompatibilityLevel = ENUMS["HardwareCompatibilityLevel"]
OPERATORS = json.loads((DATA / "onnx_operators.json").read_text())
# docs/operators.md of ONNX-TensorRT 10 says "opset 9 to opset 20". What the later ones promise
# could not be looked up; Kensa writes 17 and 18.
OPSETS = {10: range(9, 21), 11: range(9, 25)}[MAJOR]
GONE_WITH_STRONG_TYPES = ("FP16", "BF16", "INT8", "FP8", "INT4", "OBEY_PRECISION_CONSTRAINTS",
                          "PREFER_PRECISION_CONSTRAINTS")  # fmt: skip
TOPK_MOST = 3840


# Networks


@bound
class ITensor(Bound):
    def _setup(self, tensor: Tensor) -> None:
        self._tensor = tensor

    @property
    def name(self) -> str:
        return self._tensor.name

    @property
    def shape(self) -> Dims:
        return Dims(self._tensor.shape)

    @property
    def dtype(self) -> DataType:
        return getattr(DataType, self._tensor.dtype)

    @property
    def is_network_input(self) -> bool:
        return self._tensor.is_input

    @property
    def is_network_output(self) -> bool:
        return not self._tensor.is_input


@bound
class INetworkDefinition(Bound):
    """Strongly typed where asked for; from TensorRT 11 always."""

    def _setup(self, builder: Builder, flags: int) -> None:
        self._builder, self._flags, self._title = builder, flags, ""
        self._onnx: bytes = b""
        self._tensors: list[Tensor] = []
        self._layers: list[tuple[str, str]] = []  # name, key in the timing cache
        self._weights = 0

    @property
    def _strongly_typed(self) -> bool:
        return MAJOR >= 11 or bool(
            self._flags >> int(NetworkDefinitionCreationFlag.STRONGLY_TYPED) & 1
        )

    @property
    def name(self) -> str:
        return self._title

    @name.setter
    def name(self, value: str) -> None:
        self._title = value

    @property
    def flags(self) -> int:
        return self._flags

    def get_flag(self, flag: NetworkDefinitionCreationFlag) -> bool:
        return bool(self._flags >> int(flag) & 1)

    @property
    def builder(self) -> Any:
        return self._builder

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._tensors) - len(self._inputs)

    @property
    def _inputs(self) -> list[Tensor]:
        return [tensor for tensor in self._tensors if tensor.is_input]

    def get_input(self, index: int) -> ITensor | None:
        found = self._inputs
        return ITensor._new(found[index]) if 0 <= index < len(found) else None

    def get_output(self, index: int) -> ITensor | None:
        found = [tensor for tensor in self._tensors if not tensor.is_input]
        return ITensor._new(found[index]) if 0 <= index < len(found) else None


# ONNX


@bound
class ParserError(Bound):
    """`node` is the number of the node, -1 where it is the whole file."""

    def _setup(self, code: Any, desc: str, node: int, name: str, operator: str) -> None:
        self._code, self._desc, self._node = code, desc, node
        self._name, self._operator = name, operator

    def code(self) -> ErrorCode:
        return self._code

    def desc(self) -> str:
        return self._desc

    def node(self) -> int:
        return self._node

    def node_name(self) -> str:
        return self._name

    def node_operator(self) -> str:
        return self._operator

    def file(self) -> str:
        return "ModelImporter.cpp"

    def func(self) -> str:
        return "parseNode" if self._node >= 0 else "parse"

    def line(self) -> int:
        return 0

    def __str__(self) -> str:
        where = f"In node {self._node} with name: {self._name} and operator: {self._operator} "
        said = f"({self.func()}): {self._code.name}: {self._desc}"
        return where + said if self._node >= 0 else said

    __repr__ = __str__


class _Refused(Exception):
    """What becomes a ParserError: code, description, number of the node, node."""

    def __init__(self, code: str, desc: str, index: int = -1, node: Any = None) -> None:
        super().__init__(desc)
        self.error = ParserError._new(
            getattr(ErrorCode, code),
            desc,
            index,
            node.name if node is not None else "",
            node.op_type if node is not None else "",
        )


def read_onnx(data: bytes, path: str | None) -> Any:
    """An onnx.ModelProto with all its weights, or _Refused."""
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import external_data_helper

    try:
        model = onnx.load_from_string(data)
    except DecodeError:
        model = None
    if model is None or not model.graph.node:
        raise _Refused("MODEL_DESERIALIZE_FAILED", "Failed to parse the ONNX model.")
    try:
        folder = str(Path(path).parent) if path else ""
        external_data_helper.load_external_data_for_model(model, folder)
    except (OSError, onnx.checker.ValidationError) as error:
        raise _Refused("INVALID_GRAPH", f"Failed to open file: {error}") from error
    return model


def _check_nodes(model: Any) -> None:
    """What ONNX-TensorRT 10 refuses (docs/operators.md, ModelImporter.cpp)."""
    opset = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 0)
    if opset not in OPSETS:
        raise _Refused("UNSUPPORTED_GRAPH", f"Opset {opset} is not one of {OPSETS}.")
    uint8 = {one.name for one in model.graph.input if one.type.tensor_type.elem_type == 2}
    outputs = {one.name for one in model.graph.output}
    values = constants_of(model)
    for index, node in enumerate(model.graph.node):
        if node.domain or node.op_type in OPERATORS["unsupported"]:
            desc = "Plugin not found, are the plugin name, version, and namespace correct?"
            raise _Refused("UNSUPPORTED_NODE", desc, index, node)
        target = node.attribute[0].i if node.op_type == "Cast" else None
        gives_uint8 = target == 2 or (target is None and bool(uint8 & set(node.input)))
        if gives_uint8 and not outputs & set(node.output):
            desc = (
                "Assertion failed: legalUINT8: TensorRT does not support UINT8 types for"
                " intermediate tensors!"
            )
            raise _Refused("UNSUPPORTED_NODE", desc, index, node)
        if gives_uint8:
            uint8 |= set(node.output)
        if node.op_type == "TopK":
            _check_topk(index, node, values)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            _check_zero_point(index, node, values)


def _check_zero_point(index: int, node: Any, values: dict[str, Any]) -> None:
    """int8 and zero. uint8, which is ONNX's default, TensorRT would compute as int8."""
    point = values.get(node.input[2]) if len(node.input) > 2 else None
    if point is None or point.dtype != np.int8 or point.any():
        raise _Refused("UNSUPPORTED_NODE", "`y_zero_point` must be 0, and int8", index, node)


def _check_topk(index: int, node: Any, values: dict[str, Any]) -> None:
    if any(one.name == "sorted" and one.i == 0 for one in node.attribute):
        raise _Refused("UNSUPPORTED_NODE_ATTR", "`sorted` must be 1", index, node)
    count = values.get(node.input[1]) if len(node.input) > 1 else None
    if count is not None and count.reshape(-1)[0] > TOPK_MOST:
        raise _Refused("UNSUPPORTED_NODE_ATTR", f"K is at most {TOPK_MOST}", index, node)


@bound
class OnnxParser(Bound):
    """Fills a network; keeps the errors of what it refused. It logs through its own logger."""

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._logger = network, logger
        self._errors: list[ParserError] = []
        self._flag_bits = 0

    def parse(self, model: Buffer, path: str | None = None) -> bool:
        """A path only finds weights that are kept in files beside the model."""
        return self._parse(bytes(model), path)

    def parse_from_file(self, model: str) -> bool:
        try:
            data = Path(os.fsdecode(model)).read_bytes()
        except OSError:
            message = f"Failed to parse ONNX model from file: {model}!"
            write(self._logger, Severity.ERROR, message)
            return False
        return self._parse(data, os.fsdecode(model))

    def _parse(self, data: bytes, path: str | None) -> bool:
        if self._network.num_layers:
            message = "Parse was called with a non-empty network definition"
            write(self._logger, Severity.ERROR, message)
            return False
        try:
            model = read_onnx(data, path)
            _check_nodes(model)
        except _Refused as refused:
            self._errors.append(refused.error)
            write(self._logger, Severity.ERROR, str(refused.error))
            return False
        self._fill(model)
        return True

    def _fill(self, model: Any) -> None:
        net, weights = self._network, weights_of(model)
        constants = {one.name for one in model.graph.initializer}
        for values, is_input in ((model.graph.input, True), (model.graph.output, False)):
            for value in values:
                if value.name not in constants:
                    kind = value.type.tensor_type
                    shape = tuple(d.dim_value or -1 for d in kind.shape.dim)
                    dtype = TYPES.get(kind.elem_type, "FLOAT")
                    net._tensors.append(Tensor(value.name, shape, dtype, is_input))
        for index, node in enumerate(model.graph.node):
            shapes = [weights[name].shape for name in node.input if name in weights]
            settings = [attribute.SerializeToString() for attribute in node.attribute]
            key = hashlib.sha1(repr((node.op_type, shapes, settings)).encode()).hexdigest()[:16]
            net._layers.append((node.name or f"{node.op_type}_{index}", key))
        net._weights = sum(value.nbytes for value in weights.values())
        net._onnx = model.SerializeToString()
        net._title = net._title or model.graph.name

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def clear_errors(self) -> None:
        self._errors.clear()

    @property
    def flags(self) -> int:
        return self._flag_bits

    @flags.setter
    def flags(self, value: int) -> None:
        self._flag_bits = int(value)

    def set_flag(self, flag: OnnxParserFlag) -> None:
        self._flag_bits |= 1 << int(flag)

    def clear_flag(self, flag: OnnxParserFlag) -> None:
        self._flag_bits &= ~(1 << int(flag))

    def get_flag(self, flag: OnnxParserFlag) -> bool:
        return bool(self._flag_bits >> int(flag) & 1)

    def supports_operator(self, op_name: str) -> bool:
        return op_name in OPERATORS["supported"]


# Configuration


@bound
class IOptimizationProfile(Bound):
    """Smallest, best and largest shape of each dynamic input."""

    def _setup(self) -> None:
        self._shapes: dict[str, list[tuple[int, ...]]] = {}

    def set_shape(self, input: str, min: Dims, opt: Dims, max: Dims) -> None:
        shapes = [tuple(int(side) for side in shape) for shape in (min, opt, max)]
        ordered = len({len(shape) for shape in shapes}) == 1 and all(
            0 <= low <= best <= high for low, best, high in zip(*shapes, strict=True)
        )
        if not ordered:
            raise ValueError(f"Shape provided for input {input} is inconsistent.")
        self._shapes[input] = shapes

    def get_shape(self, input: str) -> list[Dims]:
        return [Dims(shape) for shape in self._shapes.get(input, [])]

    def __bool__(self) -> bool:
        return True


@bound
class ITimingCache(Bound):
    """Which layers were timed, on which device, by which version."""

    def _setup(self, entries: dict[str, float], version: str, model: str) -> None:
        self._entries, self._version, self._model = entries, version, model

    def serialize(self) -> Any:
        content = {"version": self._version, "model": self._model, "entries": self._entries}
        return host_memory(b"timing" + json.dumps(content).encode())

    def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if input_cache._version != self._version:
            return False
        if input_cache._model != self._model and not ignore_mismatch:
            return False
        self._entries = {**input_cache._entries, **self._entries}
        return True

    def reset(self) -> bool:
        self._entries.clear()
        return True


@bound
class IProgressMonitor(Bound):
    """To be subclassed. Called from several threads, see `_Progress`."""

    def __init__(self) -> None:
        pass

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        pure("IProgressMonitor::phase_start")

    def step_complete(self, phase_name: str, step: int) -> bool:
        pure("IProgressMonitor::step_complete")
        return False

    def phase_finish(self, phase_name: str) -> None:
        pure("IProgressMonitor::phase_finish")


def plain(name: str, kind: type, default: Any) -> property:
    """A property that is only remembered."""
    hidden = f"_{name}"

    def get(self: Any) -> Any:
        return getattr(self, hidden, default)

    def put(self: Any, value: Any) -> None:
        setattr(self, hidden, value)

    get.__name__ = put.__name__ = name
    put.__annotations__ = {"value": kind.__name__}
    return property(get, put)


@bound
class IBuilderConfig(Bound):
    """How to build."""

    def _setup(self, builder: Builder) -> None:
        self._builder = builder
        self._bits = 1 << int(BuilderFlag.TF32)  # the only flag that is on by default
        self._pools: dict[int, int] = {}
        self._profiles: list[IOptimizationProfile] = []
        self._cache: ITimingCache | None = None
        self._monitor: IProgressMonitor | None = None
        self._device = DeviceType.GPU
        self._core = -1

    builder_optimization_level = plain("builder_optimization_level", int, 3)
    avg_timing_iterations = plain("avg_timing_iterations", int, 1)
    max_aux_streams = plain("max_aux_streams", int, -1)
    profile_stream = plain("profile_stream", int, 0)
    tiling_optimization_level = plain("tiling_optimization_level", int, 0)
    max_num_tactics = plain("max_num_tactics", int, -1)
    profiling_verbosity = plain(
        "profiling_verbosity", ProfilingVerbosity, ProfilingVerbosity.LAYER_NAMES_ONLY
    )
    engine_capability = plain("engine_capability", EngineCapability, EngineCapability.STANDARD)
    hardware_compatibility_level = plain(
        "hardware_compatibility_level", HardwareCompatibilityLevel, HardwareCompatibilityLevel.NONE
    )
    default_device_type = plain("default_device_type", DeviceType, DeviceType.GPU)

    @property
    def DLA_core(self) -> int:
        return self._core

    @DLA_core.setter
    def DLA_core(self, value: int) -> None:
        if not 0 <= value < gpu.model.dla_cores:
            message = (
                "IBuilderConfig::setDLACore: Error Code 3: API Usage Error (Parameter check failed,"
                f" condition: dlaCore < nbDLACores. {value} of {gpu.model.dla_cores} cores.)"
            )
            say(self._builder, Severity.ERROR, message)
            return
        self._core = value

    @property
    def flags(self) -> int:
        return self._bits

    @flags.setter
    def flags(self, value: int) -> None:
        self._bits = int(value)

    def set_flag(self, flag: BuilderFlag) -> None:
        self._bits |= 1 << int(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self._bits &= ~(1 << int(flag))

    def get_flag(self, flag: BuilderFlag) -> bool:
        return bool(self._bits >> int(flag) & 1)

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: Size) -> None:
        if int(pool_size) > gpu.total:
            message = (
                "IBuilderConfig::setMemoryPoolLimit: Error Code 4: API Usage Error (the size of"
                f" {pool.name} is larger than the {gpu.total} bytes of the device)"
            )
            say(self._builder, Severity.ERROR, message)
            return
        self._pools[int(pool)] = int(pool_size)

    def get_memory_pool_limit(self, pool: MemoryPoolType) -> int:
        """The default of the workspace is all of the device; of TACTIC_DRAM 75 % on Jetson."""
        defaults = {
            MemoryPoolType.WORKSPACE: gpu.total,
            MemoryPoolType.TACTIC_DRAM: gpu.total * 3 // 4 if gpu.model.integrated else gpu.total,
            MemoryPoolType.DLA_MANAGED_SRAM: 0,
            MemoryPoolType.DLA_LOCAL_DRAM: 1 << 30,
            MemoryPoolType.DLA_GLOBAL_DRAM: 1 << 29,
        }
        return self._pools.get(int(pool), defaults.get(pool, 0))

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    @property
    def progress_monitor(self) -> Any:
        return self._monitor

    @progress_monitor.setter
    def progress_monitor(self, value: IProgressMonitor | None) -> None:
        self._monitor = value

    def create_timing_cache(self, serialized_timing_cache: Buffer) -> ITimingCache | None:
        """A new one of b""; None of bytes that another version wrote, or that are damaged."""
        data = bytes(serialized_timing_cache)
        if not data:
            return ITimingCache._new({}, LIBRARY, gpu.model.key)
        try:
            content = json.loads(data.removeprefix(b"timing"))
            if content["version"] == LIBRARY:
                return ITimingCache._new(content["entries"], LIBRARY, content["model"])
        except (ValueError, KeyError):
            pass
        message = "Error Code 1: Serialization (Serialization assertion"
        message += " stdVersionRead == kSERIALIZATION_VERSION failed.Version tag does not match.)"
        say(self._builder, Severity.ERROR, message)
        return None

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache._model != gpu.model.key and not ignore_mismatch:
            message = "The timing cache was created on another device."
            say(self._builder, Severity.ERROR, message)
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache

    def set_preview_feature(self, feature: PreviewFeature, enable: bool) -> None:
        pass

    def reset(self) -> None:
        self._setup(self._builder)


# The builder


class _Cancelled(Exception):
    pass


class _Failed(Exception):
    """The build failed; the text is the line in the log."""


class _Progress:
    """Phases within phases, as IProgressMonitor documents them.

    A step may be reported by another thread than the one that builds; here all steps of inner
    phases are, because a monitor must bear it. KENSA_DOUBLE_BUILD_SECONDS is spread over the
    steps.
    """

    def __init__(self, monitor: Any, steps: int) -> None:
        self._monitor = monitor
        self._open: list[str] = []
        self._pause = float(os.environ.get("KENSA_DOUBLE_BUILD_SECONDS", "0")) / max(1, steps)

    def phase(self, name: str, steps: list[Callable[[], None]]) -> None:
        parent = self._open[-1] if self._open else None
        self._open.append(name)
        if self._monitor is not None:
            call_back("phase_start", self._monitor.phase_start, name, parent, len(steps))
        for number, step in enumerate(steps):
            step()
            if parent is None:
                self._complete(name, number)
            else:
                self._elsewhere(name, number)
        self._finish()

    def _complete(self, name: str, number: int) -> None:
        if self._monitor is None:
            return
        if not call_back("step_complete", self._monitor.step_complete, name, number):
            raise _Cancelled

    def _elsewhere(self, name: str, number: int) -> None:
        """The same from a thread of TensorRT's own."""
        if self._pause:
            time.sleep(self._pause)
        cancelled: list[BaseException] = []

        def run() -> None:
            try:
                self._complete(name, number)
            except _Cancelled as error:
                cancelled.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if cancelled:
            raise _Cancelled

    def _finish(self) -> None:
        name = self._open.pop()
        if self._monitor is not None:
            call_back("phase_finish", self._monitor.phase_finish, name)

    def close(self) -> None:
        while self._open:
            self._finish()


@bound
class Builder(Bound):
    """Builds plans. Fails with None and the reason in the log, never with an exception."""

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        self._threads = 1
        register_on_a_device(self, logger, "createInferBuilder")

    @property
    def logger(self) -> Any:
        return self._logger

    @property
    def num_DLA_cores(self) -> int:
        return gpu.model.dla_cores

    @property
    def max_threads(self) -> int:
        return self._threads

    @max_threads.setter
    def max_threads(self, value: int) -> None:
        self._threads = int(value)

    @property
    def platform_has_tf32(self) -> bool:
        return True

    @property
    def platform_has_fast_fp16(self) -> bool:
        return True

    @property
    def platform_has_fast_int8(self) -> bool:
        return True

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition._new(self, int(flags))

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig._new(self)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile._new()

    def reset(self) -> None:
        pass

    def is_network_supported(self, network: INetworkDefinition, config: IBuilderConfig) -> bool:
        try:
            _check(network, config)
        except _Failed as failed:
            say(self, Severity.ERROR, str(failed))
            return False
        return True

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> Any:
        """A plan as IHostMemory, or None."""
        progress = None
        try:
            gpu.check()
            profiles = _check(network, config)
            known = _known(config)
            missing = [layer for layer in network._layers if layer[1] not in known]
            steps = missing or network._layers[:1]
            progress = _Progress(config._monitor, len(steps))
            plan = self._build(network, config, profiles, steps, progress)
        except (_Cancelled, _Failed, Fault) as failed:
            if progress is not None:
                progress.close()
            if not isinstance(failed, _Cancelled):
                text = f"IBuilder::buildSerializedNetwork: {failed}"
                say(self, Severity.ERROR, text)
            return None
        gpu.count("builds")
        if config._cache is not None:
            config._cache._entries.update({key: 0.1 for _, key in network._layers})
        return host_memory(plan.pack())

    def _build(
        self,
        net: INetworkDefinition,
        config: IBuilderConfig,
        profiles: list[dict[str, list[Any]]],
        steps: list[tuple[str, str]],
        progress: _Progress,
    ) -> Plan:
        activations: list[int] = []

        def measure() -> None:
            for profile in profiles or [{}]:
                largest = {name: shapes[2] for name, shapes in profile.items()}
                static = {t.name: t.shape for t in net._inputs if t.name not in largest}
                activations.append(network(net._onnx).largest_tensors({**static, **largest}))

        def select() -> None:
            progress.phase(
                "Timing tactics",
                [lambda name=name: self._try(name, net, config, activations) for name, _ in steps],
            )

        try:
            progress.phase("Building engine", [measure, select, lambda: None])
        except RuntimeError as error:  # OpenVINO's
            raise _Failed(f"Error Code 4: Internal Error ({error})") from error
        flags = config.get_flag
        return Plan(
            version=LIBRARY,
            compute=gpu.model.compute,
            model=gpu.model.key,
            tensors=net._tensors,
            profiles=profiles,
            layers=[name for name, _ in net._layers],
            weights=net._weights,
            activations=activations,
            name=net.name,
            refittable=flags(BuilderFlag.REFIT),
            strongly_typed=net._strongly_typed,
            version_compatible=flags(BuilderFlag.VERSION_COMPATIBLE),
            hardware_compatibility=int(config.hardware_compatibility_level),
            dla=config.default_device_type == DeviceType.DLA,
            verbosity=int(config.profiling_verbosity),
            onnx=net._onnx,
        )

    def _try(self, name: str, net: Any, config: Any, activations: list[int]) -> None:
        """Take the memory that a layer is timed in, and give it back."""
        held = []
        try:
            held.append(gpu.allocate(net._weights, "weights while building", backed=False))
            need = max(activations)
            try:
                held.append(gpu.allocate(need, "activations while building", backed=False))
            except Fault:
                asked, free = need // MIB, gpu.free // MIB
                warning = f"Tactic Device request: {asked}MB Available: {free}MB."
                warning += " Device memory is insufficient to use tactic."
                say(self, Severity.WARNING, warning)
                reason = f"(Could not find any implementation for node {name}.)"
                raise _Failed(f"Error Code 10: Internal Error {reason}") from None
            self._workspace(config, need)
        except Fault as fault:
            raise _Failed(f"Error Code 2: OutOfMemory ({fault})") from None
        finally:
            for memory in held:
                gpu.release(memory)

    def _workspace(self, config: Any, need: int) -> None:
        """A tactic that wants more workspace than is allowed is only skipped."""
        limit = config.get_memory_pool_limit(MemoryPoolType.WORKSPACE)
        if need > limit:
            skipped = "UNSUPPORTED_STATE: Skipping tactic 0 due to insufficient memory on requested"
            skipped += f" size of {need} detected for tactic 0x0000000000000001."
            say(self, Severity.WARNING, skipped)


def _known(config: IBuilderConfig) -> set[str]:
    """The layers that need not be timed: with a full cache a build has fewer steps."""
    off = config.get_flag(BuilderFlag.DISABLE_TIMING_CACHE)
    if config._cache is None or off or config.builder_optimization_level == 0:
        return set()
    return set(config._cache._entries)


def _check(net: INetworkDefinition, config: IBuilderConfig) -> list[dict[str, list[Any]]]:
    """The profiles, input -> shapes; _Failed for a network or a configuration that cannot be."""
    if not net._layers:
        raise _Failed("Error Code 4: API Usage Error (Network must have at least one output)")
    if net._strongly_typed:
        for name in GONE_WITH_STRONG_TYPES:
            if hasattr(BuilderFlag, name) and config.get_flag(getattr(BuilderFlag, name)):
                raise _Failed(
                    f"Error Code 3: API Usage Error (BuilderFlag::k{name} is set, and is not"
                    " allowed for a strongly typed network.)"
                )
    dynamic = [tensor for tensor in net._inputs if -1 in tensor.shape]
    if dynamic and not config._profiles:
        raise _Failed(
            "Error Code 4: API Usage Error (Network has dynamic or shape inputs, but no"
            " optimization profile has been defined.)"
        )
    profiles = [_fit(profile, net, number) for number, profile in enumerate(config._profiles)]
    shapes = [shapes for profile in profiles for shapes in profile.values()]
    _check_devices(net, config, any(least != most for least, _, most in shapes))
    return profiles


def _fit(profile: IOptimizationProfile, net: Any, number: int) -> dict[str, list[Any]]:
    for tensor in net._inputs:
        shapes = profile._shapes.get(tensor.name)
        if shapes is None:
            if -1 in tensor.shape:
                raise _Failed(
                    f"Error Code 4: API Usage Error ({tensor.name}: dynamic input is missing"
                    f" dimensions in profile {number}.)"
                )
            continue
        fits = all(
            len(shape) == len(tensor.shape)
            and all(real in (-1, side) for real, side in zip(tensor.shape, shape, strict=True))
            for shape in shapes
        )
        if not fits:
            raise _Failed(
                f"Error Code 4: API Usage Error ({tensor.name}: for dimension number 0 in profile"
                f" {number} does not match network definition {tensor.shape}.)"
            )
    return dict(profile._shapes)


def _check_devices(net: Any, config: Any, dynamic: bool) -> None:
    """`dynamic`: the smallest, best and largest shape of a profile are not the same.

    They must be for DLA ("DLA Supported Layers and Restrictions" of NVIDIA's documentation).
    """
    if config.default_device_type == DeviceType.DLA:
        if not gpu.model.dla_cores:
            raise _Failed("Error Code 3: API Usage Error (no DLA core on this platform)")
        if dynamic:
            raise _Failed(
                "Error Code 9: Internal Error (DLA does not support dynamic shapes in inputs)"
            )
    if int(config.hardware_compatibility_level) and gpu.model.integrated:
        raise _Failed(
            "Error Code 9: API Usage Error (Hardware compatibility is not supported on this"
            " platform.)"
        )
