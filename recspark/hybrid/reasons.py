"""Reasons: for each row of a list, the user's own items that speak most for it, with shares.

A retriever whose scores are sums over the user's items (`ContributingScorer`) gives the reasons of
its own rows. The rows of other models have the reasons of such a retriever: see `speakers_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from recspark import schema
from recspark.data.blocks import Array, QueryBlock, local_index, parse_queries
from recspark.models.base import RetrieverModel
from recspark.models.scoring import memory, topk
from recspark.models.scoring.contributions import contributing, strongest

# Memory for each contribution of a slice of users: the entries, their values and three sorted
# copies. Guess.
_ENTRY_BYTES = 64

_KEPT = "kept_because"  # the column of reasons that stand already
# For each model of the lists: groups of retrievers, tried in this order, until one gives a reason.
# Of a group, the retriever speaks that ranks the item best among the user's rows of the model.
Speakers = Mapping[str, tuple[tuple[str, ...], ...]]


@dataclass(frozen=True)
class Voice:
    """A retriever that can speak for a row: its vocabulary, int32 ascending, and its scorer."""

    items: Array
    scorer: topk.Scorer | topk.ListScorer

    @classmethod
    def of(cls, model: RetrieverModel) -> Voice | None:
        """Return the voice of `model`; None if its scores are not sums over the user's items."""
        scorer = model.scorer()
        return None if contributing(scorer) is None else cls(model.items, scorer)


@dataclass(frozen=True)
class Reasons:
    """The reasons of p rows.

    Row j has the reasons `start[j]:start[j + 1]` of `item_idx` (int32) and `share` (float64), the
    strongest first; see `strongest`. `speaker[j]` is the name of the retriever that gave them, ""
    where the row has none.
    """

    start: Array
    item_idx: Array
    share: Array
    speaker: list[str]


def speakers_of(
    models: Sequence[str],
    voices: Sequence[str],
    retrievers_below: Callable[[str], Sequence[str]],
    is_personal: Callable[[str], bool],
    neighbours_model: str | None,
) -> Speakers:
    """Return which retrievers speak for the rows of each of `models`.

    Parameters
    ----------
    voices : the fitted retrievers that can speak
    retrievers_below : returns the retrievers that a model is built on; [] for a retriever
    is_personal : whether the lists of a model differ by user
    neighbours_model : `publish.neighbours_model`

    - A model that can speak speaks for itself alone.
    - For a ranker, those of its retrievers speak that can, and after them the model of neighbours.
    - For any other model, the model of neighbours speaks.
    - For a model whose lists are the same for all users, nobody speaks.

    >>> below = {"ranker": ["ease", "gru4rec", "als"]}
    >>> speakers_of(
    ...     ["ranker", "gru4rec", "popular"], ["ease", "als", "item_knn"],
    ...     lambda name: below.get(name, []), lambda name: name != "popular", "item_knn"
    ... )
    {'ranker': (('ease', 'als'), ('item_knn',)), 'gru4rec': (('item_knn',),), 'popular': ()}
    """
    fallback = tuple(name for name in voices if name == neighbours_model)
    speakers: dict[str, tuple[tuple[str, ...], ...]] = {}
    for model in models:
        if model in voices:
            speakers[model] = ((model,),)
        elif not is_personal(model):
            speakers[model] = ()
        else:
            sources = tuple(name for name in retrievers_below(model) if name in voices)
            speakers[model] = tuple(group for group in (sources, fallback) if group)
    return speakers


