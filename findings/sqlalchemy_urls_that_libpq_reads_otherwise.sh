#!/usr/bin/env bash
# SQLAlchemy and libpq: a URL that one has written is another one, or none, for the other.
#
# Version: SQLAlchemy 2.1.9, psycopg 3.3.9 (binary, with its own libpq).
# Behaviour: URL.render_as_string writes a space in a password as it is, and one in an option as "+".
#   libpq refuses the first, naming the password's words in its error, and takes the second for a
#   plus. Both read %20, which is what the URL had before SQLAlchemy parsed it.
# Why it matters: whoever parses a database's URL with SQLAlchemy, to add a timeout or to check it,
#   and hands the result to psycopg, cannot connect with such a password, and has it in the log.
# Seen: the lines that this script prints, and compares. No database is needed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet sqlalchemy==2.1.9 'psycopg[binary]==3.3.9'
cat > "$folder/run.py" <<'PYTHON'
import psycopg
import sqlalchemy
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy.engine import make_url

PASSWORD = "postgresql://line:two%20words@host/parts"
OPTION = "postgresql://line@host/parts?application_name=line%203"


def rendered(url):
    return make_url(url).render_as_string(hide_password=False)


print("sqlalchemy", sqlalchemy.__version__, "psycopg", psycopg.__version__)
assert conninfo_to_dict(PASSWORD)["password"] == make_url(PASSWORD).password == "two words"
assert conninfo_to_dict(OPTION)["application_name"] == "line 3"
print(PASSWORD, "->", rendered(PASSWORD))
assert rendered(PASSWORD) == "postgresql://line:two words@host/parts"
try:
    conninfo_to_dict(rendered(PASSWORD))
except psycopg.ProgrammingError as error:
    print("libpq:", error)
    assert "two words" in str(error)
else:
    raise AssertionError("libpq reads it now")
found = conninfo_to_dict(rendered(OPTION))["application_name"]
print(OPTION, "->", rendered(OPTION), "->", found)
assert found == "line+3"
print("as described")
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
