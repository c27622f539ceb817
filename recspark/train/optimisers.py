"""Optimisers, which move parameters at each step: Adam, Adagrad, SGD and FTRL.

Each optimiser has its own learning rate. Adagrad and SGD call torch's functions. torch's optimiser
objects are not used, because they import torch's entire compiler, which takes several seconds of
two cores on every rank of every training. Adam is written out here, so that the models trained by
it keep their bits. FTRL is written out because torch does not have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch.nn import functional
from torch.optim.adagrad import adagrad
from torch.optim.sgd import sgd

Slots = Mapping[
    str, torch.Tensor
]  # what an optimiser remembers, by name; shapes are those of the weights


class Optimiser(Protocol):
    """Moves weights against their gradient.

    Each number is moved independently of all others. So a step can move only those rows of an
    embedding table that it read.

    An optimiser object holds settings only. What it remembers from step to step is in its slots
    (tensors), which the training keeps, writes to checkpoints and passes to each call.
    """

    def start(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the slots of `weights` before the first step, by name. Most slots start at 0."""

    def move(
        self,
        step: int,
        n_steps: int,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        slots: Slots,
    ) -> None:
        """Change `weights` and `slots` in place. `gradient` has the shape of `weights`.

        `gradient` may be overwritten, so do not use it afterwards.

        `step` counts from 0 to `n_steps` - 1, over the whole training.
        """

    def move_rows(
        self,
        step: int,
        n_steps: int,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        slots: Slots,
    ) -> None:
        """Do what `move` does for the u rows of a table that a step touched, (u, d) each."""
        self.move(step, n_steps, weights, gradient, slots)


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step, as a share of the optimiser's `learning_rate`.

    Parameters
    ----------
    after : how the rate changes after the warmup. `linear`: it falls in a straight line, and would
        be 0 one step after the last; `constant`: it stays at the full rate
    warmup : share of all steps, in [0, 1), during which the rate rises in equal parts to the full
        rate. Source: Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 2.2
    """

    after: Literal["linear", "constant"] = "linear"
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the steps in [0, 1), not {self.warmup}")

    def share(self, step: int, n_steps: int) -> float:
        """Return the share of the learning rate at `step` (from 0) of `n_steps`, in (0, 1].

        >>> [Schedule(warmup=0.5).share(step, 4) for step in range(4)]
        [0.5, 1.0, 1.0, 0.5]
        """
        n_warmup_steps = round(self.warmup * n_steps)
        if step < n_warmup_steps:
            return (step + 1) / n_warmup_steps
        if self.after == "constant":
            return 1.0
        return 1 - (step - n_warmup_steps) / (n_steps - n_warmup_steps)


@dataclass(frozen=True)
class Adam(Optimiser):
    """Adam: running means of the gradient and of its square (Kingma & Ba 2015, algorithm 1).

    A row of a table moves only in steps that give it a gradient, by the formulas of all other
    weights. This is the lazy variant, as in `torch.optim.SparseAdam`.

    Parameters
    ----------
    learning_rate : full rate, at the top of the schedule
    weight_decay : this times the weight is added to the weight's gradient; in tables, only for the
        rows that a step touched
    """

    learning_rate: float
    weight_decay: float = 0.0
    schedule: Schedule = Schedule()

    BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # as the paper sets them

    def start(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `Optimiser`."""
        return {"mean": torch.zeros_like(weights), "square": torch.zeros_like(weights)}

    def move(
        self,
        step: int,
        n_steps: int,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        slots: Slots,
    ) -> None:
        """See `Optimiser`. The paper's efficient order (section 2) copies only one vector."""
        rate, epsilon = self._corrected_rate_and_epsilon(step, n_steps)
        mean, square = slots["mean"], slots["square"]
        if self.weight_decay:
            gradient.add_(weights, alpha=self.weight_decay)
        mean.lerp_(gradient, 1 - self.BETA1)
        square.mul_(self.BETA2).addcmul_(gradient, gradient, value=1 - self.BETA2)
        weights.addcdiv_(mean, square.sqrt().add_(epsilon), value=-rate)

    def move_rows(
        self,
        step: int,
        n_steps: int,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        slots: Slots,
    ) -> None:
        """See `Optimiser`.

        The formulas are those of `move`. They are computed in another order, which keeps the last
        bits of models trained with tables as they have always been.
        """
        rate, epsilon = self._corrected_rate_and_epsilon(step, n_steps)
        mean, square = slots["mean"], slots["square"]
        if self.weight_decay:
            gradient = gradient + self.weight_decay * weights
        mean.lerp_(gradient, 1 - self.BETA1)
        square.copy_(self.BETA2 * square + (1 - self.BETA2) * gradient**2)
        weights.sub_(rate * mean / (square.sqrt() + epsilon))

    def _corrected_rate_and_epsilon(self, step: int, n_steps: int) -> tuple[float, float]:
        """Return rate and epsilon, both corrected for running means that started at 0."""
        step_number = step + 1
        square_correction = (1 - self.BETA2**step_number) ** 0.5
        rate = self.learning_rate * self.schedule.share(step, n_steps)
        return rate * (
            square_correction / (1 - self.BETA1**step_number)
        ), self.EPSILON * square_correction


