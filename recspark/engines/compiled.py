"""Numba with recspark's settings: what every compiled inner loop is decorated with."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., object])

# Sums may be reordered and products fused, so that loops use the processor's vector units. NaN and
# infinity keep their meaning: a diverging run must be seen.
_FAST = {"reassoc", "contract", "nsz", "arcp"}


def compiled(function: F) -> F:
    """Return `function` compiled by numba at its first call, kept on disk where there is a place.

    Numba keeps machine code beside the source, else below the user's cache folder (also for a
    module inside a zip of `--py-files`). Where neither can be written, each process compiles anew.
    """
    try:
        kept: Any = numba.njit(cache=True, nogil=True, fastmath=_FAST)(function)
        # For a module in a zip numba looks at its folder only when it is too late to do without.
        Path(kept.stats.cache_path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=kept.stats.cache_path):
            return kept
    except (RuntimeError, OSError):  # no place to keep it
        plain: Any = numba.njit(nogil=True, fastmath=_FAST)(function)
        return plain
