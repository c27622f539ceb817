"""Losses, one number per row. The loop weights the rows and adds them up over all ranks."""

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
    rows, items, weights : (P,) each: entry p says that x[rows[p], items[p]] = weights[p]; all other
        entries of x are 0

    Source: Liang et al. 2018, equation 2.
    """
    log_sum = torch.logsumexp(logits, dim=1)  # (B,)
    # -x_i log softmax(logits)_i = x_i (log_sum - logits_i)
    terms = weights * (log_sum[rows] - logits[rows, items])  # (P,)
    return torch.zeros_like(log_sum).index_add(0, rows, terms)  # (B,)


def kl_to_standard_normal(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Return KL(N(mean, diag(exp(log_variance))) || N(0, I)) of each row, (B,).

    `mean` and `log_variance` are (B, Z).

    Source: Kingma & Welling 2014, appendix B.
    """
    return -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(dim=1)  # (B,)


def softmax_nll(
    scores: torch.Tensor, targets: torch.Tensor, log_included: torch.Tensor
) -> torch.Tensor:
    """Return -log softmax(scores - log_included) of each row's target, (P,).

    This is the sampled softmax with the logQ correction.

    Parameters
    ----------
    scores : (P, N), of N different candidates
    targets : (P,) int64, the index of each row's target among the candidates
    log_included : (N,) log of the probability Q that the item is among the candidates; 0 = no
        correction, which is the plain softmax where all items are candidates

    The softmax over all items, conditioned on the candidates, subtracts log Q from every score. It
    does so for the target too, since the target could have been drawn as well.

    Source: Jean et al. 2015, "On Using Very Large Target Vocabulary for Neural Machine
    Translation"; Yi et al. 2019, "Sampling-Bias-Corrected Neural Modeling" (candidates from the
    batch).
    """
    return functional.cross_entropy(scores - log_included, targets, reduction="none")  # (P,)


def shared_softmax_nll(target: torch.Tensor, log_sum: torch.Tensor) -> torch.Tensor:
    """Return -log softmax of each row's target among the target and the other candidates, (P,).

    The result is that of `softmax_nll`. Use it where all events of a user share the other
    candidates: their scores are then summed once per user.

    Parameters
    ----------
    target : (P,) score of the target, less the log of the target's probability of being drawn
    log_sum : (P,) log of the sum of exp(score) over the other candidates, each score less the log
        of that candidate's probability of being drawn
    """
    return functional.softplus(log_sum - target)  # (P,): log(exp(target) + exp(log_sum)) - target


def bpr(target: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the mean of -log sigmoid(target - other) over the drawn items of each row, (P,).

    `target` (P,) holds scores of items acted on, `others` (P, N) scores of N items drawn for each.

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
    """Return the squared error of each row over all items, observed or not, (B,).

    It is the sum of (value - predicted)^2 over the observed items, plus `unobserved` times the sum
    of predicted^2 over the items that were not observed. A row's prediction for item i is
    hidden . items_i + bias_i.

    The sum of predicted^2 over all items is computed from the Gram matrix of the items, G = items^T
    items: sum_i (hidden . items_i + bias_i)^2 = hidden^T G hidden + 2 hidden . (items^T bias) +
    bias . bias. This costs B H^2 operations instead of B n_items H. The observed items' share of
    this sum is then subtracted again.

    Parameters
    ----------
    hidden : (B, H); items : (n_items, H); bias : (n_items,)
    predicted, values, rows : (P,) each: prediction, value and row of each observed entry
    unobserved : weight of the entries that were not observed, whose value is 0; with 0 only
        observed entries count

    Source: Sedhain et al. 2015, equation 2 (observed entries); Rendle et al. 2021, equation 2
    (entries that were not observed).
    """
    errors = (values - predicted) ** 2  # (P,)
    if unobserved:
        errors = errors - unobserved * predicted**2  # (P,)
    loss = torch.zeros_like(hidden[:, 0]).index_add(0, rows, errors)  # (B,)
    if unobserved:
        gram = items.T @ items  # (H, H)
        squares = ((hidden @ gram) * hidden).sum(dim=1)  # (B,)
        cross = 2 * hidden @ (items.T @ bias)  # (B,)
        loss = loss + unobserved * (squares + cross + bias @ bias)  # (B,)
    return loss


def gbce(
    target: torch.Tensor, others: torch.Tensor, counted: torch.Tensor, beta: float
) -> torch.Tensor:
    """Return -beta log sigmoid(r_i) - sum_j log(1 - sigmoid(r_j)) of each row, (P,).

    This is the generalised binary cross-entropy.

    Parameters
    ----------
    target : r_i (P,), scores of items acted on
    others : r_j (P, N), scores of items drawn, all with equal probability
    counted : bool (P, N), False where the drawn item j is the target i itself
    beta : see `gbce_power`; 1 = binary cross-entropy

    Source: Petrov & Macdonald 2023, "gSASRec: Reducing Overconfidence in Sequential Recommendation
    Trained with Negative Sampling", equation 12.
    """
    negative_losses = functional.softplus(others) * counted  # (P, N): -log(1 - sigmoid(r_j))
    return beta * functional.softplus(-target) + negative_losses.sum(dim=1)  # (P,)


def gbce_power(n_drawn: int, n_items: int, calibration: float) -> float:
    """Return beta of `gbce`: a (t (1 - 1 / a) + 1 / a), with a = min(1, n_drawn / (n_items - 1)).

    t is `calibration`: at 0 beta is 1, the binary cross-entropy; at 1 scores are as confident as
    with the softmax over all items. `n_drawn` items are drawn of `n_items`. Source: the paper of
    `gbce`, equation 15.

    >>> gbce_power(10, 101, 0), round(gbce_power(10, 101, 1), 9), round(gbce_power(10, 101, 0.5), 9)
    (1.0, 0.1, 0.55)
    """
    rate = min(1.0, n_drawn / (n_items - 1))
    return rate * (calibration * (1 - 1 / rate) + 1 / rate)


def bpr_max(scores: torch.Tensor, targets: torch.Tensor, reg: float) -> torch.Tensor:
    """Return -log sum_j s_j sigmoid(r_i - r_j) + reg * sum_j s_j r_j^2 of each row, (P,).

    i is the row's target; j runs over the other candidates, and s is the softmax over their scores.
    The loss is 0 where the target is the only candidate.

    Parameters
    ----------
    scores : r (P, N), of N different candidates
    targets : (P,) int64, the index of i among the candidates

    Source: Hidasi & Karatzoglou 2018, "Recurrent Neural Networks with Top-k Gains", BPR-max with
    its score regularisation.
    """
    target = scores.gather(1, targets[:, None])  # (P, 1)
    if scores.shape[1] == 1:
        return 0 * target[:, 0]  # (P,)
    others = scores.scatter(1, targets[:, None], -torch.inf)  # (P, N)
    log_share = torch.log_softmax(others, dim=1)  # (P, N), -inf at the target
    log_win = torch.logsumexp(log_share + functional.logsigmoid(target - scores), dim=1)  # (P,)
    penalty = (log_share.exp() * scores**2).sum(dim=1)  # (P,)
    return reg * penalty - log_win  # (P,)
