"""Settings of the data: which events enter, sessions, weights, and the sizes of training sets."""

from __future__ import annotations

from typing import Self

from pydantic import Field, NonNegativeFloat, model_validator

from recspark.config.section import Section


class Ingest(Section):
    """Which rows enter `events`."""

    max_late_days: int = Field(
        7,
        ge=0,
        le=36_500,
        description="days; an older event goes to quarantine, but for a first landing. Guess",
    )
    min_clean_fraction: float = Field(
        0.2,
        ge=0,
        le=1,
        description="share of rows; clean ÷ (clean + quarantined) of those that did not come before, "
        "of events and of the catalogue; below it the landing is refused before any write. Guess",
    )


class Sessions(Section):
    """When one session of a user ends and the next begins."""

    gap_minutes: float = Field(
        30,
        gt=0,
        le=525_600,
        description="minutes without an act; exactly the gap stays in. Industry habit",
    )
    max_minutes: float | None = Field(
        24 * 60,
        gt=0,
        le=525_600,
        description="minutes, longest session; null = no limit. Guess: a day ends a bot's session",
    )
    impression_types: tuple[str, ...] = Field(
        ("impression",),
        description="types of events that say what a user was shown, not what the user did: they "
        "belong to a session and keep it open, but enter no history",
    )


class Features(Section):
    """How events become histories, weights and features."""

    event_weights: dict[str, NonNegativeFloat] = Field(
        default_factory=lambda: {"purchase": 1.0},
        description="weight of one event by type, 0 or more; a type not named here weighs "
        "`other_weight`. The unit of all weights",
    )
    other_weight: float = Field(
        1.0, ge=0, description="weight of one event of any other type. Guess: as a purchase"
    )
    explicit: bool = Field(
        False,
        description="events are ratings: one weighs its `value` times the weight of its type, the "
        "newest of a user and item stands for it, and one without a value is none; the backtest has "
        "rmse and mae of models that predict ratings. Wants half_life_days null",
    )
    half_life_days: float | None = Field(
        None,
        gt=0,
        le=36_500,
        description="days, decay of the weights in training sets; null = none",
    )
    history_buckets: int = Field(
        16,
        ge=1,
        le=1_000_000,
        description="slices of `histories`; fixed at its first write. Guess: one machine",
    )
    max_training_items: int = Field(
        512,
        ge=1,
        description="newest distinct items of a user in a training set (of sequences: newest "
        "events); thins training only. Guess: few users have more",
    )
    sequence_length: int = Field(
        51,
        ge=2,
        description="items of a row of training_sessions and training_histories: those that a "
        "network reads, and the one after them. Source: Kang & McAuley 2018 (50 for sparse data)",
    )
    max_training_users: int = Field(
        2048,
        ge=1,
        description="newest users of an item in training_item_bags; thins training only. Guess: few "
        "items have more",
    )
    max_words: int = Field(
        8000,
        ge=1,
        description="words that training_texts knows, those of the most items. Source: Wang, Wang & "
        "Yeung 2015, section 5.1 (of CiteULike-a)",
    )
    max_item_words: int = Field(
        128,
        ge=1,
        description="known words of an item in training_texts, those of the most items. Guess: a "
        "name and some sentences",
    )
    max_shown: int = Field(
        100,
        ge=1,
        description="impressions, the newest, of a row of the training tables that have them; thins "
        "training only. Guess: a few pages of results",
    )

    @model_validator(mode="after")
    def _ratings_do_not_decay(self) -> Self:
        if self.explicit and self.half_life_days is not None:
            raise ValueError("explicit: ratings do not decay; set half_life_days to null")
        return self
