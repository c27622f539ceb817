"""Settings of the source: where raw events come from, and what their columns mean."""

from __future__ import annotations

import itertools
import zoneinfo
from collections.abc import Iterable
from datetime import date
from typing import Annotated, Literal

from pydantic import Field, model_validator

from recspark.config.section import Section
from recspark.errors import suggest


class MadeUpTimes(Section):
    """Times for a source that has an order but no times (kind `session_files`)."""

    start: date | None = Field(
        None, description="of the first session; null: midnight of the night"
    )
    session_seconds: float = Field(
        0.01,
        gt=0,
        le=86_400,
        description="seconds from one session's start to the next: 8.6 million a day. Guess",
    )
    event_seconds: float = Field(
        1.0,
        gt=0,
        le=86_400,
        description="seconds from one event of a session to the next. Guess",
    )


# What a mapping may name, and what it must; `event_id` is made from the row where it is not named.
EVENT_COLUMNS = (
    "event_id", "user_id", "session_key", "order_id", "item_id", "event_type", "event_at", "value",
    "quantity",
)  # fmt: skip
NUMBER_COLUMNS = ("value", "quantity")
ID_COLUMNS = ("event_id", "user_id", "session_key", "order_id", "item_id", "event_type")
# Texts that stand for a missing id: of SQL, Hive, Python, pandas, JavaScript.
NULL_IDS = ("NULL", "\\N", "nan", "None", "undefined", "<NA>", "(null)")
ITEM_COLUMNS = ("item_id", "item_name", "category", "price", "text", "media", "valid_from")


