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
    """The times that events get where a source has an order but no times (kind `session_files`)."""

    start: date | None = Field(
        None, description="day on which the first session starts; null = the day of the night"
    )
    session_seconds: float = Field(
        0.01,
        gt=0,
        le=86_400,
        description="seconds from the start of one session to the start of the next. 0.01 s makes "
        "8.6 million sessions per day. Guess",
    )
    event_seconds: float = Field(
        1.0,
        gt=0,
        le=86_400,
        description="seconds from one event of a session to the next. Guess",
    )


# The columns of an event that a mapping may name. Where it does not name `event_id`, an id is made
# from the row.
EVENT_COLUMNS = (
    "event_id", "user_id", "session_key", "order_id", "item_id", "event_type", "event_at", "value",
    "quantity",
)  # fmt: skip
NUMBER_COLUMNS = ("value", "quantity")
ID_COLUMNS = ("event_id", "user_id", "session_key", "order_id", "item_id", "event_type")
# Texts that SQL, Hive, Python, pandas and JavaScript write for a missing id.
NULL_IDS = ("NULL", "\\N", "nan", "None", "undefined", "<NA>", "(null)")
ITEM_COLUMNS = (
    "item_id", "item_name", "category", "price", "text", "media", "valid_from", "available",
    "available_from", "available_until",
)  # fmt: skip


