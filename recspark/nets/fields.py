"""What networks that read fields share: an embedding of codes, and a tower of ReLU layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

# Standard deviation of the first embeddings, as in FuxiCTR. A code that is in no training row, such
# as that of an unknown value, stays so close to 0 that it says nothing.
_EMBEDDING_STD = 1e-4


def embedding_table(n_codes: int, size: int, generator: torch.Generator) -> nn.Parameter:
    """Return the first embeddings of all codes, (n_codes, size)."""
    values = torch.empty(n_codes, size)
    return nn.Parameter(nn.init.normal_(values, std=_EMBEDDING_STD, generator=generator))


class Tower(nn.Module):
    """Layers of ReLU units, and one linear output.

    A layer is a linear map, then batch normalisation (optional), ReLU and dropout. Layer k, from 1,
    has the parameters `layer_k` (n_in, n_out) and `layer_k_bias`, and with batch normalisation the
    module `norm_k`. The output has `out` (n_in, 1) and `out_bias` (1,).
    """

    def __init__(
        self,
        n_inputs: int,
        sizes: Sequence[int],
        generator: torch.Generator,
        *,
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.depth, self.dropout = len(sizes), dropout
        n_in = n_inputs
        for k, n_out in enumerate(sizes, 1):
            self._linear(f"layer_{k}", n_in, n_out, generator)
            if batch_norm:
                self.add_module(f"norm_{k}", nn.BatchNorm1d(n_out))
            n_in = n_out
        self._linear("out", n_in, 1, generator)

    def _linear(self, name: str, n_in: int, n_out: int, generator: torch.Generator) -> None:
        values = nn.init.xavier_normal_(torch.empty(n_in, n_out), generator=generator)
        self.register_parameter(name, nn.Parameter(values))
        self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(n_out)))

    def forward(self, inputs: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """Return the output, (B,).

        `inputs` (B, n_inputs); `added` (B, H1) is added to layer 1 before its normalisation.
        """
        hidden = inputs  # (B, n_inputs)
        for k in range(1, self.depth + 1):
            hidden = hidden @ getattr(self, f"layer_{k}") + getattr(self, f"layer_{k}_bias")
            if k == 1 and added is not None:
                hidden = hidden + added  # (B, H1)
            norm = getattr(self, f"norm_{k}", None)
            if norm is not None:
                hidden = norm(hidden)  # (B, Hk)
            hidden = F.dropout(torch.relu(hidden), self.dropout, self.training)  # (B, Hk)
        output = hidden @ self.get_parameter("out") + self.get_parameter("out_bias")  # (B, 1)
        return output[:, 0]  # (B,)

    def arrays(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the tower as it is after training, by name.

        A batch normalisation is then a scale and a shift of each unit, `layer_k_scale` and
        `layer_k_shift`, which follow the linear map.
        """
        tensors = {
            name: value.detach() for name, value in self.named_parameters() if "norm" not in name
        }
        for k in range(1, self.depth + 1):
            norm = getattr(self, f"norm_{k}", None)
            if norm is not None:
                scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)  # (Hk,)
                tensors[f"layer_{k}_scale"] = scale.detach()
                tensors[f"layer_{k}_shift"] = (norm.bias - norm.running_mean * scale).detach()
        return tensors


def number_inputs(positions: torch.Tensor, powers: Sequence[float] = (1.0,)) -> torch.Tensor:
    """Return what a tower reads of numbers, (B, n_numbers * (len(powers) + 1)).

    `positions` (B, n_numbers) in [0, 1], NaN = missing. Each number gives its position to each of
    the `powers`, 0 where it is missing, and whether it is missing.
    """
    is_missing = torch.isnan(positions)  # (B, n_numbers)
    present = torch.where(is_missing, 0, positions)  # (B, n_numbers)
    parts = [present if power == 1 else present**power for power in powers]  # (B, n_numbers) each
    return torch.cat([*parts, is_missing.to(positions.dtype)], dim=1)
