"""The compiled half-step against the normal equations written out in numpy, float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from recspark.data.blocks import Array
from recspark.engines.als_kernels import Method, eigenbasis, fold_in, fold_in_parts, solve
from recspark.engines.als_objective import Objective, gramian, loss

OBJECTIVES = [
    Objective(0.3, 2.0),
    Objective(0.3, 2.0, reg_exponent=0.0),
    Objective(0.3, 2.0, reg_exponent=0.5),
    Objective(0.02, 2.0, unobserved_weight=0.3, reg_exponent=0.5, reg_counts="all"),
    Objective(0.3, 2.0, unobserved_weight=4.0),  # an unobserved pair may weigh more
    Objective(0.3, feedback="explicit"),
    Objective(0.3, reg_exponent=0.0, feedback="explicit"),
]
LENGTHS = np.array([1, 0, 2, 3, 4, 5, 30, 17])


def rows(
    seed: int, lengths: Array = LENGTHS, n_others: int = 30, *, signed: bool = False
) -> tuple[Array, Array, Array]:
    """Random entries: (start, at, weight)."""
    rng = np.random.default_rng(seed)
    at = [np.sort(rng.choice(n_others, n, replace=False)) for n in lengths]
    start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    weight = rng.uniform(0.1, 3, start[-1]).astype(np.float32)
    if signed:
        weight *= rng.choice([-1, 1], len(weight)).astype(np.float32)
    return start, np.concatenate(at).astype(np.int32), weight


def factors(seed: int, n: int, size: int) -> Array:
    return np.random.default_rng(seed).standard_normal((n, size)).astype(np.float32)


def brute_loss(
    start: Array, at: Array, weight: Array, x: Array, y: Array, objective: Objective
) -> float:
    """The loss by its definition, over a dense matrix of all pairs."""
    n, m = len(x), len(y)
    w, seen = np.zeros((n, m)), np.zeros((n, m), bool)
    row = np.repeat(np.arange(n), np.diff(start))
    w[row, at], seen[row, at] = weight, True
    if objective.feedback == "implicit":
        confidence = np.where(seen, 1 + objective.alpha * abs(w), objective.unobserved_weight)
        target, counted = (w > 0).astype(float), w > 0
    else:
        confidence, target, counted = seen.astype(float), w, seen
    total = (confidence * (target - x.astype(float) @ y.astype(float).T) ** 2).sum()
    for side, others, counts in ((x, m, counted.sum(1)), (y, n, counted.sum(0))):
        if objective.reg_counts == "all":
            counts = counts + objective.unobserved_weight * others
        scale = objective.reg * counts.astype(float) ** objective.reg_exponent
        total += (scale * (side.astype(float) ** 2).sum(1)).sum()
    return float(total)


def closed_form(start: Array, at: Array, weight: Array, y: Array, objective: Objective) -> Array:
    """Each row's minimum by the normal equations with a full confidence matrix."""
    m, size = y.shape
    wide = y.astype(float)
    out = np.zeros((len(start) - 1, size))
    for row in range(len(out)):
        mine = slice(start[row], start[row + 1])
        near, w = at[mine], weight[mine].astype(float)
        if len(near) == 0:
            continue
        counted = np.sum(w > 0)
        if objective.feedback == "implicit":
            confidence, target = np.full(m, objective.unobserved_weight), np.zeros(m)
            confidence[near], target[near] = 1 + objective.alpha * abs(w), w > 0
        else:
            confidence, target = np.zeros(m), np.zeros(m)
            confidence[near], target[near], counted = 1, w, len(w)
        if objective.reg_counts == "all":
            counted = counted + objective.unobserved_weight * m
        left = wide.T @ np.diag(confidence) @ wide
        left += objective.reg * float(counted) ** objective.reg_exponent * np.eye(size)
        out[row] = np.linalg.solve(left, wide.T @ (confidence * target))
    return out


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("size", [5, 8])
def test_both_methods_reach_the_closed_form(objective: Objective, size: int) -> None:
    y = factors(1, 30, size)
    start, at, weight = rows(2, signed=objective.feedback == "implicit")
    if (objective.reg_exponent, objective.reg_counts) == (1.0, "observed"):
        weight[:3] = abs(weight[:3])  # a row with no weight above 0 would have no penalty
    expected = closed_form(start, at, weight, y, objective)
    exact = fold_in(start, at, weight, y, objective)
    assert np.allclose(exact, expected, rtol=1e-5, atol=1e-6)
    gram, basis = eigenbasis(gramian(y))
    steps = factors(3, len(LENGTHS), size)
    solve(start, at, weight, y @ basis, gram, objective, 30, steps, "cg", cg_steps=4 * size)
    assert np.allclose(steps @ basis.T, expected, rtol=1e-3, atol=1e-3)


