"""Paragraph vectors: what is planted is found, in any number of blocks; documents are inferred alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession
from scipy import optimize

from recspark import storage
from recspark.data.blocks import Array
from recspark.engines import paragraphs as engine
from recspark.engines.paragraphs import (
    DOCUMENTS_ARROW,
    Moment,
    Paragraphs,
    Plan,
    WordMatrices,
    infer,
)
from recspark.engines.word2vec_cells import deal
from recspark.errors import DivergedError, EmptyDataError

N_TOPICS, N_DOCUMENTS, N_WORDS, LENGTH = 10, 200, 150, 40
SETTINGS = Paragraphs(size=50, subsample=None, epochs=10, learning_rate=0.05, n_blocks=1, seed=3)


def topics(seed: int, n_documents: int = N_DOCUMENTS) -> tuple[Array, Array]:
    """Return (topic of each document, words of each): topic t has the words 30 t to 30 t + 29."""
    rng = np.random.default_rng(seed)
    topic = np.repeat(np.arange(N_TOPICS), n_documents)
    words = topic[:, None] * N_WORDS + rng.integers(0, N_WORDS, (len(topic), LENGTH))
    return topic, words.astype(np.int32)


def ordered(seed: int, n_documents: int, n_units: int = 12) -> tuple[Array, Array]:
    """Return (class, words). The documents of the classes 0 and 1 differ in the order of words only.

    A unit is `u q v f f` in class 0 and `v q u f f` in class 1, with one of four pairs u, v. So every
    word has the same words around it in both. Class 2 has `u y v f f`: it teaches that u before and v
    behind make a y, which is the wrong word in class 0 and is not expected in class 1. The vector of a
    document is added to what the words around say, so without such a class no order would tell it
    anything. Documents begin anywhere in a unit.
    """
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 3, n_documents)
    pair = np.stack([rng.permutation(np.arange(n_units) % 4) for _ in kind])
    is_turned = (kind == 1)[:, None]
    first, last = np.where(is_turned, 4 + pair, pair), np.where(is_turned, pair, 4 + pair)
    middle = np.where((kind == 2)[:, None], 8 + pair, 12)
    gap = np.full_like(pair, 13)
    units = np.stack([first, middle, last, gap, gap], axis=2).reshape(n_documents, -1)
    words = np.stack([np.roll(row, int(rng.integers(0, 5))) for row in units])
    return kind, words.astype(np.int32)


def in_process(words: Array, settings: Paragraphs, folder: Path) -> tuple[WordMatrices, Array]:
    """Run the engine in this process; return it and the documents' vectors as they were trained."""
    ids = np.arange(len(words)) * 7 + 1
    files = []
    for block in range(settings.n_blocks):
        rows = [
            {"document_id": int(i), "words": list(row)}
            for i, row in zip(ids, words.tolist(), strict=True)
            if i % settings.n_blocks == block
        ]
        batch = pa.RecordBatch.from_pylist(rows[::-1], schema=DOCUMENTS_ARROW)
        files.append(engine.write_documents([batch], str(folder), block, 0))
    counts = np.bincount(words.ravel())
    layout = deal(counts.astype(np.float64), settings.n_blocks)
    plan = Plan(settings, str(folder), counts, layout, tuple(files))
    vectors: dict[int, str] = {}

    def run_step(moment: Moment) -> list[engine.StepResult]:
        results = [engine.step(plan, moment, block, 0) for block in range(settings.n_blocks)]
        vectors.update({result.block: result.vectors for result in results})
        return results

    def run_merge(moment: Moment) -> list[str]:
        return [engine.merge(plan, moment, block, 0) for block in range(settings.n_blocks)]

    trained = engine.learn(plan, run_step, run_merge)
    of_documents = np.empty((len(ids), settings.size), np.float32)
    for block, file in vectors.items():
        of_documents[ids % settings.n_blocks == block] = storage.read_array(file)
    return trained, of_documents


def inferred(trained: WordMatrices, trained_on: Array, words: Array, settings: Paragraphs) -> Array:
    start = np.arange(len(words) + 1) * words.shape[1]
    return infer(trained, np.bincount(trained_on.ravel()), settings, start, words.ravel())


def accuracy(vectors: Array, labels: Array, others: Array, labels_of_others: Array) -> float:
    """Return how often the nearest of `others` by cosine (not the vector itself) has its label."""
    unit, unit_others = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (vectors, others))
    close = unit @ unit_others.T
    if vectors is others:
        np.fill_diagonal(close, -np.inf)
    return float((labels_of_others[close.argmax(axis=1)] == labels).mean())


@pytest.mark.parametrize("n_blocks", [1, 3])
@pytest.mark.parametrize("method", ["dbow", "dm_mean"])
def test_topics_of_disjoint_words_are_found(tmp_path: Path, method: str, n_blocks: int) -> None:
    """With a wider window, or fewer words, the words around tell a topic as well as the document."""
    settings = Paragraphs(**{**vars(SETTINGS), "method": method, "n_blocks": n_blocks, "window": 1})
    topic, words = topics(1)
    trained, vectors = in_process(words, settings, tmp_path)
    assert accuracy(vectors, topic, vectors, topic) >= 0.99
    new_topic, new_words = topics(2, 20)
    new = inferred(trained, words, new_words, settings)
    assert accuracy(new, new_topic, vectors, topic) >= 0.97
    mine = inferred(trained, words, words, settings)
    assert accuracy(new, new_topic, mine, topic) >= 0.97


