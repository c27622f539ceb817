"""Settings of the published lists: which models make them, and what refuses them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from recspark.config.section import Section

Mode = Literal["novel", "repeat"]
# Algorithms that give neighbours of items, as the registry tags them (a test compares).
NEIGHBOUR_MODELS = ("item_knn", "ease", "item2vec", "rp3beta")


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
