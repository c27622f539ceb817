"""Settings of the published lists: which models make them, and which gates they must pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator

from recspark.config.section import Section

Mode = Literal["novel", "repeat"]
MAIN = "main"  # the name of the list where the settings name none
# The model name under which the backtest has the list that would have been published.
PUBLISHED = "published"
BEFORE_RULES = "_before_rules"  # follows the model name of a list that has rules
# Algorithms that give neighbours of items: those with the tag `neighbours` in the registry. A test
# compares the two.
NEIGHBOUR_MODELS = (
    "item_knn",
    "ease",
    "item2vec",
    "prod2vec",
    "meta_prod2vec",
    "rp3beta",
    "content_knn",
    "content2vec",
)
# Algorithms that give vectors and no lists: those of the kind `encoder` in the registry. A test
# compares the two.
ENCODER_MODELS = (
    "audio",
    "colours",
    "file_vectors",
    "image",
    "image_features",
    "paragraph_vectors",
    "sentences",
    "tfidf",
    "word_vectors",
)


@dataclass(frozen=True)
class PublishedList:
    """One of the lists that a night publishes for every active user.

    Parameters
    ----------
    name : value of the column `list` in `recommendations`
    model : the champion
    ladder : models that fill the places that the champion leaves empty, in this order
    mode : `novel` or `repeat`
    k : items in the list
    min_coverage, min_full_lists : thresholds of its gates
    rules : names of the rules that re-rank it
    backtest_model : the model name under which the backtest has this list
    """

    name: str
    model: str
    ladder: tuple[str, ...]
    mode: Mode
    k: int
    min_coverage: float
    min_full_lists: float
    rules: tuple[str, ...] = ()
    backtest_model: str = PUBLISHED

    @property
    def steps(self) -> tuple[str, ...]:
        """The champion, then the models of the ladder in its order. Each model is named once."""
        return tuple(dict.fromkeys((self.model, *self.ladder)))

    @property
    def before_rules(self) -> str:
        """The model name, in `metrics`, of this list as the ladder fills it, before its rules."""
        return f"{self.backtest_model}{BEFORE_RULES}"

    @property
    def judged_model(self) -> str:
        """The model name whose figures the backtest gate judges: of a list with rules, that before
        them. What rules cost is the will of whoever wrote them, and no fault of the models.
        """
        return self.before_rules if self.rules else self.backtest_model


class ListSettings(Section):
    """What one of several published lists has of its own; null = as in section `publish`."""

    model: str | None = Field(None, description="the champion of this list")
    ladder: tuple[str, ...] | None = Field(None, description="the ladder of this list")
    mode: Mode | None = Field(None, description="the mode of this list")
    k: int | None = Field(None, ge=1, le=10_000, description="items in this list")
    min_coverage: float | None = Field(
        None, ge=0, le=1, description="gate: share of active users who have this list, at least"
    )
    min_full_lists: float | None = Field(
        None, ge=0, le=1, description="gate: share of these lists that have k items, at least"
    )
    rules: tuple[str, ...] | None = Field(
        None, description="names of rules (section `rules`) that re-rank this list"
    )


class Publish(Section):
    """Which lists are published, and which gates they must pass."""

    lists: dict[str, ListSettings] = Field(
        default_factory=dict,
        description="name -> settings of a list. Every active user gets each of these lists. What a "
        "list leaves out of model, ladder, mode, k, min_coverage, min_full_lists and rules is as in "
        "this section. A file that sets `lists` replaces all lists of the layers below it. "
        f"null = one list, called {MAIN}, as this section says",
    )
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
        "none. `recspark tune` judges lists of this mode",
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

    @field_validator("lists", mode="before")
    @classmethod
    def _null_is_nothing_of_its_own(cls, lists: Any) -> Any:
        """Return `lists` with {} in the place of null: as a whole, and for a list."""
        if isinstance(lists, Mapping):
            return {name: {} if own is None else own for name, own in lists.items()}
        return {} if lists is None else lists

    @property
    def published_lists(self) -> tuple[PublishedList, ...]:
        """The lists that the night publishes, in the order of the setting `lists`."""
        return lists_of(self.model_dump())

    rules: tuple[str, ...] = Field(
        (),
        description="names of rules (section `rules`) that re-rank the list. Rules that leave out "
        "items come first, then the others, both in this order (docs/rules.md); () = no rules",
    )
    pool: int = Field(
        150,
        ge=1,
        le=100_000,
        description="items of a user among which the rules choose: the first of the list that the "
        "ladder would fill up to this length. With `n_candidates` = 100, the default are all "
        "candidates of the champion, and 50 of the models of the ladder for lists that the rules "
        "empty",
    )

    @property
    def steps(self) -> tuple[str, ...]:
        """The champions and the models of the ladders of all lists. Each model is named once."""
        return tuple(dict.fromkeys(step for list_ in self.published_lists for step in list_.steps))

    @property
    def backtest_models(self) -> tuple[str, ...]:
        """The model names under which the backtest has the lists."""
        return tuple(list_.backtest_model for list_ in self.published_lists)

    def named_models(self) -> list[tuple[str, str]]:
        """Return (setting, model) for each name of a model in `model` and `ladder`, of this section
        and of its lists.
        """
        settings: list[tuple[str, Publish | ListSettings]] = [("publish", self)]
        settings += [(f"publish.lists.{name}", own) for name, own in self.lists.items()]
        return [
            (f"{prefix}.{field}", model)
            for prefix, section in settings
            for field, models in (("model", (section.model,)), ("ladder", section.ladder or ()))
            for model in models
            if model is not None
        ]

    def named_rules(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return (setting, names of rules) for this section and for its lists that name rules."""
        own = [(f"publish.lists.{name}.rules", list_.rules) for name, list_ in self.lists.items()]
        return [
            ("publish.rules", self.rules),
            *[(s, rules) for s, rules in own if rules is not None],
        ]

    def lengths(self) -> dict[str, int]:
        """Return setting -> k, of this section and of the lists that have a k of their own."""
        own = {f"publish.lists.{name}.k": own.k for name, own in self.lists.items()}
        return {"publish.k": self.k, **{name: k for name, k in own.items() if k is not None}}


