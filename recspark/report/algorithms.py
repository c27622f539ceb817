"""What `recspark models` tells: every algorithm with its kind, tags, source and settings."""

from __future__ import annotations

from typing import Any

from recspark.models.registry import MODELS, ModelSpec
from recspark.report.settings_page import described


def algorithms(names: list[str] | None = None) -> list[dict[str, Any]]:
    """Return one mapping for each algorithm of the registry, or of `names`. Imports its class."""
    return [_about(spec) for name, spec in MODELS.items() if names is None or name in names]


def _about(spec: ModelSpec) -> dict[str, Any]:
    return {
        "algorithm": spec.name,
        "kind": spec.kind,
        "tags": sorted(spec.tags),
        "source": spec.source,
        "training_tables": list(spec.training),
        "settings": [
            {"setting": name, **described(field)}
            for name, field in spec.load().settings_class.model_fields.items()
        ],
    }
