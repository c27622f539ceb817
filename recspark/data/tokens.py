"""The one tokeniser of texts: item names, descriptions and whatever else models read as words.

What is a word?

- A run of letters, digits and the marks that belong to them, of any alphabet. The text is in Unicode
  NFKC and without case (`str.casefold`), so `ＣＡＦÉ`, `Café` and `café` are one word, and so are
  `Straße` and `STRASSE`. Digits of other scripts become 0 to 9.
- An apostrophe between letters stays: `don't`, `l'amour`. So do a point and a comma between digits:
  `3.5`, `1,000`. A percent sign stays behind its number: `100%`.
- A number and its unit are one word, with or without a space: `60cm`, `60 cm`. `UNITS` has the units
  that are joined over a space.
- A hyphen ends a word (`hand-made` has two), except behind a single letter that begins the word:
  `t-shirt` is `tshirt`, `x-ray` is `xray`. Everything else, the underscore too, ends a word.
- Chinese, Japanese, Thai, Lao, Khmer and Burmese have no spaces between words. A run of their
  characters is cut into pairs of neighbours: 东京都 has the words 东京 and 京都. A run of one
  character is that character. A character here is a letter with the marks on it.

Are regular expressions enough? The rules for `'`, `.` and `,` are those of Unicode's word boundaries
(UAX #29, MidNumLet), which ICU follows too. What ICU has beside them is a dictionary of Thai, Lao, Khmer
and Burmese words, and of Chinese and Japanese ones. A dictionary does not know brands and models, which
are what the names of items consist of. Pairs need none, and a search by pairs finds as well (Kwok
1997, "Comparing representations in Chinese information retrieval"; Lucene's CJKAnalyzer does the same).
Python's `re` has no class of marks, so `_MARKS` is made from the Unicode database. Without the
marks, a Hindi or Thai word would be cut at each of its vowel signs.

All texts of a batch are tokenised as one string: one pass of compiled code for each rule, no loop
over texts. Film plots: 7 MB per second and core where all letters are ASCII, else 4 MB.

`training_texts.words` still cuts words by its own rule, in SQL: runs of letters and digits. Models that
exist learnt from these words, and with the rules above those with a hyphen, an apostrophe, a decimal
point or a mark would change.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recspark.data.blocks import Array

UNITS = (
    "mm", "cm", "km", "mg", "kg", "ml", "cl", "oz", "lb", "lbs", "kb", "mb", "gb", "tb", "hz", "khz",
    "mhz", "ghz", "kw", "mah",
)  # fmt: skip
_SEPARATOR = "\0"  # stands between two texts
_APOSTROPHES = "\u2019\u02bc\u2018"
_REMOVED = "\u00ad\u200c\u200d\u2060\ufeff" + "".join(map(chr, range(0xFE00, 0xFE10)))
# Characters of scripts without spaces between words, as ranges.
_UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e"  # Thai
    "\u0e81-\u0eae\u0eb0-\u0ece\u0edc-\u0edf"  # Lao
    "\u1000-\u103f\u1050-\u108f\ua9e0-\ua9ef\uaa60-\uaa7f"  # Burmese
    "\u1780-\u17d3"  # Khmer
    "\u3005-\u3007\u3041-\u3096\u3099-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"  # kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
)


@dataclass(frozen=True)
class Tokens:
    """The words of n texts: text i has `words[start[i]:start[i + 1]]`, in the order of the text.

    `start` int64 (n + 1,); `words` strings.
    """

    start: Array
    words: pa.StringArray


def words_of(text: str | None) -> list[str]:
    """Return the words of one text, in order; none of a null.

    >>> words_of("Bob's T-SHIRT, 3.5 cm (100% cotton), hand-made")
    ["bob's", 'tshirt', '3.5cm', '100%', 'cotton', 'hand', 'made']
    >>> words_of("东京都 STRASSE ２５㎝")
    ['东京', '京都', 'strasse', '25cm']
    """
    found: list[str] = tokenise([text]).words.to_pylist()
    return found


def tokenise(texts: Iterable[str | None]) -> Tokens:
    """Return the words of texts; a null has none. The words of a text depend on no other text."""
    parts = ["" if text is None else text.replace(_SEPARATOR, " ") for text in texts]
    found = pa.array(_word().findall(_prepared(_SEPARATOR.join([*parts, ""]))), pa.string())
    is_separator = pc.equal(found, _SEPARATOR).to_numpy(zero_copy_only=False)
    ends = np.flatnonzero(is_separator)
    start = np.concatenate([[0], ends - np.arange(len(ends))]).astype(np.int64)
    return Tokens(start, found.filter(pa.array(~is_separator)))


def _prepared(text: str) -> str:
    """Return `text` as `_WORD` reads it: folded, units joined to numbers, pairs cut."""
    if text.isascii():
        text = text.lower()
    else:
        folded = unicodedata.normalize("NFKC", text).casefold().translate(_translation())
        text = unicodedata.normalize("NFKC", folded)
        text = _unspaced_run().sub(_pairs, text)
    return _space_of_unit().sub("", _hyphen_of_letter().sub(r"\1", text))


def _pairs(run: re.Match[str]) -> str:
    characters = _character().findall(run.group())
    pairs = map("".join, pairwise(characters))
    return f" {' '.join(pairs) if len(characters) > 1 else characters[0]} "


@cache
def _translation() -> dict[int, str | None]:
    digits = {
        code: str(unicodedata.decimal(chr(code)))
        for code in range(0x80, 0x20000)
        if unicodedata.category(chr(code)) == "Nd"
    }
    return {
        **digits,
        **dict.fromkeys(map(ord, _APOSTROPHES), "'"),
        **dict.fromkeys(map(ord, _REMOVED), None),
        ord("\u2010"): "-",
        ord("\u066b"): ".",  # the Arabic decimal point
    }


@cache
def _marks() -> str:
    """Return the combining marks (categories Mn, Mc, Me), as ranges of a character class."""
    codes = [code for code in range(0x20000) if unicodedata.category(chr(code))[0] == "M"]
    codes += range(0xE0100, 0xE01F0)
    breaks = [i for i in range(1, len(codes)) if codes[i] != codes[i - 1] + 1]
    begins, ends = [0, *breaks], [*breaks, len(codes)]
    return "".join(
        f"{chr(codes[begin])}-{chr(codes[end - 1])}"
        for begin, end in zip(begins, ends, strict=True)
    )


@cache
def _unspaced_run() -> re.Pattern[str]:
    # Marks of other scripts may stand on these letters too.
    return re.compile(f"[{_UNSPACED}][{_UNSPACED}{_marks()}]*")


@cache
def _character() -> re.Pattern[str]:
    return re.compile(f".[{_marks()}]*", re.DOTALL)


@cache
def _word() -> re.Pattern[str]:
    inside = rf"(?<=\d)[.,](?=\d)|(?<!\d)'(?=[^\W\d_])|(?<=\d)%|[{_marks()}]+"
    return re.compile(rf"[^\W_]+(?:(?:{inside})[^\W_]*)*|{_SEPARATOR}")


@cache
def _hyphen_of_letter() -> re.Pattern[str]:
    # A single letter that begins a word, and the hyphen between it and two letters or more.
    return re.compile(rf"(?<![\w'\-{_marks()}])([^\W\d_])-(?=[^\W\d_]{{2}})")


@cache
def _space_of_unit() -> re.Pattern[str]:
    return re.compile(rf"(?<=\d) (?=(?:{'|'.join(UNITS)})(?![\w{_marks()}]))")
