"""From a plan to results: runtime, engine, execution context, refitter."""

from __future__ import annotations

import json
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from double_gpu import Fault, Memory, Work, gpu
from numpy.typing import NDArray

from ._build import CHECK, ParserError, _Refused, plain, read_onnx, usage
from ._core import (
    NUMPY,
    DataType,
    Dims,
    ILogger,
    Weights,
    host_memory,
    register,
    register_on_a_device,
    say,
    volume,
    write,
)
from ._names import ENUMS, LIBRARY, MAJOR, Bound, Buffer, Severity, Size, bound
from ._plan import Plan, Shape, Shapes, Tensor, network, weights_of, with_weights

TensorIOMode, TensorLocation = ENUMS["TensorIOMode"], ENUMS["TensorLocation"]
ExecutionContextAllocationStrategy = ENUMS["ExecutionContextAllocationStrategy"]
LayerInformationFormat, ErrorCode = ENUMS["LayerInformationFormat"], ENUMS["ErrorCode"]
ProfilingVerbosity, EngineCapability = ENUMS["ProfilingVerbosity"], ENUMS["EngineCapability"]
HardwareCompatibilityLevel = ENUMS["HardwareCompatibilityLevel"]


class _Refusal(Exception):
    """Why a call gives None or False: the line for the log."""


class _Broken(_Refusal):
    """Bytes that are no plan."""


def _count(kind: str, owner: Any, memory: Memory | None) -> None:
    """Keep account of an object, and of the memory that goes with it."""
    gpu.objects[kind] = gpu.objects.get(kind, 0) + 1

    def gone() -> None:
        gpu.objects[kind] -= 1
        if memory is not None:
            gpu.release(memory)

    weakref.finalize(owner, gone).atexit = False


def _take(nbytes: int, what: str) -> Memory | None:
    """Memory of TensorRT's own; None for none."""
    try:
        return gpu.allocate(nbytes, what, backed=False) if nbytes else None
    except Fault as fault:
        size = f"Requested size was {nbytes} bytes."
        raise _Refusal(f"Error Code 2: OutOfMemory ({size} {fault})") from None


@bound
class Runtime(Bound):
    """Makes engines of plans. It lives as long as they do."""

    def __init__(self, logger: ILogger) -> None:
        self._logger, self._threads = logger, 1
        register_on_a_device(self, logger, "createInferRuntime")

    @property
    def max_threads(self) -> int:
        return self._threads

    @max_threads.setter
    def max_threads(self, value: int) -> None:
        if int(value) <= 0:
            usage(self, "IRuntime::setMaxThreads", f"{CHECK} maxThreads > 0. ")
            return
        self._threads = int(value)

    engine_host_code_allowed = plain("engine_host_code_allowed", bool, False)
    DLA_core = plain("DLA_core", int, -1)
    temporary_directory = plain("temporary_directory", str, None)
    tempfile_control_flags = plain("tempfile_control_flags", int, 3)

    @property
    def logger(self) -> Any:
        return self._logger

    @property
    def num_DLA_cores(self) -> int:
        return gpu.model.dla_cores

    def deserialize_cuda_engine(self, serialized_engine: Buffer) -> ICudaEngine | None:
        """None for bytes that are no plan of this version for this device."""
        try:
            gpu.check()
            plan = self._read(bytes(serialized_engine))
            memory = _take(plan.weights, "weights")
        except (_Refusal, Fault) as refusal:
            where = "" if str(refusal)[0] == "[" else "IRuntime::deserializeCudaEngine: "
            say(self, Severity.ERROR, f"{where}{refusal}")
            if isinstance(refusal, _Broken) and MAJOR >= 11:
                return None
            text = "Error Code 4: Internal Error (Engine deserialization failed.)"
            say(self, Severity.ERROR, f"IRuntime::deserializeCudaEngine: {text}")
            return None
        return ICudaEngine._new(self, plan, memory)

    def _read(self, data: bytes) -> Plan:
        try:
            plan = Plan.unpack(data)
        except ValueError as error:
            raise _Broken(str(error)) from None
        usage = "Error Code 6: API Usage Error"
        portable = plan.version_compatible and plan.version.split(".")[0] == str(MAJOR)
        if portable and not self.engine_host_code_allowed:
            raise _Refusal(f"{usage} (the plan has host code, and engine_host_code_allowed is off)")
        if plan.version != LIBRARY and not portable:
            raise _Refusal(
                f"{usage} (The engine plan file is not compatible with this version of TensorRT,"
                f" expecting library version {LIBRARY} got {plan.version}, please rebuild.)"
            )
        mine, its = gpu.model.compute, plan.compute
        if its != mine and not (plan.hardware_compatibility and mine >= (8, 0)):
            raise _Refusal(
                f"{usage} (The engine plan file is generated on an incompatible device, expecting"
                f" compute {mine[0]}.{mine[1]} got compute {its[0]}.{its[1]}, please rebuild.)"
            )
        if plan.model != gpu.model.key:
            text = "Using an engine plan file across different models of devices is not"
            text += " recommended and is likely to affect performance or even cause errors."
            say(self, Severity.WARNING, text)
        return plan


