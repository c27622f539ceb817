"""What a task of the evaluation does: rows of whole users in, a few integer sums out. No Spark.

All that is known of a user arrives as rows `user_idx, part, rank, item_idx`, sorted by user:

| part | rows |
|---|---|
| 0 | one, the user belongs to the population; `item_idx` = position of the segment in `PARTS` |
| 1 + mode | the truth in that mode, a row per item |
| 1 + n_modes + mode × n_models + model | the list, a row per item |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from recspark.data.blocks import Array
from recspark.eval.metrics import LIST_METRICS, NOTHING, TRUTH_METRICS, Block, Catalogue
from recspark.eval.significance import (
    BLOCK_USERS,
    STEP,
    poisson_weights,
    replicate_sums,
    to_steps,
)

METRICS = {**TRUTH_METRICS, **LIST_METRICS}
# Each user is in one: `activity` of `user_features`, or cold = no event before the cutoff.
PARTS = ("light", "regular", "heavy", "cold")
HEADER = 0
CHUNK_ROWS = 1 << 18  # scored at a time: about 1,000 users with 12 lists of 20

SUMS = "mode int, segment int, sums binary, listed binary"


@dataclass(frozen=True)
class Plan:
    """What every task knows."""

    models: tuple[str, ...]
    modes: tuple[str, ...]
    ks: tuple[int, ...]
    catalogue: Catalogue
    n_bootstrap: int
    seed: int

    @property
    def room(self) -> int:
        """Ranks that are read."""
        return max(self.ks)

    def truth_part(self, mode: int) -> int:
        """Return the part of the truth in `mode`."""
        return 1 + mode

    def first_list_part(self, mode: int) -> int:
        """Return the part of the first model's list in `mode`."""
        return 1 + len(self.modes) + mode * len(self.models)


@dataclass
class Sums:
    """Sums over the users of one mode and segment.

    Parameters
    ----------
    columns : int64 (1 + n_bootstrap, n_columns); row 0 plain, then a row per replicate. Columns:
        metric × k × model, in `STEP`s; list metric × k × model, users for whom it is defined;
        users; truth items that are not in the catalogue.
    listed : bool (n_ks, n_models, n_items): the item is in the first k of some list
    """

    columns: Array
    listed: Array

    @classmethod
    def zero(cls, plan: Plan) -> Sums:
        """Return the sums over no user."""
        cells = len(plan.ks) * len(plan.models)
        n_columns = (len(METRICS) + len(LIST_METRICS)) * cells + 2
        return cls(
            np.zeros((1 + plan.n_bootstrap, n_columns), np.int64),
            np.zeros((len(plan.ks), len(plan.models), len(plan.catalogue)), bool),
        )

    @classmethod
    def unpack(cls, sums: bytes, listed: bytes, plan: Plan) -> Sums:
        """Return what `pack` was given."""
        zero = cls.zero(plan)
        bits = np.unpackbits(np.frombuffer(listed, np.uint8), count=zero.listed.size)
        return cls(
            np.frombuffer(sums, np.int64).reshape(zero.columns.shape),
            bits.astype(bool).reshape(zero.listed.shape),
        )

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.columns + other.columns, self.listed | other.listed)

    @property
    def n_users(self) -> int:
        """Users of the population."""
        return int(self.columns[0, -2])

    @property
    def n_cold_items(self) -> int:
        """Pairs of a user and a truth item that is not in the catalogue."""
        return int(self.columns[0, -1])

    @property
    def counts(self) -> Array:
        """int64 (1 + n_bootstrap, n_metrics, n_ks, n_models): users that a mean is over."""
        n_rows, (n_ks, n_models) = len(self.columns), self.listed.shape[:2]
        of_lists = self.columns[:, len(METRICS) * n_ks * n_models : -2]
        users = self.columns[:, -2].reshape(n_rows, 1, 1, 1)
        return np.concatenate(
            [
                np.broadcast_to(users, (n_rows, len(TRUTH_METRICS), n_ks, n_models)),
                of_lists.reshape(n_rows, len(LIST_METRICS), n_ks, n_models),
            ],
            axis=1,
        )

    @property
    def means(self) -> Array:
        """float64, shaped as `counts`: mean of each metric; NaN over no user."""
        counts = self.counts
        values = self.columns[:, : counts[0].size].reshape(counts.shape) * STEP
        return np.divide(values, counts, out=np.full(counts.shape, np.nan), where=counts > 0)


def sum_users(batches: Iterable[pa.RecordBatch], plan: Plan) -> Iterator[pa.RecordBatch]:
    """Yield `SUMS`, a row per mode and segment of this task's users.

    `batches` are rows as above, sorted by user. Memory: the sums, about `CHUNK_ROWS` rows, and the
    weights of `BLOCK_USERS` users.
    """
    found: dict[tuple[int, int], Sums] = {}
    for rows in whole_users(batches):
        _add_users(rows, plan, found)
    for (mode, segment), sums in found.items():
        yield _pack(mode, segment, sums.columns, np.packbits(sums.listed))


