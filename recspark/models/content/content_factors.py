"""Factors from content: items without events get the factors that their content predicts.

Item factors of a model of events (`als`, `mf`, …) are regressed on the content of the items. Items
with events keep their own factors, the others get the predicted ones, and all are ranked together.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field
from pyspark.sql import functions as F

from recspark.data.blocks import Array, Histories, QueryBlock, Ragged, local_index
from recspark.data.dataset import Dataset
from recspark.data.feature_encoding import Encoding
from recspark.errors import ConfigError, EmptyDataError, ModelError
from recspark.models.base import (
    NOTHING,
    Algorithm,
    FitOptions,
    Needed,
    RetrieverModel,
    Settings,
)
from recspark.models.content.encoders import ListedItems, encoders_in
from recspark.models.content.ridge import Block, BlockRidge, fit_ridge
from recspark.models.item_vectors import encoded_items
from recspark.models.kinds import Kind
from recspark.models.scoring import topk

_BASE = "base."  # begins the names of the arrays of the model of events
_BASE_TEXTS = "base_texts"  # the array with the class of the model of events, and its settings
_LEAST_ITEMS = 10  # items with events and content, for a regression
_MAX_CATEGORIES = 1000  # the most frequent categories
FieldBlock = Literal["category", "price"]


class ContentFactorsSettings(Settings):
    """Settings of `ContentFactors`."""

    fields: tuple[FieldBlock, ...] = Field(
        ("category", "price"),
        description="columns of the catalogue that are a block of content beside the encoders: "
        "category = the categories of all levels (the 1,000 most frequent); price = its logarithm, "
        "in ten classes",
    )
    validation: float = Field(
        0.15,
        gt=0,
        lt=1,
        description="share of the items with events on which the penalties of the blocks are "
        "chosen. Habit",
    )
    evidence: float | None = Field(
        None,
        gt=0,
        description="blend: an item with n users gets n / (n + evidence) of its own factors and the "
        "rest of the predicted ones. null = items with events keep their own factors",
        json_schema_extra={"tune": {"low": 0.3, "high": 100, "log": True}},
    )
    weighting: Literal["users", "items"] = Field(
        "items",
        description="what an item's error counts in the regression. items = all items alike; users "
        "= the square root of the number of its users",
    )
    items: ListedItems = "all"


class ContentFactorsModel(RetrieverModel):
    """The model of events, and the factors of all items.

    `base` : the fitted model of events. `factors` float32 (n_items, d) and `bias` float32 (n_items,)
    of all listed items; `bias` has no entry (0,) where the model of events has none. A user's vector
    is that of the model of events: it follows from the factors of items with events alone.
    """

    settings: ContentFactorsSettings

    def __init__(
        self,
        settings: Settings,
        cutoff: datetime,
        items: Array,
        base: RetrieverModel,
        factors: Array,
        bias: Array,
    ) -> None:
        super().__init__(settings, cutoff, items)
        self.base, self.factors, self.bias = base, factors, bias

    @property
    def user_encoding(self) -> Encoding | None:
        """See `FittedModel`."""
        return self.base.user_encoding

    def item_vectors(self) -> Array:
        """See `RetrieverModel`."""
        return self.factors

    def arrays(self) -> dict[str, Array]:
        """See `RetrieverModel`. A dot ends each text: numpy drops NULs at the end of a text."""
        base_settings = json.dumps(self.base.settings.model_dump(mode="json"), sort_keys=True)
        texts_of_base = (
            class_path(type(self.base)),
            class_path(type(self.base.settings)),
            base_settings,
        )
        texts = np.array([f"{text}." for text in texts_of_base], np.str_)
        arrays = {"factors": self.factors, "bias": self.bias, _BASE_TEXTS: texts}
        return arrays | {f"{_BASE}{name}": a for name, a in self.base.saved_arrays().items()}

    @classmethod
    def from_arrays(
        cls, settings: Settings, cutoff: datetime, items: Array, arrays: dict[str, Array]
    ) -> Self:
        """See `RetrieverModel`."""
        texts = [str(text)[:-1] for text in arrays[_BASE_TEXTS].tolist()]
        base_class, base_settings = class_at(texts[0]), class_at(texts[1])(**json.loads(texts[2]))
        base_arrays = {
            name.removeprefix(_BASE): array
            for name, array in arrays.items()
            if name.startswith(_BASE)
        }
        base = base_class.restored(base_settings, cutoff, base_arrays)
        return cls(settings, cutoff, items, base, arrays["factors"], arrays["bias"])

    def scorer(self) -> topk.Scorer:
        """See `RetrieverModel`."""
        scorer = self.base.scorer()
        bias = topk.Shared(self.bias) if len(self.bias) else None
        return ContentFactorsScorer(scorer, topk.Shared(self.factors), bias)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ContentFactorsScorer:
    """Takes the users' vectors of the model of events, and multiplies them with all factors."""

    base: topk.Scorer
    factors: topk.Shared
    bias: topk.Shared | None

    def score(self, block: QueryBlock) -> topk.Scores:
        """See `topk.Scorer`."""
        scores = self.base.score(block)
        assert isinstance(scores, topk.DotScores)
        bias = None if self.bias is None else np.asarray(self.bias.array)
        return replace(scores, items=np.asarray(self.factors.array), bias=bias)


