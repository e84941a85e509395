"""From an ONNX to a plan: parser, network, configuration, builder."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    Bits,
    Bound,
    Buffer,
    Severity,
    Size,
    Text,
    bound,
    call_back,
    pure,
    truth,
)
from ._plan import Plan, Tensor, constants_of, network, weights_of

BuilderFlag, DeviceType = ENUMS["BuilderFlag"], ENUMS["DeviceType"]
MemoryPoolType, ErrorCode = ENUMS["MemoryPoolType"], ENUMS["ErrorCode"]
NetworkDefinitionCreationFlag = ENUMS["NetworkDefinitionCreationFlag"]
OnnxParserFlag, ProfilingVerbosity = ENUMS["OnnxParserFlag"], ENUMS["ProfilingVerbosity"]
EngineCapability, PreviewFeature = ENUMS["EngineCapability"], ENUMS["PreviewFeature"]
HardwareCompatibilityLevel = ENUMS["HardwareCompatibilityLevel"]
OPERATORS = json.loads((DATA / "onnx_operators.json").read_text())
SUPPORTED = {*OPERATORS["supported"]}
if MAJOR >= 11:
    SUPPORTED = (SUPPORTED | {*OPERATORS["since_11"]}) - {*OPERATORS["gone_in_11"]}
OLDEST_STRICT = 13  # in older ones ONNX-TensorRT also takes axes that came as an input later
OLDEST_OPSET = 7  # of older ones operators are refused, of newer ones none
GONE_WITH_STRONG_TYPES = ("FP16", "BF16", "INT8", "FP8", "INT4", "OBEY_PRECISION_CONSTRAINTS",
                          "PREFER_PRECISION_CONSTRAINTS")  # fmt: skip
TOPK_MOST = 3840
MOST_OPTIMISED = 5  # level
LEAST_POOL = 4096  # bytes


CHECK = "Parameter check failed, condition:"


def usage(owner: Any, where: str, text: str, code: int = 3) -> None:
    say(owner, Severity.ERROR, f"{where}: Error Code {code}: API Usage Error ({text})")


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
        typed = 1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self._builder, self._flags = builder, flags | (typed if MAJOR >= 11 else 0)
        self._title = f"Unnamed Network {builder._networks}"
        builder._networks += 1
        self._onnx: bytes = b""
        self._tensors: list[Tensor] = []
        self._layers: list[tuple[str, str]] = []  # name, key in the timing cache
        self._weights, self._topk = 0, ""

    @property
    def _strongly_typed(self) -> bool:
        return self.get_flag(NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    @property
    def name(self) -> str:
        return self._title

    @name.setter
    def name(self, value: Text) -> None:
        if value is None:
            self._say("setName", "(name) != nullptr.")
            return
        self._title = value

    def _say(self, function: str, condition: str) -> None:
        usage(self._builder, f"INetworkDefinition::{function}", f"{CHECK} {condition}")

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
        return self._get("Input", self._inputs, index)

    def get_output(self, index: int) -> ITensor | None:
        return self._get("Output", [one for one in self._tensors if not one.is_input], index)

    def _get(self, what: str, found: list[Tensor], index: int) -> ITensor | None:
        if 0 <= index < len(found):
            return ITensor._new(found[index])
        self._say(
            f"get{what}",
            f"(0) <= (index) && (index) < (getNb{what}s()). Invalid network output index: {index}."
            f" Valid range of network output indexis [0, {len(found)}). Upper bound of network"
            f" output index can be queried with INetworkDefinition::getNb{what}s.",
        )
        return None


# ONNX


@bound
class ParserError(Bound):
    """`node` is the number of the node, -1 where it is the whole file."""

    def _setup(self, code: Any, desc: str, where: tuple[str, str], node: int, of: Any) -> None:
        self._code, self._desc, self._node, (self._file, self._func) = code, desc, node, where
        self._name, self._operator = (of.name, of.op_type) if of is not None else ("", "")

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
        return self._file

    def func(self) -> str:
        return self._func

    def line(self) -> int:
        return 0

    def __str__(self) -> str:
        where = f"In node {self._node} with name: {self._name} and operator: {self._operator} "
        said = f"({self.func()}): {self._code.name}: {self._desc}"
        return said if self._code == ErrorCode.MODEL_DESERIALIZE_FAILED else where + said

    __repr__ = __str__


READING = ("onnxProtoUtils.hpp", "deserializeOnnxModel")
FILE, NODE = ("ModelImporter.cpp", "parseFromFile"), ("ModelImporter.cpp", "parseNode")
WEIGHTS = ("ModelImporter.cpp", "importInitializers")


class _Refused(Exception):
    """What becomes a ParserError: code, description, where in the parser, number and node."""

    def __init__(
        self, code: str, desc: str, where: tuple[str, str] = NODE, index: int = -1, node: Any = None
    ) -> None:
        super().__init__(desc)
        self.node, self.before = node, ""
        self.error = ParserError._new(getattr(ErrorCode, code), desc, where, index, node)

    def lines(self) -> list[str]:
        """What the log gets, without the numbers of lines in the parser's source."""
        error = self.error
        if error.func() in (READING[1], FILE[1], ""):
            return [str(error) if error.func() else error.desc()]
        said = [f"ModelImporter.cpp:0: ERROR: {error.file()}:0 In function {error.func()}:\n"
                f"[{int(error.code())}] {error.desc()}"]  # fmt: skip
        if self.node is None:
            return [self.before, *said] if self.before else said
        made = "".join(f' -> "{name}"' for name in self.node.output[:1])
        return [
            f"ModelImporter.cpp:0: While parsing node number {error.node()}"
            f" [{self.node.op_type}{made}]:",
            f"ModelImporter.cpp:0: --- Begin node ---\nNode name: {self.node.name}",
            "ModelImporter.cpp:0: --- End node ---",
            *said,
        ]


