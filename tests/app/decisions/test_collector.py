"""Several lines in one place: all of it arrives, once, and whatever happens to the network."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from app.decisions import collector as collecting
from app.decisions.collector import Collector, Shared, first_different
from app.decisions.database import COLUMNS, FILE, Filter, Note, open_or_make
from app.settings import Settings
from engines.errors import BadSettings
from support.decisions import decision
from support.fleet import PASSWORD, Network, Postgres
from support.line import line
from support.project import ROOT


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "EVERY_S", 0.05)
    monkeypatch.setattr(collecting, "AGAIN_AFTER_S", 0.1)


def settings_of(folder: Path, device: str, url: str) -> Settings:
    return Settings(data_dir=folder, device=device, record_url=SecretStr(url))


@contextmanager
def collected(
    folder: Path, device: str, url: str, opened: threading.Event | None = None
) -> Iterator[Collector]:
    if opened is None:
        opened = threading.Event()
        opened.set()
    collector = Collector(settings_of(folder, device, url), opened)
    collector.start()
    try:
        yield collector
    finally:
        collector.close()


def until(is_so: Callable[[], bool], within_s: float = 30) -> None:
    end = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def there(postgres: Postgres, device: str, columns: str = "number, hash") -> list[Any]:
    asked = f"SELECT {columns} FROM kensa.decisions WHERE device = %s ORDER BY record, number"
    return list(postgres.ask(asked, device))


def has(postgres: Postgres, device: str, count: int, table: str = "decisions") -> bool:
    if postgres.ask("SELECT to_regclass('kensa.trail')") == [(None,)]:
        return False
    asked = f"SELECT count(*) FROM kensa.{table} WHERE device = %s"
    return bool(postgres.ask(asked, device)[0][0] == count)


def test_a_decision_its_label_and_the_trail_arrive_as_they_are_here(
    tmp_path: Path, postgres: Postgres
) -> None:
    with open_or_make(tmp_path / "decisions") as here:
        here.append([decision(part="KB-2046/A 17 検査"), decision(raw_score=0.1 + 0.2, id="two")])
        with collected(tmp_path, "whole", postgres.url()):
            kept = here.one("two")
            assert kept is not None
            here.mark(kept, "good", "", "quality", "Only dust.")
            here.mark(kept, "defect", "scratch", "quality", "Or not.")
            here.append([decision(id="three"), Note.now("activate", "", "part", "", {"to": "1"})])
            until(lambda: has(postgres, "whole", 3) and has(postgres, "whole", 3, "trail"))
        mine = [
            (row.number, *row.decision.values().values(), row.hash, row.label, row.defect)
            for row in reversed(here.find(Filter(), 10))
        ]
    columns = f"number, {', '.join(COLUMNS)}, hash, label, defect"
    assert there(postgres, "whole", columns) == mine
    assert mine[1][-2:] == ("defect", "scratch")
    (said,) = postgres.ask(
        "SELECT what, who, reason, extract(epoch from time) * 1000 = at FROM kensa.trail"
        " WHERE device = 'whole' AND number = 2"
    )
    assert said == ("label", "quality", "Or not.", True)


def test_what_came_while_nobody_answered_follows_once_and_in_order(
    tmp_path: Path, postgres: Postgres
) -> None:
    with open_or_make(tmp_path / "decisions") as here:
        here.append([decision() for _ in range(3)])
        with collected(tmp_path, "outage", postgres.url()) as collector:
            until(lambda: has(postgres, "outage", 3))
            postgres.stop("immediate")
            here.append([decision() for _ in range(1200)])
            until(lambda: collector.problem is not None)
            assert "They are kept here and follow" in str(collector.problem)
            assert PASSWORD not in str(collector.problem)
            until(lambda: collector.behind == 1200)
            with collected(tmp_path, "outage", postgres.url()) as restarted:
                until(lambda: restarted.problem is not None)
                here.append([decision() for _ in range(5)])
                until(lambda: (collector.behind, restarted.behind) == (1205, 5))
            postgres.start()
            until(lambda: has(postgres, "outage", 1208))
            until(lambda: collector.problem is None and collector.behind == 0)
    assert [number for number, _ in there(postgres, "outage")] == list(range(1, 1209))


def test_two_that_send_the_same_record_send_it_once(tmp_path: Path, postgres: Postgres) -> None:
    """As two servers do that share a data folder."""
    with open_or_make(tmp_path / "decisions") as here:
        here.append([decision() for _ in range(3000)])
    url = postgres.url()
    with collected(tmp_path, "twice", url) as one, collected(tmp_path, "twice", url) as other:
        until(lambda: has(postgres, "twice", 3000))
        time.sleep(0.3)
        assert (one.problem, other.problem) == (None, None)
    assert has(postgres, "twice", 3000)


def test_two_copies_of_a_record_that_both_go_on_are_never_mixed(
    tmp_path: Path, postgres: Postgres
) -> None:
    """As of a machine that was cloned, name and all."""
    one, other = tmp_path / "one", tmp_path / "other"
    with open_or_make(one / "decisions") as here:
        here.append([decision()])
    shutil.copytree(one, other)
    with (
        open_or_make(one / "decisions") as here,
        open_or_make(other / "decisions") as copied,
        collected(one, "clone", postgres.url()) as first,
        collected(other, "clone", postgres.url()) as second,
    ):
        until(lambda: has(postgres, "clone", 1))
        here.append([decision()])
        until(lambda: has(postgres, "clone", 2))
        copied.append([decision(), decision()])
        until(lambda: second.problem is not None)
        assert "Decision 2 is another one here" in str(second.problem)
        here.append([decision()])
        until(lambda: has(postgres, "clone", 3))
        assert first.problem is None
        mine = [(number, hash_) for number, _, hash_ in here.rows("decisions")]
    assert there(postgres, "clone") == mine


def test_tables_of_before_there_were_views_get_them(tmp_path: Path, postgres: Postgres) -> None:
    with open_or_make(tmp_path / "decisions") as here:
        here.append([decision()])
        with collected(tmp_path, "before", postgres.url()):
            until(lambda: has(postgres, "before", 1))
        postgres.ask("ALTER TABLE kensa.decisions DROP COLUMN views")
        here.append([decision(views='{"line":""}')])
        with collected(tmp_path, "before", postgres.url()):
            until(lambda: has(postgres, "before", 2))
        assert there(postgres, "before", "views") == [("",), ('{"line":""}',)]


def test_records_of_two_folders_never_mix_though_they_have_the_same_name(
    tmp_path: Path, postgres: Postgres
) -> None:
    """As when a data folder was deleted, and begun anew."""
    for sent, folder in ((2, tmp_path / "old"), (4, tmp_path / "new")):
        with open_or_make(folder / "decisions") as here:
            here.append([decision(), decision()])
        with collected(folder, "anew", postgres.url()):
            until(lambda sent=sent: has(postgres, "anew", sent))
    assert sorted(number for number, _ in there(postgres, "anew")) == [1, 1, 2, 2]


def test_a_model_s_name_with_a_nul_is_no_end_of_collecting(
    tmp_path: Path, postgres: Postgres
) -> None:
    """A client may ask for any; PostgreSQL's text has no NUL."""
    with open_or_make(tmp_path / "decisions") as here:
        here.append([decision(model="a\0b", verdict="none", code="unknown_model"), decision()])
    with collected(tmp_path, "nul", postgres.url()):
        until(lambda: has(postgres, "nul", 2))
    assert there(postgres, "nul", "model")[0] == ("a\ufffdb",)


