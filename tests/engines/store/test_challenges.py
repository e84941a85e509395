"""Claims about known pictures on the disk: whole or not at all, and who is not known is closed."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest

from engines.errors import BadBundle, BadImage, BadRequest, DiskFull, UploadTooLarge
from engines.image import DEFAULT_LIMITS
from engines.store import challenges as kept
from engines.store.challenges import Challenges, ChallengeSet, Expected, Offered
from engines.store.versions import Store
from support.damage import png
from support.failing import failing

NAME = "bolt"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(tmp_path / "models")
    with found.staging() as folder:
        (folder / "meta.json").write_text("{}")
        found.publish(NAME, folder, {})
    return found


def picture(value: int) -> bytes:
    return png(np.full((8, 8, 3), value, np.uint8))


def offered(value: int, expected: Expected, name: str = "01.png") -> Offered:
    return Offered(name, expected, {}, lambda: picture(value))


def put(known: Challenges, *pictures: Offered, **about: object) -> ChallengeSet:
    return known.put(NAME, pictures, ChallengeSet().model_copy(update=about), DEFAULT_LIMITS)


def files(store: Store) -> dict[str, bytes]:
    folder = store.root / NAME / "challenges"
    return {path.name: path.read_bytes() for path in folder.glob("*")} if folder.exists() else {}


def test_what_is_put_is_read_again_and_the_pictures_are_those_that_were_sent(store: Store) -> None:
    known = Challenges(store)
    assert known.read(NAME) is None
    found = put(known, offered(90, "good"), offered(200, "bad"), at_shifts=True, reason="new")
    assert Challenges(store).read(NAME) == found
    assert [one.called for one in found.pictures] == ["good/01.png", "bad/01.png"]
    assert [known.picture(NAME, one) for one in found.pictures] == [picture(90), picture(200)]
    assert (found.released, found.at_shifts, found.reason) == (True, True, "new")


def test_two_pictures_of_a_group_never_have_the_same_name(store: Store) -> None:
    pictures = [offered(value, "good") for value in (1, 2, 3)]
    found = put(Challenges(store), *pictures, offered(9, "bad"))
    names = [one.name for one in found.pictures if one.expected == "good"]
    assert names == ["01.png", "01.png-2", "01.png-3"]


def test_the_same_picture_is_known_once_and_never_as_both(store: Store) -> None:
    known = Challenges(store)
    found = put(known, offered(1, "good"), offered(1, "good", "again.png"), offered(9, "bad"))
    assert len(found.pictures) == 2
    with pytest.raises(BadRequest, match=r"good/01\.png and bad/2\.png are the same picture"):
        put(known, offered(1, "good"), offered(1, "bad", "2.png"))
    assert known.read(NAME) == found


@pytest.mark.parametrize("missing", ["good", "bad"])
def test_both_kinds_are_needed(store: Store, missing: str) -> None:
    other: Expected = "bad" if missing == "good" else "good"
    with pytest.raises(BadRequest, match=f"There is no {missing} picture"):
        put(Challenges(store), offered(1, other))
    assert files(store) == {}


def test_a_damaged_picture_and_too_many_change_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Challenges(store)
    found, before = put(known, offered(1, "good"), offered(9, "bad")), files(store)
    with pytest.raises(BadImage):
        put(known, offered(2, "good"), Offered("x.png", "bad", {}, lambda: picture(3)[:-20]))
    monkeypatch.setattr(kept, "MOST", 3)
    with pytest.raises(UploadTooLarge, match="up to 3 pictures"):
        put(known, *(offered(value, "good") for value in (2, 3, 4)), offered(9, "bad"))
    monkeypatch.setattr(kept, "MOST_BYTES", len(picture(1)))
    with pytest.raises(UploadTooLarge):
        put(known, offered(2, "good"), offered(9, "bad"))
    assert (known.read(NAME), files(store)) == (found, before)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_write_that_fails_changes_nothing(store: Store, error: int, is_first: bool) -> None:
    """Whichever it is, up to the one that tidies up."""
    known = Challenges(store)
    if not is_first:
        put(known, offered(1, "good"), offered(9, "bad"))
    before = files(store)
    step = 0
    while True:
        with failing(store.root, step, error) as now:
            try:
                put(known, offered(2, "good"), offered(9, "bad"))
            except DiskFull:
                pass
            else:
                break
        assert now.failed is not None
        assert files(store) == before, now.failed
        step += 1
    assert step > 4
    put(known, offered(2, "good"), offered(9, "bad"))
    assert len(files(store)) == 3


def test_a_delete_that_fails_leaves_all_of_it(store: Store) -> None:
    known = Challenges(store)
    found = put(known, offered(1, "good"), offered(9, "bad"), released=False, why="It failed.")
    step = 0
    while True:
        with failing(store.root, step, errno.ENOSPC):
            try:
                known.delete(NAME)
            except DiskFull:
                assert known.read(NAME) == found
            else:
                break
        step += 1
    assert step > 0
    assert known.read(NAME) is None


def test_what_a_kill_left_is_swept_and_what_is_known_stays(store: Store) -> None:
    known, folder = Challenges(store), store.root / NAME / "challenges"
    put(known, offered(1, "good"), offered(9, "bad"))
    before = files(store)
    (folder / ("ab" * 32)).write_bytes(b"of a PUT that was killed")
    (folder / ".challenges.json.0123abcd").write_bytes(b"{")
    hidden = folder.with_name(".challenges.0123abcd")
    hidden.mkdir()
    known.sweep(NAME)
    assert files(store) == before
    assert not hidden.exists()
    (folder / "challenges.json").unlink()
    known.sweep(NAME)
    assert not folder.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"released": 7}', '{"pictures": [{"name": 1}]}'])
def test_a_model_of_which_nobody_knows_whether_it_is_released_is_not(
    store: Store, text: str
) -> None:
    known = Challenges(store)
    put(known, offered(1, "good"), offered(9, "bad"))
    (store.root / NAME / "challenges" / "challenges.json").write_text(text)
    found = known.read(NAME)
    assert found is not None
    assert not found.released
    assert "challenges.json is damaged" in found.why
    known.sweep(NAME)
    assert len(files(store)) == 3  # nobody knows which pictures are wanted


def test_what_a_newer_kensa_wrote_besides_is_passed_over(store: Store) -> None:
    known, path = Challenges(store), store.root / NAME / "challenges" / "challenges.json"
    found = put(known, offered(1, "good"), offered(9, "bad"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "every_hours": 8}))
    assert known.read(NAME) == found


def test_a_picture_that_is_gone_or_damaged_is_said_so_and_a_new_put_mends_it(store: Store) -> None:
    known = Challenges(store)
    good, bad = put(known, offered(1, "good"), offered(9, "bad")).pictures
    folder = store.root / NAME / "challenges"
    (folder / good.sha256).write_bytes(picture(7))
    (folder / bad.sha256).unlink()
    with pytest.raises(BadBundle, match=r"good/01\.png is damaged"):
        known.picture(NAME, good)
    with pytest.raises(BadBundle, match=r"bad/01\.png is gone"):
        known.picture(NAME, bad)
    again = put(known, offered(1, "good"), offered(9, "bad")).pictures
    assert [known.picture(NAME, one) for one in again] == [picture(1), picture(9)]


def test_old_versions_are_pruned_and_known_pictures_stay(store: Store) -> None:
    known = Challenges(store)
    put(known, offered(1, "good"), offered(9, "bad"))
    before = files(store)
    for number in range(4):
        with store.staging() as folder:
            (folder / "meta.json").write_text(f'{{"n": {number}}}')
            store.activate(NAME, store.publish(NAME, folder, {}))
    assert store.prune(NAME, 1)
    assert files(store) == before
