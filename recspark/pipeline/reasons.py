"""The reasons of tonight's published rows: which fitted models give them."""

from __future__ import annotations

from collections.abc import Sequence

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.data.interactions import before
from recspark.hybrid.reasons import Speakers, Voice, speakers_of, with_reasons
from recspark.models.base import RetrieverModel
from recspark.models.registry import spec_of
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import load_retriever, why_not_fitted
from recspark.pipeline.pairs import queries_of_retrievers
from recspark.pipeline.plan import models_of
from recspark.pipeline.runlog import OK


def with_because(
    context: RunContext, lists: DataFrame, items: DataFrame, models: Sequence[str]
) -> DataFrame:
    """Return `lists` with the column `because` (`schema.BECAUSE`) of table `recommendations`.

    Parameters
    ----------
    lists : user_idx, item_idx, model, and any other columns
    items : item_idx, item_id, item_name of every item
    models : the models that `lists` may name: the champion and the ladder of every list

    Rows that were kept from an earlier night have `because` already, and keep it: like their score,
    it is what the model of that night said. Null everywhere where `publish.because` is 0.

    Cost: that of `with_reasons`, and a small job for the names of the items, which the driver
    holds: about 50 bytes per item.
    """
    n_reasons = context.config.publish.because
    givers = reason_givers(context, models) if n_reasons else {}
    if not givers:
        stands = F.col("because") if "because" in lists.columns else F.lit(None)
        return lists.withColumn("because", stands.cast(schema.BECAUSE))
    cutoff = context.cutoffs.tonight
    histories = before(context.read("histories"), cutoff, ratings=context.config.features.explicit)
    retrievers = {name: model for name, (model, _) in givers.items()}
    names = items.select("item_idx", "item_id", "item_name").toArrow().sort_by("item_idx")
    return with_reasons(
        lists,
        queries_of_retrievers(context, retrievers, cutoff, histories),
        {name: voice for name, (_, voice) in givers.items()},
        speakers(context, models, tuple(givers)),
        names.combine_chunks(),
        n_reasons,
    )


def reason_givers(
    context: RunContext, models: Sequence[str]
) -> dict[str, tuple[RetrieverModel, Voice]]:
    """Return the fitted retrievers of tonight that give the reasons of the rows of `models`.

    These are the ones among `models`, among the retrievers that these are built on, and
    `publish.neighbours_model`, whose scores are sums over the user's items. A model that failed
    tonight, or that had too little data, is not among them.
    """
    config, cutoff = context.config, context.cutoffs.tonight
    neighbours_model = config.publish.neighbours_model
    candidates = config.with_needs([*models, *([neighbours_model] if neighbours_model else [])])
    givers: dict[str, tuple[RetrieverModel, Voice]] = {}
    for name in models_of(config, "retriever", among=candidates):
        row = context.runlog.find("train", name)
        if row is None or row.status != OK or why_not_fitted(context, name, cutoff):
            continue
        model = load_retriever(context, name, cutoff)
        if (voice := Voice.of(model)) is not None:
            givers[name] = model, voice
    used = speakers(context, models, tuple(givers)).values()
    names = {name for groups in used for group in groups for name in group}
    return {name: giver for name, giver in givers.items() if name in names}


def speakers(context: RunContext, models: Sequence[str], voices: Sequence[str]) -> Speakers:
    """Return which of `voices` give the reasons of the rows of each of `models`."""
    config = context.config

    def retrievers_below(model: str) -> Sequence[str]:
        if model in models_of(config, "retriever"):
            return ()
        return models_of(config, "retriever", among=config.with_needs([model]))

    def is_personal(model: str) -> bool:
        return "personal" in spec_of(model, config.settings_of(model)).tags

    return speakers_of(
        models, voices, retrievers_below, is_personal, config.publish.neighbours_model
    )
