"""The files for a Jetson name only what there is: image, compose file, unit, script, page."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from setuptools import find_packages

import convtrt
from app.__main__ import main
from app.main import create_app
from app.settings import Settings, table
from engines.errors import EXIT_CODE
from engines.runtimes.cuda import LOST_EXIT_CODE
from support.containers import (
    COMPOSE,
    DOCKER,
    DOCKERFILE,
    PROJECT,
    environment,
    filled,
    health_check,
    instructions,
    of,
)
from support.project import ROOT, run

PAGE = ROOT / "docs" / "jetson.md"
UNIT = DOCKER / "kensa.service"
SCRIPT = DOCKER / "bundle.sh"
SERVICE = COMPOSE["services"]["kensa"]
SETTINGS = {name for name, *_ in table()}
ANCESTORS = {
    "serve": ("base", "source", "packages"),
    "full": ("base", "source", "packages", "packages-full"),
}
TOOLS = Path(sys.executable).parent


def tool(name: str) -> str:
    """A linter that pyproject's dev packages bring."""
    found = shutil.which(name, path=f"{TOOLS}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed: pip install '.[dev]'")
    return found


# The image


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    run(tool("hadolint"), DOCKERFILE)


def test_every_file_that_is_copied_exists_and_the_context_holds_no_other() -> None:
    copied = [one for rest in of("COPY") for one in rest.split()[:-1]
              if not rest.startswith("--from=")]  # fmt: skip
    assert len(copied) > 10
    assert not [one for one in copied if not (ROOT / one).exists()]
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    assert {line[1:] for line in lines if line.startswith("!")} == set(copied)


def test_each_stage_copies_from_one_that_is_there() -> None:
    stages = [stage for stage, word, _ in instructions() if word == "FROM"]
    sources = re.findall(r"--from=(\S+)", "\n".join(of("COPY")))
    bases = [rest.split()[0] for rest in of("FROM")]
    assert {*sources} | {base for base in bases if not base.startswith("$")} <= {*stages}
    for target, before in ANCESTORS.items():
        assert [stages.index(one) for one in before] < [stages.index(target)] * len(before)


def test_the_builder_of_older_dockers_can_build_it() -> None:
    text = DOCKERFILE.read_text()
    assert not re.search(r"^# syntax|--mount|--chmod|--chown|--link|<<", text, re.M)


def test_what_a_build_imports_is_never_tensorrt_or_pycuda() -> None:
    """Their libraries come with the nvidia runtime, when a container starts."""
    assert not re.search(r"import (tensorrt|pycuda)", "\n".join(of("RUN")))


def test_the_image_that_serves_has_no_torch_and_the_full_one_has() -> None:
    def installs(target: str) -> str:
        return "\n".join(of("RUN", *ANCESTORS[target], target))

    assert "torch" not in installs("serve")
    assert "train" not in installs("serve")
    assert ".[jetson]" in installs("serve")
    assert ".[jetson,train]" in installs("full")
    assert {"jetson", "train"} <= PROJECT["project"]["optional-dependencies"].keys()


def test_every_folder_of_ours_is_a_package_and_pyproject_finds_nothing_else() -> None:
    found = PROJECT["tool"]["setuptools"]["packages"]["find"]
    ours = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in ("app", "engines", "kensa_client", "workers")
        for path in (ROOT / package).rglob("*.py")
    }
    assert len(ours) > 15
    assert set(find_packages(str(ROOT), **found)) == ours


def test_the_image_s_user_is_nobody_in_particular_and_owns_just_the_volumes() -> None:
    users = {rest for target in ANCESTORS for rest in of("USER", target)}
    assert users == {"10001:10001"} == {SERVICE["user"]}
    volumes = json.loads(*of("VOLUME"))
    assert f"chown kensa:kensa {' '.join(volumes)}" in "\n".join(of("RUN", "base"))
    assert "--uid 10001" in "\n".join(of("RUN", "base"))
    variables = environment("base")
    assert volumes == [variables["KENSA_DATA_DIR"], variables["KENSA_CACHE_DIR"]]
    assert variables["HOME"] in volumes
    assert Path(variables["CUDA_CACHE_PATH"]).parent == Path(variables["KENSA_CACHE_DIR"])


