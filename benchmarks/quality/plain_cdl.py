"""CDL as a reader of the paper would write it: torch alone, all items and users in memory."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality.plain_nets import descend


def solved(x: Tensor, other: Tensor, drawn_to: Tensor, reg: float, s: Any) -> Tensor:
    """Return the closed form of each row of x (n, m): (Y'CY + reg I)^-1 (Y'Cp + reg drawn_to)."""
    eye = reg * torch.eye(other.shape[1], dtype=other.dtype)
    gram = s.unobserved_weight * other.T @ other + eye
    out = torch.empty_like(drawn_to)
    for row, held in enumerate(drawn_to):
        at = x[row].nonzero()[:, 0]
        y, c = other[at], 1 + s.alpha * x[row, at]
        matrix = gram + (y.T * (c - s.unobserved_weight)) @ y
        out[row] = torch.linalg.solve(matrix, y.T @ c + reg * held)
    return out


def cdl(x: Tensor, words: Tensor, s: Any) -> Tensor:
    """Wang, Wang & Yeung 2015: scores (n_users, n_items) from x (n_users, n_items), words (n_items, W)."""
    sizes = [words.shape[1], *s.hidden_sizes]
    down = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    up = [nn.Linear(b, a) for a, b in itertools.pairwise(sizes)]
    for layer in (*down, *up):
        nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    act = torch.tanh if s.activation == "tanh" else torch.sigmoid
    n, factors, l2 = len(words), None, s.weight_decay / 2

    def squares(weights: list[Tensor]) -> Tensor:
        return l2 * torch.stack([(w**2).sum() for w in weights]).sum()

    def encode(h: Tensor, depth: int) -> Tensor:
        for layer in down[:depth]:
            h = act(layer(h))
        return h

    for k in range(len(down)):

        def layer_loss(rows: Tensor, k: int = k) -> Tensor:
            clean = encode(words[rows], k).detach()
            rebuilt = up[k](act(down[k](F.dropout(clean, s.corruption))))
            error = ((act if k else torch.sigmoid)(rebuilt) - clean) ** 2
            return error.sum(dim=1) + squares([*down[k].parameters(), *up[k].parameters()])

        of_layer = [*down[k].parameters(), *up[k].parameters()]
        descend(of_layer, layer_loss, n, s, s.pretraining_epochs)

    def loss(rows: Tensor) -> Tensor:
        middle = h = encode(F.dropout(words[rows], s.corruption), len(down))
        for layer in up[:0:-1]:
            h = act(layer(h))
        error = s.reg_words / 2 * ((torch.sigmoid(up[0](h)) - words[rows]) ** 2).sum(dim=1)
        error = error + squares(learned)
        if factors is None:
            return error
        return error + s.reg_items / 2 * ((factors[rows] - middle) ** 2).sum(dim=1)

    learned = [p for layer in (*down, *up) for p in layer.parameters()]
    items, free = None, torch.zeros(len(x), sizes[-1], dtype=torch.double)
    for _ in range(s.rounds):
        descend(learned, loss, n, s, s.epochs)
        code = encode(words, len(down)).detach().double()
        items = code if items is None else items
        for _ in range(s.sweeps):
            users = solved(x, items, free, s.reg_users, s)
            items = solved(x.T, users, code, s.reg_items, s)
        factors = items.float()
    return solved(x, items, free, s.reg_users, s) @ items.T
