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


@dataclass(frozen=True)
class Word2Vec:
    """Settings of a run; see `recspark.models.vectors.item2vec` for what each means."""

    size: int = 64
    architecture: Literal["skipgram", "cbow"] = "skipgram"
    loss: Literal["negative", "hierarchical"] = "negative"
    window: int | None = None  # None = the whole sentence, as a set
    shrink_window: bool = False
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
    """What every task knows: item-sized, broadcast once."""

    settings: Word2Vec
    folder: str
    inputs: Layout
    outputs: Layout
    noise: Array  # float64, by output
    keep: Array  # float32, by item
    tree: Tree | None


@dataclass(frozen=True)
class Moment:
    """One step: which blocks meet, and the files they lie in."""

    epoch: int
    number: int  # from the start of the run
    shift: int  # worker i holds output block (i + shift) % n_blocks
    examples: tuple[str, ...]  # by input block; "" = none
    inputs: tuple[str, ...]  # by input block; "" = not yet written
    outputs: tuple[str, ...]  # by output block


@dataclass(frozen=True)
class Done:
    """What a task tells the driver."""

    block: int
    other: int
    inputs: str
    outputs: str
    loss: float  # summed over
    n_losses: int  # examples
    largest: float  # |component|; NaN where one is NaN


def run_step(shared: Any, moment: Moment, block: int) -> Done:
    """Learn from the examples of one pair of blocks; runs in an executor."""
    plan: Plan = shared.value
    attempt = TaskContext.get()
    return step(plan, moment, block, attempt.taskAttemptId() if attempt else 0)


def step(plan: Plan, moment: Moment, block: int, attempt: int) -> Done:
    """Learn from the examples of input block `block` and the output block it meets at `moment`.

    Files are named by `attempt`; what is in them does not depend on it.
    """
    settings, n = plan.settings, plan.settings.n_blocks
    other = (block + moment.shift) % n
    names = moment.inputs[block], moment.outputs[other]
    nothing = Done(block, other, *names, 0.0, 0, 0.0)
    if not moment.examples[block]:
        return nothing
    found = cells.read_cell(
        moment.examples[block], other, n, ragged=settings.architecture == "cbow"
    )
    if len(found.targets) == 0:
        return nothing
    mine = plan.inputs.members(block)
    live = (
        storage.read_array(names[0])
        if names[0]
        else kernels.start_vectors(mine, settings.size, settings.seed)
    )
    outputs = (
        storage.read_array(names[1])
        if names[1]
        else np.zeros((len(plan.outputs.members(other)), settings.size), np.float32)
    )
    inputs, frozen = _localise(plan, moment, block, found.inputs)
    loss, n_losses = _learn(plan, moment, other, found, inputs, live, frozen, outputs)
    stem = f"{moment.number}-{block}-{attempt}.npy"
    names = (
        storage.join(plan.folder, f"inputs-{stem}"),
        storage.join(plan.folder, f"outputs-{stem}"),
    )
    storage.write_array(names[0], live)
    storage.write_array(names[1], outputs)
    largest = float(np.maximum(np.abs(live).max(), np.abs(outputs).max()))  # NaN stays NaN
    return Done(block, other, *names, loss, n_losses, largest)


def _learn(
    plan: Plan,
    moment: Moment,
    other: int,
    found: cells.Cell,
    inputs: Array,
    live: Array,
    frozen: Array,
    outputs: Array,
) -> tuple[float, int]:
    settings = plan.settings
    n_steps = settings.epochs * settings.n_rotations * settings.n_blocks
    fall = settings.learning_rate - settings.min_learning_rate
    first, last = (
        settings.learning_rate - fall * (moment.number + done) / n_steps for done in (0, 1)
    )
    members = plan.outputs.members(other)
    if plan.tree is not None:
        here = plan.outputs.block[plan.tree.nodes] == other
        nodes = np.where(here, plan.outputs.local[plan.tree.nodes], -1).astype(np.int32)
        return kernels.train_hierarchical(
            found.start, inputs, found.targets, live, frozen, outputs,
            plan.tree.start, nodes, plan.tree.codes, first, last,
        )  # fmt: skip
    share, rest = kernels.alias_table(plan.noise[members])
    seed = int(kernels.key(settings.seed, moment.number, other, 5)) >> 1
    return kernels.train_negative(
        found.start, inputs, plan.outputs.local[found.targets], live, frozen, outputs,
        share, rest, settings.n_negatives, first, last, seed,
    )  # fmt: skip


def _localise(plan: Plan, moment: Moment, block: int, items: Array) -> tuple[Array, Array]:
    """Return (inputs, frozen): items of `block` as their rows, others as -1 - row of `frozen`."""
    size = plan.settings.size
    blocks = plan.inputs.block[items]
    inputs = plan.inputs.local[items].copy()
    away = blocks != block
    if not away.any():
        return inputs, np.zeros((0, size), np.float32)
    wanted, at = np.unique(items[away], return_inverse=True)
    inputs[away] = -1 - at
    frozen = np.empty((len(wanted), size), np.float32)
    for one in np.unique(blocks[away]):
        rows = plan.inputs.block[wanted] == one
        name = moment.inputs[one]
        if name:
            frozen[rows] = storage.read_array(name, mmap=True)[plan.inputs.local[wanted[rows]]]
        else:
            frozen[rows] = kernels.start_vectors(wanted[rows], size, plan.settings.seed)
    return inputs, frozen
