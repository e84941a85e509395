"""One job in a process of its own: learn, convert, publish. Started by `workers.jobs`."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import time
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engines.errors import BadBundle, BadWeights, KensaError, NoWorker, UnknownVersion
from engines.files import print_anything, printable, sync_folder
from engines.image import ImageLimits
from engines.logs import FORMAT, set_up
from engines.machine import job_memory
from engines.meta import Meta
from engines.nvidia.library import builds_for_others, target_of
from engines.queue.fleet import Fleet
from engines.queue.job_folder import JobFolder
from engines.queue.job_requests import (
    ConvertRequest,
    RetrainRequest,
    TeacherRequest,
    weights_in,
)
from engines.queue.protocol import RUNNING, job_of, training_of
from engines.store.bundle import ONNX, PLAN, read_report, read_strange
from engines.store.plan_record import has_tensorrt
from engines.store.shared import Shared
from engines.store.versions import META, Store
from workers.commands import hush_libraries
from workers.jobs.exchange import checked, patiently
from workers.jobs.parent_and_child import DISK_FULL, FULL, die_with_parent, give_way
from workers.jobs.spare import SPARE, until_there_is_a_job
from workers.progress import Progress, Tick

WRITE_EVERY_S = 0.25
MOST_NAMES, MOST_OF_A_NAME = 20, 100  # of strange pictures in a job's answer; characters
MOST_NOTES, MOST_OF_A_NOTE = 10, 1000  # on the pictures; characters
MEMORY_EVERY_S = 1.0  # a job that waits for memory looks again
TIMING = "timing"  # in the data folder: what TensorRT measured of its kernels here
# What share of a job its phases are: where each begins and ends.
SPANS = {
    "fetch": (0.0, 0.02), "images": (0.02, 0.3), "coreset": (0.3, 0.5), "epochs": (0.05, 0.6),
    "leave out": (0.5, 0.6), "verify": (0.6, 0.65), "drawn defects": (0.65, 0.7),
    "convert": (0.7, 0.75), "ranges": (0.75, 0.78), "build": (0.78, 0.95),
    "publish": (0.95, 1.0),
}  # fmt: skip
SPANS_OF = {
    "convert": {**SPANS, "convert": (0.0, 0.1), "ranges": (0.1, 0.15), "build": (0.15, 0.95)},
    "teacher": {"images": (0.0, 0.05), "distil": (0.05, 1.0)},
}
# Flags of the commands that raise an error, and the key that a job has for them.
KEYS = {"--pretrained_pth": "pretrained", "--weights": "pretrained"}


def main(data: Path, *job: str) -> int:
    """Do the job on stdin, and leave result.json.

    Args:
        job: its id and kind; or SPARE, where both come on stdin, before it, once there is one.
    """
    die_with_parent()
    give_way()
    print_anything()
    hush_libraries()
    set_up("warning", os.environ.get(FORMAT, "text"), "job")
    if job == (SPARE,):
        job_id, kind, request = json.loads(until_there_is_a_job(data))
    else:
        (job_id, kind), request = job, json.loads(sys.stdin.read())
    return begun(data, job_id, kind, request)


def begun(data: Path, job_id: str, kind: str, request: dict[str, Any]) -> int:
    """Do a job, and leave result.json."""
    folder = JobFolder(data, job_id)
    progress = JobProgress(folder, SPANS_OF.get(kind, SPANS))
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        (data / RUNNING).write_text(str(os.getpid()), encoding="ascii")
        ended = do(data, job_id, kind, request, progress)
    except OSError as error:
        ended = _failed_on_disk(folder, error)
    except KensaError as error:
        ended = {"state": "failed", "code": error.code, "error": _with_keys(str(error))}
    except MemoryError:
        ended = {"state": "failed", "code": "out_of_memory", "error": "Memory was short."}
    except Exception:  # noqa: BLE001 (whatever it was, the job must end and say so)
        progress.say(traceback.format_exc())
        sentence = "The job failed in a way nobody foresaw; its log says how."
        ended = {"state": "failed", "code": "internal_error", "error": sentence}
    if "error" in ended:
        ended["error"] = printable(ended["error"])  # it may name a file whose name is not UTF-8
    folder.clean()
    try:
        progress.end(ended)
        folder.write_result(ended)
    except OSError as error:
        return DISK_FULL if error.errno == errno.ENOSPC else 1
    return 0


def do(
    data: Path, job_id: str, kind: str, request: dict[str, Any], progress: JobProgress
) -> dict[str, Any]:
    """Retrain or convert, and publish; or make a teacher.

    A job that was killed after publishing does not do it twice.

    Raises:
        KensaError: what the request names is not there or does not fit.
    """
    store = Store(data / "models")
    folder = JobFolder(data, job_id)
    folder.work.mkdir(parents=True, exist_ok=True)
    if not request.get("from_onnx") and find_spec("torch") is None:
        raise NoWorker(
            "Nothing can be learned or converted on this machine: pip install 'kensa[train]'. What"
            " can be done without is to build a plan again, with from_onnx."
        )
    if kind == "train":
        return _train_for_another(data, job_id, request, progress)
    if kind == "teacher":
        return _make_teacher(data, TeacherRequest(**request), folder.work, progress)
    if (version := store.made_by(request["model"], job_id)) is not None:
        return _succeeded(store, kind, request, version)
    if kind == "retrain":
        wait_for_memory(data, RetrainRequest(**request), progress)
    elif kind == "convert":
        wait_for_memory(data, ConvertRequest(**request), progress)
    if kind == "finish":
        made = _finish(store, data, job_id, request, progress)
        request = {**request["retrain"], "version": request["parent"]}
    elif kind == "retrain":
        made = _retrain(store, data, RetrainRequest(**request), folder.work, progress)
    else:
        made = _convert(store, data, ConvertRequest(**request), folder.work, progress)
    progress.phase("publish")
    origin = {
        "job": job_id,
        "kind": "convert" if kind == "convert" else "retrain",
        "activate": bool(request.get("activate", True)) and (made / ONNX).is_file(),
        "max_flips": request.get("max_flips"),
        "category": request.get("category"),
        "parent": request.get("version") or store.to_start_from(request["model"]),
    }
    version = store.publish(request["model"], made, origin)
    progress.say(f"published as {version}")
    return _succeeded(store, kind, request, version)


def _with_keys(sentence: str) -> str:
    """An error in one line, in words of who asked over HTTP."""
    for flag, key in KEYS.items():
        sentence = re.sub(rf"{flag}\b", key, sentence)
    return " ".join(sentence.split())


def _succeeded(store: Store, kind: str, request: dict[str, Any], version: str) -> dict[str, Any]:
    """What a job ends with: the version, and what became of the images that it learned from."""
    ended = {"state": "succeeded", "version": version}
    if kind == "convert":
        return ended
    name = request["model"]
    folder = store.folder(name, version)
    report = read_report(folder)
    found, notes = report.get("images"), report.get("notes")
    if not isinstance(found, dict):
        return ended
    shown = read_strange(folder, Meta.read(folder / META)) is not None
    see = f" See them at /models/{name}/versions/{version}/strange." if shown else ""
    return {**ended, "images": _told(found, see, notes if isinstance(notes, list) else [])}


def _told(images: dict[str, Any], see: str, notes: list[Any]) -> dict[str, Any]:
    """Of report.json's `images` what a job says: numbers, and a few names of bounded length."""
    strange = images.get("strange", [])
    names = [Path(name).name[:MOST_OF_A_NAME] for name in strange[:MOST_NAMES]]
    note = (
        f"Not learned, because they are unlike the others and unlike what is known:"
        f" {', '.join(names)}{' and others' if len(names) < len(strange) else ''}.{see} If these"
        " parts are good, learn them with keep_strange; else delete the pictures."
    )
    return {
        "learned": images.get("learned", 0),
        "known": images.get("known", 0),
        "strange": len(strange),
        "skipped": len(images.get("skipped", {})),
        "names": names,
        "note": note if names else None,
        "notes": [str(one)[:MOST_OF_A_NOTE] for one in notes[:MOST_NOTES]],
    }


