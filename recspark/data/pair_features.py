"""Features of pairs of a user and an item that follow from the user's history before the cutoff.

Each feature is one function of `Pairs`, and one line of `FEATURES`. What several of them need is
computed once, by `Pairs`. Everything is computed inside the user's own row, in time order, so a
feature depends on no other user.

Only events that weigh more than 0 count, as in the model `own_items`. A shop gives the weight 0 to
event types that say nothing in favour of an item, and an event without a weight is no rating.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark.data.blocks import MICROS_PER_DAY, Array, Histories, local_index, where

ORDER_DECAY = 0.9  # an order counts this much less for each later order of the user


@dataclass(frozen=True)
class Catalogue:
    """What the features of pairs read of all items.

    `items` int32 (n_items,), ascending: the item_idx of each local index. `price` float64
    (n_items,), NaN = unknown. `category` int32 (n_items,): a number for each category of the first
    level, -1 = the item has none.
    """

    items: Array
    price: Array
    category: Array

    @classmethod
    def of(cls, item_features: DataFrame) -> Catalogue:
        """Return the catalogue as `item_features` (as of one cutoff) describes it.

        One job; the driver holds 16 bytes per item, and the names of the categories.
        """
        rows = (
            item_features.select("item_idx", "price", F.get("category", F.lit(0)).alias("category"))
            .toArrow()
            .sort_by("item_idx")
        )
        names = rows.column("category").combine_chunks().dictionary_encode()
        codes = names.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
        price = rows.column("price").to_numpy().astype(np.float64)
        return cls(rows.column("item_idx").to_numpy(), price, codes)


@dataclass(frozen=True)
class Pairs:
    """p pairs of a user and an item, with the histories of the n users.

    Parameters
    ----------
    row : int64 (p,): the row of `history` that the pair's user has
    item_idx : int32 (p,)
    history : events before `as_of`, n rows, whatever they weigh
    as_of : the cutoff, in microseconds since 1970 UTC
    catalogue : what is known of the items
    """

    row: Array
    item_idx: Array
    history: Histories
    as_of: int
    catalogue: Catalogue

    @cached_property
    def events(self) -> Histories:
        """The events that weigh more than 0, n rows; null (NaN) is no weight."""
        return where(self.history, self.history.weight > 0)

    @cached_property
    def order(self) -> Array:
        """The order of each event, int64 (n_events,): 0 is the first order of the event's row."""
        order = np.cumsum(self.events.session_starts)
        start = self.events.start[:-1][np.diff(self.events.start) > 0]
        first_order = np.zeros(len(self.events.start) - 1, np.int64)
        first_order[np.diff(self.events.start) > 0] = order[start]
        return np.asarray(order - first_order[self.events.rows])

    @cached_property
    def n_orders(self) -> Array:
        """The number of orders of each row, int64 (n,)."""
        lengths = np.diff(self.events.start)
        n_orders = np.zeros(len(lengths), np.int64)
        n_orders[lengths > 0] = self.order[self.events.start[1:][lengths > 0] - 1] + 1
        return n_orders

    @cached_property
    def age_days(self) -> Array:
        """The age of each event at the cutoff, in days, float64 (n_events,)."""
        return np.asarray((self.as_of - self.events.event_at) / MICROS_PER_DAY)

    @cached_property
    def bought(self) -> OwnOrders:
        """What the user of each pair did with the item of the pair."""
        return OwnOrders.of(self)

    @cached_property
    def gap_days(self) -> Array:
        """The mean time between two orders of each row, in days, float64 (n,); NaN = no two."""
        lengths = np.diff(self.events.start)
        has_events = lengths > 0
        span = np.full(len(lengths), np.nan)
        first = self.age_days[self.events.start[:-1][has_events]]
        last = self.age_days[self.events.start[1:][has_events] - 1]
        span[has_events] = first - last
        return _ratio(span, self.n_orders - 1)

    @cached_property
    def local(self) -> Array:
        """The position of each pair's item in the catalogue, or -1, int64 (p,)."""
        return local_index(self.catalogue.items, self.item_idx)

    @cached_property
    def local_of_events(self) -> Array:
        """The position of each event's item in the catalogue, or -1, int64 (n_events,)."""
        return local_index(self.catalogue.items, self.events.item_idx)


