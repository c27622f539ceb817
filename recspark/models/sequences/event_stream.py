"""The events of all users in time order, and the walk of a rank through their windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from recspark.data.blocks import Array
from recspark.engines.event_walk import Clocks, walk
from recspark.models.sequences.event_windows import make_window
from recspark.nets.coevolve import CoevolveNet
from recspark.train.feed import Batch

NOBODY = np.zeros(0, np.int32)


@dataclass(frozen=True)
class Events:
    """Events in time order: `user` and `item` int32, local indices; `event_at` int64, microseconds
    since 1970 UTC; (n,) each.
    """

    user: Array
    item: Array
    event_at: Array

    def __len__(self) -> int:
        return len(self.user)

    def part(self, begin: int, end: int) -> Events:
        """Return the events from position `begin` to before position `end`."""
        span = slice(begin, end)
        return Events(self.user[span], self.item[span], self.event_at[span])


class Windows:
    """The windows of an epoch, in time order: the batches that the training loop reads.

    Every rank reads all windows. Of a window's events, those whose position is the rank modulo the
    number of ranks have weight 1 on the rank, all others 0. `size` : events of a window.
    """

    def __init__(self, n_events: int, size: int, rank: int, n_ranks: int) -> None:
        self.n_rows_of_all = n_events
        self.steps = -(-n_events // size)
        self._size, self._rank, self._n_ranks = size, rank, n_ranks

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the windows of an epoch from number `start` on, as (epoch, begin, end)."""
        for number in range(start, self.steps):
            begin = number * self._size
            end = min(begin + self._size, self.n_rows_of_all)
            is_of_rank = np.arange(begin, end) % self._n_ranks == self._rank
            yield Batch(
                {"window": torch.tensor([epoch, begin, end])},
                torch.from_numpy(is_of_rank.astype(np.float32)),
            )


class Walker:
    """Walks a network through events, window after window; the states are in the network.

    Parameters
    ----------
    n_item_samples, n_user_samples : draws of the samples that the survival term is estimated from;
        at least as many as there are items (users): all of them, and the term is exact. Equal draws
        count once
    seed : of the samples, together with epoch and window, so that all ranks draw the same
    """

    def __init__(
        self,
        net: CoevolveNet,
        events: Events,
        clocks: Clocks,
        n_item_samples: int,
        n_user_samples: int,
        mark_weight: float,
        seed: int,
    ) -> None:
        self.net, self.events, self.clocks = net, events, clocks
        self._n_samples = n_item_samples, n_user_samples
        self._mark_weight, self._seed = mark_weight, seed
        self._position = 0  # events that `clocks` know

    def loss(self, batch: Batch, _generator: torch.Generator, _done: float) -> torch.Tensor:
        """Return the loss of each event of a window, (W,), and leave the states at its end.

        Events of weight 0 have loss 0. A window that begins at 0 begins an epoch, with all states
        as before the first event.
        """
        epoch, begin, end = batch.tensors["window"].tolist()
        if begin != self._position:
            self._go_to(begin)
        if begin == 0:
            self.net.forget()
        rng = np.random.default_rng([self._seed, epoch, begin])
        events = self.events.part(begin, end)
        clocks = self.clocks
        steps = walk(
            clocks,
            events.user,
            events.item,
            events.event_at,
            _sample(rng, len(clocks.item_at), self._n_samples[0]),
            _sample(rng, len(clocks.user_at), self._n_samples[1]),
        )
        self._position = end
        device = self.net.user_start.device
        is_of_rank = batch.weight.cpu().numpy() > 0
        window, rows = make_window(
            steps, events.user, events.item, clocks, is_of_rank, reads_time=self.net.reads_time
        )
        window = window.to(device)
        user_states, item_states = self.net.evolve(window)
        losses = self.net.losses(window, user_states, item_states, self._mark_weight)  # (R,)
        self.net.keep(window, user_states, item_states)
        total = losses.new_zeros(end - begin)
        return total.index_add(0, torch.from_numpy(rows).to(device), losses)

    def _go_to(self, begin: int) -> None:
        """Put the clocks before the event at position `begin`, without the network."""
        origin = int(self.events.event_at[0])
        n_users, n_recent = self.clocks.recent_items.shape
        self.clocks = Clocks.started(n_users, len(self.clocks.item_at), n_recent, origin)
        self._position = begin
        for first in range(0, begin, _REPLAYED):
            events = self.events.part(first, min(first + _REPLAYED, begin))
            walk(self.clocks, events.user, events.item, events.event_at, NOBODY, NOBODY)


def start_exponents(
    events: Events, clocks: Clocks, shape: float, n_samples: int, seed: int
) -> Array:
    """Return the first value of s for each place of a pair's item, float64 (M + 1,).

    It is the value of the highest likelihood while all vectors are 0: the log of the number of
    events at a place, divided by the sum of (t - t')^shape / shape over the pairs at that place.
    The last one is that of pairs whose item is not among the user's newest. A place without events
    has the value of that one. Training would need thousands of steps to get there. `clocks` are
    used up.
    """
    n_places = clocks.recent_items.shape[1] + 1
    n_events, exposure = np.zeros(n_places), np.zeros(n_places)
    rng = np.random.default_rng(seed)
    for first in range(0, len(events), _WALKED):
        part = events.part(first, min(first + _WALKED, len(events)))
        items, users = (_sample(rng, len(at), n_samples) for at in (clocks.item_at, clocks.user_at))
        steps = walk(clocks, part.user, part.item, part.event_at, items, users)
        n_events += np.bincount(steps.place, minlength=n_places)
        for pairs in (steps.items, steps.users):
            weight = pairs.weight * pairs.gap.astype(np.float64) ** shape / shape
            exposure += np.bincount(pairs.place.ravel(), weight.ravel(), n_places)
    # Half an event more, spread as the exposure is, so that no place has the intensity 0.
    rate = (n_events + 0.5 * exposure / exposure.sum()) / np.maximum(exposure, 1e-12)
    return np.asarray(np.log(np.where(n_events > 0, rate, rate[-1])))


_WALKED = 1024  # events of a window of `start_exponents`
_REPLAYED = 8192  # events of a window without survival terms


@torch.no_grad()
def replay(
    net: CoevolveNet,
    events: Events,
    clocks: Clocks,
    alive: Callable[[], object] = lambda: None,
) -> None:
    """Move the states of `net`, and `clocks`, on over `events`, with the weights as they are.

    `alive` is called after every 8,192 events.
    """
    for first in range(0, len(events), _REPLAYED):
        part = events.part(first, min(first + _REPLAYED, len(events)))
        steps = walk(clocks, part.user, part.item, part.event_at, NOBODY, NOBODY)
        nobody = np.zeros(len(part), bool)
        window, _ = make_window(
            steps, part.user, part.item, clocks, nobody, reads_time=net.reads_time
        )
        window = window.to(net.user_start.device)
        net.keep(window, *net.evolve(window))
        alive()


def _sample(rng: np.random.Generator, n: int, n_draws: int) -> Array:
    """Return a uniform sample of the whole numbers below n: distinct, ascending, int32."""
    if n_draws >= n:
        return np.arange(n, dtype=np.int32)
    return np.unique(rng.integers(0, n, n_draws, dtype=np.int32))
