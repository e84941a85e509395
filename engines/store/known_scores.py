"""The scores that a limit comes from, kept with the model, so that an update goes on from them."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines.errors import BadBundle
from engines.files import sha256, write_atomically

SCORES = "scores.json"
MOST = 500  # scores, the newest: enough for any budget that can be promised
MOST_LEARNED = 20_000
MARK = 16  # hexadecimal digits of a SHA-256
LOOK = 128  # numbers that say what a picture looks like
_STORED = np.dtype("<f2")


def _no_looks() -> NDArray[np.float32]:
    return np.empty((0, LOOK), np.float32)


@dataclass(frozen=True)
class KnownScores:
    """Raw scores of normal pictures, each by a model that had not learned it.

    Attributes:
        scores: (n,), in the order in which they became known.
        parts: (n,) pictures with the same number show one part.
        learned: what tells the files apart that were learned: no update learns them again.
        strange: the same of those that were left out, because they are unlike the others: no
            update learns them unawares.
        looks: (n, LOOK) what each picture looks like, so that a part is known again in another
            file; NaN where nobody knows, none where nobody knows of any.
    """

    scores: NDArray[np.float64]
    parts: NDArray[np.int64]
    learned: tuple[str, ...] = ()
    strange: tuple[str, ...] = ()
    looks: NDArray[np.float32] = field(default_factory=_no_looks)

    @classmethod
    def none(cls, learned: tuple[str, ...] = (), strange: tuple[str, ...] = ()) -> KnownScores:
        """Of a model that has none yet, whatever it has learned."""
        return cls(np.empty(0), np.empty(0, np.int64), learned, strange)

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def count(self) -> int:
        """How many parts they are of."""
        return len(np.unique(self.parts))

    def highest(self) -> NDArray[np.float64]:
        """The highest score of each part: many pictures of one say no more of others."""
        parts, of = np.unique(self.parts, return_inverse=True)
        found = np.full(len(parts), -np.inf)
        np.maximum.at(found, of, self.scores)
        return found

    def rejected(self, limit: float) -> int:
        """How many parts have a picture above a raw score."""
        return len(np.unique(self.parts[self.scores > limit]))

    def followed_by(self, later: KnownScores) -> KnownScores:
        """These and then others, whose parts are other ones; the oldest go where it is too many."""
        first = int(self.parts.max()) + 1 if len(self) else 0
        learned = dict.fromkeys((*self.learned, *later.learned))
        strange = dict.fromkeys((*self.strange, *later.strange))
        return KnownScores(
            np.concatenate([self.scores, later.scores])[-MOST:],
            np.concatenate([self.parts, later.parts + first])[-MOST:],
            tuple(learned)[-MOST_LEARNED:],
            tuple(mark for mark in strange if mark not in learned)[-MOST_LEARNED:],
            np.concatenate([self._all_looks(), later._all_looks()])[-MOST:],
        )

    def _all_looks(self) -> NDArray[np.float32]:
        nobody_knows = np.full((len(self), LOOK), np.nan, np.float32)
        return self.looks if len(self.looks) else nobody_knows

    @staticmethod
    def mark(path: Path) -> str:
        """What tells a file from all others."""
        return sha256(path)[:MARK]

    def write(self, folder: Path) -> str:
        """Write scores.json into a folder, and return its name."""
        content = {
            "scores": [float(f"{one:.7g}") for one in self.scores],
            "parts": [int(one) for one in self.parts],
            "learned": list(self.learned),
            "strange": list(self.strange),
            "looks": base64.b64encode(self.looks.astype(_STORED).tobytes()).decode(),
        }
        write_atomically(folder / SCORES, (json.dumps(content) + "\n").encode())
        return SCORES

    @classmethod
    def read(cls, folder: Path) -> KnownScores:
        """scores.json of a folder; none where there is no such file.

        Raises:
            BadBundle: it is damaged.
        """
        path = folder / SCORES
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            scores = np.asarray(content["scores"], np.float64)
            parts = np.asarray(content["parts"], np.int64)
            looks = np.frombuffer(base64.b64decode(content.get("looks", "")), _STORED)
            learned, strange = (
                tuple(str(one) for one in content[key]) for key in ("learned", "strange")
            )
        except FileNotFoundError:
            return cls.none()
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise BadBundle(f"{path} is damaged: {error}. Run retrain.py again.") from None
        if scores.ndim != 1 or scores.shape != parts.shape or not np.isfinite(scores).all():
            raise BadBundle(f"{path} is damaged: it holds no list of scores. Run retrain.py again.")
        if len(looks) not in (0, LOOK * len(scores)) or np.isinf(looks).any():
            raise BadBundle(
                f"{path} is damaged: its looks are of no pictures. Run retrain.py again."
            )
        numbers = np.unique(parts, return_inverse=True)[1]
        rows = looks.astype(np.float32).reshape(-1, LOOK)
        return cls(scores, numbers, learned, strange, rows)
