"""Wide & Deep: a linear model of crossed features and a tower of embeddings, trained as one."""

from __future__ import annotations

from datetime import datetime
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from recspark.data.blocks import Array
from recspark.data.feature_encoding import Encoding
from recspark.errors import ConfigError, suggest
from recspark.models.neural import NetworkTask
from recspark.models.rankers.fields import (
    FieldsAlgorithm,
    FieldsBatch,
    FieldsRankerModel,
    FieldsScorer,
    FieldsSettings,
    Inputs,
    fields_batch,
    number_inputs,
)
from recspark.nets.wide_deep import WideDeepNet
from recspark.train.optimisers import Adagrad, Ftrl, Optimiser

# The crosses of a ranker where none are declared: those whose features are all there.
DEFAULT_CROSSES = (
    ("user_activity", "item_category_1"),
    ("user_activity", "item_category_2"),
    ("user_activity", "item_price"),
    ("user_activity", "item_trend"),
    ("user_activity", "n_sources"),
    ("user_mean_value", "item_price"),
    ("user_repeat_share", "pair_n_orders"),
    ("user_mean_gap_days", "pair_days_since_last"),
    ("user_recency_days", "pair_days_since_last"),
    ("pair_n_orders", "pair_days_since_last"),
    ("pair_n_orders", "item_repeat_rate"),
    ("n_sources", "item_popularity_7d"),
)
# Odd constants of the hash of a cross, as signed 64-bit integers. Both are those of SplitMix64
# (Steele, Lea, Flood 2014).
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


class WideDeepSettings(FieldsSettings):
    """Settings of `WideDeep`."""

    crosses: tuple[tuple[str, ...], ...] | None = Field(
        None,
        description="features whose combinations get a weight of their own in the wide part, such "
        "as [[user_activity, item_category_1]]. A number counts by its bucket. [] = none; null = "
        "a standard list, of which those count whose features are all there",
    )
    cross_rows: int = Field(
        1 << 20,
        ge=1,
        le=1 << 31,
        description="weights that all crosses share by a hash; 16 bytes each on a rank. Two "
        "combinations may meet in one weight, so take some ten times as many as there are",
    )
    n_buckets: int = Field(
        50,
        ge=2,
        le=1000,
        description="buckets of equal probability into which the wide part divides a number. "
        "Adult census, AUC on the validation part: .900 with 10, .912 with 100, .919 with 1,000",
    )
    wide_rate: float = Field(
        0.1,
        gt=0,
        description="alpha of FTRL, the rate of the wide part. Guess",
        json_schema_extra={"tune": {"low": 0.01, "high": 1.0, "log": True}},
    )
    wide_beta: float = Field(1.0, gt=0, description="beta of FTRL. McMahan et al. 2013")
    wide_l1: float = Field(
        3.0,
        ge=0,
        description="L1 penalty of FTRL on the wide part, in rows: the gradients of this many rows "
        "(each at most 1) must have agreed before a weight is not exactly 0. Guess",
        json_schema_extra={"tune": {"low": 0.3, "high": 30, "log": True}},
    )
    wide_l2: float = Field(0.0, ge=0, description="L2 penalty of FTRL on the wide part")
    deep_optimiser: Literal["adam", "adagrad"] = Field(
        "adam", description="what moves the tower and its embeddings; the paper has adagrad"
    )


