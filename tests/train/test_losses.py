"""Losses against the papers' equations, written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recspark.train.losses import bpr, softmax_nll, squared_over_all

pytestmark = pytest.mark.torch
RNG = np.random.default_rng(3)


def test_bpr_is_the_log_of_winning() -> None:
    target, others = RNG.normal(size=4), RNG.normal(size=(4, 3))
    want = [
        np.mean([-np.log(1 / (1 + np.exp(-(t - o)))) for o in row])
        for t, row in zip(target, others)
    ]
    found = bpr(torch.from_numpy(target), torch.from_numpy(others))
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-12)


def test_log_q_takes_the_sampling_out_of_a_softmax() -> None:
    scores, q = RNG.normal(size=(2, 5)), RNG.random(5)
    corrected = np.exp(scores) / q
    want = -np.log(corrected[[0, 1], [3, 0]] / corrected.sum(axis=1))
    found = softmax_nll(torch.from_numpy(scores), torch.tensor([3, 0]), torch.from_numpy(np.log(q)))
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