def test_four_steps_come_close() -> None:
    """The diagonal of A is worth its cost: without it the same steps leave four times the error."""
    y = factors(1, 300, 32) * np.linspace(0.1, 2, 32, dtype=np.float32)
    start, at, weight = rows(2, np.full(40, 25), 300)
    objective = Objective(0.1, 5.0)
    exact = fold_in(start, at, weight, y, objective)
    gram, basis = eigenbasis(gramian(y))
    x = np.zeros((40, 32), np.float32)
    solve(start, at, weight, y @ basis, gram, objective, 300, x, "cg", 4)
    error = np.linalg.norm(x @ basis.T - exact) / np.linalg.norm(exact)
    assert error < 0.02


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_loss_is_that_of_all_pairs(objective: Objective) -> None:
    x, y = factors(1, len(LENGTHS), 6), factors(2, 30, 6)
    start, at, weight = rows(3, signed=objective.feedback == "implicit")
    expected = brute_loss(start, at, weight, x, y, objective)
    assert loss(start, at, weight, x, y, objective) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("method", ["cg", "cholesky"])
def test_the_solver_reports_the_loss(objective: Objective, method: str) -> None:
    """Its objective and the other side's penalty are the loss; one step of cg is not the minimum."""
    x, y = factors(1, len(LENGTHS), 6), factors(2, 30, 6)
    gram, basis = eigenbasis(gramian(y))
    y = y @ basis
    start, at, weight = rows(3)
    reported, penalty = solve(start, at, weight, y, gram, objective, 30, x, method, 1)  # type: ignore[arg-type]
    nothing = replace(objective, reg=1e-12)
    whole = brute_loss(start, at, weight, x, y, objective)
    data = brute_loss(start, at, weight, x, y, nothing)
    others = brute_loss(start, at, weight, np.zeros_like(x), y, objective) - brute_loss(
        start, at, weight, np.zeros_like(x), y, nothing
    )
    assert reported + others == pytest.approx(whole, rel=1e-5)
    assert penalty == pytest.approx(whole - data - others, rel=1e-5)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_four_steps_keep_up_with_exact_solves(seed: int) -> None:
    """Ten iterations from one start: the loss of cg is within 0.1 % of that of Cholesky."""
    objective, size = Objective(0.05, 5.0), 16
    rng = np.random.default_rng(seed)
    near = rng.random((600, 200)) < np.where(np.arange(200) % 5 == np.arange(600)[:, None] % 5, 0.3, 0.02)  # fmt: skip
    users = sparse.csr_matrix(near * rng.integers(1, 4, near.shape).astype(np.float32))
    items = users.T.tocsr()
    items.sort_indices()

    def half_step(rows: sparse.csr_matrix, others: Array, x: Array, method: Method) -> Array:
        gram, basis = eigenbasis(gramian(others))
        x = x @ basis
        start = rows.indptr.astype(np.int64)
        solve(start, rows.indices, rows.data, others @ basis, gram, objective, len(others), x, method)  # fmt: skip
        return x @ basis.T

    found = {}
    for method in ("cg", "cholesky"):
        x, y = factors(seed, 600, size), np.zeros((200, size), np.float32)
        for _ in range(10):
            y = half_step(items, x, y, method)
            x = half_step(users, y, x, method)
        start = users.indptr.astype(np.int64)
        found[method] = loss(start, users.indices, users.data, x, y, objective)
    assert found["cg"] == pytest.approx(found["cholesky"], rel=1e-3)


def test_a_step_of_cg_never_raises_the_loss() -> None:
    objective = Objective(0.1, 10.0)
    gram, basis = eigenbasis(gramian(factors(1, 30, 6)))
    y = factors(1, 30, 6) @ basis
    start, at, weight = rows(2)
    x = factors(4, len(LENGTHS), 6)
    seen = [solve(start, at, weight, y, gram, objective, 30, x, "cg", 1)[0] for _ in range(12)]
    assert (np.diff(seen) <= 1e-6 * abs(seen[0])).all()
    assert seen[-1] < 0.9 * seen[0]


