"""Claims about engines.meta: what loads, what is refused and how, and what a write leaves."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engines.errors import BadMeta
from engines.meta import Meta
from support.project import ROOT

# Old files: no `model`, no `format`. The numbers of PatchCore are those of a real file (SPEC.md).
SCORES = {"image_threshold": 0.5, "image_threshold_auto": 8.257}
RANGE = {"raw_image_min": 6.725, "raw_image_max": 20.643}
COMMON = {"image_size": 256, "weights_pth": "model.pth", **SCORES}
BACKBONE = {"backbone": "resnet34", "layers": ["layer2"]}
OLD: dict[str, dict[str, Any]] = {
    "patchcore": {
        **BACKBONE, "coreset_ratio": 0.05, "memory_bank": "memory_bank.npz", **COMMON, **RANGE
    },
    "padim": {
        **BACKBONE, "n_features": 100, "stats": "stats.npz", **COMMON,
        "image_min": 6.725, "image_max": 20.643,
    },
    "efficientad": {"model_size": "small", "learning_rate": 1e-4, **COMMON, **RANGE},
    "vae": {"latent_dim": 128, "learning_rate": 1e-3, **COMMON, **RANGE},
}  # fmt: skip

WRITE_MUCH_ON_A_FULL_DISK = """
import resource, sys
from pathlib import Path
from engines.meta import Meta
path = Path(sys.argv[1])
meta = Meta.read(path).with_(note="x" * 100_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    meta.write(path)
except OSError as error:
    sys.exit(f"OSError {error.errno}")
"""


def written(folder: Path, content: Any) -> Path:
    path = folder / "meta.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(BadMeta) as caught:
        Meta.read(path)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "pydantic" not in sentence
    assert sentence.startswith(str(path))
    return sentence


# Old files


@pytest.mark.parametrize("kind", OLD)
def test_an_old_file_says_what_it_is_by_the_key_that_only_its_kind_has(
    kind: str, tmp_path: Path
) -> None:
    meta = Meta.read(written(tmp_path, OLD[kind]))
    assert meta.model == kind
    for key in OLD[kind].keys() - {"image_min", "image_max"}:
        assert getattr(meta, key) == OLD[kind][key]


@pytest.mark.parametrize("kind", OLD)
def test_the_score_range_of_every_old_kind_is_read(kind: str, tmp_path: Path) -> None:
    meta = Meta.read(written(tmp_path, OLD[kind]))
    assert (meta.raw_image_min, meta.raw_image_max) == (6.725, 20.643)
    assert (meta.image_threshold, meta.image_threshold_auto) == (0.5, 8.257)


def test_an_old_padim_file_with_image_min_is_written_with_raw_image_min(tmp_path: Path) -> None:
    path = written(tmp_path, OLD["padim"])
    Meta.read(path).write(path)
    now = json.loads(path.read_text())
    assert (now["raw_image_min"], now["raw_image_max"]) == (6.725, 20.643)
    assert "image_min" not in now
    assert "image_max" not in now


def test_raw_image_min_wins_over_the_older_name(tmp_path: Path) -> None:
    meta = Meta.read(written(tmp_path, {**OLD["padim"], **RANGE, "image_min": 1, "image_max": 2}))
    assert (meta.raw_image_min, meta.raw_image_max) == (6.725, 20.643)


def test_a_file_from_before_the_first_training_needs_no_thresholds(tmp_path: Path) -> None:
    seed = {key: OLD["patchcore"][key] for key in ("backbone", "layers", "coreset_ratio")}
    meta = Meta.read(written(tmp_path, {**seed, "image_size": 256}))
    assert (meta.weights_pth, meta.memory_bank) == ("model.pth", "memory_bank.npz")
    assert meta.image_threshold_auto is None


def test_the_stats_of_an_old_padim_file_have_their_usual_name(tmp_path: Path) -> None:
    old = {key: value for key, value in OLD["padim"].items() if key != "stats"}
    assert Meta.read(written(tmp_path, old)).stats == "stats.npz"


def test_a_byte_order_mark_is_no_reason_to_refuse(tmp_path: Path) -> None:
    path = tmp_path / "meta.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(OLD["vae"]).encode())
    assert Meta.read(path).latent_dim == 128


# Reading and writing


@pytest.mark.parametrize("kind", OLD)
def test_a_file_that_was_written_reads_back_the_same(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path, OLD[kind])
    meta = Meta.read(path)
    meta.write(path)
    assert Meta.read(path) == meta


@pytest.mark.parametrize(
    "value", [1, True, "検査 line 3", None, [1, {"deep": None}], {"lens": {"gain": None, "id": 7}}]
)
def test_unknown_keys_survive_reading_and_writing(value: Any, tmp_path: Path) -> None:
    path = written(tmp_path, {**OLD["patchcore"], "station": value})
    Meta.read(path).with_(image_threshold=0.6).write(path)
    now = json.loads(path.read_text(encoding="utf-8"))
    assert now["station"] == value
    assert now["image_threshold"] == 0.6


def test_a_null_in_the_calibration_record_survives(tmp_path: Path) -> None:
    record = {"method": "prediction_limit", "auroc": None}
    path = written(tmp_path, {**OLD["patchcore"], "calibration": record})
    Meta.read(path).write(path)
    assert json.loads(path.read_text())["calibration"] == record


def test_a_number_of_the_calibration_that_is_none_is_not_known(tmp_path: Path) -> None:
    """JSON has no NaN, so a report that quotes it could not be written."""
    found = {"parts": 1e400, "drawn": {"scores": [1.5, math.nan, -math.inf]}}
    meta = Meta.read(written(tmp_path, {**OLD["patchcore"], "calibration": found}))
    assert meta.calibration == {"parts": None, "drawn": {"scores": [1.5, None, None]}}
    meta.write(tmp_path / "again.json")
    json.loads((tmp_path / "again.json").read_text(), parse_constant=pytest.fail)


def test_keys_of_other_kinds_are_not_written_as_null(tmp_path: Path) -> None:
    path = written(tmp_path, OLD["vae"])
    Meta.read(path).write(path)
    assert None not in json.loads(path.read_text()).values()


def test_a_change_that_contradicts_the_rest_is_refused(tmp_path: Path) -> None:
    meta = Meta.read(written(tmp_path, OLD["patchcore"]))
    with pytest.raises(BadMeta, match="raw_image_min"):
        meta.with_(raw_image_min=30.0)


# What is refused, and by which name

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an auto threshold that is no number": ({"image_threshold_auto": math.nan}, "threshold_auto"),
    "an infinite range": ({"raw_image_max": math.inf}, "raw_image_max"),
    "a range wider than any number": (
        {"raw_image_min": -1.7e308, "raw_image_max": 1.7e308, "image_threshold_auto": 0.0},
        "raw_image_m",
    ),
    "an auto threshold that no score reaches": ({"image_threshold_auto": 1e300}, "threshold_auto"),
    "a ratio of 0": ({"coreset_ratio": 0}, "coreset_ratio"),
    "a ratio above 1": ({"coreset_ratio": 1.01}, "coreset_ratio"),
    "a negative ratio": ({"coreset_ratio": -0.1}, "coreset_ratio"),
    "a range of nothing": ({"raw_image_min": 5, "raw_image_max": 5}, "raw_image_min"),
    "a range upside down": ({"raw_image_min": 9, "raw_image_max": 5}, "raw_image_min"),
    "a hand-set threshold below 0": ({"image_threshold": -0.1}, "image_threshold"),
    "a hand-set threshold on the raw score": ({"image_threshold": 8.257}, "image_threshold"),
    "weights in another folder": ({"weights_pth": "../model.pth"}, "weights_pth"),
    "a bank by absolute path": ({"memory_bank": "/etc/passwd"}, "memory_bank"),
    "a bank by a Windows path": ({"memory_bank": "..\\bank.npz"}, "memory_bank"),
    "a bank that is the folder": ({"memory_bank": ".."}, "memory_bank"),
    "a bank without a name": ({"memory_bank": ""}, "memory_bank"),
    "a bank with a NUL in its name": ({"memory_bank": "bank\0.npz"}, "memory_bank"),
    "a hash of a file in another folder": ({"files": {"../x": "00"}}, "files"),
    "an unknown kind": ({"model": "fastflow"}, "model"),
    "a kind that is no word": ({"model": ["patchcore"]}, "model"),
    "another kind than its keys": ({"model": "vae"}, "latent_dim"),
    "the keys of two kinds": ({"latent_dim": 4}, "cannot tell which model"),
    "no backbone": ({"backbone": None}, "backbone"),
    "no layers": ({"layers": []}, "layers"),
    "layers in one string": ({"layers": "layer2"}, "layers"),
    "more of a place than all": ({"centre_weight": 1.1}, "centre_weight"),
    "a power of nothing": ({"feature_power": 0}, "feature_power"),
    "features to a power for a VAE": (
        {"model": "vae", "latent_dim": 8, "feature_power": 0.5},
        "for a patchcore model, not for a vae",
    ),
    "a size in words": ({"image_size": "big"}, "image_size"),
    "half a pixel": ({"image_size": 256.5}, "image_size"),
    "a size for each side": ({"image_size": [256, 256]}, "image_size"),
    "a size of nothing": ({"image_size": 0}, "image_size"),
    "a size beyond memory": ({"image_size": 100_000}, "image_size"),
    "a threshold that is yes or no": ({"image_threshold": True}, "image_threshold"),
    "a backbone that is a number": ({"backbone": 34}, "backbone"),
    "files that are a list": ({"files": ["model.onnx"]}, "files"),
    "a format of the future": ({"format": 2}, "format"),
}


@pytest.mark.parametrize(("changes", "name"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_refused_by_name(
    changes: dict[str, Any], name: str, tmp_path: Path
) -> None:
    assert name in refusal(written(tmp_path, {**OLD["patchcore"], **changes}))


@pytest.mark.parametrize("missing", ["image_size", "backbone", "layers"])
def test_a_missing_key_is_named(missing: str, tmp_path: Path) -> None:
    rest = {key: value for key, value in OLD["padim"].items() if key != missing}
    assert missing in refusal(written(tmp_path, rest))


def test_a_file_of_no_known_kind_is_told_what_it_lacks(tmp_path: Path) -> None:
    sentence = refusal(written(tmp_path, COMMON))
    for key in ("model", "coreset_ratio", "n_features", "model_size", "latent_dim"):
        assert key in sentence


@pytest.mark.parametrize(
    "text",
    [
        "", "{", '{"image_size": 256,}', "model: patchcore", "{} {}", "\0",
        "[" * 100_000, '{"image_size": ' + "1" * 5000 + "}",
    ],
    ids=["empty", "cut", "comma", "yaml", "two", "nul", "deep", "long"],
)  # fmt: skip
def test_what_is_not_json_is_refused(text: str, tmp_path: Path) -> None:
    assert "is not JSON" in refusal(written(tmp_path, text))


@pytest.mark.parametrize("encoding", ["utf-16", "shift_jis"])
def test_another_encoding_is_refused(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "meta.json"
    path.write_bytes(json.dumps({"note": "検査"}, ensure_ascii=False).encode(encoding))
    assert "is not JSON" in refusal(path)


@pytest.mark.parametrize("content", [[], [OLD["vae"]], "vae", 1, None])
def test_json_that_is_no_object_is_refused(content: Any, tmp_path: Path) -> None:
    assert "must be a JSON object" in refusal(written(tmp_path, json.dumps(content)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "meta.json")


def test_a_folder_in_its_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "meta.json").mkdir()
    assert "cannot be read" in refusal(tmp_path / "meta.json")


# Writing


@pytest.mark.parametrize("room", [0, 1000, 65536])
def test_a_disk_that_is_full_leaves_the_old_file_and_nothing_else(
    room: int, tmp_path: Path
) -> None:
    path = written(tmp_path, OLD["patchcore"])
    before = path.read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", WRITE_MUCH_ON_A_FULL_DISK, path, str(room)],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stderr.strip() == "OSError 27"  # EFBIG: the disk took `room` bytes and no more
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_process_killed_at_any_step_of_a_write_leaves_the_old_or_the_new_file(
    tmp_path: Path,
) -> None:
    path = written(tmp_path, OLD["patchcore"])
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / "killed.py", "meta", path],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert set(found) == {0.5, 0.75}  # the old threshold and the new one
    assert len(found) >= 3
    assert found == sorted(found)  # once the new one is there it stays
