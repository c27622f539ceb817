"""Column names and Spark types of every table, and of the data that models take and return.

Nothing else in recspark declares a schema. Times are in UTC. A column `..._id` has the string by
which the outside world names a user or item; `..._idx` has the dense integer that recspark uses
inside. `user_idx` is bigint and `item_idx` is int everywhere.
"""

from __future__ import annotations

from pyspark.sql import Column
from pyspark.sql import functions as F
from pyspark.sql.types import (
    ArrayType,
    BooleanType,
    DataType,
    DateType,
    DoubleType,
    FloatType,
    IntegerType,
    LongType,
    MapType,
    StringType,
    StructField,
    StructType,
    TimestampType,
)

STRING, INT, LONG = StringType(), IntegerType(), LongType()
FLOAT, DOUBLE, BOOL = FloatType(), DoubleType(), BooleanType()
DATE, TIMESTAMP = DateType(), TimestampType()
STRINGS = ArrayType(STRING)
STRING_MAP = MapType(STRING, STRING)
VERSION_MAP = MapType(STRING, LONG)


def quoted(name: str) -> Column:
    """Return the column `name`; the name may contain dots, blanks and backticks.

    `F.col("a.b")` is the field `b` of a column `a`. So a name that is not recspark's own, as that of
    a raw column or of a feature, reaches Spark through this function.
    """
    return F.col("`" + name.replace("`", "``") + "`")


def columns(**fields: DataType) -> StructType:
    """Return a StructType of `fields`, in their order. All are nullable, because Delta gives every
    column back as nullable.
    """
    return StructType([StructField(name, data_type, True) for name, data_type in fields.items()])


# --- the rows that a source gives to stage ingest ----------------------------------------------

RAW_EVENTS = columns(
    event_id=STRING,
    user_id=STRING,
    session_key=STRING,
    order_id=STRING,
    item_id=STRING,
    event_type=STRING,
    event_at=TIMESTAMP,
    value=DOUBLE,
    quantity=DOUBLE,
    attributes=STRING_MAP,
    reason=STRING,  # why the source refuses the row; null = the source has no objection
    row=STRING,  # the raw row as JSON, for the quarantine
)

# Whether an item may be listed. `available` is null where the source says nothing about it; then
# the two times are null too. An item may be listed from `available_from` on and before
# `available_until`; null = without an end.
AVAILABILITY: dict[str, DataType] = {
    "available": BOOL,
    "available_from": TIMESTAMP,
    "available_until": TIMESTAMP,
}

RAW_ITEMS = columns(
    item_id=STRING,
    item_name=STRING,
    category=STRINGS,
    price=DOUBLE,
    text=STRING,
    media=STRINGS,
    valid_from=TIMESTAMP,
    **AVAILABILITY,
    reason=STRING,  # why the source refuses the row; null = the source has no objection
    row=STRING,  # the raw row as JSON, for the quarantine
)

# --- tables -------------------------------------------------------------------------------------

EVENTS = columns(
    event_id=STRING,
    user_id=STRING,
    session_key=STRING,
    order_id=STRING,
    item_id=STRING,
    event_type=STRING,
    event_at=TIMESTAMP,
    value=DOUBLE,
    quantity=DOUBLE,
    attributes=STRING_MAP,
    event_date=DATE,
    ingest_date=DATE,
)

QUARANTINE = columns(
    ingest_date=DATE,
    source=STRING,
    input=STRING,  # `events` or `catalogue`
    reason=STRING,
    row=STRING,
    event_date=DATE,
    row_id=STRING,  # recognises the row when it is delivered again
)

SESSIONS = columns(
    session_id=STRING,
    user_id=STRING,
    session_key=STRING,
    started_at=TIMESTAMP,
    ended_at=TIMESTAMP,
    n_events=INT,  # number of the user's actions; impressions do not count
    items=STRINGS,  # the items that the user acted on
    # The impressions: the items that were shown to the user.
    shown=ArrayType(columns(item_id=STRING, event_at=TIMESTAMP)),
    started_date=DATE,
)

USER_IDS = columns(user_id=STRING, user_idx=LONG, run_date=DATE)
ITEM_IDS = columns(item_id=STRING, item_idx=INT, run_date=DATE)

ITEMS = columns(
    item_id=STRING,
    item_idx=INT,
    item_name=STRING,
    category=STRINGS,
    price=DOUBLE,
    text=STRING,
    media=STRINGS,
    valid_from=TIMESTAMP,
    ingest_date=DATE,
    **AVAILABILITY,
)

HISTORY_EVENT = columns(
    item_idx=INT,
    event_at=TIMESTAMP,
    event_type=STRING,
    weight=FLOAT,
    value=FLOAT,
    session_id=STRING,
    order_id=STRING,
)
HISTORY = ArrayType(HISTORY_EVENT)
ITEM_IDXS = ArrayType(INT)

HISTORIES = columns(user_idx=LONG, history=HISTORY, seen=ITEM_IDXS, bucket=INT)

