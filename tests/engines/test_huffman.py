"""The Huffman tree: shortest expected path, decodable, the same for the same counts."""

from __future__ import annotations

import heapq

import numpy as np
import pytest

from recspark.engines.huffman import huffman


def cost_by_heap(counts: list[int]) -> int:
    """Return the sum of counts times path lengths of an optimal tree: all merged weights."""
    heap, total = list(counts), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        made = heapq.heappop(heap) + heapq.heappop(heap)
        total += made
        heapq.heappush(heap, made)
    return total


@pytest.mark.parametrize("counts", [[5], [1, 1], [3, 3, 3, 3, 3], [100, 1, 7, 7, 20, 3, 0, 50]])
def test_paths_are_optimal_and_lead_to_one_item_each(counts: list[int]) -> None:
    tree = huffman(np.array(counts))
    lengths = np.diff(tree.start)
    assert (lengths * counts).sum() == cost_by_heap(counts) == tree.weights.sum()
    codes = {
        tuple(tree.codes[tree.start[i] : tree.start[i + 1]].tolist()) for i in range(len(counts))
    }
    assert len(codes) == len(counts)
    assert sum(2.0**-n for n in lengths) == 1  # a full tree: no branch leads nowhere


def test_paths_begin_at_the_root_and_follow_children() -> None:
    tree = huffman(np.array([4, 1, 2, 9, 3]))
    below: dict[tuple[int, int], int | str] = {}
    for item in range(5):
        path = slice(tree.start[item], tree.start[item + 1])
        nodes, codes = tree.nodes[path].tolist(), tree.codes[path].tolist()
        assert nodes[0] == 3  # the last node made
        for node, code, child in zip(nodes, codes, [*nodes[1:], f"item {item}"]):
            assert below.setdefault((node, code), child) == child
    assert len(below) == 8
