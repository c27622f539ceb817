"""The training sets that networks read: fixed-length tensors in equal files, as of one cutoff."""

from __future__ import annotations

from datetime import datetime

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark.config import Config
from recspark.data import features, impressions, texts, windows
from recspark.data.dataset import TrainingSet
from recspark.data.interactions import in_horizon
from recspark.models.registry import make
from recspark.pipeline.context import RunContext
from recspark.tables.catalog import TableCatalog, TableVersion
from recspark.tables.rows import Slice, slice_condition
from recspark.tables.snapshot import active_files

USERS_WITH_TRUTH = "users_with_truth"  # in the detail of the row of `build_features`: how many

TRAINING = (*windows.TRAINING_TABLES, *impressions.TABLES, texts.TABLE)


def training_tables(config: Config) -> set[str]:
    """Return the training tables that tonight's models read, with the settings that they have."""
    models = [make(name, config.settings_of(name)) for name in config.models]
    return {table for model in models for table in model.training_tables}


def with_truth(context: RunContext, histories: DataFrame, cutoff: datetime) -> DataFrame:
    """Return the users of `histories` who act in the horizon after `cutoff`."""
    horizon = in_horizon(cutoff, context.config.evaluate.horizon_days)
    return histories.where(F.exists("history", horizon))


def features_as_of(context: RunContext, cutoff: datetime) -> tuple[DataFrame, DataFrame]:
    """Return the slices of `user_features` and `item_features` of one cutoff."""
    at = F.col("cutoff") == F.lit(cutoff)
    return context.read("user_features").where(at), context.read("item_features").where(at)


def write_training(
    context: RunContext, table: str, histories: DataFrame, cutoff: datetime
) -> TableVersion:
    """Write the training set of one cutoff, the same number of files for each rank."""
    rows = training_rows(context, histories, cutoff, table)
    n_files = n_files_of(context)
    return context.catalog.replace_slice(table, rows, {"cutoff": cutoff}, n_files=n_files)


def n_files_of(context: RunContext) -> int:
    """Return the number of files of one cutoff's training set: a multiple of the ranks."""
    return windows.n_training_files(context.config.train.ranks)


def training_rows(
    context: RunContext, histories: DataFrame, cutoff: datetime, table: str
) -> DataFrame:
    """Return the training set of one cutoff, in as many partitions as it gets files."""
    config, n_files = context.config, n_files_of(context)
    if table == texts.TABLE:
        items = features.items_as_of(context.read("items"), cutoff)
        acted = histories.select(F.explode("history.item_idx").alias("item_idx")).distinct()
        mine = acted.join(items, on="item_idx", how="left")
        return texts.training_texts(mine, cutoff, config.features, n_files)
    if table in impressions.TABLES:
        dictionaries = context.read("user_ids"), context.read("item_ids")
        shown = impressions.impressions(context.read("sessions"), *dictionaries, cutoff)
        unit = impressions.TABLES[table]
        return impressions.training_impressions(
            histories, shown, cutoff, config.features, n_files, unit=unit
        )
    return windows.TRAINING_TABLES[table](histories, cutoff, config.features, n_files)


def training_set(catalog: TableCatalog, table: str, version: int, where: Slice) -> TrainingSet:
    """Return the active files of the slice `where` of `table` at `version`, with their rows.

    Raises VersionNotFoundError. Cost: no Spark job; the footer of each file is read here.
    """
    files = active_files(catalog, table, version, slice_condition(where))
    return TrainingSet.of_files(table, version, files)
