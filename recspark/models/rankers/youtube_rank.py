"""The ranking network of YouTube, which serves what a pair is expected to bring."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch.nn import functional

from recspark.data.blocks import Array
from recspark.data.feature_encoding import Encoding
from recspark.models.rankers.fields import (
    FieldsAlgorithm,
    FieldsBatch,
    FieldsRankerModel,
    FieldsScorer,
    FieldsSettings,
    Inputs,
    number_inputs,
)
from recspark.nets.youtube_rank import POWERS, YoutubeRankNet

_MOST = 50.0  # largest log odds that are served: e^50 is a finite float32


class YoutubeRankSettings(FieldsSettings):
    """Settings of `YoutubeRank`."""

    weigh_by: Literal["label", "one"] = Field(
        "label",
        description="what a positive row weighs in the loss. label: its label, which is what the "
        "user did in the horizon (the sum of the weights of the events), as watch time in the "
        "paper; then the odds are what a row is expected to bring. one: 1",
    )


class YoutubeRank(FieldsAlgorithm[YoutubeRankSettings]):
    """Weighted logistic regression on top of a tower; the odds e^(Wx + b) are served.

    A positive row weighs its label, a negative one 1. Then the learned odds are the sum of the
    labels over the number of negative rows, which is close to the expected label where positive
    rows are rare. Each number is read as its position x in its distribution, with x^2 and sqrt(x).

    Source: Covington, Adams, Sargin 2016, "Deep Neural Networks for YouTube Recommendations",
    section 4.
    """

    settings_class = YoutubeRankSettings
    name = "youtube_rank"

    def inputs(self, encoding: Encoding) -> Inputs:
        """See `FieldsAlgorithm`."""
        return Inputs.of(encoding)

    def make_net(self, inputs: Inputs, seed: int) -> YoutubeRankNet:
        """See `FieldsAlgorithm`."""
        settings = self.settings
        return YoutubeRankNet(
            inputs.n_codes,
            len(inputs.sizes),
            inputs.n_numbers,
            settings.embedding_size,
            settings.hidden_sizes,
            torch.Generator().manual_seed(seed),
            dropout=settings.dropout,
            batch_norm=settings.batch_norm,
        )

    def logits(self, net: YoutubeRankNet, inputs: Inputs, batch: FieldsBatch) -> torch.Tensor:
        """See `FieldsAlgorithm`."""
        logits: torch.Tensor = net(batch.rows, batch.positions)
        return logits

    def row_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """See `FieldsAlgorithm`: w log(1 + e^-logit) if positive, log(1 + e^logit) if not, (B,)."""
        is_positive = labels > 0  # (B,)
        weights = labels if self.settings.weigh_by == "label" else torch.ones_like(labels)
        positive_loss = weights * functional.softplus(-logits)  # (B,)
        return torch.where(is_positive, positive_loss, functional.softplus(logits))

    def fitted(
        self, cutoff: datetime, encoding: Encoding, arrays: dict[str, Array]
    ) -> YoutubeRankModel:
        """See `FieldsAlgorithm`."""
        return YoutubeRankModel(self.settings, cutoff, encoding, arrays)


class YoutubeRankModel(FieldsRankerModel):
    """A trained `YoutubeRank`; see `FieldsRankerModel` for its arrays."""

    settings: YoutubeRankSettings

    @property
    def inputs(self) -> Inputs:
        """See `FieldsRankerModel`."""
        return Inputs.of(self.encoding)

    def pair_scorer(self) -> YoutubeRankScorer:
        """See `RankerModel`."""
        return YoutubeRankScorer(self.settings, self.inputs, self.arrays())


class YoutubeRankScorer(FieldsScorer):
    """Computes `nets.youtube_rank.YoutubeRankNet` in float64, and serves the odds."""

    def served(self, logits: Array) -> Array:
        """See `FieldsScorer`: the odds e^logit, finite."""
        return np.exp(np.clip(logits, -_MOST, _MOST))

    def block_logits(self, codes: Array, positions: Array) -> Array:
        """See `FieldsScorer`."""
        embedded = self.embedded(codes).reshape(len(codes), -1)
        return self.tower(np.concatenate([embedded, number_inputs(positions, POWERS)], axis=1))
