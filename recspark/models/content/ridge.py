"""Ridge regression from blocks of features, each with a penalty of its own, chosen by validation.

Content of different kinds (words, categories, pictures) does not deserve one penalty: beside a good
block, a block that says nothing adds noise unless it is penalised away. On 458 films without events
(MovieLens 1M), posters put beside genres, plots and people under one penalty made the lists worse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from recspark.data.blocks import Array

# Penalties that are tried, as shares of the sum of squares of a block: a block is scaled so that
# its rows have the mean square 1.
_PENALTIES = tuple(float(x) for x in 10.0 ** np.arange(-5, 1.5, 0.5))
OFF = float("inf")  # the penalty of a block that is left out
_SWEEPS = 3  # passes over the blocks, at most
_CHUNK_ROWS = 16_384  # rows that are converted to float64 together
_LEAST_GAIN = 1e-3  # a block must lower the error by this share to be used
# A second block, or a further one, must lower it by this many standard errors of the mean of the
# rows' differences, so that chance seldom lets noise in.
_STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class Block:
    """One block of features of all items: `values` float32 (n_items, size), `is_known` bool
    (n_items,): whether the item has the block. Rows of items without it do not count.
    """

    values: Array
    is_known: Array


@dataclass(frozen=True)
class BlockRidge:
    """A fitted regression.

    Parameters
    ----------
    penalties : block -> penalty, in the order of the blocks; `OFF` = not used
    means, scales, weights : block -> the mean of its columns (size,), the factor of the centred
        columns, and the weights float64 (size, n_targets); only of used blocks
    intercept : float64 (n_targets,)
    errors : with keys `mean` (no block is used), the name of each block (that block alone) and
        `all` (as fitted): the squared error on the validation rows, divided by that of `mean`
    """

    penalties: dict[str, float]
    means: dict[str, Array]
    scales: dict[str, float]
    weights: dict[str, Array]
    intercept: Array
    errors: dict[str, float]

    def predict(self, blocks: Mapping[str, Block]) -> Array:
        """Return the targets of all items, float32 (n_items, n_targets).

        A block that an item lacks counts as the mean of the block. Taken in chunks of rows.
        """
        n_items = len(next(iter(blocks.values())).values)
        out = np.empty((n_items, len(self.intercept)), np.float32)
        for begin in range(0, n_items, _CHUNK_ROWS):
            rows = slice(begin, begin + _CHUNK_ROWS)
            total = np.broadcast_to(self.intercept, (len(out[rows]), len(self.intercept))).copy()
            for name, weights in self.weights.items():
                total += _centred(blocks[name], rows, self.means[name], self.scales[name]) @ weights
            out[rows] = total
        return out


def fit_ridge(blocks: Mapping[str, Block], targets: Array, row_weights: Array) -> BlockRidge:
    """Return the regression of `targets` on all `blocks`, with the penalties of `choose_penalties`.

    Parameters
    ----------
    blocks : of the items to learn from, (n, size) each
    targets : float (n, n_targets)
    row_weights : float64 (n,): what the squared error of each row counts; negative = the row is for
        validation, and counts its absolute value there. The penalties are chosen without the
        validation rows being learnt from; then all rows are learnt from

    Cost: p = all columns of all blocks. p^2 doubles (p = 2,000: 32 MB) three times, and for each
    penalty that is tried a solve of p x p.
    """
    is_held = row_weights < 0
    weights = np.abs(row_weights)
    learnt = _moments(blocks, targets, np.where(is_held, 0.0, weights))
    held = _moments(blocks, targets, np.where(is_held, weights, 0.0), like=learnt)
    held_rows = np.flatnonzero(is_held)

    def gain(now: Mapping[str, float], before: Mapping[str, float]) -> float:
        errors = [
            _row_errors(blocks, targets, held_rows, learnt, learnt.solve(p)) for p in (now, before)
        ]
        gains = weights[held_rows] * (errors[1] - errors[0])
        return _in_standard_errors(gains)

    penalties, errors = choose_penalties(learnt, held, gain)
    whole = _moments(blocks, targets, weights, like=learnt)
    solution = whole.solve(penalties)
    used = {name: whole.columns[name] for name, penalty in penalties.items() if penalty < OFF}
    return BlockRidge(
        penalties,
        {name: whole.means[name] for name in used},
        {name: whole.scales[name] for name in used},
        {name: solution[columns] for name, columns in used.items()},
        whole.target_mean + solution[-1],
        errors,
    )


@dataclass(frozen=True)
class _Moments:
    """Weighted products of the rows [scaled centred blocks, 1] and the centred targets.

    `gram` float64 (p + 1, p + 1), `cross` (p + 1, n_targets), `squares` : the weighted sum of the
    squared targets. `columns` : block -> its columns.
    """

    columns: dict[str, slice]
    means: dict[str, Array]
    scales: dict[str, float]
    target_mean: Array
    gram: Array
    cross: Array
    squares: float

    def solve(self, penalties: Mapping[str, float]) -> Array:
        """Return the weights, float64 (p + 1, n_targets); 0 for blocks that are `OFF`.

        The last row is the intercept, which is not penalised.
        """
        used = np.zeros(len(self.gram), bool)
        penalty = np.zeros(len(self.gram))
        used[-1] = True
        for name, columns in self.columns.items():
            used[columns] = penalties[name] < OFF
            penalty[columns] = penalties[name]
        rows = np.flatnonzero(used)
        system = self.gram[np.ix_(rows, rows)]
        total = self.gram[-1, -1]  # the weight of all rows
        system[np.diag_indices(len(rows))] += penalty[rows] * total + 1e-10 * total
        out = np.zeros(self.cross.shape)
        out[rows] = np.linalg.solve(system, self.cross[rows])
        return out

    def error(self, weights: Array) -> float:
        """Return the weighted squared error of `weights` on the rows of these moments."""
        fitted = float(np.sum(weights * (self.gram @ weights - 2 * self.cross)))
        return self.squares + fitted


def choose_penalties(
    learnt: _Moments,
    held: _Moments,
    gain: Callable[[Mapping[str, float], Mapping[str, float]], float],
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the penalty of each block, and the errors as in `BlockRidge.errors`.

    Greedy: the block comes in first that alone lowers the error on the validation rows most, then
    the one that lowers it most beside the first, and so on, each with its best penalty. After that,
    the penalties of all blocks are chosen again, one after the other, while that lowers the error.

    `gain` : how many standard errors the first penalties are better than the second, on the
    validation rows.
    """
    names = list(learnt.columns)

    def error_of(penalties: Mapping[str, float]) -> float:
        return held.error(learnt.solve(penalties))

    def best_of(name: str, penalties: Mapping[str, float]) -> tuple[float, float]:
        tried = [(error_of({**penalties, name: value}), value) for value in _PENALTIES]
        return min(tried)

    chosen = dict.fromkeys(names, OFF)
    mean_error = error = error_of(chosen)
    errors = {"mean": 1.0}
    candidates = {name: best_of(name, chosen) for name in names}
    scale = mean_error if mean_error > 0 else 1.0
    errors |= {name: candidate[0] / scale for name, candidate in candidates.items()}
    while candidates:
        name = min(candidates, key=lambda n: candidates[n][0])
        best_error, penalty = candidates[name]
        if not best_error < (1 - _LEAST_GAIN) * error:
            break
        is_first = all(value == OFF for value in chosen.values())
        with_block = {**chosen, name: penalty}
        if not is_first and gain(with_block, chosen) < _STANDARD_ERRORS:
            del candidates[name]
            continue
        error, chosen = best_error, with_block
        candidates = {other: best_of(other, chosen) for other in candidates if other != name}
    for _ in range(_SWEEPS):
        error_before = error
        for name in names:
            if chosen[name] < OFF:
                error, chosen[name] = best_of(name, chosen)
        if not error < (1 - _LEAST_GAIN) * error_before:
            break
    errors["all"] = error / scale
    return chosen, errors


