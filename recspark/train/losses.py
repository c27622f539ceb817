"""Losses per row: the loop weighs rows and adds them up over all ranks."""

from __future__ import annotations

import torch
from torch.nn import functional


def multinomial_nll(
    logits: torch.Tensor, rows: torch.Tensor, items: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Return -sum_i x_i log softmax(logits)_i of each row, (B,).

    Parameters
    ----------
    logits : (B, n_items)
    rows, items, weights : (P,) each: entry p says that x[rows[p], items[p]] = weights[p]; the rest
        is 0

    Source: Liang et al. 2018, equation 2.
    """
    log_sum = torch.logsumexp(logits, dim=1)  # (B,)
    terms = weights * (log_sum[rows] - logits[rows, items])  # (P,)
    return torch.zeros_like(log_sum).index_add(0, rows, terms)  # (B,)


def kl_to_standard_normal(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Return KL(N(mean, diag(exp(log_variance))) || N(0, I)) of each row, (B,); both are (B, Z).

    Source: Kingma & Welling 2014, appendix B.
    """
    return -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(dim=1)  # (B,)


def softmax_nll(
    scores: torch.Tensor, targets: torch.Tensor, log_included: torch.Tensor
) -> torch.Tensor:
    """Return -log softmax(scores - log_included) of the target, (P,): sampled softmax with logQ.

    Parameters
    ----------
    scores : (P, N), of N different candidates
    targets : (P,) int64, the target's place among them
    log_included : (N,) log probability that a candidate is among them; 0 = no correction, and the
        plain softmax where all items are candidates

    The softmax over all items conditioned on the candidates subtracts log Q from every score, the
    target's too, since the target could have been drawn as well.

    Source: Jean et al. 2015, "On Using Very Large Target Vocabulary for Neural Machine
    Translation"; Yi et al. 2019, "Sampling-Bias-Corrected Neural Modeling" (candidates from the
    batch).
    """
    return functional.cross_entropy(scores - log_included, targets, reduction="none")  # (P,)


def shared_softmax_nll(target: torch.Tensor, log_sum: torch.Tensor) -> torch.Tensor:
    """Return -log softmax of the target among itself and others whose scores are summed, (P,).

    `target` (P,) scores; `log_sum` (P,) the log of the sum of the others' exp(score), both less their
    log probability of being drawn. It is `softmax_nll`, at the cost of one sum for all events of a
    user, who share the others.
    """
    return functional.softplus(log_sum - target)  # (P,)


def bpr(target: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return -log sigmoid(target - other), the mean over the others, (P,).

    `target` (P,) are scores of items acted on, `others` (P, N) of items drawn for each of them.

    Source: Rendle, Freudenthaler, Gantner, Schmidt-Thieme 2009, section 4.1 (BPR-Opt).
    """
    return functional.softplus(others - target[:, None]).mean(dim=1)  # (P,)


def squared_over_all(
    hidden: torch.Tensor,
    items: torch.Tensor,
    bias: torch.Tensor,
    predicted: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    unobserved: float,
) -> torch.Tensor:
    """Return sum over observed (value - predicted)^2 + unobserved * sum over the rest predicted^2.

    Of each row, (B,); a row's prediction for item i is hidden . items_i + bias_i. The sum over all
    items comes from the items' Gram matrix, so that it costs B H^2 and not B n_items H.

    Parameters
    ----------
    hidden : (B, H); items : (n_items, H); bias : (n_items,)
    predicted, values, rows : (P,) each: of the observed entries
    unobserved : weight of what was not observed, whose value is 0; 0 = only what was observed counts

    Source: Sedhain et al. 2015, equation 2 (observed only); Rendle et al. 2021, equation 2 (the rest).
    """
    observed = (values - predicted) ** 2  # (P,)
    if unobserved:
        observed = observed - unobserved * predicted**2  # (P,)
    total = torch.zeros_like(hidden[:, 0]).index_add(0, rows, observed)  # (B,)
    if unobserved:
        gram = items.T @ items  # (H, H)
        squares = ((hidden @ gram) * hidden).sum(dim=1)  # (B,)
        cross = 2 * hidden @ (items.T @ bias)  # (B,)
        total = total + unobserved * (squares + cross + bias @ bias)  # (B,)
    return total


def gbce(
    target: torch.Tensor, others: torch.Tensor, counted: torch.Tensor, beta: float
) -> torch.Tensor:
    """Return -beta log sigmoid(r_i) - sum_j log(1 - sigmoid(r_j)), (P,): generalised cross-entropy.

    Parameters
    ----------
    target : r_i (P,), scores of items acted on
    others : r_j (P, N), of items drawn evenly; counted : bool (P, N), False where j is i
    beta : see `gbce_power`; 1 = binary cross-entropy

    Source: Petrov & Macdonald 2023, "gSASRec: Reducing Overconfidence in Sequential Recommendation
    Trained with Negative Sampling", equation 12.
    """
    lost = functional.softplus(others) * counted  # (P, N): -log(1 - sigmoid(r_j))
    return beta * functional.softplus(-target) + lost.sum(dim=1)  # (P,)


def gbce_power(n_drawn: int, n_items: int, calibration: float) -> float:
    """Return beta = a (t (1 - 1 / a) + 1 / a) for n_drawn items of n_items, a = n_drawn / (n - 1).

    t = `calibration`: 0 leaves binary cross-entropy (beta 1); at 1 scores are as sure as the softmax
    over all items. Source: the same paper, equation 15.

    >>> gbce_power(10, 101, 0), round(gbce_power(10, 101, 1), 9), round(gbce_power(10, 101, 0.5), 9)
    (1.0, 0.1, 0.55)
    """
    rate = min(1.0, n_drawn / (n_items - 1))
    return rate * (calibration * (1 - 1 / rate) + 1 / rate)


def bpr_max(scores: torch.Tensor, targets: torch.Tensor, reg: float) -> torch.Tensor:
    """Return -log sum_j s_j sigmoid(r_i - r_j) + reg * sum_j s_j r_j^2, (P,).

    Parameters
    ----------
    scores : r (P, N), of N different candidates; one alone is told apart from nothing: 0
    targets : (P,) int64, the place of i among them; j runs over the others, and s is their softmax

    Source: Hidasi & Karatzoglou 2018, "Recurrent Neural Networks with Top-k Gains", BPR-max with its
    score regularisation.
    """
    target = scores.gather(1, targets[:, None])  # (P, 1)
    if scores.shape[1] == 1:
        return 0 * target[:, 0]  # (P,)
    others = scores.scatter(1, targets[:, None], -torch.inf)  # (P, N)
    log_share = torch.log_softmax(others, dim=1)  # (P, N), -inf at the target
    log_wins = torch.logsumexp(log_share + functional.logsigmoid(target - scores), dim=1)  # (P,)
    penalty = (log_share.exp() * scores**2).sum(dim=1)  # (P,)
    return reg * penalty - log_wins  # (P,)
