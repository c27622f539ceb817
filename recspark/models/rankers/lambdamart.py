"""LambdaMART: gradient-boosted trees that put the items a user acts on at the top of the list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field
from pyspark.sql import functions as F

from recspark.data.blocks import Array
from recspark.data.dataset import Dataset
from recspark.engines.boosting import Boosting, feature_matrix, grow_trees
from recspark.errors import ConfigError, EmptyDataError
from recspark.models.base import (
    NOTHING,
    Algorithm,
    ArraysRanker,
    FitOptions,
    Needed,
    PairBlock,
    Settings,
)
from recspark.models.kinds import Kind

if TYPE_CHECKING:
    from xgboost import Booster

# The rows of one list: a user's candidates of one mode, as of one cutoff.
_LIST = ("cutoff", "mode", "user_idx")


class LambdaMartSettings(Settings):
    """Settings of `LambdaMart`."""

    n_trees: int = Field(
        200,
        ge=1,
        le=100_000,
        description="trees. Source: bundled data",
        json_schema_extra={"tune": {"choices": [100, 200, 400]}},
    )
    learning_rate: float = Field(
        0.05,
        gt=0,
        le=1,
        description="what each tree adds is multiplied by this. Source: bundled data",
        json_schema_extra={"tune": {"low": 0.02, "high": 0.2, "log": True}},
    )
    max_leaves: int = Field(
        15,
        ge=2,
        le=4096,
        description="leaves of a tree. Source: bundled data",
        json_schema_extra={"tune": {"choices": [7, 15, 31]}},
    )
    min_leaf_weight: float = Field(
        1.0,
        ge=0,
        description="least sum of second derivatives in a leaf. Default of xgboost",
        json_schema_extra={"tune": {"low": 0.1, "high": 100, "log": True}},
    )
    features_per_tree: float = Field(
        0.3,
        gt=0,
        le=1,
        description="share of the features that a tree may read, drawn for each tree. Source: "
        "bundled data",
        json_schema_extra={"tune": {"choices": [0.2, 0.3, 0.5, 1.0]}},
    )
    rows_per_tree: float = Field(
        0.7,
        gt=0,
        le=1,
        description="share of the examples that a tree is grown on, drawn for each tree. Source: "
        "bundled data",
    )
    reg: float = Field(
        5.0,
        ge=0,
        description="L2 penalty on the values of leaves. Source: bundled data",
        json_schema_extra={"tune": {"low": 0.1, "high": 100, "log": True}},
    )
    truncation: int = Field(
        20,
        ge=1,
        le=10_000,
        description="pairs of examples count where one of the two is among this many first ones of "
        "the list, by the present scores. Source: bundled data",
    )
    max_bins: int = Field(
        256, ge=2, le=65_536, description="values of a number that a split may lie between. xgboost"
    )


class LambdaMart(Algorithm[LambdaMartSettings]):
    """Trees are grown on the gradients of pairs, weighed by what a swap would change in NDCG.

    Score of a pair = sum over the trees of the value of the leaf that the pair's features lead to.
    An example is relevant if the user acted on the item. xgboost grows the trees, on `train.ranks`
    tasks together.

    Source: Burges 2010, "From RankNet to LambdaRank to LambdaMART: An Overview"; Chen & Guestrin
    2016, "XGBoost: A Scalable Tree Boosting System".
    """

    settings_class = LambdaMartSettings

    def check_needs(self, kinds: Mapping[str, Kind]) -> None:
        """See `Algorithm`. At least one retriever."""
        if "retriever" not in kinds.values():
            raise ConfigError(
                f"lambdamart ranks what retrievers list: name one in needs, which are {[*kinds]}"
            )

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> LambdaMartModel:
        """See `Algorithm.fit`. One job that counts, one shuffle, and one barrier stage.

        The driver holds the trees. Raises EmptyDataError where no example is relevant or all are,
        NoSlotsError where the cluster has too few task slots for all workers at once, RankFailedError
        where a worker was lost twice (see `grow_trees`).
        """
        assert data.examples is not None
        rows, encoding = data.examples.rows, data.examples.encoding
        is_relevant = F.col("label") > 0
        n_relevant, n_rows = rows.agg(F.count_if(is_relevant), F.count(F.lit(1))).head()  # type: ignore[misc]
        if n_relevant in (0, n_rows):
            raise EmptyDataError(
                f"lambdamart: {n_relevant:,} of {n_rows:,} examples are items that the user acted "
                "on; it learns from lists that have both"
            )
        settings = self.settings
        params = {
            "objective": "rank:ndcg",
            "lambdarank_pair_method": "topk",
            "lambdarank_num_pair_per_sample": settings.truncation,
            "tree_method": "hist",
            "grow_policy": "lossguide",
            "max_depth": 0,
            "max_leaves": settings.max_leaves,
            "eta": settings.learning_rate,
            "min_child_weight": settings.min_leaf_weight,
            "colsample_bytree": settings.features_per_tree,
            "subsample": settings.rows_per_tree,
            "reg_lambda": settings.reg,
            "max_bin": settings.max_bins,
            "seed": options.seed,
        }
        trees = grow_trees(
            rows.withColumn("label", is_relevant.cast("float")),
            _LIST,
            ("item_idx",),
            encoding,
            Boosting(params, settings.n_trees, options.train),
        )
        arrays = {"trees": np.frombuffer(trees, np.uint8)}
        return LambdaMartModel(settings, data.cutoff, encoding, arrays)


class LambdaMartModel(ArraysRanker):
    """The grown trees: `trees` uint8 (n_bytes,), the JSON text in which xgboost saves them."""

    def pair_scorer(self) -> TreeScorer:
        """See `RankerModel`."""
        return TreeScorer(self._arrays["trees"].tobytes())


@dataclass(frozen=True)
class TreeScorer:
    """Adds up the values of the leaves that each pair leads to; one thread."""

    trees: bytes

    @cached_property
    def booster(self) -> Booster:
        """The trees as xgboost holds them."""
        import xgboost

        booster = xgboost.Booster({"nthread": 1})
        booster.load_model(bytearray(self.trees))
        return booster

    def score(self, block: PairBlock) -> Array:
        """See `PairScorer`."""
        if len(block.user_idx) == 0:
            return np.zeros(0, np.float32)
        matrix = feature_matrix(block.numbers, block.fields)
        return np.asarray(self.booster.inplace_predict(matrix, validate_features=False))

    def feature_contributions(self, block: PairBlock) -> Array:
        """See `ExplainedScorer`. Exact (TreeSHAP): Lundberg et al. 2020, "From local explanations
        to global understanding with explainable AI for trees".
        """
        import xgboost

        n_columns = block.numbers.shape[1] + block.fields.shape[1]
        if len(block.user_idx) == 0:
            return np.zeros((0, n_columns + 1), np.float32)
        data = xgboost.DMatrix(
            feature_matrix(block.numbers, block.fields),
            feature_types=["q"] * block.numbers.shape[1] + ["c"] * block.fields.shape[1],
            enable_categorical=True,
            nthread=1,
        )
        return np.asarray(self.booster.predict(data, pred_contribs=True, validate_features=False))
