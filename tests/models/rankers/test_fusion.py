"""Reciprocal-rank fusion, blend and switch: planted answers, and what each refuses."""

from __future__ import annotations

import doctest
import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from recspark.config.load import load_config
from recspark.data.blocks import Array
from recspark.data.dataset import Examples
from recspark.data.examples import proposed, with_pair_features
from recspark.errors import ConfigError, EmptyDataError
from recspark.models.base import FitOptions
from recspark.models.rankers.blend import Blend, BlendModel, calibrated, fitted_weights
from recspark.models.rankers.rrf import Rrf
from recspark.models.rankers.switch import Switch, SwitchModel
from recspark.models.registry import MODELS
from recspark.pipeline.checks import check_settings
from tests.models.rankers.fusion import (
    activities,
    columns,
    data_of,
    fitted,
    ndcg,
    needs,
    scores,
)

AB = ("a", "b")
NAN = float("nan")


@pytest.mark.spark
def test_switching_gives_the_better_source_and_blending_lies_between(spark: SparkSession) -> None:
    """Source `a` is right for heavy users and `b` for light ones."""
    learnt, tested = activities(), activities(seed=4)
    data = data_of(spark, learnt, AB)
    alone = [ndcg(-tested[f"{name}_rank"], tested) for name in AB]
    switch, blend, rrf = (
        ndcg(scores(fitted(name, data, AB), tested), tested) for name in ("switch", "blend", "rrf")
    )
    assert switch == 1
    assert max(alone) < blend < 1
    assert max(alone) < rrf < 1


# --- rrf ----------------------------------------------------------------------------------------


def test_rrf_by_hand() -> None:
    pairs = columns(1, {"a": np.array([[1.0, 2, NAN]]), "b": np.array([[NAN, 3.0, NAN]])}, LABEL3)
    data: Any = type("Data", (), {"cutoff": None})  # nothing of it is read
    score = scores(fitted("rrf", data, AB, k=10, weights={"b": 2}), pairs)
    assert score.tolist() == pytest.approx([1 / 11, 1 / 12 + 2 / 13, 0])


LABEL3 = np.array([[1.0, 0, 0]])


@pytest.mark.spark
def test_rrf_has_the_same_bits_when_scores_are_rescaled_and_a_blend_has_not(
    spark: SparkSession,
) -> None:
    """From lists with other scores in the same order, through the frames of a night."""
    pairs = activities(n_users=10)
    data = data_of(spark, pairs, AB)
    rrf, blend = fitted("rrf", data, AB), fitted("blend", data, AB, scores="score")

    def scored(rescale: Any) -> tuple[pa.Table, Array]:
        lists = pa.concat_tables(
            pa.table(
                {
                    "mode": pairs["mode"],
                    "model": np.full(len(pairs["mode"]), name),
                    "user_idx": pairs["user_idx"],
                    "item_idx": pairs["item_idx"],
                    "rank": pairs[f"{name}_rank"].astype(np.int32),
                    "score": rescale(pairs[f"{name}_score"]),
                }
            )
            for name in AB
        )
        described = with_pair_features(proposed(spark.createDataFrame(lists), AB), AB, None, None)
        encoded = rrf.encoding.encode(described, ("user_idx", "item_idx"))
        by_key = [("user_idx", "ascending"), ("item_idx", "ascending")]
        others = {f"{name}_score": rescale(pairs[f"{name}_score"]) for name in AB}
        return rrf.score(encoded).toArrow().sort_by(by_key), scores(blend, {**pairs, **others})

    by_rrf, by_blend = scored(lambda score: score)
    rescaled_rrf, rescaled_blend = scored(lambda score: np.exp(3 * score) - 7)
    assert by_rrf == rescaled_rrf
    assert not np.array_equal(by_blend, rescaled_blend)
    assert np.array_equal(by_rrf.column("score").to_numpy(), scores(rrf, pairs))


@pytest.mark.parametrize("name", ["blend", "switch"])
def test_examples_of_the_documentation(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"recspark.models.rankers.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


# --- blend --------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.one_of(st.none(), st.integers(-3, 3)), st.booleans()), min_size=1, max_size=60
    ).filter(lambda rows: 0 < sum(label for _, label in rows) < len(rows)),
    st.floats(0.01, 100),
)
def test_a_calibrated_score_never_falls_and_is_finite(rows: Any, prior: float) -> None:
    score = np.array([NAN if value is None else float(value) for value, _ in rows])
    curve = calibrated(score, np.array([label for _, label in rows]), prior)
    values = curve(np.linspace(-5, 5, 101))
    if not np.isnan(score).all():
        assert (np.diff(values) >= 0).all()
    assert np.isfinite(values).all()
    assert np.isfinite(curve(np.array([NAN]))).all()


