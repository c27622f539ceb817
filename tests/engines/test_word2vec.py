"""The engine as a whole: what it learns does not depend on blocks, partitions or lost tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from recspark.data.blocks import Array
from recspark.engines import word2vec as engine
from recspark.engines import word2vec_cells as cells
from recspark.engines import word2vec_step as steps
from recspark.engines.word2vec import Vectors, train_vectors
from recspark.engines.word2vec_examples import SENTENCES, Sentences, count
from recspark.engines.word2vec_step import Moment, Plan, StepResult, Word2Vec
from recspark.errors import DivergedError, EmptyDataError, ModelError

N_GROUPS, N_ITEMS = 4, 48
SETTINGS = Word2Vec(size=16, epochs=6, learning_rate=0.05, n_negatives=5, n_blocks=2, n_rotations=2)


def clusters(n: int = 1500, seed: int = 1) -> list[list[int]]:
    """Return sentences, each of items of one group: item i belongs to group i % 4."""
    rng = np.random.default_rng(seed)
    return [
        (rng.choice(N_ITEMS // N_GROUPS, rng.integers(3, 7), replace=False) * N_GROUPS + g).tolist()
        for g in rng.integers(0, N_GROUPS, n)
    ]


def purity(vectors: Array) -> float:
    """Return the share of the 11 nearest items by cosine that are of the item's own group."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    close = unit @ unit.T
    np.fill_diagonal(close, -np.inf)
    near = np.argsort(-close, axis=1)[:, :11]
    return float((near % N_GROUPS == np.arange(N_ITEMS)[:, None] % N_GROUPS).mean())


def in_process(
    lists: list[list[int]],
    settings: Word2Vec,
    folder: Path | str,
    step: Callable[[Plan, Moment, int, int], StepResult] = steps.step,
) -> tuple[Array, Array]:
    """Run the engine in this process, as Spark would run it."""
    start = np.concatenate([[0], np.cumsum([len(items) for items in lists])])
    items = np.array([i for one in lists for i in one], np.int32)
    sentences = Sentences(np.arange(len(lists)), start, items)
    plan = engine.plan(count(sentences, np.ones(N_ITEMS, bool)), settings, str(folder))

    def write_epoch(epoch: int) -> list[tuple[str, ...]]:
        parts: dict[int, list[bytes]] = {}
        for cell, data in cells.split(plan, sentences, epoch):
            parts.setdefault(cell, []).append(data)
        written = [(cell, cells.merge(plan, cell, parts[cell], epoch, 0)) for cell in parts]
        return cells.by_rotation(written, settings)

    def run_step(moment: Moment) -> list[StepResult]:
        return [step(plan, moment, block, 0) for block in range(settings.n_blocks)]

    return engine.learn(plan, write_epoch, run_step)


@pytest.mark.parametrize("n_blocks", [1, 4, 16])
@pytest.mark.parametrize("architecture", ["skipgram", "cbow"])
@pytest.mark.parametrize("loss", ["negative", "hierarchical"])
def test_planted_clusters_are_found_with_any_number_of_blocks(
    architecture: str, loss: str, n_blocks: int, tmp_path: Path
) -> None:
    settings = replace(
        SETTINGS, architecture=architecture, loss=loss, n_blocks=n_blocks, epochs=2,
        learning_rate=0.1, n_rotations=1 if n_blocks == 16 else 2,
    )  # fmt: skip
    inputs, _ = in_process(clusters(), settings, tmp_path)
    assert purity(inputs) > 0.9
    assert list(tmp_path.rglob("examples-*")) == []
    assert len(list(tmp_path.iterdir())) == 2 * n_blocks  # nothing but the last vectors


def test_clusters_are_not_there_before_training(tmp_path: Path) -> None:
    inputs, _ = in_process(clusters(), replace(SETTINGS, epochs=1, learning_rate=1e-6), tmp_path)
    assert purity(inputs) < 0.4


@pytest.mark.parametrize("architecture", ["skipgram", "cbow"])
def test_a_task_done_again_gives_the_same_bits(architecture: str, tmp_path: Path) -> None:
    """A lost task may have written some of its files; its second attempt runs on the same input."""
    settings = replace(SETTINGS, architecture=architecture, n_blocks=3, epochs=2)

    def lose(plan: Plan, moment: Moment, block: int, attempt: int) -> StepResult:
        if (moment.number + block) % 3 == 0:
            first = steps.step(plan, moment, block, attempt)
            for name in (first.inputs, first.outputs):
                Path(name).write_bytes(b"torn")
            attempt += 100
        return steps.step(plan, moment, block, attempt)

    plain = in_process(clusters(200), settings, tmp_path / "plain")
    again = in_process(clusters(200), settings, tmp_path / "lost", lose)
    assert np.array_equal(plain[0], again[0])
    assert np.array_equal(plain[1], again[1])


