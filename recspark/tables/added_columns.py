"""Columns that a later version of recspark added to a table, and what they mean in earlier rows.

A table that an earlier version wrote stays as it is. The next night adds the column to it, in the
same commit as its own rows; Delta rewrites no earlier file for that. Whoever reads through recspark
gets the value of this module in the earlier rows. For other readers the column is null there.
"""

from __future__ import annotations

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


_LIST = AddedColumn("list", after="run_date", value="main")

# table -> the columns that were added to it, in the order in which they are to be put behind `after`
ADDED_COLUMNS: dict[str, tuple[AddedColumn, ...]] = {
    "recommendations": (_LIST,),
    "staged_recommendations": (_LIST,),
    "gates": (_LIST,),
}


def added_columns(table: str) -> tuple[AddedColumn, ...]:
    """Return the columns that were added to `table`; () where there are none."""
    return ADDED_COLUMNS.get(table, ())
