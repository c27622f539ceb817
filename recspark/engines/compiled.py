"""Numba with recspark's settings: what every compiled inner loop is decorated with."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])

# Sums may be reordered and products fused, so that loops use the processor's vector units. NaN and
# infinity keep their meaning: a diverging run must be seen.
_FAST = {"reassoc", "contract", "nsz", "arcp"}


def compiled(function: F) -> F:
    """Return `function` compiled by numba at its first call, kept on disk where there is a place.

    Sums in it may be reordered; `compiled_in_order` keeps them as written.

    Numba keeps machine code beside the source, else (also for a module inside a zip of `--py-files`)
    below the user's cache folder; `NUMBA_CACHE_DIR` names another place. Where none can be written,
    each process compiles anew: about 2 s for a training loop.
    """
    return _compiled(function, _FAST)


def compiled_in_order(function: F) -> F:
    """Return `function` compiled as by `compiled`, its sums in the order written on any processor."""
    return _compiled(function, {"contract"})


def _compiled(function: F, fastmath: set[str]) -> F:
    try:
        kept: Any = numba.njit(cache=True, nogil=True, fastmath=fastmath)(function)
        folder = Path(kept.stats.cache_path)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return cast(F, kept)
    except (RuntimeError, OSError):  # numba found no place, or one that cannot be written
        plain: Any = numba.njit(nogil=True, fastmath=fastmath)(function)
        return cast(F, plain)
