"""Networks of pictures and sounds: what padding, changes and seeds must not do."""

from __future__ import annotations

import pytest
import torch

from recspark.nets.images import changed_at_random, untrained, untrained_small, without_last_layer
from recspark.nets.sounds import untrained_gru

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_what_lies_behind_a_sound_does_not_count(length: int) -> None:
    net = untrained_gru(5, 6, 3, 1).double().eval()
    frames = torch.randn(
        1, length, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    alone = net(frames, torch.tensor([length]))
    garbage = torch.full((1, 9, 5), 1e3, dtype=torch.float64)
    padded = torch.cat(
        [torch.cat([frames, garbage], dim=1), garbage.repeat(1, 2, 1)[:, : length + 9]]
    )
    together = net(padded, torch.tensor([length, 4]))
    torch.testing.assert_close(together[:1], alone, rtol=1e-12, atol=1e-12)
    assert (together[1] - alone[0]).abs().max() > 1e-3


def test_pictures_are_mirrored_and_shifted_by_an_eighth_at_most() -> None:
    """A picture whose colours say where each pixel is: its columns run up, or down if mirrored."""
    side, n = 16, 400
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    picture = torch.stack([y, x, torch.zeros_like(x)], dim=2).expand(n, side, side, 3)
    changed = changed_at_random(picture, torch.Generator().manual_seed(3))
    rows, columns = changed[:, :, side // 2, 0], changed[:, side // 2, :, 1]  # (n, side) each
    assert (rows.diff(dim=1) >= 0).all()
    step = columns[:, side // 2 + 1] - columns[:, side // 2]
    assert set(step.tolist()) == {-1, 1}
    assert 150 < int((step == 1).sum()) < 250
    shifts = rows[:, side // 2] - side // 2
    assert set(shifts.tolist()) == {-2, -1, 0, 1, 2}
    again = changed_at_random(picture, torch.Generator().manual_seed(3))
    assert torch.equal(again, changed)


def test_first_weights_follow_from_the_seed_and_leave_torch_as_it_was() -> None:
    state = torch.random.get_rng_state()
    for make in (
        lambda seed: untrained_small(4, 2, seed),
        lambda seed: untrained_gru(4, 4, 2, seed),
        lambda seed: untrained("resnet18", seed, num_classes=2),
    ):
        a, b, other = (torch.cat([p.flatten() for p in make(s).parameters()]) for s in (1, 1, 2))
        assert torch.equal(a, b)
        assert not torch.equal(a, other)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("network", ["small", "alexnet", "resnet18"])
def test_the_last_layer_reads_the_features(network: str) -> None:
    def make() -> torch.nn.Module:
        if network == "small":
            return untrained_small(4, 3, 1).eval()
        return untrained(network, 1, num_classes=3).eval()  # type: ignore[arg-type]

    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    whole, body = make(), make()
    last: torch.nn.Module = whole.classifier[-1] if network == "alexnet" else whole.fc  # type: ignore[assignment,index]
    without_last_layer(body)
    with torch.inference_mode():
        torch.testing.assert_close(last(body(pixels)), whole(pixels))
