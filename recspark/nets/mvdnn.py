"""One user tower for all views, and an item tower for each view.

Source: Elkahky, Song, He 2015, "A Multi-View Deep Learning Approach for Cross Domain User Modeling
in Recommendation Systems"; the towers are those of Huang et al. 2013 (DSSM).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from recspark.nets.sequence import matrix


@dataclass(frozen=True)
class Bags:
    """The tokens of N items: item n has `codes[starts[n]:]`, up to where the next item starts.

    `starts` int64 (N,), `codes` int64 (M,), `weights` (M,): what each token counts.
    """

    starts: torch.Tensor
    codes: torch.Tensor
    weights: torch.Tensor


class MvdnnNet(nn.Module):
    """A user tower of tanh units, and one of the same shape for the items of each view.

    The user tower reads, for each view, the mean vector of the items that the user acted on in the
    view, whether there are any, and how many. An item tower reads the tokens of an item; the first
    layer has a vector for each of `n_buckets` codes of tokens, and each view has its own vectors.
    The score of an item is the cosine of the two results, divided by a temperature.

    With `sparse`, the gradients of the vectors of items and tokens hold only the rows that a step
    reads, see `recspark.train.parameters`.
    """

    def __init__(
        self,
        n_items: int,
        n_views: int,
        embedding_size: int,
        n_buckets: int,
        hidden_sizes: Sequence[int],
        generator: torch.Generator,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self.sparse_parameters = frozenset({"items_in", "tokens"} if sparse else ())
        # How many users have a target in each view; not trained. 0 = the view learns nothing.
        self.view_users = nn.Parameter(torch.zeros(n_views), requires_grad=False)
        self.n_buckets, self.n_layers = n_buckets, len(hidden_sizes)
        self.items_in = matrix(generator, n_items, embedding_size)
        # Row v * n_buckets + c is the vector of the code c in the view v.
        self.tokens = matrix(generator, n_views * n_buckets, hidden_sizes[0])
        self.items_1_bias = nn.Parameter(torch.zeros(n_views, hidden_sizes[0]))
        self.users_1 = _layer(generator, n_views * (embedding_size + 2), hidden_sizes[0])
        self.users_1_bias = nn.Parameter(torch.zeros(hidden_sizes[0]))
        for k in range(2, self.n_layers + 1):
            shape = hidden_sizes[k - 2], hidden_sizes[k - 1]
            self.register_parameter(f"users_{k}", _layer(generator, *shape))
            self.register_parameter(f"users_{k}_bias", nn.Parameter(torch.zeros(shape[1])))
            self.register_parameter(f"items_{k}", _layer(generator, n_views, *shape))
            self.register_parameter(f"items_{k}_bias", nn.Parameter(torch.zeros(n_views, shape[1])))

    def read(self, items: torch.Tensor) -> torch.Tensor:
        """Return the vectors, (..., E), of `items` int64 (...) as the user tower reads them."""
        is_sparse = "items_in" in self.sparse_parameters
        return functional.embedding(items, self.items_in, sparse=is_sparse)

    def users(self, means: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Return the vectors of length 1 of P users, (P, H).

        `means` (P, V, E): the mean vector of the items in each view. `numbers` (P, V, 2): whether
        there are any, and how many.
        """
        hidden = torch.cat([means, numbers], dim=2).flatten(1)  # (P, V * (E + 2))
        hidden = hidden @ self.users_1 + self.users_1_bias  # (P, H1)
        for k in range(2, self.n_layers + 1):
            weights, bias = self.get_parameter(f"users_{k}"), self.get_parameter(f"users_{k}_bias")
            hidden = torch.tanh(hidden) @ weights + bias  # (P, Hk)
        return functional.normalize(hidden, dim=1)

    def items(self, view: int, bags: Bags) -> torch.Tensor:
        """Return the vectors of length 1 of N items by the tower of a view, (N, H)."""
        hidden = functional.embedding_bag(
            bags.codes + view * self.n_buckets,
            self.tokens,
            bags.starts,
            mode="sum",
            per_sample_weights=bags.weights.to(self.tokens.dtype),
            sparse="tokens" in self.sparse_parameters,
        )  # (N, H1)
        hidden = hidden + self.items_1_bias[view]  # (N, H1)
        for k in range(2, self.n_layers + 1):
            weights, bias = self.get_parameter(f"items_{k}"), self.get_parameter(f"items_{k}_bias")
            hidden = torch.tanh(hidden) @ weights[view] + bias[view]  # (N, Hk)
        return functional.normalize(hidden, dim=1)


class ViewHistories:
    """What B users did in V views: mean vectors of the newest items of each view before some event.

    Parameters
    ----------
    embedded : (B, L, E), the vectors of the items of each row, oldest first; padding is 0
    views : int64 (B, L), the view of each event; -1 = in no view, padding too
    n_views : V
    """

    def __init__(self, embedded: torch.Tensor, views: torch.Tensor, n_views: int) -> None:
        is_in = views == torch.arange(n_views, device=views.device)[:, None, None]  # (V, B, L)
        # Of the first 0 to L events of a row: how many are in each view, and the sum of their
        # vectors. Events of other views add zeros, so a sum never depends on what comes later.
        self._n_before = functional.pad(is_in.cumsum(dim=2), (1, 0))  # (V, B, L + 1)
        self._sums = [
            functional.pad((embedded * mine[:, :, None]).cumsum(dim=1), (0, 0, 1, 0))
            for mine in is_in
        ]  # (B, L + 1, E) of each view

    def before(
        self, rows: torch.Tensor, ends: torch.Tensor, window: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean vectors (P, V, E), and how many events they are of, int64 (P, V).

        Example p reads the newest `window` events of each view among the first `ends[p]` events of
        the row `rows[p]`; both int64 (P,). The mean of no event is 0.
        """
        means, numbers = [], []
        for n_before_of_rows, sums in zip(self._n_before, self._sums, strict=True):
            n_before = n_before_of_rows[rows]  # (P, L + 1), never falling
            n_in_view = n_before.gather(1, ends[:, None])  # (P, 1)
            n_read = n_in_view.clamp_max(window)  # (P, 1)
            first = torch.searchsorted(n_before, n_in_view - n_read)[:, 0]  # (P,)
            total = sums[rows, ends] - sums[rows, first]  # (P, E)
            means.append(total / n_read.clamp_min(1))
            numbers.append(n_read[:, 0])
        return torch.stack(means, dim=1), torch.stack(numbers, dim=1)


def _layer(generator: torch.Generator, *shape: int) -> nn.Parameter:
    """Return weights (..., n_in, n_out), drawn uniformly within +-sqrt(6 / (n_in + n_out)).

    Source: Glorot and Bengio 2010, of tanh units; Huang et al. 2013 draw theirs so too.
    """
    bound = (6 / (shape[-2] + shape[-1])) ** 0.5
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound, generator=generator))