def wait_for_memory(data: Path, request: job_memory.Request, progress: JobProgress) -> None:
    """Go on once the job fits into memory, as the setting says; nothing large is loaded yet.

    Raises:
        OutOfMemory: it does not, and may not wait, or would wait for ever.
    """
    how = os.environ.get(job_memory.JOB_MEMORY, "refuse")
    said = ""
    while how != "off":
        found = job_memory.short_of(data, request, job_memory.free_for_jobs(data))
        if found is None:
            break
        if how == "refuse" or job_memory.never(found):
            raise job_memory.refusal(request, found)
        sentence = f"waiting for memory: needs {found.needed}, {found.free}"
        if not said:
            progress.say(sentence)
        if sentence != said:
            progress.phase(sentence)
        said = sentence
        time.sleep(MEMORY_EVERY_S)
    if said:
        progress.say("there is memory enough now")


def _retrain(
    store: Store, data: Path, request: RetrainRequest, work: Path, progress: JobProgress
) -> Path:
    parent = request.start(store)
    source = None if parent is None else store.check(request.model, parent)
    weights = weights_in(data, request.pretrained)
    limits = ImageLimits.read(os.environ)
    trained = _learn(request, parent, source, data / "datasets", weights, work, progress, limits)
    if not request.convert:
        return trained
    how = _as_before(data, source, request.category)
    return _engine(trained, work / "engine", progress, before=source, **how)


