"""A switch: which retriever's list a user gets, by the user's activity or by what is cold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field, model_validator
from pyspark.sql import Column, Window
from pyspark.sql import functions as F

from recspark.data.blocks import Array
from recspark.data.dataset import Dataset, Examples
from recspark.data.examples import rank_name
from recspark.data.feature_encoding import FIRST, Encoding
from recspark.errors import ConfigError, EmptyDataError, suggest
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
from recspark.models.rankers.fusion import MODE, N_MODES, check_sources, mode_code, sources_in

# Setting `by` -> the feature that is read, and its segments in order.
_ACTIVITY = ("light", "regular", "heavy")
SEGMENTS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "activity": ("user_activity", _ACTIVITY),
    "orders": ("user_n_orders", ("few", "many")),
    "item_age": ("item_age_days", ("new", "old")),
    "source": (None, ("all",)),
}
_STRIDE = 1 << 17  # above every rank: lists have at most 100,000 items
_MAX_SOURCES = 100  # a score is a whole number below 2^24, which float32 holds exactly
_STEPS = float(2**32)  # gains are summed in these steps, so that their order does not matter


class SwitchSettings(Settings):
    """Settings of `Switch`."""

    by: Literal["activity", "orders", "item_age", "source"] = Field(
        "activity",
        description="what decides which retriever is asked first. `activity`: the user's segment "
        "light, regular or heavy; `orders`: few or many orders of the user; `item_age`: whether the "
        "item is new or old; `source`: always the same retriever, segment all. A user or an item "
        "without features is light, few or new",
    )
    below: float = Field(
        3,
        gt=0,
        description="for `orders`: a user with fewer orders has few; for `item_age`: an item whose "
        "first event is fewer days old is new. Guess",
    )
    choices: dict[str, tuple[str, ...]] = Field(
        {},
        description="segment -> retrievers of `needs`, the first one first; those that are not named "
        "follow in the order of `needs`. Empty: learnt from the examples. With choices the switch "
        "needs no examples: say so by `learns: false`",
    )
    k: int = Field(
        10,
        ge=1,
        le=10_000,
        description="items: where choices are learnt, the retriever whose lists of this length have "
        "the best NDCG comes first. Habit of the papers",
    )

    @model_validator(mode="after")
    def _choices_name_all_segments(self) -> SwitchSettings:
        segments = self.segments
        for name, order in self.choices.items():
            if name not in segments:
                raise ValueError(
                    f"choices: no segment is called '{name}'.{suggest(name, segments)}"
                )
            if not order or len({*order}) < len(order):
                raise ValueError(f"choices.{name} = {[*order]}: name each retriever once")
        if self.choices and (lacking := [name for name in segments if name not in self.choices]):
            raise ValueError(f"choices: {lacking} are missing")
        return self

    @property
    def segments(self) -> tuple[str, ...]:
        """The names of the segments, in order."""
        return SEGMENTS[self.by][1]


class Switch(Algorithm[SwitchSettings]):
    """Each segment has an order of the retrievers; the first one that lists a pair decides.

    The pairs of the first retriever come first, in its own order, then those that only the second
    one lists, and so on. So a user of a segment gets the list of the retriever that is chosen for
    the segment, and where this list ends, what the next one adds. Ranks are read, no scores, so the
    pairs of a user are in one order even where the item decides about the segment. Of pairs with
    equal ranks in different retrievers, the smaller item_idx comes first.

    Learnt orders: by NDCG@k of each retriever's lists in the examples, for each segment and mode. The
    ideal is the list of all items among the user's examples that the user acted on. Where a segment
    has no such item, that of all segments counts, and for a mode without examples that of all modes.
    Of equally good retrievers the first of `needs` comes first.
    """

    settings_class = SwitchSettings

    @property
    def needs_examples(self) -> bool:
        """See `Algorithm`. Not where the choices are declared."""
        return not self.settings.choices

    def check_needs(self, kinds: Mapping[str, Kind]) -> None:
        """See `Algorithm`. At least one retriever, and choices among these only."""
        named = [name for order in self.settings.choices.values() for name in order]
        check_sources("switch", kinds, named)
        if len(kinds) > _MAX_SOURCES:
            raise ConfigError(f"switch: at most {_MAX_SOURCES} needs, and there are {len(kinds)}")

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> SwitchModel:
        """See `Algorithm.fit`. Learnt: one job with two shuffles, by list and by segment.

        The driver holds a number for each mode, segment and retriever. Raises EmptyDataError where
        users acted on no example.
        """
        settings, sources = self.settings, sources_in(needed)
        if settings.choices:
            place = _declared(settings, sources)
        else:
            assert data.examples is not None
            place = _places(_gains(data.examples, settings, sources))
        feature, segments = SEGMENTS[settings.by]
        ranks = tuple(rank_name(name) for name in sources)
        fields = dict(MODE)
        if settings.by == "activity":
            fields["user_activity"] = tuple(sorted(segments))
        elif feature is not None:
            ranks = (*ranks, feature)
        return SwitchModel(settings, data.cutoff, Encoding(ranks, fields), {"place": place})


def _declared(settings: SwitchSettings, sources: tuple[str, ...]) -> Array:
    """Return the places of `SwitchModel` by the choices in the settings, the same in each mode."""
    place = np.empty((len(settings.segments), len(sources)), np.int32)
    for row, segment in enumerate(settings.segments):
        chosen = settings.choices[segment]
        order = [*chosen, *(name for name in sources if name not in chosen)]
        place[row] = [order.index(name) for name in sources]
    return np.repeat(place[None], N_MODES, axis=0)


def _gains(examples: Examples, settings: SwitchSettings, sources: tuple[str, ...]) -> Array:
    """Return the sum of NDCG@k of each source's lists, float64 (N_MODES, n_segments, n_sources).

    What each item adds counts for the segment of its example. The sums are of whole numbers, so the
    order of the rows does not matter. Raises EmptyDataError where users acted on no example.
    """
    of_list = Window.partitionBy("cutoff", "mode", "user_idx")
    acted_on = examples.rows.where("label > 0").select(
        "mode",
        _segment(examples.encoding, settings).alias("segment"),
        F.least(F.count(F.lit(1)).over(of_list), F.lit(settings.k)).alias("n"),
        *[
            _number(examples.encoding, rank_name(name)).alias(f"rank{s}")
            for s, name in _each(sources)
        ],
    )
    ideal = F.aggregate(
        F.sequence(F.lit(1), F.col("n").cast("int")),
        F.lit(0.0),
        lambda total, rank: total + _gain(rank),
    )
    sums = [
        F.sum(
            F.when(
                F.col(f"rank{s}") <= settings.k, F.rint(_gain(F.col(f"rank{s}")) / ideal * _STEPS)
            )
            .otherwise(0)
            .cast("bigint")
        ).alias(f"steps{s}")
        for s, _ in _each(sources)
    ]
    gains = np.zeros((N_MODES, len(settings.segments), len(sources)))
    rows = acted_on.groupBy("mode", "segment").agg(*sums).collect()
    if not rows:
        raise EmptyDataError(
            "switch: no example is an item that the user acted on; it learns from lists that have some"
        )
    for mode, segment, *steps in rows:
        gains[mode_code(mode), segment] = np.array(steps) / _STEPS
    return gains


def _gain(rank: Column) -> Column:
    """Return what an item at `rank` adds to DCG."""
    return 1 / F.log2(rank + 1)


def _each(sources: tuple[str, ...]) -> list[tuple[int, str]]:
    return [*enumerate(sources)]


def _number(encoding: Encoding, name: str) -> Column:
    return F.col("numbers")[encoding.numbers.index(name)]


def _segment(encoding: Encoding, settings: SwitchSettings) -> Column:
    """Return the segment of an example: its index in `settings.segments`."""
    feature, segments = SEGMENTS[settings.by]
    if feature is None:
        return F.lit(0)
    if settings.by == "activity":
        index = [*encoding.fields].index(feature)
        code = F.col("fields")[index]
        segment = F.lit(0)
        for n, text in enumerate(encoding.fields[feature]):
            segment = F.when(code == FIRST + n, segments.index(text)).otherwise(segment)
        return segment
    value = _number(encoding, feature)
    return F.when(F.isnan(value) | (value < settings.below), 0).otherwise(1)


def _places(gains: Array) -> Array:
    """Return the places of `SwitchModel`, best source first, by the gains (`_gains`).

    >>> _places(np.array([[[0.0, 0.0], [0.0, 0.0]], [[1.0, 2.0], [0.0, 0.0]]])).tolist()
    [[[1, 0], [1, 0]], [[1, 0], [1, 0]]]
    """
    of_mode = gains.sum(axis=1, keepdims=True)
    of_all = of_mode.sum(axis=0, keepdims=True)
    of_mode = np.where(of_mode.any(axis=2, keepdims=True), of_mode, of_all)
    known = np.where(gains.any(axis=2, keepdims=True), gains, of_mode)
    best_first = np.argsort(-known, axis=2, kind="stable")
    return np.argsort(best_first, axis=2, kind="stable").astype(np.int32)


class SwitchModel(ArraysRanker):
    """The order of the sources in each mode and segment.

    `place` int32 (N_MODES, n_segments, n_sources): 0 is the source that comes first. The numbers of
    `encoding` are the ranks by the sources, and then the feature that decides, if it is a number.
    """

    settings: SwitchSettings

    def pair_scorer(self) -> FirstSource:
        """See `RankerModel`."""
        return FirstSource(self.settings, self._arrays["place"])


@dataclass(frozen=True)
class FirstSource:
    """Scores a pair by the first source of its segment that lists it: its place, then its rank."""

    settings: SwitchSettings
    place: Array  # int32 (N_MODES, n_segments, n_sources)

    def score(self, block: PairBlock) -> Array:
        """See `PairScorer`. A pair that no source lists has the score 0; any other is above."""
        n_sources = self.place.shape[2]
        place = self.place[block.fields[:, 0], self._segments(block)]  # (p, n_sources)
        ranks = block.numbers[:, :n_sources]
        score = (n_sources - place) * _STRIDE - np.nan_to_num(ranks)
        return np.where(np.isnan(ranks), 0, score).max(axis=1, initial=0).astype(np.float32)

    def _segments(self, block: PairBlock) -> Array:
        """Return the segment of each pair, int64 (p,)."""
        n_pairs = len(block.user_idx)
        _, segments = SEGMENTS[self.settings.by]
        if self.settings.by == "source":
            return np.zeros(n_pairs, np.int64)
        if self.settings.by == "activity":
            by_code = np.zeros(FIRST + len(segments), np.int64)
            by_code[FIRST:] = [segments.index(text) for text in sorted(segments)]
            return by_code[block.fields[:, 1]]
        value = block.numbers[:, -1]
        return np.where(np.isnan(value) | (value < self.settings.below), 0, 1)
