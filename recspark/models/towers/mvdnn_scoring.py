"""Scores by a trained `mvdnn`: the arrays that it keeps, and the vectors of users from histories."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from recspark.data.blocks import Array, Histories, QueryBlock, Ragged, local_index
from recspark.data.training_rows import type_codes
from recspark.errors import ModelError
from recspark.models.neural import net_arrays
from recspark.models.scoring import topk
from recspark.models.towers.item_tokens import ItemTokens
from recspark.models.towers.mvdnn_settings import MvdnnSettings
from recspark.models.towers.mvdnn_towers import item_vectors, user_tower
from recspark.models.towers.mvdnn_views import event_views
from recspark.models.towers.timelines import newest_known, vectors_in_blocks
from recspark.nets.mvdnn import MvdnnNet, ViewHistories

# Users whose vectors are computed at once. Always this many (short blocks are filled up), because
# the rounding of a sum depends on the shape of the arrays.
_BLOCK_ROWS = 32


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
