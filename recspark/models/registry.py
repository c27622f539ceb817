"""The registry of algorithms: one line for each algorithm of recspark.

An algorithm from another package needs no line. It is named by the path of its class,
`package.module:Class`.

The name of a model is free. `conf/models/NAME.yaml` may name the algorithm (`algorithm: ...`), so
that one night can compare two settings of the same algorithm, or use a class from another package.

Importing this module imports no algorithm, and neither Spark nor torch, because the plan of a night
imports it.
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

# Four keys of a model's settings that are no settings of its algorithm.
ALGORITHM = "algorithm"  # names the algorithm, where that is not the name of the model
# The kind of an algorithm from another package: retriever (the default), ranker or encoder.
KIND = "kind"
NEEDS = "needs"  # the night's models that this model is built on
# false for a ranker that needs no examples (`Algorithm.needs_examples`)
LEARNS = "learns"


@dataclass(frozen=True)
class ModelSpec:
    """One line of the registry. Classes are named by path, so that listing models imports no class.

    Parameters
    ----------
    name : name of the algorithm
    algorithm_class : path `module:class` of the class that holds the settings only
    model : path `module:class` of the class of the fitted model
    tags : any of `personal` (lists differ by user), `neural` (trains through `recspark.train`),
        `ranks` (another number of `train.ranks` gives another model; so it does with `neural`),
        `threads` (so does another number of `train.threads`),
        `neighbours` (gives neighbours of items), `cold_users` (answers users without events),
        `decay` (a setting `half_life_days` decays events) and `own_items` (lists only items that
        the user acted on: nothing in mode novel; instead of `personal`, whose checks ask for unseen
        items), `encoders` (it is built on encoders, one at least), `factors` (it is built on a model
        with item factors), `cold_items` (it may list items that nobody acted on yet); for a ranker
        `sources` (it reads only ranks and scores by its retrievers) and
        `reasons` (with any settings, its scores are sums over the items of the user's history: its
        scorer has the method `contributions`)
    training : the training tables that the algorithm may read, depending on its settings;
        build_features writes the tables that tonight's settings make it read
    source : the paper
    kind : what a fitted model does. A retriever answers from the complete catalogue, a ranker
        scores given pairs of a user and an item, and an encoder gives each item a vector
    learns : `Algorithm.learns` of the class: False if a fit reads no data, whatever the settings
    """

    name: str
    algorithm_class: str
    model: str
    tags: frozenset[str]
    training: tuple[str, ...] = ()
    source: str = ""
    kind: Kind = "retriever"
    learns: bool = True

    @property
    def depends_on_ranks(self) -> bool:
        """Whether another number of `train.ranks` gives another model, trained on as many slots."""
        return not self.tags.isdisjoint({"neural", "ranks"})

    @property
    def depends_on_threads(self) -> bool:
        """Whether another number of `train.threads` gives another model."""
        return "threads" in self.tags

    @property
    def modules(self) -> tuple[str, str]:
        """The modules of the two classes."""
        return self.algorithm_class.partition(":")[0], self.model.partition(":")[0]

    def load(self) -> type[Algorithm[Settings]]:
        """Import and return the settings-only class."""
        loaded_class: type[Algorithm[Settings]] = _import(self.algorithm_class)
        return loaded_class

    def load_model(self) -> type[FittedModel]:
        """Import and return the fitted class."""
        loaded_class: type[FittedModel] = _import(self.model)
        return loaded_class


def _line(
    family: str,
    name: str,
    classes: str,
    *tags: str,
    training: tuple[str, ...] = (),
    source: str = "",
    kind: Kind = "retriever",
    learns: bool = True,
) -> ModelSpec:
    module = f"recspark.models.{family}.{name}"
    algorithm, model = f"{module}:{classes}", f"{module}:{classes}Model"
    return ModelSpec(name, algorithm, model, frozenset(tags), training, source, kind, learns)


_BAGS = ("training_bags",)
_BOTH_BAGS = ("training_bags", "training_item_bags")
_TIMELINES = ("training_timelines",)
_TYPED_TIMELINES = ("training_typed_timelines",)
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
            "items", "item_knn", "ItemKNN", "personal", "neighbours", "decay", "reasons",
            source="Deshpande & Karypis 2004",
        ),
        _line(
            "items", "rp3beta", "Rp3Beta", "personal", "neighbours", "decay", "reasons",
            source="Paudel, Christoffel, Newell & Bernstein 2016",
        ),
        _line(
            "items", "transitions", "Transitions", "personal", "reasons",
            source="Shani, Heckerman & Brafman 2005",
        ),
        _line(
            "items", "own_items", "OwnItems", "own_items", "decay", "reasons",
            source="counts of own orders, decayed; cf. Hu et al. 2020 (TIFU-KNN), personal frequency",
        ),
        _line(
            "items", "user_knn", "UserKNN", "personal", "reasons",
            source="Herlocker, Konstan, Borchers & Riedl 1999, user-based neighbourhood; decayed",
        ),
        _line(
            "items", "ease", "Ease", "personal", "neighbours", "decay", "reasons",
            source="Steck 2019",
        ),
        _line(
            "rankers", "lambdamart", "LambdaMart", "personal", "ranks", "threads", kind="ranker",
            source="Burges 2010; Chen & Guestrin 2016",
        ),
        _line(
            "rankers", "rrf", "Rrf", "sources", kind="ranker", learns=False,
            source="Cormack, Clarke & Büttcher 2009",
        ),
        _line(
            "rankers", "blend", "Blend", "sources", kind="ranker",
            source="Zadrozny & Elkan 2002; Cao, Qin, Liu, Tsai & Li 2007",
        ),
        _line(
            "rankers", "switch", "Switch", "sources", kind="ranker",
            source="Burke 2002, switching hybrid",
        ),
        _line(
            "rankers", "wide_deep", "WideDeep", "personal", "neural", kind="ranker",
            source="Cheng et al. 2016",
        ),
        _line(
            "rankers", "pnn", "Pnn", "personal", "neural", kind="ranker",
            source="Qu et al. 2016, 2018",
        ),
        _line(
            "rankers", "youtube_rank", "YoutubeRank", "personal", "neural", kind="ranker",
            source="Covington, Adams & Sargin 2016, section 4",
        ),
        _line(
            "factors", "als", "Als", "personal", "decay", "reasons",
            source="Hu, Koren & Volinsky 2008",
        ),
        _line(
            "vectors", "item2vec", "Item2Vec", "personal", "neighbours", "decay", "reasons",
            source="Barkan & Koenigstein 2016",
        ),
        _line(
            "vectors", "prod2vec", "Prod2Vec", "personal", "neighbours", "decay", "reasons",
            source="Grbovic et al. 2015; with bag: order, bagged-prod2vec",
        ),
        _line(
            "vectors", "meta_prod2vec", "MetaProd2Vec", "personal", "neighbours", "decay", "reasons",
            source="Vasile, Smirnova & Conneau 2016",
        ),
        _line(
            "vectors", "user2vec", "User2Vec", "personal",
            source="Grbovic et al. 2015, user2vec; Le & Mikolov 2014",
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
            "autoencoders", "cdl", "Cdl", "personal", "neural", "reasons",
            training=("training_texts",),
            source="Wang, Wang & Yeung 2015",
        ),
        _line(
            "autoencoders", "multvae", "MultVae", "personal", "neural", training=_BAGS,
            source="Liang et al. 2018",
        ),
        _line(
            "content", "colours", "Colours", kind="encoder", learns=False,
            source="Swain & Ballard 1991",
        ),
        _line(
            "content", "image_features", "ImageFeatures", kind="encoder", learns=False,
            source="Krizhevsky 2014; Simonyan & Zisserman 2015; Szegedy et al. 2015; He et al. 2016",
        ),
        _line(
            "content", "image", "Image", "neural", kind="encoder",
            source="van den Oord, Dieleman & Schrauwen 2013, of pictures; He et al. 2016",
        ),
        _line(
            "content", "audio", "Audio", "neural", kind="encoder",
            source="van den Oord, Dieleman & Schrauwen 2013; Cho et al. 2014",
        ),
        _line(
            "content", "content_knn", "ContentKNN", "personal", "neighbours", "decay", "reasons",
            "encoders", "cold_items", source="Pazzani & Billsus 2007",
        ),
        _line(
            "content", "content2vec", "Content2Vec", "personal", "neural", "neighbours", "reasons",
            "encoders", "cold_items", source="Nedelec, Smirnova & Vasile 2017",
        ),
        _line(
            "content", "content_factors", "ContentFactors", "personal", "encoders", "factors",
            "cold_items",
            source="Gantner et al. 2010; van den Oord et al. 2013",
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
            "sequences", "coevolve", "Coevolve", "personal", "neural",
            training=("training_events",),
            source="Dai, Wang, Trivedi & Song 2016; batches: Kumar, Zhang & Leskovec 2019",
        ),
        _line(
            "sequences", "sasrec", "SasRec", "personal", "neural", training=_SEQUENCES,
            source="Kang & McAuley 2018",
        ),
        _line(
            "towers", "youtube_dnn", "YoutubeDnn", "personal", "neural", training=_TIMELINES,
            source="Covington, Adams & Sargin 2016, section 3",
        ),
        _line(
            "towers", "tdssm", "Tdssm", "personal", "neural", training=_TIMELINES,
            source="Song, Elkahky & He 2016",
        ),
        _line(
            "towers", "mvdnn", "Mvdnn", "personal", "neural", "cold_items",
            training=_TIMELINES + _TYPED_TIMELINES,
            source="Elkahky, Song & He 2015",
        ),
        _line(
            "content", "tfidf", "Tfidf", kind="encoder",
            source="Salton & Buckley 1988; Achlioptas 2003",
        ),
        _line(
            "content", "word_vectors", "WordVectors", kind="encoder",
            source="Mikolov et al. 2013; De Boom et al. 2016",
        ),
        _line(
            "content", "paragraph_vectors", "ParagraphVectors", kind="encoder",
            source="Le & Mikolov 2014",
        ),
        _line(
            "content", "file_vectors", "FileVectors", kind="encoder",
            source="Mikolov et al. 2013 (formats); De Boom et al. 2016; Arora, Liang & Ma 2017",
        ),
        _line(
            "content", "sentences", "Sentences", kind="encoder", learns=False,
            source="Reimers & Gurevych 2019",
        ),
    ]
}  # fmt: skip


def model_spec(algorithm: str) -> ModelSpec:
    """Return the registry line of an algorithm.

    `algorithm` is a name of the registry, or the path `package.module:Class` of a class from
    outside, for which a line is made.

    Raises ConfigError where the registry has no such name (with a suggestion), where the class
    cannot be imported, and where it is no subclass of Algorithm with a `model_class`.
    """
    if ":" in algorithm:
        return _from_outside(algorithm)
    if algorithm not in MODELS:
        raise ConfigError(f"no model is called '{algorithm}'.{suggest(algorithm, MODELS)}")
    return MODELS[algorithm]


def spec_of(name: str, settings: Mapping[str, Any]) -> ModelSpec:
    """Return the registry line of the algorithm of the model `name`.

    The setting `algorithm` names the algorithm; without it, the name of the model does. Raises
    ConfigError as `model_spec` does, and where the kind in the settings is not that of the class.
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
    """Return the kind of the model `name`, from its settings and the registry. Imports nothing.

    The kind of a class from outside is the setting `kind`, or retriever without that setting.
    Raises ConfigError where the setting is no kind.
    """
    algorithm = settings.get(ALGORITHM, name)
    registry_line = MODELS.get(algorithm) if isinstance(algorithm, str) else None
    kind = settings.get(KIND, registry_line.kind if registry_line else KINDS[0])
    if kind not in KINDS:
        raise ConfigError(f"model '{name}': {KIND} = {kind!r}: one of {', '.join(KINDS)}")
    return kind


