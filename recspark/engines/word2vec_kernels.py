"""Inner loops of the word2vec engine: random numbers, exact draws, one pass of updates.

An *example* is one update: a target, and the inputs that predict it (one item for skip-gram, the
items around the target for CBOW). `hidden` is the mean of the inputs' vectors. An input is *live*
if its vector may change in this pass, and *frozen* if another worker holds its block.

Source: Mikolov et al. 2013, "Distributed representations of words and phrases and their
compositionality", equations 2 (hierarchical softmax) and 4 (negative sampling).
"""

from __future__ import annotations

import numpy as np

from recspark.data.blocks import Array
from recspark.engines.compiled import compiled

# Constants of SplitMix64. A stream adds _GOLDEN to its state and mixes it, for each random number.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B = np.uint64(0x94D049BB133111EB)
_30, _27, _31, _32, _11 = (np.uint64(n) for n in (30, 27, 31, 32, 11))
_LOW_32_BITS = np.uint64(0xFFFFFFFF)
_LOSS_EVERY = 16  # examples per computed loss: its logarithms cost as much as the update


@compiled
def mix(x: np.uint64) -> np.uint64:
    """Return 64 well-mixed bits of `x`: the output function of SplitMix64 (Steele et al. 2014)."""
    x = (x ^ (x >> _30)) * _MIX_A
    x = (x ^ (x >> _27)) * _MIX_B
    return x ^ (x >> _31)


@compiled
def key(a: int, b: int, c: int, d: int) -> np.uint64:
    """Return 64 bits that depend on four integers: the start of a stream of random numbers."""
    bits = mix(np.uint64(a) + _GOLDEN)
    bits = mix(bits ^ mix(np.uint64(b) + _GOLDEN))
    bits = mix(bits ^ mix(np.uint64(c) + _GOLDEN))
    return mix(bits ^ mix(np.uint64(d) + _GOLDEN))


@compiled
def start_vectors(items: Array, size: int, seed: int) -> Array:
    """Return first input vectors, float32 (n, size), uniform in [-0.5, 0.5) / sqrt(size).

    A row depends on seed and item only. word2vec starts with [-0.5, 0.5) / size, which is so short
    that the first epochs only make the vectors longer. Diginetica, 5 epochs, P@20 by cosine: .28
    with that, .30 with four times that, .32 with eight times that (= / sqrt(64)).
    """
    vectors = np.empty((len(items), size), np.float32)
    width = 1 / np.sqrt(size)
    for row in range(len(items)):
        state = key(seed, items[row], 0, 1)
        for f in range(size):
            state += _GOLDEN
            uniform = np.float64(mix(state) >> _11) * 2.0**-53
            vectors[row, f] = np.float32((uniform - 0.5) * width)
    return vectors


@compiled
def alias_table(weights: Array) -> tuple[Array, Array]:
    """Return (thresholds uint32 (n,), aliases int32 (n,)), the alias table of `weights`.

    `weights` float64 (n,) >= 0. A draw picks a slot uniformly. It returns the slot with probability
    threshold / 2^32, else the slot's alias. Probabilities are exact to 2^-32 / n. Source: Vose
    1991.
    """
    n = len(weights)
    scaled = weights * (n / weights.sum())  # scaled to mean 1, the capacity of a slot
    thresholds = np.full(n, _LOW_32_BITS, np.uint32)
    aliases = np.arange(n).astype(np.int32)
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
        small_slot, large_slot = small[n_small], large[n_large - 1]
        thresholds[small_slot] = np.uint32(min(scaled[small_slot] * 2.0**32, 2.0**32 - 1))
        aliases[small_slot] = large_slot
        scaled[large_slot] -= 1 - scaled[small_slot]
        if scaled[large_slot] < 1:
            n_large -= 1
            small[n_small] = large_slot
            n_small += 1
    return thresholds, aliases


@compiled
def draw(bits: np.uint64, thresholds: Array, aliases: Array) -> np.int64:
    """Return the slot that 64 random bits draw from an alias table.

    The upper 32 bits pick the slot, the lower 32 bits choose between it and its alias.
    """
    slot = np.int64(((bits >> _32) * np.uint64(len(thresholds))) >> _32)
    if (bits & _LOW_32_BITS) < thresholds[slot]:
        return slot
    return np.int64(aliases[slot])


@compiled
def draw_many(n: int, thresholds: Array, aliases: Array, seed: int) -> Array:
    """Return n slots drawn from an alias table, int32."""
    drawn_slots = np.empty(n, np.int32)
    state = key(seed, 0, 0, 2)
    for i in range(n):
        state += _GOLDEN
        drawn_slots[i] = draw(mix(state), thresholds, aliases)
    return drawn_slots


@compiled
def _set_hidden(inputs: Array, live: Array, frozen: Array, hidden: Array, change: Array) -> int:
    """Set `hidden` to the mean of the inputs' vectors, `change` to 0; return the number of live
    inputs.

    An input >= 0 is a row of `live`; an input -1 - s is row s of `frozen`.
    """
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
        input_share = np.float32(1.0 / len(inputs))
        for f in range(len(hidden)):
            hidden[f] *= input_share
    return n_live


@compiled
def _update_inputs(inputs: Array, live: Array, change: Array) -> None:
    """Add to each live input its share of `change`: `change` / number of inputs."""
    input_share = np.float32(1.0 / len(inputs))
    for item in inputs:
        if item >= 0:
            for f in range(len(change)):
                live[item, f] += input_share * change[f]


