"""One pass of updates against plain numpy in float64, and against slopes of the loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from recspark.data.blocks import Array
from recspark.engines import word2vec_kernels as kernels
from recspark.engines.huffman import huffman

SIZE, N_LIVE, N_FROZEN, N_OUT = 5, 6, 3, 7
KINDS = ("skipgram", "cbow")
LOSSES = ("negative", "hierarchical")


@dataclass
class Problem:
    """A few examples; CBOW ones have up to three inputs, some of them frozen."""

    start: Array
    inputs: Array
    targets: Array
    live: Array
    frozen: Array
    outputs: Array

    def copy(self) -> Problem:
        return Problem(*(part.copy() for part in vars(self).values()))


def problem(kind: str, n: int, seed: int = 1) -> Problem:
    rng = np.random.default_rng(seed)
    lengths = np.ones(n, np.int64) if kind == "skipgram" else rng.integers(1, 4, n)
    start = np.concatenate([[0], np.cumsum(lengths)])
    low = 0 if kind == "skipgram" else -N_FROZEN
    inputs = rng.integers(low, N_LIVE, start[-1]).astype(np.int32)
    inputs[start[:-1]] = rng.integers(0, N_LIVE, n)  # at least one is live
    targets = rng.integers(0, N_OUT, n).astype(np.int32)
    tables = (rng.standard_normal((m, SIZE)).astype(np.float32) for m in (N_LIVE, N_FROZEN, N_OUT))
    return Problem(start, inputs, targets, *tables)


TREE = huffman(np.array([9, 4, 3, 3, 2, 1, 1, 1]))  # 7 inner nodes
HIDDEN_NODE = 3  # lies in another block


def paths() -> tuple[Array, Array, Array]:
    nodes = np.where(TREE.nodes == HIDDEN_NODE, -1, TREE.nodes).astype(np.int32)
    return TREE.start, nodes, TREE.codes


def noise() -> tuple[Array, Array]:
    return kernels.alias_table(np.arange(1.0, N_OUT + 1))


def drawn(p: Problem, n_negatives: int, seed: int) -> list[list[int]]:
    """Return what the kernel draws for each example: its own stream, taken here from numpy."""
    share, other = noise()
    state = int(kernels.key(seed, 0, 0, 3))
    rows = []
    for target in p.targets:
        row = []
        for _ in range(n_negatives):
            state = (state + 0x9E3779B97F4A7C15) % 2**64
            bits = int(kernels.mix(np.uint64(state)))
            slot = ((bits >> 32) * N_OUT) >> 32
            slot = slot if bits % 2**32 < share[slot] else int(other[slot])
            if slot != target:
                row.append(slot)
        rows.append(row)
    return rows


def terms(p: Problem, loss: str, r: int, negatives: list[list[int]]) -> list[tuple[int, float]]:
    """Return (output, label) of example r."""
    if loss == "negative":
        return [(int(p.targets[r]), 1.0), *((o, 0.0) for o in negatives[r])]
    start, nodes, codes = paths()
    path = range(start[p.targets[r]], start[p.targets[r] + 1])
    return [(int(nodes[at]), 1.0 - codes[at]) for at in path if nodes[at] >= 0]


def mean(p: Problem, r: int, live: Array) -> Array:
    mine = p.inputs[p.start[r] : p.start[r + 1]]
    return np.mean([live[i] if i >= 0 else p.frozen[-1 - i] for i in mine], axis=0)


def by_hand(p: Problem, loss: str, rates: Array, negatives: list[list[int]]) -> tuple[Array, Array]:
    """Return (live, outputs) after all examples, in float64, written out from the equations."""
    live, outputs = p.live.astype(float), p.outputs.astype(float)
    for r in range(len(p.targets)):
        mine = p.inputs[p.start[r] : p.start[r + 1]]
        hidden, portion = mean(p, r, live), (mine >= 0).mean()
        old, change = outputs.copy(), np.zeros(SIZE)
        for o, label in terms(p, loss, r, negatives):
            step = rates[r] * (label - 1 / (1 + np.exp(-hidden @ old[o])))
            change += step * outputs[o]
            outputs[o] += step * portion * hidden
        for i in mine[mine >= 0]:
            live[i] += change / len(mine)
    return live, outputs


def run(
    p: Problem, loss: str, first: float, last: float, n_negatives: int = 4
) -> tuple[float, int]:
    if loss == "negative":
        return kernels.train_negative(
            p.start, p.inputs, p.targets, p.live, p.frozen, p.outputs, *noise(),
            n_negatives, first, last, 11,
        )  # fmt: skip
    return kernels.train_hierarchical(
        p.start, p.inputs, p.targets, p.live, p.frozen, p.outputs, *paths(), first, last
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_updates_are_those_of_the_equations(kind: str, loss: str) -> None:
    p = problem(kind, 40)
    rates = 0.2 + (0.1 - 0.2) * np.arange(40) / 40
    live, outputs = by_hand(p, loss, rates, drawn(p, 4, 11))
    before = p.copy()
    run(p, loss, 0.2, 0.1)
    assert np.abs(p.live - before.live).max() > 0.1
    assert np.allclose(p.live, live, atol=1e-5)
    assert np.allclose(p.outputs, outputs, atol=1e-5)
    assert np.array_equal(p.frozen, before.frozen)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_goes_down_the_slope_of_the_loss(kind: str, loss: str) -> None:
    """One example, rate 1: the change is minus the central difference of the loss."""
    seed = next(  # no output drawn twice; all inputs different
        s
        for s in range(100)
        if len(set(d := drawn(problem(kind, 1, s), 2, 11)[0])) == len(d) > 0
        and len(set(problem(kind, 1, s).inputs)) == len(problem(kind, 1, s).inputs)
        and (kind == "skipgram" or len(problem(kind, 1, s).inputs) > 1)
        and (problem(kind, 1, s).inputs >= 0).all()
    )
    p = problem(kind, 1, seed)
    negatives = drawn(p, 2, 11)
    before = p.copy()

    def loss_at(live: Array, outputs: Array) -> float:
        hidden = mean(p, 0, live)
        signs = [(o, 1.0 if label else -1.0) for o, label in terms(p, loss, 0, negatives)]
        return sum(np.log1p(np.exp(-sign * (hidden @ outputs[o]))) for o, sign in signs)

    total, n = run(p, loss, 1.0, 1.0, 2)
    assert n == 1
    tables = [before.live.astype(float), before.outputs.astype(float)]
    assert np.isclose(total, loss_at(*tables), atol=1e-5)
    for table, moved in zip(tables, (p.live - before.live, p.outputs - before.outputs)):
        slope = np.zeros_like(table)
        for at in np.ndindex(table.shape):
            kept = table[at]
            table[at] = kept + 1e-5
            up = loss_at(*tables)
            table[at] = kept - 1e-5
            slope[at] = (up - loss_at(*tables)) / 2e-5
            table[at] = kept
        assert np.abs(slope).max() > 0.01
        assert np.allclose(moved, -slope, atol=1e-4)


@pytest.mark.parametrize("exponent", [1.0, 0.75, -0.5])
def test_draws_follow_popularity_to_the_exponent(exponent: float) -> None:
    """Chi-square of 400,000 draws of 50 items; 49 degrees of freedom, 86.7 is the 99.9 % point."""
    popularity = np.random.default_rng(3).zipf(1.5, 50).clip(1, 10_000).astype(float)
    weights = popularity**exponent
    share, other = kernels.alias_table(weights)
    found = np.bincount(kernels.draw_many(400_000, share, other, 5), minlength=50)
    expected = 400_000 * weights / weights.sum()
    assert ((found - expected) ** 2 / expected).sum() < 86.7


def test_alias_table_is_exact_and_never_draws_what_weighs_nothing() -> None:
    weights = np.array([0.0, 3.0, 1.0, 0.0, 4.0])
    share, other = kernels.alias_table(weights)
    found = np.zeros(5)
    for slot in range(5):
        stay = share[slot] / 2**32
        found[slot] += stay
        found[other[slot]] += 1 - stay
    assert np.allclose(found / 5, weights / 8, atol=1e-8)
    assert found[0] == found[3] == 0


def test_start_vectors_depend_on_seed_and_item_alone() -> None:
    some = kernels.start_vectors(np.array([7, 2, 900]), 16, 1)
    assert np.array_equal(some[1:2], kernels.start_vectors(np.array([2]), 16, 1))
    assert not np.array_equal(some, kernels.start_vectors(np.array([7, 2, 900]), 16, 2))
    many = kernels.start_vectors(np.arange(2000), 16, 1) * 16
    assert np.abs(many).max() <= 0.5
    assert abs(many.mean()) < 0.01
    assert abs(many.var() - 1 / 12) < 0.002
