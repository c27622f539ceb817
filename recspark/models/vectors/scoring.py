"""How the vectors of word2vec become scores: by the mean vector of a user's recent items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from recspark.data.blocks import Array, Histories, QueryBlock
from recspark.engines.word2vec import keep_chances
from recspark.models.scoring import topk
from recspark.models.scoring.candidates import dot_pairs
from recspark.models.scoring.contributions import Contributions, entries_of_pairs
from recspark.models.vectors.word2vec_settings import SamplingSettings
from recspark.models.weights import HistoryWeights


@dataclass(frozen=True)
class MeanVectorScorer:
    """Scores items by the dot product with the decayed mean vector of the user's recent items.

    The mean is taken of rows of `vectors` and multiplied with the rows of `target_vectors`, both
    float32 (n_items, size). `bias` float32 (n_items,) is added. If `bias` is None, the score is the
    cosine: the rows of both are of length 1 then.
    """

    weights: HistoryWeights
    n_recent: int | None
    items: Array
    vectors: topk.Shared
    target_vectors: topk.Shared
    bias: Array | None

    def score(self, block: QueryBlock) -> topk.Scores:
        """See `topk.Scorer`."""
        history = block.history if self.n_recent is None else newest(block.history, self.n_recent)
        start, items, weights = self.weights.local(history, self.items)
        users = mean_vectors(start, items, weights, np.asarray(self.vectors.array))
        if self.bias is None:
            users = unit_rows(users)
        return topk.DotScores(
            users, np.asarray(self.target_vectors.array), self.bias, np.diff(start) > 0
        )

    def contributions(self, block: QueryBlock, rows: Array, items: Array) -> Contributions:
        """See `ContributingScorer`.

        Item j adds weight_j / (sum of weights) times its vector's product with the target vector of
        the listed item. For the cosine, this is divided by the length of the mean vector.
        """
        history = block.history if self.n_recent is None else newest(block.history, self.n_recent)
        start, own_items, weights = self.weights.local(history, self.items)
        vectors = np.asarray(self.vectors.array)
        row_of_weight = np.repeat(np.arange(len(block)), np.diff(start))
        divisor = np.bincount(row_of_weight, weights, len(block))
        if self.bias is None:
            means = mean_vectors(start, own_items, weights, vectors)
            divisor *= np.sqrt(np.square(means, dtype=np.float64).sum(axis=1))
        start_of_pairs, entries = entries_of_pairs(start, rows)
        listed = np.repeat(items, np.diff(start_of_pairs))
        values = dot_pairs(
            vectors, np.asarray(self.target_vectors.array), own_items[entries], listed
        )
        divisor_of_entry = divisor[row_of_weight[entries]]
        values *= weights[entries]
        np.divide(values, divisor_of_entry, out=values, where=divisor_of_entry > 0)
        rest = np.zeros(len(rows)) if self.bias is None else self.bias[items].astype(np.float64)
        return Contributions(start_of_pairs, own_items[entries], values, rest)


def priors(counts: Array, settings: SamplingSettings) -> Array:
    """Return the number to add to each item's dot product, float32 (n,).

    Training fits in . out = log P(item | recent item) - log noise(item), up to a constant, where P
    is the probability among the uses that subsampling keeps (Levy and Goldberg 2014, equation 7).
    To get back to the probability among all uses, log noise(item) is added, and the log of the
    share of the item's uses that subsampling keeps is subtracted. Items without uses get -inf.
    `counts` int64 (n,): the uses of each item.

    >>> settings = SamplingSettings(ns_exponent=0.5, subsample=None)
    >>> priors(np.array([1, 4]), settings).round(3)
    array([-1.099, -0.405], dtype=float32)
    """
    is_used = counts > 0
    noise = counts[is_used].astype(np.float64) ** settings.ns_exponent
    log_prior = np.full(len(counts), -np.inf, np.float32)
    log_prior[is_used] = np.log(noise / noise.sum()) - np.log(
        keep_chances(counts, settings.subsample)[is_used]
    )
    return log_prior


def newest(history: Histories, n: int) -> Histories:
    """Return the n newest events of each row."""
    lengths = np.diff(history.start)
    is_newest = np.arange(len(history.item_idx)) >= np.repeat(history.start[1:] - n, lengths)
    start = np.concatenate([[0], np.cumsum(np.minimum(lengths, n))])
    return Histories(
        start, history.item_idx[is_newest], history.event_at[is_newest], history.weight[is_newest]
    )


def mean_vectors(start: Array, items: Array, weights: Array, vectors: Array) -> Array:
    """Return the weighted mean of each row's item vectors, float32 (n, size); 0 for an empty row.

    Row r has the entries `start[r]:start[r + 1]` of `items` and `weights`. Sums run in float64 in
    the order of the row, so the mean of a row depends on no other row. Only the vectors of items
    that occur are copied, not those of the whole catalogue.
    """
    occurring, column = np.unique(items, return_inverse=True)
    sparse_weights = sparse.csr_matrix(
        (weights.astype(np.float64), column, start), shape=(len(start) - 1, len(occurring))
    )
    sums = sparse_weights @ vectors[occurring].astype(np.float64)  # (n, size)
    total_weight = np.asarray(sparse_weights.sum(axis=1)).reshape(-1, 1)  # (n, 1)
    return np.asarray(np.divide(sums, total_weight, out=sums, where=total_weight > 0), np.float32)


def unit_rows(vectors: Array) -> Array:
    """Return the rows of `vectors` scaled to length 1, float32; zero rows stay zero."""
    scaled = vectors.astype(np.float64)
    lengths = np.sqrt(np.square(scaled).sum(axis=1, keepdims=True))
    return np.divide(scaled, lengths, out=scaled, where=lengths > 0).astype(np.float32)
