"""Folding a user in: the training's own objective at its least, whatever rows stand beside it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import minimize

from recspark.data.blocks import Array
from recspark.models.factors.fold_in import Folding, Kind, sample

N_ITEMS, SIZE, REG = 30, 4, 0.7


def planted(seed: int = 3) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(N_ITEMS, SIZE)).astype(np.float32)
    return factors, rng.normal(size=N_ITEMS).astype(np.float32), rng.dirichlet(np.ones(N_ITEMS))


def bags(n: int, seed: int = 5) -> tuple[Array, Array, Array]:
    """`n` rows of 0 to 12 items each, some weighing a thousand times as much as others."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 13, n)
    items = np.concatenate([rng.permutation(N_ITEMS)[:c] for c in counts]).astype(np.int32)
    weights = 10 ** rng.uniform(-2, 1, len(items))
    return np.concatenate([[0], np.cumsum(counts)]), items, weights.astype(np.float32)


def objective(kind: Kind, items: Array, weights: Array) -> Callable[[Array], float]:
    """The training's loss of one user, as `mf.row_loss` writes it, over all items."""
    y, b, q = (array.astype(float) for array in planted())

    def of(u: Array) -> float:
        score = y @ u + b
        if kind == "softmax":
            each = np.log(np.exp(score).sum()) - score[items]
        elif kind == "bpr":
            each = np.log1p(np.exp(score[None, :] - score[items][:, None])) @ q
        else:
            each = (1 - y[items] @ u) ** 2 + (y @ u) ** 2 @ q
        return float(weights @ each + REG / 2 * u @ u)

    return of


@pytest.mark.parametrize("kind", ["softmax", "bpr", "squared"])
def test_a_users_vector_minimises_the_training_s_loss(kind: Kind) -> None:
    start, items, weights = bags(20)
    found = Folding(kind, *planted(), REG)(start, items, weights)
    for row in range(20):
        part = slice(start[row], start[row + 1])
        of = objective(kind, items[part], weights[part].astype(float))
        least = minimize(of, np.zeros(SIZE), method="BFGS", options={"gtol": 1e-9}).fun
        begun = of(np.zeros(SIZE))
        # All but a thousandth of what there is to gain.
        assert of(found[row].astype(float)) - least <= 1e-3 * (begun - least) + 1e-6
    assert (found[np.diff(start) == 0] == 0).all()


@pytest.mark.parametrize("kind", ["softmax", "bpr", "squared"])
def test_a_row_does_not_depend_on_those_beside_it(kind: Kind) -> None:
    start, items, weights = bags(300)
    fold_in = Folding(kind, *planted(), REG)
    whole = fold_in(start, items, weights)
    for row in (0, 7, 255, 256, 299):
        part = slice(start[row], start[row + 1])
        alone = fold_in(np.array([0, part.stop - part.start]), items[part], weights[part])
        np.testing.assert_array_equal(alone[0], whole[row])


def test_a_step_too_long_is_taken_back() -> None:
    """Factors of length 40 make the softmax as good as certain: its curvature at 0 misleads."""
    factors, bias, drawn = planted()
    start, items, weights = bags(20)
    found = Folding("softmax", 20 * factors, 5 * bias, drawn, REG)(start, items, weights)
    assert np.isfinite(found).all()
    scores = 20 * factors.astype(float) @ found.T.astype(float) + 5 * bias[:, None]
    log_sum = np.logaddexp.reduce(scores, axis=0)
    at_0 = np.logaddexp.reduce(5.0 * bias)
    for row in range(20):
        part = slice(start[row], start[row + 1])
        w = weights[part].astype(float)
        value = w @ (log_sum[row] - scores[items[part], row]) + REG / 2 * (found[row] ** 2).sum()
        assert value <= w @ (at_0 - 5.0 * bias[items[part]]) * (1 + 1e-6) + 1e-9


def test_a_sample_sums_as_all_items_do() -> None:
    rng = np.random.default_rng(2)
    share = rng.dirichlet(np.full(5000, 0.3))
    kept, times = sample(share, 500)
    assert len(kept) <= 500
    value = rng.random(5000) * share
    assert times @ value[kept] == pytest.approx(value.sum(), rel=0.1)
