"""What a training tells of itself, epoch by epoch. No torch: the pipeline reads it too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave, over all ranks.

    Parameters
    ----------
    epoch : from 1
    loss : mean of a row
    validation : mean of a validation row at its end; None without validation
    rows_per_s, seconds : of training alone
    """

    epoch: int
    loss: float
    rows_per_s: float
    validation: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Curve:
    """All epochs of a training, in order, and which of them gave the weights."""

    epochs: tuple[Epoch, ...]
    best: int

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        return {"best": self.best, "epochs": [asdict(epoch) for epoch in self.epochs]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the curve that `to_dict` gave."""
        return cls(tuple(Epoch(**epoch) for epoch in values["epochs"]), values["best"])
