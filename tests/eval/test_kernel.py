"""The task of the evaluation, run in this process: how rows are cut up changes nothing."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from recspark.eval import kernel
from recspark.eval.kernel import Plan, Sums, add_up, sum_users, whole_users
from recspark.eval.metrics import Catalogue

N_USERS, N_ITEMS = 50, 12


def plan() -> Plan:
    catalogue = Catalogue(np.arange(N_ITEMS, dtype=np.int32), np.arange(1, N_ITEMS + 1))
    return Plan(("a", "b"), ("novel", "repeat"), (2, 4), catalogue, 20, 3)


def rows(seed: int = 0) -> pa.Table:
    """Rows of users 0, 2, 4, …; every third has no header, so is not in the population."""
    rng = np.random.default_rng(seed)
    found: list[tuple[int, int, int, int]] = []
    for user in range(0, 2 * N_USERS, 2):
        if user % 3:
            found.append((user, 0, 1, user % 4))
        for mode in (1, 2):
            found += [(user, mode, 1, item) for item in rng.choice(N_ITEMS + 2, 3, replace=False)]
        for part in range(3, 7):
            listed = rng.choice(N_ITEMS, rng.integers(0, 5), replace=False)
            found += [(user, part, rank, item) for rank, item in enumerate(listed, 1)]
    columns = np.array(found)
    names = ["user_idx", "part", "rank", "item_idx"]
    kinds = [np.int64, np.int32, np.int32, np.int32]
    return pa.table(
        {n: columns[:, i].astype(kind) for i, (n, kind) in enumerate(zip(names, kinds))}
    )


def totals(batches: list[pa.RecordBatch]) -> dict[tuple[int, int], Sums]:
    found = {}
    for batch in batches:
        (row,) = batch.to_pylist()
        found[row["mode"], row["segment"]] = Sums.unpack(row["sums"], row["listed"], plan())
    return found


def same(left: dict[tuple[int, int], Sums], right: dict[tuple[int, int], Sums]) -> bool:
    return left.keys() == right.keys() and all(
        (left[key].columns == right[key].columns).all()
        and (left[key].listed == right[key].listed).all()
        for key in left
    )


@pytest.mark.parametrize(("batch_rows", "chunk_rows"), [(1, 1), (7, 30), (13, 100), (10_000, 1)])
def test_batches_and_chunks_change_no_sum(
    monkeypatch: pytest.MonkeyPatch, batch_rows: int, chunk_rows: int
) -> None:
    whole = totals(list(sum_users(rows().to_batches(), plan())))
    monkeypatch.setattr(kernel, "CHUNK_ROWS", chunk_rows)
    batches = rows().to_batches(max_chunksize=batch_rows)
    chunks = [chunk["user_idx"] for chunk in whole_users(iter(batches))]
    assert len(chunks) > 1 or batch_rows > 1000
    assert sum(map(len, chunks)) == rows().num_rows
    assert len(np.concatenate([np.unique(chunk) for chunk in chunks])) == N_USERS
    assert same(totals(list(sum_users(iter(batches), plan()))), whole)


def test_users_per_product_change_no_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = totals(list(sum_users(rows().to_batches(), plan())))
    monkeypatch.setattr(kernel, "BLOCK_USERS", 7)
    assert same(totals(list(sum_users(rows().to_batches(), plan()))), whole)


def test_partial_sums_add_up_and_order_inside_a_user_does_not_matter() -> None:
    table = rows()
    whole = totals(list(sum_users(table.to_batches(), plan())))
    user_idx = table.column("user_idx").to_numpy()
    parts = []
    for side in (user_idx % 10 < 5, user_idx % 10 >= 5):
        mixed = np.random.default_rng(1).permutation(np.flatnonzero(side))
        order = mixed[np.argsort(user_idx[mixed], kind="stable")]
        parts += list(sum_users(table.take(order).to_batches(), plan()))
    assert same(totals(list(add_up(iter(parts)))), whole)


def test_only_users_with_a_header_and_truth_count() -> None:
    found = totals(list(sum_users(rows().to_batches(), plan())))
    with_header = sum(user % 3 > 0 for user in range(0, 2 * N_USERS, 2))
    assert (
        sum(found[1, segment].n_users for segment in range(4) if (1, segment) in found)
        <= with_header
    )
    nobody = Sums.zero(plan())
    assert nobody.n_users == 0
    assert np.isnan(nobody.means).all()
    assert list(sum_users(iter([]), plan())) == []


def test_an_item_takes_a_bit_per_mode_segment_k_and_model() -> None:
    table, given = rows(), plan()
    users: dict[int, list[dict[str, int]]] = {}
    for row in table.to_pylist():
        users.setdefault(row["user_idx"], []).append(row)
    expected: set[tuple[int, int, int, int, int]] = set()  # mode, segment, k, model, item
    for of_user in users.values():
        segment = [row["item_idx"] for row in of_user if row["part"] == 0]
        for mode in range(len(given.modes)):
            truth = {row["item_idx"] for row in of_user if row["part"] == given.truth_part(mode)}
            if not segment or not truth & set(range(N_ITEMS)):
                continue
            for row in of_user:
                model = row["part"] - given.first_list_part(mode)
                if 0 <= model < len(given.models):
                    expected |= {
                        (mode, segment[0], c, model, row["item_idx"])
                        for c, k in enumerate(given.ks)
                        if row["rank"] <= k
                    }
    sums_of = totals(list(sum_users(table.to_batches(), given)))
    assert expected == {
        (mode, segment, c, m, int(given.catalogue.items[position]))
        for (mode, segment), sums in sums_of.items()
        for c in range(len(given.ks))
        for m in range(len(given.models))
        for position in np.flatnonzero(sums.is_listed(c, m, given))
    }
    for sums in sums_of.values():
        assert sums.listed.nbytes == len(given.ks) * len(given.models) * -(-N_ITEMS // 8)