@bound
class ICudaEngine(Bound):
    """A network in the memory of the device."""

    def _setup(self, runtime: Runtime, plan: Plan, memory: Memory | None) -> None:
        self._runtime, self._plan = runtime, plan
        self._onnx = plan.onnx
        self._pending: list[Work] = []  # a refit must not meet it
        _count("engines", self, memory)
        gpu.count("engines")

    # Tensors

    def _tensor(self, name: str) -> Tensor | None:
        found = next((one for one in self._plan.tensors if one.name == name), None)
        if found is None:
            text = f"Error Code 3: API Usage Error (Given invalid tensor name: {name}. Get valid"
            text += " tensor names with getIOTensorName())"
            say(self._runtime, Severity.ERROR, f"ICudaEngine: {text}")
        return found

    @property
    def num_io_tensors(self) -> int:
        return len(self._plan.tensors)

    def get_tensor_name(self, index: int) -> str:
        return self._plan.tensors[index].name

    def __getitem__(self, index: int) -> str:
        return self._plan.tensors[index].name

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        tensor = self._tensor(name)
        if tensor is None:
            return TensorIOMode.NONE
        return TensorIOMode.INPUT if tensor.is_input else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        tensor = self._tensor(name)
        return getattr(DataType, tensor.dtype) if tensor else DataType.FLOAT

    def get_tensor_shape(self, name: str) -> Dims:
        tensor = self._tensor(name)
        return Dims(tensor.shape if tensor else ())

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        """Smallest, best, largest; of an input without a dynamic side always its own shape."""
        tensor = self._tensor(name)
        if tensor is None or not tensor.is_input:
            return [Dims()] * 3
        profile = self._profile(profile_index)
        return [Dims(shape) for shape in profile.get(name, [tensor.shape] * 3)]

    def _profile(self, index: int) -> dict[str, list[Shape]]:
        return self._plan.profiles[index] if self._plan.profiles else {}

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    # What it is

    @property
    def name(self) -> str:
        return self._plan.name

    @property
    def num_layers(self) -> int:
        return len(self._plan.layers)

    @property
    def num_optimization_profiles(self) -> int:
        return max(1, len(self._plan.profiles))

    @property
    def num_aux_streams(self) -> int:
        return 0

    @property
    def refittable(self) -> bool:
        return self._plan.refittable

    @property
    def profiling_verbosity(self) -> Any:
        return ProfilingVerbosity(self._plan.verbosity)

    @property
    def engine_capability(self) -> Any:
        return EngineCapability.STANDARD

    @property
    def hardware_compatibility_level(self) -> Any:
        return HardwareCompatibilityLevel(self._plan.hardware_compatibility)

    @property
    def device_memory_size(self) -> int:
        return max(self._plan.activations)

    @property
    def device_memory_size_v2(self) -> int:
        return max(self._plan.activations)

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return self._plan.activations[profile_index]

    @property
    def streamable_weights_size(self) -> int:
        return 0

    def serialize(self) -> Any:
        """A plan with the weights as they are now: a refit stays in it."""
        return host_memory(Plan(**{**vars(self._plan), "onnx": self._onnx}).pack())

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector._new(self)

    def create_execution_context(
        self,
        strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC,
    ) -> IExecutionContext | None:
        """Takes device memory for the largest shapes; None where it does not fit."""
        own = strategy == ExecutionContextAllocationStrategy.USER_MANAGED
        try:
            gpu.check()
            memory = _take(0 if own else self.device_memory_size_v2, "activations")
        except (_Refusal, Fault) as refusal:
            text = f"IExecutionContext::createExecutionContext: {refusal}"
            say(self._runtime, Severity.ERROR, text)
            return None
        return IExecutionContext._new(self, memory, own)


