"""What rules read of all items: names, categories, prices and ages, as arrays on the driver."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame

from recspark.config.rules import SelectingRule
from recspark.data.blocks import Array
from recspark.errors import ConfigError, suggest
from recspark.hybrid.rule_kernels import Similarity


@dataclass(frozen=True)
class RuleItems:
    """All items, in the order of `items`; the position of an item there is its local index.

    Parameters
    ----------
    items : int32 (n_items,), ascending: the item_idx of each local index
    item_id, item_name : texts; a name may be null
    category : lists of texts, the first level first; a list may be null
    price : float64 (n_items,), NaN = unknown
    age_days : float64 (n_items,), days from the item's first event to the cutoff; NaN = no event
    """

    items: Array
    item_id: pa.Array
    item_name: pa.Array
    category: pa.ListArray
    price: Array
    age_days: Array

    @classmethod
    def of(cls, items: DataFrame) -> RuleItems:
        """Return the items of `item_idx, item_id, item_name, category, price, age_days`.

        One job; the driver holds the complete frame.
        """
        columns = ("item_idx", "item_id", "item_name", "category", "price", "age_days")
        rows = items.select(*columns).toArrow().sort_by("item_idx").combine_chunks()
        arrays = {name: _one_chunk(rows.column(name)) for name in columns}
        return cls(
            arrays["item_idx"].to_numpy(),
            arrays["item_id"],
            arrays["item_name"],
            arrays["category"],
            *(arrays[name].to_numpy(zero_copy_only=False).astype(float) for name in columns[4:]),
        )

    def __len__(self) -> int:
        return len(self.items)

    def selected(self, rule: SelectingRule) -> Array:
        """Return whether the rule names each item, bool (n_items,)."""
        mask = np.zeros(len(self), bool)
        mask |= _is_in(self.item_id, rule.items)
        row, category = self.categories
        mask[row[_is_in(category, rule.categories)]] = True
        row, word = self.words
        mask[row[_is_in(word, [text.lower() for text in rule.words])]] = True
        return mask

    def check(self, name: str, rule: SelectingRule) -> None:
        """Raise ConfigError where the rule `name` names an item, category or word that no item has."""
        known_of: list[tuple[str, Sequence[str], pa.Array]] = [
            ("items", rule.items, self.item_id),
            ("categories", rule.categories, self.categories[1]),
            ("words", [text.lower() for text in rule.words], self.words[1]),
        ]
        for setting, texts, known in known_of:
            check_known(f"rules.{name}.{setting}", setting, texts, known)

    @cached_property
    def categories(self) -> tuple[Array, pa.Array]:
        """Each category of each item: the item's local index int64 (p,), and the name (p,)."""
        row, names = _flattened(self.category)
        is_name = names.is_valid().to_numpy(zero_copy_only=False)
        return row[is_name], names.filter(pa.array(is_name))

    @cached_property
    def words(self) -> tuple[Array, pa.Array]:
        """Each word of each item's name, in lower case: the item's local index int64 (p,), and the
        word (p,). A word is of letters and digits.
        """
        text = pc.utf8_lower(self.item_name.fill_null(""))
        text = pc.utf8_trim_whitespace(
            pc.replace_substring_regex(text, pattern=r"[^\p{L}\p{N}]+", replacement=" ")
        )
        row, words = _flattened(pc.split_pattern(text, pattern=" "))
        is_word = pc.not_equal(words, "").to_numpy(zero_copy_only=False)
        return row[is_word], words.filter(pa.array(is_word))

    def category_at(self, level: int) -> Array:
        """Return a number for each item's category of a level (1 = the first), int32 (n_items,).

        -1 = the item has no category of that level.
        """
        row, names = _flattened(self.category)
        start = np.searchsorted(row, np.arange(len(self)))
        is_of_level = np.arange(len(row)) - start[row] == level - 1
        of_level = names.filter(pa.array(is_of_level)).dictionary_encode().indices
        codes = np.full(len(self), -1, np.int32)
        codes[row[is_of_level]] = of_level.fill_null(-1).to_numpy(zero_copy_only=False)
        return codes

    def price_step(self, factor: float) -> Array:
        """Return the step of each item's price, int32 (n_items,): prices from factor^s to below
        factor^(s + 1) are of the step s. Items without a price above 0 get the smallest int32.
        """
        has_price = self.price > 0
        steps = np.full(len(self), np.iinfo(np.int32).min, np.int32)
        steps[has_price] = np.floor(np.log(self.price[has_price]) / np.log(factor))
        return steps

    @cached_property
    def name_similarity(self) -> Similarity:
        """The similarity of names: the weighted Jaccard of their words.

        A word weighs log((n_items + 1) / number of items with it): what many names have says little.
        """
        row, words = self.words
        codes = words.dictionary_encode().indices.to_numpy(zero_copy_only=False)
        pairs = np.unique(np.stack([row, codes], axis=1).astype(np.int64), axis=0)
        n_items_of_word = np.bincount(pairs[:, 1]) if len(pairs) else np.ones(1)
        weights = np.log((len(self) + 1) / n_items_of_word)
        return Similarity.of_sets(pairs[:, 0], pairs[:, 1], weights, len(self))

    @cached_property
    def category_similarity(self) -> Similarity:
        """The similarity of categories: the Jaccard of the sets of their names."""
        row, names = self.categories
        codes = names.dictionary_encode().indices.to_numpy(zero_copy_only=False)
        return Similarity.of_sets(row, codes, np.ones(max(len(codes), 1)), len(self))

    def days_after_event(
        self, days_of_category: dict[str, float | None], otherwise: float | None
    ) -> Array:
        """Return the number of days of each item, float64 (n_items,); None counts as infinity.

        An item has the days of the deepest of its categories in `days_of_category`, else
        `otherwise`.
        """
        days = np.full(len(self), np.inf if otherwise is None else otherwise)
        row, names = self.categories
        of_category = np.full(len(row), np.nan)
        for name, value in days_of_category.items():
            of_category[_is_in(names, [name])] = np.inf if value is None else value
        is_named = ~np.isnan(of_category)
        days[row[is_named]] = of_category[is_named]  # of several assignments, the last one stays
        return days


def check_known(setting: str, what: str, texts: Iterable[str], known: pa.Array) -> None:
    """Raise ConfigError, with a suggestion, where one of `texts` is not among `known`.

    `setting` is the name of the setting that names the texts, and `what` says what they are.
    """
    missing = [text for text in texts if not pc.any(pc.equal(known, text)).as_py()]
    if missing:
        choices = [text for text in pc.unique(known).to_pylist() if text is not None]
        shown = "; ".join(f"'{text}'.{suggest(text, choices)}" for text in missing[:5])
        raise ConfigError(f"{setting} names {what} that the catalogue does not have: {shown}")


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    chunks = column.combine_chunks()
    return chunks.combine_chunks() if isinstance(chunks, pa.ChunkedArray) else chunks


def _flattened(lists: pa.ListArray) -> tuple[Array, pa.Array]:
    lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return np.repeat(np.arange(len(lists)), lengths), lists.flatten()


def _is_in(texts: pa.Array, names: Iterable[str]) -> Array:
    value_set = pa.array(list(names), pa.string())
    return np.asarray(pc.is_in(texts, value_set=value_set).to_numpy(zero_copy_only=False))
