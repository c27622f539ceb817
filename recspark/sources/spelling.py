"""How a source spells numbers, ids and what is not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date

from recspark.config import NULL_IDS, Source

# What Unicode calls white space, what is printed with no width, and NUL, with which some databases
# pad: a text is trimmed of these at both ends.
BLANKS = (
    "".join(chr(code) for code in range(0x3001) if chr(code).isspace())
    + "\x00\u180e\u200b\u200c\u200d\u2060\ufeff"
)
_BLANK = r"[\s\u0085\u00a0\u1680\u2000-\u200b\u2028\u2029\u202f\u205f\u3000\u2060\ufeff]"


@dataclass(frozen=True)
class Spelling:
    """How one input spells its values; raw columns by name.

    Parameters
    ----------
    decimal : the sign before the fraction of a number
    thousands : the sign between groups of three digits; "" = there is none
    currency : signs that may stand before or after a number
    null_ids : texts that are no id, in any case
    null_values : raw column -> texts and numbers that mean "not known" there
    whole_numbers : raw columns whose ids are whole numbers, so that 13085.0 as text is 13085
    earliest : a number of seconds, milliseconds or microseconds before this day is no time
    """

    decimal: str = "."
    thousands: str = ""
    currency: tuple[str, ...] = ()
    null_ids: tuple[str, ...] = NULL_IDS
    null_values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    whole_numbers: frozenset[str] = frozenset()
    earliest: date = date(1990, 1, 1)

    @property
    def is_plain(self) -> bool:
        """Whether a number is spelt as Spark and programs spell it."""
        return self.decimal == "." and not self.thousands and not self.currency

    def number_pattern(self) -> str:
        """Return a Java regular expression of a text that is a number, blanks at its ends cut."""
        whole = r"\d+"
        if self.thousands:
            whole = rf"(?:\d{{1,3}}(?:{self._group()}\d{{3}})+|\d+)"
        point = rf"\Q{self.decimal}\E"
        number = rf"(?:{whole}(?:{point}\d*)?|{point}\d+)(?:[eE][+-]?\d+)?"
        if not self.currency:
            return rf"[+-]?{number}"
        sign = "(?:" + "|".join(rf"\Q{text}\E" for text in self.currency) + ")"
        before, after = rf"(?:{sign}{_BLANK}*)?", rf"(?:{_BLANK}*{sign})?"
        return rf"[+-]?{before}[+-]?{number}{after}"

    def decoration_pattern(self) -> str:
        """Return a Java regular expression of what a number text has beside sign, digits, decimal
        sign and exponent.
        """
        parts = [rf"\Q{text}\E" for text in self.currency] + [_BLANK]
        if self.thousands:
            parts.append(self._group())
        return "|".join(parts)

    def _group(self) -> str:
        return _BLANK if self.thousands in BLANKS else rf"\Q{self.thousands}\E"


def spelling_of(source: Source, columns: Mapping[str, str]) -> Spelling:
    """Return the spelling of an input of `source`.

    Parameters
    ----------
    columns : event or item column -> raw column, by which the source's settings name them
    """
    nothing: dict[str, tuple[str, ...]] = {}
    for name, texts in source.null_values.items():
        if name in columns:
            nothing[columns[name]] = (*nothing.get(columns[name], ()), *texts)
    return Spelling(
        decimal=source.decimal,
        thousands=source.thousands,
        currency=source.currency,
        null_ids=source.null_ids,
        null_values=nothing,
        whole_numbers=frozenset(
            columns[name] for name in source.whole_number_ids if name in columns
        ),
        earliest=source.earliest,
    )
