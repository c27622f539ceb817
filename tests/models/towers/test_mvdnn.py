"""MV-DNN: views, what an example reads, the loss of each view, and what planted data teach it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyspark.sql import SparkSession

from recspark.config import Train
from recspark.data.blocks import Array, Histories, QueryBlock, Ragged, parse_histories
from recspark.data.training_rows import type_code
from recspark.errors import CatalogueTooLargeError, ConfigError, EmptyDataError, ModelError
from recspark.models.base import FitOptions
from recspark.models.items.popular import Popular, PopularSettings
from recspark.models.neural import Job
from recspark.models.scoring import topk
from recspark.models.towers.item_tokens import ItemTokens, tokens_of, views_of
from recspark.models.towers.mvdnn import Mvdnn, MvdnnModel, another_view
from recspark.models.towers.mvdnn_scoring import scoring_arrays, user_vectors
from recspark.models.towers.mvdnn_settings import MvdnnSettings
from recspark.models.towers.mvdnn_towers import TokenBags, item_vectors, make_net, user_tower
from recspark.models.towers.mvdnn_training import (
    View,
    example_losses,
    row_loss,
    train_rank,
    views_to_learn,
)
from recspark.models.towers.mvdnn_views import RowReader, view_statistics
from recspark.models.towers.timelines import Examples
from recspark.nets.mvdnn import MvdnnNet, ViewHistories
from recspark.testing import synth
from recspark.train.comm import Comm
from recspark.train.feed import Batch, plan_shards
from recspark.train.launch import LocalLauncher
from recspark.train.loop import LoopOptions, load_weights
from recspark.train.negatives import Negatives

pytestmark = pytest.mark.torch
N_ITEMS = 12  # of the small network: the even ones are in view 0, the odd ones in view 1
SMALL = MvdnnSettings(
    views={"a": ("even",), "b": ("odd",)}, embedding_size=5, hidden_sizes=(7, 6), n_buckets=64,
    n_examples=3, n_samples=None, length=20, window=4, own_view_dropout=0.0,
)  # fmt: skip


def catalogue(names: list[str], categories: list[str], settings: MvdnnSettings) -> ItemTokens:
    """The tokens of items 0, 1, 2, ... with these names; each has one category."""
    n = len(names)
    batch = pa.RecordBatch.from_arrays(
        [
            pa.array(names),
            pa.array([None] * n, pa.string()),
            pa.array([[category] for category in categories]),
            pa.array([None] * n, pa.float64()),
        ],
        names=["item_name", "text", "category", "price"],
    )
    views = views_of(batch.column("category"), settings.views)
    starts, codes, weights = tokens_of(batch, settings.token_rules)
    return ItemTokens(np.arange(n, dtype=np.int32), views, starts, codes, weights)


def small_tokens(settings: MvdnnSettings = SMALL) -> ItemTokens:
    categories = ["even", "odd"] * (N_ITEMS // 2)
    return catalogue([f"item {n}" for n in range(N_ITEMS)], categories, settings)


def reader_of(settings: MvdnnSettings, tokens: ItemTokens) -> RowReader:
    return RowReader(
        settings, torch.arange(len(tokens.views)), torch.from_numpy(tokens.views).long()
    )


def some_batch(seed: int = 1, n_rows: int = 6, length: int = 9) -> Batch:
    rng = np.random.default_rng(seed)
    items = rng.integers(0, N_ITEMS, (n_rows, length)).astype(np.int32)
    items[1, 6:] = -1
    ages = -np.sort(-rng.integers(1, 10**6, items.shape), axis=1).astype(np.int32)
    ages[:, 4] = ages[:, 3]  # two events at once
    tensors = {"items": torch.from_numpy(items), "ages": torch.from_numpy(ages)}
    return Batch(tensors, torch.ones(n_rows))


def views_in(
    settings: MvdnnSettings, tokens: ItemTokens, batch: Batch
) -> tuple[RowReader, list[View]]:
    """What a rank with this one batch would learn from."""
    reader = reader_of(settings, tokens)
    answers = LocalLauncher(1).run(partial(view_statistics, batches=iter([batch]), reader=reader))
    return reader, views_to_learn(settings, *answers[0].value, len(batch.weight))


def test_means_of_views_are_those_of_their_newest_items() -> None:
    generator = torch.Generator().manual_seed(1)
    embedded = torch.randn(2, 9, 3, generator=generator)
    views = torch.tensor([[0, 1, 1, 0, -1, 1, 0, 0, 1], [1, 1, 1, 1, 1, -1, -1, -1, -1]])
    rows, ends = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 7, 9, 5])
    means, numbers = ViewHistories(embedded, views, 3).before(rows, ends, 2)
    for n, (row, end) in enumerate(zip(rows.tolist(), ends.tolist(), strict=True)):
        for view in range(3):
            read = embedded[row, :end][views[row, :end] == view][-2:]
            want = read.mean(dim=0) if len(read) else torch.zeros(3)
            np.testing.assert_allclose(means[n, view], want, atol=1e-6)
            assert numbers[n, view] == len(read)


@pytest.mark.parametrize("view", [0, 1])
def test_what_is_not_older_than_the_target_changes_no_bit(view: int) -> None:
    tokens, batch = small_tokens(), some_batch()
    net, reader = make_net(SMALL, N_ITEMS, 1), reader_of(SMALL, tokens)
    items_of_view = torch.arange(view, N_ITEMS, 2)
    negatives, since = Negatives(torch.ones(6), None, 0.5), torch.full((6,), 10**7)
    asked = View(view, items_of_view, since, negatives, 1.0)
    rows = reader.rows(batch)
    place = torch.nonzero(rows.is_target & (rows.views == view))
    examples = Examples(place[:, 0], place[:, 1])
    assert 4 in examples.ends  # one of two events at once: the other one is not older

    def losses(of: Batch) -> list[float]:
        changed = reader.rows(of)
        items = changed.timelines.items
        embedded = net.read(items.clamp_min(0)) * (items >= 0)[:, :, None]
        histories = ViewHistories(embedded, changed.views, 2)
        generator = torch.Generator().manual_seed(1)
        bags = TokenBags(tokens)
        return example_losses(
            net, SMALL, bags, asked, changed, histories, examples, generator
        ).tolist()

    want = losses(batch)
    for n, (row, end) in enumerate(place.tolist()):
        n_older = int((batch.tensors["ages"][row] > batch.tensors["ages"][row, end]).sum())
        items = batch.tensors["items"].clone()
        later = [p for p in range(n_older, int(rows.timelines.lengths[row])) if p != end]
        items[row, later] = (items[row, later] + 2) % N_ITEMS
        changed = Batch({**batch.tensors, "items": items}, batch.weight)
        assert losses(changed)[n] == want[n]
        items[row, n_older - 1] = (items[row, n_older - 1] + 2) % N_ITEMS  # what is older does
        assert losses(Batch({**batch.tensors, "items": items}, batch.weight))[n] != want[n]


def test_the_loss_of_an_example_is_the_softmax_of_its_view_over_the_temperature() -> None:
    settings = SMALL.model_copy(update={"temperature": 0.3})
    tokens, batch, net = small_tokens(), some_batch(), make_net(SMALL, N_ITEMS, 1)
    reader, views = views_in(settings, tokens, batch)
    rows, view = reader.rows(batch), views[1]
    # The oldest target: not all items of the view exist by then.
    is_target = rows.is_target & (rows.views == 1)
    oldest = rows.timelines.ages.masked_fill(~is_target, -1).argmax()
    row, end = divmod(int(oldest), is_target.shape[1])
    items, ages = rows.timelines.items[row], rows.timelines.ages[row]
    histories = ViewHistories(net.read(rows.timelines.items.clamp_min(0)), rows.views, 2)
    examples = Examples(torch.tensor([row]), torch.tensor([end]))
    found = example_losses(
        net, settings, TokenBags(tokens), view, rows, histories, examples, torch.Generator()
    )
    older = [int(i) for i, age in zip(items, ages, strict=True) if age > ages[end] and i >= 0]
    hidden = []
    for v in (0, 1):
        read = [i for i in older if i % 2 == v][-4:]
        mean = net.items_in[read].mean(dim=0) if read else torch.zeros(5)
        hidden.append(mean)
        counts = [float(bool(read)), np.log(1 + len(read)) / np.log(5)]
        hidden.append(torch.tensor(counts, dtype=torch.float32))
    user = torch.cat(hidden) @ net.users_1 + net.users_1_bias
    user = torch.tanh(user) @ net.get_parameter("users_2") + net.get_parameter("users_2_bias")
    scores = {}
    for item in view.items.tolist():
        codes = slice(tokens.starts[item], tokens.starts[item + 1])
        vectors = net.tokens[torch.from_numpy(tokens.codes[codes]).long() + 64]  # of view 1
        first = torch.from_numpy(tokens.weights[codes]) @ vectors + net.items_1_bias[1]
        out = torch.tanh(first) @ net.get_parameter("items_2")[1]
        out = out + net.get_parameter("items_2_bias")[1]
        scores[item] = torch.cosine_similarity(user, out, dim=0) / 0.3
    existed = {
        item: score
        for item, score in scores.items()
        if view.oldest[view.items.tolist().index(item)] >= ages[end]
    }
    assert 1 < len(existed) < len(scores)
    want = torch.logsumexp(torch.stack([*existed.values()]), 0) - scores[int(items[end])]
    assert found.item() == pytest.approx(float(want.detach()), rel=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_some_examples_read_only_other_views_if_there_is_anything_in_them(share: float) -> None:
    """Row 0 has both views before its target, row 1 the target's own view only."""
    settings = SMALL.model_copy(update={"own_view_dropout": share})
    tokens, net = small_tokens(), make_net(SMALL, N_ITEMS, 1)
    items = torch.tensor([[0, 1, 3], [1, 5, 3]], dtype=torch.int32)
    other = torch.tensor([[0, 7, 3], [1, 5, 3]], dtype=torch.int32)  # another item of view 1
    ages = torch.tensor([[9, 8, 7], [9, 8, 7]], dtype=torch.int32)
    reader, bags = reader_of(settings, tokens), TokenBags(tokens)
    negatives, since = Negatives(torch.ones(6), None, 0.5), torch.full((6,), 10**7)
    view = View(1, torch.arange(1, N_ITEMS, 2), since, negatives, 1.0)
    examples = Examples(torch.arange(2).repeat_interleave(500), torch.full((1000,), 2))

    def losses(of: torch.Tensor) -> torch.Tensor:
        rows = reader.rows(Batch({"items": of, "ages": ages}, torch.ones(2)))
        histories = ViewHistories(net.read(rows.timelines.items), rows.views, 2)
        generator = torch.Generator().manual_seed(1)
        return example_losses(net, settings, bags, view, rows, histories, examples, generator)

    found = losses(items).detach()
    is_blind = (found == losses(other)).view(2, 500)
    assert is_blind[0].float().mean().item() == pytest.approx(share, abs=0.07)
    assert found.view(2, 500)[1].unique().numel() == 1  # never left without anything to read


