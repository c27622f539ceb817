"""The checks of rankers: models that score pairs of a user and an item."""

from __future__ import annotations

from functools import cached_property, reduce

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.data import examples
from recspark.data.blocks import micros
from recspark.data.dataset import Dataset, Examples
from recspark.data.feature_encoding import parse_encoded
from recspark.data.pair_features import FEATURES, Catalogue
from recspark.errors import ModelError
from recspark.hybrid.pairs import describe_pairs
from recspark.models import artifacts
from recspark.models.base import PairBlock, RankerModel, RetrieverModel, explained
from recspark.models.items.item_knn import ItemKNN
from recspark.models.items.popular import Popular
from recspark.testing import synth
from recspark.testing.case import BaseCase
from recspark.testing.check import check, raises

RANKER = ("ranker",)
SOURCES = ("popular", "item_knn")  # the models that propose the pairs
GROUPS = tuple(FEATURES)  # all groups of features of pairs
_KEY = [("user_idx", "ascending"), ("item_idx", "ascending")]


class RankerCase(BaseCase):
    """A ranker of the pairs that `popular` and `item_knn` propose.

    The planted rule: a user acts on a proposed item with a price above 4, and does not act on
    cheaper ones. For a ranker with the tag `sources`, which reads no price, a user acts on the items
    that `item_knn` ranks above 8, and on no others. One pair in ten breaks the rule.

    A ranker that learns nothing gets no examples to fit on; its pairs are the same.
    """

    def first_data(self) -> Dataset:
        """See `BaseCase`."""
        data = synth.dataset(self.spark, synth.power_law(150, 60))
        self.retrievers: dict[str, RetrieverModel] = {
            "popular": Popular.from_dict({"half_life_days": None}).fit(data, self.options),
            "item_knn": ItemKNN.from_dict({"half_life_days": None}).fit(data, self.options),
        }
        self.needed = self.retrievers
        self.algorithm.check_needs({name: model.kind for name, model in self.needed.items()})
        self.described = self.with_label(self.describe(data), data).toArrow().sort_by(_KEY)
        return self.with_examples(data)

    def describe(self, data: Dataset) -> DataFrame:
        """Return the pairs with a column for each of their features."""
        lists = [
            model.recommend(synth.ask(data), 20).withColumns(
                {"model": F.lit(name), "mode": F.lit("novel")}
            )
            for name, model in self.retrievers.items()
        ]
        described_pairs = describe_pairs(
            examples.proposed(reduce(DataFrame.unionByName, lists), SOURCES),
            data.histories,
            self.retrievers,
            Catalogue.of(data.item_features),
            micros(data.cutoff),
            GROUPS,
        )
        return examples.with_pair_features(
            described_pairs, SOURCES, data.user_features, data.item_features
        )

    def with_label(self, pairs: DataFrame, data: Dataset) -> DataFrame:
        """Return `pairs` with the cutoff, and with a label by the planted rule."""
        is_flipped = F.pmod(F.xxhash64("user_idx", "item_idx"), F.lit(10)) == 0
        is_right = F.col("item_price") > 4
        if "sources" in self.spec.tags:
            is_right = F.coalesce(F.col("item_knn_rank") < 8, F.lit(False))
        return pairs.withColumns(
            {
                "label": (is_right != is_flipped).cast("float"),
                "cutoff": F.lit(data.cutoff).cast("timestamp"),
            }
        )

    def with_examples(self, data: Dataset, *, mirrored: bool = False) -> Dataset:
        """Return `data` with examples; `mirrored`: in reverse order and in other partitions."""
        if not self.spec.learns:
            return data
        pairs = self.described
        if mirrored:
            pairs = pairs.take(pa.array(np.arange(pairs.num_rows)[::-1]))
        encoding = examples.make_pair_encoding(
            SOURCES, GROUPS, data.user_features, data.item_features
        )
        keys = ("cutoff", "mode", "user_idx", "item_idx", "label")
        encoded = encoding.encode(self.spark.createDataFrame(pairs), keys).toArrow()
        rows = self.spark.createDataFrame(encoded).repartition(5 if mirrored else 2, "user_idx")
        return Dataset(**{**vars(data), "examples": Examples(rows, encoding)})

    @property
    def model(self) -> RankerModel:
        """The fitted model."""
        assert isinstance(self.fitted, RankerModel)
        return self.fitted

    @cached_property
    def pairs(self) -> DataFrame:
        """The pairs, encoded as the model reads them, sorted by user and item; on the driver."""
        pairs = self.spark.createDataFrame(self.described)
        rows = self.model.encoding.encode(pairs, ("user_idx", "item_idx")).toArrow().sort_by(_KEY)
        return self.spark.createDataFrame(rows, schema.PAIRS)

    @cached_property
    def scores(self) -> pa.Table:
        """The scores of all pairs, sorted by user and item."""
        return scored(self.model, self.pairs)


