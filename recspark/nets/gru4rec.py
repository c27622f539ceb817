"""GRU4Rec: a recurrent network over the items of one session.

Source: Hidasi, Karatzoglou, Baltrunas, Tikk 2016, "Session-based Recommendations with Recurrent
Neural Networks"; Hidasi & Karatzoglou 2018 (item vectors on both sides).
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from recspark.nets.sequence import SequenceNet, dropped

Cell = Literal["gru", "lstm"]


class Gru4RecNet(SequenceNet):
    """Layers of GRU or LSTM. The hidden state of every row begins at zero.

    The papers run sessions side by side and set the hidden state to zero where one ends and the
    next begins in its place. A row of the feed is one session, so beginning every row at zero is
    the same thing: each session is read from a zero state, its own steps are followed back in time,
    and nothing crosses its end. Only the make-up of a batch differs.
    """

    def __init__(
        self,
        n_items: int,
        embedding_size: int,
        hidden_size: int,
        n_layers: int,
        cell: Cell,
        tied: bool,
        generator: torch.Generator,
        click_head: bool = False,
        sparse: bool = False,
    ) -> None:
        super().__init__(n_items, embedding_size, hidden_size, tied, generator, click_head, sparse)
        kind = nn.GRU if cell == "gru" else nn.LSTM
        sizes = [embedding_size] + [hidden_size] * n_layers
        self.layers = nn.ModuleList(
            kind(inside, outside, batch_first=True) for inside, outside in itertools.pairwise(sizes)
        )
        for parameter in self.layers.parameters():  # torch's own bound, from our generator
            nn.init.uniform_(parameter, -(hidden_size**-0.5), hidden_size**-0.5, generator)

    def states(
        self,
        embedded: torch.Tensor,
        lengths: torch.Tensor,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """See `SequenceNet`."""
        x, on_host = dropped(embedded, dropout, generator), lengths.cpu()  # (B, T, E), (B,)
        for layer in self.layers:
            packed = pack_padded_sequence(x, on_host, batch_first=True, enforce_sorted=False)
            out, _ = layer(packed)  # no state handed in: zero
            x, _ = pad_packed_sequence(out, batch_first=True, total_length=embedded.shape[1])
            x = dropped(x, dropout, generator)  # (B, T, H)
        return x
