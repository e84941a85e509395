"""Claims about the house itself: what may import what, and what may not stand in it."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from engines import errors
from engines.errors import KensaError
from support.project import ROOT

# The floors of each package, the lowest first. What stands on one may import what lies below it and
# what is in its own room; never what is beside it or above.
FLOORS: dict[str, tuple[tuple[str, ...], ...]] = {
    "engines": (
        ("errors", "files", "logs"), ("image_files", "missing_packages", "nvidia", "page"),
        ("camera", "histogram", "image", "meta"), ("verdict", "regions"), ("limits",),
        ("promise",), ("store",), ("queue",), ("machine",), ("runtimes",),
        ("serving", "inference_command", "threshold_command"),
    ),
    "workers": (
        ("progress",), ("commands",), ("models", "sample_parts"), ("distil", "learning"),
        ("converting",), ("evaluation", "importing", "jobs"), ("demo", "learn"),
    ),
    "app": (
        ("settings", "background"), ("jobs",), ("serving",), ("decisions",), ("watching",),
        ("http",), ("open_inference",), ("routes",), ("main",), ("__main__",),
    ),
}  # fmt: skip
TRAINING = {"torch", "torchvision", "anomalib", "timm", "lightning", "onnx", "sklearn"}
# Where somebody works on it, not where it runs: /work and the homes of people.
SOMEBODYS_PATH = re.compile(r"(?<![\w.:/-])/(?:work|home/\w+|Users/\w+)/")
LARGEST = 512 * 1024  # bytes of a file
BRANCH = re.compile(r"^((?:│   )*)(?:├── |└── )(\w+) +(\d{3})  \S", re.MULTILINE)


def modules(package: str) -> list[str]:
    """The dotted names of all modules of a package, by its files."""
    paths = sorted((ROOT / package).rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return [name.removesuffix(".__init__") for name in names]


def imported(path: Path) -> Iterator[str]:
    """The dotted names that a file imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where an arrow goes"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(path: Path) -> set[str]:
    """The top-level packages of these."""
    return {name.split(".")[0] for name in imported(path)}


def arrows() -> dict[str, set[str]]:
    """Each module of ours, and those of ours that it imports."""
    found = {module: path for package in FLOORS for module, path in zip(
        modules(package), files(package), strict=True)}  # fmt: skip

    def ours(name: str) -> str | None:
        """The module that a dotted name is, or is a name in."""
        return next((one for one in (name, name.rpartition(".")[0]) if one in found), None)

    return {
        module: {to for name in imported(path) if (to := ours(name)) not in (None, module)}
        for module, path in found.items()
    }


def against_the_order(known: dict[str, set[str]], package: str) -> list[str]:
    """The arrows of a package that lead to a room beside or above the one they come from."""
    height = {room: number for number, floor in enumerate(FLOORS[package]) for room in floor}

    def room(module: str) -> str:
        return module.split(".")[1]

    return [
        f"{module} -> {to}"
        for module, targets in sorted(known.items())
        for to in sorted(targets)
        if {module.split(".")[0], to.split(".")[0]} == {package} and "." in module and "." in to
        if room(module) != room(to) and height[room(to)] >= height[room(module)]
    ]


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# Arrows


