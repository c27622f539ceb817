"""Checkpoints of a factorisation: a file a block, written by the executors. No pickle.

A checkpoint is a folder whose marker is written last, so it is whole or it is none. A file is named
by block and task attempt: a second attempt writes another file, and `state.json` says which counts, with its
checksum. A checkpoint that is not as it was written is passed over for the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from pyspark import RDD, SparkContext, TaskContext

from recspark import storage
from recspark.config import digest
from recspark.data.blocks import Array
from recspark.errors import ArtifactError

_STATE = "state.json"
_KEPT = 2


class File(NamedTuple):
    """A block's factors, and the checksum of their file."""

    uri: str
    checksum: str


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

    def write(
        records: Iterator[tuple[int, Array]], side: str
    ) -> Iterator[tuple[int, tuple[str, str]]]:
        task = TaskContext.get()
        attempt = task.taskAttemptId() if task else 0
        for block, x in records:
            name = f"{side}-{block:06d}-{attempt}.npy"
            yield block, (name, storage.write_array(storage.join(place, name), x))

    written = {
        side: dict(rdd.mapPartitions(lambda records, side=side: write(records, side)).collect())  # type: ignore[misc]
        for side, rdd in factors.items()
    }
    state = {"losses": losses, "identity": identity, "files": written}
    storage.write_sealed(storage.join(place, _STATE), state)
    storage.mark_complete(place)
    storage.remove_older(scratch, _KEPT, place)  # another factorisation's may have later names
    return place


def latest(
    context: SparkContext,
    scratch: str,
    iterations: int,
    identity: dict[str, Any],
    tell: Callable[[str], None],
) -> tuple[str, list[float]]:
    """Return place and losses of the newest whole checkpoint of the same factorisation, at most
    `iterations` old; ("", []) without one.

    One that is not as it was written is passed over, and `tell` hears why. A job, which reads the
    checkpoint.
    """
    for place in reversed(storage.folders(scratch) if scratch else []):
        try:
            state = storage.read_state(place, _STATE)
            losses = state["losses"]
            if digest(state["identity"]) != digest(identity) or len(losses) > iterations:
                continue
            every = [file for side in state["files"] for file in files(place, side).values()]
            wrong = context.parallelize(every, max(1, len(every))).flatMap(_wrong).collect()
            if not wrong:
                return place, list(losses)
            tell(f"passed over for the checkpoint before it: {wrong[0]}")
        except ArtifactError as error:
            tell(f"passed over for the checkpoint before it: {error}")
    return "", []


def files(place: str, side: str) -> dict[int, File]:
    """Return where each block's factors are; ArtifactError where `place` is not as it was written."""
    names = storage.read_state(place, _STATE)["files"][side]
    return {
        int(block): File(storage.join(place, name), checksum)
        for block, (name, checksum) in names.items()
    }


def read(file: File) -> Array:
    """Return the factors of one block, float32 (n, d); ArtifactError where they have changed."""
    try:
        return np.asarray(storage.read_array(file.uri, checksum=file.checksum))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file.uri}: {error}; train again") from None


def _wrong(file: File) -> list[str]:
    """Return what is wrong with a file; in an executor."""
    try:
        read(file)
    except ArtifactError as error:
        return [str(error)]
    return []
