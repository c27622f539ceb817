"""Settings that the models with a user tower share."""

from __future__ import annotations

from pydantic import Field

from recspark.models.neural import NeuralSettings
from recspark.models.setting_types import LearningRate


class TowerSettings(NeuralSettings):
    """How examples are drawn, how the sampled softmax is made, and how long the training is."""

    n_examples: int = Field(
        32,
        ge=1,
        description="examples that an epoch draws of each user, the same number for all; a user "
        "with fewer gives all. Each user has the same weight in the loss. Guess",
        json_schema_extra={"tune": {"choices": [16, 32, 64]}},
    )
    existing_only: bool = Field(
        True,
        description="an example's target competes only with items that had an event by then",
    )
    n_samples: int | None = Field(
        2048,
        ge=1,
        description="items drawn for a step as candidates, besides the targets of the batch; null "
        "= all items are candidates. Covington et al. 2016: several thousand",
    )
    sample_alpha: float = Field(
        0.5,
        ge=0,
        le=1,
        description="items are drawn with probability proportional to popularity^sample_alpha. "
        "Hidasi & Karatzoglou 2018: mostly 0.5",
    )
    logq: bool = Field(
        True,
        description="correct each score by the log of the probability that the item became a "
        "candidate",
    )
    sparse: bool = Field(
        False,
        description="a step moves only the vectors of the items that it reads (lazy Adam), instead "
        "of all vectors; for large catalogues. No effect where n_samples is null",
    )
    epochs: int = Field(20, ge=1, description="passes over the training set. Guess")
    batch_size: int = Field(
        64, ge=1, description="users per step, all ranks together; the ranks share them. Guess"
    )
    learning_rate: LearningRate = Field(
        2e-3,
        description="learning rate of Adam at the first step; it falls linearly to 0. Guess",
    )
    max_items: int = Field(
        500_000,
        ge=2,
        description="largest catalogue, in items. With vectors of length 64, a rank takes 1.9 GB "
        "for it, if sparse 1.0 GB, besides 1 GB for itself, of an executor of 4 GB",
    )

    @property
    def is_sparse(self) -> bool:
        """Whether gradients of item vectors are sparse; never where all items are candidates."""
        return self.sparse and self.n_samples is not None

    @property
    def numbers_of_item(self) -> int:
        """Numbers in the two vectors of an item, the one that is read and the one that scores."""
        raise NotImplementedError

    @property
    def item_bytes(self) -> int:
        """Bytes that a rank needs per item, with vectors of its own.

        A number of an item's two vectors takes 15 bytes if sparse: the number, Adam's two running
        means, and a share of the counts and of a copy at the end. Dense gradients, which are sent
        to the other ranks, take 15 bytes more. Measured: peaks of ranks with 100,000 and 300,000
        items differ by 1.8 to 1.9 kB per item if sparse, else by 3.8 kB, with 128 numbers.
        """
        return (15 if self.is_sparse else 30) * self.numbers_of_item
