"""Progress that a test can read."""

from __future__ import annotations

from collections.abc import Callable

from workers.progress import Progress, Tick


class Heard(Progress):
    """Keeps what is said, and how far it was."""

    def __init__(self, at: Callable[[int], None] = lambda done: None) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []
        self.percent: list[int] = []
        self._at = at

    def say(self, line: str) -> None:
        self.lines.append(line)

    def phase(self, name: str) -> Tick:
        assert name == "build"

        def tick(done: int, total: int) -> None:
            assert total == 100
            self.percent.append(done)
            self._at(done)

        return tick

    @property
    def text(self) -> str:
        return "\n".join(self.lines)
