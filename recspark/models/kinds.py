"""The three kinds of fitted model: see `recspark.models.base`."""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal["retriever", "ranker", "encoder"]
KINDS: tuple[Kind, ...] = get_args(Kind)