def test_a_calibration_by_hand() -> None:
    """Scores 1 and 2 are pooled, since 2 is acted on less often than 1; so are 3 and 4."""
    score = np.array([1.0, 1, 2, 2, 3, 4, NAN, NAN, NAN, NAN])
    is_acted_on = np.array([1, 0, 0, 0, 1, 1, 1, 0, 0, 0], bool)  # 4 of 10
    curve = calibrated(score, is_acted_on, prior=10)
    base = np.log(0.4 / 0.6)
    low, high, missing = (np.log(s / (1 - s)) - base for s in (5 / 14, 6 / 12, 5 / 14))
    assert curve.score.tolist() == [1.5, 3.5]
    assert curve.log_odds == pytest.approx([low, high])
    assert curve(np.array([0, 2.5, 9, NAN])) == pytest.approx(
        [low, (low + high) / 2, high, missing]
    )


def test_weights_are_the_best_that_are_not_negative() -> None:
    """The first source is right, the second noise, and the third the opposite of right."""
    rng = np.random.default_rng(1)
    start = np.arange(0, 4001, 20)
    right, noise = rng.normal(size=(2, 4000))
    wrong = rng.normal(size=4000) - right
    is_acted_on = (right + rng.gumbel(size=4000)) > 2
    weights = fitted_weights([right, noise, wrong], is_acted_on, start, 0.001)
    assert weights[0] > 0.5
    assert weights[1] < 0.2
    assert weights[2] == 0
    again = fitted_weights([right, noise, wrong], is_acted_on, start, 10.0)
    assert 0 < again[0] < weights[0] / 2
    neither = fitted_weights([right, noise], np.ones(4000, bool), start, 0.001)
    assert neither.tolist() == [0.5, 0.5]


@pytest.mark.spark
def test_a_source_without_any_candidate_changes_no_order(spark: SparkSession) -> None:
    """It is missing in every pair. A user with one candidate has a score, too."""
    silent = {f"c_{name}": np.full(720, NAN) for name in ("rank", "score", "relative")}
    pairs = {**activities(), **silent}
    for name in ("rrf", "blend", "switch"):
        with_silent = scores(fitted(name, data_of(spark, pairs, (*AB, "c")), (*AB, "c")), pairs)
        without = scores(fitted(name, data_of(spark, pairs, AB), AB), pairs)
        assert np.isfinite(with_silent).all()
        for user in range(60):
            of_user = pairs["user_idx"] == user
            order, expected = (
                np.argsort(-s[of_user], kind="stable") for s in (with_silent, without)
            )
            assert order.tolist() == expected.tolist(), name
        [alone] = scores(
            fitted(name, data_of(spark, pairs, AB), AB), {k: v[:1] for k, v in pairs.items()}
        )
        assert alone == without[0]


@pytest.mark.spark
@pytest.mark.parametrize(("name", "label"), [("blend", 0.0), ("blend", 1.0), ("switch", 0.0)])
def test_nothing_to_learn_from_is_refused(spark: SparkSession, name: str, label: float) -> None:
    pairs = activities()
    data = data_of(spark, {**pairs, "label": np.full(720, label, np.float32)}, AB)
    with pytest.raises(EmptyDataError, match=rf"^{name}: .* it learns from lists that have"):
        fitted(name, data, AB)


@pytest.mark.spark
def test_scores_below_0_are_calibrated_as_they_are(spark: SparkSession) -> None:
    """They have no relative scores, and the retriever is heard all the same."""
    pairs = activities()
    pairs |= {"b_score": -pairs["b_rank"], "b_relative": np.full(720, NAN)}
    blend = fitted("blend", data_of(spark, pairs, AB), AB)
    assert blend.encoding.numbers == ("a_relative", "b_score")
    assert ndcg(scores(blend, pairs), pairs) > ndcg(-pairs["a_rank"], pairs)
    as_it_is = fitted("blend", data_of(spark, pairs, AB), AB, scores="score")
    assert as_it_is.encoding.numbers == ("a_score", "b_score")