def read_onnx(data: bytes, path: str | None) -> Any:
    """An onnx.ModelProto with all its weights, or _Refused."""
    model = _decoded(data)
    _load_weights(model, path)
    return model


def _decoded(data: bytes) -> Any:
    """Nothing at all is a model, too: an empty one."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load_from_string(data)
    except DecodeError:
        desc = "Assertion failed: model->ParseFromCodedStream(&codedInput): Failed to parse the"
        raise _Refused("MODEL_DESERIALIZE_FAILED", f"{desc} ONNX model.", READING) from None


def _load_weights(model: Any, path: str | None) -> None:
    import onnx
    from onnx import external_data_helper

    folder = str(Path(path).parent) if path else ""
    one = None
    try:
        for one in filter(external_data_helper.uses_external_data, model.graph.initializer):
            external_data_helper.load_external_data_for_tensor(one, folder)
            one.data_location = onnx.TensorProto.DEFAULT
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        where = external_data_helper.ExternalDataInfo(one).location
        desc = "Failed to import initializer: In node -1 with name:  and operator: "
        desc += " (importInitializers): UNSUPPORTED_NODE: Assertion failed:"
        desc += " ctx->getWeightsContext().convertOnnxWeights(initializer, &weights): Failed to"
        desc += f" import initializer: {one.name}"
        refused = _Refused("INVALID_GRAPH", desc, WEIGHTS)
        refused.before = f"WeightsContext.cpp:0: Failed to open file: {Path(folder, where)}"
        raise refused from error


# What ONNX-TensorRT says of uint8 depends on the operator.
NOT_OF_UINT8 = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Add", "Sub", "Mul",
                "Div")  # fmt: skip
NO_TYPES = (4, 5, 8, 12, 13, 14, 15)  # uint16, int16, string, uint32, uint64, complex
BROADCASTING = ("Add", "Sub", "Mul", "Div", "Pow")


class _Checks:
    """What ONNX-TensorRT refuses, node by node (docs/operators.md, ModelImporter.cpp)."""

    def __init__(self, model: Any) -> None:
        import onnx

        self._model, self._graph = model, model.graph
        self._values = constants_of(model)
        self._outputs = {one.name for one in model.graph.output}
        inputs = {one.name: one.type.tensor_type.elem_type for one in model.graph.input}
        self._known = {*inputs, *(one.name for one in model.graph.initializer), ""}
        self._uint8 = {name for name, kind in inputs.items() if kind == onnx.TensorProto.UINT8}
        opsets = [one.version for one in model.opset_import if one.domain in ("", "ai.onnx")]
        opset = min(opsets, default=OLDEST_OPSET)
        self.old = bool(model.graph.node) and opset < OLDEST_OPSET
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.topk = _too_many(model)  # what the builder alone refuses
        self._odd = self._infer() if opset >= OLDEST_STRICT else None

    def node(self, index: int, node: Any) -> None:
        if self.old and node.op_type in BROADCASTING:
            desc = "Assertion failed: ctx->getOpsetVersion() >= 7: Pre-opset 7 broadcasting is"
            desc += " unsupported in this version of the ONNX parser"
            where = ("importerUtils.cpp", "broadcastTensor")
            raise _Refused("UNSUPPORTED_NODE", desc, where)
        problem = self._problem(node)
        if problem is None and index == self._odd:
            problem = ("INVALID_NODE", f"Invalid Node - {node.name}\n")
        if problem is not None:
            code, desc = problem
            known = node.op_type in {*OPERATORS["unsupported"]} - SUPPORTED
            checker = ("onnxOpCheckers.cpp", f"check{node.op_type}")
            raise _Refused(code, desc, checker if known else NODE, index, node)
        self._known.update(node.output)

    def _problem(self, node: Any) -> tuple[str, str] | None:
        kind = node.op_type
        if kind not in SUPPORTED:
            if kind in OPERATORS["unsupported"]:
                return "UNSUPPORTED_NODE", "false"
            return "INVALID_NODE", (
                'creator && "Plugin not found, are the plugin name, version, and namespace'
                ' correct?"'
            )
        if not {*node.input} <= self._known:
            return "INVALID_GRAPH", (
                "Assertion failed: (ctx->tensors().count(inputName)): Node input was not"
                " registered."
            )
        unsorted = any(one.name == "sorted" and one.i == 0 for one in node.attribute)
        if kind == "TopK" and MAJOR < 11 and unsorted:
            return "UNSUPPORTED_NODE_ATTR", "`sorted` must be 1"
        if kind in ("QuantizeLinear", "DequantizeLinear"):
            return self._zero_point(node)
        return self._types(node)

    def _types(self, node: Any) -> tuple[str, str] | None:
        kind, target = node.op_type, None
        if kind == "Cast":
            target = next(one.i for one in node.attribute if one.name == "to")
            if target in NO_TYPES:
                text = 'convertDtype(onnxType, &newType) && "Unsupported data type for the Cast'
                return "INVALID_NODE", f'{text} operator!"'
        of_uint8 = bool(self._uint8 & {*node.input}) and kind not in ("Cast", "Shape", "Size")
        if of_uint8 and kind in NOT_OF_UINT8:
            return "INVALID_NODE", (
                f"Invalid Node - {node.name}\nITensor::getDimensions: Error Code 4: API Usage"
                f" Error ({node.name}: first input has type UInt8)"
            )
        if of_uint8 and kind != "Identity":
            text = "Assertion failed: status.is_success(): Found unsupported input type of UINT8"
            return "UNSUPPORTED_NODE", text
        if of_uint8 or target == 2:
            self._uint8.update(node.output)
            if not self._outputs & {*node.output}:
                return "UNSUPPORTED_NODE", (
                    "Assertion failed: legalUINT8: TensorRT does not support UINT8 types for"
                    " intermediate tensors. For UINT8 quantization, the kIMPORT_UINT8_QUANTIZATION"
                    " flag must be set. (DLA version >= 3.16 only)"
                )
        return None

    def _zero_point(self, node: Any) -> tuple[str, str] | None:
        """int8 and zero. Harder than the real one, which takes uint8, ONNX's default, for int8."""
        point = self._values.get(node.input[2]) if len(node.input) > 2 else None
        if point is not None and point.any():
            return "INVALID_NODE", (
                "Assertion failed: shiftIsAllZeros(zeroPoint): Non-zero zero point is not"
                " supported. Please set kENABLE_UINT8_AND_ASYMMETRIC_QUANTIZATION_DLA to enable"
            )
        if point is None or point.dtype != np.int8:
            return "UNSUPPORTED_NODE", "`y_zero_point` must be 0, and int8"
        return None

    def _infer(self) -> int | None:
        """Find the shapes of the outputs; the number of the first node whose inputs do not fit."""
        nodes = self._graph.node
        found = _inferred(self._model, len(nodes))
        if found is not None:
            self.shapes = _shapes_of_outputs(self._model, found)
            return None
        low, high = 0, len(nodes)  # the first `low` nodes fit, the first `high` do not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if _inferred(self._model, middle) is None else (middle, high)
        if nodes[low].op_type != "TopK":
            return low
        self.topk = f"{nodes[low].name}: length of reduction axis is smaller than K"
        return None


