"""Each check of rankers and of encoders fails for a model that is broken in the way it guards
against; the models are those of docs/add_a_model.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark.config import Train
from recspark.models import artifacts
from recspark.models.base import FitOptions, PairBlock
from recspark.models.registry import model_spec
from recspark.testing.case import BaseCase
from recspark.testing.contract import CHECKS, case_class
from recspark.testing.encoder_checks import EncoderCase
from recspark.testing.ranker_checks import RankerCase
from tests.contract.documented import documented

pytestmark = pytest.mark.spark
Patch = pytest.MonkeyPatch
Breakage = Callable[[Any, Patch], None]
BROKEN: list[tuple[str, Breakage]] = []
ALGORITHMS = {"ranker": "linear", "encoder": "words"}
OPTIONS = FitOptions(in_process=True, train=Train(ranks=1))  # type: ignore[call-arg]


def breaks(check: str) -> Callable[[Breakage], Breakage]:
    def add(breakage: Breakage) -> Breakage:
        BROKEN.append((check, breakage))
        return breakage

    return add


@pytest.fixture(scope="module")
def cases(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseCase]:
    """The case of each kind, and all that it computes once."""
    made: dict[str, BaseCase] = {}
    for kind, name in ALGORITHMS.items():
        folder = tmp_path_factory.mktemp(f"bite_{name}")
        spec = model_spec(documented(spark, folder, name))
        made[kind] = case_class(spec)(spark, spec, {}, str(folder / "artifacts"), OPTIONS)
    return made


@breaks("every_pair_has_a_score")
def one_score_for_all(case: RankerCase, patch: Patch) -> None:
    patch.setattr(
        case, "scores", case.model.score(case.pairs).withColumn("score", F.lit(1.0)).toArrow()
    )


@breaks("every_pair_has_a_score")
def pairs_are_left_out(case: RankerCase, patch: Patch) -> None:
    patch.setattr(case, "scores", case.scores.slice(1))


@breaks("a_pair_has_its_score_whoever_is_asked_beside")
def scores_are_of_the_partition(case: RankerCase, patch: Patch) -> None:
    assert case.scores.num_rows
    real = case.model.score
    moved = (F.col("score") + F.spark_partition_id()).cast("float")
    patch.setattr(case.model, "score", lambda p: real(p).withColumn("score", moved), raising=False)


@breaks("what_is_planted_is_learned")
def what_is_learned_is_the_opposite(case: RankerCase, patch: Patch) -> None:
    at = case.scores.column_names.index("score")
    turned = pa.array(-case.scores.column("score").to_numpy())
    patch.setattr(case, "scores", case.scores.set_column(at, "score", turned))


@breaks("a_fit_does_not_depend_on_the_order_of_examples")
def a_fit_sees_its_rows_in_order(case: RankerCase, patch: Patch) -> None:
    real = case.fit

    def fit(data: Any) -> Any:
        model = real(data)
        first = data.examples.rows.first()
        model.weights = model.weights + float(first["item_idx"])
        return model

    case.model.weights = fit(case.data).weights  # type: ignore[attr-defined]
    patch.setattr(case, "fit", fit)


@breaks("missing_and_unknown_features_are_scored")
def missing_numbers_are_not_thought_of(case: RankerCase, patch: Patch) -> None:
    real = case.model.score
    lost = F.array_contains("numbers", F.lit(float("nan")).cast("float"))
    patch.setattr(
        case.model, "score",
        lambda pairs: real(pairs).withColumn("score", F.lit(float("nan")).cast("float"))
        if pairs.where(lost).count() else real(pairs),
        raising=False,
    )  # fmt: skip


@breaks("a_saved_ranker_gives_the_same_scores")
def a_vocabulary_is_lost(case: RankerCase, patch: Patch) -> None:
    real = artifacts.load

    def load(folder: str, spec: Any) -> Any:
        model: Any = real(folder, spec)
        fields = {name: values[1:] for name, values in model.encoding.fields.items()}
        model.encoding = type(model.encoding)(model.encoding.numbers, fields)
        return model

    patch.setattr(artifacts, "load", load)


@breaks("wrong_pairs_are_named")
def pairs_are_not_checked(case: RankerCase, patch: Patch) -> None:
    patch.setattr(case.model, "score", lambda pairs: pairs, raising=False)


@breaks("no_pairs_no_scores")
def nobody_gets_a_score(case: RankerCase, patch: Patch) -> None:
    patch.setattr(case.model, "score", lambda _: case.pairs.limit(1), raising=False)


def with_vectors(case: EncoderCase, patch: Patch, change: Callable[[DataFrame], DataFrame]) -> None:
    """What the encoder gives is what `change` makes of it."""
    real = case.model.encode
    patch.setattr(case.model, "encode", lambda items: change(real(items)), raising=False)


@breaks("vectors_are_of_one_size")
def a_vector_is_shorter(case: EncoderCase, patch: Patch) -> None:
    short = F.when(F.col("item_idx") == 0, F.slice("vector", 1, 2)).otherwise(F.col("vector"))
    changed = case.model.encode(case.content).withColumn("vector", short)
    patch.setattr(case, "vectors", changed.toArrow())


@breaks("vectors_are_of_one_size")
def all_vectors_are_the_same(case: EncoderCase, patch: Patch) -> None:
    same = F.transform("vector", lambda _: F.lit(1.0).cast("float"))
    patch.setattr(
        case, "vectors", case.model.encode(case.content).withColumn("vector", same).toArrow()
    )


class WrongParts:
    """Says that no feature adds anything."""

    def __init__(self, scorer: Any) -> None:
        self.score = scorer.score

    def feature_contributions(self, block: PairBlock) -> Any:
        return np.zeros((len(block.user_idx), block.numbers.shape[1] + block.fields.shape[1] + 1))


@breaks("features_add_up_to_scores")
def features_add_up_to_something_else(case: RankerCase, patch: Patch) -> None:
    scorer = WrongParts(case.model.pair_scorer())
    patch.setattr(case.model, "pair_scorer", lambda: scorer, raising=False)


@breaks("same_content_same_vector")
def a_vector_follows_the_id(case: EncoderCase, patch: Patch) -> None:
    moved = F.transform("vector", lambda v: (v + F.col("item_idx")).cast("float"))
    changed = case.model.encode(case.content).withColumn("vector", moved)
    patch.setattr(case, "vectors", changed.toArrow().sort_by("item_idx"))


@breaks("an_item_has_its_vector_whoever_is_beside")
def a_vector_is_of_the_partition(case: EncoderCase, patch: Patch) -> None:
    assert case.vectors.num_rows
    noise = F.transform("vector", lambda v: (v + F.spark_partition_id() + 1).cast("float"))
    with_vectors(case, patch, lambda vectors: vectors.withColumn("vector", noise))


@breaks("refit_gives_the_same_encoder")
def another_fit_is_another_encoder(case: EncoderCase, patch: Patch) -> None:
    draws = iter(range(10))
    kind = type(case.model)
    patch.setattr(kind, "arrays", lambda _: {"drawn": np.array([next(draws)])})


@breaks("a_saved_encoder_gives_the_same_vectors")
def another_encoder_is_loaded(case: EncoderCase, patch: Patch) -> None:
    assert case.saved
    small = case.make(size=3).fit(case.data, case.options)
    patch.setattr(artifacts, "load", lambda folder, spec: small)


@breaks("wrong_items_are_named")
def items_are_not_checked(case: EncoderCase, patch: Patch) -> None:
    patch.setattr(case.model, "encode", lambda items: items, raising=False)


@breaks("no_items_no_vectors")
def nothing_has_a_vector(case: EncoderCase, patch: Patch) -> None:
    patch.setattr(case.model, "encode", lambda _: case.content.limit(1), raising=False)


@pytest.mark.parametrize(
    ("check", "breakage"), BROKEN, ids=[f"{c}-{b.__name__}" for c, b in BROKEN]
)
def test_check_fails_for_a_broken_model(
    cases: dict[str, BaseCase], check: str, breakage: Breakage, monkeypatch: pytest.MonkeyPatch
) -> None:
    [found] = [c for c in CHECKS if c.name == check]
    case = cases[found.kinds[0]]
    weights = getattr(case.fitted, "weights", None)
    breakage(case, monkeypatch)
    try:
        with pytest.raises(AssertionError):
            found.run(case)
    finally:
        if weights is not None:
            case.fitted.weights = weights  # type: ignore[attr-defined]


def test_every_check_is_broken_once() -> None:
    ours = {check.name for check in CHECKS if check.kinds in (("ranker",), ("encoder",))}
    assert {check for check, _ in BROKEN} == ours
