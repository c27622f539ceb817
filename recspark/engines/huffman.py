"""The Huffman tree of hierarchical softmax: frequent items get short paths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recspark.data.blocks import Array
from recspark.engines.compiled import compiled


@dataclass(frozen=True)
class Tree:
    """Paths from the root: item t takes `start[t]:start[t + 1]` of `nodes` and `codes`.

    `start` int64 (n + 1,); `nodes` int32, inner nodes 0 to n - 2; `codes` int8, 1 = the branch to
    the right; `weights` float64 (n - 1,): the counts below each inner node.
    """

    start: Array
    nodes: Array
    codes: Array
    weights: Array


def huffman(counts: Array) -> Tree:
    """Return the tree of n items with `counts` (n,) >= 0. Cost: a sort, then linear; item-sized.

    Ties by index, so that equal counts give equal trees. Source: Huffman 1952, by two queues (van
    Leeuwen 1976).

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
    n = len(counts)
    n_inner = max(n - 1, 0)
    # Nodes: items 0 to n - 1, inner nodes n to 2n - 2 in the order they are made: rising weight.
    weight = np.empty(n + n_inner, np.float64)
    weight[:n] = counts
    parent = np.full(n + n_inner, -1, np.int64)
    right = np.zeros(n + n_inner, np.int8)
    leaf, inner = 0, n
    for made in range(n, n + n_inner):
        for branch in range(2):
            if leaf < n and (inner >= made or weight[order[leaf]] <= weight[inner]):
                child = order[leaf]
                leaf += 1
            else:
                child = inner
                inner += 1
            if branch == 0:
                weight[made] = weight[child]
            else:
                weight[made] += weight[child]
            parent[child] = made
            right[child] = branch
    start = np.zeros(n + 1, np.int64)
    for item in range(n):
        length, node = 0, parent[item]
        while node >= 0:
            length += 1
            node = parent[node]
        start[item + 1] = start[item] + length
    nodes, codes = np.empty(start[n], np.int32), np.empty(start[n], np.int8)
    for item in range(n):
        place, node = start[item + 1] - 1, np.int64(item)
        while parent[node] >= 0:
            nodes[place], codes[place] = parent[node] - n, right[node]
            place -= 1
            node = parent[node]
    return start, nodes, codes, weight[n:].copy()
