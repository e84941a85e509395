"""`kensa learn FOLDER`: from pictures of good parts to a model, and into the server that runs here.

The way of retrain.py, convtrt.py and evaluate.py in one go, with settings that suit most parts.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import Any
from urllib.parse import quote as in_url

import engines.missing_packages  # noqa: F401 (it says what to install)
from engines.errors import BadDataset, BadRequest, BadWeights, Conflict, KensaError
from engines.files import name_of_folder, printable, remove
from engines.image import DEFAULT_LIMITS, SUFFIXES, ImageLimits
from engines.limits import LEAST_SHARE, share
from engines.meta import FIRST, Meta
from engines.store.known_scores import KnownScores
from engines.store.versions import META, Store, is_name
from workers.commands import (
    FEW_PARTS,
    Stopped,
    must_be_there,
    run,
    show,
    summarise_conversion,
    summarise_training,
)
from workers.learning.dataset import (
    MOST_BROKEN,
    Category,
    Survey,
    check_broken,
    notes_on_passed_over,
)
from workers.progress import Progress

LEAST_PICTURES = 4  # of which a threshold can be made
GATE_LIMIT_S = 120.0  # that a server may take to let it through
LOOK_EVERY_S = 0.2
USUAL_NAMES = {"good", "normal", "ok", "train", "images", "pictures"}  # which name no part


@dataclass(frozen=True)
class Server:
    """The one that runs on this machine: where it answers, and its data folder."""

    url: str
    data: Path


@dataclass(frozen=True)
class Learn:
    """What to learn: the flags of `kensa learn`."""

    folder: Path
    name: str
    out_dir: Path
    defects: Path | None = None
    good: Path | None = None  # parts that are not learned, to measure with
    pretrained_pth: str | None = None
    bit_depth: int | None = None  # of the camera
    false_rejects: float | None = None
    keep_strange: bool = False
    regions: Path | None = None  # a PNG of what never counts
    limits: ImageLimits = DEFAULT_LIMITS
    server: Server | None = None


def learn(request: Learn, progress: Progress) -> list[str]:
    """Look, learn, convert, measure, publish; what is to be said at the end.

    Raises:
        KensaError: the pictures or the machine do not allow it. What was there is as it was.
    """
    progress.say("1/5  looking at the pictures")
    root = _root(request)
    pictures = (
        Category.of(request.folder, request.good, request.defects)
        if root is None
        else Category.find(root, request.name)
    )
    found = _looked_at(pictures, request, progress)
    progress.say(_told(found, pictures))
    part = _one_to_ask_about(pictures, found)
    data = root or _linked(request)
    said = _learned(request, data, progress)
    try:
        said += _converted(request, data, pictures, progress)
        progress.say("5/5  handing it over")
        return said + (
            _published(request, request.server, part) if request.server else _left(request, part)
        )
    except KeyboardInterrupt as stopped:
        if str(stopped):
            raise
        raise Stopped(
            f"Stopped. What was learned is in {request.out_dir}, and no server has got it."
        ) from None


def _learned(request: Learn, data: Path, progress: Progress) -> list[str]:
    """The model as retrain.py leaves it in `out_dir`; what it found."""
    from workers.learning.retrain import Retrain, retrain

    progress.say("2/5  learning what a good part looks like")
    out = request.out_dir
    out.mkdir(parents=True, exist_ok=True)
    wanted = out / "wanted.json"
    Meta.model_validate(FIRST).write(wanted)
    try:
        report = retrain(
            Retrain(
                FIRST["model"], request.name, data, out, wanted, request.pretrained_pth,
                false_rejects=request.false_rejects, keep_strange=request.keep_strange,
                bit_depth=request.bit_depth, regions=request.regions, limits=request.limits,
            ),
            progress,
        )  # fmt: skip
    finally:
        wanted.unlink(missing_ok=True)
    return summarise_training(report, out)


def _converted(request: Learn, data: Path, pictures: Category, progress: Progress) -> list[str]:
    """The engine beside it, measured where there are parts to measure with."""
    from workers.converting.convert import Convert, convert
    from workers.evaluation.evaluate import (
        EVALUATION,
        Evaluate,
        evaluate,
        summarise_evaluation,
    )

    progress.say("3/5  converting the model")
    out, engine, page = (request.out_dir / name for name in ("", "engine", "evaluation"))
    conversion = Convert(FIRST["model"], out / "model.pth", out / META, engine)
    said = summarise_conversion(convert(conversion, progress), engine)
    if (page / EVALUATION).is_file():
        remove(page)  # of the model that was there before
    if not (pictures.test_normal or pictures.test_anomaly):
        progress.say("4/5  nothing to measure with: --defects and --good name other parts")
        return said
    progress.say("4/5  measuring it with parts that it has not learned")
    measuring = Evaluate(engine, request.name, data, page, limits=request.limits)
    return said + summarise_evaluation(evaluate(measuring, progress), page)


def _root(request: Learn) -> Path | None:
    """The folder with train/ and test/ that the commands read, where FOLDER lies in one."""
    folder = request.folder
    is_one = folder.parent.name == "train" and request.name == folder.name
    return folder.parent.parent if is_one and not (request.defects or request.good) else None


def _linked(request: Learn) -> Path:
    """Such a folder of links to those that were named."""
    data = request.out_dir / "data"
    for source, place in (
        (request.folder, data / "train" / request.name),
        (request.good, data / "test" / request.name / "normal"),
        (request.defects, data / "test" / request.name / "anomaly"),
    ):
        if place.is_symlink():
            place.unlink()
        elif place.exists():
            raise Conflict(f"{place} is in the way, and no link of an earlier run: take it away.")
        if source is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(source, target_is_directory=True)
    return data


def _looked_at(pictures: Category, request: Learn, progress: Progress) -> Survey:
    """What the pictures are; BadDataset where nothing can be learned of them."""
    for note in notes_on_passed_over(pictures.passed_over):
        progress.say(note)
    _check_tests(pictures, request)
    found = Survey.of(pictures.train, progress.phase("look"), request.limits)
    check_broken(found.broken, len(pictures.train), len(pictures.train) // MOST_BROKEN)
    good = len(pictures.train) - len(found.broken) - len(found.copies)
    if good < LEAST_PICTURES:
        raise BadDataset(
            f"{request.folder} has {good} different pictures, and it takes {LEAST_PICTURES} at the"
            f" least: take {FEW_PARTS} or more, each of another part."
        )
    return found


def _check_tests(pictures: Category, request: Learn) -> None:
    """Raise BadDataset where a folder to measure with holds nothing, or what is learned."""
    for flag, folder, found in (
        ("--defects", request.defects, pictures.test_anomaly),
        ("--good", request.good, pictures.test_normal),
    ):
        if folder is not None and not found:
            raise BadDataset(
                f"{folder} holds no images: {flag} names a folder with some"
                f" ({', '.join(sorted(SUFFIXES))})."
            )
    tests = [*pictures.test_anomaly, *pictures.test_normal]
    learned = {KnownScores.mark(path) for path in pictures.train} if tests else set()
    both = [path for path in tests if KnownScores.mark(path) in learned]
    if both:
        raise BadDataset(
            f"{len(both)} pictures to measure with are among those of {request.folder} as well,"
            f" such as {both[0].resolve()}: a part is either learned as a good one, or measured"
            " with. Take them away from one of the two."
        )


def _one_to_ask_about(pictures: Category, found: Survey) -> Path:
    """A picture for the line that asks for a verdict: of a defect where there is one."""
    one = [*pictures.test_anomaly, *pictures.test_normal, *pictures.train]
    return next(path for path in one if path not in found.broken).resolve()


def _told(found: Survey, pictures: Category) -> str:
    """What was found, in a line."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.kinds.most_common())
    (width, height), _ = found.sizes.most_common(1)[0]
    sizes = len(found.sizes)
    words = [f"{len(pictures.train)} pictures ({kinds}), {width} x {height}"]
    if sizes > 1:
        words[0] += f" and {sizes - 1} other sizes"
    if found.broken:
        words.append(f"{len(found.broken)} broken")
    if found.copies:
        words.append(f"{len(found.copies)} copies of others, such as {found.copies[0].name}")
    if tests := len(pictures.test_normal) + len(pictures.test_anomaly):
        words.append(f"{tests} to measure with")
    if len(pictures.train) < FEW_PARTS:
        words.append(f"few: {FEW_PARTS} or more say how far good parts differ")
    return "; ".join(words)