def _shapes_of_outputs(model: Any, inferred: Any) -> dict[str, tuple[int, ...]]:
    """As the graph declares them, as far as OpenVINO does not know better."""
    declared = {
        one.name: tuple(side.dim_value or -1 for side in one.type.tensor_type.shape.dim)
        for one in inferred.graph.output
    }
    try:
        found = network(model.SerializeToString()).known_shapes()
    except RuntimeError:
        return declared
    return {
        name: tuple(
            known if side == -1 else side for side, known in zip(sides, declared[name], strict=True)
        )
        if len(sides) == len(declared.get(name, ()))
        else sides
        for name, sides in found.items()
    }


def _inferred(model: Any, count: int) -> Any:
    """The first `count` nodes of a model with their shapes; None where they do not fit.

    Large weights become inputs, so that they need not be copied.
    """
    import onnx
    from onnx import helper

    light = onnx.ModelProto(ir_version=model.ir_version or 8)
    light.opset_import.extend([one for one in model.opset_import if one.domain in ("", "ai.onnx")])
    light.graph.name = "shapes"
    light.graph.node.extend(model.graph.node[:count])
    light.graph.input.extend(model.graph.input)
    for one in model.graph.initializer:
        if np.prod(one.dims, dtype=np.int64) <= 64:
            light.graph.initializer.append(one)
        elif one.name not in {each.name for each in model.graph.input}:
            light.graph.input.append(
                helper.make_tensor_value_info(one.name, one.data_type, one.dims)
            )
    made = {name for node in light.graph.node for name in node.output}
    light.graph.output.extend([one for one in model.graph.output if one.name in made])
    try:
        return onnx.shape_inference.infer_shapes(
            light, check_type=True, strict_mode=True, data_prop=True
        )
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError):
        return None


