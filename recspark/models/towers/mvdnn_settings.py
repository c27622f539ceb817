"""Settings of `mvdnn`: its views, what it reads of an item, and how it is trained."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, PositiveInt, model_validator

from recspark.models.setting_types import LearningRate, VectorSize
from recspark.models.towers.item_tokens import Part, TokenRules
from recspark.models.towers.tower_settings import TowerSettings

ALL = "all"  # the name of the only view where the settings declare none
_BYTES_OF_TOKEN = 16  # on a rank: code and weight, and what the driver sends


class MvdnnSettings(TowerSettings):
    """Settings of `Mvdnn`."""

    view_by: Literal["category", "event_type"] = Field(
        "category",
        description="what an event is in a view by: category = a category of its item; event_type "
        "= its type. Then every item can be in every view",
    )
    views: dict[str, tuple[str, ...]] = Field(
        {},
        description="name of a view -> its categories, or its event types. An item with categories "
        "of two views is in the first of them; a view with an empty list has all that is in no "
        "other. What is in no view is neither read nor listed. {} = one view of everything (DSSM)",
    )
    list_view: str | None = Field(
        None,
        description="the view whose items are listed; null = the first one. For a list of each "
        "view, name one model for each; the others name the first in `needs`, and train nothing",
    )
    learn_views: tuple[str, ...] = Field(
        (),
        description="views whose events are targets; [] = all. What users did in the other views is "
        "still read. One view alone has a user tower of its own",
    )
    view_balance: float = Field(
        1.0,
        ge=0,
        le=1,
        description="1 = every view has the same weight in the loss; 0 = a view weighs as much as "
        "it has users; between: by users^(1 - view_balance)",
    )
    own_view_dropout: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the examples that do not read what the user did in the target's own "
        "view, if there is anything in other views: as of users who are new in the view. Guess",
        json_schema_extra={"tune": {"choices": [0.2, 0.5, 0.8]}},
    )
    parts: tuple[Part, ...] = Field(
        ("item_name", "text", "category", "price"),
        min_length=1,
        description="what is read of an item in the catalogue: letter trigrams of its texts, its "
        "categories, and the class of its price",
    )
    item_features: tuple[str, ...] = Field(
        (),
        description="columns of item_features that are read of an item too, as classes. They are "
        "as of the cutoff, and an item without events has none: what counts events tells of the "
        "targets themselves",
    )
    n_buckets: int = Field(
        16_384,
        ge=1,
        le=10_000_000,
        description="codes that the tokens of items are hashed into. Each view has a vector of "
        "hidden_sizes[0] numbers for each. Guess; Huang et al. 2013 have 30,621 trigrams",
    )
    max_trigrams: int = Field(
        200, ge=1, description="the first that many different trigrams of a text are read. Guess"
    )
    length: int = Field(
        512,
        ge=1,
        description="at scoring, the newest items of a user that are read, of all views. As in "
        "training",
    )
    window: int = Field(
        100,
        ge=1,
        description="the tower reads the mean vector of this many of the newest items of each "
        "view. Guess",
        json_schema_extra={"tune": {"choices": [20, 50, 100, 500]}},
    )
    embedding_size: VectorSize = Field(64, description="length of the vectors that are read. Guess")
    hidden_sizes: tuple[PositiveInt, ...] = Field(
        (128, 64),
        min_length=1,
        description="units of each layer of all towers; the last is the length of a user's and of "
        "an item's vector. Guess; Huang et al. 2013: 300, 300, 128",
    )
    temperature: float = Field(
        0.1,
        gt=0,
        description="scores are cosines divided by this, in training and at scoring. A cosine "
        "alone, at most 1, could hardly tell items apart in a softmax. Guess",
        json_schema_extra={"tune": {"choices": [0.05, 0.07, 0.1, 0.2]}},
    )
    n_examples: int = Field(
        16,
        ge=1,
        description="examples that an epoch draws of each user in each view; a user with fewer in "
        "a view gives all. In a view, each user has the same weight in the loss. Guess",
        json_schema_extra={"tune": {"choices": [8, 16, 32]}},
    )
    n_samples: int | None = Field(
        1024,
        ge=1,
        description="items drawn for a step in each view, from the items of the view, as "
        "candidates besides the targets of the batch; null = all items of the view. Guess",
    )
    learning_rate: LearningRate = Field(
        5e-3,
        description="learning rate of Adam at the first step; it falls linearly to 0. Guess",
    )
    max_items: int = Field(
        200_000,
        ge=2,
        description="largest catalogue, in items, with those that nobody acted on yet. With the "
        "default settings, a rank takes up to 1.7 GB for it, if sparse 1.5 GB, besides 1 GB for "
        "itself, of an executor of 4 GB. Most of that is for the tokens of long texts",
    )

    @property
    def numbers_of_item(self) -> int:
        """See `TowerSettings`: an item's own vector is the one that is read; its other is made."""
        return self.embedding_size

    @property
    def item_bytes(self) -> int:
        """See `TowerSettings`, with as many tokens as an item can have."""
        n_texts = sum(part in ("item_name", "text") for part in self.parts)
        n_tokens = n_texts * self.max_trigrams + len(self.parts) + len(self.item_features)
        return super().item_bytes + _BYTES_OF_TOKEN * n_tokens

    @property
    def view_names(self) -> tuple[str, ...]:
        """The names of the views; the number of a view is its place among them."""
        return tuple(self.views) or (ALL,)

    @property
    def listed(self) -> int:
        """The number of the view that is listed."""
        return 0 if self.list_view is None else self.view_names.index(self.list_view)

    def learnable(self, n_users: torch.Tensor) -> torch.Tensor:
        """Return `n_users` (V,) of each view, with 0 for a view that `learn_views` leaves out."""
        is_learnt = [not self.learn_views or name in self.learn_views for name in self.view_names]
        return n_users * torch.tensor(is_learnt)

    @property
    def token_rules(self) -> TokenRules:
        """How items become tokens, and which view an item is in."""
        views = self.views if self.view_by == "category" else {}
        return TokenRules(self.parts, self.item_features, self.n_buckets, self.max_trigrams, views)

    @model_validator(mode="after")
    def _views_fit(self) -> Self:
        values = [value for of_view in self.views.values() for value in of_view]
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(f"views: {twice} are in two views, or twice in one")
        if sum(not of_view for of_view in self.views.values()) > 1:
            raise ValueError("views: two views have an empty list, which stands for all the rest")
        if self.view_by == "event_type" and not self.views:
            raise ValueError(
                "view_by is event_type, so views must say the event types of each view"
            )
        return self
