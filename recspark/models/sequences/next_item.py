"""Models whose network reads a session or history item by item and scores the next one.

Trained by Horovod ranks on Spark executors (`recspark.models.sequences.next_item_training`), from the files of
one version of `training_sessions` or `training_histories`. Answers are the state after the newest
item times the item vectors; with the click-through head (`recspark.models.sequences.click_through`), the same
state and vectors say how likely an item is acted on if it is shown.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from recspark.data.blocks import Array, QueryBlock, Ragged
from recspark.data.dataset import Dataset
from recspark.models.base import NOTHING, Algorithm, ArraysModel, FitOptions, Needed
from recspark.models.neural import check_catalogue, fit_network, net_arrays
from recspark.models.scoring import topk
from recspark.models.sequences import click_through
from recspark.models.sequences.contexts import contexts
from recspark.models.sequences.next_item_settings import NextItemSettings
from recspark.models.sequences.next_item_training import MakeNet, train_rank
from recspark.nets.sequence import ITEM_ARRAYS, SequenceNet
from recspark.train.loop import load_weights

_TABLES = {
    ("next_item", "session"): "training_sessions",
    ("next_item", "history"): "training_histories",
    ("click_through", "session"): "training_session_impressions",
    ("click_through", "history"): "training_history_impressions",
}
_BLOCK = 256  # rows read at once, always: a row's sums then go the same way wherever it stands

S = TypeVar("S", bound=NextItemSettings)


class NextItem(Algorithm[S]):
    """A next-item network that is not trained; a model gives settings, network and fitted class."""

    @staticmethod
    @abstractmethod
    def make_net(settings: Any, n_items: int, seed: int) -> SequenceNet:
        """Return the network with the weights of `seed`."""

    @abstractmethod
    def fitted(self, cutoff: datetime, items: Array, arrays: dict[str, Array]) -> NextItemModel:
        """Return the fitted model with these weights."""

    @property
    def training_tables(self) -> tuple[str, ...]:
        """See `Algorithm`."""
        return (_TABLES[self.settings.head, self.settings.train_on],)

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> NextItemModel:
        """See `Algorithm.fit`. The driver holds items and weights, nothing of users."""
        settings, name = self.settings, type(self).__name__.lower()
        items = data.vocabulary()
        check_catalogue(name, items, settings.max_items, settings.item_bytes, "session_knn")
        training = data.training_set(self.training_tables[0])
        if settings.head == "click_through":
            click_through.check_impressions(name, data, training)
        of_rank = partial(train_rank, self.make_net)
        trained = fit_network(name, data, options, settings, items, of_rank)
        net = self.make_net(settings, len(items), options.seed)
        load_weights(net, trained)
        return self.fitted(data.cutoff, items, net_arrays(net))


class NextItemModel(ArraysModel):
    """A trained network; arrays are named as its parameters, float32. Tied: no `items_out`.

    With head `click_through` a score is the log odds of a click, see `click_through.logits`.
    """

    settings: NextItemSettings
    make_net: MakeNet

    def scorer(self) -> topk.Scorer:
        """See `RetrieverModel`."""
        shared = self.shared_arrays()
        return NextItemScorer(self.settings, type(self).make_net, self.items, shared)


@dataclass(frozen=True)
class NextItemScorer:
    """Reads the context of each query; the state after its newest item is the user's vector."""

    settings: NextItemSettings
    make_net: MakeNet
    items: Array
    arrays: dict[str, topk.Shared]

    def score(self, block: QueryBlock) -> topk.Scores:
        """See `topk.Scorer`."""
        settings = self.settings
        found = contexts(block.history, self.items, settings.context, settings.length)
        arrays = {name: np.asarray(shared.array) for name, shared in self.arrays.items()}
        users = last_states(self.make_net(settings, 1, 1), found, arrays, settings.length)
        bias = arrays["items_out_bias"]
        if settings.head == "click_through":
            users, bias = users * arrays["click_scale"], arrays["click_bias"]
        vectors = arrays.get("items_out", arrays["items_in"])
        return topk.DotScores(users, vectors, bias, found.lengths > 0)


def last_states(net: SequenceNet, found: Ragged, arrays: dict[str, Array], longest: int) -> Array:
    """Return the state after the last item of each row, float32 (n, H); 0 for an empty row.

    `found`: local items; `net` : any weights, its body takes those of `arrays`. Computed in float64
    by one thread, in blocks of `_BLOCK` rows padded to the power of two above the row's own length
    (`longest` at most), so that the answer for a row does not depend on its company.
    """
    net = net.double().eval()
    for name, parameter in net.named_parameters():
        if name not in ITEM_ARRAYS:
            parameter.data = torch.from_numpy(arrays[name].astype(np.float64))
    lengths, vectors = found.lengths, arrays["items_in"]
    out = np.zeros((len(lengths), arrays.get("items_out", vectors).shape[1]), np.float32)
    padded = np.minimum(1 << np.ceil(np.log2(np.maximum(lengths, 1))).astype(int), longest)
    with torch.no_grad(), _one_thread():
        for size in np.unique(padded[lengths > 0]):
            rows = np.flatnonzero((padded == size) & (lengths > 0))
            for begin in range(0, len(rows), _BLOCK):
                part = rows[begin : begin + _BLOCK]
                row, column = np.nonzero(np.arange(size) < lengths[part][:, None])
                block = np.zeros((_BLOCK, size, vectors.shape[1]))
                block[row, column] = vectors[found.values[found.start[part][row] + column]]
                ends = torch.ones(_BLOCK, dtype=torch.int64)  # (B,)
                ends[: len(part)] = torch.from_numpy(lengths[part])
                states = net.states(torch.from_numpy(block), ends)  # (B, T, H)
                out[part] = states[torch.arange(_BLOCK), ends - 1][: len(part)].numpy()
    return out


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute with one thread: a task owns one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
