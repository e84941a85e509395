"""Claims about app.settings, and about how the server refuses to start."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from app.__main__ import COMMANDS, have_to_oneself
from app.settings import GROUPS, Settings, table, unknown_variables, version
from engines.errors import BadSettings
from engines.image import ImageLimits
from support.project import ROOT


def refused(arguments: list[str] | None = None, **variables: str) -> str:
    """Start the server where it must refuse: what it says on stderr."""
    run = subprocess.run(
        [sys.executable, "-m", "app", *(arguments or [])],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 2
    assert run.stdout == ""
    return run.stderr


def test_the_page_lists_every_setting_as_it_is() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = [
        tuple(cell.strip().strip("`") for cell in line.strip("|").split("|"))
        for line in page.splitlines()
        if line.startswith("| `KENSA_")
    ]
    assert rows == [(name, default, unit, meaning) for name, default, unit, meaning in table()]


def test_image_limits_are_those_of_the_engines() -> None:
    settings = Settings()
    limits = ImageLimits()
    assert settings.max_image_bytes == limits.max_bytes
    assert settings.max_image_pixels == limits.max_pixels


def test_settings_come_from_the_environment_and_never_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KENSA_PORT", "9000")
    settings = Settings.read()
    assert settings.port == 9000
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KENSA_MODEL_DIR", "")
    assert Settings.read().model_dir is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KENSA_PORT", "70000"),
        ("KENSA_PORT", "tcp://10.0.0.1:8000"),  # what Kubernetes sets for a service named kensa
        ("KENSA_PRECISION", "int4"),
        ("KENSA_MODEL_NAME", "../secret"),
        ("KENSA_MAX_IMAGE_BYTES", "-1"),
        ("KENSA_LOG_LEVEL", "loud"),
    ],
)
def test_a_wrong_value_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(BadSettings, match=name) as caught:
        Settings.read()
    assert value in str(caught.value)


@pytest.mark.parametrize("shifts", ["06:00,06:10", "6,14", "24:00", "06:00;14:00", ","])
def test_shifts_that_are_no_times_are_refused_with_an_example(
    shifts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KENSA_SHIFTS", shifts)
    with pytest.raises(BadSettings, match="quarter of an hour: say 06:00,14:00,22:00"):
        Settings.read()


def test_a_misspelt_variable_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KENSA_MODEL_DRI", "x")
    monkeypatch.setenv("KENSA_PORT", "1")
    assert unknown_variables() == ["KENSA_MODEL_DRI"]


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("models/PatchCore", "PatchCore"),
        ("models/part no. 7 (left)", "part-no-7-left"),
        ("models/検査", "検査"),
        ("models/検査・部品 (左)", "検査-部品-左"),
        ("models/" + "a" * 100, "a" * 64),
        (None, "default"),
    ],
)
def test_the_model_is_named_after_its_folder(folder: str | None, name: str) -> None:
    assert Settings(model_dir=folder).served_name == name
    assert Settings(model_dir=folder, model_name="mine").served_name == "mine"


def test_compiled_networks_are_kept_in_the_cache_of_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Settings().compiled_dir == tmp_path / "kensa"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings().compiled_dir == tmp_path / ".cache" / "kensa"
    assert Settings(cache_dir=tmp_path / "other").compiled_dir == tmp_path / "other"


def test_a_wrong_setting_ends_the_process_with_one_sentence() -> None:
    said = refused(KENSA_PORT="99999")
    assert re.fullmatch(r"kensa: KENSA_PORT is '99999'.*\n", said)


def test_a_port_in_use_ends_the_process_with_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(KENSA_PORT=str(port))
    assert re.fullmatch(rf"kensa: Cannot listen on 127.0.0.1, port {port}: .*\n", said)


def test_an_address_of_another_machine_ends_the_process_with_one_sentence() -> None:
    said = refused(KENSA_HOST="192.0.2.1", KENSA_PORT="0", KENSA_ACCESS="anyone")
    assert re.fullmatch(r"kensa: Cannot listen on 192.0.2.1.*", said.splitlines()[-1])


def test_flags_are_refused_rather_than_ignored() -> None:
    assert "unrecognized arguments: --port 9000" in refused(["--port", "9000"])


def test_an_unknown_command_is_told_which_there_are() -> None:
    said = refused(["foo"])
    assert re.fullmatch(r"kensa: There is no command 'foo'\. There are (.*); without one.*\n", said)
    assert ", ".join(COMMANDS) in said


def shown(flag: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "app", flag],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip


def test_version_is_said_and_nothing_else() -> None:
    assert shown("--version") == f"kensa {version()}\n"


def test_help_says_the_commands_first_and_each_setting_once_in_its_group() -> None:
    said = shown("--help")
    names = [name for name, *_ in table()]
    assert re.findall(r"^  (KENSA_\w+) ", said, re.MULTILINE) == names
    heads = re.findall(r"^([A-Z][^:\n]*):$", said, re.MULTILINE)
    assert heads == list(GROUPS.values())
    first = {f"KENSA_{setting.upper()}": group for setting, group in GROUPS.items()}
    for setting, group in first.items():
        assert f"{group}:\n  {setting} " in said
    assert names[0] in first, "or the settings before the first group were in none"
    places = [said.index(f"\n  kensa {command} ") for command in COMMANDS]
    assert places == sorted(places)
    assert places[-1] < said.index("\n  --version") < said.index(names[0])


def test_a_user_without_a_home_is_told_to_name_a_data_folder() -> None:
    says = refused(HOME="", XDG_DATA_HOME="nowhere")
    assert says == "kensa: This user has no home: set KENSA_DATA_DIR to a folder.\n"


def test_a_second_server_on_one_data_folder_ends_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(data_dir=tmp_path, shutdown_grace_s=0)
    monkeypatch.setattr("app.__main__.TAKE_OVER_S", 0.2)
    held = have_to_oneself(settings)
    with pytest.raises(BadSettings, match=f"Another server has {tmp_path}"):
        have_to_oneself(settings)
    said = refused(KENSA_DATA_DIR=str(tmp_path), KENSA_SHUTDOWN_GRACE_S="0", KENSA_PORT="0")
    assert said.splitlines()[-1].startswith("kensa: Another server has")
    assert held is not None
    os.close(held)
    assert have_to_oneself(settings) is not None


def test_a_server_that_is_just_ending_is_waited_for(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    old = have_to_oneself(settings)
    assert old is not None
    threading.Timer(1.0, os.close, [old]).start()
    began = time.monotonic()
    assert have_to_oneself(settings) is not None
    assert 0.8 < time.monotonic() - began < 5


def test_a_data_folder_that_cannot_be_locked_is_served_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "data").touch()
    assert have_to_oneself(Settings(data_dir=tmp_path / "data")) is None
    assert "no other server" in caplog.text
