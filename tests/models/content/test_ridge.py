"""The regression from blocks of content, against numpy, and on planted blocks."""

from __future__ import annotations

import numpy as np
import pytest

from recspark.data.blocks import Array
from recspark.models.content.ridge import OFF, Block, fit_ridge
from recspark.models.content.ridge import _moments as moments_of

RNG = np.random.default_rng(3)
N = 400


def block(values: Array, is_known: Array | None = None) -> Block:
    known = np.ones(len(values), bool) if is_known is None else is_known
    return Block(values.astype(np.float32), known)


def weights(n: int = N) -> Array:
    return np.where(np.arange(n) % 5 == 0, -1.0, 1.0)


@pytest.fixture(scope="module")
def planted() -> tuple[dict[str, Block], Array]:
    """A block that decides the targets, one that decides a little, and one of noise."""
    good, little = RNG.normal(size=(N, 6)), RNG.normal(size=(N, 4))
    targets = good @ RNG.normal(size=(6, 3)) + 0.3 * little @ RNG.normal(size=(4, 3))
    targets += 0.3 * RNG.normal(size=targets.shape) + 2
    noise = RNG.normal(size=(N, 80))
    return {"good": block(good), "noise": block(noise), "little": block(little)}, targets


def test_the_solution_is_that_of_numpy(planted: tuple[dict[str, Block], Array]) -> None:
    """Of the ridge on centred columns, with the penalties as chosen; all rows count."""
    blocks, targets = planted
    fitted = fit_ridge({"good": blocks["good"]}, targets, weights())
    x = blocks["good"].values.astype(np.float64)
    x = x - x[weights() > 0].mean(axis=0)
    scale = fitted.scales["good"]
    assert np.square(x[weights() > 0] * scale).sum(axis=1).mean() == pytest.approx(1, rel=1e-5)
    design = np.concatenate([x * scale, np.ones((N, 1))], axis=1)
    penalty = np.diag([fitted.penalties["good"] * N] * 6 + [0.0])
    expected = design @ np.linalg.solve(design.T @ design + penalty, design.T @ targets)
    assert fitted.predict(blocks) == pytest.approx(expected, abs=1e-4)


def test_noise_is_left_out_and_does_no_harm(planted: tuple[dict[str, Block], Array]) -> None:
    """Under one penalty for all it would do harm: that is what the blocks are for."""
    blocks, targets = planted
    with_noise = fit_ridge(blocks, targets, weights())
    without = fit_ridge({n: b for n, b in blocks.items() if n != "noise"}, targets, weights())
    assert with_noise.penalties["noise"] == OFF
    assert without.penalties["good"] < OFF
    assert without.penalties["little"] < OFF
    assert np.array_equal(with_noise.predict(blocks), without.predict(blocks))
    assert with_noise.errors["all"] < 0.9 * with_noise.errors["good"] < with_noise.errors["noise"]
    held, learnt = np.where(weights() < 0, 1.0, 0.0), np.where(weights() > 0, 1.0, 0.0)
    of_learnt = moments_of(blocks, targets, learnt)
    of_held = moments_of(blocks, targets, held, like=of_learnt)
    one_penalty = min(
        of_held.error(of_learnt.solve(dict.fromkeys(blocks, penalty)))
        for penalty in 10.0 ** np.arange(-5, 1.5, 0.5)
    )
    assert of_held.error(of_learnt.solve(with_noise.penalties)) < 0.95 * one_penalty


def test_the_validation_rows_are_not_learnt_from_when_penalties_are_chosen() -> None:
    """A block that numbers the rows tells each learnt row its target, and a held one nothing."""
    targets = RNG.normal(size=(N, 2))
    fitted = fit_ridge({"numbers": block(np.eye(N))}, targets, weights())
    assert fitted.penalties["numbers"] == OFF
    assert fitted.predict({"numbers": block(np.eye(N))}).std(axis=0).max() < 1e-6


def test_an_item_without_a_block_counts_as_its_mean() -> None:
    values = RNG.normal(size=(N, 3)) + 5
    targets = values @ RNG.normal(size=(3, 2))
    is_known = np.arange(N) % 3 > 0
    spoilt = np.where(is_known[:, None], values, 1e6)
    fitted = fit_ridge({"some": block(spoilt, is_known)}, targets, weights())
    got = fitted.predict({"some": block(spoilt, is_known)})
    assert np.abs(got[~is_known] - got[~is_known][0]).max() == 0
    assert np.abs(got[is_known] - targets[is_known]).mean() < 0.3


def test_blocks_without_anything_give_the_mean() -> None:
    targets = RNG.normal(size=(N, 2)) + 1
    nothing = {
        "none": block(np.zeros((N, 4))),
        "unknown": block(np.ones((N, 2)), np.zeros(N, bool)),
    }
    fitted = fit_ridge(nothing, targets, weights())
    assert fitted.predict(nothing) == pytest.approx(np.tile(targets.mean(axis=0), (N, 1)), abs=1e-5)
