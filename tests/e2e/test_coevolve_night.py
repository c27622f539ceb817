"""Two nights with `coevolve`, trained by two Horovod ranks; the second carries states on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from pyspark.sql import functions as F

from recspark.data.blocks import micros
from recspark.engines.event_walk import Clocks
from recspark.models.neural import Job
from recspark.models.sequences import coevolve
from recspark.models.sequences.coevolve import CoevolveModel
from recspark.models.sequences.event_stream import replay
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import dataset, load_model
from recspark.train.comm import Comm
from recspark.train.feed import plan_shards
from recspark.train.launch import LocalLauncher
from recspark.train.loop import LoopOptions
from tests.conftest import run_night

pytestmark = [
    pytest.mark.spark,
    pytest.mark.horovod,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]
SETTINGS = (
    "models=[popular, ease, coevolve]",
    "models.coevolve.epochs=2",
    "models.coevolve.embedding_size=8",
    "models.coevolve.refit_every_days=7",
    "evaluate.n_bootstrap=20",
    "ingest.min_clean_fraction=0.05",
    "train.ranks=2",
)


@pytest.fixture(scope="module")
def nights(retail_slice: Path, tmp_path_factory: pytest.TempPathFactory) -> list[RunContext]:
    root = tmp_path_factory.mktemp("nights")
    contexts = []
    for day in ("2010-12-07", "2010-12-08"):
        context = run_night(root, retail_slice, day, *SETTINGS)
        assert isinstance(context, RunContext)
        contexts.append(context)
    return contexts


def model_of(night: RunContext) -> CoevolveModel:
    model = load_model(night, "coevolve", night.cutoffs.tonight)
    assert isinstance(model, CoevolveModel)
    return model


def test_both_nights_compare_it_with_the_others(nights: list[RunContext]) -> None:
    for night in nights:
        assert {row.status for row in night.runlog.rows().values()} == {"ok"}
        metrics = night.catalog.read("metrics", night.catalog.version("metrics"))
        rows = metrics.where(
            (F.col("run_date") == F.lit(night.run_date)) & (F.col("kind") == "backtest")
        )
        models = {row["model"] for row in rows.select("model").distinct().collect()}
        assert {"popular", "ease", "coevolve"} <= models


def test_the_second_night_carries_on_and_equals_a_replay(nights: list[RunContext]) -> None:
    first, second = (model_of(night) for night in nights)
    assert first.arrays()["trained_at"].tolist() == [micros(nights[0].cutoffs.tonight)]
    assert second.arrays()["trained_at"].tolist() == first.arrays()["trained_at"].tolist()
    arrays = second.arrays()
    np.testing.assert_array_equal(
        arrays["user_cell.weight_hh"], first.arrays()["user_cell.weight_hh"]
    )
    assert arrays["n_events"][0] > first.arrays()["n_events"][0]

    training = dataset(nights[1], second.cutoff, "coevolve").training_set("training_events")
    settings = second.settings
    assert isinstance(settings, coevolve.CoevolveSettings)
    job = Job(settings, second.items, plan_shards(training, 1), None, LoopOptions(1, 0.1))
    states = LocalLauncher(1).run(partial(replayed, dict(arrays)), job)[0].value
    for name in ("user_state", "item_state"):
        np.testing.assert_allclose(arrays[name], states[name], atol=1e-5)


def replayed(arrays: dict[str, np.ndarray], comm: Comm, job: Job) -> dict[str, np.ndarray]:
    """Return the states after all events, from the first one on, with the weights in `arrays`."""
    events, users = coevolve.read_events(comm, job)
    n_recent = job.settings.n_recent
    net = coevolve.make_net(job.settings, len(users), len(job.items), np.zeros(n_recent + 1), 1)
    for name, parameter in net.named_parameters():
        parameter.data.copy_(torch.from_numpy(np.array(arrays[name])))
    net.forget()
    clocks = Clocks.started(len(users), len(job.items), n_recent, int(events.event_at[0]))
    replay(net, events, clocks)
    return {name: net.get_parameter(name).detach().numpy() for name in ("user_state", "item_state")}


def test_states_and_next_visits_of_all_users_are_in_the_table(nights: list[RunContext]) -> None:
    for night in nights:
        model, tonight = model_of(night), night.cutoffs.tonight
        stored = night.catalog.read("user_states", night.catalog.version("user_states"))
        rows = stored.where(F.col("cutoff") == F.lit(tonight)).orderBy("user_idx").toArrow()
        arrays = model.arrays()
        np.testing.assert_array_equal(rows.column("user_idx").to_numpy(), arrays["user_idx"])
        states = np.array(rows.column("state").to_pylist(), np.float32)
        np.testing.assert_array_equal(states, arrays["user_state"])
        next_at = rows.column("next_visit_at").drop_null().cast("int64").to_numpy()
        assert len(next_at) > 0.5 * rows.num_rows
        assert (next_at > micros(tonight)).all()
