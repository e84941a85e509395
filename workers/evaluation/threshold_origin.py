"""Where the threshold of a model comes from: what meta.json's calibration says, for a person.

The calibration may be of any Kensa, or of anomalib: what it does not say is left out.
"""

from __future__ import annotations

from html import escape
from typing import Any

from engines.limits import Limits
from engines.meta import Meta
from engines.promise import FEW_FOUND, drawn_found
from engines.verdict import Scale
from workers.commands import FEW_PARTS
from workers.learning.eyesight import LEAST_SIDE, STRONG

HOW = {
    "left_out": ", each judged by a model that had not learned it",
    "held_out": ", held out of the training",
    "test": ", test images",
    "best_f1": " and as the limit with the best F1, by an older Kensa",
    "prediction_limit": " by the prediction limit of an older Kensa",
}
MANY_SPREADS = 1.0  # standard deviations of normal scores, by which a limit may move

# More can be read at a glance than in a list of numbers: a dot per drawn defect.
STYLE = """
figure:has(.drawn) { margin-top: 18px; }
.drawn { width: auto; margin-top: 8px; } .drawn th, .drawn td { border: 0; padding: 7px 14px; }
.drawn th { width: auto; } .drawn td { background: var(--pale); border: 2px solid var(--paper);
  white-space: nowrap; }
.drawn td.extra { background: none; color: var(--soft); }
.drawn i { display: inline-block; width: 13px; height: 13px; margin: 0 4px -1px 0;
  border-radius: 50%; border: 2px solid var(--anomaly); }
.drawn i.found { background: var(--good); border-color: var(--good); }
.drawn .extra i { opacity: 0.45; } .drawn span { padding-left: 8px; }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin: 0 2px -1px 6px;
  border: 2px solid var(--anomaly); }
.key.found { background: var(--good); border-color: var(--good); }
@media (max-width: 620px) { .drawn th, .drawn td { padding: 6px 5px; white-space: normal; }
  .drawn th { min-width: 0; } .drawn span { display: block; padding: 0; } }
"""


def origin_facts(meta: Meta, threshold: float) -> dict[str, str]:
    """Where the threshold comes from and what it can promise, by the name of each fact.

    Args:
        threshold: the one in force, raw score; it need not be the model's own.
    """
    found, own = meta.calibration or {}, Scale.of(meta).threshold_auto
    is_own = threshold == own
    by_hand = "" if is_own else f"; that gave {own:.4f}, and {threshold:.4f} is in force"
    facts = {
        "found from": _source(found) + by_hand,
        "promise": _promise(found) if is_own else _promise_of(meta, threshold),
        "defects": _known(found, own),
        "drawn ones": _drawn(meta, threshold),
        "moved": _moved(found),
    }
    return {name: words for name, words in facts.items() if words}


def origin_notes(meta: Meta, threshold: float) -> list[str]:
    """What makes the threshold doubtful; one sentence each."""
    found, notes = meta.calibration or {}, []
    drawn, seen = drawn_found(meta, threshold)
    if drawn and seen is not None and seen / drawn < FEW_FOUND:
        notes.append(
            f"Only {seen} of {drawn} drawn defects are found at the threshold: it may be blind to"
            " real ones, too. Show the model more pictures, take another backbone or a larger"
            " image_size, or lower the threshold."
        )
    if threshold != Scale.of(meta).threshold_auto:
        return notes
    parts = found.get("parts")
    if parts is not None and found.get("method") != "kept" and parts < FEW_PARTS:
        notes.append(
            f"The threshold comes from only {parts} parts: show the model {FEW_PARTS} or more."
        )
    if abs(found.get("moved", 0)) > MANY_SPREADS:
        notes.append(
            f"The threshold moved {_moved(found)}, in the last update: look at what was learned."
        )
    return notes


def limits_of(meta: Meta) -> dict[str, float]:
    """Raw scores of the limits between which known defects may move the threshold, by name."""
    found, limits = meta.calibration or {}, Limits.of(meta)
    if limits is None:
        return {}
    shares = {found.get("false_rejects")} | ({found.get("cap")} if found.get("defects") else set())
    raw = {
        f"{100 * share:g} %": limits.raw_for(share)
        for share in sorted(share for share in shares if share is not None)
    }
    return {name: score for name, score in raw.items() if score is not None}


