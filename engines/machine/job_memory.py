"""Whether a job fits into memory, before it begins: the server asks, and the job itself once more.

Only what this machine does is reckoned. What another machine learns, it fits there or not.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from engines.errors import OutOfMemory
from engines.machine.memory import MIB, Free, Gpu, Need, Short, anonymous, free_bytes, total_bytes
from engines.machine.memory_needs import (
    Learning,
    size,
    to_build,
    to_build_for_others,
    to_convert,
    to_distil,
    to_learn,
    unpacked,
)
from engines.meta import Meta
from engines.queue.job_requests import ConvertRequest, RetrainRequest, TeacherRequest, makes
from engines.queue.protocol import WAITING
from engines.store.bundle import ONNX
from engines.store.datasets import Datasets
from engines.store.plan_record import L4T_RELEASE, has_tensorrt
from engines.store.versions import META, Store

JOB_MEMORY = "KENSA_JOB_MEMORY"  # the server's setting, which its worker inherits
JOB_SPARE = "KENSA_JOB_SPARE"  # the same
SPARE_LEAVES = 4096 * MIB  # free, beside a spare process, which has 420 of its own
SPARE_NEEDS = SPARE_LEAVES + 1024 * MIB  # before one is begun, so that it does not come and go
WORKSPACE_MIB = 4096  # of a conversion that does not say; it is clamped
BARE = 250 << 20  # a process that builds a plan without torch
UNKNOWN = 1 << 62  # what the builder itself finds too little of

Request = RetrainRequest | ConvertRequest | TeacherRequest


def free_for_jobs(data: Path, gpu: Gpu | None = None) -> Free:
    """Memory that a job may take, that of a spare process, which it becomes, included.

    Without a look at the GPU, one that is no Jetson's has enough.
    """
    free = Free.now(gpu) if gpu is not None or L4T_RELEASE.exists() else Free(free_bytes(), UNKNOWN)
    return replace(free, host=free.host + _of_the_spare(data))


def room_for_a_spare() -> bool:
    """Whether memory allows that a process waits for the next job."""
    return free_bytes() > SPARE_NEEDS


def must_give_up_a_spare() -> bool:
    """Whether others need its memory."""
    return free_bytes() < SPARE_LEAVES


def _of_the_spare(data: Path) -> int:
    """Bytes that a spare process has; 0 where there is none."""
    try:
        pid = int((data / WAITING).read_text(encoding="ascii"))
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return 0
    return anonymous(pid) if b"workers.jobs" in command else 0


def short_of(data: Path, request: Request, free: Free) -> Short | None:
    """What a job is short of, None when it fits.

    Raises:
        KensaError: what it names is not there or is damaged; the job would fail at once.
    """
    return needs(data, request, free).short_of(free)


def needs(data: Path, request: Request, free: Free) -> Need:
    """What a job takes at its peak."""
    images = Datasets(data / "datasets")
    if isinstance(request, TeacherRequest):
        pictures = images.most_to_learn(request.category, "train")
        return Need(to_distil(pictures, request.image_size, request.model_size))
    store = Store(data / "models")
    version = store.to_start_from(request.model, request.version)
    folder = store.folder(request.model, version) if version else None
    if isinstance(request, ConvertRequest):
        return _to_convert(folder, request, free)
    meta = _meta(folder, request)
    learned = meta.memory_bank or meta.stats
    known = unpacked(folder / learned) if folder and learned and request.update else 0
    train, *test = (
        images.most_to_learn(request.category, split) for split in ("train", "normal", "anomaly")
    )
    what = Learning(meta, train, sum(test), request.batch, known)
    learning = to_learn(what)
    if not request.convert:
        return Need(learning)
    graph = size(folder / ONNX) if folder else 0
    built = to_build(graph, WORKSPACE_MIB, _least(free)) if has_tensorrt() else 0
    return Need(max(learning, to_convert(meta, what.bank)), built)


def refusal(request: Request, found: Short) -> OutOfMemory:
    """The error for a job that does not fit."""
    if isinstance(request, ConvertRequest):
        what, less = "Converting", "take a smaller workspace"
    elif isinstance(request, TeacherRequest):
        what, less = "Making", "take a category of fewer images, or a smaller image_size"
    else:
        what, less = "Retraining", "take fewer images, or a smaller batch, coreset or image_size"
    if never(found):
        wait = "it will never fit here"
    else:
        wait = f"unload a model, or let it wait with {JOB_MEMORY}=wait"
    made = makes(request.model_dump())
    return OutOfMemory(f"{what} {made} needs {found.needed}, and {found.free}: {wait}, or {less}.")


def never(found: Short) -> bool:
    """Whether waiting makes no sense: the machine, or the container, has less in all."""
    return not found.where and found.wanted > total_bytes()


def _to_convert(folder: Path | None, request: ConvertRequest, free: Free) -> Need:
    if folder is None:
        return Need(0)  # the job says that there is nothing to convert
    meta = Meta.read(folder / META)
    bank = unpacked(folder / meta.memory_bank) if meta.memory_bank else 0
    made = BARE if request.from_onnx else to_convert(meta, bank)
    if request.target is not None:  # without the GPU, in the memory of the machine
        return Need(made + to_build_for_others(size(folder / ONNX)))
    built = 0
    if has_tensorrt():
        built = to_build(size(folder / ONNX), request.workspace, _least(free))
    return Need(made, built)


def _least(free: Free) -> int:
    return free.host if free.device is None else free.device


def _meta(folder: Path | None, request: RetrainRequest) -> Meta:
    if folder is None:
        return request.first_meta()
    return request.meta_after(Meta.read(folder / META))