@bound
class EngineInspector(Bound):
    def _setup(self, engine: ICudaEngine) -> None:
        self._engine = engine

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        layers = self._engine._plan.layers
        if format == LayerInformationFormat.ONELINE:
            return "Layers:\n" + "\n".join(layers) + "\n"
        names = [tensor.name for tensor in self._engine._plan.tensors]
        return json.dumps({"Layers": layers, "Bindings": names})

    def get_layer_information(self, layer_index: int, format: LayerInformationFormat) -> str:
        return self._engine._plan.layers[layer_index]


@bound
class IExecutionContext(Bound):
    """One execution at a time, and one thread at a time: anything else is a Crash."""

    def _setup(self, engine: ICudaEngine, memory: Memory | None, own_memory: bool) -> None:
        self._engine = engine
        self._needs_memory, self._memory = own_memory, (0, 0)
        self._profile_index = 0
        self._shapes: Shapes = {t.name: t.shape for t in self._inputs if -1 not in t.shape}
        self._addresses: dict[str, int] = {}
        self._lock = threading.Lock()
        self._running: tuple[Work, int, int] | None = None  # work, stream, thread
        _count("execution contexts", self, memory)
        gpu.count("contexts")

    name = plain("name", str, "")

    @property
    def engine(self) -> Any:
        return self._engine

    @property
    def _inputs(self) -> list[Tensor]:
        return [tensor for tensor in self._engine._plan.tensors if tensor.is_input]

    def _say(self, function: str, text: str) -> bool:
        message = f"IExecutionContext::{function}: Error Code 3: API Usage Error ({text})"
        say(self._engine._runtime, Severity.ERROR, message)
        return False

    def _enter(self) -> None:
        """Crash for a thread that comes while another is here, or has work of its own going."""
        thread = threading.get_ident()
        running = self._running
        if running is not None and running[0].done:
            running = self._running = None
        other = running is not None and running[2] != thread
        if other or not self._lock.acquire(blocking=False):
            gpu.crash("an execution context is used by two threads at once")
        self._lock.release()

    # Shapes

    @property
    def active_optimization_profile(self) -> int:
        return self._profile_index

    def set_optimization_profile_async(self, profile_index: int, stream_handle: Size) -> bool:
        if not 0 <= profile_index < self._engine.num_optimization_profiles:
            raise RuntimeError("Error in set optimization profile async.")
        self._profile_index = int(profile_index)
        self._shapes = {t.name: t.shape for t in self._inputs if -1 not in t.shape}
        return True

    def set_input_shape(self, name: str, shape: Dims) -> bool:
        self._enter()
        tensor = self._engine._tensor(name)
        if tensor is None or not tensor.is_input:
            return False
        wanted = tuple(int(side) for side in shape)
        fits = len(wanted) == len(tensor.shape) and all(
            real in (-1, side) for real, side in zip(tensor.shape, wanted, strict=True)
        )
        if not fits:
            return self._say(
                "setInputShape",
                "Parameter check failed, condition: engineDims.d[i] == dims.d[i]. Static dimension"
                f" mismatch while setting input shape for {name}. Set dimensions are"
                f" {list(wanted)}. Expected dimensions are {list(tensor.shape)}.",
            )
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile_index)
        inside = all(a <= side <= b for a, side, b in zip(low, wanted, high, strict=True))
        if not inside:
            return self._say(
                "setInputShape",
                f"Parameter check failed, condition: satisfyProfile. Set dimension {list(wanted)}"
                f" for tensor {name} does not satisfy any optimization profiles. Valid range for"
                f" profile {self._profile_index}: {list(low)}..{list(high)}.",
            )
        self._shapes[name] = wanted
        return True

    def get_tensor_shape(self, name: str) -> Dims:
        """-1 in outputs while an input has no shape."""
        tensor = self._engine._tensor(name)
        if tensor is None:
            return Dims()
        if name in self._shapes:
            return Dims(self._shapes[name])
        if tensor.is_input or self.infer_shapes():
            return Dims(tensor.shape)
        return Dims(self._outputs()[name])

    def _outputs(self) -> Shapes:
        return network(self._engine._onnx).shapes(self._shapes)

    def infer_shapes(self) -> list[str]:
        """The names of the inputs that have no shape yet."""
        return [tensor.name for tensor in self._inputs if tensor.name not in self._shapes]

    @property
    def all_binding_shapes_specified(self) -> bool:
        return not self.infer_shapes()

    @property
    def all_shape_inputs_specified(self) -> bool:
        return True

    def get_max_output_size(self, name: str) -> int:
        """Bytes, at the largest shapes of the profile."""
        tensor = self._engine._tensor(name)
        if tensor is None or tensor.is_input:
            return -1
        largest = {
            one.name: tuple(self._engine.get_tensor_profile_shape(one.name, self._profile_index)[2])
            for one in self._inputs
        }
        shape = network(self._engine._onnx).shapes(largest)[name]
        return volume(shape) * self._itemsize(tensor)

    @staticmethod
    def _itemsize(tensor: Tensor) -> int:
        return np.dtype(NUMPY[getattr(DataType, tensor.dtype)]).itemsize

    # Addresses

    def set_tensor_address(self, name: str, memory: Size) -> bool:
        self._enter()
        if self._engine._tensor(name) is None:
            return False
        self._addresses[name] = int(memory)
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def set_device_memory(self, memory: Size, size: Size) -> None:
        self._memory = (int(memory), int(size))

    # Execution

    def execute_async_v3(self, stream_handle: Size) -> bool:
        """Put one execution into a stream. Its outputs are there once the stream was waited for.

        What each tensor's shape and address are now holds for it, whatever is set later.
        """
        handle = int(stream_handle)
        self._enter()
        with self._lock:
            try:
                gpu.check()
                queue = gpu.stream(handle, gpu.runtime_context())
            except Fault as fault:
                text = f"Error Code 1: Cuda Runtime ({fault})"
                message = f"IExecutionContext::enqueueV3: {text}"
                say(self._engine._runtime, Severity.ERROR, message)
                return False
            problem = self._problem()
            if problem:
                return self._say("enqueueV3", problem)
            if self._running is not None and self._running[1] != handle:
                gpu.crash("an execution context has work in two streams at once")
            buffers = self._buffers()
            for tensor, shape, address in buffers:
                self._bytes(tensor, shape, address)
            onnx = self._engine._onnx
            work = queue.add(lambda: gpu.execute(lambda: self._run(onnx, buffers)))
            self._running = (work, handle, threading.get_ident())
            pending = [one for one in self._engine._pending if not one.done]
            self._engine._pending = [*pending, work]
        return True

    def execute_v2(self, bindings: list) -> bool:
        """Addresses by number; returns when it is done."""
        for tensor, address in zip(self._engine._plan.tensors, bindings, strict=True):
            self._addresses[tensor.name] = int(address)
        done: bool = self.execute_async_v3(0)
        gpu.default_stream.drain()
        return done and gpu.sticky is None

    def _problem(self) -> str | None:
        missing = self.infer_shapes()
        if missing:
            return (
                "Parameter check failed, condition: allInputDimensionsSpecified. Not all shapes"
                " are specified. Following input tensors' dimensions are not specified:"
                f" {', '.join(missing)}."
            )
        for tensor in self._engine._plan.tensors:
            if not self._addresses.get(tensor.name):
                kind, missing_one = "output", "Neither address or allocator is set"
                if tensor.is_input:
                    kind, missing_one = "input", "Address is not set"
                return (
                    "Parameter check failed, condition: mContext.profileObliviousBindings."
                    f" {missing_one} for {kind} tensor {tensor.name}. Call setTensorAddress before"
                    " enqueue/execute."
                )
        address, size = self._memory
        if self._needs_memory and (not address or size < self._engine.device_memory_size_v2):
            return "Parameter check failed, condition: the device memory is set and large enough."
        return None

    def _buffers(self) -> list[tuple[Tensor, Shape, int]]:
        shapes = {**self._outputs(), **self._shapes}
        return [
            (tensor, shapes[tensor.name], self._addresses[tensor.name])
            for tensor in self._engine._plan.tensors
        ]

    def _bytes(self, tensor: Tensor, shape: Shape, address: int) -> NDArray[Any]:
        """The tensor in the memory of the device, as an array; Crash where it is not all there.

        NvInferRuntime.h: at least 256-byte alignment.
        """
        nbytes = volume(shape) * self._itemsize(tensor)
        data = gpu.at(address, nbytes, f"tensor {tensor.name} {list(shape)}")
        if address % 256:
            gpu.crash(f"the address of {tensor.name}, {address:#x}, is not aligned to 256 bytes")
        return data.view(NUMPY[getattr(DataType, tensor.dtype)]).reshape(shape)

    def _run(self, onnx: bytes, buffers: list[tuple[Tensor, Shape, int]]) -> None:
        arrays = {buffer[0].name: self._bytes(*buffer) for buffer in buffers}
        inputs = {t.name: arrays[t.name].copy() for t, _, _ in buffers if t.is_input}
        results = network(onnx).run(inputs)
        for tensor, _, _ in buffers:
            if not tensor.is_input:
                arrays[tensor.name][...] = results[tensor.name]


