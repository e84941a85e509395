"""Whether somebody else was at work, by how long threads waited for a CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engines.machine import cpu_delay
from engines.machine.cpu_delay import cpu_delays, longest_s

# Pins itself and a child that never rests to one CPU, works for 0.3 s of CPU time, and says how
# long it waited meanwhile.
COMPETING = """
import os, time
from engines.machine.cpu_delay import cpu_delays, longest_s
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
child = os.fork()
while not child:
    pass
try:
    before, end = cpu_delays(), time.process_time() + 0.3
    while time.process_time() < end:
        pass
    print(longest_s(before, cpu_delays()))
finally:
    os.kill(child, 9)
"""


@pytest.mark.skipif(not cpu_delays(), reason="this kernel does not count it")
def test_a_thread_that_shares_its_cpu_has_waited_for_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPETING], capture_output=True, text=True, check=True, timeout=120
    )
    assert float(done.stdout) > 0.1


def test_the_time_is_that_of_the_thread_that_waited_longest_in_between() -> None:
    before = {"1": 5_000_000_000, "2": 1_000_000_000, "3": 7_000_000_000}
    after = {"1": 5_100_000_000, "2": 1_300_000_000, "4": 200_000_000}  # one ended, one is new
    assert longest_s(before, after) == pytest.approx(0.3)
    assert longest_s(before, {}) == 0


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cpu_delay, "TASKS", tmp_path)
    for number, line in {"11": "90 1200 3\n", "12": "0 0 0\n"}.items():
        (tmp_path / number).mkdir()
        (tmp_path / number / "schedstat").write_text(line)
    return tmp_path


def test_each_thread_has_its_own_count(tasks: Path) -> None:
    assert cpu_delays() == {"11": 1200, "12": 0}


def test_a_thread_that_ends_while_they_are_read_is_left_out(tasks: Path) -> None:
    (tasks / "12" / "schedstat").unlink()
    assert cpu_delays() == {"11": 1200}


def test_where_the_system_counts_nothing_nobody_has_waited(
    tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tasks / "11" / "schedstat").write_text("")
    (tasks / "12" / "schedstat").write_text("not counted here")
    assert cpu_delays() == {}
    monkeypatch.setattr(cpu_delay, "TASKS", tasks / "none")
    assert cpu_delays() == {}
    assert longest_s(cpu_delays(), cpu_delays()) == 0
