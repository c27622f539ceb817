"""Rows of training_timelines as examples: targets, their ages, and how often they are drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from recspark.data.blocks import Histories
from recspark.data.training_rows import timelines
from recspark.models.towers.timelines import (
    N_AGE_SHARES,
    Timelines,
    age_position,
    age_shares,
    drawn_examples,
    first_ages,
    later_items,
    mean_per_row,
    newest_events,
    target_counts,
    timelines_of,
)
from recspark.train.feed import Batch
from recspark.train.launch import LocalLauncher

pytestmark = pytest.mark.torch
VOCABULARY = torch.tensor([3, 5, 8, 13])


def batch(*weights: float) -> Batch:
    items = [[3, 8, 99, 8, 13], [5, 3, -1, -1, -1], [13, -1, -1, -1, -1]]
    ages = [[90, 70, 65, 60, 10], [40, 20, 0, 0, 0], [5, 0, 0, 0, 0]]
    return Batch(
        {
            "items": torch.tensor(items, dtype=torch.int32),
            "ages": torch.tensor(ages, dtype=torch.int32),
        },
        torch.tensor(weights, dtype=torch.float32),
    )


def test_rows_are_read_without_unknown_items() -> None:
    found = timelines_of(batch(1, 1, 1), VOCABULARY)
    assert found.items.tolist() == [[0, 2, 2, 3], [1, 0, -1, -1], [3, -1, -1, -1]]
    assert found.ages.tolist() == [[90, 70, 60, 10], [40, 20, 0, 0], [5, 0, 0, 0]]
    assert found.lengths.tolist() == [4, 2, 1]


def test_targets_are_drawn_evenly_and_never_the_first_item() -> None:
    lengths, weight = torch.tensor([6, 3, 1, 9]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    items = torch.where(torch.arange(9) < lengths[:, None], 7, -1)
    is_target = later_items(Timelines(items, torch.zeros_like(items), lengths), weight)
    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(3, 6)
    for _ in range(3000):
        drawn = drawn_examples(is_target, 2, generator)
        pairs = list(zip(drawn.rows.tolist(), drawn.ends.tolist(), strict=True))
        assert len(set(pairs)) == 4  # two of row 0, both of row 1, none of rows 2 and 3
        for row, end in pairs:
            counts[row, end] += 1
    assert not counts[:, 0].any()
    assert not counts[2].any()
    assert counts[1].tolist() == [0, 3000, 3000, 0, 0, 0]
    np.testing.assert_allclose(counts[0, 1:].numpy(), 1200, rtol=0.1)


def test_each_row_weighs_the_same() -> None:
    losses, rows = torch.tensor([1.0, 2.0, 6.0, 5.0]), torch.tensor([0, 0, 0, 2])
    assert mean_per_row(losses, rows, 3).tolist() == [3, 0, 5]


def test_targets_are_counted_over_all_ranks() -> None:
    """Of row 0, two of three targets are drawn: each with a chance of 2/3. Item 8 is two of them."""

    def fn(comm: Any) -> list[float]:
        return target_counts(comm, iter([batch(1, 1, 0)]), VOCABULARY, 2).tolist()

    for result in LocalLauncher(2).run(fn):
        np.testing.assert_allclose(result.value, [2, 0, 2 * 4 / 3, 2 * 2 / 3])


def test_first_ages_are_those_of_all_ranks() -> None:
    def fn(comm: Any) -> list[int]:
        weights = [(1, 0, 0), (0, 1, 1)][comm.rank]
        return first_ages(comm, iter([batch(*weights)]), torch.tensor([3, 5, 8, 13, 77])).tolist()

    for result in LocalLauncher(2).run(fn):
        assert result.value == [90, 40, 70, 10, -1]


def test_ages_have_their_position_among_the_targets_of_all_ranks() -> None:
    ages = np.random.default_rng(1).integers(1, 10**7, (2, 400, 5))  # of each rank

    def fn(comm: Any) -> torch.Tensor:
        tensors = {
            "items": torch.full((400, 5), 3, dtype=torch.int32),
            "ages": torch.from_numpy(ages[comm.rank]).int(),
        }
        return age_shares(comm, iter([Batch(tensors, torch.ones(400))]), VOCABULARY)

    shares, other = (result.value for result in LocalLauncher(2).run(fn))
    assert torch.equal(shares, other)
    assert len(shares) == N_AGE_SHARES
    asked = torch.tensor([0, 10**5, 10**6, 5 * 10**6, 10**7, 2**31 - 1])
    found = age_position(asked, shares.float()).numpy()
    targets = ages[:, :, 1:].ravel()  # the first of each row is no target
    np.testing.assert_allclose(
        found, [(targets < age).mean() for age in asked.tolist()], atol=0.005
    )
    assert found[0] == 0
    assert found[-1] == pytest.approx(1)
    ladder = age_position(torch.arange(0, 10**7, 997), shares.float())
    assert (ladder.diff() >= 0).all()


def test_a_query_is_read_as_a_training_row_of_the_same_events() -> None:
    items, as_of = np.array([3, 5, 8, 13], np.int32), 10**9
    history = Histories(
        np.array([0, 5, 5, 7]),
        np.array([8, 99, 3, 8, 13, 5, 3], np.int32),
        as_of - np.array([90, 70, 65, 60, 10, 40, 20]) * 1_000_000 - 999_999,
        np.ones(7, np.float32),
    )
    events, ages = newest_events(history, items, as_of, 3)
    assert events.start.tolist() == [0, 3, 3, 5]
    assert (events.values.tolist(), ages.tolist()) == ([0, 2, 3, 1, 0], [65, 60, 10, 40, 20])
    row, padded, padded_ages, lengths = timelines(history, as_of, 4)
    assert (row.tolist(), lengths.tolist()) == ([0, 2], [4, 2])
    assert padded.tolist() == [[99, 3, 8, 13], [5, 3, -1, -1]]
    assert padded_ages.tolist() == [[70, 65, 60, 10], [40, 20, 0, 0]]
