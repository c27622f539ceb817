"""The words of texts: rules by hand, properties of any text."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recspark.data.tokens import tokenise, words_of

TEXTS = st.text(max_size=40)
# Texts that meet the rules often.
ODD = st.text(alphabet="aZ é\u0301ßİ'’-.,%_0٣５½㎝東京ータสดี\u200d\u00adहि\nkgm", max_size=20)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Ｃafé CAFÉ cafe\u0301", ["café"] * 3),
        ("STRASSE Straße ΣΊΣΥΦΟΣ σίσυφος", ["strasse", "strasse", "σίσυφοσ", "σίσυφοσ"]),
        ("हिन्दी में किताब", ["हिन्दी", "में", "किताब"]),
        ("١٢٫٥ كتاب", ["12.5", "كتاب"]),
        ("3.5mm 60 cm 60  cm 5 cms", ["3.5mm", "60cm", "60", "cm", "5", "cms"]),
        ("1,000 100% ㎏", ["1,000", "100%", "kg"]),
        ("T-SHIRT x-ray hand-made", ["tshirt", "xray", "hand", "made"]),
        ("vitamin-c 3-in-1", ["vitamin", "c", "3", "in", "1"]),
        ("l’amour, Bob’s 'quoted' dogs'", ["l'amour", "bob's", "quoted", "dogs"]),
        ("foo.bar a_b 1.2. c++", ["foo", "bar", "a", "b", "1.2", "c"]),
        ("東京タワー 茶", ["東京", "京タ", "タワ", "ワー", "茶"]),
        ("60cmの箱 한국어 문장", ["60cm", "の箱", "한국어", "문장"]),
        ("ที่นี่", ["ที่นี่"]),  # two letters, each with two marks: one pair
        ("co\u00adopera\u200dtion\ufeff", ["cooperation"]),
        ("\u0301 , - '", []),
    ],
)  # fmt: skip
def test_words_by_hand(text: str, words: list[str]) -> None:
    assert words_of(text) == words


@given(st.lists(st.none() | TEXTS | ODD, max_size=5))
def test_words_of_a_text_depend_on_no_other(texts: list[str | None]) -> None:
    tokens = tokenise(texts)
    words = tokens.words.to_pylist()
    assert len(tokens.start) == len(texts) + 1
    for i, text in enumerate(texts):
        assert words[tokens.start[i] : tokens.start[i + 1]] == words_of(text)


@given(TEXTS | ODD)
def test_words_are_words(text: str) -> None:
    """A word begins with a letter or digit; no space, underscore or capital letter is in it."""
    for word in words_of(text):
        assert word
        assert unicodedata.category(word[0])[0] in "LNM"  # M: only of scripts without spaces
        assert not any(c.isspace() or c in "_\0-" for c in word)
        assert unicodedata.is_normalized("NFKC", word)


@given(TEXTS | ODD)
def test_words_of_words(text: str) -> None:
    """Words that are tokenised again are the same words."""
    assert words_of("\n".join(words_of(text))) == words_of(text)


@given(TEXTS | ODD)
def test_spelling_of_a_text(text: str) -> None:
    """The normal form of Unicode and the case of letters decide nothing."""
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert words_of(unicodedata.normalize(form, text)) == words_of(text)  # type: ignore[arg-type]
    assert words_of(text.casefold()) == words_of(text)


@given(TEXTS | ODD)
def test_no_letter_or_digit_is_lost(text: str) -> None:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    letters = {c for c in folded if c.isalnum() and not c.isdecimal()} - {"\u02bc"}
    assert letters <= set("".join(words_of(text)))


@given(st.lists(st.from_regex(r"[a-z]{2,8}|[0-9]{1,4}[a-z]{2}", fullmatch=True)))
def test_plain_words_are_what_stands_between_spaces(words: list[str]) -> None:
    assert words_of("  ".join(words)) == words
