"""What `coevolve` promises of its equations: states, gradients, and what it learns of a simulation.

No Spark: the network, the walk through events, and the training loop on one rank.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from recspark.data.blocks import MICROS_PER_DAY, Array
from recspark.engines.event_walk import SHORTEST_GAP_DAYS, Clocks, walk
from recspark.models.sequences.event_stream import NOBODY, Events, Walker, Windows, replay
from recspark.models.sequences.event_windows import make_window
from recspark.nets.coevolve import CoevolveNet, Window
from recspark.train.comm import Meeting, ThreadComm
from recspark.train.loop import LoopOptions, train_network

pytestmark = pytest.mark.torch
DAY = MICROS_PER_DAY


def make_net(n_users: int, n_items: int, seed: int = 3, **changed: Any) -> CoevolveNet:
    """Return a network with vectors that differ, in the paper's form unless `changed`."""
    given: dict[str, Any] = {"size": 4, "n_recent": 0, "shape": 2.0, "cell": "rnn", **changed}
    given.setdefault("exponents", torch.zeros(given["n_recent"] + 1))
    generator = torch.Generator().manual_seed(seed)
    net = CoevolveNet(n_users, n_items, generator=generator, **given)
    with torch.no_grad():
        net.user_start.normal_(0, 1, generator=generator)
        net.item_start.weight.mul_(2.0)
        net.user_gate.fill_(1.0)
        net.item_gate.fill_(1.0)
    return net


