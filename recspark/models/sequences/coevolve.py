"""Coevolve: states of users and items that change with each event, and intensities of meetings.

Source: Dai, Wang, Trivedi, Song 2016, "Deep Coevolutionary Network: Embedding User and Item Features
for Recommendation"; batches of events: Kumar, Zhang, Leskovec 2019.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from functools import partial

import numpy as np
import torch
from pydantic import Field
from pyspark.sql import DataFrame, SparkSession

from recspark import storage
from recspark.data.blocks import MICROS_PER_DAY, Array, local_index, micros
from recspark.data.dataset import Dataset
from recspark.engines.event_walk import Clocks
from recspark.errors import CatalogueTooLargeError, EmptyDataError
from recspark.models.base import NOTHING, Algorithm, ArraysModel, FitOptions, Needed
from recspark.models.neural import Job, NeuralSettings, fit_network, make_job, run_on_ranks
from recspark.models.scoring import topk
from recspark.models.sequences.carried_states import (
    Carried,
    model_arrays,
    n_carried_events,
    read_arrays,
    set_states,
    write_arrays,
)
from recspark.models.sequences.event_stream import Events, Walker, Windows, replay, start_exponents
from recspark.models.sequences.intensity_scores import IntensityScorer, item_vectors
from recspark.models.sequences.state_table import state_rows
from recspark.models.setting_types import LearningRate, VectorSize
from recspark.nets.coevolve import Cell, CoevolveNet
from recspark.train.comm import Comm
from recspark.train.feed import READERS
from recspark.train.loop import Trained, train_network

_COLUMNS = ("user_idx", "position", "item_idx", "event_at")
_EVENT_BYTES = 100  # of a rank for each event, while the events are read and sorted
# For each user and item beside its vectors and lists: times, and what a window looks up
_ROW_BYTES = 80


class CoevolveSettings(NeuralSettings):
    """Settings of `Coevolve`. "Wikipedia" = chosen by benchmarks/quality/wikipedia.py."""

    embedding_size: VectorSize = Field(
        32, description="length of the state of a user, and of an item. Wikipedia"
    )
    cell: Cell = Field(
        "gru",
        description="how a state changes at an event: gru, or rnn, the paper's single layer",
    )
    shape: float = Field(
        0.3,
        gt=0,
        le=4,
        description="the intensity grows as (time since the last event) ^ (shape - 1). Paper: 2, a "
        "Rayleigh process. Below 1, events come in bursts. Wikipedia",
        json_schema_extra={"tune": {"choices": [0.3, 0.5, 1.0, 2.0]}},
    )
    n_recent: int = Field(
        50,
        ge=0,
        le=1000,
        description="this many of a user's newest distinct items have an intensity of their own, by "
        "their place; 0 = as in the paper. Wikipedia",
        json_schema_extra={"tune": {"choices": [0, 10, 20, 50]}},
    )
    mark_weight: float = Field(
        5.0,
        ge=0,
        description="weight of the log of the share of the event's item in the intensities of all "
        "items, which is added to the log-likelihood; 0 = the likelihood alone. Wikipedia",
    )
    n_item_samples: int = Field(
        100, ge=1, description="items that the survival term of a window is estimated from. Guess"
    )
    n_user_samples: int = Field(
        50, ge=1, description="users that the survival term of a window is estimated from. Guess"
    )
    epochs: int = Field(
        2, ge=1, description="walks through all events, each from the first event on. Wikipedia"
    )
    batch_size: int = Field(
        512,
        ge=1,
        description="events of a window, in time order; the gradient does not reach back beyond it",
    )
    learning_rate: LearningRate = Field(
        2e-3,
        description="learning rate of Adam at the first step; it falls linearly to 0. Wikipedia",
    )
    clip_norm: float = Field(
        5.0, gt=0, description="largest length of a step's gradient, ranks together. Guess"
    )
    validation: float = Field(
        0.0,
        ge=0,
        le=0,
        description="always 0: a file is a random sample of the events, and states need them all",
    )
    refit_every_days: int = Field(
        1,
        ge=1,
        description="1 = every night trains. With more, a night whose last training is younger "
        "carries the states of the night before on over the new events, with the weights as they "
        "are. It trains all the same where earlier events have changed",
    )
    max_items: int = Field(
        2_000_000,
        ge=1,
        description="largest catalogue, in items; a rank takes 24 bytes per item and number of a "
        "state, and 4 for each of n_recent (1.0 GB for 1 million items, 32 and 50). Guess",
    )
    max_users: int = Field(
        2_000_000,
        ge=1,
        description="most users; a rank takes 24 bytes per user and number of a state, and 4 for "
        "each of n_recent (1.0 GB for 1 million users, 32 and 50). Guess",
    )
    max_events: int = Field(
        100_000_000,
        ge=1,
        description="most events; a rank takes 100 bytes for each while they are read (10 GB), and "
        "16 afterwards. Guess",
    )

    def rank_bytes(self, n_users: int, n_items: int, n_events: int) -> int:
        """Return the memory of a rank, which holds all users, items and events."""
        lists = 4 * self.n_recent + _ROW_BYTES
        # A start with its gradient's two means, a state, and two copies while a training begins
        row = 24 * self.embedding_size + lists
        return row * (n_items + n_users) + _EVENT_BYTES * n_events


def make_net(
    settings: CoevolveSettings, n_users: int, n_items: int, exponents: Array, seed: int
) -> CoevolveNet:
    """Return the network with first weights drawn from `seed`."""
    return CoevolveNet(
        n_users,
        n_items,
        settings.embedding_size,
        settings.n_recent,
        settings.shape,
        settings.cell,
        torch.from_numpy(exponents),
        torch.Generator().manual_seed(seed),
    )


def read_events(comm: Comm, job: Job) -> tuple[Events, Array]:
    """Return the events of all ranks in time order, and the users, user_idx int64 ascending.

    Each rank reads its own files, and the ranks exchange what they read. Events at the same time are
    in the order of user_idx, then of the user's history.
    """
    shard = job.training.shards[comm.rank]
    groups = []
    if shard.counted:
        uris = [uri for uri, _ in shard.files]
        groups = list(READERS["petastorm"](uris, _COLUMNS, None))
    user_idx, position, item_idx, event_at = (
        comm.allgather(
            torch.from_numpy(
                np.concatenate([np.zeros(0, np.int64), *[group[name] for group in groups]])
            ).long()
        ).numpy()
        for name in _COLUMNS
    )
    item = local_index(job.items, item_idx)
    order = np.lexsort((position, user_idx, event_at))
    order = order[item[order] >= 0]
    if not len(order):
        raise EmptyDataError("coevolve: no event is on an item of the vocabulary")
    users, user = np.unique(user_idx[order], return_inverse=True)
    events = Events(user.astype(np.int32), item[order].astype(np.int32), event_at[order])
    return events, users


def train_rank(folder: str, comm: Comm, job: Job) -> Trained:
    """Train on one rank, and walk through all events once more with the trained weights.

    Every rank computes all states, so that they need not be exchanged. A rank's share of the work
    is the likelihood of its events of each window. Rank 0 writes the arrays of the model to
    `folder`, or returns them where that is "".
    """
    settings: CoevolveSettings = job.settings
    events, users = read_events(comm, job)
    n_users, n_items, seed = len(users), len(job.items), job.loop.seed

    def started() -> Clocks:
        return Clocks.started(n_users, n_items, settings.n_recent, int(events.event_at[0]))

    n_samples = settings.n_user_samples
    exponents = start_exponents(events, started(), settings.shape, n_samples, seed)
    net = make_net(settings, n_users, n_items, exponents, seed)
    walker = Walker(
        net,
        events,
        started(),
        settings.n_item_samples,
        settings.n_user_samples,
        settings.mark_weight,
        seed,
    )
    size = -(-settings.batch_size // job.loop.accumulate)
    windows = Windows(len(events), size, comm.rank, comm.size)
    loop = replace(job.loop, clip_norm=settings.clip_norm)
    trained = train_network(comm, net, walker.loss, windows, loop)
    clocks = started()
    net.cpu().forget()
    # A sum over the ranks after each part is a sign of life.
    replay(net, events, clocks, lambda: comm.allreduce(torch.zeros(1)))
    if comm.rank:
        return replace(trained, weights=None)
    arrays = model_arrays(net, clocks, events, users, job.items)
    if not folder:
        return replace(trained, checkpoint_uri="", weights=arrays)
    write_arrays(folder, arrays)
    return replace(trained, checkpoint_uri=folder, weights=None)


def carry_rank(folder: str, carried: Carried, comm: Comm, job: Job) -> dict[str, Array] | None:
    """Carry the states of a model on over the events since its cutoff, on one rank.

    Every rank computes all of it. Returns the arrays, or {} where they are written to `folder`;
    None where the events before the model's cutoff have changed.
    """
    settings: CoevolveSettings = job.settings
    events, users = read_events(comm, job)
    n_seen = n_carried_events(carried, events, users, job.items)
    if n_seen is None:
        return None
    n_users, n_items = len(users), len(job.items)
    clocks = Clocks.started(n_users, n_items, settings.n_recent, int(events.event_at[0]))
    net = make_net(settings, n_users, n_items, np.zeros(settings.n_recent + 1), job.loop.seed)
    set_states(net, clocks, carried, users, job.items)
    later = events.part(n_seen, len(events))
    replay(net, later, clocks, lambda: comm.allreduce(torch.zeros(1)))
    arrays = model_arrays(net, clocks, events, users, job.items)
    if not folder or comm.rank:
        return {} if comm.rank else arrays
    write_arrays(folder, arrays)
    return {}


class Coevolve(Algorithm[CoevolveSettings]):
    """A user and an item who meet change each other, and thereby what each will do next.

    The equations are those of `recspark.nets.coevolve.CoevolveNet`. An item's score is the log of
    its intensity for the user at the cutoff.
    """

    settings_class = CoevolveSettings

    @property
    def training_tables(self) -> tuple[str, ...]:
        """See `Algorithm`."""
        return ("training_events",)

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> CoevolveModel:
        """See `Algorithm.fit`. One Spark job more counts the users.

        Where `options` has a scratch folder, the states of users reach the driver as files only,
        which it maps into memory.
        """
        settings = self.settings
        items = data.vocabulary()
        check_size(settings, data, len(items))
        folder = storage.join(options.scratch, "states") if options.scratch else ""
        previous = options.previous
        if isinstance(previous, CoevolveModel) and self._may_carry_on(previous, data.cutoff):
            if carried := self._carried_on(previous, data, options, items, folder):
                return carried
            options.progress("  coevolve: events before the last night's cutoff changed; it trains")
        trained = fit_network(
            "coevolve", data, options, settings, items, partial(train_rank, folder)
        )
        arrays = trained.weights or read_arrays(folder)
        return CoevolveModel(
            settings,
            data.cutoff,
            items,
            {**arrays, "trained_at": np.array([micros(data.cutoff)])},
        )

    @property
    def carried_days(self) -> int:
        """See `Algorithm`."""
        return self.settings.refit_every_days - 1

    def _may_carry_on(self, previous: CoevolveModel, cutoff: datetime) -> bool:
        trained_at = int(previous.arrays()["trained_at"][0])
        age_days = (micros(cutoff) - trained_at) / MICROS_PER_DAY
        return previous.settings == self.settings and age_days < self.settings.refit_every_days

    def _carried_on(
        self,
        previous: CoevolveModel,
        data: Dataset,
        options: FitOptions,
        items: Array,
        folder: str,
    ) -> CoevolveModel | None:
        """Return `previous`, its states carried on to the cutoff of `data`; None: see `carry_rank`."""
        carried = Carried(previous.items, micros(previous.cutoff), previous.shared_arrays())
        training = data.training_set("training_events")
        job = make_job("coevolve", options, self.settings, items, training, None)
        spark = data.histories.sparkSession
        arrays = run_on_ranks(spark, options, partial(carry_rank, folder, carried), job)
        if arrays is None:
            return None
        trained_at = previous.arrays()["trained_at"]
        return CoevolveModel(
            self.settings,
            data.cutoff,
            items,
            {**(arrays or read_arrays(folder)), "trained_at": trained_at},
        )


def check_size(settings: CoevolveSettings, data: Dataset, n_items: int) -> None:
    """Raise CatalogueTooLargeError where a rank would hold more than the settings allow."""
    sizes = {
        "users": data.histories.count(),
        "items": n_items,
        "events": data.training_set("training_events").n_rows,
    }
    for name, size in sizes.items():
        largest = getattr(settings, f"max_{name}")
        if size > largest:
            gigabytes = settings.rank_bytes(sizes["users"], sizes["items"], sizes["events"]) / 1e9
            raise CatalogueTooLargeError(
                f"coevolve: {size:,} {name} before the cutoff, max_{name} is {largest:,}; raise "
                f"models.coevolve.max_{name} if each rank has {gigabytes:,.1f} GB, or "
                "use gru4rec"
            )


class CoevolveModel(ArraysModel):
    """A trained `Coevolve`: the parameters of the network, all states, and the clocks.

    `user_idx` int64 (n_users,) ascending says whose the rows of `user_own.weight`, `user_state`,
    `user_at` and `recent_items` are. See `Clocks` for the clocks.
    """

    def scorer(self) -> topk.Scorer:
        """See `RetrieverModel`. Computes the vectors of all items."""
        vectors = topk.Shared(item_vectors(self._arrays))
        as_of = micros(self.cutoff)
        return IntensityScorer(self._shape, as_of, self.items, vectors, self._of_users())

    def user_states(self) -> DataFrame:
        """See `RetrieverModel`."""
        vectors = topk.Shared(item_vectors(self._arrays))
        spark = SparkSession.active()
        return state_rows(spark, self._shape, micros(self.cutoff), vectors, self._of_users())

    @property
    def _shape(self) -> float:
        assert isinstance(self.settings, CoevolveSettings)
        return self.settings.shape

    def _of_users(self) -> dict[str, topk.Shared]:
        arrays = self.shared_arrays()
        return {name: arrays[name] for name in IntensityScorer.ARRAYS}