# Refitting


@bound
class Refitter(Bound):
    """New weights for an engine that was built with BuilderFlag.REFIT."""

    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        self._engine, self._logger = engine, logger
        register(self, logger, "createInferRefitter")
        if not engine.refittable:
            text = "Error Code 3: API Usage Error (Parameter check failed, condition:"
            say(self, Severity.ERROR, f"IRefitter::IRefitter: {text} engine.isRefittable())")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._old = self._weights(engine._onnx)
        self._new: dict[str, NDArray[Any]] = {}

    weights_validation = plain("weights_validation", bool, True)
    max_threads = plain("max_threads", int, 1)

    @staticmethod
    def _weights(onnx: bytes) -> dict[str, NDArray[Any]]:
        return weights_of(read_onnx(onnx, None))

    @property
    def logger(self) -> Any:
        return self._logger

    def get_all_weights(self) -> list[str]:
        return list(self._old)

    def get_missing_weights(self) -> list[str]:
        """Those that must be given together with some that were; the double joins none."""
        return []

    def get_weights_prototype(self, weights_name: str) -> Any:
        return Weights(self._old[weights_name])

    def get_named_weights(self, weights_name: str) -> Any:
        return Weights(self._new[weights_name]) if weights_name in self._new else None

    def set_named_weights(self, name: str, weights: Weights) -> bool:
        """Only a name that the engine knows, and as many weights of the same type."""
        old = self._old.get(name)
        if old is None or (old.size, old.dtype) != (weights.size, weights.numpy().dtype):
            text = "Error Code 3: API Usage Error (the name, number or type of the weights does"
            say(self, Severity.ERROR, f"IRefitter::setNamedWeights: {text} not fit: {name})")
            return False
        self._new[name] = weights.numpy()
        return True

    def unset_named_weights(self, weights_name: str) -> bool:
        return self._new.pop(weights_name, None) is not None

    def refit_cuda_engine(self) -> bool:
        """Contexts stay as they are, and compute with the new weights from now on."""
        try:
            gpu.check()
        except Fault as fault:
            text = f"Error Code 1: Cuda Runtime ({fault})"
            say(self, Severity.ERROR, f"IRefitter::refitCudaEngine: {text}")
            return False
        if any(not work.done for work in self._engine._pending):
            gpu.crash("an engine was refitted while it had work to do")
        finite = all(np.isfinite(value).all() for value in self._new.values())
        if self.weights_validation and not finite:
            text = "Error Code 3: API Usage Error (weights are NaN or infinite)"
            say(self, Severity.ERROR, f"IRefitter::refitCudaEngine: {text}")
            return False
        self._engine._onnx = with_weights(self._engine._onnx, self._new)
        gpu.count("refits")
        return True


