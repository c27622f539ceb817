"""The work of one task of the evaluation, in numpy and without Spark.

Rows of users come in, and a few integer sums go out.

Everything about a user (segment, truths, lists) arrives as rows `user_idx, part, rank, item_idx`,
sorted by user. `part` says what a row is:

| `part` | what the row is |
|---|---|
| 0 = `SEGMENT_PART` | the user's segment: `item_idx` is its position in `SEGMENTS_OF_USERS` |
| 1 + mode | an item of the truth in that mode; `rank` is 1 |
| 1 + n_modes + mode × n_models + model | an item of that model's list in that mode, at `rank` |

Modes and models are counted from 0, in the order of `Plan`. An example with the modes (`novel`,
`repeat`) and the models (`als`, `ease`): user 7 is `heavy`, acts on the items 30 and 31 after the
cutoff, of which 31 is new to the user, and gets the `novel` list (31, 40) from `ease`. The rows are

| `user_idx` | `part` | `rank` | `item_idx` | |
|---|---|---|---|---|
| 7 | 0 | 1 | 2 | segment: `SEGMENTS_OF_USERS[2]` is `heavy` |
| 7 | 1 | 1 | 31 | truth in `novel` |
| 7 | 2 | 1 | 30 | truth in `repeat` |
| 7 | 2 | 1 | 31 | truth in `repeat` |
| 7 | 4 | 1 | 31 | `novel` list of `ease`: 1 + 2 modes + 0 × 2 models + 1 |
| 7 | 4 | 2 | 40 | the same list |

A user without a row of part 0 is outside the population, and the user's lists are not read.
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
# Each user is in one of these segments: the `activity` in `user_features`, or `cold` for a user
# without an event before the cutoff.
SEGMENTS_OF_USERS = ("light", "regular", "heavy", "cold")
SEGMENT_PART = 0  # the `part` of the row with a user's segment
CHUNK_ROWS = 1 << 18  # rows scored together: about 1,000 users with 12 lists of 20

# A row per mode and segment, with the bytes of `Sums.columns` and of `Sums.listed`.
SUMS = "mode int, segment int, sums binary, listed binary"


@dataclass(frozen=True)
class Plan:
    """What every task is given: what to score, against what, and how many replicates to draw."""

    models: tuple[str, ...]
    modes: tuple[str, ...]
    ks: tuple[int, ...]
    catalogue: Catalogue
    n_bootstrap: int
    seed: int

    @property
    def longest(self) -> int:
        """Length of the longest list that is scored: ranks above it are not read."""
        return max(self.ks)

    def truth_part(self, mode: int) -> int:
        """Return the `part` of the truth in `mode`."""
        return SEGMENT_PART + 1 + mode

    def first_list_part(self, mode: int) -> int:
        """Return the `part` of the first model's list in `mode`; the other models' parts follow."""
        return SEGMENT_PART + 1 + len(self.modes) + mode * len(self.models)

    @property
    def listed_shape(self) -> tuple[int, int, int]:
        """Shape of `Sums.listed`: a bit per item, in whole bytes."""
        return len(self.ks), len(self.models), -(-len(self.catalogue) // 8)


@dataclass
class Sums:
    """Sums over the users of one mode and segment.

    Parameters
    ----------
    columns : int64 (1 + n_bootstrap, n_columns). Row 0 has the plain sums, and each further row
        those of one bootstrap replicate. The columns are, in this order: the sum of each metric
        × k × model, in `STEP`s; for each list metric × k × model, the users for whom it is defined;
        the users; the truth items that are not in the catalogue.
    listed : uint8 (n_ks, n_models, ceil(n_items / 8)): bits as `np.packbits` lays them, set where
        the item is among the first k of some list
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
            np.zeros(plan.listed_shape, np.uint8),
        )

    @classmethod
    def unpack(cls, sums: bytes, listed: bytes, plan: Plan) -> Sums:
        """Return the sums of a row of `SUMS`."""
        return cls(
            np.frombuffer(sums, np.int64).reshape(1 + plan.n_bootstrap, -1),
            np.frombuffer(listed, np.uint8).reshape(plan.listed_shape),
        )

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.columns + other.columns, self.listed | other.listed)

    def is_listed(self, k: int, model: int, plan: Plan) -> Array:
        """Return whether each item is in a list, bool (n_items,).

        `k` and `model` are positions in `plan.ks` and `plan.models`.
        """
        return np.unpackbits(self.listed[k, model], count=len(plan.catalogue)).astype(bool)

    @property
    def n_users(self) -> int:
        """Number of users in the population."""
        return int(self.columns[0, -2])

    @property
    def n_cold_items(self) -> int:
        """Number of pairs of a user and a truth item that is not in the catalogue."""
        return int(self.columns[0, -1])

    @property
    def counts(self) -> Array:
        """Number of users of each mean, int64 (1 + n_bootstrap, n_metrics, n_ks, n_models)."""
        n_rows, (n_ks, n_models) = len(self.columns), self.listed.shape[:2]
        list_metric_counts = self.columns[:, len(METRICS) * n_ks * n_models : -2]
        n_users = self.columns[:, -2].reshape(n_rows, 1, 1, 1)
        return np.concatenate(
            [
                np.broadcast_to(n_users, (n_rows, len(TRUTH_METRICS), n_ks, n_models)),
                list_metric_counts.reshape(n_rows, len(LIST_METRICS), n_ks, n_models),
            ],
            axis=1,
        )

    @property
    def means(self) -> Array:
        """Mean of each metric over its users, float64, shaped as `counts`; NaN without users."""
        counts = self.counts
        values = self.columns[:, : counts[0].size].reshape(counts.shape) * STEP
        return np.divide(values, counts, out=np.full(counts.shape, np.nan), where=counts > 0)