def test_the_server_and_its_engines_never_load_what_only_training_needs_and_never_fork() -> None:
    """In a process of its own, because the tests themselves import torch.

    OpenVINO would fork, and tell others that it is used, unless it is kept from that.
    """
    wanted = modules("app") + modules("engines")
    assert {
        "app.main",
        "app.__main__",
        "engines.inference_command",
        "engines.runtimes.openvino",
    } <= {*wanted}
    program = (
        "import importlib, os, sys\n"
        "os.register_at_fork(before=lambda: print('forked'))\n"
        f"for name in {wanted}: importlib.import_module(name)\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"app", "engines", "openvino", "numpy"} <= loaded
    assert not loaded & (TRAINING | {"workers", "forked"})


@pytest.mark.parametrize("path", files("app") + files("engines"), ids=name)
def test_no_import_of_training_stands_in_what_serves(path: Path) -> None:
    """Not even inside a function that the test above does not call."""
    assert not set(imports(path)) & TRAINING


def test_every_room_has_its_floor() -> None:
    for package, floors in FLOORS.items():
        there = {
            path.stem
            for path in (ROOT / package).iterdir()
            if (path.suffix == ".py" or (path / "__init__.py").exists()) and path.stem != "__init__"
        }
        assert there == {room for floor in floors for room in floor}


@pytest.mark.parametrize("package", FLOORS)
def test_arrows_between_rooms_lead_down(package: str) -> None:
    assert not against_the_order(arrows(), package)


@pytest.mark.parametrize("package", FLOORS)
def test_the_first_screen_of_the_architecture_shows_the_rooms_from_the_top_down(
    package: str,
) -> None:
    screen = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```")[1]
    assert len(screen.splitlines()) < 45
    own = screen.split(f"\n{package}/", 1)[1].split("\nworkers/")[0].split("\nengines/")[0]
    shown = re.findall(r"^  ((?:\w+/?(?:, )?)+)", own.split("\ntests/")[0], re.MULTILINE)
    rooms = [room.strip("/") for names in shown for room in names.split(", ")]
    height = {room: number for number, floor in enumerate(FLOORS[package]) for room in floor}
    assert set(rooms) == set(height)
    heights = [height[room] for room in rooms]
    assert heights == sorted(heights, reverse=True)


def test_an_arrow_that_leads_up_or_aside_would_be_found() -> None:
    up = {"engines.store.bundle": {"engines.serving.resident", "engines.files"}}
    assert against_the_order(up, "engines") == ["engines.store.bundle -> engines.serving.resident"]
    aside = {"workers.models.padim": {"workers.sample_parts.drawing", "workers.models.backbone"}}
    assert len(against_the_order(aside, "workers")) == 1


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Not even inside functions, or for types alone."""
    known = arrows()
    assert sum(map(len, known.values())) > 200
    TopologicalSorter(known).prepare()  # raises CycleError, which names the circle
    with pytest.raises(CycleError):
        TopologicalSorter({**known, "engines.errors": {"app.main"}}).prepare()


def test_engines_know_neither_the_server_nor_the_workers() -> None:
    known = {path: set(imports(path)) & {"app", "workers"} for path in files("engines")}
    assert len(known) > 5
    assert not any(known.values()), known


def test_workers_do_not_know_the_server() -> None:
    known = {path: set(imports(path)) & {"app"} for path in files("workers")}
    assert len(known) > 10
    assert not any(known.values()), known


def test_the_server_does_not_know_the_workers() -> None:
    known = {path: set(imports(path)) & {"workers"} for path in files("app")}
    assert len(known) > 5
    assert not any(known.values()), known


def test_the_client_knows_nobody_and_needs_only_httpx() -> None:
    """Whoever asks a server may copy its folder, and nothing else."""
    known = {name for path in files("kensa_client") for name in imports(path)}
    assert known - sys.stdlib_module_names == {"httpx", "kensa_client"}


def test_nobody_here_knows_the_client() -> None:
    known = {path: set(imports(path)) & {"kensa_client"} for package in FLOORS
             for path in files(package)}  # fmt: skip
    assert not any(known.values()), known


def test_only_one_runtime_knows_openvino_and_only_its_files_import_it() -> None:
    serving = files("app") + files("engines")
    users = [path for path in serving if "openvino" in set(imports(path))]
    its_files = ["openvino.py", "openvino_int8.py", "openvino_lighter.py"]
    assert [path.name for path in users] == its_files


# Paths


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_tracked_file_names_a_path_of_this_machine() -> None:
    found = []
    for path in tracked():
        text = path.read_bytes().decode("utf-8", "replace")
        paths = {str(ROOT), sys.prefix} if len(ROOT.parts) > 2 else {sys.prefix}
        if SOMEBODYS_PATH.search(text) or any(f"{name}/" in text for name in paths):
            found.append(str(path.relative_to(ROOT)))
    assert not found


def test_no_large_file_is_tracked() -> None:
    """Such as a compiled network, or weights, that somebody left in the tree."""
    assert [path for path in tracked() if path.stat().st_size > LARGEST] == []


@pytest.mark.parametrize("where", ["", " ", '"', "=", "("])
def test_a_path_of_somebody_would_be_found(where: str) -> None:
    for home in ("work", "home/taro", "Users/hanako"):
        assert SOMEBODYS_PATH.search(f"{where}/{home}/kensa")


# The error tree


def drawn() -> dict[str, tuple[str, int]]:
    """Name -> parent and status, as the docstring of errors.py draws them."""
    tree: dict[str, tuple[str, int]] = {}
    line = ["KensaError"]
    for branch in BRANCH.finditer(errors.__doc__ or ""):
        bars, name, status = branch.groups()
        depth = len(bars) // len("│   ") + 1
        tree[name] = line[depth - 1], int(status)
        line[depth:] = [name]
    return tree


def defined(base: type[KensaError] = KensaError) -> list[type[KensaError]]:
    """All errors below `base`, in every module of the server and the engines."""
    for name in modules("engines") + modules("app"):
        importlib.import_module(name)
    return [error for child in base.__subclasses__() for error in (child, *defined(child))]


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    classes = {error.__name__: (error.__mro__[1].__name__, error.status) for error in defined()}
    assert len(classes) > 10
    assert drawn() == classes


def test_every_error_has_a_code_of_its_own() -> None:
    codes = {error.__name__: vars(error).get("code") for error in [KensaError, *defined()]}
    assert None not in codes.values(), codes
    assert len(set(codes.values())) == len(codes)
    for name, code in codes.items():
        if name != "KensaError":
            words = name.replace("TensorRT", "Tensorrt")
            assert code == re.sub(r"(?<!^)(?=[A-Z])", "_", words).lower()


def test_every_error_says_what_it_means() -> None:
    for error in defined():
        assert error.__module__ == "engines.errors", "the tree stands in one file"
        assert error.__doc__
        assert 400 <= error.status <= 599


def test_the_files_that_are_begun_first_are_there() -> None:
    from conftest import LONGEST

    assert [name for name in LONGEST if not (ROOT / "tests" / name).is_file()] == []
