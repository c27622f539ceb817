"""What the rankers share that read only what their retrievers say of a pair: ranks and scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from recspark import schema
from recspark.data.feature_encoding import FIRST
from recspark.errors import ConfigError, suggest
from recspark.models.base import Needed, RetrieverModel
from recspark.models.kinds import Kind

# The field that says which lists propose a pair. Examples have it as the column `mode`.
MODE = {"mode": tuple(sorted(schema.MODES))}
N_MODES = FIRST + len(schema.MODES)  # codes of the field: missing, unknown, and the two modes


def mode_code(mode: str) -> int:
    """Return the code of a mode in the field `mode`."""
    return FIRST + MODE["mode"].index(mode)


def sources_in(needed: Needed) -> tuple[str, ...]:
    """Return the names of the retrievers among the models that a ranker is built on, in order."""
    return tuple(name for name, model in needed.items() if isinstance(model, RetrieverModel))


def check_sources(ranker: str, kinds: Mapping[str, Kind], named: Iterable[str] = ()) -> None:
    """Raise ConfigError where no retriever is among `kinds`, or one of `named` is none of them.

    `kinds` as for `Algorithm.check_needs`; `named` : the names in a setting of `ranker`.
    """
    retrievers = [name for name, kind in kinds.items() if kind == "retriever"]
    if not retrievers:
        raise ConfigError(
            f"{ranker} ranks what retrievers list: name one in needs, which are {[*kinds]}"
        )
    for name in named:
        if name not in retrievers:
            raise ConfigError(
                f"{ranker}: '{name}' is no retriever of its needs.{suggest(name, retrievers)}"
            )
