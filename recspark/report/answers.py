"""What a person asks of the tables, through a `Reader`; nothing here needs Spark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import date
from typing import Any

from rich.table import Table

from recspark.config import Sessions, cutoff_of
from recspark.errors import ConfigError, TableNotFoundError
from recspark.tables.reader import Reader
from recspark.terminal import printable

_DIGITS = 4  # that a person compares in a column of scores
_MAX_DECIMALS = 9


def latest_night(tables: Reader, table: str) -> date:
    """Return the newest night of a published table; TableNotFoundError without any."""
    nights = tables.nights(table)
    if not nights:
        raise TableNotFoundError("nothing has been published yet: run `recspark nightly` first")
    return nights[-1]


def check_night(tables: Reader, night: date) -> None:
    """Raise ConfigError where no list was published on `night`; it says which nights there are."""
    published = tables.nights("recommendations")
    if night in published:
        return
    if not published:
        latest_night(tables, "recommendations")
    began = night in tables.nights("runs")
    what = "published no list: `recspark runs` says how far it came" if began else "never ran"
    raise ConfigError(
        f"--run-date {night}: that night {what}. Table 'recommendations' has "
        f"{said_nights(published)}; leave the option out for the newest"
    )


def said_nights(nights: Sequence[date]) -> str:
    """Return which nights there are, in a sentence.

    >>> said_nights([date(2010, 12, 8), date(2010, 12, 9)])
    'the nights 2010-12-08, 2010-12-09'
    """
    if len(nights) <= 3:
        return f"the nights {', '.join(map(str, nights))}" if nights else "no night"
    return f"{len(nights)} nights, from {nights[0]} to {nights[-1]}"


def user_list(tables: Reader, user: str, night: date) -> list[dict[str, Any]]:
    """Return one user's published rows of a night, by rank."""
    rows = tables.rows("recommendations", [("run_date", "=", night), ("user_id", "=", user)])
    ranked = sorted(rows, key=lambda row: row["rank"])
    return [{k: v for k, v in row.items() if k not in ("run_date", "user_id")} for row in ranked]


def bought(
    tables: Reader, user: str, night: date, limit: int, sessions: Sessions
) -> list[dict[str, Any]]:
    """Return a user's newest acts up to the night, with item names as of then.

    Cost: one user's events, and the names of `limit` items.
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
    names: dict[str, tuple[Any, str | None]] = {}
    if items := sorted({row["item_id"] for row in newest}):
        for row in tables.rows(
            "items",
            [("item_id", "in", items), ("valid_from", "<", cutoff)],
            ["item_id", "item_name", "valid_from", "ingest_date"],
        ):
            # As `features.items_as_of`: the latest name; of two for the same time the later night's.
            since = (row["valid_from"], row["ingest_date"])
            if (
                row["item_name"] is not None
                and since > names.get(row["item_id"], (since[:0], ""))[0]
            ):
                names[row["item_id"]] = (since, row["item_name"])
    return [
        {
            "event_at": str(row["event_at"]),
            "item_id": row["item_id"],
            "item_name": names.get(row["item_id"], (None, None))[1],
        }
        for row in newest
    ]


def neighbours(tables: Reader, item: str, night: date) -> list[dict[str, Any]]:
    """Return an item's neighbours of a night, by rank."""
    rows = tables.rows("item_neighbours", [("run_date", "=", night), ("item_id", "=", item)])
    return sorted(rows, key=lambda row: row["rank"])


def stages(tables: Reader, n_nights: int) -> list[dict[str, Any]]:
    """Return what the stages of the newest nights did, as table `runs` has it but for the settings.

    Raises TableNotFoundError where no night was ever begun.
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
    """Return table, version, rows, files, bytes and path of every table, by name; those that a stage
    only keeps for the next one left out.
    """
    return [row for row in tables.sizes() if not row["table"].startswith("staged_")]


def table_of_tables(rows: list[dict[str, Any]]) -> Table:
    """Return the tables as a rich table."""
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
    """Return a value of the data as it may stand in a table on a terminal; "" for none."""
    return "" if value is None else printable(value)


def scores(values: Sequence[float | None]) -> list[str]:
    """Return the scores of one list as a person reads them: no exponents, the same decimals in all,
    four digits of the largest.

    >>> scores([0.0386543832719326, 0.0358, 1.2e-05]), scores([12345.678, 9.5, None])
    (['0.03865', '0.03580', '0.00001'], ['12,346', '10', ''])
    """
    finite = [abs(v) for v in values if v is not None and math.isfinite(v)]
    largest = max(finite, default=0.0)
    whole = math.floor(math.log10(largest)) + 1 if largest else 1
    decimals = min(max(_DIGITS - whole, 0), _MAX_DECIMALS)
    return ["" if v is None else f"{v:,.{decimals}f}" for v in values]