def scored(model: RankerModel, pairs: DataFrame) -> pa.Table:
    """Return the scores of `pairs`, sorted by user and item. Runs one Spark job."""
    return model.score(pairs).toArrow().sort_by(_KEY)


@check(kinds=RANKER)
def every_pair_has_a_score(case: RankerCase) -> None:
    """There is one score per pair. Scores have the schema, are finite, and are not all equal."""
    scores = case.model.score(case.pairs)
    assert scores.schema == schema.SCORED
    assert case.scores.num_rows == case.pairs.count()
    score = case.scores.column("score").to_numpy()
    assert np.isfinite(score).all()
    assert score.std() > 0


@check(kinds=RANKER)
def a_pair_has_its_score_whoever_is_asked_beside(case: RankerCase) -> None:
    """Pairs in another order, in one or seven partitions, or only half of them: the same bits."""
    shuffled_pairs = case.pairs.orderBy(F.xxhash64("item_idx", "user_idx")).repartition(7)
    assert scored(case.model, shuffled_pairs) == case.scores
    even_scores = case.scores.filter(pa.array(case.scores.column("user_idx").to_numpy() % 2 == 0))
    assert scored(case.model, case.pairs.where("user_idx % 2 = 0").coalesce(1)) == even_scores


@check(kinds=RANKER)
def features_add_up_to_scores(case: RankerCase) -> None:
    """What the features add to the score of a pair is the score, to a hundred thousandth.

    A ranker need not give it. One that does has a column for each feature, and one for the rest.
    """
    scorer = case.model.pair_scorer()
    explained_scorer = explained(scorer)
    if explained_scorer is None:
        return
    pairs = case.pairs.toArrow().combine_chunks().to_batches()[0]
    numbers, fields = parse_encoded(pairs, case.model.encoding)
    users, items = (pairs.column(name).to_numpy() for name in ("user_idx", "item_idx"))
    block = PairBlock(users, items, numbers, fields)
    parts = explained_scorer.feature_contributions(block).astype(np.float64)
    assert parts.shape == (len(users), numbers.shape[1] + fields.shape[1] + 1)
    assert len(np.unique(parts[:, -1])) == 1
    error = np.abs(parts.sum(axis=1) - scorer.score(block))
    assert (error <= 1e-5 * np.abs(parts).sum(axis=1)).all(), f"off by {error.max():.2g}"


@check("learns", kinds=RANKER)
def what_is_planted_is_learned(case: RankerCase) -> None:
    """A pair that is acted on has a higher score than one that is not, in over 80% of cases.

    Each pair that is acted on is compared with each that is not. An equal score counts half.
    """
    is_acted_on, score = (
        case.described.column("label").to_numpy() > 0,
        case.scores.column("score").to_numpy(),
    )
    score_differences = score[is_acted_on][:, None] - score[~is_acted_on][None, :]
    assert ((score_differences > 0) + 0.5 * (score_differences == 0)).mean() > 0.8


@check("learns", kinds=RANKER)
def a_fit_does_not_depend_on_the_order_of_examples(case: RankerCase) -> None:
    """Examples in reverse order and in other partitions give the same bits."""
    refitted = case.fit(case.with_examples(case.data, mirrored=True))
    for name, array in case.model.arrays().items():
        assert np.array_equal(refitted.arrays()[name], array), f"array '{name}' differs"


@check(kinds=RANKER)
def missing_and_unknown_features_are_scored(case: RankerCase) -> None:
    """Pairs with all numbers missing, and all fields missing or unknown, get finite scores."""
    n_numbers, n_fields = len(case.model.encoding.numbers), len(case.model.encoding.fields)
    rows = [(1, code, [float("nan")] * n_numbers, [code] * n_fields) for code in (0, 1)]
    scores = scored(case.model, case.spark.createDataFrame(rows, schema.PAIRS))
    assert np.isfinite(scores.column("score").to_numpy()).all()


@check(kinds=RANKER)
def a_saved_ranker_gives_the_same_scores(case: RankerCase) -> None:
    """A saved and loaded model has the same settings and encoding, and gives the same bits."""
    loaded = artifacts.load(case.saved, case.spec)
    assert isinstance(loaded, RankerModel)
    assert (loaded.settings, loaded.encoding) == (case.model.settings, case.model.encoding)
    assert scored(loaded, case.pairs) == case.scores


@check(kinds=RANKER)
def wrong_pairs_are_named(case: RankerCase) -> None:
    """A missing column or a wrong type is a ModelError that names it and what the frame has."""
    with raises(ModelError, "numbers is missing", "'fields'"):
        case.model.score(case.pairs.drop("numbers"))
    with raises(ModelError, "user_idx is string, expected bigint"):
        case.model.score(case.pairs.withColumn("user_idx", F.lit("u")))


@check(kinds=RANKER)
def no_pairs_no_scores(case: RankerCase) -> None:
    """An empty frame of pairs gives an empty frame of scores."""
    assert case.model.score(case.pairs.limit(0)).toArrow().num_rows == 0