def drawn_chart(meta: Meta, threshold: float) -> str:
    """The drawn defects by strength and size, a dot each; nothing where none were drawn."""
    by = ((meta.calibration or {}).get("drawn") or {}).get("by") or {}
    sides = list(dict.fromkeys(side for scores in by.values() for side in scores))
    if not sides:
        return ""
    head = "".join(f"<th>{escape(_spaced(side))} of the side</th>" for side in sides)
    rows = "".join(
        f"<tr><th>{escape(strength)}</th>"
        f"{''.join(_cell(strength, side, scores.get(side), threshold) for side in sides)}</tr>"
        for strength, scores in sorted(by.items(), reverse=True)
    )
    return (
        '<figure><figcaption>Defects drawn onto good parts <span><i class="key found"></i> found,'
        ' <i class="key"></i> missed; on grey those that any model has to find</span></figcaption>'
        f'<table class="drawn"><tr><th></th>{head}</tr>{rows}</table></figure>'
    )


def _cell(strength: str, side: str, scores: list[float] | None, threshold: float) -> str:
    if scores is None:
        return "<td></td>"
    found, of = sum(score > threshold for score in scores), len(scores)
    counted = strength == STRONG and float(side.rstrip("% ")) > 100 * LEAST_SIDE
    dots = '<i class="found"></i>' * found + "<i></i>" * (of - found)
    look = "" if counted else ' class="extra"'
    return f"<td{look}>{dots}<span>{found} of {of}</span></td>"


def _source(found: dict[str, Any]) -> str:
    """Whose scores it was found from."""
    method = found.get("method")
    if method in (None, "anomalib"):
        return f"{'anomalib' if method else 'nobody knows what'}: nothing says how parts scored"
    if method == "kept":
        return "what an earlier training found: the last update brought nothing to find it from"
    pictures, parts, defects = found.get("normals"), found.get("parts"), found.get("defects")
    if pictures is None:
        return ""
    of = f" of {parts} parts" if parts not in (None, pictures) else ""
    known = f", and {_count(defects, 'defective one')}" if defects else ""
    return f"{_count(pictures, 'normal picture')}{of}{HOW.get(method, '')}{known}"


def _promise(found: dict[str, Any]) -> str:
    """What as many parts can promise of the model's own threshold."""
    bound, parts, rejected = (found.get(key) for key in ("at_most", "parts", "rejected"))
    if bound is None or parts is None or rejected is None:
        return ""
    promise = f"{_at_most(bound)} ({rejected} of {parts} parts above it)"
    budget, needed = found.get("false_rejects"), found.get("parts_needed")
    if budget is None or needed is None or bound <= budget:
        return promise
    return f"{promise}; for {100 * budget:g} % show it {needed} parts"


def _promise_of(meta: Meta, threshold: float) -> str:
    """What is promised of a threshold that somebody has set."""
    limits = Limits.of(meta)
    bound = limits.at_most(threshold) if limits is not None else None
    return "" if bound is None else f"{_at_most(bound)}, at {threshold:.4f}"


def _at_most(bound: float) -> str:
    return f"at most {100 * bound:.1f} % false rejects, 95 % sure"


def _known(found: dict[str, Any], own: float) -> str:
    """What is found of the defects that training was shown."""
    defects, misses, cap = (found.get(key) for key in ("defects", "misses", "cap"))
    if not defects or misses is None:
        return ""
    words = f"{defects - misses} of the {defects} that training was shown are found at {own:.4f}"
    if not misses or cap is None:
        return words
    most = max(cap, found.get("false_rejects") or 0)
    return f"{words}; {misses} more would cost over {100 * most:g} % of the good parts"


def _drawn(meta: Meta, threshold: float) -> str:
    of, found = drawn_found(meta, threshold)
    if of is None:
        return ""
    return (
        f"{found} of {of} found at {threshold:.4f}: scratches, stains, dents and missing pieces"
        " drawn onto good parts"
    )


def _moved(found: dict[str, Any]) -> str:
    """How far an update moved the threshold."""
    before, now, moved = (found.get(key) for key in ("before", "threshold", "moved"))
    if before is None or now is None or moved is None:
        return ""
    return (
        f"from {before:.4f} to {now:.4f}, {abs(moved):.1f} standard deviations of normal"
        f" scores {'up' if now >= before else 'down'}"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _spaced(share: str) -> str:
    return f"{share.rstrip('%')} %"