@compiled
def _update_outputs(
    n_terms: int,
    rows: Array,
    labels: Array,
    dots: Array,
    hidden: Array,
    change: Array,
    outputs: Array,
    learning_rate: float,
    live_share: float,
) -> None:
    """Take one step down the loss sum_k -log sigmoid(+-hidden . outputs[rows[k]]), k < n_terms.

    The sign is + where `labels[k]` is 1 and - where it is 0. Sets `dots` to the products before the
    step and adds the step of `hidden` to `change`. The outputs move by `live_share` of their step.
    All products are computed before any update, so that their loads from memory overlap.
    """
    size = len(hidden)
    for term in range(n_terms):
        row = rows[term]
        dot = np.float32(0)
        for f in range(size):
            dot += hidden[f] * outputs[row, f]
        dots[term] = dot
    for term in range(n_terms):
        sigmoid = np.float32(1) / (np.float32(1) + np.exp(-dots[term]))
        step = np.float32(learning_rate) * (labels[term] - sigmoid)
        output_step = step * np.float32(live_share)
        row = rows[term]
        for f in range(size):
            old_output = outputs[row, f]
            change[f] += step * old_output
            outputs[row, f] = old_output + output_step * hidden[f]


@compiled
def _loss(n_terms: int, dots: Array, labels: Array) -> float:
    """Return the sum of -log sigmoid(dot) over terms with label 1 and -log sigmoid(-dot) with 0."""
    total = 0.0
    for term in range(n_terms):
        signed = np.float64(dots[term]) * (1 - 2 * labels[term])
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
    thresholds: Array,
    aliases: Array,
    n_negatives: int,
    first_rate: float,
    last_rate: float,
    seed: int,
) -> tuple[float, int]:
    """Update `live` and `outputs` in place by negative sampling, one example after the other.

    Parameters
    ----------
    start : int64 (n + 1,); example r has the inputs `start[r]:start[r + 1]` of `inputs`
    inputs : int32; an input >= 0 is a row of `live`, an input -1 - s is row s of `frozen`
    targets : int32 (n,), rows of `outputs`
    live, frozen, outputs : float32 (., size), C order; `frozen` is only read
    thresholds, aliases : alias table of the noise over the rows of `outputs`
    n_negatives : number of draws per example; a draw that hits the target is skipped
    first_rate, last_rate : learning rate at the first example and after the last; linear between
        them
    seed : decides the draws

    The step of an output is scaled by the share of inputs that are live. So an example that is seen
    once from each block of its inputs counts once in total. Returns (sum of the losses of every
    16th example, number of these examples).
    """
    n_examples, size = len(targets), live.shape[1]
    hidden, change = np.empty(size, np.float32), np.empty(size, np.float32)
    rows, dots = np.empty(n_negatives + 1, np.int32), np.empty(n_negatives + 1, np.float32)
    labels = np.zeros(n_negatives + 1, np.float32)
    labels[0] = 1
    state = key(seed, 0, 0, 3)
    loss_sum, n_losses = 0.0, 0
    for example in range(n_examples):
        learning_rate = first_rate + (last_rate - first_rate) * (example / n_examples)
        example_inputs = inputs[start[example] : start[example + 1]]
        live_share = _set_hidden(example_inputs, live, frozen, hidden, change) / len(example_inputs)
        rows[0], n_terms = targets[example], 1
        for _ in range(n_negatives):
            state += _GOLDEN
            drawn = draw(mix(state), thresholds, aliases)
            if drawn != targets[example]:
                rows[n_terms] = drawn
                n_terms += 1
        _update_outputs(
            n_terms, rows, labels, dots, hidden, change, outputs, learning_rate, live_share
        )
        if example % _LOSS_EVERY == 0:
            loss_sum += _loss(n_terms, dots, labels)
            n_losses += 1
        _update_inputs(example_inputs, live, change)
    return loss_sum, n_losses


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
    """Update `live` and `outputs` in place by hierarchical softmax, one example after the other.

    As `train_negative`, but `targets` are items, and the rows of `outputs` are inner nodes of a
    Huffman tree. The path of item t is `path_start[t]:path_start[t + 1]` of `nodes` and `codes`.
    `nodes` int32 are rows of `outputs`; -1 = the node is not in this block and is skipped. `codes`
    int8: 1 = the path goes to the right.
    """
    n_examples, size = len(targets), live.shape[1]
    hidden, change = np.empty(size, np.float32), np.empty(size, np.float32)
    longest = 0
    for item in range(len(path_start) - 1):
        longest = max(longest, path_start[item + 1] - path_start[item])
    rows, dots = np.empty(longest, np.int32), np.empty(longest, np.float32)
    labels = np.empty(longest, np.float32)
    loss_sum, n_losses = 0.0, 0
    for example in range(n_examples):
        learning_rate = first_rate + (last_rate - first_rate) * (example / n_examples)
        example_inputs = inputs[start[example] : start[example + 1]]
        live_share = _set_hidden(example_inputs, live, frozen, hidden, change) / len(example_inputs)
        n_terms = 0
        for path_index in range(path_start[targets[example]], path_start[targets[example] + 1]):
            if nodes[path_index] >= 0:
                rows[n_terms], labels[n_terms] = nodes[path_index], 1 - codes[path_index]
                n_terms += 1
        _update_outputs(
            n_terms, rows, labels, dots, hidden, change, outputs, learning_rate, live_share
        )
        if example % _LOSS_EVERY == 0:
            loss_sum += _loss(n_terms, dots, labels)
            n_losses += 1
        _update_inputs(example_inputs, live, change)
    return loss_sum, n_losses
