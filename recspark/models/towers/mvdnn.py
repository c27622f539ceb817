"""MV-DNN: one user tower learns from several views (domains) of a shop, an item tower from each.

A view is a part of the catalogue (films, books) or a kind of event (clicks, purchases). What a user
did in one view tells what the user will like in another one, so a user who is new in a view is
served from what the user did elsewhere.

The network is trained by Horovod ranks on Spark executors, from the files of one version of
`training_timelines`. At scoring, the score of an item is the user's vector times the item's. The
columns of `user_features` are as of a cutoff, so for an earlier example they would count the target
and what came after it. They are not read: what the tower reads of a user is in the history.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, PositiveInt, model_validator

from recspark.data.blocks import Array, Histories, QueryBlock, Ragged, local_index
from recspark.data.dataset import Dataset
from recspark.data.feature_encoding import flat
from recspark.data.training_rows import type_code, type_codes
from recspark.errors import ConfigError, EmptyDataError, ModelError
from recspark.models.base import NOTHING, Algorithm, ArraysModel, FitOptions, FittedModel, Needed
from recspark.models.kinds import Kind
from recspark.models.neural import (
    Job,
    NetworkTask,
    check_catalogue_size,
    fit_network,
    net_arrays,
    one_thread,
    with_the_same_draws,
)
from recspark.models.scoring import topk
from recspark.models.setting_types import LearningRate, VectorSize
from recspark.models.towers.item_tokens import ItemTokens, Part, TokenRules, item_tokens
from recspark.models.towers.sampled_softmax import sampled_softmax
from recspark.models.towers.timelines import (
    COLUMNS,
    Examples,
    Timelines,
    drawn_examples,
    mean_per_row,
    newest_known,
    timelines_of,
    vectors_in_blocks,
)
from recspark.models.towers.tower_settings import TowerSettings
from recspark.nets.mvdnn import Bags, MvdnnNet, ViewHistories
from recspark.train.comm import Comm
from recspark.train.feed import Batch
from recspark.train.loop import Trained, load_weights
from recspark.train.negatives import Negatives

ALL = "all"  # the name of the only view where the settings declare none
# Users whose vectors are computed at once. Always this many (short blocks are filled up), because
# the rounding of a sum depends on the shape of the arrays.
_BLOCK_ROWS = 32
_BLOCK_ITEMS = 4096  # items whose vectors are computed at once
_BYTES_OF_TOKEN = 16  # on a rank: code and weight, and what the driver sends


class MvdnnSettings(TowerSettings):
    """Settings of `Mvdnn`."""

    view_by: Literal["category", "event_type"] = Field(
        "category",
        description="what an event is in a view by: category = a category of its item; event_type "
        "= its type. Then every item can be in every view",
    )
    views: dict[str, tuple[str, ...]] = Field(
        {},
        description="name of a view -> its categories, or its event types. An item with categories "
        "of two views is in the first of them; a view with an empty list has all that is in no "
        "other. What is in no view is neither read nor listed. {} = one view of everything (DSSM)",
    )
    list_view: str | None = Field(
        None,
        description="the view whose items are listed; null = the first one. For a list of each "
        "view, name one model for each; the others name the first in `needs`, and train nothing",
    )
    learn_views: tuple[str, ...] = Field(
        (),
        description="views whose events are targets; [] = all. What users did in the other views is "
        "still read. One view alone has a user tower of its own",
    )
    view_balance: float = Field(
        1.0,
        ge=0,
        le=1,
        description="1 = every view has the same weight in the loss; 0 = a view weighs as much as "
        "it has users; between: by users^(1 - view_balance)",
    )
    own_view_dropout: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the examples that do not read what the user did in the target's own "
        "view, if there is anything in other views: as of users who are new in the view. Guess",
        json_schema_extra={"tune": {"choices": [0.2, 0.5, 0.8]}},
    )
    parts: tuple[Part, ...] = Field(
        ("item_name", "text", "category", "price"),
        min_length=1,
        description="what is read of an item in the catalogue: letter trigrams of its texts, its "
        "categories, and the class of its price",
    )
    item_features: tuple[str, ...] = Field(
        (),
        description="columns of item_features that are read of an item too, as classes. They are "
        "as of the cutoff, and an item without events has none: what counts events tells of the "
        "targets themselves",
    )
    n_buckets: int = Field(
        16_384,
        ge=1,
        le=10_000_000,
        description="codes that the tokens of items are hashed into. Each view has a vector of "
        "hidden_sizes[0] numbers for each. Guess; Huang et al. 2013 have 30,621 trigrams",
    )
    max_trigrams: int = Field(
        200, ge=1, description="the first that many different trigrams of a text are read. Guess"
    )
    length: int = Field(
        512,
        ge=1,
        description="at scoring, the newest items of a user that are read, of all views. As in "
        "training",
    )
    window: int = Field(
        100,
        ge=1,
        description="the tower reads the mean vector of this many of the newest items of each "
        "view. Guess",
        json_schema_extra={"tune": {"choices": [20, 50, 100, 500]}},
    )
    embedding_size: VectorSize = Field(64, description="length of the vectors that are read. Guess")
    hidden_sizes: tuple[PositiveInt, ...] = Field(
        (128, 64),
        min_length=1,
        description="units of each layer of all towers; the last is the length of a user's and of "
        "an item's vector. Guess; Huang et al. 2013: 300, 300, 128",
    )
    temperature: float = Field(
        0.1,
        gt=0,
        description="scores are cosines divided by this, in training and at scoring. A cosine "
        "alone, at most 1, could hardly tell items apart in a softmax. Guess",
        json_schema_extra={"tune": {"choices": [0.05, 0.07, 0.1, 0.2]}},
    )
    n_examples: int = Field(
        16,
        ge=1,
        description="examples that an epoch draws of each user in each view; a user with fewer in "
        "a view gives all. In a view, each user has the same weight in the loss. Guess",
        json_schema_extra={"tune": {"choices": [8, 16, 32]}},
    )
    n_samples: int | None = Field(
        1024,
        ge=1,
        description="items drawn for a step in each view, from the items of the view, as "
        "candidates besides the targets of the batch; null = all items of the view. Guess",
    )
    learning_rate: LearningRate = Field(
        5e-3,
        description="learning rate of Adam at the first step; it falls linearly to 0. Guess",
    )
    max_items: int = Field(
        200_000,
        ge=2,
        description="largest catalogue, in items, with those that nobody acted on yet. With the "
        "default settings, a rank takes up to 1.7 GB for it, if sparse 1.5 GB, besides 1 GB for "
        "itself, of an executor of 4 GB. Most of that is for the tokens of long texts",
    )

    @property
    def numbers_of_item(self) -> int:
        """See `TowerSettings`: an item's own vector is the one that is read; its other is made."""
        return self.embedding_size

    @property
    def item_bytes(self) -> int:
        """See `TowerSettings`, with as many tokens as an item can have."""
        n_texts = sum(part in ("item_name", "text") for part in self.parts)
        n_tokens = n_texts * self.max_trigrams + len(self.parts) + len(self.item_features)
        return super().item_bytes + _BYTES_OF_TOKEN * n_tokens

    @property
    def view_names(self) -> tuple[str, ...]:
        """The names of the views; the number of a view is its place among them."""
        return tuple(self.views) or (ALL,)

    @property
    def listed(self) -> int:
        """The number of the view that is listed."""
        return 0 if self.list_view is None else self.view_names.index(self.list_view)

    def learnable(self, n_users: torch.Tensor) -> torch.Tensor:
        """Return `n_users` (V,) of each view, with 0 for a view that `learn_views` leaves out."""
        is_learnt = [not self.learn_views or name in self.learn_views for name in self.view_names]
        return n_users * torch.tensor(is_learnt)

    @property
    def token_rules(self) -> TokenRules:
        """How items become tokens, and which view an item is in."""
        views = self.views if self.view_by == "category" else {}
        return TokenRules(self.parts, self.item_features, self.n_buckets, self.max_trigrams, views)

    @model_validator(mode="after")
    def _views_fit(self) -> Self:
        values = [value for of_view in self.views.values() for value in of_view]
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(f"views: {twice} are in two views, or twice in one")
        if sum(not of_view for of_view in self.views.values()) > 1:
            raise ValueError("views: two views have an empty list, which stands for all the rest")
        if self.view_by == "event_type" and not self.views:
            raise ValueError(
                "view_by is event_type, so views must say the event types of each view"
            )
        return self


