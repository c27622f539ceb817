"""AutoRec against equation 2 of Sedhain et al. 2015, in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recspark.models.autorec import LAYERS, AutoRecSettings, make_net, row_loss
from recspark.models.encoder import encode
from recspark.train.feed import Batch

pytestmark = pytest.mark.torch
VOCABULARY = np.array([3, 5, 8, 13])
RATED = {0: {3: 5.0, 8: 1.0}, 1: {5: 3.0, 13: 4.0, 8: 2.0}}  # 99 is in no vocabulary


def batch() -> Batch:
    items = torch.tensor([[3, 8, -1], [5, 8, 13], [99, -1, -1]])
    weights = torch.tensor([[5.0, 1, 0], [3, 2, 4], [1, 0, 0]])
    return Batch({"items": items, "weights": weights}, torch.ones(3))


def test_only_what_was_rated_counts() -> None:
    net = make_net(AutoRecSettings(hidden_size=3), 4, seed=1)
    with torch.no_grad():
        for bias in (net.items_in_bias, net.items_out_bias):
            bias += torch.linspace(-1, 1, len(bias))
    v, mu, w, b = (p.detach().numpy().astype(float) for p in net.parameters())
    want = np.zeros(3)
    for row, rated in RATED.items():
        r = np.array([rated.get(item, 0.0) for item in VOCABULARY])
        rebuilt = w @ (1 / (1 + np.exp(-(r @ v + mu)))) + b
        want[row] = ((r - rebuilt)[r > 0] ** 2).sum()
    found = row_loss(net, torch.from_numpy(VOCABULARY), 0.0, batch())
    np.testing.assert_allclose(found.detach().numpy(), want, rtol=1e-5)
    # With a weight for the rest, their squared outputs count too.
    more = row_loss(net, torch.from_numpy(VOCABULARY), 0.5, batch()).detach().numpy()
    assert (more > found.detach().numpy()).all()


def test_scoring_is_the_network() -> None:
    net = make_net(AutoRecSettings(hidden_size=7), 4, seed=2)
    arrays = {name: p.detach().numpy() for name, p in net.named_parameters()}
    start, items = np.array([0, 2, 2, 5]), np.array([0, 2, 1, 2, 3], np.int32)
    weights = np.float32([5, 1, 3, 2, 4])
    rows = torch.tensor([0, 0, 2, 2, 2])
    with torch.no_grad():
        want = net(rows, torch.from_numpy(items).long(), torch.from_numpy(weights), 3)
    found = encode(start, items, weights, arrays, LAYERS, unit=False)
    np.testing.assert_allclose(found, want.numpy(), atol=1e-6)
