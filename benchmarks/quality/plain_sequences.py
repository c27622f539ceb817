"""GRU4Rec and SASRec as a reader of the papers would write them: one function each, torch alone.

Each takes the histories to train on, those to answer (lists of films, newest last), the number of
films and the settings of our model, uses those that the paper knows, and returns scores of all films,
(n_users, n_items). Films count from 1 inside: 0 is what fills a row. SASRec's
bias begins at the films' popularity, as both of ours do, GRU4Rec's at 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.quality.plain_nets import descend
from recspark.data.blocks import Array


def windows(histories: list[Array], length: int) -> Tensor:
    """Return histories cut from their end into `length` steps, int64 (n, length + 1)."""
    cut = [
        torch.from_numpy(items[max(0, end - length - 1) : end].astype(np.int64) + 1)
        for items in histories
        for end in range(len(items), 1, -length)
    ]
    return pad_sequence(cut, batch_first=True)


def newest(histories: list[Array], length: int) -> tuple[Tensor, Tensor]:
    """Return the newest `length` films of each history, int64 (n, length), and the last one's place."""
    cut = [torch.from_numpy(items[-length:].astype(np.int64) + 1) for items in histories]
    return pad_sequence(cut, batch_first=True), torch.tensor([len(items) - 1 for items in cut])


def gru4rec(train: list[Array], asked: list[Array], n_items: int, s: Any) -> Tensor:
    """Hidasi & Karatzoglou 2018: BPR-max against drawn films and the batch's; or the whole softmax."""
    rows = windows(train, s.length)
    items = nn.Embedding(n_items + 1, s.hidden_size, padding_idx=0)
    nn.init.uniform_(items.weight, -(s.hidden_size**-0.5), s.hidden_size**-0.5)
    gru = nn.GRU(s.hidden_size, s.hidden_size, batch_first=True)
    bias = torch.zeros(n_items + 1, requires_grad=True)
    popular = torch.bincount(rows[rows > 0], minlength=n_items + 1) ** s.sample_alpha

    def states(x: Tensor, dropout: float) -> Tensor:
        return F.dropout(gru(F.dropout(items(x), dropout))[0], dropout)

    def loss(at: Tensor) -> Tensor:
        read, wanted = rows[at, :-1], rows[at, 1:]
        h, wanted = states(read, s.dropout)[wanted > 0], wanted[wanted > 0]
        if s.loss == "cross_entropy":
            logits = (h @ items.weight.T + bias)[:, 1:]
            return F.cross_entropy(logits, wanted - 1, reduction="none")
        drawn = torch.multinomial(popular, s.n_samples, replacement=True)
        candidates, place = torch.cat([wanted, drawn]).unique(return_inverse=True)
        scores = h @ items.weight[candidates].T + bias[candidates]
        target = place[: len(wanted), None]
        share = scores.scatter(1, target, -torch.inf).softmax(dim=1)
        wins = (share * torch.sigmoid(scores.gather(1, target) - scores)).sum(dim=1)
        return -torch.log(wins + 1e-24) + s.bpr_reg * (share * scores**2).sum(dim=1)

    descend([*items.parameters(), *gru.parameters(), bias], loss, len(rows), s, s.epochs)
    with torch.no_grad():
        x, last = newest(asked, s.length)
        h = states(x, 0)[torch.arange(len(x)), last]
        return (h @ items.weight.T + bias)[:, 1:]


def sasrec(train: list[Array], asked: list[Array], n_items: int, s: Any) -> Tensor:
    """Kang & McAuley 2018, by torch's own encoder; the softmax over all films, not one negative."""
    rows, size = windows(train, s.length), s.embedding_size
    items = nn.Embedding(n_items + 1, size, padding_idx=0)
    places = nn.Embedding(s.length, size)
    for table in (items, places):
        nn.init.normal_(table.weight, std=size**-0.5)
    layer = nn.TransformerEncoderLayer(
        size, s.n_heads, size, s.dropout, "relu", batch_first=True, norm_first=True
    )
    blocks = nn.TransformerEncoder(
        layer, s.n_blocks, nn.LayerNorm(size), enable_nested_tensor=False
    )
    counts = torch.bincount(rows[rows > 0], minlength=n_items + 1)
    bias = torch.log(counts + 0.1).requires_grad_()

    def states(x: Tensor) -> Tensor:
        n = x.shape[1]
        e = items(x) * size**0.5 + places.weight[:n]
        later = nn.Transformer.generate_square_subsequent_mask(n)
        return blocks(F.dropout(e, s.dropout, blocks.training), mask=later, is_causal=True)

    def loss(at: Tensor) -> Tensor:
        read, wanted = rows[at, :-1], rows[at, 1:]
        logits = (states(read)[wanted > 0] @ items.weight.T + bias)[:, 1:]
        return F.cross_entropy(logits, wanted[wanted > 0] - 1, reduction="none")

    learned = [p for part in (items, places, blocks) for p in part.parameters()]
    descend([*learned, bias], loss, len(rows), s, s.epochs)
    with torch.no_grad():
        blocks.eval()
        x, last = newest(asked, s.length)
        h = states(x)[torch.arange(len(x)), last]
        return (h @ items.weight.T + bias)[:, 1:]


SEQUENCES = {"gru4rec": gru4rec, "sasrec": sasrec}
