"""Settings of models whose network reads a session or history item by item."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from recspark.data.windows import Unit
from recspark.models.neural import NeuralSettings


class NextItemSettings(NeuralSettings):
    """Settings that all next-item networks share."""

    train_on: Unit = Field(
        "session", description="what a row of the training set is: a session, or a whole history"
    )
    context: Unit = Field(
        "session",
        description="what is read to answer: the last session of the history, or all of it",
    )
    length: int = Field(
        50, ge=1, description="items, the newest, that the network reads. Kang & McAuley 2018: 50"
    )
    head: Literal["next_item", "click_through"] = Field(
        "next_item",
        description="what lists are ordered by: what comes next, or P(click) of an item if it is "
        "shown. click_through learns both, and needs impressions (sessions.impression_types)",
    )
    click_weight: float = Field(
        1.0,
        gt=0,
        description="click_through: weight of an impression's loss; a next item weighs 1. Guess: "
        "both likelihoods as they are",
    )
    tied: bool = Field(
        True, description="one vector an item for reading and scoring, instead of two"
    )
    sparse: bool = Field(
        False,
        description="a step moves the vectors of the items that it reads, in place of all (Adam's "
        "lazy variant): of a large catalogue it then moves little but a bias. Nothing where n_samples is null",
    )
    loss: Literal["cross_entropy", "bpr_max", "gbce"] = Field(
        "cross_entropy",
        description="how targets are told apart from candidates. gbce (gSASRec): against n_samples "
        "items drawn evenly for a step, not against the batch's targets",
    )
    n_samples: int | None = Field(
        2048,
        ge=1,
        description="items drawn for a step beside the batch's targets; null = all items are "
        "candidates. Hidasi & Karatzoglou 2018: 2048",
    )
    sample_alpha: float = Field(
        0.5,
        ge=0,
        le=1,
        description="items are drawn by popularity^this. Hidasi & Karatzoglou 2018: 0.5 mostly",
    )
    logq: bool = Field(
        True, description="cross_entropy: correct scores for how likely a candidate was one"
    )
    calibration: float = Field(
        0.75,
        ge=0,
        le=1,
        description="gbce: t, 0 = binary cross-entropy, 1 = as sure as the whole softmax. Petrov & "
        "Macdonald 2023: 0.75",
    )
    bpr_reg: float = Field(
        1.0, ge=0, description="bpr_max: weight of the candidates' squared scores. Same paper: 1"
    )
    dropout: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="share of units dropped. Guess",
        json_schema_extra={"tune": {"low": 0.0, "high": 0.6}},
    )
    epochs: int = Field(10, ge=1, description="passes over the training set. Guess")
    batch_size: int = Field(
        256, ge=1, description="rows of a step, of all ranks together; ranks share them. Guess"
    )
    learning_rate: float = Field(
        2e-3,
        gt=0,
        description="of Adam at the first step, falling linearly to 0. Guess",
        json_schema_extra={"tune": {"low": 5e-4, "high": 1e-2, "log": True}},
    )
    max_items: int = Field(
        500_000,
        ge=2,
        description="largest catalogue. Guess: with tied vectors of 256 a rank takes 1.5 GB for it "
        "if sparse, else 3.1, of an executor of 4",
    )

    @model_validator(mode="after")
    def _gbce_draws(self) -> Self:
        if self.loss == "gbce" and self.n_samples is None:
            raise ValueError("loss gbce draws items: set n_samples (Petrov & Macdonald 2023: 256)")
        return self

    @property
    def is_sparse(self) -> bool:
        """Whether gradients of item vectors are: where all items are candidates they are not."""
        return self.sparse and self.n_samples is not None

    @property
    def item_bytes(self) -> int:
        """Bytes of a rank for each item: vectors with Adam's means, and dense gradients, sent."""
        return (12 if self.is_sparse else 24) * (1 if self.tied else 2) * self.state_size

    @property
    def state_size(self) -> int:
        """Length of a state, and of the vectors that score items."""
        raise NotImplementedError