@bound
class OnnxParser(Bound):
    """Fills a network; keeps the errors of what it refused. It logs through its own logger.

    What it has filled until it refuses stays, so that neither it nor the network can be used again.
    """

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._held, self._logger = weakref.ref(network), logger
        self._errors: list[ParserError] = []
        self._flag_bits = 1 << int(OnnxParserFlag.NATIVE_INSTANCENORM)  # on by default
        self._read, self._last = False, ""

    @property
    def _network(self) -> INetworkDefinition:
        """The parser does not keep it: it dies where nobody else does."""
        network = self._held()
        if network is None:
            gpu.crash("a parser is used whose network nobody holds any more")
        return network

    def parse(self, model: Buffer, path: str | None = None) -> bool:
        """A path only finds weights that are kept in files beside the model."""
        return self._parse(bytes(model), path)

    def parse_from_file(self, model: str) -> bool:
        if not Path(model).is_file():
            text = "Assertion failed: stat(onnxModelFile, &sb) == 0 && S_ISREG(sb.st_mode): Input"
            text += f" file cannot be found, or is not a regular file: {model}"
            return self._refuse(_Refused("INVALID_VALUE", text, FILE))
        return self._parse(Path(model).read_bytes(), model)

    def _parse(self, data: bytes, path: str | None) -> bool:
        if self._network.num_layers:
            message = "ModelImporter.cpp:0: Parse was called with a non-empty network definition"
            write(self._logger, Severity.ERROR, message)
            return False
        try:
            if self._errors and not self._read:
                return self._fail_again(data)
            if self._read:
                text = (
                    "Assertion failed: model->ByteSizeLong() == 0: A model was previously parsed!"
                )
                raise _Refused("MODEL_DESERIALIZE_FAILED", text, READING)
            model = _decoded(data)
            self._read = bool(data)
            self._import(model, path)
        except _Refused as refused:
            return self._refuse(refused)
        return True

    def _fail_again(self, data: bytes) -> bool:
        """An error stays, and nothing but the inputs is read after one."""
        self._network._tensors += _inputs(_decoded(data))
        error = self._errors[-1]
        text = f"ModelImporter.cpp:0: ERROR: {error.file()}:0 In function {error.func()}:\n"
        write(self._logger, Severity.ERROR, f"{text}[{int(error.code())}] {error.desc()}")
        return False

    def _refuse(self, refused: _Refused) -> bool:
        self._errors.append(refused.error)
        self._last = str(refused.error)
        for line in refused.lines():
            write(self._logger, Severity.ERROR, line)
        return False

    def _import(self, model: Any, path: str | None) -> None:
        net = self._network
        for node in model.graph.node:
            node.domain = ""  # nobody looks at it
        net._tensors += _inputs(model)
        _load_weights(model, path)
        weights, checks = weights_of(model), _Checks(model)
        if checks.old:
            text = "ModelImporter.cpp:0: TensorRT supports ONNX graphs generated with at least"
            text += " opset 7. Models using older opsets are not guaranteed to work."
            write(self._logger, Severity.WARNING, text)
        for index, node in enumerate(model.graph.node):
            if self._last:  # of an error before, which clear_errors does not clear
                net._layers.append((node.name, ""))
                desc = f"Invalid Node - {node.name}\n{self._last}"
                raise _Refused("INVALID_NODE", desc, NODE, index, node)
            checks.node(index, node)
            shapes = [weights[name].shape for name in node.input if name in weights]
            settings = [attribute.SerializeToString() for attribute in node.attribute]
            key = hashlib.sha1(repr((node.op_type, shapes, settings)).encode()).hexdigest()[:16]
            net._layers.append((node.name or f"{node.op_type}_{index}", key))
        for one in model.graph.output:
            net._tensors.append(_tensor(one, is_input=False, shape=checks.shapes.get(one.name)))
        net._topk = checks.topk
        net._weights = sum(value.nbytes for value in weights.values())
        net._onnx = model.SerializeToString()

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError | None:
        """A number that there is not is an error more, and None."""
        if 0 <= index < len(self._errors):
            return self._errors[index]
        text = f"vector::_M_range_check: __n (which is {index % (1 << 64)}) >= this->size()"
        text += f" (which is {len(self._errors)})"
        self._refuse(_Refused("INTERNAL_ERROR", text, ("", "")))
        return None

    def clear_errors(self) -> None:
        self._errors.clear()

    @property
    def flags(self) -> int:
        return self._flag_bits

    @flags.setter
    def flags(self, value: Bits) -> None:
        self._flag_bits = int(value)

    def set_flag(self, flag: OnnxParserFlag) -> None:
        self._flag_bits |= 1 << int(flag)

    def clear_flag(self, flag: OnnxParserFlag) -> None:
        self._flag_bits &= ~(1 << int(flag))

    def get_flag(self, flag: OnnxParserFlag) -> bool:
        return bool(self._flag_bits >> int(flag) & 1)

    def supports_operator(self, op_name: Text) -> bool:
        if op_name is None:
            text = "basic_string::_M_construct null not valid"
            return self._refuse(_Refused("INTERNAL_ERROR", text, ("", "")))
        return op_name in SUPPORTED


