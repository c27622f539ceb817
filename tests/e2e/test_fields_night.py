"""A night whose ranker is a network of fields, trained by two Horovod ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from recspark import storage
from recspark.models.rankers.wide_deep import WideDeepModel
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import load_model
from tests.conftest import NIGHT, run_night

pytestmark = [
    pytest.mark.spark,
    pytest.mark.horovod,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]
SETTINGS = (
    "models=[popular, item_knn, wide_deep]",
    "models.wide_deep.needs=[popular, item_knn]",
    "models.wide_deep.epochs=2",
    "models.wide_deep.cross_rows=4096",
    "publish={model: wide_deep, ladder: [popular], neighbours_model: item_knn}",
    "evaluate.n_bootstrap=20",
    "train.ranks=2",
)


@pytest.fixture(scope="module")
def night(retail_slice: Path, tmp_path_factory: pytest.TempPathFactory) -> RunContext:
    context = run_night(tmp_path_factory.mktemp("night"), retail_slice, NIGHT, *SETTINGS)
    assert isinstance(context, RunContext)
    return context


def test_the_network_is_published(night: RunContext) -> None:
    assert {row.status for row in night.runlog.rows().values()} == {"ok"}
    version = night.catalog.version("recommendations")
    models = night.catalog.read("recommendations", version).groupBy("model").count().collect()
    n_lists = {row["model"]: row["count"] for row in models}
    assert n_lists["wide_deep"] > 0.9 * sum(n_lists.values())


def test_the_standard_crosses_are_there(night: RunContext) -> None:
    model = load_model(night, "wide_deep", night.cutoffs.tonight)
    assert isinstance(model, WideDeepModel)
    arrays = model.arrays()
    n_hashed = len(arrays["wide"]) - model.inputs.n_codes
    assert n_hashed == 4096
    assert 0 < model.zero_share < 1
    assert model.n_wide_seen > 500


def test_each_training_has_a_curve_and_leaves_no_rows(night: RunContext) -> None:
    version = night.catalog.version("training_curves")
    curves = night.catalog.read("training_curves", version).where("model = 'wide_deep'").collect()
    assert {row["cutoff"] for row in curves} == {
        cutoff.replace(tzinfo=None) for cutoff in (night.cutoffs.backtest, night.cutoffs.tonight)
    }
    assert all(row["validation"] > 0 for row in curves)
    root = storage.absolute(night.config.paths.checkpoints)
    assert not [uri for uri in storage.list_files(root) if "training_rows" in uri]