def _moments(
    blocks: Mapping[str, Block],
    targets: Array,
    row_weights: Array,
    like: _Moments | None = None,
) -> _Moments:
    """Return the moments of the rows, weighted; centred and scaled as `like`, or by these rows."""
    n_rows = len(targets)
    if like is None:
        means, scales = {}, {}
        for name, block in blocks.items():
            means[name], scales[name] = _mean_and_scale(block, row_weights)
        total = row_weights.sum()
        target_mean = row_weights @ targets.astype(np.float64) / max(total, 1e-300)
        starts = np.cumsum([0, *(block.values.shape[1] for block in blocks.values())])
        columns = {
            name: slice(int(begin), int(end))
            for name, begin, end in zip(blocks, starts[:-1], starts[1:], strict=True)
        }
    else:
        means, scales, target_mean = like.means, like.scales, like.target_mean
        columns = like.columns
    n_columns = max((columns[name].stop for name in columns), default=0) + 1
    gram = np.zeros((n_columns, n_columns))
    cross = np.zeros((n_columns, targets.shape[1]))
    squares = 0.0
    for begin in range(0, n_rows, _CHUNK_ROWS):
        rows = slice(begin, begin + _CHUNK_ROWS)
        parts = [_centred(block, rows, means[n], scales[n]) for n, block in blocks.items()]
        weight = row_weights[rows, None]
        x = np.concatenate([*parts, np.ones((len(weight), 1))], axis=1)
        y = targets[rows].astype(np.float64) - target_mean
        gram += x.T @ (weight * x)
        cross += x.T @ (weight * y)
        squares += float(np.sum(weight * y**2))
    return _Moments(columns, means, scales, target_mean, gram, cross, squares)