@pytest.mark.spark
def test_each_mode_has_its_own_blend_and_its_own_switch(spark: SparkSession) -> None:
    """Source `a` is right in mode novel and `b` in mode repeat; a mode without examples has both."""
    novel = activities()
    is_heavy = novel["user_activity"] == "heavy"
    mode = np.where(is_heavy, "novel", "repeat")
    pairs = {**novel, "mode": mode, "user_activity": np.full(720, "light")}
    for name in ("blend", "switch"):
        model = fitted(name, data_of(spark, pairs, AB), AB)
        assert ndcg(scores(model, pairs), pairs) == 1, name
        only_novel = {key: value[is_heavy] for key, value in pairs.items()}
        model = fitted(name, data_of(spark, only_novel, AB), AB)
        asked = {**only_novel, "mode": np.full(360, "repeat")}
        assert ndcg(scores(model, asked), asked) == 1, name


@pytest.mark.spark
def test_a_blend_of_a_sample_of_the_users(spark: SparkSession) -> None:
    """Many examples: those of some users, the same ones for a seed, whatever the partitions."""
    pairs = activities(n_users=200)
    data = data_of(spark, pairs, AB)
    assert data.examples is not None
    mixed = data.examples.rows.orderBy(F.xxhash64("item_idx", "user_idx")).repartition(3)
    mirrored = replace(data, examples=Examples(mixed, data.examples.encoding))
    blends = [
        Blend.from_dict({"max_examples": most}).fit(some, FitOptions(), needs(*AB))
        for some, most in ((data, 600), (mirrored, 600), (data, 10_000))
    ]
    first, second, all_examples = (blend.arrays() for blend in blends)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not np.array_equal(first["weights"], all_examples["weights"])


# --- switch -------------------------------------------------------------------------------------


def test_the_next_source_follows_where_the_first_one_ends() -> None:
    """`a` lists items 0 and 1, `b` lists 1, 2 and 3, and nobody lists item 4."""
    ranks = {
        "a": np.array([[2.0, 1, NAN, NAN, NAN]]),
        "b": np.array([[NAN, 1.0, 3, 2, NAN]]),
    }
    pairs = columns(1, ranks, np.zeros((1, 5)))
    data: Any = type("Data", (), {"cutoff": None})
    for order, expected in ((["a"], [1, 0, 3, 2, 4]), (["b", "a"], [1, 3, 2, 0, 4])):
        model = fitted("switch", data, AB, by="source", choices={"all": order})
        score = scores(model, pairs)
        assert np.argsort(-score).tolist() == expected
        assert score[4] == 0
        assert (score[:4] > 0).all()


@pytest.mark.spark
@pytest.mark.parametrize(
    ("by", "feature", "low", "high"),
    [
        ("orders", "user_n_orders", 2.0, 3.0),
        ("orders", "user_n_orders", NAN, 30.0),
        ("item_age", "item_age_days", 2.5, 3.0),
        ("activity", "user_activity", "", "heavy"),
    ],
)
def test_a_segment_has_the_source_that_is_best_for_it(
    spark: SparkSession, by: str, feature: str, low: Any, high: Any
) -> None:
    """A user without features has few orders, and is light."""
    pairs = activities()
    is_heavy = pairs["user_activity"] == "heavy"
    others = {"user_activity": np.full(720, "regular")} | {feature: np.where(is_heavy, high, low)}
    planted = {**pairs, **others}
    model = fitted("switch", data_of(spark, planted, AB), AB, by=by)
    assert isinstance(model, SwitchModel)
    assert ndcg(scores(model, planted), planted) == 1
    swapped = {**planted, feature: np.where(is_heavy, low, high)}
    assert ndcg(scores(model, swapped), swapped) < 0.5


@pytest.mark.spark
def test_the_length_of_the_lists_decides_which_source_is_better(spark: SparkSession) -> None:
    """`a` has one item right and first, the other at rank 12; `b` has both, at ranks 2 and 3."""
    ranks = {"a": np.array([[1.0, 12, 2, 3]]), "b": np.array([[2.0, 3, 1, 4]])}
    pairs = columns(1, ranks, np.array([[1, 1, 0, 0]]))
    first = {
        k: fitted("switch", data_of(spark, pairs, AB), AB, by="source", k=k).arrays()["place"]
        for k in (1, 10)
    }
    assert first[1][2, 0].tolist() == [0, 1]
    assert first[10][2, 0].tolist() == [1, 0]  # 1/log2(3) + 1/log2(4) > 1
    assert 1 / np.log2(3) + 1 / np.log2(4) > 1