class ContentFactors(Algorithm[ContentFactorsSettings]):
    """Item factors of a model of events for items with events, predicted factors for the others.

    The prediction is a ridge regression from the content of an item to its factors (and its bias),
    learnt from the items with events. Each encoder, the categories and the price are a block with a
    penalty of its own: see `ridge`. The factors of an item without events are never those of the
    model of events, even where that model has some.

    Source: Gantner et al. 2010, "Learning attribute-to-feature mappings for cold-start
    recommendations" (linear maps); van den Oord et al. 2013.
    """

    settings_class = ContentFactorsSettings

    def check_needs(self, kinds: Mapping[str, Kind]) -> None:
        """See `Algorithm`. One retriever; encoders, or `fields`."""
        retrievers = [name for name, kind in kinds.items() if kind == "retriever"]
        encoders = encoders_in(kinds)
        if len(retrievers) != 1 or len(encoders) + 1 != len(kinds):
            raise ConfigError(
                "content_factors is built on one model with item factors (als, mf, …) and on "
                f"encoders; needs = {[*kinds]}"
            )
        if not encoders and not self.settings.fields:
            raise ConfigError(
                "content_factors has no content to read: name an encoder in `needs`, or category or "
                "price in `fields`"
            )
        if clash := sorted({*encoders} & {*self.settings.fields}):
            raise ConfigError(
                f"content_factors: the encoders {clash} are called like `fields`; name them otherwise"
            )

    def fit(
        self, data: Dataset, options: FitOptions, needed: Needed = NOTHING
    ) -> ContentFactorsModel:
        """See `Algorithm.fit`.

        One job for each encoder, one for the catalogue, and one for the vocabulary. The driver holds
        the vectors of all items. Raises ModelError where the model of events has no item factors,
        EmptyDataError where too few items have events and content.
        """
        settings = self.settings
        [(name, base)] = [
            (name, model) for name, model in needed.items() if isinstance(model, RetrieverModel)
        ]
        factors, bias = item_factors(name, base)
        is_warm = np.isin(base.items, data.vocabulary())
        items, blocks = content_blocks(data, encoders_of(needed), settings.fields, base.items)
        of_base = local_index(base.items[is_warm], items)  # -1 = without events
        is_learnt_from = (of_base >= 0) & np.any([b.is_known for b in blocks.values()], axis=0)
        if is_learnt_from.sum() < _LEAST_ITEMS:
            raise EmptyDataError(
                f"content_factors: {is_learnt_from.sum()} items have both factors by '{name}' and "
                f"content ({', '.join(blocks)}); it takes {_LEAST_ITEMS} to learn from"
            )
        targets = np.concatenate([factors, bias[:, None]], axis=1) if len(bias) else factors
        targets = targets[is_warm]
        rows = np.flatnonzero(is_learnt_from)
        n_users = users_of_items(data, items)
        ridge = fit_ridge(
            {name: Block(b.values[rows], b.is_known[rows]) for name, b in blocks.items()},
            targets[of_base[rows]],
            row_weights(items[rows], n_users[rows], settings, options.seed),
        )
        options.progress(described(ridge))
        predicted = ridge.predict(blocks)
        combined = combine(predicted, targets, of_base, n_users, settings.evidence)
        if settings.items == "cold":
            items, combined = items[of_base < 0], combined[of_base < 0]
        all_factors, all_bias = combined[:, : factors.shape[1]], combined[:, factors.shape[1] :]
        return ContentFactorsModel(
            settings,
            data.cutoff,
            items,
            base,
            np.ascontiguousarray(all_factors),
            np.ascontiguousarray(all_bias.ravel()),
        )


