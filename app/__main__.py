"""`kensa`, or `python -m app`: read the settings, listen, serve until told to stop."""

from __future__ import annotations

import argparse
import fcntl
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import engines.missing_packages  # noqa: F401 (it says what to install)
from app.http.starting import Starting
from engines.errors import EXIT_CODE, BadRequest, BadSettings, KensaError
from engines.files import write_atomically

if TYPE_CHECKING:
    from app.settings import Settings

TAKE_OVER_S = 5.0  # that a server may take to end, beside its grace ...
MOST_GRACE_S = 60  # ... of which more is not waited for
ADDRESS = "address"  # in the data folder: where its server answers
LAST_WORDS_S = 1.0  # for answers, after the GPU was lost
# A thread that only computes, such as one that lists versions, gives Python's lock away after so
# long. A part asks for it a dozen times: Python's own 5 ms would be 60 ms for it.
SWITCH_S = 0.0005

COMMANDS = {
    "learn": "learn from a folder of good parts, and hand the model to the server that runs here",
    "doctor": "look at this machine: what it has, what fits, what is wrong, what to type for it",
    "threshold": "show or change the threshold of a model in a folder",
    "keys": "make, show and remove API keys",
    "verify": "check the record of decisions: whether anything was changed in it afterwards",
}

log = logging.getLogger("kensa")


def main() -> None:
    """The command. Exits with 0 when told to stop, with 2 and one sentence at a wrong setting."""
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        sys.exit(_command(sys.argv[1], sys.argv[2:]))
    # Early, so imports that take time come after: process 1 of a container hears no signal that it
    # has no handler for. uvicorn raises it again once it has stopped in good order: no failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    _parser().parse_args()
    gc.disable()  # nothing of what is loaded is garbage: to look for it takes a sixth of the time
    from engines.machine.memory import keep_together

    keep_together()
    from app.settings import Settings

    try:
        settings = Settings.read()
        settings.data  # noqa: B018 (raises where there is no place for it)
        _log_lines(settings)
        from app.http.access import Access

        Access(settings).must_be_safe()
        have_to_oneself(settings)
        listener = listen(settings.host, settings.port)
    except KensaError as error:
        sys.stderr.write(f"kensa: {error}\n")
        sys.exit(EXIT_CODE)
    serve(settings, listener)


def have_to_oneself(settings: Settings) -> int | None:
    """Lock the data folder for as long as this process lives; None where that cannot be done.

    A server that is just being stopped is waited for. Returns the descriptor that holds it.

    Raises:
        BadSettings: another server has the folder. After a rollback on one of the two, the other
            would go on with the version that was rolled back.
    """
    folder = None
    end = time.monotonic() + min(settings.shutdown_grace_s, MOST_GRACE_S) + TAKE_OVER_S
    try:
        settings.data.mkdir(parents=True, exist_ok=True)
        folder = os.open(settings.data, os.O_RDONLY)
        while not _is_locked(folder):
            if time.monotonic() > end:
                os.close(folder)
                raise BadSettings(
                    f"Another server has {settings.data}: stop it, or set KENSA_DATA_DIR to another"
                    " folder for this one."
                )
            time.sleep(0.1)
    except OSError as error:  # such as a file system without locks
        log.warning(
            "%s cannot be locked (%s): see to it that no other server has this folder",
            *(settings.data, error.strerror),
        )
    return folder


def _is_locked(folder: int) -> bool:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        BadSettings: the port is taken, or the address is not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise BadSettings(
            f"Cannot listen on {host}, port {port}: {error.strerror}."
            " Stop what uses it, or set KENSA_HOST and KENSA_PORT."
        ) from None


def serve(settings: Settings, listener: socket.socket) -> None:
    """Answer requests until SIGTERM, SIGHUP or Ctrl-C, then exit with 0."""
    url = _url(*listener.getsockname()[:2])
    with suppress(OSError):  # a folder that cannot be written is said elsewhere
        write_atomically(settings.data / ADDRESS, url.encode())
    starting = Starting(listener)
    log.info("Kensa starts; %s answers 503 until it is ready", url)

    import uvicorn

    from app.http.connection import BACKLOG, Connection, room_for_connections
    from app.main import create_app
    from app.settings import version
    from engines.runtimes import cuda

    def when_lost(why: str) -> None:
        app.state.store.end_of_process()
        _end_soon(why)

    sys.setswitchinterval(SWITCH_S)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            app.state.store.end_of_process()
            super().handle_exit(sig, frame)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            open_models = self.lifespan.startup

            async def open_models_first() -> None:
                await open_models()
                _freeze()
                starting.end()

            self.lifespan.startup = open_models_first
            await super().startup(sockets)
            log.info("Kensa %s listens on %s: / is the screen, /docs for programs", version(), url)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            app.state.stopping.set()  # for answers that would never end by themselves
            await super().shutdown(sockets)

    app = create_app(settings)
    cuda.when_lost(when_lost)
    most = room_for_connections(settings.max_connections)
    config = uvicorn.Config(
        app,
        http=partial(Connection, settings=settings, most=most),  # type: ignore[arg-type]
        loop="asyncio",  # not another one where that happens to be installed
        ws="none",
        backlog=BACKLOG,
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=settings.shutdown_grace_s,
    )
    gc.enable()
    Server(config).run(sockets=[listener])


