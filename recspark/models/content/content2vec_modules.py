"""The modules of `content2vec`: the vectors that the models of `needs` give each item."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from recspark.data.blocks import Array
from recspark.data.dataset import Dataset
from recspark.models.base import Needed
from recspark.models.item_vectors import needed_vectors

_RANDOM_PAIRS = 100_000  # pairs that say how large the cosines of a module are


@dataclass(frozen=True)
class Modules:
    """The vectors of items by all modules.

    `items` item_idx int32 (n,), ascending; `vectors` float32 (n, D): joined, of each module of length
    1, or 0 where there is none; `has_vector` bool (n, M); `sizes`, `names`: of each module;
    `is_behaviour`: whether it learns from events, so that an item without events has no vector.
    """

    items: Array
    vectors: Array
    has_vector: Array
    sizes: tuple[int, ...]
    names: tuple[str, ...]
    is_behaviour: tuple[bool, ...]

    def of(self, items: Array) -> Modules:
        """Return the vectors of those of `items` (ascending) that have one."""
        is_kept = np.isin(self.items, items)
        return replace(
            self,
            items=self.items[is_kept],
            vectors=self.vectors[is_kept],
            has_vector=self.has_vector[is_kept],
        )

    @classmethod
    def read(cls, data: Dataset, needed: Needed, vocabulary: Array) -> Modules:
        """Return the vectors of the models of `needs`. One job for each encoder.

        A retriever's vector of an item that is not in `vocabulary` is never read: nobody acted on it,
        so whatever it is tells nothing. Items without any vector are left out. Raises ModelError
        where a retriever has no vectors of items.
        """
        of_modules = {
            name: needed_vectors("content2vec", data, name, model) for name, model in needed.items()
        }
        is_behaviour = tuple(model.kind == "retriever" for model in needed.values())
        items = np.unique(np.concatenate([v.item_idx for v in of_modules.values()])).astype(
            np.int32
        )
        is_warm = np.isin(items, vocabulary)
        parts = [v.rows_of(items) for v in of_modules.values()]
        for part, of_behaviour in zip(parts, is_behaviour, strict=True):
            if of_behaviour:
                part[~is_warm] = 0
        has_vector = np.stack([part.any(axis=1) for part in parts], axis=1)
        has_any = has_vector.any(axis=1)
        return cls(
            items[has_any],
            np.concatenate(parts, axis=1, dtype=np.float32)[has_any],
            has_vector[has_any],
            tuple(part.shape[1] for part in parts),
            tuple(of_modules),
            is_behaviour,
        )

    def mean_and_scale(self, seed: int) -> tuple[Array, Array]:
        """Return the mean and the deviation of each module's cosines of random pairs, float32 (M,).

        A module with hardly any vectors, or with equal ones, has the scale 1.
        """
        rng = np.random.default_rng([seed, 3])
        i, j = rng.integers(0, len(self.items), (2, _RANDOM_PAIRS))
        mean, scale = np.zeros(len(self.sizes)), np.ones(len(self.sizes))
        for m, (end, size) in enumerate(zip(np.cumsum(self.sizes), self.sizes, strict=True)):
            is_pair = self.has_vector[i, m] & self.has_vector[j, m] & (i != j)
            part = self.vectors[:, end - size : end]
            pairs = np.flatnonzero(is_pair)
            cosines = np.concatenate(
                [
                    np.einsum("pd,pd->p", part[i[some]], part[j[some]], dtype=np.float64)
                    for some in np.array_split(pairs, max(1, len(pairs) // 4096))
                ]
            )
            if len(cosines) > 1 and cosines.std() > 1e-6:
                mean[m], scale[m] = cosines.mean(), cosines.std()
        return mean.astype(np.float32), scale.astype(np.float32)