def _learn(
    request: RetrainRequest,
    parent: str | None,
    source: Path | None,
    datasets: Path,
    weights: str | Path | None,
    work: Path,
    progress: JobProgress,
    limits: ImageLimits,
) -> Path:
    """Learn on top of the version in `source`, or from nothing; the folder of what was made."""
    from workers.commands import summarise_training
    from workers.learning.retrain import Retrain, retrain

    meta_json, learned = work / META, None
    if source is None:
        meta = request.first_meta()
        bit_depth = meta.bit_depth
    else:
        before = Meta.read(source / META)
        meta = request.meta_after(before)
        bit_depth, meta = meta.bit_depth, meta.with_(bit_depth=before.bit_depth)
        weights = weights or source / meta.weights_pth
        if weights != "untrained" and not Path(weights).is_file():
            raise BadWeights(
                f"{request.model} {parent} has no {meta.weights_pth}, so nothing can be learned on"
                " top of it: take it in with its weights, or say which with pretrained."
            )
        known = meta.memory_bank or meta.stats
        if request.update and known is not None and (source / known).is_file():
            learned = source / known
    if source is not None and meta.regions is not None:
        shutil.copyfile(source / meta.regions, work / meta.regions)
    meta.with_(files=None).write(meta_json)
    report = retrain(
        Retrain(
            meta.model,
            request.category,
            datasets,
            work / "trained",
            meta_json,
            None if weights is None else str(weights),
            load_bank=learned if meta.memory_bank else None,
            load_stats=learned if meta.stats else None,
            epochs=request.epochs,
            batch=request.batch,
            false_rejects=request.false_rejects,
            false_rejects_cap=request.false_rejects_cap,
            keep_strange=request.keep_strange,
            bit_depth=bit_depth,
            limits=limits,
        ),
        progress,
    )
    for line in summarise_training(report, work / "trained")[1:-1]:
        progress.say(line)
    return work / "trained"


