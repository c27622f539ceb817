"""The checks of all models, and those of retrievers. Each check runs on one fitted model.

A check that fails raises AssertionError. `recspark.testing.contract` has the checks of all kinds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from pyspark.sql import functions as F

from recspark import schema, storage
from recspark.data.blocks import Array, parse_queries
from recspark.errors import ArtifactError, ConfigError, ModelError
from recspark.models import artifacts
from recspark.models.base import RetrieverModel
from recspark.models.scoring import topk
from recspark.models.scoring.contributions import SUM_TOLERANCE, contributing
from recspark.models.vectors.scoring import unit_rows
from recspark.testing import synth
from recspark.testing.case import BaseCase, Case, K, ordered
from recspark.testing.check import check, job_group, raises
from recspark.testing.other_process import other_process

RETRIEVER = ("retriever",)

# --- settings -----------------------------------------------------------------------------------


@check()
def defaults_are_whole(case: BaseCase) -> None:
    """Every setting has a default and a description, and accepts all values that `tune` may try."""
    settings_class = case.spec.load().settings_class
    defaults = settings_class()
    for name, field in settings_class.model_fields.items():
        assert field.description, f"{name} has no description"
        schema_extra = field.json_schema_extra
        tune = schema_extra.get("tune", {}) if isinstance(schema_extra, dict) else {}
        assert isinstance(tune, dict)
        choices: Any = tune.get("choices", [])
        for value in [tune.get("low"), tune.get("high"), *choices]:
            if value is not None:
                case.spec.load().from_dict({**defaults.model_dump(), name: value})


@check()
def settings_survive_yaml(case: BaseCase) -> None:
    """Settings that are written as YAML and read back are equal to the original ones."""
    text = yaml.safe_dump(case.algorithm.settings.model_dump(mode="json"))
    read_back = case.spec.load().from_dict(yaml.safe_load(text))
    assert read_back.settings == case.algorithm.settings


@check()
def unknown_setting_is_refused(case: BaseCase) -> None:
    """A misspelt setting is a ConfigError that names it and the setting with the closest name."""
    setting = next(iter(case.spec.load().settings_class.model_fields))
    with raises(ConfigError, f"unknown setting '{setting}x'", f"'{setting}'"):
        case.spec.load().from_dict({setting + "x": 1})


@check()
def fit_changes_no_setting(case: BaseCase) -> None:
    """A fit leaves the algorithm unchanged, and the fitted model has equal settings."""
    assert case.algorithm.settings == case.make().settings
    assert case.fitted.settings == case.make().settings
    assert case.fitted.cutoff == case.data.cutoff
    assert list(vars(case.algorithm)) == ["settings"]


# --- output -------------------------------------------------------------------------------------


@check(kinds=RETRIEVER)
def lists_are_well_formed(case: Case) -> None:
    """Lists have the schema, ranks 1..n, finite scores in falling order, and no item twice.

    Items with equal scores are in ascending order.
    """
    lists = case.model.recommend(case.queries, K)
    assert lists.schema == schema.RECOMMENDED, lists.schema
    user, item, rank, score = _columns(case.lists)
    assert len(user) > 0
    assert np.isfinite(score).all()
    assert np.isin(item, case.model.items).all()
    is_first_of_user = np.append(True, user[1:] != user[:-1])
    assert (
        rank
        == np.arange(len(user))
        - np.flatnonzero(is_first_of_user)[np.cumsum(is_first_of_user) - 1]
        + 1
    ).all()
    assert rank.max() <= K
    is_in_order = (score[1:] < score[:-1]) | ((score[1:] == score[:-1]) & (item[1:] > item[:-1]))
    assert is_in_order[~is_first_of_user[1:]].all()
    assert len(np.unique(np.stack([user, item]), axis=1).T) == len(user)


@check(kinds=RETRIEVER)
def nothing_seen_is_listed(case: Case) -> None:
    """Lists of novel queries have no item of the history; repeat queries mask nothing."""
    seen_pairs = set(zip(case.log.user_idx.tolist(), case.log.item_idx.tolist(), strict=True))
    user, item, *_ = _columns(case.lists if case.mode == "novel" else _novel_lists(case))
    assert not seen_pairs & set(zip(user.tolist(), item.tolist(), strict=True))
    repeat_lists = ordered(case.model.recommend(case.ask(case.data, case.model, "repeat"), K))
    user, item, *_ = _columns(repeat_lists)
    assert seen_pairs & set(zip(user.tolist(), item.tolist(), strict=True))


@check("own_items", kinds=RETRIEVER)
def only_own_items_are_listed(case: Case) -> None:
    """Lists of repeat queries have no item outside the user's history; novel queries get no list."""
    assert _novel_lists(case).num_rows == 0
    seen_pairs = set(zip(case.log.user_idx.tolist(), case.log.item_idx.tolist(), strict=True))
    repeat_queries = case.ask(case.data, case.model, "repeat")
    user, item, *_ = _columns(ordered(case.model.recommend(repeat_queries, len(case.model.items))))
    assert set(zip(user.tolist(), item.tolist(), strict=True)) <= seen_pairs


