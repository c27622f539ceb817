"""What every model must do, and every retriever: small named checks, run on one fitted model each.

A check raises AssertionError. `recspark.testing.contract` has them all.
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
from recspark.testing import synth
from recspark.testing.case import BaseCase, Case, K, ordered
from recspark.testing.check import check, job_group, raises
from recspark.testing.other_process import other_process

RETRIEVER = ("retriever",)

# --- settings -----------------------------------------------------------------------------------


@check()
def defaults_are_whole(case: BaseCase) -> None:
    """Every setting has a default and a description, and what tune may try is valid."""
    kind = case.spec.load().settings_class
    default = kind()
    for name, field in kind.model_fields.items():
        assert field.description, f"{name} has no description"
        extra = field.json_schema_extra
        tune = extra.get("tune", {}) if isinstance(extra, dict) else {}
        assert isinstance(tune, dict)
        choices: Any = tune.get("choices", [])
        for value in [tune.get("low"), tune.get("high"), *choices]:
            if value is not None:
                case.spec.load().from_dict({**default.model_dump(), name: value})


@check()
def settings_survive_yaml(case: BaseCase) -> None:
    """Settings written as YAML and read back are the same."""
    text = yaml.safe_dump(case.algorithm.settings.model_dump(mode="json"))
    again = case.spec.load().from_dict(yaml.safe_load(text))
    assert again.settings == case.algorithm.settings


@check()
def unknown_setting_is_refused(case: BaseCase) -> None:
    """A misspelt setting is a ConfigError that names it and a near one."""
    known = next(iter(case.spec.load().settings_class.model_fields))
    with raises(ConfigError, f"unknown setting '{known}x'", f"'{known}'"):
        case.spec.load().from_dict({known + "x": 1})


@check()
def fit_changes_no_setting(case: BaseCase) -> None:
    """A fit leaves the recommender as it was, and the model carries the same settings."""
    assert case.algorithm.settings == case.make().settings
    assert case.fitted.settings == case.make().settings
    assert case.fitted.cutoff == case.data.cutoff
    assert list(vars(case.algorithm)) == ["settings"]


# --- output -------------------------------------------------------------------------------------


@check(kinds=RETRIEVER)
def lists_are_well_formed(case: Case) -> None:
    """Schema, ranks 1..n, finite scores that fall, ties by the smaller item, no item twice."""
    frame = case.model.recommend(case.queries, K)
    assert frame.schema == schema.RECOMMENDED, frame.schema
    user, item, rank, score = _columns(case.lists)
    assert len(user) > 0
    assert np.isfinite(score).all()
    assert np.isin(item, case.model.items).all()
    starts = np.append(True, user[1:] != user[:-1])
    assert (rank == np.arange(len(user)) - np.flatnonzero(starts)[np.cumsum(starts) - 1] + 1).all()
    assert rank.max() <= K
    falls = (score[1:] < score[:-1]) | ((score[1:] == score[:-1]) & (item[1:] > item[:-1]))
    assert falls[~starts[1:]].all()
    assert len(np.unique(np.stack([user, item]), axis=1).T) == len(user)


@check(kinds=RETRIEVER)
def nothing_seen_is_listed(case: Case) -> None:
    """Novel queries mask every item of the history; repeat queries mask nothing."""
    seen = set(zip(case.log.user_idx.tolist(), case.log.item_idx.tolist(), strict=True))
    user, item, *_ = _columns(case.lists)
    assert not seen & set(zip(user.tolist(), item.tolist(), strict=True))
    repeat = ordered(case.model.recommend(case.ask(case.data, case.model, "repeat"), K))
    user, item, *_ = _columns(repeat)
    assert seen & set(zip(user.tolist(), item.tolist(), strict=True))


@check(kinds=RETRIEVER)
def every_user_with_events_is_answered(case: Case) -> None:
    """A user with events on known items gets a list."""
    assert set(case.lists.column("user_idx").to_pylist()) == set(case.log.user_idx.tolist())


# --- edges --------------------------------------------------------------------------------------


@check(kinds=RETRIEVER)
def shorter_lists_are_prefixes(case: Case) -> None:
    """One item is the first of ten; more than there are items begin with those ten."""
    whole = ordered(case.model.recommend(case.queries, len(case.model.items) + 5))
    _, _, rank, _ = _columns(whole)
    assert whole.filter(pa.array(rank <= K)) == case.lists
    first = ordered(case.model.recommend(case.queries, 1))
    assert first == case.lists.filter(pa.array(_columns(case.lists)[2] == 1))


@check(kinds=RETRIEVER)
def odd_queries_get_what_is_left(case: Case) -> None:
    """All seen: no row. No events: a row only from models for cold users. Null means empty."""
    everything = [int(i) for i in case.model.items]
    some = case.queries.first()
    assert some is not None
    rows = [
        (1, some["history"], everything),
        (2, some["history"], everything[1:]),
        (3, [], []),
        (4, None, None),
        (5, some["history"], [10**9]),  # masks an item that the model does not know
    ]
    queries = case.queries_of(rows)
    user, item, *_ = _columns(ordered(case.model.recommend(queries, K)))
    found = {u: item[user == u].tolist() for u in (1, 2, 3, 4, 5)}
    assert found[1] == []
    assert found[2] in ([everything[0]], [])
    assert bool(found[3]) == bool(found[4]) == ("cold_users" in case.spec.tags)
    assert found[5]


@check(kinds=RETRIEVER)
def no_queries_no_lists(case: Case) -> None:
    """An empty frame of queries gives an empty frame of lists."""
    empty = case.queries_of([])
    assert case.model.recommend(empty, K).toArrow().num_rows == 0


# --- invariance ---------------------------------------------------------------------------------


@check(kinds=RETRIEVER)
def order_and_partitions_do_not_matter(case: Case) -> None:
    """Shuffled queries in 1 and in 7 partitions give the same bits."""
    for n in (1, 7):
        shuffled = case.queries.orderBy(F.xxhash64("user_idx")).repartition(n)
        assert ordered(case.model.recommend(shuffled, K)) == case.lists


@check(kinds=RETRIEVER)
def users_are_answered_alike_alone(case: Case) -> None:
    """A user asked alone gets the list that the user gets among all."""
    scorer = case.model.scorer()
    batches = case.queries.toArrow().combine_chunks().to_batches(max_chunksize=1)
    alone = [topk.answer(parse_queries(b), case.model.items, scorer, K) for b in batches[:40]]
    together = case.lists.slice(0, sum(b.num_rows for b in alone))
    assert pa.Table.from_batches(alone).to_pylist() == together.to_pylist()


@check(kinds=RETRIEVER)
def refit_gives_the_same_model(case: Case) -> None:
    """The same bits from rows in another order and other partitions, later events and items added.

    Rule 10 of the architecture: nothing at or after the cutoff reaches a model.
    """
    rng = np.random.default_rng(5)
    new = int(case.log.item_idx.max()) + 1
    later = synth.log(
        [
            (int(u), int(i), -float(a))
            for u, i, a in zip(
                rng.choice(case.log.user_idx, 200),
                rng.choice([new, new + 1, *case.log.item_idx.tolist()], 200),
                rng.uniform(0, 9, 200),
                strict=True,
            )
        ]
    )
    events = case.log.only(rng.permutation(len(case.log.age))) + later
    model, _ = case.refit(events, "again", 5)
    assert np.array_equal(model.items, case.model.items)
    for name, array in case.model.arrays().items():
        assert np.array_equal(model.arrays()[name], array), f"array '{name}' differs"


@check(kinds=RETRIEVER)
def given_pairs_have_the_scores_of_lists(case: Case) -> None:
    """A listed item asked for alone has the score of the list; one that no model knows has none."""
    listed = case.lists.slice(0, 60)
    user, item, _, score = _columns(listed)
    rows = [(int(u), [int(i) for i in item[user == u]] + [10**9]) for u in np.unique(user)]
    wanted = case.spark.createDataFrame(rows, "user_idx bigint, items array<int>")
    pairs = case.queries.join(wanted, on="user_idx", how="inner")
    frame = case.model.score(pairs)
    assert frame.schema == schema.SCORED
    got = {(r["user_idx"], r["item_idx"]): r["score"] for r in frame.collect()}
    want = dict(zip(zip(user.tolist(), item.tolist(), strict=True), score.tolist(), strict=True))
    assert {pair: found for pair, found in got.items() if pair[1] != 10**9} == want
    assert {found for pair, found in got.items() if pair[1] == 10**9} == {None}


@check(kinds=RETRIEVER)
def only_allowed_items_are_listed(case: Case) -> None:
    """With some items allowed, the list is what is left of the whole one without the others."""
    allowed = case.model.items[::3]
    few = ordered(case.model.recommend(case.queries, 3, allowed))
    whole = ordered(case.model.recommend(case.queries, len(case.model.items)))
    user, item, _, score = _columns(whole)
    kept = np.isin(item, allowed)
    user, item, score = user[kept], item[kept], score[kept]
    rank = np.arange(len(user)) - np.searchsorted(user, user) + 1
    top = rank <= 3
    found = _columns(few)
    for want, got in zip((user, item, rank, score), found, strict=True):
        assert np.array_equal(want[top], got)
    assert ordered(case.model.recommend(case.queries, 3, allowed[:0])).num_rows == 0


# --- laziness, hygiene --------------------------------------------------------------------------


@check(kinds=RETRIEVER)
def recommend_starts_no_job(case: Case) -> None:
    """`recommend` only plans; its plan has no shuffle of its own."""
    model, queries = case.model, case.queries  # the fit has jobs of its own
    with job_group(case.spark, f"lazy {case.spec.name}") as jobs:
        frame = model.recommend(queries, K)
        assert jobs() == []
        frame.write.format("noop").mode("overwrite").save()
        assert jobs() != []
    plan = frame._jdf.queryExecution().executedPlan().toString()
    assert "Exchange" not in plan


@check()
def fit_leaves_nothing_behind(case: BaseCase) -> None:
    """No RDD or frame stays persisted, no temporary view stays registered."""
    assert case.left_behind == set()


# --- saved models -------------------------------------------------------------------------------


@check(kinds=RETRIEVER)
def loaded_model_gives_the_same_lists(case: Case) -> None:
    """Saved and loaded: same settings, same bits, and nothing in the folder but JSON and arrays."""
    again = artifacts.load(case.saved, case.spec)
    assert isinstance(again, RetrieverModel)
    assert again.settings == case.model.settings
    assert ordered(again.recommend(case.queries, K)) == case.lists
    names = [name for name, _, _ in storage.fingerprint(case.saved)]
    assert {name.rsplit(".", 1)[-1] for name in names} == {storage.COMPLETE, "json", "npy"}
    for name in names:
        if name.endswith(".npy"):
            storage.read_array(storage.join(case.saved, name))  # never unpickles


@check(kinds=RETRIEVER)
def another_process_gives_the_same_lists(case: Case) -> None:
    """Another Python process, without Spark, answers with the same bits from the saved folder."""
    asked, got = storage.join(case.folder, "asked.arrow"), storage.join(case.folder, "got.arrow")
    with (
        pa.OSFile(asked, "wb") as sink,
        pa.ipc.new_file(sink, case.queries.toArrow().schema) as out,
    ):
        out.write_table(case.queries.toArrow().combine_chunks())
    told = other_process().ask(case.saved, case.spec.name, asked, got, str(K))
    assert told == "answered", told
    with pa.OSFile(got) as source:
        assert pa.ipc.open_file(source).read_all().to_pylist() == case.lists.to_pylist()


@check()
def other_files_are_refused(case: BaseCase) -> None:
    """A folder without a model, or with another model's, is an ArtifactError."""
    with raises(ArtifactError, "no complete model"):
        artifacts.load(storage.join(case.folder, "nothing"), case.spec)
    other = replace(case.spec, model="elsewhere:Model")
    with raises(ArtifactError, "expected elsewhere:Model"):
        artifacts.load(case.saved, other)


