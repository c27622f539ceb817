"""Windows of events, from the walk in numpy to the tensors that the network of `coevolve` reads."""

from __future__ import annotations

import numpy as np
import torch

from recspark.data.blocks import Array
from recspark.engines.event_walk import Clocks, Others, Walk
from recspark.nets.coevolve import Pairs, Window, facts


def make_window(
    steps: Walk,
    user: Array,
    item: Array,
    clocks: Clocks,
    rows: Array | None = None,
    *,
    reads_time: bool = True,
) -> tuple[Window, Array]:
    """Return the window of the events (user, item), and the events of `rows` in its order, (R,).

    The order is that of the levels; events of one level stand in their order in time.

    Parameters
    ----------
    user, item : int32 (W,), local indices
    clocks : those of the walk
    rows : bool (W,): the events whose likelihood is computed; None = all
    reads_time : False = the cells of the network are told that every gap is one day
    """
    order = np.argsort(steps.level, kind="stable")  # (W,)
    position = np.empty_like(order)  # (W,): of each event in the order
    position[order] = np.arange(len(order))
    n_recent = clocks.recent_items.shape[1]
    users, row_of_user = _everybody(user, steps.users, len(clocks.user_at))
    items, row_of_item = _everybody(item, steps.items, len(clocks.item_at))
    kept = order if rows is None else order[rows[order]]  # (R,)

    def gaps(values: Array) -> torch.Tensor:
        return torch.from_numpy(values if reads_time else np.ones_like(values))

    def versions(ids: Array, slot: Array, row: Array, n_rows: int) -> torch.Tensor:
        return torch.from_numpy(np.where(slot >= 0, n_rows + position[slot], row[ids]))

    def pairs(others: Others, row: Array, n_rows: int) -> Pairs:
        return Pairs(
            versions(others.ids[kept], others.slot[kept], row, n_rows),
            torch.from_numpy(others.gap[kept]),
            torch.from_numpy(others.place[kept].astype(np.int64)),
            torch.from_numpy(others.weight[kept]),
        )

    place, user_place = (torch.from_numpy(p[order]) for p in (steps.place, steps.user_place))
    window = Window(
        users=torch.from_numpy(users),
        items=torch.from_numpy(items),
        level_sizes=np.bincount(steps.level).tolist(),
        user=torch.from_numpy(row_of_user[user[order]]),
        item=torch.from_numpy(row_of_item[item[order]]),
        user_facts=facts(gaps(steps.user_gap[order]), place, n_recent),
        item_facts=facts(gaps(steps.item_gap[order]), user_place, n_recent),
        user_version=versions(user[kept], steps.user_slot[kept], row_of_user, len(users)),
        item_version=versions(item[kept], steps.item_slot[kept], row_of_item, len(items)),
        item_pairs=pairs(steps.items, row_of_item, len(items)),
        user_pairs=pairs(steps.users, row_of_user, len(users)),
    )
    return window, kept


def _everybody(acting: Array, others: Others, n: int) -> tuple[Array, Array]:
    """Return the ids that a window reads, int64 ascending, and the row of each of all n ids.

    The last number of the second, (n + 1,), is the row of padding (-1): 0.
    """
    is_read = np.zeros(n + 1, bool)
    is_read[acting] = is_read[others.ids] = True
    ids = np.flatnonzero(is_read[:-1])
    row = np.zeros(n + 1, np.int64)
    row[ids] = np.arange(len(ids))
    return ids, row
