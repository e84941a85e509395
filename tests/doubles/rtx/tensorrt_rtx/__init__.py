"""A double of TensorRT for RTX, made of that of TensorRT 11.4: what differs is added here.

A plan is for the capabilities that its configuration names. Kernels are made when a context first
executes a shape, unless its runtime cache has them; `gpu.counts["kernels"]` counts them. A cache is
read only where a context is current, as the real docstring says.
"""

import os
from dataclasses import replace
from pathlib import Path

os.environ["KENSA_DOUBLE_TENSORRT"] = "11.4.0.106"
_OF = Path(__file__).parents[2] / "tensorrt"
__path__ = [str(_OF)]
exec(compile((_OF / "__init__.py").read_text(), str(_OF / "__init__.py"), "exec"), globals())

from double_gpu import gpu  # noqa: E402

from ._build import Builder, IBuilderConfig  # noqa: E402
from ._core import host_memory  # noqa: E402
from ._names import enum  # noqa: E402
from ._run import ICudaEngine, IExecutionContext  # noqa: E402

__version__ = "1.7.1.116"
ComputeCapability = enum(
    "ComputeCapability",
    {"NONE": 0, "CURRENT": 1, "SM75": 75, "SM80": 80, "SM86": 86, "SM89": 89, "SM120": 120,
     "SM121": 121},
)  # fmt: skip
DynamicShapesKernelSpecializationStrategy = enum(
    "DynamicShapesKernelSpecializationStrategy", {"LAZY": 0, "EAGER": 1, "NONE": 2}
)
gpu.counts.setdefault("kernels", 0)


class _Named:
    """`num_compute_capabilities` and what is set by number."""

    @staticmethod
    def count(config):
        return len(getattr(config, "_capabilities", []))

    @staticmethod
    def resize(config, count):
        config._capabilities = [ComputeCapability.NONE] * count

    @staticmethod
    def put(config, capability, index):
        if not 0 <= index < len(config._capabilities):
            return False
        config._capabilities[index] = capability
        return True


IBuilderConfig.num_compute_capabilities = property(_Named.count, _Named.resize)
IBuilderConfig.set_compute_capability = _Named.put
_build = Builder._build


def _for_capabilities(self, net, config, *rest):
    made = _build(self, net, config, *rest)
    named = [
        one for one in getattr(config, "_capabilities", []) if one != ComputeCapability.CURRENT
    ]
    here = ComputeCapability(int("{}{}".format(*gpu.model.compute)))
    if not named or here in named:
        return made
    major, minor = divmod(int(named[0]), 10)
    return replace(made, compute=(major, minor), model=named[0].name)


Builder._build = _for_capabilities


class IRuntimeCache:
    def __init__(self):
        self._kernels = set()

    def deserialize(self, blob):
        if gpu.current() is None:
            return False
        self._kernels = set(bytes(blob).decode().split("\n"))
        return True

    def serialize(self):
        return host_memory("\n".join(sorted(self._kernels)).encode())


class IRuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    def __init__(self):
        self._cache = None

    def create_runtime_cache(self):
        return IRuntimeCache()

    def set_runtime_cache(self, cache=None):
        self._cache = cache
        return True


ICudaEngine.create_runtime_config = lambda self: IRuntimeConfig()
_create = ICudaEngine.create_execution_context


def _create_execution_context(self, runtime_config=None):
    context = _create(self)
    if context is not None and runtime_config is not None:
        context._kernels = runtime_config._cache
    return context


ICudaEngine.create_execution_context = _create_execution_context
_execute = IExecutionContext.execute_async_v3


def _execute_async_v3(self, stream_handle):
    cache = getattr(self, "_kernels", None)
    if cache is not None:
        shapes = [
            (tensor.name, tuple(self.get_tensor_shape(tensor.name)))
            for tensor in self._engine._plan.tensors
        ]
        if str(shapes) not in cache._kernels:
            gpu.count("kernels")
            cache._kernels.add(str(shapes))
    return _execute(self, stream_handle)


IExecutionContext.execute_async_v3 = _execute_async_v3