@pytest.mark.parametrize("architecture", ["skipgram", "cbow"])
def test_an_attempt_that_is_late_touches_no_file_that_counts(
    architecture: str, tmp_path: Path
) -> None:
    """Speculation, or a task of an executor that was given up: it writes after the other's answer
    was taken, and is killed half-way.
    """
    settings = replace(SETTINGS, architecture=architecture, n_blocks=3, epochs=2)
    late: list[str] = []

    def twice(plan: Plan, moment: Moment, block: int, attempt: int) -> StepResult:
        taken = steps.step(plan, moment, block, attempt)
        zombie = steps.step(plan, moment, block, attempt + 100)
        for name in {zombie.inputs, zombie.outputs} - {*moment.inputs, *moment.outputs}:
            Path(name).write_bytes(b"torn")
            late.append(name)
        return taken

    plain = in_process(clusters(200), settings, tmp_path / "plain")
    again = in_process(clusters(200), settings, tmp_path / "late", twice)
    assert len(late) == 2 * 2 * 2 * 3 * 3  # files, epochs, rotations, blocks, steps
    assert np.array_equal(plain[0], again[0])
    assert np.array_equal(plain[1], again[1])


@pytest.mark.parametrize("architecture", ["skipgram", "cbow"])
def test_cells_of_an_attempt_that_is_late_are_files_of_their_own(
    architecture: str, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, architecture=architecture, n_blocks=2)
    sentences = Sentences(np.arange(1), np.array([0, 3]), np.array([0, 4, 8], np.int32))
    plan = engine.plan(count(sentences, np.ones(N_ITEMS, bool)), settings, str(tmp_path))
    parts: dict[int, list[bytes]] = {}
    for cell, data in cells.split(plan, sentences, 0):
        parts.setdefault(cell, []).append(data)
    cell = next(iter(parts))
    first, second = (cells.merge(plan, cell, parts[cell], 0, attempt) for attempt in (0, 1))
    assert first != second
    assert Path(first).read_bytes() == Path(second).read_bytes()


def test_inputs_of_other_blocks_stand_still_where_they_were(tmp_path: Path) -> None:
    """Each input is found again by value: in the block's own rows, or among the frozen ones."""
    settings = replace(SETTINGS, n_blocks=3)
    plan = engine.plan(np.arange(N_ITEMS, 0, -1), settings, str(tmp_path))
    table = np.random.default_rng(1).standard_normal((N_ITEMS, 16)).astype(np.float32)
    start = steps.kernels.start_vectors(np.arange(N_ITEMS), 16, settings.seed)
    names = []
    for block in range(3):
        names.append(str(tmp_path / f"{block}.npy") if block != 2 else "")  # one is not yet written
        if names[-1]:
            np.save(names[-1], table[plan.inputs.members(block)])
        else:
            table[plan.inputs.members(block)] = start[plan.inputs.members(block)]
    moment = Moment(0, 0, 0, ("", "", ""), tuple(names), ("", "", ""))
    items = np.array([5, 0, 7, 5, 40, 13, 1, 2], np.int32)
    inputs, frozen = steps._localise(plan, moment, 1, items)
    mine = plan.inputs.block[items] == 1
    assert 0 < mine.sum() < len(items)
    assert ((inputs >= 0) == mine).all()
    live = table[plan.inputs.members(1)]
    found = [live[i] if i >= 0 else frozen[-1 - i] for i in inputs]
    assert np.array_equal(found, table[items])


@pytest.mark.parametrize("architecture", ["skipgram", "cbow"])
def test_vectors_may_pass_through_a_store_that_is_no_folder(
    architecture: str, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, architecture=architecture, epochs=1)
    here = in_process(clusters(100), settings, tmp_path)
    there = in_process(clusters(100), settings, "memory://word2vec")
    assert np.array_equal(here[0], there[0])
    assert np.array_equal(here[1], there[1])


def test_seeds_differ(tmp_path: Path) -> None:
    one, _ = in_process(clusters(100), SETTINGS, tmp_path / "a")
    other, _ = in_process(clusters(100), replace(SETTINGS, seed=1), tmp_path / "b")
    assert not np.allclose(one, other)


def test_the_learning_rate_falls_linearly_over_all_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = []
    real = steps.kernels.train_negative
    monkeypatch.setattr(
        steps.kernels, "train_negative", lambda *args: (rates.append(args[-3:-1]), real(*args))[1]
    )
    settings = replace(SETTINGS, n_blocks=1, n_rotations=2, epochs=2, learning_rate=0.09)
    in_process(clusters(50), replace(settings, min_learning_rate=0.01), tmp_path)
    assert np.allclose(rates, [(0.09, 0.07), (0.07, 0.05), (0.05, 0.03), (0.03, 0.01)])


