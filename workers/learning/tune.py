"""Search for hyper-parameters with Optuna (arXiv:1907.10902): trial after trial, each a training.

The search is kept in a database in `out_dir`, so a process that is stopped or killed loses no more
than the trial it is in. A trial is ended when it is complete, or pruned: its values cannot be
trained. One that was interrupted is `fail`, and the same values are tried again.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import math
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from engines.errors import BadDataset, BadMeta, BadRequest, BadWeights, KensaError
from engines.files import sha256, write_atomically
from engines.meta import Meta
from workers import models
from workers.learning.dataset import Category
from workers.learning.retrain import Retrain, retrain
from workers.progress import Progress

UNTRAINED = "untrained"  # as in workers.models.backbone, which takes seconds to load
SEED = 0
RANDOM_TRIALS = 5  # until the sampler has something to learn from
FEW = 5  # images of a kind, below which the AUROC moves in steps too coarse to choose by
MOST_KILLS = 2  # of a process in the same trial
KILLED_AGAIN = f"killed {MOST_KILLS} times: it may be too large for the memory"

CORESET_RATIO = (0.01, 0.25)
MOST_ROWS = 10_000  # of a bank, but the start's own: more take minutes to choose, and serve slowly
FEWEST_FEATURES = 16
LATENT_DIMS = (16, 32, 64, 128, 256)
MODEL_SIZES = ("small", "medium")
LEARNING_RATE_FACTOR = 10.0  # up and down from the kind's own
STRIDES = range(4, 17)  # pixels between the features of a stage; others are too fine or too coarse
MOST_STAGES = 3  # of a backbone; of a transformer, whose blocks all have one stride, a few

WITH_BACKBONE = ("patchcore", "padim")
HYPER_PARAMETERS = {
    "patchcore": ("backbone", "layers", "coreset_ratio", "image_size"),
    "padim": ("backbone", "layers", "n_features", "image_size"),
    "efficientad": ("model_size", "learning_rate", "image_size"),
    "vae": ("latent_dim", "learning_rate", "image_size"),
}
# Keys of meta.json that a training found; they would be false beside other hyper-parameters.
FOUND_IN_TRAINING = ("image_threshold_auto", "raw_image_min", "raw_image_max", "score_kind",
                     "calibration", "files")  # fmt: skip

STUDY, TRIALS, BEST = "study.db", "trials.csv", "meta.json"


@dataclass(frozen=True)
class Tune:
    """What to search: the flags of tune.py."""

    model: str
    meta_json: Path
    category: str
    data_root: Path
    out_dir: Path
    trials: int = 20
    pretrained_pth: str | None = None
    backbones: list[str] = field(default_factory=list)  # "name" or "name=weights"
    image_sizes: list[int] = field(default_factory=list)  # pixels
    epochs: int = 1
    batch: int = 4
    timeout: float | None = None  # seconds
    penalty_dir: Path | None = None


@dataclass(frozen=True)
class Found:
    """What a search has found so far. `best` is None when no trial could be trained."""

    trials: list[FrozenTrial]
    first: FrozenTrial | None  # the start
    best: FrozenTrial | None
    pretrained_pth: str | None  # of the best
    stopped: bool = False  # by Ctrl-C


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
    with _study(request, space, category) as study:
        _clear_interrupted(study)
        found = _keep(study, space, request)
        to_do = range(len(_ended(study)), request.trials)
        if not to_do:
            return found
        tick = progress.phase("trials")
        tick(to_do.start, request.trials)
        try:
            for done in to_do:
                if request.timeout is not None and time.monotonic() - began >= request.timeout:
                    progress.say(f"--timeout: no trial begins after {request.timeout:g} s")
                    break
                progress.say(_line(_try(study, space, request, progress)))
                found = _keep(study, space, request)
                tick(done + 1, request.trials)
        except KeyboardInterrupt:
            return replace(_keep(study, space, request), stopped=True)
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


def _try(study: optuna.Study, space: Space, request: Tune, progress: Progress) -> FrozenTrial:
    """One trial, ended.

    What it draws depends on nothing but the trials that have ended before: an interrupted search
    goes on as if it had never been interrupted.
    """
    ended = len(_ended(study))
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
        trial.set_user_attr("reason", str(error))
        if not ended:  # the start itself: what is wrong with it is wrong with all
            study.tell(trial, state=TrialState.FAIL)
            raise
        return study.tell(trial, state=TrialState.PRUNED)
    except KeyboardInterrupt:
        trial.set_user_attr("reason", "stopped")
        study.tell(trial, state=TrialState.FAIL)
        raise
    for path, why in report["images"]["skipped"].items():
        if not ended:
            progress.say(f"skipped {path}: {why}")
    for key in ("f1", "normals", "defects"):
        trial.set_user_attr(key, report["calibration"][key])
    trial.set_user_attr("mib", report["mib"])
    trial.set_user_attr("seconds", round(time.perf_counter() - began, 1))
    return study.tell(trial, report["calibration"]["auroc"])


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
        )
        report = retrain(training, Progress(quiet=True))
        names = {meta.weights_pth, meta.memory_bank, meta.stats} - {None}
        size = sum((training.out_dir / str(name)).stat().st_size for name in names)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if "auroc" not in report["calibration"]:
        raise BadDataset("None of the defective test images can be read.")
    return {**report, "mib": round(size / 2**20, 1)}


# ---- what is searched ------------------------------------------------------------------------


class Stage(NamedTuple):
    """A layer of a backbone that features can be taken from."""

    layer: str
    channels: int
    stride: int  # pixels of the image between two features


@dataclass(frozen=True)
class Space:
    """The values that trials draw from. The start's own are always among them."""

    start: Meta
    images: int  # that are learned
    weights: dict[str | None, str | None]  # of each backbone; None for kinds without one
    stages: dict[str, list[Stage]]  # of each backbone
    image_sizes: list[int]
    model_sizes: list[str]  # that there is a teacher for
    learning_rate: float | None  # of the start; None for kinds without one

    @classmethod
    def of(cls, request: Tune, start: Meta, images: int) -> Space:
        """Find out what can be searched with so many training images.

        Raises:
            BadMeta: timm does not know a backbone.
            BadWeights: there are no weights for one of `backbones`.
        """
        weights: dict[str | None, str | None] = {start.backbone: request.pretrained_pth}
        for word in request.backbones:
            name, _, file = word.partition("=")
            if name != start.backbone:
                weights[name] = file or (UNTRAINED if request.pretrained_pth == UNTRAINED else None)
        stages = {str(name): _stages(str(name)) for name in weights if start.model in WITH_BACKBONE}
        for backbone in stages:
            if backbone != start.backbone:
                _check_weights(backbone, stages[backbone], weights[backbone])
        return cls(
            start,
            images,
            weights,
            stages,
            sorted({start.image_size, *request.image_sizes}),
            _model_sizes(start, request.pretrained_pth),
            start.learning_rate or getattr(models.module(start.model), "LEARNING_RATE", None),
        )

    def first(self) -> dict[str, Any]:
        """The start, as `draw` names its parameters."""
        return {
            "image_size": self.start.image_size,
            "backbone": self.start.backbone,
            f"layers of {self.start.backbone}": "+".join(self.start.layers or []),
            "coreset_ratio": self.start.coreset_ratio,
            "n_features": self.start.n_features,
            "model_size": self.start.model_size,
            "latent_dim": self.start.latent_dim,
            "learning_rate": self.learning_rate,
        }

    def draw(self, trial: optuna.Trial) -> dict[str, Any]:
        """Values for the keys of meta.json that are searched."""
        start, kind = self.start, self.start.model
        values: dict[str, Any] = {}
        image_size = trial.suggest_categorical("image_size", self.image_sizes)
        if kind in WITH_BACKBONE:
            backbone = trial.suggest_categorical("backbone", list(self.stages))
            choices = self.layer_choices(backbone)
            chosen = trial.suggest_categorical(f"layers of {backbone}", choices)
            values |= {"backbone": backbone, "layers": chosen.split("+")}
        if kind == "patchcore":
            assert start.coreset_ratio is not None, "Meta requires it of a patchcore model"
            low, high = self.coreset_range(backbone, values["layers"], image_size)
            drawn = trial.suggest_float("coreset_ratio", low, high, log=True)
            values["coreset_ratio"] = _short(drawn, start.coreset_ratio)
        if kind == "padim":
            most = self.most_features(backbone, values["layers"], image_size)
            fewest = min(FEWEST_FEATURES, most)
            values["n_features"] = trial.suggest_int("n_features", fewest, most, log=True)
        if kind == "efficientad":
            values["model_size"] = trial.suggest_categorical("model_size", self.model_sizes)
        if kind == "vae":
            assert start.latent_dim is not None, "Meta requires it of a vae"
            fresh = self.weights[start.backbone] in (
                None,
                UNTRAINED,
            )  # a file holds weights of one size
            sizes = sorted({start.latent_dim, *(LATENT_DIMS if fresh else ())})
            values["latent_dim"] = trial.suggest_categorical("latent_dim", sizes)
        if self.learning_rate is not None:
            usual = models.module(kind).LEARNING_RATE
            low = min(usual / LEARNING_RATE_FACTOR, self.learning_rate)
            high = max(usual * LEARNING_RATE_FACTOR, self.learning_rate)
            drawn = trial.suggest_float("learning_rate", low, high, log=True)
            values["learning_rate"] = _short(drawn, self.learning_rate)
        return {**values, "image_size": image_size}

    def layer_choices(self, backbone: str) -> list[str]:
        """Runs of neighbouring stages, as "layer2+layer3": in the middle of the network, where
        features are neither edges nor whole objects (arXiv:2106.08265, section 3.1)."""
        stages = self.stages[backbone]
        middle = [stage.layer for stage in stages if stage.stride in STRIDES]
        names = middle or [stage.layer for stage in stages]
        if len(names) > MOST_STAGES:
            part = len(names) / MOST_STAGES
            names = [names[int((index + 0.5) * part)] for index in range(MOST_STAGES)]
        count = len(names)
        runs = ["+".join(names[i:j]) for i in range(count) for j in range(i + 1, count + 1)]
        own = "+".join(self.start.layers or [])
        return runs if backbone != self.start.backbone or own in runs else [*runs, own]

    def coreset_range(
        self, backbone: str, layers: list[str], image_size: int
    ) -> tuple[float, float]:
        """The least and the most coreset_ratio. Fine layers make too many rows of a large one."""
        low, high = CORESET_RATIO
        patches = self.images * self.positions(backbone, layers, image_size)
        high = max(low, min(high, MOST_ROWS / patches))
        own = self.start.coreset_ratio
        of_start = (self.start.backbone, self.start.layers, self.start.image_size)
        if own is not None and (backbone, layers, image_size) == of_start:
            return min(low, own), max(high, own)
        return low, high

    def most_features(self, backbone: str, layers: list[str], image_size: int) -> int:
        """n_features at most: the channels there are, and the statistics that PaDiM allows."""
        from workers.models.padim import LARGEST_MIB

        channels = sum(stage.channels for stage in self.stages[backbone] if stage.layer in layers)
        fits = math.isqrt(LARGEST_MIB * 2**20 // (4 * self.positions(backbone, layers, image_size)))
        return max(1, min(channels, fits))

    def positions(self, backbone: str, layers: list[str], image_size: int) -> int:
        """Patches of an image; 1 where there is no such layer, which the training will say."""
        strides = [stage.stride for stage in self.stages[backbone] if stage.layer == layers[0]]
        return math.ceil(image_size / strides[0]) ** 2 if strides else 1


def _short(drawn: float, start: float) -> float:
    """With three digits, but for the start's own."""
    return drawn if drawn == start else float(f"{drawn:.3g}")


def _stages(backbone: str) -> list[Stage]:
    from workers.models.backbone import feature_info

    return [
        Stage(info["module"], info["num_chs"], info["reduction"]) for info in feature_info(backbone)
    ]


def _check_weights(backbone: str, stages: list[Stage], weights: str | None) -> None:
    """Raise now, and not in each trial, where a backbone has no weights."""
    from workers.models.backbone import extractor

    try:
        extractor(backbone, [stages[-1].layer], weights)
    except BadWeights as error:
        raise BadWeights(f"{error} In --backbones, {backbone}=F names a file.") from error


def _model_sizes(start: Meta, weights: str | None) -> list[str]:
    """The sizes that there is a teacher for; the start's first, whether there is or not."""
    if start.model_size is None:
        return []
    sizes: list[str] = [start.model_size]
    for size in MODEL_SIZES if weights in (None, UNTRAINED) else ():  # a file is of one size
        with suppress(BadWeights):
            if size not in sizes:
                models.module(start.model).build(start.with_(model_size=size), weights)
                sizes.append(size)
    return sizes


# ---- the study on disk -----------------------------------------------------------------------


@contextmanager
def _study(request: Tune, space: Space, category: Category) -> Iterator[optuna.Study]:
    """The study in `out_dir`, a new one or the one that is there; held, for one process only.

    Raises:
        BadRequest: it is of another search, another process is at it, or the file is damaged.
    """
    request.out_dir.mkdir(parents=True, exist_ok=True)
    folder = os.open(request.out_dir, os.O_RDONLY)
    try:
        _hold(folder, request.out_dir)
        # Through the descriptor: a path with `?`, `%` or braces means something else in a URL.
        storage = optuna.storages.RDBStorage(f"sqlite:////proc/self/fd/{folder}/{STUDY}")
        study = _create(storage)
        search = _search_of(request, space, category)
        before = study.user_attrs.get("search", search)
        other = ", ".join(what for what in search if search[what] != before.get(what))
        if other and _ended(study):
            raise BadRequest(
                f"{request.out_dir} holds a search with other {other}: choose another --out_dir,"
                f" or remove {STUDY} there and begin anew."
            )
        if other:  # it could not be begun, and the flags were mended
            optuna.delete_study(study_name=study.study_name, storage=storage)
            study = _create(storage)
        study.set_user_attr("search", search)
        try:
            yield study
        finally:
            storage.remove_session()
            storage.engine.dispose()
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        why = str(error.__cause__ or error).splitlines()[0]
        raise BadRequest(
            f"{request.out_dir / STUDY} cannot be used ({why}): free some space if the disk is"
            " full, or choose another --out_dir."
        ) from error
    finally:
        os.close(folder)


def _hold(folder: int, out_dir: Path) -> None:
    """A second search would take the trial of this one for an interrupted one."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadRequest(
            f"Another search is at work in {out_dir}: wait for it, or choose another --out_dir."
        ) from None


def _create(storage: optuna.storages.RDBStorage) -> optuna.Study:
    return optuna.create_study(
        storage=storage, study_name="tune", direction="maximize", load_if_exists=True
    )


def _search_of(request: Tune, space: Space, category: Category) -> dict[str, str]:
    """What makes values of trials comparable, by the words of a refusal."""
    images = hashlib.sha256()
    for path in (*category.train, *category.test_normal, *category.test_anomaly):
        name = path.relative_to(request.data_root)
        images.update(f"{name} {path.stat().st_size}\n".encode(errors="surrogateescape"))
    return {
        "--model": request.model,
        "--category": request.category,
        "images in --data_root": images.hexdigest(),
        "--meta_json": space.start.model_dump_json(),
        "--pretrained_pth": _weights_id(request.pretrained_pth),
        "--backbones": ",".join(sorted(request.backbones)),
        "teachers": ",".join(space.model_sizes),
        "--image_sizes": ",".join(map(str, sorted(request.image_sizes))),
        "--epochs": str(request.epochs),
        "--batch": str(request.batch),
        "--penalty_dir": str(request.penalty_dir and request.penalty_dir.resolve()),
    }


def _weights_id(weights: str | None) -> str:
    return str(weights) if weights in (None, UNTRAINED) else sha256(Path(str(weights)))


def _ended(study: optuna.Study) -> list[FrozenTrial]:
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    return study.get_trials(deepcopy=False, states=states)


def _clear_interrupted(study: optuna.Study) -> None:
    """Mark what a killed process left as failed; as pruned what kills the process every time."""
    killed = [
        trial.user_attrs.get("values")
        for trial in study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        if "reason" not in trial.user_attrs
    ]
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        values = trial.user_attrs.get("values")
        again = values is not None and killed.count(values) + 1 >= MOST_KILLS
        study.tell(trial.number, state=TrialState.PRUNED if again else TrialState.FAIL)


def _reason(trial: FrozenTrial) -> str:
    """Why a trial is not complete; one that was killed could not say it itself."""
    if trial.state is TrialState.COMPLETE:
        return ""
    killed = "killed" if trial.state is TrialState.FAIL else KILLED_AGAIN
    return str(trial.user_attrs.get("reason", killed))


def _keep(study: optuna.Study, space: Space, request: Tune) -> Found:
    """Write trials.csv and the best meta.json."""
    trials, ended = study.get_trials(deepcopy=False), _ended(study)
    complete = [trial for trial in ended if trial.state is TrialState.COMPLETE]
    write_atomically(request.out_dir / TRIALS, _table(trials, request.model).encode())
    if not complete:
        return Found(trials, None, None, None)
    best = min(complete, key=_rank)
    meta = space.start.with_(**best.user_attrs["values"])
    meta.write(request.out_dir / BEST)
    return Found(trials, ended[0], best, space.weights[meta.backbone])


def _rank(trial: FrozenTrial) -> tuple[float, float, float, int]:
    """The smallest is the best. Rounded, because equal measures may differ in their last bit."""
    assert trial.value is not None, "a complete trial has one"
    measured = trial.user_attrs
    return -round(trial.value, 6), -round(measured["f1"], 6), measured["mib"], trial.number


def _table(trials: list[FrozenTrial], model: str) -> str:
    keys = HYPER_PARAMETERS[model]
    file = io.StringIO()
    table = csv.writer(file)
    table.writerow(["number", "state", "auroc", "f1", "seconds", "mib", *keys, "reason"])
    for trial in trials:
        about, values = trial.user_attrs, trial.user_attrs.get("values", {})
        measured = [trial.value, *(about.get(key) for key in ("f1", "seconds", "mib"))]
        searched = [_cell(values.get(key)) for key in keys]
        table.writerow(
            [trial.number, trial.state.name.lower(), *measured, *searched, _reason(trial)]
        )
    return file.getvalue()


def _cell(value: Any) -> Any:
    return "+".join(value) if isinstance(value, list) else value


# ---- for a person ----------------------------------------------------------------------------


def _line(trial: FrozenTrial) -> str:
    return f"trial {trial.number}: {_measured(trial)}; {_drawn(trial)}"


def _measured(trial: FrozenTrial) -> str:
    about = trial.user_attrs
    if trial.value is None:
        return f"not trained ({_reason(trial)})"
    return (
        f"AUROC {trial.value:.4f}, best F1 {about['f1']:.4f}, {about['mib']} MiB,"
        f" {about['seconds']} s"
    )


def _drawn(trial: FrozenTrial) -> str:
    values = trial.user_attrs["values"].items()
    return ", ".join(f"{key} {_cell(value)}" for key, value in values)


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
        "out_dir": request.out_dir / "model",
    }
    words = [str(w) for k, v in flags.items() if v is not None for w in (f"--{k}", v)]
    return ["python3", "retrain.py", *words]