def _inputs(model: Any) -> list[Tensor]:
    constants = {one.name for one in model.graph.initializer}
    return [_tensor(one, is_input=True) for one in model.graph.input if one.name not in constants]


def _tensor(value: Any, *, is_input: bool, shape: tuple[int, ...] | None = None) -> Tensor:
    """Of an onnx.ValueInfoProto; the shape of an output is what follows from the graph."""
    kind = value.type.tensor_type
    declared = tuple(side.dim_value or -1 for side in kind.shape.dim)
    return Tensor(
        value.name,
        declared if shape is None else shape,
        TYPES.get(kind.elem_type, "FLOAT"),
        is_input,
    )


def _too_many(model: Any) -> str:
    """What is wrong with the K of a graph, if anything is."""
    values = constants_of(model)
    for node in model.graph.node:
        count = values.get(node.input[1]) if node.op_type == "TopK" else None
        if count is not None and count.reshape(-1)[0] > TOPK_MOST:
            return f"{node.name}: K exceeds the maximum value allowed ({TOPK_MOST})."
    return ""


# Configuration


@bound
class IOptimizationProfile(Bound):
    """Smallest, best and largest shape of each dynamic input."""

    def _setup(self, builder: Builder) -> None:
        self._builder = builder
        self._shapes: dict[str, list[tuple[int, ...]]] = {}

    def set_shape(self, input: str, min: Dims, opt: Dims, max: Dims) -> None:
        """Only what is negative is refused here; whether they fit is asked when it is added."""
        shapes = [tuple(int(side) for side in shape) for shape in (min, opt, max)]
        for which, shape in zip(("min", "opt", "max"), shapes, strict=True):
            if any(side < 0 for side in shape):
                condition = "std::all_of(dims.d, dims.d + dims.nbDims, [](int32_t x) noexcept {"
                text = f"{CHECK} {condition} return x >= 0; }})."
                usage(self._builder, "IOptimizationProfile::setDimensions", text)
                text = f"Shape provided for {which} is inconsistent with other shapes."
                raise RuntimeError(text)
            known = self._shapes.get(input, []) if which != "min" else []
            self._shapes[input] = [*known, shape]

    def get_shape(self, input: str) -> list[Dims]:
        if input not in self._shapes:
            text = f"Cannot get dimensions for input: {input}. Input is not present in this"
            text += " OptimizationProfile"
            usage(self._builder, "IOptimizationProfile::getDimensions", text, 4)
            return []
        if len(self._shapes[input]) < 3:
            raise ValueError("__len__() should return >= 0")
        return [Dims(shape) for shape in self._shapes[input]]

    def __bool__(self) -> bool:
        """Whether min <= opt <= max everywhere."""
        wrong = [name for name, shapes in self._shapes.items() if not _ordered(shapes)]
        if wrong:
            text = f"Invalid optimization profiles for input tensors {', '.join(wrong)}, please"
            text += " ensure that the optimization profiles satisfy MIN<=OPT<=MAX."
            usage(self._builder, "IOptimizationProfile::isValid", text, 4)
        return not wrong


