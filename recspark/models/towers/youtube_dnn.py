"""YouTube's candidate network: what will a user watch next, as a softmax over all items?

The network is trained by Horovod ranks on Spark executors, from the files of one version of
`training_timelines`. At scoring, the score of an item is the user's vector times the item's.

What the paper has and this model has not: searches (events have no queries), and geography, gender
and age (the tables have no such columns of a user). The columns of `user_features` are as of a
cutoff, so for an earlier example they would count the target and what came after it. The user's
numbers that the tower reads are computed from what was before each example instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from pydantic import Field, PositiveInt

from recspark.data.blocks import Array, Histories, QueryBlock, micros
from recspark.data.dataset import Dataset
from recspark.models.base import NOTHING, Algorithm, ArraysModel, FitOptions, Needed
from recspark.models.neural import (
    Job,
    NetworkTask,
    check_catalogue_size,
    fit_network,
    net_arrays,
    with_the_same_draws,
)
from recspark.models.scoring import topk
from recspark.models.setting_types import VectorSize
from recspark.models.towers.sampled_softmax import sampled_softmax
from recspark.models.towers.timelines import (
    COLUMNS,
    N_AGE_SHARES,
    Examples,
    Timelines,
    age_position,
    age_shares,
    drawn_examples,
    first_ages,
    later_items,
    log_seconds,
    mean_per_row,
    newest_events,
    target_counts,
    timelines_of,
    vectors_in_blocks,
)
from recspark.models.towers.tower_settings import TowerSettings
from recspark.nets.youtube_dnn import YoutubeDnnNet, window_means
from recspark.train.comm import Comm
from recspark.train.feed import Batch
from recspark.train.loop import Trained, load_weights
from recspark.train.negatives import Negatives

# Arrays that are not read when user vectors are computed, but for `items_in`, row by row.
_ITEM_ARRAYS = ("items_in", "items_out", "items_out_bias")
# Users whose vectors are computed at once. Always this many (short blocks are filled up), because
# the rounding of a sum depends on the shape of the arrays.
_BLOCK_ROWS = 256


class YoutubeDnnSettings(TowerSettings):
    """Settings of `YoutubeDnn`. "ML-1M" = chosen on the last but one ratings of MovieLens 1M."""

    windows: tuple[PositiveInt, ...] = Field(
        (50,),
        min_length=1,
        description="the tower reads the mean vector of this many of the newest items; several "
        "windows are put side by side. Covington et al. 2016: one window, 50",
    )
    embedding_size: VectorSize = Field(
        64, description="length of the vector of an item that was watched. Guess"
    )
    hidden_sizes: tuple[PositiveInt, ...] = Field(
        (256, 64),
        min_length=1,
        description="units of each layer of the tower; the last is the length of a user's vector "
        "and of the item vectors that score. Covington et al. 2016: 1024, 512, 256",
    )
    example_age: bool = Field(
        True,
        description="the tower reads how long before the cutoff a training example was; 0 at "
        "scoring. So it learns what is watched now, not the average over the training period",
        json_schema_extra={"tune": {"choices": [True, False]}},
    )
    user_numbers: bool = Field(
        True,
        description="the tower reads how many items were read, how long ago the oldest of them was "
        "when the newest came, and the same of the newest but one. Instead of columns of "
        "user_features, which are as of the cutoff and would tell of what came after an example",
    )
    dropout: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="share of the means and of the hidden units that is dropped in training. Guess",
        json_schema_extra={"tune": {"low": 0.0, "high": 0.6}},
    )

    @property
    def numbers_of_item(self) -> int:
        """See `TowerSettings`."""
        return self.embedding_size + self.hidden_sizes[-1]

    @property
    def n_numbers(self) -> int:
        """Numbers of an example that the tower reads."""
        return 3 * self.user_numbers + self.example_age


class YoutubeDnn(Algorithm[YoutubeDnnSettings]):
    """A tower over the means of the newest items, trained to predict the next item of a user.

    The loss is a softmax over drawn items, corrected for how they were drawn. Each user gives the
    same number of examples, whose targets are drawn among all items of the user but the first.

    Source: Covington, Adams, Sargin 2016, "Deep Neural Networks for YouTube Recommendations",
    section 3.
    """

    settings_class = YoutubeDnnSettings

    @property
    def training_tables(self) -> tuple[str, ...]:
        """See `Algorithm`."""
        return ("training_timelines",)

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> YoutubeDnnModel:
        """See `Algorithm.fit`. The driver holds the vocabulary and weights, nothing per user.

        Raises CatalogueTooLargeError if there are more than `max_items` items.
        """
        settings, items = self.settings, data.vocabulary()
        check_catalogue_size(
            "youtube_dnn", items, settings.max_items, settings.item_bytes, "item2vec"
        )
        trained = fit_network("youtube_dnn", data, options, settings, items, train_rank)
        net = make_net(settings, len(items), options.seed)
        load_weights(net, trained)
        return YoutubeDnnModel(settings, data.cutoff, items, net_arrays(net))


class YoutubeDnnModel(ArraysModel):
    """A trained `YoutubeDnn`. The arrays are the parameters of the network, float32, by name."""

    settings: YoutubeDnnSettings
    vectors_array = "items_out"

    def scorer(self) -> topk.Scorer:
        """See `RetrieverModel`."""
        as_of = micros(self.cutoff)
        return YoutubeDnnScorer(self.settings, self.items, as_of, self.shared_arrays())


@dataclass(frozen=True)
class YoutubeDnnScorer:
    """Computes the vector of each user from the history of the query.

    `items` item_idx int32 (n_items,), ascending: the vocabulary. `as_of`: the cutoff, in
    microseconds since 1970 UTC. `arrays`: see `YoutubeDnnModel`.
    """

    settings: YoutubeDnnSettings
    items: Array
    as_of: int
    arrays: dict[str, topk.Shared]

    def score(self, block: QueryBlock) -> topk.Scores:
        """See `topk.Scorer`. A user without a known item gets no list."""
        arrays = {name: np.asarray(shared.array) for name, shared in self.arrays.items()}
        users, is_known = user_vectors(self.settings, arrays, block.history, self.items, self.as_of)
        return topk.DotScores(users, arrays["items_out"], arrays["items_out_bias"], is_known)


def user_vectors(
    settings: YoutubeDnnSettings,
    arrays: dict[str, Array],
    history: Histories,
    items: Array,
    as_of: int,
) -> tuple[Array, Array]:
    """Return the vector of each user at the cutoff, float32 (n, H), and who has a known item.

    Computed in float64 by one thread, in blocks of exactly `_BLOCK_ROWS` users, whose items are
    padded to the longest window. So the vector of a user does not depend on the users beside it.
    Parameters are those of `YoutubeDnnScorer`; `arrays` are the trained parameters.
    """
    longest = max(settings.windows)
    events, ages = newest_events(history, items, as_of, longest)
    # The network's item vectors are not used here, so one item is enough to build it.
    net = make_net(settings, 1, 1).double().eval()
    for name, parameter in net.named_parameters():
        if name not in _ITEM_ARRAYS:
            parameter.data = torch.from_numpy(arrays[name].astype(np.float64))

    def vectors_of(
        embedded: torch.Tensor, block_ages: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        now = torch.zeros_like(lengths)  # (B,)
        examples = Examples(torch.arange(len(lengths)), lengths)
        return example_vectors(net, settings, embedded, block_ages, examples, now)  # (B, H)

    vectors = vectors_in_blocks(
        events,
        ages,
        arrays["items_in"],
        (_BLOCK_ROWS, longest),
        settings.hidden_sizes[-1],
        0,
        vectors_of,
    )
    return vectors, events.lengths > 0


def make_net(settings: YoutubeDnnSettings, n_items: int, seed: int) -> YoutubeDnnNet:
    """Return the network with first weights drawn from `seed`."""
    return YoutubeDnnNet(
        n_items,
        settings.embedding_size,
        settings.windows,
        settings.n_numbers,
        settings.hidden_sizes,
        N_AGE_SHARES if settings.example_age else 0,
        torch.Generator().manual_seed(seed),
        settings.is_sparse,
    )


def train_rank(comm: Comm, job: Job) -> Trained:
    """Train on one rank; see `recspark.train.launch`."""
    settings: YoutubeDnnSettings = job.settings
    task = NetworkTask(comm, job, COLUMNS)
    feed, vocabulary = task.feed, task.vocabulary
    net = make_net(settings, task.n_items, task.seed)
    counts = target_counts(comm, feed.epoch(0), vocabulary, settings.n_examples)  # (n_items,)
    negatives = Negatives(counts, settings.n_samples, settings.sample_alpha)
    # The best bias while user vectors tell nothing. Else the first epochs would only learn it.
    net.items_out_bias.data = torch.log(negatives.share).float()  # (n_items,)
    if settings.example_age:
        net.age_shares.data = age_shares(comm, feed.epoch(0), vocabulary).float()
    oldest = first_ages(comm, feed.epoch(0), vocabulary) if settings.existing_only else None
    loss = partial(row_loss, net, vocabulary, settings, negatives, oldest)
    without_dropout = settings.model_copy(update={"dropout": 0.0})
    loss_without_dropout = partial(row_loss, net, vocabulary, without_dropout, negatives, oldest)
    return task.train(net, loss, with_the_same_draws(loss_without_dropout))


def row_loss(
    net: YoutubeDnnNet,
    vocabulary: torch.Tensor,
    settings: YoutubeDnnSettings,
    negatives: Negatives,
    oldest: torch.Tensor | None,
    batch: Batch,
    generator: torch.Generator,
    done: float,
) -> torch.Tensor:
    """Return the mean loss of the examples of each row (user), (B,); 0 for a row of weight 0.

    `oldest` int64 (n_items,): see `first_ages`; None = every item is a candidate at any time.
    `done` is not used.
    """
    timelines = timelines_of(batch, vocabulary)
    is_target = later_items(timelines, batch.weight)  # (B, L)
    examples = drawn_examples(is_target, settings.n_examples, generator)
    losses = example_losses(net, settings, negatives, oldest, timelines, examples, generator)
    return mean_per_row(losses, examples.rows, len(batch.weight))


def example_losses(
    net: YoutubeDnnNet,
    settings: YoutubeDnnSettings,
    negatives: Negatives,
    oldest: torch.Tensor | None,
    timelines: Timelines,
    examples: Examples,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return the sampled softmax loss of each example, (P,). All examples share the candidates.

    Events of a row after the target of an example change nothing in its vector.
    """
    is_item = timelines.items >= 0  # (B, L)
    embedded = net.read(timelines.items.clamp_min(0)) * is_item[:, :, None]  # (B, L, E)
    targets = timelines.items[examples.rows, examples.ends]  # (P,)
    target_ages = timelines.ages[examples.rows, examples.ends]  # (P,)
    users = example_vectors(
        net,
        settings,
        embedded,
        timelines.ages,
        examples,
        target_ages,
        settings.dropout,
        generator,
    )  # (P, H)

    def scores_of(items: torch.Tensor) -> torch.Tensor:
        return users @ net.scored(items).T + net.items_out_bias[items]  # (P, N)

    return sampled_softmax(
        scores_of, targets, target_ages, negatives, oldest, settings.logq, generator
    )


