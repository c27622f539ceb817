"""User kNN: recommend the items that the most similar users acted on lately.

Two users are similar if they acted on the same items; the similarity is a cosine.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from pydantic import Field
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType
from scipy import sparse

from recspark import schema
from recspark.data.blocks import (
    Array,
    Histories,
    QueryBlock,
    local_index,
    micros,
    parse_histories,
)
from recspark.data.dataset import Dataset
from recspark.data.interactions import hash_sample
from recspark.errors import CatalogueTooLargeError
from recspark.models.base import NOTHING, Algorithm, ArraysModel, FitOptions, Needed, Settings
from recspark.models.scoring import memory, topk
from recspark.models.scoring.contributions import Contributions, entries_of_pairs
from recspark.models.scoring.listed import ListedScores, SlicedScores
from recspark.models.setting_types import HalfLifeDays
from recspark.models.weights import HistoryWeights

# Memory of the driver, while the index is built, for each entry (an item of a user): measured
_ENTRY_BYTES = 100
# Memory of a slice of queries for each pair of a query and a user (a similarity: a float64 and an
# int32), and for each pair of a query and an item (a vote: the same, and the list made of it)
_PAIR_BYTES, _VOTE_BYTES = 12, 20
_FLOATS = ArrayType(schema.FLOAT)
_USERS = schema.columns(
    user_idx=schema.LONG, items=schema.ITEM_IDXS, weights=_FLOATS, votes=_FLOATS
)


class UserKNNSettings(Settings):
    """Settings of `UserKNN`."""

    half_life_days: HalfLifeDays = Field(
        60.0,
        description="days, in the similarity of users: an event this old counts half; null = no "
        "decay. Source: bundled data",
    )
    vote_half_life_days: HalfLifeDays = Field(
        10.0,
        description="days, in the votes of the neighbours: an event this old counts half; null = "
        "no decay. Source: bundled data",
    )
    n_neighbours: int = Field(
        200,
        ge=1,
        description="k: this many of the most similar users vote. Source: bundled data",
        json_schema_extra={"tune": {"choices": [50, 100, 200, 400, 800]}},
    )
    max_users: int = Field(
        50_000,
        ge=1,
        description="largest neighbourhood, in users: of more users, a sample of about this many "
        "are compared with a query, which costs time in proportion to their number. Guess",
    )
    max_entries: int = Field(
        100_000_000,
        ge=1,
        description="largest index, in entries: the distinct items of all its users together. An "
        "entry takes about 100 bytes on the driver while the index is built (10 GB), and 24 in the "
        "artifact and on the workers. Guess",
    )


class UserKNNModel(ArraysModel):
    """A fitted `UserKNN`: the index of users.

    User u of the index (a position, not a user_idx) has the votes `votes[user_start[u]:
    user_start[u + 1]]` (float64) for the local items at the same places of `user_items` (int32,
    ascending). Item i is in the unit vectors of the users at the places `item_start[i]:
    item_start[i + 1]` of `item_users` (int32, ascending), and `units` (float64) holds its
    coordinate in each of these vectors. `user_idx` (int64, ascending) is the user_idx of each user.
    Both starts are int64.

    An entry of the index takes 24 bytes: 12 in each of the two halves.
    """

    settings: UserKNNSettings

    def scorer(self) -> topk.ListScorer:
        """See `RetrieverModel`."""
        return UserKNNScorer(self.settings, micros(self.cutoff), self.items, self.shared_arrays())


@dataclass(frozen=True)
class UserKNNScorer:
    """Compares each query with the users of the index, and adds up the votes of the nearest ones.

    `as_of` : the time at which an event has age 0, in microseconds since 1970 UTC. `items` int32
    (n_items,), ascending: the vocabulary. `arrays` : see `UserKNNModel`.
    """

    settings: UserKNNSettings
    as_of: int
    items: Array
    arrays: dict[str, topk.Shared]

    def score(self, block: QueryBlock) -> SlicedScores:
        """See `topk.ListScorer`.

        The queries are taken in slices. The similarities of a slice, and its votes, take at most
        `memory.block_bytes()` each, or those of one query if they take more. A query has at most
        `n_neighbours` times the votes of the user with most of them.
        """
        users_of_items, votes_of_users = self._index
        queries, own_position = self._queries(block), self._own_position(block)
        n_items = len(self.items)

        def score_rows(rows: slice) -> ListedScores:
            neighbours = nearest_users(
                queries[rows] @ users_of_items, own_position[rows], self.settings.n_neighbours
            )
            votes = neighbours @ votes_of_users
            votes.sort_indices()
            return ListedScores(
                votes.indptr.astype(np.int64),
                votes.indices.astype(np.int32),
                votes.data.astype(np.float32),
                n_items,
            )

        n_users, n_items = votes_of_users.shape
        most_votes = int(np.diff(votes_of_users.indptr).max(initial=0))
        most_listed = min(n_items, self.settings.n_neighbours * most_votes)
        bytes_of_query = max(_PAIR_BYTES * n_users, _VOTE_BYTES * most_listed, 1)
        rows_at_once = max(1, memory.block_bytes() // bytes_of_query)
        return SlicedScores(len(block), rows_at_once, score_rows)

    def contributions(self, block: QueryBlock, rows: Array, items: Array) -> Contributions:
        """See `ContributingScorer`.

        Item j adds its share of the similarities of the neighbours, times their votes: the sum over
        the neighbours v of the products of the coordinates of j in the unit vectors of the user and
        of v, times vote(v, i).
        """
        queries = self._queries(block)
        start = queries.indptr.astype(np.int64)
        start_of_pairs, entries = entries_of_pairs(start, rows)
        users_of_items, votes_of_users = self._index
        values = np.zeros(len(entries))
        for first_row, neighbours in self._neighbours(block, queries):
            pair_start = np.searchsorted(rows, first_row + np.arange(neighbours.shape[0] + 1))
            for n, (begin, end) in enumerate(itertools.pairwise(pair_start)):
                if begin == end:
                    continue
                users = neighbours.indices[neighbours.indptr[n] : neighbours.indptr[n + 1]]
                own = slice(start[first_row + n], start[first_row + n + 1])
                units = users_of_items[queries.indices[own]][:, users]  # (own items, neighbours)
                votes = votes_of_users[users][:, items[begin:end]]  # (neighbours, pairs)
                of_row = queries.data[own][:, None] * (units @ votes).toarray()
                values[start_of_pairs[begin] : start_of_pairs[end]] = of_row.T.ravel()
        return Contributions(
            start_of_pairs, queries.indices[entries].astype(np.int32), values, np.zeros(len(rows))
        )

    def _queries(self, block: QueryBlock) -> sparse.csr_matrix:
        """Return the unit vector of each query, float64 (n, n_items), items ascending."""
        similarity_weights, _ = weights_of(self.settings, self.as_of)
        start, local, weights = similarity_weights.local(block.history, self.items)
        return unit_rows(
            sparse.csr_matrix((weights, local, start), shape=(len(block), len(self.items)))
        )

    def _neighbours(
        self, block: QueryBlock, queries: sparse.csr_matrix
    ) -> Iterator[tuple[int, sparse.csr_matrix]]:
        """Yield (first row, similarities of the nearest users) of each slice of the queries."""
        users_of_items, _ = self._index
        own_position = self._own_position(block)
        n_rows = max(1, memory.block_bytes() // (_PAIR_BYTES * max(users_of_items.shape[1], 1)))
        for begin in range(0, len(block), n_rows):
            rows = slice(begin, begin + n_rows)
            similarities = queries[rows] @ users_of_items
            yield (
                begin,
                nearest_users(similarities, own_position[rows], self.settings.n_neighbours),
            )

    def _own_position(self, block: QueryBlock) -> Array:
        """Return the position of each query's own user in the index; -1 where it lacks the user."""
        user_idx = np.asarray(self.arrays["user_idx"].array)
        if len(user_idx) == 0:
            return np.full(len(block), -1)
        return local_index(user_idx, block.user_idx)

    @cached_property
    def _index(self) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
        """The unit vectors, (n_items, n_users), and the votes of the users, (n_users, n_items)."""
        arrays = {name: np.asarray(shared.array) for name, shared in self.arrays.items()}
        n_items, n_users = len(self.items), len(arrays["user_idx"])
        return (
            sparse.csr_matrix(
                (arrays["units"], arrays["item_users"], arrays["item_start"]),
                shape=(n_items, n_users),
            ),
            sparse.csr_matrix(
                (arrays["votes"], arrays["user_items"], arrays["user_start"]),
                shape=(n_users, n_items),
            ),
        )


