"""Paragraph vectors on Spark: vectors of words and of the documents that they stand in.

Documents stay where they are. They are dealt into `n_blocks` blocks by their id, once; each block is a
file of words and a file of vectors, and no table of documents exists anywhere. The words' *output*
vectors are dealt into as many blocks, which move from worker to worker as in `engines.word2vec`: in each
step, worker i holds its own documents and one block of outputs, and learns at the places where a word of
that block stands. So no two workers ever hold the same output vector or the same document, and nothing
is averaged: PV-DBOW gives the same quality with any number of blocks. After `n_blocks` steps, every
document has met every word: one rotation. An epoch has `n_rotations`, each over its share of the
documents.

PV-DM also has the words' *input* vectors, and the inputs of one place lie anywhere. Here every worker has
a copy of them, and after each rotation the copies become one: a word's vector is the mean of its copies,
each with the number of its uses as its weight. So a rare word, which few workers use, keeps the steps
that it took; a frequent word, of which all copies say nearly the same, takes the steps of one worker
where it could have taken those of all. More rotations make the loss smaller. To hold the inputs in blocks
too, as CBOW does in `engines.word2vec`, would learn each place once for each block that holds one of
its words: with 16 blocks, eleven words lie in eight blocks, and 16 workers do the work of two.

What it costs: a worker holds its documents (4 bytes per word and `size` floats per document), a block of
outputs, and for PV-DM all inputs: 100,000 words of 100 floats are 40 MB. A step reads and writes the
vectors of the worker's documents and a block of outputs, which is a short job; a rotation of PV-DM reads
and writes the inputs once more for each worker. The driver holds the words' vectors at the end, and
nothing of documents.

Files carry the number of the attempt that wrote them, and count once their task has reported them. So a
lost task is run again, and gives the same bits: random numbers depend on (seed, epoch, step, document).

Source: Le and Mikolov 2014, "Distributed Representations of Sentences and Documents"; blocks as in
Gemulla et al. 2011.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pyspark import TaskContext
from pyspark.sql import DataFrame

from recspark import schema, storage
from recspark.data.blocks import Array
from recspark.engines import paragraph_kernels as kernels
from recspark.engines.word2vec import EXPLODED, keep_chances, run_folder
from recspark.engines.word2vec_cells import Layout, deal
from recspark.engines.word2vec_kernels import alias_table, start_vectors
from recspark.errors import DivergedError, EmptyDataError

Method = Literal["dbow", "dm_mean", "dm_concat"]
METHODS: dict[str, int] = {
    "dbow": kernels.DBOW, "dm_mean": kernels.DM_MEAN, "dm_concat": kernels.DM_CONCAT
}  # fmt: skip
DOCUMENTS = schema.columns(document_id=schema.LONG, words=schema.ITEM_IDXS)
# Ids of the words' inputs, which seed their first vectors, begin here: not at those of documents.
_FIRST_INPUT = -(2**31)


@dataclass(frozen=True)
class Paragraphs:
    """Settings of a run; see `recspark.models.content.paragraph_vectors` for what each means."""

    size: int = 100
    method: Method = "dbow"
    window: int = 5
    n_negatives: int = 5
    ns_exponent: float = 0.75
    subsample: float | None = 1e-3
    epochs: int = 10
    learning_rate: float = 0.025
    min_learning_rate: float = 0.0001
    n_blocks: int = 2
    n_rotations: int = 1
    seed: int = 0


@dataclass(frozen=True)
class WordMatrices:
    """What a run learns about words; documents are inferred from it.

    `inputs` float32 (n_words + 1, size): each word as context, then the word that stands for none. With
    DBOW it has no row. `outputs` float32 (n_words, layer): each word as target.
    """

    inputs: Array
    outputs: Array


@dataclass(frozen=True)
class Plan:
    """What every task needs to know; word-sized, broadcast once."""

    settings: Paragraphs
    folder: str
    counts: Array  # int64, by word: its uses in all documents
    outputs: Layout  # of the words
    documents: tuple[str, ...]  # files of each block's documents, without their ending

    @property
    def layer(self) -> int:
        """The length of an output vector."""
        settings = self.settings
        return kernels.layer_size(METHODS[settings.method], settings.size, settings.window)

    @property
    def n_inputs(self) -> int:
        """The number of input vectors; 0 with DBOW."""
        return 0 if self.settings.method == "dbow" else len(self.counts) + 1


@dataclass(frozen=True)
class Moment:
    """One step of all workers. Files are "" or () where they are not yet written."""

    epoch: int
    rotation: int
    number: int  # number of the step, counted from the start of the run
    shift: int  # worker i holds output block (i + shift) % n_blocks
    vectors: tuple[str, ...]  # file of the documents' vectors, by block
    outputs: tuple[str, ...]  # file of the words' outputs, by output block
    inputs: tuple[tuple[str, ...], ...]  # files whose rows are the words' inputs, by worker
    uses: tuple[str, ...]  # file of the uses of each input since the copies were one, by worker


@dataclass(frozen=True)
class StepResult:
    """What a task reports to the driver."""

    block: int
    output_block: int
    vectors: str
    outputs: str
    inputs: tuple[str, ...]
    uses: str
    loss: float  # sum of the losses of `n_losses` examples
    n_losses: int
    largest: float  # largest |component| of a vector; NaN where one is NaN


def train_paragraphs(
    documents: DataFrame,
    counts: Array,
    settings: Paragraphs,
    *,
    scratch: str = "",
    progress: Callable[[str], None] = lambda _text: None,
) -> WordMatrices:
    """Return what the words of `documents` learn.

    Parameters
    ----------
    documents : `DOCUMENTS`; ids are unique, words are numbers below n_words, in the order of the text
    counts : int64 (n_words,): the uses of each word in `documents`, above 0
    settings : see `Paragraphs`
    scratch : URI of a folder that all workers reach; "" = a temporary folder, for a local master
    progress : called with the mean loss of each epoch

    The result depends only on (settings, documents), not on their order or partitions. Raises
    EmptyDataError without words, DivergedError where a component is NaN or beyond 1000, and ModelError
    where the master is not local and `scratch` is empty.

    Cost: one shuffle of the documents, by id, then epochs x n_rotations x n_blocks short jobs, and for
    PV-DM with more than one block one more job per rotation. See the module for the memory.
    """
    if len(counts) == 0:
        raise EmptyDataError(
            "paragraph vectors: no word is left; do the items have names or texts, and is min_items "
            "not too high?"
        )
    context = documents.sparkSession.sparkContext
    n_blocks = settings.n_blocks
    with run_folder(str(context.master), scratch) as folder:
        files = _write_documents(documents, folder, n_blocks)
        layout = deal(counts.astype(np.float64), n_blocks)
        plan = Plan(settings, folder, np.asarray(counts, np.int64), layout, files)
        shared, blocks = context.broadcast(plan), context.parallelize(range(n_blocks), n_blocks)
        try:
            return learn(
                plan,
                lambda moment: blocks.map(partial(_run_step, shared, moment)).collect(),
                lambda moment: blocks.map(partial(_run_merge, shared, moment)).collect(),
                progress,
            )
        finally:
            shared.destroy()


def learn(
    plan: Plan,
    run_step: Callable[[Moment], list[StepResult]],
    run_merge: Callable[[Moment], list[str]],
    progress: Callable[[str], None] = lambda _text: None,
) -> WordMatrices:
    """Return the words' vectors after all epochs.

    Decides the order of all steps, and which files count. It is given the functions that do the work,
    so that tests can run it without Spark: `run_step` runs `step` for each block, and `run_merge` runs
    `merge` for each block, of a moment.
    """
    settings, n_blocks = plan.settings, plan.settings.n_blocks
    nothing: tuple[str, ...] = ("",) * n_blocks
    moment = Moment(0, 0, 0, 0, nothing, nothing, ((),) * n_blocks, nothing)
    for epoch in range(settings.epochs):
        loss_sum, n_losses = 0.0, 0
        for rotation in range(settings.n_rotations):
            for shift in range(n_blocks):
                number = moment.number + (0 if epoch == rotation == shift == 0 else 1)
                moment = replace(moment, epoch=epoch, rotation=rotation, shift=shift, number=number)
                results = run_step(moment)
                _check_vectors(results, moment, settings)
                loss_sum += sum(result.loss for result in results)
                n_losses += sum(result.n_losses for result in results)
                moment = _moved_on(moment, _after(moment, results))
            if plan.n_inputs and n_blocks > 1:
                merged = tuple(run_merge(moment))
                moment = _moved_on(
                    moment, replace(moment, inputs=(merged,) * n_blocks, uses=nothing)
                )
        progress(f"epoch {epoch + 1}/{settings.epochs}: loss {loss_sum / max(n_losses, 1):.4f}")
    outputs = np.zeros((len(plan.counts), plan.layer), np.float32)
    for block, file in enumerate(moment.outputs):
        outputs[plan.outputs.members(block)] = storage.read_array(file)
    return WordMatrices(_inputs_of(plan, moment.inputs[0]), outputs)


def infer(
    words: WordMatrices, uses: Array, settings: Paragraphs, start: Array, numbers: Array
) -> Array:
    """Return the vectors of texts of known words, float32 (n, size); see `kernels.infer`.

    Text t has the words `numbers[start[t]:start[t + 1]]`, int32. `uses` int64 (n_words,): those of the
    words in training. No number of `words` changes.
    """
    thresholds, aliases = alias_table(uses.astype(np.float64) ** settings.ns_exponent)
    inputs = words.inputs if len(words.inputs) else np.zeros((0, settings.size), np.float32)
    return kernels.infer(
        METHODS[settings.method], settings.window, start, numbers, inputs, words.outputs,
        keep_chances(uses, settings.subsample), thresholds, aliases, settings.n_negatives,
        settings.epochs, settings.learning_rate, settings.min_learning_rate, settings.seed,
    )  # fmt: skip


def step(plan: Plan, moment: Moment, block: int, attempt: int) -> StepResult:
    """Learn from the documents of `block` at the places of one block of words."""
    settings = plan.settings
    ids, start, words = _read_documents(plan.documents[block])
    output_block = (block + moment.shift) % settings.n_blocks
    members = plan.outputs.members(output_block)
    output_rows = np.full(len(plan.counts), -1, np.int32)
    output_rows[members] = np.arange(len(members))
    vectors = _array(
        moment.vectors[block], lambda: start_vectors(ids, settings.size, settings.seed)
    )
    outputs = _array(
        moment.outputs[output_block], lambda: np.zeros((len(members), plan.layer), np.float32)
    )
    inputs = _inputs_of(plan, moment.inputs[block])
    uses = _array(moment.uses[block], lambda: np.zeros(len(inputs), np.int64))
    noise = plan.counts[members] ** settings.ns_exponent
    loss, n_losses = 0.0, 0
    if len(members):
        thresholds, aliases = alias_table(noise)
        first_rate, last_rate = _rates(settings, moment.number)
        loss, n_losses = kernels.train(
            METHODS[settings.method], settings.window, start, words, ids,
            _order(ids, settings, moment), vectors, inputs, uses, outputs, output_rows,
            keep_chances(plan.counts, settings.subsample), thresholds, aliases,
            settings.n_negatives, first_rate, last_rate, settings.seed, moment.epoch, moment.number,
        )  # fmt: skip
    names = [
        storage.join(plan.folder, f"{what}-{moment.number}-{block}-{attempt}.npy")
        for what in ("vectors", "outputs", "inputs", "uses")
    ]
    arrays = [vectors, outputs, inputs, uses][: 4 if plan.n_inputs else 2]
    for name, array in zip(names, arrays, strict=False):
        storage.write_array(name, array)
    largest = max(float(np.abs(array).max(initial=0)) for array in arrays[:3])
    if any(np.isnan(array).any() for array in arrays[:3]):
        largest = np.nan
    inputs_files: tuple[str, ...] = (names[2],) if plan.n_inputs else ()
    uses_file = names[3] if plan.n_inputs else ""
    return StepResult(
        block, output_block, names[0], names[1], inputs_files, uses_file, loss, n_losses, largest
    )


def merge(plan: Plan, moment: Moment, block: int, attempt: int) -> str:
    """Make one of the workers' copies of a share of the inputs; return the name of its file.

    The share of `block` is a range of rows, so that the files of all blocks, one after the other, are
    the inputs.
    """
    n_blocks = plan.settings.n_blocks
    first, end = (plan.n_inputs * (block + n) // n_blocks for n in (0, 1))
    total = np.zeros((end - first, plan.settings.size))
    n_uses = np.zeros(end - first)
    unused = np.zeros((end - first, plan.settings.size), np.float32)
    for (file,), uses_file in zip(moment.inputs, moment.uses, strict=True):
        rows = storage.read_array(file, mmap=True)[first:end]
        uses = storage.read_array(uses_file, mmap=True)[first:end]
        total += uses[:, None] * rows.astype(np.float64)
        n_uses += uses
        unused = rows  # a row that no worker used is the same in all copies
    mean = (total / np.maximum(n_uses, 1)[:, None]).astype(np.float32)
    name = storage.join(plan.folder, f"merged-{moment.number}-{block}-{attempt}.npy")
    storage.write_array(name, np.where(n_uses[:, None] > 0, mean, unused))
    return name


def write_documents(
    batches: Iterable[pa.RecordBatch], folder: str, block: int, attempt: int
) -> str:
    """Write the documents of one block, sorted by id; return the name of their files."""
    parts = [pa.Table.from_batches([batch]) for batch in batches]
    rows = pa.concat_tables(parts) if parts else DOCUMENTS_ARROW.empty_table()
    rows = rows.sort_by("document_id").combine_chunks()
    lists = rows.column("words").combine_chunks() if rows.num_rows else None
    words = np.zeros(0, np.int32) if lists is None else lists.flatten().to_numpy()
    lengths = np.zeros(0, np.int64) if lists is None else lists.value_lengths().to_numpy()
    name = storage.join(folder, f"documents-{block}-{attempt}")
    storage.write_array(f"{name}-ids.npy", rows.column("document_id").to_numpy().astype(np.int64))
    storage.write_array(f"{name}-start.npy", np.concatenate([[0], np.cumsum(lengths)]))
    storage.write_array(f"{name}-words.npy", words.astype(np.int32))
    return name


DOCUMENTS_ARROW = pa.schema([("document_id", pa.int64()), ("words", pa.list_(pa.int32()))])


def _write_documents(documents: DataFrame, folder: str, n_blocks: int) -> tuple[str, ...]:
    def write(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        attempt = TaskContext.get()
        assert attempt is not None
        block = attempt.partitionId()
        name = write_documents(batches, folder, block, attempt.taskAttemptId())
        yield pa.RecordBatch.from_arrays(
            [pa.array([block], pa.int32()), pa.array([name])], names=["block", "name"]
        )

    written = (
        documents.select(*DOCUMENTS.names)
        .repartition(n_blocks, "document_id")
        .mapInArrow(write, schema.columns(block=schema.INT, name=schema.STRING))
        .toArrow()
        .sort_by("block")
    )
    return tuple(written.column("name").to_pylist())


def _read_documents(name: str) -> tuple[Array, Array, Array]:
    ids, start, words = (
        storage.read_array(f"{name}-{what}.npy") for what in ("ids", "start", "words")
    )
    return ids, start, words


def _after(moment: Moment, results: list[StepResult]) -> Moment:
    """Return `moment` with the files that its step wrote."""
    vectors, outputs = list(moment.vectors), list(moment.outputs)
    inputs, uses = list(moment.inputs), list(moment.uses)
    for result in results:
        vectors[result.block], outputs[result.output_block] = result.vectors, result.outputs
        inputs[result.block], uses[result.block] = result.inputs, result.uses
    return replace(
        moment,
        vectors=tuple(vectors),
        outputs=tuple(outputs),
        inputs=tuple(inputs),
        uses=tuple(uses),
    )


def _moved_on(before: Moment, after: Moment) -> Moment:
    """Return `after`; remove the files that only `before` names."""
    for file in _files(before) - _files(after) - {""}:
        storage.remove(file)
    return after


def _files(moment: Moment) -> set[str]:
    inputs = {file for files in moment.inputs for file in files}
    return {*moment.vectors, *moment.outputs, *inputs, *moment.uses}


def _check_vectors(results: list[StepResult], moment: Moment, settings: Paragraphs) -> None:
    for result in results:
        if not result.largest <= EXPLODED:
            raise DivergedError(
                f"paragraph vectors: epoch {moment.epoch + 1}, step {moment.number + 1}: a vector has "
                f"a component of {result.largest:.3g}; lower learning_rate "
                f"(now {settings.learning_rate})"
            )


def _array(file: str, first: Callable[[], Array]) -> Array:
    return storage.read_array(file) if file else first()


def _inputs_of(plan: Plan, files: tuple[str, ...]) -> Array:
    if files:
        return np.concatenate([storage.read_array(file) for file in files])
    ids = np.arange(plan.n_inputs, dtype=np.int64) + _FIRST_INPUT
    return start_vectors(ids, plan.settings.size, plan.settings.seed)


def _order(ids: Array, settings: Paragraphs, moment: Moment) -> Array:
    """Return the documents of this rotation, in the random order of this epoch."""
    keys = kernels.document_keys(ids, settings.seed, moment.epoch)
    is_of_rotation = (keys >> np.uint64(48)) % np.uint64(settings.n_rotations) == moment.rotation
    documents = np.flatnonzero(is_of_rotation)
    return documents[np.argsort(keys[documents], kind="stable")]


def _rates(settings: Paragraphs, number: int) -> tuple[float, float]:
    n_steps = settings.epochs * settings.n_rotations * settings.n_blocks
    decrease = settings.learning_rate - settings.min_learning_rate
    return (
        settings.learning_rate - decrease * number / n_steps,
        settings.learning_rate - decrease * (number + 1) / n_steps,
    )


def _run_step(shared: Any, moment: Moment, block: int) -> StepResult:
    attempt = TaskContext.get()
    return step(shared.value, moment, block, attempt.taskAttemptId() if attempt else 0)


def _run_merge(shared: Any, moment: Moment, block: int) -> str:
    attempt = TaskContext.get()
    return merge(shared.value, moment, block, attempt.taskAttemptId() if attempt else 0)
