"""Encoders with vectors that others trained: means by hand, ids, and what is refused."""

from __future__ import annotations

import importlib
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from recspark import schema, storage
from recspark.config.load import load_config
from recspark.data.blocks import Array
from recspark.data.content import content_as_of
from recspark.data.vector_files import folder_sha256
from recspark.errors import ConfigError, EmptyDataError, ModelError, SetupError
from recspark.models.base import FitOptions
from recspark.models.content import sentences
from recspark.models.content.file_vectors import FileVectors, FileVectorsModel
from recspark.models.content.sentences import Sentences, SentencesModel
from recspark.pipeline.fitted import recipe
from recspark.testing import synth
from tests.models.content.test_texts import ITEMS, batch

WORDS = {"mug": [1.0, 0.0], "red": [0.0, 2.0], "a": [5.0, 5.0]}


def settings_of(path: Path, rows: dict[str, list[float]], **more: Any) -> dict[str, Any]:
    """Write a text file; return the settings that name it."""
    lines = [f"{token} {' '.join(map(str, vector))}" for token, vector in rows.items()]
    path.write_text("\n".join([f"{len(rows)} 2", *lines, ""]), encoding="utf-8")
    return {"file": str(path), "sha256": storage.sha256(str(path)), **more}


def encoded(settings: dict[str, Any], items: pa.RecordBatch) -> tuple[Array, list[str | None]]:
    algorithm = FileVectors.from_dict(settings)
    algorithm.check_needs({})
    model = FileVectorsModel(algorithm.settings, synth.CUTOFF, {})
    coder: Any = model.coder()
    return coder.encode_or_explain(items)  # type: ignore[no-any-return]


def test_plain_means_by_hand(tmp_path: Path) -> None:
    """`mug` is there twice in the second item; `blue`, `unknown` and the tea are in no file."""
    vectors, problems = encoded(settings_of(tmp_path / "v", WORDS, weighting="plain"), batch(ITEMS))
    expected = [[0.5, 1], [7 / 3, 5 / 3], [np.nan] * 2, [1, 0], [0, 2]]
    np.testing.assert_allclose(vectors, expected, rtol=1e-6)
    assert problems == [None, None, "no words", None, None]
    _, problems = encoded(
        settings_of(tmp_path / "v", {"cup": [1, 2]}, weighting="plain"), batch(ITEMS)
    )
    assert problems == ["no known word"] * 2 + ["no words"] + ["no known word"] * 2


def test_means_by_rank_by_hand(tmp_path: Path) -> None:
    """Shares by Zipf's law: 6/11, 3/11 and 2/11 of three words."""
    vectors, _ = encoded(settings_of(tmp_path / "v", WORDS, weighting="rank"), batch(ITEMS))
    mug, red = (1e-3 / (1e-3 + share) for share in (6 / 11, 3 / 11))
    np.testing.assert_allclose(vectors[0], np.array([mug, 2 * red]) / (mug + red), rtol=1e-6)


def test_items_by_their_ids(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "v", {"A-1": [1, 2], "b": [3, 4]}, tokens="items")
    ids = pa.array(["b", "a-1", None, "A-1", "c"])
    items = batch(ITEMS)
    items = pa.RecordBatch.from_arrays([*items.columns, ids], names=schema.CONTENT_AND_ID.names)
    vectors, problems = encoded(settings, items)
    np.testing.assert_array_equal(vectors[[0, 3]], [[3, 4], [1, 2]])
    assert np.isnan(vectors[[1, 2, 4]]).all()
    assert problems == [None, "not in the file", "not in the file", None, "not in the file"]


@pytest.mark.spark
def test_on_a_catalogue_by_ids_and_by_idf(spark: SparkSession, tmp_path: Path) -> None:
    """Items have the ids i0, i1, … and the words `words of item 0`."""
    data = synth.dataset(spark, synth.log([(0, item, 1.0) for item in range(4)]))
    settings = settings_of(tmp_path / "ids", {"i1": [1, 2], "i3": [3, 4]}, tokens="items")
    model = FileVectors.from_dict(settings).fit(data, FitOptions())
    catalogue = synth.with_media(data.items).join(
        data.items.select("item_idx", "item_id"), on="item_idx", how="inner"
    )
    rows = model.encode(catalogue).toArrow().sort_by("item_idx").to_pylist()
    assert rows == [{"item_idx": 1, "vector": [1, 2]}, {"item_idx": 3, "vector": [3, 4]}]
    with pytest.raises(ModelError, match="item_id is missing"):
        model.encode(catalogue.drop("item_id"))
    told: list[str] = []
    settings = settings_of(tmp_path / "words", {"item": [9, 9], "2": [1, 0], "of": [5, 5]})
    model = FileVectors.from_dict(settings).fit(data, FitOptions(progress=told.append))
    assert told == ["  file_vectors: the file has 3 of the catalogue's 7 words"]
    rows = model.encode(catalogue.drop("item_id")).toArrow().to_pylist()
    assert rows == [{"item_idx": 2, "vector": [1, 0]}]  # all have the words of, item: idf 0
    settings = settings_of(tmp_path / "other", {"tasse": [9, 9]})
    with pytest.raises(EmptyDataError, match="none of the catalogue's 7 words, such as '0'"):
        FileVectors.from_dict(settings).fit(data, FitOptions())