def test_the_image_starts_the_server_and_stops_it_as_it_wants_to_be_stopped() -> None:
    (command,) = [json.loads(rest) for rest in of("CMD")]
    (entry,) = [json.loads(rest) for rest in of("ENTRYPOINT")]
    assert command[0] in PROJECT["project"]["scripts"]
    assert entry == ["tini", "--"]
    assert " tini " in "\n".join(of("RUN", "base"))
    assert of("STOPSIGNAL") == ["SIGTERM"]
    assert of("EXPOSE") == [str(Settings().port)]


def test_the_health_check_asks_for_a_route_that_wants_no_key() -> None:
    (path,) = re.findall(r"'GET', '([^']+)'", health_check()[-1])
    paths = create_app(Settings(data_dir=Path("/nowhere"))).openapi()["paths"]
    assert "security" not in paths[path]["get"]
    assert str(Settings().port) in health_check()[-1]


def test_every_variable_is_a_setting_everywhere() -> None:
    for file in (DOCKERFILE, DOCKER / "compose.yaml", UNIT, SCRIPT, PAGE):
        named = set(re.findall(r"KENSA_[A-Z_]+", file.read_text()))
        assert named <= SETTINGS, file
    assert environment("base")["KENSA_HOST"] == "0.0.0.0"
    assert environment("base")["KENSA_ACCESS"] == "keys"


# The compose file


def test_the_compose_file_names_only_what_there_is() -> None:
    text = (DOCKER / "compose.yaml").read_text()
    head = text.split("\n\nservices:")[0]
    assert set(re.findall(r"\$\{(\w+)", text)) == set(re.findall(r"#   ([A-Z_]+)=", head))
    built = SERVICE["build"]
    assert (DOCKER / built["context"] / built["dockerfile"]).samefile(DOCKERFILE)
    assert set(re.findall(r"compose -f (\S+)", head)) == {"docker/compose.yaml"}
    for target in ANCESTORS:
        chosen = yaml.safe_load(filled(text, RENDER_GID="104", TARGET=target))["services"]["kensa"]
        assert (chosen["build"]["target"], chosen["image"]) == (target, f"kensa:{target}")


def test_the_container_may_do_no_more_than_it_must() -> None:
    assert SERVICE["runtime"] == "nvidia"
    assert SERVICE["read_only"] is True
    assert SERVICE["cap_drop"] == ["ALL"]
    assert SERVICE["security_opt"] == ["no-new-privileges:true"]
    assert SERVICE["group_add"] == ["video", "104"]
    assert SERVICE["restart"] == "unless-stopped"
    assert not {"privileged", "cap_add", "devices", "ports"} & SERVICE.keys()
    writable = {one.split(":")[0]: one.split(":")[1] for one in SERVICE["volumes"]
                if isinstance(one, str) and not one.endswith(":ro")}  # fmt: skip
    assert list(writable.values()) == json.loads(*of("VOLUME"))
    assert writable.keys() == COMPOSE["volumes"].keys()
    assert [one.split(":")[0] for one in SERVICE["tmpfs"]] == ["/tmp"]
    assert not [one for one in SERVICE["volumes"] if isinstance(one, dict) and not one["read_only"]]


def test_whoever_stops_it_waits_longer_than_the_server_takes() -> None:
    grace = Settings().shutdown_grace_s
    assert int(SERVICE["stop_grace_period"].rstrip("s")) > grace + 2
    assert int(unit()["TimeoutStopSec"][0]) > grace + 2


# The unit


