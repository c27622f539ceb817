"""Windows, subsampling and cells: which examples an epoch learns from, and in what order."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recspark.data.blocks import Array
from recspark.engines import word2vec_cells as cells
from recspark.engines import word2vec_examples as module
from recspark.engines.word2vec import keep_chances, plan
from recspark.engines.word2vec_examples import (
    BAGGED_SENTENCES,
    SENTENCES,
    WHOLE,
    Examples,
    Metadata,
    Sentences,
    count,
    examples,
    pack,
    take_ragged,
    unpack_batches,
)
from recspark.engines.word2vec_step import Word2Vec


def sentences(*lists: list[int]) -> Sentences:
    start = np.concatenate([[0], np.cumsum([len(items) for items in lists])])
    items = np.array([i for one in lists for i in one], np.int32)
    return Sentences(np.arange(len(lists)) * 10, start, items)


def batch(lists: list[list[int] | None], first: int = 0) -> pa.RecordBatch:
    ids = pa.array(range(first, first + len(lists)), pa.int64())
    return pa.RecordBatch.from_arrays(
        [ids, pa.array(lists, pa.list_(pa.int32()))], names=SENTENCES.names
    )


def found(
    s: Sentences,
    window: int,
    *,
    shrink: bool = False,
    cbow: bool = False,
    keep: Array | None = None,
    epoch: int = 0,
) -> Examples:
    keep = np.ones(100, np.float32) if keep is None else keep
    parts = list(examples(s, keep, window=window, shrink=shrink, cbow=cbow, seed=1, epoch=epoch))
    return Examples(
        np.concatenate([p.keys for p in parts]),
        np.concatenate([p.targets for p in parts]),
        np.cumsum([0, *[n for p in parts for n in np.diff(p.start)]]),
        np.concatenate([p.inputs for p in parts]),
    )


def pairs(e: Examples) -> list[tuple[int, int]]:
    """Return (input, target) of skip-gram examples."""
    return list(zip(e.inputs.tolist(), e.targets.tolist(), strict=True))


def bags(e: Examples) -> list[tuple[list[int], int]]:
    """Return (inputs, target) of CBOW examples."""
    return [
        (e.inputs[e.start[r] : e.start[r + 1]].tolist(), int(t)) for r, t in enumerate(e.targets)
    ]


def test_a_sliding_window_pairs_neighbours_within_a_sentence_only() -> None:
    got = pairs(found(sentences([1, 2, 3, 4], [5, 6]), 2))
    near = [(1, 2), (1, 3), (2, 3), (2, 4), (3, 4), (5, 6)]
    assert Counter(got) == Counter(near + [(b, a) for a, b in near])


def test_a_set_window_pairs_all_with_all() -> None:
    got = pairs(found(sentences([1, 2, 3, 4]), WHOLE))
    assert Counter(got) == Counter((a, b) for a in range(1, 5) for b in range(1, 5) if a != b)


def test_cbow_predicts_each_item_from_its_window() -> None:
    assert bags(found(sentences([1, 2, 3], [4, 5]), 1, cbow=True)) == [
        ([2], 1), ([1, 3], 2), ([2], 3), ([5], 4), ([4], 5),
    ]  # fmt: skip


def test_a_repeated_item_predicts_itself_from_its_other_place() -> None:
    expected = [(1, 1), (1, 1), (1, 2), (2, 1)]
    assert Counter(pairs(found(sentences([1, 1, 2]), 1))) == Counter(expected)


def test_a_shrunk_window_is_uniform() -> None:
    """A neighbour at distance d of window 4 is met with chance (5 - d) / 4."""
    s = sentences(*([0, 1, 2, 3, 4, 5, 6, 7, 8] for _ in range(4000)))
    got = Counter(pairs(found(s, 4, shrink=True)))
    shares = [got[4 + d, 4] / 4000 for d in range(1, 6)]
    assert np.allclose(shares, [1, 0.75, 0.5, 0.25, 0], atol=0.03)


def test_subsampling_keeps_the_share_of_word2vec() -> None:
    """Item 0 makes up nearly half of all uses; t = 0.01. The window closes over what is left out."""
    counts = np.array([4000, *[40] * 100])
    keep = keep_chances(counts, 0.01)
    share = 4000 / 8000
    assert np.isclose(keep[0], np.sqrt(0.01 / share) + 0.01 / share)
    assert (keep[1:] == 1).all()
    s = sentences(*([1, 0, 2] for _ in range(4000)))
    got = Counter(pairs(found(s, 1, keep=keep)))
    n_kept = got[0, 1]
    assert abs(n_kept / 4000 - keep[0]) < 4 * np.sqrt(keep[0] / 4000)
    assert got[1, 2] == 4000 - n_kept
    other = Counter(pairs(found(s, 1, keep=keep, epoch=1)))
    assert other[0, 1] != n_kept


def test_without_subsampling_all_uses_stay_but_unused_items_go() -> None:
    assert keep_chances(np.array([5, 0, 1]), None).tolist() == [1, 0, 1]


def test_few_examples_at_once_are_the_same_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    s = sentences([1, 2, 3], [4, 5, 6, 7], [8, 9], [1, 9])
    whole = found(s, 2)
    monkeypatch.setattr(module, "_EXAMPLES_AT_ONCE", 1)
    alone = found(s, 2)
    assert pairs(alone) == pairs(whole)
    assert np.array_equal(alone.keys, whole.keys)


def test_packing_maps_cuts_and_leaves_out() -> None:
    vocabulary = np.array([10, 20, 30, 40, 50], np.int32)
    lists = [[20, 99, 10], None, [30], [50, 40, 30, 20, 10], [40, 20, 40], [50, 50]]
    (plain,) = unpack_batches(pack([batch(lists)], vocabulary, as_sets=False, max_length=3))
    rows = [plain.items[a:b].tolist() for a, b in zip(plain.start, plain.start[1:])]
    assert rows == [[1, 0], [4, 3, 2], [1, 0], [3, 1, 3], [4, 4]]
    assert plain.ids[[0, 1, 3, 4]].tolist() == [0, 3, 4, 5]
    assert len(set(plain.ids.tolist())) == 5
    (sets,) = unpack_batches(pack([batch(lists)], vocabulary, as_sets=True, max_length=100))
    rows = [sets.items[a:b].tolist() for a, b in zip(sets.start, sets.start[1:])]
    assert rows == [[0, 1], [0, 1, 2, 3, 4], [1, 3]]


def test_take_ragged() -> None:
    start, values = np.array([0, 2, 2, 5]), np.array([7, 8, 1, 2, 3])
    got = take_ragged(start, values, np.array([2, 0, 1, 2]))
    assert got[0].tolist() == [0, 3, 5, 5, 8]
    assert got[1].tolist() == [1, 2, 3, 7, 8, 1, 2, 3]
    got = take_ragged(np.array([0, 1, 1, 3]), np.array([7, 8, 9]), np.array([2, 1]))
    assert (got[0].tolist(), got[1].tolist()) == ([0, 2, 2], [8, 9])


def test_blocks_are_dealt_evenly() -> None:
    layout = cells.deal(np.array([8, 1, 5, 6, 2, 7, 3]), 3)
    assert [layout.members(b).tolist() for b in range(3)] == [[0, 4, 1], [5, 6], [3, 2]]
    assert layout.local.tolist() == [0, 2, 1, 0, 1, 0, 1]


ARCHITECTURES = ("skipgram", "cbow")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("loss", ["negative", "hierarchical"])
def test_cells_hold_each_example_where_its_blocks_meet(
    architecture: str, loss: str, tmp_path: object
) -> None:
    rng = np.random.default_rng(1)
    s = sentences(*(rng.choice(12, rng.integers(2, 7), replace=False).tolist() for _ in range(50)))
    settings = Word2Vec(architecture=architecture, loss=loss, window=2, n_blocks=3, n_rotations=2)  # type: ignore[arg-type]
    counts = np.bincount(s.items, minlength=12)
    p = plan(counts, settings, str(tmp_path))
    cbow = architecture == "cbow"
    expected = Counter(
        (tuple(inputs), target, i, j)
        for inputs, target in bags(found(s, 2, cbow=cbow))
        for i in {int(p.inputs.block[x]) for x in inputs}
        for j in (
            {int(p.outputs.block[target])}
            if p.tree is None
            else {
                int(p.outputs.block[node])
                for node in p.tree.nodes[p.tree.start[target] : p.tree.start[target + 1]]
            }
        )
    )
    parts: dict[int, list[bytes]] = {}
    for half in halves(s):
        for cell, one_part in cells.split(p, half, 0):
            parts.setdefault(cell, []).append(one_part)
    got: Counter[tuple[tuple[int, ...], int, int, int]] = Counter()
    for cell, data in parts.items():
        name = cells.merge(p, cell, data, 0, 7)
        for j in range(3):
            one = cells.read_cell(name, j, 3, ragged=cbow)
            for r, target in enumerate(one.targets.tolist()):
                inputs = tuple(one.inputs[one.start[r] : one.start[r + 1]].tolist())
                got[inputs, target, cell % 3, j] += 1
    assert got == expected


def halves(s: Sentences) -> list[Sentences]:
    middle = len(s.ids) // 2
    cut = s.start[middle]
    return [
        Sentences(s.ids[:middle], s.start[: middle + 1], s.items[:cut]),
        Sentences(s.ids[middle:], s.start[middle:] - cut, s.items[cut:]),
    ]


def test_a_cell_does_not_depend_on_the_order_of_its_parts() -> None:
    """Not even where keys are equal."""
    e = Examples(
        np.array([5, 5, 3, 5 | 1 << 48, 5], np.uint64),
        np.array([1, 2, 3, 4, 2], np.int32),
        np.arange(6),
        np.array([9, 8, 7, 6, 5], np.int32),
    )
    one = cells.cell_bytes([e], 2, ragged=False)
    other = cells.cell_bytes(
        [e.take(np.array([4, 3])), e.take(np.array([2, 1, 0]))], 2, ragged=False
    )
    assert one == other


def test_rotations_and_order_are_random() -> None:
    s = sentences(*([1, 2, 3, 4] for _ in range(500)))
    e = found(s, WHOLE)
    assert len(np.unique(e.keys)) == len(e.keys) == 6000
    rotation = (e.keys >> np.uint64(48)) % np.uint64(4)
    assert np.abs(np.bincount(rotation.astype(int)) - 1500).max() < 5 * np.sqrt(1500)


def bagged(*sentence_bags: list[list[int]]) -> Sentences:
    """Return sentences made of bags of items."""
    flat = sentences(*([i for bag in bags for i in bag] for bags in sentence_bags))
    numbers = [n for bags in sentence_bags for n, bag in enumerate(bags) for _ in bag]
    return Sentences(flat.ids, flat.start, flat.items, np.array(numbers, np.int32))


def all_pairs(s: Sentences, window: int, within_bag: bool, keep: Array | None = None) -> Counter:
    keep = np.ones(100, np.float32) if keep is None else keep
    parts = examples(
        s, keep, window=window, shrink=False, cbow=False, seed=1, epoch=0, within_bag=within_bag
    )
    return Counter(pair for part in parts for pair in pairs(part))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 4), st.booleans())
def test_items_of_neighbouring_bags_predict_each_other(
    data: st.DataObject, window: int, within_bag: bool
) -> None:
    """Against a plain loop over all pairs of items of a sentence."""
    bag = st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True)
    lists = data.draw(st.lists(st.lists(bag, min_size=1, max_size=5), min_size=1, max_size=3))
    expected = Counter(
        (i, j)
        for bags in lists
        for m, first in enumerate(bags)
        for n, second in enumerate(bags)
        for a, i in enumerate(first)
        for b, j in enumerate(second)
        if abs(m - n) <= window and (m != n or (within_bag and a != b))
    )
    assert all_pairs(bagged(*lists), window, within_bag) == expected


def test_a_bag_that_lost_all_items_does_not_count_in_the_window() -> None:
    keep = np.ones(100, np.float32)
    keep[2] = 0
    assert all_pairs(bagged([[1], [2], [3]]), 1, within_bag=False, keep=keep) == {
        (1, 3): 1, (3, 1): 1,
    }  # fmt: skip


def test_only_sentences_of_two_bags_count_unless_a_bag_pairs_its_items() -> None:
    s = bagged([[1, 2]], [[1], [2, 3]], [[4]])
    kept = np.ones(5, bool)
    assert count(s, kept).tolist() == [0, 1, 1, 1, 0]
    assert count(s, kept, within_bag=True).tolist() == [0, 2, 2, 1, 0]
    kept[1] = False  # the second sentence keeps one bag
    assert count(s, kept).tolist() == [0, 0, 0, 0, 0]
    assert count(s, kept, within_bag=True).tolist() == [0, 0, 1, 1, 0]


def test_the_order_within_a_bag_means_nothing() -> None:
    def packed(lists: list[list[int]], bags: list[list[int]]) -> Sentences:
        column = pa.list_(pa.int32())
        rows = pa.RecordBatch.from_arrays(
            [pa.array([5, 6], pa.int64()), pa.array(lists, column), pa.array(bags, column)],
            names=BAGGED_SENTENCES.names,
        )
        vocabulary = np.arange(10, dtype=np.int32)
        (s,) = unpack_batches(pack([rows], vocabulary, as_sets=False, max_length=9))
        return s

    numbers = [[0, 0, 0, 4, 4], [1, 2]]
    first = packed([[7, 3, 7, 2, 1], [9, 8]], numbers)
    second = packed([[3, 7, 3, 1, 2], [9, 8]], numbers)
    for name in ("ids", "start", "items", "bags"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name
    assert first.items.tolist() == [3, 7, 1, 2, 9, 8]  # each bag has each item once
    assert first.bags.tolist() == [0, 0, 4, 4, 1, 2]


def test_metadata_add_four_kinds_of_pairs_and_change_no_other() -> None:
    """Items 0 and 1 have the tokens 0 and 1, item 2 has both, item 3 none. Token t is member 4 + t."""
    start, tokens = np.array([0, 1, 2, 4, 4]), np.array([0, 1, 0, 1], np.int32)
    s = sentences(*([0, 1, 3] for _ in range(2000)), *([2, 0] for _ in range(2000)))
    keep = np.ones(4, np.float32)

    def counted(weight: float) -> Counter:
        metadata = Metadata(start, tokens, 2, weight)
        parts = examples(
            s, keep, window=1, shrink=False, cbow=False, seed=1, epoch=0, metadata=metadata
        )
        return Counter(pair for part in parts for pair in pairs(part))

    plain, full, half = all_pairs(s, 1, within_bag=False, keep=keep), counted(1.0), counted(0.5)
    assert {pair: n for pair, n in full.items() if max(pair) < 4} == plain
    assert counted(0.0) == plain
    assert full[1, 4] == full[3, 5] == 2000  # item -> token of the other item
    assert full[4, 1] == full[5, 3] == 2000  # token -> the other item
    assert full[5, 1] == 4000  # token -> its own item, once per pair with the item as input
    assert full[5, 6] == full[6, 5] == 0
    # Item 2 draws one of its two tokens for each pair; token 0 is that of its neighbour too.
    assert full[4, 2] + full[5, 2] == 2000 + 2000
    assert abs(full[5, 2] - 1000) < 4 * np.sqrt(500)
    # Token -> token: 2000 of item 1 before item 0, and every other pair of items 2 and 0.
    assert abs(full[5, 4] - 3000) < 4 * np.sqrt(500)
    for pair in [(1, 4), (4, 1)]:
        assert abs(half[pair] - 1000) < 4 * np.sqrt(500)
    assert abs(half[5, 1] - 2000) < 4 * np.sqrt(1000)
