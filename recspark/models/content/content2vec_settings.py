"""Settings of `content2vec`: how modules are joined, which pairs are made, how long it trains."""

from __future__ import annotations

from pydantic import Field, model_validator

from recspark.data.training_pairs import PairRules
from recspark.models.content.encoders import ListedItems
from recspark.models.neural import NeuralSettings
from recspark.models.setting_types import HalfLifeDays, LearningRate, Patience, ValidationShare
from recspark.nets.content2vec import Merger


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
    learning_rate: LearningRate = Field(
        5e-3,
        description="learning rate of Adam at the first step; it falls linearly to 0. Guess",
        json_schema_extra={"tune": {"low": 5e-4, "high": 2e-2, "log": True}},
    )
    weight_decay: float = Field(
        1e-4,
        ge=0,
        description="L2 penalty on all parameters. Guess",
        json_schema_extra={"tune": {"low": 1e-6, "high": 1e-2, "log": True}},
    )
    validation: ValidationShare = Field(
        0.1,
        description="share of the items (not of the pairs) that is held out. The pairs of such an item "
        "are validated on, without its vectors by retrievers, as if it were new; the model gets the "
        "weights of the epoch with the smallest loss on them",
    )
    patience: Patience = 3

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
