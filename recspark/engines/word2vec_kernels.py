"""Inner loops of the word2vec engine: random numbers, exact draws, one pass of updates.

An *example* is what one update learns from: a target, and the inputs that predict it (one item for
skip-gram, the items around the target for CBOW). `hidden` is the mean of the inputs' vectors.

Source: Mikolov et al. 2013, "Distributed representations of words and phrases and their
compositionality", equations 2 (hierarchical softmax) and 4 (negative sampling).
"""

from __future__ import annotations

import numpy as np

from recspark.data.blocks import Array
from recspark.engines.compiled import compiled

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B = np.uint64(0x94D049BB133111EB)
_30, _27, _31, _32, _11 = (np.uint64(n) for n in (30, 27, 31, 32, 11))
_LOW = np.uint64(0xFFFFFFFF)
_LOSS_EVERY = 16  # rows between two whose loss is taken: a logarithm costs as much as the update


@compiled
def mix(x: np.uint64) -> np.uint64:
    """Return 64 well-mixed bits of `x`: the output function of SplitMix64 (Steele et al. 2014)."""
    x = (x ^ (x >> _30)) * _MIX_A
    x = (x ^ (x >> _27)) * _MIX_B
    return x ^ (x >> _31)


@compiled
def key(a: int, b: int, c: int, d: int) -> np.uint64:
    """Return 64 bits decided by four integers: the seed of a stream of random numbers."""
    out = mix(np.uint64(a) + _GOLDEN)
    out = mix(out ^ mix(np.uint64(b) + _GOLDEN))
    out = mix(out ^ mix(np.uint64(c) + _GOLDEN))
    return mix(out ^ mix(np.uint64(d) + _GOLDEN))


@compiled
def start_vectors(items: Array, size: int, seed: int) -> Array:
    """Return float32 (n, size), uniform in [-0.5, 0.5) / size; a row depends on seed and item."""
    out = np.empty((len(items), size), np.float32)
    for row in range(len(items)):
        state = key(seed, items[row], 0, 1)
        for f in range(size):
            state += _GOLDEN
            uniform = np.float64(mix(state) >> _11) * 2.0**-53
            out[row, f] = np.float32((uniform - 0.5) / size)
    return out


@compiled
def alias_table(weights: Array) -> tuple[Array, Array]:
    """Return (share uint32, other int32) of the alias method; both (n,), `weights` float64 >= 0.

    A draw picks a slot uniformly and keeps it with probability share / 2^32, else takes its other.
    Probabilities are exact to 2^-32 / n. Source: Vose 1991.
    """
    n = len(weights)
    scaled = weights * (n / weights.sum())
    share = np.full(n, _LOW, np.uint32)
    other = np.arange(n).astype(np.int32)
    small, large = np.empty(n, np.int32), np.empty(n, np.int32)
    n_small = n_large = 0
    for slot in range(n):
        if scaled[slot] < 1:
            small[n_small] = slot
            n_small += 1
        else:
            large[n_large] = slot
            n_large += 1
    while n_small > 0 and n_large > 0:
        n_small -= 1
        low, high = small[n_small], large[n_large - 1]
        share[low] = np.uint32(min(scaled[low] * 2.0**32, 2.0**32 - 1))
        other[low] = high
        scaled[high] -= 1 - scaled[low]
        if scaled[high] < 1:
            n_large -= 1
            small[n_small] = high
            n_small += 1
    return share, other


@compiled
def draw(bits: np.uint64, share: Array, other: Array) -> int:
    """Return the slot that 64 random bits draw from an alias table."""
    slot = np.int64(((bits >> _32) * np.uint64(len(share))) >> _32)
    if (bits & _LOW) < share[slot]:
        return slot
    return np.int64(other[slot])


@compiled
def draw_many(n: int, share: Array, other: Array, seed: int) -> Array:
    """Return n draws, int32."""
    out = np.empty(n, np.int32)
    state = key(seed, 0, 0, 2)
    for at in range(n):
        state += _GOLDEN
        out[at] = draw(mix(state), share, other)
    return out


@compiled
def _gather(inputs: Array, live: Array, frozen: Array, hidden: Array, change: Array) -> int:
    """Set `hidden` to the mean of the inputs' vectors, `change` to 0; return how many are live."""
    n_live = 0
    hidden[:] = 0
    change[:] = 0
    for item in inputs:
        if item >= 0:
            n_live += 1
            for f in range(len(hidden)):
                hidden[f] += live[item, f]
        else:
            for f in range(len(hidden)):
                hidden[f] += frozen[-1 - item, f]
    if len(inputs) > 1:
        part = np.float32(1.0 / len(inputs))
        for f in range(len(hidden)):
            hidden[f] *= part
    return n_live


@compiled
def _spread(inputs: Array, live: Array, change: Array) -> None:
    """Add an input's share of `change` to each live one."""
    part = np.float32(1.0 / len(inputs))
    for item in inputs:
        if item >= 0:
            for f in range(len(change)):
                live[item, f] += part * change[f]


