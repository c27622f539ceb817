"""Settings that models share which learn vectors by negative sampling."""

from __future__ import annotations

from pydantic import Field

from recspark.engines.word2vec_step import Word2Vec
from recspark.models.base import Settings
from recspark.models.setting_types import VectorSize


class SamplingSettings(Settings):
    """Settings of learning by negative sampling.

    "Tuned" gives the best values that Caselles-Dupré et al. 2018 found for next-event prediction on
    four data sets: music (two sets), e-commerce and click streams. Their repository
    `w2v_reco_hyperparameters_matter` lists them.
    """

    embedding_size: VectorSize = Field(
        64,
        description="length of a vector. Guess",
    )
    n_negatives: int = Field(
        10,
        ge=1,
        description="negative sampling: noise items per example. Mikolov et al.: 5 to 20",
    )
    ns_exponent: float = Field(
        1.0,
        ge=-2,
        le=2,
        description="noise items are drawn in proportion to uses^ns_exponent; below 0, rare items "
        "are drawn more often. Tuned: -0.5, -0.5, 1, -1; word2vec: 0.75",
        json_schema_extra={"tune": {"low": -1.0, "high": 1.0}},
    )
    subsample: float | None = Field(
        1e-3,
        gt=0,
        description="subsampling: items with more than this share of all uses lose some of their "
        "uses at random; null = no subsampling. Tuned: 1e-5, 1e-5, 1e-3, 1e-5",
        json_schema_extra={"tune": {"choices": [None, 1e-3, 1e-4, 1e-5]}},
    )
    epochs: int = Field(
        30,
        ge=1,
        description="passes over the sentences. Tuned: 110, 130, 140, 150; 30 is a guess at what a "
        "night allows (word2vec: 5)",
        json_schema_extra={"tune": {"choices": [10, 30, 100]}},
    )
    learning_rate: float = Field(
        0.025,
        gt=0,
        description="learning rate at the first example; it falls linearly to min_learning_rate. "
        "Source: word2vec",
        json_schema_extra={"tune": {"low": 0.005, "high": 0.1, "log": True}},
    )
    min_learning_rate: float = Field(
        0.0001, ge=0, description="learning rate after the last example. Source: word2vec"
    )


class Word2VecSettings(SamplingSettings):
    """Settings of the engine `engines.word2vec`. For "tuned" see `SamplingSettings`."""

    min_count: int = Field(
        1, ge=1, description="an item with fewer uses gets no vector and is not recommended"
    )
    max_length: int = Field(
        100,
        ge=2,
        le=10_000,
        description="most items of a sentence; longer ones are cut. With window null, and with "
        "bags, a sentence of n items gives up to n^2 pairs. Guess",
    )
    n_blocks: int = Field(
        2,
        ge=1,
        le=4096,
        description="blocks of items, which is the number of tasks that run at once. The quality "
        "does not depend on it (benchmarks/item2vec.py), the exact vectors do",
    )
    n_rotations: int = Field(
        8,
        ge=1,
        le=16,
        description="times per epoch that each pair of blocks meets. With 1 and "
        "n_blocks 4, a fifth of the hit rate was lost on Diginetica",
    )

    def of_engine(self, seed: int) -> Word2Vec:
        """Return the settings of the engine, for skip-gram with negative sampling."""
        return Word2Vec(
            size=self.embedding_size,
            n_negatives=self.n_negatives,
            ns_exponent=self.ns_exponent,
            subsample=self.subsample,
            min_count=self.min_count,
            max_length=self.max_length,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            min_learning_rate=self.min_learning_rate,
            n_blocks=self.n_blocks,
            n_rotations=self.n_rotations,
            seed=seed,
        )
