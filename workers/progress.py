"""Progress of long work: a bar on a terminal, plain lines elsewhere, and a log file."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from engines.files import printable

PLAIN_EVERY_S = 5.0  # seconds between two plain lines of one phase

Tick = Callable[[int, int], None]  # (done, total)


class Progress:
    """Where long work says how far it is. Jobs read the same calls as the terminal does."""

    def __init__(self, log: Path | None = None, *, quiet: bool = False) -> None:
        """Show progress on stderr, and write every line of `say` and the phases' ends to `log`."""
        self._log = log
        self._quiet = quiet
        self._bar_on = sys.stderr.isatty() and not quiet

    def say(self, line: str) -> None:
        """One line for a person, at once."""
        line = printable(line)
        if not self._quiet:
            tqdm.write(line, file=sys.stderr)
        self._to_log(line)

    def fail(self, sentence: str) -> None:
        """Say why the work ended without a result; never itself the reason for another error."""
        sentence = printable(" ".join(sentence.split()))  # what libraries say may be a paragraph
        tqdm.write(f"error: {sentence}", file=sys.stderr)
        with contextlib.suppress(OSError):
            self._to_log(f"error: {sentence}")

    def phase(self, name: str) -> Tick:
        """Begin a phase; call what it returns with (done, total) until both are equal."""
        started = time.monotonic()
        bar = _bar(name) if self._bar_on else None
        last = [started]

        def tick(done: int, total: int) -> None:
            now = time.monotonic()
            finished = done >= total
            if bar is not None:
                bar.total = total
                bar.update(done - bar.n)
                if finished:
                    bar.close()
            if finished:
                line = f"{name}: {done} in {now - started:.1f} s"
                self._to_log(line) if bar is not None else self.say(line)
            elif bar is None and not self._quiet and now - last[0] >= PLAIN_EVERY_S:
                last[0] = now
                print(f"{name}: {done} of {total}", file=sys.stderr, flush=True)  # noqa: T201

        return tick

    def _to_log(self, line: str) -> None:
        if self._log is None:
            return
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


def _bar(name: str) -> tqdm:
    # A serial console says 0 x 0, where tqdm draws nothing; get_terminal_size then says 80 x 24.
    size = shutil.get_terminal_size()
    return tqdm(
        desc=f"{name:<10}", file=sys.stderr, leave=True, ncols=size.columns, nrows=size.lines
    )