# --- planted answers ----------------------------------------------------------------------------


@check("personal", kinds=RETRIEVER)
def checkerboard_is_solved(case: Case) -> None:
    """The one item of the user's colour that was held out comes first."""
    log, held_out = synth.checkerboard(40, 20)
    model, data = case.refit(log, "checkerboard")
    found = ordered(model.recommend(case.ask(data, model), 1))
    user, item, *_ = _columns(found)
    assert dict(zip(user.tolist(), item.tolist(), strict=True)) == held_out


@check("decay", kinds=RETRIEVER)
def decay_prefers_what_is_new(case: Case) -> None:
    """After a drift, late items fill the lists when decay is on, and do not when it is off."""
    log, late = synth.drift(60, 24)
    shares = []
    for half_life in (10.0, None):
        model, data = case.refit(log, f"drift {half_life}", half_life_days=half_life)
        _, item, *_ = _columns(ordered(model.recommend(case.ask(data, model, "repeat"), 4)))
        shares.append(np.isin(item, list(late)).mean())
    assert shares[0] > 0.9, f"late items with decay: {shares[0]:.2f}"
    assert shares[1] < 0.6, f"late items without decay: {shares[1]:.2f}"


@check(kinds=RETRIEVER)
def lists_beat_chance(case: Case) -> None:
    """Held-out events are found half as often again as by chance, at least."""
    assert hit_rate(case.lists, case.truth) > 1.5 * K / len(case.model.items)


