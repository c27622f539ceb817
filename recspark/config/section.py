"""The base class of all sections of the configuration, with the checks that they share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

_INT_MAX = 2**31 - 1


class Section(BaseModel):
    """Base of every section. A section is frozen; unknown keys, NaN and infinity are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `true` and `false` as the value of a number: they would count as 1 and 0."""
        field = cls.model_fields[info.field_name or ""]
        types = _types_in(field.annotation)
        if types & {int, float} and not types & {bool, Any} and _holds_bool(value):
            raise ValueError("expected a number, not true or false")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _counts_fit_an_int(cls, value: Any) -> Any:
        """Refuse a whole number that is too large for an int of Spark."""
        if any(abs(number) > _INT_MAX for number in _whole_numbers(value)):
            raise ValueError(f"a whole number is at most {_INT_MAX:,}")
        return value


def _types_in(annotation: Any) -> set[Any]:
    """Return the annotation and all types that occur in it.

    Example: for `dict[str, int] | None` these are the annotation, `dict[str, int]`, `str`, `int`
    and `NoneType`.
    """
    arguments = get_args(annotation)
    return {annotation}.union(*map(_types_in, arguments)) if arguments else {annotation}


def _whole_numbers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, list | tuple):
        for element in value:
            yield from _whole_numbers(element)


def _holds_bool(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_bool, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_bool, value))
    return isinstance(value, bool)
