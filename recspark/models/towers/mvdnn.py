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

from collections.abc import Mapping
from functools import partial

from recspark.data.dataset import Dataset
from recspark.data.feature_encoding import flat
from recspark.errors import ConfigError, EmptyDataError, ModelError
from recspark.models.base import NOTHING, Algorithm, ArraysModel, FitOptions, FittedModel, Needed
from recspark.models.kinds import Kind
from recspark.models.neural import check_catalogue_size, fit_network
from recspark.models.scoring import topk
from recspark.models.towers.item_tokens import ItemTokens, item_tokens
from recspark.models.towers.mvdnn_scoring import MvdnnScorer, scoring_arrays
from recspark.models.towers.mvdnn_settings import MvdnnSettings
from recspark.models.towers.mvdnn_towers import make_net
from recspark.models.towers.mvdnn_training import train_rank
from recspark.nets.mvdnn import MvdnnNet
from recspark.train.loop import load_weights


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
