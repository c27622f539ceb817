"""SDAE: what each of its trainings moves, what it corrupts, and that scoring is the network."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recspark.models.autoencoders.autoencoder import encode
from recspark.models.autoencoders.sdae import (
    SdaeModel,
    SdaeSettings,
    layers_of,
    make_net,
    pretraining_loss,
    row_loss,
    train_rank,
)
from recspark.models.neural import Job, corrupted, net_arrays
from recspark.testing import synth
from recspark.train.feed import Batch, plan_shards
from recspark.train.launch import LocalLauncher
from recspark.train.loop import LoopOptions, load_weights

pytestmark = pytest.mark.torch
VOCABULARY = torch.tensor([3, 5, 8, 13])
SETTINGS = SdaeSettings(hidden_sizes=(6, 4, 2), corruption=0.5)


def batch() -> Batch:
    items = torch.tensor([[3, 8, -1], [5, 8, 13]])
    weights = torch.tensor([[3.0, 4, 0], [1, 2, 2]])
    return Batch({"items": items, "weights": weights}, torch.ones(2))


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_pretraining_moves_one_layer_and_its_way_back(k: int) -> None:
    net = make_net(SETTINGS, 4, seed=1)
    pretraining_loss(net, VOCABULARY, SETTINGS, k, batch(), generator()).sum().backward()
    moved = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == set(net.parameters_of(k))
    net.zero_grad()
    row_loss(net, VOCABULARY, SETTINGS, batch(), generator()).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_a_layer_rebuilds_its_clean_input_from_a_corrupted_one() -> None:
    net = make_net(SETTINGS, 4, seed=1)
    a = {name: p.detach().numpy().astype(float) for name, p in net.named_parameters()}
    bags = np.array([[0.6, 0, 0.8, 0], [0, 1 / 3, 2 / 3, 2 / 3]])
    clean = np.tanh(bags @ a["items_in"] + a["items_in_bias"])
    kept = (torch.rand((2, 6), generator=generator()) >= 0.5).numpy()
    code = np.tanh((clean * kept / 0.5) @ a["down_2"] + a["down_2_bias"])
    back = np.tanh(code @ a["up_2"] + a["up_2_bias"])
    want = ((back - clean) ** 2).sum(axis=1)
    found = pretraining_loss(net, VOCABULARY, SETTINGS, 2, batch(), generator())
    np.testing.assert_allclose(found.detach().numpy(), want, rtol=1e-5)


def test_corruption_is_masking_noise() -> None:
    net = make_net(SETTINGS, 4, seed=1)
    whole = row_loss(net, VOCABULARY, SETTINGS, batch(), None)
    none = SETTINGS.model_copy(update={"corruption": 0.0})
    torch.testing.assert_close(row_loss(net, VOCABULARY, none, batch(), generator()), whole)
    assert not row_loss(net, VOCABULARY, SETTINGS, batch(), generator()).equal(whole)


def test_what_is_corrupted_sums_to_what_it_was() -> None:
    values = torch.rand(200_000, generator=generator())
    for share in (0.0, 0.3, 0.8):
        found = corrupted(values, share, generator(2))
        assert float((found == 0).float().mean()) == pytest.approx(share, abs=0.01)
        assert float(found.mean()) == pytest.approx(float(values.mean()), rel=0.02)


def planted(tmp_path: object, **changed: object) -> float:
    """NDCG@10 of what was held back of planted tastes."""
    events, held = synth.tastes()
    training = synth.write_training(events, f"{tmp_path}/tastes", "training_bags")
    settings = SdaeSettings(
        **{"hidden_sizes": (32, 16), "batch_size": 50, "half_life_days": None, **changed}  # type: ignore[arg-type]
    )
    items = np.arange(held.shape[1], dtype=np.int32)
    loop = LoopOptions(epochs=settings.epochs, learning_rate=0.01)
    made = Job(settings, items, plan_shards(training, 1), None, loop)
    net = make_net(settings, len(items), 1)
    load_weights(net, LocalLauncher(1).run(train_rank, made)[0].value)
    model = SdaeModel(settings, synth.CUTOFF, items, net_arrays(net))
    return synth.ndcg(synth.scores(model, events), events, held)


def test_neither_corruption_nor_layers_trained_first_cost(tmp_path: object) -> None:
    """Half of the input set to 0 is no worse than none of it, nor are layers trained one by one."""
    events, held = synth.tastes()
    counts = np.bincount(events.item_idx, minlength=held.shape[1])
    popular = synth.ndcg(np.tile(counts.astype(float), (len(held), 1)), events, held)
    whole = planted(tmp_path, corruption=0.5, pretraining_epochs=4)
    assert whole > 1.3 * popular
    assert whole > planted(tmp_path, corruption=0.0, pretraining_epochs=4) - 0.005
    assert whole > planted(tmp_path, corruption=0.5, pretraining_epochs=0) - 0.005


def test_scoring_is_the_network() -> None:
    net = make_net(SETTINGS, 4, seed=2)
    arrays = {name: p.detach().numpy() for name, p in net.named_parameters()}
    start, items = np.array([0, 2, 5]), np.array([0, 2, 1, 2, 3], np.int32)
    found = encode(start, items, np.float32([3, 4, 1, 2, 2]), arrays, layers_of(3), unit=True)
    logits = torch.from_numpy(found @ arrays["items_out"].T + arrays["items_out_bias"])
    share = torch.log_softmax(logits, dim=1)
    want = -(share * torch.tensor([[3.0, 0, 4, 0], [0, 1, 2, 2]])).sum(dim=1)
    loss = row_loss(net, VOCABULARY, SETTINGS, batch(), None)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)


def job(tmp_path: object, **loop: object) -> Job:
    events = synth.power_law(60, 20)
    training = synth.write_training(events, f"{tmp_path}/rows", "training_bags")
    settings = SdaeSettings(hidden_sizes=(8, 4), pretraining_epochs=2, batch_size=20)
    options = LoopOptions(epochs=2, learning_rate=0.01, **loop)  # type: ignore[arg-type]
    items = np.unique(events.item_idx).astype(np.int32)
    return Job(settings, items, plan_shards(training, 2), None, options)


def test_each_layer_is_resumed_for_itself(tmp_path: object) -> None:
    plain, told = job(tmp_path), []
    whole = LocalLauncher(2).run(train_rank, plain)[0].value
    saved = job(tmp_path, checkpoints=f"{tmp_path}/checkpoints")
    LocalLauncher(2, tell=told.append).run(train_rank, saved)
    order = [line.split(":")[0] for line in told if not line.startswith("rank")]
    epochs = ["epoch 1 of 2", "epoch 2 of 2"]
    assert order == ["layer 1 of 2", *epochs, "layer 2 of 2", *epochs, "all layers", *epochs]
    told.clear()
    again = LocalLauncher(2, tell=told.append).run(train_rank, saved)[0].value
    assert sum(line == "resuming after epoch 2 of 2" for line in told) == 3
    nets = [make_net(saved.settings, len(saved.items), 1) for _ in range(2)]
    for net, trained in zip(nets, (whole, again)):
        load_weights(net, trained)
    for left, right in zip(nets[0].parameters(), nets[1].parameters()):
        assert left.equal(right)
