"""The training set of content models: the words of items, as fixed-length rows for networks."""

from __future__ import annotations

from datetime import datetime

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Features
from recspark.data.training_rows import NO_ITEM, padded, spread

TABLE = "training_texts"
LEAST_ITEMS = 2  # items of a word at least: a word of one item says nothing about other items


def words(items: DataFrame) -> DataFrame:
    """Return `item_idx, word, n`: how often each word occurs in an item's name, text and category.

    A word is a run of letters and digits, in lower case. Each category is one word,
    `category=<its name>`. Nulls have no words. One shuffle, by item and word.
    """
    text = F.lower(F.concat_ws(" ", "item_name", "text"))
    words_of_text = F.split(text, r"[^\p{L}\p{N}]+")
    category_words = F.transform(
        F.coalesce("category", F.array().cast("array<string>")),
        lambda name: F.concat(F.lit("category="), F.lower(name)),
    )
    words_of_item = F.filter(
        F.concat(words_of_text, category_words), lambda word: word.isNotNull() & (word != "")
    )
    rows = items.select("item_idx", F.explode(words_of_item).alias("word"))
    return rows.groupBy("item_idx", "word").agg(F.count("*").alias("n"))


def training_texts(
    items: DataFrame, cutoff: datetime, settings: Features, n_files: int
) -> DataFrame:
    """Return a row per item: the words of the item as numbers.

    Parameters
    ----------
    items : item_idx, item_name, category, text: the items that a model may recommend, as of the
        cutoff
    cutoff : goes into the rows
    settings : `max_words`: size of the dictionary; `max_item_words`: words per row
    n_files : partitions of the result, as for `training_rows.training_bags`

    Returns
    -------
    `schema.TRAINING_TEXTS`. The dictionary has the `max_words` words that occur in the most items,
    in at least `LEAST_ITEMS`; ties are in order of the word. Its words are numbered from 0 in that
    order. An item keeps the `max_item_words` words with the smallest numbers. The weight of a word
    is its count in the item, divided by its largest count in any item, in (0, 1]. An item without
    words of the dictionary has a row of padding only. Cost: one job for the dictionary, which the
    driver holds; then shuffles of item-sized rows.
    """
    word_counts = words(items)
    dictionary = items.sparkSession.createDataFrame(
        _dictionary(word_counts, settings.max_words),
        schema.columns(word=schema.STRING, number=schema.INT, most=schema.LONG),
    )
    pair = F.struct("number", (F.col("n") / F.col("most")).cast("float").alias("weight"))
    pairs_of_item = (
        word_counts.join(F.broadcast(dictionary), on="word", how="inner")
        .groupBy("item_idx")
        .agg(F.sort_array(F.collect_list(pair)).alias("pairs"))
    )
    pairs = F.slice(
        F.coalesce("pairs", F.array().cast(pairs_of_item.schema["pairs"].dataType)),
        1,
        settings.max_item_words,
    )
    joined = items.select("item_idx").join(pairs_of_item, on="item_idx", how="left")
    pairs_of_all_items = joined.select("item_idx", pairs.alias("pairs"))
    training_rows = pairs_of_all_items.select(
        F.lit(cutoff).alias("cutoff"),
        "item_idx",
        padded(F.col("pairs.number"), settings.max_item_words, F.lit(NO_ITEM)).alias("words"),
        padded(F.col("pairs.weight"), settings.max_item_words, F.lit(0.0).cast("float")).alias(
            "weights"
        ),
        F.size("pairs").alias("length"),
    )
    return spread(training_rows, F.xxhash64("item_idx"), n_files)


def _dictionary(word_counts: DataFrame, max_words: int) -> list[tuple[str, int, int]]:
    """Return (word, number, largest count in one item), in order of the number. One job.

    `word_counts` are the rows of `words`; see `training_texts` for the order.
    """
    frequent_words = (
        word_counts.groupBy("word")
        .agg(F.count("*").alias("items"), F.max("n").alias("most"))
        .where(F.col("items") >= LEAST_ITEMS)
        .orderBy(F.desc("items"), "word")
        .limit(max_words)
        .collect()
    )
    return [(row["word"], number, row["most"]) for number, row in enumerate(frequent_words)]