class Source(Section):
    """Where raw events come from, and which of their columns become which columns of an event."""

    name: str = Field(
        pattern=r"^\w[\w.-]*$", description="name of the file in conf/sources, without .yaml"
    )
    kind: Literal["online_retail", "movielens", "session_files", "mapping"] = Field(
        description="the reader of the source; mapping = the reader for files whose columns are "
        "named in the settings below. A setting whose meaning begins with `mapping:` is for this "
        "kind only"
    )
    path: str = Field(
        description="file, folder or URI; `{run_date}` is replaced by the date of the night"
    )
    archive: bool = Field(
        True,
        description="true = `path` holds all events at once; false = each night has its landing at "
        "`path`",
    )
    timezone: str = Field("UTC", description="time zone of the times that name no zone")
    format: Literal["csv", "jsonl", "parquet", "delta"] = Field(
        "parquet", description="mapping: format of the files of events"
    )
    options: dict[str, str] = Field(
        default_factory=dict,
        description="options of the reader, with the names that Spark gives them",
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="mapping: column of an event -> raw column"
    )
    constants: dict[str, str] = Field(
        default_factory=dict,
        description="mapping: column of an event -> a text that is the same in every row",
    )
    attributes: dict[str, str] = Field(
        default_factory=dict, description="mapping: name of an attribute of the event -> raw column"
    )
    expressions: dict[str, str] = Field(
        default_factory=dict,
        description="mapping: column of an event -> Spark SQL of raw columns, such as `price * "
        "pieces`",
    )
    where: dict[str, str] = Field(
        default_factory=dict,
        description="mapping: condition in Spark SQL of raw columns -> reason. A row for which a "
        "condition does not hold goes to quarantine with the reason of the first such condition. A "
        "condition that is null does not hold",
    )
    min_value: float | None = Field(
        None,
        description="mapping: a row with a smaller `value` goes to quarantine; null = no bound",
    )
    max_value: float = Field(
        1e12,
        gt=0,
        description="a row whose `value` or `quantity` is farther from 0 goes to quarantine. "
        "Guess: no shop has such amounts. Models compute in float32, which can square far larger "
        "numbers",
    )
    bounds: dict[str, tuple[float | None, float | None]] = Field(
        default_factory=dict,
        description="mapping: `value` or `quantity` -> [least, most]. A row with a number outside "
        "these bounds goes to quarantine; null = no bound",
    )
    decimal: str = Field(
        ".",
        min_length=1,
        max_length=1,
        description="sign before the fraction of a number that is written as text",
    )
    thousands: str = Field(
        "",
        max_length=1,
        description='sign between groups of three digits; "" = no sign; " " = any blank',
    )
    currency: tuple[str, ...] = Field(
        (),
        description="currency signs that may stand before or after a number, such as € or EUR. A "
        "text with any other sign is no number",
    )
    null_ids: tuple[str, ...] = Field(
        NULL_IDS, description="texts that mean `no id` in every id column, in upper or lower case"
    )
    null_values: dict[str, tuple[Annotated[str, Field(coerce_numbers_to_str=True)], ...]] = Field(
        default_factory=dict,
        description="column of an event or item -> texts and numbers that mean `not known` in it, "
        "such as the user number of all guests",
    )
    whole_number_ids: tuple[str, ...] = Field(
        (),
        description="id columns in which the text 13085.0 (a float before it became text) means "
        "13085",
    )
    earliest: date = Field(
        date(1990, 1, 1),
        description="a time that is a number (of seconds, milliseconds or microseconds) and would "
        "lie before this day is no time. Guess: no shop logged events before then",
    )
    items_path: str | None = Field(
        None, description="mapping: file, folder or URI of the catalogue; null = no catalogue"
    )
    items_format: Literal["csv", "jsonl", "parquet", "delta"] | None = Field(
        None, description="mapping: format of the catalogue; null = that of the events"
    )
    items_columns: dict[str, str] = Field(
        default_factory=dict,
        description="mapping: column of an item -> raw column of the catalogue",
    )
    items_complete: bool = Field(
        False,
        description="mapping: whether each delivery of the catalogue names all items that may be "
        "listed. An item that tonight's does not name is then in no list, until a later one names "
        "it again",
    )
    list_separator: str = Field(
        "|",
        min_length=1,
        description="mapping: text between the parts of `category` and of `media`, where they are "
        "texts",
    )
    files: tuple[str, ...] = Field(
        (),
        description="session_files: names of files below `path`, in the order in which they are "
        "read; () = all files, ordered by name",
    )
    made_up: MadeUpTimes = Field(
        MadeUpTimes(),  # type: ignore[call-arg]
        description="session_files: the times that its events lack",
    )

    @model_validator(mode="after")
    def _can_be_read(self) -> Source:
        # `zones` is empty on a machine without tzdata. The setting is not checked then, since Spark
        # has zones of its own.
        zones = zoneinfo.available_timezones()
        if zones and self.timezone not in zones:
            suggestion = suggest(self.timezone, zones)
            hint = (
                suggestion
                if suggestion.startswith(" Did")
                else " Use an IANA name such as Europe/London."
            )
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
            mapping_settings = (
                "columns", "constants", "attributes", "items_path", "min_value", "expressions",
                "where", "bounds", "null_values", "whole_number_ids", "items_complete",
            )  # fmt: skip
            if misplaced_settings := [
                f"source.{name}" for name in mapping_settings if getattr(self, name)
            ]:
                raise ValueError(
                    f"{', '.join(misplaced_settings)}: for kind 'mapping' only, not '{self.kind}'"
                )
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
        if refused_signs := [
            text for text in self.currency if not text or any(map(str.isdigit, text))
        ]:
            raise ValueError(f"source.currency: {refused_signs} is no sign of a currency")

    def _check_mapping(self) -> None:
        checked_settings: list[tuple[str, Iterable[str], Iterable[str]]] = [
            ("columns", self.columns, EVENT_COLUMNS),
            ("expressions", self.expressions, EVENT_COLUMNS),
            ("bounds", self.bounds, NUMBER_COLUMNS),
            ("null_values", self.null_values, (*EVENT_COLUMNS, *ITEM_COLUMNS)),
            ("whole_number_ids", self.whole_number_ids, ID_COLUMNS),
            ("constants", self.constants, EVENT_COLUMNS),
            ("items_columns", self.items_columns, ITEM_COLUMNS),
        ]
        for setting, names, allowed_names in checked_settings:
            for name in names:
                if name not in allowed_names:
                    raise ValueError(
                        f"source.{setting}.{name} is no column here.{suggest(name, allowed_names)}"
                    )
        mapped_columns = {*self.columns, *self.constants, *self.expressions}
        for name in ("event_id", "item_id", "event_at"):
            if name in self.constants:
                raise ValueError(f"source.constants.{name}: it differs by row, name its raw column")
        for name in ("value", "quantity"):
            if name in self.constants and not _is_number(self.constants[name]):
                raise ValueError(f"source.constants.{name} = '{self.constants[name]}' is no number")
        if self.min_value is not None and "value" not in mapped_columns:
            raise ValueError("source.min_value is set, but source.columns gives no value")
        for name in self.bounds:
            if name not in mapped_columns:
                raise ValueError(f"source.bounds.{name}: source.columns gives no {name}")
        if self.min_value is not None and "value" in self.bounds:
            raise ValueError("source.min_value and source.bounds.value: keep one of them")
        columns_by_setting = {
            "columns": self.columns,
            "constants": self.constants,
            "expressions": self.expressions,
        }
        for first_setting, second_setting in itertools.combinations(columns_by_setting, 2):
            if shared_columns := sorted(
                set(columns_by_setting[first_setting]) & set(columns_by_setting[second_setting])
            ):
                raise ValueError(
                    f"source.{first_setting} and source.{second_setting} both give {shared_columns}"
                )
        missing_columns = [
            name for name in ("item_id", "event_type", "event_at") if name not in mapped_columns
        ]
        if not mapped_columns & {"user_id", "session_key"}:
            missing_columns.append("user_id or session_key")
        if missing_columns:
            raise ValueError(
                f"source.columns gives no {', no '.join(missing_columns)}: name a raw column there, or a constant"
            )
        if (self.items_path is None) != (not self.items_columns):
            raise ValueError("source.items_path and source.items_columns go together")
        if self.items_columns and "item_id" not in self.items_columns:
            raise ValueError("source.items_columns gives no item_id")
        if self.items_complete and self.items_path is None:
            raise ValueError("source.items_complete is set, but source.items_path is not")
        if self.items_complete and "valid_from" in self.items_columns:
            raise ValueError(
                "source.items_complete: a complete catalogue says what holds on its night; take "
                "valid_from out of source.items_columns"
            )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
