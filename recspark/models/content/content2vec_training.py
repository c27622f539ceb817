"""The training of `content2vec` on one rank: what it reads of a pair, and the loss of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn import functional

from recspark import storage
from recspark.data.blocks import Array
from recspark.data.training_pairs import A_IS_HELD_OUT, B_IS_HELD_OUT, COLUMNS
from recspark.models.content.content2vec_modules import Modules
from recspark.models.content.content2vec_settings import Content2VecSettings
from recspark.models.neural import Job, NetworkTask, look_up
from recspark.nets.content2vec import PairNet
from recspark.train.comm import Comm
from recspark.train.feed import Batch
from recspark.train.loop import Trained


@dataclass(frozen=True)
class Inputs:
    """What every rank reads beside the pairs; the arrays lie in files.

    `vectors`, `has_vector` : URIs of the arrays of `Modules` of the items of the job. `mean`, `scale`
    float32 (M,): see `PairNet`.
    """

    vectors: str
    has_vector: str
    sizes: tuple[int, ...]
    is_behaviour: tuple[bool, ...]
    mean: Array
    scale: Array

    @classmethod
    def write(cls, modules: Modules, mean: Array, scale: Array, folder: str) -> Inputs:
        """Write the arrays of `modules` below `folder`."""
        uris = [storage.join(folder, f"{name}.npy") for name in ("vectors", "has_vector")]
        for uri, array in zip(uris, (modules.vectors, modules.has_vector), strict=True):
            storage.write_array(uri, array)
        return cls(uris[0], uris[1], modules.sizes, modules.is_behaviour, mean, scale)

    def make_net(self, settings: Content2VecSettings, seed: int) -> PairNet:
        """Return the network with first weights drawn from `seed`."""
        generator = torch.Generator().manual_seed(seed)
        net = PairNet(self.sizes, settings.merger, settings.hidden_size, generator)
        net.mean.copy_(torch.from_numpy(self.mean))
        net.scale.copy_(torch.from_numpy(self.scale))
        return net


def train_rank(inputs: Inputs, comm: Comm, job: Job) -> Trained:
    """Train on one rank; see `recspark.train.launch`."""
    task = NetworkTask(comm, job, COLUMNS)
    net = inputs.make_net(task.settings, task.seed)
    table = ItemTable(
        storage.read_array(inputs.vectors, mmap=True),
        storage.read_array(inputs.has_vector, mmap=True),
        inputs,
        task.vocabulary,
    )
    return task.train(net, partial(row_loss, net, table, task.settings.cold_dropout))


@dataclass(frozen=True)
class ItemTable:
    """Looks up the inputs of the network for items; `vocabulary` int64 (n_items,) are their item_idx."""

    vectors: Array
    has_vector: Array
    inputs: Inputs
    vocabulary: torch.Tensor

    def rows(
        self, items: torch.Tensor, is_hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the vectors (B, D) and whether each module has one (B, M), of `items` (B,).

        An item for which `is_hidden`, bool (B,), has no vector by a retriever.
        """
        local = look_up(items, self.vocabulary)[0].cpu().numpy()
        vectors = torch.from_numpy(np.array(self.vectors[local])).to(items.device)  # (B, D)
        has = torch.from_numpy(self.has_vector[local].astype(np.float32)).to(items.device)  # (B, M)
        of_behaviour = torch.tensor(self.inputs.is_behaviour, device=items.device)  # (M,)
        has = has * ~(is_hidden[:, None] & of_behaviour)
        sizes = torch.tensor(self.inputs.sizes, device=items.device)  # (M,)
        return vectors * has.repeat_interleave(sizes, dim=1), has


def row_loss(
    net: PairNet,
    table: ItemTable,
    cold_dropout: float,
    batch: Batch,
    generator: torch.Generator | None,
    done: float,
) -> torch.Tensor:
    """Return the logistic loss of each pair, (B,).

    With a `generator` items are hidden at random; without one, those that are held out.
    """
    tensors = batch.tensors
    logits = pair_logits(net, table, tensors, cold_dropout, generator)  # (B,)
    return functional.binary_cross_entropy_with_logits(
        logits, tensors["label"].float(), reduction="none"
    )


def pair_logits(
    net: PairNet,
    table: ItemTable,
    tensors: Mapping[str, torch.Tensor],
    cold_dropout: float,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Return the logits of the pairs of a batch, (B,); see `row_loss`."""
    sides = []
    for name, bit in (("item_a", A_IS_HELD_OUT), ("item_b", B_IS_HELD_OUT)):
        items, held_out = tensors[name], tensors["held_out"]  # (B,) each
        if generator is None:
            is_hidden = (held_out & bit) > 0  # (B,)
        else:
            draws = torch.rand(len(items), generator=generator, device=items.device)  # (B,)
            is_hidden = draws < cold_dropout
        sides.append(table.rows(items, is_hidden))
    (a, has_a), (b, has_b) = sides
    logits: torch.Tensor = net(a, b, has_a, has_b)
    return logits
