"""Claims about `kensa threshold`: a model in a folder gets another threshold."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engines import threshold_command
from engines.meta import Meta
from engines.store.versions import Store
from engines.verdict import Scale
from support.plans import tiny_bank, tiny_bundle
from support.project import ROOT

LIMITS = [{"false_rejects": share, "raw": raw, "at_most": 0.2}
          for share, raw in ((0.001, 3.0), (0.01, 2.5), (0.1, 2.0))]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tiny_bundle(tmp_path / "tiny", tiny_bank(1))
    Meta.read(made / "meta.json").with_(
        image_threshold_auto=2.5, raw_image_min=1.0, raw_image_max=5.0, of_somebody="kept",
        calibration={"false_rejects": 0.01, "limits": LIMITS},
    ).write(made / "meta.json")  # fmt: skip
    return made


def kensa(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """As somebody types it; fails where it loads what only serving or training needs."""
    program = (
        "import runpy, sys\n"
        f"sys.argv = {['kensa', 'threshold', *map(str, arguments)]!r}\n"
        "try: runpy.run_module('app', run_name='__main__')\n"
        "finally: assert not {'torch', 'openvino', 'fastapi', 'dbos'} & {*sys.modules}\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def refused(*arguments: str | Path) -> str:
    done = kensa(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    return done.stderr


def test_it_shows_the_threshold_and_changes_nothing(folder: Path) -> None:
    before = (folder / "meta.json").read_bytes()
    done = kensa(folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "threshold      0.5 on the normalised score, 2.5 raw",
        "false_rejects  0.01, at most 0.2 (95 % sure)",
        "  0.001        3 raw, at most 0.2 (95 % sure)",
        "  0.01         2.5 raw, at most 0.2 (95 % sure)",
        "  0.1          2 raw, at most 0.2 (95 % sure)",
    ]
    assert (folder / "meta.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flag", "value", "raw"),
    [("--threshold", "0.75", 3.5), ("--raw", "2.1", 2.1), ("--false_rejects", "0.001", 3.0)],
)
def test_another_one_is_written_and_nothing_else(
    flag: str, value: str, raw: float, folder: Path
) -> None:
    before = json.loads((folder / "meta.json").read_text())
    done = kensa(folder, flag, value)
    assert done.returncode == 0, done.stderr
    assert f"{raw:g} raw" in done.stdout.splitlines()[0]
    after = json.loads((folder / "meta.json").read_text())
    assert Scale.of(Meta.parse(after)).raw_threshold == pytest.approx(raw)
    assert {**after, "image_threshold": None} == {**before, "image_threshold": None}
    assert kensa(folder).stdout == done.stdout


def test_a_version_in_a_servers_store_is_refused_with_who_to_ask(
    folder: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "models")
    version = store.take_in("part", folder, {})
    for place in (store.folder("part", version), tmp_path / "link"):
        if place.name == "link":
            place.symlink_to(store.folder("part", version))
        assert "PUT /models/NAME/threshold" in refused(place, "--threshold", "0.6")
    store.check("part", version)


def test_what_is_no_model_is_refused(folder: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nothing")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copyfile(folder / "meta.json", alone / "meta.json")
    assert "name a folder that retrain.py or convtrt.py made" in refused(alone)
    (folder / "meta.json").write_text("{")
    assert "is not JSON" in refused(folder)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--threshold", "1.2"], "must be a number from 0 to 1"),
        (["--threshold", "nan"], "must be a number from 0 to 1"),
        (["--threshold", "half"], "invalid float value"),
        (["--raw", "9"], "must be a number from 0.5 to 4.5"),
        (["--false_rejects", "0.5"], "must be a number from 0.001 to 0.1"),
        (["--raw", "2", "--threshold", "0.5"], "not allowed with"),
        (["--raw"], "expected one argument"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(
    arguments: list[str], sentence: str, folder: Path
) -> None:
    before = (folder / "meta.json").read_bytes()
    assert sentence in refused(folder, *arguments)
    assert (folder / "meta.json").read_bytes() == before


def test_where_nothing_can_be_written_all_is_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "meta.json").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert threshold_command.main([str(folder), "--threshold", "0.6"]) == 2
    assert "is as it was: No space left on device." in capsys.readouterr().err
    assert (folder / "meta.json").read_bytes() == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
