"""A search on disk: its database, which one process at a time may use, its table and its best.

A trial is ended when it is complete, or pruned: its values cannot be trained. One that was
interrupted is `fail`, and the same values are tried again.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from engines.errors import BadRequest
from engines.files import printable, sha256, write_atomically
from workers.learning.dataset import Category
from workers.learning.search_space import UNTRAINED, Space, Tune

MOST_KILLS = 2  # of a process in the same trial
KILLED_AGAIN = f"killed {MOST_KILLS} times: it may be too large for the memory"
HYPER_PARAMETERS = {
    "patchcore": ("backbone", "layers", "coreset_ratio", "image_size"),
    "padim": ("backbone", "layers", "n_features", "image_size"),
    "efficientad": ("model_size", "learning_rate", "image_size"),
    "vae": ("latent_dim", "learning_rate", "image_size"),
}
STUDY, TRIALS, BEST = "study.db", "trials.csv", "meta.json"
META_JSON = "--meta_json"


@dataclass(frozen=True)
class Found:
    """What a search has found so far. `best` is None when no trial could be trained."""

    trials: list[FrozenTrial]
    first: FrozenTrial | None  # the start
    best: FrozenTrial | None
    pretrained_pth: str | None  # of the best
    stopped: bool = False  # by Ctrl-C


@contextmanager
def open_study(request: Tune, space: Space, category: Category) -> Iterator[optuna.Study]:
    """The study in `out_dir`, a new one or the one that is there; held, for one process only.

    Raises:
        BadRequest: it is of another search, another process is at it, or the file is damaged.
    """
    request.out_dir.mkdir(parents=True, exist_ok=True)
    folder = os.open(request.out_dir, os.O_RDONLY)
    try:
        _lock(folder, request.out_dir)
        # Through the descriptor: a path with `?`, `%` or braces means something else in a URL.
        storage = optuna.storages.RDBStorage(f"sqlite:////proc/self/fd/{folder}/{STUDY}")
        study = _create(storage)
        search = _search_of(request, space, category)
        before = study.user_attrs.get("search", search)
        if meta := before.get(META_JSON):  # of an older Kensa, whose meta.json had fewer keys
            before = {**before, META_JSON: _without_nulls(meta)}
        other = ", ".join(what for what in search if search[what] != before.get(what))
        if other and ended_trials(study):
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


def _lock(folder: int, out_dir: Path) -> None:
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


def _search_of(request: Tune, space: Space, category: Category) -> dict[str, str | None]:
    """What makes values of trials comparable, by the words of a refusal."""
    images = hashlib.sha256()
    for path in (*category.train, *category.test_normal, *category.test_anomaly):
        name = path.relative_to(request.data_root)
        images.update(f"{name} {path.stat().st_size}\n".encode(errors="surrogateescape"))
    return {
        "--model": request.model,
        "--category": request.category,
        "images in --data_root": images.hexdigest(),
        META_JSON: _without_nulls(space.start.model_dump_json()),
        "--pretrained_pth": _weights_id(request.pretrained_pth),
        "--backbones": ",".join(sorted(request.backbones)),
        "teachers": ",".join(space.model_sizes),
        "--image_sizes": ",".join(map(str, sorted(request.image_sizes))),
        "--epochs": str(request.epochs),
        "--batch": str(request.batch),
        "--penalty_dir": str(request.penalty_dir and request.penalty_dir.resolve()),
        "--regions": None if request.never is None else sha256(request.never),
    }


def _without_nulls(text: str) -> str:
    """JSON of an object without the keys that have no value."""
    return json.dumps({key: value for key, value in json.loads(text).items() if value is not None})


def _weights_id(weights: str | None) -> str:
    return str(weights) if weights in (None, UNTRAINED) else sha256(Path(str(weights)))


def ended_trials(study: optuna.Study) -> list[FrozenTrial]:
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    return study.get_trials(deepcopy=False, states=states)


def clear_interrupted(study: optuna.Study) -> None:
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


def why_incomplete(trial: FrozenTrial) -> str:
    """Why a trial is not complete; one that was killed could not say it itself."""
    if trial.state is TrialState.COMPLETE:
        return ""
    killed = "killed" if trial.state is TrialState.FAIL else KILLED_AGAIN
    return str(trial.user_attrs.get("reason", killed))


def keep_results(study: optuna.Study, space: Space, request: Tune) -> Found:
    """Write trials.csv and the best meta.json."""
    trials, ended = study.get_trials(deepcopy=False), ended_trials(study)
    complete = [trial for trial in ended if trial.state is TrialState.COMPLETE]
    write_atomically(request.out_dir / TRIALS, printable(_table(trials, request.model)).encode())
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
        searched = [as_cell(values.get(key)) for key in keys]
        table.writerow(
            [trial.number, trial.state.name.lower(), *measured, *searched, why_incomplete(trial)]
        )
    return file.getvalue()


def as_cell(value: Any) -> Any:
    return "+".join(value) if isinstance(value, list) else value
