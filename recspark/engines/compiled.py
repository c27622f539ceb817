"""Numba with recspark's settings: what every compiled inner loop is decorated with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

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
        return numba.njit(cache=True, nogil=True, fastmath=_FAST)(function)
    except RuntimeError:  # no place to keep it
        return numba.njit(nogil=True, fastmath=_FAST)(function)
