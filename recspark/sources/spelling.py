"""How a source spells numbers, ids and missing values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date

from recspark.config import NULL_IDS, Source

# Characters that are trimmed from both ends of a text: all white space of Unicode, characters
# without width, and NUL, with which some databases pad texts.
BLANKS = (
    "".join(chr(code) for code in range(0x3001) if chr(code).isspace())
    + "\x00\u180e\u200b\u200c\u200d\u2060\ufeff"
)
# One blank inside a number (1 234,50 €), as a Java regular expression.
_BLANK = r"[\s\u0085\u00a0\u1680\u2000-\u200b\u2028\u2029\u202f\u205f\u3000\u2060\ufeff]"


@dataclass(frozen=True)
class Spelling:
    """How one input of a source spells its values.

    Parameters
    ----------
    decimal : the sign before the fraction of a number
    thousands : the sign between groups of three digits; "" = there is none; " " = any blank
    currency : signs that may stand before or after a number
    null_ids : texts that mean "no id", in upper or lower case
    null_values : raw column -> texts and numbers that mean "not known" in that column
    whole_numbers : raw columns whose ids are whole numbers, so that text 13085.0 is the id 13085
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
        """Whether a number is spelt as programs and Spark spell it: 1234.5."""
        return self.decimal == "." and not self.thousands and not self.currency

    def number_pattern(self) -> str:
        """Return a Java regular expression for the text of a number without blanks at its ends.

        With decimal "," and thousands ".", it matches 1.234,50 and 1234,5 but not 12.34,50.
        """
        integer_digits = r"\d+"
        if self.thousands:
            integer_digits = rf"(?:\d{{1,3}}(?:{self._group()}\d{{3}})+|\d+)"
        decimal_sign = rf"\Q{self.decimal}\E"
        number = rf"(?:{integer_digits}(?:{decimal_sign}\d*)?|{decimal_sign}\d+)(?:[eE][+-]?\d+)?"
        if not self.currency:
            return rf"[+-]?{number}"
        currency_sign = "(?:" + "|".join(rf"\Q{text}\E" for text in self.currency) + ")"
        currency_before, currency_after = (
            rf"(?:{currency_sign}{_BLANK}*)?",
            rf"(?:{_BLANK}*{currency_sign})?",
        )
        return rf"[+-]?{currency_before}[+-]?{number}{currency_after}"

    def decoration_pattern(self) -> str:
        """Return a Java regular expression for what has to be removed from a number's text before a
        cast: currency signs, blanks and signs between groups of three digits.
        """
        parts = [rf"\Q{text}\E" for text in self.currency] + [_BLANK]
        if self.thousands:
            parts.append(self._group())
        return "|".join(parts)

    def _group(self) -> str:
        return _BLANK if self.thousands in BLANKS else rf"\Q{self.thousands}\E"


def spelling_of(source: Source, columns: Mapping[str, str]) -> Spelling:
    """Return the spelling of one input of `source`.

    Parameters
    ----------
    columns : event or item column -> raw column. The source's settings name event and item columns,
        and the spelling names raw ones
    """
    null_values: dict[str, tuple[str, ...]] = {}
    for name, texts in source.null_values.items():
        if name in columns:
            null_values[columns[name]] = (*null_values.get(columns[name], ()), *texts)
    return Spelling(
        decimal=source.decimal,
        thousands=source.thousands,
        currency=source.currency,
        null_ids=source.null_ids,
        null_values=null_values,
        whole_numbers=frozenset(
            columns[name] for name in source.whole_number_ids if name in columns
        ),
        earliest=source.earliest,
    )
