"""TDSSM: what a user likes for good, and what the user did in the last days and weeks.

The network is trained by Horovod ranks on Spark executors, from the files of one version of
`training_timelines`. Time is cut into steps: the fast rate has one step for each day, say, the slow
rate one for each week. The day of a target is never read: not by the rates, and not by the static
part, which reads everything before that day. (The columns of `user_features` are as of a cutoff, so
for an earlier example they would count the target and what came after it. They are not read.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from recspark.data.blocks import Array, Histories, QueryBlock, micros
from recspark.data.dataset import Dataset
from recspark.errors import ConfigError, ModelError
from recspark.models.base import NOTHING, Algorithm, ArraysModel, FitOptions, Needed
from recspark.models.item_vectors import needed_vectors
from recspark.models.kinds import Kind
from recspark.models.neural import (
    Job,
    NetworkTask,
    check_catalogue_size,
    fit_network,
    net_arrays,
    with_the_same_draws,
)
from recspark.models.scoring import topk
from recspark.models.setting_types import LearningRate, VectorSize
from recspark.models.towers.sampled_softmax import sampled_softmax
from recspark.models.towers.timelines import (
    COLUMNS,
    Examples,
    Timelines,
    drawn_examples,
    first_ages,
    later_items,
    mean_per_row,
    newest_events,
    target_counts,
    timelines_of,
    vectors_in_blocks,
)
from recspark.models.towers.tower_settings import TowerSettings
from recspark.nets.tdssm import STATIC, TdssmNet, n_at_least, step_means
from recspark.train.comm import Comm
from recspark.train.feed import Batch
from recspark.train.loop import Trained, load_weights
from recspark.train.negatives import Negatives

Part = Literal["static", "slow", "fast"]
# Arrays that are not read when user vectors are computed, but for `items_in`, row by row.
_ITEM_ARRAYS = ("items_in", "items_out")
# Users whose vectors are computed at once. Always this many (short blocks are filled up), because
# the rounding of a sum depends on the shape of the arrays.
_BLOCK_ROWS = 64


class TdssmSettings(TowerSettings):
    """Settings of `Tdssm`."""

    parts: tuple[Part, ...] = Field(
        ("static", "slow", "fast"),
        min_length=1,
        description="parts of the user tower: static = everything before; slow, fast = a recurrent "
        "layer over steps of time. Song et al. 2016: all three (MR-TDSSM), or static and one rate "
        "(TDSSM)",
    )
    fast_hours: float = Field(
        24.0,
        gt=0,
        description="hours of a step of the fast rate. The step of a target is not read by any "
        "part. Song et al. 2016: a day",
    )
    slow_hours: float = Field(
        168.0, gt=0, description="hours of a step of the slow rate. Song et al. 2016: a week"
    )
    n_fast: int = Field(14, ge=1, description="steps that the fast rate reads. Guess")
    n_slow: int = Field(8, ge=1, description="steps that the slow rate reads. Guess")
    steps_from: Literal["target", "newest_event"] = Field(
        "target",
        description="where the newest step ends: target = where the step of the target begins (the "
        "cutoff at scoring), so steps are as old as they are; newest_event = at the user's newest "
        "event that may be read, so a user who was away has no empty steps",
    )
    length: int = Field(
        512,
        ge=1,
        description="at scoring, the newest items of a user that are read. As in training",
    )
    embedding_size: VectorSize = Field(
        64, description="length of the vectors that are read. No effect with a model in needs"
    )
    hidden_size: int = Field(
        64,
        ge=1,
        description="units of each part, and length of a user's vector and of the item vectors "
        "that score. Guess",
        json_schema_extra={"tune": {"choices": [32, 64, 128]}},
    )
    temperature: float = Field(
        0.1,
        gt=0,
        description="scores are cosines divided by this. A cosine alone, at most 1, could hardly "
        "tell items apart in a softmax. Guess",
        json_schema_extra={"tune": {"choices": [0.05, 0.07, 0.1, 0.2]}},
    )
    learning_rate: LearningRate = Field(
        5e-3,
        description="learning rate of Adam at the first step; it falls linearly to 0. Guess",
    )

    @property
    def numbers_of_item(self) -> int:
        """See `TowerSettings`."""
        return self.embedding_size + self.hidden_size

    @property
    def rates(self) -> dict[str, tuple[int, int]]:
        """Seconds of a step, and number of steps, of each rate among the parts."""
        rates = {
            "slow": (round(3600 * self.slow_hours), self.n_slow),
            "fast": (self.fast_seconds, self.n_fast),
        }
        return {part: rates[part] for part in self.parts if part != STATIC}

    @property
    def fast_seconds(self) -> int:
        """Seconds of a step of the fast rate, at least 1."""
        return max(1, round(3600 * self.fast_hours))

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if len({*self.parts}) < len(self.parts):
            raise ValueError(f"parts {[*self.parts]} names a part twice")
        if {"slow", "fast"} <= {*self.parts} and self.slow_hours <= self.fast_hours:
            raise ValueError(
                f"slow_hours ({self.slow_hours}) must be more than fast_hours ({self.fast_hours})"
            )
        return self


class Tdssm(Algorithm[TdssmSettings]):
    """A static and two recurrent user towers of different rates, and item vectors; cosine.

    With a model in `needs`, the tower reads the vectors of that model, which are not trained: those
    of an encoder, or the item vectors of a retriever that has any (`als`, `item2vec`, ...). This is
    the paper's "pre-train", which leaves few parameters to be learned.

    Source: Song, Elkahky, He 2016, "Multi-Rate Deep Learning for Temporal Recommendation".
    """

    settings_class = TdssmSettings

    @property
    def training_tables(self) -> tuple[str, ...]:
        """See `Algorithm`."""
        return ("training_timelines",)

    def check_needs(self, kinds: Mapping[str, Kind]) -> None:
        """See `Algorithm`. At most one encoder or retriever."""
        if len(kinds) > 1 or "ranker" in kinds.values():
            raise ConfigError(
                f"tdssm: needs = {[*kinds]}; it reads the item vectors of one encoder or retriever"
            )

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> TdssmModel:
        """See `Algorithm.fit`. The driver holds the vocabulary and weights, nothing per user.

        Raises CatalogueTooLargeError if there are more than `max_items` items, and ModelError if
        the needed model has no item vectors.
        """
        settings, items = self.settings, data.vocabulary()
        check_catalogue_size("tdssm", items, settings.max_items, settings.item_bytes, "item2vec")
        vectors = pretrained_vectors(data, needed, items)
        train_one_rank = partial(train_rank, vectors)
        trained = fit_network("tdssm", data, options, settings, items, train_one_rank)
        net = make_net(settings, len(items), options.seed, vectors)
        load_weights(net, trained)
        return TdssmModel(settings, data.cutoff, items, scoring_arrays(net))


class TdssmModel(ArraysModel):
    """A trained `Tdssm`.

    The arrays are the parameters of the network, float32, by name; the rows of `items_out` have
    length 1.
    """

    settings: TdssmSettings
    vectors_array = "items_out"

    def scorer(self) -> topk.Scorer:
        """See `RetrieverModel`."""
        return TdssmScorer(self.settings, self.items, micros(self.cutoff), self.shared_arrays())


@dataclass(frozen=True)
class TdssmScorer:
    """Computes the vector of each user from the history of the query.

    `items` item_idx int32 (n_items,), ascending: the vocabulary. `as_of`: the cutoff, in
    microseconds since 1970 UTC. `arrays`: see `TdssmModel`.
    """

    settings: TdssmSettings
    items: Array
    as_of: int
    arrays: dict[str, topk.Shared]

    def score(self, block: QueryBlock) -> topk.Scores:
        """See `topk.Scorer`. A user without a known item gets no list."""
        arrays = {name: np.asarray(shared.array) for name, shared in self.arrays.items()}
        users, is_known = user_vectors(self.settings, arrays, block.history, self.items, self.as_of)
        no_bias = None
        scaled = users / np.float32(self.settings.temperature)
        return topk.DotScores(scaled, arrays["items_out"], no_bias, is_known)


def user_vectors(
    settings: TdssmSettings, arrays: dict[str, Array], history: Histories, items: Array, as_of: int
) -> tuple[Array, Array]:
    """Return the vector of each user at the cutoff, float32 (n, H), and who has a known item.

    Computed in float64 by one thread, in blocks of exactly `_BLOCK_ROWS` users, whose items are
    padded to the setting `length`. So the vector of a user does not depend on the users beside it.
    """
    events, ages = newest_events(history, items, as_of, settings.length)
    # The network's item vectors are not used here, so one item is enough to build it.
    net = TdssmNet(
        1, arrays["items_in"].shape[1], settings.hidden_size, settings.parts, torch.Generator()
    )
    net = net.double().eval()
    for name, parameter in net.named_parameters():
        if name not in _ITEM_ARRAYS:
            parameter.data = torch.from_numpy(arrays[name].astype(np.float64))

    def vectors_of(
        embedded: torch.Tensor, block_ages: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        rows, now = torch.arange(len(lengths)), torch.zeros_like(lengths)  # (B,) each
        return example_vectors(net, settings, embedded, block_ages, rows, now)  # (B, H)

    vectors = vectors_in_blocks(
        events,
        ages,
        arrays["items_in"],
        (_BLOCK_ROWS, settings.length),
        settings.hidden_size,
        -1,
        vectors_of,
    )
    return vectors, events.lengths > 0


def pretrained_vectors(data: Dataset, needed: Needed, items: Array) -> Array | None:
    """Return the vectors of `items` by the needed model, float32 (n_items, E); None without one.

    They are scaled to length 1; an item without a vector has zeros. The driver holds them, and they
    are sent to each rank.
    """
    if not needed:
        return None
    [(name, model)] = needed.items()
    return needed_vectors("tdssm", data, name, model).rows_of(items)


def make_net(
    settings: TdssmSettings, n_items: int, seed: int, vectors: Array | None = None
) -> TdssmNet:
    """Return the network with first weights drawn from `seed`.

    `vectors` float32 (n_items, E): what the tower reads of items, not trained; None = trained.
    """
    net = TdssmNet(
        n_items,
        settings.embedding_size if vectors is None else vectors.shape[1],
        settings.hidden_size,
        settings.parts,
        torch.Generator().manual_seed(seed),
        pretrained=vectors is not None,
        sparse=settings.is_sparse,
    )
    if vectors is not None:
        net.items_in.data = torch.from_numpy(vectors.copy())
    return net


def scoring_arrays(net: TdssmNet) -> dict[str, Array]:
    """Return the arrays of `TdssmModel`."""
    arrays = net_arrays(net)
    lengths = np.linalg.norm(arrays["items_out"], axis=1, keepdims=True)
    return {**arrays, "items_out": arrays["items_out"] / np.maximum(lengths, 1e-12)}


def train_rank(vectors: Array | None, comm: Comm, job: Job) -> Trained:
    """Train on one rank; see `recspark.train.launch`. `vectors`: see `make_net`."""
    settings: TdssmSettings = job.settings
    task = NetworkTask(comm, job, COLUMNS)
    feed, vocabulary = task.feed, task.vocabulary
    net = make_net(settings, task.n_items, task.seed, vectors)
    targets = partial(readable_targets, settings)
    counts = target_counts(comm, feed.epoch(0), vocabulary, settings.n_examples, targets)
    if not float(counts.sum()):
        raise ModelError(
            f"tdssm: no user has events in two steps of {settings.fast_hours:g} hours, so nothing "
            "comes before any target; lower models.tdssm.fast_hours"
        )
    negatives = Negatives(counts, settings.n_samples, settings.sample_alpha)
    oldest = first_ages(comm, feed.epoch(0), vocabulary) if settings.existing_only else None
    loss: Any = partial(row_loss, net, vocabulary, settings, negatives, oldest)
    return task.train(net, loss, with_the_same_draws(loss))


def readable_targets(
    settings: TdssmSettings, timelines: Timelines, weight: torch.Tensor
) -> torch.Tensor:
    """Return whether an item has an event before its own step of the fast rate, bool (B, L)."""
    begins = step_begins(timelines.ages, settings.fast_seconds)  # (B, L)
    return later_items(timelines, weight) & (timelines.ages[:, :1] >= begins)


def step_begins(ages: torch.Tensor, seconds: int) -> torch.Tensor:
    """Return the youngest age that is not in the step of an event, int64; same shape as `ages`.

    Steps are counted back from the cutoff. With steps of a day, an event that is 30 hours old is in
    the second step; events that are 48 hours old or more are before that step.
    """
    return (ages // seconds + 1) * seconds


def row_loss(
    net: TdssmNet,
    vocabulary: torch.Tensor,
    settings: TdssmSettings,
    negatives: Negatives,
    oldest: torch.Tensor | None,
    batch: Batch,
    generator: torch.Generator,
    done: float,
) -> torch.Tensor:
    """Return the mean loss of the examples of each row (user), (B,); 0 for a row without any.

    `oldest` int64 (n_items,): see `first_ages`; None = every item is a candidate at any time.
    `done` is not used.
    """
    timelines = timelines_of(batch, vocabulary)
    is_target = readable_targets(settings, timelines, batch.weight)  # (B, L)
    examples = drawn_examples(is_target, settings.n_examples, generator)
    losses = example_losses(net, settings, negatives, oldest, timelines, examples, generator)
    return mean_per_row(losses, examples.rows, len(batch.weight))


def example_losses(
    net: TdssmNet,
    settings: TdssmSettings,
    negatives: Negatives,
    oldest: torch.Tensor | None,
    timelines: Timelines,
    examples: Examples,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return the sampled softmax loss of each example, (P,). All examples share the candidates.

    Events in the step of the target and later ones change nothing in the vector of an example.
    """
    is_item = timelines.items >= 0  # (B, L)
    embedded = net.read(timelines.items.clamp_min(0)) * is_item[:, :, None]  # (B, L, E)
    targets = timelines.items[examples.rows, examples.ends]  # (P,)
    target_ages = timelines.ages[examples.rows, examples.ends]  # (P,)
    ages = timelines.ages.masked_fill(~is_item, -1)  # (B, L)
    begins = step_begins(target_ages, settings.fast_seconds)  # (P,)
    users = example_vectors(net, settings, embedded, ages, examples.rows, begins)  # (P, H)

    def scores_of(items: torch.Tensor) -> torch.Tensor:
        return users @ net.scored(items).T / settings.temperature  # (P, N)

    return sampled_softmax(
        scores_of, targets, target_ages, negatives, oldest, settings.logq, generator
    )


