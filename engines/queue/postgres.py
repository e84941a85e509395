"""`Postgres`: a database that several machines use, by its URL."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from engines.errors import BadSettings

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

# Of every connection: none hangs for long on a network that is gone.
_PATIENCE = {
    "connect_timeout": "5",  # seconds
    "keepalives_idle": "5",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",  # ms
}


@dataclass(frozen=True)
class Postgres:
    """Where a database is. Only `connect_to` has the password: no sentence, no repr."""

    _url: URL

    @classmethod
    def of(cls, setting: str, text: str) -> Postgres:
        """The database that a setting names.

        Raises:
            BadSettings: it is no PostgreSQL URL.
        """
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError

        try:
            url = make_url(text)
        except (ArgumentError, ValueError):
            url = None
        if url is None or url.get_backend_name() != "postgresql" or not url.database:
            raise BadSettings(
                f"{setting} is no PostgreSQL URL: it looks like"
                " postgresql://user:password@host:5432/database."
            )
        return cls(url)

    @property
    def connect_to(self) -> str:
        """The URL as libpq takes it, with patience that ends."""
        url = self._url.set(drivername="postgresql")
        url = url.update_query_dict({**_PATIENCE, **url.query})
        place, _, asked = url.render_as_string(hide_password=False).partition("?")
        # libpq takes no space as it is, and no plus for one.
        return f"{place.replace(' ', '%20')}?{asked.replace('+', '%20')}"

    @property
    def place(self) -> str:
        """Which one it is, for people."""
        host, port = self._url.host or "localhost", self._url.port
        return f"{self._url.database} on {host}" + (f":{port}" if port else "")

    def shown(self, error: BaseException) -> str:
        """What an error says, in one line and without the password."""
        text = str(getattr(error, "orig", None) or error).strip()
        given = (self._url.password, self._url.query.get("password"), os.environ.get("PGPASSWORD"))
        secrets = [form for one in given if one for form in (quote(str(one)), str(one))]
        for secret in sorted(secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
        text = " ".join(text.split("\n\t")[0].split("(Background on this error")[0].split())
        return text.rstrip(".")
