"""Settings of the backtest, of the examples that rankers learn from, and of `recspark tune`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from recspark.config.publishing import Mode
from recspark.config.section import Section


class Evaluate(Section):
    """How the backtest compares models on past events."""

    horizon_days: int = Field(
        14,
        ge=1,
        le=3650,
        description="days after the cutoff whose events are the truth: [cutoff, cutoff + horizon). "
        "Guess: two weeks of a shop",
    )
    every_days: int = Field(
        1,
        ge=1,
        le=3650,
        description="days between the cutoffs of backtests, counted from 1970-01-01. A backtest "
        "has the newest cutoff whose horizon has ended. With 1, every night has its own cutoff; "
        "with 7, the nights of a week share one",
    )
    ks: tuple[Annotated[int, Field(ge=1, le=10_000)], ...] = Field(
        (10, 20),
        min_length=1,
        description="items: the lengths at which lists are scored. Habit of the papers",
    )
    metric: str = Field(
        "ndcg", description="the metric that `recspark tune` and the gate compare, at k = `ks[0]`"
    )
    baseline: str = Field(
        "popular",
        description="the model that every other model is compared with: an interval is that of the "
        "difference to it. Where it is not set, and its default is not among `models`, the first "
        "of `models` takes its place",
    )
    n_bootstrap: int = Field(
        1000,
        ge=0,
        le=100_000,
        description="Poisson replicates of the users, for the intervals; 0 = no intervals. Habit",
    )
    max_eval_users: int = Field(
        1_000_000,
        ge=1,
        description="users that are evaluated. Of more users, a seeded hash sample is taken. Guess",
    )
    seed: int = Field(
        1,
        ge=0,
        lt=2**31,
        description="seed of the bootstrap and of the sample of users; any number",
    )


class Examples(Section):
    """The examples of rankers: the candidates of earlier cutoffs, and what users then did."""

    every_days: int = Field(
        7,
        ge=1,
        le=3650,
        description="days between the cutoffs of the grid, counted from 1970-01-01. 7 gives "
        "Thursdays. Habit: a week",
    )
    n_cutoffs: int = Field(
        2,
        ge=1,
        le=100,
        description="cutoffs that give examples: the newest of the grid whose horizon has ended by "
        "the cutoff of the lists. Guess",
    )
    modes: tuple[Mode, ...] = Field(
        ("novel", "repeat"),
        min_length=1,
        description="modes of the lists whose items become examples. A ranker makes good lists of "
        "those modes only that it has learnt from",
    )
    features: tuple[Literal["orders", "catalogue"], ...] = Field(
        ("orders", "catalogue"),
        description="groups of features of a pair that follow from the user's history "
        "(docs/features.md)",
    )
    vectors: tuple[str, ...] = Field(
        (),
        description="models whose vectors of items say how like an item is to the user's last items "
        "(docs/features.md): encoders, or models such as als, mf or item2vec. The examples of a ranker "
        "have these features for the models that the ranker names in `needs`",
    )
    n_negatives: int = Field(
        30,
        ge=1,
        le=10_000,
        description="candidates that a user did not act on, kept for each user, mode and cutoff: a "
        "seeded hash sample. Guess",
    )
    max_users: int = Field(
        200_000,
        ge=1,
        description="users of one cutoff. Of more users, a seeded hash sample is taken. Guess",
    )
    honest_features: tuple[str, ...] = Field(
        (),
        description="features that may tell almost alone what a user does after a cutoff. A feature "
        "that does is refused as a leak, unless it is named here: name it if it reads nothing after "
        "the cutoff, for example where the items of a subscription are bought again every month",
    )

    @field_validator("modes", "features", "vectors", "honest_features")
    @classmethod
    def _names_are_given_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        repeated_names = sorted({name for name in names if names.count(name) > 1})
        if repeated_names:
            raise ValueError(f"names {', '.join(repeated_names)} twice")
        return names


class Tune(Section):
    """How `recspark tune` searches for the best settings of a model."""

    n_trials: int = Field(30, ge=1, le=100_000, description="trials of one search. Guess")
    seed: int = Field(1, ge=0, lt=2**31, description="seed of the search; any number")
