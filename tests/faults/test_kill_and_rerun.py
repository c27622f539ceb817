"""A night that is killed again and again ends like one that never was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recspark.pipeline.context import RunContext
from recspark.pipeline.plan import STAGES
from recspark.pipeline.runlog import BEGIN, RunLog
from recspark.tables import catalog as catalog_module
from tests.conftest import run_night
from tests.e2e.test_small_night import everything

pytestmark = [pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(1800)]


class Killed(BaseException):
    """As final as SIGKILL for the code under test: no handler of recspark catches it."""


def until_it_ends(root: Path, source: Path) -> tuple[RunContext, int]:
    """Run the night until nobody kills it any more; return its context and how often it was
    killed."""
    for attempt in range(60):
        try:
            context: Any = run_night(root, source)
        except Killed:
            continue
        return context, attempt
    raise AssertionError("killed for ever")


def test_each_stage_killed_before_its_runs_row(
    small_night: RunContext, retail_slice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage loses its row once, after its tables were committed."""
    killed: set[str] = set()
    record = RunLog.record

    def kill_once(self: RunLog, **row: Any) -> None:
        if row["stage"] != BEGIN and row["stage"] not in killed:
            killed.add(row["stage"])
            raise Killed(row["stage"])
        record(self, **row)

    monkeypatch.setattr(RunLog, "record", kill_once)
    context, times = until_it_ends(tmp_path, retail_slice)
    assert killed == {stage.name for stage in STAGES if stage.models(context.config)}
    assert times == len(killed)
    assert everything(context) == everything(small_night)


def test_each_table_killed_before_its_commit(
    small_night: RunContext, retail_slice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every table's first commit fails once, when its files are about to be written."""
    killed: set[str] = set()
    commit = catalog_module._commit

    def kill_once(table: str, write: Any) -> None:
        if table not in killed and table != "runs":
            killed.add(table)
            raise Killed(table)
        commit(table, write)

    monkeypatch.setattr(catalog_module, "_commit", kill_once)
    context, times = until_it_ends(tmp_path, retail_slice)
    assert 5 < times <= len(killed)  # tables that are written side by side fail together
    assert {"events", "histories", "candidates", "metrics", "recommendations"} <= killed
    assert everything(context) == everything(small_night)
