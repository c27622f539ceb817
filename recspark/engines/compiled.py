"""Numba with recspark's settings: the decorators of every compiled inner loop."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])

# Sums may be reordered and products fused, so that loops use the processor's vector units. NaN and
# infinity keep their meaning, so that a diverging run is noticed.
_FAST_MATH = {"reassoc", "contract", "nsz", "arcp"}


def compiled(function: F) -> F:
    """Return `function` compiled by numba at its first call, with its machine code cached on disk.

    Sums in the function may be reordered; `compiled_in_order` keeps them as written.

    Numba writes the machine code next to the source file. If that folder cannot be written (also
    for a module inside a zip of `--py-files`), it writes below the user's cache folder;
    `NUMBA_CACHE_DIR` names another folder. If no folder can be written, each process compiles anew,
    which takes about 2 s for a training loop.
    """
    return _compiled(function, _FAST_MATH)


def compiled_in_order(function: F) -> F:
    """Return `function` compiled as by `compiled`, with sums as written on any processor."""
    return _compiled(function, {"contract"})


def _compiled(function: F, fastmath: set[str]) -> F:
    try:
        cached: Any = numba.njit(cache=True, nogil=True, fastmath=fastmath)(function)
        folder = Path(cached.stats.cache_path)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return cast(F, cached)
    except (RuntimeError, OSError):  # numba has no cache folder, or it cannot be written
        uncached: Any = numba.njit(nogil=True, fastmath=fastmath)(function)
        return cast(F, uncached)
