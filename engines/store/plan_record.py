"""What a model.plan was built for: it is good for that alone, and read only where that is here."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from engines.errors import BadBundle, NoTensorRT, Unreadable
from engines.files import sha256, write_atomically
from engines.store.bundle import ONNX, PLAN, PLAN_RECORD

L4T_RELEASE = Path("/etc/nv_tegra_release")  # "# R36 (release), REVISION: 4.0, GCID: ..."

Precision = Literal["f32", "f16", "int8"]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

__all__ = ["PLAN_RECORD", "Fingerprint", "Machine", "Precision", "has_tensorrt"]

_STRICT = ConfigDict(extra="forbid", strict=True)
_SPOKEN = {"tensorrt": "TensorRT", "compute": "compute capability", "device": "GPU", "l4t": "L4T"}
_REBUILD = "Build it again on this machine: convtrt.py, or POST /convert with from_onnx."


def has_tensorrt() -> bool:
    """Whether the packages are there; whether they work only `Machine.read` knows."""
    return find_spec("tensorrt") is not None and find_spec("pycuda") is not None


@dataclass(frozen=True)
class Machine:
    """What a plan depends on."""

    tensorrt: str  # "10.3.0"
    compute: str  # "8.7", the compute capability
    device: str  # "Orin"
    l4t: str | None  # "36.4.0", the release of Jetson Linux; None on other machines

    @classmethod
    def read(cls) -> Machine:
        """This machine. Makes no context.

        Raises:
            NoTensorRT: the bindings, a library, the driver or a device is missing.
        """
        trt, cuda = _import_tensorrt(), _import_pycuda()
        try:
            cuda.init()
            device = cuda.Device(0)
            major, minor = device.compute_capability()
            name = device.name()
        except cuda.Error as error:
            raise NoTensorRT(
                f"CUDA finds no GPU to use ({error}): on a Jetson the user must be in the groups"
                " video and render (sudo usermod -aG video,render $USER), and a container needs"
                " --runtime nvidia."
            ) from None
        return cls(trt.__version__, f"{major}.{minor}", name, _l4t())


def _import_tensorrt() -> Any:
    try:
        import tensorrt as trt
    except ModuleNotFoundError:
        raise NoTensorRT(
            "TensorRT's Python bindings are not in this environment: on a Jetson, sudo apt install"
            " python3-libnvinfer, and make the environment with"
            " python3 -m venv --system-site-packages, so that it sees them."
        ) from None
    except ImportError as error:
        raise NoTensorRT(
            f"TensorRT's Python bindings are here, but not a library that they need ({error}): a"
            " container must be started with --runtime nvidia, from an image that has TensorRT"
            " inside; outside of one, sudo apt install tensorrt."
        ) from None
    return trt


def _import_pycuda() -> Any:
    try:
        import pycuda.driver as cuda
    except ModuleNotFoundError:
        raise NoTensorRT(
            "pycuda is not in this environment: pip install 'kensa[jetson]' (it is compiled with"
            " nvcc, which must be on the PATH: /usr/local/cuda/bin)."
        ) from None
    except ImportError as error:
        raise NoTensorRT(
            f"The CUDA driver is not to be found ({error}): a container must be started with"
            " --runtime nvidia; outside of one, install the driver (a Jetson comes with it)."
        ) from None
    return cuda


def _l4t(release: Path | None = None) -> str | None:
    try:
        words = (release or L4T_RELEASE).read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return None
    major = next((word[1:] for word in words if word[:1] == "R" and word[1:].isdecimal()), None)
    if major is None or "REVISION:" not in words[:-1]:
        return None
    minor = words[words.index("REVISION:") + 1].rstrip(",")
    return f"{major}.{minor}"


@checked(frozen=True, config=_STRICT)
class Fingerprint:
    """model.plan.json: what the plan beside it was built for, and of."""

    machine: Machine
    onnx: Hash  # SHA-256 of the model.onnx
    plan: Hash  # SHA-256 of model.plan: compared before it is read, because a plan is executable
    precision: Precision
    max_batch: Annotated[int, Field(ge=1)]
    bank_rows: Annotated[int, Field(ge=1)] | None  # the largest memory bank; None without one
    refittable: bool
    device_bytes: Annotated[int, Field(ge=0)]  # weights and one context, without the bank

    @classmethod
    def read(cls, folder: Path) -> Fingerprint | None:
        """The record of a folder, None where there is none.

        Raises:
            BadBundle: it is damaged.
        """
        path = folder / PLAN_RECORD
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            Unreadable.check(path, error)
            what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise BadBundle(
                f"{path} is damaged ({what}), so nobody knows what model.plan was built for."
                f" {_REBUILD}"
            ) from None

    def write(self, folder: Path) -> None:
        """Write it in whole or not at all."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        write_atomically(folder / PLAN_RECORD, (text + "\n").encode())

    def stale(self, folder: Path, machine: Machine) -> str | None:
        """Why the plan of a folder must not be read on a machine, as a sentence; None: it may."""
        other = [
            f"{_SPOKEN[field.name]} {built or 'of no Jetson'} (here {here or 'no Jetson'})"
            for field in fields(Machine)
            if (built := getattr(self.machine, field.name))
            != (here := getattr(machine, field.name))
        ]
        if other:
            return f"{folder / PLAN} was built for {', '.join(other)}. {_REBUILD}"
        for name, expected in ((PLAN, self.plan), (ONNX, self.onnx)):
            path = folder / name
            if not path.is_file():
                return f"{path} does not exist, but {PLAN_RECORD} beside it names it. {_REBUILD}"
            if sha256(path) != expected:
                what = "is not the file that was built" if name == PLAN else "has changed since"
                return f"{path} {what} (its SHA-256 differs from {PLAN_RECORD}'s). {_REBUILD}"
        return None
