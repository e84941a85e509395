"""Names that are not UTF-8 are written escaped: no file, no JSON and no terminal refuses them."""

from __future__ import annotations

import io
import json
import os
import sys

import pytest

from engines.files import json_text, print_anything, printable

WINDOWS = os.fsdecode("検査.png".encode("cp932"))


def test_bytes_that_are_no_utf_8_are_written_as_such() -> None:
    assert printable("検査 α.png") == "検査 α.png"
    assert printable(WINDOWS) == r"\x8c\x9f\x8d\xb8.png"
    assert printable("half \ud800") == r"half \ud800"


def test_json_of_any_names_is_read_back_as_what_was_shown() -> None:
    content = {WINDOWS: ["検査", WINDOWS, 'a"\\b'], "n": 1.5, "none": None}
    text = json_text(content)
    assert text.encode()
    shown = printable(WINDOWS)
    assert json.loads(text) == {shown: ["検査", shown, 'a"\\b'], "n": 1.5, "none": None}


def test_a_terminal_that_lacks_letters_shows_them_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    print_anything()
    print(f"検査 {WINDOWS}")
    sys.stdout.flush()
    assert raw.getvalue() == rb"\u691c\u67fb \udc8c\udc9f\udc8d\udcb8.png" + b"\n"
