"""Checkpoints of a training: its tensors, how far it is, and which training it is. No pickle.

A checkpoint is a folder. Its marker file is written last, and a folder without a marker does not
count as a checkpoint. `state.json` holds the checksum of each tensor's file, and a checksum of
itself. A checkpoint whose files have changed since it was written is skipped, and the one before it
is used. The newest two checkpoints are kept, and the one of the epoch with the best validation
value.
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
_N_KEPT = 2  # newest checkpoints of a folder that stay, beside that of the best epoch
# The advice at the end of each error message.
_TRAIN_AGAIN = "train again: the checkpoint before it is taken, or the training begins anew"


@dataclass(frozen=True)
class Position:
    """How far a training is.

    Together with its tensors this is all that a training needs to go on as if it had never stopped.

    Parameters
    ----------
    epoch : number of finished epochs
    batch : number of finished batches of the epoch that is under way. A position always lies
        between two optimiser steps
    step : number of optimiser steps done in the whole training
    loss, rows, seconds : of the epoch that is under way, up to this position: the sum of the losses
        and the number of rows, both over all ranks, and the time spent
    curve : figures of each finished epoch
    best : epoch (from 1) with the best validation value so far, or the last one where the training
        has no validation; 0 = no epoch has finished yet
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
        """Return the position as JSON. `from_json` gives back every number with the same bits."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """Return the position that `to_json` wrote."""
        fields = json.loads(text)
        curve = tuple(Epoch(**epoch) for epoch in fields.pop("curve"))
        return cls(**fields, curve=curve)


Tensors = dict[str, torch.Tensor]


def save(folder: str, position: Position, tensors: Tensors, identity: dict[str, Any]) -> str:
    """Write a checkpoint below `folder` (any URI), remove old ones, and return the URI of the new
    one.

    `identity` holds the settings and data versions of the training. `latest` returns only
    checkpoints with an equal identity.
    """
    uri = storage.join(folder, _folder_name(position.epoch, position.batch))
    storage.remove(uri)
    description_by_name = {
        name: {
            "dtype": str(tensor.dtype),
            "shape": list(tensor.shape),
            "sha256": storage.write_array(_tensor_uri(uri, name), tensor.cpu().numpy()),
        }
        for name, tensor in tensors.items()
    }
    storage.write_sealed(
        storage.join(uri, _STATE),
        {"tensors": description_by_name, "identity": identity, "position": asdict(position)},
    )
    storage.mark_complete(uri)
    best_uri = storage.join(folder, _folder_name(position.best, 0))
    # `uri` is named too: checkpoints of another training in this folder may have later names.
    storage.remove_older(folder, _N_KEPT, best_uri, uri)
    return uri


def latest(
    folder: str, identity: dict[str, Any], like: Tensors, tell: Tell
) -> tuple[Position, str] | None:
    """Return position and URI of the newest usable checkpoint of this training; None if none is.

    A checkpoint belongs to this training if its identity equals `identity`. It is skipped, for the
    one before it, where it is incomplete, where its files have changed since they were written, or
    where its tensors do not have the names, types and shapes of `like`; `tell` is called with the
    reason. The tensors are read one at a time, so that memory holds only one of them.
    """
    for uri in reversed(storage.folders(folder) if folder else []):
        try:
            state = _read_state(uri)
            if digest(state["identity"]) != digest(identity):
                continue
            _check_fit(uri, state["tensors"], like)
            for name in state["tensors"]:
                load(uri, [name])
            return Position.from_json(json.dumps(state["position"]).encode()), uri
        except ArtifactError as error:
            tell(f"passed over for the checkpoint before it: {error}")
    return None


def newest(folder: str) -> str:
    """Return the URI of the newest complete checkpoint, of any training; "" if there is none."""
    return next(iter(reversed(storage.complete_folders(folder))), "")


def at_epoch(folder: str, epoch: int) -> str:
    """Return the URI of the checkpoint at the end of `epoch` (counted from 1)."""
    return storage.join(folder, _folder_name(epoch, 0))


def load(uri: str, names: Sequence[str] = ()) -> Tensors:
    """Return the tensors of the checkpoint at `uri`: those in `names`, or all where `names` is
    empty.

    Raises ArtifactError where a file is missing or has changed since it was written.
    """
    description_by_name = _read_state(uri)["tensors"]
    tensors = {}
    for name in names or description_by_name:
        checksum = description_by_name[name]["sha256"]
        try:
            tensors[name] = torch.from_numpy(
                storage.read_array(_tensor_uri(uri, name), checksum=checksum)
            )
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{_tensor_uri(uri, name)}: {error}; {_TRAIN_AGAIN}") from None
    return tensors


def _read_state(uri: str) -> dict[str, Any]:
    try:
        return storage.read_state(uri, _STATE)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; {_TRAIN_AGAIN}") from None


def _check_fit(uri: str, description_by_name: dict[str, dict[str, Any]], like: Tensors) -> None:
    """Raise ArtifactError where names, types or shapes of tensors differ from those of `like`."""
    stored = {
        name: (description["dtype"], description["shape"])
        for name, description in description_by_name.items()
    }
    expected = {name: (str(tensor.dtype), list(tensor.shape)) for name, tensor in like.items()}
    if stored != expected:
        raise ArtifactError(f"{uri} has tensors {stored}, the network has {expected}")


def _tensor_uri(uri: str, name: str) -> str:
    return storage.join(uri, f"{name}.npy")


def _folder_name(epoch: int, batch: int) -> str:
    return f"epoch-{epoch:06d}-batch-{batch:09d}"
