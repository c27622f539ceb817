"""Models whose network reads a session or a history item by item and scores the next item.

The network is trained by Horovod ranks on Spark executors (`next_item_training`), from the files of
one version of a training table (`_TABLES`). At scoring, the score of an item is the state after the
user's newest item times the item's vector. With the click-through head (`click_through`), the same
state and item vectors give the probability that an item is clicked if it is shown.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from recspark.data.blocks import Array, QueryBlock, Ragged
from recspark.data.dataset import Dataset
from recspark.models.base import NOTHING, Algorithm, ArraysModel, FitOptions, Needed
from recspark.models.neural import check_catalogue_size, fit_network, net_arrays, one_thread
from recspark.models.scoring import topk
from recspark.models.sequences import click_through
from recspark.models.sequences.contexts import contexts
from recspark.models.sequences.next_item_settings import NextItemSettings
from recspark.models.sequences.next_item_training import MakeNet, train_rank
from recspark.nets.sequence import ITEM_ARRAYS, SequenceNet
from recspark.train.loop import load_weights

# (head, train_on) -> the training table
_TABLES = {
    ("next_item", "session"): "training_sessions",
    ("next_item", "history"): "training_histories",
    ("click_through", "session"): "training_session_impressions",
    ("click_through", "history"): "training_history_impressions",
}
# Rows that the network reads at once. Always this many (short blocks are filled up), because the
# rounding of a sum depends on the shape of the arrays.
_BLOCK_ROWS = 256

S = TypeVar("S", bound=NextItemSettings)


class NextItem(Algorithm[S]):
    """A next-item model that is not fitted. Subclasses give settings, network and fitted class."""

    @staticmethod
    @abstractmethod
    def make_net(settings: Any, n_items: int, seed: int) -> SequenceNet:
        """Return the network with first weights drawn from `seed`."""

    @abstractmethod
    def fitted(self, cutoff: datetime, items: Array, arrays: dict[str, Array]) -> NextItemModel:
        """Return the fitted model; `arrays` are the network's weights, by name."""

    @property
    def training_tables(self) -> tuple[str, ...]:
        """See `Algorithm`."""
        return (_TABLES[self.settings.head, self.settings.train_on],)

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> NextItemModel:
        """See `Algorithm.fit`. The driver holds the vocabulary and weights, nothing per user."""
        settings, name = self.settings, type(self).__name__.lower()
        items = data.vocabulary()
        check_catalogue_size(name, items, settings.max_items, settings.item_bytes, "session_knn")
        training = data.training_set(self.training_tables[0])
        if settings.head == "click_through":
            click_through.check_impressions(name, data, training)
        train_one_rank = partial(train_rank, self.make_net)
        trained = fit_network(name, data, options, settings, items, train_one_rank)
        net = self.make_net(settings, len(items), options.seed)
        load_weights(net, trained)
        return self.fitted(data.cutoff, items, net_arrays(net))


class NextItemModel(ArraysModel):
    """A trained next-item model.

    The arrays are the parameters of the network, float32, by name. With `tied` item vectors there
    is no `items_out`. With the head `click_through`, scores are the log odds of a click, see
    `click_through.logits`.
    """

    settings: NextItemSettings
    make_net: MakeNet

    def scorer(self) -> topk.Scorer:
        """See `RetrieverModel`."""
        shared = self.shared_arrays()
        return NextItemScorer(self.settings, type(self).make_net, self.items, shared)

    def item_vectors(self) -> Array:
        """See `RetrieverModel`. Those that the last state is multiplied with."""
        return scored_vectors(self._arrays)


@dataclass(frozen=True)
class NextItemScorer:
    """Lets the network read the context of each query; the last state is the user's vector.

    `items` item_idx int32 (n_items,), ascending: the vocabulary. `arrays` : see `NextItemModel`.
    """

    settings: NextItemSettings
    make_net: MakeNet
    items: Array
    arrays: dict[str, topk.Shared]

    def score(self, block: QueryBlock) -> topk.Scores:
        """See `topk.Scorer`. A user without a known item in the context gets no list."""
        settings = self.settings
        items_read = contexts(block.history, self.items, settings.context, settings.length)
        arrays = {name: np.asarray(shared.array) for name, shared in self.arrays.items()}
        # The network's item vectors are not used here, so one item is enough to build it.
        users = last_states(self.make_net(settings, 1, 1), items_read, arrays, settings.length)
        bias = arrays["items_out_bias"]
        if settings.head == "click_through":
            users, bias = users * arrays["click_scale"], arrays["click_bias"]
        return topk.DotScores(users, scored_vectors(arrays), bias, items_read.lengths > 0)


def scored_vectors(arrays: dict[str, Array]) -> Array:
    """Return the vectors that a state is multiplied with, float32 (n_items, H).

    `arrays` : see `NextItemModel`.
    """
    return arrays.get("items_out", arrays["items_in"])


def last_states(
    net: SequenceNet, items_read: Ragged, arrays: dict[str, Array], longest: int
) -> Array:
    """Return the state after the last item of each row, float32 (n, H); 0 for an empty row.

    The states are computed in float64 by one thread. Rows are grouped by their length, rounded up
    to a power of two (`longest` at most), and padded to it: with `longest` 50, rows of 5 to 8 items
    are padded to 8, and rows of 33 to 50 items to 50. The network reads blocks of exactly
    `_BLOCK_ROWS` rows. So the state of a row does not depend on the rows beside it.

    Parameters
    ----------
    net : a network of the right sizes with any weights; the weights of its body are set to `arrays`
    items_read : the local items of each row, `longest` at most
    arrays : the trained parameters, by name
    """
    net = net.double().eval()
    for name, parameter in net.named_parameters():
        if name not in ITEM_ARRAYS:
            parameter.data = torch.from_numpy(arrays[name].astype(np.float64))
    lengths, vectors = items_read.lengths, arrays["items_in"]
    last_state = np.zeros((len(lengths), arrays.get("items_out", vectors).shape[1]), np.float32)
    padded_length = np.minimum(1 << np.ceil(np.log2(np.maximum(lengths, 1))).astype(int), longest)
    with torch.no_grad(), one_thread():
        for width in np.unique(padded_length[lengths > 0]):
            rows_of_width = np.flatnonzero((padded_length == width) & (lengths > 0))
            for begin in range(0, len(rows_of_width), _BLOCK_ROWS):
                rows = rows_of_width[begin : begin + _BLOCK_ROWS]
                # Row of the block and position of each item, then the vectors of the items.
                row, position = np.nonzero(np.arange(width) < lengths[rows][:, None])
                block = np.zeros((_BLOCK_ROWS, width, vectors.shape[1]))  # (B, T, E)
                block[row, position] = vectors[
                    items_read.values[items_read.start[rows][row] + position]
                ]
                block_lengths = torch.ones(_BLOCK_ROWS, dtype=torch.int64)  # (B,)
                block_lengths[: len(rows)] = torch.from_numpy(lengths[rows])
                states = net.states(torch.from_numpy(block), block_lengths)  # (B, T, H)
                last_state[rows] = states[torch.arange(_BLOCK_ROWS), block_lengths - 1][
                    : len(rows)
                ].numpy()
    return last_state
