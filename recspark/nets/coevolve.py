"""States of users and items that change at each event, and the intensity of a user meeting an item.

Source: Dai, Wang, Trivedi, Song 2016, "Deep Coevolutionary Network: Embedding User and Item Features
for Recommendation".
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import torch
from torch import nn

Cell = Literal["gru", "rnn"]
# exp() of a larger number is taken as exp() of this one; float32 ends at 88
LARGEST_EXPONENT = 40.0
# A new model hardly reads the states: noise of cells that have learned nothing yet is not for it
FIRST_GATE = 0.1
_N_FACTS = 3  # numbers about an event that a cell reads beside the two states


@dataclass(frozen=True)
class Pairs:
    """Pairs of events of a window: its user with several items, or its item with several users.

    (R, C) each. `version` int64 is the row of the other side among the versions; `gap` days since
    the last event of either; `place` int64, place of the item among the user's newest items;
    `weight` how many pairs this one stands for, 0 = padding.
    """

    version: torch.Tensor
    gap: torch.Tensor
    place: torch.Tensor
    weight: torch.Tensor

    def to(self, device: torch.device) -> Self:
        """Return the pairs on `device`."""
        return _moved(self, device)


@dataclass(frozen=True)
class Window:
    """W events in the order of their levels (then of time), for `CoevolveNet`.

    The likelihood is computed of R of them, in the same order: those of this rank.

    Versions are the states in the order: states at the beginning of the window of the `users` (and
    `items`), then the states that each event makes.

    Parameters
    ----------
    users, items : int64 (U,), (I,): everybody whose state at the beginning is read
    level_sizes : number of events of each level
    user, item : int64 (W,): rows of `users`, of `items`
    user_facts, item_facts : float32 (W, 3): see `facts`
    user_version, item_version : int64 (R,): the states just before each event
    item_pairs, user_pairs : see `Pairs`; column 0 of `item_pairs` is the item of the event
    """

    users: torch.Tensor
    items: torch.Tensor
    level_sizes: list[int]
    user: torch.Tensor
    item: torch.Tensor
    user_facts: torch.Tensor
    item_facts: torch.Tensor
    user_version: torch.Tensor
    item_version: torch.Tensor
    item_pairs: Pairs
    user_pairs: Pairs

    def to(self, device: torch.device) -> Self:
        """Return the window on `device`."""
        return _moved(self, device)


def _moved(values: Any, device: torch.device) -> Any:
    """Return a copy of a dataclass whose tensors, and those of its `Pairs`, are on `device`."""
    if device.type == "cpu":
        return values
    moved = {f.name: getattr(values, f.name) for f in fields(values)}
    return replace(
        values, **{name: value.to(device) for name, value in moved.items() if hasattr(value, "to")}
    )


def facts(gap: torch.Tensor, place: torch.Tensor, n_recent: int) -> torch.Tensor:
    """Return what a cell reads about an event beside the states, float32 (W, 3).

    The time since the last event of the user (the item), as log(1 + gap in minutes) / 10, which is
    about 1 after a month; whether the item is among the user's newest items (the user among the
    item's); whether it is the very last one.
    """
    since = torch.log1p(gap * 1440) / 10  # (W,)
    return torch.stack([since, (place < n_recent).float(), (place == 0).float()], dim=1)


class CoevolveNet(nn.Module):
    """The intensity with which a user meets an item, and how a meeting changes both.

    The vector of a user is a start, equal for all, plus one of the user's own, plus the user's state
    times a gate; that of an item is its own start plus its state times a gate. (A vector that stays
    beside one that changes: Kumar, Zhang, Leskovec 2019.) States begin at 0, and so do the users'
    own starts: a user who is not known has none. A gate is a number for each dimension of all users
    (items). At an event, both states change, each computed from the vectors just before the event:

        u(t) = cell(u state, [i(t-), facts]),  i(t) = cell'(i state, [u(t-), facts'])

    The intensity of a pair t - t' after the last event t' of its user or its item is

        lambda(t) = exp(s) (t - t')^(shape - 1),  s = u.i + a.u + b.i + bias_i + place + base

    with one number for each place among the user's newest items. `shape` 2 is the paper's Rayleigh
    process; below 1, events come in bursts. Its integral from t' is exp(s) (t - t')^shape / shape.

    Parameters
    ----------
    size : length d of a vector
    n_recent : M, number of a user's newest distinct items whose intensity has a number of its own
    shape : > 0; 1 = the intensity does not depend on the time
    evolves : False = states stay 0: for comparison
    reads_time : False = cells are told that every gap is one day: for comparison
    exponents : float (M + 1,), the first values of s: for each place, and for all other items
    """

    # Read row by row; see `recspark.train.parameters.Parameters`
    sparse_parameters = frozenset({"user_own.weight", "item_start.weight", "item_bias.weight"})

    def __init__(
        self,
        n_users: int,
        n_items: int,
        size: int,
        n_recent: int,
        shape: float,
        cell: Cell,
        exponents: torch.Tensor,
        generator: torch.Generator,
        *,
        evolves: bool = True,
        reads_time: bool = True,
    ) -> None:
        super().__init__()
        self.size, self.n_recent, self.shape = size, n_recent, shape
        self.evolves, self.reads_time = evolves, reads_time
        self.item_start = nn.Embedding(n_items, size, sparse=True)
        self.item_bias = nn.Embedding(n_items, 1, sparse=True)
        cell_class = nn.GRUCell if cell == "gru" else nn.RNNCell
        self.user_cell = cell_class(size + _N_FACTS, size)
        self.item_cell = cell_class(size + _N_FACTS, size)
        self.user_start = nn.Parameter(torch.zeros(size))
        self.user_own = nn.Embedding(n_users, size, sparse=True)
        self.user_gate = nn.Parameter(torch.full((size,), FIRST_GATE))
        self.item_gate = nn.Parameter(torch.full((size,), FIRST_GATE))
        self.user_rate = nn.Parameter(torch.zeros(size))  # a
        self.item_rate = nn.Parameter(torch.zeros(size))  # b
        self.place = nn.Parameter((exponents[:-1] - exponents[-1]).float())
        self.base = nn.Parameter(exponents[-1].float())
        # What a window leaves behind. Frozen parameters: they are in checkpoints, and ranks, which
        # all compute the same ones, do not exchange them.
        self.user_state = nn.Parameter(torch.zeros(n_users, size), requires_grad=False)
        self.item_state = nn.Parameter(torch.zeros(n_items, size), requires_grad=False)
        nn.init.normal_(self.item_start.weight, 0, size**-0.5, generator)
        nn.init.zeros_(self.item_bias.weight)
        nn.init.zeros_(self.user_own.weight)
        for module in (self.user_cell, self.item_cell):
            for parameter in module.parameters():
                nn.init.uniform_(parameter, -(size**-0.5), size**-0.5, generator)

    def forget(self) -> None:
        """Set all states to 0, as before the first event."""
        self.user_state.data.zero_()
        self.item_state.data.zero_()

    def evolve(self, window: Window) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the states of users (U + W, d) and items (I + W, d) at the beginning and after
        each event of a window. The gradient stops at the beginning of the window.
        """
        users, items = self.user_state[window.users], self.item_state[window.items]  # (U, d)
        if not self.evolves:
            n_events, n_users = len(window.user), len(users)
            zeros = users.new_zeros(n_events, self.size)
            return users.new_zeros(n_users + n_events, self.size), torch.cat([items, zeros])
        # (U, d), (I, d): what does not change within the window
        user_starts = self.user_start + self.user_own(window.users)
        item_starts = self.item_start(window.items)
        user_versions, item_versions = [users], [items]
        begin = 0
        for n_events in window.level_sizes:
            level = slice(begin, begin + n_events)
            begin += n_events
            user, item = window.user[level], window.item[level]  # (B,): nobody is there twice
            user_state, item_state = users[user], items[item]  # (B, d)
            user_vector = user_state * self.user_gate + user_starts[user]
            item_vector = item_state * self.item_gate + item_starts[item]
            user_input = torch.cat([item_vector, window.user_facts[level]], dim=1)  # (B, d + 3)
            item_input = torch.cat([user_vector, window.item_facts[level]], dim=1)
            new_user = self.user_cell(user_input, user_state).to(users.dtype)  # (B, d)
            new_item = self.item_cell(item_input, item_state).to(items.dtype)
            users, items = users.index_copy(0, user, new_user), items.index_copy(0, item, new_item)
            user_versions.append(new_user)
            item_versions.append(new_item)
        return torch.cat(user_versions), torch.cat(item_versions)

    def keep(self, window: Window, user_states: torch.Tensor, item_states: torch.Tensor) -> None:
        """Keep what `evolve` returned: the states at the end of the window."""
        if not self.evolves:
            return
        with torch.no_grad():
            users, items = window.users[window.user], window.items[window.item]  # (W,)
            n_users, n_items = len(window.users), len(window.items)
            # Of several events of a user the last one counts; events are in the order of levels.
            for table, rows, states in (
                (self.user_state, users, user_states[n_users:]),
                (self.item_state, items, item_states[n_items:]),
            ):
                begin = 0
                for n_events in window.level_sizes:
                    level = slice(begin, begin + n_events)
                    table.data[rows[level]] = states[level]
                    begin += n_events

    def user_vectors(self, states: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
        """Return the vectors of `users` (n,) in `states` (n, d), for `scores`: (n, d + 2)."""
        vector = states * self.user_gate + self.user_start + self.user_own(users)
        one = vector.new_ones(len(vector), 1)
        return torch.cat([vector, one, (vector @ self.user_rate + self.base)[:, None]], dim=1)

    def item_vectors(self, states: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Return the vectors of `items` (n,) in `states` (n, d), for `scores`: (n, d + 2)."""
        vector = states * self.item_gate + self.item_start(items)
        bias = self.item_bias(items) + (vector @ self.item_rate)[:, None]  # (n, 1)
        return torch.cat([vector, bias, vector.new_ones(len(vector), 1)], dim=1)

    def with_place(self, dots: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Return s of pairs: the product of their vectors plus the number of their place."""
        numbers = torch.cat([self.place, self.place.new_zeros(1)])  # (M + 1,)
        return (dots + numbers[place]).clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)

    def pair_exponents(
        self, window: Window, user_states: torch.Tensor, item_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return s of `window.item_pairs` and of `window.user_pairs`, (R, C) each."""
        users = torch.cat([window.users, window.users[window.user]])  # (U + W,)
        items = torch.cat([window.items, window.items[window.item]])  # (I + W,)
        user_vectors = self.user_vectors(user_states, users)  # (U + W, d + 2)
        item_vectors = self.item_vectors(item_states, items)  # (I + W, d + 2)
        of_items = user_vectors[window.user_version] @ item_vectors.T  # (R, I + W)
        of_users = item_vectors[window.item_version] @ user_vectors.T  # (R, U + W)
        return (
            self.with_place(of_items.gather(1, window.item_pairs.version), window.item_pairs.place),
            self.with_place(of_users.gather(1, window.user_pairs.version), window.user_pairs.place),
        )

    def log_intensity(self, exponent: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
        """Return log lambda, `gap` days after the last event of the user or the item."""
        return exponent + (self.shape - 1) * torch.log(gap)

    def expected_meetings(self, exponent: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
        """Return the integral of lambda over a gap: the expected number of events in the gap."""
        return torch.exp(exponent) * gap**self.shape / self.shape

    def losses(
        self,
        window: Window,
        user_states: torch.Tensor,
        item_states: torch.Tensor,
        mark_weight: float,
    ) -> torch.Tensor:
        """Return minus the log-likelihood of each event, (R,), with its survival terms.

        A pair's intensity is followed from the last event of its user or its item to the next. So
        each event ends such a time for all pairs of its user and for all pairs of its item; these
        are the survival terms of the event, estimated from `window.item_pairs` and
        `window.user_pairs`.

        `mark_weight` : weight of one more term: minus the log of the share that the item of the
        event has in the intensities of all items for this user at this moment. (The likelihood has
        this term once already, beside that of the moment of the event.)
        """
        of_items, of_users = self.pair_exponents(window, user_states, item_states)  # (R, C)
        items, users = window.item_pairs, window.user_pairs
        log_items = self.log_intensity(of_items, items.gap)  # (R, C)
        survival = (items.weight * self.expected_meetings(of_items, items.gap)).sum(dim=1)
        survival = survival + (users.weight * self.expected_meetings(of_users, users.gap)).sum(
            dim=1
        )  # (R,)
        loss = survival - log_items[:, 0]
        if mark_weight:
            total = torch.logsumexp(log_items + torch.log(items.weight), dim=1)  # (R,)
            loss = loss + mark_weight * (total - log_items[:, 0])
        return loss
