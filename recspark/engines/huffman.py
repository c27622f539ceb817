"""The Huffman tree of hierarchical softmax: frequent items get short paths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recspark.data.blocks import Array
from recspark.engines.compiled import compiled


@dataclass(frozen=True)
class Tree:
    """A binary tree, as the path from the root to each item.

    Item t has `start[t]:start[t + 1]` of `nodes` and `codes`: the inner nodes on its path, and at
    each of them 1 = the path goes right, 0 = left. `start` int64 (n + 1,); `nodes` int32, inner
    nodes 0 to n - 2, of which n - 2 is the root; `codes` int8; `weights` float64 (n - 1,): the sum
    of the counts below each inner node.
    """

    start: Array
    nodes: Array
    codes: Array
    weights: Array


def huffman(counts: Array) -> Tree:
    """Return the Huffman tree of n items with `counts` (n,) >= 0. Frequent items get short paths.

    Items with equal counts are taken by index, so that equal counts give equal trees. Cost: one
    sort, then linear; item-sized. Source: Huffman 1952, by two queues (van Leeuwen 1976).

    >>> tree = huffman(np.array([1, 1, 5]))
    >>> np.diff(tree.start).tolist()
    [2, 2, 1]
    """
    counts = np.asarray(counts, np.float64)
    order = np.argsort(counts, kind="stable")
    start, nodes, codes, weights = _build(counts, order)
    return Tree(start, nodes, codes, weights)


@compiled
def _build(counts: Array, order: Array) -> tuple[Array, Array, Array, Array]:
    n_items = len(counts)
    n_inner = max(n_items - 1, 0)
    # Returns the arrays of `Tree`. Nodes have these numbers here: items are 0 to n - 1, and inner
    # nodes are n to 2n - 2 in the order in which they are built, which is that of rising weight. So
    # leaves and inner nodes are two sorted queues, and the lightest node without a parent is at the
    # head of one of them. Example, counts [1, 1, 5]: node 3 joins items 0 and 1 (weight 2), and
    # node 4, the root, joins node 3 and item 2 (weight 7).
    weight = np.empty(n_items + n_inner, np.float64)
    weight[:n_items] = counts
    parent = np.full(n_items + n_inner, -1, np.int64)
    is_right = np.zeros(n_items + n_inner, np.int8)
    next_leaf, next_inner = 0, n_items
    for new_node in range(n_items, n_items + n_inner):
        for branch in range(2):
            if next_leaf < n_items and (
                next_inner >= new_node or weight[order[next_leaf]] <= weight[next_inner]
            ):
                child = order[next_leaf]
                next_leaf += 1
            else:
                child = next_inner
                next_inner += 1
            if branch == 0:
                weight[new_node] = weight[child]
            else:
                weight[new_node] += weight[child]
            parent[child] = new_node
            is_right[child] = branch
    start = np.zeros(n_items + 1, np.int64)
    for item in range(n_items):
        length, node = 0, parent[item]
        while node >= 0:
            length += 1
            node = parent[node]
        start[item + 1] = start[item] + length
    nodes, codes = np.empty(start[n_items], np.int32), np.empty(start[n_items], np.int8)
    # Follow each item's path up from the leaf, and fill it in from its end.
    for item in range(n_items):
        slot, node = start[item + 1] - 1, np.int64(item)
        while parent[node] >= 0:
            nodes[slot], codes[slot] = parent[node] - n_items, is_right[node]
            slot -= 1
            node = parent[node]
    return start, nodes, codes, weight[n_items:].copy()