@pytest.mark.spark
def test_an_id_is_no_part_of_the_content(spark: SparkSession, tmp_path: Path) -> None:
    """What stage encode reads has ids; two items that are described alike have equal digests."""
    names = ("item_id", "item_idx", "item_name", "valid_from")
    begin = datetime(2020, 1, 1, tzinfo=UTC)
    rows = [
        dict(zip(names, row, strict=True))
        for row in (("a", 1, "mug", begin), ("b", 2, "mug", begin))
    ]
    described = content_as_of(spark.createDataFrame(rows, schema.ITEMS), synth.CUTOFF)
    assert len({row["content"] for row in described.collect()}) == 1
    settings = settings_of(tmp_path / "ids", {"b": [1, 2]}, tokens="items")
    model = FileVectorsModel(FileVectors.from_dict(settings).settings, synth.CUTOFF, {})
    rows_read = described.select(*model.content_schema.names)
    assert model.encode(rows_read).toArrow().to_pylist() == [{"item_idx": 2, "vector": [1, 2]}]


def test_vectors_of_earlier_nights_stay_until_the_file_changes() -> None:
    """Weights by idf follow the catalogue; nothing else does. Another file has another key."""
    for settings, keeps in (
        ({}, False),
        ({"weighting": "plain"}, True),
        ({"weighting": "rank"}, True),
        ({"tokens": "items"}, True),
    ):
        assert FileVectors.from_dict(settings).keeps_vectors == keeps
    assert Sentences.from_dict({}).keeps_vectors
    keys = []
    for digit in ("1", "2", "1"):
        text = f"models.file_vectors={{file: v.txt, weighting: plain, sha256: '{digit * 64}'}}"
        config = load_config("test", ["models=[file_vectors, popular]", text])
        keys.append(recipe(config, "file_vectors"))
    assert keys[0] == keys[2] != keys[1]


def test_settings_that_do_not_fit_together() -> None:
    with pytest.raises(ConfigError, match="file_vectors needs the settings file"):
        FileVectors.from_dict({}).check_needs({})
    with pytest.raises(ConfigError, match="format: npy needs the setting index"):
        FileVectors.from_dict({"format": "npy"})
    with pytest.raises(ConfigError, match="index is for format: npy; format = text"):
        FileVectors.from_dict({"index": "x"})
    without = FileVectors.from_dict(
        {"format": "npy", "index": "i", "file": "f", "sha256": "0" * 64}
    )
    with pytest.raises(ConfigError, match="index_sha256"):
        without.check_needs({})
    with pytest.raises(ConfigError, match="sentences needs the settings folder"):
        Sentences.from_dict({}).check_needs({})


# --- sentences: what is tested is our side, with a stub in place of the package ------------------


class Stub:
    """Stands for `SentenceTransformer`: the vector of a text is its length, and 1."""

    def __init__(self, folder: str, *, device: str, local_files_only: bool) -> None:
        assert (device, local_files_only) == ("cpu", True)
        if not (Path(folder) / "config.json").exists():
            raise OSError("no config.json\nand more lines")

    def get_sentence_embedding_dimension(self) -> int:
        return 2

    def encode(self, texts: list[str], **settings: Any) -> Array:
        [text] = texts  # one by one
        return np.array([[len(text), 1]], np.float32)


@pytest.fixture
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A folder, its settings, and the stub in place of the package."""
    package: Any = ModuleType("sentence_transformers")
    package.SentenceTransformer = Stub
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    sentences.encoder_of.cache_clear()
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    return {"folder": str(tmp_path), "sha256": folder_sha256(str(tmp_path))}


def test_the_plumbing_of_sentences_with_a_stub(encoder: dict[str, Any]) -> None:
    model = SentencesModel(Sentences.from_dict(encoder).settings, synth.CUTOFF)
    vectors, problems = model.coder().encode_or_explain(batch(ITEMS))
    lengths = [
        len("Red mug\n"),
        len("blue MUG\na mug"),
        np.nan,
        len("mug\nunknown"),
        len("\nred 茶"),
    ]
    np.testing.assert_array_equal(vectors[:, 0], lengths)
    assert problems == [None, None, "no words", None, None]


def test_folders_that_cannot_be_used_are_named(encoder: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=f"SHA-256 {encoder['sha256']}, the settings say {'0' * 64}"
    ):
        sentences.encoder_of(encoder["folder"], "0" * 64)
    with pytest.raises(ModelError, match="none is no local folder with files"):
        sentences.encoder_of(str(tmp_path / "none"), encoder["sha256"])
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    with pytest.raises(
        ModelError, match="no encoder that sentence-transformers reads: no config.json$"
    ):
        sentences.encoder_of(encoder["folder"], folder_sha256(encoder["folder"]))


def test_without_the_package_sentences_says_so(
    encoder: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # an import fails
    with pytest.raises(ImportError):
        importlib.import_module("sentence_transformers")
    with pytest.raises(SetupError, match="sentences needs the package sentence-transformers"):
        sentences.encoder_of(encoder["folder"], encoder["sha256"])
