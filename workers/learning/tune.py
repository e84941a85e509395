"""Search for hyper-parameters with Optuna (arXiv:1907.10902): trial after trial, each a training.

The search is kept in a database in `out_dir`, so a process that is stopped or killed loses no more
than the trial it is in.
"""

from __future__ import annotations

import shlex
import shutil
import time
from dataclasses import replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from engines.errors import BadDataset, BadMeta, BadRequest, KensaError
from engines.files import printable
from engines.image import DEFAULT_LIMITS
from engines.meta import Meta
from workers.learning.dataset import Category
from workers.learning.retrain import Retrain, retrain
from workers.learning.search_space import Space, Tune
from workers.learning.study import (
    BEST,
    STUDY,
    TRIALS,
    Found,
    as_cell,
    clear_interrupted,
    ended_trials,
    keep_results,
    open_study,
    why_incomplete,
)
from workers.models.origin import said
from workers.progress import Progress

SEED = 0
RANDOM_TRIALS = 5  # until the sampler has something to learn from
FEW = 5  # images of a kind, below which the AUROC moves in steps too coarse to choose by
# Keys of meta.json that a training found; they would be false beside other hyper-parameters.
FOUND_IN_TRAINING = ("image_threshold_auto", "raw_image_min", "raw_image_max", "score_kind",
                     "calibration", "files", "regions")  # fmt: skip


def tune(request: Tune, progress: Progress) -> Found:
    """Try hyper-parameters until `trials` have ended; keep the best as meta.json in `out_dir`.

    The best has the highest AUROC of the images under test/; of equal ones that with the best F1,
    then the smallest model, then the earlier trial. The first trial is the start itself.

    Raises:
        KensaError: the flags, the files or the images do not allow it, or `out_dir` holds another
            search. Also when the start cannot be trained; other trials are recorded as pruned.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    began = time.monotonic()
    start = _start(request)
    category = Category.find(request.data_root, request.category)
    if not category.test_anomaly:
        raise BadDataset(
            f"{request.data_root / 'test' / request.category / 'anomaly'} holds no images: a search"
            " needs defective ones, to tell better hyper-parameters from worse."
        )
    space = Space.of(request, start, len(category.train))
    with open_study(request, space, category) as study:
        clear_interrupted(study)
        found = keep_results(study, space, request)
        to_do = range(len(ended_trials(study)), request.trials)
        if not to_do:
            return found
        tick = progress.phase("trials")
        tick(to_do.start, request.trials)
        try:
            for done in to_do:
                if request.timeout is not None and time.monotonic() - began >= request.timeout:
                    progress.say(f"--timeout: no trial begins after {request.timeout:g} s")
                    break
                progress.say(_trial_line(_one_trial(study, space, request, progress)))
                found = keep_results(study, space, request)
                tick(done + 1, request.trials)
        except KeyboardInterrupt:
            return replace(keep_results(study, space, request), stopped=True)
        return found


def _start(request: Tune) -> Meta:
    start = Meta.read(request.meta_json)
    if start.model != request.model:
        raise BadMeta(
            f"{request.meta_json} describes a {start.model} model, but --model says"
            f" {request.model}."
        )
    best = request.out_dir / BEST
    if request.meta_json.resolve() == best.resolve():
        raise BadRequest(
            f"{best} is where the search writes its best: name the file that it began with, or"
            " another --out_dir."
        )
    if best.exists() and not (request.out_dir / STUDY).exists():
        raise BadRequest(f"{request.out_dir} holds another {BEST}: choose another --out_dir.")
    return start.with_(**dict.fromkeys(FOUND_IN_TRAINING))


# ---- one trial -------------------------------------------------------------------------------


def _one_trial(study: optuna.Study, space: Space, request: Tune, progress: Progress) -> FrozenTrial:
    """One trial, ended.

    What it draws depends on nothing but the trials that have ended before: an interrupted search
    goes on as if it had never been interrupted.
    """
    ended = len(ended_trials(study))
    study.sampler = optuna.samplers.TPESampler(seed=SEED + ended, n_startup_trials=RANDOM_TRIALS)
    if not ended and not study.get_trials(states=(TrialState.WAITING,)):
        study.enqueue_trial(space.first())
    trial = study.ask()
    values = space.draw(trial)
    trial.set_user_attr("values", values)
    began = time.perf_counter()
    try:
        report = _train(values, space, request)
    except KensaError as error:
        trial.set_user_attr("reason", printable(str(error)))
        if not ended:  # the start itself: what is wrong with it is wrong with all
            study.tell(trial, state=TrialState.FAIL)
            raise
        return study.tell(trial, state=TrialState.PRUNED)
    except KeyboardInterrupt:
        trial.set_user_attr("reason", "stopped")
        study.tell(trial, state=TrialState.FAIL)
        raise
    if values.get("backbone") not in _trained(study):
        progress.say(said(values.get("backbone") or request.model, report.get("weights")))
    for path, why in report["images"]["skipped"].items():
        if not ended:
            progress.say(f"skipped {path}: {why}")
    found = report["calibration"]
    for key, value in (("f1", "best_f1"), ("normals", "normals"), ("defects", "defects")):
        trial.set_user_attr(key, found[value])
    trial.set_user_attr("mib", report["mib"])
    trial.set_user_attr("seconds", round(time.perf_counter() - began, 1))
    return study.tell(trial, report["calibration"]["auroc"])


def _trained(study: optuna.Study) -> set[str | None]:
    """The backbones of the trials that are complete; that of all is None where kinds have none."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return {trial.user_attrs["values"].get("backbone") for trial in complete}