class WideDeep(FieldsAlgorithm[WideDeepSettings]):
    """One logistic loss moves both parts: FTRL the wide one, Adam or Adagrad the deep one.

    The wide part has a weight for each code of each feature, and for each combination of codes of
    the crossed features. The deep part is a tower that reads the embeddings of the fields, and each
    number as its position in its distribution. Their sum is the logit of the probability that is
    served. The weights of the wide part start at 0, and those that the data do not insist on stay
    exactly 0.

    Source: Cheng et al. 2016, "Wide & Deep Learning for Recommender Systems"; McMahan et al. 2013,
    "Ad Click Prediction: a View from the Trenches" (FTRL).
    """

    settings_class = WideDeepSettings
    name = "wide_deep"

    def inputs(self, encoding: Encoding) -> Inputs:
        """See `FieldsAlgorithm`. Raises ConfigError for a cross of a feature that is not there."""
        inputs = Inputs.of(encoding, self.settings.n_buckets)
        crossed(self.settings, inputs)
        return inputs

    def make_net(self, inputs: Inputs, seed: int) -> WideDeepNet:
        """See `FieldsAlgorithm`."""
        settings = self.settings
        n_fields = len(inputs.sizes) - inputs.n_numbers
        has_crosses = len(crossed(settings, inputs)) > 0
        return WideDeepNet(
            inputs.n_codes + settings.cross_rows * has_crosses,
            sum(inputs.sizes[:n_fields]),
            n_fields,
            inputs.n_numbers,
            settings.embedding_size,
            settings.hidden_sizes,
            torch.Generator().manual_seed(seed),
            dropout=settings.dropout,
            batch_norm=settings.batch_norm,
        )

    def prepare(self, net: WideDeepNet, inputs: Inputs, task: NetworkTask) -> None:
        """Mark the wide weights that some training row reads. One pass over the rows."""
        seen = torch.zeros(len(net.wide_seen))  # (n_wide_rows,)
        for batch in task.feed.epoch(0):
            seen[self._wide_rows(fields_batch(batch, inputs), inputs).flatten()] = 1
        net.wide_seen.data = task.comm.allreduce(seen).clamp_max(1)[:, None]

    def logits(self, net: WideDeepNet, inputs: Inputs, batch: FieldsBatch) -> torch.Tensor:
        """See `FieldsAlgorithm`."""
        n_fields = len(inputs.sizes) - inputs.n_numbers
        wide_rows = self._wide_rows(batch, inputs)  # (B, W)
        logits: torch.Tensor = net(wide_rows, batch.rows[:, :n_fields], batch.positions)
        return logits

    def _wide_rows(self, batch: FieldsBatch, inputs: Inputs) -> torch.Tensor:
        """Return the wide weights that each row reads, int64 (B, W)."""
        crosses = crossed(self.settings, inputs)
        rows = [cross_row(batch.codes, cross, self.settings.cross_rows) for cross in crosses]
        parts = [batch.rows, *(inputs.n_codes + row[:, None] for row in rows)]
        return torch.cat(parts, dim=1)

    def optimisers(self) -> dict[str, Optimiser]:
        """See `FieldsAlgorithm`.

        The penalties of FTRL are in rows, as in the paper, where a step is one row. A gradient here
        is the mean of the rows of a step. FTRL on the mean, with beta and the penalties divided by
        the number of rows, has the weights of FTRL on the sum.
        """
        settings = self.settings
        n_rows = settings.batch_size
        wide = Ftrl(
            alpha=settings.wide_rate,
            beta=settings.wide_beta / n_rows,
            l1=settings.wide_l1 / n_rows,
            l2=settings.wide_l2 / n_rows,
        )
        if settings.deep_optimiser == "adam":
            return {**super().optimisers(), "wide": wide}
        return {
            "": Adagrad(settings.learning_rate, settings.weight_decay),
            "embedding": Adagrad(settings.learning_rate, settings.embedding_reg),
            "wide": wide,
        }

    def fitted(
        self, cutoff: datetime, encoding: Encoding, arrays: dict[str, Array]
    ) -> WideDeepModel:
        """See `FieldsAlgorithm`. The wide weights are kept as vectors, and which are seen as bits."""
        wide = {
            "wide": arrays["wide"][:, 0],
            "wide_seen": np.packbits(arrays["wide_seen"][:, 0] > 0),
        }
        return WideDeepModel(self.settings, cutoff, encoding, {**arrays, **wide})

    def report(self, model: FieldsRankerModel) -> str:
        """See `FieldsAlgorithm`: how sparse the wide part is."""
        assert isinstance(model, WideDeepModel)
        return (
            f"wide part: {model.n_wide_seen:,} weights are read by the training rows, "
            f"{model.zero_share:.1%} of them are exactly 0"
        )


