"""What `recspark models` prints: every algorithm with its kind, tags, source and settings."""

from __future__ import annotations

from typing import Any

from recspark.models.registry import MODELS, ModelSpec
from recspark.report.settings_page import setting_description


def algorithms() -> list[dict[str, Any]]:
    """Return what the registry knows about each algorithm. Imports no algorithm."""
    return [_registry_entry(spec) for spec in MODELS.values()]


def with_settings(algorithm: dict[str, Any]) -> dict[str, Any]:
    """Return `algorithm`, an element of `algorithms()`, with all its settings. Imports its
    class.
    """
    fields = MODELS[algorithm["algorithm"]].load().settings_class.model_fields
    settings = [{"setting": name, **setting_description(field)} for name, field in fields.items()]
    return {**algorithm, "settings": settings}


def _registry_entry(spec: ModelSpec) -> dict[str, Any]:
    return {
        "algorithm": spec.name,
        "kind": spec.kind,
        "tags": sorted(spec.tags),
        "source": spec.source,
        "training_tables": list(spec.training),
    }