def example_vectors(
    net: TdssmNet,
    settings: TdssmSettings,
    embedded: torch.Tensor,
    ages: torch.Tensor,
    rows: torch.Tensor,
    begins: torch.Tensor,
) -> torch.Tensor:
    """Return the user vector of each example, (P, H).

    Parameters
    ----------
    embedded : (B, L, E), the vectors of the items of each row, oldest first; padding is 0
    ages : int64 (B, L), of the items' events, in seconds; padding is -1
    rows : int64 (P,), the row of each example
    begins : int64 (P,), the youngest age that an example reads; 0 at scoring
    """
    sums = torch.nn.functional.pad(embedded.cumsum(dim=1), (0, 0, 1, 0))  # (B, L + 1, E)
    n_before = n_at_least(ages, rows, begins[:, None])[:, 0]  # (P,)
    before = sums[rows, n_before] / n_before.clamp_min(1)[:, None]  # (P, E)
    if settings.steps_from == "newest_event":
        newest = ages[rows, (n_before - 1).clamp_min(0)]  # (P,)
        begins = torch.where(n_before > 0, newest.clamp_min(0), begins)
    steps = {
        part: step_means(sums, ages, rows, begins, seconds, n_steps)
        for part, (seconds, n_steps) in settings.rates.items()
    }
    return net.users(before, steps)
