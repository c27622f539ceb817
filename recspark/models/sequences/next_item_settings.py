"""Settings of models whose network reads a session or a history item by item."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from recspark.data.training_rows import Unit
from recspark.models.neural import NeuralSettings
from recspark.models.setting_types import LearningRate


class NextItemSettings(NeuralSettings):
    """Settings that all next-item networks share."""

    train_on: Unit = Field(
        "session", description="a row of the training set is one session, or one whole history"
    )
    context: Unit = Field(
        "session",
        description="what the network reads at scoring: the last session of a history, or the "
        "whole history",
    )
    length: int = Field(
        50,
        ge=1,
        description="the network reads this many of the newest items. Kang & McAuley 2018: 50",
    )
    head: Literal["next_item", "click_through"] = Field(
        "next_item",
        description="what orders the lists: next_item = how likely an item comes next, "
        "click_through = how likely an item is clicked if it is shown. click_through learns both, "
        "and needs impressions (sessions.impression_types)",
    )
    click_weight: float = Field(
        1.0,
        gt=0,
        description="click_through: weight of the loss of an impression; the loss of a next item "
        "weighs 1. Guess: both likelihoods count as they are",
    )
    tied: bool = Field(
        True, description="an item has one vector for reading and scoring, instead of two"
    )
    sparse: bool = Field(
        False,
        description="a step moves only the vectors of the items that it reads (lazy Adam), instead "
        "of all vectors. With a large catalogue, a step then moves few numbers besides the biases. "
        "No effect where n_samples is null",
    )
    loss: Literal["cross_entropy", "bpr_max", "gbce"] = Field(
        "cross_entropy",
        description="loss that separates a target from the candidates. gbce (gSASRec): the "
        "candidates of a step are n_samples items drawn evenly, without the targets of the batch",
    )
    n_samples: int | None = Field(
        2048,
        ge=1,
        description="items drawn for a step as candidates, besides the targets of the batch; null "
        "= all items are candidates. Hidasi & Karatzoglou 2018: 2048",
    )
    sample_alpha: float = Field(
        0.5,
        ge=0,
        le=1,
        description="items are drawn with probability proportional to popularity^sample_alpha. "
        "Hidasi & Karatzoglou 2018: mostly 0.5",
    )
    logq: bool = Field(
        True,
        description="cross_entropy: correct each score by the log of the probability that the item "
        "became a candidate",
    )
    calibration: float = Field(
        0.75,
        ge=0,
        le=1,
        description="gbce: t; 0 = binary cross-entropy, 1 = scores are as confident as with a "
        "softmax over all items. Petrov & Macdonald 2023: 0.75",
    )
    bpr_reg: float = Field(
        1.0,
        ge=0,
        description="bpr_max: weight of the candidates' squared scores. Hidasi & Karatzoglou 2018: "
        "1",
    )
    dropout: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="share of the units that is dropped in training. Guess",
        json_schema_extra={"tune": {"low": 0.0, "high": 0.6}},
    )
    epochs: int = Field(10, ge=1, description="passes over the training set. Guess")
    batch_size: int = Field(
        256, ge=1, description="rows per step, all ranks together; the ranks share them. Guess"
    )
    learning_rate: LearningRate = Field(
        2e-3,
        description="learning rate of Adam at the first step; it falls linearly to 0. Guess",
        json_schema_extra={"tune": {"low": 5e-4, "high": 1e-2, "log": True}},
    )
    max_items: int = Field(
        500_000,
        ge=2,
        description="largest catalogue, in items. Guess: with tied vectors of length 256, a rank "
        "takes 1.5 GB for it if sparse, else 3.1 GB, of an executor of 4 GB",
    )

    @model_validator(mode="after")
    def _check_gbce_draws_items(self) -> Self:
        if self.loss == "gbce" and self.n_samples is None:
            raise ValueError("loss gbce draws items: set n_samples (Petrov & Macdonald 2023: 256)")
        return self

    @property
    def is_sparse(self) -> bool:
        """Whether gradients of item vectors are sparse; never where all items are candidates."""
        return self.sparse and self.n_samples is not None

    @property
    def item_bytes(self) -> int:
        """Bytes that a rank needs per item.

        A number of an item's vectors takes 12 bytes: the number and Adam's two running means.
        Without `is_sparse`, dense gradients, which are sent to the other ranks, take 12 bytes more.
        """
        return (12 if self.is_sparse else 24) * (1 if self.tied else 2) * self.state_size

    @property
    def state_size(self) -> int:
        """Length of a state, and of the item vectors that score."""
        raise NotImplementedError
