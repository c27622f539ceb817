"""Checkpoints of a training: its tensors, its position and what it is a training of. No pickle.

A checkpoint is a folder whose marker is written last, so it is whole or it is none. The newest two
are kept, and the best by validation.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch

from recspark import storage
from recspark.config import digest
from recspark.train.curve import Epoch

log = logging.getLogger(__name__)

_STATE = "state.json"
_POSITION = "position.json"
_KEPT = 2


@dataclass(frozen=True)
class Position:
    """How far a training is: what it needs, beside its tensors, to go on as if nothing had happened.

    Parameters
    ----------
    epoch : epochs done
    batch : batches done of the one after it, always between two optimiser steps
    step : optimiser steps done
    loss, rows, seconds : so far, of the epoch that is not done; loss and rows over all ranks
    curve : of the epochs done
    best : epoch with the best validation value; 0 = none yet
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss: float = 0.0
    rows: float = 0.0
    seconds: float = 0.0
    curve: tuple[Epoch, ...] = ()
    best: int = 0

    def to_json(self) -> bytes:
        """Return the position as text: numbers come back as the same bits."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """Return the position that `to_json` wrote."""
        found = json.loads(text)
        curve = tuple(Epoch(**epoch) for epoch in found.pop("curve"))
        return cls(**found, curve=curve)


Tensors = dict[str, torch.Tensor]


def save(folder: str, position: Position, tensors: Tensors, identity: dict[str, Any]) -> str:
    """Write a checkpoint below `folder` (any URI) and return where; old ones are removed.

    `identity` names the settings and data versions: `latest` returns a checkpoint of the same only.
    """
    place = storage.join(folder, _name(position.epoch, position.batch))
    storage.remove(place)
    for name, tensor in tensors.items():
        storage.write_array(storage.join(place, f"{name}.npy"), tensor.cpu().numpy())
    storage.write_bytes(storage.join(place, _POSITION), position.to_json())
    storage.write_json(
        storage.join(place, _STATE), {"tensors": sorted(tensors), "identity": identity}
    )
    storage.mark_complete(place)
    best = storage.join(folder, _name(position.best, 0))
    storage.remove_older(folder, _KEPT, best, place)  # another training's may have later names
    return place


def latest(folder: str, identity: dict[str, Any]) -> tuple[Position, str] | None:
    """Return position and place of this training's newest whole checkpoint; None without one.

    One whose files cannot be read is passed over for the one before it. Reads a tensor at a time.
    """
    for place in reversed(storage.complete_folders(folder)):
        try:
            state = storage.read_json(storage.join(place, _STATE))
            if digest(state["identity"]) != digest(identity):
                continue
            position = Position.from_json(storage.read_bytes(storage.join(place, _POSITION)))
            for name in state["tensors"]:
                load(place, [name])
            return position, place
        except (OSError, ValueError, EOFError) as error:
            log.warning(
                "checkpoint %s cannot be read, the one before it is taken: %s", place, error
            )
    return None


def newest(folder: str) -> str:
    """Return the place of the newest whole checkpoint, of whatever training; "" without one."""
    return next(iter(reversed(storage.complete_folders(folder))), "")


def at_epoch(folder: str, epoch: int) -> str:
    """Return the place of the checkpoint at the end of `epoch`."""
    return storage.join(folder, _name(epoch, 0))


def load(place: str, names: list[str] | None = None) -> Tensors:
    """Return the tensors that `save` wrote to `place`, or those named."""
    names = names or storage.read_json(storage.join(place, _STATE))["tensors"]
    return {
        name: torch.from_numpy(storage.read_array(storage.join(place, f"{name}.npy")))
        for name in names
    }


def _name(epoch: int, batch: int) -> str:
    return f"epoch-{epoch:06d}-batch-{batch:09d}"
