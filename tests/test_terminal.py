"""Text of the data on a terminal, in a log and in JSON: nothing in it is obeyed, all of it is shown."""

from __future__ import annotations

import io
import json
import logging
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.table import Table

from recspark.cli.common import PlainConsole, print_json, reporter
from recspark.report.answers import cell
from recspark.terminal import LineFormatter, printable

# Every character, and often the bad ones: escape, delete, C1, bidirectional, zero width, separators.
BAD = "\x00\x07\b\t\n\r\x1b\x7f\x85\x9b\xad\u061c\u200b\u200e\u202e\u2028\u2029\u2060\u2066\ufeff\ud800"
TEXTS = st.text(st.one_of(st.characters(), st.sampled_from(BAD)), max_size=30)


def is_obeyed(char: str) -> bool:
    """Return whether a terminal might do something else than show a character."""
    joiner = char in "\u200c\u200d"
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and not joiner


@given(TEXTS)
@example("\x1b]0;owned\x07")
@example("\x9b31m")
@example("abc\u202etxt.exe")
def test_nothing_that_is_obeyed_stays(text: str) -> None:
    shown = printable(text)
    assert not any(map(is_obeyed, shown))
    assert printable(shown) == shown
    if not any(map(is_obeyed, text)) and all(unicodedata.category(c)[0] != "C" for c in text):
        assert shown == text


@pytest.mark.parametrize(
    "text", ["Amélie", "東京 お茶", "עברית", "नमस्ते", "می\u200cخواهم", "👩\u200d🍳", "a\u00a0b"]
)
def test_names_of_all_scripts_stay(text: str) -> None:
    assert printable(text) == text


@given(TEXTS)
def test_no_table_or_line_of_the_console_is_obeyed(text: str) -> None:
    said = io.StringIO()
    console = PlainConsole(file=said, width=300)
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)  # a command that forgot to ask for `cell`
    table.add_row(cell(text))
    console.print(table)
    console.print(text)
    assert not any(is_obeyed(char) for char in said.getvalue().replace("\n", ""))


@pytest.mark.parametrize("name", [":smile:", "[red]MUG[/red]", "[/home]"])
def test_names_are_printed_by_the_letter(name: str) -> None:
    said = io.StringIO()
    PlainConsole(file=said, width=80).print(name)
    assert said.getvalue() == f"{name}\n"


def test_progress_of_a_hostile_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from recspark.cli.common import console

    with console.capture() as said:
        reporter()("train \x1b[2J\nease")
    assert said.get().count("\n") == 1
    assert "\x1b[2J" not in said.get()


@given(TEXTS)
def test_no_log_line_is_obeyed(text: str) -> None:
    record = logging.LogRecord("recspark", logging.WARNING, "x.py", 1, "item %s", (text,), None)
    line = LineFormatter("%(message)s").format(record)
    assert not any(is_obeyed(char) for char in line.replace("\n", ""))


@given(TEXTS)
def test_json_is_ascii_and_says_the_same(text: str) -> None:
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", said)
        print_json({text: text})
    line = said.getvalue()
    assert line.endswith("\n")
    assert line[:-1].isprintable()
    assert line.isascii()
    assert json.loads(line) == {text: text}
