"""Every notebook runs from its first cell to its last on a night's tables, and draws."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT


@pytest.fixture
def night(request: pytest.FixtureRequest) -> str:
    """Where a night lies: RECSPARK_NIGHT, as `.ci/run` names the one of the DAG; else a small one."""
    given = os.environ.get("RECSPARK_NIGHT")
    if given:
        return str(ROOT / given)
    return str(Path(request.getfixturevalue("small_night").catalog.root).parent)


@pytest.mark.spark
@pytest.mark.notebook
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_a_notebook_runs(path: Path, night: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "RECSPARK_ROOT", night)
    monkeypatch.setitem(os.environ, "RECSPARK_ENV", "test")
    monkeypatch.delenv("PYSPARK_GATEWAY_PORT", raising=False)
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}})
    client.execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 2
    assert not any(o["output_type"] == "error" for o in outputs)


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_a_notebook_is_stored_without_output(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs"), "clear the outputs before committing"
