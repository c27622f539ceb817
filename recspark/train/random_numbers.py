"""Random numbers of a training: a seed for each batch, and torch's own numbers drawn from it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_TORCH = threading.Lock()  # torch has one generator for all ranks that are threads of a process


def seed_of(*parts: int) -> int:
    """Return a seed for each combination of `parts`."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def torch_random(seed: int, device: str) -> Iterator[None]:
    """Let torch draw from `seed` within; afterwards it goes on with what it drew from before.

    Ranks that are threads of one process wait for each other. Cost: 10 microseconds.
    """
    gpus = [torch.cuda.current_device()] if device == "cuda" else []
    with _TORCH, torch.random.fork_rng(gpus):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` costs 20 times as much
        if gpus:
            torch.cuda.manual_seed(seed)
        yield
