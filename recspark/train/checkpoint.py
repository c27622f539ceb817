"""Checkpoints of a training: its vectors, its position and what it is a training of. No pickle.

A checkpoint is a folder whose marker is written last, so it is whole or it is none. Only the newest
two are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from recspark import storage
from recspark.config import digest

_STATE = "state.json"
_VECTORS = ("vector", "mean", "square")
_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """What a training needs to go on as if nothing had happened.

    Parameters
    ----------
    epoch : epochs done; the next one reads its rows from their beginning
    step : optimiser steps done
    vector, mean, square : (P,) each: all parameters, and Adam's running means of gradient and
        square
    """

    epoch: int
    step: int
    vector: torch.Tensor
    mean: torch.Tensor
    square: torch.Tensor


def save(folder: str, checkpoint: Checkpoint, identity: dict[str, Any]) -> str:
    """Write `checkpoint` below `folder` (any URI) and return where; older ones but one are removed.

    `identity` names the settings and data versions: `latest` returns a checkpoint of the same only.
    """
    place = storage.join(folder, f"epoch-{checkpoint.epoch:06d}")
    storage.remove(place)
    for name in _VECTORS:
        vector: torch.Tensor = getattr(checkpoint, name)
        storage.write_array(storage.join(place, f"{name}.npy"), vector.numpy())
    storage.write_json(
        storage.join(place, _STATE),
        {"epoch": checkpoint.epoch, "step": checkpoint.step, "identity": identity},
    )
    storage.mark_complete(place)
    for old in _complete(folder)[:-_KEPT]:
        storage.remove(old)
    return place


def latest(folder: str, identity: dict[str, Any]) -> tuple[str, Checkpoint | None]:
    """Return place and content of this training's newest whole checkpoint, or ("", None)."""
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
    vectors = [
        torch.from_numpy(storage.read_array(storage.join(place, f"{name}.npy")))
        for name in _VECTORS
    ]
    return Checkpoint(int(state["epoch"]), int(state["step"]), *vectors)


def _complete(folder: str) -> list[str]:
    """Return the whole checkpoints below `folder`, oldest first."""
    if not folder or not storage.exists(folder):
        return []
    names = {file.rsplit("/", 2)[1] for file in storage.list_files(folder)}
    places = [storage.join(folder, name) for name in sorted(names)]
    return [place for place in places if storage.is_complete(place)]
