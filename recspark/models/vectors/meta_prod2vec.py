"""Meta-Prod2Vec: prod2vec in which the metadata of items have vectors too, in the same space."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field
from pyspark.sql import functions as F

from recspark.data import training_texts
from recspark.data.blocks import Array, local_index
from recspark.data.dataset import Dataset
from recspark.engines.word2vec_examples import Metadata
from recspark.models.vectors.prod2vec import Prod2Vec, Prod2VecModel, Prod2VecSettings

_CATEGORY = "category="  # how the words of categories begin, in `training_texts.words`


class MetaProd2VecSettings(Prod2VecSettings):
    """Settings of `MetaProd2Vec`."""

    metadata: tuple[Literal["category", "words"], ...] = Field(
        ("category",),
        min_length=1,
        description="what the metadata of an item are: category = its categories, words = the "
        "words of its name and text",
    )
    metadata_weight: float = Field(
        0.25,
        ge=0,
        le=1,
        description="how much an example with metadata counts beside one of two items; 0 = "
        "prod2vec. Vasile et al. 2016 (lambda) tried 0.05 to 1",
        json_schema_extra={"tune": {"choices": [0.01, 0.05, 0.25, 1.0]}},
    )


class MetaProd2VecModel(Prod2VecModel):
    """The fitted vectors, and the most similar items of each item; see `Prod2VecModel`."""


class MetaProd2Vec(Prod2Vec):
    """As `Prod2Vec`; the metadata of the items in a window are predicted, and predict, as well.

    Beside the pairs of items in one window, training fits four more kinds of pairs, each with the
    weight `metadata_weight`: item and metadata of the other item, metadata and the other item,
    metadata and metadata, and metadata and their own item.

    Source: Vasile, Smirnova and Conneau 2016, "Meta-Prod2Vec: Product Embeddings Using
    Side-Information for Recommendation", equation 5.
    """

    settings_class = MetaProd2VecSettings
    fitted_class = MetaProd2VecModel
    settings: MetaProd2VecSettings

    def metadata(self, data: Dataset, items: Array) -> Metadata:
        """Return the tokens of each of `items`. Two jobs; the driver holds a row per item and token.

        A token is a word or a category of two items or more: that of a single item says nothing
        about other items.
        """
        words = training_texts.words(data.items).select("item_idx", "word")
        is_category = F.col("word").startswith(_CATEGORY)
        kinds = self.settings.metadata
        if "words" not in kinds:
            words = words.where(is_category)
        elif "category" not in kinds:
            words = words.where(~is_category)
        table = words.toArrow()
        word = table.column("word").combine_chunks().dictionary_encode()
        name = word.dictionary.to_numpy(zero_copy_only=False)
        code, item = (
            word.indices.to_numpy(),
            local_index(items, table.column("item_idx").to_numpy()),
        )
        is_kept = (np.bincount(code, minlength=len(name)) >= training_texts.LEAST_ITEMS)[code]
        is_kept &= item >= 0
        # Number the tokens in the order of their names: the order of rows means nothing.
        kept_codes = np.unique(code[is_kept])
        number = np.zeros(len(name), np.int64)
        number[kept_codes[np.argsort(name[kept_codes].astype(str))]] = np.arange(len(kept_codes))
        token, item = number[code[is_kept]], item[is_kept]
        order = np.lexsort((token, item))
        start = np.concatenate([[0], np.cumsum(np.bincount(item, minlength=len(items)))])
        return Metadata(
            start.astype(np.int64),
            token[order].astype(np.int32),
            len(kept_codes),
            self.settings.metadata_weight,
        )
