"""The network and its loss against the paper's equations in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recspark.nets.multvae import MultVaeNet
from recspark.train.losses import kl_to_standard_normal, multinomial_nll

pytestmark = pytest.mark.torch
N_ITEMS, HIDDEN, LATENT = 7, 5, 3
X = np.array([[0, 2.0, 0, 1, 0, 0, 0.5], [1, 0, 0, 0, 0, 0, 0], [0] * 7, [3, 1, 1, 1, 1, 1, 1]])


def net() -> MultVaeNet:
    made = MultVaeNet(N_ITEMS, HIDDEN, LATENT, torch.Generator().manual_seed(3)).double()
    with torch.no_grad():  # biases start at 0: give them something to be wrong about
        for number, parameter in enumerate(made.parameters()):
            if parameter.dim() == 1:
                parameter += torch.linspace(-0.5, 0.7, len(parameter)) * (number + 1) / 4
    return made


def entries() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, items = np.nonzero(X)
    return torch.tensor(rows), torch.tensor(items), torch.tensor(X[rows, items])


def by_hand(made: MultVaeNet) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    w = {name: p.detach().numpy() for name, p in made.named_parameters()}
    x = X / np.maximum(np.sqrt((X**2).sum(axis=1, keepdims=True)), 1e-12)
    h = np.tanh(x @ w["items_in"] + w["items_in_bias"])
    latent = h @ w["to_latent"] + w["to_latent_bias"]
    mean, log_variance = latent[:, :LATENT], latent[:, LATENT:]
    h = np.tanh(mean @ w["from_latent"] + w["from_latent_bias"])
    return h @ w["items_out"].T + w["items_out_bias"], mean, log_variance


def test_forward_is_the_dense_formula() -> None:
    made = net()
    found = made(*entries(), len(X))
    for got, want in zip(found, by_hand(made), strict=True):
        np.testing.assert_allclose(got.detach().numpy(), want, rtol=0, atol=1e-13)


def test_elbo_is_the_papers() -> None:
    made = net()
    logits, mean, log_variance = by_hand(made)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    nll = -(X * np.log(softmax)).sum(axis=1)  # equation 2
    variance = np.exp(log_variance)
    kl = 0.5 * (variance + mean**2 - 1 - np.log(variance)).sum(axis=1)
    rows, items, weights = entries()
    out, mu, log_var = made(rows, items, weights, len(X))
    np.testing.assert_allclose(multinomial_nll(out, rows, items, weights).detach(), nll, rtol=1e-13)
    np.testing.assert_allclose(kl_to_standard_normal(mu, log_var).detach(), kl, rtol=1e-13)
    # ... and the KL of two Gaussians is what integrating the densities says.
    z = np.linspace(-12, 12, 20_001)
    m, s = mean[0, 0], np.sqrt(variance[0, 0])
    q = np.exp(-0.5 * ((z - m) / s) ** 2) / (s * np.sqrt(2 * np.pi))
    log_p = -0.5 * z**2 - 0.5 * np.log(2 * np.pi)
    integral = (q * (np.log(q + 1e-300) - log_p)).sum() * (z[1] - z[0])
    one = kl_to_standard_normal(torch.tensor([[m]]), torch.tensor([[log_variance[0, 0]]]))
    assert float(one) == pytest.approx(integral, abs=1e-6)


def test_dropout_and_sampling_follow_the_generator_and_average_out() -> None:
    made = net()
    with torch.no_grad():
        made.to_latent_bias[LATENT:] = 0.3

    def noisy(seed: int, dropout: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        logits: torch.Tensor = made(*entries(), len(X), dropout, generator)[0]
        return logits.detach()

    assert noisy(1, 0.5).equal(noisy(1, 0.5))
    assert not noisy(1, 0.5).equal(noisy(2, 0.5))
    # The encoder is linear in its entries before the first tanh: keep it nearly so, and dropout
    # must leave the expectation as it was.
    with torch.no_grad():
        made.items_in *= 1e-3
        made.items_in_bias.zero_()
    still = made(*entries(), len(X))[1].detach()
    generator = torch.Generator().manual_seed(5)
    means = torch.stack([made(*entries(), len(X), 0.5, generator)[1] for _ in range(4000)])
    assert (means.mean(dim=0) - still).abs().max() < 6 * means.std(dim=0).max() / 4000**0.5
    assert means.std(dim=0)[0].max() > 0
