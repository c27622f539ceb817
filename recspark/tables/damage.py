"""Which file a failed Spark job could not read."""

from __future__ import annotations

import re
from urllib.parse import unquote

from recspark.errors import DamagedFileError

# As Spark's error condition FAILED_READ_FILE ends, with and without a hint.
_READING = re.compile(
    r"\[FAILED_READ_FILE[.\w]*\] Encountered error while reading file (.+?)\.\s+(SQLSTATE|File does)"
)


def named(error: Exception, root: str) -> DamagedFileError | None:
    """Return what to raise for a job that `error` ended because of one file; None for other errors.

    `root` : URI of the tables; a file below it is named with its table, another is of a landing.
    """
    found = _READING.search(str(error))
    if found is None:
        return None
    uri, missing = found[1], found[2] == "File does"
    inside = _place(uri).removeprefix(_place(root).rstrip("/") + "/")
    what = "is not there" if missing else "is torn, or no data file"
    if inside == _place(uri):
        return DamagedFileError(f"{uri} {what}: land it again, then run this stage again")
    table, _, name = inside.partition("/")
    return DamagedFileError(
        f"table '{table}': its file {name} {what}, though the table's log lists it. Put the "
        "file back from a backup, or run the stage that writes the table again; then run this one "
        "again (docs/runbook.md)"
    )


def of_log(table: str, what: Exception | str) -> DamagedFileError:
    """Return what to raise where a file of a table's log is cut short or empty: its name, or the
    error of reading it.
    """
    said = what if isinstance(what, str) else str(what).partition("\n: ")[2] or str(what)
    name = re.search(r"\d{20}[.\w-]*", said)
    file = f"its log file {name[0]}" if name else f"its log ({said.splitlines()[0][:200]})"
    return DamagedFileError(
        f"table '{table}': {file} is cut short or empty: the commit that it held cannot be read. Put "
        "it back from a backup; where it is the newest and there is none, delete it (that write is "
        "lost then) and run the stage that writes the table again (docs/runbook.md)"
    )


def _place(uri: str) -> str:
    """Return `uri` without its scheme, its characters as they are.

    >>> _place("file:///my%20lake/t"), _place("/my lake/t"), _place("s3a://lake/t")
    ('/my lake/t', '/my lake/t', '/lake/t')
    """
    return unquote(re.sub(r"^\w+:/*", "/", uri))