@pytest.mark.parametrize("n_samples", [None, 3])
def test_negatives_of_other_views_are_never_drawn(n_samples: int | None) -> None:
    settings = SMALL.model_copy(update={"n_samples": n_samples})
    tokens, batch = small_tokens(), some_batch(n_rows=30)
    reader, views = views_in(settings, tokens, batch)
    net, asked = make_net(settings, N_ITEMS, 1), []
    items_of_tower = net.items

    def spy(view: int, bags: Any) -> torch.Tensor:
        asked.append((view, bags))
        return items_of_tower(view, bags)

    net.items = spy  # type: ignore[method-assign]
    row_loss(net, reader, TokenBags(tokens), views, batch, torch.Generator(), 0.0).sum().backward()
    assert [view for view, _ in asked] == [0, 1]
    for view, bags in asked:
        ends = [*bags.starts.tolist()[1:], len(bags.codes)]
        drawn = {tuple(bags.codes[a:b].tolist()) for a, b in zip(bags.starts.tolist(), ends)}
        codes = [
            tuple(tokens.codes[tokens.starts[i] : tokens.starts[i + 1]].tolist())
            for i in range(N_ITEMS)
        ]
        assert drawn <= {codes[i] for i in range(view, N_ITEMS, 2)}
    # No number of the other view's tower has a gradient from a view's own targets.
    for view in views:
        net = make_net(settings, N_ITEMS, 1)
        row_loss(
            net, reader, TokenBags(tokens), [view], batch, torch.Generator(), 0.0
        ).sum().backward()
        assert net.tokens.grad is not None
        by_view = net.tokens.grad.view(2, 64, -1).abs().sum(dim=(1, 2))
        assert by_view[view.number] > 0
        assert by_view[1 - view.number] == 0


