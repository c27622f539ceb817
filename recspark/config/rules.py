"""Settings of the rules that re-rank published lists: section `rules`, and the file conf/rules.yaml.

A rule has a name, by which lists apply it (`publish.rules`) and by which the column `rules` of a
published row says that the rule let the row in or raised it. Each kind of rule is one class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from recspark.config.section import Section
from recspark.errors import suggest

SEGMENTS = ("light", "regular", "heavy", "cold")

Days = Annotated[float, Field(ge=0, le=36_500)]


class RuleBase(Section):
    """What every rule has."""

    segments: tuple[str, ...] = Field(
        (),
        description="the users whom the rule concerns, by their activity: "
        f"{', '.join(SEGMENTS)} (cold = without an event before the cutoff); () = all users",
    )

    @field_validator("segments")
    @classmethod
    def _are_known(cls, segments: tuple[str, ...]) -> tuple[str, ...]:
        for segment in segments:
            if segment not in SEGMENTS:
                raise ValueError(f"no segment is called '{segment}'.{suggest(segment, SEGMENTS)}")
        return segments


class SelectingRule(RuleBase):
    """A rule that concerns certain items: those that any of its three settings names."""

    items: tuple[Annotated[str, Field(coerce_numbers_to_str=True)], ...] = Field(
        (), description="item ids"
    )
    categories: tuple[str, ...] = Field(
        (),
        description="names of categories, of any level. A brand or a seller is a category where "
        "the source puts it into `category`",
    )
    words: tuple[Annotated[str, Field(coerce_numbers_to_str=True, min_length=1)], ...] = Field(
        (), description="words of the item's name, in lower or upper case"
    )

    @model_validator(mode="after")
    def _names_something(self) -> SelectingRule:
        if not (self.items or self.categories or self.words):
            raise ValueError("the rule names no items, categories or words")
        return self


class LeaveOut(SelectingRule):
    """Leaves out the items that it names."""

    kind: Literal["leave_out"] = Field(description="this kind of rule")


class Pin(SelectingRule):
    """Puts the first of the items that it names to the top of the list.

    It takes items that are in the user's pool, in the order of the pool.
    """

    kind: Literal["pin"] = Field(description="this kind of rule")
    places: int = Field(
        ge=1, le=10_000, description="items that go to the top of the list, at most"
    )


class Cap(RuleBase):
    """Lists at most some items of a kind: of one category, one price family or one name family."""

    kind: Literal["cap"] = Field(description="this kind of rule")
    at_most: int = Field(ge=1, le=10_000, description="items of one kind in a list, at most")
    by: Literal["category", "price", "name"] = Field(
        "category",
        description="what items of one kind have in common. category: the category of `level`. "
        "price: a price in the same step, where each step is `factor` times the one below. name: "
        "similar words. An item without a category, price or name is of no kind",
    )
    level: int = Field(
        1,
        ge=1,
        le=100,
        description="the level of the category, from 1 = the first; with `by: category`",
    )
    factor: float = Field(
        1.5,
        gt=1,
        le=1000,
        description="the width of a price step, as a ratio; with `by: price`. Guess",
    )
    similarity: float = Field(
        0.4,
        gt=0,
        le=1,
        description="names are similar from this weighted Jaccard similarity of their words on; "
        "with `by: name`. Chosen on the names of the bundled shop: its hot water bottles have .38 "
        "and more to one another, different products of one pattern less than .4",
    )


class Freshness(RuleBase):
    """Raises new items, or leaves out old ones.

    An item's age counts from its first event. An item without an event is new.
    """

    kind: Literal["freshness"] = Field(description="this kind of rule")
    days: Days = Field(description="days before the cutoff; an item first seen in them is new")
    older: Literal["keep", "leave_out"] = Field(
        "keep",
        description="keep: new items go to the top `places`, older ones follow; leave_out: older "
        "items are left out, and the order stays",
    )
    places: int = Field(
        2, ge=1, le=10_000, description="new items that go to the top of the list, at most. Guess"
    )


class PriceBand(RuleBase):
    """Leaves out items that are far from the user's own prices.

    A user's price is the mean of today's prices of the items of the user's events. Items without a
    price, and users without one, are not concerned.
    """

    kind: Literal["price_band"] = Field(description="this kind of rule")
    factor: float = Field(
        gt=1,
        le=1_000_000,
        description="an item is left out where its price is more than `factor` times the user's "
        "mean, or less than the mean divided by `factor`",
    )


class ExcludeBought(RuleBase):
    """Leaves out items for some time after the user's last event with them.

    In mode novel, such items are never in a list.
    """

    kind: Literal["exclude_bought"] = Field(description="this kind of rule")
    days: Days | None = Field(
        None, description="days after the event; null = for ever, 0 = never left out"
    )
    categories: dict[str, Days | None] = Field(
        default_factory=dict,
        description="category of any level -> days after the event, in place of `days`; null = for "
        "ever, 0 = never left out. Of several categories of an item, the deepest one counts",
    )


class Diversity(RuleBase):
    """Mixes similar items less: picks one item after the other by maximal marginal relevance.

    The next item is the one with the largest `relevance` × (1 − place / `publish.pool`) − (1 −
    `relevance`) × (its similarity to the most similar item picked before).
    Source: Carbonell & Goldstein 1998.
    """

    kind: Literal["diversity"] = Field(description="this kind of rule")
    relevance: float = Field(
        ge=0,
        le=1,
        description="the weight lambda of the order of the list: 1 keeps it, 0 looks at similarity "
        "only",
    )
    by: str = Field(
        "category",
        min_length=1,
        description="what makes items similar. category: common categories (Jaccard); name: common "
        "words (weighted Jaccard); else the name of an encoder of `models`, or of a model with "
        "item vectors (als, mf, item2vec): the cosine of their vectors",
    )


class Calibrated(RuleBase):
    """Gives the list the categories in the shares that they have in the user's history.

    The next item is the one with the largest (1 − `weight`) × (sum of 1 − place / `publish.pool`)
    − `weight` × KL(p, q), where p are the shares of the categories among the user's events, and q
    those of the list with it, smoothed by .01 × p. Source: Steck 2018, equations 4 to 7.
    """

    kind: Literal["calibrated"] = Field(description="this kind of rule")
    weight: float = Field(
        0.5,
        ge=0,
        le=1,
        description="the weight lambda of the calibration; 0 keeps the order. Guess",
    )
    level: int = Field(1, ge=1, le=100, description="the level of the category, from 1 = the first")


# kind -> its class
KINDS_OF_RULES: dict[str, type[RuleBase]] = {
    "leave_out": LeaveOut,
    "pin": Pin,
    "cap": Cap,
    "freshness": Freshness,
    "price_band": PriceBand,
    "exclude_bought": ExcludeBought,
    "diversity": Diversity,
    "calibrated": Calibrated,
}


def _kind_of(rule: Any) -> str | None:
    kind = rule.get("kind") if isinstance(rule, Mapping) else getattr(rule, "kind", None)
    return None if kind is None else str(kind)


# Pydantic's own discriminator by a field allows no validator of all fields, which sections have.
Rule = Annotated[
    Annotated[LeaveOut, Tag("leave_out")]
    | Annotated[Pin, Tag("pin")]
    | Annotated[Cap, Tag("cap")]
    | Annotated[Freshness, Tag("freshness")]
    | Annotated[PriceBand, Tag("price_band")]
    | Annotated[ExcludeBought, Tag("exclude_bought")]
    | Annotated[Diversity, Tag("diversity")]
    | Annotated[Calibrated, Tag("calibrated")],
    Discriminator(_kind_of),
]
