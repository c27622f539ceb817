"""Makes text safe for a terminal or a log. Text from the data may hold control characters, which
are not trusted.
"""

from __future__ import annotations

import logging
import unicodedata

# Zero-width joiners are part of ordinary words in Persian and Indic scripts, and of emoji.
_JOINERS = "\u200c\u200d"


def printable(text: object, keep: str = "") -> str:
    r"""Return `text` with an escape in place of every character that a terminal would obey as a
    command, or would not show.

    Such characters are control characters (C0, C1), bidirectional marks, zero-width and other
    invisible characters, line and paragraph separators and lone surrogates. Letters, marks, blanks
    and joiners are not changed. The characters in `keep` are not changed either, such as the
    newlines of a message.

    >>> printable("MUG\x1b[2J \u202eGNP\n"), printable("Amélie 東京"), printable("a\nb", keep="\n")
    ('MUG\\x1b[2J \\u202eGNP\\n', 'Amélie 東京', 'a\nb')
    """
    plain_text = str(text)
    if plain_text.isprintable():
        return plain_text
    return "".join(
        character if _is_shown(character, keep) else _escape(character) for character in plain_text
    )


def _is_shown(character: str, keep: str) -> bool:
    return (
        character.isprintable()
        or character in keep
        or character in _JOINERS
        or unicodedata.category(character) == "Zs"  # blanks of other widths
    )


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class LineFormatter(logging.Formatter):
    """Formats a log record without characters that a terminal would obey. A traceback keeps its
    line breaks.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return `record` as a printable line, or as several lines where it has a traceback."""
        return printable(super().format(record), keep="\n")


def log_to_terminal(level: str) -> None:
    """Write the log records of this process to standard error, from `level` on.

    Records of py4j are left out: the tracebacks that py4j logs when the JVM has ended before
    Python. Whatever ended the JVM has its own message.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(message)s"))
    # Filtered by file, because py4j logs some records with its own logger, others with the root's.
    handler.addFilter(lambda record: "/py4j/" not in record.pathname)
    logging.basicConfig(level=level, handlers=[handler])