def sum_users(batches: Iterable[pa.RecordBatch], plan: Plan) -> Iterator[pa.RecordBatch]:
    """Yield `SUMS`, a row per mode and segment of this task's users.

    `batches` are rows as the docstring of the module describes them, sorted by user. Memory: the
    sums, about `CHUNK_ROWS` rows, and the weights of `BLOCK_USERS` users. At 1 million items and 27
    models, `Sums.listed` takes 3.4 MB per mode, segment and k.
    """
    sums_of: dict[tuple[int, int], Sums] = {}  # by (mode, segment)
    for rows in whole_users(batches):
        _add_users(rows, plan, sums_of)
    for (mode, segment), sums in sums_of.items():
        yield _pack(mode, segment, sums.columns, sums.listed)


def add_up(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield `SUMS`, one row per mode and segment: the sum of its rows in `batches`."""
    sums_of: dict[tuple[int, int], tuple[Array, Array]] = {}
    for batch in batches:
        for row in batch.to_pylist():
            key = row["mode"], row["segment"]
            sums = np.frombuffer(row["sums"], np.int64)
            listed = np.frombuffer(row["listed"], np.uint8)
            if key in sums_of:
                sums, listed = sums + sums_of[key][0], listed | sums_of[key][1]
            sums_of[key] = sums, listed
    for (mode, segment), (sums, listed) in sums_of.items():
        yield _pack(mode, segment, sums, listed)


def whole_users(batches: Iterable[pa.RecordBatch]) -> Iterator[dict[str, Array]]:
    """Yield columns of about `CHUNK_ROWS` rows at a time; the rows of a user stay together."""
    pending_batches: list[pa.RecordBatch] = []
    n_rows = 0
    for batch in batches:
        pending_batches.append(batch)
        n_rows += batch.num_rows
        if n_rows < CHUNK_ROWS:
            continue
        table = pa.Table.from_batches(pending_batches)
        user_idx = table.column("user_idx").to_numpy()
        last_user = int(np.searchsorted(user_idx, user_idx[-1]))  # further rows may follow
        if last_user:
            yield _columns(table.slice(0, last_user))
        pending_batches = table.slice(last_user).to_batches()
        n_rows -= last_user
    if n_rows:
        yield _columns(pa.Table.from_batches(pending_batches))


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


def _add_users(rows: dict[str, Array], plan: Plan, sums_of: dict[tuple[int, int], Sums]) -> None:
    """Add the users in `rows`, with all their lists, to the sums of their mode and segment."""
    users, segment, entries = _population(rows, plan)
    scored = [_score(mode, entries, len(users), plan) for mode in range(len(plan.modes))]
    for begin in range(0, len(users), BLOCK_USERS):
        block = slice(begin, begin + BLOCK_USERS)
        weights = poisson_weights(users[block], plan.n_bootstrap, plan.seed)
        for mode, (items, columns) in enumerate(scored):
            for code in np.unique(segment[block]):
                is_in_segment = segment[block] == code
                sums = sums_of.setdefault((mode, int(code)), Sums.zero(plan))
                sums.columns += replicate_sums(
                    weights[is_in_segment], columns[block][is_in_segment]
                )
                _mark_listed(sums.listed, items[block][is_in_segment], plan.ks)


@dataclass(frozen=True)
class _Entries:
    """The items of all truths and lists of some users; arrays of one length.

    Parameters
    ----------
    user : int64, position of the user among those users
    part, rank : as in the rows (see the docstring of the module)
    item : int32, position in the catalogue; `NOTHING` for an item that is not in it
    """

    user: Array
    part: Array
    rank: Array
    item: Array


def _population(rows: dict[str, Array], plan: Plan) -> tuple[Array, Array, _Entries]:
    """Return user_idx (n,) and segment (n,) of the users in the population, and their entries.

    The users are in the order of `rows`. `segment` holds positions in `SEGMENTS_OF_USERS`.
    """
    user_idx, part = rows["user_idx"], rows["part"]
    is_first = np.concatenate([[True], user_idx[1:] != user_idx[:-1]])
    user = np.cumsum(is_first) - 1  # position among all users of `rows`
    segment = np.full(user[-1] + 1, -1)
    is_segment = part == SEGMENT_PART
    segment[user[is_segment]] = rows["item_idx"][is_segment]
    is_member = segment >= 0  # any other user has a list, but is not in the population
    is_entry = is_member[user] & ~is_segment
    position_of_member = np.cumsum(is_member) - 1
    entries = _Entries(
        position_of_member[user[is_entry]],
        part[is_entry],
        rows["rank"][is_entry],
        plan.catalogue.positions(rows["item_idx"][is_entry]),
    )
    return user_idx[is_first][is_member], segment[is_member], entries


def _score(mode: int, entries: _Entries, n_users: int, plan: Plan) -> tuple[Array, Array]:
    """Return the listed items (n_users, n_models, longest), and each user's columns of `Sums`.

    A user without a truth item in the catalogue is not in the population of the mode: no items, and
    0 in every column but the last, which counts the truth items outside the catalogue.
    """
    n_models = len(plan.models)
    user, item = entries.user, entries.item
    in_truth = entries.part == plan.truth_part(mode)
    in_known_truth = in_truth & (item != NOTHING)
    n_truth = np.bincount(user[in_known_truth], minlength=n_users)
    n_cold_items = np.bincount(user[in_truth & ~in_known_truth], minlength=n_users)

    model = entries.part - plan.first_list_part(mode)
    in_list = (model >= 0) & (model < n_models) & (item != NOTHING) & (n_truth[user] > 0)
    cell = user[in_list], model[in_list], entries.rank[in_list] - 1
    items = np.full((n_users, n_models, plan.longest), NOTHING, np.int32)
    items[cell] = item[in_list]
    pair = user * len(plan.catalogue) + item
    hits = np.zeros(items.shape, bool)
    hits[cell] = np.isin(pair[in_list], pair[in_known_truth])

    block = Block(
        items.reshape(-1, plan.longest),
        hits.reshape(-1, plan.longest),
        np.repeat(np.maximum(n_truth, 1), n_models),
        plan.catalogue,
    )
    values, is_defined = [], []
    for name, metric in METRICS.items():
        for k in plan.ks:
            value = metric(block, k).reshape(n_users, n_models)
            values.append(to_steps(value))
            if name in LIST_METRICS:
                is_defined.append(~np.isnan(value))
    columns = [*values, *is_defined, n_truth[:, None] > 0, n_cold_items[:, None]]
    return items, np.concatenate(columns, axis=1)


def _mark_listed(listed: Array, items: Array, ks: tuple[int, ...]) -> None:
    """Set the bits of `items` (n_users, n_models, longest) in `listed`; see `Sums`.

    Example with 20 items: each model has 3 bytes, which are 24 bits. The bit of item 10 of model 1
    has the position 1 * 24 + 10 = 34. This is bit 2 of byte 4, with the value 128 >> 2 = 32.
    """
    _, n_models, n_bytes = listed.shape
    for bits_of_k, k in zip(listed, ks):
        top_items = items[:, :, :k]
        model = np.broadcast_to(np.arange(n_models)[:, None], top_items.shape)
        is_item = top_items != NOTHING
        bit_position = np.unique(model[is_item] * (8 * n_bytes) + top_items[is_item])
        if len(bit_position) == 0:
            continue
        byte, bit_value = bit_position // 8, (128 >> (bit_position % 8)).astype(np.uint8)
        is_first = np.concatenate([[True], byte[1:] != byte[:-1]])  # first bit of its byte
        byte_values = np.bitwise_or.reduceat(bit_value, np.flatnonzero(is_first))
        bits_of_k.reshape(-1)[byte[is_first]] |= byte_values
