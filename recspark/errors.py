"""Every error that recspark raises on purpose, each with its own exit code.

A message says what is wrong (table, column, row or setting), what recspark found instead, and what
to do next. `docs/runbook.md` has a line for each class.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from recspark.masking import mask


class RecsparkError(Exception):
    """Base class of all named errors. A job or the CLI ends with the error's `exit_code`.

    Secrets are hidden in the text of the error, whoever wrote the text.
    """

    exit_code = 1

    def __str__(self) -> str:
        return mask(super().__str__())


class ConfigError(RecsparkError):
    """A setting is unknown, of the wrong type or out of range."""

    exit_code = 2


class SourceError(RecsparkError):
    """The raw input cannot be read as the source's settings say, for example because a column is
    missing, renamed or of another type.
    """

    exit_code = 10


class MissingLandingError(SourceError):
    """The landing of the night does not exist. An empty landing is fine, a missing one is not."""

    exit_code = 11


class ConservationError(RecsparkError):
    """Rows were lost or invented: in != clean + quarantined + duplicates."""

    exit_code = 12


class SchemaError(RecsparkError):
    """A DataFrame does not have the columns that its table declares."""

    exit_code = 13


class KeyViolationError(RecsparkError):
    """Two rows of one write carry the same key."""

    exit_code = 14


class TableNotFoundError(RecsparkError):
    """A table that a stage reads does not exist (yet)."""

    exit_code = 15


class VersionNotFoundError(RecsparkError):
    """A pinned table version cannot be read any more (vacuumed) or never was."""

    exit_code = 16


class ConcurrentWriteError(RecsparkError):
    """Another writer committed to the same slice; nothing of this write is visible."""

    exit_code = 17


class StageOrderError(RecsparkError):
    """A stage was started before the stage that it reads from has finished for this run."""

    exit_code = 18


class IdRangeError(RecsparkError):
    """An index does not fit the type that a model or table needs."""

    exit_code = 19


class EmptyDataError(RecsparkError):
    """There is no data before the cutoff."""

    exit_code = 20


class CatalogueTooLargeError(RecsparkError):
    """There are more items, or users, than a model may hold. Raised before memory is taken."""

    exit_code = 21


class ModelError(RecsparkError):
    """A model cannot use the settings, queries or artifact that it got."""

    exit_code = 22


class ArtifactError(ModelError):
    """A saved model is missing, torn, or of another version or class."""

    exit_code = 23


class DamagedFileError(RecsparkError):
    """A data file of a table or of a landing is torn, or was deleted behind the table's back."""

    exit_code = 24


class ModelsFailedError(RecsparkError):
    """The night is published, but some models failed. Nothing that was published needs them."""

    exit_code = 25


class LeakError(RecsparkError):
    """A feature of the examples tells what the user did after the cutoff."""

    exit_code = 26


class FeedError(RecsparkError):
    """The training rows that were read are not those planned, or a rank has no rows to read."""

    exit_code = 30


class RankFailedError(RecsparkError):
    """A training rank failed; the message carries the rank's own traceback."""

    exit_code = 31


class NoSlotsError(RecsparkError):
    """The cluster has fewer free slots than there are training ranks."""

    exit_code = 32


class DivergedError(RecsparkError):
    """The loss is not finite, or vectors grow without limit. The message gives the step."""

    exit_code = 33


class DeviceError(RecsparkError):
    """The settings ask for training on a GPU, but the machine has no GPU."""

    exit_code = 34


class GateRefusedError(RecsparkError):
    """A publish gate refused tonight's lists; the last good lists stay as they were."""

    exit_code = 40


class SupersededRunError(RecsparkError):
    """A newer run of the night has begun. The lists of this run must not be published, or no longer
    be published.
    """

    exit_code = 41


class OpenRunError(RecsparkError):
    """Another run of the night, with other settings, has begun and has not ended."""

    exit_code = 42


class UnknownUserError(RecsparkError):
    """The id of a user or item is in no table."""

    exit_code = 50


class SetupError(RecsparkError):
    """The machine lacks something recspark needs: Java, a jar, a package."""

    exit_code = 60


class Interrupted(RecsparkError):
    """A person ended a command with Ctrl-C. The stages that had ended before are recorded."""

    exit_code = 130


def suggest(name: str, known_names: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name most similar to `name`. Where no name is
    similar, return the list of known names.

    Known names of more than 100 letters are not compared. Of more than 1,000 names, only 1,000 that
    begin with the same letter as `name` are compared. So the names in a hostile file cost little
    time. Of a long list, the first 20 names are shown.

    >>> suggest("eaze", ["ease", "als"])
    " Did you mean 'ease'?"
    >>> suggest("zzz", ["ease", "als"])
    ' Known: als, ease.'
    """
    names = sorted(known_names)
    compared_names = [other_name for other_name in names if len(other_name) <= 100]
    compared_names = (
        compared_names
        if len(compared_names) <= 1000
        else [other_name for other_name in compared_names if other_name[:1] == name[:1]][:1000]
    )
    similar_names = difflib.get_close_matches(name[:100], compared_names, n=1)
    return (
        f" Did you mean '{similar_names[0]}'?" if similar_names else f" Known: {shortened(names)}."
    )


def shortened(names: Sequence[str], most: int = 20, longest: int = 60) -> str:
    """Return the first `most` of `names` for a message, each cut after `longest` letters.

    >>> shortened(["a", "b" * 9, "c"], most=2, longest=4)
    'a, bbbb…, … (1 more)'
    """
    shown = [name if len(name) <= longest else f"{name[:longest]}…" for name in names[:most]]
    remainder = [f"… ({len(names) - most:,} more)"] if len(names) > most else []
    return ", ".join([*shown, *remainder])


def java_message(error: Exception) -> str:
    """Return the first line of the message of an error from Spark's JVM, up to 500 letters. Without
    a message, return the class name of the error.
    """
    java_exception = getattr(error, "java_exception", None)
    message = (
        str(error)
        if java_exception is None
        else str(java_exception.getMessage() or java_exception.toString())
    )
    lines = (line.strip() for line in message.splitlines())
    return next((line for line in lines if line), type(error).__name__)[:500]
