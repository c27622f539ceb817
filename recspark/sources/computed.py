"""Columns that a source's settings compute by Spark SQL of the raw ones.

SQL reads a raw column as what it means: a number where SQL itself would make one of it (`price > 0`,
`price * pieces`), spelt as the source says, and else text as ids are printed, so that CSV and Parquet
give the same. What cannot be computed for a row is null, never an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import BooleanType, DataType

from recspark.errors import SourceError, suggest
from recspark.session import lenient
from recspark.sources import values
from recspark.sources.spelling import Spelling

COMPUTED, UNREAD = "= ", "unread in "
_AS_NUMBER = re.compile(
    r"CAST\((`(?:[^`]|``)+`|\w+) AS (?:TINYINT|SMALLINT|INT|BIGINT|FLOAT|DOUBLE|DECIMAL)"
)


@dataclass(frozen=True)
class Computed:
    """A column that SQL makes.

    Parameters
    ----------
    setting : where it was written, for messages
    sql : an expression of raw columns
    is_condition : whether it has to be true or false
    """

    setting: str
    sql: str
    is_condition: bool = False

    @property
    def name(self) -> str:
        """The name of the column, which no raw column has."""
        return f"{COMPUTED}{self.sql}"

    @property
    def wrong(self) -> str:
        """The name of the column that says which raw number could not be read; null = none."""
        return f"{UNREAD}{self.sql}"


@dataclass(frozen=True)
class Staged:
    """Files that share their columns: frame columns `_raw_0` … have the `names`."""

    frame: DataFrame
    names: Sequence[str]

    @property
    def columns(self) -> dict[str, Column]:
        """Raw name -> column; the last of those that share a name."""
        return {name: F.col(position(i)) for i, name in enumerate(self.names)}

    @property
    def kinds(self) -> dict[str, DataType]:
        """Raw name -> its type."""
        return {name: self.frame.schema[position(i)].dataType for i, name in enumerate(self.names)}


def position(i: int) -> str:
    """Return the name of the i-th column of a `Staged` frame."""
    return f"_raw_{i}"


def compute(source: str, part: Staged, computed: Computed, spelling: Spelling) -> Staged:
    """Return `part` with two more columns: what is `computed`, and the name of a raw column whose
    number could not be read for it.

    Raises SourceError where SQL cannot be read, names a column that is not there, is no function of
    one row, or no condition where one is wanted. Cost: no job; the driver plans two small queries.
    """
    kinds = part.kinds
    raw = {
        name: column
        for name, column in part.columns.items()
        if not name.startswith((COMPUTED, UNREAD))
    }
    texts = {name: values.printed(column, kinds[name]) for name, column in raw.items()}
    # What is nested stays as it is.
    read = {name: raw[name] if text is None else text for name, text in texts.items()}
    wrong = [F.lit(None).cast("string")]
    with lenient(part.frame.sparkSession):
        for name in _numbers(source, _with(part, read), computed, part.names):
            number = values.number(raw[name], kinds[name], name, spelling)
            if number is not None:
                read[name], given = number
                wrong.append(F.when(read[name].isNull() & given, F.lit(name)))
        n = len(part.names)
        frame = _with(part, read).select(
            *part.frame.columns,
            F.expr(computed.sql).alias(position(n)),
            F.coalesce(*wrong).alias(position(n + 1)),
        )
    made = Staged(frame, [*part.names, computed.name, computed.wrong])
    kind = made.kinds[computed.name]
    if computed.is_condition and not isinstance(kind, BooleanType):
        raise SourceError(
            f"source '{source}': {computed.setting} is no condition: '{computed.sql}' gives "
            f"{kind.simpleString()}; nothing was written"
        )
    return made


def _with(part: Staged, columns: Mapping[str, Column]) -> DataFrame:
    return part.frame.select("*", *[column.alias(name) for name, column in columns.items()])


def _numbers(
    source: str, rows: DataFrame, computed: Computed, names: Sequence[str]
) -> Sequence[str]:
    """Return the raw columns that SQL makes a number of, all being text in `rows`."""
    try:
        plan = rows.select(F.expr(computed.sql))._jdf.queryExecution().analyzed()
    except AnalysisException as error:
        raise SourceError(
            f"source '{source}': {computed.setting} = '{computed.sql}' cannot be computed: "
            f"{_told(error, names)} Nothing was written"
        ) from None
    expressions = plan.expressions()
    made = [expressions.apply(i) for i in range(expressions.size())]
    # Other plans make rows of a row, or look at other rows.
    is_of_one_row = plan.nodeName() == "Project" and plan.child().nodeName() == "Project"
    if not is_of_one_row or not all(expression.deterministic() for expression in made):
        raise SourceError(
            f"source '{source}': {computed.setting} = '{computed.sql}' has to be computed from one "
            "row alone, and the same each time; nothing was written"
        )
    cast = [name for expression in made for name in _AS_NUMBER.findall(expression.sql())]
    known = {name.lower(): name for name in names}
    bare = [name.strip("`").replace("``", "`").lower() for name in cast]
    return sorted({known[name] for name in bare if name in known})


def _told(error: AnalysisException, names: Sequence[str]) -> str:
    if (error.getCondition() or "").startswith("UNRESOLVED_COLUMN"):
        name = (error.getMessageParameters() or {}).get("objectName", "").strip("`")
        return f"no column '{name}'.{suggest(name, names)}"
    return next(line for line in str(error).splitlines() if line.strip())