USER_FEATURES = columns(
    cutoff=TIMESTAMP,
    user_idx=LONG,
    n_events=INT,
    n_orders=INT,
    n_orders_28d=INT,
    n_orders_90d=INT,
    n_items=INT,
    order_size=DOUBLE,
    repeat_share=DOUBLE,
    spend=DOUBLE,
    mean_value=DOUBLE,
    recency_days=DOUBLE,
    tenure_days=DOUBLE,
    mean_gap_days=DOUBLE,
    activity=STRING,
)

ITEM_FEATURES = columns(
    cutoff=TIMESTAMP,
    item_idx=INT,
    n_events=LONG,
    n_users=LONG,
    n_events_7d=LONG,
    n_events_28d=LONG,
    n_events_90d=LONG,
    growth=DOUBLE,
    popularity_3d=DOUBLE,
    popularity_7d=DOUBLE,
    popularity_14d=DOUBLE,
    popularity_30d=DOUBLE,
    popularity_60d=DOUBLE,
    popularity_120d=DOUBLE,
    trend=DOUBLE,
    new_users_14d=LONG,
    new_users_28d=LONG,
    price=DOUBLE,
    price_change=DOUBLE,
    age_days=DOUBLE,
    last_event_days=DOUBLE,
    repeat_rate=DOUBLE,
    category=STRINGS,
)

SOURCE_OF_EXAMPLE = columns(model=STRING, rank=INT, score=FLOAT)

EXAMPLES = columns(
    cutoff=TIMESTAMP,
    model=STRING,  # the ranker that is trained on the example
    mode=STRING,  # the retrievers' lists that propose the item: `novel` or `repeat`
    user_idx=LONG,
    item_idx=INT,
    label=FLOAT,  # weight of the user's events with the item in the horizon; 0 = no event
    sources=ArrayType(SOURCE_OF_EXAMPLE),  # which retrievers proposed the item
    numbers=ArrayType(FLOAT),
    fields=ArrayType(INT),
)

ITEM_VECTORS = columns(
    encoder=STRING,
    # The fitted encoder: its cutoff and key. For an encoder that is not fitted: its recipe.
    artifact=STRING,
    item_idx=INT,
    content=STRING,  # digest of the item's content that was encoded
    vector=ArrayType(FLOAT),  # null = the encoder gives no vector for this content
    # Why there is no vector; null = there is one, or the encoder does not say.
    problem=STRING,
    encoded_date=DATE,
)

TRAINING_BAGS = columns(
    cutoff=TIMESTAMP,
    user_idx=LONG,
    items=ITEM_IDXS,  # fixed length, padded with -1
    weights=ArrayType(FLOAT),  # fixed length, padded with 0
    length=INT,
)

# The files of one training by fields, not a table: `recspark.data.training_fields`.
TRAINING_ROWS = columns(
    label=FLOAT,
    weight=FLOAT,  # what the row counts in the loss
    numbers=ArrayType(FLOAT),  # positions in the distribution of each number, [0, 1]; NaN = missing
    # Codes of the fields. The name is not `fields`, which Petastorm's schemas have for themselves.
    codes=ArrayType(INT),
)

TRAINING_CURVES = columns(
    run_date=DATE,
    model=STRING,
    cutoff=TIMESTAMP,
    epoch=INT,
    loss=DOUBLE,  # mean loss per training row
    validation=DOUBLE,  # mean loss per validation row; null where there are no validation rows
    best=BOOL,  # whether the model has the weights of this epoch
    rows_per_s=DOUBLE,
    seconds=DOUBLE,
)

TRAINING_SEQUENCES = columns(
    cutoff=TIMESTAMP,
    user_idx=LONG,
    position=INT,  # position of the first item in the user's history
    items=ITEM_IDXS,  # fixed length, in time order, padded with -1
    length=INT,
)

TRAINING_TIMELINES = columns(
    cutoff=TIMESTAMP,
    user_idx=LONG,
    items=ITEM_IDXS,  # fixed length, in time order, padded with -1
    ages=ArrayType(INT),  # of each item's event: seconds before the cutoff; padded with 0
    length=INT,
)

TRAINING_TYPED_TIMELINES = columns(
    cutoff=TIMESTAMP,
    user_idx=LONG,
    items=ITEM_IDXS,  # fixed length, in time order, padded with -1
    ages=ArrayType(INT),  # of each item's event: seconds before the cutoff; padded with 0
    types=ArrayType(INT),  # of each item's event: the code of its type; padded with 0
    length=INT,
)

TRAINING_IMPRESSIONS = columns(
    **{field.name: field.dataType for field in TRAINING_SEQUENCES},
    shown=ITEM_IDXS,  # fixed length, in time order, padded with -1
    # For each of `shown`: how many of `items` come before it in time, at least 1; padded with 0.
    shown_after=ITEM_IDXS,
    # For each of `shown`: 1 = the user acted on it later in the session, else 0; padded with 0.
    clicked=ITEM_IDXS,
)

TRAINING_EVENTS = columns(
    cutoff=TIMESTAMP,
    user_idx=LONG,
    position=INT,  # of the event in the user's history, from 0
    item_idx=INT,
    event_at=LONG,  # microseconds since 1970 UTC: a number, as the feed reads numbers
)

