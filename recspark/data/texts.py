"""The words of items, as fixed-length rows that networks read: the training set of content models."""

from __future__ import annotations

from datetime import datetime

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Features
from recspark.data.windows import NO_ITEM, padded, spread

TABLE = "training_texts"
LEAST_ITEMS = 2  # a word of one item says nothing of another


def words(items: DataFrame) -> DataFrame:
    """Return `item_idx, word, n`: how often each word stands in an item's name, text and category.

    Words are what stands between characters that are neither letters nor digits, in small letters;
    a category is one word, `category=<its name>`. Nulls have none. One shuffle, by item and word.
    """
    text = F.lower(F.concat_ws(" ", "item_name", "text"))
    found = F.split(text, r"[^\p{L}\p{N}]+")
    labels = F.transform(
        F.coalesce("category", F.array().cast("array<string>")),
        lambda name: F.concat(F.lit("category="), F.lower(name)),
    )
    every = F.filter(F.concat(found, labels), lambda word: word.isNotNull() & (word != ""))
    rows = items.select("item_idx", F.explode(every).alias("word"))
    return rows.groupBy("item_idx", "word").agg(F.count("*").alias("n"))


def training_texts(
    items: DataFrame, cutoff: datetime, settings: Features, n_files: int
) -> DataFrame:
    """Return a row per item: its words as numbers.

    Parameters
    ----------
    items : item_idx, item_name, category, text: those that a model may recommend, as of the cutoff
    settings : `max_words`, and `max_item_words`
    n_files : partitions of the result, as for `windows.training_bags`

    Returns
    -------
    `schema.TRAINING_TEXTS`. The dictionary is the `max_words` words of the most items (at least
    `LEAST_ITEMS`; ties by the word), numbered from 0 in that order. A weight is the word's count in
    the item over its largest count in any, in (0, 1]. An item without known words has a row of
    padding. Cost: one job for the dictionary, which the driver holds; then shuffles of
    item-sized rows.
    """
    counted = words(items)
    numbers = items.sparkSession.createDataFrame(
        _dictionary(counted, settings.max_words),
        schema.columns(word=schema.STRING, number=schema.INT, most=schema.LONG),
    )
    pair = F.struct("number", (F.col("n") / F.col("most")).cast("float").alias("weight"))
    known = (
        counted.join(F.broadcast(numbers), on="word", how="inner")
        .groupBy("item_idx")
        .agg(F.sort_array(F.collect_list(pair)).alias("pairs"))
    )
    pairs = F.slice(
        F.coalesce("pairs", F.array().cast(known.schema["pairs"].dataType)),
        1,
        settings.max_item_words,
    )
    joined = items.select("item_idx").join(known, on="item_idx", how="left")
    rows = joined.select("item_idx", pairs.alias("pairs"))
    made = rows.select(
        F.lit(cutoff).alias("cutoff"),
        "item_idx",
        padded(F.col("pairs.number"), settings.max_item_words, F.lit(NO_ITEM)).alias("words"),
        padded(F.col("pairs.weight"), settings.max_item_words, F.lit(0.0).cast("float")).alias(
            "weights"
        ),
        F.size("pairs").alias("length"),
    )
    return spread(made, F.xxhash64("item_idx"), n_files)


def _dictionary(counted: DataFrame, max_words: int) -> list[tuple[str, int, int]]:
    """Return (word, number, largest count in an item), by number. One job."""
    found = (
        counted.groupBy("word")
        .agg(F.count("*").alias("items"), F.max("n").alias("most"))
        .where(F.col("items") >= LEAST_ITEMS)
        .orderBy(F.desc("items"), "word")
        .limit(max_words)
        .collect()
    )
    return [(row["word"], number, row["most"]) for number, row in enumerate(found)]
