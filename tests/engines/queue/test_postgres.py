"""The URL of a database of several machines: libpq reads what was written, people no secret."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy.engine import make_url

from engines.queue.postgres import Postgres

SECRET = "p w%:@/+ s3?"


def test_any_user_password_and_option_arrives_as_it_is() -> None:
    """libpq reads spaces and plusses otherwise than SQLAlchemy writes them."""
    url = f"postgresql://line%201:{quote(SECRET, safe='')}@office/kensa?options=-c%20a%3Db%2Bc"
    written = Postgres.of("KENSA_RECORD_URL", url).connect_to
    found = conninfo_to_dict(written)
    assert (found["user"], found["password"], found["dbname"], found["options"]) == (
        "line 1", SECRET, "kensa", "-c a=b+c",
    )  # fmt: skip
    again = make_url(written)  # as DBOS reads it
    assert (again.username, again.password, again.query["options"]) == (
        "line 1", SECRET, "-c a=b+c",
    )  # fmt: skip


@pytest.mark.parametrize("secret", [SECRET, "two  spaces"])
@pytest.mark.parametrize("url", ["postgresql://kensa:{}@office/kensa",
                                 "postgresql://kensa@office/kensa?password={}"])  # fmt: skip
def test_no_sentence_has_the_password_in_any_form(url: str, secret: str) -> None:
    postgres = Postgres.of("KENSA_RECORD_URL", url.format(quote(secret, safe="")))
    for form in (secret, quote(secret)):
        said = postgres.shown(ValueError(f"no {form!s} in {form}."))
        assert said == "no *** in ***"
