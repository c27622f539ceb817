"""Columns that a source's settings compute from raw columns by Spark SQL.

The SQL gets a raw column as a number where SQL itself would cast the column to a number
(`price > 0`, `price * pieces`). The number is read in the spelling that the source's settings give.
Any other raw column reaches the SQL as text, printed as ids are. So CSV and Parquet give the same
results. Where a value cannot be computed for a row, the result is null, never an error.
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

# How the names of the columns begin that `compute` adds.
COMPUTED_PREFIX, UNREAD_PREFIX = "= ", "unread in "
# A cast to a number in the SQL of an analysed expression; the group is the name of the cast column.
_AS_NUMBER = re.compile(
    r"CAST\((`(?:[^`]|``)+`|\w+) AS (?:TINYINT|SMALLINT|INT|BIGINT|FLOAT|DOUBLE|DECIMAL)"
)


@dataclass(frozen=True)
class Computed:
    """A column that Spark SQL computes.

    Parameters
    ----------
    setting : the setting that holds the SQL, for messages
    sql : an expression of raw columns
    is_condition : whether the SQL has to give true or false
    """

    setting: str
    sql: str
    is_condition: bool = False

    @property
    def name(self) -> str:
        """The name of the computed column. It begins with `= `, to differ from raw columns."""
        return f"{COMPUTED_PREFIX}{self.sql}"

    @property
    def unread_name(self) -> str:
        """The name of the column that tells which raw number could not be read for the SQL; its
        value is the name of a raw column, or null where all numbers could be read.
        """
        return f"{UNREAD_PREFIX}{self.sql}"


@dataclass(frozen=True)
class Staged:
    """The rows of files that share their columns.

    Parameters
    ----------
    frame : the rows; its columns are called `_raw_0`, `_raw_1`, … and `_unreadable`
    names : the raw name of each column `_raw_i`, in order. A name may occur twice
    """

    frame: DataFrame
    names: Sequence[str]

    @property
    def columns(self) -> dict[str, Column]:
        """Raw name -> column. Of columns that share a name, the last one counts."""
        return {name: F.col(staged_column(index)) for index, name in enumerate(self.names)}

    @property
    def data_types(self) -> dict[str, DataType]:
        """Raw name -> the type of its column."""
        return {
            name: self.frame.schema[staged_column(index)].dataType
            for index, name in enumerate(self.names)
        }


def staged_column(index: int) -> str:
    """Return the name of the column number `index` (from 0) of a `Staged` frame."""
    return f"_raw_{index}"


def compute(source: str, staged: Staged, computed: Computed, spelling: Spelling) -> Staged:
    """Return `staged` with two more columns: `computed.name` holds the value of the SQL, and
    `computed.unread_name` the name of a raw column whose number could not be read for the SQL.

    Raises SourceError where the SQL cannot be parsed, names a column that does not exist, is not a
    function of one row, or is no condition although `computed.is_condition`. Cost: no job; the
    driver plans two small queries.
    """
    data_types = staged.data_types
    raw_columns = {
        name: column
        for name, column in staged.columns.items()
        if not name.startswith((COMPUTED_PREFIX, UNREAD_PREFIX))
    }
    texts = {name: values.printed(column, data_types[name]) for name, column in raw_columns.items()}
    # Lists and structs have no text; the SQL gets them as they are.
    sql_inputs = {name: raw_columns[name] if text is None else text for name, text in texts.items()}
    unread_names = [F.lit(None).cast("string")]
    with lenient(staged.frame.sparkSession):
        for name in _number_columns(
            source, _with_columns(staged, sql_inputs), computed, staged.names
        ):
            number = values.number(raw_columns[name], data_types[name], name, spelling)
            if number is not None:
                sql_inputs[name], is_present = number
                unread_names.append(F.when(sql_inputs[name].isNull() & is_present, F.lit(name)))
        n_columns = len(staged.names)
        frame = _with_columns(staged, sql_inputs).select(
            *staged.frame.columns,
            F.expr(computed.sql).alias(staged_column(n_columns)),
            F.coalesce(*unread_names).alias(staged_column(n_columns + 1)),
        )
    extended = Staged(frame, [*staged.names, computed.name, computed.unread_name])
    data_type = extended.data_types[computed.name]
    if computed.is_condition and not isinstance(data_type, BooleanType):
        raise SourceError(
            f"source '{source}': {computed.setting} is no condition: '{computed.sql}' gives "
            f"{data_type.simpleString()}; nothing was written"
        )
    return extended


def _with_columns(staged: Staged, columns: Mapping[str, Column]) -> DataFrame:
    return staged.frame.select("*", *[column.alias(name) for name, column in columns.items()])


def _number_columns(
    source: str, rows: DataFrame, computed: Computed, names: Sequence[str]
) -> Sequence[str]:
    """Return the names of the raw columns that the SQL casts to numbers.

    `rows` has every raw column as text. So Spark's analyser adds a cast wherever the SQL needs a
    number: of `price > 0` it makes `CAST(price AS INT) > 0`, and this returns `["price"]`.
    """
    try:
        plan = rows.select(F.expr(computed.sql))._jdf.queryExecution().analyzed()
    except AnalysisException as error:
        raise SourceError(
            f"source '{source}': {computed.setting} = '{computed.sql}' cannot be computed: "
            f"{_reason_of(error, names)} Nothing was written"
        ) from None
    expressions = plan.expressions()
    results = [expressions.apply(i) for i in range(expressions.size())]
    # Any other plan turns one row into several, or looks at other rows.
    is_of_one_row = plan.nodeName() == "Project" and plan.child().nodeName() == "Project"
    if not is_of_one_row or not all(expression.deterministic() for expression in results):
        raise SourceError(
            f"source '{source}': {computed.setting} = '{computed.sql}' has to be computed from one "
            "row alone, and the same each time; nothing was written"
        )
    cast_columns = [name for expression in results for name in _AS_NUMBER.findall(expression.sql())]
    name_by_lower_case = {name.lower(): name for name in names}
    lower_case_names = [name.strip("`").replace("``", "`").lower() for name in cast_columns]
    return sorted(
        {name_by_lower_case[name] for name in lower_case_names if name in name_by_lower_case}
    )


# What is wrong with the SQL, in one line for a message.
def _reason_of(error: AnalysisException, names: Sequence[str]) -> str:
    if (error.getCondition() or "").startswith("UNRESOLVED_COLUMN"):
        name = (error.getMessageParameters() or {}).get("objectName", "").strip("`")
        return f"no column '{name}'.{suggest(name, names)}"
    return next(line for line in str(error).splitlines() if line.strip())