def is_backtest_model(name: str) -> bool:
    """Return whether a model's name stands for a published list.

    >>> [is_backtest_model(name) for name in ("published", "published_again", "publisher")]
    [True, True, False]
    """
    return name == PUBLISHED or name.startswith(f"{PUBLISHED}_")


def lists_of(publish: Mapping[str, Any]) -> tuple[PublishedList, ...]:
    """Return the lists of a night from its section `publish` as plain values.

    The section may be that of an earlier night, as `runs.config` has it: settings that it lacks have
    their defaults.

    >>> night = {"model": "ease", "ladder": ["popular"], "mode": "novel", "k": 10,
    ...          "min_coverage": 0.9, "min_full_lists": 0.9}
    >>> [(one.name, one.backtest_model) for one in lists_of(night)]
    [('main', 'published')]
    >>> both = lists_of({**night, "lists": {"again": {"mode": "repeat"}, "main": None}})
    >>> [(one.name, one.mode, one.backtest_model) for one in both]
    [('again', 'repeat', 'published_again'), ('main', 'novel', 'published')]
    """
    settings_of_lists = publish.get("lists") or {MAIN: {}}
    # By name: `runs.config` does not keep the order of the lists.
    first = MAIN if MAIN in settings_of_lists else min(settings_of_lists)

    def value(own: Mapping[str, Any] | None, name: str) -> Any:
        own_value = (own or {}).get(name)
        default = Publish.model_fields[name].default
        return publish.get(name, default) if own_value is None else own_value

    return tuple(
        PublishedList(
            name=name,
            model=value(own, "model"),
            ladder=tuple(value(own, "ladder")),
            mode=value(own, "mode"),
            k=value(own, "k"),
            min_coverage=value(own, "min_coverage"),
            min_full_lists=value(own, "min_full_lists"),
            rules=tuple(value(own, "rules")),
            backtest_model=PUBLISHED if name == first else f"{PUBLISHED}_{name}",
        )
        for name, own in settings_of_lists.items()
    )
