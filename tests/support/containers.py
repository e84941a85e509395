"""What the files in docker/ say, for the tests that hold them to it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from support.project import ROOT

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

DOCKER = ROOT / "docker"
DOCKERFILE = DOCKER / "Dockerfile.l4t"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
# What the image `serve` has, but for pycuda, which cannot be compiled here.
INSTALLED: list[str] = [
    *PROJECT["project"]["dependencies"],
    *(one for one in PROJECT["project"]["optional-dependencies"]["jetson"] if "pycuda" not in one),
]


def instructions(path: Path = DOCKERFILE) -> list[tuple[str, str, str]]:
    """Stage ("" before the first), instruction and what follows, with lines joined."""
    lines = [line for line in path.read_text().splitlines() if not re.match(r"\s*#", line)]
    found, stage = [], ""
    for line in re.sub(r"\\\n", "", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        word, _, rest = line.partition(" ")
        if word == "FROM":
            stage = rest.split()[-1]
        found.append((stage, word, rest.strip()))
    return found


def of(word: str, *stages: str) -> list[str]:
    """What follows an instruction, in all stages or in some."""
    return [
        rest
        for stage, found, rest in instructions()
        if found == word and (stage in stages or not stages)
    ]


def environment(*stages: str) -> dict[str, str]:
    """What ENV sets there."""
    pairs = [pair for rest in of("ENV", *stages) for pair in shlex.split(rest)]
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def health_check() -> list[str]:
    (rest,) = of("HEALTHCHECK")
    found: list[str] = json.loads(rest.partition(" CMD ")[2])
    return found


def filled(text: str, **variables: str) -> str:
    """A compose file with its variables in their places, as compose does it."""

    def value(found: re.Match[str]) -> str:
        name, default = found[1], found[2] or ""
        return variables.get(name) or ("" if default.startswith(":?") else default.lstrip(":-"))

    return re.sub(r"\$\{(\w+)(:[-?][^}]*)?\}", value, text)


COMPOSE: dict[str, Any] = yaml.safe_load(
    filled((DOCKER / "compose.yaml").read_text(), RENDER_GID="104")
)
JETSON = {"stop_grace_period": float(COMPOSE["services"]["kensa"]["stop_grace_period"].rstrip("s"))}
