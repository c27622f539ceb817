"""Stage encode: one encoder's vectors of the items whose content is new to it."""

from __future__ import annotations

from functools import reduce

from pyspark import StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.data.content import content_as_of
from recspark.models.base import EncoderModel
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import cutoffs_of, load_model, vectors_key, why_not_fitted
from recspark.pipeline.runlog import StageResult

_KEY = ["artifact", "item_idx", "content"]


def encode(context: RunContext, model: str) -> StageResult:
    """Write one encoder's slice of `item_vectors`: of each artifact of tonight the items as they were
    before its cutoff.

    What the slice has already, of the same artifact and content, stays; only the rest is encoded: of an
    encoder that learns nothing what is new since last night, of one that is trained anew all. An item
    that the encoder has no vector of gets a row without one, and is not tried again.
    """
    catalog = context.catalog
    current = catalog.version("item_vectors")
    stored = catalog.read("item_vectors", current).where(F.col("encoder") == F.lit(model))
    asked: list[DataFrame] = []  # artifact, item_idx, content of the cutoffs so far
    new: list[DataFrame] = []
    vectors: list[DataFrame] = []
    try:
        for cutoff in cutoffs_of(context, model):
            if why_not_fitted(context, model, cutoff):
                continue
            fitted = load_model(context, model, cutoff)
            assert isinstance(fitted, EncoderModel), model
            # As of one cutoff an item has one content.
            wanted = content_as_of(context.read("items"), cutoff).withColumn(
                "artifact", F.lit(vectors_key(context, model, cutoff))
            )
            unknown = wanted
            for known in (stored, *asked):
                unknown = unknown.join(known.select(*_KEY), on=_KEY, how="left_anti")
            unknown = unknown.persist(StorageLevel.MEMORY_AND_DISK)
            asked.append(wanted.select(*_KEY))
            new.append(unknown)
            coded = fitted.encode(unknown.select(*schema.CONTENT.names))
            vectors.append(unknown.select(*_KEY).join(coded, on="item_idx", how="left"))
        kept = stored.join(reduce(DataFrame.unionByName, asked), on=_KEY, how="left_semi")
        fresh = reduce(DataFrame.unionByName, vectors).withColumns(
            {"encoder": F.lit(model), "encoded_date": F.lit(context.run_date).cast("date")}
        )
        names = schema.ITEM_VECTORS.names
        rows = kept.select(*names).unionByName(fresh.select(*names))
        written = catalog.replace_slice(
            "item_vectors", rows, {"encoder": model}, expected=current, whole=False
        )
        n_new = sum(frame.count() for frame in new)
    finally:
        for frame in new:
            frame.unpersist()
    context.progress(f"  {model}: {n_new:,} of {written.rows:,} items encoded anew")
    outputs = {"item_vectors": written.version}
    return StageResult(outputs, context.count("items"), written.rows, {"encoded": n_new})
