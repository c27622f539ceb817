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
import torch
from pydantic import Field, model_validator
from torch.nn import functional

from recspark import storage
from recspark.config import digest
from recspark.data.blocks import Array, QueryBlock, local_index, micros
from recspark.data.dataset import Dataset
from recspark.data.training_pairs import (
    A_IS_HELD_OUT,
    B_IS_HELD_OUT,
    COLUMNS,
    PairRules,
    write_training_pairs,
)
from recspark.data.training_rows import n_training_files
from recspark.errors import ConfigError, EmptyDataError, ModelError
from recspark.models.base import NOTHING, Algorithm, ArraysModel, FitOptions, Needed
from recspark.models.content.encoders import ListedItems
from recspark.models.content.pair_scores import PairScorer, PairVectors
from recspark.models.item_vectors import needed_vectors
from recspark.models.kinds import Kind
from recspark.models.neural import (
    Job,
    NetworkTask,
    NeuralSettings,
    check_catalogue_size,
    look_up,
    net_arrays,
    train_on_ranks,
)
from recspark.models.scoring import topk
from recspark.models.scoring.contributions import Contributions
from recspark.models.scoring.listed import ListedScores
from recspark.models.setting_types import HalfLifeDays
from recspark.models.vectors.scoring import MeanVectorScorer, newest
from recspark.models.vectors.similar_items import SimilarItemsScorer, lists_of
from recspark.models.weights import HistoryWeights
from recspark.nets.content2vec import Merger, PairNet
from recspark.train.comm import Comm
from recspark.train.feed import Batch
from recspark.train.loop import Trained, load_weights

_NET = "net."  # begins the names of the network's arrays
_RANDOM_PAIRS = 100_000  # pairs that say how large the cosines of a module are


