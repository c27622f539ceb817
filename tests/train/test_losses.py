"""Losses and candidates against the papers' equations, written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recspark.train.losses import bpr, bpr_max, gbce, gbce_power, softmax_nll, squared_over_all
from recspark.train.negatives import Negatives

pytestmark = pytest.mark.torch
RNG = np.random.default_rng(3)
SCORES = np.array([[0.5, -1.0, 2.0, 0.0], [1.0, 1.0, -2.0, 3.0]])
TARGETS = np.array([2, 0])


def test_bpr_is_the_log_of_winning() -> None:
    target, others = RNG.normal(size=4), RNG.normal(size=(4, 3))
    want = [
        np.mean([-np.log(1 / (1 + np.exp(-(t - o)))) for o in row])
        for t, row in zip(target, others)
    ]
    found = bpr(torch.from_numpy(target), torch.from_numpy(others))
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-12)


@pytest.mark.parametrize("unobserved", [0.0, 0.1, 1.0])
def test_squares_over_all_items_are_those_of_the_dense_matrix(unobserved: float) -> None:
    hidden, items, bias = RNG.normal(size=(3, 4)), RNG.normal(size=(6, 4)), RNG.normal(size=6)
    rows, at = np.array([0, 0, 2]), np.array([1, 5, 3])
    values = np.array([2.0, 0.5, 4.0])
    dense = hidden @ items.T + bias
    want = unobserved * (dense**2).sum(axis=1)
    for row, item, value in zip(rows, at, values):
        want[row] += (value - dense[row, item]) ** 2 - unobserved * dense[row, item] ** 2
    tensors = [torch.from_numpy(a) for a in (hidden, items, bias)]
    found = squared_over_all(
        *tensors,
        torch.from_numpy(dense[rows, at]),
        torch.from_numpy(values),
        torch.from_numpy(rows),
        unobserved,
    )
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-12, atol=1e-12)


def test_softmax_nll_is_the_softmax_of_corrected_scores() -> None:
    """Jean et al. 2015: exp(s_y - log Q(y)) over the sum of the same of all candidates."""
    log_included = np.log([0.9, 0.1, 0.5, 0.25])
    for correction in (log_included, np.zeros(4)):
        want = []
        for scores, target in zip(SCORES, TARGETS, strict=True):
            terms = np.exp(scores) / np.exp(correction)
            want.append(-np.log(terms[target] / terms.sum()))
        found = softmax_nll(*map(torch.from_numpy, (SCORES, TARGETS, correction)))
        np.testing.assert_allclose(found.numpy(), want, rtol=1e-12)


def test_bpr_max_by_hand() -> None:
    """Hidasi & Karatzoglou 2018: s is the softmax of the negatives alone, the target left out."""
    want = []
    for scores, target in zip(SCORES, TARGETS, strict=True):
        negatives = np.delete(scores, target)
        s = np.exp(negatives) / np.exp(negatives).sum()
        wins = 1 / (1 + np.exp(-(scores[target] - negatives)))
        want.append(-np.log((s * wins).sum()) + 0.7 * (s * negatives**2).sum())
    found = bpr_max(torch.from_numpy(SCORES), torch.from_numpy(TARGETS), 0.7)
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-12)


def test_bpr_max_of_one_candidate_is_nothing() -> None:
    scores = torch.ones(2, 1, requires_grad=True)
    found = bpr_max(scores, torch.zeros(2, dtype=torch.int64), 0.7)
    found.sum().backward()
    assert found.tolist() == [0, 0]
    assert scores.grad is not None
    assert scores.grad.tolist() == [[0], [0]]


def test_bpr_max_gradient_flows_through_the_softmax() -> None:
    """The derivative by finite differences: the softmax weights are not constants."""
    scores = torch.from_numpy(SCORES).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: bpr_max(s, torch.from_numpy(TARGETS), 0.7), scores)


def test_gbce_by_hand() -> None:
    """Petrov & Macdonald 2023: -log(sigmoid(r_i)^beta prod_j (1 - sigmoid(r_j)))."""
    counted = np.array([[True, True, False, True], [False, True, True, True]])
    target = SCORES[np.arange(2), TARGETS]
    want = []
    for r, others, kept in zip(target, SCORES, counted, strict=True):
        wins = 1 / (1 + np.exp(-r))
        losses = 1 - 1 / (1 + np.exp(-others[kept]))
        want.append(-np.log(wins**0.3 * losses.prod()))
    found = gbce(*map(torch.from_numpy, (target, SCORES, counted)), 0.3)
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-12)


def test_calibrated_gbce_is_least_where_scores_are_probabilities() -> None:
    """An item is the target with probability p, else drawn with probability a: at t = 1 sigmoid(r) = p."""
    p, a = 0.3, 0.05
    power = gbce_power(5, 101, 1.0)
    assert power == pytest.approx(a)
    score = torch.tensor([np.log(p / (1 - p))], requires_grad=True)
    nobody, none = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.bool)
    as_target = gbce(score, nobody, none, power)
    sure = torch.full((1,), 40.0, dtype=torch.float64)  # costs nothing as a target
    as_drawn = gbce(sure, score[:, None], ~none, power)
    (p * as_target + (1 - p) * a * as_drawn).sum().backward()
    assert score.grad is not None
    assert score.grad.item() == pytest.approx(0, abs=1e-9)
    assert gbce_power(5, 101, 0) == 1


def test_candidates_are_the_targets_and_what_was_drawn() -> None:
    counts = torch.tensor([50.0, 0.0, 30.0, 15.0, 5.0])
    negatives = Negatives(counts, 2, 0.5)
    targets = torch.tensor([4, 2, 4])
    share = (counts + 0.2).numpy() / (counts + 0.2).sum().item()
    draw = np.sqrt(share) / np.sqrt(share).sum()
    included = 1 - (1 - draw) ** 2 * (1 - share) ** 3
    generator = torch.Generator().manual_seed(0)
    seen = np.zeros(5)
    for _ in range(4000):
        found = negatives.candidates(targets, generator)
        items = found.items.numpy()
        assert (np.diff(items) > 0).all()
        np.testing.assert_array_equal(items[found.targets.numpy()], [4, 2, 4])
        np.testing.assert_allclose(found.log_included.numpy(), np.log(included[items]), rtol=1e-5)
        seen[items] += 1
    np.testing.assert_array_equal(seen[[2, 4]], 4000)
    others = [0, 1, 3]  # these only by a draw: 1 - (1 - q)^2
    np.testing.assert_allclose(seen[others] / 4000, (1 - (1 - draw) ** 2)[others], atol=0.03)


def test_all_items_are_candidates_without_a_number_of_samples() -> None:
    found = Negatives(torch.ones(4), None, 0.5).candidates(torch.tensor([3, 1]), torch.Generator())
    assert found.items.tolist() == [0, 1, 2, 3]
    assert found.targets.tolist() == [3, 1]
    assert found.log_included.tolist() == [0, 0, 0, 0]