def _train_for_another(
    data: Path, training_id: str, wanted: dict[str, Any], progress: JobProgress
) -> dict[str, Any]:
    """Learn what the queue of several machines asks for, and leave it for the one that asked."""
    fleet = Fleet.read(os.environ)
    assert fleet is not None
    shared = Shared.open(fleet.shared_url)
    folder, (device, model) = JobFolder(data, training_id), checked(wanted)
    request = RetrainRequest(**wanted["retrain"])
    ticked = progress.phase("fetch")
    source: Path | None
    if device == fleet.device:  # everything is here
        source = data
        start = None
        if wanted["parent"] is not None:
            start = Store(data / "models").check(model, wanted["parent"])
    else:
        source = data / "inputs" / device / model
        source.parent.mkdir(parents=True, exist_ok=True)
        patiently(lambda: shared.pull(f"{device}/inputs", wanted["inputs"], source, ticked), folder)
        start = None if wanted["parent"] is None else source / "start"
    weights = weights_in(source, request.pretrained)
    limits = ImageLimits.read(wanted.get("limits") or os.environ)
    datasets = source / "datasets"
    trained = _learn(
        request, wanted["parent"], start, datasets, weights, folder.work, progress, limits
    )
    if device == fleet.device:
        shutil.rmtree(folder.root / "trained", ignore_errors=True)
        trained.rename(folder.root / "trained")
        return {"state": "succeeded", "trained": None}
    files = {path.name: path for path in trained.iterdir()}
    place = f"{device}/results/{job_of(training_id)}"
    return {"state": "succeeded", "trained": patiently(lambda: shared.push(place, files), folder)}


def _finish(
    store: Store, data: Path, job_id: str, learned: dict[str, Any], progress: JobProgress
) -> Path:
    """What another machine learned, or a training of this one, made ready to be published."""
    fleet = Fleet.read(os.environ)
    assert fleet is not None
    folder = JobFolder(data, job_id)
    if learned["trained"] is None:
        trained = JobFolder(data, training_of(job_id)).root / "trained"
        if not trained.is_dir():
            raise BadBundle(f"{trained} is gone, so what was learned is lost. Send the job again.")
    else:
        trained = folder.work / "trained"
        place = f"{fleet.device}/results/{job_id}"
        shared = Shared.open(fleet.shared_url)
        patiently(lambda: shared.pull(place, learned["trained"], trained), folder)
    if learned["retrain"].get("convert", True):
        source = None
        if learned["parent"] is not None:
            source = store.folder(learned["retrain"]["model"], learned["parent"])
        how = _as_before(data, source, learned["retrain"]["category"])
        return _engine(trained, folder.work / "engine", progress, before=source, **how)
    made = folder.work / "made"
    shutil.copytree(trained, made)
    return made


def _convert(
    store: Store, data: Path, request: ConvertRequest, work: Path, progress: JobProgress
) -> Path:
    version = store.to_start_from(request.model, request.version)
    if version is None:
        raise UnknownVersion(
            f"{request.model} has no version to convert that was not held or rolled back from:"
            " name one."
        )
    source = store.check(request.model, version)
    how = {"workspace": request.workspace, "use_dla": request.use_dla, "cache": data / TIMING}
    how |= {"target": request.target}
    if request.from_onnx:
        return _rebuild(source, work / "engine", progress, **how)
    meta = Meta.read(source / META)
    if not (source / meta.weights_pth).is_file():
        raise BadBundle(f"{request.model} {version} has no {meta.weights_pth} to convert.")
    if request.category is not None:
        how |= {"data_root": data / "datasets", "category": request.category}
    return _engine(
        source, work / "engine", progress,
        before=source if (source / PLAN).is_file() else _live(store, request.model),
        opset=request.opset, fp16=request.fp16, int8=request.int8, **how,
    )  # fmt: skip


def _make_teacher(
    data: Path, request: TeacherRequest, work: Path, progress: JobProgress
) -> dict[str, Any]:
    """It is in `weights` in whole or not at all: moved there when it is done."""
    wait_for_memory(data, request, progress)
    from workers.distil.teacher import Distil, distil
    from workers.learning.dataset import Category

    made, kept = work / request.teacher, data / "weights" / request.teacher
    what = Distil(
        Category.find(data / "datasets", request.category).train,
        made,
        weights=weights_in(data, request.pretrained),
        limits=ImageLimits.read(os.environ),
        **request.model_dump(include={"model_size", "image_size", "steps"}),
    )
    distil(what, progress)
    kept.parent.mkdir(exist_ok=True)
    made.replace(kept)
    sync_folder(kept.parent)
    progress.say(f"written to weights/{request.teacher}: name it as pretrained of POST /retrain")
    return {"state": "succeeded"}


