"""Inner loops of paragraph vectors: one pass over a document, in training and in inference.

At each place of a document, a hidden vector predicts the word that stands there, by negative sampling.
`method` says what the hidden vector is made of:

- DBOW: the vector of the document alone.
- DM_MEAN: the mean of the vectors of the document and of the words around the place.
- DM_CONCAT: the vector of the document, then those of the `window` words before the place and of the
  `window` words after it, in their order. Where the document has no word, the vector is that of a word
  that stands for none: the last row of `inputs`.

Every vector that the hidden one is made of moves by the full step of its part. For DM_MEAN the gradient
would be this step divided by the number of vectors; word2vec.c does not divide it, and with it no
implementation that the published figures were reached with.

Source: Le and Mikolov 2014, "Distributed Representations of Sentences and Documents"; negative sampling:
Mikolov et al. 2013, equation 4.
"""

from __future__ import annotations

import numpy as np

from recspark.data.blocks import Array
from recspark.engines.compiled import compiled
from recspark.engines.word2vec_kernels import _loss, _update_outputs, draw, key, mix

DBOW, DM_MEAN, DM_CONCAT = 0, 1, 2
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # step of the state of SplitMix64, see `word2vec_kernels`
_11 = np.uint64(11)
_LOSS_EVERY = 16  # examples per computed loss


def layer_size(method: int, size: int, window: int) -> int:
    """Return the length of a hidden vector, which is that of an output vector."""
    return size * (1 + 2 * window) if method == DM_CONCAT else size


@compiled
def text_keys(start: Array, words: Array) -> Array:
    """Return a number for each text, int64 (n,), which depends on the words of the text alone."""
    keys = np.empty(len(start) - 1, np.int64)
    for text in range(len(keys)):
        bits = np.uint64(start[text + 1] - start[text])
        for position in range(start[text], start[text + 1]):
            bits = mix(bits ^ mix(np.uint64(words[position]) + _GOLDEN))
        keys[text] = np.int64(bits >> np.uint64(1))
    return keys


@compiled
def document_keys(ids: Array, seed: int, epoch: int) -> Array:
    """Return a random number for each document of an epoch, uint64 (n,)."""
    keys = np.empty(len(ids), np.uint64)
    for document in range(len(ids)):
        keys[document] = key(seed, epoch, ids[document], 10)
    return keys


@compiled
def _keep_words(words: Array, keep: Array, state: np.uint64, kept: Array) -> int:
    """Set `kept` to the words that stay in this pass (subsampling); return their number."""
    n_kept = 0
    for word in words:
        state += _GOLDEN
        if np.float64(mix(state) >> _11) * 2.0**-53 < keep[word]:
            kept[n_kept] = word
            n_kept += 1
    return n_kept


@compiled
def _set_context(
    method: int, kept: Array, n_kept: int, centre: int, window: int, reach: int, context: Array
) -> int:
    """Set `context` to the rows of the inputs around `centre`; return their number.

    DM_MEAN takes `reach` words to either side, DM_CONCAT all of `window`, and -1 where there is none.
    """
    n_context = 0
    if method == DM_MEAN:
        for position in range(max(0, centre - reach), min(n_kept, centre + reach + 1)):
            if position != centre:
                context[n_context] = kept[position]
                n_context += 1
    elif method == DM_CONCAT:
        for position in range(centre - window, centre + window + 1):
            if position != centre:
                context[n_context] = kept[position] if 0 <= position < n_kept else -1
                n_context += 1
    return n_context


@compiled
def _set_hidden(
    method: int,
    vector: Array,
    inputs: Array,
    context: Array,
    n_context: int,
    hidden: Array,
    change: Array,
) -> None:
    """Set `hidden` to what `method` makes of the document's vector and the context, `change` to 0."""
    size = len(vector)
    change[:] = 0
    for f in range(size):
        hidden[f] = vector[f]
    if method == DM_CONCAT:
        for i in range(n_context):
            row = context[i] if context[i] >= 0 else len(inputs) - 1
            for f in range(size):
                hidden[(i + 1) * size + f] = inputs[row, f]
    elif n_context > 0:
        for i in range(n_context):
            for f in range(size):
                hidden[f] += inputs[context[i], f]
        share = np.float32(1.0 / (n_context + 1))
        for f in range(size):
            hidden[f] *= share


