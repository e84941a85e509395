"""`kensa learn`: from a folder of pictures to a model that judges, as a newcomer types it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.http.keys import add_key
from engines.files import printable
from engines.meta import FIRST, Meta
from engines.store.bundle import Bundle
from engines.store.versions import Store
from support.damage import seeds
from support.project import ROOT
from support.server import serving
from support.waiting import until
from workers.evaluation.evaluate import PAGE
from workers.learn import Learn, Server, _asked, _curl, _published, main, parse
from workers.sample_parts.write_dataset import CATEGORY, write_dataset

GOOD = 6  # parts: few, so that learning them is quick
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn parts: train/ and test/, as write_dataset leaves them. Do not change."""
    folder = tmp_path_factory.mktemp("parts")
    return write_dataset(folder, train=GOOD, normal=1, per_kind=1, size=256)


@pytest.fixture
def good(parts: Path, tmp_path: Path) -> Path:
    """A folder with pictures of good parts, and a name that a shell and a URL have to quote."""
    return Path(shutil.copytree(parts / "train" / CATEGORY, tmp_path / "検査 部品"))


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "app", "learn", *map(str, words)]


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """No hub to fetch weights from, and a data folder in which nobody serves."""
    data = {"KENSA_DATA_DIR": str(folder / "data"), "HF_HUB_OFFLINE": "1"}
    return {**os.environ, "PYTHONPATH": str(ROOT), **data, **variables}


