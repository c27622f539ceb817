"""Each contract check fails for a model that is broken in the way the check guards against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import Field
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark import schema, storage
from recspark.errors import ConfigError
from recspark.models import artifacts
from recspark.models.base import Array, FitOptions, RetrieverModel
from recspark.models.items.item_item import ItemItemScorer
from recspark.models.items.item_knn import ItemKNN, ItemKNNSettings
from recspark.models.items.popular import Popular, PopularSettings
from recspark.models.registry import model_spec
from recspark.models.scoring import topk
from recspark.models.scoring.contributions import Contributions
from recspark.testing import checks
from recspark.testing.case import Case, K, left_behind, ordered
from recspark.testing.contract import CHECKS

pytestmark = pytest.mark.spark

Patch = pytest.MonkeyPatch
Breakage = Callable[[Case, Patch], None]
BROKEN: list[tuple[str, Breakage]] = []


def breaks(check: str) -> Callable[[Breakage], Breakage]:
    def add(breakage: Breakage) -> Breakage:
        BROKEN.append((check, breakage))
        return breakage

    return add


@pytest.fixture(scope="module")
def case(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = str(tmp_path_factory.mktemp("bite"))
    settings = {"shrink": 1.0, "half_life_days": None}
    return Case(spark, model_spec("item_knn"), settings, folder, FitOptions())


# --- settings -----------------------------------------------------------------------------------


class Undescribed(ItemKNNSettings):
    extra: float = 1.0


class Untunable(ItemKNNSettings):
    extra: float = Field(1.0, ge=0, description="x", json_schema_extra={"tune": {"low": -1}})


class Forgetful(ItemKNNSettings):
    def model_dump(self, **kwargs: Any) -> dict[str, Any]:
        return {k: v for k, v in super().model_dump(**kwargs).items() if k != "shrink"}


class Careless(ItemKNNSettings, extra="ignore"):
    pass


def with_settings(case: Case, patch: Patch, kind: type[ItemKNNSettings]) -> None:
    patch.setattr(ItemKNN, "settings_class", kind)
    patch.setattr(case, "algorithm", case.make())


@breaks("defaults_are_whole")
def a_setting_without_description(case: Case, patch: Patch) -> None:
    with_settings(case, patch, Undescribed)


@breaks("defaults_are_whole")
def a_range_that_tune_may_not_try(case: Case, patch: Patch) -> None:
    with_settings(case, patch, Untunable)


@breaks("settings_survive_yaml")
def a_setting_that_is_not_written(case: Case, patch: Patch) -> None:
    with_settings(case, patch, Forgetful)


@breaks("unknown_setting_is_refused")
def unknown_settings_are_ignored(case: Case, patch: Patch) -> None:
    with_settings(case, patch, Careless)


@breaks("fit_changes_no_setting")
def a_fit_that_keeps_state(case: Case, patch: Patch) -> None:
    patch.setattr(case.algorithm, "fitted", True, raising=False)


@breaks("fit_changes_no_setting")
def a_fit_that_changes_a_setting(case: Case, patch: Patch) -> None:
    patch.setattr(case.algorithm, "settings", ItemKNNSettings(shrink=9))


# --- output -------------------------------------------------------------------------------------


def with_column(case: Case, patch: Patch, name: str, change: Callable[[Any], Any]) -> None:
    at = case.lists.column_names.index(name)
    values = change(case.lists.column(name).to_numpy().copy())
    kind = case.lists.schema.field(at)
    patch.setattr(case, "lists", case.lists.set_column(at, kind, pa.array(values, kind.type)))


def put(at: int, value: Any) -> Callable[[Any], Any]:
    def change(values: Any) -> Any:
        values[at] = value(values) if callable(value) else value
        return values

    return change


for label, column, edit in [
    ("rank_skips", "rank", put(3, 5)),
    ("score_is_nan", "score", put(0, np.nan)),
    ("score_rises", "score", put(4, 1e9)),
    ("item_twice", "item_idx", put(1, lambda v: v[0])),
    ("item_unknown", "item_idx", put(0, 10**6)),
    ("ties_by_larger_item", "score", np.ones_like),
]:

    def spoil(case: Case, patch: Patch, column: str = column, edit: Any = edit) -> None:
        with_column(case, patch, column, edit)

    spoil.__name__ = label
    breaks("lists_are_well_formed")(spoil)


def with_recommend(
    case: Case, patch: Patch, change: Callable[[DataFrame, DataFrame], DataFrame]
) -> None:
    real = case.model.recommend
    patch.setattr(case.model, "recommend", lambda q, k: change(q, real(q, k)), raising=False)


@breaks("lists_are_well_formed")
def another_schema(case: Case, patch: Patch) -> None:
    with_recommend(case, patch, lambda q, lists: lists.withColumn("score", F.lit(1.0)))


@breaks("nothing_seen_is_listed")
def seen_items_are_listed(case: Case, patch: Patch) -> None:
    queries = case.queries.withColumn("seen", F.array().cast(schema.ITEM_IDXS))
    patch.setattr(case, "lists", ordered(case.model.recommend(queries, K)))


@breaks("nothing_seen_is_listed")
def repeat_masks_too(case: Case, patch: Patch) -> None:
    novel = case.spark.createDataFrame(case.lists, schema.RECOMMENDED)
    with_recommend(case, patch, lambda q, lists: novel)


def with_lists_where(case: Case, patch: Patch, condition: str) -> None:
    """Keep the listed items that meet `condition`, on the query and its `own` items."""
    own = F.transform("history", lambda event: event["item_idx"]).alias("own")
    with_recommend(
        case,
        patch,
        lambda q, lists: (
            lists.join(q.select("user_idx", "seen", own), on="user_idx", how="inner")
            .where(condition)
            .select(*schema.RECOMMENDED.names)
        ),
    )


@breaks("only_own_items_are_listed")
def unseen_items_in_mode_novel(case: Case, patch: Patch) -> None:
    with_lists_where(case, patch, "size(seen) > 0 OR array_contains(own, item_idx)")


@breaks("only_own_items_are_listed")
def unseen_items_in_mode_repeat(case: Case, patch: Patch) -> None:
    with_lists_where(case, patch, "size(seen) = 0")


@breaks("every_user_with_events_is_answered")
def one_user_is_forgotten(case: Case, patch: Patch) -> None:
    patch.setattr(case, "lists", case.lists.slice(0, case.lists.num_rows - K))


# --- edges, invariance --------------------------------------------------------------------------


@breaks("shorter_lists_are_prefixes")
def scores_depend_on_k(case: Case, patch: Patch) -> None:
    real = case.model.recommend
    shifted = lambda q, k: real(q, k).withColumn("score", (F.col("score") + k).cast("float"))
    patch.setattr(case.model, "recommend", shifted, raising=False)


@breaks("odd_queries_get_what_is_left")
def users_without_events_get_a_row(case: Case, patch: Patch) -> None:
    extra = case.spark.createDataFrame([(3, 0, 1, 1.0)], schema.RECOMMENDED)
    with_recommend(case, patch, lambda q, lists: lists.union(extra))


@breaks("odd_queries_get_what_is_left")
def the_last_unseen_item_is_another(case: Case, patch: Patch) -> None:
    one = F.when(F.col("user_idx") == 2, F.lit(6)).otherwise(F.col("item_idx"))
    extra = case.spark.createDataFrame([(2, 3, 1, 1.0)], schema.RECOMMENDED)
    with_recommend(
        case, patch, lambda q, lists: lists.union(extra).withColumn("item_idx", one.cast("int"))
    )


@breaks("no_queries_no_lists")
def a_row_from_nothing(case: Case, patch: Patch) -> None:
    extra = case.spark.createDataFrame([(3, 0, 1, 1.0)], schema.RECOMMENDED)
    with_recommend(case, patch, lambda q, lists: lists.union(extra))


@breaks("order_and_partitions_do_not_matter")
def scores_depend_on_the_partition(case: Case, patch: Patch) -> None:
    moved = (F.col("score") + F.spark_partition_id() / 1000).cast("float")
    with_recommend(case, patch, lambda q, lists: lists.withColumn("score", moved))


@breaks("users_are_answered_alike_alone")
def scores_depend_on_the_block(case: Case, patch: Patch) -> None:
    class Leaky:
        def __init__(self, real: topk.Scorer) -> None:
            self.real = real

        def score(self, block: Any) -> topk.Scores:
            found: Any = self.real.score(block)
            found.weights[:] *= 1 + 1 / len(block)
            return found  # type: ignore[no-any-return]

    leaky = Leaky(case.model.scorer())
    patch.setattr(case.model, "scorer", lambda: leaky)


@breaks("refit_gives_the_same_model")
def one_bit_of_a_weight(case: Case, patch: Patch) -> None:
    matrix = case.model.arrays()["matrix"].copy()
    matrix[0, 1] = np.nextafter(matrix[0, 1], np.float32(9))
    patch.setattr(case.model, "matrix", matrix, raising=False)


@breaks("refit_gives_the_same_model")
def later_events_reach_the_fit(case: Case, patch: Patch) -> None:
    patch.setattr(
        checks.synth,
        "before",
        lambda histories, cutoff: histories.withColumn("seen", F.array().cast(schema.ITEM_IDXS)),
    )


# --- laziness, saved models ---------------------------------------------------------------------


@breaks("recommend_starts_no_job")
def recommend_counts_first(case: Case, patch: Patch) -> None:
    with_recommend(case, patch, lambda q, lists: lists.limit(q.count()))


@breaks("recommend_starts_no_job")
def recommend_shuffles(case: Case, patch: Patch) -> None:
    with_recommend(case, patch, lambda q, lists: lists.repartition(2))


@breaks("fit_leaves_nothing_behind")
def a_frame_stays_cached(case: Case, patch: Patch) -> None:
    spark, before = case.spark, left_behind(case.spark)
    cached = spark.range(3).persist()
    cached.count()
    patch.setattr(case, "left_behind", left_behind(spark) - before)
    cached.unpersist(blocking=True)


@breaks("fit_leaves_nothing_behind")
def a_view_stays_registered(case: Case, patch: Patch) -> None:
    spark, before = case.spark, left_behind(case.spark)
    spark.range(3).createOrReplaceTempView("left_by_fit")
    patch.setattr(case, "left_behind", left_behind(spark) - before)
    spark.catalog.dropTempView("left_by_fit")


@breaks("loaded_model_gives_the_same_lists")
def a_pickle_in_the_folder(case: Case, patch: Patch) -> None:
    folder = storage.join(case.folder, "pickled")
    artifacts.save(case.model, folder)
    storage.write_bytes(storage.join(folder, "model.pkl"), b"")
    patch.setattr(case, "saved", folder)


def save_other(case: Case, patch: Patch) -> None:
    folder = storage.join(case.folder, "other")
    real = case.model.matrix  # type: ignore[attr-defined]
    patch.setattr(case.model, "matrix", real * np.float32(1.5))
    artifacts.save(case.model, folder)
    patch.setattr(case.model, "matrix", real)
    patch.setattr(case, "saved", folder)


breaks("loaded_model_gives_the_same_lists")(save_other)
breaks("another_process_gives_the_same_lists")(save_other)


@breaks("another_process_gives_the_same_lists")
def only_this_process_can_load(case: Case, patch: Patch) -> None:
    patch.setattr(case, "saved", str(Path(case.folder) / "never"))


@breaks("other_files_are_refused")
def anything_is_loaded(case: Case, patch: Patch) -> None:
    patch.setattr(artifacts, "load", lambda folder, spec: case.model)


# --- planted answers ----------------------------------------------------------------------------


@breaks("checkerboard_is_solved")
def popularity_instead_of_taste(case: Case, patch: Patch) -> None:
    def refit(log: Any, name: str) -> Any:
        data = case.dataset(log, name)
        return Popular(PopularSettings(half_life_days=None)).fit(data, case.options), data

    patch.setattr(case, "refit", refit)


@breaks("decay_prefers_what_is_new")
def decay_is_forgotten(case: Case, patch: Patch) -> None:
    real = case.refit
    patch.setattr(case, "refit", lambda log, name, half_life_days: real(log, name))


@breaks("decay_prefers_what_is_new")
def decay_is_always_on(case: Case, patch: Patch) -> None:
    real = case.refit
    patch.setattr(
        case, "refit", lambda log, name, half_life_days: real(log, name, half_life_days=10.0)
    )


@breaks("lists_beat_chance")
def items_by_their_index(case: Case, patch: Patch) -> None:
    with_column(
        case, patch, "item_idx", lambda v: np.sort(case.model.items)[-1 - np.arange(len(v)) % K]
    )


@breaks("personal_lists_beat_popular_ones")
def popular_lists(case: Case, patch: Patch) -> None:
    popular = Popular(PopularSettings(half_life_days=None)).fit(case.data, case.options)
    patch.setattr(case, "lists", ordered(popular.recommend(case.queries, K)))


def with_neighbours(case: Case, patch: Patch, **columns: Any) -> None:
    real = case.model.neighbours
    patch.setattr(case.model, "neighbours", lambda k: real(k).withColumns(columns), raising=False)


@breaks("neighbours_are_of_the_same_group")
def an_item_is_its_own_neighbour(case: Case, patch: Patch) -> None:
    with_neighbours(case, patch, neighbour_idx=F.col("item_idx"))


@breaks("neighbours_are_of_the_same_group")
def neighbours_of_another_group(case: Case, patch: Patch) -> None:
    with_neighbours(case, patch, neighbour_idx=F.col("item_idx") + 3)


@breaks("wrong_queries_are_named")
def queries_are_not_checked(case: Case, patch: Patch) -> None:
    patch.setattr(case.model, "recommend", lambda q, k: q, raising=False)


@breaks("given_pairs_have_the_scores_of_lists")
def pairs_have_other_scores(case: Case, patch: Patch) -> None:
    real = case.model.score
    patch.setattr(
        case.model, "score", lambda p: real(p).withColumn("score", F.col("score") + F.lit(1).cast("float")),
        raising=False,
    )  # fmt: skip


@breaks("given_pairs_have_the_scores_of_lists")
def items_that_nobody_knows_have_a_score(case: Case, patch: Patch) -> None:
    real = case.model.score
    some = F.coalesce("score", F.lit(0).cast("float"))
    patch.setattr(case.model, "score", lambda p: real(p).withColumn("score", some), raising=False)


def with_contributions(patch: Patch, change: Callable[[Contributions], Contributions]) -> None:
    real = ItemItemScorer.contributions
    patch.setattr(
        ItemItemScorer,
        "contributions",
        lambda self, block, rows, items: change(real(self, block, rows, items)),
    )


@breaks("contributions_add_up_to_scores")
def a_contribution_is_left_out(case: Case, patch: Patch) -> None:
    def without_largest(given: Contributions) -> Contributions:
        values = given.values.copy()
        values[values.argmax()] = 0
        return replace(given, values=values)

    with_contributions(patch, without_largest)


@breaks("contributions_add_up_to_scores")
def another_item_adds_it(case: Case, patch: Patch) -> None:
    with_contributions(patch, lambda given: replace(given, items=(given.items + 1) % 50))


@breaks("contributions_add_up_to_scores")
def contributions_depend_on_the_batch(case: Case, patch: Patch) -> None:
    def shifted(given: Contributions) -> Contributions:
        step = len(given.rest) * 1e-12
        return replace(given, values=given.values + step)

    with_contributions(patch, shifted)


@breaks("contributions_add_up_to_scores")
def the_tag_promises_what_the_scorer_lacks(case: Case, patch: Patch) -> None:
    patch.delattr(ItemItemScorer, "contributions")


@breaks("only_allowed_items_are_listed")
def what_is_allowed_is_not_looked_at(case: Case, patch: Patch) -> None:
    real = case.model.recommend
    patch.setattr(case.model, "recommend", lambda q, k, allowed=None: real(q, k), raising=False)


@breaks("only_allowed_items_are_listed")
def what_is_not_allowed_is_cut_from_the_list(case: Case, patch: Patch) -> None:
    real = case.model.recommend

    def recommend(queries: DataFrame, k: int, allowed: Any = None) -> DataFrame:
        lists = real(queries, k)
        return lists if allowed is None else lists.where(F.col("item_idx").isin(allowed.tolist()))

    patch.setattr(case.model, "recommend", recommend, raising=False)


# --- vectors of items ---------------------------------------------------------------------------


def vectors_by_group(model: RetrieverModel) -> Array:
    """Return a vector for each item that the check takes: those of a group are the same."""
    return np.eye(4, dtype=np.float32)[model.items // 3 % 4]


def with_vectors(case: Case, patch: Patch, vectors: Callable[[RetrieverModel], Array]) -> None:
    patch.setattr(type(case.model), "item_vectors", vectors)


def test_vectors_that_say_the_group_are_taken(case: Case, monkeypatch: Patch) -> None:
    with_vectors(case, monkeypatch, vectors_by_group)
    checks.vectors_of_items_are_rows_of_the_vocabulary(case)


@breaks("vectors_of_items_are_rows_of_the_vocabulary")
def vectors_are_not_saved(case: Case, patch: Patch) -> None:
    vectors = vectors_by_group(case.model)
    patch.setattr(case.model, "item_vectors", lambda: vectors, raising=False)


@breaks("vectors_of_items_are_rows_of_the_vocabulary")
def an_item_has_no_vector(case: Case, patch: Patch) -> None:
    with_vectors(case, patch, lambda model: vectors_by_group(model)[1:])


@breaks("vectors_of_items_are_rows_of_the_vocabulary")
def a_vector_is_not_finite(case: Case, patch: Patch) -> None:
    def with_a_hole(model: RetrieverModel) -> Array:
        vectors = vectors_by_group(model)
        vectors[0, 0] = np.inf
        return vectors

    with_vectors(case, patch, with_a_hole)


@breaks("vectors_of_items_are_rows_of_the_vocabulary")
def vectors_are_those_of_other_items(case: Case, patch: Patch) -> None:
    def shuffled(model: RetrieverModel) -> Array:
        return np.random.default_rng(0).permutation(vectors_by_group(model))

    with_vectors(case, patch, shuffled)


@pytest.mark.parametrize(
    ("check", "breakage"), BROKEN, ids=[f"{c}-{b.__name__}" for c, b in BROKEN]
)
def test_check_fails_for_a_broken_model(
    case: Case, check: str, breakage: Breakage, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = next(c.run for c in CHECKS if c.name == check)
    breakage(case, monkeypatch)
    with pytest.raises((AssertionError, ConfigError)):
        run(case)


def test_every_check_is_broken_once() -> None:
    ours = {check.name for check in CHECKS if "retriever" in check.kinds}
    assert {check for check, _ in BROKEN} == ours