def test_the_gradient_of_every_view_reaches_the_user_tower() -> None:
    tokens, batch = small_tokens(), some_batch()
    reader, views = views_in(SMALL, tokens, batch)
    gradients = []
    for chosen in ([views[0]], [views[1]], views):
        net = make_net(SMALL, N_ITEMS, 1)
        generator = torch.Generator().manual_seed(1)
        row_loss(net, reader, TokenBags(tokens), chosen, batch, generator, 0.0).sum().backward()
        of_users = [p.grad for n, p in net.named_parameters() if n.startswith("users_")]
        assert all(grad is not None and grad.any() for grad in of_users)
        gradients.append(net.get_parameter("users_2").grad)
    assert not torch.allclose(gradients[0], gradients[1])


@pytest.mark.parametrize("balance", [1.0, 0.0])
def test_a_view_of_many_users_does_not_drown_the_others(balance: float) -> None:
    """Ten users act in view 0, one of them in view 1 too; all have many events or few."""
    settings = SMALL.model_copy(update={"view_balance": balance})
    tokens = small_tokens()
    rng = np.random.default_rng(1)
    items = 2 * rng.integers(0, N_ITEMS // 2, (10, 12)).astype(np.int32)
    items[0, ::2] += 1
    items[1:5, 3:] = -1
    ages = np.tile(np.arange(12, 0, -1, dtype=np.int32), (10, 1))
    tensors = {"items": torch.from_numpy(items), "ages": torch.from_numpy(ages)}
    batch = Batch(tensors, torch.ones(10))
    reader, views = views_in(settings, tokens, batch)
    n_users = {0: 10, 1: 1}
    weights = {view.number: view.weight * n_users[view.number] / 10 for view in views}
    want = {0: 0.5, 1: 0.5} if balance else {0: 10 / 11, 1: 1 / 11}
    assert weights == pytest.approx(want)
    # The loss of a row is the mean of its examples, however many, times the weight of the view.
    net = make_net(settings, N_ITEMS, 1)
    for name, parameter in net.named_parameters():
        if name == "tokens":
            parameter.data.zero_()  # every item has the same vector, so each loss is log(n)
    reader = replace(reader, settings=settings.model_copy(update={"existing_only": False}))
    losses = row_loss(net, reader, TokenBags(tokens), [views[0]], batch, torch.Generator(), 0.0)
    per_user = views[0].weight * np.log(len(views[0].items))
    np.testing.assert_allclose(losses.detach(), per_user, rtol=1e-5)


def test_a_view_that_is_not_learnt_is_read_all_the_same() -> None:
    settings = SMALL.model_copy(update={"learn_views": ("b",)})
    tokens, batch = small_tokens(), some_batch()
    reader, views = views_in(settings, tokens, batch)
    assert [view.number for view in views] == [1]
    assert views[0].weight * 6 == 6  # all six users have a target in it
    net = make_net(settings, N_ITEMS, 1)
    row_loss(net, reader, TokenBags(tokens), views, batch, torch.Generator(), 0.0).sum().backward()
    assert net.items_in.grad is not None
    assert net.items_in.grad[::2].any()
    assert settings.learnable(torch.tensor([4.0, 6.0])).tolist() == [0, 6]


def test_only_events_of_a_view_are_candidates_and_only_since_they_exist() -> None:
    batch = Batch(
        {
            "items": torch.tensor([[0, 2, 1, 4], [2, 2, 3, -1]], dtype=torch.int32),
            "ages": torch.tensor([[9, 8, 7, 6], [30, 20, 10, 0]], dtype=torch.int32),
        },
        torch.ones(2),
    )
    _, views = views_in(SMALL, small_tokens(), batch)
    assert [view.items.tolist() for view in views] == [[0, 2, 4], [1, 3]]
    assert [view.oldest.tolist() for view in views] == [[9, 30, 6], [7, 10]]


def test_what_ranks_know_of_the_views_is_that_of_all_ranks() -> None:
    reader, batches = reader_of(SMALL, small_tokens()), [some_batch(1), some_batch(2)]

    def of_rank(comm: Comm) -> tuple[torch.Tensor, ...]:
        return view_statistics(comm, iter(batches[comm.rank : comm.rank + 1]), reader)

    def of_both(comm: Comm) -> tuple[torch.Tensor, ...]:
        return view_statistics(comm, iter(batches), reader)

    [alone] = LocalLauncher(1).run(of_both)
    for rank in LocalLauncher(2).run(of_rank):
        for found, want in zip(rank.value, alone.value, strict=True):
            np.testing.assert_allclose(found, want)
    # A user gives n_examples targets of each view: as many are expected, of all items together.
    counts = torch.zeros(2)
    for batch in batches:
        rows = reader.rows(batch)
        for view in (0, 1):
            n_targets = (rows.is_target & (rows.views == view)).sum(dim=1)
            counts[view] += n_targets.clamp_max(SMALL.n_examples).sum()
    np.testing.assert_allclose(alone.value[1].sum(dim=1), counts)


def test_a_batch_that_weighs_nothing_has_a_gradient_of_zero() -> None:
    tokens, batch = small_tokens(), some_batch()
    reader, views = views_in(SMALL, tokens, batch)
    net = make_net(SMALL, N_ITEMS, 1)
    nothing = Batch(batch.tensors, torch.zeros(len(batch.weight)))
    losses = row_loss(net, reader, TokenBags(tokens), views, nothing, torch.Generator(), 0.0)
    losses.sum().backward()
    assert losses.tolist() == [0] * 6
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())