def test_a_record_that_is_repaired_or_named_first_is_not_looked_at_before(
    tmp_path: Path, postgres: Postgres
) -> None:
    """Else all of it would be collected twice, or a file that was put aside for ever."""
    with open_or_make(tmp_path / "decisions") as here:
        here.append([decision()])
    with sqlite3.connect(tmp_path / "decisions" / FILE) as database:
        database.execute("PRAGMA application_id = 0")  # of a Kensa that collected nothing
    opened = threading.Event()
    with collected(tmp_path, "unnamed", postgres.url(), opened):
        time.sleep(0.5)
        with open_or_make(tmp_path / "decisions") as here:
            opened.set()
            until(lambda: has(postgres, "unnamed", 1))
            assert there(postgres, "unnamed", "record") == [(here.name,)]


def test_a_label_that_could_not_be_written_there_follows(
    tmp_path: Path, postgres: Postgres
) -> None:
    """Where the line of the trail stood there without it, it would never come."""
    with open_or_make(tmp_path / "decisions") as here:
        here.append([decision(id="one")])
        with collected(tmp_path, "label", postgres.url()) as collector:
            until(lambda: has(postgres, "label", 1))
            postgres.ask("ALTER TABLE kensa.decisions RENAME COLUMN label TO away")
            kept = here.one("one")
            assert kept is not None
            here.mark(kept, "good", "", "quality", "")
            until(lambda: collector.problem is not None)
            postgres.ask("ALTER TABLE kensa.decisions RENAME COLUMN away TO label")
            until(lambda: has(postgres, "label", 1, "trail"))
    assert there(postgres, "label", "label") == [("good",)]


def test_the_trail_of_a_record_that_lost_its_end_is_collected(
    tmp_path: Path, postgres: Postgres
) -> None:
    """A line of the trail may name a decision that a repair could not take over."""
    with open_or_make(tmp_path / "decisions") as here:
        here.append([decision(), decision(), decision()])
        here.append([Note.now("live", "", "part", "", {})])
        with sqlite3.connect(tmp_path / "decisions" / FILE) as database:
            database.execute("DELETE FROM decisions WHERE number > 1")
        with collected(tmp_path, "lost", postgres.url()):
            until(lambda: has(postgres, "lost", 1) and has(postgres, "lost", 1, "trail"))


