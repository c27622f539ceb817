"""Every algorithm that recspark knows: one line each; and one from outside, by its class path.

A model's name is its user's own: `conf/models/NAME.yaml` may say `algorithm:`, so that one night
compares two settings of one algorithm, or brings a class from another package. Importing this module
imports no algorithm, neither Spark nor torch: the plan of a night reads it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recspark.errors import ConfigError, suggest
from recspark.models.kinds import KINDS, Kind

if TYPE_CHECKING:
    from recspark.models.base import Algorithm, FittedModel, Settings

# Keys of a model's settings in a night that are no settings of its algorithm:
ALGORITHM = "algorithm"  # which algorithm it is, where that is not the model's own name
KIND = (
    "kind"  # of an algorithm from outside: retriever (also where nothing is said), ranker, encoder
)
NEEDS = "needs"  # the night's models that it is built on


@dataclass(frozen=True)
class ModelSpec:
    """One registry line; classes are named by path so that listing models imports none of them.

    `kind`: what a fitted model does; a retriever answers from the whole catalogue, a ranker scores
    given pairs, an encoder gives items vectors. `source`: the paper.

    Tags: `personal` (lists differ by user), `neural` (trains through `recspark.train`),
    `neighbours` (gives item neighbours), `cold_users` (answers users without events), `decay` (a
    setting `half_life_days` decays events). `training`: the training tables that its settings may
    make it read; build_features writes those that they do.
    """

    name: str
    algorithm_class: str  # module:class, of the settings-only class
    model: str  # module:class, of the fitted class
    tags: frozenset[str]
    training: tuple[str, ...] = ()
    source: str = ""
    kind: Kind = "retriever"

    @property
    def modules(self) -> tuple[str, str]:
        """The modules of both classes."""
        return self.algorithm_class.partition(":")[0], self.model.partition(":")[0]

    def load(self) -> type[Algorithm[Settings]]:
        """Import and return the settings-only class."""
        found: type[Algorithm[Settings]] = _import(self.algorithm_class)
        return found

    def load_model(self) -> type[FittedModel]:
        """Import and return the fitted class."""
        found: type[FittedModel] = _import(self.model)
        return found


def _line(
    family: str,
    name: str,
    classes: str,
    *tags: str,
    training: tuple[str, ...] = (),
    source: str = "",
    kind: Kind = "retriever",
) -> ModelSpec:
    module = f"recspark.models.{family}.{name}"
    algorithm, model = f"{module}:{classes}", f"{module}:{classes}Model"
    return ModelSpec(name, algorithm, model, frozenset(tags), training, source, kind)


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
        _line(
            "items", "rp3beta", "Rp3Beta", "personal", "neighbours", "decay",
            source="Paudel, Christoffel, Newell & Bernstein 2016",
        ),
        _line(
            "items", "transitions", "Transitions", "personal",
            source="Shani, Heckerman & Brafman 2005",
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
    `package.module:Class` cannot be imported or is no Algorithm with a `model_class`.
    """
    if ":" in algorithm:
        return _from_outside(algorithm)
    if algorithm not in MODELS:
        raise ConfigError(f"no model is called '{algorithm}'.{suggest(algorithm, MODELS)}")
    return MODELS[algorithm]


def spec_of(name: str, settings: Mapping[str, Any]) -> ModelSpec:
    """Return the registry line of a night's model: of its `algorithm`, else of its own name.

    Raises ConfigError as `model_spec`, and where `kind` among the settings is not that of the class.
    """
    algorithm = settings.get(ALGORITHM, name)
    if not isinstance(algorithm, str):
        raise ConfigError(f"model '{name}': {ALGORITHM} = {algorithm!r} is no name")
    try:
        spec = model_spec(algorithm)
    except ConfigError as error:
        if algorithm == name:
            raise
        raise ConfigError(f"model '{name}': {error}") from None
    if kind_of(name, settings) != spec.kind:
        raise ConfigError(
            f"model '{name}': {algorithm} is of kind {spec.kind}; say so in its settings, {KIND}: {spec.kind}"
        )
    return spec


def kind_of(name: str, settings: Mapping[str, Any]) -> Kind:
    """Return what a night's model is, as far as its settings and the registry say: imports nothing.

    A class from outside is what `kind` says, a retriever where nothing is said. Raises ConfigError
    for a kind that there is not.
    """
    algorithm = settings.get(ALGORITHM, name)
    known = MODELS.get(algorithm) if isinstance(algorithm, str) else None
    kind = settings.get(KIND, known.kind if known else KINDS[0])
    if kind not in KINDS:
        raise ConfigError(f"model '{name}': {KIND} = {kind!r}: one of {', '.join(KINDS)}")
    return kind


def make(name: str, settings: Mapping[str, Any]) -> Algorithm[Settings]:
    """Return a night's model `name` with `settings` over the defaults of its algorithm."""
    values = {k: value for k, value in settings.items() if k not in (ALGORITHM, KIND, NEEDS)}
    return spec_of(name, settings).load().from_dict(values)


def _from_outside(path: str) -> ModelSpec:
    from recspark.models.base import Algorithm, FittedModel

    try:
        found = _import(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"algorithm '{path}' cannot be imported: {error}. Name it package.module:Class, and install "
            "the package where the driver and the executors run"
        ) from None
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise ConfigError(f"algorithm '{path}' is no subclass of recspark.models.base.Algorithm")
    model = getattr(found, "model_class", None)
    if not (isinstance(model, type) and issubclass(model, FittedModel)):
        raise ConfigError(
            f"algorithm '{path}': its class needs `model_class`, the fitted model that fit gives"
        )
    fitted = f"{model.__module__}:{model.__qualname__}"
    return ModelSpec(path, path, fitted, found.tags, source=f"class {path}", kind=model.kind)


def _import(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