class Mvdnn(Algorithm[MvdnnSettings]):
    """A user tower that all views share, and an item tower for each view; cosine.

    The loss is a softmax over drawn items of the target's own view, corrected for how they were
    drawn. In each view, each user gives the same number of examples.

    With another `mvdnn` in `needs`, nothing is trained: the model is the network of that one, and
    lists the view `list_view`. All other settings are then those of that model.

    Source: Elkahky, Song, He 2015, "A Multi-View Deep Learning Approach for Cross Domain User
    Modeling in Recommendation Systems".
    """

    settings_class = MvdnnSettings

    @property
    def training_tables(self) -> tuple[str, ...]:
        """See `Algorithm`."""
        is_typed = self.settings.view_by == "event_type"
        return ("training_typed_timelines" if is_typed else "training_timelines",)

    def check_needs(self, kinds: Mapping[str, Kind]) -> None:
        """See `Algorithm`. At most one retriever; without one, `list_view` is one of `views`."""
        settings = self.settings
        if len(kinds) > 1 or {*kinds.values()} - {"retriever"}:
            raise ConfigError(
                f"mvdnn: needs = {[*kinds]}; name one other mvdnn, to list another view of it"
            )
        named = {*settings.learn_views, settings.list_view or settings.view_names[0]}
        if not kinds and (unknown := sorted(named - {*settings.view_names})):
            raise ConfigError(
                f"mvdnn: list_view or learn_views names {unknown}, which is none of the views "
                f"{[*settings.view_names]}; declare it in views, or name in `needs` the mvdnn that "
                "has it"
            )

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> MvdnnModel:
        """See `Algorithm.fit`. Two jobs, and the training.

        The driver holds the vectors and the tokens of all items, nothing per user. Raises
        CatalogueTooLargeError if there are more than `max_items` items, EmptyDataError if no item
        with events has a token and a view, and ModelError where nothing can be learnt of the view
        that is listed.
        """
        settings = self.settings
        if needed:
            [(name, model)] = needed.items()
            return another_view(settings, name, model)
        catalogue = data.items if data.catalogue is None else data.catalogue
        described = catalogue.select("item_idx").toArrow().column("item_idx").to_numpy()
        check_catalogue_size(
            "mvdnn", described, settings.max_items, settings.item_bytes, "item2vec"
        )
        features = flat(data.item_features)
        if lacking := sorted({*settings.item_features} - {*features.columns}):
            raise ModelError(
                f"mvdnn: item_features names {lacking}, but the table has {features.columns}"
            )
        tokens = item_tokens(catalogue, features, settings.token_rules)
        known = tokens.of(data.vocabulary())
        if len(known.item_idx) == 0:
            raise EmptyDataError(
                f"mvdnn: no item with an event has a description ({', '.join(settings.parts)}) and "
                f"is in one of the views {[*settings.view_names]}; are their categories spelt right?"
            )
        train_one_rank = partial(train_rank, known)
        trained = fit_network("mvdnn", data, options, settings, known.item_idx, train_one_rank)
        net = make_net(settings, len(known.item_idx), options.seed)
        load_weights(net, trained)
        options.progress(f"mvdnn: {_summary(settings, net, tokens, len(described))}")
        items, arrays = scoring_arrays(settings, net, known, tokens)
        return MvdnnModel(settings, data.cutoff, items, arrays)


