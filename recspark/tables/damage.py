"""Which file a failed Spark job could not read."""

from __future__ import annotations

import re
from urllib.parse import unquote

from recspark.errors import DamagedFileError, SourceError

# As Spark's error condition FAILED_READ_FILE ends, with and without a hint (which says that the file
# is gone, or has no footer, or a column of another type).
_READING = re.compile(
    r"\[FAILED_READ_FILE[.\w]*\] Encountered error while reading file (.+?)\.\s+(SQLSTATE|File does|[A-Z])"
)


def failed_file(error: Exception) -> tuple[str, bool] | None:
    """Return the URI of the file that `error` ended a job because of, and whether it is gone; None
    for other errors.
    """
    found = _READING.search(str(error))
    return None if found is None else (found[1], found[2] == "File does")


def unread_source(uri: str, is_gone: bool) -> SourceError:
    """Return what to raise for a file of a landing that cannot be read."""
    what = "is gone" if is_gone else "cannot be read to its end (torn, or not what its name says)"
    return SourceError(
        f"{unquote(uri)} {what}; nothing was written of it. Deliver it again and run the night again"
    )


def named(error: Exception, root: str) -> DamagedFileError | SourceError | None:
    """Return what to raise for a job that `error` ended because of one file; None for other errors.

    `root` : URI of the tables; a file below it is named with its table, another is of a landing.
    """
    failed = failed_file(error)
    if failed is None:
        return None
    uri, missing = failed
    inside = _place(uri).removeprefix(_place(root).rstrip("/") + "/")
    what = "is not there" if missing else "is torn, or no data file"
    if inside == _place(uri):
        return unread_source(uri, missing)
    table, _, name = inside.partition("/")
    return DamagedFileError(
        f"table '{table}': its file {name} {what}, though the table's log lists it. Put the "
        "file back from a backup, or run the stage that writes the table again; then run this one "
        "again (docs/runbook.md)"
    )


def _place(uri: str) -> str:
    """Return `uri` without its scheme, its characters as they are.

    >>> _place("file:///my%20lake/t"), _place("/my lake/t"), _place("s3a://lake/t")
    ('/my lake/t', '/my lake/t', '/lake/t')
    """
    return unquote(re.sub(r"^\w+:/*", "/", uri))