@compiled
def _update_words(
    method: int, inputs: Array, uses: Array, context: Array, n_context: int, change: Array
) -> None:
    """Add to the input of each word of the context its part of `change`, and count its uses."""
    size = inputs.shape[1]
    for i in range(n_context):
        row = context[i] if context[i] >= 0 else len(inputs) - 1
        first = (i + 1) * size if method == DM_CONCAT else 0
        uses[row] += 1
        for f in range(size):
            inputs[row, f] += change[first + f]


@compiled
def _set_terms(
    target: int,
    n_negatives: int,
    state: np.uint64,
    thresholds: Array,
    aliases: Array,
    rows: Array,
) -> int:
    """Set `rows` to the output row of the target and those of the negatives; return their number.

    A draw that hits the target is skipped.
    """
    rows[0], n_terms = target, 1
    for _ in range(n_negatives):
        state += _GOLDEN
        drawn = draw(mix(state), thresholds, aliases)
        if drawn != target:
            rows[n_terms] = drawn
            n_terms += 1
    return n_terms


@compiled
def train(
    method: int,
    window: int,
    start: Array,
    words: Array,
    ids: Array,
    order: Array,
    vectors: Array,
    inputs: Array,
    uses: Array,
    outputs: Array,
    output_rows: Array,
    keep: Array,
    thresholds: Array,
    aliases: Array,
    n_negatives: int,
    first_rate: float,
    last_rate: float,
    seed: int,
    epoch: int,
    step: int,
) -> tuple[float, int]:
    """Update `vectors`, `inputs`, `outputs` and `uses` in place by one pass over documents.

    Parameters
    ----------
    method, window : see the module
    start, words : document d has `words[start[d]:start[d + 1]]`, int32 numbers of words
    ids : int64, by document; seeds the document's random numbers
    order : the documents of this pass, in the order in which they are learnt
    vectors : float32 (n_documents, size)
    inputs : float32 (n_words + 1, size): the words as context. With DBOW it has no row
    uses : int64 (n_words + 1,): counts how often each row of `inputs` was changed
    outputs : float32 (n_rows, layer): the words as targets, those of one block
    output_rows : int32 (n_words,): the row of each word in `outputs`; -1 = it is in another block, and
        the places where it stands are left out
    keep : float32 (n_words,): chance that a use of the word stays in an epoch
    thresholds, aliases : alias table of the noise over the rows of `outputs`
    first_rate, last_rate : learning rate at the first document and after the last, linear between
    seed, epoch, step : decide the random numbers. Which words stay, and how far a window reaches,
        depends on the epoch, so that the steps of an epoch see the same places

    Returns (sum of the losses of every 16th example, number of these examples).
    """
    size, layer = vectors.shape[1], outputs.shape[1]
    hidden, change = np.empty(layer, np.float32), np.empty(layer, np.float32)
    rows, dots = np.empty(n_negatives + 1, np.int32), np.empty(n_negatives + 1, np.float32)
    labels = np.zeros(n_negatives + 1, np.float32)
    labels[0] = 1
    context = np.empty(2 * window, np.int32)
    longest = 0
    for document in order:
        longest = max(longest, start[document + 1] - start[document])
    kept = np.empty(longest, np.int32)
    loss_sum, n_losses, n_examples = 0.0, 0, 0
    for turn in range(len(order)):
        document = order[turn]
        rate = first_rate + (last_rate - first_rate) * (turn / len(order))
        words_of_document = words[start[document] : start[document + 1]]
        vector = vectors[document]
        n_kept = _keep_words(words_of_document, keep, key(seed, epoch, ids[document], 7), kept)
        window_state = key(seed, epoch, ids[document], 8)
        negative_state = key(seed, step, ids[document], 9)
        for centre in range(n_kept):
            window_state += _GOLDEN
            target = output_rows[kept[centre]]
            if target < 0:
                continue
            reach = 1 + int(np.float64(mix(window_state) >> _11) * 2.0**-53 * window)
            n_context = _set_context(method, kept, n_kept, centre, window, reach, context)
            _set_hidden(method, vector, inputs, context, n_context, hidden, change)
            n_terms = _set_terms(target, n_negatives, negative_state, thresholds, aliases, rows)
            negative_state += _GOLDEN * np.uint64(n_negatives)
            _update_outputs(n_terms, rows, labels, dots, hidden, change, outputs, rate, 1.0)
            if n_examples % _LOSS_EVERY == 0:
                loss_sum += _loss(n_terms, dots, labels)
                n_losses += 1
            n_examples += 1
            for f in range(size):
                vector[f] += change[f]
            _update_words(method, inputs, uses, context, n_context, change)
    return loss_sum, n_losses