def test_lines_that_come_while_verify_compares_are_no_difference(
    tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        open_or_make(tmp_path / "decisions") as writer,
        open_or_make(tmp_path / "decisions") as here,
    ):
        writer.append([decision()])
        with collected(tmp_path, "meanwhile", postgres.url()):
            until(lambda: has(postgres, "meanwhile", 1))
            hashes = Shared.hashes

            def while_more_comes(shared: Shared, table: str, *numbers: int) -> Any:
                if table == "trail":
                    writer.append([Note.now("live", "", "part", "", {})])
                    until(lambda: has(postgres, "meanwhile", 1, "trail"))
                return hashes(shared, table, *numbers)

            monkeypatch.setattr(Shared, "hashes", while_more_comes)
            collected_in = settings_of(tmp_path, "meanwhile", postgres.url()).collected_in
            assert collected_in is not None
            with closing(Shared(collected_in, "meanwhile", here.name)) as shared:
                assert first_different(here, shared) == (1, None)


def verify(folder: Path, device: str, url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app", "verify"], cwd=ROOT, capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], "KENSA_DATA_DIR": str(folder),
             "KENSA_DEVICE": device, "KENSA_RECORD_URL": url}, timeout=60,
    )  # fmt: skip


def test_a_record_that_was_written_anew_in_good_order_is_named_by_what_was_collected(
    tmp_path: Path, postgres: Postgres
) -> None:
    """Its chain is whole: only the second witness knows."""
    url = postgres.url()
    first, second, third = decision(), decision(verdict="anomaly"), decision()
    folder = tmp_path / "decisions"
    with open_or_make(folder) as here:
        here.append([first, second, third])
    with collected(tmp_path, "forged", url):
        until(lambda: has(postgres, "forged", 3))
    done = verify(tmp_path, "forged", url)
    assert done.returncode == 0, done.stderr
    assert "under forged: 3 lines, all the same" in done.stdout
    with sqlite3.connect(folder / FILE) as database:
        (name,) = database.execute("PRAGMA application_id").fetchone()
    (folder / FILE).unlink()
    with open_or_make(folder) as here:
        here.append([first, decision(verdict="normal"), third])
    with sqlite3.connect(folder / FILE) as database:
        database.execute(f"PRAGMA application_id = {name}")
    done = verify(tmp_path, "forged", url)
    assert done.returncode == 2
    assert "Decision 2 is not the one that was collected (forged in kensa on" in done.stderr
    with collected(tmp_path, "forged", url) as collector:
        until(lambda: collector.problem is not None)
        assert "Decision 3 is another one here" in str(collector.problem)
    assert has(postgres, "forged", 3)
    with sqlite3.connect(folder / FILE) as database:
        database.execute("DELETE FROM decisions WHERE number = 3")
        database.execute("UPDATE sqlite_sequence SET seq = 2 WHERE name = 'decisions'")
    with collected(tmp_path, "forged", url) as collector:
        until(lambda: collector.problem is not None)
        assert "Decision 3 is missing here" in str(collector.problem)


def test_verify_says_when_it_cannot_compare(tmp_path: Path, postgres: Postgres) -> None:
    with open_or_make(tmp_path / "decisions") as here:
        here.append([decision()])
    done = verify(tmp_path, "alone", postgres.url(port=1))
    assert done.returncode == 2
    assert "The record here is whole." in done.stderr
    assert PASSWORD not in done.stderr
    with pytest.raises(BadSettings, match="KENSA_RECORD_URL is no PostgreSQL URL"):
        _ = settings_of(tmp_path, "alone", "mysql://host/kensa").collected_in


def test_pruned_decisions_are_no_difference(tmp_path: Path, postgres: Postgres) -> None:
    with open_or_make(tmp_path / "decisions") as here:
        here.append([decision() for _ in range(10)])
        with collected(tmp_path, "pruned", postgres.url()):
            until(lambda: has(postgres, "pruned", 10))
            here.prune(10, "more than 1 MiB")
            until(lambda: has(postgres, "pruned", 1, "trail"))
        with collected(tmp_path, "pruned", postgres.url()):
            here.append([decision()])
            until(lambda: has(postgres, "pruned", 11))
    assert verify(tmp_path, "pruned", postgres.url()).returncode == 0


def test_a_line_judges_and_answers_as_ever_while_the_cable_is_out(
    tmp_path: Path, kensa_model: Path, sample_data: Path, postgres: Postgres
) -> None:
    network = Network(postgres.port)
    image = next((sample_data / "train" / "sample_bracket").glob("*.png")).read_bytes()
    with line(
        tmp_path, kensa_model, KENSA_RECORD_URL=postgres.url(port=network.port),
        KENSA_DEVICE="cable",
    ) as running:  # fmt: skip
        infer = running.server.infer
        assert infer(image).status_code == 200
        until(lambda: has(postgres, "cable", 1))
        network.cut()
        began = time.monotonic()
        for _ in range(5):
            assert infer(image).status_code == 200
        assert time.monotonic() - began < 15  # what the network itself would wait
        found = running.server.client.get("/decisions").json()["decisions"]
        assert len(found) == 6
        network.mend()
        until(lambda: has(postgres, "cable", 6), within_s=60)
        assert "kensa_decisions_behind" in running.server.client.get("/metrics").text
    network.close()
