"""The training sets that networks read: fixed-length tensors in equal files, as of one cutoff."""

from __future__ import annotations

from datetime import datetime

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark.config import Config
from recspark.data import features, training_impressions, training_rows, training_texts
from recspark.data.dataset import TrainingSet
from recspark.data.interactions import in_horizon
from recspark.models.registry import make
from recspark.pipeline.context import RunContext
from recspark.tables.catalog import TableCatalog, TableVersion
from recspark.tables.row_checks import Slice, slice_condition
from recspark.tables.snapshot import active_files

# Key in the detail of the `runs` row of build_features: the number of users who act after the
# backtest's cutoff.
USERS_WITH_TRUTH = "users_with_truth"

# The names of all training tables.
TRAINING = (*training_rows.TRAINING_TABLES, *training_impressions.TABLES, training_texts.TABLE)


def training_tables(config: Config) -> set[str]:
    """Return the training tables that tonight's models read, with their present settings."""
    models = [make(name, config.settings_of(name)) for name in config.models]
    return {table for model in models for table in model.training_tables}


def with_truth(context: RunContext, histories: DataFrame, cutoff: datetime) -> DataFrame:
    """Return the rows of `histories` of the users who act in the horizon after `cutoff`."""
    is_in_horizon = in_horizon(cutoff, context.config.evaluate.horizon_days)
    return histories.where(F.exists("history", is_in_horizon))


def features_as_of(context: RunContext, cutoff: datetime) -> tuple[DataFrame, DataFrame]:
    """Return the slices of `user_features` and `item_features` as of one cutoff."""
    is_of_cutoff = F.col("cutoff") == F.lit(cutoff)
    return context.read("user_features").where(is_of_cutoff), context.read("item_features").where(
        is_of_cutoff
    )


def write_training(
    context: RunContext, table: str, histories: DataFrame, cutoff: datetime
) -> TableVersion:
    """Write the training set of one cutoff, with the same number of files for each rank."""
    rows = rows_of_training_set(context, histories, cutoff, table)
    n_files = n_files_of(context)
    return context.catalog.replace_slice(table, rows, {"cutoff": cutoff}, n_files=n_files)


def n_files_of(context: RunContext) -> int:
    """Return the number of files of one cutoff's training set: a multiple of the ranks."""
    return training_rows.n_training_files(context.config.train.ranks)


def rows_of_training_set(
    context: RunContext, histories: DataFrame, cutoff: datetime, table: str
) -> DataFrame:
    """Return the rows of one training table as of one cutoff, in as many partitions as it gets
    files.

    `histories` are cut at the cutoff.
    """
    config, n_files = context.config, n_files_of(context)
    if table == training_texts.TABLE:
        items = features.items_as_of(context.read("items"), cutoff)
        items_acted_on = histories.select(
            F.explode("history.item_idx").alias("item_idx")
        ).distinct()
        described_items = items_acted_on.join(items, on="item_idx", how="left")
        return training_texts.training_texts(described_items, cutoff, config.features, n_files)
    if table in training_impressions.TABLES:
        dictionaries = context.read("user_ids"), context.item_sized(context.read("item_ids"))
        shown_items = training_impressions.impressions(
            context.read("sessions"), *dictionaries, cutoff
        )
        unit = training_impressions.TABLES[table]
        return training_impressions.training_impressions(
            histories, shown_items, cutoff, config.features, n_files, unit=unit
        )
    return training_rows.TRAINING_TABLES[table](histories, cutoff, config.features, n_files)


def training_set(catalog: TableCatalog, table: str, version: int, where: Slice) -> TrainingSet:
    """Return the files of the slice `where` of `table` at `version`, with the number of their rows.

    Raises VersionNotFoundError. Cost: no Spark job; the driver reads the footer of each file.
    """
    files = active_files(catalog, table, version, slice_condition(where))
    return TrainingSet.of_files(table, version, files)
