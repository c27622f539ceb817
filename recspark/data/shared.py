"""Arrays that all workers of a machine share: the memory-mapped file, not a copy for each worker."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np

from recspark import storage
from recspark.data.blocks import Array
from recspark.errors import ModelError


@dataclass(frozen=True)
class Shared:
    """A read-only array that executors need.

    If the array is a complete memory-mapped `.npy` file (an artifact in a local or mounted folder),
    pickling stores only the name of the file, and all workers of a machine share its pages. Any
    other array is pickled by value: every worker has a copy.
    """

    array: Array

    def __reduce__(self) -> tuple[Any, ...]:
        array = self.array
        base: object = array.base  # the memory map, if the array is a complete file
        if isinstance(array, np.memmap) and isinstance(base, mmap.mmap):
            return _open_shared, (str(array.filename), array.dtype.str, array.shape)
        return Shared, (np.asarray(array),)


def _open_shared(path: str, dtype: str, shape: tuple[int, ...]) -> Shared:
    array = storage.read_array(path, mmap=True)
    if array.dtype.str != dtype or array.shape != shape:
        raise ModelError(f"{path}: the artifact changed while it was in use; run the stage again")
    return Shared(array)