@pytest.mark.parametrize("method", ["dbow", "dm_mean", "dm_concat"])
def test_only_concatenation_knows_the_order_of_words(tmp_path: Path, method: str) -> None:
    settings = Paragraphs(
        **{**vars(SETTINGS), "method": method, "window": 1, "size": 8, "epochs": 20}
    )
    kind, words = ordered(1, 600)
    trained, _ = in_process(words, settings, tmp_path)
    new_kind, new_words = ordered(2, 300)
    known, new = kind < 2, new_kind < 2
    vectors = inferred(trained, words, words[known], settings)
    new_vectors = inferred(trained, words, new_words[new], settings)
    share = accuracy(new_vectors, new_kind[new], vectors, kind[known])
    assert share >= 0.9 if method == "dm_concat" else 0.35 < share < 0.65


@pytest.mark.parametrize("method", ["dbow", "dm_mean"])
def test_an_inferred_vector_is_where_the_expected_steps_cancel(method: str) -> None:
    """Steps of all places of the document, over all draws of negatives; solved by scipy."""
    rng = np.random.default_rng(5)
    n, size = 12, 3
    inputs, outputs = rng.normal(size=(n + 1, size)), rng.normal(size=(n, size))
    uses, words = rng.integers(1, 20, n), np.array([0, 3, 3, 5, 7, 1], np.int32)
    settings = Paragraphs(
        size=size, method=method, window=1, subsample=None, epochs=8000, learning_rate=0.05
    )  # type: ignore[arg-type]
    trained = WordMatrices(
        (inputs if method == "dm_mean" else inputs[:0]).astype(np.float32),
        outputs.astype(np.float32),
    )
    noise = uses**settings.ns_exponent / (uses**settings.ns_exponent).sum()

    def expected_step(vector: Array) -> Array:
        total = np.zeros(size)
        for place, word in enumerate(words):
            around = [words[p] for p in (place - 1, place + 1) if 0 <= p < len(words)]
            around = around if method == "dm_mean" else []
            hidden = (vector + inputs[around].sum(axis=0)) / (1 + len(around))
            sigmoid = 1 / (1 + np.exp(-outputs @ hidden))
            chance = np.where(
                np.arange(n) == word, 0, noise
            )  # a draw of the word itself is skipped
            total += (1 - sigmoid[word]) * outputs[word]
            total -= settings.n_negatives * (chance * sigmoid) @ outputs
        return total

    solved = optimize.root(expected_step, np.zeros(size))
    assert solved.success
    assert np.abs(solved.x).max() > 0.3
    got = infer(trained, uses, settings, np.array([0, len(words)]), words)[0]
    np.testing.assert_allclose(got, solved.x, atol=0.1)


@pytest.mark.parametrize("method", ["dbow", "dm_mean", "dm_concat"])
def test_a_document_is_inferred_alone_and_words_stay(tmp_path: Path, method: str) -> None:
    """The arrays may not be written; a document has its vector whoever is beside."""
    settings = Paragraphs(**{**vars(SETTINGS), "method": method, "epochs": 2, "window": 2})
    _, words = topics(1, 5)
    trained, _ = in_process(words, settings, tmp_path)
    before = trained.inputs.copy(), trained.outputs.copy()
    trained.inputs.setflags(write=False)
    trained.outputs.setflags(write=False)
    together = inferred(trained, words, words, settings)
    alone = [inferred(trained, words, words[i : i + 1], settings)[0] for i in (0, 7, 49)]
    np.testing.assert_array_equal(together[[0, 7, 49]], alone)
    np.testing.assert_array_equal(trained.inputs, before[0])
    np.testing.assert_array_equal(trained.outputs, before[1])


def test_a_step_that_is_run_again_gives_the_same_bits(tmp_path: Path) -> None:
    _, words = topics(1, 5)
    settings = Paragraphs(**{**vars(SETTINGS), "method": "dm_mean", "epochs": 2, "n_blocks": 2})
    (tmp_path / "again").mkdir()
    first, second = (in_process(words, settings, f) for f in (tmp_path, tmp_path / "again"))
    np.testing.assert_array_equal(first[0].inputs, second[0].inputs)
    np.testing.assert_array_equal(first[0].outputs, second[0].outputs)
    np.testing.assert_array_equal(first[1], second[1])


def test_no_file_is_left_behind_but_the_last(tmp_path: Path) -> None:
    _, words = topics(1, 5)
    settings = Paragraphs(**{**vars(SETTINGS), "method": "dm_mean", "epochs": 3, "n_blocks": 2})
    in_process(words, settings, tmp_path)
    kinds = [file.name.split("-")[0] for file in tmp_path.iterdir()]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "documents": 6, "vectors": 2, "outputs": 2, "merged": 2
    }  # fmt: skip


def test_a_rate_that_is_too_high_is_named(tmp_path: Path) -> None:
    _, words = topics(1, 5)
    with pytest.raises(DivergedError, match="lower learning_rate"):
        in_process(words, Paragraphs(**{**vars(SETTINGS), "learning_rate": 1e5}), tmp_path)


@pytest.mark.spark
def test_on_spark_partitions_change_nothing(spark: SparkSession) -> None:
    _, words = topics(1, 8)
    rows = [(int(i), [int(w) for w in row]) for i, row in enumerate(words)]
    settings = Paragraphs(**{**vars(SETTINGS), "method": "dm_mean", "epochs": 2, "n_blocks": 2})
    counts = np.bincount(words.ravel())
    results = []
    for order, n_partitions in ((rows, 1), (rows[::-1], 3)):
        documents = spark.createDataFrame(order, engine.DOCUMENTS).repartition(n_partitions)
        results.append(engine.train_paragraphs(documents, counts, settings))
    np.testing.assert_array_equal(results[0].inputs, results[1].inputs)
    np.testing.assert_array_equal(results[0].outputs, results[1].outputs)
    with pytest.raises(EmptyDataError, match="no word is left"):
        engine.train_paragraphs(documents, np.zeros(0, np.int64), settings)
