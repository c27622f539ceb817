"""The papers' networks as a reader of the paper would write them: one function each, torch alone.

Each takes a user-item matrix of 0 and 1 (n_users, n_items) and the settings of our model, uses those
that the paper knows, and returns scores of all items, (n_users, n_items). Adam with a rate that falls
linearly to 0, as ours; L2 as the paper has it. None of them knows of files, ranks or weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def descend(
    parameters: list[Tensor], loss: Callable[[Tensor], Tensor], n: int, s: Any, epochs: int
) -> None:
    """Minimise the mean of `loss` (of row numbers) over batches of rows."""
    adam = torch.optim.Adam(parameters, lr=s.learning_rate)
    batches = -(-n // s.batch_size)
    for step in range(epochs * batches):
        if step % batches == 0:
            order = torch.randperm(n)
        rows = order[step % batches * s.batch_size :][: s.batch_size]
        adam.param_groups[0]["lr"] = s.learning_rate * (1 - step / (epochs * batches))
        adam.zero_grad()
        loss(rows).mean().backward()
        adam.step()


def length_1(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1)


def multinomial(logits: Tensor, x: Tensor) -> Tensor:
    return -(x * torch.log_softmax(logits, dim=1)).sum(dim=1)


def multvae(x: Tensor, s: Any) -> Tensor:
    """Liang et al. 2018, as in their notebook: dropout of the row at length 1, tanh, KL that grows."""
    n, m = x.shape
    encoder = nn.Sequential(
        nn.Linear(m, s.hidden_size), nn.Tanh(), nn.Linear(s.hidden_size, 2 * s.latent_size)
    )
    decoder = nn.Sequential(
        nn.Linear(s.latent_size, s.hidden_size), nn.Tanh(), nn.Linear(s.hidden_size, m)
    )
    for layer in (*encoder, *decoder):
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.trunc_normal_(layer.bias, std=0.001)
    done = [0]
    steps = s.epochs * -(-n // s.batch_size)

    def loss(rows: Tensor) -> Tensor:
        done[0] += 1
        mean, log_variance = encoder(F.dropout(length_1(x[rows]), s.dropout)).chunk(2, dim=1)
        z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(dim=1)
        beta = s.beta * min(1.0, done[0] / steps / s.anneal)
        return multinomial(decoder(z), x[rows]) + beta * kl

    descend([*encoder.parameters(), *decoder.parameters()], loss, n, s, s.epochs)
    with torch.no_grad():
        return decoder(encoder(length_1(x)).chunk(2, dim=1)[0])


def sdae(x: Tensor, s: Any) -> Tensor:
    """Vincent et al. 2010 for rows of items: masking noise, layers one by one, then all of them."""
    n, m = x.shape
    sizes = [m, *s.hidden_sizes]
    down = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    up = [nn.Linear(b, a) for a, b in itertools.pairwise(sizes)]
    for layer in (*down, *up):
        nn.init.xavier_normal_(layer.weight)

    def encode(h: Tensor, depth: int) -> Tensor:
        for layer in down[:depth]:
            h = torch.tanh(layer(h))
        return h

    def whole(h: Tensor) -> Tensor:
        h = encode(h, len(down))
        for layer in up[:0:-1]:
            h = torch.tanh(layer(h))
        return up[0](h)

    for k in range(len(down)):

        def layer_loss(rows: Tensor, k: int = k) -> Tensor:
            clean = encode(length_1(x[rows]), k).detach()
            rebuilt = up[k](torch.tanh(down[k](F.dropout(clean, s.corruption))))
            if k == 0:
                return multinomial(rebuilt, x[rows])
            return ((torch.tanh(rebuilt) - clean) ** 2).sum(dim=1)

        of_layer = [*down[k].parameters(), *up[k].parameters()]
        descend(of_layer, layer_loss, n, s, s.pretraining_epochs)

    def loss(rows: Tensor) -> Tensor:
        return multinomial(whole(F.dropout(length_1(x[rows]), s.corruption)), x[rows])

    descend([p for layer in (*down, *up) for p in layer.parameters()], loss, n, s, s.epochs)
    with torch.no_grad():
        return whole(length_1(x))


def mf(x: Tensor, s: Any) -> Tensor:
    """A full softmax over user vector x item vector + item bias; the users' own vectors answer."""
    n, m = x.shape
    users = (0.1 * torch.randn(n, s.embedding_size)).requires_grad_()
    items = (0.1 * torch.randn(m, s.embedding_size)).requires_grad_()
    bias = torch.log(x.mean(dim=0) + 1e-3).requires_grad_()
    l2 = s.weight_decay / 2

    def loss(rows: Tensor) -> Tensor:
        u = users[rows]
        held = l2 * s.batch_size * (u**2).sum(dim=1) + l2 * (items**2).sum()
        return multinomial(u @ items.T + bias, x[rows]) + held

    descend([users, items, bias], loss, n, s, s.epochs)
    return (users @ items.T + bias).detach()


def autorec(x: Tensor, s: Any) -> Tensor:
    """Sedhain et al. 2015 by user, sigmoid and all, with a weight for what was not observed."""
    n, m = x.shape
    first, last = nn.Linear(m, s.hidden_size), nn.Linear(s.hidden_size, m)
    for layer in (first, last):
        nn.init.xavier_normal_(layer.weight)
    l2 = s.weight_decay / 2

    def loss(rows: Tensor) -> Tensor:
        wanted = x[rows]
        rebuilt = last(torch.sigmoid(first(wanted)))
        error = torch.where(wanted > 0, 1.0, s.unobserved) * (wanted - rebuilt) ** 2
        held = l2 * sum((p**2).sum() for p in (*first.parameters(), *last.parameters()))
        return error.sum(dim=1) + held

    descend([*first.parameters(), *last.parameters()], loss, n, s, s.epochs)
    with torch.no_grad():
        return last(torch.sigmoid(first(x)))


NETS = {"multvae": multvae, "sdae": sdae, "mf": mf, "autorec": autorec}
