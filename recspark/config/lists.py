"""Settings of the lists: how they are compared, which is published, and what refuses it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from recspark.config.section import Section

Mode = Literal["novel", "repeat"]
# Algorithms that give neighbours of items, as the registry tags them (a test compares).
NEIGHBOUR_MODELS = ("item_knn", "ease", "item2vec", "rp3beta")


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


class Publish(Section):
    """Which list is published, and what refuses it."""

    model: str = Field(
        "ease",
        description="the champion; where it is not among `models` and nobody set it, the first of them "
        "that is not evaluate.baseline. Best on the bundled data",
    )
    ladder: tuple[str, ...] = Field(
        ("item_knn", "popular"),
        description="models that fill what the champion leaves open, in order; where nobody set it, "
        "without those that are not among `models`",
    )
    mode: Mode = Field(
        "novel",
        description="novel leaves out what the user acted on before, repeat leaves out nothing",
    )
    k: int = Field(10, ge=1, le=10_000, description="items of a list. Habit")
    active_days: int = Field(
        400, ge=1, le=36_500, description="days; a user with an event in them gets a list. Guess"
    )
    rescore_days: int | None = Field(
        None,
        ge=1,
        le=36_500,
        description="days; of the active users only those with an event in them, or whose history or "
        "list changed, are scored anew, the others keep the list of the night before; null = everyone",
    )
    neighbours_model: str | None = Field(
        "item_knn",
        description="whose neighbours `item_neighbours` holds; null = none. Where it is not among "
        f"`models` and nobody set it, the first of them among {', '.join(NEIGHBOUR_MODELS)}, else null",
    )
    n_neighbours: int = Field(20, ge=1, le=10_000, description="of each item. Guess")
    min_coverage: float = Field(
        0.999, ge=0, le=1, description="gate: share of active users with a list. Guess"
    )
    min_full_lists: float = Field(
        0.99, ge=0, le=1, description="gate: share of lists with k items. Guess"
    )

    @property
    def steps(self) -> tuple[str, ...]:
        """The champion and what fills its lists, in the ladder's order, each once."""
        return tuple(dict.fromkeys((self.model, *self.ladder)))


class Tune(Section):
    """How `recspark tune` searches."""

    n_trials: int = Field(30, ge=1, le=100_000, description="trials of a search. Guess")
    seed: int = Field(1, ge=0, lt=2**31, description="of the search; any number")
