"""A saved model is a folder without pickle, whole or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import numpy as np
import pytest

from recspark import storage
from recspark.errors import ArtifactError
from recspark.models import artifacts
from recspark.models.ease import EaseModel, EaseSettings
from recspark.models.popular import PopularModel, PopularSettings
from recspark.models.registry import model_spec

CUTOFF = datetime(2020, 7, 1, tzinfo=UTC)
ITEMS = np.array([2, 5, 9], np.int32)


def ease_model() -> EaseModel:
    matrix = np.arange(9, dtype=np.float32).reshape(3, 3) / 7
    return EaseModel(EaseSettings(reg=7.5, half_life_days=None), CUTOFF, ITEMS, matrix)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    artifacts.save(ease_model(), str(tmp_path / "ease"))
    return str(tmp_path / "ease")


@pytest.mark.parametrize("place", ["local", "memory"])
def test_what_is_saved_is_loaded(place: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "m") if place == "local" else "memory://artifacts/m"
    saved = ease_model()
    artifacts.save(PopularModel(PopularSettings(), CUTOFF, ITEMS, np.ones(3, np.float32)), folder)
    artifacts.save(saved, folder)  # replaces what was there
    loaded = artifacts.load(folder, model_spec("ease"))
    assert isinstance(loaded, EaseModel)
    assert loaded.settings == saved.settings
    assert loaded.cutoff == saved.cutoff
    assert np.array_equal(loaded.items, saved.items)
    assert np.array_equal(loaded.matrix, saved.matrix)
    assert isinstance(loaded.matrix, np.memmap) == (place == "local")
    names = [name for name, _, _ in storage.fingerprint(folder)]
    assert names == ["_complete", "items.npy", "matrix.npy", "metadata.json"]
    if place == "memory":
        fsspec.filesystem("memory").rm("/artifacts", recursive=True)


def test_metadata_says_what_it_is(folder: str) -> None:
    metadata = storage.read_json(f"{folder}/metadata.json")
    assert metadata["class"] == "recspark.models.ease:EaseModel"
    assert metadata["format"] == artifacts.FORMAT
    assert metadata["settings"]["reg"] == 7.5
    assert metadata["cutoff"] == "2020-07-01T00:00:00+00:00"
    assert metadata["arrays"]["matrix"]["shape"] == [3, 3]
    assert metadata["recspark"]


def change(key: str, value: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        metadata = json.loads((folder / "metadata.json").read_text())
        metadata[key] = value
        (folder / "metadata.json").write_text(json.dumps(metadata))

    return apply


def tear(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def flip(folder: Path) -> None:
    data = bytearray((folder / "matrix.npy").read_bytes())
    data[-1] ^= 1
    (folder / "matrix.npy").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "_complete").unlink(), "no complete model is saved here"),
        (lambda folder: (folder / "metadata.json").unlink(), "metadata.json cannot be read"),
        (tear("metadata.json", 40), "metadata.json cannot be read"),
        (lambda folder: (folder / "matrix.npy").unlink(), "array 'matrix' cannot be read"),
        (tear("matrix.npy", 140), "array 'matrix' cannot be read"),
        (tear("matrix.npy", 30), "array 'matrix' cannot be read"),
        (flip, "array 'matrix' is not the one that was saved"),
        (change("format", 0), "format 0, written by recspark"),
        (change("class", "x:Y"), "holds x:Y, expected recspark.models.ease:EaseModel"),
        (change("settings", {"regularisation": 1}), "does not fit"),
    ],
)
def test_damage_is_refused_by_name(
    folder: str, damage: Callable[[Path], None], message: str
) -> None:
    damage(Path(folder))
    with pytest.raises(ArtifactError, match=message):
        artifacts.load(folder, model_spec("ease"))


def test_missing_folder_and_other_model(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="train ease first"):
        artifacts.load(str(tmp_path / "nowhere"), model_spec("ease"))
    with pytest.raises(ArtifactError, match="holds recspark"):
        artifacts.load(folder, model_spec("popular"))


def test_an_array_of_python_objects_is_not_saved(tmp_path: Path) -> None:
    model = PopularModel(PopularSettings(), CUTOFF, ITEMS, np.array([{}, {}, {}], object))
    with pytest.raises(ValueError, match="allow_pickle"):
        artifacts.save(model, str(tmp_path / "m"))
    assert not storage.is_complete(str(tmp_path / "m"))
