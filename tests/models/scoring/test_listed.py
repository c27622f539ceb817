"""Listed scores: their best items do not depend on the slices of rows, and take bounded memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from recspark.data.blocks import Array, Ragged
from recspark.models.scoring import memory
from recspark.models.scoring.listed import ListedScores

N_ITEMS = 3000


def random_lists(n_rows: int, longest: int, seed: int) -> tuple[ListedScores, Ragged, Array]:
    """Lists with few different scores, of lengths from 0; the items that are masked and allowed."""
    rng = np.random.default_rng(seed)
    lists = [
        np.sort(rng.choice(N_ITEMS, length, replace=False))
        for length in rng.integers(0, longest + 1, n_rows)
    ]
    items = np.concatenate([*lists, []]).astype(np.int32)
    scores = rng.choice(np.array([-np.inf, -1, 0, 0.5, 2], np.float32), len(items))
    seen = [rng.choice(row, len(row) // 2, replace=False) for row in lists]
    return (
        ListedScores(np.cumsum([0, *map(len, lists)]), items, scores, N_ITEMS),
        Ragged(np.cumsum([0, *map(len, seen)]), np.concatenate([*seen, []]).astype(np.int64)),
        rng.random(N_ITEMS) < 0.8,
    )


@pytest.mark.parametrize("n_rows", [0, 1, 50])
def test_slices_of_rows_do_not_change_a_bit(n_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of a row each, and of a few rows; some rows list nothing."""
    scores, seen, allowed = random_lists(n_rows, 9, seed=1)
    for allowed_items in (None, allowed):
        monkeypatch.undo()
        undivided = scores.best(seen, 3, allowed_items)
        assert [array.dtype for array in undivided] == ["i8", "i4", "i4", "f4"]
        assert len(undivided[0]) > n_rows / 2 or n_rows < 2
        for n_bytes in (0, 400, 1000, 3000):
            monkeypatch.setattr(memory, "block_bytes", lambda n_bytes=n_bytes: n_bytes)
            in_slices = scores.best(seen, 3, allowed_items)
            assert [a.dtype for a in in_slices] == [a.dtype for a in undivided]
            assert [a.tobytes() for a in in_slices] == [a.tobytes() for a in undivided]


def test_a_slice_has_as_many_rows_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 130 bytes, two entries: the rows have 1, 1, 0, 3, 2 and 0 entries."""
    start = np.array([0, 1, 2, 2, 5, 7, 7])
    scores = ListedScores(start, np.array([0, 0, 0, 1, 2, 0, 1], np.int32), np.ones(7, "f4"), 3)
    slices = []

    def recorded(self: ListedScores, rows: slice, *arguments: object) -> tuple[Array, ...]:
        slices.append((rows.start, rows.stop))
        return best_of_rows(self, rows, *arguments)  # type: ignore[arg-type]

    best_of_rows = ListedScores._best_of_rows
    monkeypatch.setattr(ListedScores, "_best_of_rows", recorded)
    monkeypatch.setattr(memory, "block_bytes", lambda: 130)
    scores.best(Ragged(np.zeros(7, np.int64), np.zeros(0, np.int64)), 2)
    assert slices == [(0, 3), (3, 4), (4, 6)]


def test_what_is_held_does_not_follow_the_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the result, and a byte or two for each entry (those of the check for NaN)."""
    monkeypatch.setattr(memory, "block_bytes", lambda: 1 << 20)
    for n_rows in (100, 400):
        scores, seen, _ = random_lists(n_rows, 2000, seed=2)
        tracemalloc.start()
        scores.best(seen, 1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.5 * 2**20 + 3 * len(scores.items)