def test_sparse_gradients_are_the_dense_ones() -> None:
    tokens, batch = small_tokens(), some_batch()
    gradients: dict[bool, dict[str, Any]] = {}
    for sparse in (False, True):
        settings = SMALL.model_copy(update={"n_samples": 4, "sparse": sparse})
        reader, views = views_in(settings, tokens, batch)
        net, generator = make_net(settings, N_ITEMS, 1), torch.Generator().manual_seed(1)
        row_loss(net, reader, TokenBags(tokens), views, batch, generator, 0.0).sum().backward()
        gradients[sparse] = {name: p.grad for name, p in net.named_parameters()}
    is_sparse = {n for n, grad in gradients[True].items() if grad is not None and grad.is_sparse}
    assert is_sparse == {"items_in", "tokens"}
    for name in is_sparse:
        dense = gradients[True][name].to_dense()
        np.testing.assert_allclose(dense, gradients[False][name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("logq", [True, False])
def test_corrected_scores_are_the_shares_of_the_items(logq: bool) -> None:
    """Items of a view are drawn by popularity. Where scores are the log shares, the mean gradient
    of the corrected loss is 0. Without the correction popular items are pulled up too little.
    """
    share = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
    settings = SMALL.model_copy(
        update={"logq": logq, "existing_only": False, "temperature": 1.0, "n_examples": 1}
    )
    tokens = small_tokens()
    scores = torch.log(share).clone().requires_grad_()
    net = make_net(settings, N_ITEMS, 1)
    bags, odd = TokenBags(tokens), torch.arange(1, N_ITEMS, 2)
    negatives = Negatives(share * 10**6, 2, 1.0)
    view = View(1, odd, torch.full((6,), 10**7), negatives, 1.0)
    codes = {tuple(bags.of(odd[n : n + 1]).codes.tolist()): n for n in range(6)}

    def items(_view: int, asked: Any) -> torch.Tensor:  # vectors whose products are the scores
        ends = [*asked.starts.tolist()[1:], len(asked.codes)]
        of = [codes[tuple(asked.codes[a:b].tolist())] for a, b in zip(asked.starts.tolist(), ends)]
        return scores[of, None] * torch.ones(1, 6) / 6

    net.items = items  # type: ignore[method-assign]
    net.users = lambda means, numbers: torch.ones(len(means), 6)  # type: ignore[method-assign]
    reader, generator = reader_of(settings, tokens), torch.Generator().manual_seed(1)
    n_batches, n_rows = 600, 4
    for _ in range(n_batches):
        drawn = torch.multinomial(share, n_rows, replacement=True, generator=generator)
        rows = torch.stack([torch.zeros(n_rows, dtype=torch.int64), 2 * drawn + 1], dim=1)
        ages = torch.tensor([[2, 1]]).expand(n_rows, 2)
        batch = Batch({"items": rows.int(), "ages": ages}, torch.ones(n_rows))
        row_loss(net, reader, bags, [view], batch, generator, 0.0).sum().backward()
    assert scores.grad is not None
    gradient = (scores.grad / (n_rows * n_batches)).numpy()
    if logq:
        np.testing.assert_allclose(gradient, 0, atol=0.02)
    else:
        assert gradient[0] > 0.04
        assert (gradient[4:] < 0).all()


# --- scoring --------------------------------------------------------------------------------------


def queries(log: synth.Log) -> QueryBlock:
    users, column = synth.history_column(log)
    nothing = Ragged(np.zeros(len(users) + 1, np.int64), np.zeros(0, np.int32))
    return QueryBlock(users, parse_histories(column), nothing)


def some_log(n_users: int = 100, n_items: int = N_ITEMS, seed: int = 1) -> synth.Log:
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(n_users), rng.integers(1, 30, n_users))
    n = len(user)
    item = rng.integers(0, n_items, n).astype(np.int32)
    return synth.Log(user, item, rng.uniform(0, 50, n), np.ones(n, np.float32))


def arrays_of(settings: MvdnnSettings, net: MvdnnNet, tokens: ItemTokens) -> dict[str, Array]:
    net.view_users.data[:] = 1
    return scoring_arrays(settings, net, tokens, tokens)[1]


def test_a_user_has_the_vector_of_training_whatever_the_block() -> None:
    tokens, net = small_tokens(), make_net(SMALL, N_ITEMS, 1)
    arrays, block = arrays_of(SMALL, net, tokens), queries(some_log())
    vectors, is_known = user_vectors(SMALL, arrays, block.history)
    assert is_known.all()
    for row in range(10):
        items = torch.tensor(block.history.part(slice(row, row + 1)).item_idx).long()[-20:]
        histories = ViewHistories(net.items_in[items][None], items[None] % 2, 2)
        ends = torch.tensor([len(items)])
        want = user_tower(net, SMALL, *histories.before(torch.tensor([0]), ends, 4))
        np.testing.assert_allclose(vectors[row], want[0].detach(), atol=1e-6)
    for step in (1, 33):
        parts = [
            user_vectors(SMALL, arrays, block.history.part(slice(n, n + step)))[0]
            for n in range(0, 100, step)
        ]
        np.testing.assert_array_equal(np.concatenate(parts), vectors)
    # Scores are those of the kernel, the temperature in them, and as bit-equal.
    model = MvdnnModel(SMALL, synth.CUTOFF, tokens.item_idx[::2], arrays)
    scores = model.scorer().score(block)
    assert isinstance(scores, topk.DotScores)
    every = np.repeat(np.arange(100), 6), np.tile(np.arange(6), 100)
    together = scores.exact(*every).reshape(100, 6)
    alone = [
        model.scorer().score(block.part(slice(n, n + 1))).exact(np.zeros(6, int), np.arange(6))
        for n in range(100)
    ]
    np.testing.assert_array_equal(together, alone)
    users = torch.from_numpy(vectors)
    cosines = users @ net.items(0, TokenBags(tokens).of(torch.arange(0, N_ITEMS, 2))).T
    np.testing.assert_allclose(together, cosines.detach() / SMALL.temperature, atol=1e-5)


def test_events_outside_the_views_are_not_read() -> None:
    settings = SMALL.model_copy(update={"views": {"a": ("even",)}})
    tokens = small_tokens(settings).only(np.arange(N_ITEMS) % 2 == 0)
    assert (small_tokens(settings).views[1::2] == -1).all()
    arrays = arrays_of(settings, make_net(settings, 6, 1), tokens)
    log = synth.log([(0, 1, 5.0), (1, 1, 5.0), (1, 2, 4.0), (2, 2, 9.0)])
    vectors, is_known = user_vectors(settings, arrays, queries(log).history)
    assert is_known.tolist() == [False, True, True]
    np.testing.assert_array_equal(vectors[1], vectors[2])


def test_types_of_events_can_be_the_views() -> None:
    settings = SMALL.model_copy(
        update={"view_by": "event_type", "views": {"buy": ("purchase",), "look": ()}}
    )
    tokens = small_tokens(settings)
    codes = [type_code(name) for name in ("purchase", "click", "click", "purchase")]
    batch = Batch(
        {
            "items": torch.tensor([[0, 1, 0, 2]], dtype=torch.int32),
            "ages": torch.tensor([[9, 8, 7, 6]], dtype=torch.int32),
            "types": torch.tensor([codes], dtype=torch.int32),
        },
        torch.ones(1),
    )
    reader, views = views_in(settings, tokens, batch)
    assert reader.rows(batch).views.tolist() == [[0, 1, 1, 0]]
    assert [view.items.tolist() for view in views] == [[0, 2], [0, 1]]
    net = make_net(settings, N_ITEMS, 1)
    net.view_users.data[:] = 1
    items, arrays = scoring_arrays(settings, net, tokens, tokens)
    assert items.tolist() == arrays["view.1.items"].tolist() == list(range(N_ITEMS))
    history = Histories(
        np.array([0, 4]), np.array([0, 1, 0, 2], np.int32), np.arange(4), np.ones(4, np.float32),
        event_type=pa.array(["purchase", "click", "click", "purchase"]),
    )  # fmt: skip
    means, numbers = ViewHistories(
        net.items_in[[0, 1, 0, 2]][None], torch.tensor([[0, 1, 1, 0]]), 2
    ).before(torch.tensor([0]), torch.tensor([4]), 4)
    want = user_tower(net, settings, means, numbers)
    found, _ = user_vectors(settings, arrays, history)
    np.testing.assert_allclose(found, want.detach(), atol=1e-6)


def test_another_view_of_the_same_network_is_not_trained_again() -> None:
    tokens, net = small_tokens(), make_net(SMALL, N_ITEMS, 1)
    arrays = arrays_of(SMALL, net, tokens)
    base = MvdnnModel(SMALL, synth.CUTOFF, tokens.item_idx[::2], arrays)
    other = another_view(MvdnnSettings(list_view="b"), "base", base)
    assert other.items.tolist() == list(range(1, N_ITEMS, 2))
    odd = tokens.only(tokens.views == 1)
    np.testing.assert_array_equal(other.arrays()["items_out"], item_vectors(net, 1, odd))
    block = queries(some_log())
    np.testing.assert_array_equal(
        base.scorer().score(block).users, other.scorer().score(block).users
    )
    same = another_view(MvdnnSettings(), "base", base)
    assert same.items.tolist() == base.items.tolist()
    with pytest.raises(ModelError, match=r"'base' learnt nothing of the view 'c'.*\['a', 'b'\]"):
        another_view(MvdnnSettings(list_view="c"), "base", base)


def test_errors_say_what_to_do() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"views": {"a": ["x"], "b": ["x"]}}, r"\['x'\] are in two views"),
        ({"views": {"a": [], "b": []}}, "two views have an empty list"),
        ({"view_by": "event_type"}, "views must say the event types"),
        ({"temperature": 0}, "temperature"),
    ]
    for settings, text in wrong:
        with pytest.raises(ConfigError, match=text):
            Mvdnn.from_dict(settings)
    with pytest.raises(ConfigError, match="name one other mvdnn"):
        Mvdnn(SMALL).check_needs({"words": "encoder"})
    another = Mvdnn.from_dict({"views": {"a": []}, "list_view": "c"})
    with pytest.raises(ConfigError, match=r"names \['c'\], which is none of .* \['a'\]"):
        another.check_needs({})
    another.check_needs({"trained": "retriever"})  # whose views are the ones that count
    tokens, net = small_tokens(), make_net(SMALL, N_ITEMS, 1)
    with pytest.raises(ModelError, match="no user acted in the view 'a' after anything else"):
        scoring_arrays(SMALL, net, tokens, tokens)


