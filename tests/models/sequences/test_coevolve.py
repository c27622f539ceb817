"""How `coevolve` trains by ranks, resumes, and scores by states that are stored or read anew."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recspark.data.blocks import MICROS_PER_DAY, Array, Histories, QueryBlock, Ragged, micros
from recspark.errors import CatalogueTooLargeError
from recspark.models.neural import Job, net_arrays
from recspark.models.scoring.topk import Shared
from recspark.models.sequences import coevolve
from recspark.models.sequences.carried_states import Carried
from recspark.models.sequences.coevolve import (
    CoevolveModel,
    CoevolveSettings,
    carry_rank,
    train_rank,
)
from recspark.models.sequences.event_stream import Events, Walker, replay
from recspark.models.sequences.intensity_scores import IntensityScores, item_vectors
from recspark.models.sequences.state_table import (
    expected_gap,
    median_gap,
    state_batch,
    total_intensities,
)
from recspark.nets.coevolve import CoevolveNet
from recspark.testing import synth
from recspark.train.feed import plan_shards
from recspark.train.launch import LocalLauncher
from recspark.train.loop import LoopOptions, Trained

pytestmark = pytest.mark.torch
SETTINGS = CoevolveSettings(
    embedding_size=6, n_recent=3, batch_size=64, epochs=2, n_item_samples=10, n_user_samples=8
)
DAY = MICROS_PER_DAY
TRAIN = partial(train_rank, "")  # returns the arrays


@pytest.fixture(scope="module")
def log() -> synth.Log:
    return synth.power_law(40, 30)


@pytest.fixture
def job(log: synth.Log, tmp_path: Path) -> Job:
    """A training whose checkpoint is written after every step."""
    training = synth.write_training(log, str(tmp_path / "rows"), "training_events", n_files=4)
    loop = LoopOptions(
        epochs=2,
        learning_rate=0.02,
        checkpoints=str(tmp_path / "checkpoints"),
        checkpoint_every_s=0,
    )
    items = np.unique(log.item_idx).astype(np.int32)
    return Job(SETTINGS, items, plan_shards(training, 2), None, loop)


def without_checkpoints(job: Job, ranks: int) -> Job:
    files = [file for shard in job.training.shards for file in shard.files]
    training = synth.TrainingSet("training_events", 0, tuple(sorted(files)))
    loop = replace(job.loop, checkpoints="")
    return replace(job, training=plan_shards(training, ranks), loop=loop)


def arrays_of(trained: Trained) -> dict[str, Array]:
    assert trained.weights is not None
    return trained.weights


def test_two_ranks_train_what_one_trains(job: Job) -> None:
    one, two = (
        LocalLauncher(ranks).run(TRAIN, without_checkpoints(job, ranks))[0].value
        for ranks in (1, 2)
    )
    assert [e.loss for e in two.curve.epochs] == pytest.approx(
        [e.loss for e in one.curve.epochs], rel=1e-5
    )
    for name, array in arrays_of(one).items():
        np.testing.assert_allclose(arrays_of(two)[name], array, atol=2e-4, err_msg=name)


def test_a_rank_that_ends_in_the_middle_of_a_window_costs_no_bit(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = LocalLauncher(2).run(TRAIN, without_checkpoints(job, 2))[0].value
    n_steps = -(-len(one_walk(job)) // SETTINGS.batch_size)
    told: list[str] = []
    evolve, n_calls = CoevolveNet.evolve, iter(range(10**6))

    def breaking(net: CoevolveNet, window: Any) -> Any:
        if next(n_calls) == 2 * (n_steps + n_steps // 2):  # of both ranks, in the second epoch
            raise RuntimeError("the rank ends here")
        return evolve(net, window)

    monkeypatch.setattr(CoevolveNet, "evolve", breaking)
    with pytest.raises(Exception, match="the rank ends here"):
        LocalLauncher(2).run(TRAIN, job)
    monkeypatch.setattr(CoevolveNet, "evolve", evolve)
    again = LocalLauncher(2, tell=told.append).run(TRAIN, job)[0].value
    assert any("resuming after epoch 1 of 2, batch" in line for line in told)
    assert [e.loss for e in again.curve.epochs] == [e.loss for e in whole.curve.epochs]
    for name, array in arrays_of(whole).items():
        np.testing.assert_array_equal(arrays_of(again)[name], array, err_msg=name)


def one_walk(job: Job) -> Events:
    """Return the events of a job, as one rank reads them."""
    one = without_checkpoints(job, 1)
    return LocalLauncher(1).run(coevolve.read_events, one)[0].value[0]


def test_the_states_are_written_as_files_where_there_is_a_folder(job: Job, tmp_path: Path) -> None:
    folder = str(tmp_path / "states")
    one = without_checkpoints(job, 1)
    trained = LocalLauncher(1).run(partial(train_rank, folder), one)[0].value
    assert trained.weights is None
    given = LocalLauncher(1).run(TRAIN, one)[0].value
    for name, array in arrays_of(given).items():
        np.testing.assert_array_equal(np.load(f"{folder}/{name}.npy"), array)


def test_events_are_read_in_time_order(job: Job, log: synth.Log) -> None:
    events = one_walk(job)
    past = log.only(log.age > 0)
    assert len(events) == len(past.age)
    assert (np.diff(events.event_at) >= 0).all()


def test_a_window_that_is_begun_anew_has_the_same_loss(job: Job) -> None:
    """After a checkpoint the clocks are moved on to the window, without the network."""
    events = one_walk(job)
    n_users, n_items = events.user.max() + 1, len(job.items)
    exponents = np.zeros(SETTINGS.n_recent + 1)
    origin = int(events.event_at[0])
    losses = []
    batches = list(coevolve.Windows(len(events), 64, 0, 1).epoch(0))
    for skipped in (0, 2):
        net = coevolve.make_net(SETTINGS, n_users, n_items, exponents, 1)
        clocks = coevolve.Clocks.started(n_users, n_items, SETTINGS.n_recent, origin)
        if skipped:  # what the checkpoint holds: the states
            replay(net, events.part(0, 64 * skipped), clocks)
            clocks = coevolve.Clocks.started(n_users, n_items, SETTINGS.n_recent, origin)
        walker = Walker(net, events, clocks, 10, 8, 1.0, 1)
        generator = torch.Generator()
        losses.append([walker.loss(b, generator, 0.0).sum().item() for b in batches[skipped:4]])
    assert losses[1] == pytest.approx(losses[0][2:], rel=1e-5)


# --- carried on ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_nights(
    log: synth.Log, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Job, Carried, Job, synth.Log]:
    """A trained model of all but the last days, and the job of all events: with new users and
    items, so that the numbers of others within the model change.
    """
    folder = tmp_path_factory.mktemp("nights")
    first_night = log.only((log.age > 2) & (log.user_idx % 7 != 3) & (log.item_idx % 5 != 1))
    later = log.only((log.age > 0) & (log.age < 2))
    second_night = first_night + later
    assert len(np.unique(later.user_idx)) > 5
    jobs = []
    for name, events in (("first", first_night), ("second", second_night)):
        training = synth.write_training(events, str(folder / name), "training_events", n_files=3)
        items = np.unique(events.item_idx).astype(np.int32)
        jobs.append(Job(SETTINGS, items, plan_shards(training, 1), None, LoopOptions(2, 0.02)))
    trained = LocalLauncher(1).run(TRAIN, jobs[0])[0].value
    arrays = {name: Shared(array) for name, array in arrays_of(trained).items()}
    cutoff = micros(synth.CUTOFF) - 2 * DAY
    return jobs[0], Carried(jobs[0].items, cutoff, arrays), jobs[1], second_night


def test_states_carried_on_equal_a_replay(two_nights: Any) -> None:
    _, carried, job, _ = two_nights
    found = LocalLauncher(1).run(partial(carry_rank, "", carried), job)[0].value
    assert found is not None
    events, users = LocalLauncher(1).run(coevolve.read_events, job)[0].value
    n_users, n_items = len(users), len(job.items)
    assert n_users > len(carried.arrays["user_idx"].array)
    assert n_items > len(carried.items)
    # A replay of everything, with the weights of the model that was carried on.
    net = coevolve.make_net(SETTINGS, n_users, n_items, np.zeros(SETTINGS.n_recent + 1), 1)
    for name, parameter in net.named_parameters():
        parameter.data.copy_(torch.from_numpy(found[name]))
    net.forget()
    origin = int(events.event_at[0])
    clocks = coevolve.Clocks.started(n_users, n_items, SETTINGS.n_recent, origin)
    replay(net, events, clocks)
    for name in ("user_state", "item_state"):
        expected = net.get_parameter(name).detach().numpy()
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found[name], expected, atol=1e-5, err_msg=name)
    for name, values in vars(clocks).items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    # The weights are those of the model; new items have the mean of the others.
    old = np.isin(job.items, carried.items)
    start = carried.arrays["item_start.weight"].array
    np.testing.assert_array_equal(found["item_start.weight"][old], start)
    np.testing.assert_allclose(found["item_start.weight"][~old], start.mean(0)[None], atol=1e-6)
    # Users keep the starts of their own; a new user has none.
    old = np.isin(found["user_idx"], carried.arrays["user_idx"].array)
    own = carried.arrays["user_own.weight"].array
    assert np.abs(own).max() > 0
    np.testing.assert_array_equal(found["user_own.weight"][old], own)
    assert not found["user_own.weight"][~old].any()
    np.testing.assert_array_equal(
        found["user_cell.weight_ih"], carried.arrays["user_cell.weight_ih"].array
    )


def test_states_are_not_carried_on_over_changed_events(two_nights: Any, tmp_path: Path) -> None:
    _, carried, job, log = two_nights
    early = np.flatnonzero(log.age > 2)
    is_other = np.ones(len(log.age), bool)
    is_other[early[0]] = False
    for name, events in (
        ("one less", log.only(is_other)),
        ("one more", log + synth.log([(int(log.user_idx[0]), int(log.item_idx[0]), 3.5)])),
        ("another", log.only(is_other) + synth.log([(1, int(log.item_idx[0]), 3.5)])),
    ):
        training = synth.write_training(events, str(tmp_path / name), "training_events", n_files=2)
        changed = replace(job, training=plan_shards(training, 1))
        assert LocalLauncher(1).run(partial(carry_rank, "", carried), changed)[0].value is None


# --- scores -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted() -> tuple[CoevolveModel, CoevolveNet, Events, int]:
    """A network with states after 200 events, and its model as of half a day later."""
    rng = np.random.default_rng(3)
    settings = SETTINGS.model_copy(update={"shape": 0.5})
    user, item = (rng.integers(0, n, 200).astype(np.int32) for n in (9, 12))
    events = Events(user, item, np.cumsum(rng.integers(1, DAY // 10, 200)))
    net = coevolve.make_net(settings, 9, 12, np.array([2.0, 1.0, 0.5, -1.0]), 5)
    with torch.no_grad():
        net.user_start.normal_(0, 1, generator=torch.Generator().manual_seed(2))
        net.user_own.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(6))
        net.user_gate.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(7))
        net.item_gate.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(8))
        net.user_rate.normal_(0, 1, generator=torch.Generator().manual_seed(3))
        net.item_rate.normal_(0, 1, generator=torch.Generator().manual_seed(4))
    clocks = coevolve.Clocks.started(9, 12, 3, 0)
    replay(net, events, clocks)
    arrays = {**vars(clocks), **net_arrays(net), "user_idx": np.arange(9) * 10}
    arrays |= {"origin": np.zeros(1, np.int64), "n_events": np.array([200])}
    as_of = int(events.event_at[-1]) + DAY // 2
    cutoff = np.datetime64(as_of, "us").astype(object)
    return (
        CoevolveModel(settings, cutoff, np.arange(12, dtype=np.int32), arrays),
        net,
        events,
        as_of,
    )


def block_of(events: Events, users: list[int], n_items: int = 12) -> QueryBlock:
    """Return the queries of users (local) with their histories in `events`."""
    rows = [np.flatnonzero(events.user == user) for user in users]
    start = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
    taken = np.concatenate(rows) if rows else np.zeros(0, int)
    item, at = events.item[taken], events.event_at[taken]
    history = Histories(start, item, at, np.ones(len(taken), np.float32))
    nothing = Ragged(np.zeros(len(users) + 1, np.int64), np.zeros(0, np.int32))
    return QueryBlock(np.array(users, np.int64) * 10, history, nothing)


def log_intensities(net: CoevolveNet, model: CoevolveModel, as_of: int) -> Array:
    """Return the log of the intensity of each pair, by the network and the clocks."""
    clocks = model.arrays()
    with torch.no_grad():
        users = net.user_vectors(net.user_state, torch.arange(9))
        items = net.item_vectors(net.item_state, torch.arange(12))
        place = np.full((9, 12), net.n_recent)
        for p in range(net.n_recent):
            has_item = clocks["recent_items"][:, p] >= 0
            place[has_item, clocks["recent_items"][has_item, p]] = p
        last = np.maximum(clocks["user_at"][:, None], clocks["item_at"][None])
        gap = torch.from_numpy((as_of - last) / DAY)
        s = net.with_place(users @ items.T, torch.from_numpy(place))
        return np.asarray(net.log_intensity(s, gap).numpy())


def scores_of(model: CoevolveModel, block: QueryBlock) -> IntensityScores:
    scores = model.scorer().score(block)
    assert isinstance(scores, IntensityScores)
    return scores


def test_scores_are_the_log_intensities_of_stored_states(fitted: Any) -> None:
    model, net, events, as_of = fitted
    scores = scores_of(model, block_of(events, [*range(9)]))
    rows, items = (a.ravel() for a in np.indices((9, 12)))
    exact = scores.exact(rows, items).reshape(9, 12)
    np.testing.assert_allclose(exact, log_intensities(net, model, as_of), atol=1e-5)
    error = np.abs(scores.approximate(slice(0, 9)) - exact)
    assert (error <= scores.error(slice(0, 9))[:, None]).all()


def test_later_events_of_a_history_change_the_stored_state(fitted: Any) -> None:
    """A user's newer events give the state of a walk in which the items stand still."""
    model, net, events, as_of = fitted
    later = Events(
        np.array([4, 4], np.int32),
        np.array([7, 7], np.int32),
        np.array([as_of - DAY // 4, as_of - DAY // 8]),
    )
    both = Events(*(np.concatenate([getattr(e, f) for e in (events, later)]) for f in vars(later)))
    users = model.scorer()._states(  # type: ignore[attr-defined]
        block_of(both, [4, 5]),
        {name: s.array for name, s in model.scorer().arrays.items()},  # type: ignore[attr-defined]
        model.scorer().vectors.array,  # type: ignore[attr-defined]
        np.concatenate([both.item[both.user == u] for u in (4, 5)]),
        np.array([4, 5]),
    )
    copy = coevolve.make_net(model.settings, 9, 12, np.zeros(4), 5)
    copy.load_state_dict(net.state_dict())
    names = ("user_at", "item_at", "recent_items", "recent_users")
    clocks = coevolve.Clocks(*(model.arrays()[name].copy() for name in names))
    still = copy.item_state.clone()
    for n in range(2):
        replay(copy, later.part(n, n + 1), clocks)
        copy.item_state.data.copy_(still)
    np.testing.assert_allclose(users.state[0], copy.user_state[4].detach(), atol=1e-5)
    assert users.recent[0].tolist() == clocks.recent_items[4].tolist()
    assert users.at[0] == later.event_at[1]
    np.testing.assert_array_equal(users.state[1], net.user_state[5].detach())


def test_whose_state_is_not_stored_is_read_from_the_history(fitted: Any) -> None:
    model, _, events, _ = fitted
    stranger = replace(block_of(events, [3]), user_idx=np.array([777]))
    scores = scores_of(model, stranger)
    assert scores.known.tolist() == [True]
    stored = scores_of(model, block_of(events, [3]))
    assert scores.recent.tolist() == stored.recent.tolist()
    assert scores.user_time.tolist() == stored.user_time.tolist()
    # The same number with another history is a stranger too, and without a history unknown.
    other = replace(block_of(events, [2]), user_idx=np.array([30]))
    assert (
        scores_of(model, other).recent.tolist()
        == scores_of(model, block_of(events, [2])).recent.tolist()
    )
    assert not scores_of(model, block_of(events.part(0, 0), [3])).known.any()


# --- the table of states ------------------------------------------------------------------------


def test_total_intensities_add_up(fitted: Any) -> None:
    model, net, *_ = fitted
    arrays = model.arrays()
    with torch.no_grad():
        users = net.user_vectors(net.user_state, torch.arange(9)).numpy()
        items = net.item_vectors(net.item_state, torch.arange(12)).numpy()
    place = np.append(arrays["place"], 0.0)
    expected = np.zeros(9)
    for user, item in np.ndindex(9, 12):
        own = arrays["recent_items"][user].tolist()
        expected[user] += np.exp(
            users[user] @ items[item] + place[own.index(item) if item in own else -1]
        )
    total = total_intensities(users, items, arrays["recent_items"], arrays["place"])
    np.testing.assert_allclose(total, expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [2.0, 0.5])
def test_gaps_are_those_of_simulated_users(shape: float) -> None:
    """Against draws: total t^shape / shape is exponential; silent users are those still away."""
    draws = (np.random.default_rng(1).exponential(size=400_000) * shape / 3.0) ** (1 / shape)
    total, nothing = np.array([3.0]), np.array([0.0])
    assert expected_gap(total, shape)[0] == pytest.approx(draws.mean(), rel=0.02)
    assert median_gap(total, shape, nothing)[0] == pytest.approx(np.median(draws), rel=0.02)
    later = draws[draws > 0.3]
    assert median_gap(total, shape, np.array([0.3]))[0] == pytest.approx(np.median(later), rel=0.02)
    assert expected_gap(total, 2.0)[0] == pytest.approx(np.sqrt(np.pi / 2) / np.sqrt(3.0))


def test_rows_of_states(fitted: Any) -> None:
    model, net, events, as_of = fitted
    items = item_vectors(model.arrays())
    rows = state_batch(model.arrays(), items, 0.5, as_of, np.arange(3, 6)).to_pylist()
    assert [row["user_idx"] for row in rows] == [30, 40, 50]
    for row, user in zip(rows, (3, 4, 5), strict=True):
        np.testing.assert_array_equal(row["state"], net.user_state[user].detach().numpy())
        last_at = row["last_event_at"].timestamp() * 1e6
        assert round(last_at) == events.event_at[events.user == user].max()
        assert row["next_visit_at"].timestamp() * 1e6 > as_of  # never before the cutoff


# --- size ---------------------------------------------------------------------------------------


def test_memory_of_a_rank_at_a_million_users_and_items() -> None:
    """The figures that docs/scale.md gives."""
    size = CoevolveSettings().rank_bytes(10**6, 10**6, 0)
    assert 2.05e9 < size < 2.15e9


def test_more_than_the_settings_allow_is_refused() -> None:
    class Counted:
        histories = type("Users", (), {"count": staticmethod(lambda: 11)})
        training_set = staticmethod(lambda _table: synth.TrainingSet("t", 0, (("f", 7),)))

    settings = CoevolveSettings(max_users=10)
    with pytest.raises(CatalogueTooLargeError, match=r"11 users.*models\.coevolve\.max_users"):
        coevolve.check_size(settings, Counted(), 5)  # type: ignore[arg-type]
    coevolve.check_size(CoevolveSettings(), Counted(), 5)  # type: ignore[arg-type]
