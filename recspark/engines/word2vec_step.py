"""One step of word2vec: a worker learns from the examples in which its two blocks meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pyspark import TaskContext

from recspark import storage
from recspark.data.blocks import Array
from recspark.engines import word2vec_cells as cells
from recspark.engines import word2vec_kernels as kernels
from recspark.engines.huffman import Tree
from recspark.engines.word2vec_cells import Layout
from recspark.engines.word2vec_examples import Metadata


@dataclass(frozen=True)
class Word2Vec:
    """Settings of a run; see `recspark.models.vectors.item2vec` for what each means."""

    size: int = 64
    architecture: Literal["skipgram", "cbow"] = "skipgram"
    loss: Literal["negative", "hierarchical"] = "negative"
    window: int | None = None  # None = the whole sentence, as a set
    shrink_window: bool = False
    within_bag: bool = False  # in sentences of bags: items of one bag predict each other too
    n_negatives: int = 10
    ns_exponent: float = 0.5
    subsample: float | None = None
    min_count: int = 1
    max_length: int = 100
    epochs: int = 5
    learning_rate: float = 0.025
    min_learning_rate: float = 0.0001
    n_blocks: int = 2
    n_rotations: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """What every task needs to know; item-sized, broadcast once."""

    settings: Word2Vec
    folder: str
    inputs: Layout  # of items and the tokens of `metadata`
    outputs: Layout  # the same, or of inner nodes of `tree`
    noise: Array  # float64, by output: weight with which it is drawn as a negative
    keep: Array  # float32, by item: chance that a use stays in an epoch (subsampling)
    tree: Tree | None  # for hierarchical softmax
    metadata: Metadata | None = None  # for skip-gram with negative sampling


@dataclass(frozen=True)
class Moment:
    """One step of all workers: which blocks meet, and the files of their vectors and examples."""

    epoch: int
    number: int  # number of the step, counted from the start of the run
    shift: int  # worker i holds output block (i + shift) % n_blocks
    examples: tuple[str, ...]  # file of the examples, by input block; "" = no example
    inputs: tuple[str, ...]  # file of the vectors, by input block; "" = not yet written
    outputs: tuple[str, ...]  # file of the vectors, by output block; "" = not yet written


@dataclass(frozen=True)
class StepResult:
    """What a task reports to the driver."""

    input_block: int
    output_block: int
    inputs: str  # file of the vectors of the input block
    outputs: str  # file of the vectors of the output block
    loss: float  # sum of the losses of `n_losses` examples
    n_losses: int
    largest: float  # largest |component| of a vector; NaN where one is NaN


def run_step(shared: Any, moment: Moment, block: int) -> StepResult:
    """Run `step` in an executor, with the task's attempt number; `shared` is the broadcast plan."""
    plan: Plan = shared.value
    attempt = TaskContext.get()
    return step(plan, moment, block, attempt.taskAttemptId() if attempt else 0)


def step(plan: Plan, moment: Moment, block: int, attempt: int) -> StepResult:
    """Learn from the examples of input block `block` and of the output block that it meets.

    Reads the vectors of both blocks from their files, updates them, and writes them to new files,
    whose names contain `attempt`; the contents do not depend on it. Without an example, no file is
    written and the result names the old ones.
    """
    settings, n_blocks = plan.settings, plan.settings.n_blocks
    output_block = (block + moment.shift) % n_blocks
    files = moment.inputs[block], moment.outputs[output_block]
    unchanged = StepResult(block, output_block, *files, 0.0, 0, 0.0)
    if not moment.examples[block]:
        return unchanged
    cell = cells.read_cell(
        moment.examples[block], output_block, n_blocks, ragged=settings.architecture == "cbow"
    )
    if len(cell.targets) == 0:
        return unchanged
    members = plan.inputs.members(block)
    live = (
        storage.read_array(files[0])
        if files[0]
        else kernels.start_vectors(members, settings.size, settings.seed)
    )
    outputs = (
        storage.read_array(files[1])
        if files[1]
        else np.zeros((len(plan.outputs.members(output_block)), settings.size), np.float32)
    )
    inputs, frozen = _localise(plan, moment, block, cell.inputs)
    loss, n_losses = _update_vectors(
        plan, moment, output_block, cell, inputs, live, frozen, outputs
    )
    stem = f"{moment.number}-{block}-{attempt}.npy"
    files = (
        storage.join(plan.folder, f"inputs-{stem}"),
        storage.join(plan.folder, f"outputs-{stem}"),
    )
    storage.write_array(files[0], live)
    storage.write_array(files[1], outputs)
    largest = float(np.maximum(np.abs(live).max(), np.abs(outputs).max()))  # NaN stays NaN
    return StepResult(block, output_block, *files, loss, n_losses, largest)


