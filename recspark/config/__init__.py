"""The typed settings of a night. Each module of this package holds one group of sections.

`recspark.config.load` reads the settings from the files in `conf/`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from typing import Any

from pydantic import Field, model_validator

from recspark import masking
from recspark.config.data import Features, Ingest, Sessions
from recspark.config.evaluation import Evaluate, Examples, Tune
from recspark.config.machine import Paths, Spark, Train
from recspark.config.publishing import (
    BEFORE_RULES,
    ENCODER_MODELS,
    MAIN,
    NEIGHBOUR_MODELS,
    PUBLISHED,
    ListSettings,
    Mode,
    Publish,
    PublishedList,
    is_backtest_model,
    lists_of,
)
from recspark.config.rules import Diversity, Rule
from recspark.config.section import Section
from recspark.config.source import NULL_IDS, MadeUpTimes, Source
from recspark.errors import suggest

__all__ = [
    "ENCODER_MODELS", "MAIN", "NEIGHBOUR_MODELS", "NULL_IDS", "PUBLISHED", "Config", "Evaluate", "Examples", "Features",
    "Ingest", "ListSettings", "MadeUpTimes", "Mode", "Paths", "Publish", "PublishedList", "Rule",
    "Section", "Sessions", "Source", "Spark", "Train", "Tune", "cutoff_of", "digest",
    "is_backtest_model", "lists_of", "on_grid",
]  # fmt: skip

_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_-]{0,99}\Z")


class Config(Section):
    """All settings of one night, after the layers have been put together."""

    env: str = Field(
        "local", description="name of the file conf/env/<name>.yaml; the option --env sets it"
    )
    paths: Paths = Paths()  # type: ignore[call-arg]
    spark: Spark = Spark()  # type: ignore[call-arg]
    source: Source
    ingest: Ingest = Ingest()  # type: ignore[call-arg]
    sessions: Sessions = Sessions()  # type: ignore[call-arg]
    features: Features = Features()  # type: ignore[call-arg]
    models: tuple[str, ...] = Field(
        min_length=1, description="models that are trained and compared every night, in this order"
    )
    model_settings: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="model -> its settings. They override those in conf/models and conf/tuned; "
        "--set writes them as `models.<name>.<setting>`. Four of them are not settings of the "
        "algorithm: `algorithm` names the algorithm, where it is not the name of the model; "
        "`needs` lists the night's models that this model is built on; `kind` is the kind of an "
        "algorithm from outside (retriever, ranker or encoder); `learns: false` is for a ranker that "
        "needs no examples with its settings",
    )
    train: Train = Train()  # type: ignore[call-arg]
    evaluate: Evaluate = Evaluate()  # type: ignore[call-arg]
    examples: Examples = Examples()  # type: ignore[call-arg]
    publish: Publish = Publish()  # type: ignore[call-arg]
    rules: dict[str, Rule] = Field(
        default_factory=dict,
        description="name of a rule -> its settings, also from conf/rules.yaml. A rule does nothing "
        "until a list applies it (`publish.rules`)",
    )
    tune: Tune = Tune()  # type: ignore[call-arg]
    keep_nights: int = Field(
        30,
        ge=1,
        le=36_500,
        description="nights whose candidates, features, training sets and artifacts are kept; "
        "those of earlier nights are deleted. Guess",
    )
    n_candidates: int = Field(
        100, ge=1, le=100_000, description="items in a candidate list of a model. Guess"
    )

    @model_validator(mode="after")
    def _names_fit_together(self) -> Config:
        """Check names and numbers across sections.

        One error reports all problems, so that they can be corrected in one go.
        """
        # A model without settings may be a misspelt name, so it is not suggested.
        choices = [name for name in self.models if name in self.model_settings] or self.models
        problems = [
            f"{field} = '{name}' is not among models {list(self.models)}.{suggest(name, choices)}"
            for field, name in [
                ("evaluate.baseline", self.evaluate.baseline),
                ("publish.neighbours_model", self.publish.neighbours_model),
                *self.publish.named_models(),
            ]
            if name is not None and name not in self.models
        ]
        weighted_impressions = sorted(
            {*self.sessions.impression_types} & {*self.features.event_weights}
        )
        if weighted_impressions:
            problems.append(
                f"features.event_weights names {weighted_impressions}, which sessions.impression_types says are "
                "impressions: they enter no history, so they have no weight"
            )
        # Model names become names of files, folders, table slices and Airflow tasks.
        unfit_names = [
            name for name in self.models if not _NAME.match(name) or is_backtest_model(name)
        ]
        if unfit_names:
            problems.append(
                f"models: {unfit_names}: a name is of letters, digits, _ and -, up to 100, and neither "
                f"'{PUBLISHED}' nor begins with '{PUBLISHED}_': these are the published lists"
            )
        unfit_lists = [
            name
            for name in self.publish.lists
            if not _NAME.match(name) or f"_{name}".endswith(BEFORE_RULES)
        ]
        if unfit_lists:
            problems.append(
                f"publish.lists: {unfit_lists}: a name is of letters, digits, _ and -, up to 100, and "
                f"does not end with '{BEFORE_RULES.removeprefix('_')}'"
            )
        repeated_names = sorted({name for name in self.models if self.models.count(name) > 1})
        if repeated_names:
            problems.append(f"models names {repeated_names} twice")
        problems += self._wrong_needs()
        problems += self._wrong_rules()
        lengths = {**self.publish.lengths(), "evaluate.ks": max(self.evaluate.ks)}
        longer = [f"{name} = {k}" for name, k in lengths.items() if self.n_candidates < k]
        if longer:
            problems.append(f"n_candidates must be at least {' and '.join(longer)}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _wrong_rules(self) -> list[str]:
        """Return what is wrong with the names of the rules and with what the rules name."""
        problems = []
        for setting, names in self.publish.named_rules():
            problems += [
                f"{setting} names '{name}', which is no rule.{suggest(name, self.rules)}"
                if self.rules
                else f"{setting} names '{name}', but there are no rules: write it into conf/rules.yaml"
                for name in names
                if name not in self.rules
            ]
            if len({*names}) < len(names):
                problems.append(f"{setting} names a rule twice: {list(names)}")
        problems += [
            f"rules.{name}: a name is of letters, digits, _ and -, up to 100"
            for name in self.rules
            if not _NAME.match(name)
        ]
        similarities = ("category", "name", *self.models)
        problems += [
            f"rules.{name}.by = '{rule.by}' is neither category nor name nor one of models "
            f"{list(self.models)}.{suggest(rule.by, similarities)}"
            for name, rule in self.rules.items()
            if isinstance(rule, Diversity) and rule.by not in similarities
        ]
        lengths = self.publish.lengths()
        if longer := [f"{name} = {k}" for name, k in lengths.items() if self.publish.pool < k]:
            problems.append(f"publish.pool must be at least {' and '.join(longer)}")
        return problems

    def _wrong_needs(self) -> list[str]:
        """Return what is wrong with the settings `needs` of the night's models."""
        problems = []
        for model in self.models:
            needs = self.settings_of(model).get("needs", [])
            if not isinstance(needs, list) or not all(isinstance(name, str) for name in needs):
                problems.append(f"models.{model}.needs = {needs!r} is no list of names")
                return problems
            problems += [
                f"models.{model}.needs names '{name}', which is not among models {list(self.models)}."
                f"{suggest(name, self.models)}"
                for name in needs
                if name not in self.models
            ]
            if len({*needs}) < len(needs):
                problems.append(f"models.{model}.needs names a model twice: {needs}")
        if not problems and (circle := self._circle_of_needs()):
            problems.append(f"models need one another in a circle: {' -> '.join(circle)}")
        return problems

    def _circle_of_needs(self) -> list[str]:
        """Return models that need one another in a circle; [] where no models do.

        Each model in the list needs the next one. The first model stands at the end again: where a
        needs b and b needs a, the list is [a, b, a].
        """
        checked: set[str] = set()

        def walk(model: str, path: list[str]) -> list[str]:
            if model in path:
                return [*path[path.index(model) :], model]
            if model in checked:
                return []
            circle: list[str] = []
            for needed in self.needs_of(model):
                circle = circle or walk(needed, [*path, model])
            checked.add(model)
            return circle

        return next((circle for model in self.models if (circle := walk(model, []))), [])

    def settings_of(self, model: str) -> dict[str, Any]:
        """Return the settings that the layers give to `model`; {} where they give none."""
        return self.model_settings.get(model, {})

    def needs_of(self, model: str) -> tuple[str, ...]:
        """Return the models that `model` is built on: the setting `needs` of `model`."""
        return tuple(self.settings_of(model).get("needs", ()))

    def with_needs(self, models: Iterable[str]) -> tuple[str, ...]:
        """Return `models` and all models that they are built on, directly or through others.

        The order is that of the setting `models`.
        """
        needed_models: set[str] = set()
        unvisited_models = list(models)
        while unvisited_models:
            model = unvisited_models.pop()
            if model not in needed_models:
                needed_models.add(model)
                unvisited_models += self.needs_of(model)
        return tuple(model for model in self.models if model in needed_models)

    def secrets(self) -> dict[str, str]:
        """Return name -> value of the free settings whose names say that they hold secrets.

        The free settings are `source.options` and `spark.conf`.
        """
        free_settings = {**self.source.options, **self.spark.conf}
        return {name: value for name, value in free_settings.items() if masking.is_secret(name)}

    def masked(self) -> dict[str, Any]:
        """Return the complete configuration as plain values, with its secrets hidden."""
        data = self.model_dump(mode="json")
        data["spark"]["conf"] = masking.mask_free(data["spark"]["conf"])
        data["source"]["options"] = masking.mask_free(data["source"]["options"])
        for section, field in (("paths", "root"), ("source", "path"), ("source", "items_path")):
            data[section][field] = masking.mask_value(data[section][field])
        data["model_settings"] = masking.mask_value(data["model_settings"])
        return data

    def resolved(self) -> str:
        """Return the complete configuration as JSON with sorted keys. Secrets are hidden.

        Table `runs` stores this text.
        """
        return json.dumps(self.masked(), sort_keys=True)

    def fingerprint(self) -> str:
        """Return a digest (16 hex digits) of all settings that can change a table."""
        return digest(self.comparable())

    def comparable(self) -> dict[str, Any]:
        """Return all settings that can change a table, as plain values.

        Left out are the sections `paths`, `spark` and `tune`, the name of the environment, the
        paths of the source, and what `train` says about the machine. Secrets are replaced by `***`:
        a new password changes no table, and a password could be guessed from a digest over it.
        """
        data = self.model_dump(mode="json", exclude={"paths", "spark", "env", "tune"})
        data["train"] = self.train.arithmetic()
        for path_field in ("path", "items_path"):
            data["source"].pop(path_field)
        data["source"]["options"] = {
            name: masking.HIDDEN if masking.is_secret(name) else value
            for name, value in self.source.options.items()
        }
        return data


def digest(data: object, length: int = 16) -> str:
    """Return the first `length` hex digits of the SHA-256 of `data` as canonical JSON.

    >>> digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    True
    """
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def on_grid(moment: datetime, every_days: int) -> datetime:
    """Return the newest midnight of a grid that is not after `moment`.

    The grid has a midnight UTC every `every_days` days, counted from 1970-01-01.

    >>> on_grid(datetime(2010, 11, 30, 12, tzinfo=UTC), 7).isoformat()
    '2010-11-25T00:00:00+00:00'
    """
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    days = (moment - epoch).days
    return epoch + timedelta(days=days - days % every_days)


def cutoff_of(run_date: date) -> datetime:
    """Return the cutoff of the night `run_date`: midnight UTC at the end of that day.

    Training reads the events before this instant.

    >>> cutoff_of(date(2010, 12, 9)).isoformat()
    '2010-12-10T00:00:00+00:00'
    """
    return datetime.combine(run_date + timedelta(days=1), datetime.min.time(), UTC)