def _left(request: Learn, part: Path) -> list[str]:
    """No server runs: how to start one with the model."""
    engine = _quoted(str(request.out_dir / "engine"))
    return [
        "",
        "no server    runs on this machine with this user's data folder, so the model stays there:",
        f"serve it     KENSA_MODEL_DIR={engine} KENSA_MODEL_NAME={request.name} kensa",
        f"then         {_curl(request, 'http://127.0.0.1:8000', part)}",
    ]


def _published(request: Learn, server: Server, part: Path) -> list[str]:
    """Hand it to the server; what its gate says. Ctrl-C takes it back, unless it is live."""
    store, name = Store(server.data / "models"), request.name
    before = store.versions(name)
    origin = {"learned": str(request.folder)}
    try:
        version = store.offer(name, request.out_dir / "engine", origin)
        return _what_became_of_it(store, version, request, server, part)
    except KeyboardInterrupt:
        for version in {*store.versions(name)} - {*before}:
            _take_back(store, name, version, printable(str(request.folder)), server)
        raise


def _take_back(store: Store, name: str, version: str, learned: str, server: Server) -> None:
    """Withdraw what was just published. Raises Stopped where it judges already."""
    with suppress(KensaError):  # damaged, or gone already
        if store.manifest(name, version).origin.get("learned") == learned:
            store.withdraw(name, version)
    pointer = store.pointer(name)
    if pointer is not None and pointer.live == version:
        back = f"curl{_key(server.url)} -X POST {server.url}/models/{in_url(name)}/rollback"
        undo = f" {back} goes back to {pointer.previous}." if pointer.previous else ""
        raise Stopped(f"Stopped too late: {name} {version} judges parts already.{undo}")


