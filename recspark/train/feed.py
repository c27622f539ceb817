"""Batches of one rank, read by Petastorm from the files that the driver planned for that rank.

The driver divides the files of one pinned table version between the ranks (`plan_shards`). Every
rank then takes the same number of steps, and over an epoch every row counts exactly once. All
batches have the same number of rows, on all ranks. Where a rank has fewer rows for a step, it fills
up its batch with repeated rows at weight 0; the loop divides by the sum of the weights of all
ranks.
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

# Bytes. A rank whose share of the rows is no larger keeps it in memory; a rank with a larger share
# reads it again in every epoch. This is a guess: half of what a 4 GB executor leaves to Python.
ALLOWANCE = 1 << 30
Columns = dict[str, Array]
Block = tuple[Columns, Array]  # rows, and their positions in the order in which to take them
ReaderName = Literal["petastorm", "arrow"]


@dataclass(frozen=True)
class Shard:
    """The files that one rank reads: (URI, number of rows) of each; no file is empty.

    `counted` is False where there was no file for this rank. It then borrows the file of another
    rank, and the rows count only on that other rank.
    """

    files: tuple[tuple[str, int], ...]
    counted: bool = True

    @property
    def n_stored_rows(self) -> int:
        """Number of rows in the files."""
        return sum(rows for _, rows in self.files)

    @property
    def n_rows(self) -> int:
        """Number of rows that count on this rank."""
        return self.n_stored_rows if self.counted else 0


@dataclass(frozen=True)
class ShardPlan:
    """The shard of each rank, fixed on the driver before launch."""

    shards: tuple[Shard, ...]

    @property
    def ranks(self) -> int:
        return len(self.shards)

    @property
    def n_rows(self) -> int:
        """Number of rows that count in one epoch, over all ranks."""
        return sum(shard.n_rows for shard in self.shards)

    def steps(self, batch_size: int) -> int:
        """Return the number of steps of an epoch, which is equal on every rank.

        It is ceil(rows of the largest shard / rows of a rank's batch). `batch_size` is the number
        of rows of a step over all ranks: 100 rows on the largest of 2 shards take 7 steps at
        `batch_size` 32, because ceil(100 / 16) = 7.
        """
        largest = max(shard.n_rows for shard in self.shards)
        return math.ceil(largest / math.ceil(batch_size / self.ranks))


@dataclass(frozen=True)
class Batch:
    """A step's rows on one rank: `tensors` by column, (B, ...); `weight` float32 (B,), 0 or 1."""

    tensors: dict[str, torch.Tensor]
    weight: torch.Tensor


def split_files(
    training: TrainingSet, share: float, ranks: int
) -> tuple[TrainingSet, TrainingSet | None]:
    """Split `training` into (files to train on, files to validate on).

    The second are the last files, with about `share` of the rows; None where `share` is 0. Rows are
    spread over files by a hash, so each file is a random sample of the rows.

    Every rank gets an equal number of validation files, at least one, and at least one file to
    train on. Where there are fewer than two files per rank, at least one file is held out and at
    least one is left to train on. Raises FeedError where fewer than two files have rows.
    """
    if share == 0:
        return training, None
    files = [(uri, rows) for uri, rows in training.files if rows > 0]
    if len(files) < 2:
        raise FeedError(
            f"table '{training.table}' version {training.version}: {len(files)} files with rows "
            "are too few to hold one back for validation; set validation to 0"
        )
    if len(files) >= 2 * ranks:
        n_held_out = ranks * min(max(1, round(share * len(files) / ranks)), len(files) // ranks - 1)
    else:
        n_held_out = min(max(1, round(share * len(files))), len(files) - 1)
    return (
        replace(training, files=tuple(files[:-n_held_out])),
        replace(training, files=tuple(files[-n_held_out:])),
    )


def plan_shards(training: TrainingSet, ranks: int) -> ShardPlan:
    """Divide the files of `training` between ranks, so that the numbers of rows are about equal.

    Files are dealt out from the largest to the smallest; each goes to the rank with the fewest rows
    so far. Of files of equal size the one with the smaller URI comes first, and of ranks with
    equally many rows the lower one is taken. A rank that gets no file borrows the smallest file at
    weight 0.

    Example: files of 5, 4, 3 and 2 rows for 2 ranks are dealt as (5, 2) and (4, 3).

    Raises FeedError where there is nothing to read, or where the shards do not add up to the table.
    """
    files = [(uri, rows) for uri, rows in training.files if rows > 0]
    if not files:
        raise FeedError(
            f"table '{training.table}' version {training.version} has no rows to train on; "
            "run build_features for this cutoff"
        )
    shares: list[list[tuple[str, int]]] = [[] for _ in range(ranks)]
    rows_by_rank = [0] * ranks
    for uri, rows in sorted(files, key=lambda file: (-file[1], file[0])):
        rank = rows_by_rank.index(min(rows_by_rank))
        shares[rank].append((uri, rows))
        rows_by_rank[rank] += rows
    smallest = min(files, key=lambda file: (file[1], file[0]))
    plan = ShardPlan(
        tuple(
            Shard(tuple(sorted(share))) if share else Shard((smallest,), counted=False)
            for share in shares
        )
    )
    planned_uris = [uri for shard in plan.shards if shard.counted for uri, _ in shard.files]
    if plan.n_rows != training.n_rows or len(set(planned_uris)) != len(planned_uris):
        raise FeedError(
            f"table '{training.table}' version {training.version}: {training.n_rows} rows, but "
            f"{plan.n_rows} planned for {ranks} ranks"
        )
    return plan


class Feed:
    """The batches of one rank.

    Parameters
    ----------
    plan, rank : the rank's shard of the plan is read
    columns : columns of numbers, or of lists of numbers that all have one length; types stay as
        stored
    batch_size : rows of a step over all ranks; a rank takes at most ceil(batch_size / ranks) of
        them
    seed : determines the order of the rows, together with the epoch and the rank
    reader : `petastorm`, or `arrow`, which reads the same with pyarrow alone
    allowance : bytes. A share of at most this size is kept in memory; a larger one is read again in
        every epoch, in blocks of about this size

    An epoch spreads the rows of a rank evenly over its steps, so that there is no small last step.
    FeedError is raised where the number of rows read differs from the plan.
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
        self._share_in_memory: Columns | None = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, `steps` in all, in an order that (seed, epoch, rank) sets.

        The first `start` batches are left out; the others are those that an uninterrupted epoch
        would give. A share that does not fit in memory is read from its beginning even then.

        Example: 10 rows in 4 steps make steps of 2, 3, 2 and 3 rows. With `rows_per_step` 3, a step
        of the rows [a, b] yields the batch [a, b, a] with the weights [1, 1, 0]. A step without
        rows of its own repeats one spare row at weight 0.
        """
        rng = np.random.default_rng([self._seed, epoch, self._rank])
        blocks = (
            self._block_in_memory(rng) if self._fits_in_memory() else self._streamed_blocks(rng)
        )
        n_rows, steps = self.shard.n_rows, self.steps
        step_sizes = [
            (step + 1) * n_rows // steps - step * n_rows // steps for step in range(steps)
        ]
        for step_rows, spare_row in itertools.islice(
            _cut_into_steps(blocks, step_sizes), start, None
        ):
            n_counted = _n_rows(step_rows)
            source_rows = step_rows if n_counted else spare_row
            positions = np.arange(self.rows_per_step) % _n_rows(source_rows)
            yield Batch(
                {name: torch.from_numpy(values[positions]) for name, values in source_rows.items()},
                torch.from_numpy((np.arange(self.rows_per_step) < n_counted).astype(np.float32)),
            )

    def _fits_in_memory(self) -> bool:
        if self._share_in_memory is not None:
            return True
        row_bytes = _row_bytes(self.shard.files[0][0], self._columns)
        return row_bytes * self.shard.n_stored_rows <= self._allowance

    def _block_in_memory(self, rng: np.random.Generator) -> Iterator[Block]:
        """Yield all rows of the shard as one block. The first call reads them and keeps them."""
        if self._share_in_memory is None:
            self._share_in_memory = _concat(list(self._read(None)))
        yield self._share_in_memory, rng.permutation(self.shard.n_stored_rows)

    def _streamed_blocks(self, rng: np.random.Generator) -> Iterator[Block]:
        """Yield blocks of at least `allowance` bytes (the last may be smaller).

        Each block holds several row groups, which are read in a random order. The rows of a block
        are shuffled.
        """
        groups: list[Columns] = []
        # From 1, as Petastorm takes 0 for "no seed".
        for group in self._read(int(rng.integers(1, 1 << 31))):
            groups.append(group)
            if sum(values.nbytes for g in groups for values in g.values()) >= self._allowance:
                block = _concat(groups)
                groups = []
                yield block, rng.permutation(_n_rows(block))
        if groups:
            block = _concat(groups)
            yield block, rng.permutation(_n_rows(block))

    def _read(self, seed: int | None) -> Iterator[Columns]:
        """Yield the shard's row groups; at their end, FeedError where the rows do not add up."""
        n_read = 0
        for group in self._reader([uri for uri, _ in self.shard.files], self._columns, seed):
            n_read += _n_rows(group)
            yield group
        if n_read != self.shard.n_stored_rows:
            raise FeedError(
                f"rank {self._rank} read {n_read} rows, planned were {self.shard.n_stored_rows} "
                f"from {len(self.shard.files)} files; the first is {self.shard.files[0][0]}"
            )


def read_petastorm(uris: list[str], columns: Sequence[str], seed: int | None) -> Iterator[Columns]:
    """Yield the columns of each row group.

    Without a seed the groups come sorted by URI, and within a file in the order of the file. A seed
    (>= 1) shuffles them.
    """
    from petastorm import make_batch_reader

    # Petastorm 0.12 calls an old dataset interface of pyarrow, which warns at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"petastorm\.")
    # With one worker the row groups come in order, and the next one is read while this one is used.
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
    """Yield what `read_petastorm` yields, but with pyarrow alone.

    Tests compare the two. This reader is also the fallback where Petastorm does not work.
    """
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
            yield {name: _column_array(path, name, table.column(name)) for name in columns}


READERS: dict[ReaderName, Callable[[list[str], Sequence[str], int | None], Iterator[Columns]]] = {
    "petastorm": read_petastorm,
    "arrow": read_arrow,
}


def _old_filesystem(uri: str) -> Any:
    """Return the file system of `uri` with pyarrow's old interface, which Petastorm calls."""
    from pyarrow.filesystem import DaskFileSystem

    class Store(DaskFileSystem):  # type: ignore[misc]
        def isdir(self, path: str) -> bool:
            return bool(self.fs.isdir(path))

        def isfile(self, path: str) -> bool:
            return bool(self.fs.isfile(path))

    warnings.filterwarnings("ignore", category=FutureWarning, message="The pyarrow.filesystem")
    return Store(fsspec.core.url_to_fs(uri)[0])


def _column_array(path: str, name: str, column: pa.ChunkedArray) -> Array:
    """Return a column as (n,), or as (n, length) where it holds lists, all of one length."""
    values = column.combine_chunks()
    if not pa.types.is_list(values.type):
        scalars: Array = values.to_numpy(zero_copy_only=False)
        return scalars
    lengths = np.unique(values.value_lengths().to_numpy(zero_copy_only=False))
    if len(lengths) != 1:
        raise FeedError(
            f"{path}: lists of column '{name}' have lengths {lengths.tolist()}, not one"
        )
    flat: Array = values.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(values), -1)


def _row_bytes(uri: str, columns: Sequence[str]) -> float:
    """Estimate the bytes per row in memory, by the first rows; FeedError for missing columns."""
    fs, path = fsspec.core.url_to_fs(uri)
    with pq.ParquetFile(path, filesystem=fs) as file:
        names = file.schema_arrow.names
        missing = [name for name in columns if name not in names]
        if missing:
            raise FeedError(
                f"{uri}: no columns {missing}, there are {names} (files lack partition columns)"
            )
        first_rows = next(file.iter_batches(batch_size=64, columns=list(columns)))
    return float(first_rows.nbytes) / first_rows.num_rows


def _cut_into_steps(
    blocks: Iterator[Block], sizes: Sequence[int]
) -> Iterator[tuple[Columns, Columns]]:
    """Yield (rows of the step, one spare row) for each of `sizes`, which are numbers of rows.

    The steps take the rows of the blocks one after the other; a step may take rows of several
    blocks. Example: blocks of 5 and 4 rows and the sizes 3 and 4 give rows 0-2 of the first block,
    then rows 3-4 of the first block joined with rows 0-1 of the second one.

    All blocks are read to their end, so that the reader counts all their rows.
    """
    columns, order = next(blocks)
    spare_row = _take(columns, order[:1])
    for size in sizes:
        parts = [_take(columns, order[:size])]
        n_missing, order = size - len(order[:size]), order[size:]
        while n_missing:
            columns, order = next(blocks)
            parts.append(_take(columns, order[:n_missing]))
            n_missing, order = n_missing - len(order[:n_missing]), order[n_missing:]
        yield _concat(parts), spare_row
    for _ in blocks:
        pass


def _take(columns: Columns, positions: Array) -> Columns:
    return {name: values[positions] for name, values in columns.items()}


def _concat(pieces: list[Columns]) -> Columns:
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _n_rows(columns: Columns) -> int:
    return len(next(iter(columns.values())))


def _with_scheme(uri: str) -> str:
    return uri if ":" in uri.split("/", maxsplit=1)[0] else f"file://{uri}"