@pytest.mark.parametrize("loss", ["negative", "hierarchical"])
def test_a_diverging_rate_stops_the_run(loss: str, tmp_path: Path) -> None:
    settings = replace(SETTINGS, loss=loss, learning_rate=500.0)
    with pytest.raises(DivergedError, match=r"epoch \d, step \d+.*lower learning_rate \(now 500"):
        in_process(clusters(), settings, tmp_path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stops_the_run(bad: float, tmp_path: Path) -> None:
    def spoil(plan: Plan, moment: Moment, block: int, attempt: int) -> StepResult:
        done = steps.step(plan, moment, block, attempt)
        if moment.number == 1:
            vectors = np.load(done.inputs)
            vectors[0, 0] = bad
            np.save(done.inputs, vectors)
        return done

    with pytest.raises(DivergedError, match="step 3: a vector has a component of (nan|inf)"):
        in_process(clusters(), SETTINGS, tmp_path, spoil)


# --- on Spark -------------------------------------------------------------------------------------


def spark_train(
    spark: SparkSession, lists: list[list[int]], settings: Word2Vec, n_partitions: int, order: Array
) -> Vectors:
    rows = pa.table(
        {"sentence_id": pa.array(order), "items": [[3 * i for i in lists[s]] for s in order]}
    )
    frame = spark.createDataFrame(rows.cast(_ARROW), SENTENCES).repartition(n_partitions)
    return train_vectors(frame, np.arange(0, 3 * N_ITEMS, 3, np.int32), settings)


_ARROW = pa.schema([("sentence_id", pa.int64()), ("items", pa.list_(pa.int32()))])


@pytest.mark.spark
def test_partitions_and_order_change_no_bit_and_spark_does_what_one_process_does(
    spark: SparkSession, tmp_path: Path
) -> None:
    lists = clusters(120)
    settings = replace(SETTINGS, epochs=2, subsample=0.05, window=3, shrink_window=True)
    one = spark_train(spark, lists, settings, 1, np.arange(120))
    other = spark_train(spark, lists, settings, 5, np.random.default_rng(1).permutation(120))
    inputs, outputs = in_process(lists, settings, tmp_path)
    for got in (one, other):
        assert np.array_equal(got.inputs, inputs)
        assert got.outputs is not None
        assert np.array_equal(got.outputs, outputs)
    assert np.array_equal(one.counts, other.counts)


@pytest.mark.spark
def test_two_attempts_of_a_task_have_names_of_their_own(
    spark: SparkSession, tmp_path: Path
) -> None:
    """Spark gives each attempt another number; it is part of the names."""
    settings = replace(SETTINGS, n_blocks=1, n_rotations=1)
    sentences = Sentences(np.arange(1), np.array([0, 3]), np.array([0, 4, 8], np.int32))
    plan = engine.plan(count(sentences, np.ones(N_ITEMS, bool)), settings, str(tmp_path))
    parts: dict[int, list[bytes]] = {}
    for cell, data in cells.split(plan, sentences, 0):
        parts.setdefault(cell, []).append(data)
    examples = tuple(cells.merge(plan, cell, parts[cell], 0, 0) for cell in parts)
    moment = Moment(0, 0, 0, examples, ("",), ("",))
    shared = spark.sparkContext.broadcast(plan)
    blocks = spark.sparkContext.parallelize([0, 0], 2)
    done = blocks.map(lambda block: steps.run_step(shared, moment, block)).collect()
    assert len({one.inputs for one in done} | {one.outputs for one in done}) == 4


def test_nothing_to_learn_from_is_named(spark: SparkSession) -> None:
    with pytest.raises(EmptyDataError, match="no sentence has two items"):
        spark_train(spark, [[1], [2], [7]], SETTINGS, 1, np.arange(3))


@pytest.mark.spark
def test_rare_items_get_no_vector(spark: SparkSession) -> None:
    """Item 3 is used twice, its one partner once: below min_count = 2 it has nobody left."""
    lists = [[0, 1], [0, 1], [1, 0, 2], [3, 4], [3]]
    settings = replace(SETTINGS, epochs=1, min_count=2)
    found = spark_train(spark, lists, settings, 1, np.arange(5))
    assert found.counts[:5].tolist() == [3, 3, 0, 0, 0]


def test_workers_elsewhere_need_a_folder() -> None:
    with (
        pytest.raises(ModelError, match="give FitOptions.scratch"),
        engine.run_folder("spark://host:7077", ""),
    ):
        pass
