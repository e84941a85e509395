"""The one seam to CUDA: pycuda where it is, as on a Jetson, else cuda-bindings, a wheel."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from engines.errors import NoTensorRT
from engines.nvidia.library import FULL, here

_NO_DRIVER = (
    "The CUDA driver is not to be found ({}): a container must be started with --runtime nvidia;"
    " outside of one, install the driver (a Jetson comes with it)."
)
_NO_DRIVER_OF_A_PC = (
    "NVIDIA's driver is not to be found ({}): on a PC with an RTX card install it, and start a"
    " container with --gpus all."
)
_DOES_NOT_LOAD = (
    "cuda-bindings is here, but does not load ({}): install it anew,"
    " pip install --force-reinstall cuda-bindings."
)


def is_installed() -> bool:
    """Whether there is one of the two packages."""
    return find_spec("pycuda") is not None or _has_bindings()


def load() -> Any:
    """pycuda.driver, or what has the same names.

    Raises:
        NoTensorRT: neither package is here, or there is no driver.
    """
    if find_spec("pycuda") is not None:
        try:
            import pycuda.driver as cuda
        except ImportError as error:
            raise NoTensorRT(_NO_DRIVER.format(error)) from None
        return cuda
    if not _has_bindings():
        raise NoTensorRT(
            "pycuda is not in this environment: pip install 'kensa[jetson]' (it is compiled with"
            " nvcc, which must be on the PATH: /usr/local/cuda/bin)."
            if here() is FULL
            else "cuda-bindings is not in this environment: pip install 'kensa[rtx]'."
        )
    try:
        from engines.nvidia import cuda_bindings
    except (ImportError, OSError) as error:
        raise NoTensorRT(_DOES_NOT_LOAD.format(error)) from None
    if problem := cuda_bindings.no_driver():
        raise NoTensorRT((_NO_DRIVER if here() is FULL else _NO_DRIVER_OF_A_PC).format(problem))
    return cuda_bindings


def has_driver() -> bool:
    """Whether a driver may be here. With pycuda only loading it would tell: that is for later."""
    if find_spec("pycuda") is not None:
        return True
    if not _has_bindings():
        return False
    try:
        from engines.nvidia import cuda_bindings
    except (ImportError, OSError):  # which `load` says
        return False
    return cuda_bindings.no_driver() is None


def _has_bindings() -> bool:
    try:
        return find_spec("cuda.bindings") is not None
    except ImportError:  # there is no package cuda, or another one of that name
        return False