@bound
class OnnxParserRefitter(Bound):
    """Gives a refitter the weights of an ONNX (ONNX-TensorRT: ModelRefitter.cpp).

    It goes by names alone. Weights that only the file has are passed over in silence, weights that
    only the engine has are an error; whether the two graphs are the same is not looked at.
    """

    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self._refitter, self._logger = refitter, logger
        self._errors: list[ParserError] = []

    def refit_from_bytes(self, model: Buffer, path: str | None = None) -> bool:
        return self._refit(bytes(model), path)

    def refit_from_file(self, model: str) -> bool:
        try:
            data = Path(os.fsdecode(model)).read_bytes()
        except OSError:
            data = b""
        return self._refit(data, os.fsdecode(model))

    def _refit(self, data: bytes, path: str | None) -> bool:
        try:
            given = weights_of(read_onnx(data, path))
            wanted = self._refitter.get_all_weights()
            done = 0
            for name in wanted:
                if name in given:
                    if not self._refitter.set_named_weights(name, Weights(given[name])):
                        raise _Refused("REFIT_FAILED", "Failed to set named weights")
                    done += 1
            if done != len(wanted):
                text = f"Only successfully refitted {done} weights out of {len(wanted)}"
                raise _Refused("REFIT_FAILED", text)
        except _Refused as refused:
            self._errors.append(refused.error)
            write(self._logger, Severity.ERROR, str(refused.error))
            return False
        return True

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def clear_errors(self) -> None:
        self._errors.clear()