def with_own_starts_and_gates(net: CoevolveNet) -> CoevolveNet:
    """Return `net` with what the paper's form leaves out: every user another start, gates not 1."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        net.user_own.weight.normal_(0, 0.5, generator=generator)
        for gate in (net.user_gate, net.item_gate):
            gate.uniform_(0.5, 1.5, generator=generator)
    return net


def some_events(rows: list[tuple[int, int, float]]) -> Events:
    """Return events from (user, item, day)."""
    user, item, day = zip(*rows, strict=True)
    at = np.round(np.array(day) * DAY).astype(np.int64)
    return Events(np.array(user, np.int32), np.array(item, np.int32), at)


def window_of(net: CoevolveNet, events: Events, clocks: Clocks) -> Window:
    """Return a window with all users and items as samples: its survival terms are exact."""
    n_users, n_items = len(clocks.user_at), len(clocks.item_at)
    everybody = np.arange(n_items, dtype=np.int32), np.arange(n_users, dtype=np.int32)
    steps = walk(clocks, events.user, events.item, events.event_at, *everybody)
    return make_window(steps, events.user, events.item, clocks)[0]


def clocks_of(net: CoevolveNet) -> Clocks:
    return Clocks.started(len(net.user_state), len(net.item_state), net.n_recent, 0)


def exponents(net: CoevolveNet) -> Array:
    """Return s of every pair in the present states, float64 (n_users, n_items)."""
    with torch.no_grad():
        users = net.user_vectors(net.user_state, torch.arange(len(net.user_state)))
        items = net.item_vectors(net.item_state, torch.arange(len(net.item_state)))
        return np.asarray((users @ items.T).double().numpy())


# --- states -------------------------------------------------------------------------------------


def test_levels_hold_nobody_twice_and_keep_the_order_of_each() -> None:
    rng = np.random.default_rng(1)
    user, item = rng.integers(0, 12, 200), rng.integers(0, 9, 200)
    clocks = Clocks.started(12, 9, 2, 0)
    level = walk(clocks, user, item, np.arange(200) * DAY, NOBODY, NOBODY).level
    for one_side in (user, item):
        for who in np.unique(one_side):
            assert (np.diff(level[one_side == who]) > 0).all()
    assert level.max() < 199  # some stand side by side
    assert walk(
        Clocks.started(3, 3, 2, 0),
        np.array([0, 1, 1, 2]),
        np.array([0, 0, 1, 2]),
        np.arange(4) * DAY,
        NOBODY,
        NOBODY,
    ).level.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("cell", ["gru", "rnn"])
def test_both_states_change_from_the_values_just_before_and_nobody_else_does(cell: Any) -> None:
    net = with_own_starts_and_gates(make_net(3, 3, cell=cell, n_recent=2))
    rows = [(0, 0, 1.0), (1, 1, 1.5), (0, 1, 2.0), (2, 1, 2.0), (0, 0, 9.0)]
    users, items = net.user_state.clone(), net.item_state.clone()
    last = np.zeros(3), np.zeros(3)
    recent: dict[tuple[str, int], list[int]] = {}

    def facts(side: str, who: int, other: int, gap: float) -> torch.Tensor:
        newest = recent.setdefault((side, who), [])
        place = newest.index(other) if other in newest[:2] else 2
        since = np.log1p(max(gap, SHORTEST_GAP_DAYS) * 1440) / 10
        return torch.tensor([since, place < 2, place == 0], dtype=torch.float32)

    with torch.no_grad():
        for u, i, day in rows:  # one event at a time, as the equations say
            user_vector = users[u] * net.user_gate + net.user_start + net.user_own.weight[u]
            item_vector = items[i] * net.item_gate + net.item_start.weight[i]
            of_user = facts("user", u, i, day - last[0][u])
            of_item = facts("item", i, u, day - last[1][i])
            new_user = net.user_cell(torch.cat([item_vector, of_user])[None], users[u][None])
            new_item = net.item_cell(torch.cat([user_vector, of_item])[None], items[i][None])
            users[u], items[i] = new_user[0], new_item[0]
            last[0][u] = last[1][i] = day
            for key, other in ((("user", u), i), (("item", i), u)):
                recent[key] = [other, *(o for o in recent[key] if o != other)]
    replay(net, some_events(rows), clocks_of(net))
    assert torch.allclose(net.user_state, users, atol=1e-6)
    assert torch.allclose(net.item_state, items, atol=1e-6)

    before = net.user_state.clone(), net.item_state.clone()
    replay(net, some_events([(1, 2, 10.0)]), clocks_of(net))
    assert torch.equal(net.user_state[[0, 2]], before[0][[0, 2]])
    assert torch.equal(net.item_state[:2], before[1][:2])
    assert not torch.equal(net.user_state[1], before[0][1])


def test_windows_carry_states_on() -> None:
    """Cut into windows of any length, the same events end in the same states."""
    rng = np.random.default_rng(2)
    rows = [(int(rng.integers(6)), int(rng.integers(5)), n / 7) for n in range(60)]
    events, ends = some_events(rows), []
    for size in (60, 7, 1):
        net = make_net(6, 5, n_recent=3)
        clocks = clocks_of(net)
        for begin in range(0, 60, size):
            part = events.part(begin, begin + size)
            window = window_of(net, part, clocks)
            net.keep(window, *net.evolve(window))
        ends.append(torch.cat([net.user_state, net.item_state]))
    assert torch.allclose(ends[0], ends[1], atol=1e-6)
    assert torch.allclose(ends[0], ends[2], atol=1e-6)


# --- likelihood ---------------------------------------------------------------------------------


def test_the_loss_is_minus_the_log_likelihood() -> None:
    """Against the intensities of all pairs, integrated numerically from event to event."""
    rng = np.random.default_rng(4)
    rows = [
        (int(rng.integers(3)), int(rng.integers(4)), d) for d in np.cumsum(rng.exponential(1, 20))
    ]
    for shape in (2.0, 0.5):
        net = make_net(3, 4, shape=shape)
        window = window_of(net, some_events(rows), clocks_of(net))
        states = net.evolve(window)
        loss = net.losses(window, *states, 0.0).sum().item()
        last, total = np.zeros((3, 4)), 0.0
        clocks = clocks_of(net)
        for u, i, day in rows:
            s = exponents(net)
            total -= s[u, i] + (shape - 1) * np.log(day - last[u, i])
            for v, j in np.ndindex(3, 4):
                if v != u and j != i:
                    continue
                density = partial(intensity, s[v, j], shape, last[v, j])
                total += integrate.quad(density, last[v, j], day)[0]
            replay(net, some_events([(u, i, day)]), clocks)
            last[u], last[:, i] = day, day
        assert loss == pytest.approx(total, rel=1e-4)


def intensity(s: float, shape: float, begin: float, day: float) -> float:
    return float(np.exp(s) * (day - begin) ** (shape - 1))


def test_sampled_survival_terms_have_the_right_mean() -> None:
    rng = np.random.default_rng(6)
    rows = [(int(rng.integers(8)), int(rng.integers(30)), n / 3) for n in range(40)]
    events, net = some_events(rows), make_net(8, 30, n_recent=3)
    exact = net.losses(window_of(net, events, clocks_of(net)), *evolved(net, events), 0.0).sum()
    sums = []
    for seed in range(300):
        draws = np.random.default_rng(seed)
        items, users = (
            np.sort(draws.choice(n, k, replace=False)).astype(np.int32)
            for n, k in ((30, 6), (8, 3))
        )
        clocks = clocks_of(net)
        steps = walk(clocks, events.user, events.item, events.event_at, items, users)
        window = make_window(steps, events.user, events.item, clocks)[0]
        with torch.no_grad():
            sums.append(net.losses(window, *net.evolve(window), 0.0).sum().item())
    error = np.std(sums) / np.sqrt(len(sums))
    assert abs(np.mean(sums) - exact.item()) < 4 * error
    assert error < 0.1 * abs(exact.item())


def evolved(net: CoevolveNet, events: Events) -> tuple[torch.Tensor, torch.Tensor]:
    return net.evolve(window_of(net, events, clocks_of(net)))


def test_the_gradient_is_that_of_finite_differences() -> None:
    """Through all events of a window, by the survival term and by the intensities."""
    rng = np.random.default_rng(5)
    rows = [(int(rng.integers(3)), int(rng.integers(3)), n / 2) for n in range(12)]
    net = with_own_starts_and_gates(make_net(3, 3, n_recent=2)).double()
    window = window_of(net, some_events(rows), clocks_of(net))
    window = replace(
        window, user_facts=window.user_facts.double(), item_facts=window.item_facts.double()
    )
    net.losses(window, *net.evolve(window), 1.0).sum().backward()
    step = 1e-6
    for name in (
        "user_cell.weight_ih", "item_cell.weight_hh", "user_start", "user_own.weight", "user_gate",
        "item_gate", "place", "item_rate",
    ):  # fmt: skip
        parameter = net.get_parameter(name)
        assert parameter.grad is not None
        flat, gradient = parameter.data.view(-1), parameter.grad.to_dense()
        for position in range(0, len(flat), max(1, len(flat) // 4)):
            sums = []
            for change in (step, -2 * step):
                flat[position] += change
                with torch.no_grad():
                    sums.append(net.losses(window, *net.evolve(window), 1.0).sum().item())
            flat[position] += step
            expected = (sums[0] - sums[1]) / (2 * step)
            assert gradient.reshape(-1)[position].item() == pytest.approx(
                expected, rel=1e-4, abs=1e-5
            )


def test_events_of_one_moment_and_long_gaps_stay_finite() -> None:
    rows = [(0, 0, 5.0), (0, 0, 5.0), (1, 0, 5.0), (0, 1, 5.0), (0, 1, 50_000.0)]
    for shape in (2.0, 0.3):
        net = make_net(2, 2, shape=shape, n_recent=2)
        net.base.data.fill_(60.0)  # exp() of it squared is beyond float32
        window = window_of(net, some_events(rows), clocks_of(net))
        loss = net.losses(window, *net.evolve(window), 1.0)
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert all(
            torch.isfinite(p.grad).all() for p in net.user_cell.parameters() if p.grad is not None
        )


# --- what it learns -----------------------------------------------------------------------------


def simulated(net: CoevolveNet, n_events: int, seed: int) -> tuple[Events, Array]:
    """Return events drawn from the intensities of `net` (shape 2), and the intensity of every pair
    just before each event, (n_events, n_users, n_items).

    A pair's time since its last event follows from an exponential draw: exp(s) t^2 / 2 = draw.
    """
    rng, clocks = np.random.default_rng(seed), clocks_of(net)
    net.forget()
    s = exponents(net)
    last = np.zeros_like(s)
    next_at = np.sqrt(2 * rng.exponential(size=s.shape) / np.exp(s))
    rows, intensities = [], []
    for _ in range(n_events):
        u, i = (int(n) for n in np.unravel_index(next_at.argmin(), s.shape))
        now = next_at[u, i]
        rows.append((u, i, now))
        intensities.append(np.exp(s) * (now - last))
        replay(net, some_events(rows[-1:]), clocks)
        s = exponents(net)
        is_reset = np.zeros(s.shape, bool)
        is_reset[u] = is_reset[:, i] = True
        last[is_reset] = now
        draws = rng.exponential(size=int(is_reset.sum()))
        next_at[is_reset] = now + np.sqrt(2 * draws / np.exp(s[is_reset]))
    return some_events(rows), np.array(intensities)


def followed(net: CoevolveNet, events: Events) -> tuple[Array, Array]:
    """Return the intensity of every pair before each event, and the expected number of events, over
    all pairs, between each event and the one before.
    """
    net.forget()
    clocks, last, before = clocks_of(net), np.zeros((len(net.user_state), len(net.item_state))), 0.0
    intensities, residuals = [], []
    for n in range(len(events)):
        event, s = events.part(n, n + 1), exponents(net)
        now = event.event_at[0] / DAY
        intensities.append(np.exp(s) * (now - last))
        residuals.append((np.exp(s) * ((now - last) ** 2 - (before - last) ** 2) / 2).sum())
        replay(net, event, clocks)
        last[event.user[0]] = last[:, event.item[0]] = before = now
    return np.array(intensities), np.array(residuals)


def trained(
    net: CoevolveNet, events: Events, epochs: int, rate: float, mark: float = 0.0, size: int = 100
) -> CoevolveNet:
    walker = Walker(net, events, clocks_of(net), 10**6, 10**6, mark, 1)
    comm = ThreadComm(0, Meeting(1, lambda: None), lambda _text: None)
    windows = Windows(len(events), size, 0, 1)
    train_network(comm, net, walker.loss, windows, LoopOptions(epochs, rate, clip_norm=5.0))
    return net


def check_recovered(n: int, n_events: int, epochs: int) -> None:
    truth = make_net(n, n)
    with torch.no_grad():
        for cell in (truth.user_cell, truth.item_cell):
            for parameter in cell.parameters():
                parameter.mul_(2.0)
    events, intensities = simulated(truth, n_events, 1)
    learned, residuals = followed(trained(make_net(n, n, seed=11), events, epochs, 0.02), events)
    assert np.corrcoef(intensities.ravel(), learned.ravel())[0, 1] >= 0.95
    assert stats.kstest(residuals, "expon").pvalue > 0.01


def test_a_simulation_of_two_users_and_two_items_is_recovered() -> None:
    check_recovered(2, 500, 8)


@pytest.mark.slow
def test_a_simulation_of_four_users_and_four_items_is_recovered() -> None:
    check_recovered(4, 2500, 12)


def test_a_taste_that_swaps_is_followed_at_once() -> None:
    """Users like the items 0 to 4 or the items 5 to 9; whoever meets item 10 changes sides.

    Asked is the first event after each meeting with item 10 in the last third, where factors that
    stand still (the two main directions of the counts so far) know nothing.
    """
    rng = np.random.default_rng(8)
    n_users, swap = 12, 10
    side, rows = rng.integers(0, 2, n_users), []
    for n in range(1800):
        user = int(rng.integers(n_users))
        item = swap if rng.random() < 0.15 else int(rng.integers(5) + 5 * side[user])
        side[user] ^= item == swap
        rows.append((user, item, (n + 1) / 24))
    events = some_events(rows)
    n_trained = 1200
    net = make_net(n_users, 11, size=8, cell="gru", shape=1.0)
    trained(net, events.part(0, n_trained), 12, 0.02, mark=1.0)
    net.forget()
    clocks = clocks_of(net)
    replay(net, events.part(0, n_trained), clocks)
    counts = np.zeros((n_users, 11))
    np.add.at(counts, (events.user[:n_trained], events.item[:n_trained]), 1)
    last_item = dict(zip(events.user[:n_trained].tolist(), events.item[:n_trained].tolist()))
    hits: dict[str, list[bool]] = {"coevolve": [], "still": []}
    for n in range(n_trained, len(events)):
        user, item = int(events.user[n]), int(events.item[n])
        if last_item[user] == swap and item != swap:
            left, values, right = np.linalg.svd(counts)
            still = (left[:, :2] * values[:2]) @ right[:2]
            for name, scores in (("coevolve", exponents(net)), ("still", still)):
                hits[name].append(bool(scores[user, :swap].argmax() // 5 == item // 5))
        replay(net, events.part(n, n + 1), clocks)
        counts[user, item] += 1
        last_item[user] = item
    assert np.mean(hits["coevolve"]) >= 0.9
    assert np.mean(hits["still"]) <= 0.6
