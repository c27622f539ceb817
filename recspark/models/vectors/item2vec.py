"""Item2vec: items that share baskets or sessions get vectors that point the same way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator
from pyspark.sql import DataFrame, SparkSession
from scipy import sparse

from recspark.data.blocks import Array, Histories, QueryBlock, micros, parse_histories
from recspark.data.dataset import Dataset
from recspark.engines.word2vec import keep_chances, train
from recspark.engines.word2vec_examples import SENTENCES
from recspark.engines.word2vec_step import Word2Vec
from recspark.models.base import (
    NOTHING,
    Algorithm,
    FitOptions,
    Needed,
    RetrieverModel,
    Settings,
    check_k,
)
from recspark.models.scoring import topk
from recspark.models.setting_types import HalfLifeDays, VectorSize
from recspark.models.weights import HistoryWeights


class Item2VecSettings(Settings):
    """Settings of `Item2Vec`.

    "Tuned" = the best of Caselles-Dupré et al. 2018 for next-event prediction, on music (two sets),
    e-commerce and click streams, as their repository `w2v_reco_hyperparameters_matter` lists them.
    """

    sentence: Literal["order", "session", "history"] = Field(
        "order",
        description="what counts as one sentence: an order (where an event has none, its session), "
        "a session, or the user's whole history. Barkan and Koenigstein 2016: the basket",
        json_schema_extra={"tune": {"choices": ["order", "session", "history"]}},
    )
    architecture: Literal["skipgram", "cbow"] = Field(
        "skipgram", description="predict an item from each neighbour, or from their mean"
    )
    loss: Literal["negative", "hierarchical"] = Field(
        "negative", description="negative sampling, or hierarchical softmax over a Huffman tree"
    )
    window: int | None = Field(
        None,
        ge=1,
        description="places to either side; null = the whole sentence as a set, order ignored "
        "(Barkan and Koenigstein 2016). Tuned, for sequences: 3, 3, 3, 7",
        json_schema_extra={"tune": {"choices": [None, 3, 5, 10]}},
    )
    shrink_window: bool = Field(
        False, description="draw each window uniformly from 1 to `window`, as word2vec does"
    )
    embedding_size: VectorSize = Field(
        64,
        description="length of a vector. Guess",
    )
    n_negatives: int = Field(
        10, ge=1, description="noise items an example; negative sampling. Mikolov et al.: 5 to 20"
    )
    ns_exponent: float = Field(
        1.0,
        ge=-2,
        le=2,
        description="noise is drawn by uses^ns_exponent; below 0, rare items more often. "
        "Tuned: -0.5, -0.5, 1, -1; word2vec: 0.75",
        json_schema_extra={"tune": {"low": -1.0, "high": 1.0}},
    )
    subsample: float | None = Field(
        1e-3,
        gt=0,
        description="share of all uses above which an item's uses are thinned; null = none. "
        "Tuned: 1e-5, 1e-5, 1e-3, 1e-5",
        json_schema_extra={"tune": {"choices": [None, 1e-3, 1e-4, 1e-5]}},
    )
    epochs: int = Field(
        30,
        ge=1,
        description="passes over the sentences. Tuned: 110, 130, 140, 150; 30 is a guess at what a "
        "night allows (word2vec: 5)",
        json_schema_extra={"tune": {"choices": [10, 30, 100]}},
    )
    learning_rate: float = Field(
        0.025,
        gt=0,
        description="at the first example, falling linearly. Source: word2vec",
        json_schema_extra={"tune": {"low": 0.005, "high": 0.1, "log": True}},
    )
    min_learning_rate: float = Field(
        0.0001, ge=0, description="after the last example. Source: word2vec"
    )
    min_count: int = Field(
        1, ge=1, description="an item with fewer uses gets no vector and is not recommended"
    )
    max_length: int = Field(
        100,
        ge=2,
        le=10_000,
        description="items; a longer sentence is cut. A set of n makes n^2 pairs. Guess",
    )
    score: Literal["cosine", "likelihood"] = Field(
        "likelihood",
        description="of the user's mean vector with an item: cosine of input vectors, or what "
        "training fits (negative sampling only): log P(item | recent item), the product with the "
        "item's output vector + log of its noise, less the log of what subsampling keeps",
        json_schema_extra={"tune": {"choices": ["cosine", "likelihood"]}},
    )
    half_life_days: HalfLifeDays = Field(
        30.0,
        description="days; an event this old counts half in the user's mean; null = no decay. Guess",
    )
    n_recent: int | None = Field(
        None, ge=1, description="only the user's newest events count; null = all"
    )
    n_blocks: int = Field(
        2,
        ge=1,
        le=4096,
        description="blocks of items = tasks at once. Quality does not depend on it "
        "(benchmarks/item2vec.py), the bits do",
    )
    n_rotations: int = Field(
        8,
        ge=1,
        le=16,
        description="times an epoch that all blocks meet; with 1, 4 blocks lost a fifth of the hit "
        "rate on Diginetica",
    )

    @model_validator(mode="after")
    def _has_outputs(self) -> Self:
        if self.loss == "hierarchical" and self.score == "likelihood":
            raise ValueError(
                "score: likelihood needs an output vector for each item; hierarchical softmax has "
                "them for the nodes of its tree: say score: cosine"
            )
        return self


class Item2VecModel(RetrieverModel):
    """What a user's recent items add up to, against every item.

    `vectors` float32 (n_items, size): of inputs. For `score: likelihood`, `outputs` float32
    (n_items, size) and `bias` float32 (n_items,), see `priors`; else both have no rows.
    """

    def __init__(
        self,
        settings: Item2VecSettings,
        cutoff: datetime,
        items: Array,
        vectors: Array,
        outputs: Array,
        bias: Array,
    ) -> None:
        super().__init__(settings, cutoff, items)
        self.vectors, self.outputs, self.bias = vectors, outputs, bias
        self._settings = settings

    def scorer(self) -> topk.Scorer:
        """See `RetrieverModel`."""
        if self._settings.score == "cosine":
            return self._cosine()
        return self._scorer(self.vectors, self.outputs, self.bias)

    def neighbours(self, k: int) -> DataFrame:
        """See `RetrieverModel`; by the cosine of input vectors, whatever `score` says."""
        check_k(k)
        spark = SparkSession.active()
        return topk.neighbours(spark, self.items, self._cosine(), micros(self.cutoff), k)

    def arrays(self) -> dict[str, Array]:
        """See `RetrieverModel`."""
        return {"vectors": self.vectors, "outputs": self.outputs, "bias": self.bias}

    @classmethod
    def from_arrays(
        cls, settings: Settings, cutoff: datetime, items: Array, arrays: dict[str, Array]
    ) -> Self:
        """See `RetrieverModel`."""
        assert isinstance(settings, Item2VecSettings)
        return cls(settings, cutoff, items, arrays["vectors"], arrays["outputs"], arrays["bias"])

    def _cosine(self) -> Item2VecScorer:
        unit = unit_rows(self.vectors)
        return self._scorer(unit, unit, None)

    def _scorer(self, vectors: Array, others: Array, bias: Array | None) -> Item2VecScorer:
        settings = self._settings
        weights = HistoryWeights.sums(self.cutoff, settings.half_life_days)
        return Item2VecScorer(
            weights, settings.n_recent, self.items, topk.Shared(vectors), topk.Shared(others), bias
        )


@dataclass(frozen=True)
class Item2VecScorer:
    """Averages the vectors of recent items, weighted by decay, and multiplies.

    `vectors`, `others` float32 (n_items, size); `bias` float32 (n_items,), or None: the score is the
    cosine, and both are of length 1.
    """

    weights: HistoryWeights
    n_recent: int | None
    items: Array
    vectors: topk.Shared
    others: topk.Shared
    bias: Array | None

    def score(self, block: QueryBlock) -> topk.Scores:
        """See `topk.Scorer`."""
        history = block.history if self.n_recent is None else newest(block.history, self.n_recent)
        start, items, weights = self.weights.local(history, self.items)
        users = mean_vectors(start, items, weights, np.asarray(self.vectors.array))
        if self.bias is None:
            users = unit_rows(users)
        return topk.DotScores(users, np.asarray(self.others.array), self.bias, np.diff(start) > 0)


class Item2Vec(Algorithm[Item2VecSettings]):
    """Skip-gram or CBOW over baskets, sessions or histories; users are means of recent items.

    Source: Barkan and Koenigstein 2016, "Item2Vec"; Mikolov et al. 2013; settings: Caselles-Dupré
    et al. 2018, "Word2vec applied to recommendation: hyperparameters matter"; decayed mean of
    recent purchases: Grbovic et al. 2015.
    """

    settings_class = Item2VecSettings

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> Item2VecModel:
        """See `Algorithm.fit`.

        An item that never shared a sentence with another one has no vector and is left out of the
        model. Raises EmptyDataError where no two items share a sentence, DivergedError where
        vectors explode. Vectors and examples pass through `options.scratch`; see `engines.word2vec`
        for the cost.
        """
        settings = self.settings
        items = data.vocabulary()
        learnt = train(
            sentences(data.histories, settings.sentence),
            items,
            engine_settings(settings, options.seed),
            scratch=options.scratch,
            progress=options.progress,
        )
        known = np.flatnonzero(learnt.counts)
        outputs = np.zeros((0, settings.embedding_size), np.float32)
        bias = np.zeros(0, np.float32)
        if settings.score == "likelihood":
            assert learnt.outputs is not None
            outputs = learnt.outputs[known]
            bias = priors(learnt.counts, settings)[known]
        return Item2VecModel(
            settings, data.cutoff, items[known], learnt.inputs[known], outputs, bias
        )


def engine_settings(settings: Item2VecSettings, seed: int) -> Word2Vec:
    """Return what the engine needs to know."""
    return Word2Vec(
        size=settings.embedding_size,
        architecture=settings.architecture,
        loss=settings.loss,
        window=settings.window,
        shrink_window=settings.shrink_window,
        n_negatives=settings.n_negatives,
        ns_exponent=settings.ns_exponent,
        subsample=settings.subsample,
        min_count=settings.min_count,
        max_length=settings.max_length,
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        min_learning_rate=settings.min_learning_rate,
        n_blocks=settings.n_blocks,
        n_rotations=settings.n_rotations,
        seed=seed,
    )


def priors(counts: Array, settings: Item2VecSettings) -> Array:
    """Return float32 (n,): what likelihood adds to in . out for each item.

    Training fits in . out = log P(item | recent item) - log noise, P over what subsampling keeps
    (Levy and Goldberg 2014, equation 7, but for a constant); so the noise is added again, and what
    was thinned is weighed up.

    >>> settings = Item2VecSettings(ns_exponent=0.5, subsample=None)
    >>> priors(np.array([1, 4]), settings).round(3)
    array([-1.099, -0.405], dtype=float32)
    """
    used = counts > 0
    noise = counts[used].astype(np.float64) ** settings.ns_exponent
    out = np.full(len(counts), -np.inf, np.float32)
    out[used] = np.log(noise / noise.sum()) - np.log(keep_chances(counts, settings.subsample)[used])
    return out


def sentences(histories: DataFrame, sentence: str) -> DataFrame:
    """Return `sentence_id, items` of `histories`; items in time order. Narrow, lazy.

    The id is made from user_idx and the sentence's number among the user's own, so it does not
    change with partitions, nor when events follow.
    """
    return histories.select("user_idx", "history").mapInArrow(
        partial(cut_histories, sentence=sentence), SENTENCES
    )


def cut_histories(batches: Iterable[pa.RecordBatch], sentence: str) -> Iterator[pa.RecordBatch]:
    """Return `SENTENCES` of batches of `user_idx, history`."""
    for batch in batches:
        history = parse_histories(batch.column("history"))
        user, rows = batch.column("user_idx").to_numpy(), history.rows
        group = _groups(batch.column("history").flatten(), sentence)
        # Number the groups of each user by first appearance: runs of (row, group), times in order.
        order = np.lexsort((group, rows))
        new = np.ones(len(order), bool)
        new[1:] = (np.diff(rows[order]) != 0) | (np.diff(group[order]) != 0)
        which = np.cumsum(new) - 1  # of the sorted events
        begun = order[new]  # each group's first event: lexsort is stable
        by_row = np.argsort(begun, kind="stable")  # groups by row, then first appearance
        place = np.empty(len(begun), np.int64)
        place[by_row] = np.arange(len(begun))
        of_event = np.empty(len(order), np.int64)
        of_event[order] = place[which]
        row = rows[begun[by_row]]
        number = np.arange(len(row)) - np.searchsorted(row, row)
        events = np.argsort(of_event, kind="stable")
        start = np.concatenate([[0], np.cumsum(np.bincount(of_event, minlength=len(begun)))])
        yield pa.RecordBatch.from_arrays(
            [
                pa.array(user[row] * _USER + number * _NUMBER, pa.int64()),
                pa.ListArray.from_arrays(
                    pa.array(start, pa.int32()), pa.array(history.item_idx[events], pa.int32())
                ),
            ],
            names=SENTENCES.names,
        )


# Odd, so that ids of one user, and first ids of all users, differ; what is drawn hashes them again.
_USER, _NUMBER = np.int64(0x1E3779B97F4A7C15), np.int64(0x3F58476D1CE4E5B9)


def _groups(events: pa.StructArray, sentence: str) -> Array:
    """Return an int for each event: those of a row with the same one share a sentence."""
    if sentence == "history":
        return np.zeros(len(events), np.int64)
    names = events.field("session_id")
    if sentence == "order":
        names = pc.coalesce(events.field("order_id"), names)
    codes = names.dictionary_encode(null_encoding="encode")
    return codes.indices.to_numpy(zero_copy_only=False).astype(np.int64)


def newest(history: Histories, n: int) -> Histories:
    """Return the n newest events of each row."""
    lengths = np.diff(history.start)
    kept = np.arange(len(history.item_idx)) >= np.repeat(history.start[1:] - n, lengths)
    start = np.concatenate([[0], np.cumsum(np.minimum(lengths, n))])
    return Histories(start, history.item_idx[kept], history.event_at[kept], history.weight[kept])


def mean_vectors(start: Array, items: Array, weights: Array, vectors: Array) -> Array:
    """Return float32 (n, size): the weighted mean of each row's item vectors; 0 for no items.

    Sums run in float64 in the order of the row, so a row's answer depends on that row alone.
    """
    rows = sparse.csr_matrix(
        (weights.astype(np.float64), items, start), shape=(len(start) - 1, len(vectors))
    )
    sums = rows @ vectors.astype(np.float64)  # (n, size)
    weight = np.asarray(rows.sum(axis=1)).reshape(-1, 1)  # (n, 1)
    return np.asarray(np.divide(sums, weight, out=sums, where=weight > 0), np.float32)


def unit_rows(vectors: Array) -> Array:
    """Return `vectors` brought to length 1, float32; zero rows stay zero."""
    wide = vectors.astype(np.float64)
    lengths = np.sqrt(np.square(wide).sum(axis=1, keepdims=True))
    return np.divide(wide, lengths, out=wide, where=lengths > 0).astype(np.float32)
