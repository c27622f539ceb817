"""Colours of pictures, and what every encoder of pictures does with files that are broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from recspark import schema
from recspark.models.content.colours import ColoursModel, ColoursSettings
from recspark.testing import synth
from recspark.testing.synth import picture
from tests.broken_media import broken_images, broken_sounds, write

RED, BLUE = np.array([255, 0, 0]), np.array([0, 0, 255])


def colours(folder: Path) -> ColoursModel:
    settings = {"folder": str(folder), "size": 8, "max_file_mb": 1, "max_megapixels": 1.0}
    return ColoursModel(ColoursSettings(**settings), synth.CUTOFF)  # type: ignore[arg-type]


def test_a_histogram_by_hand(tmp_path: Path) -> None:
    """A quarter of the picture is red, (3, 0, 0) of 4 levels: colour 48. The rest is blue: colour 3."""
    (tmp_path / "a.png").write_bytes(picture(RED, BLUE, 64))
    batch = pa.RecordBatch.from_pydict({"media": [["a.png"]]})
    [vector] = colours(tmp_path).coder().encode(batch)
    expected = np.zeros(64)
    expected[[48, 3]] = np.array([1, 3]) / np.sqrt(10)
    np.testing.assert_allclose(vector, expected, atol=1e-6)


@pytest.mark.spark
def test_broken_files_are_refused_by_name_and_the_others_encoded(
    spark: SparkSession, tmp_path: Path
) -> None:
    """Fifty and more in one job: each has its reason, and good files beside them have vectors."""
    files = {**broken_images(), **broken_sounds()}
    write(tmp_path, files)
    (tmp_path / "good.png").write_bytes(picture(RED, BLUE))
    names = [*files, "good.png", "good.png"]
    n = len(names)
    content = pa.table(
        {
            "item_idx": pa.array(np.arange(n), pa.int32()),
            "item_name": pa.array(names),
            "category": pa.nulls(n, pa.list_(pa.string())),
            "price": pa.nulls(n, pa.float64()),
            "text": pa.nulls(n, pa.string()),
            "media": pa.array([[name] for name in names]),
        }
    )
    items = spark.createDataFrame(content, schema.CONTENT)
    rows = colours(tmp_path).encode_or_explain(items).toArrow().sort_by("item_idx")
    expected = dict.fromkeys(broken_sounds(), "no image")
    expected |= {name: problem for name, (_, problem) in broken_images().items()}
    problems = rows.column("problem").to_pylist()
    assert problems == [*[expected[name] for name in files], None, None]
    vectors = rows.column("vector").to_pylist()
    assert vectors[: len(files)] == [None] * len(files)
    assert vectors[-1] == vectors[-2]
    assert np.sum(np.square(vectors[-1])) == pytest.approx(1)
