"""Cells: the examples of one epoch by rotation, input block and output block, in files.

A file holds one (rotation, input block), its examples sorted by output block and in random order
below that: a header of int64 [row of each output block (n_blocks + 1), input of each (n_blocks +
1)], then targets int32, with CBOW the number of inputs of each int32, then inputs int32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark import TaskContext
from pyspark.sql import DataFrame
from pyspark.sql.types import BinaryType

from recspark import schema, storage
from recspark.data.blocks import Array
from recspark.engines.word2vec_examples import (
    WHOLE,
    Examples,
    Sentences,
    examples,
    take_ragged,
    unpack,
)

_MADE = schema.columns(cell=schema.INT, data=BinaryType())
_WRITTEN = schema.columns(cell=schema.INT, name=schema.STRING)
_ORDER = np.uint64((1 << 48) - 1)  # bits of a key that order a cell; those above pick the rotation


@dataclass(frozen=True)
class Layout:
    """Who lies where: `block` int32 and `local` int32 (its row in the block), both (n,)."""

    block: Array
    local: Array

    @cached_property
    def _sorted(self) -> tuple[Array, Array]:
        order = np.lexsort((self.local, self.block))
        return order, self.block[order]

    def members(self, block: int) -> Array:
        """Return who lies in `block`, int64, by row."""
        order, blocks = self._sorted
        return order[np.searchsorted(blocks, block) : np.searchsorted(blocks, block, side="right")]


@dataclass(frozen=True)
class Cell:
    """Examples of one cell: as `Examples`, in the order of learning."""

    targets: Array
    start: Array
    inputs: Array


def deal(weights: Array, n_blocks: int) -> Layout:
    """Return a layout whose blocks weigh nearly the same.

    Heaviest first (ties by index), dealt to the blocks there and back: a block's row 0 is heavy.

    >>> deal(np.array([5, 9, 1, 7]), 2).block.tolist()
    [1, 0, 0, 1]
    """
    order = np.argsort(-np.asarray(weights, np.float64), kind="stable")
    turn, place = np.divmod(np.arange(len(order)), n_blocks)
    block, local = np.empty(len(order), np.int32), np.empty(len(order), np.int32)
    block[order] = np.where(turn % 2 == 0, place, n_blocks - 1 - place)
    local[order] = turn
    return Layout(block, local)


def write_epoch(packed: DataFrame, shared: Any, epoch: int) -> list[tuple[str, ...]]:
    """Write the cells of `epoch`; return the files, by rotation and input block ("" = no example).

    One job, one shuffle. `shared` : broadcast of the `Plan`.
    """
    settings = shared.value.settings
    n_cells = settings.n_rotations * settings.n_blocks

    def make(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for sentences in unpack(batches):
            yield from split(shared.value, sentences, epoch)

    def write(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        context = TaskContext.get()
        yield from merge(shared.value, batches, epoch, context.taskAttemptId() if context else 0)

    rows = (
        packed.mapInArrow(make, _MADE)
        .repartition(n_cells, "cell")
        .mapInArrow(write, _WRITTEN)
        .toArrow()
    )
    return by_rotation(rows, settings)


def by_rotation(rows: pa.Table, settings: Any) -> list[tuple[str, ...]]:
    """Return the names of the rows (`cell, name`) by rotation and input block; "" where none is."""
    n = settings.n_blocks
    names = dict(zip(rows.column("cell").to_pylist(), rows.column("name").to_pylist(), strict=True))
    return [
        tuple(names.get(rotation * n + block, "") for block in range(n))
        for rotation in range(settings.n_rotations)
    ]


def split(plan: Any, sentences: Sentences, epoch: int) -> Iterator[pa.RecordBatch]:
    """Return the examples of `sentences` as `cell, data`, a row for each rotation and input block.

    An example goes to every input block that holds one of its inputs and every output block that
    holds its target, or a node of its path.
    """
    settings = plan.settings
    made = examples(
        sentences,
        plan.keep,
        window=WHOLE if settings.window is None else settings.window,
        shrink=settings.shrink_window and settings.window is not None,
        cbow=settings.architecture == "cbow",
        seed=settings.seed,
        epoch=epoch,
    )
    for part in made:
        rows, inputs = _input_blocks(plan, part)
        if plan.tree is None:
            outputs = plan.outputs.block[part.targets[rows]]
        else:
            rows, inputs, outputs = _path_blocks(plan, part, rows, inputs)
        keys = part.keys[rows]
        rotation = (keys >> np.uint64(48)) % np.uint64(settings.n_rotations)
        cell = rotation.astype(np.int64) * settings.n_blocks + inputs
        order = np.argsort(cell.astype(np.uint16), kind="stable")  # a radix sort
        ends = np.searchsorted(cell[order], np.arange(settings.n_rotations * settings.n_blocks + 1))
        keys = (keys & _ORDER) | (outputs.astype(np.uint64) << np.uint64(48))
        chosen = Examples(keys, part.targets[rows], *take_ragged(part.start, part.inputs, rows))
        chosen = chosen.take(order)
        ids = np.flatnonzero(np.diff(ends))
        data = [_to_bytes(chosen, ends[at], ends[at + 1]) for at in ids]
        yield pa.RecordBatch.from_arrays(
            [pa.array(ids, pa.int32()), pa.array(data, pa.binary())], names=_MADE.names
        )


def merge(
    plan: Any, batches: Iterable[pa.RecordBatch], epoch: int, attempt: int
) -> Iterator[pa.RecordBatch]:
    """Write one file for each cell id in `batches`; return `cell, name`."""
    parts: dict[int, list[Examples]] = {}
    for batch in batches:
        for cell, data in zip(batch.column("cell").to_pylist(), batch.column("data"), strict=True):
            parts.setdefault(cell, []).append(_from_bytes(data.as_buffer()))
    for cell in sorted(parts):
        content = cell_bytes(
            parts.pop(cell), plan.settings.n_blocks, ragged=plan.settings.architecture == "cbow"
        )
        name = storage.join(plan.folder, f"examples-{epoch}-{cell}-{attempt}.bin")
        storage.write_bytes(name, content)
        yield pa.RecordBatch.from_arrays(
            [pa.array([cell], pa.int32()), pa.array([name])], names=_WRITTEN.names
        )


def cell_bytes(parts: list[Examples], n_blocks: int, *, ragged: bool) -> bytes:
    """Return the content of a file: the examples of `parts` by key, whatever their order."""
    start = np.cumsum([0] + [len(part.inputs) for part in parts])
    whole = Examples(
        np.concatenate([part.keys for part in parts]),
        np.concatenate([part.targets for part in parts]),
        np.concatenate([[0]] + [part.start[1:] + at for part, at in zip(parts, start)]),
        np.concatenate([part.inputs for part in parts]),
    )
    order = np.argsort(whole.keys)
    keys = whole.keys[order]
    if (keys[1:] == keys[:-1]).any():  # two examples drew the same 48 bits
        first = whole.inputs[whole.start[:-1]]
        order = np.lexsort((first, whole.targets, whole.keys))
    whole = whole.take(order)
    rows = np.searchsorted(whole.keys >> np.uint64(48), np.arange(n_blocks + 1))
    header = np.concatenate([rows, whole.start[rows]]).astype(np.int64)
    lengths = np.diff(whole.start).astype(np.int32) if ragged else np.zeros(0, np.int32)
    return b"".join(part.tobytes() for part in (header, whole.targets, lengths, whole.inputs))


def read_cell(name: str, block: int, n_blocks: int, *, ragged: bool) -> Cell:
    """Return the examples of output block `block`; reads no others."""
    size = 16 * (n_blocks + 1)
    header = np.frombuffer(storage.read_bytes(name, 0, size), np.int64)
    rows, places = header[: n_blocks + 1], header[n_blocks + 1 :]
    n = int(rows[-1])

    def read(before: int, begin: int, end: int) -> Array:
        if begin == end:
            return np.zeros(0, np.int32)
        at = size + 4 * before
        data = storage.read_bytes(name, at + 4 * begin, at + 4 * end)
        return np.frombuffer(data, np.int32).copy()  # what comes from bytes is read-only

    begin, end = int(rows[block]), int(rows[block + 1])
    targets = read(0, begin, end)
    lengths = read(n, begin, end) if ragged else np.ones(end - begin, np.int32)
    inputs = read(2 * n if ragged else n, int(places[block]), int(places[block + 1]))
    start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Cell(targets, start, inputs)


def _input_blocks(plan: Any, part: Examples) -> tuple[Array, Array]:
    """Return (example, input block): each block that holds an input of the example, once."""
    blocks = plan.inputs.block[part.inputs].astype(np.int64)
    if len(part.inputs) == len(part.targets):  # one input each
        return np.arange(len(blocks)), blocks
    row = np.repeat(np.arange(len(part.targets)), np.diff(part.start))
    return np.divmod(np.unique(row * plan.settings.n_blocks + blocks), plan.settings.n_blocks)


def _path_blocks(
    plan: Any, part: Examples, rows: Array, inputs: Array
) -> tuple[Array, Array, Array]:
    """Return (example, input block, output block): each block with a node of the target's path."""
    n = plan.settings.n_blocks
    tree = plan.tree
    wanted, at = np.unique(part.targets, return_inverse=True)
    start, nodes = take_ragged(tree.start, tree.nodes, wanted)
    place = np.repeat(np.arange(len(wanted)), np.diff(start))
    pair = np.unique(place * n + plan.outputs.block[nodes])
    first = np.searchsorted(pair, np.arange(len(wanted) + 1) * n)
    target = at[rows]
    n_blocks = np.diff(first)[target]
    _, outputs = take_ragged(first, pair % n, target)
    return np.repeat(rows, n_blocks), np.repeat(inputs, n_blocks), outputs


def _to_bytes(part: Examples, begin: int, end: int) -> bytes:
    inputs = slice(int(part.start[begin]), int(part.start[end]))
    return b"".join(
        [
            np.array([end - begin, inputs.stop - inputs.start], np.int64).tobytes(),
            part.keys[begin:end].tobytes(),
            part.targets[begin:end].tobytes(),
            np.diff(part.start[begin : end + 1]).astype(np.int32).tobytes(),
            part.inputs[inputs].tobytes(),
        ]
    )


def _from_bytes(data: Any) -> Examples:
    n, m = (int(size) for size in np.frombuffer(data, np.int64, 2))
    lengths = np.frombuffer(data, np.int32, n, 16 + 12 * n)
    return Examples(
        np.frombuffer(data, np.uint64, n, 16),
        np.frombuffer(data, np.int32, n, 16 + 8 * n),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.frombuffer(data, np.int32, m, 16 + 16 * n),
    )
