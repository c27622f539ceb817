"""Settings of the evaluation: the backtest, the examples of rankers, and `recspark tune`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from recspark.config.section import Section


class Evaluate(Section):
    """The backtest."""

    horizon_days: int = Field(
        14,
        ge=1,
        le=3650,
        description="days; truth = events in [cutoff, cutoff + horizon). Guess: two weeks of a shop",
    )
    every_days: int = Field(
        1,
        ge=1,
        le=3650,
        description="days between the cutoffs of backtests, counted from 1970-01-01; the backtest has the "
        "newest whose horizon has ended. 1: every night its own; 7: nights of a week share one",
    )
    ks: tuple[Annotated[int, Field(ge=1, le=10_000)], ...] = Field(
        (10, 20), min_length=1, description="list lengths that are scored. Habit of the papers"
    )
    metric: str = Field(
        "ndcg", description="the metric that tune and the gate look at, at k = ks[0]"
    )
    baseline: str = Field(
        "popular",
        description="every interval is a difference to this model; where it is not among `models` and "
        "nobody set it, the first of them",
    )
    n_bootstrap: int = Field(
        1000,
        ge=0,
        le=100_000,
        description="Poisson replicates of the users; 0 = no interval. Habit",
    )
    max_eval_users: int = Field(
        1_000_000, ge=1, description="users; above it a seeded hash sample of them. Guess"
    )
    seed: int = Field(
        1, ge=0, lt=2**31, description="of the bootstrap and of the sample of users; any number"
    )


class Examples(Section):
    """What rankers learn from: the candidates of earlier cutoffs, and what their users did then."""

    every_days: int = Field(
        7,
        ge=1,
        le=3650,
        description="days between the cutoffs of the grid, counted from 1970-01-01: 7 gives Thursdays. "
        "Habit: a week",
    )
    n_cutoffs: int = Field(
        2,
        ge=1,
        le=100,
        description="newest cutoffs of the grid whose horizon has ended before the lists' cutoff. Guess",
    )
    n_negatives: int = Field(
        30,
        ge=1,
        le=10_000,
        description="candidates kept of each user and cutoff that were not acted on, a seeded hash "
        "sample. Guess",
    )
    max_users: int = Field(
        200_000, ge=1, description="users of a cutoff; above it a seeded hash sample of them. Guess"
    )


class Tune(Section):
    """How `recspark tune` searches."""

    n_trials: int = Field(30, ge=1, le=100_000, description="trials of a search. Guess")
    seed: int = Field(1, ge=0, lt=2**31, description="of the search; any number")
