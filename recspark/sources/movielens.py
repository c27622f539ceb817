"""MovieLens: ratings, films and tags, as CSV (latest, 20M, …), with `::` (1M, 10M) or as Parquet.

`source.path` is the folder. GroupLens: research only, so the files stay where they are.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from datetime import date

from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from recspark import schema, storage
from recspark.config import Source
from recspark.errors import SourceError
from recspark.sources.files import Place, find_place
from recspark.sources.landing import Night
from recspark.sources.raw import UNREADABLE, RawTable, read_raw
from recspark.sources.typed import (
    as_raw_events,
    attributes_of,
    bounds_of,
    id_of,
    list_of,
    number_of,
    readability,
    shaped,
    text_of,
    time_of,
)

# The films' own times are not known; a name holds since before the first rating.
SINCE_EVER = "1970-01-01"
NO_GENRES = "(no genres listed)"
DOUBLE_COLON = {"sep": "::", "quote": "", "header": "false"}


@dataclass(frozen=True)
class Form:
    """How one release spells a file: the name it ends in, its format and its columns."""

    endings: tuple[str, ...]
    format: str
    columns: tuple[str, ...]
    extra: tuple[str, ...] = ()


RATINGS = (
    Form(("csv", "csv.gz"), "csv", ("userId", "movieId", "rating", "timestamp")),
    Form(("dat", "dat.gz"), "::", ("UserID", "MovieID", "Rating", "Timestamp")),
    # ML-1M as rebuilt: exact order in `time_rank_in_user`, and which times are interpolated.
    Form(
        ("parquet",),
        "parquet",
        ("user_id", "movie_id", "rating", "timestamp"),
        ("time_rank_in_user", "ts_source"),
    ),
)
MOVIES = (
    Form(("csv", "csv.gz"), "csv", ("movieId", "title", "genres")),
    Form(("dat", "dat.gz"), "::", ("MovieID", "Title", "Genres")),
)
TAGS = (
    Form(("csv", "csv.gz"), "csv", ("userId", "movieId", "tag", "timestamp")),
    Form(("dat", "dat.gz"), "::", ("UserID", "MovieID", "Tag", "Timestamp")),
)


def places(source: Source, run_date: date) -> list[Place]:
    """Return where ratings, films and tags lie; one that is not there has no entries.

    Raises MissingLandingError where the folder is not there, SourceError where it has other files
    only.
    """
    folder = find_place(source, source.path, run_date)
    if not folder.entries:
        return [folder, folder, folder]
    found = [_one_file(folder, "ratings", RATINGS), _one_file(folder, "movies", MOVIES)]
    if not found[0].entries:
        names = [f"ratings.{ending}" for form in RATINGS for ending in form.endings]
        raise SourceError(
            f"source '{source.name}': none of {', '.join(names)} is in {folder.root}, which has "
            f"{', '.join(name for name, _, _ in folder.entries[:10])}; is source.path right?"
        )
    return [*found, _one_file(folder, "tags", TAGS)]


def read(
    spark: SparkSession, source: Source, places: list[Place], night: Night
) -> tuple[DataFrame | None, DataFrame | None]:
    """Return ratings as events and films as catalogue of `night`; None where no file holds a row.

    An event is a `rating`, value = the stars; 0 (unknown, in the rebuilt 1M) = null. A film's text
    is title, genres and the tags it had by then: one row from ever, one more per day on which it
    was tagged. Cost: events one shuffle (identical lines), items three.
    """
    ratings = _read_form(spark, places[0], RATINGS)
    movies = _read_form(spark, places[1], MOVIES)
    tags = _read_form(spark, places[2], TAGS)
    events = None if ratings is None else _events(source, ratings, night)
    items = None if movies is None else _items(movies, tags, night)
    return events, items


def _one_file(folder: Place, stem: str, forms: tuple[Form, ...]) -> Place:
    known = {entry[0]: entry for entry in folder.entries}
    for form in forms:
        for ending in form.endings:
            entry = known.get(f"{stem}.{ending}")
            if entry is not None:
                return Place(folder.source, storage.join(folder.root, entry[0]), (entry,))
    return Place(folder.source, folder.root, ())


def _read_form(spark: SparkSession, place: Place, forms: tuple[Form, ...]) -> RawTable | None:
    if not place.entries:
        return None
    form = next(form for form in forms if place.root.endswith(form.endings))
    if form.format == "parquet":
        return read_raw(spark, place, "parquet", form.columns + form.extra)
    # Numbers only, as in the ratings, are the same in either.
    options = {} if forms is RATINGS else {"encoding": _encoding(place)}
    if form.format == "::":
        options |= DOUBLE_COLON
        return read_raw(spark, place, "csv", form.columns, options=options, header=form.columns)
    return read_raw(spark, place, "csv", form.columns, options=options)


def _encoding(place: Place) -> str:
    """Return how the titles or tags are encoded, by their bytes: 1M is ISO-8859-1, 10M is UTF-8 and
    has the same form.

    Cost: the driver reads the file once, up to the first byte that is no UTF-8: 40 MB of tags at 20M.
    """
    for uri in place.files:
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            with storage.open_read(uri, decompress=True) as stream:
                while block := stream.read(1 << 20):
                    decoder.decode(block)
                decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "ISO-8859-1"
        except (OSError, EOFError) as error:
            raise SourceError(f"{uri} cannot be read: {error}; was it delivered in full?") from None
    return "UTF-8"


def _events(source: Source, table: RawTable, night: Night) -> DataFrame:
    user, movie, stars, at = list(table.kinds)[:4]
    rated_at, rating = time_of(table, at, "UTC"), number_of(table, stars)
    event_at, attributes = rated_at.value, attributes_of({})
    if "time_rank_in_user" in table.kinds:
        # Whole seconds tie often; microseconds by rank keep each user's exact order.
        rank = table.column("time_rank_in_user").cast("bigint")
        event_at = F.timestamp_micros(F.unix_micros(rated_at.value) + rank)
        is_made_up = table.column("ts_source") == "interp"
        attributes = attributes_of({"time": F.when(is_made_up, "interpolated")})
    columns = {
        "user_id": id_of(table, user),
        "item_id": id_of(table, movie),
        "event_type": F.lit("rating"),
        "event_at": event_at,
        "rating": rating.value,
        "value": F.nullif(rating.value, F.lit(0.0)),
        "attributes": attributes,
    }
    content = [*(table.column(name) for name in (user, movie, stars, at)), F.col(UNREADABLE)]
    checks = readability(table, {"rating": rating, "event_at": rated_at}, (user, movie))
    checks += bounds_of("value", size=source.max_value)
    return as_raw_events(table, night.rows(table.frame, event_at), columns, checks, content)


def _items(movies: RawTable, tags: RawTable | None, night: Night) -> DataFrame:
    movie, title, genres = movies.kinds
    category = F.filter(list_of(movies, genres, "|"), lambda genre: genre != NO_GENRES)
    films = (
        movies.frame.where(~movies.unreadable())
        .select(
            id_of(movies, movie).alias("item_id"),
            text_of(movies, title).alias("item_name"),
            category.alias("category"),
        )
        .where(F.col("item_id").isNotNull())
        .groupBy("item_id")
        .agg(F.max(F.struct("item_name", "category")).alias("film"))
        .select("item_id", "film.*")
    )
    states = films.select(
        "*",
        F.lit(SINCE_EVER).cast("timestamp").alias("valid_from"),
        F.array().cast(schema.STRINGS).alias("tags"),
    )
    if tags is not None:
        states = states.unionByName(films.join(_tags_by_day(tags), on="item_id", how="inner"))
    # An empty list must add no blank.
    words = [F.nullif(F.array_join(name, " "), F.lit("")) for name in ("category", "tags")]
    text = F.concat_ws(" ", "item_name", *words)
    return shaped(
        night.catalogue(states, F.col("valid_from")),
        schema.RAW_ITEMS,
        {
            **{name: F.col(name) for name in ("item_id", "item_name", "category", "valid_from")},
            "text": text,
        },
    )


def _tags_by_day(table: RawTable) -> DataFrame:
    """Return item_id, valid_from, tags: the distinct tags a film had after each day that added
    some.
    """
    _, movie, tag, at = table.kinds
    tagged_at = time_of(table, at, "UTC").value
    by_day = (
        table.frame.where(~table.unreadable())
        .select(
            id_of(table, movie).alias("item_id"),
            F.lower(text_of(table, tag)).alias("tag"),
            tagged_at.alias("at"),
        )
        .where("item_id IS NOT NULL AND tag IS NOT NULL AND at IS NOT NULL")
        .groupBy("item_id", F.to_date("at").alias("day"))
        .agg(F.max("at").alias("valid_from"), F.collect_set("tag").alias("tags"))
    )
    so_far = Window.partitionBy("item_id").orderBy("day")
    tags = F.array_sort(F.array_distinct(F.flatten(F.collect_list("tags").over(so_far))))
    return by_day.select("item_id", "valid_from", tags.alias("tags"))
