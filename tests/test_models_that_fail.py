"""A model that nothing published needs fails alone: whichever, in whichever of its stages."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recspark.config.load import load_config
from recspark.errors import (
    EmptyDataError,
    ModelsFailedError,
    RankFailedError,
    StageOrderError,
)
from recspark.pipeline import reuse, run
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import not_compared
from recspark.pipeline.plan import STAGES, Stage
from recspark.pipeline.run import execute, night
from recspark.pipeline.runlog import OK, RunLog, RunRow, StageResult

NEEDED = ("ease", "item_knn", "popular")  # the champion, the ladder, the neighbours
CHALLENGERS = ("als", "item2vec", "multvae")
SETTINGS = [
    f"models={[*CHALLENGERS, *NEEDED]}",
    "publish={model: ease, ladder: [popular], neighbours_model: item_knn}",
]
PER_MODEL = ["train", "recommend"]  # all of them are retrievers


class InMemory(RunLog):
    """The rows of a run that writes none."""

    def __init__(self) -> None:
        self.run_id = "run"
        self._rows: dict[tuple[str, str], RunRow] = {}
        self._others: list[RunRow] = []

    def ended(self, stage: str, first: date, last: date, model: str) -> list[RunRow]:
        return []

    def record(self, **row: Any) -> None:
        result: StageResult = row["result"]
        self._rows[row["stage"], row["model"]] = RunRow(
            row["stage"], row["model"], row["inputs"], result.outputs, row["code"], result.detail,
            result.rows_in, result.rows_out, row.get("status", OK), self.run_id,
        )  # fmt: skip

    def compact(self) -> None:
        pass


class Night:
    """A night of which `failing` stages raise; `ran` lists those that ended well."""

    def __init__(self) -> None:
        self.failing: dict[tuple[str, str], Exception] = {}
        self.ran: list[tuple[str, str]] = []
        self.version = 0
        self.context = RunContext(
            spark=None,  # type: ignore[arg-type]
            catalog=SimpleNamespace(
                commits={"candidates": 0},
                root="/tables",
                identity=lambda _, version: [version, "x"],
            ),  # type: ignore[arg-type]
            config=load_config("test", SETTINGS),
            run_date=date(2024, 5, 31),
            run_id="run",
            pins={},
            runlog=InMemory(),
        )

    def run(self, stage: str, model: str = "") -> StageResult:
        if error := self.failing.get((stage, model)):
            raise error
        self.ran.append((stage, model))
        if stage != "recommend":
            return StageResult({}, 0, 0)
        self.context.catalog.commits["candidates"] += 1
        self.version += 1
        return StageResult({"candidates": self.version}, 0, 0)

    def ended(self) -> set[tuple[str, str]]:
        rows = self.context.runlog.rows()
        return {key for key, row in rows.items() if row.status == OK}


@pytest.fixture(autouse=True, scope="module")
def fake_stages() -> Iterator[list[Night]]:
    """The stages' functions run the night that is in the list."""
    tonight: list[Night] = []

    def of(stage: Stage) -> Any:
        if stage.per_model:
            return lambda _, model: tonight[0].run(stage.name, model)
        return lambda _: tonight[0].run(stage.name)

    with pytest.MonkeyPatch.context() as patch:
        for stage in STAGES:
            patch.setitem(run.FUNCTIONS, stage.name, of(stage))
        patch.setattr(reuse, "still_holds", lambda *_: True)
        yield tonight


@given(
    failing=st.dictionaries(
        st.tuples(st.sampled_from(PER_MODEL), st.sampled_from([*CHALLENGERS, *NEEDED])),
        st.sampled_from([EmptyDataError("no item"), RankFailedError("hung"), ValueError("a bug")]),
    )
)
def test_what_nothing_published_needs_fails_alone(
    fake_stages: list[Night], failing: dict[tuple[str, str], Exception]
) -> None:
    made = Night()
    fake_stages[:] = [made]
    made.failing = failing
    alone = {model for _, model in failing if model in CHALLENGERS}
    needed = [error for (_, model), error in failing.items() if model in NEEDED]
    if needed:
        with pytest.raises(Exception) as caught:
            night(made.context)
        assert caught.value in needed
        assert ("evaluate", "") not in made.ran
        with pytest.raises(StageOrderError):
            execute(made.context, STAGES[-1])
    elif alone:
        with pytest.raises(ModelsFailedError) as told:
            night(made.context)
        assert all(model in str(told.value) for model in alone)
        assert told.value.exit_code == 25
    else:
        night(made.context)
    if not needed:
        assert ("publish", "") in made.ran
        assert set(not_compared(made.context)) == alone

    before = made.ended()
    made.failing, made.ran = {}, []
    night(made.context)  # what failed is tried again, and what ended well is not
    assert made.ended() == {
        (stage.name, model) for stage in STAGES for model in stage.models(made.context.config)
    }
    again = {(stage, model) for stage, model in made.ran if stage in PER_MODEL}
    assert again == {key for key in made.ended() if key[0] in PER_MODEL} - before
    assert not not_compared(made.context)


def test_a_challenger_that_left_no_row_stops_nobody(fake_stages: list[Night]) -> None:
    """Killed on its way, or forgotten."""
    made = Night()
    fake_stages[:] = [made]
    for stage in STAGES:
        for model in stage.models(made.context.config):
            if model != "als":
                execute(made.context, stage, model)
    assert not_compared(made.context) == {"als": "train has not ended in this run"}
    rows = made.context.runlog.rows()
    del rows["recommend", "ease"]
    with pytest.raises(StageOrderError, match="'recommend' ease has not ended yet"):
        execute(made.context, STAGES[-1])
