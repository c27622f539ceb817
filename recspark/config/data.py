"""Settings of the data: the checks of new rows, sessions, weights, and sizes of training sets."""

from __future__ import annotations

from typing import Self

from pydantic import Field, NonNegativeFloat, model_validator

from recspark.config.section import Section


class Ingest(Section):
    """Which rows of a landing enter table `events`."""

    max_late_days: int = Field(
        7,
        ge=0,
        le=36_500,
        description="days; an event that is older than this on the night goes to quarantine. The "
        "first landing has no such limit. Guess",
    )
    min_clean_fraction: float = Field(
        0.2,
        ge=0,
        le=1,
        description="share of rows: clean ÷ (clean + quarantined). Only rows that were not "
        "delivered before count. Events and catalogue are checked alike. Where the share is "
        "smaller, the landing is refused before anything is written. Guess",
    )


class Sessions(Section):
    """When one session of a user ends and the next begins."""

    gap_minutes: float = Field(
        30,
        gt=0,
        le=525_600,
        description="minutes; a longer time between two events ends the session. A gap of exactly "
        "this length does not. Industry habit",
    )
    max_minutes: float | None = Field(
        24 * 60,
        gt=0,
        le=525_600,
        description="minutes; a longer session is cut into sessions of this length. null = no "
        "limit. Guess: a day ends the session of a bot",
    )
    impression_types: tuple[str, ...] = Field(
        ("impression",),
        description="types of events that say what a user was shown, not what the user did. These "
        "events belong to a session and keep it open, but they enter no history",
    )


class Features(Section):
    """How events become histories, weights and features."""

    event_weights: dict[str, NonNegativeFloat] = Field(
        default_factory=lambda: {"purchase": 1.0},
        description="event type -> weight of one event of the type, 0 or more. A type that is not "
        "named here weighs `other_weight`. This is the unit of all weights",
    )
    other_weight: float = Field(
        1.0,
        ge=0,
        description="weight of one event of any other type. Guess: the same as a purchase",
    )
    explicit: bool = Field(
        False,
        description="whether events are ratings. A rating weighs its `value` times the weight of "
        "its type. Of several ratings of one item by one user, the newest counts. An event without "
        "a value is no rating. The backtest has rmse and mae of the models that predict ratings. "
        "`half_life_days` must be null",
    )
    half_life_days: float | None = Field(
        None,
        gt=0,
        le=36_500,
        description="days after which the weight of an event in a training set has halved. null = "
        "weights do not decay",
    )
    history_buckets: int = Field(
        16,
        ge=1,
        le=1_000_000,
        description="slices of table `histories`. The number is fixed when the table is first "
        "written. Guess: for one machine",
    )
    max_training_items: int = Field(
        512,
        ge=1,
        description="distinct items: a training set has the newest ones of each user (a training "
        "set of sequences has the newest events). This limits training only. Guess: few users have "
        "more",
    )
    sequence_length: int = Field(
        51,
        ge=2,
        description="items in a row of training_sessions and training_histories: those that a "
        "network reads, and the one that follows them. Source: Kang & McAuley 2018 (50 for sparse "
        "data)",
    )
    max_training_users: int = Field(
        2048,
        ge=1,
        description="users: training_item_bags has the newest ones of each item. This limits "
        "training only. Guess: few items have more",
    )
    max_words: int = Field(
        8000,
        ge=1,
        description="words in the dictionary of training_texts: those that occur in the most "
        "items. Source: Wang, Wang & Yeung 2015, section 5.1 (for the data set CiteULike-a)",
    )
    max_item_words: int = Field(
        128,
        ge=1,
        description="words of one item in training_texts: those of the dictionary that occur in "
        "the most items. Guess: a name and some sentences",
    )
    max_shown: int = Field(
        100,
        ge=1,
        description="impressions: a row of a training table with impressions has the newest ones. "
        "This limits training only. Guess: a few pages of results",
    )

    @model_validator(mode="after")
    def _ratings_do_not_decay(self) -> Self:
        if self.explicit and self.half_life_days is not None:
            raise ValueError("explicit: ratings do not decay; set half_life_days to null")
        return self
