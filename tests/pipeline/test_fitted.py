"""A task loads each fitted model once."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from recspark.models import artifacts
from recspark.pipeline import fitted
from recspark.pipeline.context import RunContext

CUTOFF = datetime(2024, 6, 1, tzinfo=UTC)


def test_a_task_loads_and_checks_a_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next task loads it again, and so does whoever asks outside of a task."""
    loads: list[str] = []

    def load(folder: str, spec: Any) -> str:
        loads.append(folder)
        return f"{folder}, load {len(loads)}"

    monkeypatch.setattr(artifacts, "load", load)
    monkeypatch.setattr(fitted, "spec_of", lambda model, settings: None)
    monkeypatch.setattr(fitted, "folder_of", lambda context, model, cutoff: model)
    config = SimpleNamespace(
        settings_of=lambda model: {}, paths=SimpleNamespace(artifacts="/artifacts")
    )
    nothing: Any = None
    outside = RunContext(nothing, nothing, config, *[nothing] * 4)  # type: ignore[arg-type]
    task = replace(outside, stage="evaluate")
    models = [fitted.load_model(task, name, CUTOFF) for name in ("als", "als", "ease")]
    assert models[0] is models[1]
    assert len(loads) == 2
    fitted.load_model(replace(task, stage="publish"), "als", CUTOFF)
    assert len(loads) == 3
    for _ in range(2):
        fitted.load_model(outside, "als", CUTOFF)
    assert len(loads) == 5