def _what_became_of_it(
    store: Store, version: str, request: Learn, server: Server, part: Path
) -> list[str]:
    """Wait for the gate."""
    name = request.name
    model = f"{server.url}/models/{in_url(name)}"
    end = time.monotonic() + GATE_LIMIT_S
    while time.monotonic() < end:
        pointer, gate = store.pointer(name), store.gate(name, version)
        if pointer is not None and pointer.live == version:
            said = f"live         {name} {version} judges parts at {server.url}"
            return ["", said, f"try it       {_curl(request, server.url, part)}"]
        if gate is not None and gate.get("ok") is False:
            why = " ".join(gate.get("reasons", []))
            return [
                "",
                f"held         {name} {version}: {why}",
                f"let it in    curl{_key(server.url)} -X POST {model}/versions/{version}/activate",
            ]
        if (why_not := store.refused(name).get(version)) is not None:
            return ["", f"refused      {name} {version}: {why_not}"]
        time.sleep(LOOK_EVERY_S)
    return ["", f"at the gate  {name} {version}; see {model}"]


def _curl(request: Learn, url: str, part: Path) -> str:
    """A line for a shell that asks for the verdict of a picture there is."""
    named = str(part)
    if set(named) & set(';,"'):  # which mean something to curl
        named = '"' + named.replace("\\", r"\\").replace('"', r"\"") + '"'
    key = _key(url) if request.server else ""
    return f"curl{key} -F {_quoted(f'file=@{named}')} '{url}/infer?model={in_url(request.name)}'"


def _key(url: str) -> str:
    """What a curl line needs besides where the server wants a key."""
    import httpx

    with suppress(httpx.HTTPError):  # it may have been stopped just now
        if httpx.get(f"{url}/models", trust_env=False).status_code == httpx.codes.UNAUTHORIZED:
            return " -H 'X-API-Key: KEY'"
    return ""


