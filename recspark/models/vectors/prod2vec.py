"""Prod2vec: items that users buy one after the other, or in neighbouring orders, are neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from scipy import sparse
from scipy.cluster.vq import kmeans2

from recspark import schema
from recspark.data.blocks import Array, local_index, micros
from recspark.data.dataset import Dataset
from recspark.engines.word2vec import Vectors, train_vectors
from recspark.engines.word2vec_examples import Metadata
from recspark.models.base import NOTHING, Algorithm, ArraysModel, FitOptions, Needed
from recspark.models.scoring import topk
from recspark.models.setting_types import HalfLifeDays
from recspark.models.vectors.scoring import MeanVectorScorer, priors, unit_rows
from recspark.models.vectors.sentences import bagged_sentences, sentences
from recspark.models.vectors.similar_items import SimilarItemsScorer, lists_of
from recspark.models.vectors.word2vec_settings import Word2VecSettings
from recspark.models.weights import HistoryWeights

_STEPS = 2**20  # shares of a step between clusters are rounded to multiples of 1 / _STEPS
_KMEANS_ITERATIONS = 30


class Prod2VecSettings(Word2VecSettings):
    """Settings of `Prod2Vec`."""

    bag: Literal["item", "order", "session"] = Field(
        "item",
        description="what a window counts: item = single events of the user's history (prod2vec); "
        "order = orders (bagged-prod2vec; where an event has no order, its session); session = "
        "sessions. Grbovic et al. 2015, sections 3.2 and 3.3",
        json_schema_extra={"tune": {"choices": ["item", "order"]}},
    )
    within_bag: bool = Field(
        False,
        description="whether the items of one order (session) predict each other too. Grbovic et "
        "al. 2015, equation 3.3: no",
    )
    window: int = Field(
        5,
        ge=1,
        description="number of events, orders or sessions to either side whose items are "
        "neighbours. Habit of word2vec",
        json_schema_extra={"tune": {"choices": [1, 2, 5, 10]}},
    )
    similarity: Literal["cosine", "probability"] = Field(
        "cosine",
        description="similarity of an item to a bought one. cosine = that of their input vectors. "
        "probability = that the item is in the window of the bought one, which training fits: "
        "exp(input of the bought item . output of the item), times the item's share of the noise "
        "over the share of its uses that subsampling keeps",
        json_schema_extra={"tune": {"choices": ["cosine", "probability"]}},
    )
    popularity: float = Field(
        1.0,
        ge=0,
        le=1,
        description="with similarity: probability: the power to which the share of the item counts. "
        "1 = the probability, 0 = how many times likelier the item is than by chance",
        json_schema_extra={"tune": {"low": 0.0, "high": 1.0}},
    )
    n_neighbours: int = Field(
        100,
        ge=1,
        le=10_000,
        description="most similar items kept per item; each takes 8 bytes on the driver and on the "
        "workers. Guess",
    )
    n_clusters: int | None = Field(
        None,
        ge=2,
        le=65_536,
        description="clusters of item vectors (k-means). Only items of the clusters that users buy "
        "from next are neighbours of an item; null = items of all clusters may be. Grbovic et al. "
        "2015, section 3.5",
    )
    n_next_clusters: int = Field(
        5,
        ge=1,
        description="with n_clusters: number of the likeliest next clusters whose items are "
        "neighbours. Guess",
    )
    half_life_days: HalfLifeDays = Field(
        6.58,
        description="days; what an event this old adds counts half; null = no decay. Grbovic et "
        "al. 2015 let it fall to 0.9 of it per day: 6.58 days",
    )

    @model_validator(mode="after")
    def _check_bags(self) -> Self:
        if self.within_bag and self.bag == "item":
            raise ValueError("within_bag: true needs bag: order or bag: session")
        return self


class Prod2VecModel(ArraysModel):
    """The fitted vectors, and the most similar items of each item.

    `vectors` float32 (n_items, size): the input vectors. Item j has the similar items
    `neighbours[start[j]:start[j + 1]]`, int32 local indices, ascending, with `similarities` float32
    (p,), above 0. `start` is int64 (n_items + 1,). With `similarity: cosine` an item is similar to
    itself by 1; with `probability` the model says how likely it is bought again.
    """

    settings: Prod2VecSettings
    vectors_array = "vectors"

    def scorer(self) -> topk.ListScorer:
        """See `RetrieverModel`."""
        arrays = self.shared_arrays()
        return SimilarItemsScorer(
            HistoryWeights.sums(self.cutoff, self.settings.half_life_days),
            self.items,
            *(arrays[name] for name in ("start", "neighbours", "similarities")),
        )


class Prod2Vec(Algorithm[Prod2VecSettings]):
    """Score of item i = sum over the items j of the history of decayed weight_j * similarity(j, i).

    The vectors are those of skip-gram over each user's events in time order; with `bag: order` over
    orders, so that the items of neighbouring orders predict each other and those of one order do
    not.

    Source: Grbovic et al. 2015, "E-commerce in Your Inbox: Product Recommendations at Scale".
    """

    settings_class: ClassVar[type[Prod2VecSettings]] = Prod2VecSettings
    fitted_class: ClassVar[type[Prod2VecModel]] = Prod2VecModel

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> Prod2VecModel:
        """See `Algorithm.fit`.

        An item that has no item in its windows is left out of the model. Raises EmptyDataError if
        no user has two items in two bags, and DivergedError if the vectors diverge. Vectors and
        examples pass through files in `options.scratch`; see `engines.word2vec` for the cost. One
        job more finds the similar items, exactly, among all items of the catalogue: its cost is
        n_items^2. With `n_clusters`, one job counts the steps between clusters, and the driver
        finds the similar items, in n_items^2 * n_next_clusters / n_clusters.
        """
        settings = self.settings
        items = data.vocabulary()
        sentences_of_users = sentences_by_bag(data.histories, settings.bag)
        trained = train_vectors(
            sentences_of_users,
            items,
            replace(
                settings.of_engine(options.seed),
                window=settings.window,
                within_bag=settings.within_bag,
            ),
            metadata=self.metadata(data, items),
            scratch=options.scratch,
            progress=options.progress,
        )
        has_vector = np.flatnonzero(trained.counts)
        kept_items = items[has_vector]
        vectors = trained.inputs[has_vector]
        if settings.n_clusters is None:
            neighbours = similar_items(data, kept_items, trained, settings)
        else:
            cluster = clusters(vectors, settings.n_clusters, options.seed)
            steps = steps_between_clusters(sentences_of_users, kept_items, cluster)
            neighbours = similar_items_of_clusters(vectors, cluster, steps, settings)
        arrays = {"vectors": vectors, **neighbours}
        return self.fitted_class(settings, data.cutoff, kept_items, arrays)

    def metadata(self, data: Dataset, items: Array) -> Metadata | None:
        """Return the metadata of each of `items` that take part in training; None = no metadata."""
        return None


def sentences_by_bag(histories: DataFrame, bag: str) -> DataFrame:
    """Return the sentences that `train_vectors` learns from; see the setting `bag`. Narrow, lazy."""
    return sentences(histories, "history") if bag == "item" else bagged_sentences(histories, bag)


def similar_items(
    data: Dataset, items: Array, trained: Vectors, settings: Prod2VecSettings
) -> dict[str, Array]:
    """Return `start`, `neighbours` and `similarities` of `Prod2VecModel`.

    `items` : the items with a vector, ascending. One job; the driver holds the result.
    """
    has_vector = np.flatnonzero(trained.counts)
    vectors, by_cosine = trained.inputs[has_vector], settings.similarity == "cosine"
    if by_cosine:
        vectors = targets = unit_rows(vectors)
    else:
        assert trained.outputs is not None
        targets = trained.outputs[has_vector]
    scorer = MeanVectorScorer(
        HistoryWeights.sums(data.cutoff, None),
        None,
        items,
        topk.Shared(vectors),
        topk.Shared(targets),
        None if by_cosine else settings.popularity * priors(trained.counts, settings)[has_vector],
    )
    spark = data.histories.sparkSession
    found = topk.neighbours(
        spark, items, scorer, micros(data.cutoff), settings.n_neighbours, with_itself=True
    ).toArrow()
    item, neighbour = (
        local_index(items, found.column(name).to_numpy()) for name in ("item_idx", "neighbour_idx")
    )
    score = found.column("score").to_numpy().astype(np.float64)
    value = score if by_cosine else np.exp(np.minimum(score, 50))
    return lists_of(item, neighbour, value, len(items))


def clusters(vectors: Array, n_clusters: int, seed: int) -> Array:
    """Return the cluster of each vector, int64 (n,): k-means of the vectors scaled to length 1.

    On the driver; scipy's `kmeans2` from k-means++ (Arthur and Vassilvitskii 2007). With fewer
    vectors than clusters, each vector is a cluster.
    """
    if len(vectors) <= n_clusters:
        return np.arange(len(vectors))
    _, labels = kmeans2(
        unit_rows(vectors).astype(np.float64),
        n_clusters,
        iter=_KMEANS_ITERATIONS,
        minit="++",
        missing="warn",
        seed=np.random.default_rng(seed),
    )
    return labels.astype(np.int64)


def steps_between_clusters(sentences: DataFrame, items: Array, cluster: Array) -> Array:
    """Return how often users step from one cluster to another, float64 (n, n).

    A user steps from each bag (without bags, from each item) to the next one. A step counts 1 in
    all: it is shared by the clusters of the two bags in proportion to their items. Shares are
    rounded to multiples of 2^-20, so the sums do not depend on partitions.

    `sentences` : as `sentences_by_bag` returns them; `items` ascending, with their `cluster`. One
    job with a shuffle of at most n^2 rows per task; the driver holds the result.
    """
    n_clusters = int(cluster.max()) + 1
    shared = sentences.sparkSession.sparkContext.broadcast((items, cluster))

    def count(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        vocabulary, cluster_of_item = shared.value
        for batch in batches:
            steps = _steps_of_batch(batch, vocabulary, cluster_of_item, n_clusters).tocoo()
            yield pa.RecordBatch.from_arrays(
                [
                    pa.array(steps.row, pa.int32()),
                    pa.array(steps.col, pa.int32()),
                    pa.array(np.rint(steps.data * _STEPS), pa.float64()).cast(pa.int64()),
                ],
                names=_CLUSTER_STEPS.names,
            )

    try:
        summed = (
            sentences.mapInArrow(count, _CLUSTER_STEPS)
            .groupBy("cluster", "next")
            .agg(F.sum("steps").alias("steps"))
            .toArrow()
        )
    finally:
        shared.destroy()
    steps = np.zeros((n_clusters, n_clusters))
    steps[summed.column("cluster").to_numpy(), summed.column("next").to_numpy()] = (
        summed.column("steps").to_numpy() / _STEPS
    )
    return steps


_CLUSTER_STEPS = schema.columns(cluster=schema.INT, next=schema.INT, steps=schema.LONG)


def _steps_of_batch(
    batch: pa.RecordBatch, items: Array, cluster: Array, n_clusters: int
) -> sparse.csr_matrix:
    """Return the steps of a batch of sentences between clusters, (n_clusters, n_clusters)."""
    column = batch.column("items")
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    row = np.repeat(np.arange(len(lengths)), lengths)
    local = local_index(items, column.flatten().to_numpy(zero_copy_only=False))
    if "bags" in batch.schema.names:
        bag = batch.column("bags").flatten().to_numpy(zero_copy_only=False)
    else:
        bag = np.arange(len(row))
    is_known = local >= 0
    row, local, bag = row[is_known], local[is_known], bag[is_known]
    is_first = np.ones(len(row), bool)  # the first item of each bag
    is_first[1:] = (np.diff(row) != 0) | (np.diff(bag) != 0)
    bag_number = np.cumsum(is_first) - 1
    row_of_bag = row[is_first]
    n_items_of_bag = np.bincount(bag_number, minlength=len(row_of_bag))
    # `shares[b, c]` is the share of the items of bag b that are of cluster c.
    shares = sparse.csr_matrix(
        (1 / n_items_of_bag[bag_number], (bag_number, cluster[local])),
        shape=(len(row_of_bag), n_clusters),
    )
    if len(row_of_bag) < 2:
        return sparse.csr_matrix((n_clusters, n_clusters))
    is_step = sparse.diags((row_of_bag[1:] == row_of_bag[:-1]).astype(np.float64))
    return shares[:-1].T @ is_step @ shares[1:]


def similar_items_of_clusters(
    vectors: Array, cluster: Array, steps: Array, settings: Prod2VecSettings
) -> dict[str, Array]:
    """Return `start`, `neighbours` and `similarities` of `Prod2VecModel`, by clusters.

    The neighbours of an item are the items nearest by cosine in the clusters that users step to
    from its cluster most often; of equal clusters, the smaller number comes first. On the driver.
    """
    unit_vectors = unit_rows(vectors)
    likeliest = np.argsort(-steps, axis=1, kind="stable")[:, : settings.n_next_clusters]
    parts: list[tuple[Array, Array, Array]] = []
    for number in range(len(steps)):
        next_clusters = likeliest[number][steps[number, likeliest[number]] > 0]
        candidates = np.flatnonzero(np.isin(cluster, next_clusters))
        members = np.flatnonzero(cluster == number)
        if not len(candidates):
            continue
        rows_at_once = max(1, (1 << 22) // len(candidates))
        for begin in range(0, len(members), rows_at_once):
            some = members[begin : begin + rows_at_once]
            cosines = unit_vectors[some] @ unit_vectors[candidates].T  # (some, candidates)
            order = np.argsort(-cosines, axis=1, kind="stable")[:, : settings.n_neighbours]
            parts.append(
                (
                    np.repeat(some, order.shape[1]),
                    candidates[order].ravel(),
                    np.take_along_axis(cosines, order, axis=1).ravel(),
                )
            )
    item, neighbour, value = (
        np.concatenate(arrays) if parts else np.zeros(0, np.int64)
        for arrays in (zip(*parts, strict=True) if parts else [(), (), ()])
    )
    return lists_of(item, neighbour, value, len(vectors))