@dataclass(frozen=True)
class Adagrad(Optimiser):
    """Adagrad: the rate of a weight falls as the sum of its squared gradients grows.

    So rows that a training rarely touches keep a large rate.

    Source: Duchi, Hazan, Singer 2011, "Adaptive Subgradient Methods", the diagonal form.

    Parameters
    ----------
    learning_rate : full rate, at the top of the schedule
    weight_decay : this times the weight is added to the weight's gradient; in tables, only for the
        rows that a step touched
    schedule : constant by default, since the sums of squares already make the rate fall
    """

    learning_rate: float
    weight_decay: float = 0.0
    schedule: Schedule = Schedule("constant")

    EPSILON = 1e-10  # the default of torch

    def start(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `Optimiser`."""
        return {"squares": torch.zeros_like(weights)}

    def move(
        self,
        step: int,
        n_steps: int,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        slots: Slots,
    ) -> None:
        """See `Optimiser`."""
        adagrad(
            [weights],
            [gradient],
            [slots["squares"]],
            [torch.tensor(float(step))],
            foreach=False,
            lr=self.learning_rate * self.schedule.share(step, n_steps),
            weight_decay=self.weight_decay,
            lr_decay=0.0,
            eps=self.EPSILON,
            maximize=False,
        )


@dataclass(frozen=True)
class Sgd(Optimiser):
    """Stochastic gradient descent: a step is the rate times the gradient.

    With momentum a step is the rate times a running sum of gradients.

    Parameters
    ----------
    learning_rate : full rate, at the top of the schedule
    momentum : share of the running sum that a step keeps; 0 = no running sum. A row of a table
        keeps its sum unchanged until a step touches the row again
    weight_decay : this times the weight is added to the weight's gradient; in tables, only for the
        rows that a step touched
    """

    learning_rate: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: Schedule = Schedule()

    def start(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `Optimiser`."""
        return {"velocity": torch.zeros_like(weights)} if self.momentum else {}

    def move(
        self,
        step: int,
        n_steps: int,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        slots: Slots,
    ) -> None:
        """See `Optimiser`."""
        sgd(
            [weights],
            [gradient],
            [slots.get("velocity") if self.momentum else None],
            foreach=False,
            fused=False,
            lr=self.learning_rate * self.schedule.share(step, n_steps),
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


@dataclass(frozen=True)
class Ftrl(Optimiser):
    """FTRL-Proximal: the rates of Adagrad, and weights that are exactly 0 unless the data insist.

    Use it for the wide part of a network, which has a weight for each crossed feature, most of
    which should not be there.

    A weight follows from its slots alone. With z and the sum of squared gradients n, the weight is
    0 where |z| <= l1, else -(z - sign(z) l1) / ((beta + sqrt n) / alpha + l2). There is no
    schedule, because this form holds for a fixed alpha; the growing n makes the rate of a weight
    fall. There is no weight decay beside l2.

    Source: McMahan et al. 2013, "Ad Click Prediction: a View from the Trenches", algorithm 1. The
    paper starts with weights of 0. Here other weights are possible: z starts at the value that
    gives them.

    Parameters
    ----------
    alpha : about twice the learning rate that is best for plain gradient steps (the paper)
    beta : added to sqrt(n): 1 is "usually good enough" (the paper)
    l1, l2 : penalties on |w| and on w^2 / 2. They apply once to all steps together, not to each
        step. A step's gradient is the mean over its rows, so the more steps there are, the less
        they matter
    """

    alpha: float
    beta: float = 1.0
    l1: float = 0.0
    l2: float = 0.0

    def start(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `Optimiser`."""
        z = -weights * (self.beta / self.alpha + self.l2) - weights.sign() * self.l1
        return {"z": z, "squares": torch.zeros_like(weights)}

    def move(
        self,
        step: int,
        n_steps: int,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        slots: Slots,
    ) -> None:
        """See `Optimiser`."""
        z, squares = slots["z"], slots["squares"]
        old_root = squares.sqrt()  # sqrt(n) before the step
        squares.addcmul_(gradient, gradient)
        new_root = squares.sqrt()
        z.add_(gradient - (new_root - old_root) / self.alpha * weights)
        divisor = (self.beta + new_root) / self.alpha + self.l2
        weights.copy_(functional.softshrink(-z, self.l1) / divisor)
