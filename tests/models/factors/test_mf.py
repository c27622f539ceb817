"""Matrix factorisation: its losses in numpy, what a step moves, and users folded in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from recspark.models.factors import mf
from recspark.models.factors.mf import MfModel, MfSettings, make_net, row_loss, train_rank
from recspark.models.neural import Job
from recspark.nets.mf import MfNet
from recspark.testing import synth
from recspark.train.feed import Batch, plan_shards
from recspark.train.launch import LocalLauncher
from recspark.train.loop import LoopOptions, load_table

pytestmark = pytest.mark.torch
VOCABULARY, USERS = torch.tensor([3, 5, 8, 13]), torch.tensor([70, 1 << 40, (1 << 40) + 1])
SHARE = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4]))


def batch() -> Batch:
    return Batch(
        {
            "user_idx": torch.tensor([(1 << 40) + 1, 70]),
            "items": torch.tensor([[3, 8, -1], [13, -1, -1]]),
            "weights": torch.tensor([[2.0, 0.5, 0], [1, 0, 0]]),
        },
        torch.ones(2),
    )


def planted(settings: MfSettings) -> MfNet:
    net = make_net(settings, 3, 4, seed=1)
    with torch.no_grad():
        net.users *= 10
        net.items *= 10
        net.items_bias += torch.tensor([[0.5], [-1.0], [0.2], [0.0]])
        net.items_share += SHARE[:, None]
    return net


@pytest.mark.parametrize("kind", ["softmax", "bpr", "squared"])
def test_the_loss_of_every_event_against_drawn_items(kind: str) -> None:
    settings = MfSettings(embedding_size=3, loss=kind, n_negatives=3)
    net = planted(settings)
    found = row_loss(
        net, USERS, VOCABULARY, settings, batch(), torch.Generator().manual_seed(4), 0.0
    )
    x, y = (t.detach().numpy().astype(float) for t in (net.users, net.items))
    b = (net.items_bias + SHARE[:, None]).detach().numpy().astype(float)[:, 0]
    q = np.exp(0.75 * SHARE.numpy().astype(float))
    q /= q.sum()
    drawn = torch.multinomial(
        torch.from_numpy(q).float(), 3, replacement=True, generator=torch.Generator().manual_seed(4)
    ).numpy()

    def loss(user: int, item: int) -> float:
        ranks = kind != "squared"  # biases are of scores that rank
        mine, others = x[user] @ y[item] + ranks * b[item], x[user] @ y[drawn].T + ranks * b[drawn]
        if kind == "squared":
            return float((1 - mine) ** 2 + (others**2).mean())
        if kind == "bpr":
            return float(np.mean(-np.log(1 / (1 + np.exp(others - mine)))))
        top = np.exp(mine) / q[item]
        return float(-np.log(top / (top + (np.exp(others) / q[drawn]).sum())))

    want = [2 * loss(2, 0) + 0.5 * loss(2, 2), loss(0, 3)]
    np.testing.assert_allclose(found.detach().numpy(), want, rtol=1e-5)
    found.sum().backward()
    items = {0, 2, 3, *drawn.tolist()}
    tables = [(net.users, {0, 2}), (net.items, items)]
    for table, rows in tables if kind == "squared" else [*tables, (net.items_bias, items)]:
        assert table.grad is not None
        assert table.grad.is_sparse
        assert set(table.grad.coalesce().indices()[0].tolist()) == rows


def test_a_small_catalogue_is_told_apart_as_a_whole() -> None:
    settings = MfSettings(embedding_size=3, n_negatives=4)
    net = planted(settings)
    found = row_loss(net, USERS, VOCABULARY, settings, batch(), torch.Generator(), 0.0)
    scores = net.users @ net.items.T + net.items_bias[:, 0] + SHARE
    lost = -torch.log_softmax(scores, dim=1)
    want = torch.stack([2 * lost[2, 0] + 0.5 * lost[2, 2], lost[0, 3]])
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("kind", ["softmax", "bpr"])
def test_folded_in_a_user_ranks_as_well_as_by_the_vector_of_the_training(
    kind: Any, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, held = synth.tastes()
    training = synth.write_training(events, f"{tmp_path}/rows", "training_bags")
    settings = MfSettings(
        loss=kind,
        embedding_size=8,
        batch_size=50,
        half_life_days=None,
        n_negatives=50,
        weight_decay=0.02,
    )
    nets: list[MfNet] = []

    def kept(*of: Any) -> MfNet:
        nets.append(make_net(*of))
        return nets[0]

    monkeypatch.setattr(mf, "make_net", kept)
    loop = LoopOptions(epochs=40, learning_rate=0.05, weight_decay=settings.weight_decay)
    items = np.arange(held.shape[1], dtype=np.int32)
    job = Job(settings, items, plan_shards(training, 1), None, loop)
    trained = LocalLauncher(1).run(train_rank, job)[0].value
    model = MfModel(settings, synth.CUTOFF, items, mf.scoring_arrays(trained, settings))
    own = nets[0].users.detach().numpy() @ model.arrays()["factors"].T + model.arrays()["bias"]
    by_training = synth.ndcg(own, events, held)
    assert by_training > 1.2 * synth.ndcg(
        np.tile(model.arrays()["bias"], (len(own), 1)), events, held
    )
    assert synth.ndcg(synth.scores(model, events), events, held) > by_training - 0.01


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
        assert trained.weights is None or "users" not in trained.weights
        found.append(load_table(trained, "items"))
    assert found[0].shape == (len(items), 4)
    np.testing.assert_array_equal(found[0], found[1])