USER_STATES = columns(
    cutoff=TIMESTAMP,
    model=STRING,
    user_idx=LONG,
    state=ArrayType(FLOAT),
    last_event_at=TIMESTAMP,
    next_visit_at=TIMESTAMP,  # null: not within ten years
)

TRAINING_ITEM_BAGS = columns(
    cutoff=TIMESTAMP,
    item_idx=INT,
    users=ArrayType(LONG),  # fixed length, ascending, padded with -1
    weights=ArrayType(FLOAT),  # fixed length, padded with 0
    length=INT,
)

TRAINING_TEXTS = columns(
    cutoff=TIMESTAMP,
    item_idx=INT,
    words=ITEM_IDXS,  # fixed length, ascending, padded with -1
    weights=ArrayType(FLOAT),  # fixed length, padded with 0
    length=INT,
)

CANDIDATES = columns(
    run_date=DATE,
    cutoff=TIMESTAMP,
    model=STRING,
    mode=STRING,
    user_idx=LONG,
    item_idx=INT,
    rank=INT,
    score=FLOAT,
)

METRICS = columns(
    run_date=DATE,
    kind=STRING,
    cutoff=TIMESTAMP,
    horizon_days=INT,
    model=STRING,
    mode=STRING,
    segment=STRING,
    metric=STRING,
    k=INT,
    value=DOUBLE,
    n_users=LONG,
    baseline=STRING,
    diff=DOUBLE,
    ci_low=DOUBLE,
    ci_high=DOUBLE,
)

REASON = columns(item_id=STRING, item_name=STRING, share=FLOAT)
BECAUSE = ArrayType(REASON)  # the user's own items that speak most for a row

RECOMMENDATIONS = columns(
    run_date=DATE,
    list=STRING,  # which of the published lists
    user_id=STRING,
    rank=INT,
    item_id=STRING,
    item_name=STRING,
    score=FLOAT,
    model=STRING,
    source=STRING,
    because=BECAUSE,
    rules=STRINGS,  # names of the rules that let the row into the list or raised it
)

DEFAULT_RECOMMENDATIONS = columns(
    run_date=DATE, segment=STRING, rank=INT, item_id=STRING, item_name=STRING, score=FLOAT
)

ITEM_NEIGHBOURS = columns(
    run_date=DATE,
    item_id=STRING,
    rank=INT,
    neighbour_id=STRING,
    neighbour_name=STRING,
    score=FLOAT,
    model=STRING,
)

GATES = columns(
    run_id=STRING,
    run_date=DATE,
    list=STRING,  # the published list that was judged
    gate=STRING,
    value=DOUBLE,
    threshold=DOUBLE,
    passed=BOOL,
    detail=STRING,
)

RUNS = columns(
    run_id=STRING,
    run_date=DATE,
    stage=STRING,
    model=STRING,
    inputs=VERSION_MAP,
    outputs=VERSION_MAP,
    config=STRING,
    code=STRING,
    detail=STRING,
    rows_in=LONG,
    rows_out=LONG,
    seconds=DOUBLE,
    peak_memory_mb=DOUBLE,
    status=STRING,
    started_at=TIMESTAMP,
    ended_at=TIMESTAMP,
)

TUNING = columns(
    cutoff=TIMESTAMP,
    horizon_days=INT,
    model=STRING,
    mode=STRING,
    metric=STRING,
    trial=INT,
    settings=STRING,
    value=DOUBLE,
    is_best=BOOL,
    seconds=DOUBLE,
)

# --- the data that models take and return ------------------------------------------------------

QUERIES = columns(user_idx=LONG, history=HISTORY, seen=ITEM_IDXS)
RECOMMENDED = columns(user_idx=LONG, item_idx=INT, rank=INT, score=FLOAT)
# Encoded features: `numbers`, where NaN = missing, and the codes of categories in `fields`, where
# 0 = missing and 1 = a category that the encoding does not know.
ENCODED = columns(numbers=ArrayType(FLOAT), fields=ArrayType(INT))
# The pairs that a ranker scores, and the scores that it returns.
PAIRS = columns(user_idx=LONG, item_idx=INT, numbers=ArrayType(FLOAT), fields=ArrayType(INT))
SCORED = columns(user_idx=LONG, item_idx=INT, score=FLOAT)
# The content of an item that an encoder gets, and the vectors that it returns.
CONTENT = columns(
    item_idx=INT, item_name=STRING, category=STRINGS, price=DOUBLE, text=STRING, media=STRINGS
)
CONTENT_AND_ID = StructType([*CONTENT.fields, *columns(item_id=STRING).fields])
VECTORS = columns(item_idx=INT, vector=ArrayType(FLOAT))
VECTORS_OR_PROBLEMS = columns(item_idx=INT, vector=ArrayType(FLOAT), problem=STRING)
PREDICTED = columns(user_idx=LONG, item_idx=INT, rating=FLOAT, predicted=FLOAT)
NEIGHBOURS = columns(item_idx=INT, rank=INT, neighbour_idx=INT, score=FLOAT)

MODES = ("novel", "repeat")