@dataclass(frozen=True)
class OwnOrders:
    """The orders of the pair's user that contain the pair's item; each array is float64 (p,).

    `n_orders` is their number. The ages of the first and the last of them are in days.
    `orders_since_first` and `orders_since_last` count the user's orders after the first and after
    the last of them. These four are NaN without such an order.
    `decayed[h]` sums 0.5^(age / h days) over these orders, and `decayed_orders` sums
    `ORDER_DECAY`^(number of later orders).
    """

    n_orders: Array
    first_age_days: Array
    last_age_days: Array
    orders_since_first: Array
    orders_since_last: Array
    decayed: Mapping[int, Array]
    decayed_orders: Array

    @classmethod
    def of(cls, pairs: Pairs) -> OwnOrders:
        """Return the orders of all pairs. Cost: one sort of the events of the block."""
        history, rows = pairs.events, pairs.events.rows
        # Sort by user and item; the sort is stable, so the events of an item stay in time order.
        by_item = np.lexsort((history.item_idx, rows))
        row, item, order = rows[by_item], history.item_idx[by_item], pairs.order[by_item]
        age_days = pairs.age_days[by_item]
        # Several events of an item in one order count once: the first of them.
        is_new_item = np.ones(len(row), bool)
        is_new_item[1:] = (row[1:] != row[:-1]) | (item[1:] != item[:-1])
        is_new_order = is_new_item.copy()
        is_new_order[1:] |= order[1:] != order[:-1]
        row, item, order, age_days = (array[is_new_order] for array in (row, item, order, age_days))
        begin = np.flatnonzero(is_new_item[is_new_order])  # (q,): the first order of each item
        end = np.append(begin[1:], len(row))[: len(begin)]  # () without any order
        n_later_orders = pairs.n_orders[row] - 1 - order
        key_of_item = _key(row[begin], item[begin])  # ascending
        index = np.minimum(
            np.searchsorted(key_of_item, _key(pairs.row, pairs.item_idx)),
            max(len(key_of_item) - 1, 0),
        )
        is_bought = np.zeros(len(pairs.row), bool)
        if len(key_of_item):
            is_bought = key_of_item[index] == _key(pairs.row, pairs.item_idx)

        def of_pairs(values: Array, otherwise: float) -> Array:
            out = np.full(len(is_bought), otherwise)
            out[is_bought] = values[index[is_bought]]
            return out

        def sums(values: Array) -> Array:
            return of_pairs(np.add.reduceat(values, begin) if len(begin) else values, 0.0)

        return cls(
            n_orders=of_pairs((end - begin).astype(np.float64), 0.0),
            first_age_days=of_pairs(age_days[begin], np.nan),
            last_age_days=of_pairs(age_days[end - 1], np.nan),
            orders_since_first=of_pairs(n_later_orders[begin].astype(np.float64), np.nan),
            orders_since_last=of_pairs(n_later_orders[end - 1].astype(np.float64), np.nan),
            decayed={days: sums(np.exp2(-age_days / days)) for days in (7, 30, 90)},
            decayed_orders=sums(ORDER_DECAY ** n_later_orders.astype(np.float64)),
        )


def _key(row: Array, item_idx: Array) -> Array:
    return (row.astype(np.int64) << 32) | item_idx.astype(np.int64)


def _of_items(values: Array, local: Array, otherwise: float) -> Array:
    """Return `values[local]`, and `otherwise` where `local` is -1 (not in the catalogue)."""
    return np.where(local >= 0, values[local], otherwise)


def _ratio(value: Array, divisor: Array) -> Array:
    """Return value / divisor, float64; NaN where the divisor is 0, negative or NaN."""
    is_defined = divisor > 0
    return np.where(is_defined, value / np.where(is_defined, divisor, 1), np.nan)


def n_orders(pairs: Pairs) -> Array:
    """Orders of the user that contain the item."""
    return pairs.bought.n_orders


def order_share(pairs: Pairs) -> Array:
    """Share of the user's orders that contain the item."""
    return _ratio(pairs.bought.n_orders, pairs.n_orders[pairs.row])


def share_since_first(pairs: Pairs) -> Array:
    """Share of the orders from the first one with the item on; missing if there is none."""
    return _ratio(pairs.bought.n_orders, pairs.bought.orders_since_first + 1)


