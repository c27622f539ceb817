"""A recurrent network that reads a sound as frames of log-mel energies."""

from __future__ import annotations

import torch
from torch import nn

from recspark.train.random_numbers import torch_random


class AudioGru(nn.Module):
    """A layer of convolution over time, a GRU, and the average of its states.

    Source: the task is that of van den Oord, Dieleman, Schrauwen 2013, "Deep content-based music
    recommendation"; the recurrent layer in place of their convolutions: Cho et al. 2014.
    """

    def __init__(self, n_bands: int, hidden_size: int, size: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(n_bands, hidden_size, 5, stride=2, padding=2)
        self.gru = nn.GRU(hidden_size, hidden_size, batch_first=True)
        self.fc = nn.Linear(2 * hidden_size, size)

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return (B, size). `frames` (B, T, n_bands), of which the first `lengths` (B,) count."""
        positions = torch.arange(frames.shape[1], device=frames.device)  # (T,)
        counts = (positions < lengths[:, None])[:, :, None]  # (B, T, 1)
        frames = torch.where(counts, frames, 0)  # (B, T, n_bands)
        inputs = torch.relu(self.convolution(frames.transpose(1, 2))).transpose(1, 2)  # (B, T/2, H)
        # The state after step t depends on steps up to t only, so padding changes no kept state.
        states, _ = self.gru(inputs)  # (B, T/2, H)
        n_steps = (lengths + 1) // 2  # (B,)
        is_kept = (positions[: states.shape[1]] < n_steps[:, None])[:, :, None]  # (B, T/2, 1)
        mean = torch.where(is_kept, states, 0).sum(dim=1) / n_steps[:, None]  # (B, H)
        largest = torch.where(is_kept, states, -1).amax(dim=1)  # (B, H); a state is above -1
        vectors: torch.Tensor = self.fc(torch.cat([mean, largest], dim=1))  # (B, size)
        return vectors


def untrained_gru(n_bands: int, hidden_size: int, size: int, seed: int) -> AudioGru:
    """Return an `AudioGru` with first weights drawn from `seed`."""
    with torch_random(seed, "cpu"):
        return AudioGru(n_bands, hidden_size, size)