def encoders_of(needed: Needed) -> list[str]:
    """Return the names of the encoders among `needed`."""
    return encoders_in({name: model.kind for name, model in needed.items()})


def class_path(of: type) -> str:
    """Return `module:name` of a class."""
    return f"{of.__module__}:{of.__qualname__}"


def class_at(path: str) -> Any:
    """Return the class at `module:name`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def item_factors(name: str, base: RetrieverModel) -> tuple[Array, Array]:
    """Return the item factors (n_items, d) and bias (n_items,) or (0,) of a model of events.

    Raises ModelError where its scores are no products of a user's and an item's vector.
    """
    no_events = Histories(
        np.zeros(1, np.int64), *(np.zeros(0, t) for t in (np.int32, np.int64, np.float32))
    )
    nobody = QueryBlock(
        np.zeros(0, np.int64), no_events, Ragged(np.zeros(1, np.int64), np.zeros(0, np.int32))
    )
    scores = base.scorer().score(nobody)
    if not isinstance(scores, topk.DotScores):
        raise ModelError(
            f"content_factors is built on '{name}', which has no item factors; name a model such as "
            "als or mf in `needs`"
        )
    bias = np.zeros(0, np.float32) if scores.bias is None else scores.bias
    return np.asarray(scores.items), np.asarray(bias)


def content_blocks(
    data: Dataset, encoders: list[str], fields: tuple[str, ...], warm_items: Array
) -> tuple[Array, dict[str, Block]]:
    """Return the listed items, int32 (n,) ascending, and their blocks of content.

    Listed are `warm_items`, and every item that has one of the blocks.
    """
    encoded = {name: encoded_items(data, name) for name in encoders}
    described = catalogue_fields(data, fields)
    known = [one.item_idx for one in encoded.values()]
    known += [item_idx[block.is_known] for item_idx, block in described.values()]
    items = np.unique(np.concatenate([warm_items, *known])).astype(np.int32)
    blocks = {}
    for name, one in encoded.items():
        values = one.rows_of(items)
        blocks[name] = Block(values, values.any(axis=1))
    for name, (item_idx, block) in described.items():
        local = local_index(item_idx, items) if len(item_idx) else np.full(len(items), -1)
        values = np.zeros((len(items), block.values.shape[1]), np.float32)
        is_known = np.zeros(len(items), bool)
        values[local >= 0] = block.values[local[local >= 0]]
        is_known[local >= 0] = block.is_known[local[local >= 0]]
        blocks[name] = Block(values, is_known)
    return items, blocks


def catalogue_fields(data: Dataset, fields: tuple[str, ...]) -> dict[str, tuple[Array, Block]]:
    """Return field -> (item_idx ascending, block of the described items). One job, or none."""
    if not fields or data.catalogue is None:
        return {}
    rows = data.catalogue.select("item_idx", *fields).toArrow().combine_chunks()
    rows = rows.sort_by("item_idx")
    item_idx = rows.column("item_idx").to_numpy().astype(np.int32)
    makers = {"category": category_block, "price": price_block}
    return {
        name: (item_idx, makers[name](rows.column(name).combine_chunks()))
        for name in fields
        if len(item_idx)
    }


def category_block(categories: pa.ListArray) -> Block:
    """Return 1 / sqrt(number of the item's categories) for each of its categories.

    Columns are the 1,000 most frequent names, of any level; of equally frequent ones the smaller.
    """
    lengths = categories.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    row = np.repeat(np.arange(len(categories)), lengths)
    names = categories.flatten()
    row, names = row[pc.is_valid(names).to_numpy(zero_copy_only=False)], names.drop_null()
    codes = names.dictionary_encode()
    texts = np.array(codes.dictionary.to_pylist() or [""], object)
    code = codes.indices.to_numpy(zero_copy_only=False)
    pairs = np.unique(np.stack([row, code], axis=1), axis=0).astype(np.int64)  # distinct
    row, code = pairs[:, 0], pairs[:, 1]
    counts = np.bincount(code, minlength=len(texts))
    columns = sorted(range(len(texts)), key=lambda c: (-counts[c], texts[c]))[:_MAX_CATEGORIES]
    column_of = np.full(len(texts), -1)
    column_of[columns] = np.arange(len(columns))
    column = column_of[code]
    row, column = row[column >= 0], column[column >= 0]
    n_categories = np.bincount(row, minlength=len(categories))
    values = np.zeros((len(categories), len(columns)), np.float32)
    values[row, column] = 1 / np.sqrt(n_categories[row])
    return Block(values, n_categories > 0)


def price_block(prices: pa.Array) -> Block:
    """Return ten classes of the price, by tenths of the known prices, as hats on its logarithm.

    A price between two class marks belongs to both, in proportion: no jump, and no straight line.
    """
    price = prices.to_numpy(zero_copy_only=False).astype(np.float64)
    is_known = np.isfinite(price) & (price > 0)
    logs = np.log(np.where(is_known, price, 1.0))
    marks = np.unique(np.quantile(logs[is_known], np.linspace(0, 1, 10))) if is_known.any() else []
    values = np.zeros((len(price), max(len(marks), 1)), np.float32)
    for column in range(len(marks)):
        unit = np.zeros(len(marks))
        unit[column] = 1
        values[:, column] = np.interp(logs, marks, unit)
    return Block(values, is_known)


def users_of_items(data: Dataset, items: Array) -> Array:
    """Return the number of users of each of `items` before the cutoff, float64 (n,). One job."""
    rows = data.item_features.select("item_idx", F.col("n_users").cast("double")).toArrow()
    n_users = np.zeros(len(items))
    local = local_index(items, rows.column("item_idx").to_numpy())
    n_users[local[local >= 0]] = rows.column("n_users").to_numpy()[local >= 0]
    return n_users


def row_weights(items: Array, n_users: Array, settings: ContentFactorsSettings, seed: int) -> Array:
    """Return the weights that `fit_ridge` takes; negative for the items of the validation.

    A hash of the item and the seed decides, so an item stays on its side when others come.
    """
    weights = np.ones(len(items)) if settings.weighting == "items" else np.sqrt(n_users + 1.0)
    mixed = (
        items.astype(np.uint64) + np.uint64(1) + np.uint64(seed) * np.uint64(1_000_003)
    ) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    is_held = (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53 < settings.validation
    if not is_held.any() or is_held.all():
        is_held = np.arange(len(items)) % 7 == 0
    return np.where(is_held, -weights, weights)


def combine(
    predicted: Array, own: Array, of_base: Array, n_users: Array, evidence: float | None
) -> Array:
    """Return the targets of all items, float32 (n_items, n_targets).

    `own` (n_warm, n_targets); item i has `own[of_base[i]]`, or none where `of_base[i]` is -1. Without
    `evidence`, an item with its own keeps it to the last bit.

    >>> predicted, own = np.array([[0.0], [4.0]], np.float32), np.array([[8.0]], np.float32)
    >>> combine(predicted, own, np.array([0, -1]), np.array([3.0, 0.0]), None).tolist()
    [[8.0], [4.0]]
    >>> combine(predicted, own, np.array([0, -1]), np.array([3.0, 0.0]), 1.0).tolist()
    [[6.0], [4.0]]
    """
    out = predicted.astype(np.float32)
    is_warm = of_base >= 0
    if evidence is None:
        out[is_warm] = own[of_base[is_warm]]
    else:
        share = (n_users / (n_users + evidence))[is_warm, None]
        out[is_warm] = share * own[of_base[is_warm]] + (1 - share) * predicted[is_warm]
    return out


def described(ridge: BlockRidge) -> str:
    """Return a line of text that says what the blocks are worth."""
    blocks = ", ".join(
        f"{name} {'off' if np.isinf(penalty) else f'{penalty:g}'} (alone {ridge.errors[name]:.3f})"
        for name, penalty in ridge.penalties.items()
    )
    return f"content_factors: error {ridge.errors['all']:.3f} of the mean's; penalties: {blocks}"
