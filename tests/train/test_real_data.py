"""Two ranks on the bundled shop's data, read from the active files of one Delta version."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Features, Train
from recspark.data import training_rows
from recspark.data.blocks import Array
from recspark.data.dataset import TrainingSet
from recspark.pipeline.training_sets import training_set
from recspark.tables.catalog import TableCatalog
from recspark.train.feed import Batch, Feed, ShardPlan, plan_shards
from recspark.train.launch import LocalLauncher, launcher

pytestmark = [pytest.mark.spark, pytest.mark.torch]
RAW = Path(__file__).parents[2] / "data/online_retail_ii/online_retail_2009_2010.parquet"
CUTOFF = datetime(2010, 11, 25, tzinfo=UTC)
STEPS = 10


def histories(spark: SparkSession) -> DataFrame:
    """The shop's sales by customer; item_idx is a hash of the code, so the vocabulary has gaps."""
    sales = spark.read.parquet(str(RAW)).where(
        "`Customer ID` IS NOT NULL AND Quantity > 0 AND Price > 0 AND StockCode RLIKE '^[0-9]{5}'"
    )
    event = F.struct(
        F.col("InvoiceDate").cast("timestamp").alias("event_at"),
        F.shiftright(F.crc32(F.col("StockCode").cast("binary")), 1).cast("int").alias("item_idx"),
    )
    history = F.transform(
        F.sort_array(F.collect_list(event)),
        lambda e: F.struct(
            e["item_idx"],
            e["event_at"],
            F.lit("purchase").alias("event_type"),
            F.lit(1.0).cast("float").alias("weight"),
            F.lit(None).cast("float").alias("value"),
            F.lit(None).cast("string").alias("session_id"),
            F.lit(None).cast("string").alias("order_id"),
        ),
    )
    return sales.groupBy(F.col("Customer ID").cast("bigint").alias("user_idx")).agg(
        history.cast(schema.HISTORY).alias("history")
    )


@pytest.fixture(scope="module")
def training(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    """Version 1 of the table; version 2 has emptied the slice, and left its files in the folder."""
    catalog = TableCatalog(spark, str(tmp_path_factory.mktemp("tables")))
    n_files = training_rows.n_training_files(2)
    features = Features(half_life_days=30, max_training_items=256)  # type: ignore[call-arg]
    bags = training_rows.training_bags(histories(spark), CUTOFF, features, n_files)
    slice_ = {"cutoff": CUTOFF}
    version = catalog.replace_slice("training_bags", bags, slice_, n_files=n_files).version
    catalog.replace_slice("training_bags", bags.limit(0), slice_, n_files=n_files)
    return training_set(catalog, "training_bags", version, slice_)


@pytest.fixture(scope="module")
def vocabulary(spark: SparkSession, training: TrainingSet) -> Array:
    files = spark.read.parquet(*[uri for uri, _ in training.files])
    items = files.select(F.explode("items").alias("i")).where("i >= 0").distinct().toArrow()
    return np.sort(items.column("i").to_numpy())


def ten_steps(reader: str = "petastorm", learning_rate: float = 1e-3) -> Callable[..., Any]:
    """Ten steps of Mult-VAE without dropout and sampling, so that nothing but the rows decides."""

    def fn(comm: Any, make_feed: Any, plan: Any, batch_size: int, items: Any) -> dict[str, Any]:
        from functools import partial

        import torch

        from recspark.models.autoencoders.multvae import (
            MultVaeSettings,
            log_shares,
            make_net,
            row_loss,
        )
        from recspark.train.loop import LoopOptions, train_network

        feed = make_feed(
            plan, comm.rank, ("user_idx", "items", "weights"), batch_size, 7, reader=reader
        )
        settings = MultVaeSettings(hidden_size=64, latent_size=16)
        known = torch.from_numpy(items).long()
        net = make_net(settings, len(items), 1)
        net.items_out_bias.data = log_shares(comm, feed.epoch(0), known)
        loss = partial(row_loss, net, known, settings)
        train_network(
            comm,
            net,
            lambda batch, _generator, done: loss(batch, None, done),
            feed,
            LoopOptions(epochs=1, learning_rate=learning_rate),
        )
        users = [b.tensors["user_idx"][b.weight > 0] for b in feed.epoch(0)]
        return {
            "vector": torch.nn.utils.parameters_to_vector(net.parameters()).detach().numpy(),
            "steps": feed.steps,
            "files": [uri for uri, _ in feed.shard.files],
            "users": torch.cat(users).tolist(),
        }

    return fn


class Joined:
    """One rank that reads, at each step, what all ranks of `plan` read at that step."""

    def __init__(self, plan: ShardPlan, rank: int, *args: Any, **options: Any) -> None:
        self.feeds = [Feed(plan, rank, *args, **options) for rank in range(plan.ranks)]
        self.steps = self.feeds[0].steps
        self.n_rows_of_all = plan.n_rows
        self.shard = self.feeds[0].shard

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for batches in zip(*(feed.epoch(epoch, start) for feed in self.feeds), strict=True):
            names = batches[0].tensors
            yield Batch(
                {name: torch.cat([b.tensors[name] for b in batches]) for name in names},
                torch.cat([b.weight for b in batches]),
            )


@pytest.mark.parametrize("kind", ["in_process", pytest.param("horovod", marks=pytest.mark.horovod)])
def test_two_ranks_are_one_at_twice_the_batch(
    spark: SparkSession, training: TrainingSet, vocabulary: Array, kind: str
) -> None:
    plan = plan_shards(training, 2)
    batch_size = 2 * -(-max(shard.n_rows for shard in plan.shards) // STEPS)
    told: list[str] = []
    settings = Train(ranks=2, threads=1, start_timeout_s=60, timeout_s=200)  # type: ignore[call-arg]
    ranks = launcher(spark, settings, in_process=kind == "in_process", tell=told.append)
    found = [r.value for r in ranks.run(ten_steps(), Feed, plan, batch_size, vocabulary)]
    (one,) = (
        r.value for r in LocalLauncher(1).run(ten_steps(), Joined, plan, batch_size, vocabulary)
    )

    assert [f["steps"] for f in found] == [STEPS, STEPS]
    assert not set(found[0]["files"]) & set(found[1]["files"])
    assert sorted(found[0]["files"] + found[1]["files"]) == [uri for uri, _ in training.files]
    users = found[0]["users"] + found[1]["users"]
    assert len(users) == len(set(users)) == training.n_rows > 4000
    assert sorted(users) == sorted(one["users"])

    assert np.array_equal(found[0]["vector"], found[1]["vector"])  # the ranks agree to the bit
    moved = np.abs(found[0]["vector"] - one["vector"]).max()
    assert moved < 1e-5
    for rank in range(2):
        assert any(line.startswith(f"rank {rank} on host") for line in told)