@check(kinds=RETRIEVER)
def every_user_with_events_is_answered(case: Case) -> None:
    """Every user with events on items that the model knows gets a list."""
    assert set(case.lists.column("user_idx").to_pylist()) == set(case.log.user_idx.tolist())


# --- edges --------------------------------------------------------------------------------------


@check(kinds=RETRIEVER)
def shorter_lists_are_prefixes(case: Case) -> None:
    """A list of 1 item is the start of the list of K items, which is the start of a longer one.

    The longest lists ask for more items than the model has.
    """
    longest_lists = ordered(case.model.recommend(case.queries, len(case.model.items) + 5))
    _, _, rank, _ = _columns(longest_lists)
    assert longest_lists.filter(pa.array(rank <= K)) == case.lists
    shortest_lists = ordered(case.model.recommend(case.queries, 1))
    assert shortest_lists == case.lists.filter(pa.array(_columns(case.lists)[2] == 1))


@check(kinds=RETRIEVER)
def odd_queries_get_what_is_left(case: Case) -> None:
    """Unusual queries get the lists that remain possible.

    A user who has seen all items gets no list, and one who has seen all but one gets at most that
    item. Without events only models for cold users give a list. A null history or null seen items
    are the same as empty ones. Seen items that the model does not know change nothing.
    """
    all_items = [int(i) for i in case.model.items]
    first_query = case.queries.first()
    assert first_query is not None
    rows = [
        (1, first_query["history"], all_items),
        (2, first_query["history"], all_items[1:]),
        (3, [], []),
        (4, None, None),
        (5, first_query["history"], [10**9]),  # masks an item that the model does not know
    ]
    queries = case.queries_of(rows)
    user, item, *_ = _columns(ordered(case.model.recommend(queries, K)))
    items_by_user = {u: item[user == u].tolist() for u in (1, 2, 3, 4, 5)}
    assert items_by_user[1] == []
    assert items_by_user[2] in ([all_items[0]], [])
    assert bool(items_by_user[3]) == bool(items_by_user[4]) == ("cold_users" in case.spec.tags)
    assert items_by_user[5]


@check(kinds=RETRIEVER)
def no_queries_no_lists(case: Case) -> None:
    """A frame without queries gives a frame without lists."""
    no_queries = case.queries_of([])
    assert case.model.recommend(no_queries, K).toArrow().num_rows == 0


# --- invariance ---------------------------------------------------------------------------------


@check(kinds=RETRIEVER)
def order_and_partitions_do_not_matter(case: Case) -> None:
    """Shuffled queries, in 1 and in 7 partitions, give lists with the same bits."""
    for n_partitions in (1, 7):
        shuffled_queries = case.queries.orderBy(F.xxhash64("user_idx")).repartition(n_partitions)
        assert ordered(case.model.recommend(shuffled_queries, K)) == case.lists


@check(kinds=RETRIEVER)
def users_are_answered_alike_alone(case: Case) -> None:
    """A user whose query comes alone gets the same list as among the queries of all users."""
    scorer = case.model.scorer()
    batches = case.queries.toArrow().combine_chunks().to_batches(max_chunksize=1)
    lists_alone = [topk.answer(parse_queries(b), case.model.items, scorer, K) for b in batches[:40]]
    lists_together = case.lists.slice(0, sum(b.num_rows for b in lists_alone))
    assert pa.Table.from_batches(lists_alone).to_pylist() == lists_together.to_pylist()