def _row_errors(
    blocks: Mapping[str, Block], targets: Array, rows: Array, like: _Moments, weights: Array
) -> Array:
    """Return the squared error of each of `rows`, float64, with the solution `weights`."""
    out = np.empty(len(rows))
    for begin in range(0, len(rows), _CHUNK_ROWS):
        chunk = rows[begin : begin + _CHUNK_ROWS]
        predicted = like.target_mean + weights[-1]
        for name, block in blocks.items():
            part = Block(block.values[chunk], block.is_known[chunk])
            centred = _centred(part, slice(None), like.means[name], like.scales[name])
            predicted = predicted + centred @ weights[like.columns[name]]
        out[begin : begin + _CHUNK_ROWS] = np.square(targets[chunk] - predicted).sum(axis=1)
    return out


def _in_standard_errors(values: Array) -> float:
    """Return the mean of `values`, divided by its standard error; 0 for fewer than two values.

    >>> round(_in_standard_errors(np.array([1.0, 2.0, 3.0])), 3)
    3.464
    """
    if len(values) < 2:
        return 0.0
    spread = float(values.std(ddof=1)) / np.sqrt(len(values))
    return float(values.mean()) / spread if spread > 0 else 0.0


def _mean_and_scale(block: Block, row_weights: Array) -> tuple[Array, float]:
    """Return the mean of the columns over the known rows, and 1 / the root mean square of a row."""
    weight = row_weights * block.is_known
    total = weight.sum()
    size = block.values.shape[1]
    if total == 0:
        return np.zeros(size), 0.0
    mean, square = np.zeros(size), 0.0
    for begin in range(0, len(weight), _CHUNK_ROWS):
        rows = slice(begin, begin + _CHUNK_ROWS)
        mean += weight[rows] @ block.values[rows].astype(np.float64)
    mean /= total
    for begin in range(0, len(weight), _CHUNK_ROWS):
        rows = slice(begin, begin + _CHUNK_ROWS)
        square += float(weight[rows] @ ((block.values[rows] - mean) ** 2).sum(axis=1))
    return mean, 0.0 if square <= 1e-12 * total else float(np.sqrt(total / square))


def _centred(block: Block, rows: slice, mean: Array, scale: float) -> Array:
    return np.where(block.is_known[rows, None], (block.values[rows] - mean) * scale, 0.0)
