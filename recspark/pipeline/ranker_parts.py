"""What each feature of a pair adds to a ranker's score, on a night that is over."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
from pyspark.sql import functions as F

from recspark.config import Config, Mode
from recspark.data.feature_encoding import FIRST, UNKNOWN, Encoding, parse_encoded
from recspark.data.interactions import before
from recspark.errors import StageOrderError
from recspark.models.base import PairBlock, RankerModel, explained
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import load_model
from recspark.pipeline.pairs import pairs_with_features
from recspark.pipeline.runlog import RunLog, begun_runs
from recspark.tables.catalog import TableCatalog


@dataclass(frozen=True)
class Part:
    """What a feature adds to the score of a pair: its name, its value (None = missing), and that."""

    feature: str
    value: float | str | None
    adds: float


@dataclass(frozen=True)
class ScoreParts:
    """The score of a pair, and what makes it.

    `parts` : every feature, the one that moves the score most first. `rest` is what no feature
    adds; `rest` and what all parts add sum up to `score`.
    """

    score: float
    rest: float
    parts: list[Part]

    def to_dict(self, n: int) -> dict[str, Any]:
        """Return plain values, with the first `n` parts."""
        return {
            "score": self.score,
            "rest": self.rest,
            "n_features": len(self.parts),
            "features": [vars(part) for part in self.parts[:n]],
        }


def past_context(catalog: TableCatalog, config: Config, run_date: date, run_id: str) -> RunContext:
    """Return a context that reads what a run of an earlier night read and wrote. It begins nothing.

    `config` : the settings of that run, with the paths of now. Raises StageOrderError where the run
    has no row in `runs`.
    """
    for run in begun_runs(catalog, run_date):
        if run.run_id == run_id:
            runlog = RunLog(catalog, run_date, run_id)
            return RunContext(catalog.spark, catalog, config, run_date, run_id, run.pins, runlog)
    raise StageOrderError(f"night {run_date}: run {run_id} has no row in table 'runs'")


def score_parts(
    context: RunContext, ranker: str, user_id: str, item_id: str, mode: Mode
) -> ScoreParts | None:
    """Return what makes a ranker's score of a candidate in lists of `mode`; None if the ranker cannot
    say.

    The item must be a candidate of one of the ranker's retrievers for the user. The features are
    computed again, by the code that computed them in the night; a score also depends on the user's
    other candidates, so those are computed with it. Raises StageOrderError where the fitted ranker
    is gone or was fitted by other code.

    Cost: a few Spark jobs on the rows of one user.
    """
    cutoff = context.cutoffs.tonight
    fitted = load_model(context, ranker, cutoff)
    assert isinstance(fitted, RankerModel), ranker
    scorer = fitted.pair_scorer()
    explained_scorer = explained(scorer)
    if explained_scorer is None:
        return None
    user = context.read("user_ids").where(F.col("user_id") == user_id).select("user_idx")
    item = context.read("item_ids").where(F.col("item_id") == item_id).select("item_idx")
    [[user_idx]], [[item_idx]] = user.collect(), item.collect()
    lists = context.read("candidates").where(
        (F.col("run_date") == F.lit(context.run_date))
        & (F.col("cutoff") == F.lit(cutoff))
        & (F.col("mode") == F.lit(mode))
        & (F.col("user_idx") == user_idx)
    )
    histories = context.read("histories").where(F.col("user_idx") == user_idx)
    users = before(histories, cutoff, ratings=context.config.features.explicit)
    pairs = pairs_with_features(context, ranker, cutoff, lists, users)
    keys = ("user_idx", "item_idx")
    encoded = fitted.encoding.encode(pairs, keys).where(F.col("item_idx") == item_idx)
    batches = encoded.toArrow().combine_chunks().to_batches()
    if not batches:
        return None
    numbers, fields = parse_encoded(batches[0], fitted.encoding)
    block = PairBlock(np.array([user_idx]), np.array([item_idx], np.int32), numbers, fields)
    adds = explained_scorer.feature_contributions(block)[0].astype(np.float64)
    names = (*fitted.encoding.numbers, *fitted.encoding.fields)
    values = [*map(_number, numbers[0]), *_texts(fitted.encoding, fields[0])]
    order = np.argsort(-np.abs(adds[:-1]), kind="stable")
    parts = [Part(names[n], values[n], float(adds[n])) for n in order]
    return ScoreParts(float(scorer.score(block)[0]), float(adds[-1]), parts)


def _number(value: np.float32) -> float | None:
    return None if np.isnan(value) else float(value)


def _texts(encoding: Encoding, codes: np.ndarray[Any, Any]) -> list[str | None]:
    """Return the values of fields; None = missing, "(unknown)" = not in the vocabulary."""
    return [
        values[code - FIRST] if code >= FIRST else "(unknown)" if code == UNKNOWN else None
        for values, code in zip(encoding.fields.values(), codes.tolist(), strict=True)
    ]