def nearest_users(
    similarities: sparse.csr_matrix, own_position: Array, k: int
) -> sparse.csr_matrix:
    """Return the k largest similarities of each row, users ascending.

    `similarities` (n, n_users), all stored values above 0. `own_position` int64 (n,): the user that
    is left out of each row; -1 = none. Of equal similarities, the smaller user comes first.

    >>> rows = sparse.csr_matrix([[0.5, 0.25, 0.0, 0.5, 0.75]])
    >>> nearest_users(rows, np.array([4]), 1).toarray()
    array([[0.5, 0. , 0. , 0. , 0. ]])
    """
    n_rows = len(own_position)
    row = np.repeat(np.arange(n_rows), np.diff(similarities.indptr))
    is_other = similarities.indices != own_position[row]
    row, user, similarity = (
        row[is_other],
        similarities.indices[is_other],
        similarities.data[is_other],
    )
    start = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=n_rows))])
    # The k-th largest similarity of each row that has more than k.
    kth_largest = np.full(n_rows, -np.inf)
    for long_row in np.flatnonzero(np.diff(start) > k):
        of_row = similarity[start[long_row] : start[long_row + 1]]
        kth_largest[long_row] = np.partition(of_row, len(of_row) - k)[len(of_row) - k]
    is_near = similarity >= kth_largest[row]  # more than k in a row where similarities are equal
    row, user, similarity = row[is_near], user[is_near], similarity[is_near]
    nearest_first = np.lexsort((user, -similarity, row))
    row, user, similarity = row[nearest_first], user[nearest_first], similarity[nearest_first]
    is_among_k = np.arange(len(row)) - np.searchsorted(row, row) < k
    row, user, similarity = row[is_among_k], user[is_among_k], similarity[is_among_k]
    by_user = np.lexsort((user, row))
    start = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=n_rows))])
    return sparse.csr_matrix((similarity[by_user], user[by_user], start), shape=similarities.shape)


