"""What a model.plan was built for: it is good for that alone, and read only where that is here."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from engines.errors import BadBundle, NoTensorRT, Unreadable
from engines.files import sha256, write_atomically
from engines.nvidia import driver
from engines.nvidia.library import FULL, LIBRARIES, RTX, Module, builds_for_others, capability, here
from engines.store.bundle import ONNX, PLAN, PLAN_RECORD

L4T_RELEASE = Path("/etc/nv_tegra_release")  # "# R36 (release), REVISION: 4.0, GCID: ..."

Precision = Literal["f32", "f16", "int8"]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

# They stand in sentences, so a record that somebody else wrote may not fill a page with them.
_Name = Annotated[str, Field(min_length=1, max_length=64)]
_Device = Annotated[str, Field(max_length=256)]
_Compute = Annotated[str, Field(pattern=r"^([0-9]+\.[0-9]+|SM[0-9]{2,3}(,SM[0-9]{2,3})*)$",
                                max_length=256)]  # fmt: skip

__all__ = ["PLAN_RECORD", "Fingerprint", "Machine", "Precision", "has_tensorrt"]

_STRICT = ConfigDict(extra="forbid", strict=True)
_SPOKEN = {"tensorrt": "TensorRT", "compute": "compute capability", "device": "GPU", "l4t": "L4T"}
_REBUILD = "Build it again on this machine: convtrt.py, or POST /convert with from_onnx."


def has_tensorrt() -> bool:
    """Whether this machine may run plans: the packages are there, and with them a driver where that
    can be told. Whether they work only `Machine.read` knows.
    """
    library = here()
    if not library.installed or not driver.is_installed():
        return False
    return library is FULL or driver.has_driver()  # RTX also builds for others, where is no GPU


def builds_plans() -> bool:
    """Whether this machine may build plans, be it for GPUs of other machines alone."""
    return has_tensorrt() or builds_for_others()


@dataclass(frozen=True)
class Machine:
    """What a plan depends on."""

    tensorrt: _Name  # "10.3.0"
    compute: _Compute  # "8.7", the compute capability; of a plan for others, all that it is for
    device: _Device  # "Orin"
    l4t: _Name | None  # "36.4.0", the release of Jetson Linux; None on other machines
    library: Module = "tensorrt"

    @classmethod
    def read(cls) -> Machine:
        """This machine. Makes no context.

        Raises:
            NoTensorRT: the bindings, a library, the driver or a device is missing.
        """
        library = here()
        library.must_be_installed()
        cuda, trt = driver.load(), library.load()
        try:
            cuda.init()
            device = cuda.Device(0)
            major, minor = device.compute_capability()
            name = device.name()
        except cuda.Error as error:
            raise NoTensorRT(
                f"CUDA finds no GPU to use ({error}): {_NO_GPU[library.module]}"
            ) from None
        return cls(trt.__version__, f"{major}.{minor}", name, _l4t(), library.module)

    @classmethod
    def of_others(cls, capabilities: tuple[str, ...]) -> Machine:
        """Any that has TensorRT for RTX as it is here, and a GPU of one of these capabilities.

        Raises:
            NoTensorRT: TensorRT for RTX is not here.
        """
        version = RTX.load().__version__
        return cls(version, ",".join(capabilities), "", None, RTX.module)

    @property
    def capabilities(self) -> tuple[str, ...]:
        """SM86 for 8.6; several where it stands for other machines."""
        return tuple(capability(one) if "." in one else one for one in self.compute.split(","))

    @property
    def elsewhere(self) -> bool:
        """Whether it stands for machines that are not this one."""
        return not self.device

    @property
    def spoken(self) -> str:
        """The library, and its version."""
        return f"{LIBRARIES[self.library].spoken} {self.tensorrt}"

    @property
    def version(self) -> str:
        """The version of the library; with the library's name where it is not TensorRT itself."""
        return self.tensorrt if self.library == FULL.module else self.spoken

    @property
    def made_for(self) -> str:
        """What its plans need: the library, and the GPU where the library names GPUs."""
        named = LIBRARIES[self.library].names_gpus
        return f"{self.spoken} and {self._gpus}" if named else self.spoken

    @property
    def _gpus(self) -> str:
        all_of = ", ".join(self.capabilities)
        return f"{self.device}, {all_of}" if self.device else f"GPUs of {all_of}"

    def differences(self, here: Machine) -> list[str]:
        """In what another machine differs from this one, for which there is a plan."""
        if self.library != here.library:
            return [f"{self.spoken} (here {here.spoken})"]
        if LIBRARIES[self.library].names_gpus:
            found = []
            if self.tensorrt != here.tensorrt:
                found.append(f"{self.spoken} (here {here.tensorrt})")
            if not set(here.capabilities) <= set(self.capabilities):
                found.append(f"{self._gpus} (here {here._gpus})")
            return found
        return [
            f"{spoken} {built or 'of no Jetson'} (here {other or 'no Jetson'})"
            for name, spoken in _SPOKEN.items()
            if (built := getattr(self, name)) != (other := getattr(here, name))
        ]


_NO_GPU = {
    FULL.module: "on a Jetson the user must be in the groups video and render (sudo usermod -aG"
    " video,render $USER), and a container needs --runtime nvidia.",
    RTX.module: "nvidia-smi must show it, and a container needs --gpus all.",
}


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
    proved: bool = True  # it scored pictures as its graph does; if not, whoever opens it sees to it

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
        text = json.dumps(self._written(), indent=2, ensure_ascii=False)
        write_atomically(folder / PLAN_RECORD, (text + "\n").encode())

    def stale(self, folder: Path, machine: Machine) -> str | None:
        """Why the plan of a folder must not be read on a machine, as a sentence; None: it may."""
        other = self.machine.differences(machine)
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

    def unused(self, folder: Path, why: str) -> str:
        """That a machine without a GPU has no use for the plan, as a sentence."""
        made_for = self.machine.made_for
        return f"{folder / PLAN} is for {made_for}, and not used here: {why} OpenVINO runs {ONNX}."

    def _written(self) -> dict[str, Any]:
        """Without what is as it always was, so that an older Kensa reads it where it can use it."""
        found = asdict(self)
        for names, of in ((fields(Fingerprint), found), (fields(Machine), found["machine"])):
            for one in names:
                if one.default is not MISSING and of[one.name] == one.default:
                    del of[one.name]
        return found
