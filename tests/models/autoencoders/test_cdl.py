"""CDL: its closed forms and its network's loss, against the paper's equations in plain numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pyspark.sql import SparkSession

from recspark.data.blocks import Array
from recspark.engines.als import BlockedAls, Plan
from recspark.errors import ConfigError
from recspark.models.autoencoders.cdl import Cdl, CdlSettings, make_net, row_loss
from recspark.models.base import FitOptions
from recspark.testing import synth
from recspark.train.curve import Curve
from recspark.train.feed import Batch
from tests.conftest import ROOT

pytestmark = pytest.mark.torch
SETTINGS = CdlSettings(
    hidden_sizes=(5, 3), corruption=0.4, reg_users=0.3, reg_items=2.0, reg_words=7.0, alpha=1.5,
    unobserved_weight=0.05,
)  # fmt: skip
SHORT = {"hidden_sizes": [4, 3], "sweeps": 1, "epochs": 2, "pretraining_epochs": 1, "n_blocks": 1}
SHIPPED = ROOT / "conf" / "models" / "cdl.yaml"
N_WORDS = 6
TEXTS = np.array([[0.5, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0], [0, 0.25, 0, 1, 0, 0]])


def batch() -> Batch:
    words = torch.tensor([[0, 2, 5], [-1, -1, -1], [1, 3, -1]], dtype=torch.int32)
    weights = torch.tensor([[0.5, 1, 1], [0, 0, 0], [0.25, 1, 0]])
    return Batch({"words": words, "weights": weights}, torch.ones(3))


def sigmoid(values: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-values)))


def layers(texts: Array) -> tuple[Array, Array]:
    """Equation 1: the middle layer and the words rebuilt from it."""
    a = {
        n: p.detach().numpy().astype(float)
        for n, p in make_net(SETTINGS, N_WORDS, 4).named_parameters()
    }
    hidden = sigmoid(texts @ a["items_in"] + a["items_in_bias"])
    middle = sigmoid(hidden @ a["down_2"] + a["down_2_bias"])
    back = sigmoid(middle @ a["up_2"] + a["up_2_bias"])
    return middle, sigmoid(back @ a["items_out"].T + a["items_out_bias"])


@pytest.mark.parametrize("corrupt", [False, True])
def test_loss_of_an_item_is_that_of_equation_5(corrupt: bool) -> None:
    net = make_net(SETTINGS, N_WORDS, 4)
    v = np.random.default_rng(1).standard_normal((3, 3))
    kept = np.ones(5)
    generator = None
    if corrupt:
        generator = torch.Generator().manual_seed(2)
        kept = (torch.rand(5, generator=generator) >= 0.4).numpy() / 0.6
        assert 0 < np.count_nonzero(kept) < 5
        generator.manual_seed(2)
    seen = TEXTS.copy()
    seen[TEXTS > 0] *= kept
    middle, rebuilt = layers(seen)
    want = 7 / 2 * ((rebuilt - TEXTS) ** 2).sum(axis=1) + 2 / 2 * ((v - middle) ** 2).sum(axis=1)
    found = row_loss(net, SETTINGS, batch(), torch.from_numpy(v).float(), generator)
    np.testing.assert_allclose(found.detach().numpy(), want, rtol=1e-5)
    alone = row_loss(net, SETTINGS, batch(), None, None).detach().numpy()
    np.testing.assert_allclose(
        alone, 3.5 * ((layers(TEXTS)[1] - TEXTS) ** 2).sum(axis=1), rtol=1e-5
    )


@pytest.mark.spark
def test_one_update_of_items_and_users_is_the_papers_closed_form(spark: SparkSession) -> None:
    """v = (U C U' + lambda_v I)^-1 (U C R + lambda_v e), then u = (V C V' + lambda_u I)^-1 V C R."""
    weights = np.array([[2, 0, 1, 0], [0, 1, 0, 0], [1, 3, 0, 0]], np.float32)  # users x items
    rows = [(u, np.flatnonzero(w).tolist(), w[w > 0].tolist()) for u, w in enumerate(weights)]
    frame = spark.createDataFrame(rows, "user bigint, items array<int>, weights array<float>")
    e = np.random.default_rng(3).random((4, 3))
    scale = SETTINGS.scale
    plan = Plan(
        rank=3, iterations=1, n_blocks=1, method="cholesky",
        prior=lambda _: (scale * e).astype(np.float32),
    )  # fmt: skip
    with BlockedAls(frame, 4, SETTINGS.objective, plan) as als:
        als.run()
        ((_, users),) = als.user_factors().collect()
        v, loss = als.item_factors() / scale, als.losses[0]
    begin = np.random.default_rng([plan.seed, 0]).standard_normal((3, 3), np.float32)
    u0 = begin / np.linalg.norm(begin, axis=1, keepdims=True) * scale

    r = (weights > 0).astype(float)
    c = np.where(weights > 0, 1 + 1.5 * weights, 0.05)
    for j in range(4):  # item 3 has no user
        a = u0.T @ np.diag(c[:, j]) @ u0 + 2.0 * np.eye(3)
        np.testing.assert_allclose(
            v[j], np.linalg.solve(a, u0.T @ (c[:, j] * r[:, j]) + 2 * e[j]), rtol=1e-4
        )
    u = users * scale
    for i in range(3):
        a = v.T @ np.diag(c[i]) @ v + 0.3 * np.eye(3)
        np.testing.assert_allclose(u[i], np.linalg.solve(a, v.T @ (c[i] * r[i])), rtol=1e-4)
    want = (c * (r - u @ v.T) ** 2).sum() + 0.3 * (u**2).sum() + 2 * ((v - e) ** 2).sum()
    assert loss == pytest.approx(want, rel=1e-5)


@pytest.mark.spark
def test_factors_are_held_to_the_words(spark: SparkSession, tmp_path: Path) -> None:
    """The planted texts hardly differ: with a strong lambda_v factors do not either."""
    where = {"training_texts": str(tmp_path / "texts")}
    data = synth.dataset(spark, synth.power_law(40, 12), 2, where)
    curves: list[Curve] = []
    options = FitOptions(in_process=True, record=curves.append)

    def off(reg_items: float, rounds: int) -> float:
        """How far factors lie from their mean, against the largest."""
        settings = {**SHORT, "reg_items": reg_items, "rounds": rounds}
        model = Cdl.from_dict(settings).fit(data, options)
        mean = model.factors.mean(axis=0)
        return float(np.abs(model.factors - mean).max() / np.abs(model.factors).max())

    assert off(1e6, 2) < 0.2
    assert off(0.01, 1) > 0.5
    assert [epoch.epoch for epoch in curves[0].epochs] == [1, 2, 3, 4]


@pytest.mark.spark
@pytest.mark.parametrize("settings", ["defaults", "conf/models"])
def test_what_is_shipped_ranks_above_popular_on_planted_tastes(
    settings: str, spark: SparkSession, tmp_path: Path
) -> None:
    """Users have three items each, as a shop's; the texts say nothing of them.

    `popular` has .224; an item held to its text, or an act that weighs a hundred times what was left,
    brings no more than that. A third above it is four standard errors of the mean of 400 users.
    """
    events, held = synth.tastes(n_liked=4)
    data = synth.dataset(spark, events, 2, {"training_texts": str(tmp_path / "texts")})
    shipped = {} if settings == "defaults" else yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    model = Cdl.from_dict({**shipped, "n_blocks": 1}).fit(data, FitOptions(in_process=True))
    scored = np.full(held.shape, -np.inf)
    scored[:, model.items] = synth.scores(model, events)
    bought = np.bincount(events.item_idx, minlength=held.shape[1])
    popular = synth.ndcg(np.tile(bought, (len(held), 1)).astype(float), events, held)
    assert synth.ndcg(scored, events, held) > 1.3 * popular


def test_code_is_the_middle_layer() -> None:
    net = make_net(SETTINGS, N_WORDS, 4)
    rows, words = torch.tensor([0, 0, 0, 2, 2]), torch.tensor([0, 2, 5, 1, 3])
    found = net.encode(rows, words, torch.tensor([0.5, 1, 1, 0.25, 1]), 3, net.depth)
    np.testing.assert_allclose(found.detach().numpy(), layers(TEXTS)[0], rtol=1e-5)


@pytest.mark.parametrize("name", ["validation", "patience"])
def test_what_it_would_not_heed_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no validation, no patience"):
        Cdl.from_dict({name: {"validation": 0.2, "patience": 3}[name]})
