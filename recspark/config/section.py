"""What every section of the configuration checks: known keys, and numbers that are numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

_INT_MAX = 2**31 - 1


class Section(BaseModel):
    """Base of every section: frozen, an unknown key is an error, and numbers are finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `true` where a number stands: it would count as 1."""
        field = cls.model_fields[info.field_name or ""]
        kinds = _kinds(field.annotation)
        if kinds & {int, float} and not kinds & {bool, Any} and _holds_bool(value):
            raise ValueError("expected a number, not true or false")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _counts_fit_an_int(cls, value: Any) -> Any:
        """Refuse a whole number that Spark's int does not hold."""
        if any(abs(number) > _INT_MAX for number in _whole_numbers(value)):
            raise ValueError(f"a whole number is at most {_INT_MAX:,}")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """Return the types that an annotation is made of."""
    parts = get_args(annotation)
    return {annotation}.union(*map(_kinds, parts)) if parts else {annotation}


def _whole_numbers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _whole_numbers(inner)


def _holds_bool(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_bool, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_bool, value))
    return isinstance(value, bool)