def test_fold_in_does_not_depend_on_the_block() -> None:
    rng = np.random.default_rng(1)
    y = factors(1, 300, 16)
    lengths = rng.integers(0, 200, 64)
    start, at, weight = rows(5, lengths, 300)
    objective = Objective(0.1, 10.0)
    whole = fold_in(start, at, weight, y, objective)
    for row in range(64):
        part = slice(start[row], start[row + 1])
        alone = fold_in(np.array([0, lengths[row]]), at[part], weight[part], y, objective)
        assert np.array_equal(alone[0], whole[row])


def test_items_fold_in_by_the_same_solve() -> None:
    """New items given users: the transposed problem."""
    users = factors(1, 20, 4)
    start, at, weight = rows(7, np.array([3, 8]), 20)
    objective = Objective(0.2, 3.0, reg_exponent=0.5)
    expected = closed_form(start, at, weight, users, objective)
    assert np.allclose(fold_in(start, at, weight, users, objective), expected, rtol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_prior_draws_rows_to_it(objective: Objective) -> None:
    """(A, b + penalty prior) by numpy, an empty row too; the objective is that of |x - prior|^2."""
    start, at, weight = rows(5)
    y, prior = factors(6, 30, 4), factors(7, len(LENGTHS), 4)
    gram = gramian(y)
    x = np.zeros_like(prior)
    value, penalty = solve(start, at, weight, y, gram, objective, 30, x, "cholesky", prior=prior)
    penalties = np.maximum(objective.penalties(start, weight, 30), 0)
    confidence, target = objective.confidences(weight)
    base = objective.unobserved_weight if objective.implicit else 0.0
    want = 0.0
    for row in np.flatnonzero((LENGTHS > 0) | (penalties > 0)):
        mine = slice(start[row], start[row + 1])
        z, c, p = y[at[mine]].astype(float), confidence[mine], target[mine]
        a = base * gram + z.T @ ((c - base)[:, None] * z) + penalties[row] * np.eye(4)
        b = z.T @ (c * p) + penalties[row] * prior[row]
        np.testing.assert_allclose(x[row], np.linalg.solve(a, b), rtol=1e-3, atol=1e-4)
        off = x[row].astype(float) - prior[row]
        unseen = np.delete(y.astype(float), at[mine], axis=0) @ x[row]
        want += (c * (p - z @ x[row]) ** 2).sum() + base * (unseen**2).sum()
        want += penalties[row] * off @ off
    if objective.reg_exponent == 0 or objective.reg_counts == "all":
        assert value == pytest.approx(want, rel=1e-4)
        assert penalty > 0
    with pytest.raises(ValueError, match="cholesky"):
        solve(start, at, weight, y, gram, objective, 30, x, "cg", prior=prior)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_parts_of_scores_against_the_inverse(objective: Objective) -> None:
    """c_j p_j y_i^T W y_j, with W inverted by numpy; their sum is the score of the folded-in row."""
    start, at, weight = rows(8, signed=objective.feedback == "explicit")
    y = factors(9, 30, 7)
    row = np.array([0, 0, 2, 4, 6, 6, 6, 7])  # rows without pairs, and a row without entries
    other = np.array([3, 29, 3, 0, 11, 11, 5, 29])
    parts = fold_in_parts(start, at, weight, y, objective, row, other, gramian(y))
    penalties = objective.penalties(start, weight, len(y))
    confidence, target = objective.confidences(weight)
    y = y.astype(np.float64)
    alpha_0 = objective.unobserved_weight if objective.implicit else 0.0
    expected = []
    for r, i in zip(row, other, strict=True):
        entries = slice(start[r], start[r + 1])
        y_r = y[at[entries]]
        a = alpha_0 * y.T @ y + penalties[r] * np.eye(7)
        a += (y_r * (confidence[entries] - alpha_0)[:, None]).T @ y_r
        expected.append(confidence[entries] * target[entries] * (y_r @ np.linalg.inv(a) @ y[i]))
    np.testing.assert_allclose(parts, np.concatenate(expected), rtol=1e-8, atol=1e-12)
    users = fold_in(start, at, weight, y.astype(np.float32), objective)
    scores = np.einsum("pd,pd->p", users[row].astype(np.float64), y[other])
    sums = [part.sum() for part in np.split(parts, np.cumsum([len(e) for e in expected])[:-1])]
    np.testing.assert_allclose(sums, scores, rtol=1e-4, atol=1e-5)
