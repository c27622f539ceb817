"""Every algorithm that recspark knows: one line each; and one from outside, by its class path.

A model's name is its user's own: `conf/models/NAME.yaml` may say `algorithm:`, so that one night
compares two settings of one algorithm, or brings a class from another package.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from recspark.errors import ConfigError, suggest
from recspark.models.base import Recommender, RecommenderModel, Settings

ALGORITHM = "algorithm"  # the key of a model's settings that names its algorithm
Kind = Literal["retriever"]


@dataclass(frozen=True)
class ModelSpec:
    """One registry line; classes are named by path so that listing models imports none of them.

    `kind`: what a fitted model does; a retriever answers from the whole catalogue. `source`: the
    paper.

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
    source: str = ""
    kind: Kind = "retriever"

    @property
    def modules(self) -> tuple[str, str]:
        """The modules of both classes."""
        return self.recommender.partition(":")[0], self.model.partition(":")[0]

    def load(self) -> type[Recommender[Settings]]:
        """Import and return the settings-only class."""
        found: type[Recommender[Settings]] = _import(self.recommender)
        return found

    def load_model(self) -> type[RecommenderModel]:
        """Import and return the fitted class."""
        found: type[RecommenderModel] = _import(self.model)
        return found


def _line(
    family: str,
    name: str,
    classes: str,
    *tags: str,
    training: tuple[str, ...] = (),
    source: str = "",
) -> ModelSpec:
    module = f"recspark.models.{family}.{name}"
    recommender, model = f"{module}:{classes}", f"{module}:{classes}Model"
    return ModelSpec(name, recommender, model, frozenset(tags), training, source)


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
        _line("items", "popular", "Popular", "cold_users", "decay", source="counts, decayed"),
        _line(
            "items", "item_knn", "ItemKNN", "personal", "neighbours", "decay",
            source="Deshpande & Karypis 2004",
        ),
        _line("items", "ease", "Ease", "personal", "neighbours", "decay", source="Steck 2019"),
        _line("factors", "als", "Als", "personal", "decay", source="Hu, Koren & Volinsky 2008"),
        _line(
            "vectors", "item2vec", "Item2Vec", "personal", "neighbours", "decay",
            source="Barkan & Koenigstein 2016",
        ),
        _line(
            "factors", "mf", "Mf", "personal", "neural", training=_BAGS,
            source="Koren, Bell & Volinsky 2009; BPR: Rendle et al. 2009",
        ),
        _line(
            "autoencoders", "autorec", "AutoRec", "personal", "neural", training=_BOTH_BAGS,
            source="Sedhain et al. 2015",
        ),
        _line(
            "autoencoders", "sdae", "Sdae", "personal", "neural", training=_BAGS, source="Vincent et al. 2010"
        ),
        _line(
            "autoencoders", "cdl", "Cdl", "personal", "neural", training=("training_texts",),
            source="Wang, Wang & Yeung 2015",
        ),
        _line(
            "autoencoders", "multvae", "MultVae", "personal", "neural", training=_BAGS,
            source="Liang et al. 2018",
        ),
        _line(
            "sequences", "session_knn", "SessionKNN", "personal",
            source="VSKNN: Ludewig & Jannach 2018; STAN: Garg et al. 2019",
        ),
        _line(
            "sequences", "gru4rec", "Gru4Rec", "personal", "neural", training=_SEQUENCES,
            source="Hidasi et al. 2016, Hidasi & Karatzoglou 2018",
        ),
        _line(
            "sequences", "sasrec", "SasRec", "personal", "neural", training=_SEQUENCES,
            source="Kang & McAuley 2018",
        ),
    ]
}  # fmt: skip


def model_spec(algorithm: str) -> ModelSpec:
    """Return the registry line of `algorithm`, or one made of the class that it is the path of.

    Raises ConfigError with a suggestion where there is none of that name, and where
    `package.module:Class` cannot be imported or is no Recommender with a `model_class`.
    """
    if ":" in algorithm:
        return _from_outside(algorithm)
    if algorithm not in MODELS:
        raise ConfigError(f"no model is called '{algorithm}'.{suggest(algorithm, MODELS)}")
    return MODELS[algorithm]


def spec_of(name: str, settings: Mapping[str, Any]) -> ModelSpec:
    """Return the registry line of a night's model: of its `algorithm`, else of its own name."""
    algorithm = settings.get(ALGORITHM, name)
    if not isinstance(algorithm, str):
        raise ConfigError(f"model '{name}': {ALGORITHM} = {algorithm!r} is no name")
    try:
        return model_spec(algorithm)
    except ConfigError as error:
        if algorithm == name:
            raise
        raise ConfigError(f"model '{name}': {error}") from None


def make(name: str, settings: Mapping[str, Any]) -> Recommender[Settings]:
    """Return a night's model `name` with `settings` over the defaults of its algorithm."""
    values = {key: value for key, value in settings.items() if key != ALGORITHM}
    return spec_of(name, settings).load().from_dict(values)


def _from_outside(path: str) -> ModelSpec:
    try:
        found = _import(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"algorithm '{path}' cannot be imported: {error}. Name it package.module:Class, and install "
            "the package where the driver and the executors run"
        ) from None
    if not (isinstance(found, type) and issubclass(found, Recommender)):
        raise ConfigError(f"algorithm '{path}' is no subclass of recspark.models.base.Recommender")
    model = getattr(found, "model_class", None)
    if not (isinstance(model, type) and issubclass(model, RecommenderModel)):
        raise ConfigError(
            f"algorithm '{path}': its class needs `model_class`, the RecommenderModel that fit gives"
        )
    return ModelSpec(
        path,
        path,
        f"{model.__module__}:{model.__qualname__}",
        found.tags,
        found.training_tables,
        f"class {path}",
    )


def _import(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
