"""The feed: shares, order, counting; over both readers, kept in memory and streamed."""

from __future__ import annotations

import gc
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recspark.data.dataset import TrainingSet
from recspark.errors import FeedError
from recspark.train.feed import READERS, Batch, Feed, ShardPlan, plan_shards, split_files

pytestmark = pytest.mark.torch
COLUMNS = ("user_idx", "items", "weights")
BIG = 1 << 53  # where a float64 would lose the last digit of an int64


def table(users: range) -> pa.Table:
    n = len(users)
    items = np.arange(n * 3, dtype=np.int32).reshape(n, 3) + 1000 * np.array(users)[:, None]
    lists = pa.ListArray.from_arrays(
        np.arange(n + 1, dtype=np.int32) * 3, items.ravel().astype(np.int32)
    )
    weights = pa.ListArray.from_arrays(
        np.arange(n + 1, dtype=np.int32) * 3, np.linspace(0, 1, n * 3, dtype=np.float32)
    )
    idx = pa.array([BIG + user for user in users], pa.int64())
    return pa.table({"user_idx": idx, "items": lists, "weights": weights, "unread": ["x"] * n})


def stored(folder: Path, sizes: list[int], row_group_size: int = 16) -> TrainingSet:
    """Files of the sizes given, in a folder named as Delta names a partition."""
    home = folder / "cutoff=2010-11-25 00%3A00%3A00"
    home.mkdir(parents=True, exist_ok=True)
    files, begin = [], 0
    for number, size in enumerate(sizes):
        path = home / f"part-{number:05d}.parquet"
        pq.write_table(table(range(begin, begin + size)), path, row_group_size=row_group_size)
        files.append((f"file:{path}", size))
        begin += size
    return TrainingSet("training_bags", 3, tuple(files))


def feeds(plan: ShardPlan, **options: Any) -> list[Feed]:
    return [Feed(plan, rank, COLUMNS, 24, 7, **options) for rank in range(plan.ranks)]


def counted(batches: list[Batch]) -> list[int]:
    """The users of an epoch, in order, each as often as it counts."""
    return [
        int(user) - BIG
        for batch in batches
        for user, weight in zip(batch.tensors["user_idx"], batch.weight)
        if weight
    ]


KEPT, STREAMED = {"allowance": 1 << 30}, {"allowance": 1}


