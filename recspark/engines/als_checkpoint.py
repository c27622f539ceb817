"""Checkpoints of a factorisation: a file a block, written by the executors. No pickle.

A checkpoint is a folder whose marker is written last, so it is whole or it is none. A file is named
by block and task attempt: a second attempt writes another file, and `state.json` says which counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from pyspark import RDD, TaskContext

from recspark import storage
from recspark.config import digest
from recspark.data.blocks import Array

_STATE = "state.json"
_KEPT = 2


def save(
    scratch: str,
    losses: list[float],
    factors: dict[str, RDD[tuple[int, Array]]],
    identity: dict[str, Any],
) -> str:
    """Write `factors`, by side and block, and return where; all but the newest two are removed.

    `losses` : after each iteration so far; they number the checkpoint. `identity` names the settings
    and the data: `latest` returns a checkpoint of the same only. A job a side.
    """
    place = storage.join(scratch, f"iteration-{len(losses):06d}")
    storage.remove(place)

    def write(records: Iterator[tuple[int, Array]], side: str) -> Iterator[tuple[int, str]]:
        task = TaskContext.get()
        attempt = task.taskAttemptId() if task else 0
        for block, x in records:
            name = f"{side}-{block:06d}-{attempt}.npy"
            storage.write_array(storage.join(place, name), x)
            yield block, name

    written = {
        side: dict(rdd.mapPartitions(lambda records, side=side: write(records, side)).collect())  # type: ignore[misc]
        for side, rdd in factors.items()
    }
    state = {"losses": losses, "identity": identity, "files": written}
    storage.write_json(storage.join(place, _STATE), state)
    storage.mark_complete(place)
    storage.remove_older(scratch, _KEPT, place)  # another factorisation's may have later names
    return place


def latest(scratch: str, iterations: int, identity: dict[str, Any]) -> tuple[str, list[float]]:
    """Return place and losses of the newest whole checkpoint of the same factorisation, at most
    `iterations` old; ("", []) without one.
    """
    for place in reversed(storage.complete_folders(scratch)):
        state = storage.read_json(storage.join(place, _STATE))
        losses = state["losses"]
        if digest(state["identity"]) == digest(identity) and len(losses) <= iterations:
            return place, list(losses)
    return "", []


def files(place: str, side: str) -> dict[int, str]:
    """Return the URI of each block's factors."""
    names = storage.read_json(storage.join(place, _STATE))["files"][side]
    return {int(block): storage.join(place, name) for block, name in names.items()}


def read(uri: str) -> Array:
    """Return the factors of one block, float32 (n, d)."""
    return np.asarray(storage.read_array(uri))
