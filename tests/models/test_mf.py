"""Matrix factorisation: its losses in numpy, and that a step moves only what it reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recspark.models.mf import MfSettings, make_net, row_loss, train_rank
from recspark.models.neural import Job
from recspark.testing import synth
from recspark.train.feed import Batch, plan_shards
from recspark.train.launch import LocalLauncher
from recspark.train.loop import LoopOptions, load_table

pytestmark = pytest.mark.torch
VOCABULARY, USERS = torch.tensor([3, 5, 8, 13]), torch.tensor([70, 1 << 40, (1 << 40) + 1])
LOG_Q = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4]))


def batch() -> Batch:
    return Batch(
        {
            "user_idx": torch.tensor([(1 << 40) + 1, 70]),
            "items": torch.tensor([[3, 8, -1], [13, -1, -1]]),
            "weights": torch.tensor([[2.0, 0.5, 0], [1, 0, 0]]),
        },
        torch.ones(2),
    )


@pytest.mark.parametrize("kind", ["softmax", "bpr", "squared"])
def test_the_loss_of_every_event_against_drawn_items(kind: str) -> None:
    settings = MfSettings(embedding_size=3, loss=kind, n_negatives=5)
    net = make_net(settings, 3, 4, seed=1)
    with torch.no_grad():
        net.users *= 10
        net.items *= 10
    found = row_loss(
        net, USERS, VOCABULARY, LOG_Q, settings, batch(), torch.Generator().manual_seed(4), 0.0
    )
    x, y = (t.detach().numpy().astype(float) for t in (net.users, net.items))
    q = np.exp(LOG_Q.numpy().astype(float))
    drawn = torch.multinomial(
        LOG_Q.exp(), 5, replacement=True, generator=torch.Generator().manual_seed(4)
    ).numpy()

    def loss(user: int, item: int) -> float:
        mine, others = x[user] @ y[item], x[user] @ y[drawn].T
        if kind == "squared":
            return float((1 - mine) ** 2 + (others**2).mean())
        if kind == "bpr":
            return float(np.mean(-np.log(1 / (1 + np.exp(others - mine)))))
        top = np.exp(mine) / q[item]
        return float(-np.log(top / (top + (np.exp(others) / q[drawn]).sum())))

    want = [2 * loss(2, 0) + 0.5 * loss(2, 2), loss(0, 3)]
    np.testing.assert_allclose(found.detach().numpy(), want, rtol=1e-5)
    found.sum().backward()
    for table, rows in ((net.users, {0, 2}), (net.items, {0, 2, 3, *drawn.tolist()})):
        assert table.grad is not None
        assert table.grad.is_sparse
        assert set(table.grad.coalesce().indices()[0].tolist()) == rows


def test_users_stay_with_the_ranks(tmp_path: object) -> None:
    """Both ranks share one table of users; only items come back, the same for a seed."""
    events = synth.power_law(60, 20)
    training = synth.write_training(events, f"{tmp_path}/rows", "training_bags")
    settings = MfSettings(embedding_size=4, batch_size=20, n_negatives=8)
    items = np.unique(events.item_idx).astype(np.int32)
    found = []
    for folder in ("", f"{tmp_path}/checkpoints"):
        loop = LoopOptions(epochs=2, learning_rate=0.01, checkpoints=folder)
        job = Job(settings, items, plan_shards(training, 2), None, loop)
        trained = LocalLauncher(2).run(train_rank, job)[0].value
        assert trained.weights is None or set(trained.weights) == {"items"}
        found.append(load_table(trained, "items"))
    assert found[0].shape == (len(items), 4)
    np.testing.assert_array_equal(found[0], found[1])