@check(kinds=RETRIEVER)
def refit_gives_the_same_model(case: Case) -> None:
    """A second fit gives the same bits, though its data differ in ways that must not matter.

    The events are in another order and in other partitions, and events after the cutoff are added,
    some of them on new items. Rule 10 of the architecture: nothing at or after the cutoff reaches a
    model.
    """
    rng = np.random.default_rng(5)
    new_item = int(case.log.item_idx.max()) + 1
    later_events = synth.log(
        [
            (int(u), int(i), -float(a))
            for u, i, a in zip(
                rng.choice(case.log.user_idx, 200),
                rng.choice([new_item, new_item + 1, *case.log.item_idx.tolist()], 200),
                rng.uniform(0, 9, 200),
                strict=True,
            )
        ]
    )
    events = case.log.only(rng.permutation(len(case.log.age))) + later_events
    model, _ = case.refit(events, "again", 5)
    assert np.array_equal(model.items, case.model.items)
    for name, array in case.model.arrays().items():
        assert np.array_equal(model.arrays()[name], array), f"array '{name}' differs"


@check(kinds=RETRIEVER)
def given_pairs_have_the_scores_of_lists(case: Case) -> None:
    """`score` gives a listed item the score of the list, and an item that no model knows, null."""
    some_lists = case.lists.slice(0, 60)
    user, item, _, score = _columns(some_lists)
    rows = [(int(u), [int(i) for i in item[user == u]] + [10**9]) for u in np.unique(user)]
    items_of_users = case.spark.createDataFrame(rows, "user_idx bigint, items array<int>")
    pairs = case.queries.join(items_of_users, on="user_idx", how="inner")
    scored_pairs = case.model.score(pairs)
    assert scored_pairs.schema == schema.SCORED
    score_by_pair = {(r["user_idx"], r["item_idx"]): r["score"] for r in scored_pairs.collect()}
    expected = dict(
        zip(zip(user.tolist(), item.tolist(), strict=True), score.tolist(), strict=True)
    )
    assert {pair: value for pair, value in score_by_pair.items() if pair[1] != 10**9} == expected
    assert {value for pair, value in score_by_pair.items() if pair[1] == 10**9} == {None}