def _ordered(shapes: list[tuple[int, ...]]) -> bool:
    ranks = {len(shape) for shape in shapes}
    return (
        len(shapes) == 3
        and len(ranks) == 1
        and all(low <= best <= high for low, best, high in zip(*shapes, strict=True))
    )


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
        self._core, self._level = -1, 3

    avg_timing_iterations = plain("avg_timing_iterations", int, 1)
    max_aux_streams = plain("max_aux_streams", int, -1)
    profile_stream = plain("profile_stream", int, 0)
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
    def builder_optimization_level(self) -> int:
        return self._level

    @builder_optimization_level.setter
    def builder_optimization_level(self, value: int) -> None:
        if int(value) < 0:
            text = f"{CHECK} level >= 0. Setting builder optimization level. Valid values include"
            text += " integers from 0 to the n, where n is the required optimization level"
            usage(self._builder, "IBuilderConfig::setBuilderOptimizationLevel", text)
            return
        self._level = min(int(value), MOST_OPTIMISED)

    @property
    def flags(self) -> int:
        return self._bits

    @flags.setter
    def flags(self, value: Bits) -> None:
        known = [int(flag) for flag in BuilderFlag.__members__.values()]
        if int(value) >= 1 << max(known) + 1:
            text = f"{CHECK} flags.toU32() < (1U << EnumMax<BuilderFlag>()). "
            usage(self._builder, "IBuilderConfig::setFlags", text)
            return
        self._bits = int(value) & sum(1 << flag for flag in known)

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
        power = int(pool_size) >= LEAST_POOL and int(pool_size).bit_count() == 1
        if pool == MemoryPoolType.TACTIC_DRAM and not power:
            text = f"{CHECK} (pool == MemoryPoolType::kDLA_MANAGED_SRAM && poolSize == 0) ||"
            text += " (static_cast<int64_t>(poolSize) >= kDLA_MIN_MEMORY_POOL_SIZE &&"
            text += " std::has_single_bit(poolSize)). "
            usage(self._builder, "IBuilderConfig::setMemoryPoolLimit", text)
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

    def add_optimization_profile(self, profile: IOptimizationProfile | None) -> int:
        """Its number, or -1 where it is wrong: no exception says so."""
        if profile is None or not profile:
            condition = "profile != nullptr." if profile is None else "profile->isValid()."
            text = f"{CHECK} {condition} "
            usage(self._builder, "IBuilderConfig::addOptimizationProfile", text)
            return -1
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


