"""User2vec: users and items have vectors, and the vector of a user helps to predict the own items."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark.data.blocks import Array, Histories, QueryBlock, local_index, parse_histories, where
from recspark.data.dataset import Dataset
from recspark.engines.paragraphs import (
    DOCUMENTS,
    Method,
    Paragraphs,
    WordMatrices,
    infer,
    train_paragraphs,
)
from recspark.errors import EmptyDataError
from recspark.models.base import NOTHING, Algorithm, ArraysModel, FitOptions, Needed
from recspark.models.scoring import topk
from recspark.models.vectors.scoring import newest, priors, unit_rows
from recspark.models.vectors.word2vec_settings import SamplingSettings

_METHODS: dict[str, Method] = {"dm": "dm_mean", "dbow": "dbow"}
_SHARES = 2**20  # `share_of_users` is rounded to multiples of 1 / _SHARES


class User2VecSettings(SamplingSettings):
    """Settings of `User2Vec`. For "tuned" see `SamplingSettings`."""

    mode: Literal["dm", "dbow"] = Field(
        "dm",
        description="what predicts an item of a user: dm = the mean of the user's vector and of the "
        "vectors of the items around it; dbow = the user's vector alone, which costs half. "
        "Grbovic et al. 2015: dm",
        json_schema_extra={"tune": {"choices": ["dm", "dbow"]}},
    )
    nearest: Literal["inputs", "outputs"] = Field(
        "outputs",
        description="what the items nearest to a user's vector are. inputs (dm only) = those with "
        "the highest cosine of their input vectors: Grbovic et al. 2015. outputs = those that the "
        "user most likely acts on, which training fits: the dot product with the output vector, "
        "plus popularity times the log of the item's share of the noise over the share of its uses "
        "that subsampling keeps",
    )
    popularity: float = Field(
        1.0,
        ge=0,
        le=1,
        description="with nearest: outputs: the power to which the share of the item counts. 1 = "
        "the probability, 0 = how many times likelier the item is than by chance",
        json_schema_extra={"tune": {"low": 0.0, "high": 1.0}},
    )
    window: int = Field(
        5,
        ge=1,
        le=50,
        description="dm: number of events to either side whose items help to predict an item; it is "
        "drawn from 1 to this for each event. Grbovic et al. 2015: 5",
        json_schema_extra={"tune": {"choices": [1, 2, 5, 10]}},
    )
    subsample: float | None = Field(
        None,
        gt=0,
        description="subsampling: in training, items with more than this share of all uses lose "
        "some of their uses at random; null = no subsampling. At scoring no event is lost",
        json_schema_extra={"tune": {"choices": [None, 1e-3, 1e-4]}},
    )
    epochs: int = Field(
        10,
        ge=1,
        description="passes over the histories in training, and over a user's history for the "
        "user's vector. Guess (word2vec: 5)",
        json_schema_extra={"tune": {"choices": [5, 10, 20, 40]}},
    )
    max_length: int = Field(
        500,
        ge=1,
        description="only this many of a user's newest events count, in training and at scoring, "
        "whose cost is in proportion to them. Guess",
    )
    n_recent: int | None = Field(
        None,
        ge=1,
        description="at scoring, only this many of the user's newest events count; null = "
        "max_length. Grbovic et al. 2015 found that vectors of users age fast",
        json_schema_extra={"tune": {"choices": [None, 20, 50, 100]}},
    )
    share_of_users: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the users that training reads, drawn by user and seed. All users get "
        "lists, but an item that none of the drawn users acted on has no vector. A training of 10^8 "
        "users needs less than 1",
    )
    n_blocks: int = Field(
        2,
        ge=1,
        le=4096,
        description="blocks of users and of items, which is the number of tasks that run at once",
    )
    n_rotations: int = Field(
        1,
        ge=1,
        le=16,
        description="parts of an epoch: after each, all blocks of items have met all users of the "
        "part, and with dm the workers' copies of the items become one",
    )

    @model_validator(mode="after")
    def _check_inputs(self) -> Self:
        if self.mode == "dbow" and self.nearest == "inputs":
            raise ValueError(
                "nearest: inputs needs input vectors of items, which mode: dbow does not learn: say "
                "nearest: outputs, or mode: dm"
            )
        return self

    def of_engine(self, seed: int) -> Paragraphs:
        """Return the settings of the engine."""
        return Paragraphs(
            size=self.embedding_size,
            method=_METHODS[self.mode],
            window=self.window,
            n_negatives=self.n_negatives,
            ns_exponent=self.ns_exponent,
            subsample=self.subsample,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            min_learning_rate=self.min_learning_rate,
            n_blocks=self.n_blocks,
            n_rotations=self.n_rotations,
            seed=seed,
        )


class User2VecModel(ArraysModel):
    """The fitted vectors of the items; a user's vector is solved from the history of the query.

    `inputs` float32 (n_items + 1, size): each item beside another one, then a row that stands for no
    item; with `mode: dbow` it has no rows. `outputs` float32 (n_items, size): each item as the one
    that is predicted. `uses` int64 (n_items,): how often training read each item, above 0. `seed`
    int64 (1,): that of the users' vectors.
    """

    settings: User2VecSettings
    vectors_array = "outputs"

    def scorer(self) -> User2VecScorer:
        """See `RetrieverModel`."""
        settings, arrays, shared = self.settings, self.arrays(), self.shared_arrays()
        targets, bias = shared["outputs"], None
        if settings.nearest == "inputs":
            targets = topk.Shared(unit_rows(np.asarray(arrays["inputs"][:-1])))
        else:
            bias = (settings.popularity * priors(arrays["uses"], settings)).astype(np.float32)
        return User2VecScorer(
            settings.model_copy(update={"subsample": None}).of_engine(int(arrays["seed"][0])),
            min(settings.max_length, settings.n_recent or settings.max_length),
            self.items,
            shared["uses"],
            shared["inputs"],
            shared["outputs"],
            targets,
            bias,
        )


@dataclass(frozen=True)
class User2VecScorer:
    """Scores items by the product of their row of `targets` with the user's vector.

    `inputs`, `outputs` and `uses` : see `User2VecModel`. `bias` float32 (n_items,) is added; with
    None the score is the cosine, and the rows of `targets` are of length 1.
    """

    engine: Paragraphs
    n_recent: int
    items: Array
    uses: topk.Shared
    inputs: topk.Shared
    outputs: topk.Shared
    targets: topk.Shared
    bias: Array | None

    def score(self, block: QueryBlock) -> topk.Scores:
        """See `topk.Scorer`."""
        users, is_known = self.vectors(block.history)
        if self.bias is None:
            users = unit_rows(users)
        return topk.DotScores(users, np.asarray(self.targets.array), self.bias, is_known)

    def vectors(self, history: Histories) -> tuple[Array, Array]:
        """Return the users' vectors, float32 (n, size), and whether the user has a known item.

        A vector depends on the model and on the items of the user's own history, in their order, and
        on nothing else: not on other rows, partitions or threads. Without a known item it is 0.
        """
        start, items = documents(history, self.items, self.n_recent)
        inputs, outputs, uses = (
            np.asarray(shared.array) for shared in (self.inputs, self.outputs, self.uses)
        )
        vectors = infer(WordMatrices(inputs, outputs), uses, self.engine, start, items)
        return vectors, np.diff(start) > 0


class User2Vec(Algorithm[User2VecSettings]):
    """A user is a document, and the items in time order are its words.

    Training maximises sum_i log P(item_i | mean of the user's vector and of the vectors of the items
    around i) over the events i of all users, by negative sampling; with `mode: dbow`, the user's
    vector alone predicts. What training learns of the items is kept, and what it learns of the users
    is not. At scoring, the vector of a user is learnt anew from the history of the query by the same
    steps, while the vectors of the items stay as they are (as ALS folds users in). So a user who is
    new, or who bought today, has a vector that is up to date, and no table of users exists.

    The paper has one more term, log P(user | mean of the vectors of the user's items), a softmax over
    all users. It is left out: its vectors of users as targets are used for nothing else, and its
    negatives would be other users. `mode: dbow` ties users and items in the other direction, as
    PV-DBOW does.

    Source: Grbovic et al. 2015, "E-commerce in Your Inbox: Product Recommendations at Scale",
    user2vec; Le and Mikolov 2014, "Distributed Representations of Sentences and Documents".
    """

    settings_class = User2VecSettings

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> User2VecModel:
        """See `Algorithm.fit`.

        Cost: one job counts the uses of items, then one shuffle of the histories by user, and epochs
        x n_rotations x n_blocks short jobs. In each of them, a task reads its users' items (4 bytes
        each), and reads and writes their vectors (4 bytes per number): see `engines.paragraphs`.
        Driver: item-sized, 8 bytes per item and number. Vectors pass through files in
        `options.scratch`. Raises EmptyDataError where no user who is drawn has a document, and
        DivergedError if the vectors diverge.
        """
        settings = self.settings
        histories = drawn_users(data.histories, settings.share_of_users, options.seed)
        vocabulary = data.vocabulary()
        uses = count_uses(histories, vocabulary, settings.max_length)
        if not uses.any():
            raise EmptyDataError(
                "user2vec: no drawn user has an event with a weight above 0 on an eligible item; is "
                f"share_of_users = {settings.share_of_users} not too small?"
            )
        items, uses = vocabulary[uses > 0], uses[uses > 0]
        words = train_paragraphs(
            documents_of_users(histories, items, settings.max_length),
            uses,
            settings.of_engine(options.seed),
            scratch=options.scratch,
            progress=options.progress,
        )
        arrays = {
            "inputs": words.inputs,
            "outputs": words.outputs,
            "uses": uses,
            "seed": np.array([options.seed], np.int64),
        }
        return User2VecModel(settings, data.cutoff, items, arrays)


def drawn_users(histories: DataFrame, share: float, seed: int) -> DataFrame:
    """Return the histories of a share of the users, drawn by user_idx and seed. Narrow, lazy."""
    if share == 1:
        return histories
    draw = F.pmod(F.xxhash64("user_idx", F.lit(seed)), F.lit(_SHARES))
    return histories.where(draw < round(share * _SHARES))


def documents(history: Histories, items: Array, max_length: int) -> tuple[Array, Array]:
    """Return the documents of users: (start, local).

    The document of row r is `local[start[r]:start[r + 1]]`: the local indices, int32, of the items of
    the newest `max_length` events, oldest first. Events count whose item is in `items` (item_idx,
    ascending) and whose weight is above 0; a user may have an item more than once.
    """
    known = where(history, (local_index(items, history.item_idx) >= 0) & (history.weight > 0))
    kept = newest(known, max_length)
    return kept.start.astype(np.int64), local_index(items, kept.item_idx).astype(np.int32)


def documents_of_users(histories: DataFrame, items: Array, max_length: int) -> DataFrame:
    """Return `paragraphs.DOCUMENTS`, the document of each user who has one. Narrow, lazy."""
    shared = histories.sparkSession.sparkContext.broadcast(items)

    def cut(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            history = parse_histories(batch.column("history"))
            start, local = documents(history, shared.value, max_length)
            lists = pa.ListArray.from_arrays(pa.array(start, pa.int32()), pa.array(local))
            has_item = pa.array(np.diff(start) > 0)
            yield pa.RecordBatch.from_arrays(
                [batch.column("user_idx").filter(has_item), lists.filter(has_item)],
                names=DOCUMENTS.names,
            )

    return histories.select("user_idx", "history").mapInArrow(cut, DOCUMENTS)


def count_uses(histories: DataFrame, items: Array, max_length: int) -> Array:
    """Return how often each of `items` is in the documents of users, int64 (n_items,). One job."""
    counted = (
        documents_of_users(histories, items, max_length)
        .select(F.explode("words").alias("item"))
        .groupBy("item")
        .count()
        .toArrow()
    )
    uses = np.zeros(len(items), np.int64)
    uses[counted.column("item").to_numpy()] = counted.column("count").to_numpy()
    return uses
