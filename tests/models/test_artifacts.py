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
from recspark.models.items.ease import EaseModel, EaseSettings
from recspark.models.items.popular import PopularModel, PopularSettings
from recspark.models.registry import model_spec
from tests.damage import damages, put

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


@pytest.mark.parametrize(
    "matrix",
    [np.float32(2.5).reshape(()), np.zeros((0, 3)), np.arange(6.0).reshape(2, 3).T],
    ids=["one number", "no rows", "by columns"],
)
def test_an_array_of_any_shape_keeps_it(matrix: np.ndarray, tmp_path: Path) -> None:
    folder = str(tmp_path / "m")
    artifacts.save(EaseModel(EaseSettings(), CUTOFF, ITEMS, matrix), folder)
    loaded = artifacts.load(folder, model_spec("ease"))
    assert isinstance(loaded, EaseModel)
    assert loaded.matrix.shape == matrix.shape
    assert loaded.matrix.tobytes() == matrix.tobytes()


def test_metadata_says_what_it_is(folder: str) -> None:
    metadata = storage.read_json(f"{folder}/metadata.json")
    assert metadata["class"] == "recspark.models.items.ease:EaseModel"
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


def sealed(key: str, value: object) -> Callable[[Path], None]:
    """Another version of recspark wrote it."""

    def apply(folder: Path) -> None:
        uri = str(folder / "metadata.json")
        storage.write_sealed(uri, {**storage.read_sealed(uri), key: value})

    return apply


def tear(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def flip(folder: Path) -> None:
    data = bytearray((folder / "matrix.npy").read_bytes())
    data[-1] ^= 1
    (folder / "matrix.npy").write_bytes(data)


def test_every_damage_is_refused_by_name_or_changes_nothing(tmp_path: Path) -> None:
    """Each file of an artifact, damaged in each way."""
    folder = tmp_path / "ease"
    saved, curve = ease_model(), {"best": 1, "epochs": [{"loss": 0.1}]}
    artifacts.save(saved, str(folder), curve)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert {file.name for file in files} >= {"items.npy", "matrix.npy", "metadata.json"}
    n_refused = 0
    for file in files:
        whole = file.read_bytes()
        for how, content in damages(file, [other for other in files if other != file]):
            put(file, content)
            try:
                found = artifacts.load(str(folder), model_spec("ease"))
                training = artifacts.training(str(folder))
            except ArtifactError:
                n_refused += 1
            else:
                assert file.name == "_complete", (file.name, how)
                assert (found.settings, found.cutoff) == (saved.settings, saved.cutoff)
                assert found.items.tobytes() == saved.items.tobytes()
                assert found.arrays()["matrix"].tobytes() == saved.matrix.tobytes()
                assert training == curve
            put(file, whole)
    assert n_refused > 150
    assert artifacts.training(str(folder)) == curve


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "_complete").unlink(), "no complete model is saved here"),
        (lambda folder: (folder / "metadata.json").unlink(), "metadata.json cannot be read"),
        (tear("metadata.json", 40), "metadata.json cannot be read"),
        (lambda folder: (folder / "matrix.npy").unlink(), "array 'matrix' cannot be read"),
        (tear("matrix.npy", 140), "array 'matrix' cannot be read"),
        (tear("matrix.npy", 30), "array 'matrix' cannot be read"),
        (flip, "array 'matrix' cannot be read: its bytes are not those that were written"),
        (change("settings", {"reg": 1}), "metadata.json cannot be read: it has changed"),
        (sealed("format", 0), "format 0, written by recspark"),
        (sealed("class", "x:Y"), "holds x:Y, expected recspark.models.items.ease:EaseModel"),
        (sealed("settings", {"regularisation": 1}), "does not fit"),
    ],
)
def test_damage_is_refused_by_name(
    folder: str, damage: Callable[[Path], None], message: str
) -> None:
    damage(Path(folder))
    with pytest.raises(ArtifactError, match=message):
        artifacts.load(folder, model_spec("ease"))


def test_missing_folder_and_other_model(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="train it first"):
        artifacts.load(str(tmp_path / "nowhere"), model_spec("ease"))
    with pytest.raises(ArtifactError, match="holds recspark"):
        artifacts.load(folder, model_spec("popular"))


def test_an_array_of_python_objects_is_not_saved(tmp_path: Path) -> None:
    model = PopularModel(PopularSettings(), CUTOFF, ITEMS, np.array([{}, {}, {}], object))
    with pytest.raises(ValueError, match="allow_pickle"):
        artifacts.save(model, str(tmp_path / "m"))
    assert not storage.is_complete(str(tmp_path / "m"))