def learn(folder: Path, *words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """What the command says, typed in `folder`."""
    return subprocess.run(
        command(*words), cwd=folder, env=environment(folder, **variables),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


Typed = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Typed:
    """The same where no server runs, in this process: it has torch already."""
    monkeypatch.chdir(tmp_path)

    def learn(*words: str | Path) -> subprocess.CompletedProcess[str]:
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return subprocess.CompletedProcess(words, code, said.out, said.err)

    return learn


def printed(said: str, label: str) -> str:
    """The command that stands behind a label in the last lines."""
    found = re.search(rf"^{label} +(.*)$", said, re.MULTILINE)
    assert found, said
    return found[1]


def in_a_shell(line: str, folder: Path) -> dict[str, Any]:
    """The JSON that a printed curl line answers."""
    line = line.replace("curl ", "curl --silent --show-error --noproxy '*' ")
    done = subprocess.run(line, shell=True, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}  # fmt: skip


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The sentence of a command that learned nothing."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: "), done.stderr
    assert "/data/train/" not in last, "it names the folders that were named"
    assert "2/5" not in done.stderr, "it says so before it learns"
    return last


# ---- no server runs -----------------------------------------------------------------------------


@needs_curl
def test_a_folder_becomes_a_model_and_the_last_lines_serve_it(
    good: Path, parts: Path, tmp_path: Path
) -> None:
    bad = parts / "test" / CATEGORY / "anomaly"
    done = learn(tmp_path, good, "--defects", bad)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = re.findall(r"^(\d)/5 ", done.stderr, re.MULTILINE)
    assert steps == ["1", "2", "3", "4", "5"]
    assert f"{GOOD} pictures ({GOOD} PNG), 256 x 256; 5 to measure with; few: " in done.stderr
    model = tmp_path / "models" / "検査-部品"  # named after the folder, as a server names it
    bundle = Bundle.open(model / "engine")
    assert bundle.meta.backbone == FIRST["backbone"]
    assert bundle.meta.calibration is not None
    assert bundle.meta.calibration["defects"] == 5
    assert (model / "evaluation" / PAGE).is_file()
    assert f"written to   models/検査-部品/evaluation/{PAGE}" in done.stdout
    assert not list(model.rglob("wanted.json"))
    start = printed(done.stdout, "serve it")
    settings = dict(word.split("=", 1) for word in shlex.split(start)[:-1])
    settings["KENSA_MODEL_DIR"] = str(tmp_path / settings["KENSA_MODEL_DIR"])
    ask = printed(done.stdout, "then")
    with serving(tmp_path, **settings) as server:
        answer = in_a_shell(ask.replace("http://127.0.0.1:8000", server.url), tmp_path)
    assert answer["model_name"] == "検査-部品"
    assert answer["model_version"].startswith("0001-")


def test_what_is_learned_again_takes_the_place_of_what_was_there(
    good: Path, parts: Path, tmp_path: Path, typed: Typed
) -> None:
    page = tmp_path / "models" / "bolt" / "evaluation" / "evaluation.json"
    page.parent.mkdir(parents=True)
    page.write_text("{}")  # of a model that was there before
    first = typed(good, "--name", "bolt")
    assert first.returncode == 0, first.stderr
    assert not page.parent.exists()
    before = Bundle.open(tmp_path / "models" / "bolt" / "engine").meta
    (good / "0000.png").unlink()
    again = typed(good, "--name", "bolt", "--good", parts / "test" / CATEGORY / "normal")
    assert again.returncode == 0, again.stderr
    after = Bundle.open(tmp_path / "models" / "bolt" / "engine").meta
    assert before.calibration is not None
    assert after.calibration is not None
    assert (before.calibration["normals"], after.calibration["normals"]) == (GOOD, GOOD)
    assert "1 to measure with" in again.stderr
    assert not (tmp_path / "models" / "bolt" / "data" / "test" / "bolt" / "anomaly").exists()


@pytest.mark.parametrize("step", ["2/5", "3/5"])
def test_ctrl_c_leaves_nothing_half(
    step: str, good: Path, kensa_model: Path, tmp_path: Path
) -> None:
    engine = tmp_path / "models" / "bolt" / "engine"
    shutil.copytree(kensa_model, engine)
    before = content(engine)
    learning = subprocess.Popen(
        command(good, "--name", "bolt"), cwd=tmp_path, env=environment(tmp_path),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert learning.stderr is not None
    said = ""
    for line in learning.stderr:
        said += line
        if line.strip().startswith(step):
            break
    time.sleep(0.2)  # into the step
    os.killpg(learning.pid, signal.SIGINT)
    said += learning.communicate(timeout=60)[1]
    assert learning.returncode == 130, said
    assert "Traceback" not in said
    assert content(engine) == before
    last = said.splitlines()[-1]
    if step == "2/5":
        assert last == "error: Stopped. Nothing was changed."
    else:
        assert last.startswith("error: Stopped. What was learned is in models/bolt, and no server")
    half = [path for path in (tmp_path / "models").rglob("*") if path.name.startswith(".")]
    assert half == []
    assert not (engine.parent / "wanted.json").exists()
    if (engine.parent / "meta.json").exists():
        meta = Meta.read(engine.parent / "meta.json")
        assert all((engine.parent / name).is_file() for name in meta.files or {})


def stopped(folder: Path, work: str) -> subprocess.CompletedProcess[str]:
    """What a command says whose work is this."""
    (folder / "stopped.py").write_text(
        "import sys, time\n"
        "from workers.commands import run\n"
        "from workers.progress import Progress\n"
        f"sys.exit(run(lambda: exec({work!r}), Progress()))\n"
    )
    return subprocess.run(
        [sys.executable, "-m", "stopped"], cwd=folder, env=environment(folder),
        capture_output=True, text=True, timeout=50,
    )  # fmt: skip


STOPPED = (130, "error: Stopped. Nothing was changed.\n")


def test_ctrl_c_while_torch_is_imported_ends_with_the_same_exit_code(tmp_path: Path) -> None:
    done = stopped(tmp_path, "raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == STOPPED


@pytest.mark.parametrize("times", [1, 3])
def test_ctrl_c_is_heard_when_torch_is_loaded_and_not_before(times: int, tmp_path: Path) -> None:
    """Raised in the middle, it would abort torch, which is written in C++, and with it all."""
    (tmp_path / "torch.py").write_text(
        "import pathlib, signal, time\n"
        f"for _ in range({times}):\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    time.sleep(0.3)\n"
        "pathlib.Path('loaded').touch()\n"
    )
    done = stopped(tmp_path, "import torch; time.sleep(60)")
    assert (done.returncode, done.stderr) == STOPPED
    assert (tmp_path / "loaded").exists()


# ---- a server runs ------------------------------------------------------------------------------


@needs_curl
def test_beside_a_server_it_goes_live_and_judges(good: Path, tmp_path: Path) -> None:
    (good / "._0000.png").write_bytes(b"what a Mac leaves beside a file")
    with serving(tmp_path) as server:  # at a port that nobody tells the command
        done = learn(tmp_path, good)
        assert done.returncode == 0, done.stdout + done.stderr
        version = Store(tmp_path / "data" / "models").versions("検査-部品")[-1]
        assert printed(done.stdout, "live") == f"検査-部品 {version} judges parts at {server.url}"
        answer = in_a_shell(printed(done.stdout, "try it"), tmp_path)
        assert (answer["model_name"], answer["model_version"]) == ("検査-部品", version)
        told = server.client.get(f"/models/検査-部品/versions/{version}").json()
        assert told["origin"]["learned"] == str(good)


def handed_over(engine: Path, good: Path, url: str, folder: Path) -> str:
    """What the command says in the end, of a model that was learned before."""
    shutil.copytree(engine, folder / "out" / "engine")
    server = Server(url, folder / "data")
    request = Learn(good, "bolt", folder / "out", server=server)
    return "\n".join(_published(request, server, good / "0000.png"))


@needs_curl
def test_what_the_gate_holds_can_be_let_in_as_it_says(
    good: Path, kensa_model: Path, tmp_path: Path
) -> None:
    with serving(tmp_path, KENSA_GATE_FOUND="1") as server:
        said = handed_over(kensa_model, good, server.url, tmp_path)
        version = Store(tmp_path / "data" / "models").versions("bolt")[-1]
        held = printed(said, "held")
        assert held.startswith(f"bolt {version}: ")
        assert "drawn" in held
        answer = server.client.post("/infer?model=bolt", files={"file": seeds()["png_colour"]})
        assert answer.status_code != 200
        in_a_shell(printed(said, "let it in"), tmp_path)
        until(lambda: server.client.get("/models/bolt").json()["live"] == version)


@pytest.mark.parametrize("judges_already", [False, True])
def test_what_was_handed_over_is_taken_back_by_ctrl_c_unless_it_judges(
    judges_already: bool, kensa_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "data" / "models")
    other = store.take_in("bolt", kensa_model, {})
    store.activate("bolt", other)
    shutil.copytree(kensa_model, tmp_path / "out" / "engine")
    meta = Meta.read(kensa_model / "meta.json")
    meta.with_(image_threshold=0.4).write(tmp_path / "out" / "engine" / "meta.json")
    folder = tmp_path / os.fsdecode("検査".encode("cp932"))
    server = Server("http://127.0.0.1:9", tmp_path / "data")
    request = Learn(folder, "bolt", tmp_path / "out", server=server)

    def ctrl_c(_: float) -> None:
        if judges_already:
            store.activate("bolt", store.versions("bolt")[-1])
        raise KeyboardInterrupt

    monkeypatch.setattr("workers.learn.time.sleep", ctrl_c)
    with pytest.raises(KeyboardInterrupt) as stopped:
        _published(request, server, folder / "0000.png")
    if judges_already:
        assert len(store.versions("bolt")) == 2
        undo = "curl -X POST http://127.0.0.1:9/models/bolt/rollback"
        assert f"judges parts already. {undo} goes back to {other}." in str(stopped.value)
    else:
        assert store.versions("bolt") == [other]
        assert str(stopped.value) == ""


@needs_curl
def test_where_keys_are_wanted_the_line_has_a_place_for_one(
    good: Path, kensa_model: Path, tmp_path: Path
) -> None:
    key = add_key(tmp_path / "data" / "keys.json", "line-3", "line")
    with serving(tmp_path) as server:
        ask = printed(handed_over(kensa_model, good, server.url, tmp_path), "try it")
        assert "-H 'X-API-Key: KEY'" in ask
        answer = in_a_shell(ask.replace("X-API-Key: KEY", f"X-API-Key: {key}"), tmp_path)
        assert answer["model_name"] == "bolt"


# ---- what cannot be learned ---------------------------------------------------------------------


def test_a_folder_that_is_called_good_takes_the_name_of_the_one_around_it(tmp_path: Path) -> None:
    for place, name in (("bolt/good", "bolt"), ("bolt/Train", "bolt"), ("bolt/left", "left")):
        (tmp_path / place).mkdir(parents=True)
        assert _asked(vars(parse([str(tmp_path / place)]))).name == name


def test_a_servers_folder_that_cannot_be_written_is_said_before_it_learns(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("workers.learn.os.access", lambda *_: False)
    assert main([str(good), "--server", "http://127.0.0.1:9", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: A server runs with the data folder {tmp_path}, which cannot")
    assert said.count("\n") == 1


def test_too_few_pictures_are_counted(good: Path, tmp_path: Path) -> None:
    for path in sorted(good.iterdir())[3:]:
        path.unlink()
    said = refused(learn(tmp_path, good))
    assert "has 3 different pictures, and it takes 4" in said


def test_copies_count_once(good: Path, tmp_path: Path, typed: Typed) -> None:
    first, *others = sorted(good.iterdir())
    for path in others[2:]:
        path.write_bytes(first.read_bytes())
    done = typed(good)
    assert "has 3 different pictures" in refused(done)


def test_broken_pictures_are_named(good: Path, tmp_path: Path, typed: Typed) -> None:
    for name in ("0001.png", "0002.png"):
        (good / name).write_bytes((good / name).read_bytes()[:500])
    said = refused(typed(good))
    assert "0001.png" in said
    assert "2 of 6 pictures cannot be read" in said


def test_what_is_not_there_is_named(good: Path, tmp_path: Path, typed: Typed) -> None:
    assert "nowhere is no folder: FOLDER names" in refused(typed("nowhere"))
    file = good / "0000.png"
    assert "is no folder: --defects names" in refused(typed(good, "--defects", file))
    assert "is no folder: --good names" in refused(typed(good, "--good", "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "/empty holds no images" in refused(typed("empty"))
    (tmp_path / "!!!").mkdir()
    assert "!!! no name for a model can be made" in refused(typed("!!!"))
    assert "is no name for a model" in refused(typed(good, "--name", "a/b"))
    assert not (tmp_path / "models").exists(), "what is refused leaves nothing"


def test_folders_to_measure_with_hold_pictures_that_are_not_learned(
    good: Path, tmp_path: Path, typed: Typed
) -> None:
    (tmp_path / "empty").mkdir()
    for flag in ("--defects", "--good"):
        assert f"{flag} names a folder with some" in refused(typed(good, flag, "empty"))
        said = refused(typed(good, flag, good))
        assert f"{GOOD} pictures to measure with are among those of" in said


def test_what_a_command_is_told_to_do_it_has_a_flag_for(
    good: Path, tmp_path: Path, typed: Typed
) -> None:
    said = refused(typed(good, "--pretrained_pth", "gone.pth"))
    assert "gone.pth does not exist" in said
    for path in good.iterdir():  # as of a camera of 12 bits
        Image.fromarray(np.full((64, 64), 4000, np.uint16)).save(path)
        path.write_bytes(path.read_bytes() + path.name.encode())  # no two of them the same
    assert "--bit_depth" in typed(good).stderr.splitlines()[-1]
    assert parse([str(good), "--bit_depth", "12"]).bit_depth == 12


@pytest.mark.parametrize(
    "name", ["a b.png", "a;b,\"c'\\.png", os.fsdecode("検表'.png".encode("cp932"))]
)
def test_the_printed_line_names_the_picture_whatever_it_is_called(
    name: str, tmp_path: Path
) -> None:
    if shutil.which("bash") is None or shutil.which("curl") is None:
        pytest.skip("needs bash and curl")
    (tmp_path / name).write_bytes(b"the picture")
    request = Learn(tmp_path, "bolt", tmp_path)
    line = printable(_curl(request, "http://127.0.0.1:9", tmp_path / name))
    done = subprocess.run(
        ["bash", "-c", line.replace("curl ", "curl --noproxy '*' ")], check=False, timeout=60
    )
    cannot_connect, cannot_read = 7, 26
    assert done.returncode == cannot_connect != cannot_read, line


def test_what_stands_in_the_way_of_its_links_is_left_alone(
    good: Path, tmp_path: Path, typed: Typed
) -> None:
    mine = tmp_path / "models" / "bolt" / "data" / "train" / "bolt" / "mine.png"
    mine.parent.mkdir(parents=True)
    mine.touch()
    done = typed(good, "--name", "bolt")
    assert done.returncode == 2
    assert "is in the way" in done.stderr
    assert "2/5" not in done.stderr
    assert mine.exists()


def test_where_only_serving_is_installed_it_says_what_learning_takes(
    good: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("workers.learn.find_spec", lambda _: None)
    assert main([str(good)]) == 2
    assert "pip install 'kensa[train]'" in capsys.readouterr().err
