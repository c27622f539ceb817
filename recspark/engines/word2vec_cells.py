"""The examples of one epoch in files, one per cell. A cell is a rotation and an input block.

Within a file, examples are sorted by output block, and are in random order within an output block.
So a worker reads the examples of one output block as one range of the file. Content of a file:

1. header, int64: the first example of each output block (n_blocks + 1), then the first input of
   each output block (n_blocks + 1);
2. the target of each example, int32;
3. with CBOW, the number of inputs of each example, int32;
4. the inputs of all examples, int32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from pyspark import RDD, TaskContext

from recspark import storage
from recspark.data.blocks import Array
from recspark.engines.word2vec_examples import (
    WHOLE,
    Examples,
    Sentences,
    examples,
    take_ragged,
    unpack,
)

# The lower 48 bits of a key order the examples of a cell; the upper 16 decide the rotation.
_ORDER_BITS = np.uint64((1 << 48) - 1)


@dataclass(frozen=True)
class Layout:
    """Where each member (an item or an inner node) is: its block, and its row in the block.

    `block` int32 (n,) and `local` int32 (n,), the row.
    """

    block: Array
    local: Array

    @cached_property
    def _sorted(self) -> tuple[Array, Array]:
        order = np.lexsort((self.local, self.block))
        return order, self.block[order]

    def members(self, block: int) -> Array:
        """Return the members of `block`, int64, in the order of their rows."""
        order, blocks = self._sorted
        return order[np.searchsorted(blocks, block) : np.searchsorted(blocks, block, side="right")]


@dataclass(frozen=True)
class Cell:
    """The examples of one input block and one output block, as in `Examples`, in training order."""

    targets: Array
    start: Array
    inputs: Array


def deal(weights: Array, n_blocks: int) -> Layout:
    """Return a layout whose blocks have nearly the same total weight.

    Members are dealt to the blocks from the heaviest to the lightest (of equal weights, by index),
    in alternating direction: to blocks 0, 1, 2, then to 2, 1, 0, and so on. Row 0 of each block is
    heavy.

    >>> deal(np.array([5, 9, 1, 7]), 2).block.tolist()
    [1, 0, 0, 1]
    """
    order = np.argsort(-np.asarray(weights, np.float64), kind="stable")
    round_number, turn_in_round = np.divmod(np.arange(len(order)), n_blocks)
    block, local = np.empty(len(order), np.int32), np.empty(len(order), np.int32)
    block[order] = np.where(round_number % 2 == 0, turn_in_round, n_blocks - 1 - turn_in_round)
    local[order] = round_number
    return Layout(block, local)


def write_epoch(packed: RDD[Any], shared: Any, epoch: int) -> list[tuple[str, ...]]:
    """Write the examples of `epoch`; return the files by rotation and input block, "" = no example.

    One job, one shuffle. This is an RDD because each cell must have a partition of its own, and
    because planning a new DataFrame for each epoch took longer than making the examples of a small
    epoch.

    Parameters
    ----------
    packed : rows of `PACKED`
    shared : broadcast of the `Plan`
    """
    settings = shared.value.settings

    def split_rows(rows: Iterable[Any]) -> Iterator[tuple[int, bytes]]:
        for row in rows:
            yield from split(shared.value, unpack(*row), epoch)

    def write_cell(cell: int, rows: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, str]]:
        context = TaskContext.get()
        attempt = context.taskAttemptId() if context else 0
        contents = [data for _, data in rows]
        if contents:
            yield cell, merge(shared.value, cell, contents, epoch, attempt)

    parts_by_cell = packed.mapPartitions(split_rows).partitionBy(
        settings.n_rotations * settings.n_blocks, int
    )
    return by_rotation(parts_by_cell.mapPartitionsWithIndex(write_cell).collect(), settings)


def by_rotation(written: list[tuple[int, str]], settings: Any) -> list[tuple[str, ...]]:
    """Return the names of `written`, by rotation and input block; "" where there is no file.

    `written` has pairs of (cell, name). Cell c is rotation c // n_blocks and input block c %
    n_blocks.
    """
    n_blocks, name_by_cell = settings.n_blocks, dict(written)
    return [
        tuple(name_by_cell.get(rotation * n_blocks + block, "") for block in range(n_blocks))
        for rotation in range(settings.n_rotations)
    ]


def split(plan: Any, sentences: Sentences, epoch: int) -> Iterator[tuple[int, bytes]]:
    """Yield the examples of `sentences` as (cell, bytes). A cell is a rotation and an input block.

    An example is in every input block that holds one of its inputs, and in every output block that
    holds its target or, for hierarchical softmax, a node of the target's path. So one example can
    give several rows: `rows` has the example of each, `input_blocks` and `output_blocks` its
    blocks.
    """
    settings = plan.settings
    chunks = examples(
        sentences,
        plan.keep,
        window=WHOLE if settings.window is None else settings.window,
        shrink=settings.shrink_window and settings.window is not None,
        cbow=settings.architecture == "cbow",
        seed=settings.seed,
        epoch=epoch,
        within_bag=settings.within_bag,
        metadata=plan.metadata,
    )
    for chunk in chunks:
        rows, input_blocks = _input_blocks(plan, chunk)
        if plan.tree is None:
            output_blocks = plan.outputs.block[chunk.targets[rows]]
        else:
            rows, input_blocks, output_blocks = _path_blocks(plan, chunk, rows, input_blocks)
        keys = chunk.keys[rows]
        rotation = (keys >> np.uint64(48)) % np.uint64(settings.n_rotations)
        cell_of_row = rotation.astype(np.int64) * settings.n_blocks + input_blocks
        # As uint16, numpy sorts with a radix sort.
        order = np.argsort(cell_of_row.astype(np.uint16), kind="stable")
        cell_start = np.searchsorted(
            cell_of_row[order], np.arange(settings.n_rotations * settings.n_blocks + 1)
        )
        # From here on, keys order the rows of a cell: by output block, then at random.
        keys = (keys & _ORDER_BITS) | (output_blocks.astype(np.uint64) << np.uint64(48))
        rows_by_cell = Examples(
            keys, chunk.targets[rows], *take_ragged(chunk.start, chunk.inputs, rows)
        )
        rows_by_cell = rows_by_cell.take(order)
        for cell in np.flatnonzero(np.diff(cell_start)):
            yield int(cell), _to_bytes(rows_by_cell, cell_start[cell], cell_start[cell + 1])


def merge(plan: Any, cell: int, parts: list[bytes], epoch: int, attempt: int) -> str:
    """Write the file of `cell` from the `parts` that `split` made, in any order; return
    its name.
    """
    settings = plan.settings
    content = cell_bytes(
        [_from_bytes(data) for data in parts],
        settings.n_blocks,
        ragged=settings.architecture == "cbow",
    )
    name = storage.join(plan.folder, f"examples-{epoch}-{cell}-{attempt}.bin")
    storage.write_bytes(name, content)
    return name


def cell_bytes(parts: list[Examples], n_blocks: int, *, ragged: bool) -> bytes:
    """Return the content of a file: the examples of `parts`, sorted by key."""
    part_start = np.cumsum([0] + [len(part.inputs) for part in parts])
    merged = Examples(
        np.concatenate([part.keys for part in parts]),
        np.concatenate([part.targets for part in parts]),
        np.concatenate(
            [[0]] + [part.start[1:] + offset for part, offset in zip(parts, part_start)]
        ),
        np.concatenate([part.inputs for part in parts]),
    )
    order = np.argsort(merged.keys)
    keys = merged.keys[order]
    # If two examples drew the same 48 bits, sort by target and input too: the order of `parts` must
    # not matter.
    if (keys[1:] == keys[:-1]).any():
        first_inputs = merged.inputs[merged.start[:-1]]
        order = np.lexsort((first_inputs, merged.targets, merged.keys))
    merged = merged.take(order)
    first_examples = np.searchsorted(merged.keys >> np.uint64(48), np.arange(n_blocks + 1))
    header = np.concatenate([first_examples, merged.start[first_examples]]).astype(np.int64)
    lengths = np.diff(merged.start).astype(np.int32) if ragged else np.zeros(0, np.int32)
    return b"".join(part.tobytes() for part in (header, merged.targets, lengths, merged.inputs))


def read_cell(name: str, block: int, n_blocks: int, *, ragged: bool) -> Cell:
    """Return the examples of output block `block` from the file `name`; reads no others."""
    header_bytes = 16 * (n_blocks + 1)
    header = np.frombuffer(storage.read_bytes(name, 0, header_bytes), np.int64)
    first_examples, first_inputs = header[: n_blocks + 1], header[n_blocks + 1 :]
    n_examples = int(first_examples[-1])

    # Reads `begin` to `end` of an int32 array that has `n_before` values between it and the header.
    def read_range(n_before: int, begin: int, end: int) -> Array:
        if begin == end:
            return np.zeros(0, np.int32)
        begin_byte = header_bytes + 4 * n_before
        data = storage.read_bytes(name, begin_byte + 4 * begin, begin_byte + 4 * end)
        return np.frombuffer(data, np.int32).copy()  # arrays from bytes are read-only

    begin, end = int(first_examples[block]), int(first_examples[block + 1])
    targets = read_range(0, begin, end)
    lengths = read_range(n_examples, begin, end) if ragged else np.ones(end - begin, np.int32)
    inputs = read_range(
        2 * n_examples if ragged else n_examples,
        int(first_inputs[block]),
        int(first_inputs[block + 1]),
    )
    start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Cell(targets, start, inputs)


def _input_blocks(plan: Any, chunk: Examples) -> tuple[Array, Array]:
    """Return (example, input block): for each example, every block that holds an input, once."""
    blocks = plan.inputs.block[chunk.inputs].astype(np.int64)
    if len(chunk.inputs) == len(chunk.targets):  # one input per example
        return np.arange(len(blocks)), blocks
    example = np.repeat(np.arange(len(chunk.targets)), np.diff(chunk.start))
    return np.divmod(np.unique(example * plan.settings.n_blocks + blocks), plan.settings.n_blocks)


def _path_blocks(
    plan: Any, chunk: Examples, rows: Array, input_blocks: Array
) -> tuple[Array, Array, Array]:
    """Return (example, input block, output block): each row once per block of its target's path.

    `rows` and `input_blocks` are the examples and blocks from `_input_blocks`. A row whose target's
    path has nodes in output blocks 0 and 2 becomes two rows, one for each of these blocks.
    """
    n_blocks = plan.settings.n_blocks
    tree = plan.tree
    distinct_targets, target_index = np.unique(chunk.targets, return_inverse=True)
    start, nodes = take_ragged(tree.start, tree.nodes, distinct_targets)
    path_of_node = np.repeat(np.arange(len(distinct_targets)), np.diff(start))
    path_blocks = np.unique(path_of_node * n_blocks + plan.outputs.block[nodes])
    path_start = np.searchsorted(path_blocks, np.arange(len(distinct_targets) + 1) * n_blocks)
    target_of_row = target_index[rows]
    n_path_blocks = np.diff(path_start)[target_of_row]
    _, output_blocks = take_ragged(path_start, path_blocks % n_blocks, target_of_row)
    return np.repeat(rows, n_path_blocks), np.repeat(input_blocks, n_path_blocks), output_blocks


def _to_bytes(rows: Examples, begin: int, end: int) -> bytes:
    """Return the examples `begin` to `end` as bytes.

    Content: int64 number of examples and number of inputs; then the keys, the targets, the number
    of inputs of each example, and the inputs. The numbers of inputs are left out if each example
    has one input. Size: 16 bytes per example with one input each, else 16 per example and 4 per
    input.
    """
    inputs = slice(int(rows.start[begin]), int(rows.start[end]))
    n_examples, n_inputs = end - begin, inputs.stop - inputs.start
    lengths = np.diff(rows.start[begin : end + 1]) if n_examples != n_inputs else np.zeros(0)
    return b"".join(
        [
            np.array([n_examples, n_inputs], np.int64).tobytes(),
            rows.keys[begin:end].tobytes(),
            rows.targets[begin:end].tobytes(),
            lengths.astype(np.int32).tobytes(),
            rows.inputs[inputs].tobytes(),
        ]
    )


def _from_bytes(data: bytes) -> Examples:
    # Reads what `_to_bytes` wrote.
    n_examples, n_inputs = (int(size) for size in np.frombuffer(data, np.int64, 2))
    n_lengths = n_examples if n_examples != n_inputs else 0
    lengths = np.frombuffer(data, np.int32, n_lengths, 16 + 12 * n_examples)
    start = np.concatenate([[0], np.cumsum(lengths)]) if n_lengths else np.arange(n_examples + 1)
    return Examples(
        np.frombuffer(data, np.uint64, n_examples, 16),
        np.frombuffer(data, np.int32, n_examples, 16 + 8 * n_examples),
        start,
        np.frombuffer(data, np.int32, n_inputs, 16 + 12 * n_examples + 4 * n_lengths),
    )
