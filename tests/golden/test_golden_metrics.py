"""The hand-worked table of docs/metrics.md: three users, k = 3, exact fractions."""

from __future__ import annotations

from fractions import Fraction as Q
from pathlib import Path

import numpy as np
import pytest

from recspark.eval.metrics import LIST_METRICS, TRUTH_METRICS, coverage, golden_block

THIRD = 1 / np.log2(3)  # discount at rank 2; at rank 3 it is 1/2
# metric: user 0, user 1, user 2 (None = not defined), mean over users for whom it is defined
BY_HAND = {
    "ndcg": (Q(3, 2) / (1 + THIRD), THIRD / (Q(3, 2) + THIRD), 0, None),
    "recall": (1, Q(1, 4), 0, Q(5, 12)),
    "recall_capped": (1, Q(1, 3), 0, Q(4, 9)),
    "precision": (Q(2, 3), Q(1, 3), 0, Q(1, 3)),
    "map": (Q(5, 6), Q(1, 6), 0, Q(1, 3)),
    "mrr": (1, Q(1, 2), 0, Q(1, 2)),
    "hit_rate": (1, 1, 0, Q(2, 3)),
    "novelty": (Q(7, 3), 4, None, Q(19, 6)),
    "intra_list_diversity": (Q(2, 3), Q(2, 5), None, Q(8, 15)),
    "popularity_bias": (Q(3, 4), Q(5, 12), None, Q(7, 12)),
}
METRICS = {**TRUTH_METRICS, **LIST_METRICS}


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_equals_its_fraction(name: str) -> None:
    *users, mean = BY_HAND[name]
    found = METRICS[name](golden_block(), 3)
    want = [np.nan if value is None else float(value) for value in users]
    np.testing.assert_allclose(found, want, rtol=1e-7)  # vectors are float32
    if mean is not None:
        assert np.nanmean(found) == pytest.approx(float(mean), rel=1e-7)


def test_coverage_equals_its_fraction() -> None:
    block = golden_block()
    listed = np.isin(np.arange(6), block.items)
    assert coverage(listed) == pytest.approx(5 / 6)


def test_the_document_has_a_row_for_every_metric() -> None:
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    rows = {
        name: [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        for name in [*METRICS, "coverage"]
    }
    assert {name: len(lines) for name, lines in rows.items()} == dict.fromkeys(rows, 2)
    for name, (*_, mean) in BY_HAND.items():
        assert mean is None or f"**{mean}**" in rows[name][1]
