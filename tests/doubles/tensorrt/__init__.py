"""A double of NVIDIA TensorRT's Python bindings, for machines that cannot have TensorRT.

    KENSA_DOUBLE_TENSORRT       10.3.0 (default), 10.16.1.11 or 11.4.0.106
    KENSA_DOUBLE_BUILD_SECONDS  how long a build takes, spread over its steps

Names that a version lacks do not exist (tests/data/tensorrt). What it does follows the docstrings
of the real bindings, their source (NVIDIA/TensorRT: python/src/infer) and that of the ONNX parser
(onnx/onnx-tensorrt); messages are those of TensorRT 10 where one was found. It computes with
OpenVINO. The GPU under it is `double_gpu`, which pycuda's double shares.

    _names.py  which names exist, types of arguments, enums      _core.py   loggers, shapes, weights
    _plan.py   what a plan holds, and who computes it            _build.py  ONNX -> plan
    _run.py    plan -> results, refit

Known to differ: memory sizes are estimates; a network is built weakly typed, but computed as if it
were strongly typed; every version takes the ONNX operators of 10.1; a damaged plan is always found
(TensorRT has no checksum); timing caches of another version are None.
"""

from double_gpu import missing as _missing

if _missing("bindings"):  # a venv that does not see the system's packages
    raise ModuleNotFoundError("No module named 'tensorrt'", name="tensorrt")
if _missing("libnvinfer"):
    raise ImportError("libnvinfer.so.10: cannot open shared object file: No such file or directory")

from ._build import (
    Builder,
    IBuilderConfig,
    INetworkDefinition,
    IOptimizationProfile,
    IProgressMonitor,
    ITensor,
    ITimingCache,
    OnnxParser,
    ParserError,
)
from ._core import (
    DataType,
    Dims,
    IHostMemory,
    ILogger,
    Logger,
    Weights,
    bfloat16,
    float16,
    float32,
    int8,
    int32,
    int64,
    nptype,
    uint8,
    volume,
)
from ._names import ENUMS as _ENUMS
from ._names import VERSION as __version__
from ._run import (
    EngineInspector,
    ICudaEngine,
    IExecutionContext,
    OnnxParserRefitter,
    Refitter,
    Runtime,
)

globals().update(_ENUMS)
bool = DataType.BOOL


def init_libnvinfer_plugins(logger: object, namespace: str) -> object:
    """There are none."""
    return True


__all__ = [
    "Builder",
    "DataType",
    "Dims",
    "EngineInspector",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProgressMonitor",
    "ITensor",
    "ITimingCache",
    "Logger",
    "OnnxParser",
    "OnnxParserRefitter",
    "ParserError",
    "Refitter",
    "Runtime",
    "Weights",
    "__version__",
    "bfloat16",
    "bool",
    "float16",
    "float32",
    "init_libnvinfer_plugins",
    "int8",
    "int32",
    "int64",
    "nptype",
    "uint8",
    "volume",
]