class MvdnnModel(ArraysModel):
    """A trained `Mvdnn`.

    `items` are those of the view that is listed; `items_out` float32 (n_items, H) has their
    vectors, of length 1. Another view, of number K, that learnt anything has the arrays
    `view.K.items` int32 and `view.K.vectors`. `read_items` int32 (n_read,), ascending, are the
    items that the user tower reads, `read_views` int32 their views, and `items_in` float32
    (n_read, E) their vectors. The other arrays are the parameters of the user tower, by name.
    """

    settings: MvdnnSettings
    vectors_array = "items_out"

    def scorer(self) -> topk.Scorer:
        """See `RetrieverModel`."""
        arrays = self.shared_arrays()
        return MvdnnScorer(
            self.settings, {name: a for name, a in arrays.items() if not name.startswith("view.")}
        )


@dataclass(frozen=True)
class MvdnnScorer:
    """Computes the vector of each user from the history of the query. `arrays`: see `MvdnnModel`."""

    settings: MvdnnSettings
    arrays: dict[str, topk.Shared]

    def score(self, block: QueryBlock) -> topk.Scores:
        """See `topk.Scorer`. A user without an event in any view gets no list."""
        arrays = {name: np.asarray(shared.array) for name, shared in self.arrays.items()}
        users, is_known = user_vectors(self.settings, arrays, block.history)
        no_bias = None
        scaled = users / np.float32(self.settings.temperature)
        return topk.DotScores(scaled, arrays["items_out"], no_bias, is_known)