@pytest.mark.parametrize("memory", [KEPT, STREAMED], ids=["kept", "streamed"])
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("sizes", "ranks"),
    [([50, 50], 2), ([70, 9, 20, 1], 3), ([40], 1), ([5, 90], 2), ([30, 0, 30], 2), ([12], 3)],
    ids=str,
)
def test_every_row_counts_once_and_steps_are_equal(
    tmp_path: Path, reader: Any, memory: dict[str, int], sizes: list[int], ranks: int
) -> None:
    plan = plan_shards(stored(tmp_path, sizes), ranks)
    ranked = feeds(plan, reader=reader, **memory)
    for epoch in range(2):
        batches = [list(feed.epoch(epoch)) for feed in ranked]
        assert {len(b) for b in batches} == {plan.steps(24)}
        assert {len(batch.weight) for b in batches for batch in b} == {ranked[0].rows_per_step}
        assert ranked[0].rows_per_step <= -(-24 // ranks)
        seen = [user for b in batches for user in counted(b)]
        assert sorted(seen) == list(range(sum(sizes)))


@pytest.mark.parametrize("reader", READERS)
def test_values_and_types_arrive_untouched(tmp_path: Path, reader: Any) -> None:
    training = stored(tmp_path, [20])
    (feed,) = feeds(plan_shards(training, 1), reader=reader)
    (batch,) = feed.epoch(0)
    assert {n: str(t.dtype) for n, t in batch.tensors.items()} == {
        "user_idx": "torch.int64",
        "items": "torch.int32",
        "weights": "torch.float32",
    }
    want = table(range(20)).to_pydict()
    order = [int(u) - BIG for u in batch.tensors["user_idx"]]
    assert batch.tensors["items"].tolist() == [want["items"][u] for u in order]
    assert batch.tensors["weights"].tolist() == [want["weights"][u] for u in order]


@pytest.mark.parametrize("memory", [KEPT, STREAMED], ids=["kept", "streamed"])
@pytest.mark.parametrize("reader", READERS)
def test_order_is_that_of_seed_epoch_and_rank(
    tmp_path: Path, reader: Any, memory: dict[str, int]
) -> None:
    plan = plan_shards(stored(tmp_path, [64, 64]), 2)

    def order(seed: int, epoch: int) -> list[int]:
        feed = Feed(plan, 0, COLUMNS, 24, seed, reader=reader, **memory)
        return counted(list(feed.epoch(epoch)))

    for seed in (0, 1):
        assert order(seed, 0) == order(seed, 0)
        assert order(seed, 0) != order(seed, 1)
    assert order(0, 0) != order(1, 0)
    first, second = (list(feed.epoch(0)) for feed in feeds(plan, reader=reader, **memory))
    assert [u + 64 for u in counted(first)] != counted(second)


def test_twins_give_the_same_batches(tmp_path: Path) -> None:
    plan = plan_shards(stored(tmp_path, [40, 31]), 2)
    for one, other in zip(feeds(plan, reader="petastorm"), feeds(plan, reader="arrow")):
        for a, b in zip(one.epoch(3), other.epoch(3), strict=True):
            assert all(a.tensors[name].equal(b.tensors[name]) for name in COLUMNS)
            assert a.weight.equal(b.weight)


@pytest.mark.parametrize("memory", [KEPT, STREAMED], ids=["kept", "streamed"])
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("claimed", [39, 41])
def test_rows_read_must_be_rows_planned(
    tmp_path: Path, reader: Any, memory: dict[str, int], claimed: int
) -> None:
    training = stored(tmp_path, [40])
    lying = TrainingSet(training.table, training.version, ((training.files[0][0], claimed),))
    (feed,) = feeds(plan_shards(lying, 1), reader=reader, **memory)
    with pytest.raises(FeedError, match=f"rank 0 read 40 rows, planned were {claimed}"):
        list(feed.epoch(0))


@pytest.mark.parametrize("reader", READERS)
def test_lists_of_unequal_length_are_refused(tmp_path: Path, reader: Any) -> None:
    path = tmp_path / "ragged.parquet"
    pq.write_table(pa.table({"items": pa.array([[1, 2], [3]], pa.list_(pa.int32()))}), path)
    plan = plan_shards(TrainingSet("t", 1, ((str(path), 2),)), 1)
    with pytest.raises(FeedError, match="'items'"):
        list(Feed(plan, 0, ("items",), 4, 1, reader=reader).epoch(0))


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    plan = plan_shards(stored(tmp_path, [4]), 1)
    with pytest.raises(FeedError, match=r"no columns \['cutoff'\]"):
        list(Feed(plan, 0, ("items", "cutoff"), 4, 1).epoch(0))


@pytest.mark.parametrize("reader", READERS)
def test_files_of_another_store(tmp_path: Path, reader: Any) -> None:
    training = stored(tmp_path, [20, 20])
    memory = fsspec.filesystem("memory")
    files = []
    for uri, rows in training.files:
        name = f"memory://bucket/{Path(uri).name}"
        memory.pipe_file(name, Path(uri.removeprefix("file:")).read_bytes())
        files.append((name, rows))
    try:
        plan = plan_shards(TrainingSet("t", 1, tuple(files)), 2)
        users = [u for feed in feeds(plan, reader=reader) for u in counted(list(feed.epoch(0)))]
    finally:
        memory.rm("/bucket", recursive=True)
    assert sorted(users) == list(range(40))


def test_a_rank_without_files_borrows_one(tmp_path: Path) -> None:
    plan = plan_shards(stored(tmp_path, [30, 12]), 3)
    assert [shard.n_rows for shard in plan.shards] == [30, 12, 0]
    assert plan.shards[2].files == plan.shards[1].files
    assert all(not batch.weight.any() for batch in feeds(plan)[2].epoch(0))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 50), max_size=12), st.integers(1, 5), st.integers(1, 40))
