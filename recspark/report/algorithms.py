"""What `recspark models` tells: every algorithm with its kind, tags, source and settings."""

from __future__ import annotations

from typing import Any

from recspark.models.registry import MODELS, ModelSpec
from recspark.report.settings_page import described


def algorithms() -> list[dict[str, Any]]:
    """Return what the registry says of each algorithm. Imports none of them."""
    return [_about(spec) for spec in MODELS.values()]


def with_settings(algorithm: dict[str, Any]) -> dict[str, Any]:
    """Return one of `algorithms` with all its settings. Imports its class."""
    fields = MODELS[algorithm["algorithm"]].load().settings_class.model_fields
    settings = [{"setting": name, **described(field)} for name, field in fields.items()]
    return {**algorithm, "settings": settings}


def _about(spec: ModelSpec) -> dict[str, Any]:
    return {
        "algorithm": spec.name,
        "kind": spec.kind,
        "tags": sorted(spec.tags),
        "source": spec.source,
        "training_tables": list(spec.training),
    }
