"""Answers to a person's questions about the tables, through a `Reader`. No Spark is needed here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import date, datetime
from itertools import groupby
from typing import Any

from rich.table import Table

from recspark.config import MAIN, Sessions, cutoff_of
from recspark.errors import ConfigError, TableNotFoundError
from recspark.tables.reader import Reader
from recspark.terminal import printable

_N_DIGITS = 4  # significant digits of the largest score in a column
_MAX_DECIMALS = 9


def latest_night(tables: Reader, table: str) -> date:
    """Return the newest night of a published table; TableNotFoundError if there is none."""
    nights = tables.nights(table)
    if not nights:
        raise TableNotFoundError("nothing has been published yet: run `recspark nightly` first")
    return nights[-1]


def check_night(tables: Reader, night: date) -> None:
    """Raise ConfigError, which names the nights with lists, if `night` published no list."""
    published = tables.nights("recommendations")
    if night in published:
        return
    if not published:
        latest_night(tables, "recommendations")
    has_begun = night in tables.nights("runs")
    outcome = (
        "published no list: `recspark runs` says how far it came" if has_begun else "never ran"
    )
    raise ConfigError(
        f"--run-date {night}: that night {outcome}. Table 'recommendations' has "
        f"{nights_in_words(published)}; leave the option out for the newest"
    )


def nights_in_words(nights: Sequence[date]) -> str:
    """Return a phrase that names the nights.

    >>> nights_in_words([date(2010, 12, 8), date(2010, 12, 9)])
    'the nights 2010-12-08, 2010-12-09'
    """
    if len(nights) <= 3:
        return f"the nights {', '.join(map(str, nights))}" if nights else "no night"
    return f"{len(nights)} nights, from {nights[0]} to {nights[-1]}"


def user_lists(tables: Reader, user: str, night: date) -> dict[str, list[dict[str, Any]]]:
    """Return list -> one user's published rows of a night, sorted by rank.

    The list `main` comes first, then the others by name. {} for a user without a list.
    """
    rows = tables.rows("recommendations", [("run_date", "=", night), ("user_id", "=", user)])
    rows.sort(key=lambda row: (row["list"] != MAIN, row["list"], row["rank"]))
    return {
        name: [
            {k: v for k, v in row.items() if k not in ("run_date", "user_id")}
            for row in rows_of_list
        ]
        for name, rows_of_list in groupby(rows, key=lambda row: str(row["list"]))
    }


def bought(
    tables: Reader, user: str, night: date, limit: int, sessions: Sessions
) -> list[dict[str, Any]]:
    """Return the newest acts of a user up to the end of the night, newest first, with the item
    names of that time.

    An act is an event that is no impression. At most `limit` acts are returned. Cost: reads the
    events of one user and the names of at most `limit` items.
    """
    cutoff = cutoff_of(night)
    events = tables.rows(
        "events",
        [("user_id", "=", user), ("event_at", "<", cutoff)],
        ["event_at", "event_id", "item_id", "event_type"],
    )
    acts = [row for row in events if row["event_type"] not in sessions.impression_types]
    acts.sort(key=lambda row: row["event_id"])
    acts.sort(key=lambda row: row["event_at"], reverse=True)
    newest = acts[:limit]
    names = names_before(tables, [row["item_id"] for row in newest], cutoff)
    return [
        {
            "event_at": str(row["event_at"]),
            "item_id": row["item_id"],
            "item_name": names.get(row["item_id"]),
        }
        for row in newest
    ]


def names_before(tables: Reader, items: Sequence[str], cutoff: datetime) -> dict[str, str]:
    """Return the name that each of `items` had at `cutoff`; items without a name are left out."""
    # item_id -> ((valid_from, ingest_date) of the name, name)
    latest_names: dict[str, tuple[Any, str]] = {}
    if items:
        for row in tables.rows(
            "items",
            [("item_id", "in", sorted({*items})), ("valid_from", "<", cutoff)],
            ["item_id", "item_name", "valid_from", "ingest_date"],
        ):
            # The same rule as in `features.items_as_of`: the name with the latest valid_from, and
            # of two with the same valid_from the one that the later night ingested. The default,
            # an empty tuple, is smaller than every other tuple.
            name_from = (row["valid_from"], row["ingest_date"])
            if (
                row["item_name"] is not None
                and name_from > latest_names.get(row["item_id"], (name_from[:0], ""))[0]
            ):
                latest_names[row["item_id"]] = (name_from, row["item_name"])
    return {item: name for item, (_, name) in latest_names.items()}


def neighbours(tables: Reader, item: str, night: date) -> list[dict[str, Any]]:
    """Return the neighbours of an item on a night, sorted by rank."""
    rows = tables.rows("item_neighbours", [("run_date", "=", night), ("item_id", "=", item)])
    return sorted(rows, key=lambda row: row["rank"])


def stages(tables: Reader, n_nights: int) -> list[dict[str, Any]]:
    """Return one row for each stage of the newest nights: the columns of table `runs` without
    `config`.

    Raises TableNotFoundError if no night was ever begun.
    """
    nights = tables.nights("runs")[-n_nights:]
    if not nights:
        raise TableNotFoundError(
            "no night was ever begun here: is paths.root right? `recspark nightly` begins one"
        )
    rows = tables.rows("runs", [("run_date", "in", nights)])
    rows.sort(key=lambda row: (row["run_date"], row["started_at"], row["stage"], row["model"]))
    return [{k: v for k, v in row.items() if k != "config"} for row in rows]


def sizes(tables: Reader) -> list[dict[str, Any]]:
    """Return table, version, rows, files, bytes and path of every table, sorted by name, without
    the tables that one stage only keeps for the next (`staged_…`).
    """
    return [row for row in tables.sizes() if not row["table"].startswith("staged_")]


def table_of_tables(rows: list[dict[str, Any]]) -> Table:
    """Return `rows`, as from `sizes`, as a rich table."""
    table = Table(title="tables")
    for column in ("table", "version", "rows", "files", "MB"):
        table.add_column(column, justify="left" if column == "table" else "right")
    for row in rows:
        table.add_row(
            cell(row["table"]),
            str(row["version"]),
            f"{row['rows']:,}",
            str(row["files"]),
            f"{row['bytes'] / 1e6:.1f}",
        )
    return table


def cell(value: object) -> str:
    """Return a value of the data as safe text for a table on a terminal; "" for None."""
    return "" if value is None else printable(value)


def scores(values: Sequence[float | None]) -> list[str]:
    """Return the scores of one list as text for a person.

    There are no exponents, all scores have the same number of decimals, and the largest has at
    least four significant digits.

    >>> scores([0.0386543832719326, 0.0358, 1.2e-05]), scores([12345.678, 9.5, None])
    (['0.03865', '0.03580', '0.00001'], ['12,346', '10', ''])
    """
    finite = [abs(v) for v in values if v is not None and math.isfinite(v)]
    largest = max(finite, default=0.0)
    # Digits before the decimal point; 0.0386 has -1 of them, so it gets 4 - (-1) = 5 decimals.
    n_whole_digits = math.floor(math.log10(largest)) + 1 if largest else 1
    decimals = min(max(_N_DIGITS - n_whole_digits, 0), _MAX_DECIMALS)
    return ["" if v is None else f"{v:,.{decimals}f}" for v in values]
