"""The models of the store: which version would serve, and whether they fit into the memory."""

from __future__ import annotations

import socket
from urllib.parse import quote

from app.settings import Settings
from app.watching.doctor.findings import Fit, Report, note, wrong
from engines.camera import Camera
from engines.errors import BadBundle, BadMeta, KensaError
from engines.machine.memory import MIB, Free, Need
from engines.meta import Meta
from engines.promise import doubts
from engines.serving.opening import Opening, memory_needed
from engines.serving.resident import held_back, in_its_place, nobody_instead
from engines.store.bundle import ONNX
from engines.store.challenges import Challenges
from engines.store.plan_record import Fingerprint, Machine
from engines.store.versions import META, Store


def look_at_models(
    report: Report,
    settings: Settings,
    opening: Opening,
    tensorrt: Machine | None,
    free: Free,
    serving: bool = False,
) -> None:
    """What `report` says of them. `serving`: whether this very process has them in memory."""
    where = "here" if serving else f"on port {settings.port}"
    serving = serving or _is_served(settings)
    if serving:
        report.facts["storage"]["server"] = (
            f"answers {where}: what its models take is not free any more"
        )
    if limit := settings.model_memory_mib * MIB:
        free = free.at_most(limit)
    store = Store(settings.data / "models")
    post = f"curl -X POST http://localhost:{settings.port or 'PORT'}"
    needs: list[Need] = []
    try:
        names = store.names()
    except OSError as error:
        report.findings.append(wrong(f"The models cannot be read: {error}."))
        return
    for name in names:
        try:
            _look_whether_released(store, name, post, report)
            found = _look_at(store, name, opening, tensorrt, post, report)
        except KensaError as error:
            report.findings.append(wrong(f"{name}: {error}"))
            continue
        if found is None:
            continue
        version, meta, plan, need = found
        doubted = doubts(meta, settings.gate_found, live=True)
        report.findings += [wrong(f"{name} {version}: {one}") for one in doubted]
        if (settings.unusable or settings.drift_parts) and Camera.of(meta.camera) is None:
            report.findings.append(
                note(
                    f"{name} {version}: its training did not note what its pictures look like, so"
                    " KENSA_UNUSABLE and KENSA_DRIFT_PARTS see nothing of it.",
                    "Train it again: POST /retrain, or kensa learn.",
                )
            )
        needs.append(need)
        short = need.short_of(free)
        fits = None if serving else short is None
        report.models.append(Fit(name, version, meta.model, plan, need.all // MIB, fits))
        if short is not None and not serving:
            report.findings.append(
                wrong(
                    f"{name} needs {short.needed}, and {short.free}.",
                    "End other programs, or give the model a smaller memory bank.",
                )
            )
    together = Need(sum(need.host for need in needs), sum(need.device for need in needs))
    short = together.short_of(free)
    if short is not None and not serving and all(one.fits for one in report.models):
        report.findings.append(
            note(
                f"Each model fits, but all together need {short.needed}, and {short.free}.",
                "KENSA_REST=on lets them take turns; KENSA_PINNED=NAME keeps one in memory.",
            )
        )


def _look_whether_released(store: Store, name: str, post: str, report: Report) -> None:
    known = Challenges(store).read(name)
    if known is not None and not known.released:
        do = f"{post}/models/{quote(name)}/challenge"
        report.findings.append(wrong(known.why, f"{do}   # once that is mended"))


def _look_at(
    store: Store, name: str, opening: Opening, tensorrt: Machine | None, post: str, report: Report
) -> tuple[str, Meta, str, Need] | None:
    """The version that would serve, and what it takes; None where none can.

    Raises:
        KensaError: its files are damaged.
    """
    version = _that_serves(store, name, post, report)
    if version is None:
        return None
    folder = store.folder(name, version)
    meta = Meta.read(folder / META)
    if not (folder / ONNX).is_file():
        report.findings.append(
            note(
                f"{name} {version} is trained, but not converted.",
                f"{post}/convert -H 'Content-Type: application/json' -d"
                f' \'{{"model": "{name}"}}\'',
            )
        )
        return None
    record = Fingerprint.read(folder)
    plan = "none"
    if record is not None:
        plan = f"for {record.machine.made_for}, which does not run here"
    if tensorrt is not None:
        why = record.stale(folder, tensorrt) if record else "it has no plan for TensorRT."
        plan = ("stale" if record else "none") if why else "good"
        if why:
            do = "Start the server: it builds one, and says so in GET /jobs."
            report.findings.append(note(f"{name}: {why}", do))
    return version, meta, plan, memory_needed(folder, opening)


def _that_serves(store: Store, name: str, post: str, report: Report) -> str | None:
    """The version that would serve, after every file in it was compared with its SHA-256.

    Where none was live yet, the newest, unless the gate holds it. What is wrong is reported.
    """
    candidates, should, why = store.to_serve(name)
    tried: dict[str, str] = {}
    for version in candidates:
        try:
            Meta.read(store.check(name, version) / META)
        except (BadBundle, BadMeta) as error:
            tried[version] = f"cannot be used: {str(error).rstrip('.')}"
            continue
        why = tried.get(should or "", why)
        if why is not None:
            report.findings.append(wrong(in_its_place(name, version, should, why)))
        return version
    why = tried.pop(should or "", why)
    if why is not None:
        report.findings.append(wrong(nobody_instead(name, should, why, tried)))
        return None
    if held := store.held(name):
        do = f"{post}/models/{quote(name)}/versions/{held[0]}/activate"
        report.findings.append(
            wrong(held_back(name, *held), f"{do}   # if it may judge all the same")
        )
        return None
    return next(reversed(store.versions(name)), None)


def _is_served(settings: Settings) -> bool:
    """Whether something listens where the server would."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    try:
        with socket.create_connection((host, settings.port), timeout=0.5):
            return settings.port != 0
    except OSError:
        return False
