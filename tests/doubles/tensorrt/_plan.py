"""What a network is, and what a plan holds: the ONNX, and for whom it was built.

Everything is computed by OpenVINO in float32; half precision is in the graph. The sizes in memory
are estimates: weights as the ONNX has them, activations as the two largest tensors at the largest
shapes of the profile. TensorRT's own numbers differ, and have the same order.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = b"ftrt"  # as a real plan begins; one of tensorrt_rtx with b"vtrt"
HEADER_BYTES = 64  # of a real one: what is shorter is none
Shape = tuple[int, ...]
Shapes = dict[str, Shape]


@dataclass
class Tensor:
    """An input or output of the network."""

    name: str
    shape: Shape  # -1 where dynamic
    dtype: str  # a member of DataType
    is_input: bool


@dataclass
class Plan:
    """The header of a plan, and its ONNX."""

    version: str  # of the library
    compute: tuple[int, int]
    model: str  # of the device
    tensors: list[Tensor]
    profiles: list[dict[str, list[Shape]]]  # input -> min, opt, max
    layers: list[str]
    weights: int  # bytes
    activations: list[int]  # bytes, of each profile
    name: str = ""
    refittable: bool = False
    strongly_typed: bool = False
    version_compatible: bool = False
    hardware_compatibility: int = 0
    dla: bool = False
    verbosity: int = 0
    onnx: bytes = field(default=b"", repr=False)

    def pack(self) -> bytes:
        header = asdict(self)
        del header["onnx"]
        header["body"] = hashlib.sha256(self.onnx).hexdigest()
        text = json.dumps(header).encode()
        # Not compressed: a plan is about as large as the weights in it, and is taken for them.
        return MAGIC + struct.pack("<IQ", len(text), len(self.onnx)) + text + self.onnx

    @classmethod
    def unpack(cls, data: bytes) -> Plan:
        """Raises ValueError, in TensorRT's words, for bytes that are no whole plan."""
        if not data:
            raise ValueError(
                "Error Code 3: API Usage Error (Cannot deserialize with an empty memory buffer.)"
            )
        if len(data) < HEADER_BYTES:
            text = "Error Code 2: Internal Error (Assertion bufferSize >= minBufferSize failed. )"
            raise ValueError(f"[runtime.cpp::readHeader::0] {text}")
        serialization = "Error Code 1: Serialization (Serialization assertion"
        if data[:4] != MAGIC:
            found, wanted = (int.from_bytes(one, "little") for one in (data[:4], MAGIC))
            raise ValueError(
                f"{serialization} header.magicTag == kEXPECTED_MAGIC_TAG failed.Trying to load an"
                f" engine created with incompatible serialization version ({found} != {wanted})."
                " Check that the engine was not created using safety runtime, same OS was used and"
                " version compatibility parameters were set accordingly and that it is a TRT"
                " engine file)"
            )
        start = 4 + struct.calcsize("<IQ")
        try:
            header_bytes, body_bytes = struct.unpack("<IQ", data[4:start])
            if len(data) != start + header_bytes + body_bytes:
                raise _Cut
            header = json.loads(data[start : start + header_bytes])
            body = data[start + header_bytes :]
            if hashlib.sha256(body).hexdigest() != header.pop("body"):
                raise ValueError
            tensors = [
                Tensor(**{**tensor, "shape": tuple(tensor["shape"])})
                for tensor in header.pop("tensors")
            ]
            profiles = [
                {name: [tuple(shape) for shape in shapes] for name, shapes in profile.items()}
                for profile in header.pop("profiles")
            ]
            compute = tuple(header.pop("compute"))
            return cls(**header, compute=compute, tensors=tensors, profiles=profiles, onnx=body)
        except _Cut:
            raise ValueError(f"{serialization} plan.header.size == blobSize failed. )") from None
        except (ValueError, KeyError, TypeError, struct.error):
            raise ValueError(f"{serialization} engine plan data is damaged)") from None


class _Cut(Exception):
    """There are more or fewer bytes than the header says."""


class Network:
    """An ONNX graph that OpenVINO computes, with any shapes."""

    def __init__(self, onnx: bytes) -> None:
        import openvino as ov

        self._core = ov.Core()
        self._model = self._core.read_model(onnx)
        self._request: Any = None

    def known_shapes(self) -> Shapes:
        """The shapes of the outputs, -1 where a side depends on the inputs."""
        return {
            output.any_name: tuple(
                side.get_length() if side.is_static else -1 for side in output.partial_shape
            )
            for output in self._model.outputs
        }

    def shapes(self, inputs: Shapes) -> Shapes:
        """The shapes of the outputs."""
        key = tuple(sorted(inputs.items()))
        return dict(self._reshaped(key)[0])

    def largest_tensors(self, inputs: Shapes) -> int:
        """Bytes of the two largest tensors."""
        return self._reshaped(tuple(sorted(inputs.items())))[1]

    @lru_cache(maxsize=64)  # noqa: B019
    def _reshaped(self, inputs: tuple[tuple[str, Shape], ...]) -> tuple[list[Any], int]:
        model = self._model.clone()
        model.reshape({name: list(shape) for name, shape in inputs})
        outputs = [(out.any_name, tuple(out.shape)) for out in model.outputs]
        sizes = sorted(
            int(np.prod(output.shape, dtype=np.int64)) * output.element_type.size
            for node in model.get_ordered_ops()
            if node.get_type_name() not in ("Constant", "Result")
            for output in node.outputs()
            if output.partial_shape.is_static
        )
        return outputs, max(512, sum(sizes[-2:]))

    def run(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if self._request is None:
            precision = {"INFERENCE_PRECISION_HINT": "f32"}
            compiled = self._core.compile_model(self._model, "CPU", precision)
            self._request = compiled.create_infer_request()
        results = self._request.infer(inputs)
        return {
            output.any_name: np.array(results[output]) for output in self._request.model_outputs
        }


@lru_cache(maxsize=4)
def network(onnx: bytes) -> Network:
    return Network(onnx)


# Weights, by the names that the parser gives them


def constants_of(model: Any) -> dict[str, NDArray[Any]]:
    """Of an onnx.ModelProto: initializers, and Constant nodes by the name of their output."""
    from onnx import numpy_helper

    found = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return found


def weights_of(model: Any) -> dict[str, NDArray[Any]]:
    """Those that can be refitted. Integers cannot: TensorRT folds what is a shape."""
    found = constants_of(model)
    return {name: value for name, value in found.items() if value.dtype.kind == "f"}


def with_weights(onnx: bytes, new: dict[str, NDArray[Any]]) -> bytes:
    """The same graph with other values."""
    import onnx as library
    from onnx import numpy_helper

    model = library.load_from_string(onnx)
    for one in model.graph.initializer:
        if one.name in new:
            one.CopyFrom(numpy_helper.from_array(_like(one, new[one.name]), one.name))
    for node in model.graph.node:
        if node.op_type == "Constant" and node.output[0] in new:
            tensor = node.attribute[0].t
            tensor.CopyFrom(numpy_helper.from_array(_like(tensor, new[node.output[0]])))
    changed: bytes = model.SerializeToString()
    return changed


def _like(tensor: Any, value: NDArray[Any]) -> NDArray[Any]:
    """Weights have a number and a type, no shape."""
    return np.ascontiguousarray(value).reshape(tuple(tensor.dims))