def _freeze() -> None:
    """Let Python's search for cycles pass over all that stays as long as the process does.

    It stops every thread: over the 160,000 objects of the libraries it takes as long as a part does
    or longer, and a list, which makes thousands of objects, brings one on.
    """
    gc.collect()  # else what is left of the start would stay, too
    gc.freeze()


def _command(name: str, arguments: list[str]) -> int:
    """Do what one of the sub-commands does; its exit code."""
    try:
        if name == "learn":
            _learn(arguments)
        elif name == "doctor":
            from app.watching.doctor.command import command as doctor

            return doctor(arguments)
        elif name == "threshold":
            from engines.threshold_command import main as threshold

            return threshold(arguments)
        elif name == "verify":
            from app.decisions.verify import command as verify

            verify(arguments)
        elif name == "keys":
            from app.http.keys import command as keys

            keys(arguments)
        else:
            raise BadRequest(
                f"There is no command {name!r}. There are {', '.join(COMMANDS)}; without one, kensa"
                " serves. kensa --help says more."
            )
    except KensaError as error:
        sys.stderr.write(f"kensa: {error}\n")
        return EXIT_CODE
    return 0


def _learn(arguments: list[str]) -> NoReturn:
    """Become the process that learns: a server never loads what that takes."""
    from app.settings import Settings

    settings = Settings.read()
    given = [f"--max_image_{what}={getattr(settings, f'max_image_{what}')}"
             for what in ("bytes", "pixels")]  # fmt: skip
    if _serves(settings.data):
        given += ["--server", _address(settings), str(settings.data)]
    words = [sys.executable, "-m", "workers.learn", *given, *arguments]
    os.execv(sys.executable, words)  # it gets the terminal, and Ctrl-C


def _address(settings: Settings) -> str:
    """Where the server of this data folder answers this machine: it may have other settings."""
    try:
        url = (settings.data / ADDRESS).read_text(encoding="ascii")
    except (OSError, ValueError):
        url = _url(settings.host, settings.port)
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def _url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _serves(data: Path) -> bool:
    """Whether a server has this data folder."""
    try:
        folder = os.open(data, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _is_locked(folder)
    except OSError:
        return False
    finally:
        os.close(folder)


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    logging.shutdown()
    os._exit(0)  # not sys.exit, which would wait for a thread that waits for a locked queue


def _end_soon(why: str) -> None:
    """The GPU is lost. Parts that wait get their error, and the supervisor starts a new process."""
    from engines.runtimes.cuda import LOST_EXIT_CODE

    log.critical("%s This process ends with exit code %d.", why, LOST_EXIT_CODE)

    def end() -> NoReturn:
        logging.shutdown()
        os._exit(LOST_EXIT_CODE)  # whoever waits for the GPU would keep it from ending

    threading.Timer(LAST_WORDS_S, end).start()


def _log_lines(settings: Settings) -> None:
    """Lines on stderr. uvicorn only speaks up when something is wrong."""
    from app.settings import unknown_variables
    from engines.logs import set_up

    set_up(settings.log_level, settings.log_format)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # warns of what clients do wrong
    for name in unknown_variables():
        log.warning("%s is set, but there is no such setting", name)


def _parser() -> argparse.ArgumentParser:
    from app.settings import GROUPS, PREFIX, table

    lines = []
    for name, default, _, meaning in table():
        if (group := GROUPS.get(name.removeprefix(PREFIX).lower())) is not None:
            lines += ["", f"{group}:"]
        lines += [
            f"  {name} ({f'default {default}' if default else 'not set'})",
            f"      {meaning}",
        ]
    commands = [f"  kensa {name:<10} {meaning}" for name, meaning in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="kensa",
        usage="kensa [-h] [--version] | kensa COMMAND ...",
        description="Without a command: serve the models over HTTP.\n\n"
        + "\n".join(["commands, each with a --help of its own:", *commands]),
        epilog="\n".join(["Settings are environment variables.", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="which Kensa this is")
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        from app.settings import version

        sys.stdout.write(f"kensa {version()}\n")
        parser.exit()


if __name__ == "__main__":
    main()
