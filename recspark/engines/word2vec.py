"""Word2vec on Spark whose quality does not fall with the number of workers.

Items are dealt into blocks, on the input and on the output side. At each step worker i holds input
block i and one output block, and learns from the examples that lie in both; then the output blocks
move on to the next worker. No two workers ever hold the same vector, so nothing is averaged. After
`n_blocks` steps every pair of blocks has met: one rotation. An epoch is cut into `n_rotations`, so
that no block works for long against vectors that stand still. Noise is drawn from the output block
in hand.

Vectors and examples pass through files in a folder that all workers reach. A file is named by the
attempt that wrote it and counts once its task has told the driver, so a task that was lost is
simply done again, and gives the same bits: its random numbers depend on (seed, epoch, block).

CBOW with inputs in several blocks: each of these takes a step with its own inputs live and the
others as they were after the last step. Hierarchical softmax: the inner nodes of the tree are dealt
out like items, and a path is learnt in pieces.

Source: Mikolov et al. 2013; Caselles-Dupré et al. 2018 for recommendation; blocks as in Gemulla et
al. 2011, "Large-scale matrix factorization with distributed stochastic gradient descent".
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pyspark import TaskContext
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema, storage
from recspark.data.blocks import Array
from recspark.engines import word2vec_cells as cells
from recspark.engines import word2vec_kernels as kernels
from recspark.engines.huffman import Tree, huffman
from recspark.engines.word2vec_cells import Layout, deal
from recspark.engines.word2vec_examples import PACKED, count, pack, unpack
from recspark.errors import DivergedError, EmptyDataError, ModelError

# A component this large is no vector any more: products of two such saturate every sigmoid. Those of
# converged runs stay below 10.
EXPLODED = 1e3


@dataclass(frozen=True)
class Word2Vec:
    """Settings of a run; see `recspark.models.item2vec` for what each means."""

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
class Vectors:
    """What a run learnt.

    `counts` int64 (n_items,): uses in sentences of two items or more; 0 = the item has no vector.
    `inputs` float32 (n_items, size); `outputs` the same, None for hierarchical softmax.
    """

    counts: Array
    inputs: Array
    outputs: Array | None


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


def train(
    sentences: DataFrame,
    vocabulary: Array,
    settings: Word2Vec,
    *,
    scratch: str = "",
    progress: Callable[[str], None] = lambda _text: None,
) -> Vectors:
    """Return the vectors of `vocabulary`'s items.

    Parameters
    ----------
    sentences : `sentence_id bigint` (unique; decides what is random about it), `items array<int>`
    vocabulary : item_idx int32 (n_items,), ascending; other items are passed over
    scratch : URI of a folder that all workers reach; "" = a temporary folder, for a local master
    progress : told the mean loss of each epoch

    Deterministic for (settings, sentences), whatever their order and partitions. Raises DivergedError
    when a component is NaN or beyond 1000, EmptyDataError when no sentence has two known items,
    ModelError when workers elsewhere would have no folder in common.

    Cost: one pass over `sentences`, kept packed until the end; per epoch one shuffle of its examples
    (16 bytes a pair) and n_rotations x n_blocks short jobs. A task holds two blocks of vectors and
    the examples of one rotation. Driver: item-sized.
    """
    spark = sentences.sparkSession
    cutting = partial(
        pack,
        vocabulary=np.array(vocabulary, np.int32),
        as_sets=settings.window is None,
        max_length=settings.max_length,
    )
    packed = sentences.select("sentence_id", "items").mapInArrow(cutting, PACKED).persist()
    try:
        counts = _counts(packed, len(vocabulary), settings)
        with _folder(str(spark.sparkContext.master), scratch) as folder:
            inputs, outputs = _run(packed, plan(counts, settings, folder), progress)
    finally:
        packed.unpersist(blocking=True)
    return Vectors(counts, inputs, outputs if settings.loss == "negative" else None)


def plan(counts: Array, settings: Word2Vec, folder: str) -> Plan:
    """Return the plan of a run on items with `counts`."""
    tree = huffman(counts) if settings.loss == "hierarchical" else None
    weights = counts if tree is None else tree.weights
    noise = np.zeros(len(weights))
    used = weights > 0
    noise[used] = weights[used].astype(np.float64) ** settings.ns_exponent
    return Plan(
        settings,
        folder,
        deal(counts, settings.n_blocks),
        deal(weights, settings.n_blocks),
        noise,
        keep_chances(counts, settings.subsample),
        tree,
    )


def keep_chances(counts: Array, subsample: float | None) -> Array:
    """Return float32 (n,): the chance that a use of an item stays; 0 for an item without uses.

    sqrt(t / f) + t / f, at most 1; f is the item's share of all uses. Source: word2vec.c.
    """
    used = counts > 0
    keep = used.astype(np.float64)
    if subsample is not None:
        ratio = subsample * counts.sum() / counts[used]
        keep[used] = np.minimum(1, np.sqrt(ratio) + ratio)
    return keep.astype(np.float32)


def _counts(packed: DataFrame, n_items: int, settings: Word2Vec) -> Array:
    """Return the uses of each item, 0 below `min_count`; one job, or two where that is above 1."""
    counts = _count(packed, np.ones(n_items, bool))
    if settings.min_count > 1:
        counts = _count(packed, counts >= settings.min_count)
    if not counts.any():
        raise EmptyDataError(
            "word2vec: no sentence has two items with enough uses; are baskets or sessions recorded, "
            f"and is min_count = {settings.min_count} not too high?"
        )
    return counts


def _count(packed: DataFrame, kept: Array) -> Array:
    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        total = np.zeros(len(kept), np.int64)
        for sentences in unpack(batches):
            total += count(sentences, kept)
        at = np.flatnonzero(total)
        yield pa.RecordBatch.from_arrays(
            [pa.array(at, pa.int32()), pa.array(total[at], pa.int64())], names=["item", "n"]
        )

    found = packed.mapInArrow(run, schema.columns(item=schema.INT, n=schema.LONG))
    rows = found.groupBy("item").agg(F.sum("n").alias("n")).toArrow()
    counts = np.zeros(len(kept), np.int64)
    counts[rows.column("item").to_numpy()] = rows.column("n").to_numpy()
    return counts


def _run(packed: DataFrame, plan: Plan, progress: Callable[[str], None]) -> tuple[Array, Array]:
    n, context = plan.settings.n_blocks, packed.sparkSession.sparkContext
    shared = context.broadcast(plan)
    try:
        return learn(
            plan,
            lambda epoch: cells.write_epoch(packed, shared, epoch),
            lambda moment: (
                context.parallelize(range(n), n).map(partial(_step, shared, moment)).collect()
            ),
            progress,
        )
    finally:
        shared.destroy()


def learn(
    plan: Plan,
    write_epoch: Callable[[int], list[tuple[str, ...]]],
    run_step: Callable[[Moment], list[Done]],
    progress: Callable[[str], None] = lambda _text: None,
) -> tuple[Array, Array]:
    """Return (inputs, outputs), float32 (n, size), after all epochs: the order of things.

    Parameters
    ----------
    write_epoch : writes an epoch's cells; returns their files by rotation and input block
    run_step : runs `step` for every input block of a moment, wherever
    """
    settings = plan.settings
    inputs, outputs = [""] * settings.n_blocks, [""] * settings.n_blocks
    number = 0
    for epoch in range(settings.epochs):
        files = write_epoch(epoch)
        loss, n_losses = 0.0, 0
        for rotation in range(settings.n_rotations):
            for shift in range(settings.n_blocks):
                moment = Moment(
                    epoch, number, shift, files[rotation], tuple(inputs), tuple(outputs)
                )
                done = run_step(moment)
                _check(done, moment, settings)
                old = {*inputs, *outputs}
                for one in done:
                    inputs[one.block], outputs[one.other] = one.inputs, one.outputs
                    loss, n_losses = loss + one.loss, n_losses + one.n_losses
                _remove(old - {*inputs, *outputs})
                number += 1
        _remove({name for row in files for name in row})
        progress(f"epoch {epoch + 1}/{settings.epochs}: loss {loss / max(n_losses, 1):.4f}")
    return (
        _assemble(inputs, plan.inputs, settings.size),
        _assemble(outputs, plan.outputs, settings.size),
    )


def _step(shared: Any, moment: Moment, block: int) -> Done:
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


def _check(done: list[Done], moment: Moment, settings: Word2Vec) -> None:
    for one in done:
        if not one.largest <= EXPLODED:
            raise DivergedError(
                f"word2vec: epoch {moment.epoch + 1}, step {moment.number + 1}: a vector has a "
                f"component of {one.largest:.3g}; lower learning_rate (now {settings.learning_rate})"
            )


def _assemble(names: list[str], layout: Layout, size: int) -> Array:
    out = np.zeros((len(layout.block), size), np.float32)
    for block, name in enumerate(names):
        if name:
            out[layout.members(block)] = storage.read_array(name)
    return out


def _remove(names: set[str]) -> None:
    for name in names - {""}:
        storage.remove(name)


@contextmanager
def _folder(master: str, scratch: str) -> Iterator[str]:
    """Give a folder for the files of one run, removed afterwards."""
    if scratch:
        folder = storage.join(storage.absolute(scratch), f"word2vec-{uuid.uuid4().hex}")
        try:
            yield folder
        finally:
            storage.remove(folder)
    elif master.startswith("local"):
        with tempfile.TemporaryDirectory(prefix="word2vec-") as folder:
            yield folder
    else:
        raise ModelError(
            f"word2vec: workers of {master} pass vectors through files and need a folder that all of "
            "them reach; give FitOptions.scratch (the nightly takes it from paths.root)"
        )
