"""TDSSM: steps of time, what an example reads, and what each part learns from planted data."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recspark.data.blocks import Array, QueryBlock, Ragged, micros, parse_histories
from recspark.errors import ConfigError, ModelError
from recspark.models.items.popular import PopularModel, PopularSettings
from recspark.models.neural import Job
from recspark.models.towers.tdssm import (
    Tdssm,
    TdssmModel,
    TdssmSettings,
    example_losses,
    example_vectors,
    make_net,
    pretrained_vectors,
    readable_targets,
    scoring_arrays,
    step_begins,
    train_rank,
    user_vectors,
)
from recspark.models.towers.timelines import Examples, Timelines
from recspark.nets.tdssm import step_means
from recspark.testing import synth
from recspark.train.feed import plan_shards
from recspark.train.launch import LocalLauncher
from recspark.train.loop import LoopOptions, load_weights
from recspark.train.negatives import Negatives

pytestmark = pytest.mark.torch
HOUR, DAY = 3600, 86_400
SMALL = TdssmSettings(
    embedding_size=5, hidden_size=6, n_fast=3, n_slow=2, length=20, n_examples=3, n_samples=None
)


def some_timelines(n_rows: int = 4, length: int = 12, n_items: int = 20) -> Timelines:
    """Events of the 30 days before the cutoff; the last row has 3 items."""
    rng = np.random.default_rng(1)
    items = torch.from_numpy(rng.integers(0, n_items, (n_rows, length)))
    ages = torch.from_numpy(-np.sort(-rng.integers(0, 30 * DAY, (n_rows, length)), axis=1))
    lengths = torch.full((n_rows,), length)
    lengths[-1], items[-1, 3:], ages[-1, 3:] = 3, -1, 0
    return Timelines(items, ages, lengths)


def test_steps_are_means_of_their_time() -> None:
    timelines = some_timelines()
    is_item = timelines.items >= 0
    ages = timelines.ages.masked_fill(~is_item, -1)
    embedded = torch.randn(4, 12, 3, generator=torch.Generator().manual_seed(1))
    embedded = embedded * is_item[:, :, None]
    sums = torch.nn.functional.pad(embedded.cumsum(dim=1), (0, 0, 1, 0))
    rows, begins = torch.tensor([0, 2, 3, 3]), torch.tensor([0, 6 * DAY, 0, 40 * DAY])
    found = step_means(sums, ages, rows, begins, 5 * DAY, 4)
    n_full = 0
    for query in range(4):
        for step in range(4):  # the oldest first
            low = int(begins[query]) + (3 - step) * 5 * DAY
            of_row = ages[rows[query]]
            inside = (of_row >= low) & (of_row < low + 5 * DAY)
            read = embedded[rows[query]][inside]
            want = read.mean(dim=0) if len(read) else torch.zeros(3)
            np.testing.assert_allclose(found[query, step, :3], want, atol=1e-5)
            assert found[query, step, 3] == (len(read) > 0)
            n_full += len(read) > 1
    assert n_full >= 4


def test_the_step_of_a_target_is_counted_back_from_the_cutoff() -> None:
    ages = torch.tensor([0, DAY - 1, DAY, 30 * HOUR])
    assert step_begins(ages, DAY).tolist() == [DAY, DAY, 2 * DAY, 2 * DAY]
    items = torch.tensor([[4, 5, 6, 7]])
    ages = torch.tensor([[50 * HOUR, 49 * HOUR, 30 * HOUR, HOUR]])
    timelines = Timelines(items, ages, torch.tensor([4]))
    # Items 4 and 5 are of one day: neither has anything before it that may be read.
    found = readable_targets(SMALL, timelines, torch.ones(1))
    assert found.tolist() == [[False, False, True, True]]
    assert not readable_targets(SMALL, timelines, torch.zeros(1)).any()


@pytest.mark.parametrize("steps_from", ["target", "newest_event"])
def test_the_day_of_the_target_and_later_days_change_no_bit(steps_from: str) -> None:
    settings = SMALL.model_copy(update={"steps_from": steps_from})
    net, negatives = make_net(settings, 20, 1), Negatives(torch.ones(20), None, 0.5)
    items = torch.arange(8)[None].clone()
    ages = torch.tensor([[9 * DAY, 8 * DAY, 3 * DAY, 53 * HOUR, 52 * HOUR, 50 * HOUR, DAY, 9]])
    timelines = Timelines(items, ages, torch.tensor([8]))
    examples = Examples(torch.tensor([0]), torch.tensor([4]))  # 52 hours old: of the third day

    def loss(of: Timelines) -> float:
        generator = torch.Generator().manual_seed(1)
        return float(
            example_losses(net, settings, negatives, None, of, examples, generator).detach()
        )

    want = loss(timelines)
    other = items.clone()
    other[0, [3, 5, 6, 7]] = torch.tensor([7, 3, 5, 6])  # the same day, before and after; later
    assert loss(Timelines(other, ages, timelines.lengths)) == want
    for earlier in range(3):
        other = items.clone()
        other[0, earlier] = 15
        assert loss(Timelines(other, ages, timelines.lengths)) != want


def queries(log: synth.Log) -> QueryBlock:
    users, column = synth.history_column(log)
    nothing = Ragged(np.zeros(len(users) + 1, np.int64), np.zeros(0, np.int32))
    return QueryBlock(users, parse_histories(column), nothing)


def test_a_user_has_the_vector_of_training_whatever_the_batch() -> None:
    rng = np.random.default_rng(1)
    user = np.repeat(np.arange(90), rng.integers(1, 9, 90))
    log = synth.Log(
        user,
        rng.integers(0, 20, len(user)).astype(np.int32),
        rng.uniform(0, 20, len(user)),
        np.ones(len(user), np.float32),
    )
    net, items, as_of = make_net(SMALL, 20, 1), np.arange(20, dtype=np.int32), micros(synth.CUTOFF)
    arrays, block = scoring_arrays(net), queries(log)
    vectors, is_known = user_vectors(SMALL, arrays, block.history, items, as_of)
    assert is_known.all()
    np.testing.assert_allclose(np.linalg.norm(arrays["items_out"], axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    for row in range(10):
        history = block.history.part(slice(row, row + 1))
        want = example_vectors(
            net,
            SMALL,
            net.items_in[torch.tensor(history.item_idx).long()][None],
            torch.tensor((as_of - history.event_at) // 1_000_000)[None],
            torch.tensor([0]),
            torch.tensor([0]),  # everything before the cutoff is read
        )
        np.testing.assert_allclose(vectors[row], want[0].detach(), atol=1e-5)
    for step in (1, 65):
        parts = [
            user_vectors(SMALL, arrays, block.history.part(slice(n, n + step)), items, as_of)[0]
            for n in range(0, 90, step)
        ]
        np.testing.assert_array_equal(np.concatenate(parts), vectors)


# --- planted: a genre for good, a genre of ten days, a burst of a day ---------------------------

N_GENRES, N_TITLES = 5, 2  # a genre of each kind has two items, drawn evenly
KINDS = GOOD, PERIOD, BURST = range(3)
LAST = 50  # the day of the query


def watched(n_users: int, seed: int) -> tuple[synth.Log, Array]:
    """Return events of users on days 0 to 49, and the genre of each kind that day 50 continues.

    The genre for good is watched ten times in the first two weeks, and once more weeks later. Each
    ten days from day 15 on have a genre of their own, watched twice on their first and sixth day. From
    day 15 on each day has a burst: on odd days of a random genre, on even days that of the day
    before. The answers are (n_users, 3).
    """
    rng = np.random.default_rng(seed)
    answers = rng.integers(0, N_GENRES, (n_users, len(KINDS)))
    users = np.arange(n_users)
    days_for_good = [*rng.integers(0, 14, (10, n_users)), rng.integers(29, 34, n_users)]
    # kind, genre (n_users,), day (n_users,)
    parts = [(GOOD, answers[:, GOOD], day) for day in days_for_good]
    for first_day in (15, 25, 35, 45):
        genre = rng.integers(0, N_GENRES, n_users)
        days = [day for day in (first_day, first_day + 5) if day < LAST]
        parts.extend((PERIOD, genre, np.full(n_users, day)) for day in 2 * days)
    answers[:, PERIOD] = genre
    for day in range(15, LAST):
        if day % 2:
            genre = rng.integers(0, N_GENRES, n_users)
        parts.append((BURST, genre, np.full(n_users, day)))
    answers[:, BURST] = genre
    item = np.concatenate(
        [
            (kind * N_GENRES + of) * N_TITLES + rng.integers(0, N_TITLES, n_users)
            for kind, of, _ in parts
        ]
    )
    age = LAST - np.concatenate([day for _, _, day in parts]) - rng.uniform(0.1, 0.9, len(item))
    return synth.Log(
        np.tile(users, len(parts)), item.astype(np.int32), age, np.ones(len(item), np.float32)
    ), answers


def accuracy(folder: Path, vectors: Array | None = None, **settings: Any) -> Array:
    """Return the share of new users whose genre scores best, for each kind, (3,)."""
    made = TdssmSettings(
        **{
            "embedding_size": 16, "hidden_size": 32, "n_fast": 2, "n_slow": 2, "n_samples": None,
            "existing_only": False, "n_examples": 24, "batch_size": 50, "epochs": 40,
            "learning_rate": 0.02, **settings,
        }
    )  # fmt: skip
    log, _ = watched(800, 1)
    training = synth.write_training(log, str(folder), "training_timelines", 2, 64)
    items = np.arange(N_GENRES * len(KINDS) * N_TITLES, dtype=np.int32)
    loop = LoopOptions(epochs=made.epochs, learning_rate=made.learning_rate)
    job = Job(made, items, plan_shards(training, 2), None, loop)
    answer = LocalLauncher(2).run(partial(train_rank, vectors), job)[0].value
    net = make_net(made, len(items), 1, vectors)
    load_weights(net, answer)
    model = TdssmModel(made, synth.CUTOFF, items, scoring_arrays(net))
    asked, answers = watched(300, 2)
    scores = synth.scores(model, asked).reshape(300, len(KINDS), N_GENRES, N_TITLES).sum(axis=3)
    return (scores.argmax(axis=2) == answers).mean(axis=0)


def test_each_part_wins_its_own_kind_and_all_win_all(tmp_path: Path) -> None:
    short = {"static": 20, "slow": 20, "fast": 10}  # epochs: one part alone learns in fewer
    alone = {
        part: accuracy(tmp_path / part, parts=(part,), epochs=epochs)
        for part, epochs in short.items()
    }
    for kind, part in enumerate(alone):
        assert alone[part][kind] > 0.9, (part, alone[part])
        assert (np.delete(alone[part], kind) < 0.6).all(), (part, alone[part])
    everything = accuracy(tmp_path / "all")
    assert everything.mean() >= 0.9, everything


def test_given_vectors_are_read_as_they_are(tmp_path: Path) -> None:
    """Vectors that say the genre are as good as trained ones, and no training changes them."""
    genre = np.repeat(np.eye(N_GENRES * len(KINDS), dtype=np.float32), N_TITLES, axis=0)
    assert accuracy(tmp_path, vectors=genre, parts=("fast",), epochs=10)[BURST] > 0.9
    net = make_net(SMALL, len(genre), 1, genre)
    assert not net.items_in.requires_grad
    assert scoring_arrays(net)["items_in"].tolist() == genre.tolist()


def test_needed_models_give_their_item_vectors() -> None:
    class Known(PopularModel):
        def item_vectors(self) -> Array:
            return np.array([[3.0, 4.0], [0.0, 2.0]], np.float32)

    model = Known(PopularSettings(), synth.CUTOFF, np.array([5, 9], np.int32), np.zeros(2))
    data: Any = type("Data", (), {"vectors": {}})()
    items = np.array([4, 5, 9], np.int32)
    found = pretrained_vectors(data, {"als": model}, items)
    np.testing.assert_allclose(found, [[0, 0], [0.6, 0.8], [0, 1]])
    assert pretrained_vectors(data, {}, items) is None
    popular = PopularModel(PopularSettings(), synth.CUTOFF, items, np.zeros(3, np.float32))
    with pytest.raises(ModelError, match="'popular' has no item vectors"):
        pretrained_vectors(data, {"popular": popular}, items)


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    for wrong, text in (
        ({"parts": ["fast", "fast"]}, "names a part twice"),
        ({"slow_hours": 24}, r"slow_hours \(24.0\) must be more than fast_hours"),
        ({"parts": ["hourly"]}, "parts"),
    ):
        with pytest.raises(ConfigError, match=text):
            Tdssm.from_dict(wrong)
    with pytest.raises(ConfigError, match="one encoder or retriever"):
        Tdssm.from_dict({}).check_needs({"als": "retriever", "words": "encoder"})
    Tdssm.from_dict({}).check_needs({"words": "encoder"})
    log = synth.log([(user, item, 3.0 + item / 100) for user in range(9) for item in range(4)])
    training = synth.write_training(log, str(tmp_path), "training_timelines", 1)
    loop = LoopOptions(epochs=1, learning_rate=0.1)
    job = Job(SMALL, np.arange(4, dtype=np.int32), plan_shards(training, 1), None, loop)
    with pytest.raises(ModelError, match=r"no user has events in two steps of 24 hours"):
        LocalLauncher(1).run(partial(train_rank, None), job)