class UserKNN(Algorithm[UserKNNSettings]):
    """Score of item i for user u = sum over the neighbours v of u of similarity(u, v) * vote(v, i).

    The neighbours are the `n_neighbours` users most similar to u, without u. similarity(u, v) is
    the cosine of the users' item weights, where an item weighs 0.5^(age / half_life_days), times
    the weight of its event. vote(v, i) is the same weight by `vote_half_life_days`. Of several
    events of an item, the heaviest decayed one counts.

    Source: Herlocker, Konstan, Borchers & Riedl 1999, "An Algorithmic Framework for Performing
    Collaborative Filtering" (user-based neighbourhood); decayed.
    """

    settings_class = UserKNNSettings

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> UserKNNModel:
        """See `Algorithm.fit`. Runs four Spark jobs, no shuffle of users.

        The driver holds the index, which has at most about `max_users` users, and while it is built
        their rows: about 100 bytes per entry. Of more users, a hash of user_idx and the seed draws
        the sample. Raises CatalogueTooLargeError before the rows are collected.
        """
        settings, items = self.settings, data.vocabulary()
        is_sampled = hash_sample(data.histories, settings.max_users, options.seed)
        histories = data.histories.where(is_sampled)
        n_entries = histories.agg(F.sum(F.size("seen"))).first()[0] or 0  # type: ignore[index]
        if n_entries > settings.max_entries:
            raise CatalogueTooLargeError(
                f"user_knn: the neighbourhood's users have {n_entries:,} items, max_entries is "
                f"{settings.max_entries:,}; lower models.user_knn.max_users, or raise max_entries "
                f"if the driver has {_ENTRY_BYTES * n_entries / 1e9:,.0f} GB to spare"
            )
        rows = users_with_weights(histories, items, settings, micros(data.cutoff)).toArrow()
        return UserKNNModel(settings, data.cutoff, items, build_index(rows, len(items)))


def weights_of(settings: UserKNNSettings, as_of: int) -> tuple[HistoryWeights, HistoryWeights]:
    """Return the rules that give the weights of the similarity, and those of the votes."""
    return (
        HistoryWeights(as_of, settings.half_life_days, "last"),
        HistoryWeights(as_of, settings.vote_half_life_days, "last"),
    )