@compiled
def _learn(
    n: int,
    at: Array,
    labels: Array,
    dots: Array,
    hidden: Array,
    change: Array,
    outputs: Array,
    rate: float,
    portion: float,
) -> None:
    """Take one step down sum_k -log sigmoid(+-hidden . outputs[at[k]]), k < n: + for label 1.

    Sets `dots` to the products before it; `change` gets the step of `hidden`; the outputs move by
    `portion` of theirs. All products come first: their loads from memory overlap.
    """
    size = len(hidden)
    for k in range(n):
        row = at[k]
        dot = np.float32(0)
        for f in range(size):
            dot += hidden[f] * outputs[row, f]
        dots[k] = dot
    for k in range(n):
        sigmoid = np.float32(1) / (np.float32(1) + np.exp(-dots[k]))
        step = np.float32(rate) * (labels[k] - sigmoid)
        back = step * np.float32(portion)
        row = at[k]
        for f in range(size):
            old = outputs[row, f]
            change[f] += step * old
            outputs[row, f] = old + back * hidden[f]


@compiled
def _loss(n: int, dots: Array, labels: Array) -> float:
    """Return the sum of -log sigmoid(dot) for label 1, -log sigmoid(-dot) for label 0."""
    total = 0.0
    for k in range(n):
        signed = np.float64(dots[k]) * (1 - 2 * labels[k])
        total += max(signed, 0.0) + np.log1p(np.exp(-abs(signed)))
    return total


@compiled
def train_negative(
    start: Array,
    inputs: Array,
    targets: Array,
    live: Array,
    frozen: Array,
    outputs: Array,
    share: Array,
    other: Array,
    n_negatives: int,
    first_rate: float,
    last_rate: float,
    seed: int,
) -> tuple[float, int]:
    """Update `live` and `outputs` in place, an example at a time, by negative sampling.

    Parameters
    ----------
    start : int64 (n + 1,); example r has `start[r]:start[r + 1]` of
    inputs : int32; >= 0 is a row of `live`, -1 - s is row s of `frozen`
    targets : int32 (n,), rows of `outputs`
    live, frozen, outputs : float32 (., size), C order; `frozen` is read only
    share, other : alias table of the noise over the rows of `outputs`
    n_negatives : draws an example; one that hits the target is left out
    first_rate, last_rate : learning rate at the first example and after the last, linear between
    seed : of the draws

    An output's step is scaled by the live share of the inputs, so that an example seen once from
    each block of its inputs counts once. Returns (sum of losses of every 16th example, their
    number).
    """
    n, size = len(targets), live.shape[1]
    hidden, change = np.empty(size, np.float32), np.empty(size, np.float32)
    at, dots = np.empty(n_negatives + 1, np.int32), np.empty(n_negatives + 1, np.float32)
    labels = np.zeros(n_negatives + 1, np.float32)
    labels[0] = 1
    state = key(seed, 0, 0, 3)
    total, n_losses = 0.0, 0
    for r in range(n):
        rate = first_rate + (last_rate - first_rate) * (r / n)
        mine = inputs[start[r] : start[r + 1]]
        portion = _gather(mine, live, frozen, hidden, change) / len(mine)
        at[0], n_terms = targets[r], 1
        for _ in range(n_negatives):
            state += _GOLDEN
            drawn = draw(mix(state), share, other)
            if drawn != targets[r]:
                at[n_terms] = drawn
                n_terms += 1
        _learn(n_terms, at, labels, dots, hidden, change, outputs, rate, portion)
        if r % _LOSS_EVERY == 0:
            total += _loss(n_terms, dots, labels)
            n_losses += 1
        _spread(mine, live, change)
    return total, n_losses


@compiled
def train_hierarchical(
    start: Array,
    inputs: Array,
    targets: Array,
    live: Array,
    frozen: Array,
    outputs: Array,
    path_start: Array,
    nodes: Array,
    codes: Array,
    first_rate: float,
    last_rate: float,
) -> tuple[float, int]:
    """Update `live` and `outputs` in place, an example at a time, by hierarchical softmax.

    As `train_negative`, but `targets` are items, the rows of `outputs` inner nodes of a Huffman
    tree. Item t's path is `path_start[t]:path_start[t + 1]` of `nodes` (int32, rows of `outputs`;
    -1 = not in this block, left out) and `codes` (int8, 1 = the branch to the right).
    """
    n, size = len(targets), live.shape[1]
    hidden, change = np.empty(size, np.float32), np.empty(size, np.float32)
    longest = 0
    for item in range(len(path_start) - 1):
        longest = max(longest, path_start[item + 1] - path_start[item])
    at, dots = np.empty(longest, np.int32), np.empty(longest, np.float32)
    labels = np.empty(longest, np.float32)
    total, n_losses = 0.0, 0
    for r in range(n):
        rate = first_rate + (last_rate - first_rate) * (r / n)
        mine = inputs[start[r] : start[r + 1]]
        portion = _gather(mine, live, frozen, hidden, change) / len(mine)
        n_terms = 0
        for place in range(path_start[targets[r]], path_start[targets[r] + 1]):
            if nodes[place] >= 0:
                at[n_terms], labels[n_terms] = nodes[place], 1 - codes[place]
                n_terms += 1
        _learn(n_terms, at, labels, dots, hidden, change, outputs, rate, portion)
        if r % _LOSS_EVERY == 0:
            total += _loss(n_terms, dots, labels)
            n_losses += 1
        _spread(mine, live, change)
    return total, n_losses
