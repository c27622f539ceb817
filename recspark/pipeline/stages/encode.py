"""Stage encode: one encoder's vectors of the items whose content is new to that encoder."""

from __future__ import annotations

from functools import reduce

from pyspark import StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.data.content import TRIED_AGAIN, content_as_of
from recspark.models.base import EncoderModel
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import cutoffs_of, load_model, vectors_key, why_not_fitted
from recspark.pipeline.runlog import StageResult

# A vector is known by the fitted encoder, the item, and a digest of the item's content.
_KEY = ["artifact", "item_idx", "content"]


def encode(context: RunContext, model: str) -> StageResult:
    """Write one encoder's slice of `item_vectors`.

    The slice holds, for each artifact of tonight (one fitted encoder per cutoff), the vectors of
    the items as they were described before that cutoff.

    Rows of the slice with the same artifact and the same content stay. Only the other items are
    encoded. For an encoder that learns nothing from data (`Algorithm.keeps_vectors`), the others are
    the items that are new or changed since last night; for an encoder that was trained anew, they
    are all items. An item that
    the encoder has no vector for gets a row with a null vector, with the reason where the encoder
    says it. It is not tried again, except where the reason may pass (`TRIED_AGAIN`). `detail` counts
    tonight's items without a vector by reason.
    """
    catalog = context.catalog
    current = catalog.version("item_vectors")
    stays = F.col("problem").isNull() | ~F.col("problem").isin(*TRIED_AGAIN)
    stored = catalog.read("item_vectors", current).where((F.col("encoder") == F.lit(model)) & stays)
    # One frame for each cutoff so far: the keys that the slice must have (artifact, item_idx,
    # content), the content of the items that have to be encoded, and the vectors of these items
    # with their keys.
    keys_by_cutoff: list[DataFrame] = []
    new_items_by_cutoff: list[DataFrame] = []
    new_vectors_by_cutoff: list[DataFrame] = []
    try:
        for cutoff in cutoffs_of(context, model):
            if why_not_fitted(context, model, cutoff):
                continue
            encoder = load_model(context, model, cutoff)
            assert isinstance(encoder, EncoderModel), model
            # As of one cutoff an item has one content, so each key occurs once.
            items_at_cutoff = content_as_of(context.read("items"), cutoff).withColumn(
                "artifact", F.lit(vectors_key(context, model, cutoff))
            )
            # Leave out what is stored already, and what an earlier cutoff of this loop encodes.
            items_to_encode = items_at_cutoff
            for encoded_rows in (stored, *keys_by_cutoff):
                items_to_encode = items_to_encode.join(
                    encoded_rows.select(*_KEY), on=_KEY, how="left_anti"
                )
            items_to_encode = items_to_encode.persist(StorageLevel.MEMORY_AND_DISK)
            keys_by_cutoff.append(items_at_cutoff.select(*_KEY))
            new_items_by_cutoff.append(items_to_encode)
            encoded_items = encoder.encode_or_explain(
                items_to_encode.select(*encoder.content_schema.names)
            )
            new_vectors_by_cutoff.append(
                items_to_encode.select(*_KEY).join(encoded_items, on="item_idx", how="left")
            )
        kept_rows = stored.join(
            reduce(DataFrame.unionByName, keys_by_cutoff), on=_KEY, how="left_semi"
        )
        new_rows = reduce(DataFrame.unionByName, new_vectors_by_cutoff).withColumns(
            {"encoder": F.lit(model), "encoded_date": F.lit(context.run_date).cast("date")}
        )
        names = schema.ITEM_VECTORS.names
        rows = kept_rows.select(*names).unionByName(new_rows.select(*names))
        written = catalog.replace_slice(
            "item_vectors", rows, {"encoder": model}, expected=current, any_commit_conflicts=False
        )
        n_new = sum(new_items.count() for new_items in new_items_by_cutoff)
    finally:
        for new_items in new_items_by_cutoff:
            new_items.unpersist()
    context.progress(f"  {model}: {n_new:,} of {written.rows:,} items encoded anew")
    problems = _problems(context, model, written.version)
    if problems:
        n_by_reason = ", ".join(f"{reason} {n:,}" for reason, n in problems.items())
        context.progress(f"  {model}: items without a vector: {n_by_reason}")
    outputs = {"item_vectors": written.version}
    detail = {"encoded": n_new, "problems": problems}
    return StageResult(outputs, context.count("items"), written.rows, detail)


def _problems(context: RunContext, model: str, version: int) -> dict[str, int]:
    """Return reason -> number of the items that have no vector tonight, most frequent first."""
    artifact = vectors_key(context, model, context.cutoffs.tonight)
    is_of_tonight = (F.col("encoder") == F.lit(model)) & (F.col("artifact") == F.lit(artifact))
    rows = context.catalog.read("item_vectors", version).where(is_of_tonight)
    counts = rows.where(F.col("problem").isNotNull()).groupBy("problem").count()
    return {row[0]: row[1] for row in counts.orderBy(F.desc("count"), "problem").collect()}