def another_view(settings: MvdnnSettings, name: str, model: FittedModel) -> MvdnnModel:
    """Return the model of `settings.list_view` of the fitted model called `name`.

    Raises ModelError where that is no `MvdnnModel`, or has no vectors of the view.
    """
    if not isinstance(model, MvdnnModel):
        raise ModelError(
            f"mvdnn: the needed model '{name}' is a {type(model).__name__}; name an mvdnn in `needs`"
        )
    trained, arrays = model.settings, dict(model.arrays())
    asked = settings.list_view or trained.view_names[0]
    if asked == trained.view_names[trained.listed]:
        return MvdnnModel(trained, model.cutoff, model.items, arrays)
    numbers = {name: number for number, name in enumerate(trained.view_names)}
    of_view = f"view.{numbers.get(asked)}"
    if f"{of_view}.items" not in arrays:
        raise ModelError(
            f"mvdnn: the needed model '{name}' learnt nothing of the view '{asked}'; it has "
            f"{[*trained.view_names]}. Is list_view spelt right, and did users act in the view after "
            "something else?"
        )
    items, vectors = arrays[f"{of_view}.items"], arrays[f"{of_view}.vectors"]
    of_users = {n: a for n, a in arrays.items() if n != "items_out" and not n.startswith("view.")}
    listing = trained.model_copy(update={"list_view": asked})
    return MvdnnModel(listing, model.cutoff, items, {**of_users, "items_out": vectors})


