"""Blocks against a dense matrix: every interaction is on both sides, under the rows that are sent."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from recspark.engines.als_blocks import (
    Block,
    Order,
    _corners,
    _item_block,
    _pick,
    _user_block,
    _Users,
)

N_USERS, N_ITEMS = 50, 23


def cut(dense: np.ndarray, n: int) -> tuple[list[Block], list[Block]]:
    """Blocks of users and of items, as the tasks make them; a user's id is 10 times the row."""
    order = Order(N_ITEMS, n)
    rows = sparse.csr_matrix(dense.astype(np.float32))
    every = _Users(
        np.arange(N_USERS) * 10,
        np.diff(rows.indptr).astype(np.int32),
        rows.indices.astype(np.int32),
        rows.data,
    )
    mixed = _pick(every, np.random.default_rng(3).permutation(N_USERS))
    users = []
    for b in range(n):
        mine = np.flatnonzero(mixed.users // 10 % n == b)
        halves = [_pick(mixed, half) for half in np.array_split(mine, 2)]
        users.append(_user_block(halves, order))
    corners = [list(_corners(b, block, order)) for b, block in enumerate(users)]
    items = [
        _item_block(b, [corners[other][b] for other in reversed(range(n))], order) for b in range(n)
    ]
    return users, items


@pytest.mark.parametrize("n", [1, 2, 3, 30])
def test_columns_are_the_rows_that_are_sent(n: int) -> None:
    rng = np.random.default_rng(1)
    dense = (rng.random((N_USERS, N_ITEMS)) < 0.1) * rng.uniform(0.5, 2, (N_USERS, N_ITEMS))
    dense = dense.astype(np.float32)
    users, items = cut(dense, n)
    for sides, others, matrix, scale in ((users, items, dense, 10), (items, users, dense.T, 1)):
        found = np.zeros_like(matrix)
        sent = [block.routes() for block in others]
        for b, block in enumerate(sides):
            columns = np.concatenate([o.ids[route[b]] for o, route in zip(others, sent)])
            columns = columns // (10 if scale == 1 else 1)
            assert len(columns) == block.bounds[-1]
            part = sparse.csr_matrix(
                (block.weight, columns[block.indices], block.start),
                shape=(len(block.ids), matrix.shape[1]),
            )
            found[block.ids // scale] += part.toarray()
            assert part.nnz == len(block.indices)
            assert block.indices.dtype == np.int32
            assert all(
                (np.diff(block.indices[a:z]) > 0).all()
                for a, z in zip(block.start, block.start[1:])
            )
        assert np.array_equal(found, matrix)


def test_columns_of_users_are_places_in_the_order_of_items() -> None:
    dense = np.random.default_rng(1).random((N_USERS, N_ITEMS)) < 0.1
    order = Order(N_ITEMS, 3)
    users, items = cut(dense, 3)
    by_block = np.concatenate([block.ids for block in items])
    assert np.array_equal(by_block[order.position], np.arange(N_ITEMS))
    for block in users:
        for row, user in enumerate(block.ids // 10):
            mine = block.columns[block.indices[block.start[row] : block.start[row + 1]]]
            assert sorted(by_block[mine]) == np.flatnonzero(dense[user]).tolist()


@pytest.mark.parametrize("name", ["ids", "start", "indices", "weight", "bounds", "columns"])
@pytest.mark.parametrize("at", [0, -1])
def test_checksum_sees_a_change(name: str, at: int) -> None:
    dense = np.random.default_rng(1).random((N_USERS, N_ITEMS)) < 0.1
    one, again = cut(dense, 2)[0][0], cut(dense, 2)[0][0]
    assert one.checksum == again.checksum
    getattr(again, name)[at] += 1
    assert one.checksum != again.checksum