class _Failed(Exception):
    """The build failed; the text is the line in the log."""


class _Cancelled(_Failed):
    def __init__(self) -> None:
        super().__init__("Error Code 7: BuildCanceled (Build canceled by user)")


class _Progress:
    """Phases within phases, as the real library tells them.

    It announces more steps than it completes, starts some phases again and again, and completes
    steps of a phase while one within it is still open.

    The documentation says that a step may be reported by another thread than the one that builds;
    here the steps of the layers are, because a monitor must bear it. KENSA_DOUBLE_BUILD_SECONDS is
    spread over them.
    """

    def __init__(self, monitor: Any, layers: int) -> None:
        self._monitor = monitor
        self._open: list[str] = []
        self._pause = float(os.environ.get("KENSA_DOUBLE_BUILD_SECONDS", "0")) / max(1, layers)

    @contextmanager
    def phase(self, name: str, steps: int) -> Iterator[Callable[..., None]]:
        """Gives what completes one step, or several. What fails is finished by `close`."""
        parent = self._open[-1] if self._open else None
        self._open.append(name)
        if self._monitor is not None:
            call_back("phase_start", self._monitor.phase_start, name, parent, steps)
        done = itertools.count()

        def complete(times: int = 1) -> None:
            for _ in range(times):
                self._complete(name, next(done))

        yield complete
        self._finish()

    def run(self, name: str, steps: int) -> None:
        """A phase in which nothing happens."""
        with self.phase(name, steps) as complete:
            complete(steps)

    def layers(self, name: str, tries: list[Callable[[], None]]) -> None:
        """A phase with a step for each layer."""
        with self.phase(name, len(tries)) as complete:
            for attempt in tries:
                attempt()
                self._elsewhere(complete)

    def _complete(self, name: str, number: int) -> None:
        if self._monitor is None:
            return

        def ask() -> bool:
            return truth(self._monitor.step_complete(name, number))

        if not call_back("step_complete", ask):
            raise _Cancelled

    def _elsewhere(self, complete: Callable[[], None]) -> None:
        """Complete a step in a thread of TensorRT's own."""
        if self._pause:
            time.sleep(self._pause)
        cancelled: list[BaseException] = []

        def run() -> None:
            try:
                complete()
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
        self._threads, self._networks = 1, 0
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
        if int(value) <= 0:
            usage(self, "IBuilder::setMaxThreads", f"{CHECK} maxThreads > 0. ")
            return
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

    def create_network(self, flags: Bits = 0) -> INetworkDefinition | None:
        known = NetworkDefinitionCreationFlag.__members__.values()
        if int(flags) >= 1 << max(map(int, known)) + 1:
            text = f"{CHECK} flagSet.toU32() < (1U << EnumMax<NetworkDefinitionCreationFlag>()). "
            usage(self, "IBuilder::createNetworkV2", text)
            return None
        return INetworkDefinition._new(self, int(flags))

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig._new(self)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile._new(self)

    def reset(self) -> None:
        pass

    def is_network_supported(self, network: INetworkDefinition, config: IBuilderConfig) -> bool:
        try:
            _check(network, config)
        except _Failed as failed:
            say(self, Severity.ERROR, f"IBuilder::isNetworkSupported: {failed}")
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
        except (_Failed, Fault) as failed:
            if progress is not None:
                progress.close()
            say(self, Severity.ERROR, f"IBuilder::buildSerializedNetwork: {failed}")
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

        tries = [lambda name=name: self._try(name, net, config, activations) for name, _ in steps]
        try:
            self._tell(progress, len(net._layers), measure, tries)
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

    def _tell(
        self,
        progress: _Progress,
        layers: int,
        measure: Callable[[], None],
        tries: list[Callable[[], None]],
    ) -> None:
        with progress.phase("Building engine", 6) as engine:
            progress.run("Cloning network graph", layers)
            engine(2)
            progress.run("Preparing graph for optimization", 4)
            measure()
            engine(2)
            with progress.phase("Building engine from subgraph", 1) as subgraph:
                progress.run("Optimizing graph", 30)
                with progress.phase("Computing profile costs", 5) as costs:
                    with progress.phase("Timing tactics", 3) as tactics:
                        progress.layers("Timing graph nodes", tries)
                        tactics()
                        with progress.phase("Timing tensor reformats", 3) as reformats:
                            for _ in range(3):
                                progress.run("Computing reformatting costs", 1)
                                reformats()
                        tactics()
                    costs(3)
                    with progress.phase("Determining refit engines", 1) as refit:
                        refit()
                        costs(2)
                subgraph()
            engine()

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
    if not net.num_outputs:
        raise _Failed("Error Code 4: API Usage Error (Network must have at least one output.)")
    if net._strongly_typed:
        for name in GONE_WITH_STRONG_TYPES:
            if hasattr(BuilderFlag, name) and config.get_flag(getattr(BuilderFlag, name)):
                raise _Failed(
                    f"Error Code 3: API Usage Error (BuilderFlag::k{name} is set, and is not"
                    " allowed for a strongly typed network.)"
                )
    if net._topk:
        text = f"ITopKLayer {net._topk.split(':')[0]}: {net._topk}"
        raise _Failed(f"Error Code 4: API Usage Error ({text})")
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
    """The shapes of the network's inputs; what a profile says of others is passed over."""
    for tensor in net._inputs:
        problem = _misfit(tensor, profile._shapes.get(tensor.name), number)
        if problem:
            raise _Failed(f"Error Code 4: API Usage Error ({problem})")
    names = {tensor.name for tensor in net._inputs}
    return {name: shapes for name, shapes in profile._shapes.items() if name in names}


def _misfit(tensor: Tensor, shapes: Any, number: int) -> str:
    name, sides = tensor.name, tensor.shape
    if shapes is None:
        missing = f"Dynamic input tensor {name} is missing dimensions in profile {number}."
        return missing if -1 in sides else ""
    if len(shapes[0]) != len(sides):
        return (
            f"Dynamic-shaped input tensor {name} has {len(sides)} dimensions but profile {number}"
            f" has {len(shapes[0])} dimensions."
        )
    for axis, (side, low, best, high) in enumerate(zip(sides, *shapes, strict=True)):
        if side != -1 and {side} != {low, best, high}:
            return (
                f"Dimension mismatch for tensor {name} and profile {number}. At dimension axis"
                f" {axis}, profile has min={low}, opt={best}, max={high} but tensor has {side}."
            )
    return ""


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
