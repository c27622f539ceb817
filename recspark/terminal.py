"""What may reach a terminal or a log: text of the data is not trusted with its control characters."""

from __future__ import annotations

import logging
import unicodedata

# Joiners are part of ordinary words of Persian and Indic scripts, and of emoji.
_JOINERS = "\u200c\u200d"


def printable(text: object, keep: str = "") -> str:
    r"""Return `text` with every character that a terminal would obey, or not show, as its escape.

    Those are control characters (C0, C1), bidirectional marks, zero-width and other invisible
    characters, line and paragraph separators and lone surrogates. Letters, marks, blanks and joiners
    stay. `keep` : characters that stay too, such as the newlines of a message.

    >>> printable("MUG\x1b[2J \u202eGNP\n"), printable("Amélie 東京"), printable("a\nb", keep="\n")
    ('MUG\\x1b[2J \\u202eGNP\\n', 'Amélie 東京', 'a\nb')
    """
    plain = str(text)
    if plain.isprintable():
        return plain
    return "".join(char if _is_shown(char, keep) else _escape(char) for char in plain)


def _is_shown(char: str, keep: str) -> bool:
    return (
        char.isprintable()
        or char in keep
        or char in _JOINERS
        or unicodedata.category(char) == "Zs"  # blanks of other widths
    )


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


class LineFormatter(logging.Formatter):
    """A log line with nothing in it that a terminal would obey; a traceback keeps its lines."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of `record`."""
        return printable(super().format(record), keep="\n")


def log_to_terminal(level: str) -> None:
    """Let this process's log lines go to standard error, from `level` on.

    py4j's tracebacks of a JVM that ended first are left out: what ended it has its own message.
    """
    lines = logging.StreamHandler()
    lines.setFormatter(LineFormatter("%(message)s"))
    # Some of py4j's are in its own name, some in that of the root logger.
    lines.addFilter(lambda record: "/py4j/" not in record.pathname)
    logging.basicConfig(level=level, handlers=[lines])