class Content2VecSettings(NeuralSettings):
    """Settings of `Content2Vec`."""

    merger: Merger = Field(
        "residual",
        description="how the modules are joined. linear = a weight for the similarity by each module; "
        "crossfeat = besides, one for the product of each two; residual = besides linear, a residual "
        "unit over the vectors of both items. Nedelec et al. 2017, section 3",
        json_schema_extra={"tune": {"choices": ["linear", "crossfeat", "residual"]}},
    )
    hidden_size: int = Field(
        64,
        ge=1,
        description="with merger: residual, units of the residual layer. Guess",
        json_schema_extra={"tune": {"choices": [32, 64, 128]}},
    )
    min_users: int = Field(
        20, ge=1, description="users who have both items of a positive pair, at least. Guess"
    )
    min_lift: float = Field(
        2.0,
        gt=0,
        description="how many times as many users as by chance have both items of a positive pair, at "
        "least. Guess",
    )
    max_history: int = Field(
        500,
        ge=2,
        le=10_000,
        description="newest events of a user that pairs are made of; the cost grows with its square. "
        "Guess",
    )
    n_negatives: int = Field(
        5,
        ge=1,
        le=100,
        description="negative pairs drawn for each positive one; those that are positive are left out. "
        "Habit of word2vec",
    )
    n_matched: int = Field(
        20,
        ge=1,
        description="in a negative pair, one of this many items takes the place of an item: those whose "
        "numbers of users are nearest to its own. The more there are, the less popular are the "
        "negatives of the most popular items. Guess",
    )
    cold_dropout: float = Field(
        0.3,
        ge=0,
        lt=1,
        description="in training, share of the items whose vectors by retrievers are hidden, so that the "
        "network learns what content alone is worth. As DropoutNet, Volkovs et al. 2017. Guess",
        json_schema_extra={"tune": {"choices": [0.1, 0.3, 0.5]}},
    )
    n_neighbours: int | None = Field(
        50,
        ge=1,
        le=10_000,
        description="only this many of the items with events that are likeliest beside an item add to "
        "its score; each takes 8 bytes on the driver and on the workers. null, with merger: linear "
        "= all, by their logits. As content_knn",
    )
    n_recent: int | None = Field(
        None, ge=1, description="newest events of a user that count at scoring; null = all"
    )
    half_life_days: HalfLifeDays = None
    items: ListedItems = "all"
    max_items: int = Field(
        200_000,
        ge=2,
        description="largest number of items with a vector: each is compared with each that has events. "
        "Guess",
    )
    epochs: int = Field(20, ge=1, description="passes over the pairs, at most. Guess")
    batch_size: int = Field(
        1024, ge=1, description="pairs per step, all ranks together; the ranks share them"
    )
    learning_rate: float = Field(
        5e-3,
        gt=0,
        description="learning rate of Adam at the first step; it falls linearly to 0. Guess",
        json_schema_extra={"tune": {"low": 5e-4, "high": 2e-2, "log": True}},
    )
    weight_decay: float = Field(
        1e-4,
        ge=0,
        description="L2 penalty on all parameters. Guess",
        json_schema_extra={"tune": {"low": 1e-6, "high": 1e-2, "log": True}},
    )
    validation: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of the items (not of the pairs) that is held out. The pairs of such an item "
        "are validated on, without its vectors by retrievers, as if it were new; the model gets the "
        "weights of the epoch with the smallest loss on them",
    )
    patience: int = Field(
        3,
        ge=0,
        description="the training ends after this many epochs in a row without a smaller loss on held-out "
        "items; 0 = it runs all epochs",
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Content2VecSettings:
        if self.n_neighbours is None and self.merger != "linear":
            raise ValueError(
                f"n_neighbours: null needs merger: linear; with {self.merger} a score is no dot product"
            )
        return self

    def rules(self, seed: int) -> PairRules:
        """Return the rules of the training pairs."""
        return PairRules(
            self.min_users,
            self.min_lift,
            self.max_history,
            self.n_negatives,
            self.n_matched,
            self.validation,
            seed,
        )


@dataclass(frozen=True)
class Modules:
    """The vectors of items by all modules.

    `items` item_idx int32 (n,), ascending; `vectors` float32 (n, D): joined, of each module of length
    1, or 0 where there is none; `has_vector` bool (n, M); `sizes`, `names`: of each module;
    `is_behaviour`: whether it learns from events, so that an item without events has no vector.
    """

    items: Array
    vectors: Array
    has_vector: Array
    sizes: tuple[int, ...]
    names: tuple[str, ...]
    is_behaviour: tuple[bool, ...]

    def of(self, items: Array) -> Modules:
        """Return the vectors of those of `items` (ascending) that have one."""
        is_kept = np.isin(self.items, items)
        return replace(
            self,
            items=self.items[is_kept],
            vectors=self.vectors[is_kept],
            has_vector=self.has_vector[is_kept],
        )

    @classmethod
    def read(cls, data: Dataset, needed: Needed, vocabulary: Array) -> Modules:
        """Return the vectors of the models of `needs`. One job for each encoder.

        A retriever's vector of an item that is not in `vocabulary` is never read: nobody acted on it,
        so whatever it is tells nothing. Items without any vector are left out. Raises ModelError
        where a retriever has no vectors of items.
        """
        of_modules = {
            name: needed_vectors("content2vec", data, name, model) for name, model in needed.items()
        }
        is_behaviour = tuple(model.kind == "retriever" for model in needed.values())
        items = np.unique(np.concatenate([v.item_idx for v in of_modules.values()])).astype(
            np.int32
        )
        is_warm = np.isin(items, vocabulary)
        parts = [v.rows_of(items) for v in of_modules.values()]
        for part, of_behaviour in zip(parts, is_behaviour, strict=True):
            if of_behaviour:
                part[~is_warm] = 0
        has_vector = np.stack([part.any(axis=1) for part in parts], axis=1)
        has_any = has_vector.any(axis=1)
        return cls(
            items[has_any],
            np.concatenate(parts, axis=1, dtype=np.float32)[has_any],
            has_vector[has_any],
            tuple(part.shape[1] for part in parts),
            tuple(of_modules),
            is_behaviour,
        )

    def mean_and_scale(self, seed: int) -> tuple[Array, Array]:
        """Return the mean and the deviation of each module's cosines of random pairs, float32 (M,).

        A module with hardly any vectors, or with equal ones, has the scale 1.
        """
        rng = np.random.default_rng([seed, 3])
        i, j = rng.integers(0, len(self.items), (2, _RANDOM_PAIRS))
        mean, scale = np.zeros(len(self.sizes)), np.ones(len(self.sizes))
        for m, (end, size) in enumerate(zip(np.cumsum(self.sizes), self.sizes, strict=True)):
            is_pair = self.has_vector[i, m] & self.has_vector[j, m] & (i != j)
            part = self.vectors[:, end - size : end]
            pairs = np.flatnonzero(is_pair)
            cosines = np.concatenate(
                [
                    np.einsum("pd,pd->p", part[i[some]], part[j[some]], dtype=np.float64)
                    for some in np.array_split(pairs, max(1, len(pairs) // 4096))
                ]
            )
            if len(cosines) > 1 and cosines.std() > 1e-6:
                mean[m], scale[m] = cosines.mean(), cosines.std()
        return mean.astype(np.float32), scale.astype(np.float32)


@dataclass(frozen=True)
class Inputs:
    """What every rank reads beside the pairs; the arrays lie in files.

    `vectors`, `has_vector` : URIs of the arrays of `Modules` of the items of the job. `mean`, `scale`
    float32 (M,): see `PairNet`.
    """

    vectors: str
    has_vector: str
    sizes: tuple[int, ...]
    is_behaviour: tuple[bool, ...]
    mean: Array
    scale: Array

    @classmethod
    def write(cls, modules: Modules, mean: Array, scale: Array, folder: str) -> Inputs:
        """Write the arrays of `modules` below `folder`."""
        uris = [storage.join(folder, f"{name}.npy") for name in ("vectors", "has_vector")]
        for uri, array in zip(uris, (modules.vectors, modules.has_vector), strict=True):
            storage.write_array(uri, array)
        return cls(uris[0], uris[1], modules.sizes, modules.is_behaviour, mean, scale)

    def make_net(self, settings: Content2VecSettings, seed: int) -> PairNet:
        """Return the network with first weights drawn from `seed`."""
        generator = torch.Generator().manual_seed(seed)
        net = PairNet(self.sizes, settings.merger, settings.hidden_size, generator)
        net.mean.copy_(torch.from_numpy(self.mean))
        net.scale.copy_(torch.from_numpy(self.scale))
        return net


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


def train_rank(inputs: Inputs, comm: Comm, job: Job) -> Trained:
    """Train on one rank; see `recspark.train.launch`."""
    task = NetworkTask(comm, job, COLUMNS)
    net = inputs.make_net(task.settings, task.seed)
    table = ItemTable(
        storage.read_array(inputs.vectors, mmap=True),
        storage.read_array(inputs.has_vector, mmap=True),
        inputs,
        task.vocabulary,
    )
    return task.train(net, partial(row_loss, net, table, task.settings.cold_dropout))


@dataclass(frozen=True)
class ItemTable:
    """Looks up the inputs of the network for items; `vocabulary` int64 (n_items,) are their item_idx."""

    vectors: Array
    has_vector: Array
    inputs: Inputs
    vocabulary: torch.Tensor

    def rows(
        self, items: torch.Tensor, is_hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the vectors (B, D) and whether each module has one (B, M), of `items` (B,).

        An item for which `is_hidden`, bool (B,), has no vector by a retriever.
        """
        local = look_up(items, self.vocabulary)[0].cpu().numpy()
        vectors = torch.from_numpy(np.array(self.vectors[local])).to(items.device)  # (B, D)
        has = torch.from_numpy(self.has_vector[local].astype(np.float32)).to(items.device)  # (B, M)
        of_behaviour = torch.tensor(self.inputs.is_behaviour, device=items.device)  # (M,)
        has = has * ~(is_hidden[:, None] & of_behaviour)
        sizes = torch.tensor(self.inputs.sizes, device=items.device)  # (M,)
        return vectors * has.repeat_interleave(sizes, dim=1), has


def row_loss(
    net: PairNet,
    table: ItemTable,
    cold_dropout: float,
    batch: Batch,
    generator: torch.Generator | None,
    done: float,
) -> torch.Tensor:
    """Return the logistic loss of each pair, (B,).

    With a `generator` items are hidden at random; without one, those that are held out.
    """
    tensors = batch.tensors
    logits = pair_logits(net, table, tensors, cold_dropout, generator)  # (B,)
    return functional.binary_cross_entropy_with_logits(
        logits, tensors["label"].float(), reduction="none"
    )


def pair_logits(
    net: PairNet,
    table: ItemTable,
    tensors: Mapping[str, torch.Tensor],
    cold_dropout: float,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Return the logits of the pairs of a batch, (B,); see `row_loss`."""
    sides = []
    for name, bit in (("item_a", A_IS_HELD_OUT), ("item_b", B_IS_HELD_OUT)):
        items, held_out = tensors[name], tensors["held_out"]  # (B,) each
        if generator is None:
            is_hidden = (held_out & bit) > 0  # (B,)
        else:
            draws = torch.rand(len(items), generator=generator, device=items.device)  # (B,)
            is_hidden = draws < cold_dropout
        sides.append(table.rows(items, is_hidden))
    (a, has_a), (b, has_b) = sides
    logits: torch.Tensor = net(a, b, has_a, has_b)
    return logits


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