def with_reasons(
    lists: DataFrame,
    queries: DataFrame,
    voices: Mapping[str, Voice],
    speakers: Speakers,
    names: pa.Table,
    n: int,
) -> DataFrame:
    """Return `lists` with the column `because` (`schema.BECAUSE`): at most `n` reasons of each row.

    Parameters
    ----------
    lists : user_idx, item_idx, model, and any other columns. A row whose `because` is there already
        (that of a kept list) keeps it
    queries : user_idx, history, a row per user; for a retriever that reads user features also a
        column `features_NAME`. A user without a row has no reasons
    voices : name -> retriever, of those that speak
    speakers : see `speakers_of`; rows of a model that is not among them have no reasons
    names : item_idx, item_id, item_name of all items, ascending by item_idx

    `because` is null where nothing speaks for the row. Shares: see `strongest`.

    One shuffle by user, of the lists and of the queries, no action. Lists that are partitioned by
    user already (as `ladder.fill` returns them) are not shuffled. `names` and the voices are
    broadcast. Beside the rows of a batch, a task holds about `memory.block_bytes()`, or what the
    rows of one user take if that is more.
    """
    if "because" in lists.columns:
        explained = with_reasons(
            lists.withColumnRenamed("because", _KEPT), queries, voices, speakers, names, n
        )
        return explained.withColumn("because", F.coalesce(_KEPT, "because")).select(*lists.columns)
    columns = [name for name in lists.columns if name != "user_idx"]
    of_user = lists.groupBy("user_idx").agg(F.collect_list(F.struct(*columns)).alias("rows"))
    rows = of_user.join(queries, on="user_idx", how="left").withColumn(
        "seen", F.array().cast(schema.ITEM_IDXS)
    )
    result = StructType([*lists.select("user_idx", *columns).schema]).add("because", schema.BECAUSE)
    shared = lists.sparkSession.sparkContext.broadcast((dict(voices), dict(speakers), names))

    def explain(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        voices, speakers, names = shared.value
        name_idx = names.column("item_idx").to_numpy()
        for batch in batches:
            lengths = batch.column("rows").value_lengths().to_numpy(zero_copy_only=False)
            row = np.repeat(np.arange(batch.num_rows), lengths)
            listed = batch.column("rows").flatten()
            models = listed.field("model")
            if _KEPT in columns:  # no model speaks for a row that has its reasons
                models = pc.if_else(listed.field(_KEPT).is_valid(), None, models)
            features = {
                name: batch.column(f"features_{name}")
                for name in voices
                if batch.schema.get_field_index(f"features_{name}") >= 0
            }
            reasons = reasons_of(
                parse_queries(batch),
                row,
                listed.field("item_idx").to_numpy(),
                models.to_pylist(),
                voices,
                speakers,
                n,
                features,
            )
            named = names.take(pa.array(np.searchsorted(name_idx, reasons.item_idx)))
            yield pa.RecordBatch.from_arrays(
                [
                    batch.column("user_idx").take(pa.array(row)),
                    *(listed.field(name) for name in columns),
                    because_column(reasons, named),
                ],
                names=result.names,
            )

    return rows.mapInArrow(explain, result)


def because_column(reasons: Reasons, named: pa.Table) -> pa.ListArray:
    """Return the column `because` of rows with `reasons`; null where a row has none.

    `named` : item_id and item_name of each of `reasons.item_idx`
    """
    structs = pa.StructArray.from_arrays(
        [
            named.column("item_id").combine_chunks().cast(pa.string()),
            named.column("item_name").combine_chunks().cast(pa.string()),
            pa.array(reasons.share, pa.float32()),
        ],
        names=schema.REASON.names,
    )
    # A null offset makes the list that begins there null; the last offset must not be null.
    is_null = np.append(np.diff(reasons.start) == 0, False)
    return pa.ListArray.from_arrays(pa.array(reasons.start, pa.int32(), mask=is_null), structs)


def reasons_of(
    block: QueryBlock,
    row: Array,
    item_idx: Array,
    models: Sequence[str | None],
    voices: Mapping[str, Voice],
    speakers: Speakers,
    n: int,
    features: Mapping[str, pa.StructArray] | None = None,
) -> Reasons:
    """Return the reasons of p listed items, at most `n` for each.

    Parameters
    ----------
    block : the users' queries
    row : int64 (p,), ascending: the row of `block` of each listed item
    item_idx, models : of each listed item, and the model that listed it; None = nobody speaks
    voices, speakers : which retrievers speak for the rows of a model
    features : name of a retriever -> the user features that it reads, a row per query
    """
    n_rows = len(row)
    speaker = np.full(n_rows, "", object)
    counts = np.zeros(n_rows, np.int64)
    parts: list[tuple[Array, Array, Array]] = []  # of each reason: its row, item_idx and share
    models_of_rows = np.array(models, object)
    n_groups = max((len(groups) for groups in speakers.values()), default=0)

    def query_of(name: str) -> QueryBlock:
        return replace(block, features=features[name]) if features and name in features else block

    for nth in range(n_groups):
        chosen = np.full(n_rows, "", object)
        for model, groups in speakers.items():
            open_rows = np.flatnonzero((models_of_rows == model) & (counts == 0))
            if len(groups) <= nth or not len(open_rows):
                continue
            if len(groups[nth]) == 1:
                chosen[open_rows] = groups[nth][0]
                continue
            group_voices = {name: (query_of(name), voices[name]) for name in groups[nth]}
            chosen[open_rows] = best_ranking(group_voices, row[open_rows], item_idx[open_rows])
        for name in sorted({*chosen} - {""}):
            rows_of_voice = np.flatnonzero(chosen == name)
            of_rows, own_item_idx, share = _spoken(
                query_of(name), voices[name], row[rows_of_voice], item_idx[rows_of_voice], n
            )
            parts.append((rows_of_voice[of_rows], own_item_idx, share))
            counts += np.bincount(parts[-1][0], minlength=n_rows)
            speaker[np.unique(parts[-1][0])] = name
    if not parts:
        parts = [(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0))]
    of_rows, own_item_idx, share = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.argsort(of_rows, kind="stable")  # the reasons of a row are together, in order
    start = np.concatenate([[0], np.cumsum(counts)])
    return Reasons(start, own_item_idx[order], share[order], speaker.tolist())


