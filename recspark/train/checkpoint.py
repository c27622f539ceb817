"""Checkpoints of a training: its vectors, its position and what it is a training of. No pickle.

A checkpoint is a folder whose marker is written last, so it is whole or it is none. Only the newest two
are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recspark import storage
from recspark.config import digest
from recspark.data.blocks import Array

_STATE = "state.json"
_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """What a training needs to go on as if nothing had happened.

    Parameters
    ----------
    epoch : epochs done; the next one reads its rows from their beginning
    step : optimiser steps done
    vectors : float32, equally long: `parameters`, and Adam's `first` and `second` moments
    """

    epoch: int
    step: int
    vectors: dict[str, Array]


def save(folder: str, checkpoint: Checkpoint, identity: dict[str, Any]) -> str:
    """Write `checkpoint` below `folder` (any URI) and return where; older ones but one are removed.

    `identity` names the settings and data versions: `latest` returns a checkpoint of the same only.
    """
    place = storage.join(folder, f"epoch-{checkpoint.epoch:06d}")
    storage.remove(place)
    for name, vector in checkpoint.vectors.items():
        storage.write_array(storage.join(place, f"{name}.npy"), vector)
    storage.write_json(
        storage.join(place, _STATE),
        {
            "epoch": checkpoint.epoch,
            "step": checkpoint.step,
            "vectors": sorted(checkpoint.vectors),
            "identity": identity,
        },
    )
    storage.mark_complete(place)
    for old in _complete(folder)[:-_KEPT]:
        storage.remove(old)
    return place


def latest(folder: str, identity: dict[str, Any]) -> tuple[str, Checkpoint | None]:
    """Return the newest whole checkpoint of this very training and its place; ("", None) without one."""
    for place in reversed(_complete(folder)):
        state = storage.read_json(storage.join(place, _STATE))
        if digest(state["identity"]) == digest(identity):
            return place, load(place)
    return "", None


def newest(folder: str) -> str:
    """Return the place of the newest whole checkpoint, of whatever training; "" without one."""
    return next(iter(reversed(_complete(folder))), "")


def load(place: str) -> Checkpoint:
    """Return the checkpoint that `save` wrote to `place`."""
    state = storage.read_json(storage.join(place, _STATE))
    vectors = {
        name: storage.read_array(storage.join(place, f"{name}.npy")) for name in state["vectors"]
    }
    return Checkpoint(int(state["epoch"]), int(state["step"]), vectors)


def _complete(folder: str) -> list[str]:
    """Return the whole checkpoints below `folder`, oldest first."""
    if not folder or not storage.exists(folder):
        return []
    places = {file.rsplit("/", 1)[0] for file in storage.list_files(folder)}
    return sorted(place for place in places if storage.is_complete(place))
