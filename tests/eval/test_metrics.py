"""Each metric against an independent oracle, on any list."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recspark.eval.metrics import LIST_METRICS, TRUTH_METRICS, Block, Catalogue

N_ITEMS = 9
ITEMS = st.integers(0, N_ITEMS + 2)  # the last three are in no catalogue
LISTS = st.lists(ITEMS, max_size=7, unique=True)
TRUTHS = st.sets(ITEMS.filter(lambda item: item < N_ITEMS), min_size=1)
COUNTS = st.lists(st.integers(1, 5), min_size=N_ITEMS, max_size=N_ITEMS)  # few values: many ties


def vectors() -> np.ndarray:
    drawn = np.random.default_rng(5).normal(size=(N_ITEMS, 4))
    drawn[3] = 0  # no direction
    length = np.linalg.norm(drawn, axis=1, keepdims=True)
    return (drawn / np.maximum(length, 1e-9)).astype(np.float32)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(LISTS, TRUTHS), min_size=1, max_size=5), COUNTS, st.integers(1, 9))
@example([([], {0})], [1] * N_ITEMS, 3)
@example([([N_ITEMS, 0], {0})], [1] * N_ITEMS, 1)
def test_every_metric_equals_the_oracle(
    oracle: SimpleNamespace, rows: list[tuple[list[int], set[int]]], counts: list[int], k: int
) -> None:
    unit = vectors()
    catalogue = Catalogue(np.arange(N_ITEMS, dtype=np.int32), np.array(counts), unit)
    block = Block.of([listed for listed, _ in rows], [truth for _, truth in rows], catalogue)
    cosine = lambda a, b: float(unit[a].astype(float) @ unit[b].astype(float))
    expected = [
        oracle.list_figures(listed, truth, k, dict(enumerate(counts)), cosine)
        for listed, truth in rows
    ]
    for name, metric in {**TRUTH_METRICS, **LIST_METRICS}.items():
        want = [np.nan if row[name] is None else row[name] for row in expected]
        np.testing.assert_allclose(metric(block, k), want, atol=1e-12, err_msg=name)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(LISTS, TRUTHS), min_size=2, max_size=6), st.integers(1, 9))
def test_a_list_scores_the_same_alone_and_in_a_block(
    rows: list[tuple[list[int], set[int]]], k: int
) -> None:
    catalogue = Catalogue(np.arange(N_ITEMS, dtype=np.int32), np.arange(1, N_ITEMS + 1), vectors())
    lists, truths = [listed for listed, _ in rows], [truth for _, truth in rows]
    block = Block.of(lists, truths, catalogue)
    room = block.items.shape[1]
    for row in range(len(rows)):
        alone = Block(
            block.items[row : row + 1],
            block.hits[row : row + 1],
            block.n_truth[row : row + 1],
            catalogue,
        )
        assert alone.items.shape == (1, room)
        for metric in (*TRUTH_METRICS.values(), *LIST_METRICS.values()):
            assert metric(alone, k).tobytes() == metric(block, k)[row : row + 1].tobytes()


@pytest.mark.parametrize("name", TRUTH_METRICS)
def test_a_perfect_list_scores_one_where_it_can(name: str) -> None:
    catalogue = Catalogue(np.arange(N_ITEMS, dtype=np.int32), np.ones(N_ITEMS))
    block = Block.of([[0, 1, 2]], [{0, 1, 2, 3, 4}], catalogue)
    best = {"recall": 3 / 5}
    assert TRUTH_METRICS[name](block, 3)[0] == pytest.approx(best.get(name, 1), abs=1e-15)


def test_diversity_is_not_defined_without_vectors() -> None:
    catalogue = Catalogue(np.arange(N_ITEMS, dtype=np.int32), np.ones(N_ITEMS))
    block = Block.of([[0, 1]], [{0}], catalogue)
    assert np.isnan(LIST_METRICS["intra_list_diversity"](block, 2)).all()
