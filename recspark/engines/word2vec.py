"""Word2vec on Spark, in a way that more workers do not lower the quality.

Items are dealt into blocks, once as inputs and once as outputs. In each step, worker i holds input
block i and one output block, and learns from the examples that have their input in the one and
their target in the other. Then each output block moves to the next worker. No two workers ever hold
the same vector, so no vectors are averaged. After `n_blocks` steps, every pair of blocks has met:
one rotation. With 3 blocks, worker 0 meets output blocks 0, 1, 2 while worker 1 meets 1, 2, 0.

An epoch is cut into `n_rotations`, so that no block learns for long against vectors that do not
change. Negatives are drawn from the output block that the worker holds.

Vectors and examples pass through files in a folder that all workers reach. The name of a file
contains the attempt that wrote it, and the file counts only after its task has reported it to the
driver. So a lost task is simply run again, and its second run gives the same bits: its random
numbers depend on (seed, step, block).

CBOW: the inputs of an example can lie in several blocks. Then each of these blocks takes a step, in
which its own inputs are updated and the others have the values from the end of the last step.
Hierarchical softmax: the inner nodes of the tree are dealt into output blocks like items, and a
path is learned in pieces.

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
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema, storage
from recspark.data.blocks import Array
from recspark.engines import word2vec_cells as cells
from recspark.engines.huffman import huffman
from recspark.engines.word2vec_cells import Layout, deal
from recspark.engines.word2vec_examples import (
    BAGGED_SENTENCES,
    PACKED,
    Metadata,
    count,
    pack,
    unpack_batches,
)
from recspark.engines.word2vec_step import Moment, Plan, StepResult, Word2Vec, run_step
from recspark.errors import DivergedError, EmptyDataError, ModelError

# A run has diverged if a component of a vector is this large: dot products of two such vectors
# saturate every sigmoid. In converged runs, components stay below 10.
EXPLODED = 1e3


@dataclass(frozen=True)
class Vectors:
    """The result of a run.

    `counts` int64 (n_items,): how often each item is used in sentences of two items or more; 0 =
    the item has no vector. `inputs` and `outputs` float32 (n, size) have a row per item, and then a
    row per token where there are metadata of a weight above 0; a token of no used item has the
    output 0. `outputs` is None for hierarchical softmax.
    """

    counts: Array
    inputs: Array
    outputs: Array | None


def train_vectors(
    sentences: DataFrame,
    vocabulary: Array,
    settings: Word2Vec,
    *,
    metadata: Metadata | None = None,
    scratch: str = "",
    progress: Callable[[str], None] = lambda _text: None,
) -> Vectors:
    """Return the vectors of the items of `vocabulary`, and of the tokens of their metadata.

    Parameters
    ----------
    sentences : `sentence_id bigint` (unique; seeds the sentence's random numbers), `items
        array<int>`; in sentences of bags also `bags array<int>`, the number of the bag of each
        item, which does not decrease. Windows then count bags, and the order of the items within
        a bag means nothing
    vocabulary : item_idx int32 (n_items,), ascending; other items are ignored
    settings : see `Word2Vec`
    metadata : tokens of each item of `vocabulary`, which get vectors in the same space (see
        `word2vec_examples.examples`). Only for skip-gram with negative sampling. With the weight 0,
        the vectors of the items are those without metadata
    scratch : URI of a folder that all workers reach; "" = a temporary folder, for a local master
    progress : called with the mean loss of each epoch

    The result depends only on (settings, sentences), not on the order or partitions of the
    sentences. Raises DivergedError when a component is NaN or beyond 1000, EmptyDataError when no
    sentence has two items of the vocabulary, and ModelError when the master is not local and
    `scratch` is empty.

    Cost: one pass over `sentences`, which stay cached in packed form until the end. Per epoch, one
    shuffle of its examples (16 bytes per pair) and n_rotations x n_blocks short jobs. A task holds
    two blocks of vectors and the examples of one rotation. Driver: item-sized.
    """
    spark = sentences.sparkSession
    pack_sentences = partial(
        pack,
        vocabulary=np.array(vocabulary, np.int32),
        as_sets=settings.window is None,
        max_length=settings.max_length,
    )
    columns = [name for name in BAGGED_SENTENCES.names if name in sentences.columns]
    packed = sentences.select(*columns).mapInArrow(pack_sentences, PACKED).persist()
    try:
        counts = _counts(packed, len(vocabulary), settings)
        with run_folder(str(spark.sparkContext.master), scratch) as folder:
            plan_of_run = plan(counts, settings, folder, metadata)
            inputs, outputs = _run(packed, plan_of_run, progress)
    finally:
        packed.unpersist(blocking=True)
    return Vectors(counts, inputs, outputs if settings.loss == "negative" else None)


def plan(counts: Array, settings: Word2Vec, folder: str, metadata: Metadata | None = None) -> Plan:
    """Return the plan of a run over items that are used `counts` times.

    A token is drawn as a negative with the weight of its uses^ns_exponent, times the weight of the
    metadata: an item counts as much beside other items as it does without metadata. Raises
    ModelError where there are metadata, but no skip-gram with negative sampling.
    """
    tree = huffman(counts) if settings.loss == "hierarchical" else None
    uses, token_uses = counts.astype(np.float64), np.zeros(0)
    if metadata is not None and (tree is not None or settings.architecture == "cbow"):
        raise ModelError("word2vec: metadata need architecture skipgram and loss negative")
    if metadata is not None and metadata.weight > 0:
        n_tokens_of_item = np.diff(metadata.start)
        uses_of_entry = np.repeat(counts / np.maximum(n_tokens_of_item, 1), n_tokens_of_item)
        token_uses = np.bincount(metadata.tokens, uses_of_entry, metadata.n_tokens).astype(
            np.float64
        )
    else:
        metadata = None
    members = np.concatenate([uses, token_uses])
    outputs = members if tree is None else tree.weights.astype(np.float64)
    noise = np.zeros(len(outputs))
    noise[outputs > 0] = outputs[outputs > 0] ** settings.ns_exponent
    if metadata is not None:
        noise[len(counts) :] *= metadata.weight
    return Plan(
        settings,
        folder,
        deal(members, settings.n_blocks),
        deal(outputs, settings.n_blocks),
        noise,
        keep_chances(counts, settings.subsample),
        tree,
        metadata,
    )


def keep_chances(counts: Array, subsample: float | None) -> Array:
    """Return float32 (n,): the chance that one use of an item stays, 0 for an item without uses.

    The chance is sqrt(t / f) + t / f, at most 1, where t is `subsample` and f is the item's share
    of all uses. `subsample` None = every use stays. Source: word2vec.c.
    """
    is_used = counts > 0
    chances = is_used.astype(np.float64)
    if subsample is not None:
        ratio = subsample * counts.sum() / counts[is_used]
        chances[is_used] = np.minimum(1, np.sqrt(ratio) + ratio)
    return chances.astype(np.float32)


def _counts(packed: DataFrame, n_items: int, settings: Word2Vec) -> Array:
    """Return the number of uses of each item, 0 for an item below `min_count`.

    One job; two if `min_count` is above 1.
    """
    counts = _count_uses(packed, np.ones(n_items, bool), settings.within_bag)
    if settings.min_count > 1:
        # Without the rare items, some sentences have fewer than two items left.
        counts = _count_uses(packed, counts >= settings.min_count, settings.within_bag)
    if not counts.any():
        raise EmptyDataError(
            "word2vec: no sentence has two items with enough uses; are baskets or sessions recorded, "
            f"and is min_count = {settings.min_count} not too high?"
        )
    return counts


def _count_uses(packed: DataFrame, is_kept: Array, within_bag: bool) -> Array:
    def count_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        total = np.zeros(len(is_kept), np.int64)
        for sentences in unpack_batches(batches):
            total += count(sentences, is_kept, within_bag=within_bag)
        used_items = np.flatnonzero(total)
        yield pa.RecordBatch.from_arrays(
            [pa.array(used_items, pa.int32()), pa.array(total[used_items], pa.int64())],
            names=["item", "n"],
        )

    partial_counts = packed.mapInArrow(
        count_batches, schema.columns(item=schema.INT, n=schema.LONG)
    )
    item_counts = partial_counts.groupBy("item").agg(F.sum("n").alias("n")).toArrow()
    counts = np.zeros(len(is_kept), np.int64)
    counts[item_counts.column("item").to_numpy()] = item_counts.column("n").to_numpy()
    return counts


def _run(packed: DataFrame, plan: Plan, progress: Callable[[str], None]) -> tuple[Array, Array]:
    n_blocks, context = plan.settings.n_blocks, packed.sparkSession.sparkContext
    shared, blocks = context.broadcast(plan), context.parallelize(range(n_blocks), n_blocks)
    packed_rows: Any = packed.rdd
    try:
        return learn(
            plan,
            lambda epoch: cells.write_epoch(packed_rows, shared, epoch),
            lambda moment: blocks.map(partial(run_step, shared, moment)).collect(),
            progress,
        )
    finally:
        shared.destroy()


def learn(
    plan: Plan,
    write_epoch: Callable[[int], list[tuple[str, ...]]],
    run_step: Callable[[Moment], list[StepResult]],
    progress: Callable[[str], None] = lambda _text: None,
) -> tuple[Array, Array]:
    """Return (inputs, outputs), float32 (n, size), after all epochs.

    Decides the order of all steps, and which files count. It is given the functions that do the
    work, so that tests can run it without Spark.

    Parameters
    ----------
    write_epoch : writes an epoch's examples; returns their files by rotation and input block
    run_step : runs `step` for every input block of a moment; returns one result per block
    progress : called with the mean loss of each epoch
    """
    settings = plan.settings
    inputs, outputs = [""] * settings.n_blocks, [""] * settings.n_blocks
    step_number = 0
    for epoch in range(settings.epochs):
        files = write_epoch(epoch)
        loss_sum, n_losses = 0.0, 0
        for rotation in range(settings.n_rotations):
            for shift in range(settings.n_blocks):
                moment = Moment(
                    epoch, step_number, shift, files[rotation], tuple(inputs), tuple(outputs)
                )
                results = run_step(moment)
                _check_vectors(results, moment, settings)
                old_files = {*inputs, *outputs}
                for result in results:
                    inputs[result.input_block], outputs[result.output_block] = (
                        result.inputs,
                        result.outputs,
                    )
                    loss_sum, n_losses = loss_sum + result.loss, n_losses + result.n_losses
                _remove_files(old_files - {*inputs, *outputs})
                step_number += 1
        _remove_files({name for rotation_files in files for name in rotation_files})
        progress(f"epoch {epoch + 1}/{settings.epochs}: loss {loss_sum / max(n_losses, 1):.4f}")
    return (
        _assemble(inputs, plan.inputs, settings.size),
        _assemble(outputs, plan.outputs, settings.size),
    )


def _check_vectors(results: list[StepResult], moment: Moment, settings: Word2Vec) -> None:
    for result in results:
        if not result.largest <= EXPLODED:
            raise DivergedError(
                f"word2vec: epoch {moment.epoch + 1}, step {moment.number + 1}: a vector has a "
                f"component of {result.largest:.3g}; lower learning_rate "
                f"(now {settings.learning_rate})"
            )


def _assemble(files: list[str], layout: Layout, size: int) -> Array:
    # Returns all vectors, float32 (n, size), from one file per block. Without a file they are 0.
    vectors = np.zeros((len(layout.block), size), np.float32)
    for block, file in enumerate(files):
        if file:
            vectors[layout.members(block)] = storage.read_array(file)
    return vectors


def _remove_files(files: set[str]) -> None:
    for file in files - {""}:
        storage.remove(file)


@contextmanager
def run_folder(master: str, scratch: str) -> Iterator[str]:
    """Yield a folder for the files of one run; remove it afterwards."""
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
