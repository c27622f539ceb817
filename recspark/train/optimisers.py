"""How a step moves parameters: Adam, Adagrad, SGD and FTRL, each with a learning rate of its own.

Adagrad and SGD are torch's own functions. Its optimiser objects are not used: they import torch's
whole compiler, several seconds of two cores on every rank of every training. Adam is written out, so
that the models trained by it keep their bits; torch has no FTRL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch.nn import functional
from torch.optim.adagrad import adagrad
from torch.optim.sgd import sgd

Slots = Mapping[str, torch.Tensor]  # what an optimiser remembers, each shaped as the weights


class Optimiser(Protocol):
    """Moves weights against their gradient, each number by itself.

    So the rows of an embedding table that a step reads can be moved without the rest of the table.
    An optimiser holds settings only; what it remembers from step to step are its slots, which the
    loop keeps, checkpoints and hands back.
    """

    def start(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the slots of `weights` before the first step, by name; 0 in most."""

    def move(
        self,
        step: int,
        n_steps: int,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        slots: Slots,
    ) -> None:
        """Change `weights` and `slots` in place; `gradient`, of the same shape, is used up.

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
        """Do the same for the rows of a table that a step touched, (u, d) each."""
        self.move(step, n_steps, weights, gradient, slots)


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step, as a share of the optimiser's own.

    Parameters
    ----------
    after : `linear`, a straight fall from the top to 0 behind the last step; or `constant`
    warmup : share of all steps, in [0, 1), in which the rate first rises in equal parts to the top.
        Source: Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 2.2
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
        rising = round(self.warmup * n_steps)
        if step < rising:
            return (step + 1) / rising
        if self.after == "constant":
            return 1.0
        return 1 - (step - rising) / (n_steps - rising)


@dataclass(frozen=True)
class Adam(Optimiser):
    """Running means of the gradient and of its square (Kingma & Ba 2015, algorithm 1).

    A row of a table moves only in steps that give it a gradient, by the same formulas (the lazy
    variant, as `torch.optim.SparseAdam`).

    Parameters
    ----------
    learning_rate : at the schedule's top
    weight_decay : times the weight, added to its gradient; of tables, for the rows touched
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
        """See `Optimiser`. The paper's efficient order (section 2): no copy of a vector but one."""
        rate, epsilon = self._corrected(step, n_steps)
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
        """See `Optimiser`. Apart from `move` for the sake of rows' last bits, as they always were."""
        rate, epsilon = self._corrected(step, n_steps)
        mean, square = slots["mean"], slots["square"]
        if self.weight_decay:
            gradient = gradient + self.weight_decay * weights
        mean.lerp_(gradient, 1 - self.BETA1)
        square.copy_(self.BETA2 * square + (1 - self.BETA2) * gradient**2)
        weights.sub_(rate * mean / (square.sqrt() + epsilon))

    def _corrected(self, step: int, n_steps: int) -> tuple[float, float]:
        """Return rate and epsilon with the corrections of means that began at 0."""
        number = step + 1
        correction = (1 - self.BETA2**number) ** 0.5
        rate = self.learning_rate * self.schedule.share(step, n_steps)
        return rate * (correction / (1 - self.BETA1**number)), self.EPSILON * correction


@dataclass(frozen=True)
class Adagrad(Optimiser):
    """The rate of a weight falls with the squares of its gradients, so rare rows keep a large one.

    Source: Duchi, Hazan, Singer 2011, "Adaptive Subgradient Methods", the diagonal form.

    Parameters
    ----------
    learning_rate : at the schedule's top, which is constant unless set: the squares make it fall
    weight_decay : times the weight, added to its gradient; of tables, for the rows touched
    """

    learning_rate: float
    weight_decay: float = 0.0
    schedule: Schedule = Schedule("constant")

    EPSILON = 1e-10  # torch's

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
    """The rate times the gradient, or times a running sum of gradients.

    Parameters
    ----------
    learning_rate : at the schedule's top
    momentum : share of the running sum that a step keeps; 0 = no such sum. A row of a table keeps its
        sum until it is touched again
    weight_decay : times the weight, added to its gradient; of tables, for the rows touched
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
    """FTRL-Proximal: Adagrad's rates, and weights that are exactly 0 unless the data insist.

    For wide parts, a weight for each crossed feature, most of which should not be there. A weight
    follows from its slots alone: 0 where |z| <= l1, else -(z - sign(z) l1) / ((beta + sqrt n) / alpha
    + l2). There is no schedule, because this form holds for a fixed alpha; the squares n make rates
    fall. There is no weight decay beside l2.

    Source: McMahan et al. 2013, "Ad Click Prediction: a View from the Trenches", algorithm 1. The
    paper begins at weights of 0; other ones are begun from, with the z that gives them.

    Parameters
    ----------
    alpha : about twice the learning rate that is best for plain gradient steps (the paper)
    beta : added to sqrt(n): 1 is "usually good enough" (the paper)
    l1, l2 : penalties on |w| and on w^2 / 2 of all steps together, not of each: a step's gradient is
        the mean of its rows, so sums over more steps outweigh them
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
        root = squares.sqrt()  # sqrt(n) before the step
        squares.addcmul_(gradient, gradient)
        new_root = squares.sqrt()
        z.add_(gradient - (new_root - root) / self.alpha * weights)
        divisor = (self.beta + new_root) / self.alpha + self.l2
        weights.copy_(functional.softshrink(-z, self.l1) / divisor)
