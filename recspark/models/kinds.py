"""The three kinds of fitted models. `recspark.models.base` says what each kind does."""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal["retriever", "ranker", "encoder"]
KINDS: tuple[Kind, ...] = get_args(Kind)
