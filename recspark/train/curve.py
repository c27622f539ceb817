"""The figures of a training, epoch by epoch. Needs no torch, as the pipeline reads them too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Epoch:
    """The figures of one epoch, over all ranks.

    Parameters
    ----------
    epoch : number of the epoch, from 1
    loss : mean loss of its training rows
    validation : mean value of the validation rows at the end of the epoch; None without validation
    rows_per_s, seconds : speed and time of the training steps, without the validation
    """

    epoch: int
    loss: float
    rows_per_s: float
    validation: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Curve:
    """All epochs of a training, in order; `best` is the epoch (from 1) whose weights are used."""

    epochs: tuple[Epoch, ...]
    best: int

    def to_dict(self) -> dict[str, Any]:
        """Return the curve as plain values that JSON can hold."""
        return {"best": self.best, "epochs": [asdict(epoch) for epoch in self.epochs]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the curve that `to_dict` returned as `values`."""
        return cls(tuple(Epoch(**epoch) for epoch in values["epochs"]), values["best"])
