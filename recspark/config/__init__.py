"""Typed settings of a night, a file for each group of sections; `recspark.config.load` reads `conf/`."""

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
from recspark.config.publishing import NEIGHBOUR_MODELS, Mode, Publish
from recspark.config.section import Section
from recspark.config.source import NULL_IDS, MadeUpTimes, Source
from recspark.errors import suggest

__all__ = [
    "NEIGHBOUR_MODELS", "NULL_IDS", "Config", "Evaluate", "Examples", "Features", "Ingest", "MadeUpTimes",
    "Mode", "Paths", "Publish", "Section", "Sessions", "Source", "Spark", "Train", "Tune", "cutoff_of",
    "digest", "on_grid",
]  # fmt: skip

_MODEL_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_-]{0,99}$")


class Config(Section):
    """Everything one night needs to know, resolved."""

    env: str = Field("local", description="conf/env/<name>.yaml; the option --env")
    paths: Paths = Paths()  # type: ignore[call-arg]
    spark: Spark = Spark()  # type: ignore[call-arg]
    source: Source
    ingest: Ingest = Ingest()  # type: ignore[call-arg]
    sessions: Sessions = Sessions()  # type: ignore[call-arg]
    features: Features = Features()  # type: ignore[call-arg]
    models: tuple[str, ...] = Field(
        min_length=1, description="trained and compared every night, in this order"
    )
    model_settings: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="model to its settings, over conf/models and conf/tuned; in --set `models.<name>.`. "
        "`algorithm` among them names what it is, where that is not the model's own name; `needs` lists the "
        "night's models that it is built on; `kind` says what a class from outside is",
    )
    train: Train = Train()  # type: ignore[call-arg]
    evaluate: Evaluate = Evaluate()  # type: ignore[call-arg]
    examples: Examples = Examples()  # type: ignore[call-arg]
    publish: Publish = Publish()  # type: ignore[call-arg]
    tune: Tune = Tune()  # type: ignore[call-arg]
    keep_nights: int = Field(
        30,
        ge=1,
        le=36_500,
        description="nights whose candidates, features, training sets and artifacts are kept. Guess",
    )
    n_candidates: int = Field(
        100, ge=1, le=100_000, description="k of the candidate lists of each model. Guess"
    )

    @model_validator(mode="after")
    def _names_fit_together(self) -> Config:
        """Say everything at once: who corrects one name wants to know the others."""
        # A name without settings may be misspelt itself: it is not offered as known.
        known = [name for name in self.models if name in self.model_settings] or self.models
        wrong = [
            f"{field} = '{name}' is not among models {list(self.models)}.{suggest(name, known)}"
            for field, name in [
                ("publish.model", self.publish.model),
                ("evaluate.baseline", self.evaluate.baseline),
                ("publish.neighbours_model", self.publish.neighbours_model),
                *[("publish.ladder", step) for step in self.publish.ladder],
            ]
            if name is not None and name not in self.models
        ]
        weighed = sorted({*self.sessions.impression_types} & {*self.features.event_weights})
        if weighed:
            wrong.append(
                f"features.event_weights names {weighed}, which sessions.impression_types says are "
                "impressions: they enter no history, so they have no weight"
            )
        # They are names of files, folders, slices and Airflow's tasks.
        unfit = [name for name in self.models if not _MODEL_NAME.match(name)]
        if unfit or "published" in self.models:
            wrong.append(
                f"models: {unfit or ['published']}: a name is of letters, digits, _ and -, up to 100, and "
                "not 'published', which is the list itself"
            )
        twice = sorted({name for name in self.models if self.models.count(name) > 1})
        if twice:
            wrong.append(f"models names {twice} twice")
        wrong += self._wrong_needs()
        if self.n_candidates < max(self.publish.k, *self.evaluate.ks):
            wrong.append("n_candidates must be at least publish.k and every evaluate.ks")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def _wrong_needs(self) -> list[str]:
        """Return what is wrong with what the night's models say they are built on."""
        wrong = []
        for model in self.models:
            needs = self.settings_of(model).get("needs", [])
            if not isinstance(needs, list) or not all(isinstance(name, str) for name in needs):
                wrong.append(f"models.{model}.needs = {needs!r} is no list of names")
                return wrong
            wrong += [
                f"models.{model}.needs names '{name}', which is not among models {list(self.models)}."
                f"{suggest(name, self.models)}"
                for name in needs
                if name not in self.models
            ]
            if len({*needs}) < len(needs):
                wrong.append(f"models.{model}.needs names a model twice: {needs}")
        if not wrong and (circle := self._circle_of_needs()):
            wrong.append(f"models need one another in a circle: {' -> '.join(circle)}")
        return wrong

    def _circle_of_needs(self) -> list[str]:
        """Return models of which each needs the next, and the last the first; [] where none do."""
        checked: set[str] = set()

        def walk(model: str, path: list[str]) -> list[str]:
            if model in path:
                return [*path[path.index(model) :], model]
            if model in checked:
                return []
            found: list[str] = []
            for name in self.needs_of(model):
                found = found or walk(name, [*path, model])
            checked.add(model)
            return found

        return next((found for model in self.models if (found := walk(model, []))), [])

    def settings_of(self, model: str) -> dict[str, Any]:
        """Return the settings of one of the night's models, as the layers give them."""
        return self.model_settings.get(model, {})

    def needs_of(self, model: str) -> tuple[str, ...]:
        """Return the night's models that one of them is built on, as its settings name them."""
        return tuple(self.settings_of(model).get("needs", ()))

    def with_needs(self, models: Iterable[str]) -> tuple[str, ...]:
        """Return `models`, and all that they are built on, in the night's order."""
        wanted: set[str] = set()
        waiting = list(models)
        while waiting:
            model = waiting.pop()
            if model not in wanted:
                wanted.add(model)
                waiting += self.needs_of(model)
        return tuple(model for model in self.models if model in wanted)

    def secrets(self) -> dict[str, str]:
        """Return the free settings whose name says that they hold a secret, name to value."""
        free = {**self.source.options, **self.spark.conf}
        return {name: value for name, value in free.items() if masking.is_secret(name)}

    def masked(self) -> dict[str, Any]:
        """Return the whole configuration as plain values, its secrets hidden."""
        data = self.model_dump(mode="json")
        data["spark"]["conf"] = masking.mask_free(data["spark"]["conf"])
        data["source"]["options"] = masking.mask_free(data["source"]["options"])
        for section, field in (("paths", "root"), ("source", "path"), ("source", "items_path")):
            data[section][field] = masking.mask_value(data[section][field])
        data["model_settings"] = masking.mask_value(data["model_settings"])
        return data

    def resolved(self) -> str:
        """Return the whole configuration as JSON with sorted keys, as stored in `runs`: secrets are
        hidden.
        """
        return json.dumps(self.masked(), sort_keys=True)

    def fingerprint(self) -> str:
        """Return 16 hex digits over every setting that can change a table."""
        return digest(self.comparable())

    def comparable(self) -> dict[str, Any]:
        """Return every setting that can change a table, as plain values.

        Paths, machine and secrets are left out: a new password is the same night, and a digest of one
        could be guessed.
        """
        data = self.model_dump(mode="json", exclude={"paths", "spark", "env", "tune"})
        data["train"] = self.train.arithmetic()
        for place in ("path", "items_path"):
            data["source"].pop(place)
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
    """Return the newest midnight UTC, not after `moment`, of those `every_days` apart since 1970-01-01.

    >>> on_grid(datetime(2010, 11, 30, 12, tzinfo=UTC), 7).isoformat()
    '2010-11-25T00:00:00+00:00'
    """
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    days = (moment - epoch).days
    return epoch + timedelta(days=days - days % every_days)


def cutoff_of(run_date: date) -> datetime:
    """Return the first instant that is not in training: midnight UTC after `run_date`.

    >>> cutoff_of(date(2010, 12, 9)).isoformat()
    '2010-12-10T00:00:00+00:00'
    """
    return datetime.combine(run_date + timedelta(days=1), datetime.min.time(), UTC)
