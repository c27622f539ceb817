"""Errors that name the file which a failed Spark job could not read."""

from __future__ import annotations

import re
from urllib.parse import unquote

from recspark.errors import DamagedFileError, SourceError

# The message of Spark's error condition FAILED_READ_FILE. The file is followed by the SQLSTATE, or
# by a hint: that the file does not exist, has no footer, or has a column of another type.
_FAILED_READ = re.compile(
    r"\[FAILED_READ_FILE[.\w]*\] Encountered error while reading file (.+?)\.\s+(SQLSTATE|File does|[A-Z])"
)


def failed_file(error: Exception) -> tuple[str, bool] | None:
    """Return (URI of the file that a job failed on, whether the file is gone); None if `error` is
    another error.
    """
    match = _FAILED_READ.search(str(error))
    return None if match is None else (match[1], match[2] == "File does")


def unreadable_source_error(uri: str, is_gone: bool) -> SourceError:
    """Return the error to raise for a file of a landing that cannot be read."""
    problem = (
        "is gone" if is_gone else "cannot be read to its end (torn, or not what its name says)"
    )
    return SourceError(
        f"{unquote(uri)} {problem}; nothing was written of it. Deliver it again and run the night again"
    )


def unreadable_file_error(error: Exception, root: str) -> DamagedFileError | SourceError | None:
    """Return the error to raise if `error` ended a job because of one file; None for other errors.

    `root` : URI of the tables. The error for a file below it names the file's table. Any other file
    belongs to a landing.
    """
    failed = failed_file(error)
    if failed is None:
        return None
    uri, is_gone = failed
    path_below_root = _plain_path(uri).removeprefix(_plain_path(root).rstrip("/") + "/")
    problem = "is not there" if is_gone else "is torn, or no data file"
    if path_below_root == _plain_path(uri):
        return unreadable_source_error(uri, is_gone)
    table, _, file_name = path_below_root.partition("/")
    return DamagedFileError(
        f"table '{table}': its file {file_name} {problem}, though the table's log lists it. Put the "
        "file back from a backup, or run the stage that writes the table again; then run this one "
        "again (docs/runbook.md)"
    )


def damaged_log_error(table: str, cause: Exception | str) -> DamagedFileError:
    """Return the error to raise if a file of a table's log is cut short or empty.

    `cause` : the name of the log file, or the error of reading it, whose message may name the file
    """
    message = cause if isinstance(cause, str) else str(cause).partition("\n: ")[2] or str(cause)
    name_match = re.search(r"\d{20}[.\w-]*", message)
    damaged_part = (
        f"its log file {name_match[0]}"
        if name_match
        else f"its log ({message.splitlines()[0][:200]})"
    )
    return DamagedFileError(
        f"table '{table}': {damaged_part} is cut short or empty: the commit that it held cannot be read. Put "
        "it back from a backup; where it is the newest and there is none, delete it (that write is "
        "lost then) and run the stage that writes the table again (docs/runbook.md)"
    )


def _plain_path(uri: str) -> str:
    """Return `uri` as a path: without its scheme, and with escapes such as `%20` decoded.

    >>> _plain_path("file:///my%20lake/t"), _plain_path("/my lake/t"), _plain_path("s3a://lake/t")
    ('/my lake/t', '/my lake/t', '/lake/t')
    """
    return unquote(re.sub(r"^\w+:/*", "/", uri))