def unit() -> dict[str, list[str]]:
    lines = [line.partition("=") for line in UNIT.read_text().splitlines()
             if "=" in line and not line.startswith("#")]  # fmt: skip
    return {name: [value for other, _, value in lines if other == name] for name, _, _ in lines}


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    analyse = shutil.which("systemd-analyze")
    if analyse is None:
        pytest.skip("systemd-analyze is not installed")
    copy = tmp_path / UNIT.name  # it looks whether the command is there
    copy.write_text(re.sub("^ExecStart=.*", "ExecStart=/bin/true", UNIT.read_text(), flags=re.M))
    done = subprocess.run([analyse, "verify", copy], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert not said
    assert done.returncode == 0, done.stderr


def test_the_unit_starts_kensa_again_unless_that_is_no_use() -> None:
    (command,) = unit()["ExecStart"]
    assert Path(command).name in PROJECT["project"]["scripts"]
    assert unit()["Restart"] == ["on-failure"]
    assert unit()["RestartPreventExitStatus"] == [str(EXIT_CODE)]
    assert LOST_EXIT_CODE != EXIT_CODE
    assert f"# {LOST_EXIT_CODE} after the GPU failed" in UNIT.read_text()


def test_the_unit_hides_no_gpu_and_gives_the_folders_that_it_names() -> None:
    assert not unit().keys() & {
        "PrivateDevices", "ProtectClock", "DevicePolicy", "DeviceAllow", "MemoryDenyWriteExecute",
    }  # fmt: skip
    assert unit()["SupplementaryGroups"] == ["video render"]
    variables = dict(one.split("=") for line in unit()["Environment"] for one in line.split())
    assert variables["KENSA_DATA_DIR"] == f"/var/lib/{unit()['StateDirectory'][0]}"
    assert variables["KENSA_CACHE_DIR"] == f"/var/cache/{unit()['CacheDirectory'][0]}"
    assert "nvpmodel.service" in unit()["After"][0]
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        page = (ROOT / "docs" / "settings.md").read_text()
        assert f"{name}={variables[name]}" in page
        assert environment("base")[name] == variables[name]


# The script


def test_shellcheck_finds_nothing_in_the_scripts() -> None:
    run(tool("shellcheck"), *SCRIPT.parent.glob("*.sh"))


def wheel(folder: Path, name: str, tag: str = "py3-none-any", version: str = "1") -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as file:
        file.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        file.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}\n")
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """What an index has: wheels for this machine, for a Jetson, and for both."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in ("plain", "older", "newer", "intel", "wheel"):
        wheel(folder, name)
    wheel(folder, "setuptools", version="99")
    for tag in ("cp310-cp310-manylinux_2_31_aarch64", "cp311-cp311-manylinux_2_31_x86_64",
                "cp312-cp312-manylinux_2_39_aarch64"):  # fmt: skip
        wheel(folder, "native", tag)
    return folder


def bundle(index: Path, *arguments: str, **variables: str) -> set[str]:
    """Run a copy of the script beside a project of its own; the names of what it gathered."""
    project = index.parent / "project"
    (project / "docker").mkdir(parents=True, exist_ok=True)
    shutil.copy(SCRIPT, project / "docker")
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "kensa"\nversion = "1"\ndependencies = ["plain", "native",\n'
        "\"older; python_version < '3.11'\", \"newer; python_version >= '3.11'\",\n"
        "\"intel; platform_machine == 'x86_64'\"]\n"
        "[project.optional-dependencies]\njetson = []\n[tool.setuptools]\npy-modules = []\n"
    )
    tool("uv")
    run(
        "bash", project / "docker" / SCRIPT.name, *arguments, cwd=index.parent,
        PIP_NO_INDEX="1", PIP_FIND_LINKS=str(index), PIP_NO_BUILD_ISOLATION="0",
        PIP_CONFIG_FILE=os.devnull, UV_NO_INDEX="1", UV_FIND_LINKS=str(index), **variables,
    )  # fmt: skip
    return {path.name for path in (index.parent / arguments[0]).iterdir()}


def test_the_script_gathers_what_the_jetson_needs_and_not_what_this_machine_would(
    index: Path,
) -> None:
    always = {"kensa-1-py3-none-any.whl", "requirements.txt", "plain-1-py3-none-any.whl",
              "setuptools-99-py3-none-any.whl", "wheel-1-py3-none-any.whl"}  # fmt: skip
    assert bundle(index, "gathered") == always | {
        "older-1-py3-none-any.whl", "native-1-cp310-cp310-manylinux_2_31_aarch64.whl",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("script", "said"),
    [("bundle.sh", "docker/bundle.sh FOLDER train"), ("check_gpu.sh", "check_gpu.sh run FOLDER")],
)
def test_the_scripts_say_how_they_are_used(script: str, said: str) -> None:
    done = run("bash", SCRIPT.with_name(script), check=False)
    assert done.returncode == 2
    assert said in done.stdout


def test_the_trial_of_a_gpu_says_what_is_missing_before_it_takes_time(tmp_path: Path) -> None:
    script, bare = SCRIPT.with_name("check_gpu.sh"), tmp_path / "python3"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    done = run("bash", script, "gather", tmp_path / "a", check=False, PYTHON=str(bare))
    assert done.returncode == 2
    assert done.stderr.endswith("activate an environment with the extra train\n")
    assert not (tmp_path / "a").exists()
    done = run("bash", script, "run", tmp_path / "a", tmp_path / "b" / "gpu.json", check=False)
    assert done.returncode == 2
    assert done.stderr.endswith("a holds no wheels: make it with docker/check_gpu.sh gather\n")
    assert not (tmp_path / "b").exists()


# The page


def blocks() -> list[str]:
    return re.findall(r"^```\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


def commands(start: str) -> list[str]:
    """The commands of the page that hold a word, with continued lines joined."""
    lines = re.sub(r"\\\n\s*", "", "\n".join(blocks())).splitlines()
    return [line.split("#")[0].strip() for line in lines if re.search(rf"(^|[/ ]){start}", line)]


def test_the_page_calls_kensa_only_in_ways_that_it_knows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = re.findall(r"kensa (doctor|keys)(?: (\w+))?", "\n".join(blocks()))
    assert {*called} == {("doctor", ""), ("keys", "add")}
    for word, what in {*called}:
        monkeypatch.setattr(sys, "argv", ["kensa", word, *filter(None, [what]), "--help"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        assert f"usage: kensa {word}" in capsys.readouterr().out


def test_the_page_gives_convtrt_flags_that_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        convtrt.parse(["--help"])
    has = {*re.findall(r"--\w+", capsys.readouterr().out)}
    called = [one.split("convtrt.py")[1] for one in commands("convtrt.py ")]
    assert len(called) == 2
    assert not {flag for one in called for flag in re.findall(r"--\w+", one)} - has


def test_the_page_names_files_arguments_and_targets_that_there_are() -> None:
    text = PAGE.read_text()
    files = set(re.findall(r"\b(?:docker|tests)/[\w.]+", text)) - {"docker/.env"}
    assert len(files) >= 5
    assert not [one for one in files if not (ROOT / one).exists()]
    arguments = {rest.split("=")[0] for rest in of("ARG")}
    assert set(re.findall(r"--build-arg '?(\w+)=", text)) <= arguments
    assert set(re.findall(r"--target (\w+)", text)) <= ANCESTORS.keys()
    assert set(
        re.findall(r"compose\.yaml (?:run --rm |up -d |logs -f )(?:-v \S+ )?(\w+)", text)
    ) == {"kensa"}
    variables = set(re.findall(r"(JETSON_\w+)=", text))
    assert len(variables) == 2
    assert not [one for one in variables if f"${{{one}:-" not in SCRIPT.read_text()]
    assert set(re.findall(r"\.\[([\w,]+)\]", text)) == {"jetson", "jetson,train", "train"}
    kept = set(re.findall(r"^echo [\"'](\w+)=", "\n".join(blocks()), re.M)) - SETTINGS
    assert kept == {"RENDER_GID"} | (
        kept & set(re.findall(r"#   ([A-Z_]+)=", (DOCKER / "compose.yaml").read_text()))
    )


# What a user meets

LONGEST = 500  # characters of a sentence; docstrings are longer


def sentences() -> Iterator[str]:
    """Every text in the code but long ones, with a NUL where something is put in."""
    for folder in ("app", "engines", "workers"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                text = ""
                if isinstance(node, ast.JoinedStr):
                    text = "".join(
                        str(part.value) if isinstance(part, ast.Constant) else "\0"
                        for part in node.values
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    text = node.value
                if " " in text and len(text) < LONGEST:
                    yield text


def is_said(quoted: str, code: str) -> bool:
    """Whether the code says it: `…` stands for what is put in, or for more of the text."""
    pieces = (re.escape(piece) for piece in quoted.replace("”", "").split("…"))
    return re.fullmatch(".*".join(pieces), code, re.S) is not None


def test_every_sentence_of_the_table_is_one_of_the_code() -> None:
    said = set(sentences())
    quoted = re.findall(r"^\| “(.+?)” \|", PAGE.read_text(), re.M)
    assert len(quoted) >= 14
    assert not [one for one in quoted if not any(is_said(one, code) for code in said)]


def test_a_sentence_that_the_code_does_not_say_would_be_found() -> None:
    assert is_said("It needs …, and …: …", "It needs \0 MiB, and \0 are free: stop.")
    assert not is_said("It needs …, and …: …", "It wants \0 MiB, and \0 are free: stop.")
    assert not is_said("The end.", "The end. No.")