def user_vectors(
    settings: MvdnnSettings, arrays: dict[str, Array], history: Histories
) -> tuple[Array, Array]:
    """Return the vector of each user, float32 (n, H), and who has an event in a view, bool (n,).

    Computed in float64 by one thread, in blocks of exactly `_BLOCK_ROWS` users, whose items are
    padded to the setting `length`. So the vector of a user does not depend on the users beside it.
    """
    newest = newest_known(history, arrays["read_items"], settings.length)
    events = Ragged(newest.start, local_index(arrays["read_items"], newest.item_idx))
    types = None if settings.view_by == "category" else type_codes(newest.event_type)
    views = event_views(
        settings,
        torch.from_numpy(np.array(arrays["read_views"])).long(),
        torch.from_numpy(events.values),
        None if types is None else torch.from_numpy(types).long(),
    ).numpy()  # (n_events,)
    n_views = len(settings.view_names)
    net = MvdnnNet(1, n_views, settings.embedding_size, 1, settings.hidden_sizes, torch.Generator())
    net = net.double().eval()
    for name, parameter in net.named_parameters():
        if name.startswith("users_"):
            parameter.data = torch.from_numpy(arrays[name].astype(np.float64))

    def vectors_of(
        embedded: torch.Tensor, block_views: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        histories = ViewHistories(embedded, block_views, n_views)
        means, numbers = histories.before(torch.arange(len(lengths)), lengths, settings.window)
        return user_tower(net, settings, means, numbers)  # (B, H)

    vectors = vectors_in_blocks(
        events,
        views,  # in the place of ages, which this network does not read
        arrays["items_in"],
        (_BLOCK_ROWS, settings.length),
        settings.hidden_sizes[-1],
        -1,
        vectors_of,
    )
    n_in_views = np.bincount(events.rows[views >= 0], minlength=len(events.lengths))
    return vectors, n_in_views > 0


def scoring_arrays(
    settings: MvdnnSettings, net: MvdnnNet, known: ItemTokens, tokens: ItemTokens
) -> tuple[Array, dict[str, Array]]:
    """Return the items that are listed, int32 ascending, and the arrays of `MvdnnModel`.

    `known` : the items that the network read; `tokens` : all items. Raises ModelError where the view
    that is listed learnt nothing.
    """
    arrays = {name: a for name, a in net_arrays(net).items() if name.startswith("users_")}
    arrays |= {"items_in": net.items_in.detach().numpy().copy()}
    arrays |= {"read_items": known.item_idx, "read_views": known.views}
    listed = tokens.item_idx[:0]
    for view, name in enumerate(settings.view_names):
        of_view = tokens
        if settings.view_by == "category":
            of_view = tokens.only(tokens.views == view)
        if net.view_users[view] > 0:
            vectors = item_vectors(net, view, of_view)
            if view == settings.listed:
                listed, arrays["items_out"] = of_view.item_idx, vectors
            else:
                arrays[f"view.{view}.items"] = of_view.item_idx
                arrays[f"view.{view}.vectors"] = vectors
        elif view == settings.listed:
            raise ModelError(
                f"mvdnn: no user acted in the view '{name}' after anything else, or learn_views "
                "leaves it out, so nothing is learnt of it; list another view, or correct what "
                "models.mvdnn.views says of it"
            )
    return listed, arrays


def item_vectors(net: MvdnnNet, view: int, tokens: ItemTokens) -> Array:
    """Return the vectors of items by the tower of a view, float32 (n, H)."""
    bags = TokenBags(tokens)
    vectors = [torch.zeros(0, net.items_1_bias.shape[1])]
    with torch.no_grad(), one_thread():
        for begin in range(0, len(tokens.item_idx), _BLOCK_ITEMS):
            end = min(begin + _BLOCK_ITEMS, len(tokens.item_idx))
            vectors.append(net.items(view, bags.of(torch.arange(begin, end))))
    return torch.cat(vectors[1:] or vectors).float().numpy()


def make_net(settings: MvdnnSettings, n_items: int, seed: int) -> MvdnnNet:
    """Return the network with first weights drawn from `seed`."""
    return MvdnnNet(
        n_items,
        len(settings.view_names),
        settings.embedding_size,
        settings.n_buckets,
        settings.hidden_sizes,
        torch.Generator().manual_seed(seed),
        settings.is_sparse,
    )


class TokenBags:
    """The tokens of all items as tensors, from which a step takes those of its candidates."""

    def __init__(self, tokens: ItemTokens) -> None:
        self._starts = torch.from_numpy(np.array(tokens.starts))  # (n_items + 1,)
        self._codes = torch.from_numpy(np.array(tokens.codes))  # (n_tokens,)
        self._weights = torch.from_numpy(np.array(tokens.weights))  # (n_tokens,)

    def of(self, items: torch.Tensor) -> Bags:
        """Return the tokens of `items`, int64 (N,): positions in the tokens."""
        if self._starts.device != items.device:
            self._starts, self._codes, self._weights = (
                values.to(items.device) for values in (self._starts, self._codes, self._weights)
            )
        begins, ends = self._starts[items], self._starts[items + 1]  # (N,) each
        lengths = ends - begins
        starts = lengths.cumsum(0) - lengths  # (N,)
        total = int(lengths.sum())
        within = torch.arange(total, device=items.device) - starts.repeat_interleave(lengths)
        place = begins.repeat_interleave(lengths) + within  # (M,)
        return Bags(starts, self._codes[place].long(), self._weights[place])


@dataclass(frozen=True)
class View:
    """What the loss needs of a view.

    `items` int64 (n,), ascending local items: those with an event in the view, which compete for
    its targets. `oldest` int64 (n,): the age of each one's oldest event in the view. `weight` : what
    the mean loss of a user in this view counts.
    """

    number: int
    items: torch.Tensor
    oldest: torch.Tensor
    negatives: Negatives
    weight: float


def train_rank(known: ItemTokens, comm: Comm, job: Job) -> Trained:
    """Train on one rank; see `recspark.train.launch`. `known`: the tokens of the vocabulary."""
    settings: MvdnnSettings = job.settings
    columns = COLUMNS if settings.view_by == "category" else (*COLUMNS, "types")
    task = NetworkTask(comm, job, columns)
    reader = RowReader(settings, task.vocabulary, torch.from_numpy(known.views).long())
    oldest, counts, n_users = view_statistics(comm, task.feed.epoch(0), reader)
    views = views_to_learn(settings, oldest, counts, n_users, task.feed.n_rows_of_all)
    if not views:
        raise ModelError(
            f"mvdnn: no user has an event in the views {[*settings.view_names]} after an earlier "
            "one, so there is nothing to learn; correct models.mvdnn.views"
        )
    net = make_net(settings, task.n_items, task.seed)
    net.view_users.data = settings.learnable(n_users).float()  # (V,)
    loss: Any = partial(row_loss, net, reader, TokenBags(known), views)
    return task.train(net, loss, with_the_same_draws(loss))


@dataclass(frozen=True)
class ViewRows:
    """The rows of a batch: `timelines`, and beside each item (B, L) the view of its event.

    `views` int64: -1 = in no view, and in the padding. `n_older` int64: how many events of the row
    are older than the event, in seconds. `is_target` bool: some older event is in a view.
    """

    timelines: Timelines
    views: torch.Tensor
    n_older: torch.Tensor
    is_target: torch.Tensor


@dataclass(frozen=True)
class RowReader:
    """Reads batches of `training_timelines`.

    `vocabulary` int64 (n_items,), ascending; `item_views` int64 (n_items,), the view of each item.
    """

    settings: MvdnnSettings
    vocabulary: torch.Tensor
    item_views: torch.Tensor

    def rows(self, batch: Batch) -> ViewRows:
        """Return the rows of a batch. Rows of weight 0 have no target."""
        timelines = timelines_of(batch, self.vocabulary)
        items, ages = timelines.items, timelines.ages  # (B, L) each
        views = event_views(self.settings, self.item_views, items, timelines.types)  # (B, L)
        place = torch.arange(items.shape[1], device=items.device)  # (L,)
        is_new_time = torch.ones_like(items, dtype=torch.bool)  # (B, L)
        is_new_time[:, 1:] = ages[:, 1:] < ages[:, :-1]
        n_older = torch.where(is_new_time, place, 0).cummax(dim=1).values  # (B, L)
        n_in_views = torch.nn.functional.pad((views >= 0).cumsum(dim=1), (1, 0))  # (B, L + 1)
        is_target = (views >= 0) & (batch.weight[:, None] > 0) & (n_in_views.gather(1, n_older) > 0)
        return ViewRows(timelines, views, n_older, is_target)


def event_views(
    settings: MvdnnSettings,
    item_views: torch.Tensor,
    items: torch.Tensor,
    types: torch.Tensor | None,
) -> torch.Tensor:
    """Return the view of each event, int64, in the shape of `items`; -1 = none.

    `items` int64 (...): local items, padding is -1. `item_views` int64 (n_items,). `types` int64
    (...): codes of the event types, where these decide.
    """
    if settings.view_by == "category":
        views = item_views.to(items.device)[items.clamp_min(0)]
    else:
        assert types is not None
        views = torch.full_like(items, -1)
        for view, names in enumerate(settings.views.values()):
            if not names:
                views[:] = view
        for view, names in enumerate(settings.views.values()):
            for name in names:
                views = views.masked_fill(types == type_code(name), view)
    return views.masked_fill(items < 0, -1)


def view_statistics(
    comm: Comm, batches: Iterator[Batch], reader: RowReader
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what the rows of all ranks say of each item in each view; V views.

    - int64 (V, n_items): the age of the item's oldest event in the view; -1 = it has none
    - float64 (V, n_items): how often the item is expected as a target of the view in an epoch
    - float64 (V,): the number of users with a target in the view
    """
    n_views, n_items = len(reader.settings.view_names), len(reader.vocabulary)
    oldest = torch.full((n_views, n_items), -1)
    counts = torch.zeros(n_views, n_items, dtype=torch.float64)
    n_users = torch.zeros(n_views, dtype=torch.float64)
    for batch in batches:
        rows = reader.rows(batch)
        items, ages = rows.timelines.items, rows.timelines.ages  # (B, L) each
        for view in range(n_views):
            is_in = (rows.views == view) & (batch.weight[:, None] > 0)  # (B, L)
            oldest[view].scatter_reduce_(0, items[is_in], ages[is_in], "amax")
            is_target = is_in & rows.is_target  # (B, L)
            n_targets = is_target.sum(dim=1)  # (B,)
            chance = (reader.settings.n_examples / n_targets.double()).clamp_max(1)  # (B,)
            row, column = torch.nonzero(is_target, as_tuple=True)  # (P,) each
            counts[view].index_add_(0, items[row, column], chance[row])
            n_users[view] += (n_targets > 0).sum()
    oldest = comm.allgather(oldest[None]).amax(dim=0)
    return oldest, comm.allreduce(counts), comm.allreduce(n_users)


def views_to_learn(
    settings: MvdnnSettings,
    oldest: torch.Tensor,
    counts: torch.Tensor,
    n_users: torch.Tensor,
    n_rows: int,
) -> list[View]:
    """Return the views that have targets; the other arguments are those of `view_statistics`.

    The loop divides the sum of the losses of all rows by `n_rows`. With the weights made here, the
    result is the mean over views of the mean over the users of a view (`view_balance` 1), or the
    mean over all pairs of a user and a view (0).
    """
    learnt = [view for view, n in enumerate(settings.learnable(n_users).tolist()) if n > 0]
    shares = n_users[learnt] ** (1 - settings.view_balance)  # of each view in the loss
    weights = (n_rows * shares / shares.sum() / n_users[learnt]).tolist()
    views = []
    for view, weight in zip(learnt, weights, strict=True):
        items = torch.nonzero(oldest[view] >= 0)[:, 0]  # (n,)
        negatives = Negatives(counts[view][items], settings.n_samples, settings.sample_alpha)
        views.append(View(view, items, oldest[view][items], negatives, weight))
    return views


def row_loss(
    net: MvdnnNet,
    reader: RowReader,
    bags: TokenBags,
    views: Sequence[View],
    batch: Batch,
    generator: torch.Generator,
    done: float,
) -> torch.Tensor:
    """Return the loss of each row (user), (B,): over its views, the weighted mean of its examples.

    `done` is not used.
    """
    settings, rows = reader.settings, reader.rows(batch)
    items = rows.timelines.items  # (B, L)
    embedded = net.read(items.clamp_min(0)) * (items >= 0)[:, :, None]  # (B, L, E)
    histories = ViewHistories(embedded, rows.views, len(settings.view_names))
    loss = embedded.new_zeros(len(items))  # (B,)
    for view in views:
        is_target = rows.is_target & (rows.views == view.number)  # (B, L)
        examples = drawn_examples(is_target, settings.n_examples, generator)
        losses = example_losses(
            net, settings, bags, view, rows, histories, examples, generator
        )  # (P,)
        loss = loss + view.weight * mean_per_row(losses, examples.rows, len(items))
    return loss


def example_losses(
    net: MvdnnNet,
    settings: MvdnnSettings,
    bags: TokenBags,
    view: View,
    rows: ViewRows,
    histories: ViewHistories,
    examples: Examples,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return the sampled softmax loss of each example of a view, (P,).

    An example reads only events that are older than its target. All examples of the view share the
    candidates, which are items of the view.
    """
    place = examples.rows, examples.ends
    n_older = rows.n_older[place]  # (P,)
    means, numbers = histories.before(examples.rows, n_older, settings.window)
    draws = torch.rand(len(n_older), generator=generator, device=n_older.device)  # (P,)
    is_known_elsewhere = numbers.sum(dim=1) > numbers[:, view.number]  # (P,)
    is_hidden = torch.zeros_like(numbers, dtype=torch.bool)  # (P, V)
    is_hidden[:, view.number] = (draws < settings.own_view_dropout) & is_known_elsewhere
    means = means.masked_fill(is_hidden[:, :, None], 0)  # (P, V, E)
    users = user_tower(net, settings, means, numbers.masked_fill(is_hidden, 0))  # (P, H)
    items = view.items.to(n_older.device)  # (n,)

    def scores_of(candidates: torch.Tensor) -> torch.Tensor:
        vectors = net.items(view.number, bags.of(items[candidates]))  # (N, H)
        return users @ vectors.T / settings.temperature  # (P, N)

    return sampled_softmax(
        scores_of,
        torch.searchsorted(items, rows.timelines.items[place]),
        rows.timelines.ages[place],
        view.negatives,
        view.oldest if settings.existing_only else None,
        settings.logq,
        generator,
    )


def user_tower(
    net: MvdnnNet, settings: MvdnnSettings, means: torch.Tensor, numbers: torch.Tensor
) -> torch.Tensor:
    """Return the vectors of P users, (P, H).

    `means` (P, V, E) and `numbers` int64 (P, V): as `ViewHistories.before` returns them.
    """
    counts = torch.log1p(numbers.to(means.dtype)) / np.log1p(settings.window)  # (P, V)
    is_any = (numbers > 0).to(means.dtype)  # (P, V)
    return net.users(means, torch.stack([is_any, counts], dim=2))


def _summary(settings: MvdnnSettings, net: MvdnnNet, tokens: ItemTokens, n_described: int) -> str:
    """Return a line of text on the views, and on the items that are left out."""
    users = net.view_users.tolist()
    is_by_item = settings.view_by == "category"
    views = ", ".join(
        f"{name} {(tokens.views == view).sum() if is_by_item else len(tokens.views):,} items and "
        f"{users[view]:,.0f} users"
        for view, name in enumerate(settings.view_names)
    )
    return f"{views}; {n_described - len(tokens.views):,} items are in no view or have no tokens"
