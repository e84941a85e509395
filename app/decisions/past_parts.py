"""`past_parts`: decisions of the record that the gate shows to a new version."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from app.decisions.database import DecisionDatabase, Filter, Kept
from app.decisions.recorder import Recorder
from app.decisions.teaching import LABELS, PAGE, last_of_each_picture
from engines.serving.gate import Past, Record

MOST = 32  # of those marked as defects, of those marked as good, and of rejects without a mark


def past_parts(recorder: Recorder, model: str) -> Record:
    """Those that a person has marked, and rejects that nobody has; the newest of each. Blocks.

    Marked defects come first, should time run short. Of a picture that was judged several times,
    what was said of the last one counts, as in what is learned of them. Of each kind `PAGE`
    decisions are looked through.

    Raises:
        Conflict, DiskFull: as `Recorder.read`.
    """
    asked = Filter(model=model)

    def newest(database: DecisionDatabase) -> tuple[list[Kept], list[Kept]]:
        with database.reading():
            labels = [replace(asked, label=label) for label in LABELS]
            marked = [kept for one in labels for kept in database.find(one, PAGE)]
            rejects = replace(asked, verdict="anomaly", label="none")
            return marked, database.find(rejects, PAGE)

    found, rejects = map(last_of_each_picture, recorder.read(newest))
    marked = [one for one in found if one.decision.verdict != "unusable"]  # by whatever version
    known = {one.decision.sha256 for one in marked}
    groups = [[one for one in marked if one.label == label] for label in ("defect", "good")]
    rejects = [one for one in rejects if not one.decision.code]  # by the model itself
    groups.append([one for one in rejects if one.decision.sha256 not in known])
    shown = [one for group in groups for one in [one for one in group if one.picture_bytes][:MOST]]
    return Record(
        past=[_past(recorder, one) for one in shown],
        without_picture=sum(not one.picture_bytes for one in marked if one.label != "unusable"),
        known=known,
    )


def _past(recorder: Recorder, kept: Kept) -> Past:
    one = kept.decision
    return Past(
        number=kept.number, id=one.id, part=one.part, sha256=one.sha256,
        label=kept.label,  # type: ignore[arg-type]  # of those that were asked for
        defect=kept.defect, picture=partial(recorder.pictures.image, kept.number),
    )  # fmt: skip