@compiled
def infer(
    method: int,
    window: int,
    start: Array,
    words: Array,
    inputs: Array,
    outputs: Array,
    keep: Array,
    thresholds: Array,
    aliases: Array,
    n_negatives: int,
    epochs: int,
    first_rate: float,
    last_rate: float,
    seed: int,
) -> Array:
    """Return the vectors of new documents, float32 (n, size), with the words' vectors as they are.

    The parameters are those of `train`; `outputs` has a row for each word. No array is written, so
    `inputs` and `outputs` may be read-only. Each vector begins at 0 and takes `epochs` passes over its
    own document, with random numbers that depend on the seed and the words of the document. So the
    vector depends on no other document, and equal documents have equal vectors. A document without
    words has the vector 0.
    """
    size = inputs.shape[1]
    layer = outputs.shape[1]
    n_documents = len(start) - 1
    vectors = np.zeros((n_documents, size), np.float32)
    hidden, change = np.empty(layer, np.float32), np.empty(layer, np.float32)
    rows = np.empty(n_negatives + 1, np.int32)
    context = np.empty(2 * window, np.int32)
    keys = text_keys(start, words)
    longest = 0
    for document in range(n_documents):
        longest = max(longest, start[document + 1] - start[document])
    kept = np.empty(longest, np.int32)
    for document in range(n_documents):
        words_of_document = words[start[document] : start[document + 1]]
        vector = vectors[document]
        for epoch in range(epochs):
            rate = np.float32(first_rate + (last_rate - first_rate) * (epoch / epochs))
            n_kept = _keep_words(words_of_document, keep, key(seed, epoch, keys[document], 7), kept)
            window_state = key(seed, epoch, keys[document], 8)
            state = key(seed, epoch, keys[document], 9)
            for centre in range(n_kept):
                window_state += _GOLDEN
                reach = 1 + int(np.float64(mix(window_state) >> _11) * 2.0**-53 * window)
                n_context = _set_context(method, kept, n_kept, centre, window, reach, context)
                _set_hidden(method, vector, inputs, context, n_context, hidden, change)
                n_terms = _set_terms(kept[centre], n_negatives, state, thresholds, aliases, rows)
                state += _GOLDEN * np.uint64(n_negatives)
                for term in range(n_terms):
                    row = rows[term]
                    dot = np.float32(0)
                    for f in range(layer):
                        dot += hidden[f] * outputs[row, f]
                    label = np.float32(1 if term == 0 else 0)
                    slope = rate * (label - np.float32(1) / (np.float32(1) + np.exp(-dot)))
                    for f in range(size):  # only the part of the document is needed
                        change[f] += slope * outputs[row, f]
                for f in range(size):
                    vector[f] += change[f]
    return vectors
