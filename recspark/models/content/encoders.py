"""Settings that models built on encoders have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from recspark.errors import ConfigError, suggest
from recspark.models.kinds import Kind

ListedItems = Annotated[
    Literal["all", "cold"],
    Field(
        description="which items are listed. all = every item with a vector; cold = only items "
        "without an event before the cutoff"
    ),
]


def encoders_in(kinds: Mapping[str, Kind]) -> list[str]:
    """Return the encoders among `kinds`, in order."""
    return [name for name, kind in kinds.items() if kind == "encoder"]


def check_named(setting: str, named: Mapping[str, object], encoders: list[str]) -> None:
    """Raise ConfigError where `setting` names an encoder that is not among `encoders`."""
    for name in named:
        if name not in encoders:
            raise ConfigError(
                f"{setting} names '{name}', which is no encoder among `needs`: {encoders}."
                f"{suggest(name, encoders)}"
            )