def learns_from_examples(name: str, settings: Mapping[str, Any]) -> bool:
    """Return whether the model `name` is a ranker that learns from examples. Imports nothing.

    Its setting `learns` says so; without it, the registry line does, and a ranker from outside
    learns. Raises ConfigError as `kind_of`
    does, and where the setting is neither true nor false.
    """
    algorithm = settings.get(ALGORITHM, name)
    registry_line = MODELS.get(algorithm) if isinstance(algorithm, str) else None
    learns = settings.get(LEARNS, registry_line.learns if registry_line else True)
    if not isinstance(learns, bool):
        raise ConfigError(f"model '{name}': {LEARNS} = {learns!r}: true or false")
    return kind_of(name, settings) == "ranker" and learns


def lists_only_own_items(name: str, settings: Mapping[str, Any]) -> bool:
    """Return whether the model `name` lists only items that the user acted on (tag `own_items`).

    In mode novel, where these items are masked, such a model lists nothing. Raises ConfigError as
    `spec_of` does.
    """
    return "own_items" in spec_of(name, settings).tags


def lists_cold_items(name: str, settings: Mapping[str, Any]) -> bool:
    """Return whether the model `name` may list items without events (tag `cold_items`).

    Raises ConfigError as `spec_of` does.
    """
    return "cold_items" in spec_of(name, settings).tags


