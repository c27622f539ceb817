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

    The papers process sessions side by side; where one session ends, the next one takes its place
    in the batch and the hidden state is set to zero. Here a row of a batch is one session, so
    starting every row at zero is equivalent: each session is read from a zero state, gradients flow
    back through all of its own steps, and nothing passes from one session to another. Only the
    composition of the batches differs.
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
        layer_class = nn.GRU if cell == "gru" else nn.LSTM
        sizes = [embedding_size] + [hidden_size] * n_layers
        self.layers = nn.ModuleList(
            layer_class(input_size, output_size, batch_first=True)
            for input_size, output_size in itertools.pairwise(sizes)
        )
        # The same bound as torch's default, but drawn from `generator`.
        for parameter in self.layers.parameters():
            nn.init.uniform_(parameter, -(hidden_size**-0.5), hidden_size**-0.5, generator)

    def states(
        self,
        embedded: torch.Tensor,
        lengths: torch.Tensor,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """See `SequenceNet`."""
        x, cpu_lengths = dropped(embedded, dropout, generator), lengths.cpu()  # (B, T, E), (B,)
        for layer in self.layers:
            packed = pack_padded_sequence(x, cpu_lengths, batch_first=True, enforce_sorted=False)
            packed_states, _ = layer(packed)  # without an initial state it is zero
            x, _ = pad_packed_sequence(
                packed_states, batch_first=True, total_length=embedded.shape[1]
            )
            x = dropped(x, dropout, generator)  # (B, T, H)
        return x
