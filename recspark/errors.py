"""Every error recspark raises on purpose, each with its own exit code.

A message says what was wrong (table, column, row or setting), what was there instead, and what to
do next. `docs/runbook.md` has a line for each class.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from recspark.masking import mask


class RecsparkError(Exception):
    """Base of all named errors; `exit_code` is what a job or the CLI ends with.

    Its text shows no secrets, wherever it came from.
    """

    exit_code = 1

    def __str__(self) -> str:
        return mask(super().__str__())


class ConfigError(RecsparkError):
    """A setting is unknown, of the wrong type or out of range."""

    exit_code = 2


class SourceError(RecsparkError):
    """The raw input cannot be read as the source says: a column is gone, renamed or of another
    type.
    """

    exit_code = 10


class MissingLandingError(SourceError):
    """The landing of the night is not there. A present, empty landing is fine; a missing one is
    not.
    """

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
    """There is nothing to work on before the cutoff."""

    exit_code = 20


class CatalogueTooLargeError(RecsparkError):
    """A dense model was asked to hold more items than its limit; raised before memory is taken."""

    exit_code = 21


class ModelError(RecsparkError):
    """A model got settings, queries or an artifact that it cannot use."""

    exit_code = 22


class ArtifactError(ModelError):
    """A saved model is missing, torn, or of another version or class."""

    exit_code = 23


class DamagedFileError(RecsparkError):
    """A data file of a table or of a landing is torn, or was deleted behind the table's back."""

    exit_code = 24


class ModelsFailedError(RecsparkError):
    """The night is published, but without models that nothing published needs: they failed alone."""

    exit_code = 25


class FeedError(RecsparkError):
    """Training rows read do not equal the rows planned, or a rank has nothing to read."""

    exit_code = 30


class RankFailedError(RecsparkError):
    """A training rank failed; the message carries the rank's own traceback."""

    exit_code = 31


class NoSlotsError(RecsparkError):
    """The cluster has no free slot for each training rank."""

    exit_code = 32


class DivergedError(RecsparkError):
    """The loss is not finite, or vectors explode; the message gives the step."""

    exit_code = 33


class DeviceError(RecsparkError):
    """A training asks for a GPU where there is none."""

    exit_code = 34


class GateRefusedError(RecsparkError):
    """A publish gate refused tonight's lists; the last good lists stay as they were."""

    exit_code = 40


class SupersededRunError(RecsparkError):
    """A newer run of the night has begun: this one's lists are not, or no longer, to be published."""

    exit_code = 41


class OpenRunError(RecsparkError):
    """Another run of the night, with other settings, has begun and not ended."""

    exit_code = 42


class UnknownUserError(RecsparkError):
    """A user or item asked for by id is in no table."""

    exit_code = 50


class SetupError(RecsparkError):
    """The machine lacks something recspark needs: Java, a jar, a package."""

    exit_code = 60


class Interrupted(RecsparkError):
    """A person ended a command by Ctrl-C; what had ended before is recorded."""

    exit_code = 130


def suggest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest known name, else the list of known names.

    Names are looked at up to 100 letters and 1,000 names, so that those of a hostile file cost
    little; of long lists the first 20 are shown.

    >>> suggest("eaze", ["ease", "als"])
    " Did you mean 'ease'?"
    >>> suggest("zzz", ["ease", "als"])
    ' Known: als, ease.'
    """
    names = sorted(known)
    likely = [other for other in names if len(other) <= 100]
    likely = likely if len(likely) <= 1000 else [o for o in likely if o[:1] == name[:1]][:1000]
    near = difflib.get_close_matches(name[:100], likely, n=1)
    return f" Did you mean '{near[0]}'?" if near else f" Known: {shortened(names)}."


def shortened(names: Sequence[str], most: int = 20, longest: int = 60) -> str:
    """Return `names` for a message: the first `most`, each up to `longest` letters.

    >>> shortened(["a", "b" * 9, "c"], most=2, longest=4)
    'a, bbbb…, … (1 more)'
    """
    shown = [n if len(n) <= longest else f"{n[:longest]}…" for n in names[:most]]
    rest = [f"… ({len(names) - most:,} more)"] if len(names) > most else []
    return ", ".join([*shown, *rest])


def java_message(error: Exception) -> str:
    """Return the first line of what the JVM said, up to 500 letters, for an error of Spark's."""
    java = getattr(error, "java_exception", None)
    said = str(error) if java is None else str(java.getMessage() or java.toString())
    lines = (line.strip() for line in said.splitlines())
    return next((line for line in lines if line), type(error).__name__)[:500]