@check("personal", kinds=RETRIEVER)
def personal_lists_beat_popular_ones(case: Case) -> None:
    """More held-out events are found than by what is popular, by a third at least."""
    from recspark.models.items.popular import Popular, PopularSettings

    popular = Popular(PopularSettings(half_life_days=None)).fit(case.data, case.options)
    bar = hit_rate(ordered(popular.recommend(case.queries, K)), case.truth)
    assert hit_rate(case.lists, case.truth) > 4 / 3 * bar


@check("neighbours", kinds=RETRIEVER)
def neighbours_are_of_the_same_group(case: Case) -> None:
    """Each item's neighbours: ranked, never itself, and mostly of the item's own group."""
    model = case.model  # the fit has jobs of its own
    with job_group(case.spark, f"neighbours {case.spec.name}") as jobs:
        frame = model.neighbours(5)
        assert jobs() == []
    assert frame.schema == schema.NEIGHBOURS
    rows = frame.toArrow()
    item, near = (rows.column(c).to_numpy() for c in ("item_idx", "neighbour_idx"))
    rank, score = (rows.column(c).to_numpy() for c in ("rank", "score"))
    assert set(item.tolist()) <= set(case.model.items.tolist())
    assert (item != near).all()
    assert sorted(set(rank.tolist())) == [1, 2, 3, 4, 5]
    assert np.isfinite(score).all()
    same = (item // 3) % 4 == (near // 3) % 4  # synth.power_law
    assert same[rank == 1].mean() > 0.6


# --- errors -------------------------------------------------------------------------------------


@check(kinds=RETRIEVER)
def wrong_queries_are_named(case: Case) -> None:
    """A missing column, another type, and k = 0 are ModelErrors that say what was there."""
    with raises(ModelError, "seen is missing", "'history'"):
        case.model.recommend(case.queries.drop("seen"), K)
    with raises(ModelError, "user_idx is string, expected bigint"):
        case.model.recommend(case.queries.withColumn("user_idx", F.lit("u")), K)
    with raises(ModelError, "k = 0"):
        case.model.recommend(case.queries, 0)


# --- helpers ------------------------------------------------------------------------------------


def hit_rate(lists: pa.Table, truth: dict[int, int]) -> float:
    """Return the share of users whose held-out item is in the list."""
    user, item, *_ = _columns(lists)
    pairs = zip(user.tolist(), item.tolist(), strict=True)
    return float(sum(truth.get(u) == i for u, i in pairs) / len(truth))


def _columns(lists: pa.Table) -> tuple[Array, Array, Array, Array]:
    names = schema.RECOMMENDED.names
    user, item, rank, score = (lists.column(name).to_numpy() for name in names)
    return user, item, rank, score
