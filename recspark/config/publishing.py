"""Settings of the published lists: which models make them, and which gates they must pass."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from recspark.config.section import Section

Mode = Literal["novel", "repeat"]
# Algorithms that give neighbours of items: those with the tag `neighbours` in the registry. A test
# compares the two.
NEIGHBOUR_MODELS = ("item_knn", "ease", "item2vec", "rp3beta")


class Publish(Section):
    """Which lists are published, and which gates they must pass."""

    model: str = Field(
        "ease",
        description="the champion: the model whose lists are published. Where it is not set, and "
        "its default is not among `models`, the first of `ladder`, or else of `models`, that is "
        "among `models` and is not evaluate.baseline takes its place",
    )
    ladder: tuple[str, ...] = Field(
        ("item_knn", "popular"),
        description="models that fill the places that the champion leaves empty in a list, in this "
        "order. Where it is not set, models of its default that are not among `models` are left "
        "out",
    )
    mode: Mode = Field(
        "novel",
        description="novel leaves out the items that the user acted on before; repeat leaves out "
        "none",
    )
    k: int = Field(10, ge=1, le=10_000, description="items in a list. Habit")
    active_days: int = Field(
        400,
        ge=1,
        le=36_500,
        description="days before the cutoff; a user with an event in these days gets a list. Guess",
    )
    rescore_days: int | None = Field(
        None,
        ge=1,
        le=36_500,
        description="days before the cutoff. An active user with an event in these days is scored "
        "anew, and so is one whose events changed or whose list holds an item that may no longer "
        "be listed. The other active users keep the list of the newest earlier night. null = "
        "everyone is scored anew",
    )
    neighbours_model: str | None = Field(
        "item_knn",
        description="the model whose neighbours of items fill table `item_neighbours`; null = no "
        "model. Where it is not set, and its default is not among `models`, it is the first of "
        "`models` whose algorithm is one of "
        f"{', '.join(NEIGHBOUR_MODELS)}, else null",
    )
    n_neighbours: int = Field(20, ge=1, le=10_000, description="neighbours of each item. Guess")
    because: int = Field(
        3,
        ge=0,
        le=100,
        description="reasons of each row, at most: the user's own items that speak most for it "
        "(column `because`); 0 = off. Guess",
    )
    min_coverage: float = Field(
        0.999,
        ge=0,
        le=1,
        description="gate: share of active users who have a list, at least. Guess",
    )
    min_full_lists: float = Field(
        0.99, ge=0, le=1, description="gate: share of lists that have k items, at least. Guess"
    )

    @property
    def steps(self) -> tuple[str, ...]:
        """The champion, then the models of the ladder in its order. Each model is named once."""
        return tuple(dict.fromkeys((self.model, *self.ladder)))