class WideDeepModel(FieldsRankerModel):
    """A trained `WideDeep`.

    Beside the arrays of `FieldsRankerModel` there are `wide` float32 (n_wide_rows,), and
    `wide_seen` uint8 (n_wide_rows / 8,), whose bits tell which weights some training row read.
    """

    settings: WideDeepSettings

    @property
    def inputs(self) -> Inputs:
        """See `FieldsRankerModel`."""
        return Inputs.of(self.encoding, self.settings.n_buckets)

    @cached_property
    def _is_seen(self) -> Array:
        arrays = self.arrays()
        return np.unpackbits(arrays["wide_seen"], count=len(arrays["wide"])).astype(bool)

    @property
    def n_wide_seen(self) -> int:
        """The number of wide weights that some training row read."""
        return int(self._is_seen.sum())

    @property
    def zero_share(self) -> float:
        """The share of those weights that are exactly 0."""
        return float((self.arrays()["wide"][self._is_seen] == 0).mean())

    def pair_scorer(self) -> WideDeepScorer:
        """See `RankerModel`."""
        return WideDeepScorer(self.settings, self.inputs, self.arrays())


class WideDeepScorer(FieldsScorer):
    """Adds the wide weights of a row to the output of its tower."""

    def block_logits(self, codes: Array, positions: Array) -> Array:
        """See `FieldsScorer`."""
        inputs, settings = self.inputs, self.settings
        n_fields = len(inputs.sizes) - inputs.n_numbers
        wide = self._stored["wide"]
        total = np.zeros(len(codes))
        # One feature after the other, so that every row adds up in the same order.
        for rows in inputs.rows(codes).T:
            total += wide[rows]
        for cross in crossed(settings, inputs):
            total += wide[inputs.n_codes + cross_row(codes, cross, settings.cross_rows)]
        embedded = self._stored["embedding"][inputs.rows(codes)[:, :n_fields]].astype(np.float64)
        flat = embedded.reshape(len(codes), -1)
        return total + self.tower(np.concatenate([flat, number_inputs(positions)], axis=1))


def crossed(settings: WideDeepSettings, inputs: Inputs) -> list[tuple[int, ...]]:
    """Return the positions of the features of each cross among `inputs.names`.

    Raises ConfigError, which names it, for a declared feature that is not there, and for a cross of
    fewer than two different features.
    """
    position = {name: n for n, name in enumerate(inputs.names)}
    if settings.crosses is None:
        present = [cross for cross in DEFAULT_CROSSES if position.keys() >= {*cross}]
        return [tuple(position[name] for name in cross) for cross in present]
    for cross in settings.crosses:
        if len({*cross}) != len(cross) or len(cross) < 2:
            raise ConfigError(
                f"wide_deep: crosses has {[*cross]}; a cross has two or more different features"
            )
        for name in cross:
            if name not in position:
                raise ConfigError(
                    f"wide_deep: crosses names '{name}', which is no feature.{suggest(name, position)}"
                )
    return [tuple(position[name] for name in cross) for cross in settings.crosses]


def cross_row(codes: Any, cross: tuple[int, ...], n_rows: int) -> Any:
    """Return the row of a cross in its table, int64 (n,): a hash of the codes, modulo `n_rows`.

    `codes` int64 (n, F), a numpy array or a torch tensor: training and scoring share this function,
    whose 64-bit products wrap around in both. Which features are crossed is part of the hash.
    """
    hashed = codes[:, cross[0]] * 0
    for position in cross:
        hashed = (hashed ^ (codes[:, position] + 1 + (position << 32))) * _FIRST
        hashed = (hashed ^ ((hashed >> 31) & 0x1FFFFFFFF)) * _SECOND
        hashed = hashed ^ ((hashed >> 29) & 0x7FFFFFFFF)
    return (hashed & 0x7FFFFFFFFFFFFFFF) % n_rows