# --- planted data ---------------------------------------------------------------------------------

Trained = Callable[..., MvdnnModel]


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    """Train on a log, without Spark. `tokens` may have items that nobody acted on."""

    def run(
        log: synth.Log, tokens: ItemTokens, settings: MvdnnSettings, n_ranks: int = 1
    ) -> MvdnnModel:
        folder = str(tmp_path / f"rows-{len(list(tmp_path.iterdir()))}")
        training = synth.write_training(log, folder, "training_timelines", n_ranks, 64)
        known = tokens.of(np.unique(log.item_idx))
        loop = LoopOptions(epochs=settings.epochs, learning_rate=settings.learning_rate)
        job = Job(settings, known.item_idx, plan_shards(training, n_ranks), None, loop)
        answer = LocalLauncher(n_ranks).run(partial(train_rank, known), job)[0].value
        net = make_net(settings, len(known.item_idx), 1)
        load_weights(net, answer)
        items, arrays = scoring_arrays(settings, net, known, tokens)
        return MvdnnModel(settings, synth.CUTOFF, items, arrays)

    return run


N_USERS, N_OF_VIEW, N_EVENTS = 300, 30, 20
PLANTED = MvdnnSettings(
    views={"b": ("b",), "a": ("a",)}, embedding_size=8, hidden_sizes=(16, 8), n_buckets=1024,
    n_samples=None, n_examples=8, length=64, batch_size=32, epochs=20, learning_rate=0.02,
)  # fmt: skip


