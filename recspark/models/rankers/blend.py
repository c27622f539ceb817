"""A blend: the weighted sum of what the retrievers' scores have meant at earlier cutoffs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field
from pyspark.sql import functions as F
from scipy.optimize import isotonic_regression, minimize

from recspark.data.blocks import Array
from recspark.data.dataset import Dataset, Examples
from recspark.data.examples import score_names
from recspark.data.feature_encoding import Encoding
from recspark.data.interactions import hash_sample
from recspark.errors import EmptyDataError
from recspark.models.base import (
    NOTHING,
    Algorithm,
    FitOptions,
    Needed,
    PairBlock,
    RankerModel,
    Settings,
)
from recspark.models.kinds import Kind
from recspark.models.rankers.fusion import MODE, N_MODES, check_sources, mode_code, sources_in

_LIST = ("cutoff", "mode", "user_idx")  # the examples of one list


class BlendSettings(Settings):
    """Settings of `Blend`."""

    scores: Literal["relative", "score"] = Field(
        "relative",
        description="what is calibrated: the score itself, or the score relative to the user's fifth "
        "best by the same retriever. A retriever that has no relative score for most of the pairs "
        "that it scores, because its scores are below 0, has its scores calibrated. Source: bundled "
        "data",
        json_schema_extra={"tune": {"choices": ["relative", "score"]}},
    )
    prior: float = Field(
        20.0,
        gt=0,
        description="examples with the share of positives that all examples have, added to each step "
        "of a calibration: steps of few examples say little. Guess",
        json_schema_extra={"tune": {"low": 1, "high": 200, "log": True}},
    )
    reg: float = Field(
        0.001,
        ge=0,
        description="L2 penalty on the weights, per list. Guess",
        json_schema_extra={"tune": {"low": 1e-5, "high": 1, "log": True}},
    )
    max_examples: int = Field(
        1_000_000,
        ge=1,
        description="examples that the blend is fitted on. Of more, all those of a seeded hash sample "
        "of the users are taken. A handful of curves and weights is fitted, so more say nothing new. "
        "Guess",
    )


class Blend(Algorithm[BlendSettings]):
    """Score of a pair = sum over the retrievers of weight x calibrated score.

    A calibrated score is the logarithm of the odds that a pair with this score is acted on, less that of
    all pairs: isotonic regression on the examples, so it never falls where the score rises. Between
    the steps it is interpolated, so that two scores are seldom equal. A pair that the retriever does
    not score has a value of its own: that of the examples without a score.

    The weights are not negative. They maximise the likelihood that, of the examples of a list, those
    are chosen that the user acted on: a softmax over the list, so how active a user is plays no part.
    Calibrations and weights are fitted for each mode, and for all modes together; the latter serve a
    mode without examples.

    Source: Zadrozny & Elkan 2002, "Transforming Classifier Scores into Accurate Multiclass Probability
    Estimates" (isotonic calibration); Cao, Qin, Liu, Tsai & Li 2007, "Learning to Rank: From Pairwise
    Approach to Listwise Approach" (the likelihood).
    """

    settings_class = BlendSettings

    def check_needs(self, kinds: Mapping[str, Kind]) -> None:
        """See `Algorithm`. At least one retriever."""
        check_sources("blend", kinds)

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> BlendModel:
        """See `Algorithm.fit`. One job that counts, and one that reads the examples; no shuffle.

        The driver holds about `max_examples` examples, with five retrievers at most 200 bytes each. It
        sorts them by their keys, so neither their order nor their partitions matter. Raises EmptyDataError
        where no example is relevant or all are.
        """
        assert data.examples is not None
        settings, sources = self.settings, sources_in(needed)
        table = _examples(data.examples, sources, settings.max_examples, options.seed)
        names = tuple(_name(table, source, settings) for source in sources)
        is_acted_on = table.column("label").to_numpy() > 0
        if is_acted_on.sum() in (0, len(is_acted_on)):
            raise EmptyDataError(
                f"blend: {is_acted_on.sum():,} of {len(is_acted_on):,} examples are items that the "
                "user acted on; it learns from lists that have both"
            )
        mode = np.array([mode_code(name) for name in table.column("mode").to_pylist()])
        of_all = _fitted(table, names, settings)
        blends = [of_all] * N_MODES
        for code in np.unique(mode):
            examples_of_mode = table.filter(pa.array(mode == code))
            if 0 < is_acted_on[mode == code].sum() < (mode == code).sum():
                blends[code] = _fitted(examples_of_mode, names, settings)
        return BlendModel(settings, data.cutoff, Encoding(names, dict(MODE)), tuple(blends))


def _examples(
    examples: Examples, sources: tuple[str, ...], max_examples: int, seed: int
) -> pa.Table:
    """Return the examples of a sample of the users, sorted by list and item.

    Columns: cutoff, mode, user_idx, item_idx, label, and the two scores of each source.
    """
    rows, encoding = examples.rows, examples.encoding
    names = [name for source in sources for name in score_names(source)]
    numbers = [F.col("numbers")[encoding.numbers.index(name)].alias(name) for name in names]
    is_sampled = hash_sample(rows, max_examples, seed)
    table = rows.where(is_sampled).select(*_LIST, "item_idx", "label", *numbers).toArrow()
    return table.sort_by([(name, "ascending") for name in (*_LIST, "item_idx")]).combine_chunks()


def _name(table: pa.Table, source: str, settings: BlendSettings) -> str:
    """Return the name of the column of `table` that is calibrated for a source."""
    score, relative = score_names(source)
    n_scores, n_relative = (
        np.count_nonzero(~np.isnan(table.column(name).to_numpy())) for name in (score, relative)
    )
    return relative if settings.scores == "relative" and 2 * n_relative >= n_scores else score


def _fitted(table: pa.Table, names: tuple[str, ...], settings: BlendSettings) -> BlendOfMode:
    """Return the blend of the examples in `table`, which are sorted by list."""
    is_acted_on = table.column("label").to_numpy() > 0
    scores = [table.column(name).to_numpy() for name in names]
    curves = tuple(calibrated(score, is_acted_on, settings.prior) for score in scores)
    terms = [curve(score) for curve, score in zip(curves, scores, strict=True)]
    keys = [table.column(name) for name in _LIST]
    is_first = np.ones(table.num_rows, bool)
    is_first[1:] = np.any([pc.not_equal(key[1:], key[:-1]).to_numpy() for key in keys], axis=0)
    start = np.append(np.flatnonzero(is_first), table.num_rows)
    return BlendOfMode(curves, fitted_weights(terms, is_acted_on, start, settings.reg))


@dataclass(frozen=True)
class BlendOfMode:
    """The curve and the weight of each source in one mode; `weights` float64 (n_sources,)."""

    curves: tuple[Curve, ...]
    weights: Array

    def score(self, scores: Array) -> Array:
        """Return the score of each pair, float64 (p,), from the scores of the sources (p, n_sources).

        One source after the other is added, so a pair has its score whatever pairs are beside it.
        """
        total = np.zeros(len(scores))
        for curve, weight, score in zip(self.curves, self.weights, scores.T, strict=True):
            total += weight * curve(score)
        return total


class BlendModel(RankerModel):
    """One blend for each code of the field `mode`."""

    def __init__(
        self,
        settings: Settings,
        cutoff: datetime,
        encoding: Encoding,
        blends: tuple[BlendOfMode, ...],
    ) -> None:
        super().__init__(settings, cutoff, encoding)
        self.blends = blends

    def arrays(self) -> dict[str, Array]:
        """See `FittedModel`.

        `weights` and `missing` float64 (N_MODES, n_sources); `knot_score` and `knot_log_odds`
        float64: the knots of all curves, by mode and then by source; `n_knots` int64 (N_MODES,
        n_sources).
        """
        curves = [curve for blend in self.blends for curve in blend.curves]
        shape = (len(self.blends), -1)
        return {
            "weights": np.array([blend.weights for blend in self.blends]),
            "missing": np.array([curve.missing for curve in curves]).reshape(shape),
            "n_knots": np.array([len(curve.score) for curve in curves]).reshape(shape),
            "knot_score": np.concatenate([curve.score for curve in curves]),
            "knot_log_odds": np.concatenate([curve.log_odds for curve in curves]),
        }

    @classmethod
    def from_arrays(
        cls, settings: Settings, cutoff: datetime, encoding: Encoding, arrays: dict[str, Array]
    ) -> Self:
        """See `RankerModel`."""
        ends = np.cumsum(arrays["n_knots"].ravel())[:-1]
        knots = [np.split(arrays[name], ends) for name in ("knot_score", "knot_log_odds")]
        missing = arrays["missing"].ravel().tolist()
        curves = [Curve(*curve) for curve in zip(*knots, missing, strict=True)]
        n_sources = arrays["weights"].shape[1]
        blends = [
            BlendOfMode(tuple(curves[code * n_sources : (code + 1) * n_sources]), weights)
            for code, weights in enumerate(arrays["weights"])
        ]
        return cls(settings, cutoff, encoding, tuple(blends))

    def pair_scorer(self) -> BlendScorer:
        """See `RankerModel`."""
        return BlendScorer(self.blends)


@dataclass(frozen=True)
class BlendScorer:
    """Scores the pairs of each mode by the blend of the mode."""

    blends: tuple[BlendOfMode, ...]

    def score(self, block: PairBlock) -> Array:
        """See `PairScorer`."""
        total = np.zeros(len(block.user_idx), np.float32)
        mode = block.fields[:, 0]
        for code in np.unique(mode):
            total[mode == code] = self.blends[code].score(block.numbers[mode == code])
        return total


@dataclass(frozen=True)
class Curve:
    """What the scores of one retriever mean, in one mode.

    Knots: `score` float64 (n_knots,) ascending and `log_odds` float64 (n_knots,) not descending;
    `missing` is the value of a pair without a score.
    """

    score: Array
    log_odds: Array
    missing: float

    def __call__(self, score: Array) -> Array:
        """Return the value of each score, float64 (p,); NaN is a missing score."""
        known = np.interp(score, self.score, self.log_odds) if len(self.score) else score
        return np.where(np.isnan(score), self.missing, known)


def calibrated(score: Array, is_acted_on: Array, prior: float) -> Curve:
    """Return the curve of one retriever from examples; see `Blend`.

    `score` float (n,), NaN = missing; `is_acted_on` bool (n,); `prior` is the setting.

    >>> curve = calibrated(np.array([1.0, 2, 3, 4]), np.array([False, False, True, True]), 1.0)
    >>> curve.score.tolist(), curve(np.array([1.5, 2.5, 3.5])).round(2).tolist()
    ([1.5, 3.5], [-1.61, 0.0, 1.61])
    """
    base = is_acted_on.mean()

    def log_odds(n_acted_on: Array, n: Array) -> Array:
        share = (n_acted_on + prior * base) / (n + prior)
        return np.asarray(np.log(share / (1 - share)) - np.log(base / (1 - base)))

    has_score = ~np.isnan(score)
    missing = ~has_score
    value_missing = float(log_odds(is_acted_on[missing].sum(), missing.sum()))
    values, inverse, counts = np.unique(
        score[has_score].astype(np.float64), return_inverse=True, return_counts=True
    )
    if len(values) == 0:
        return Curve(values, values, value_missing)
    n_acted_on = np.bincount(inverse, is_acted_on[has_score])
    fitted = isotonic_regression(n_acted_on / counts, weights=counts)
    first = fitted.blocks[:-1].astype(np.int64)
    n_of_block = np.add.reduceat(counts, first)
    centre = np.add.reduceat(values * counts, first) / n_of_block
    height = log_odds(np.add.reduceat(n_acted_on, first), n_of_block)
    return Curve(centre, np.maximum.accumulate(height), value_missing)


def fitted_weights(terms: Sequence[Array], is_acted_on: Array, start: Array, reg: float) -> Array:
    """Return the weights, float64 (n_sources,), not negative; see `Blend`.

    Minimised is the mean over lists of -log of the softmax of the relevant examples, each weighed by 1 /
    (relevant examples of the list), plus reg / 2 x the sum of squared weights: a convex function.

    Lists whose examples are all relevant, or none, say nothing; without any other list the weights are
    equal.

    `terms` : of each source the calibrated scores, float64 (n,), sorted by list; `is_acted_on` bool (n,); `start` int64
    (n_lists + 1,): the first example of each list, then n.
    """
    lengths = np.diff(start)
    n_acted_on = np.add.reduceat(is_acted_on.astype(np.int64), start[:-1])
    is_used = np.repeat((n_acted_on > 0) & (n_acted_on < lengths), lengths)
    used_lengths = lengths[(n_acted_on > 0) & (n_acted_on < lengths)]
    terms, is_acted_on = [term[is_used] for term in terms], is_acted_on[is_used]
    begin = np.full(len(terms), 1 / len(terms))
    if len(used_lengths) == 0:
        return begin
    first = np.cumsum(used_lengths) - used_lengths  # (n_lists,)
    row = np.repeat(np.arange(len(first)), used_lengths)
    share = is_acted_on / np.add.reduceat(is_acted_on.astype(np.float64), first)[row]

    def loss(weights: Array) -> tuple[float, Array]:
        scores = sum(weight * term for weight, term in zip(weights, terms, strict=True))
        scores = scores - np.maximum.reduceat(scores, first)[row]
        powers = np.exp(scores)
        totals = np.add.reduceat(powers, first)
        likelihood = (share * scores).sum() - np.log(totals).sum()
        excess = powers / totals[row] - share
        slope = np.array([(term * excess).sum() for term in terms]) / len(first)
        return reg / 2 * (weights**2).sum() - likelihood / len(first), slope + reg * weights

    found = minimize(loss, begin, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(terms))
    return np.asarray(found.x)