def test_plan_is_disjoint_complete_and_balanced(sizes: list[int], ranks: int, batch: int) -> None:
    training = TrainingSet("t", 1, tuple((f"f{i:02d}", n) for i, n in enumerate(sizes)))
    if not sum(sizes):
        with pytest.raises(FeedError, match="no rows"):
            plan_shards(training, ranks)
        return
    plan = plan_shards(training, ranks)
    planned = [file for shard in plan.shards if shard.counted for file in shard.files]
    assert sorted(planned) == sorted(f for f in training.files if f[1])
    load = [shard.n_rows for shard in plan.shards]
    assert max(load) - min(load) <= max(sizes)
    assert max(load) <= plan.steps(batch) * -(-batch // ranks)


@pytest.mark.parametrize("allowance", [1 << 30, 1], ids=["kept", "streamed"])
def test_an_epoch_goes_on_from_any_batch(tmp_path: Path, allowance: int) -> None:
    plan = plan_shards(stored(tmp_path, [40, 25, 11]), 2)
    for feed in feeds(plan, reader="arrow", allowance=allowance):
        whole = list(feed.epoch(3))
        for start in (1, feed.steps - 1):
            rest = list(feed.epoch(3, start))
            assert len(rest) == feed.steps - start
            for want, found in zip(whole[start:], rest):
                assert torch.equal(want.weight, found.weight)
                for name in COLUMNS:
                    assert torch.equal(want.tensors[name], found.tensors[name])


def test_fifty_passes_read_every_row_fifty_times(tmp_path: Path) -> None:
    """Two ranks that stream through Petastorm: an empty file, a rank with few rows, a huge group."""
    training = stored(tmp_path, [70, 0, 9, 3], row_group_size=64)
    seen: Counter[int] = Counter()
    for feed in feeds(plan_shards(training, 2), allowance=1):
        for epoch in range(50):
            batches = list(feed.epoch(epoch))
            assert len(batches) == feed.steps
            seen.update(counted(batches))
    assert seen == dict.fromkeys(range(82), 50)


def test_memory_stays_flat_while_streaming(tmp_path: Path) -> None:
    """A share of 16 times the allowance: what is held is counted, by Arrow and by Python, for numpy
    and torch's tensors over it too. Neither depends on the allocators or on other processes.
    """
    n, length, allowance = 4096, 256, 1 << 19
    lists = pa.FixedSizeListArray.from_arrays(np.arange(n * length, dtype=np.int32), length)
    columns = {name: lists.cast(pa.list_(pa.int32())) for name in COLUMNS[1:]}
    rows = pa.table({"user_idx": np.arange(n), **columns})
    pq.write_table(rows, tmp_path / "0.parquet", row_group_size=128)  # 1/4 MB each
    del rows, lists, columns
    plan = plan_shards(TrainingSet("t", 1, ((f"file:{tmp_path}/0.parquet", n),)), 1)
    feed = Feed(plan, 0, COLUMNS, 64, 7, allowance=allowance)

    def held() -> int:
        return int(pa.total_allocated_bytes()) + tracemalloc.get_traced_memory()[0]

    list(feed.epoch(0))  # imports
    after, most = [], 0
    tracemalloc.start()
    try:
        for epoch in range(1, 7):
            gc.collect()
            begun = held()
            for _batch in feed.epoch(epoch):
                most = max(most, held() - begun)
            del _batch
            gc.collect()
            after.append(held())
            assert not [one for one in gc.get_objects() if type(one) is Batch]
    finally:
        tracemalloc.stop()
    assert most < n * length * 8 / 2  # a block and its copy, and what the reader has ahead
    # The first two epochs fill caches of Petastorm and pyarrow. A row group an epoch were 1 MB.
    assert after[-1] - after[1] < allowance / 8


def test_whole_files_are_held_back() -> None:
    files = tuple((f"file:/t/part-{n}.parquet", 10 * (n != 3)) for n in range(9))
    training = TrainingSet("t", 1, files)
    assert split_files(training, 0, 1) == (training, None)
    kept, held = split_files(training, 0.25, 1)
    assert held is not None
    assert (kept.n_rows, held.n_rows) == (60, 20)
    assert set(kept.files) | set(held.files) == {file for file in files if file[1]}
    _, least = split_files(training, 0.001, 1)
    assert least is not None
    assert least.n_rows == 10
    most, _ = split_files(training, 0.999, 1)
    assert most.n_rows == 10
    with pytest.raises(FeedError, match="1 files with rows are too few to hold one back"):
        split_files(TrainingSet("t", 1, files[:1]), 0.1, 1)


@pytest.mark.parametrize(("share", "held_back"), [(0.1, 2), (0.001, 2), (0.3, 6), (0.999, 18)])
def test_every_rank_holds_back_as_much(share: float, held_back: int) -> None:
    training = TrainingSet("t", 1, tuple((f"file:/t/part-{n:02d}.parquet", 50) for n in range(20)))
    kept, held = split_files(training, share, 2)
    assert held is not None
    assert len(held.files) == held_back
    for part in (kept, held):
        assert len({len(shard.files) for shard in plan_shards(part, 2).shards}) == 1
    few, one = split_files(replace(training, files=training.files[:5]), 0.1, 4)
    assert one is not None
    assert (len(few.files), len(one.files)) == (4, 1)
