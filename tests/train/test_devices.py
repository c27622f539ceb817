"""Losses make their tensors where the batch lies: what a GPU needs, shown without one.

Within `torch.device("meta")` every tensor made without a device is on another one than the batch, so
that whatever mixes them fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from recspark.models.autoencoders import autorec, cdl, multvae, sdae
from recspark.models.factors import mf
from recspark.models.sequences import next_item_training
from recspark.models.sequences.gru4rec import Gru4Rec, Gru4RecSettings
from recspark.models.sequences.sasrec import SasRec, SasRecSettings
from recspark.train.feed import Batch
from recspark.train.negatives import Negatives

pytestmark = pytest.mark.torch
N_ITEMS, N_USERS = 6, 3
VOCABULARY = torch.arange(N_ITEMS)
Loss = Callable[[Batch, torch.Generator], torch.Tensor]


def batch() -> Batch:
    """Bags and sequences in one: columns that a loss does not read do no harm."""
    items = torch.tensor([[0, 2, 4, -1], [5, 1, 3, 2], [3, 0, -1, -1]], dtype=torch.int32)
    weights = torch.where(items >= 0, 1.0, 0.0)
    columns = {
        "user_idx": torch.arange(N_USERS),
        "item_idx": torch.tensor([1, 2, 4], dtype=torch.int32),
        "items": items,
        "words": items,
        "weights": weights,
        "length": (items >= 0).sum(dim=1).int(),
        "shown": torch.tensor([[1, 3], [0, -1], [5, 5]], dtype=torch.int32),
        "shown_after": torch.tensor([[1, 2], [3, 0], [1, 2]], dtype=torch.int32),
        "clicked": torch.tensor([[0, 1], [1, 0], [0, 0]], dtype=torch.int32),
    }
    return Batch(columns, torch.tensor([1.0, 1.0, 0.0]))


def sequence(model: Any, settings: Any) -> Loss:
    net = model.make_net(settings, N_ITEMS, 1)
    negatives = Negatives(torch.arange(1.0, N_ITEMS + 1), settings.n_samples, 0.5)

    def loss(rows: Batch, generator: torch.Generator) -> torch.Tensor:
        return next_item_training.row_loss(
            net, VOCABULARY, settings, negatives, rows, generator, 0.5
        )

    return loss


def gru4rec(**changes: Any) -> Loss:
    return sequence(Gru4Rec, Gru4RecSettings(hidden_size=4, **{"n_samples": 3, **changes}))


def sasrec(**changes: Any) -> Loss:
    return sequence(SasRec, SasRecSettings(**{"n_samples": 3, **changes}))


def of_mf(kind: Any) -> Loss:
    settings = mf.MfSettings(embedding_size=4, loss=kind, n_negatives=5)
    net = mf.make_net(settings, N_USERS, N_ITEMS, 1)
    users = torch.arange(N_USERS)
    return lambda rows, g: mf.row_loss(net, users, VOCABULARY, settings, rows, g, 0.5)


def of_multvae() -> Loss:
    settings = multvae.MultVaeSettings(hidden_size=4, latent_size=2)
    net = multvae.make_net(settings, N_ITEMS, 1)
    return lambda rows, g: multvae.row_loss(net, VOCABULARY, settings, rows, g, 0.5)


def of_autorec() -> Loss:
    settings = autorec.AutoRecSettings(hidden_size=4)
    net = autorec.make_net(settings, N_ITEMS, 1)
    return lambda rows, g: autorec.row_loss(net, VOCABULARY, settings, rows, g)


def of_sdae(layer: int) -> Loss:
    settings = sdae.SdaeSettings(hidden_sizes=(4, 3))
    net = sdae.make_net(settings, N_ITEMS, 1)
    if layer == 0:
        return lambda rows, g: sdae.row_loss(net, VOCABULARY, settings, rows, g)
    return lambda rows, g: sdae.pretraining_loss(net, VOCABULARY, settings, layer, rows, g)


def of_cdl(layer: int) -> Loss:
    settings = cdl.CdlSettings(hidden_sizes=(4, 3))
    net = cdl.make_net(settings, N_ITEMS, 1)
    if layer == 0:
        return lambda rows, g: cdl.row_loss(net, settings, rows, torch.ones(3, 3, device="cpu"), g)
    return lambda rows, g: cdl.layer_loss(net, settings, layer, rows, g)


LOSSES: dict[str, Callable[[], Loss]] = {
    "gru4rec": gru4rec,
    "gru4rec, softmax": lambda: gru4rec(loss="cross_entropy"),
    "gru4rec, all items": lambda: gru4rec(loss="cross_entropy", n_samples=None, sparse=False),
    "gru4rec, no logQ": lambda: gru4rec(loss="cross_entropy", logq=False),
    "gru4rec, lstm, clicks": lambda: gru4rec(cell="lstm", head="click_through"),
    "sasrec": sasrec,
    "sasrec, gbce": lambda: sasrec(loss="gbce"),
    **{f"mf, {kind}": lambda kind=kind: of_mf(kind) for kind in ("softmax", "bpr", "rating")},  # type: ignore[misc]
    "multvae": of_multvae,
    "autorec": of_autorec,
    **{f"sdae, layer {k}": lambda k=k: of_sdae(k) for k in (0, 1, 2)},  # type: ignore[misc]
    **{f"cdl, layer {k}": lambda k=k: of_cdl(k) for k in (0, 1, 2)},  # type: ignore[misc]
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_stays_where_its_batch_is(name: str) -> None:
    loss, rows = LOSSES[name](), batch()
    here = loss(rows, torch.Generator("cpu").manual_seed(1))
    with torch.device("meta"):
        found = loss(rows, torch.Generator("cpu").manual_seed(1))
    assert found.device.type == "cpu"
    assert torch.equal(found, here)
    assert (here[:2] != 0).all()
