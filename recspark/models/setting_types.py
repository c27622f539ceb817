"""Settings that several models share: each type is declared here once.

A type has the bounds of the setting, its meaning and the values that `recspark tune` may try. Every
model gives its own default. Where the meaning differs, a model also gives its own description:
`half_life_days: HalfLifeDays = Field(7.0, description="…")`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

HalfLifeDays = Annotated[
    float | None,
    Field(
        gt=0,
        description="days; an event this old counts half; null = no decay",
        json_schema_extra={"tune": {"low": 1, "high": 400, "log": True}},
    ),
]
# For a network. The weights in its training set have decayed already, by `features.half_life_days`;
# this half-life is for scoring only.
ScoringHalfLifeDays = Annotated[
    float | None,
    Field(
        gt=0,
        description="days; at scoring an event this old counts half; null = no decay",
        json_schema_extra={"tune": {"low": 10, "high": 200, "log": True}},
    ),
]
# For the item-item models. The formula is in the docstring of `item_item.trend_factors`.
TrendDays = Annotated[
    float | None,
    Field(
        gt=0,
        description="days; scores are multiplied by the item's trend: its decayed popularity with "
        "this half-life over that with six times it, scaled so that an item that sells evenly has "
        "the factor 1; null = no trend",
        json_schema_extra={"tune": {"choices": [None, 3, 5, 10]}},
    ),
]
# For an encoder that learns.
RefitDays = Annotated[
    int,
    Field(
        ge=1,
        description="days that one fitted encoder is used before it is fitted anew. Until then a "
        "night encodes only what is new or changed; after a fit it encodes all items. 1 = every "
        "night",
    ),
]
VectorSize = Annotated[
    int,
    Field(
        ge=1,
        description="length of a user's and an item's vector",
        json_schema_extra={"tune": {"choices": [32, 64, 128]}},
    ),
]
Epochs = Annotated[
    int,
    Field(
        ge=1,
        description="passes over the training set",
        json_schema_extra={"tune": {"choices": [10, 20, 40]}},
    ),
]
LearningRate = Annotated[
    float,
    Field(
        gt=0,
        description="learning rate of Adam at the first step; it falls linearly to 0",
        json_schema_extra={"tune": {"low": 1e-3, "high": 2e-2, "log": True}},
    ),
]
# What is held out differs where the rows of a training set are not independent: of pairs it is
# items, of examples of a ranker it is users.
ValidationShare = Annotated[
    float,
    Field(
        ge=0,
        lt=1,
        description="share of the training set that is held out for validation. Whole files are "
        "held out; a file is a hash sample of the rows, and a rank has ten files. The model gets "
        "the weights of the epoch with the best validation value",
    ),
]
Patience = Annotated[
    int,
    Field(
        ge=0,
        description="the training ends after this many epochs in a row without a better validation "
        "value; 0 = it runs all epochs",
    ),
]