def _rebuild(source: Path, out_dir: Path, progress: JobProgress, **how: Any) -> Path:
    """Without torch: this may be a machine that only serves."""
    from workers.commands import summarise_plan
    from workers.converting.plan.rebuild import rebuild

    progress.phase("convert")
    report = rebuild(source, out_dir, progress, **how)
    for line in summarise_plan(report["plan"]):
        progress.say(line)
    return out_dir


def _engine(source: Path, out_dir: Path, progress: JobProgress, **how: Any) -> Path:
    from workers.commands import summarise_conversion
    from workers.converting.convert import Convert, convert

    progress.phase("convert")
    meta = Meta.read(source / META)
    how["limits"] = ImageLimits.read(os.environ)
    request = Convert(meta.model, source / meta.weights_pth, source / META, out_dir, **how)
    for line in summarise_conversion(convert(request, progress), out_dir)[1:-1]:
        progress.say(line)
    return out_dir


def _as_before(data: Path, source: Path | None, category: str) -> dict[str, Any]:
    """How the version was converted that a retraining starts from: so is the next one."""
    report = {} if source is None else read_report(source)
    export, plan = report.get("export", {}), report.get("plan", {})
    how: dict[str, Any] = {"cache": data / TIMING}
    if "opset" in export:
        how["opset"] = export["opset"]
    how["fp16"] = export.get("precision") == "f16"
    if export.get("precision") == "int8":
        how |= {"int8": True, "data_root": data / "datasets", "category": category}
    if plan:
        for flag, key in (("workspace", "workspace_mib"), ("use_dla", "dla")):
            if key in plan:
                how[flag] = plan[key]
        if not has_tensorrt() and builds_for_others():  # which serves nobody with it
            how["target"] = target_of(plan.get("gpus"))
    return how


def _live(store: Store, name: str) -> Path | None:
    live = next(iter(store.candidates(name)), None)
    return store.folder(name, live) if live else None


def _failed_on_disk(folder: JobFolder, error: OSError) -> dict[str, Any]:
    folder.clean()  # which makes room to write down why
    if error.errno == errno.ENOSPC:
        return {"state": "failed", "code": "disk_full", "error": FULL}
    where = f": {error.filename}" if error.filename else ""
    return {"state": "failed", "code": "os_error", "error": f"{error.strerror or error}{where}."}


class JobProgress(Progress):
    """Progress that the server reads: one fraction for the whole job, and a log."""

    def __init__(self, folder: JobFolder, spans: dict[str, tuple[float, float]]) -> None:
        super().__init__(folder.log, quiet=True)
        self._spans = spans
        self._folder = folder
        self._began = time.monotonic()
        self._fraction = 0.0
        self._written = -WRITE_EVERY_S

    def phase(self, name: str) -> Tick:
        ticked = super().phase(name)
        begin, end = self._spans.get(name, (self._fraction, self._fraction))
        self._write(name, begin, 0, 0, at_once=True)

        def tick(done: int, total: int) -> None:
            ticked(done, total)
            fraction = begin + (end - begin) * done / max(total, 1)
            self._write(name, fraction, done, total, at_once=done >= total)

        return tick

    def end(self, ended: dict[str, Any]) -> None:
        if ended.get("error"):
            self.say(f"error: {ended['error']}")
        is_part = "trained" in ended  # of a job that goes on elsewhere
        fraction = 1.0 if ended["state"] == "succeeded" and not is_part else self._fraction
        phase = "trained" if is_part else ended["state"]
        self._write(phase, fraction, 0, 0, at_once=True)

    def _write(self, phase: str, fraction: float, done: int, total: int, *, at_once: bool) -> None:
        now = time.monotonic()
        self._fraction = max(self._fraction, fraction)
        if not at_once and now - self._written < WRITE_EVERY_S:
            return
        self._written = now
        left = None
        if self._fraction > 0.05:
            left = round((now - self._began) * (1 - self._fraction) / self._fraction, 1)
        self._folder.write_progress(
            {
                "phase": phase,
                "done": done,
                "total": total,
                "fraction": round(self._fraction, 4),
                "seconds_left": left,
                "pid": os.getpid(),
            }
        )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