def two_views(shared: bool, seed: int = 1) -> tuple[synth.Log, Array, Array]:
    """Return events, what each user thinks of each item of view b, and the users who are new there.

    Items 0 to 29 are in view a, 30 to 59 in view b. Users and items have directions in the plane. A
    user acts on items by exp(4 cosine); in view b by the same direction as in view a if `shared`,
    else by another one. Every fifth user has no event in view b.
    """
    rng = np.random.default_rng(seed)
    items = rng.uniform(0, 2 * np.pi, 2 * N_OF_VIEW)
    in_a = rng.uniform(0, 2 * np.pi, N_USERS)
    in_b = in_a if shared else rng.uniform(0, 2 * np.pi, N_USERS)
    liking = np.cos(np.stack([in_a, in_b])[:, :, None] - items.reshape(2, 1, N_OF_VIEW))
    noise = rng.gumbel(size=liking.shape)  # the largest sums are draws without replacement
    drawn = np.argsort(-(4 * liking + noise), axis=2)[:, :, : N_EVENTS // 2]
    item = drawn + np.array([0, N_OF_VIEW])[:, None, None]
    user = np.broadcast_to(np.arange(N_USERS)[None, :, None], item.shape)
    is_cold = np.arange(N_USERS) % 5 == 0
    is_kept = np.ones(item.shape, bool)
    is_kept[1, is_cold] = False
    n = is_kept.sum()
    log = synth.Log(
        user[is_kept], item[is_kept].astype(np.int32), rng.uniform(0, 99, n), np.ones(n, np.float32)
    )
    return log, liking[1], is_cold


def auc(scores: Array, is_liked: Array) -> float:
    """The mean over rows of the share of pairs of a liked and another item in the right order."""
    values = []
    for row, liked in zip(scores, is_liked, strict=True):
        difference = row[liked][:, None] - row[~liked][None, :]
        values.append(((difference > 0) + 0.5 * (difference == 0)).mean())
    return float(np.mean(values))


def order_of_new_users(trained: Trained, shared: bool, **changed: Any) -> float:
    log, liking, is_cold = two_views(shared)
    settings = PLANTED.model_copy(update=changed)
    tokens = catalogue(
        [f"{'ab'[n // N_OF_VIEW]}{n}" for n in range(2 * N_OF_VIEW)],
        ["a"] * N_OF_VIEW + ["b"] * N_OF_VIEW,
        settings,
    )
    model = trained(log, tokens, settings)
    assert model.items.tolist() == list(range(N_OF_VIEW, 2 * N_OF_VIEW))
    scores = synth.scores(model, log)  # of all users, who all have events
    return auc(scores[is_cold], liking[is_cold] > 0)


def test_users_who_are_new_in_a_view_are_known_from_the_other_one(trained: Trained) -> None:
    assert order_of_new_users(trained, shared=True) >= 0.95


def test_independent_tastes_tell_nothing_of_the_other_view(trained: Trained) -> None:
    assert order_of_new_users(trained, shared=False) == pytest.approx(0.5, abs=0.08)


def test_an_item_without_events_is_placed_by_its_trigrams(trained: Trained) -> None:
    """Users like one of two sorts; names say the sort. New items get the users of their sort."""
    rng = np.random.default_rng(2)
    sorts = ["violet lamp", "wooden spoon"]
    words = ["small", "large", "round", "flat", "plain", "antique", "garden", "kitchen"]
    names = [f"{word} {sorts[n % 2]}" for n, word in enumerate(np.repeat(words, 2))]
    names += ["travel violets", "two lamps", "spoons", "woodenware"]
    is_first = np.array([n % 2 == 0 for n in range(16)] + [True, True, False, False])
    user = np.repeat(np.arange(80), 6)
    item = 2 * rng.integers(0, 8, len(user)) + user % 2
    log = synth.Log(
        user, item.astype(np.int32), rng.uniform(0, 9, len(user)), np.ones(len(user), np.float32)
    )
    settings = PLANTED.model_copy(update={"views": {}, "batch_size": 16})
    tokens = catalogue(names, [""] * 20, settings)
    model = trained(log, tokens, settings)
    assert model.items.tolist() == list(range(20))
    scores = synth.scores(model, log)[:, 16:]
    likes_first = np.arange(80) % 2 == 0
    margin = scores[:, is_first[16:]].min(axis=1) - scores[:, ~is_first[16:]].max(axis=1)
    assert (margin[likes_first] > 0).mean() > 0.95
    margin = scores[:, ~is_first[16:]].min(axis=1) - scores[:, is_first[16:]].max(axis=1)
    assert (margin[~likes_first] > 0).mean() > 0.95


def test_two_ranks_learn_the_same_twice(trained: Trained) -> None:
    log, _, _ = two_views(shared=True)
    tokens = catalogue([f"i{n}" for n in range(60)], ["a"] * 30 + ["b"] * 30, PLANTED)
    settings = PLANTED.model_copy(update={"epochs": 2})
    one, again = trained(log, tokens, settings, 2), trained(log, tokens, settings, 2)
    for name, array in one.arrays().items():
        np.testing.assert_array_equal(array, again.arrays()[name])


@pytest.mark.spark
def test_a_fit_lists_a_view_with_its_items_without_events(
    spark: SparkSession, tmp_path: Path
) -> None:
    log, _, _ = two_views(shared=True)
    log = log.only(log.item_idx % 10 != 3)
    data = synth.dataset(spark, log, 2, {"training_timelines": str(tmp_path / "rows")})
    data = replace(data, catalogue=synth.with_media(synth.items(spark, np.arange(60))))
    settings = {
        "views": {"first": ["c0", "c1"], "others": []}, "list_view": "others", "epochs": 1,
        "n_buckets": 512, "hidden_sizes": [8], "embedding_size": 4, "item_features": ["n_users"],
    }  # fmt: skip
    said: list[str] = []
    options = FitOptions(in_process=True, train=Train(ranks=1, threads=1), progress=said.append)
    model = Mvdnn.from_dict(settings).fit(data, options)
    assert model.items.tolist() == [n for n in range(60) if n % 4 > 1]  # c2 and c3, cold ones too
    assert any("first 30 items and 300 users, others 30 items" in text for text in said)
    first = Mvdnn.from_dict({"list_view": "first"}).fit(data, options, {"mvdnn": model})
    assert first.items.tolist() == [n for n in range(60) if n % 4 < 2]
    lists = first.recommend(synth.ask(data), 60).toArrow()
    assert len(set(lists.column("user_idx").to_pylist())) == 300
    assert {13, 33, 53} <= set(lists.column("item_idx").to_pylist())
    wrong: list[tuple[type[Exception], dict[str, Any], str]] = [
        (ModelError, {"item_features": ["n_user"]}, r"names \['n_user'\], but the table has"),
        (EmptyDataError, {"views": {"books": ["book"]}}, r"one of the views \['books'\]"),
        (CatalogueTooLargeError, {"max_items": 59}, r"60 items .* raise models\.mvdnn\.max_items"),
    ]
    for error, changed, text in wrong:
        with pytest.raises(error, match=text):
            Mvdnn.from_dict({**settings, "list_view": None, **changed}).fit(data, options)
    popular = Popular(PopularSettings()).fit(data, options)
    with pytest.raises(ModelError, match="'popular' is a PopularModel; name an mvdnn"):
        Mvdnn.from_dict({}).fit(data, options, {"popular": popular})
