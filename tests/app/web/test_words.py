"""Claims about the words of the screen: none is missing in a language, and none is left over."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any, get_args

from app.routes.web import FOLDER
from engines import errors
from engines.camera import Code


@cache
def words() -> dict[str, dict[str, list[str]]]:
    """All of words.js, as the file itself has it."""
    source = (FOLDER / "words.js").read_text()
    body = source.partition("const WORDS = ")[2].partition("\n};")[0] + "\n}"
    return _object(body)


def _object(body: str) -> Any:
    """A literal of names, strings in single quotes and lists, as JSON knows them."""
    without_comments = re.sub(r"^\s*//.*$", "", body, flags=re.MULTILINE)
    strings: list[str] = []

    def keep(found: re.Match[str]) -> str:
        strings.append(found[0][1:-1].replace("\\'", "'").replace('\\"', '"'))
        return f'"{len(strings) - 1}"'

    text = re.sub(r"'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\"", keep, without_comments)
    text = re.sub(r"(\w+):", r'"name \1":', text)
    found = json.loads(re.sub(r",(\s*[}\]])", r"\1", text))
    return {
        section.removeprefix("name "): {
            name.removeprefix("name "): [strings[int(one)] for one in both]
            for name, both in entries.items()
        }
        for section, entries in found.items()
    }


def every_word() -> list[tuple[str, list[str]]]:
    return [
        (f"{section}.{name}", both)
        for section, entries in words().items()
        for name, both in entries.items()
    ]


def test_every_word_is_there_in_both_languages() -> None:
    wrong = [name for name, both in every_word() if len(both) != 2 or not all(map(str.strip, both))]
    assert not wrong


def test_what_is_put_into_a_sentence_is_put_into_its_translation() -> None:
    def places(text: str) -> set[str]:
        return set(re.findall(r"\{(\w+)\}", text))

    assert not [name for name, (one, other) in every_word() if places(one) != places(other)]


def used() -> tuple[set[str], set[str]]:
    """The words that the code names, and the beginnings of those that it puts together."""
    whole, begun = set(), set()
    for path in FOLDER.rglob("*.js"):
        if "lib" in path.parts or path.name == "words.js":
            continue
        source = path.read_text()
        whole |= set(re.findall(r"'([a-z_]+\.[a-z_0-9]+)'", source))
        begun |= set(re.findall(r"`([a-z_]+\.[a-z_0-9]*)\$\{", source))
    return whole, begun


def test_every_word_that_is_shown_exists() -> None:
    known = {name for name, _ in every_word()}
    asked = {
        found
        for path in FOLDER.rglob("*.js")
        if "lib" not in path.parts
        for found in re.findall(r"\bt\(\s*'([\w.]+)'", path.read_text())
    }
    assert not asked - known
    _, begun = used()
    assert not [one for one in begun if not any(name.startswith(one) for name in known)]


def test_no_word_is_left_over() -> None:
    whole, begun = used()
    known = [name for name, _ in every_word()]
    assert not [n for n in known if n not in whole and not n.startswith(tuple(begun))]


def test_every_error_has_words() -> None:
    codes = {
        one.code
        for one in vars(errors).values()
        if isinstance(one, type) and issubclass(one, errors.KensaError)
    }
    assert not (codes | set(get_args(Code))) - set(words()["codes"])