def best_ranking(
    voices: Mapping[str, tuple[QueryBlock, Voice]], row: Array, item_idx: Array
) -> Array:
    """Return for each of p listed items the name of the retriever that ranks it best, object (p,).

    A retriever ranks the listed items of a user by its own scores; of equal scores, the smaller
    item comes first. Of retrievers that give the same rank, the first one of `voices` is taken. ""
    where no retriever has a score.
    """
    best_rank = np.full(len(row), np.inf)
    best_name = np.full(len(row), "", object)
    for name, (block, voice) in voices.items():
        score, has_score = topk.pair_scores(block, voice.items, voice.scorer, row, item_idx)
        order = np.lexsort((item_idx, np.where(has_score, -score, np.inf), row))
        rank = np.empty(len(row))
        rank[order] = np.arange(len(row)) - np.searchsorted(row, row)
        is_better = has_score & (rank < best_rank)
        best_rank[is_better], best_name[is_better] = rank[is_better], name
    return best_name


def _spoken(
    block: QueryBlock, voice: Voice, row: Array, item_idx: Array, n: int
) -> tuple[Array, Array, Array]:
    """Return the reasons that one retriever gives: (row of each reason, item_idx, share).

    The row of a reason is a position in `row`. Users are taken in slices of bounded memory.
    """
    _, has_score = topk.pair_scores(block, voice.items, voice.scorer, row, item_idx)
    pairs = np.flatnonzero(has_score)
    scorer = contributing(voice.scorer)
    assert scorer is not None
    pairs_of_row = np.bincount(row[pairs], minlength=len(block))
    n_entries = np.cumsum(pairs_of_row * np.diff(block.history.start))
    most_entries = memory.block_bytes() // _ENTRY_BYTES
    parts = []
    begin = 0
    while begin < len(block):
        entries_before = n_entries[begin - 1] if begin else 0
        end = int(np.searchsorted(n_entries, entries_before + most_entries, side="right"))
        end = max(begin + 1, end)
        in_slice = pairs[slice(*np.searchsorted(row[pairs], [begin, end]))]
        if len(in_slice):
            local = local_index(voice.items, item_idx[in_slice])
            given = scorer.contributions(
                block.part(slice(begin, end)), row[in_slice] - begin, local
            )
            start, own_items, share = strongest(given, n)
            of_pairs = np.repeat(in_slice, np.diff(start))
            parts.append((of_pairs, voice.items[own_items], share))
        begin = end
    if not parts:
        return np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0)
    of_pairs, own_item_idx, share = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return of_pairs, own_item_idx, share
