"""Saved models: a folder of `metadata.json` and one `.npy` file per array. No pickle.

The marker of `recspark.storage` is written last, so a folder is a whole model or none.
`metadata.json` has the checksum of every array's file, and one of itself: what is loaded is what
was saved, or an ArtifactError.
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
_AGAIN = "train the model again: run the night with --force"


def save(
    model: FittedModel,
    folder: str,
    training: dict[str, Any] | None = None,
    made_of: dict[str, Any] | None = None,
) -> None:
    """Write `model` to `folder` (any URI), replacing what is there. No Spark job.

    Kept with it: `training`, how it was trained; `made_of`, version and commit of each table that it
    follows from. The functions of these names give them back.
    """
    storage.remove(folder)
    arrays = model.saved_arrays()
    described = {}
    for name, array in arrays.items():
        array = np.ascontiguousarray(array)
        described[name] = {
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
            "arrays": described,
            "training": training,
            "made_of": made_of,
        },
    )
    storage.mark_complete(folder)


def load(folder: str, spec: ModelSpec) -> FittedModel:
    """Return the model of registry line `spec` saved in `folder`.

    Arrays of a local folder are memory-mapped: workers on a machine that sees it share them.
    Raises ArtifactError when the folder is missing, incomplete, changed since it was written, or of
    another format or class. Cost: every array is read once, to check it. No Spark job.
    """
    metadata = _metadata(folder)
    if metadata["class"] != spec.model:
        raise ArtifactError(f"{folder}: holds {metadata['class']}, expected {spec.model}")
    arrays = {name: _array(folder, name, about) for name, about in metadata["arrays"].items()}
    try:
        settings = spec.load().settings_class(**metadata["settings"])
        cutoff = datetime.fromisoformat(metadata["cutoff"])
        return spec.load_model().restored(settings, cutoff, arrays)
    except (KeyError, ValidationError) as error:
        raise ArtifactError(
            f"{folder}: does not fit {spec.model}: {error}; train it again"
        ) from None


def training(folder: str) -> dict[str, Any] | None:
    """Return what `save` was given about the training of the model in `folder`."""
    found: dict[str, Any] | None = _metadata(folder)["training"]
    return found


def made_of(folder: str) -> dict[str, Any]:
    """Return table -> [version, commit], as `save` was given them; {} where it was given none."""
    return dict(_metadata(folder).get("made_of") or {})


def _metadata(folder: str) -> dict[str, Any]:
    if not storage.is_complete(folder):
        raise ArtifactError(f"{folder}: no complete model is saved here; train it first")
    try:
        found = storage.read_sealed(storage.join(folder, METADATA))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder}: {METADATA} cannot be read: {error}; {_AGAIN}") from None
    if found["format"] != FORMAT:
        raise ArtifactError(
            f"{folder}: format {found['format']!r}, written by recspark {found['recspark']!r}; this "
            f"one reads format {FORMAT}; {_AGAIN}"
        )
    return found


def _array(folder: str, name: str, about: dict[str, Any]) -> Array:
    try:
        return storage.read_array(_file(folder, name), mmap=True, checksum=about["sha256"])
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder}: array '{name}' cannot be read: {error}; {_AGAIN}") from None


def _file(folder: str, name: str) -> str:
    return storage.join(folder, f"{name}.npy")


def _class_path(kind: type[FittedModel]) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"
