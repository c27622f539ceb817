"""Every model that recspark knows: one line each."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recspark.errors import ConfigError, suggest
from recspark.models.base import Recommender, RecommenderModel, Settings


@dataclass(frozen=True)
class ModelSpec:
    """One registry line; classes are named by path so that listing models imports none of them.

    Tags: `personal` (lists differ by user), `neural` (trains through `recspark.train`),
    `neighbours` (gives item neighbours), `cold_users` (answers users without events), `decay` (a
    setting `half_life_days` decays events). `training`: the training tables that its settings may
    make it read; build_features writes the one that they do.
    """

    name: str
    recommender: str  # module:class, of the settings-only class
    model: str  # module:class, of the fitted class
    tags: frozenset[str]
    training: tuple[str, ...] = ()

    def load(self) -> type[Recommender[Settings]]:
        """Import and return the settings-only class."""
        found: type[Recommender[Settings]] = _import(self.recommender)
        return found

    def load_model(self) -> type[RecommenderModel]:
        """Import and return the fitted class."""
        found: type[RecommenderModel] = _import(self.model)
        return found


def _line(name: str, classes: str, *tags: str, training: tuple[str, ...] = ()) -> ModelSpec:
    module = f"recspark.models.{name}"
    recommender, model = f"{module}:{classes}", f"{module}:{classes}Model"
    return ModelSpec(name, recommender, model, frozenset(tags), training)


_BAGS = ("training_bags",)
_BOTH_BAGS = ("training_bags", "training_item_bags")
_SEQUENCES = (
    "training_sessions",
    "training_histories",
    "training_session_impressions",
    "training_history_impressions",
)


MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in [
        _line("popular", "Popular", "cold_users", "decay"),
        _line("item_knn", "ItemKNN", "personal", "neighbours", "decay"),
        _line("ease", "Ease", "personal", "neighbours", "decay"),
        _line("als", "Als", "personal", "decay"),
        _line("item2vec", "Item2Vec", "personal", "neighbours", "decay"),
        _line("mf", "Mf", "personal", "neural", training=_BAGS),
        _line("autorec", "AutoRec", "personal", "neural", training=_BOTH_BAGS),
        _line("sdae", "Sdae", "personal", "neural", training=_BAGS),
        _line("cdl", "Cdl", "personal", "neural", training=("training_texts",)),
        _line("multvae", "MultVae", "personal", "neural", training=_BAGS),
        _line("session_knn", "SessionKNN", "personal"),
        _line("gru4rec", "Gru4Rec", "personal", "neural", training=_SEQUENCES),
        _line("sasrec", "SasRec", "personal", "neural", training=_SEQUENCES),
    ]
}


def model_spec(name: str) -> ModelSpec:
    """Return the registry line of `name`; ConfigError with a suggestion where there is none."""
    if name not in MODELS:
        raise ConfigError(f"no model is called '{name}'.{suggest(name, MODELS)}")
    return MODELS[name]


def make(name: str, settings: Mapping[str, Any]) -> Recommender[Settings]:
    """Return model `name` with `settings` over its defaults."""
    return model_spec(name).load().from_dict(dict(settings))


def _import(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
