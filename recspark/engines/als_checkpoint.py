"""Checkpoints of a factorisation: the executors write one file per block. No pickle.

A checkpoint is a folder whose marker file is written last: without the marker the checkpoint does
not count. A file is named by block and task attempt, so a second attempt writes another file.
`state.json` says which file counts for each block, with its checksum. A checkpoint whose files are
not as they were written is passed over, and the one before it is taken.
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
_N_KEPT = 2  # newest checkpoints that are not removed


class File(NamedTuple):
    """The file of a block's factors, and its checksum."""

    uri: str
    checksum: str


def save(
    scratch: str,
    losses: list[float],
    factors: dict[str, RDD[tuple[int, Array]]],
    identity: dict[str, Any],
) -> str:
    """Write `factors`, by side and block, and return the checkpoint's folder.

    All checkpoints but the newest two are removed. Cost: one job per side.

    Parameters
    ----------
    scratch : URI of the folder that holds the checkpoints
    losses : one per iteration so far; their number is the number of the checkpoint
    factors : for each side, float32 (n, d) by block
    identity : names the settings and the data; `latest` returns only a checkpoint with the same
        identity
    """
    folder = storage.join(scratch, f"iteration-{len(losses):06d}")
    storage.remove(folder)

    def write(
        records: Iterator[tuple[int, Array]], side: str
    ) -> Iterator[tuple[int, tuple[str, str]]]:
        task = TaskContext.get()
        attempt = task.taskAttemptId() if task else 0
        for block, block_factors in records:
            name = f"{side}-{block:06d}-{attempt}.npy"
            yield block, (name, storage.write_array(storage.join(folder, name), block_factors))

    written = {
        side: dict(rdd.mapPartitions(lambda records, side=side: write(records, side)).collect())  # type: ignore[misc]
        for side, rdd in factors.items()
    }
    state = {"losses": losses, "identity": identity, "files": written}
    storage.write_sealed(storage.join(folder, _STATE), state)
    storage.mark_complete(folder)
    # `folder` stays, even if checkpoints of another factorisation have later names.
    storage.remove_older(scratch, _N_KEPT, folder)
    return folder


def latest(
    context: SparkContext,
    scratch: str,
    iterations: int,
    identity: dict[str, Any],
    tell: Callable[[str], None],
) -> tuple[str, list[float]]:
    """Return (folder, losses) of the newest usable checkpoint of this factorisation, or ("", []).

    A checkpoint is usable if its identity is `identity`, if it was written after at most
    `iterations` iterations, and if all its files are as they were written. Damaged checkpoints are
    passed over, and `tell` is called with the reason. Cost: one job for each checkpoint tried,
    which reads its files.
    """
    for folder in reversed(storage.folders(scratch) if scratch else []):
        try:
            state = storage.read_state(folder, _STATE)
            losses = state["losses"]
            if digest(state["identity"]) != digest(identity) or len(losses) > iterations:
                continue
            block_files = [file for side in state["files"] for file in files(folder, side).values()]
            damages = (
                context.parallelize(block_files, max(1, len(block_files)))
                .flatMap(_damage_of)
                .collect()
            )
            if not damages:
                return folder, list(losses)
            tell(f"passed over for the checkpoint before it: {damages[0]}")
        except ArtifactError as error:
            tell(f"passed over for the checkpoint before it: {error}")
    return "", []


def files(folder: str, side: str) -> dict[int, File]:
    """Return each block's file. Raises ArtifactError if `folder` is not as it was written."""
    names = storage.read_state(folder, _STATE)["files"][side]
    return {
        int(block): File(storage.join(folder, name), checksum)
        for block, (name, checksum) in names.items()
    }


def read(file: File) -> Array:
    """Return the factors of one block, float32 (n, d).

    Raises ArtifactError if the file is not as it was written.
    """
    try:
        return np.asarray(storage.read_array(file.uri, checksum=file.checksum))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file.uri}: {error}; train again") from None


def _damage_of(file: File) -> list[str]:
    """Return the error of reading a file, in a list, or an empty list. Runs in an executor."""
    try:
        read(file)
    except ArtifactError as error:
        return [str(error)]
    return []
