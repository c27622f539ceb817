"""Source kind `movielens`: ratings, films and tags of a MovieLens release.

The files are CSV (releases latest, 20M, …), text with `::` between the fields (1M, 10M), or
Parquet. `source.path` is the folder of the release. GroupLens allows research only, so the files
stay where they are.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from dataclasses import dataclass
from datetime import date

from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from recspark import schema, storage
from recspark.config import Source
from recspark.data.event_checks import NO_ITEM, NO_TIME
from recspark.errors import SourceError
from recspark.sources.files import SourceInput, find_input, head
from recspark.sources.landing import Night
from recspark.sources.raw import UNREADABLE, RawTable, read_raw
from recspark.sources.typed import (
    as_raw_events,
    attributes_of,
    bounds_of,
    first_reason,
    id_of,
    list_of,
    number_of,
    readability,
    shaped,
    text_of,
    time_of,
)

# MovieLens gives no times for the films, so a film's title is valid from before the first rating.
SINCE_EVER = "1970-01-01"
NO_GENRES = "(no genres listed)"
NO_TAG = "no tag"
# CSV options for files with `::` between the fields: no quotes and no header line.
DOUBLE_COLON = {"sep": "::", "quote": "", "header": "false"}


@dataclass(frozen=True)
class Form:
    """The form that a file has in some releases.

    Parameters
    ----------
    endings : endings of the file's name that have this form
    format : `csv`, `::` or `parquet`
    columns : the raw columns, in the order in which this module unpacks them
    extra : further columns that only this form has
    """

    endings: tuple[str, ...]
    format: str
    columns: tuple[str, ...]
    extra: tuple[str, ...] = ()


RATINGS = (
    Form(("csv", "csv.gz"), "csv", ("userId", "movieId", "rating", "timestamp")),
    Form(("dat", "dat.gz"), "::", ("UserID", "MovieID", "Rating", "Timestamp")),
    # ML-1M as rebuilt: `time_rank_in_user` gives the exact order of a user's ratings, and
    # `ts_source` says which times are interpolated.
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

CATALOGUE_IS_OF_EVENTS = False


def inputs(source: Source, run_date: date) -> list[SourceInput]:
    """Return the files of ratings, films and tags. A file that does not exist has no entries.

    Raises MissingLandingError where the folder does not exist, and SourceError where the folder has
    files but no ratings.
    """
    folder = find_input(source, source.path, run_date)
    if not folder.entries:
        return [folder, folder, folder]
    ratings_and_movies = [_file_of(folder, "ratings", RATINGS), _file_of(folder, "movies", MOVIES)]
    if not ratings_and_movies[0].entries:
        names = [f"ratings.{ending}" for form in RATINGS for ending in form.endings]
        raise SourceError(
            f"source '{source.name}': none of {', '.join(names)} is in {folder.root}, which has "
            f"{', '.join(name for name, _, _ in folder.entries[:10])}; is source.path right?"
        )
    return [*ratings_and_movies, _file_of(folder, "tags", TAGS)]


def read(
    spark: SparkSession, source: Source, inputs: list[SourceInput], night: Night
) -> tuple[DataFrame | None, DataFrame | None]:
    """Return the ratings of `night` as events, and the films as catalogue; None for an input whose
    files hold no row.

    An event has the type `rating`, and its value is the number of stars. 0 stars (unknown, in the
    rebuilt 1M) become null. A film's text is its title, its genres and the tags it had at the time.
    The catalogue has one row, valid from 1970 on, for each line of the films, and one more per film
    and day on which the film was tagged. A line of the tags that cannot be read becomes a row of
    the catalogue with a `reason`. Cost: one shuffle for the events (to number identical lines),
    three for the items.
    """
    ratings = _read_form(spark, inputs[0], RATINGS)
    movies = _read_form(spark, inputs[1], MOVIES)
    tags = _read_form(spark, inputs[2], TAGS)
    events = None if ratings is None else _events(source, ratings, night)
    items = None if movies is None else _items(movies, tags, night)
    return events, items


# The first file of `folder` that is called `stem` with an ending of `forms`. A source_input without
# entries stands for a file that does not exist.
def _file_of(folder: SourceInput, stem: str, forms: tuple[Form, ...]) -> SourceInput:
    entry_by_name = {entry[0]: entry for entry in folder.entries}
    for form in forms:
        for ending in form.endings:
            entry = entry_by_name.get(f"{stem}.{ending}")
            if entry is not None:
                return SourceInput(folder.source, storage.join(folder.root, entry[0]), (entry,))
    return SourceInput(folder.source, folder.root, ())


def _read_form(
    spark: SparkSession, source_input: SourceInput, forms: tuple[Form, ...]
) -> RawTable | None:
    if not source_input.entries:
        return None
    form = next(form for form in forms if source_input.root.endswith(form.endings))
    if form.format == "parquet":
        return read_raw(spark, source_input, "parquet", form.columns + form.extra)
    # The ratings hold only numbers, whose bytes are the same in either encoding.
    options = {} if forms is RATINGS else {"encoding": _encoding(source_input)}
    if form.format == "::":
        options |= DOUBLE_COLON
        return read_raw(
            spark, source_input, "csv", form.columns, options=options, header=form.columns
        )
    return read_raw(spark, source_input, "csv", form.columns, options=options)


def _encoding(source_input: SourceInput) -> str:
    """Return the encoding of a file of titles or tags: `UTF-8` where all its bytes are UTF-8, else
    `ISO-8859-1`.

    The form of the file does not tell: 1M is ISO-8859-1, and 10M has the same form but is UTF-8.
    Cost: the driver reads the file once, up to the first byte that is not UTF-8 (40 MB for the tags
    of 20M).
    """
    for uri in source_input.files:
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            # Raises an error with its own message for a torn file or an unsupported compression.
            head(uri)
            with storage.open_read(uri) as stream:
                content = gzip.GzipFile(fileobj=stream) if uri.endswith(".gz") else stream
                while block := content.read(1 << 20):
                    decoder.decode(block)
                decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "ISO-8859-1"
        except (OSError, EOFError, zlib.error) as error:
            raise SourceError(f"{uri} cannot be read: {error}; was it delivered in full?") from None
    return "UTF-8"


def _events(source: Source, table: RawTable, night: Night) -> DataFrame:
    user_column, movie_column, rating_column, time_column = list(table.named_types)[:4]
    rated_at, rating = time_of(table, time_column, "UTC"), number_of(table, rating_column)
    event_at, attributes = rated_at.value, attributes_of({})
    if "time_rank_in_user" in table.named_types:
        # Ratings often share a second. Adding the rank as microseconds keeps each user's order.
        rank = table.column("time_rank_in_user").cast("bigint")
        event_at = F.timestamp_micros(F.unix_micros(rated_at.value) + rank)
        is_interpolated = table.column("ts_source") == "interp"
        attributes = attributes_of({"time": F.when(is_interpolated, "interpolated")})
    columns = {
        "user_id": id_of(table, user_column),
        "item_id": id_of(table, movie_column),
        "event_type": F.lit("rating"),
        "event_at": event_at,
        "rating": rating.value,
        "value": F.nullif(rating.value, F.lit(0.0)),
        "attributes": attributes,
    }
    content = [
        *(table.column(name) for name in (user_column, movie_column, rating_column, time_column)),
        F.col(UNREADABLE),
    ]
    checks = readability(
        table, {"rating": rating, "event_at": rated_at}, (user_column, movie_column)
    )
    checks += bounds_of("value", size=source.max_value)
    return as_raw_events(table, night.rows(table.frame, event_at), columns, checks, content)


def _items(movies: RawTable, tags: RawTable | None, night: Night) -> DataFrame:
    movie_column, title_column, genres_column = movies.named_types
    category = F.filter(list_of(movies, genres_column, "|"), lambda genre: genre != NO_GENRES)
    columns = {
        "item_id": id_of(movies, movie_column),
        "item_name": text_of(movies, title_column),
        "category": category,
        "valid_from": F.lit(SINCE_EVER).cast("timestamp"),
    }
    checks = readability(movies, {}, tuple(movies.named_types))
    film_rows = movies.frame.withColumns(columns).withColumn("reason", first_reason(checks))
    film_rows = film_rows.withColumn("row", movies.row()).select(*columns, "reason", "row")
    catalogue = film_rows.withColumn("tags", F.array().cast(schema.STRINGS))
    if tags is not None:
        tag_lines = night.rows(_tags_with_reason(tags), F.col("valid_from"))
        films = (
            film_rows.where("reason IS NULL AND item_id IS NOT NULL")
            .groupBy("item_id")
            .agg(F.max(F.struct("item_name", "category")).alias("film"))
            .select("item_id", "film.*")
        )
        tagged = films.join(_tags_by_day(tag_lines), on="item_id", how="inner")
        refused_tags = tag_lines.where("reason IS NOT NULL").drop("tag")
        catalogue = catalogue.unionByName(tagged, allowMissingColumns=True)
        catalogue = catalogue.unionByName(refused_tags, allowMissingColumns=True)
    # An empty list gives "", which becomes null, so that `concat_ws` adds no blank for the list.
    joined_lists = [F.nullif(F.array_join(name, " "), F.lit("")) for name in ("category", "tags")]
    plain_columns = {name: F.col(name) for name in (*columns, "reason", "row")}
    return shaped(
        catalogue,
        schema.RAW_ITEMS,
        {**plain_columns, "text": F.concat_ws(" ", "item_name", *joined_lists)},
    )


def _tags_with_reason(table: RawTable) -> DataFrame:
    """Return the lines of the tags as (item_id, tag, valid_from, reason, row). Tags are in lower
    case; `reason` is null for a line that can be read.
    """
    _, movie_column, tag_column, time_column = table.named_types
    tagged_at = time_of(table, time_column, "UTC")
    columns = {
        "item_id": id_of(table, movie_column),
        "tag": F.lower(text_of(table, tag_column)),
        "valid_from": tagged_at.value,
    }
    checks = [
        *readability(table, {"valid_from": tagged_at}, tuple(table.named_types)),
        (F.col("item_id").isNull(), NO_ITEM),
        (F.col("tag").isNull(), NO_TAG),
        (F.col("valid_from").isNull(), NO_TIME),
    ]
    lines = table.frame.withColumns(columns).withColumn("reason", first_reason(checks))
    return lines.withColumn("row", table.row()).select(*columns, "reason", "row")


def _tags_by_day(tag_lines: DataFrame) -> DataFrame:
    """Return (item_id, valid_from, tags), one row per film and day on which the film was tagged:
    `tags` are all distinct tags of the film up to the end of that day, sorted, and `valid_from` is
    the time of the day's last tag.

    For example, a film tagged "noir" on Monday and "slow" on Tuesday gets one row with ["noir"] for
    Monday and one with ["noir", "slow"] for Tuesday.
    """
    by_day = (
        tag_lines.where("reason IS NULL")
        .select("item_id", "tag", F.col("valid_from").alias("at"))
        .groupBy("item_id", F.to_date("at").alias("day"))
        .agg(F.max("at").alias("valid_from"), F.collect_set("tag").alias("tags"))
    )
    days_so_far = Window.partitionBy("item_id").orderBy("day")
    tags = F.array_sort(F.array_distinct(F.flatten(F.collect_list("tags").over(days_so_far))))
    return by_day.select("item_id", "valid_from", tags.alias("tags"))