@pytest.mark.spark
def test_each_list_counts_once_however_much_the_user_bought(spark: SparkSession) -> None:
    """`a` has the only item of the first user, NDCG 1; `b` two of the three of the second, NDCG .77,
    whose sum of gains is 1.63.
    """
    ranks = {
        "a": np.array([[1.0, 2, 3, 4], [20, 20, 20, 1]]),
        "b": np.array([[20.0, 3, 2, 1], [1, 2, 20, 3]]),
    }
    pairs = columns(2, ranks, np.array([[1, 0, 0, 0], [1, 1, 1, 0]]))
    place = fitted("switch", data_of(spark, pairs, AB), AB, by="source").arrays()["place"]
    assert place[2, 0].tolist() == [0, 1]


@pytest.mark.spark
def test_a_segment_without_examples_takes_the_order_of_all(spark: SparkSession) -> None:
    pairs = activities()
    is_light = pairs["user_activity"] == "light"
    only_light = {key: value[is_light] for key, value in pairs.items()}
    model = fitted("switch", data_of(spark, only_light, AB), AB)
    heavy = {**only_light, "user_activity": np.full(360, "heavy")}
    assert ndcg(scores(model, heavy), heavy) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"choices": {"light": ["a"]}}, r"choices: \['regular', 'heavy'\] are missing"),
        ({"choices": {"lite": ["a"]}}, "no segment is called 'lite'. Did you mean 'light'"),
        ({"by": "source", "choices": {"all": []}}, r"choices.all = \[\]: name each retriever once"),
        ({"by": "source", "choices": {"all": ["a", "a"]}}, "name each retriever once"),
        ({"by": "sources"}, "by"),
    ],
)
def test_choices_that_cannot_be_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Switch.from_dict(settings)


# --- needs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rrf", "blend", "switch"])
def test_a_retriever_is_needed(name: str) -> None:
    algorithm = MODELS[name].load().from_dict({})
    with pytest.raises(ConfigError, match=rf"{name} ranks what retrievers list.*\['words'\]"):
        algorithm.check_needs({"words": "encoder"})


def test_names_that_are_not_needed_are_named() -> None:
    kinds: Any = {"ease": "retriever", "als": "retriever", "words": "encoder"}
    with pytest.raises(ConfigError, match="rrf: 'eese' is no retriever of its needs. Did you mean"):
        Rrf.from_dict({"weights": {"eese": 2}}).check_needs(kinds)
    with pytest.raises(ConfigError, match=r"rrf: the weights of all of \['ease', 'als'\] are 0"):
        Rrf.from_dict({"weights": {"ease": 0, "als": 0}}).check_needs(kinds)
    with pytest.raises(ConfigError, match="switch: 'words' is no retriever of its needs"):
        Switch.from_dict({"by": "source", "choices": {"all": ["words"]}}).check_needs(kinds)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["models.rrf.learns=true"], "'rrf' needs no examples.*: say so, models.rrf.learns=false"),
        (
            ["models.switch.choices={all: [ease]}"],
            "'switch' needs no examples.*switch.learns=false",
        ),
        (
            ["models.blend.learns=false"],
            "'blend' needs examples.*: say so, models.blend.learns=true",
        ),
        (["models.blend.learns=maybe"], "model 'blend': learns = 'maybe': true or false"),
    ],
)
def test_the_settings_say_who_needs_examples(settings: list[str], message: str) -> None:
    night = [
        "models=[popular, ease, rrf, blend, switch]",
        *[f"models.{name}.needs=[popular, ease]" for name in ("rrf", "blend", "switch")],
        "models.switch.by=source",
    ]
    check_settings(load_config("test", night))
    with pytest.raises(ConfigError, match=message):
        check_settings(load_config("test", [*night, *settings]))


@pytest.mark.spark
def test_saved_blends_are_the_same(spark: SparkSession) -> None:
    """Curves with different numbers of knots, by mode and source."""
    pairs = activities()
    pairs["a_relative"] = np.where(pairs["a_relative"] > 2, pairs["a_relative"], NAN)
    blend = fitted("blend", data_of(spark, pairs, AB), AB)
    again = BlendModel.restored(blend.settings, blend.cutoff, blend.saved_arrays())
    assert len({len(c.score) for b in again.blends for c in b.curves}) > 1
    assert np.array_equal(scores(again, pairs), scores(blend, pairs))
