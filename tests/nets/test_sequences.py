"""What next-item networks promise: a zero state for each row, and nothing from what comes later."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from recspark.nets.gru4rec import Gru4RecNet
from recspark.nets.sasrec import SasRecNet
from recspark.nets.sequence import SequenceNet, dropped

pytestmark = pytest.mark.torch


def gru4rec(cell: Any = "gru", tied: bool = True) -> SequenceNet:
    generator = torch.Generator().manual_seed(3)
    return Gru4RecNet(9, 4, 4, 2, cell, tied, generator).double()


def sasrec() -> SequenceNet:
    return SasRecNet(9, 6, 4, 2, 2, True, torch.Generator().manual_seed(3)).double()


NETS = [gru4rec("gru"), gru4rec("lstm"), sasrec()]


def states(net: SequenceNet, rows: list[list[int]]) -> list[np.ndarray]:
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.tensor([row + [0] * (int(lengths.max()) - len(row)) for row in rows])
    with torch.no_grad():
        found = net.states(net.items_in[padded], lengths).numpy()
    return [f[:n] for f, n in zip(found, lengths, strict=True)]


@pytest.mark.parametrize("net", NETS)
def test_a_row_does_not_depend_on_the_rows_before_it(net: SequenceNet) -> None:
    """The state of session B is the same alone and after session A: none crosses a row's end."""
    a, b = [1, 2, 3, 4, 5], [6, 7, 2]
    np.testing.assert_allclose(states(net, [a, b])[1], states(net, [b])[0], atol=1e-14)
    together = states(net, [a[:3] + b])[0][3:]
    assert np.abs(together - states(net, [b])[0]).max() > 1e-3  # one row would carry it over


@pytest.mark.parametrize("net", NETS)
def test_a_later_item_never_changes_an_earlier_state(net: SequenceNet) -> None:
    first, other = states(net, [[1, 2, 3, 4, 5]])[0], states(net, [[1, 2, 3, 8, 0]])[0]
    np.testing.assert_allclose(first[:3], other[:3], atol=1e-14)
    assert np.abs(first[3:] - other[3:]).min() > 1e-6


def test_gru_steps_are_those_of_the_equations() -> None:
    """Cho et al. 2014 as torch lays its weights out: reset, update, candidate; from a zero state."""
    net = gru4rec()
    x = net.items_in[torch.tensor([3, 1, 7])].detach().numpy()

    def sigmoid(values: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-values))

    for layer in net.layers:
        w, u, w_bias, u_bias = (parameter.detach().numpy() for parameter in layer.parameters())
        h, out = np.zeros(4), []
        for step in x:
            (wr, wz, wn), (ur, uz, un) = np.split(w @ step + w_bias, 3), np.split(u @ h + u_bias, 3)
            reset, update = sigmoid(wr + ur), sigmoid(wz + uz)
            h = (1 - update) * np.tanh(wn + reset * un) + update * h
            out.append(h)
        x = np.array(out)
    np.testing.assert_allclose(states(net, [[3, 1, 7]])[0], x, atol=1e-14)


def test_one_block_of_attention_is_the_papers_equations() -> None:
    """Kang & McAuley 2018, section III, written out for one row and one head."""
    net = SasRecNet(9, 6, 4, 1, 1, True, torch.Generator().manual_seed(5)).double()
    at = {name: parameter.detach().numpy() for name, parameter in net.named_parameters()}

    def norm(values: np.ndarray) -> np.ndarray:
        centred = values - values.mean(axis=-1, keepdims=True)
        return centred / np.sqrt(values.var(axis=-1, keepdims=True) + 1e-5)

    e = at["items_in"][[3, 1, 7]] * 2.0 + at["positions"][:3]  # sqrt(4) = 2
    q, k, v = (norm(e) @ at[f"blocks.0.{name}"] for name in ("query", "key", "value"))
    attended = []
    for i in range(3):
        weights = np.exp(k[: i + 1] @ q[i] / np.sqrt(4))
        attended.append(weights @ v[: i + 1] / weights.sum())
    s = e + np.array(attended)
    inner = np.maximum(norm(s) @ at["blocks.0.inner"] + at["blocks.0.inner_bias"], 0)
    f = s + inner @ at["blocks.0.outer"] + at["blocks.0.outer_bias"]
    np.testing.assert_allclose(states(net, [[3, 1, 7]])[0], norm(f), atol=1e-12)


def test_tied_vectors_are_one_parameter() -> None:
    assert "items_out" not in dict(gru4rec(tied=True).named_parameters())
    assert "items_out" in dict(gru4rec(tied=False).named_parameters())


def test_dropout_comes_from_the_generator_and_keeps_the_mean() -> None:
    ones = torch.ones(200, 500)
    found = dropped(ones, 0.3, torch.Generator().manual_seed(1))
    np.testing.assert_allclose(found.unique().numpy(), [0, 1 / 0.7], rtol=1e-6)
    assert found.mean().item() == pytest.approx(1, abs=0.01)
    assert found.equal(dropped(ones, 0.3, torch.Generator().manual_seed(1)))
    assert dropped(ones, 0.3, None) is ones
