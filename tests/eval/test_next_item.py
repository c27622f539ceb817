"""The next item of every prefix, worked by hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from recspark.data.blocks import QueryBlock, Ragged, local_index
from recspark.eval import next_item
from recspark.models.scoring import topk

ITEMS = np.array([10, 20, 30, 40], np.int32)


@dataclass
class FollowsLast:
    """After item i the local items score `matrix[i]`; a prefix ending in a stranger knows nothing."""

    matrix: np.ndarray

    def score(self, block: QueryBlock) -> topk.Scores:
        last = block.history.item_idx[block.history.start[1:] - 1]
        local = local_index(ITEMS, last)
        return topk.DotScores(
            self.matrix[local], np.eye(4, dtype=np.float32), None, known=local >= 0
        )


def test_ranks_by_hand() -> None:
    matrix = np.array([[1, 4, 2, 3], [5, 0, 0, 0], [0, 1, 2, 3], [9, 8, 7, 6]], np.float32)
    sessions = Ragged(np.array([0, 3, 4, 4, 7, 9]), np.array([10, 20, 30, 40, 30, 40, 40, 99, 10]))
    # 10 -> 20: first. (10) 20 -> 30: 10, 20, 30, 40 by score and tie: third.
    # 30 -> 40: first. (30) 40 -> 40: fourth. 99 -> 10: the model knows nothing.
    want = [1, 3, 1, 4, 0]
    scorer = FollowsLast(matrix)
    assert next_item.ranks(scorer, ITEMS, sessions, 0, 4).tolist() == want
    assert next_item.ranks(scorer, ITEMS, sessions, 0, 3).tolist() == [1, 3, 1, 0, 0]


def test_blocks_of_prefixes_do_not_change_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 6, 50)
    start = np.concatenate([[0], np.cumsum(lengths)])
    sessions = Ragged(start, rng.choice(ITEMS, start[-1]))
    scorer = FollowsLast(rng.normal(size=(4, 4)).astype(np.float32))
    whole = next_item.ranks(scorer, ITEMS, sessions, 0, 4)
    assert len(whole) == np.maximum(lengths - 1, 0).sum()
    monkeypatch.setattr(next_item, "_AT_ONCE", 7)
    np.testing.assert_array_equal(next_item.ranks(scorer, ITEMS, sessions, 0, 4), whole)


def test_summary_counts_ranks_within_k() -> None:
    found = np.array([1, 3, 0, 20])
    assert next_item.summary(found, 20) == {
        "hit_rate": 3 / 4,
        "mrr": pytest.approx((1 + 1 / 3 + 1 / 20) / 4),
        "ndcg": pytest.approx((1 + 1 / 2 + 1 / np.log2(21)) / 4),
    }
    assert next_item.summary(found, 3)["hit_rate"] == 2 / 4