def _quoted(word: str) -> str:
    """A word for a shell; one with bytes that are not UTF-8 as bash and zsh read it."""
    if printable(word) == word:
        return quote(word)
    return "$'" + printable(word.replace("\\", r"\\").replace("'", r"\'")) + "'"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kensa learn",
        description="Learn what good parts look like, from a folder of pictures: look at them,"
        " learn, convert, measure, and hand the model to the server that runs on this machine."
        " Where none runs, the model stays in --out_dir.",
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help=f"pictures of good parts, {FEW_PARTS} or"
        " more, each of another part")  # fmt: skip
    add("--name", metavar="N", help="what to call the model (default: the folder's name)")
    add("--defects", type=Path, metavar="D", help="pictures of defective parts: they are not"
        " learned, and help to find the threshold")  # fmt: skip
    add("--good", type=Path, metavar="D", help="pictures of good parts that are not learned, to"
        " measure with")  # fmt: skip
    add("--out_dir", type=Path, metavar="D", help="where the files go (default: models/N)")
    add("--pretrained_pth", metavar="F", help="weights of the backbone: a .pth or .safetensors with"
        " timm or torchvision names. Without it: pretrained ones of an installed package, of timm's"
        " cache or of the hub. The word 'untrained' takes random ones")  # fmt: skip
    add("--bit_depth", type=int, choices=(8, 10, 12, 14, 16), help="bits that the camera gives, in"
        " 16-bit files")  # fmt: skip
    add("--false_rejects", type=float, metavar="X", help="share of good parts that may be rejected"
        " (default 0.01)")  # fmt: skip
    add("--keep_strange", action="store_true", help="learn pictures too that are unlike the others")
    add("--regions", type=Path, metavar="F", help="a PNG as large as the pictures: what is white in"
        " it never counts")  # fmt: skip
    add("--server", nargs=2, metavar=("URL", "DATA"), help=argparse.SUPPRESS)  # `kensa` says it
    ImageLimits.add_flags(parser)
    parsed = parser.parse_args(arguments)
    if parsed.false_rejects is not None and share(parsed.false_rejects) is None:
        parser.error(f"--false_rejects is a share between {LEAST_SHARE:g} and 1, such as 0.01 for"
            " one part in 100")  # fmt: skip
    return parsed


def _asked(flags: dict[str, Any]) -> Learn:
    """What the flags ask for.

    Raises:
        BadRequest: a folder is not there, or there is no name for the model.
    """
    for flag in ("folder", "defects", "good"):
        given = flags[flag]
        if given is not None and not given.is_dir():
            what = f"--{flag}" if flag != "folder" else "FOLDER"
            raise BadRequest(f"{given} is no folder: {what} names one with pictures.")
        flags[flag] = given and given.absolute()
    must_be_there(flags, "pretrained_pth", "regions")
    folder = flags["folder"]
    named = folder.parent if folder.name.lower() in USUAL_NAMES else folder
    name = flags.pop("name") or name_of_folder(named)
    if not name:
        raise BadRequest(
            f"Of {printable(str(named))} no name for a model can be made: say one with --name."
        )
    if not is_name(name):
        raise BadRequest(
            f"{name!r} is no name for a model: --name takes up to 64 letters, digits, - and _."
        )
    out_dir = flags.pop("out_dir") or Path("models") / name
    server = flags.pop("server")
    where = Server(server[0], Path(server[1])) if server else None
    if where is not None:
        _must_be_ours(where.data)
    limits = ImageLimits.of_flags(flags)
    return Learn(name=name, out_dir=out_dir, limits=limits, server=where, **flags)


def _must_be_ours(data: Path) -> None:
    """Raise BadRequest where a server's folder cannot be written: now, not after the learning."""
    place = next(folder for folder in (data / "models", data) if folder.is_dir())
    if not os.access(place, os.W_OK | os.X_OK):
        raise BadRequest(
            f"A server runs with the data folder {data}, which cannot be written: run kensa learn"
            " as the user who runs the server, or set KENSA_DATA_DIR to a folder of your own: then"
            " the model stays in --out_dir."
        )


def main(arguments: list[str] | None = None) -> int:
    flags = vars(parse(arguments))
    progress = Progress()

    def work() -> None:
        request = _asked(flags)
        if find_spec("torch") is None or find_spec("timm") is None:
            raise BadWeights(
                "Learning takes more packages than serving: pip install 'kensa[train]'"
            )
        show(learn(request, progress))

    return run(work, progress)


if __name__ == "__main__":
    sys.exit(main())
