"""Models that predict ratings: the score of what is asked, and null for what is not known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from recspark.errors import ModelError
from recspark.models.autoencoders.autorec import AutoRecModel, AutoRecSettings
from recspark.models.base import RetrieverModel
from recspark.models.factors.als import AlsModel, AlsSettings
from recspark.models.factors.mf import MfModel, MfSettings, make_net, row_loss
from recspark.models.ratings import predicted
from recspark.testing import synth
from recspark.train.feed import Batch

ITEMS = np.array([3, 5, 8], np.int32)
FACTORS = np.array([[1, 0.5], [0.2, 2], [-1, 1]], np.float32)


def autorec(settings: AutoRecSettings) -> AutoRecModel:
    rng = np.random.default_rng(1)
    arrays = {
        "items_in": rng.normal(size=(3, 2)), "items_in_bias": rng.normal(size=2),
        "items_out": rng.normal(size=(3, 2)), "items_out_bias": rng.normal(size=3),
    }  # fmt: skip
    wide = {name: array.astype(np.float32) for name, array in arrays.items()}
    return AutoRecModel(settings, synth.CUTOFF, ITEMS, wide)


def test_which_models_predict_ratings() -> None:
    def rates(model: RetrieverModel) -> bool:
        return model.rates

    assert rates(autorec(AutoRecSettings(unobserved=0, half_life_days=None)))
    assert not rates(autorec(AutoRecSettings(unobserved=0)))
    assert not rates(autorec(AutoRecSettings(half_life_days=None)))
    of_als: dict[str, Any] = {"half_life_days": None}
    assert rates(AlsModel(AlsSettings(**of_als, feedback="explicit"), synth.CUTOFF, ITEMS, FACTORS))
    assert not rates(AlsModel(AlsSettings(**of_als), synth.CUTOFF, ITEMS, FACTORS))
    rating = MfSettings(loss="rating", half_life_days=None)
    assert rates(MfModel(rating, synth.CUTOFF, ITEMS, FACTORS))
    assert not rates(MfModel(MfSettings(half_life_days=None), synth.CUTOFF, ITEMS, FACTORS))


@pytest.mark.spark
def test_predictions_are_the_equations(spark: SparkSession) -> None:
    """AutoRec: b + W sigmoid(V r + mu). MF: the user's least squares on the items rated, x y."""
    events = synth.log([(0, 3, 2.0), (0, 8, 1.0), (6, 5, 1.0)])
    events.weight[:] = [4, 2, 5]
    data = synth.dataset(spark, events)
    pairs = "array(struct(5, 1f), struct(8, 2f), struct(99, 3f))"
    asked = synth.ask(data).withColumn(
        "asked", F.expr(pairs).cast("array<struct<item_idx:int,rating:float>>")
    )
    asked = asked.where("user_idx = 0")

    def of(model: RetrieverModel) -> list[tuple[Any, ...]]:
        return sorted(map(tuple, predicted(model, asked).collect()))

    model = autorec(AutoRecSettings(unobserved=0, half_life_days=None))
    a = {name: array.astype(float) for name, array in model.arrays().items()}
    r = np.array([4.0, 0, 2])
    out = (
        a["items_out"] @ (1 / (1 + np.exp(-(r @ a["items_in"] + a["items_in_bias"]))))
        + a["items_out_bias"]
    )
    found = of(model)
    assert [(u, i, rating) for u, i, rating, _ in found] == [(0, 5, 1.0), (0, 8, 2.0), (0, 99, 3.0)]
    np.testing.assert_allclose([found[0][3], found[1][3]], out[1:], rtol=1e-5)
    assert found[2][3] is None

    mf = MfModel(
        MfSettings(loss="rating", half_life_days=None, weight_decay=0.01, batch_size=100),
        synth.CUTOFF,
        ITEMS,
        {"factors": FACTORS},
    )
    y = FACTORS[[0, 2]].astype(float)
    x = np.linalg.solve(y.T @ y + 0.01 * 100 / 2 * np.eye(2), y.T @ [4, 2])
    np.testing.assert_allclose([row[3] for row in of(mf)[:2]], FACTORS[1:] @ x, rtol=1e-5)

    with pytest.raises(ModelError, match="predicts no ratings"):
        predicted(autorec(AutoRecSettings()), asked)


def test_mf_loss_of_ratings_is_the_squared_error_of_what_was_rated() -> None:
    settings = MfSettings(loss="rating", embedding_size=2)
    net = make_net(settings, 2, 3, 1)
    batch = Batch(
        {
            "user_idx": torch.tensor([7, 9]),
            "items": torch.tensor([[3, 8], [5, -1]], dtype=torch.int32),
            "weights": torch.tensor([[4.0, 2], [5, 0]]),
        },
        torch.ones(2),
    )
    found = row_loss(
        net, torch.tensor([7, 9]), torch.from_numpy(ITEMS).long(), settings, batch,
        torch.Generator(), 0.0,
    )  # fmt: skip
    x, y = net.users.detach().numpy(), net.items.detach().numpy()
    want = [(4 - x[0] @ y[0]) ** 2 + (2 - x[0] @ y[2]) ** 2, (5 - x[1] @ y[1]) ** 2]
    np.testing.assert_allclose(found.detach().numpy(), want, rtol=1e-6)