def _update_vectors(
    plan: Plan,
    moment: Moment,
    output_block: int,
    cell: cells.Cell,
    inputs: Array,
    live: Array,
    frozen: Array,
    outputs: Array,
) -> tuple[float, int]:
    settings = plan.settings
    # Updates `live` and `outputs` in place; returns (sum of losses, number of losses). The learning
    # rate falls linearly over all steps of the run: here from `first_rate` to `last_rate`.
    n_steps = settings.epochs * settings.n_rotations * settings.n_blocks
    decrease = settings.learning_rate - settings.min_learning_rate
    first_rate, last_rate = (
        settings.learning_rate - decrease * (moment.number + n_done) / n_steps for n_done in (0, 1)
    )
    members = plan.outputs.members(output_block)
    if plan.tree is not None:
        is_in_block = plan.outputs.block[plan.tree.nodes] == output_block
        nodes = np.where(is_in_block, plan.outputs.local[plan.tree.nodes], -1).astype(np.int32)
        return kernels.train_hierarchical(
            cell.start, inputs, cell.targets, live, frozen, outputs,
            plan.tree.start, nodes, plan.tree.codes, first_rate, last_rate,
        )  # fmt: skip
    thresholds, aliases = kernels.alias_table(plan.noise[members])
    seed = int(kernels.key(settings.seed, moment.number, output_block, 5)) >> 1
    return kernels.train_negative(
        cell.start, inputs, plan.outputs.local[cell.targets], live, frozen, outputs,
        thresholds, aliases, settings.n_negatives, first_rate, last_rate, seed,
    )  # fmt: skip


def _localise(plan: Plan, moment: Moment, block: int, items: Array) -> tuple[Array, Array]:
    """Return (inputs, frozen): `items` as the kernels need them, and vectors of other blocks'
    items.

    An item of `block` becomes its row in the block. An item of another block becomes -1 - r, where
    r is its row in `frozen` float32 (m, size), which holds each such item once. Example: `block`
    has items 4 and 9 in rows 0 and 1; `items` [9, 7, 4, 7] gives `inputs` [1, -1, 0, -1], and
    `frozen` has one row, that of item 7.
    """
    size = plan.settings.size
    blocks = plan.inputs.block[items]
    inputs = plan.inputs.local[items].copy()
    is_elsewhere = blocks != block
    if not is_elsewhere.any():
        return inputs, np.zeros((0, size), np.float32)
    frozen_items, frozen_rows = np.unique(items[is_elsewhere], return_inverse=True)
    inputs[is_elsewhere] = -1 - frozen_rows
    frozen = np.empty((len(frozen_items), size), np.float32)
    for other_block in np.unique(blocks[is_elsewhere]):
        is_in_block = plan.inputs.block[frozen_items] == other_block
        file = moment.inputs[other_block]
        if file:
            frozen[is_in_block] = storage.read_array(file, mmap=True)[
                plan.inputs.local[frozen_items[is_in_block]]
            ]
        else:
            frozen[is_in_block] = kernels.start_vectors(
                frozen_items[is_in_block], size, plan.settings.seed
            )
    return inputs, frozen
