"""YouTube's candidate network: what an example reads, the loss, and what planted data teach it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyspark.sql import SparkSession

from recspark.config import Train
from recspark.data.blocks import Array, QueryBlock, Ragged, micros, parse_histories
from recspark.data.dataset import Dataset
from recspark.errors import CatalogueTooLargeError, ConfigError
from recspark.models.base import FitOptions
from recspark.models.neural import Job, net_arrays
from recspark.models.towers.timelines import Examples, Timelines, first_ages, timelines_of
from recspark.models.towers.youtube_dnn import (
    YoutubeDnn,
    YoutubeDnnModel,
    YoutubeDnnSettings,
    example_losses,
    make_net,
    row_loss,
    train_rank,
    user_vectors,
)
from recspark.nets.youtube_dnn import YoutubeDnnNet, window_means
from recspark.testing import synth
from recspark.train.feed import Batch, plan_shards
from recspark.train.launch import LocalLauncher
from recspark.train.loop import LoopOptions, load_weights
from recspark.train.negatives import Negatives

pytestmark = pytest.mark.torch
DAY = 86_400
SMALL = YoutubeDnnSettings(
    windows=(4, 2), embedding_size=5, hidden_sizes=(7, 6), n_examples=3, n_samples=None, dropout=0.0
)


def net_of(settings: YoutubeDnnSettings, n_items: int) -> YoutubeDnnNet:
    """A network whose ages spread evenly, in octaves, and whose items differ in bias."""
    net = make_net(settings, n_items, 1)
    net.age_shares.data = torch.linspace(0, 1, len(net.age_shares))
    torch.nn.init.normal_(net.items_out_bias, generator=torch.Generator().manual_seed(2))
    return net


def some_timelines(n_rows: int = 4, length: int = 9, n_items: int = 20, seed: int = 1) -> Timelines:
    rng = np.random.default_rng(seed)
    items = torch.from_numpy(rng.integers(0, n_items, (n_rows, length)))
    ages = torch.from_numpy(-np.sort(-rng.integers(0, 10**6, (n_rows, length)), axis=1))
    return Timelines(items, ages, torch.full((n_rows,), length))


def test_means_are_those_of_the_newest_items_before_the_end() -> None:
    embedded = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1))
    embedded[1, 4:] = 0  # padding
    rows, ends = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 5, 1, 4])
    found = window_means(embedded, rows, ends, (50, 2))
    for n, (row, end) in enumerate(zip(rows.tolist(), ends.tolist(), strict=True)):
        for k, window in enumerate((50, 2)):
            read = embedded[row, max(0, end - window) : end]
            want = read.mean(dim=0) if end else torch.zeros(3)
            np.testing.assert_allclose(found[n, k], want, atol=1e-6)


@pytest.mark.parametrize("settings", [SMALL, SMALL.model_copy(update={"example_age": False})])
def test_what_comes_after_the_target_changes_no_bit(settings: YoutubeDnnSettings) -> None:
    net, negatives = net_of(settings, 20), Negatives(torch.ones(20), None, 0.5)
    timelines = some_timelines()
    examples = Examples(torch.tensor([0, 1, 1, 3]), torch.tensor([3, 1, 6, 5]))
    oldest = torch.full((20,), 10**7)

    def losses(of: Timelines) -> list[float]:
        generator = torch.Generator().manual_seed(1)
        return example_losses(net, settings, negatives, oldest, of, examples, generator).tolist()

    want = losses(timelines)
    rng = np.random.default_rng(5)
    for example in range(4):
        items, ages = timelines.items.clone(), timelines.ages.clone()
        row, end = int(examples.rows[example]), int(examples.ends[example])
        later = end + 1 + torch.from_numpy(rng.permutation(9 - end - 1))
        items[row, end + 1 :], ages[row, end + 1 :] = items[row, later], ages[row, later] * 3
        found = losses(Timelines(items, ages, timelines.lengths))
        assert found[example] == want[example]
        items[row, end - 1] = (items[row, end - 1] + 1) % 20  # what comes before does
        assert losses(Timelines(items, ages, timelines.lengths))[example] != want[example]


def test_the_loss_of_an_example_is_the_softmax_of_what_existed() -> None:
    net, timelines = net_of(SMALL, 20), some_timelines()
    examples = Examples(torch.tensor([0, 2]), torch.tensor([3, 8]))
    oldest = torch.arange(20) * 60_000  # items 0 to 16 come one after the other
    oldest[timelines.items[examples.rows, examples.ends]] = 10**7
    negatives = Negatives(torch.ones(20), None, 0.5)
    found = example_losses(
        net, SMALL, negatives, oldest, timelines, examples, torch.Generator()
    ).tolist()
    for row, end, value in zip([0, 2], [3, 8], found, strict=True):
        age, target = int(timelines.ages[row, end]), int(timelines.items[row, end])
        read = net.items_in[timelines.items[row, :end]]
        means = torch.cat([read[-4:].mean(dim=0), read[-2:].mean(dim=0)])
        newest, octaves = int(timelines.ages[row, end - 1]), torch.log2
        gaps = [
            float(octaves(torch.tensor(1.0 + int(timelines.ages[row, n]) - newest)) / 31)
            for n in (max(0, end - 4), end - 2)
        ]
        position = float(octaves(torch.tensor(1.0 + age)) / 31)
        numbers = torch.tensor([*gaps, min(end, 4) / 4, position])
        hidden = torch.cat([means, numbers, numbers**2, numbers.sqrt()])
        for k in (1, 2):
            weights, bias = net.get_parameter(f"layer_{k}"), net.get_parameter(f"layer_{k}_bias")
            hidden = torch.relu(hidden @ weights + bias)
        scores = net.items_out @ hidden + net.items_out_bias
        existed = oldest >= age
        assert 0 < int(existed.sum()) < 20
        want = torch.logsumexp(scores[existed], dim=0) - scores[target]
        assert value == pytest.approx(float(want.detach()), rel=1e-4)


def test_users_weigh_the_same_whatever_they_watched() -> None:
    """The loss of a row is a mean, and rows with few and many events have gradients of one size."""
    settings = SMALL.model_copy(update={"example_age": False, "user_numbers": False})
    net, negatives = net_of(settings, 2), Negatives(torch.ones(2), None, 0.5)
    net.items_in.data[:] = net.items_in.data[0]  # all histories look alike
    generator = torch.Generator().manual_seed(1)
    items = torch.zeros(2, 40, dtype=torch.int32)
    items[1] = 1
    items[0, 4:] = -1  # 4 events of item 0, 40 of item 1
    batch = Batch({"items": items, "ages": torch.zeros_like(items)}, torch.ones(2))
    lost = row_loss(net, torch.arange(2), settings, negatives, None, batch, generator, 0.0)
    lost.sum().backward()
    share = torch.softmax(-lost.detach(), 0)  # of each item, which is all of its row
    np.testing.assert_allclose(lost.exp().reciprocal().sum().item(), 1, rtol=1e-5)
    assert net.items_out_bias.grad is not None
    want = 2 * share - 1  # two rows of weight 1, one for each item
    np.testing.assert_allclose(net.items_out_bias.grad.numpy(), want.numpy(), atol=1e-5)


def test_a_batch_that_weighs_nothing_has_a_gradient_of_zero() -> None:
    net, negatives = net_of(SMALL, 5), Negatives(torch.ones(5), 3, 0.5)
    rows = torch.zeros(2, 6, dtype=torch.int32)
    batch = Batch({"items": rows, "ages": rows}, torch.zeros(2))
    lost = row_loss(net, torch.arange(5), SMALL, negatives, None, batch, torch.Generator(), 0.0)
    lost.sum().backward()
    assert lost.tolist() == [0, 0]
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())


def test_sparse_gradients_are_the_dense_ones() -> None:
    gradients: dict[bool, dict[str, Any]] = {}
    timelines, examples = some_timelines(), Examples(torch.tensor([0, 3]), torch.tensor([3, 5]))
    for sparse in (False, True):
        settings = SMALL.model_copy(update={"n_samples": 4, "sparse": sparse})
        net, negatives = net_of(settings, 20), Negatives(torch.ones(20), 4, 0.5)
        generator = torch.Generator().manual_seed(1)
        example_losses(
            net, settings, negatives, None, timelines, examples, generator
        ).sum().backward()
        gradients[sparse] = {name: p.grad for name, p in net.named_parameters()}
    assert {n for n, grad in gradients[True].items() if grad is not None and grad.is_sparse} == {
        "items_in",
        "items_out",
    }
    for name in ("items_in", "items_out"):
        dense = gradients[True][name].to_dense()
        np.testing.assert_allclose(dense, gradients[False][name], rtol=1e-5, atol=1e-8)


def queries(log: synth.Log) -> QueryBlock:
    users, column = synth.history_column(log)
    nothing = Ragged(np.zeros(len(users) + 1, np.int64), np.zeros(0, np.int32))
    return QueryBlock(users, parse_histories(column), nothing)


def test_a_user_has_the_vector_of_training_whatever_the_batch() -> None:
    rng = np.random.default_rng(1)
    user = np.repeat(np.arange(300), rng.integers(1, 9, 300))
    log = synth.Log(
        user,
        rng.integers(0, 20, len(user)).astype(np.int32),
        rng.uniform(0, 50, len(user)),
        np.ones(len(user), np.float32),
    )
    net, items, as_of = net_of(SMALL, 20), np.arange(20, dtype=np.int32), micros(synth.CUTOFF)
    arrays, block = net_arrays(net), queries(log)
    vectors, is_known = user_vectors(SMALL, arrays, block.history, items, as_of)
    assert is_known.all()
    for row in range(10):
        history = block.history.part(slice(row, row + 1))
        timelines = Timelines(
            torch.tensor(history.item_idx).long()[None],
            torch.tensor((as_of - history.event_at) // 1_000_000)[None],
            torch.tensor([len(history.item_idx)]),
        )
        from recspark.models.towers.youtube_dnn import example_vectors

        want = example_vectors(
            net,
            SMALL,
            net.items_in[timelines.items],
            timelines.ages,
            Examples(torch.tensor([0]), timelines.lengths),
            torch.tensor([0]),  # the age of what comes next is 0
        )
        np.testing.assert_allclose(vectors[row], want[0].detach(), atol=1e-6)
    for step in (1, 257):
        parts = [
            user_vectors(SMALL, arrays, block.history.part(slice(n, n + step)), items, as_of)[0]
            for n in range(0, 300, step)
        ]
        np.testing.assert_array_equal(np.concatenate(parts), vectors)


Trained = Callable[..., YoutubeDnnModel]


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    """Train on a log, without Spark."""

    def run(log: synth.Log, n_ranks: int = 1, **settings: Any) -> YoutubeDnnModel:
        short = {
            "embedding_size": 4, "hidden_sizes": (8, 4), "n_samples": None, "dropout": 0.0,
            "batch_size": 128, "epochs": 12, "learning_rate": 0.05, "user_numbers": False,
        }  # fmt: skip
        made = YoutubeDnnSettings(**{**short, **settings})
        folder = str(tmp_path / f"rows-{len(list(tmp_path.iterdir()))}")
        training = synth.write_training(log, folder, "training_timelines", n_ranks)
        items = np.unique(log.item_idx)
        loop = LoopOptions(epochs=made.epochs, learning_rate=made.learning_rate)
        job = Job(made, items, plan_shards(training, n_ranks), None, loop)
        answer = LocalLauncher(n_ranks).run(train_rank, job)[0].value
        net = make_net(made, len(items), 1)
        load_weights(net, answer)
        return YoutubeDnnModel(made, synth.CUTOFF, items, net_arrays(net))

    return run


def shares(model: YoutubeDnnModel, log: synth.Log) -> Array:
    """The probability of each item to come next, as the mean over users, (n_items,)."""
    scores = torch.from_numpy(synth.scores(model, log))
    return torch.softmax(scores, dim=1).mean(dim=0).numpy()


def rising_and_falling(n_users: int = 300, n_items: int = 8, seed: int = 1) -> synth.Log:
    """Every item is there from the first day. Item i is watched most around day 10 i of 80 days,
    and items that came later are watched less in total.
    """
    rng = np.random.default_rng(seed)
    day = rng.uniform(0, 80, (n_users, 12))
    distance = day[:, :, None] - 10 * np.arange(n_items)  # since the item came
    appeal = np.where(distance > 0, np.exp(-distance / 8), np.exp(distance / 2)) + 0.01
    cumulative = np.cumsum(appeal, axis=2) / appeal.sum(axis=2, keepdims=True)
    item = (rng.random((n_users, 12, 1)) > cumulative).sum(axis=2)
    keep = rng.random(item.shape) < 1.3 - item / n_items  # fewer people watch in the end
    return synth.Log(
        np.repeat(np.arange(n_users), 12).reshape(item.shape)[keep],
        item[keep].astype(np.int32),
        80 - day[keep],
        np.ones(keep.sum(), np.float32),
    )


def test_with_example_age_what_is_fresh_comes_first(trained: Trained) -> None:
    """At the cutoff the newest item is the one that is watched, though all others were watched more
    in the training period."""
    log = rising_and_falling()
    share = np.bincount(log.item_idx) / len(log.item_idx)
    assert share[7] < share[:7].min()
    # The order in which people watch tells the day too, so the tower reads no items here.
    with_age, without = (
        shares(trained(blind(log), example_age=is_on, n_ranks=2), log) for is_on in (True, False)
    )
    assert with_age.argmax() == 7
    assert with_age[7] > 0.5
    assert without[7] < 0.2
    assert without.argmax() != 7


def blind(log: synth.Log) -> synth.Log:
    """The same events as histories of two: what came before a target tells nothing of it."""
    rng = np.random.default_rng(3)
    order = rng.permutation(len(log.age))[: len(log.age) // 2 * 2].reshape(-1, 2)
    log = log.only(order.ravel())
    return synth.Log(np.repeat(np.arange(len(order)), 2), log.item_idx, log.age, log.weight)


@pytest.mark.parametrize("logq", [True, False])
def test_corrected_scores_are_the_shares_of_the_items(logq: bool) -> None:
    """Items are drawn by popularity. Where scores are the log shares, the mean gradient of the
    corrected loss is 0. Without the correction it makes popular items score less, others more.
    """
    share = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.04, 0.03, 0.02, 0.01])
    settings = SMALL.model_copy(update={"logq": logq})
    net = net_of(settings, 8)
    net.items_out.data.zero_()
    net.items_out_bias.data = torch.log(share)
    negatives = Negatives(share * 10**6, 2, 1.0)
    generator = torch.Generator().manual_seed(1)
    examples = Examples(torch.arange(4), torch.ones(4, dtype=torch.int64))
    ages, lengths = torch.zeros(4, 2, dtype=torch.int64), torch.full((4,), 2)
    n_batches = 600
    for _ in range(n_batches):
        items = torch.multinomial(share, 8, replacement=True, generator=generator).view(4, 2)
        timelines = Timelines(items, ages, lengths)
        losses = example_losses(net, settings, negatives, None, timelines, examples, generator)
        losses.sum().backward()
    assert net.items_out_bias.grad is not None
    gradient = (net.items_out_bias.grad / (4 * n_batches)).numpy()
    if logq:
        np.testing.assert_allclose(gradient, 0, atol=0.02)
    else:
        assert gradient[0] > 0.04
        assert (gradient[4:] < 0).all()


def test_a_late_item_competes_only_since_it_exists(trained: Trained) -> None:
    """Item 4 takes half of all events in the last quarter.

    A target is the newer one of two events: 7/16 of the targets are of the last quarter.
    """
    rng = np.random.default_rng(4)
    age = rng.uniform(0, 40, 4000)
    is_late = (age < 10) & (rng.random(4000) < 0.5)
    log = synth.Log(
        np.repeat(np.arange(1000), 4),
        np.where(is_late, 4, rng.integers(0, 4, 4000)).astype(np.int32),
        age,
        np.ones(4000, np.float32),
    )
    short = {"example_age": False, "epochs": 8}
    known, unknown = (
        shares(trained(blind(log), existing_only=existing, **short), log)[4]
        for existing in (True, False)
    )
    assert known == pytest.approx(0.5, abs=0.08)
    assert unknown == pytest.approx(7 / 32, abs=0.05)


def test_the_oldest_event_of_an_item_bounds_its_time() -> None:
    items = torch.tensor([[1, 0, 1]], dtype=torch.int32)
    batch = Batch({"items": items, "ages": torch.tensor([[9, 5, 2]])}, torch.ones(1))
    (answer,) = LocalLauncher(1).run(
        partial(first_ages, batches=iter([batch]), vocabulary=torch.arange(3))
    )
    assert answer.value.tolist() == [5, 9, -1]
    assert timelines_of(batch, torch.arange(3)).lengths.tolist() == [3]


def test_errors_say_what_to_do() -> None:
    class Known(Dataset):
        def __init__(self) -> None:
            pass

        def vocabulary(self) -> Any:
            return np.arange(7, dtype=np.int32)

    with pytest.raises(
        CatalogueTooLargeError, match=r"7 items .* raise models\.youtube_dnn\.max_items"
    ):
        YoutubeDnn(YoutubeDnnSettings(max_items=6)).fit(Known(), FitOptions())
    for wrong in ({"windows": []}, {"windows": [0]}, {"hidden_sizes": []}, {"n_examples": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            YoutubeDnn.from_dict(wrong)


@pytest.mark.spark
@pytest.mark.horovod
def test_two_horovod_ranks_learn_what_two_threads_learn(
    spark: SparkSession, tmp_path: Path
) -> None:
    log, _ = synth.tastes(40, 20, 8)
    data = synth.dataset(spark, log, 1, {"training_timelines": str(tmp_path / "rows")})
    model = YoutubeDnn.from_dict({"embedding_size": 4, "hidden_sizes": [8, 4], "epochs": 2})
    arrays = [
        model.fit(data, FitOptions(in_process=in_process, train=Train(ranks=2, threads=1))).arrays()
        for in_process in (True, False)
    ]
    for name, array in arrays[0].items():
        np.testing.assert_allclose(array, arrays[1][name], atol=1e-6, err_msg=name)
