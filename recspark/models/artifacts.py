"""Saved models: a folder of `metadata.json` and one `.npy` file per array. No pickle.

The marker of `recspark.storage` is written last, so a folder is a whole model or none.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Any

import numpy as np
from pydantic import ValidationError

import recspark
from recspark import storage
from recspark.data.blocks import Array
from recspark.errors import ArtifactError
from recspark.models.base import RecommenderModel
from recspark.models.registry import ModelSpec

FORMAT = 1
METADATA = "metadata.json"
TRAINING = "training.json"


def save(model: RecommenderModel, folder: str, training: dict[str, Any] | None = None) -> None:
    """Write `model` to `folder` (any URI), replacing what is there. No Spark job.

    `training` is kept beside it, for `training`: how it was trained.
    """
    storage.remove(folder)
    if training is not None:
        storage.write_json(storage.join(folder, TRAINING), training)
    arrays = {"items": model.items, **model.arrays()}
    described = {}
    for name, array in arrays.items():
        array = np.ascontiguousarray(array)
        storage.write_array(_file(folder, name), array)
        described[name] = {
            "dtype": array.dtype.str,
            "shape": list(array.shape),
            "sha256": _checksum(array),
        }
    storage.write_json(
        storage.join(folder, METADATA),
        {
            "format": FORMAT,
            "recspark": recspark.__version__,
            "class": _class_path(type(model)),
            "settings": model.settings.model_dump(mode="json"),
            "cutoff": model.cutoff.isoformat(),
            "arrays": described,
        },
    )
    storage.mark_complete(folder)


def load(folder: str, spec: ModelSpec) -> RecommenderModel:
    """Return the model of registry line `spec` saved in `folder`.

    Arrays of a local folder are memory-mapped: workers on a machine that sees it share them.
    Raises ArtifactError when the folder is missing, incomplete, changed since it was written, or of
    another format or class. Cost: every array is read once, to check it. No Spark job.
    """
    if not storage.is_complete(folder):
        raise ArtifactError(f"{folder}: no complete model is saved here; train {spec.name} first")
    metadata = _metadata(folder)
    if metadata.get("format") != FORMAT:
        raise ArtifactError(
            f"{folder}: format {metadata.get('format')!r}, written by recspark "
            f"{metadata.get('recspark')!r}; this one reads format {FORMAT}: train {spec.name} again"
        )
    if metadata["class"] != spec.model:
        raise ArtifactError(f"{folder}: holds {metadata['class']}, expected {spec.model}")
    arrays = {name: _array(folder, name, about) for name, about in metadata["arrays"].items()}
    try:
        settings = spec.load().settings_class(**metadata["settings"])
        cutoff = datetime.fromisoformat(metadata["cutoff"])
        return spec.load_model().from_arrays(settings, cutoff, arrays.pop("items"), arrays)
    except (KeyError, ValidationError) as error:
        raise ArtifactError(
            f"{folder}: does not fit {spec.model}: {error}; train it again"
        ) from None


def training(folder: str) -> dict[str, Any] | None:
    """Return what `save` was given about the training of the model in `folder`."""
    uri = storage.join(folder, TRAINING)
    return storage.read_json(uri) if storage.exists(uri) else None


def _metadata(folder: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = storage.read_json(storage.join(folder, METADATA))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{folder}: {METADATA} cannot be read: {error}; train the model again"
        ) from None
    return found


def _array(folder: str, name: str, about: dict[str, Any]) -> Array:
    try:
        array = storage.read_array(_file(folder, name), mmap=True)
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError(
            f"{folder}: array '{name}' cannot be read: {error}; train the model again"
        ) from None
    found = {"dtype": array.dtype.str, "shape": list(array.shape), "sha256": _checksum(array)}
    if found != about:
        raise ArtifactError(
            f"{folder}: array '{name}' is not the one that was saved; train the model again"
        )
    return array


def _file(folder: str, name: str) -> str:
    return storage.join(folder, f"{name}.npy")


def _checksum(array: Array) -> str:
    return hashlib.sha256(array.data.cast("B") if array.size else b"").hexdigest()


def _class_path(kind: type[RecommenderModel]) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"
