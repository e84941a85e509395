"""The worker process: takes jobs from the queue, one at a time, and gives each a child process.

    python -m workers.jobs --data_dir D

Where KENSA_QUEUE_URL is set, as for the server, it takes jobs from the queue of several machines.
It never loads torch itself, so it is small, and a child that dies takes nothing with it. A job
whose child or worker died is begun again, at most twice.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

from engines.errors import EXIT_CODE, BadSettings
from engines.logs import FORMAT, set_up
from engines.machine.job_memory import JOB_SPARE
from engines.queue.fleet import Fleet
from workers.jobs.attempts import attended, spare
from workers.jobs.parent_and_child import die_with_parent, has_lock
from workers.jobs.single_worker import stopping, work

log = logging.getLogger("kensa.worker")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m workers.jobs", description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True, help="the server's KENSA_DATA_DIR")
    data = parser.parse_args(arguments).data_dir.absolute()
    set_up("info", os.environ.get(FORMAT, "text"), "worker")
    die_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    data.mkdir(parents=True, exist_ok=True)
    with (data / "worker.lock").open("w") as lock:
        if not has_lock(lock):
            log.error("Another worker has %s", data)
            return EXIT_CODE
        try:
            if os.environ.get(JOB_SPARE) == "auto" and find_spec("torch") is not None:
                keeping = [data, lambda: not attended]
                threading.Thread(target=spare.keep, args=keeping, daemon=True).start()
            fleet = Fleet.read(os.environ)
            if fleet is None:
                work(data)
            else:
                from workers.jobs.fleet_worker import work_with_others  # not needed elsewhere

                work_with_others(data, fleet)
        except BadSettings as error:
            log.error("%s", error)
            return EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
