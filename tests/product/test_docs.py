"""The documentation names all there is, and nothing that there is not."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from app.settings import table
from engines.image import SUFFIXES
from engines.meta import Meta
from support.project import ROOT, run

PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md")])
COMMANDS = (ROOT / "docs" / "commands.md").read_text()


def blocks(page: Path) -> list[str]:
    """The indented or fenced code of a page."""
    return re.findall(r"^```\n(.*?)^```$", page.read_text(), re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_heading_leads_to_one(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text())
    missing = [
        f"{file}#{name}"
        for file, name in links
        if name not in anchors(page.parent / file if file else page)
    ]
    assert not missing


def test_every_ending_of_a_name_that_is_read_is_documented() -> None:
    (line,) = (one for one in (ROOT / "docs" / "http.md").read_text().splitlines()
               if one.startswith("A **name** is kept"))  # fmt: skip
    assert {*re.findall(r"`(\.\w+)`", line)} == SUFFIXES


def words_of(command: str) -> list[str | Path]:
    """How a command of the documentation is run here."""
    if command.startswith("kensa "):
        return [sys.executable, "-m", "app", *command.split()[1:]]
    return [sys.executable, *command.split()[1:]] if " " in command else [ROOT / command]


@pytest.mark.parametrize(
    "command",
    ["retrain.py", "convtrt.py", "evaluate.py", "tune.py", "import_anomalib.py", "bin/patchcore",
     "python -m workers.distil", "kensa learn", "kensa threshold"],
)  # fmt: skip
def test_every_flag_of_a_command_is_documented_and_every_documented_one_exists(
    command: str,
) -> None:
    options = run(*words_of(command), "--help").stdout.split("options:")[1]
    has = set(re.findall(r"(?<![\w-])--\w+", options)) - {"--help"}
    part = COMMANDS.split(f"## {command}\n")[1].split("\n## ")[0]
    assert has == set(re.findall(r"(?<![\w-])--\w+", part.split("| flag |")[1].split("\n\n")[0]))


def test_every_key_of_meta_json_is_documented() -> None:
    table = COMMANDS.split("### meta.json")[1].split("\n## ")[0]
    missing = [key for key in Meta.model_fields if f"`{key}`" not in table]
    assert not missing


def test_every_make_target_is_documented_and_every_documented_one_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"`make (\w+)", COMMANDS))
    assert named == targets


def test_the_japanese_readme_shows_the_same_commands_as_the_english_one() -> None:
    def commands(name: str) -> list[str]:
        text = "\n".join(blocks(ROOT / name))
        first = r"make|source|kensa|python3|curl|KENSA_\w+="
        return re.findall(rf"^(?:\$ )?((?:{first})[^#\n]*[^#\s])", text, re.M)

    assert commands("README.ja.md") == commands("README.md")
    assert len(commands("README.md")) >= 13


def test_the_readmes_name_the_same_pages() -> None:
    pages = [set(re.findall(r"docs/[\w-]+\.md", (ROOT / name).read_text()))
             for name in ("README.md", "README.ja.md")]  # fmt: skip
    assert pages[0] == pages[1] == {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}


def test_the_licence_is_apache_2_and_pyproject_says_so() -> None:
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()


def test_every_variable_for_several_machines_is_a_setting() -> None:
    settings = {name for name, *_ in table()}
    for page in ("operations.md", "compose.yaml"):
        named = set(re.findall(r"KENSA_[A-Z_]+", (ROOT / "docs" / page).read_text()))
        assert len(named) > 3
        assert named <= settings


def test_the_compose_file_names_only_what_there_is() -> None:
    text = (ROOT / "docs" / "compose.yaml").read_text()
    head, compose = text.split("\n\n")[0], yaml.safe_load(text)
    scripts = (ROOT / "pyproject.toml").read_text().split("[project.scripts]\n")[1]
    assert set(re.findall(r"--profile (\w+)", head)) == set(compose["services"])
    assert set(re.findall(r"\$\{(\w+)\}", text)) == set(re.findall(r"#   ([A-Z_]+)=", head))
    for name, service in compose["services"].items():
        assert service["profiles"] == [name]
        places = dict(one.split(":") for one in service["volumes"])
        assert places.keys() <= compose["volumes"].keys()
        if name == "queue":
            continue
        command = service["command"].split()
        if command[0] == "python":
            options = run(sys.executable, *command[1:3], "--help").stdout
            assert set(re.findall(r"--\w+", " ".join(command[3:]))) <= {
                *re.findall(r"--\w+", options)
            }
        else:
            assert f"{command[0]} = " in scripts
        assert service["environment"]["KENSA_DATA_DIR"] in places.values()
        assert service["environment"]["KENSA_SHARED_URL"] in places.values()
        made = service["build"]["dockerfile_inline"]
        assert all(place in made for place in places.values())
        assert "[train]" in made


def test_every_file_of_ours_that_a_page_names_is_there() -> None:
    named = {
        (page.name, path)
        for page in PAGES
        for path in re.findall(
            r"(?<![\w./-])((?:app|engines|workers|tests|benchmarks|docker)/[\w./-]*\w/?)",
            page.read_text(encoding="utf-8"),
        )
    }
    assert len(named) > 30
    own = {"docker/.env"}  # which whoever deploys it writes
    missing = {(page, path) for page, path in named if not (ROOT / path).exists()}
    assert {path for _, path in missing} <= own, sorted(missing)
