"""Content2vec: items that the same users act on, learnt from their vectors by several models.

The modules are the models of `needs`: encoders of texts, pictures, sounds, and retrievers with item
vectors (prod2vec, als, …). A network learns from them which pairs of items go together. It is
trained by Horovod ranks on files of pairs that Petastorm reads. An item that nobody acted on has no
vector by a retriever; the network has learnt what its content alone is worth.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from recspark import storage
from recspark.config import digest
from recspark.data.blocks import Array, QueryBlock, local_index, micros
from recspark.data.dataset import Dataset
from recspark.data.training_pairs import write_training_pairs
from recspark.data.training_rows import n_training_files
from recspark.errors import ConfigError, EmptyDataError, ModelError
from recspark.models.base import NOTHING, Algorithm, ArraysModel, FitOptions, Needed
from recspark.models.content.content2vec_modules import Modules
from recspark.models.content.content2vec_settings import Content2VecSettings
from recspark.models.content.content2vec_training import Inputs, train_rank
from recspark.models.content.pair_scores import PairScorer, PairVectors
from recspark.models.kinds import Kind
from recspark.models.neural import check_catalogue_size, net_arrays, train_on_ranks
from recspark.models.scoring import topk
from recspark.models.scoring.contributions import Contributions
from recspark.models.scoring.listed import ListedScores
from recspark.models.vectors.scoring import MeanVectorScorer, newest
from recspark.models.vectors.similar_items import SimilarItemsScorer, lists_of
from recspark.models.weights import HistoryWeights
from recspark.train.loop import load_weights

_NET = "net."  # begins the names of the network's arrays


class Content2Vec(Algorithm[Content2VecSettings]):
    """Score of item i = sum over the items j of the history of decayed weight_j * P(i, j).

    P is the probability, by the network, that i and j are a positive pair: a pair that `min_users`
    users have, and `min_lift` times as many as by chance. Only the `n_neighbours` items with events
    that are likeliest beside i count. P is relative to how many negative pairs were drawn.

    Source: Nedelec, Smirnova, Vasile 2017, "Specializing Joint Representations for the Task of
    Product Recommendation". There the modules are trained for the pairs too, and their vectors are
    those of the paper's own networks; here the modules are fitted before, each by its own aim.
    """

    settings_class = Content2VecSettings

    def check_needs(self, kinds: Mapping[str, Kind]) -> None:
        """See `Algorithm`. Encoders and retrievers, one at least; `fit` checks that a retriever has
        item vectors.
        """
        if not kinds or "ranker" in kinds.values():
            raise ConfigError(
                "content2vec joins the item vectors of encoders and of retrievers such as prod2vec or "
                f"als, one at least; needs = {[*kinds]}"
            )

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> Content2VecModel:
        """See `Algorithm.fit`.

        One job for each encoder; `write_training_pairs`; the ranks train; one job finds the
        neighbours, exactly: n_items * (items with events) * (D + 4 hidden_size) operations. The driver
        holds the vectors of all items, 4 bytes per number, and the neighbours. Raises EmptyDataError
        where there is no item with a vector, or no positive pair of such items, ModelError where a
        retriever has no vectors of items.
        """
        settings = self.settings
        vocabulary = data.vocabulary()
        modules = Modules.read(data, needed, vocabulary)
        warm = modules.of(vocabulary)
        if len(warm.items) < 2:
            raise EmptyDataError(
                f"content2vec: {len(warm.items)} items with an event before {data.cutoff:%Y-%m-%d} have "
                f"a vector by {[*needed]}: do the items have content that these encoders read?"
            )
        bytes_per_item = 4.0 * modules.vectors.shape[1] + 8 * (settings.n_neighbours or 0)
        check_catalogue_size(
            "content2vec", modules.items, settings.max_items, bytes_per_item, "content_knn"
        )
        rules = settings.rules(options.seed)
        n_files = n_training_files(options.train.ranks)
        mean, scale = warm.mean_and_scale(options.seed)
        with options.scratch_folder() as scratch:
            checksum = hashlib.sha256(warm.vectors.tobytes()).hexdigest()
            key = digest([warm.items.tolist(), checksum, repr(rules), n_files])
            folder = storage.join(scratch, f"pairs-{key}")
            pairs = write_training_pairs(
                data.histories, warm.items, rules, storage.join(folder, "rows"), n_files
            )
            options.progress(f"  content2vec: {pairs.n_positive:,} positive pairs")
            inputs = Inputs.write(warm, mean, scale, folder)
            trained = train_on_ranks(
                "content2vec",
                data.histories.sparkSession,
                options,
                settings,
                warm.items,
                partial(train_rank, inputs),
                pairs.training,
                pairs.held_out,
            )
            net = inputs.make_net(settings, options.seed)
            load_weights(net, trained)
        weights = [
            f"{name} {weight:.3f}"
            for name, weight in zip(modules.names, net.weights.tolist(), strict=True)
        ]
        options.progress(f"  content2vec: weights of the similarities: {', '.join(weights)}")
        is_cold = ~np.isin(modules.items, vocabulary)
        arrays = {
            "vectors": modules.vectors,
            "has_vector": modules.has_vector,
            "sizes": np.array(modules.sizes, np.int32),
            "is_cold": is_cold,
            **{f"{_NET}{name}": array for name, array in net_arrays(net).items()},
        }
        model = Content2VecModel(settings, data.cutoff, modules.items, arrays)
        if settings.n_neighbours is not None:
            arrays |= neighbour_lists(data, model, is_cold, settings)
        return Content2VecModel(settings, data.cutoff, modules.items, arrays)


class Content2VecModel(ArraysModel):
    """The vectors of all items, the network, and for each item those to whose score it adds.

    `vectors` float32 (n_items, D), `has_vector` bool (n_items, M), `sizes` int32 (M,): see `Modules`.
    `is_cold` bool (n_items,). The arrays that begin with `net.` are those of `PairNet`. With
    `n_neighbours`, item j adds `similarities` float32 (probabilities) to the score of each of the
    items `neighbours[start[j]:start[j + 1]]`, int32 local indices, ascending; `start` is int64
    (n_items + 1,).
    """

    settings: Content2VecSettings

    @cached_property
    def pair_vectors(self) -> PairVectors:
        """What the network says of each item."""
        arrays = {name: np.asarray(array) for name, array in self._arrays.items()}
        net = {
            name.removeprefix(_NET): array
            for name, array in arrays.items()
            if name.startswith(_NET)
        }
        return PairVectors.of(
            arrays["vectors"], arrays["has_vector"], arrays["sizes"].tolist(), net
        )

    def pair_probabilities(self, item_a: Array, item_b: Array) -> Array:
        """Return the probability of each pair of item_idx, float64 (p,).

        Raises ModelError where the model does not know an item.
        """
        a, b = local_index(self.items, item_a), local_index(self.items, item_b)
        if (a < 0).any() or (b < 0).any():
            n = int(((a < 0) | (b < 0)).sum())
            raise ModelError(
                f"content2vec: {n:,} of {len(a):,} pairs have an item without a vector; leave them out"
            )
        return _probability(self.pair_vectors.logits(a, b))

    def scorer(self) -> topk.Scorer | topk.ListScorer:
        """See `RetrieverModel`."""
        settings = self.settings
        weights = HistoryWeights.sums(self.cutoff, settings.half_life_days)
        if settings.n_neighbours is not None:
            shared = self.shared_arrays()
            lists = (shared[name] for name in ("start", "neighbours", "similarities"))
            return RecentItemsScorer(
                SimilarItemsScorer(weights, self.items, *lists), settings.n_recent
            )
        own, others = self.pair_vectors.linear_vectors
        is_listed = np.ones(len(self.items), bool)
        if settings.items == "cold":
            is_listed = np.asarray(self._arrays["is_cold"])
        bias = np.where(is_listed, self.pair_vectors.constant, -np.inf).astype(np.float32)
        return MeanVectorScorer(
            weights, settings.n_recent, self.items, topk.Shared(own), topk.Shared(others), bias
        )


@dataclass(frozen=True)
class RecentItemsScorer:
    """`SimilarItemsScorer` on the `n_recent` newest events of each user; None = on all."""

    scorer: SimilarItemsScorer
    n_recent: int | None

    def score(self, block: QueryBlock) -> ListedScores:
        """See `topk.ListScorer`."""
        return self.scorer.score(self._recent(block))

    def contributions(self, block: QueryBlock, rows: Array, items: Array) -> Contributions:
        """See `ContributingScorer`. Item j adds its decayed weight times the probability."""
        return self.scorer.contributions(self._recent(block), rows, items)

    def _recent(self, block: QueryBlock) -> QueryBlock:
        if self.n_recent is None:
            return block
        return replace(block, history=newest(block.history, self.n_recent))


def neighbour_lists(
    data: Dataset, model: Content2VecModel, is_cold: Array, settings: Content2VecSettings
) -> dict[str, Array]:
    """Return `start`, `neighbours` and `similarities` of `Content2VecModel`. One job."""
    assert settings.n_neighbours is not None
    items, vectors = model.items, model.pair_vectors
    found = topk.neighbours(
        data.histories.sparkSession,
        items,
        PairScorer(items, vectors),
        micros(data.cutoff),
        settings.n_neighbours,
        allowed=items[~is_cold],
        with_itself=True,
    ).toArrow()
    listed, own = (
        local_index(items, found.column(name).to_numpy()) for name in ("item_idx", "neighbour_idx")
    )
    score = found.column("score").to_numpy().astype(np.float64)
    probability = _probability(score + vectors.constant if vectors.is_linear else score)
    if settings.items == "cold":
        is_kept = is_cold[listed]
        listed, own, probability = listed[is_kept], own[is_kept], probability[is_kept]
    return lists_of(own, listed, probability, len(items))


def _probability(logit: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-np.clip(logit, -50, 50))))