def make(name: str, settings: Mapping[str, Any]) -> Algorithm[Settings]:
    """Return the algorithm of the model `name`, with `settings` in the place of its defaults."""
    no_settings = (ALGORITHM, KIND, NEEDS, LEARNS)
    values = {key: value for key, value in settings.items() if key not in no_settings}
    return spec_of(name, settings).load().from_dict(values)


def _from_outside(path: str) -> ModelSpec:
    from recspark.models.base import Algorithm, FittedModel

    try:
        algorithm_class = _import(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"algorithm '{path}' cannot be imported: {error}. Name it package.module:Class, and install "
            "the package where the driver and the executors run"
        ) from None
    if not (isinstance(algorithm_class, type) and issubclass(algorithm_class, Algorithm)):
        raise ConfigError(f"algorithm '{path}' is no subclass of recspark.models.base.Algorithm")
    model_class = getattr(algorithm_class, "model_class", None)
    if not (isinstance(model_class, type) and issubclass(model_class, FittedModel)):
        raise ConfigError(
            f"algorithm '{path}': its class needs `model_class`, the fitted model that fit gives"
        )
    model_path = f"{model_class.__module__}:{model_class.__qualname__}"
    return ModelSpec(
        path,
        path,
        model_path,
        algorithm_class.tags,
        source=f"class {path}",
        kind=model_class.kind,
        learns=algorithm_class.learns,
    )


def _import(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