def users_with_weights(
    histories: DataFrame, items: Array, settings: UserKNNSettings, as_of: int
) -> DataFrame:
    """Return `_USERS`: see `weighted_items`. `items` is the vocabulary. Lazy and narrow."""
    shared = histories.sparkSession.sparkContext.broadcast((items, weights_of(settings, as_of)))

    def weigh_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        vocabulary, rules = shared.value
        for batch in batches:
            history = parse_histories(batch.column("history"))
            yield weighted_items(batch.column("user_idx"), history, vocabulary, rules)

    return histories.select("user_idx", "history").mapInArrow(weigh_batches, _USERS)


def weighted_items(
    user_idx: pa.Array,
    history: Histories,
    items: Array,
    rules: tuple[HistoryWeights, HistoryWeights],
) -> pa.RecordBatch:
    """Return `_USERS`: of each row the local items, ascending, and both weights of each item.

    Items and users without a weight above 0 are left out. `items` int32 (n_items,) ascending is the
    vocabulary, and `rules` are those of `weights_of`.
    """
    similarity_weights, vote_weights = rules
    # Both rules give the same items of each row; only the weights differ.
    items_of_rows, weights = similarity_weights(history)
    _, votes = vote_weights(history)
    local = local_index(items, items_of_rows.values)
    is_kept = (local >= 0) & ((weights > 0) | (votes > 0))
    n_kept_before = np.concatenate([[0], np.cumsum(is_kept)])
    start = n_kept_before[items_of_rows.start].astype(np.int32)
    lists = [
        pa.ListArray.from_arrays(pa.array(start), pa.array(values[is_kept]))
        for values in (local.astype(np.int32), weights, votes)
    ]
    rows = pa.RecordBatch.from_arrays([user_idx, *lists], names=_USERS.names)
    return rows.filter(pa.array(np.diff(start) > 0))


def build_index(rows: pa.Table, n_items: int) -> dict[str, Array]:
    """Return the arrays of `UserKNNModel`, from `rows` of `_USERS` in any order."""
    rows = rows.sort_by("user_idx").combine_chunks()
    items, weights, votes = (
        rows.column(name).combine_chunks() for name in ("items", "weights", "votes")
    )
    lengths = items.value_lengths().to_numpy(zero_copy_only=False)
    start = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    # (n_users, n_items) each
    items_of_users, votes_of_users = (
        _without_zeros(start, items.flatten().to_numpy(), column.flatten().to_numpy(), n_items)
        for column in (weights, votes)
    )
    users_of_items = unit_rows(items_of_users).tocsc()
    return {
        "user_idx": rows.column("user_idx").to_numpy().astype(np.int64),
        "user_start": votes_of_users.indptr.astype(np.int64),
        "user_items": votes_of_users.indices.astype(np.int32),
        "votes": votes_of_users.data,
        "item_start": users_of_items.indptr.astype(np.int64),
        "item_users": users_of_items.indices.astype(np.int32),
        "units": users_of_items.data,
    }


def _without_zeros(start: Array, items: Array, weights: Array, n_items: int) -> sparse.csr_matrix:
    """Return the rows as a float64 matrix, without the entries that weigh 0 or less.

    Row r has the items and weights at `start[r]:start[r + 1]`. A weight is 0 where the event is so
    old that its decayed weight is 0 in float32.
    """
    is_kept = weights > 0
    n_kept_before = np.concatenate([[0], np.cumsum(is_kept)])
    return sparse.csr_matrix(
        (weights[is_kept].astype(np.float64), items[is_kept], n_kept_before[start]),
        shape=(len(start) - 1, n_items),
    )


def unit_rows(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return the rows of `matrix` scaled to length 1, in float64; an empty row stays empty.

    No stored value is 0. The squares of a row are added up in the order of its entries, whatever the
    other rows hold.

    >>> unit_rows(sparse.csr_matrix([[3.0, 0.0, 4.0], [0.0, 0.0, 0.0]])).toarray()
    array([[0.6, 0. , 0.8],
           [0. , 0. , 0. ]])
    """
    n_rows = matrix.shape[0]
    row = np.repeat(np.arange(n_rows), np.diff(matrix.indptr))
    weights = matrix.data.astype(np.float64)
    length = np.sqrt(np.bincount(row, weights * weights, n_rows))
    return sparse.csr_matrix((weights / length[row], matrix.indices, matrix.indptr), matrix.shape)
