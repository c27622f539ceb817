"""Columns that a later version of recspark added to a table, and what they mean in earlier rows.

A table that an earlier version wrote stays as it is. The next night adds the column to it, in the
same commit as its own rows; Delta rewrites no earlier file for that. Whoever reads through recspark
gets the value of this module in the earlier rows. For other readers the column is null there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AddedColumn:
    """One added column.

    Parameters
    ----------
    name : name of the column
    after : the column that it stands behind
    type : its type, as Delta's log writes it: "string", or a dict for a list, map or struct
    value : what the column means in rows that were written without it; None = null
    """

    name: str
    after: str
    type: Any = "string"
    value: str | None = None


_STRINGS = {"type": "array", "elementType": "string", "containsNull": True}
_LIST = AddedColumn("list", after="run_date", value="main")
_REASON = {
    "type": "struct",
    "fields": [
        {"name": name, "type": type_of_field, "nullable": True, "metadata": {}}
        for name, type_of_field in (
            ("item_id", "string"),
            ("item_name", "string"),
            ("share", "float"),
        )
    ],
}
_REASONS = {"type": "array", "elementType": _REASON, "containsNull": True}
_BECAUSE = AddedColumn("because", after="source", type=_REASONS)
_RULES = AddedColumn("rules", after="because", type=_STRINGS)

# table -> the columns that were added to it, in the order in which they are to be put behind `after`
ADDED_COLUMNS: dict[str, tuple[AddedColumn, ...]] = {
    "recommendations": (_LIST, _BECAUSE, _RULES),
    "staged_recommendations": (_LIST, _BECAUSE, _RULES),
    "gates": (_LIST,),
    "item_vectors": (AddedColumn("problem", after="vector"),),
    "items": (
        AddedColumn("available", after="ingest_date", type="boolean"),
        AddedColumn("available_from", after="available", type="timestamp"),
        AddedColumn("available_until", after="available_from", type="timestamp"),
    ),
}


def added_columns(table: str) -> tuple[AddedColumn, ...]:
    """Return the columns that were added to `table`; () where there are none."""
    return ADDED_COLUMNS.get(table, ())


def with_added_names(names: Iterable[str], table: str) -> list[str]:
    """Return the column names of `table` with those that were added to it, each at its place.

    A table that lacked a column at first has it at its end. Here it stands where it stands in a
    table that had it from the beginning.

    >>> with_added_names(["run_id", "run_date", "gate"], "gates")
    ['run_id', 'run_date', 'list', 'gate']
    >>> with_added_names(["run_id", "run_date", "gate", "list"], "gates")
    ['run_id', 'run_date', 'list', 'gate']
    """
    added = added_columns(table)
    ordered = [name for name in names if name not in {column.name for column in added}]
    for column in added:
        place = ordered.index(column.after) + 1 if column.after in ordered else len(ordered)
        ordered.insert(place, column.name)
    return ordered