class Source(Section):
    """Where raw events come from and how their columns map to the event schema."""

    name: str = Field(
        pattern=r"^\w[\w.-]*$", description="of its file in conf/sources, without .yaml"
    )
    kind: Literal["online_retail", "movielens", "session_files", "mapping"] = Field(
        description="which reader; mapping = columns as named here"
    )
    path: str = Field(description="file, folder or URI; `{run_date}` is replaced by the night")
    archive: bool = Field(
        True, description="one file with everything; false: one landing per night at `path`"
    )
    timezone: str = Field("UTC", description="time zone of times that carry none")
    format: Literal["csv", "jsonl", "parquet", "delta"] = Field(
        "parquet", description="mapping: of the events' files"
    )
    options: dict[str, str] = Field(default_factory=dict, description="reader options, as Spark's")
    columns: dict[str, str] = Field(
        default_factory=dict, description="mapping: event column -> raw column"
    )
    constants: dict[str, str] = Field(
        default_factory=dict, description="mapping: event column -> constant text"
    )
    attributes: dict[str, str] = Field(
        default_factory=dict, description="mapping: attribute -> raw column"
    )
    expressions: dict[str, str] = Field(
        default_factory=dict,
        description="mapping: event column -> Spark SQL of raw columns, `price * pieces`",
    )
    where: dict[str, str] = Field(
        default_factory=dict,
        description="mapping: Spark SQL condition of raw columns -> the reason with which a row goes to "
        "quarantine where it does not hold, the first that does not; a condition that is null fails",
    )
    min_value: float | None = Field(
        None, description="mapping: a smaller `value` is quarantined; null = any value is fine"
    )
    max_value: float = Field(
        1e12,
        gt=0,
        description="a `value` or `quantity` farther from 0 is quarantined. Guess: no shop's amount; "
        "far below what float32, which models compute in, can square",
    )
    bounds: dict[str, tuple[float | None, float | None]] = Field(
        default_factory=dict,
        description="mapping: `value` or `quantity` -> [least, most]; beyond them a row is "
        "quarantined; null = no bound",
    )
    decimal: str = Field(
        ".", min_length=1, max_length=1, description="sign before a number's fraction, in text"
    )
    thousands: str = Field(
        "",
        max_length=1,
        description='sign between groups of three digits; "" = none; " " = any blank',
    )
    currency: tuple[str, ...] = Field(
        (), description="signs that may stand before or after a number: €, EUR; else it is none"
    )
    null_ids: tuple[str, ...] = Field(
        NULL_IDS, description="texts that are no id, in capitals or not, in any id column"
    )
    null_values: dict[str, tuple[Annotated[str, Field(coerce_numbers_to_str=True)], ...]] = Field(
        default_factory=dict,
        description="event or item column -> what stands there for 'not known': the number of a guest",
    )
    whole_number_ids: tuple[str, ...] = Field(
        (), description="id columns whose text 13085.0 (a float, once) means the id 13085"
    )
    earliest: date = Field(
        date(1990, 1, 1),
        description="a number (of seconds, milliseconds, microseconds) before this day is no time. "
        "Guess: no shop logged events then",
    )
    items_path: str | None = Field(None, description="mapping: catalogue, where there is one")
    items_format: Literal["csv", "jsonl", "parquet", "delta"] | None = Field(
        None, description="mapping: of the catalogue; null = as the events"
    )
    items_columns: dict[str, str] = Field(
        default_factory=dict, description="mapping: item column -> raw column of the catalogue"
    )
    list_separator: str = Field(
        "|",
        min_length=1,
        description="mapping: between the parts of `category` and `media` as text",
    )
    files: tuple[str, ...] = Field(
        (), description="session_files: names below `path` in reading order; () = all, by name"
    )
    made_up: MadeUpTimes = Field(MadeUpTimes(), description="session_files: the times it lacks")  # type: ignore[call-arg]

    @model_validator(mode="after")
    def _can_be_read(self) -> Source:
        zones = (
            zoneinfo.available_timezones()
        )  # empty on a machine without tzdata: Spark has its own
        if zones and self.timezone not in zones:
            near = suggest(self.timezone, zones)
            hint = near if near.startswith(" Did") else " Use an IANA name such as Europe/London."
            raise ValueError(f"source.timezone = '{self.timezone}' is no time zone.{hint}")
        if not self.archive and "{run_date}" not in self.path:
            raise ValueError(
                f"source.path = '{self.path}' names no {{run_date}}, so every night would read the same; "
                "put it in, or say archive: true"
            )
        if self.kind == "session_files" and self.archive and self.made_up.start is None:
            raise ValueError(
                "source.made_up.start is missing: an archive without times needs a first day"
            )
        self._check_numbers()
        if self.kind == "mapping":
            self._check_mapping()
        else:
            named = (
                "columns", "constants", "attributes", "items_path", "min_value", "expressions",
                "where", "bounds", "null_values", "whole_number_ids",
            )  # fmt: skip
            if given := [f"source.{name}" for name in named if getattr(self, name)]:
                raise ValueError(f"{', '.join(given)}: for kind 'mapping' only, not '{self.kind}'")
        return self

    def _check_numbers(self) -> None:
        signs = {"decimal": self.decimal, "thousands": self.thousands}
        for setting, sign in signs.items():
            if sign and (sign.isalnum() or sign in "+-"):
                raise ValueError(f"source.{setting} = '{sign}' can be a part of a number itself")
        if self.decimal == self.thousands or self.decimal.isspace():
            raise ValueError(
                f"source.decimal = '{self.decimal}' and source.thousands = '{self.thousands}': "
                "12,345 has to be one number"
            )
        if wrong := [text for text in self.currency if not text or any(map(str.isdigit, text))]:
            raise ValueError(f"source.currency: {wrong} is no sign of a currency")

    def _check_mapping(self) -> None:
        checked: list[tuple[str, Iterable[str], Iterable[str]]] = [
            ("columns", self.columns, EVENT_COLUMNS),
            ("expressions", self.expressions, EVENT_COLUMNS),
            ("bounds", self.bounds, NUMBER_COLUMNS),
            ("null_values", self.null_values, (*EVENT_COLUMNS, *ITEM_COLUMNS)),
            ("whole_number_ids", self.whole_number_ids, ID_COLUMNS),
            ("constants", self.constants, EVENT_COLUMNS),
            ("items_columns", self.items_columns, ITEM_COLUMNS),
        ]
        for setting, named, known in checked:
            for name in named:
                if name not in known:
                    raise ValueError(
                        f"source.{setting}.{name} is no column here.{suggest(name, known)}"
                    )
        given = {*self.columns, *self.constants, *self.expressions}
        for name in ("event_id", "item_id", "event_at"):
            if name in self.constants:
                raise ValueError(f"source.constants.{name}: it differs by row, name its raw column")
        for name in ("value", "quantity"):
            if name in self.constants and not _is_number(self.constants[name]):
                raise ValueError(f"source.constants.{name} = '{self.constants[name]}' is no number")
        if self.min_value is not None and "value" not in given:
            raise ValueError("source.min_value is set, but source.columns gives no value")
        for name in self.bounds:
            if name not in given:
                raise ValueError(f"source.bounds.{name}: source.columns gives no {name}")
        if self.min_value is not None and "value" in self.bounds:
            raise ValueError("source.min_value and source.bounds.value: keep one of them")
        sets = {
            "columns": self.columns,
            "constants": self.constants,
            "expressions": self.expressions,
        }
        for one, other in itertools.combinations(sets, 2):
            if twice := sorted(set(sets[one]) & set(sets[other])):
                raise ValueError(f"source.{one} and source.{other} both give {twice}")
        lacking = [name for name in ("item_id", "event_type", "event_at") if name not in given]
        if not given & {"user_id", "session_key"}:
            lacking.append("user_id or session_key")
        if lacking:
            raise ValueError(
                f"source.columns gives no {', no '.join(lacking)}: name a raw column there, or a constant"
            )
        if (self.items_path is None) != (not self.items_columns):
            raise ValueError("source.items_path and source.items_columns go together")
        if self.items_columns and "item_id" not in self.items_columns:
            raise ValueError("source.items_columns gives no item_id")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
