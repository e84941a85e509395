"""Where the queue lies: a file of this machine, or a database that several machines share."""

from __future__ import annotations

import logging
import secrets
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sql
from dbos import DBOS, DBOSClient

from engines.errors import NoWorker
from engines.queue.fleet import Fleet
from engines.queue.json_rows import JsonSerializer
from engines.queue.protocol import APPLICATION, DATABASE, database_url

log = logging.getLogger("kensa")


class QueueClient(DBOSClient):
    """DBOS's client, which can count as well: it lists all rows, and 5,000 are 0.1 s of Python."""

    def count_workflows(
        self, attributes: dict[str, Any] | None = None
    ) -> list[tuple[str, str | None, int]]:
        """How many there are of each status and, of those that succeeded, of each output.

        Args:
            attributes: which all of them have, as `list_workflows` takes them.
        """
        queue = self._sys_db
        job, ended = queue.tables.workflow_status, queue.tables.workflow_output
        output = sql.func.coalesce(ended.c.output, job.c.output)
        said = sql.case((job.c.status == "SUCCESS", output)).label("said")
        query = (
            sql.select(job.c.status, said, sql.func.count())
            .select_from(job.outerjoin(ended, queue._wf_join(job, ended)))
            .where(queue._observability_filter(job.c.application_name, None))
            .group_by(job.c.status, sql.literal_column("said"))
        )
        if attributes:
            query = query.where(queue._attributes_contains_clause(attributes))
        with queue._observability_query() as connection:
            return [(row[0], row[1], row[2]) for row in connection.execute(query)]


def connect(data: Path) -> Any:
    """A QueueClient on the queue of this machine, which is made where there is no good one."""
    data.mkdir(parents=True, exist_ok=True)
    _put_aside_if_damaged(data)

    logging.getLogger("dbos").setLevel(logging.WARNING)
    url = database_url(data)
    DBOS.migrate(url)
    with closing(sqlite3.connect(data / DATABASE, timeout=30)) as database:
        database.execute("PRAGMA journal_mode=WAL")  # who reads waits for nobody
    return QueueClient(
        system_database_url=url, serializer=JsonSerializer(), application_name=APPLICATION
    )


def reach(fleet: Fleet) -> Any:
    """A QueueClient on the queue of several machines. Raises what is wrong, in psycopg's words."""
    logging.getLogger("dbos").setLevel(logging.CRITICAL)  # `problem` says it, once
    with psycopg.connect(fleet.database_url):
        pass  # which says best what is wrong
    DBOS.migrate(fleet.database_url)
    client = QueueClient(
        system_database_url=fleet.database_url, serializer=JsonSerializer(),
        application_name=APPLICATION, retry_connection_errors=False,
    )  # fmt: skip
    return _Reaching(client, fleet)


def _put_aside_if_damaged(data: Path) -> None:
    """Without the queue that it had the server still serves.

    A database that is locked, or cannot be read at the moment, is not a damaged one.
    """
    path = data / DATABASE
    if not path.exists():
        return
    try:
        with closing(sqlite3.connect(path, timeout=30)) as database:
            found = database.execute("PRAGMA quick_check").fetchone()[0]
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        found = str(error)
    if found != "ok":
        aside = path.with_name(f"{DATABASE}.damaged-{secrets.token_hex(3)}")
        for suffix in ("", "-wal", "-shm"):
            part = path.with_name(path.name + suffix)
            if part.exists():
                part.rename(aside.with_name(aside.name + suffix))
        log.error("The queue was damaged (%s): it is now %s, and a new one is begun",
                  found, aside.name)  # fmt: skip


class _Reaching:
    """A QueueClient far away: where its database does not answer, every method raises NoWorker."""

    def __init__(self, client: Any, fleet: Fleet) -> None:
        self._client = client
        self._fleet = fleet

    def __getattr__(self, name: str) -> Any:
        from sqlalchemy import exc

        method = getattr(self._client, name)

        def ask(*arguments: Any, **options: Any) -> Any:
            try:
                return method(*arguments, **options)
            except (exc.DBAPIError, exc.TimeoutError) as error:
                why = self._fleet.shown(error)
                raise NoWorker(f"The queue's database does not answer: {why}.") from error

        return ask
