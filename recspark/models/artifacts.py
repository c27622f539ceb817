"""Saved models: a folder of `metadata.json` and one `.npy` file per array. No pickle.

The marker of `recspark.storage` is written last: a folder with the marker holds a complete model, a
folder without it counts as no model. `metadata.json` holds the checksum of every array's file, and
a checksum of itself. So `load` returns exactly what was saved, or raises ArtifactError.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import numpy as np
from pydantic import ValidationError

from recspark import storage
from recspark.data.blocks import Array
from recspark.errors import ArtifactError
from recspark.models.base import FittedModel
from recspark.models.registry import ModelSpec
from recspark.version import __version__

FORMAT = 2
METADATA = "metadata.json"
_REMEDY = "train the model again: run the night with --force"


def save(
    model: FittedModel,
    folder: str,
    training: dict[str, Any] | None = None,
    made_of: dict[str, Any] | None = None,
) -> None:
    """Write `model` to `folder` (any URI), in place of whatever the folder holds. No Spark job.

    Two more values are stored with the model. `training` says how the model was trained. `made_of`
    is the version and commit of each table that the model was computed from. The functions
    `training` and `made_of` read them again.
    """
    storage.remove(folder)
    arrays = model.saved_arrays()
    array_entries = {}
    for name, array in arrays.items():
        array = np.asarray(array, order="C")  # ascontiguousarray gives 0-d arrays a dimension
        array_entries[name] = {
            "dtype": array.dtype.str,
            "shape": list(array.shape),
            "sha256": storage.write_array(_file(folder, name), array),
        }
    storage.write_sealed(
        storage.join(folder, METADATA),
        {
            "format": FORMAT,
            "recspark": __version__,
            "class": _class_path(type(model)),
            "settings": model.settings.model_dump(mode="json"),
            "cutoff": model.cutoff.isoformat(),
            "arrays": array_entries,
            "training": training,
            "made_of": made_of,
        },
    )
    storage.mark_complete(folder)


def load(folder: str, spec: ModelSpec) -> FittedModel:
    """Return the model saved in `folder`, which is a model of the registry line `spec`.

    The arrays of a local folder are memory-mapped, so all workers on a machine that sees the folder
    share one copy. Raises ArtifactError if the folder is missing or incomplete, if it has changed
    since it was written, or if its format or its class is another one. Cost: every array is read
    once, to check it. No Spark job.
    """
    metadata = _metadata(folder)
    if metadata["class"] != spec.model:
        raise ArtifactError(f"{folder}: holds {metadata['class']}, expected {spec.model}")
    arrays = {
        name: _array(folder, name, array_entry) for name, array_entry in metadata["arrays"].items()
    }
    try:
        settings = spec.load().settings_class(**metadata["settings"])
        cutoff = datetime.fromisoformat(metadata["cutoff"])
        return spec.load_model().restored(settings, cutoff, arrays)
    except (KeyError, ValidationError) as error:
        raise ArtifactError(
            f"{folder}: does not fit {spec.model}: {error}; train it again"
        ) from None


def training(folder: str) -> dict[str, Any] | None:
    """Return the `training` with which `save` wrote the model in `folder`."""
    training_of_model: dict[str, Any] | None = _metadata(folder)["training"]
    return training_of_model


def made_of(folder: str) -> dict[str, Any]:
    """Return table -> [version, commit]: the `made_of` of the model in `folder`.

    It is {} if `save` was called without `made_of`.
    """
    return dict(_metadata(folder).get("made_of") or {})


def _metadata(folder: str) -> dict[str, Any]:
    if not storage.is_complete(folder):
        raise ArtifactError(f"{folder}: no complete model is saved here; train it first")
    try:
        metadata = storage.read_sealed(storage.join(folder, METADATA))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder}: {METADATA} cannot be read: {error}; {_REMEDY}") from None
    if metadata["format"] != FORMAT:
        raise ArtifactError(
            f"{folder}: format {metadata['format']!r}, "
            f"written by recspark {metadata['recspark']!r}; "
            f"this one reads format {FORMAT}; {_REMEDY}"
        )
    return metadata


def _array(folder: str, name: str, array_entry: dict[str, Any]) -> Array:
    try:
        return storage.read_array(_file(folder, name), mmap=True, checksum=array_entry["sha256"])
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{folder}: array '{name}' cannot be read: {error}; {_REMEDY}"
        ) from None


def _file(folder: str, name: str) -> str:
    return storage.join(folder, f"{name}.npy")


def _class_path(model_class: type[FittedModel]) -> str:
    return f"{model_class.__module__}:{model_class.__qualname__}"