def _train(values: dict[str, Any], space: Space, request: Tune) -> dict[str, Any]:
    """Train once, quietly, in a folder that is removed: the report, and MiB of the model's files.

    Raises:
        KensaError: these values cannot be trained, or no defective image can be read.
    """
    folder = request.out_dir / ".trial"
    shutil.rmtree(folder, ignore_errors=True)  # of a killed process
    try:
        meta = space.start.with_(**values)
        folder.mkdir()
        meta.write(folder / BEST)
        training = Retrain(
            model=request.model,
            category=request.category,
            data_root=request.data_root,
            out_dir=folder / "model",
            meta_json=folder / BEST,
            pretrained_pth=space.weights[meta.backbone],
            epochs=request.epochs,
            batch=request.batch,
            penalty_dir=request.penalty_dir,
            regions=request.never,
            limits=request.limits,
        )
        report = retrain(training, Progress(quiet=True))
        names = {meta.weights_pth, meta.memory_bank, meta.stats} - {None}
        size = sum((training.out_dir / str(name)).stat().st_size for name in names)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if "auroc" not in report["calibration"]:
        raise BadDataset("None of the defective test images can be read.")
    return {**report, "mib": round(size / 2**20, 1)}


# ---- for a person ----------------------------------------------------------------------------


def _trial_line(trial: FrozenTrial) -> str:
    return f"trial {trial.number}: {_measured(trial)}; {_drawn(trial)}"


def _measured(trial: FrozenTrial) -> str:
    about = trial.user_attrs
    if trial.value is None:
        return f"not trained ({why_incomplete(trial)})"
    return (
        f"AUROC {trial.value:.4f}, best F1 {about['f1']:.4f}, {about['mib']} MiB,"
        f" {about['seconds']} s"
    )


def _drawn(trial: FrozenTrial) -> str:
    values = trial.user_attrs["values"].items()
    return ", ".join(f"{key} {as_cell(value)}" for key, value in values)


def summarise_search(request: Tune, found: Found) -> list[str]:
    """What was tried, what is best, how far that is to be believed, and what to do next."""
    states = [trial.state for trial in found.trials]
    complete, pruned = states.count(TrialState.COMPLETE), states.count(TrialState.PRUNED)
    not_trained = f", {pruned} of them could not be trained: see {TRIALS}" if pruned else ""
    tried = f"{complete + pruned} trials of {request.trials}{not_trained}"
    ending = ["stopped      what was tried is kept; the same command goes on"] * found.stopped
    if found.best is None or found.first is None:
        return ["", f"tried        {tried}", *ending]
    about = found.best.user_attrs
    few = min(about["normals"], about["defects"]) < FEW
    return [
        "",
        f"tried        {tried}",
        f"start        {_measured(found.first)}",
        f"best         {_measured(found.best)} (trial {found.best.number})",
        f"             {_drawn(found.best)}",
        f"measured on  {about['normals']} normal and {about['defects']} defective images",
        "             they chose these values, so this AUROC is optimistic: measure the model on"
        " others",
        *[f"             fewer than {FEW} of a kind: the best may be so by chance"] * few,
        f"written to   {request.out_dir}",
        *ending,
        f"next         {shlex.join(_next_command(request, found))}",
    ]


def _next_command(request: Tune, found: Found) -> list[str]:
    flags = {
        "model": request.model,
        "pretrained_pth": found.pretrained_pth,
        "meta_json": request.out_dir / BEST,
        "category": request.category,
        "data_root": request.data_root,
        "epochs": request.epochs,
        "batch": request.batch,
        "penalty_dir": request.penalty_dir,
        "regions": request.never,
        "out_dir": request.out_dir / "model",
        "max_image_bytes": _unusual(request.limits.max_bytes, DEFAULT_LIMITS.max_bytes),
        "max_image_pixels": _unusual(request.limits.max_pixels, DEFAULT_LIMITS.max_pixels),
    }
    words = [str(w) for k, v in flags.items() if v is not None for w in (f"--{k}", v)]
    return ["python3", "retrain.py", *words]


def _unusual(value: int, usual: int) -> int | None:
    return None if value == usual else value
