"""Checkpoints of a training: its tensors, its position and what it is a training of. No pickle.

A checkpoint is a folder whose marker is written last, so it is whole or it is none. `state.json` has
the checksum of each tensor's file, and one of itself: one that has changed since is passed over for
the one before it. The newest two are kept, and the best by validation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch

from recspark import storage
from recspark.config import digest
from recspark.errors import ArtifactError
from recspark.train.comm import Tell
from recspark.train.curve import Epoch

_STATE = "state.json"
_KEPT = 2
_AGAIN = "train again: the checkpoint before it is taken, or the training begins anew"


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
    described = {
        name: {
            "dtype": str(tensor.dtype),
            "shape": list(tensor.shape),
            "sha256": storage.write_array(_file(place, name), tensor.cpu().numpy()),
        }
        for name, tensor in tensors.items()
    }
    storage.write_sealed(
        storage.join(place, _STATE),
        {"tensors": described, "identity": identity, "position": asdict(position)},
    )
    storage.mark_complete(place)
    best = storage.join(folder, _name(position.best, 0))
    storage.remove_older(folder, _KEPT, best, place)  # another training's may have later names
    return place


def latest(
    folder: str, identity: dict[str, Any], like: Tensors, tell: Tell
) -> tuple[Position, str] | None:
    """Return position and place of this training's newest whole checkpoint; None without one.

    One that is not as it was written, or whose tensors have not the names, types and shapes of
    `like`, is passed over for the one before it; `tell` hears why. Reads a tensor at a time.
    """
    for place in reversed(storage.folders(folder) if folder else []):
        try:
            state = _state(place)
            if digest(state["identity"]) != digest(identity):
                continue
            _check_fit(place, state["tensors"], like)
            for name in state["tensors"]:
                load(place, [name])
            return Position.from_json(json.dumps(state["position"]).encode()), place
        except ArtifactError as error:
            tell(f"passed over for the checkpoint before it: {error}")
    return None


def newest(folder: str) -> str:
    """Return the place of the newest whole checkpoint, of whatever training; "" without one."""
    return next(iter(reversed(storage.complete_folders(folder))), "")


def at_epoch(folder: str, epoch: int) -> str:
    """Return the place of the checkpoint at the end of `epoch`."""
    return storage.join(folder, _name(epoch, 0))


def load(place: str, names: Sequence[str] = ()) -> Tensors:
    """Return the tensors that `save` wrote to `place`, or those named.

    Raises ArtifactError where a file is missing or is not as it was written.
    """
    described = _state(place)["tensors"]
    out = {}
    for name in names or described:
        checksum = described[name]["sha256"]
        try:
            out[name] = torch.from_numpy(storage.read_array(_file(place, name), checksum=checksum))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{_file(place, name)}: {error}; {_AGAIN}") from None
    return out


def _state(place: str) -> dict[str, Any]:
    try:
        return storage.read_state(place, _STATE)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; {_AGAIN}") from None


def _check_fit(place: str, described: dict[str, dict[str, Any]], like: Tensors) -> None:
    """Raise ArtifactError where the tensors of a checkpoint could not be put into those of `like`."""
    found = {name: (about["dtype"], about["shape"]) for name, about in described.items()}
    want = {name: (str(tensor.dtype), list(tensor.shape)) for name, tensor in like.items()}
    if found != want:
        raise ArtifactError(f"{place} has tensors {found}, the network has {want}")


def _file(place: str, name: str) -> str:
    return storage.join(place, f"{name}.npy")


def _name(epoch: int, batch: int) -> str:
    return f"epoch-{epoch:06d}-batch-{batch:09d}"
