"""Known scores are kept with the model as they are, the newest of them, and damage is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engines.errors import BadBundle
from engines.store.known_scores import MOST, MOST_LEARNED, SCORES, KnownScores


def known(scores: list[float], parts: list[int], learned: tuple[str, ...] = ()) -> KnownScores:
    return KnownScores(np.array(scores, np.float64), np.array(parts, np.int64), learned)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    before = known([1.25, 1e-7, 3.1415926], [0, 0, 1], ("0123456789abcdef", "fedcba9876543210"))
    assert before.write(tmp_path) == SCORES
    after = KnownScores.read(tmp_path)
    np.testing.assert_allclose(after.scores, before.scores, rtol=1e-6)
    assert after.parts.tolist() == [0, 0, 1]
    assert after.learned == before.learned


def test_a_folder_without_the_file_knows_none(tmp_path: Path) -> None:
    assert len(KnownScores.read(tmp_path)) == 0
    assert KnownScores.read(tmp_path).count == 0


def test_marks_without_scores_are_kept(tmp_path: Path) -> None:
    KnownScores.none(("a", "b")).write(tmp_path)
    assert KnownScores.read(tmp_path).learned == ("a", "b")


def test_later_parts_are_other_parts() -> None:
    both = known([1, 2, 3], [0, 1, 1], ("a", "b")).followed_by(known([4, 5], [0, 1], ("b", "c")))
    assert both.scores.tolist() == [1, 2, 3, 4, 5]
    assert both.parts.tolist() == [0, 1, 1, 2, 3]
    assert both.count == 4
    assert both.learned == ("a", "b", "c")


def test_nothing_may_be_followed_and_may_follow() -> None:
    some = known([1, 2], [0, 1], ("a",))
    for both in (KnownScores.none().followed_by(some), some.followed_by(KnownScores.none())):
        assert both.scores.tolist() == [1, 2]
        assert both.count == 2
        assert both.learned == ("a",)


def test_the_newest_are_kept() -> None:
    old = known([0.0] * 400, list(range(400)))
    new = known([1.0] * 300, list(range(300)))
    both = old.followed_by(new)
    assert len(both) == both.count == MOST
    assert both.scores.sum() == 300
    marks = tuple(map(str, range(MOST_LEARNED)))
    learned = known([1], [0], marks).followed_by(known([2], [0], ("new",))).learned
    assert len(learned) == MOST_LEARNED
    assert learned[-1] == "new"


def test_a_part_is_rejected_once_where_any_of_its_pictures_is() -> None:
    assert known([1, 9, 8, 2, 3], [0, 0, 0, 1, 2]).rejected(5) == 1
    assert known([1, 9, 8, 2, 3], [0, 0, 0, 1, 2]).rejected(9) == 0  # at the limit is below it


def test_files_are_told_apart_by_what_is_in_them(tmp_path: Path) -> None:
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
    marks = [KnownScores.mark(tmp_path / name) for name in "abc"]
    assert marks[0] == marks[1] != marks[2]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b"null",
        b"{}",
        b"\xff\xfe\x00",
        b'{"scores": [1], "parts": [0]}',
        b'{"scores": [1], "parts": [0, 1], "learned": [], "strange": []}',
        b'{"scores": ["a"], "parts": [0], "learned": [], "strange": []}',
        b'{"scores": [1], "parts": ["x"], "learned": [], "strange": []}',
        b'{"scores": [NaN], "parts": [0], "learned": [], "strange": []}',
        b'{"scores": [Infinity], "parts": [0], "learned": [], "strange": []}',
        b'{"scores": [[1]], "parts": [[0]], "learned": [], "strange": []}',
        b'{"scores": [[1], 2], "parts": [0, 1], "learned": [], "strange": []}',
        b'{"scores": 1, "parts": 0, "learned": [], "strange": []}',
        b'{"scores": [1], "parts": [0], "learned": 7, "strange": []}',
        b'{"scores": [1], "parts": [999999999999999999999], "learned": [], "strange": []}',
        b'{"scores": [1], "parts": [0], "learned": [], "strange": [], "looks": 7}',
        b'{"scores": [1], "parts": [0], "learned": [], "strange": [], "looks": "AAA"}',
        b'{"scores": [1], "parts": [0], "learned": [], "strange": [], "looks": "AAAA"}',
    ],
)
def test_damage_is_said_with_what_to_do(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SCORES).write_bytes(content)
    with pytest.raises(BadBundle, match=r"scores\.json is damaged.*Run retrain\.py again"):
        KnownScores.read(tmp_path)


def test_a_folder_in_its_place_is_damage(tmp_path: Path) -> None:
    (tmp_path / SCORES).mkdir()
    with pytest.raises(BadBundle, match="damaged"):
        KnownScores.read(tmp_path)


def test_whatever_numbers_its_parts_have_others_may_follow(tmp_path: Path) -> None:
    content = '{"scores": [1, 2], "parts": [-1, 9223372036854775807], "learned": [], "strange": []}'
    (tmp_path / SCORES).write_text(content)
    both = KnownScores.read(tmp_path).followed_by(known([3], [0]))
    assert both.count == 3


def test_what_was_strange_stays_so_until_it_is_learned(tmp_path: Path) -> None:
    first = KnownScores.none(learned=("a",), strange=("x", "y"))
    first.write(tmp_path)
    assert KnownScores.read(tmp_path).strange == ("x", "y")
    later = first.followed_by(KnownScores.none(learned=("x",), strange=("y", "z")))
    assert (later.learned, later.strange) == (("a", "x"), ("y", "z"))