def add_up(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield `SUMS`, the rows of each mode and segment added up."""
    found: dict[tuple[int, int], tuple[Array, Array]] = {}
    for batch in batches:
        for row in batch.to_pylist():
            key = row["mode"], row["segment"]
            sums = np.frombuffer(row["sums"], np.int64)
            listed = np.frombuffer(row["listed"], np.uint8)
            if key in found:
                sums, listed = sums + found[key][0], listed | found[key][1]
            found[key] = sums, listed
    for (mode, segment), (sums, listed) in found.items():
        yield _pack(mode, segment, sums, listed)


def whole_users(batches: Iterable[pa.RecordBatch]) -> Iterator[dict[str, Array]]:
    """Yield columns of about `CHUNK_ROWS` rows at a time; the rows of a user stay together."""
    held: list[pa.RecordBatch] = []
    n_rows = 0
    for batch in batches:
        held.append(batch)
        n_rows += batch.num_rows
        if n_rows < CHUNK_ROWS:
            continue
        table = pa.Table.from_batches(held)
        user_idx = table.column("user_idx").to_numpy()
        whole = int(np.searchsorted(user_idx, user_idx[-1]))  # the last user may go on
        if whole:
            yield _columns(table.slice(0, whole))
        held = table.slice(whole).to_batches()
        n_rows -= whole
    if n_rows:
        yield _columns(pa.Table.from_batches(held))


def _columns(table: pa.Table) -> dict[str, Array]:
    return {name: table.column(name).to_numpy() for name in table.column_names}


def _pack(mode: int, segment: int, sums: Array, listed: Array) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [
            pa.array([mode], pa.int32()),
            pa.array([segment], pa.int32()),
            pa.array([sums.tobytes()], pa.binary()),
            pa.array([listed.tobytes()], pa.binary()),
        ],
        names=["mode", "segment", "sums", "listed"],
    )


def _add_users(rows: dict[str, Array], plan: Plan, found: dict[tuple[int, int], Sums]) -> None:
    """Add all lists of the users in `rows` to `found`."""
    user_idx, part = rows["user_idx"], rows["part"]
    first = np.concatenate([[True], user_idx[1:] != user_idx[:-1]])
    row = np.cumsum(first) - 1
    segment = np.full(row[-1] + 1, -1)
    segment[row[part == HEADER]] = rows["item_idx"][part == HEADER]
    wanted = segment >= 0  # the others have a list, but are not in the population
    users, segment = user_idx[first][wanted], segment[wanted]
    kept = wanted[row] & (part != HEADER)
    row = (np.cumsum(wanted) - 1)[row[kept]]
    part, rank = part[kept], rows["rank"][kept]
    item = plan.catalogue.positions(rows["item_idx"][kept])

    scored = [
        _score(mode, row, part, rank, item, len(users), plan) for mode in range(len(plan.modes))
    ]
    for begin in range(0, len(users), BLOCK_USERS):
        block = slice(begin, begin + BLOCK_USERS)
        weights = poisson_weights(users[block], plan.n_bootstrap, plan.seed)
        for mode, (items, columns) in enumerate(scored):
            for code in np.unique(segment[block]):
                mine = segment[block] == code
                total = found.setdefault((mode, int(code)), Sums.zero(plan))
                total.columns += replicate_sums(weights[mine], columns[block][mine])
                _mark_listed(total.listed, items[block][mine], plan.ks)


def _score(
    mode: int, row: Array, part: Array, rank: Array, item: Array, n_users: int, plan: Plan
) -> tuple[Array, Array]:
    """Return the listed items (n_users, n_models, room), and each user's columns of `Sums`.

    A user without truth in this mode has no items and no figures: not in its population.
    """
    n_models = len(plan.models)
    in_truth = part == plan.truth_part(mode)
    known = in_truth & (item != NOTHING)
    n_truth = np.bincount(row[known], minlength=n_users)
    n_cold_items = np.bincount(row[in_truth & ~known], minlength=n_users)

    model = part - plan.first_list_part(mode)
    listed = (model >= 0) & (model < n_models) & (item != NOTHING) & (n_truth[row] > 0)
    place = row[listed], model[listed], rank[listed] - 1
    items = np.full((n_users, n_models, plan.room), NOTHING, np.int32)
    items[place] = item[listed]
    pair = row * len(plan.catalogue) + item
    hits = np.zeros(items.shape, bool)
    hits[place] = np.isin(pair[listed], pair[known])

    block = Block(
        items.reshape(-1, plan.room),
        hits.reshape(-1, plan.room),
        np.repeat(np.maximum(n_truth, 1), n_models),
        plan.catalogue,
    )
    values, defined = [], []
    for name, metric in METRICS.items():
        for k in plan.ks:
            value = metric(block, k).reshape(n_users, n_models)
            values.append(to_steps(value))
            if name in LIST_METRICS:
                defined.append(~np.isnan(value))
    columns = [*values, *defined, n_truth[:, None] > 0, n_cold_items[:, None]]
    return items, np.concatenate(columns, axis=1)


def _mark_listed(listed: Array, items: Array, ks: tuple[int, ...]) -> None:
    """Mark `items` (n_users, n_models, room) in `listed` (n_ks, n_models, n_items)."""
    model = np.broadcast_to(np.arange(items.shape[1])[:, None], items.shape)
    for at, k in enumerate(ks):
        top, of = items[:, :, :k], model[:, :, :k]
        there = top != NOTHING
        listed[at, of[there], top[there]] = True
