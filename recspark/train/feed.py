"""Batches of one rank, read by Petastorm from the files that the driver planned for it.

The driver shares out the files of one pinned table version (`plan_shards`); every rank then takes
the same number of steps, and over an epoch every row counts exactly once. A batch always has the
same number of rows on every rank; where a rank has fewer, rows repeat at weight 0, and the loop
divides by the weight of all ranks together.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recspark import storage
from recspark.data.blocks import Array
from recspark.data.dataset import TrainingSet
from recspark.errors import FeedError

# A rank's share is kept in memory up to this; beyond it every epoch reads it anew. Guess: half of
# what an executor of 4 GB leaves to Python.
ALLOWANCE = 1 << 30
Columns = dict[str, Array]
Block = tuple[Columns, Array]  # rows, and the order to take them in
ReaderName = Literal["petastorm", "arrow"]


@dataclass(frozen=True)
class Shard:
    """What one rank reads: (URI, rows) of each file, none of them empty.

    `counted` False: the rank has none of its own and borrows one, whose rows count elsewhere.
    """

    files: tuple[tuple[str, int], ...]
    counted: bool = True

    @property
    def stored(self) -> int:
        """Rows in the files."""
        return sum(rows for _, rows in self.files)

    @property
    def n_rows(self) -> int:
        """Rows that count on this rank."""
        return self.stored if self.counted else 0


@dataclass(frozen=True)
class ShardPlan:
    """The shard of each rank, fixed on the driver before launch."""

    shards: tuple[Shard, ...]

    @property
    def ranks(self) -> int:
        return len(self.shards)

    @property
    def n_rows(self) -> int:
        """Rows that count in one epoch, over all ranks."""
        return sum(shard.n_rows for shard in self.shards)

    def steps(self, batch_size: int) -> int:
        """Return the steps of an epoch, equal on every rank: ceil(largest share / rank's batch).

        `batch_size` is that of all ranks together.
        """
        largest = max(shard.n_rows for shard in self.shards)
        return math.ceil(largest / math.ceil(batch_size / self.ranks))


@dataclass(frozen=True)
class Batch:
    """One step of one rank: `tensors` by column, (B, ...) each; `weight` float32 (B,), 0 or 1."""

    tensors: dict[str, torch.Tensor]
    weight: torch.Tensor


def split_files(
    training: TrainingSet, share: float, ranks: int
) -> tuple[TrainingSet, TrainingSet | None]:
    """Return `training` without its last files, and those files: about `share` of the rows.

    Files hold rows by their hash, so a whole file is a sample. Every rank gets as many of them, one
    at least where `share` is above 0, and one to train on; with too few files for that, some file
    is held out and some stays. Raises FeedError where there is a single file.
    """
    if share == 0:
        return training, None
    files = [(uri, rows) for uri, rows in training.files if rows > 0]
    if len(files) < 2:
        raise FeedError(
            f"table '{training.table}' version {training.version}: {len(files)} files with rows are "
            "too few to hold one back for validation; set validation to 0"
        )
    if len(files) >= 2 * ranks:
        held = ranks * min(max(1, round(share * len(files) / ranks)), len(files) // ranks - 1)
    else:
        held = min(max(1, round(share * len(files))), len(files) - 1)
    return (
        replace(training, files=tuple(files[:-held])),
        replace(training, files=tuple(files[-held:])),
    )


def plan_shards(training: TrainingSet, ranks: int) -> ShardPlan:
    """Return disjoint shares of the files of `training`, balanced by rows.

    The largest file goes to the rank with the fewest rows, then the next largest; ties by URI and
    rank. A rank for which no file is left borrows the smallest one at weight 0. Raises FeedError
    where there is nothing to read, or where the shares do not add up to the table.
    """
    files = [(uri, rows) for uri, rows in training.files if rows > 0]
    if not files:
        raise FeedError(
            f"table '{training.table}' version {training.version} has no rows to train on; "
            "run build_features for this cutoff"
        )
    shares: list[list[tuple[str, int]]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for uri, rows in sorted(files, key=lambda file: (-file[1], file[0])):
        rank = load.index(min(load))
        shares[rank].append((uri, rows))
        load[rank] += rows
    smallest = min(files, key=lambda file: (file[1], file[0]))
    plan = ShardPlan(
        tuple(
            Shard(tuple(sorted(share))) if share else Shard((smallest,), counted=False)
            for share in shares
        )
    )
    planned = [uri for shard in plan.shards if shard.counted for uri, _ in shard.files]
    if plan.n_rows != training.n_rows or len(set(planned)) != len(planned):
        raise FeedError(
            f"table '{training.table}' version {training.version}: {training.n_rows} rows, but "
            f"{plan.n_rows} planned for {ranks} ranks"
        )
    return plan


class Feed:
    """The batches of one rank.

    Parameters
    ----------
    plan, rank : whose shard to read
    columns : scalar or fixed-length list columns of numbers; types stay as stored
    batch_size : rows of a step over all ranks; a rank takes ceil(batch_size / ranks) at most
    seed : with epoch and rank it sets the order of rows
    reader : `petastorm`, or `arrow`, its twin
    allowance : bytes; a larger share is not kept, but read anew each epoch, so much of it at a time

    An epoch spreads a rank's rows evenly over its steps, so that no step is left with a few. The
    rows read are counted against the plan: FeedError where they differ.
    """

    def __init__(
        self,
        plan: ShardPlan,
        rank: int,
        columns: Sequence[str],
        batch_size: int,
        seed: int,
        *,
        reader: ReaderName = "petastorm",
        allowance: int = ALLOWANCE,
    ) -> None:
        self.shard = plan.shards[rank]
        self.steps = plan.steps(batch_size)
        self.n_rows_of_all = plan.n_rows
        self.rows_per_step = math.ceil(max(s.n_rows for s in plan.shards) / self.steps)
        self._rank = rank
        self._columns = tuple(columns)
        self._seed = seed
        self._reader = READERS[reader]
        self._allowance = allowance
        self._kept: Columns | None = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the `steps` batches of an epoch, in the order of (seed, epoch, rank).

        The first `start` are left out: the rest is what an uninterrupted epoch would give. A share
        that is streamed is read for them all the same.
        """
        rng = np.random.default_rng([self._seed, epoch, self._rank])
        blocks = self._kept_block(rng) if self._fits() else self._streamed_blocks(rng)
        n, steps = self.shard.n_rows, self.steps
        shares = [(step + 1) * n // steps - step * n // steps for step in range(steps)]
        for own, spare in itertools.islice(_cut(blocks, shares), start, None):
            n_own = _n_rows(own)
            source = own if n_own else spare
            at = np.arange(self.rows_per_step) % _n_rows(source)
            yield Batch(
                {name: torch.from_numpy(values[at]) for name, values in source.items()},
                torch.from_numpy((np.arange(self.rows_per_step) < n_own).astype(np.float32)),
            )

    def _fits(self) -> bool:
        if self._kept is not None:
            return True
        row_bytes = _row_bytes(self.shard.files[0][0], self._columns)
        return row_bytes * self.shard.stored <= self._allowance

    def _kept_block(self, rng: np.random.Generator) -> Iterator[Block]:
        """Yield the whole share as one block, read at the first call."""
        if self._kept is None:
            self._kept = _concat(list(self._read(None)))
        yield self._kept, rng.permutation(self.shard.stored)

    def _streamed_blocks(self, rng: np.random.Generator) -> Iterator[Block]:
        """Yield blocks of about `allowance` bytes: row groups in a new order, their rows mixed."""
        held: list[Columns] = []
        # 0 would mean "no seed" to Petastorm.
        for group in self._read(int(rng.integers(1, 1 << 31))):
            held.append(group)
            if sum(values.nbytes for part in held for values in part.values()) >= self._allowance:
                block = _concat(held)
                held = []
                yield block, rng.permutation(_n_rows(block))
        if held:
            block = _concat(held)
            yield block, rng.permutation(_n_rows(block))

    def _read(self, seed: int | None) -> Iterator[Columns]:
        """Yield the shard's row groups and count their rows."""
        n = 0
        for group in self._reader([uri for uri, _ in self.shard.files], self._columns, seed):
            n += _n_rows(group)
            yield group
        if n != self.shard.stored:
            raise FeedError(
                f"rank {self._rank} read {n} rows, planned were {self.shard.stored} from "
                f"{len(self.shard.files)} files; the first is {self.shard.files[0][0]}"
            )


def read_petastorm(uris: list[str], columns: Sequence[str], seed: int | None) -> Iterator[Columns]:
    """Yield the columns of each row group, by URI and position, or as `seed` (>= 1) orders them."""
    from petastorm import make_batch_reader

    # Petastorm 0.12 calls pyarrow's old dataset interface, which says so at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"petastorm\.")
    # One worker: row groups come in the order they were asked for, the next while this one is used.
    with make_batch_reader(
        [_with_scheme(uri) for uri in uris],
        schema_fields=[f"^{name}$" for name in columns],
        workers_count=1,
        results_queue_size=1,
        shuffle_row_groups=seed is not None,
        seed=seed,
        num_epochs=1,
        filesystem=None if storage.is_local(uris[0]) else _old_filesystem(uris[0]),
    ) as reader:
        try:
            for group in reader:
                yield {name: np.asarray(getattr(group, name)) for name in columns}
        except RuntimeError as error:  # lists of unequal length
            raise FeedError(f"{uris[0]} and {len(uris) - 1} more files: {error}") from error


def read_arrow(uris: list[str], columns: Sequence[str], seed: int | None) -> Iterator[Columns]:
    """Do as `read_petastorm` with pyarrow alone: its twin in tests, and the way out."""
    fs, _ = fsspec.core.url_to_fs(uris[0])
    paths = [fsspec.core.url_to_fs(uri)[1] for uri in sorted(uris)]
    groups = [
        (path, group)
        for path in paths
        for group in range(pq.read_metadata(path, filesystem=fs).num_row_groups)
    ]
    if seed is not None:
        np.random.default_rng(seed).shuffle(groups)
    for path, group in groups:
        with pq.ParquetFile(path, filesystem=fs) as file:
            table = file.read_row_group(int(group), columns=list(columns))
        if table.num_rows:
            yield {name: _array(path, name, table.column(name)) for name in columns}


READERS: dict[ReaderName, Callable[[list[str], Sequence[str], int | None], Iterator[Columns]]] = {
    "petastorm": read_petastorm,
    "arrow": read_arrow,
}


def _old_filesystem(uri: str) -> Any:
    """Return the store of `uri` behind pyarrow's old interface, as Petastorm needs it."""
    from pyarrow.filesystem import DaskFileSystem

    class Store(DaskFileSystem):  # type: ignore[misc]
        def isdir(self, path: str) -> bool:
            return bool(self.fs.isdir(path))

        def isfile(self, path: str) -> bool:
            return bool(self.fs.isfile(path))

    warnings.filterwarnings("ignore", category=FutureWarning, message="The pyarrow.filesystem")
    return Store(fsspec.core.url_to_fs(uri)[0])


def _array(path: str, name: str, column: pa.ChunkedArray) -> Array:
    """Return a column as (n,), or (n, length) where it holds lists."""
    values = column.combine_chunks()
    if not pa.types.is_list(values.type):
        out: Array = values.to_numpy(zero_copy_only=False)
        return out
    lengths = np.unique(values.value_lengths().to_numpy(zero_copy_only=False))
    if len(lengths) != 1:
        raise FeedError(
            f"{path}: lists of column '{name}' have lengths {lengths.tolist()}, not one"
        )
    flat: Array = values.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(values), -1)


def _row_bytes(uri: str, columns: Sequence[str]) -> float:
    """Return the bytes that one row takes in memory. Raises FeedError where a column is missing."""
    fs, path = fsspec.core.url_to_fs(uri)
    with pq.ParquetFile(path, filesystem=fs) as file:
        names = file.schema_arrow.names
        missing = [name for name in columns if name not in names]
        if missing:
            raise FeedError(
                f"{uri}: no columns {missing}, there are {names} (files lack partition columns)"
            )
        first = next(file.iter_batches(batch_size=64, columns=list(columns)))
    return float(first.nbytes) / first.num_rows


def _cut(blocks: Iterator[Block], sizes: Sequence[int]) -> Iterator[tuple[Columns, Columns]]:
    """Yield (`size` rows, one spare row) for each size, taking the blocks' rows in their order.

    The blocks are read to their end, so that their rows are counted.
    """
    columns, order = next(blocks)
    spare = _take(columns, order[:1])
    for size in sizes:
        parts = [_take(columns, order[:size])]
        left, order = size - len(order[:size]), order[size:]
        while left:
            columns, order = next(blocks)
            parts.append(_take(columns, order[:left]))
            left, order = left - len(order[:left]), order[left:]
        yield _concat(parts), spare
    for _ in blocks:
        pass


def _take(columns: Columns, at: Array) -> Columns:
    return {name: values[at] for name, values in columns.items()}


def _concat(parts: list[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _n_rows(columns: Columns) -> int:
    return len(next(iter(columns.values())))


def _with_scheme(uri: str) -> str:
    return uri if ":" in uri.split("/", maxsplit=1)[0] else f"file://{uri}"