def days_since_last(pairs: Pairs) -> Array:
    """Days since the user's last order of the item; missing if there is none."""
    return pairs.bought.last_age_days


def days_since_first(pairs: Pairs) -> Array:
    """Days since the user's first order of the item; missing if there is none."""
    return pairs.bought.first_age_days


def orders_since_last(pairs: Pairs) -> Array:
    """Orders of the user after the last one with the item; missing if there is none."""
    return pairs.bought.orders_since_last


def gap_days(pairs: Pairs) -> Array:
    """Mean days between two of the user's orders of the item; missing with fewer than two."""
    bought = pairs.bought
    return _ratio(bought.first_age_days - bought.last_age_days, bought.n_orders - 1)


def due(pairs: Pairs) -> Array:
    """Days since the last order of the item / `gap_days`: from 1 on, the item is due again."""
    return _ratio(pairs.bought.last_age_days, gap_days(pairs))


def due_by_user(pairs: Pairs) -> Array:
    """Days since the last order of the item / mean days between two orders of the user."""
    return _ratio(pairs.bought.last_age_days, pairs.gap_days[pairs.row])


def decayed_7d(pairs: Pairs) -> Array:
    """Orders of the item; an order of 7 days ago counts half."""
    return pairs.bought.decayed[7]


def decayed_30d(pairs: Pairs) -> Array:
    """Orders of the item; an order of 30 days ago counts half."""
    return pairs.bought.decayed[30]


def decayed_90d(pairs: Pairs) -> Array:
    """Orders of the item; an order of 90 days ago counts half."""
    return pairs.bought.decayed[90]


def decayed_orders(pairs: Pairs) -> Array:
    """Orders of the item; an order counts .9 for each later order of the user."""
    return pairs.bought.decayed_orders


def price_ratio(pairs: Pairs) -> Array:
    """Price of the item / mean price of the user's items, an item counted once per event."""
    price_of_events = _of_items(pairs.catalogue.price, pairs.local_of_events, np.nan)
    has_price = ~np.isnan(price_of_events)
    n_rows = len(pairs.events.start) - 1
    rows = pairs.events.rows[has_price]
    total = np.bincount(rows, price_of_events[has_price], n_rows)
    mean_price = _ratio(total, np.bincount(rows, minlength=n_rows))
    price = _of_items(pairs.catalogue.price, pairs.local, np.nan)
    return _ratio(price, mean_price[pairs.row])


def category_share(pairs: Pairs) -> Array:
    """Share of the user's events whose items are of the item's category (first level)."""
    category_of_events = _of_items(pairs.catalogue.category, pairs.local_of_events, -1)
    category = _of_items(pairs.catalogue.category, pairs.local, -1)
    keys, counts = np.unique(_key(pairs.events.rows, category_of_events), return_counts=True)
    n_events = np.diff(pairs.events.start)[pairs.row]
    n_of_category = np.zeros(len(category))
    if len(keys):
        pair_keys = _key(pairs.row, category)
        index = np.minimum(np.searchsorted(keys, pair_keys), len(keys) - 1)
        n_of_category = np.where(keys[index] == pair_keys, counts[index], 0)
    return np.where(category >= 0, _ratio(n_of_category, n_events), np.nan)


Feature = Callable[[Pairs], Array]
# Group -> name of the feature -> its function. A feature is a float64 (p,); NaN = missing.
FEATURES: dict[str, dict[str, Feature]] = {
    "orders": {
        function.__name__: function
        for function in (
            n_orders,
            order_share,
            share_since_first,
            days_since_last,
            days_since_first,
            orders_since_last,
            gap_days,
            due,
            due_by_user,
            decayed_7d,
            decayed_30d,
            decayed_90d,
            decayed_orders,
        )
    },
    "catalogue": {function.__name__: function for function in (price_ratio, category_share)},
}
PREFIX = "pair_"  # of the names of these features in examples


def names(groups: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the features of these groups, in order, each with `PREFIX`."""
    return tuple(PREFIX + name for group in groups for name in FEATURES[group])


def pair_features(pairs: Pairs, groups: Sequence[str]) -> dict[str, Array]:
    """Return name -> the values of all pairs, float64 (p,), for the features of these groups."""
    return {
        PREFIX + name: feature(pairs)
        for group in groups
        for name, feature in FEATURES[group].items()
    }
