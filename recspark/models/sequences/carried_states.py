"""Last night's states, carried on over the events of one more day with the weights as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from recspark import storage
from recspark.data.blocks import Array, local_index
from recspark.engines.event_walk import Clocks
from recspark.models.neural import net_arrays
from recspark.models.scoring.topk import Shared
from recspark.models.sequences.event_stream import Events
from recspark.nets.coevolve import CoevolveNet

# Parameters with a row per item. New items get the mean of the others.
_OF_ITEMS = ("item_start.weight", "item_bias.weight")
# Other parameters with a row per user or item. New users and items get 0.
_BY_ROW = ("user_own.weight", "user_state", "item_state")


@dataclass(frozen=True)
class Carried:
    """A model whose states are to be carried on, as ranks get it.

    Parameters
    ----------
    items : item_idx int32 ascending, its vocabulary
    cutoff : microseconds since 1970 UTC; it has seen all events before
    arrays : those of `CoevolveModel`; files where the model was loaded from a folder
    """

    items: Array
    cutoff: int
    arrays: Mapping[str, Shared]


def events_digest(events: Events, users: Array, items: Array) -> int:
    """Return a sum of hashes of the events: another event gives another sum, the order does not
    matter. int64.
    """
    mixed = users[events.user].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= items[events.item].astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
    mixed ^= events.event_at.astype(np.uint64) * np.uint64(0x165667B19E3779F9)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    return int(mixed.sum(dtype=np.uint64).astype(np.int64))


def n_carried_events(carried: Carried, events: Events, users: Array, items: Array) -> int | None:
    """Return how many of `events` the model has seen: those before its cutoff.

    None where the events before its cutoff are others than it has seen, for example as events came
    late: its states are then not those of the events.
    """
    n_early = int(np.searchsorted(events.event_at, carried.cutoff))
    early = events.part(0, n_early)
    has_same_events = n_early == int(carried.arrays["n_events"].array[0]) and (
        events_digest(early, users, items) == int(carried.arrays["events_digest"].array[0])
    )
    has_all = np.isin(carried.items, items).all()
    return n_early if has_same_events and has_all else None


def set_states(
    net: CoevolveNet, clocks: Clocks, carried: Carried, users: Array, items: Array
) -> None:
    """Put weights, states and clocks of a model into `net` and `clocks`, which may have more users
    and items. A new user has no state and no start of its own. A new item has no state, and the
    mean start and bias.
    """
    arrays = {name: np.asarray(shared.array) for name, shared in carried.arrays.items()}
    rows = {
        "user": local_index(users, arrays["user_idx"]),
        "item": local_index(items, carried.items),
    }
    for name, parameter in net.named_parameters():
        values = torch.from_numpy(np.array(arrays[name]))
        if name in _OF_ITEMS:
            parameter.data[:] = values.mean(dim=0)
        if name in _OF_ITEMS or name in _BY_ROW:
            parameter.data[torch.from_numpy(rows[name[:4]])] = values
        else:
            parameter.data.copy_(values)
    clocks.user_at[rows["user"]] = arrays["user_at"]
    clocks.item_at[rows["item"]] = arrays["item_at"]
    # Local indices become those of more users and items; -1 stays.
    for recent, side, listed in (
        ("recent_items", "user", "item"),
        ("recent_users", "item", "user"),
    ):
        local = np.append(rows[listed], -1)
        getattr(clocks, recent)[rows[side]] = local[arrays[recent]]


def model_arrays(
    net: CoevolveNet, clocks: Clocks, events: Events, users: Array, items: Array
) -> dict[str, Array]:
    """Return the arrays of `CoevolveModel` after all `events`, but for `trained_at`."""
    return {
        "user_idx": users,
        **vars(clocks),
        **net_arrays(net),
        "origin": events.event_at[:1],
        "n_events": np.array([len(events)]),
        "events_digest": np.array([events_digest(events, users, items)]),
    }


def write_arrays(folder: str, arrays: Mapping[str, Array]) -> None:
    """Write arrays to files in `folder` (any URI)."""
    for name, array in arrays.items():
        storage.write_array(storage.join(folder, f"{name}.npy"), array)
    storage.write_json(storage.join(folder, "names.json"), list(arrays))


def read_arrays(folder: str) -> dict[str, Any]:
    """Return what `write_arrays` wrote; files of a local folder are mapped into memory."""
    return {
        name: storage.read_array(storage.join(folder, f"{name}.npy"), mmap=True)
        for name in storage.read_json(storage.join(folder, "names.json"))
    }