def example_vectors(
    net: YoutubeDnnNet,
    settings: YoutubeDnnSettings,
    embedded: torch.Tensor,
    ages: torch.Tensor,
    examples: Examples,
    target_ages: torch.Tensor,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Return the user vector of each example, (P, H).

    Parameters
    ----------
    embedded : (B, L, E), the vectors of the items of each row, oldest first; padding is 0
    ages : int64 (B, L), of the items' events, in seconds
    examples : only the items before `ends` are read
    target_ages : int64 (P,), seconds from each target to the cutoff; 0 at scoring
    """
    rows, ends = examples.rows, examples.ends
    means = window_means(embedded, rows, ends, settings.windows)  # (P, n_windows, E)
    numbers: list[torch.Tensor] = []  # (P,) each
    if settings.user_numbers:
        longest = max(settings.windows)
        newest = ages[rows, (ends - 1).clamp_min(0)]  # (P,)
        for n_back in (longest, 2):  # the oldest item that is read, and the newest but one
            older = ages[rows, (ends - n_back).clamp_min(0)]  # (P,)
            numbers.append(log_seconds((older - newest).clamp_min(0)))
        numbers.append(ends.clamp_max(longest) / longest)
    if settings.example_age:
        numbers.append(age_position(target_ages, net.age_shares.detach()))
    columns = [column.to(means.dtype) for column in numbers]
    stacked = torch.stack(columns, dim=1) if columns else means.new_zeros(len(rows), 0)
    return net.users(means, stacked, dropout, generator)
