"""Progress that a test can read."""

from __future__ import annotations

from collections.abc import Callable

from workers.progress import Progress, Tick


class Said(Progress):
    """Shows nothing, and keeps every line."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


class Heard(Said):
    """Keeps also how far the build of a plan was."""

    def __init__(self, at: Callable[[int], None] = lambda done: None) -> None:
        super().__init__()
        self.percent: list[int] = []
        self._at = at

    def phase(self, name: str) -> Tick:
        assert name == "build"

        def tick(done: int, total: int) -> None:
            assert total == 100
            self.percent.append(done)
            self._at(done)

        return tick
