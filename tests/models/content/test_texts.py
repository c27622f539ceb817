"""Encoders of texts on a batch: the dictionary, weights and means by hand."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from recspark import schema
from recspark.data.blocks import Array
from recspark.models.content.texts import Dictionary, count_words, texts_of, weighted_means
from recspark.models.content.tfidf import TfidfCoder
from recspark.models.content.word_vectors import WordVectorsCoder

PARTS = ("item_name", "text")
ITEMS = [("Red mug", None), ("blue MUG", "a mug"), (None, None), ("mug", "unknown"), ("", "red 茶")]


def batch(items: list[tuple[str | None, str | None]]) -> pa.RecordBatch:
    n = len(items)
    strings, lists = pa.string(), pa.list_(pa.string())
    return pa.RecordBatch.from_arrays(
        [
            pa.array(range(n), pa.int32()),
            pa.array([name for name, _ in items], strings),
            pa.array([["Kitchen"], None, [], ["a b", "c"], None][:n], lists),
            pa.nulls(n, pa.float64()),
            pa.array([text for _, text in items], strings),
            pa.nulls(n, lists),
        ],
        names=schema.CONTENT.names,
    )


def dictionary(min_items: int = 1) -> Dictionary:
    counted = pa.Table.from_batches([count_words(batch(ITEMS), PARTS)]).sort_by("word")
    n_items = counted.column("items")[0].as_py()
    kept = counted.slice(1).filter(pa.array(counted.column("items").to_numpy()[1:] >= min_items))
    uses, items = (kept.column(name).to_numpy() for name in ("uses", "items"))
    return Dictionary(kept.column("word").combine_chunks(), uses, items, n_items)


def test_texts_of_items_with_and_without_parts() -> None:
    texts = ["Red mug\n", "blue MUG\na mug", "\n", "mug\nunknown", "\nred 茶"]
    assert texts_of(batch(ITEMS), PARTS) == texts
    assert texts_of(batch(ITEMS), ("category",)) == ["Kitchen", "", "", "a b\nc", ""]


def test_words_are_counted_by_hand() -> None:
    words = dictionary(2)
    assert words.words.to_pylist() == ["mug", "red"]
    assert words.uses.tolist() == [4, 2]
    assert words.items.tolist() == [3, 2]
    assert words.n_items == 4  # one item has no word
    np.testing.assert_allclose(words.idf, np.log([5 / 4, 5 / 3]), rtol=1e-6)


def test_a_dictionary_survives_its_arrays() -> None:
    words = dictionary()
    again = Dictionary.of_arrays(words.to_arrays())
    assert again.words.equals(words.words)
    assert "茶" in again.words.to_pylist()
    assert again.n_items == words.n_items


def unit(values: list[float]) -> Array:
    return np.array(values) / np.linalg.norm(values)


def test_tfidf_by_hand() -> None:
    vectors = TfidfCoder(dictionary(2), PARTS, None, True, 1).encode(batch(ITEMS))
    mug, red = np.log(5 / 4), np.log(5 / 3)
    want = [unit([mug, red]), [1, 0], [np.nan] * 2, [1, 0], [0, 1]]
    np.testing.assert_allclose(vectors, want, rtol=1e-6)
    often = TfidfCoder(dictionary(2), PARTS, None, False, 1).encode(batch([("red mug mug", None)]))
    np.testing.assert_allclose(often, [unit([2 * mug, red])], rtol=1e-6)


def test_a_projection_keeps_cosines() -> None:
    """1,024 components: a cosine is wrong by 1/32, so by less than five times that."""
    exact = TfidfCoder(dictionary(), PARTS, None, True, 1).encode(batch(ITEMS))[[0, 1, 3, 4]]
    short = TfidfCoder(dictionary(), PARTS, 1024, True, 1).encode(batch(ITEMS))[[0, 1, 3, 4]]
    assert np.abs(exact @ exact.T - short @ short.T).max() < 5 / 32
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, rtol=1e-5)


def test_word_vectors_are_means_by_idf() -> None:
    vectors = np.array([[1, 0], [0, 2]], np.float32)
    encoded = WordVectorsCoder(dictionary(2), vectors, PARTS).encode(batch(ITEMS))
    mug, red = np.log(5 / 4), np.log(5 / 3)
    want = [[mug, 2 * red] / (mug + red), [1, 0], [np.nan] * 2, [1, 0], [0, 2]]
    np.testing.assert_allclose(encoded, want, rtol=1e-6)
    # A word without a vector counts as unknown.
    encoded = WordVectorsCoder(dictionary(2), vectors * [[0], [1]], PARTS).encode(batch(ITEMS))
    np.testing.assert_allclose(encoded[0], [0, 2])
    assert np.isnan(encoded[1]).all()


def test_means_depend_on_no_other_item() -> None:
    rng = np.random.default_rng(1)
    vectors, weights = rng.normal(size=(9, 5)).astype(np.float32), rng.random(9).astype(np.float32)
    start, numbers = np.array([0, 4, 9]), np.arange(9, dtype=np.int32)
    together = weighted_means(start, numbers, weights, vectors)
    alone = weighted_means(start[:2], numbers, weights, vectors)
    np.testing.assert_array_equal(together[:1], alone)