@check(kinds=RETRIEVER)
def contributions_add_up_to_scores(case: Case) -> None:
    """What the user's items add to the score of a listed pair is the score, to `SUM_TOLERANCE`.

    The items are of the user's history, each once per pair, and the contributions of a pair do not
    depend on the other pairs. A model with the tag `reasons` gives contributions; others may.
    """
    scorer = case.model.scorer()
    contributing_scorer = contributing(scorer)
    if contributing_scorer is None:
        assert "reasons" not in case.spec.tags, "the scorer has no method `contributions`"
        return
    [batch] = case.queries.toArrow().combine_chunks().to_batches()
    block = parse_queries(batch)
    user, item, *_ = _columns(case.lists)
    rows = np.searchsorted(block.user_idx, user)
    score, has_score = topk.pair_scores(block, case.model.items, scorer, rows, item)
    assert has_score.all()
    local = np.searchsorted(case.model.items, item)
    given = contributing_scorer.contributions(block, rows, local)
    size = np.bincount(given.pairs, np.abs(given.values), len(rows)) + np.abs(given.rest)
    error = np.abs(given.totals - score)
    assert (error <= SUM_TOLERANCE * size).all(), f"off by {error.max():.2g}"
    assert (np.diff(given.start) > 0).any(), "no item adds to any score"
    own_pairs = set(zip(case.log.user_idx.tolist(), case.log.item_idx.tolist(), strict=True))
    entries = zip(user[given.pairs].tolist(), case.model.items[given.items].tolist(), strict=True)
    assert own_pairs >= set(entries)
    keys = given.pairs * len(case.model.items) + given.items
    assert len(np.unique(keys)) == len(keys), "an item is there twice"
    third = slice(len(block) // 3, 2 * len(block) // 3)
    is_in_third = (rows >= third.start) & (rows < third.stop)
    is_in_third[::2] = False
    alone = contributing_scorer.contributions(
        block.part(third), rows[is_in_third] - third.start, local[is_in_third]
    )
    assert alone.values.tobytes() == given.values[is_in_third[given.pairs]].tobytes()
    assert alone.rest.tobytes() == given.rest[is_in_third].tobytes()


@check(kinds=RETRIEVER)
def only_allowed_items_are_listed(case: Case) -> None:
    """With allowed items, the list is the full list without all items that are not allowed.

    With no item allowed there are no lists.
    """
    allowed = case.model.items[::3]
    lists_of_allowed = ordered(case.model.recommend(case.queries, 3, allowed))
    full_lists = ordered(case.model.recommend(case.queries, len(case.model.items)))
    user, item, _, score = _columns(full_lists)
    is_allowed = np.isin(item, allowed)
    user, item, score = user[is_allowed], item[is_allowed], score[is_allowed]
    rank = np.arange(len(user)) - np.searchsorted(user, user) + 1
    is_in_top = rank <= 3
    actual_columns = _columns(lists_of_allowed)
    for expected, actual in zip((user, item, rank, score), actual_columns, strict=True):
        assert np.array_equal(expected[is_in_top], actual)
    assert ordered(case.model.recommend(case.queries, 3, allowed[:0])).num_rows == 0


# --- laziness, hygiene --------------------------------------------------------------------------


@check(kinds=RETRIEVER)
def recommend_starts_no_job(case: Case) -> None:
    """`recommend` starts no Spark job, and its plan adds no shuffle."""
    model, queries = case.model, case.queries  # taken first, as the fit runs jobs
    with job_group(case.spark, f"lazy {case.spec.name}") as jobs:
        lists = model.recommend(queries, K)
        assert jobs() == []
        lists.write.format("noop").mode("overwrite").save()
        assert jobs() != []
    plan = lists._jdf.queryExecution().executedPlan().toString()
    assert "Exchange" not in plan


@check()
def fit_leaves_nothing_behind(case: BaseCase) -> None:
    """After a fit no RDD or frame is still persisted, and no temporary view is still registered."""
    assert case.left_behind == set()


# --- saved models -------------------------------------------------------------------------------


@check(kinds=RETRIEVER)
def loaded_model_gives_the_same_lists(case: Case) -> None:
    """A saved and loaded model has the same settings, and gives lists with the same bits.

    The folder holds only JSON files, arrays, and the marker of a complete folder.
    """
    loaded = artifacts.load(case.saved, case.spec)
    assert isinstance(loaded, RetrieverModel)
    assert loaded.settings == case.model.settings
    assert ordered(loaded.recommend(case.queries, K)) == case.lists
    names = [name for name, _, _ in storage.fingerprint(case.saved)]
    assert {name.rsplit(".", 1)[-1] for name in names} == {storage.COMPLETE, "json", "npy"}
    for name in names:
        if name.endswith(".npy"):
            storage.read_array(storage.join(case.saved, name))  # never unpickles


@check(kinds=RETRIEVER)
def another_process_gives_the_same_lists(case: Case) -> None:
    """Another Python process, without Spark, gives the same bits from the saved model."""
    queries_path, lists_path = (
        storage.join(case.folder, "asked.arrow"),
        storage.join(case.folder, "got.arrow"),
    )
    with (
        pa.OSFile(queries_path, "wb") as sink,
        pa.ipc.new_file(sink, case.queries.toArrow().schema) as writer,
    ):
        writer.write_table(case.queries.toArrow().combine_chunks())
    reply = other_process().ask(case.saved, case.spec.name, queries_path, lists_path, str(K))
    assert reply == "answered", reply
    with pa.OSFile(lists_path) as source:
        assert pa.ipc.open_file(source).read_all().to_pylist() == case.lists.to_pylist()


@check()
def other_files_are_refused(case: BaseCase) -> None:
    """A folder without a model, or with a model of another class, is an ArtifactError."""
    with raises(ArtifactError, "no complete model"):
        artifacts.load(storage.join(case.folder, "nothing"), case.spec)
    other_spec = replace(case.spec, model="elsewhere:Model")
    with raises(ArtifactError, "expected elsewhere:Model"):
        artifacts.load(case.saved, other_spec)


# --- planted answers ----------------------------------------------------------------------------


@check("personal", kinds=RETRIEVER)
def checkerboard_is_solved(case: Case) -> None:
    """Each user's held-out item comes first in the user's list (see `synth.checkerboard`)."""
    log, held_out = synth.checkerboard(40, 20)
    model, data = case.refit(log, "checkerboard")
    lists = ordered(model.recommend(case.ask(data, model), 1))
    user, item, *_ = _columns(lists)
    assert dict(zip(user.tolist(), item.tolist(), strict=True)) == held_out


@check("decay", kinds=RETRIEVER)
def decay_prefers_what_is_new(case: Case) -> None:
    """After a drift, late items fill the lists with decay, and do not without decay.

    With decay they are more than 90% of the listed items, without decay less than 60%. See
    `synth.drift`.
    """
    log, late_items = synth.drift(60, 24)
    shares = []
    for half_life in (10.0, None):
        model, data = case.refit(log, f"drift {half_life}", half_life_days=half_life)
        _, item, *_ = _columns(ordered(model.recommend(case.ask(data, model, "repeat"), 4)))
        shares.append(np.isin(item, list(late_items)).mean())
    assert shares[0] > 0.9, f"late items with decay: {shares[0]:.2f}"
    assert shares[1] < 0.6, f"late items without decay: {shares[1]:.2f}"


@check(kinds=RETRIEVER)
def lists_beat_chance(case: Case) -> None:
    """Lists contain the held-out items over 1.5 times as often as random lists do."""
    assert hit_rate(case.lists, case.truth) > 1.5 * K / len(case.model.items)


@check("personal", kinds=RETRIEVER)
def personal_lists_beat_popular_ones(case: Case) -> None:
    """Lists contain the held-out items over 4/3 times as often as lists of popular items do."""
    from recspark.models.items.popular import Popular, PopularSettings

    popular = Popular(PopularSettings(half_life_days=None)).fit(case.data, case.options)
    popular_hit_rate = hit_rate(ordered(popular.recommend(case.queries, K)), case.truth)
    assert hit_rate(case.lists, case.truth) > 4 / 3 * popular_hit_rate


@check("neighbours", kinds=RETRIEVER)
def neighbours_are_of_the_same_group(case: Case) -> None:
    """An item's neighbours are ranked, never the item itself, and mostly of the item's group."""
    model = case.model  # taken first, as the fit runs jobs
    with job_group(case.spark, f"neighbours {case.spec.name}") as jobs:
        neighbours = model.neighbours(5)
        assert jobs() == []
    assert neighbours.schema == schema.NEIGHBOURS
    rows = neighbours.toArrow()
    item, neighbour = (rows.column(c).to_numpy() for c in ("item_idx", "neighbour_idx"))
    rank, score = (rows.column(c).to_numpy() for c in ("rank", "score"))
    assert set(item.tolist()) <= set(case.model.items.tolist())
    assert (item != neighbour).all()
    assert sorted(set(rank.tolist())) == [1, 2, 3, 4, 5]
    assert np.isfinite(score).all()
    is_in_group = (item // 3) % 4 == (neighbour // 3) % 4  # the groups of `synth.power_law`
    assert is_in_group[rank == 1].mean() > 0.6


@check(kinds=RETRIEVER)
def vectors_of_items_are_rows_of_the_vocabulary(case: Case) -> None:
    """Vectors of items, where the model has some, are a finite row for each item, survive saving,
    and are mostly nearest to those of items of the same group.
    """
    loaded = artifacts.load(case.saved, case.spec)
    assert isinstance(loaded, RetrieverModel)
    vectors, saved = case.model.item_vectors(), loaded.item_vectors()
    if vectors is None or saved is None:
        assert vectors is saved
        return
    assert vectors.dtype == np.float32
    assert vectors.ndim == 2
    assert len(vectors) == len(case.model.items)
    assert np.isfinite(vectors).all()
    assert np.array_equal(vectors, saved)
    unit_vectors = unit_rows(vectors)
    cosines = unit_vectors @ unit_vectors.T
    np.fill_diagonal(cosines, -2)
    group = (case.model.items // 3) % 4  # the groups of `synth.power_law`
    assert (group == group[cosines.argmax(axis=1)]).mean() > 0.4  # 0.25 by chance


# --- errors -------------------------------------------------------------------------------------


@check(kinds=RETRIEVER)
def wrong_queries_are_named(case: Case) -> None:
    """A missing column, a wrong type, and k = 0 are ModelErrors that say what the query has."""
    with raises(ModelError, "seen is missing", "'history'"):
        case.model.recommend(case.queries.drop("seen"), K)
    with raises(ModelError, "user_idx is string, expected bigint"):
        case.model.recommend(case.queries.withColumn("user_idx", F.lit("u")), K)
    with raises(ModelError, "k = 0"):
        case.model.recommend(case.queries, 0)


# --- helpers ------------------------------------------------------------------------------------


def hit_rate(lists: pa.Table, truth: dict[int, int]) -> float:
    """Return the share of the users in `truth` whose held-out item is in their list."""
    user, item, *_ = _columns(lists)
    pairs = zip(user.tolist(), item.tolist(), strict=True)
    return float(sum(truth.get(u) == i for u, i in pairs) / len(truth))


def _novel_lists(case: Case) -> pa.Table:
    """Return the K best items of every user that are not in the user's history."""
    return ordered(case.model.recommend(case.ask(case.data, case.model, "novel"), K))


def _columns(lists: pa.Table) -> tuple[Array, Array, Array, Array]:
    names = schema.RECOMMENDED.names
    user, item, rank, score = (lists.column(name).to_numpy() for name in names)
    return user, item, rank, score
