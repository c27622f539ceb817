"""The recspark command: what a person types, right and wrong."""

from __future__ import annotations

import json
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.table import Table
from typer.testing import CliRunner

from recspark import __version__
from recspark.cli import app
from recspark.cli.common import console, reporter
from recspark.data.dataset import Dataset
from recspark.errors import ConfigError, TableNotFoundError, UnknownUserError
from recspark.layers import load_config
from recspark.models.base import FitOptions
from recspark.models.popular import Popular, PopularModel
from recspark.pipeline.run import RunContext
from recspark.pipeline.tune import holds
from recspark.tables.catalog import TableCatalog
from tests.conftest import NIGHT, ROOT

pytestmark = [pytest.mark.spark, pytest.mark.timeout(600)]
runner = CliRunner()


@pytest.fixture
def place(small_night: RunContext, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options that point a command at the small night; the tests' session is not to be stopped."""
    monkeypatch.setattr(type(small_night.spark), "stop", lambda self: None)
    return ["--env", "test", "--set", f"paths.root={Path(small_night.catalog.root).parent}"]


def test_help_lists_every_command() -> None:
    text = runner.invoke(app, ["--help"]).stdout
    for command in (
        "nightly",
        "stage",
        "tune",
        "show",
        "similar",
        "runs",
        "tables",
        "doctor",
        "export",
    ):
        assert command in text


def test_show_a_user(small_night: RunContext, place: list[str]) -> None:
    lists = small_night.catalog.read(
        "recommendations", small_night.catalog.version("recommendations")
    )
    user = lists.collect()[0]["user_id"]
    found = json.loads(runner.invoke(app, ["show", user, "--json", *place]).stdout.splitlines()[-1])
    assert [r["rank"] for r in found["recommendations"]] == list(range(1, 11))
    assert found["bought"]
    assert user in runner.invoke(app, ["show", user, *place]).stdout
    unknown = runner.invoke(app, ["show", "nobody", *place])
    assert isinstance(unknown.exception, UnknownUserError)


def test_similar_items(small_night: RunContext, place: list[str]) -> None:
    rows = small_night.catalog.read(
        "item_neighbours", small_night.catalog.version("item_neighbours")
    )
    item = rows.collect()[0]["item_id"]
    found = json.loads(
        runner.invoke(app, ["similar", item, "--json", *place]).stdout.splitlines()[-1]
    )
    assert [r["rank"] for r in found] == list(range(1, len(found) + 1))
    assert item not in {r["neighbour_id"] for r in found}


def test_a_mistyped_root_has_no_tables(place: list[str], tmp_path: Path) -> None:
    found = runner.invoke(app, ["tables", *place[:3], f"paths.root={tmp_path}"])
    assert isinstance(found.exception, TableNotFoundError)


def test_a_name_that_looks_like_markup_is_printed_as_it_is() -> None:
    table = Table("name")
    table.add_row("SIGN [/home] [blue]")
    with console.capture() as seen:
        console.print(table)
        reporter()("MUG [red]")
    assert "SIGN [/home] [blue]" in seen.get()
    assert "MUG [red]" in seen.get()


def test_the_version_is_told() -> None:
    assert runner.invoke(app, ["--version"]).stdout == f"recspark {__version__}\n"


def test_runs_and_tables(small_night: RunContext, place: list[str]) -> None:
    rows = json.loads(runner.invoke(app, ["runs", "--json", *place]).stdout.splitlines()[-1])
    assert {r["stage"] for r in rows} >= {"ingest", "train", "publish"}
    tables = json.loads(runner.invoke(app, ["tables", "--json", *place]).stdout.splitlines()[-1])
    assert {t["table"]: t["rows"] for t in tables}["recommendations"] > 0


def test_tune_writes_the_best_of_its_trials(
    small_night: RunContext, place: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a copy of the night's tables and of conf/; the backtest's horizon is not looked at."""
    tables = Path(small_night.catalog.root)
    shutil.copytree(tables, tmp_path / "root" / tables.name)
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    monkeypatch.setenv("RECSPARK_CONF", str(tmp_path / "conf"))
    root = f"paths.root={tmp_path / 'root'}"
    arguments = [
        "popular",
        "--run-date",
        NIGHT,
        "--trials",
        "3",
        "--write",
        "--json",
        *place,
        "--set",
        root,
    ]
    scratches: list[str] = []
    fit = Popular.fit

    def seen(self: Popular, data: Dataset, options: FitOptions) -> PopularModel:
        scratches.append(options.scratch)
        return fit(self, data, options)

    monkeypatch.setattr(Popular, "fit", seen)
    done = runner.invoke(app, ["tune", *arguments])
    assert done.exit_code == 0, done.output
    checkpoints = tmp_path / "root" / "checkpoints" / NIGHT  # item2vec needs one on a cluster
    assert {Path(scratch).parent for scratch in scratches} == {checkpoints}
    assert len(set(scratches)) == 3
    assert not list(checkpoints.glob("*"))
    catalog = TableCatalog(small_night.spark, str(tmp_path / "root" / tables.name))
    trials = sorted(
        catalog.read("tuning", catalog.version("tuning")).collect(), key=lambda r: r.trial
    )
    assert [row.trial for row in trials] == [0, 1, 2]
    horizon = timedelta(days=small_night.config.evaluate.horizon_days)
    assert {row.cutoff for row in trials} == {
        small_night.backtest_cutoff.replace(tzinfo=None) - horizon
    }
    best = max(trials, key=lambda row: row.value)
    assert best.is_best
    assert best.value > 0
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(best.settings)
    assert (tmp_path / "conf" / "models" / "popular.yaml").read_bytes() == (
        ROOT / "conf" / "models" / "popular.yaml"
    ).read_bytes()
    written = (tmp_path / "conf" / "tuned" / "online_retail" / "popular.yaml").read_text()
    assert written.count("#") == 1
    assert f"ndcg@10 {best.value:.4f}" in written
    assert load_config("test").model_settings["popular"] == json.loads(best.settings)
    elsewhere = load_config("test", ["source=movielens_small"]).model_settings["popular"]
    assert elsewhere == yaml.safe_load((ROOT / "conf" / "models" / "popular.yaml").read_text())


@pytest.mark.parametrize(
    ("how", "value", "want"),
    [
        ({"choices": [64, 100]}, 100, True),
        ({"choices": [64, 100]}, 200, False),  # optuna ends the search at such a beginning
        ({"choices": [None, 50]}, None, False),
        ({"low": 0.1, "high": 100}, 0.1, True),
        ({"low": 0.1, "high": 100}, 0.0, False),
        ({"low": 0.1, "high": 100}, None, False),
    ],
)
def test_a_search_begins_at_what_is_configured_where_it_can(
    how: dict[str, Any], value: Any, want: bool
) -> None:
    assert holds(how, value) == want


def test_export_one_night(place: list[str], tmp_path: Path) -> None:
    target = tmp_path / "lists"
    done = runner.invoke(
        app,
        ["export", "recommendations", str(target), "--run-date", NIGHT, "--format", "csv", *place],
    )
    assert done.exit_code == 0, done.output
    lines = [line for f in target.glob("*.csv") for line in f.read_text().splitlines()]
    assert lines[0].startswith("run_date,user_id,rank")
    assert len(lines) > 1000


def test_export_refuses_what_it_cannot_or_must_not_write(place: list[str], tmp_path: Path) -> None:
    precious = tmp_path / "precious" / "file.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    for arguments, says in (
        (["recommendations", str(precious.parent)], "holds files that no export wrote"),
        (["recommendations", str(tmp_path / "x"), "--where", "no_such = 1"], "--where .*no_such"),
        (["sessions", str(tmp_path / "x"), "--format", "csv"], "CSV has no lists: items"),
        (["recommendations", str(tmp_path / "x"), "--run-date", "2010-13-45"], "is not a date"),
        (["events", str(tmp_path / "x"), "--run-date", NIGHT], "no run_date.*--where.*ingest_date"),
    ):
        done = runner.invoke(app, ["export", *arguments, *place])
        assert isinstance(done.exception, ConfigError), done.output
        with pytest.raises(ConfigError, match=says):
            raise done.exception
    assert precious.read_text() == "mine"
    for _ in range(2):  # an export of before is replaced
        done = runner.invoke(app, ["export", "gates", str(tmp_path / "gates"), *place])
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nightly", "--run-date", "09.12.2010"], "is not a date"),
        (["stage", "ingst", "--run-date", NIGHT], "Did you mean 'ingest'"),
        (["nightly", "--run-date", NIGHT, "--set", "publish.kk=1"], "unknown setting 'publish.kk'"),
        (
            ["nightly", "--run-date", NIGHT, "--set", "models.ease.regg=1"],
            "unknown setting 'regg'.*'reg'",
        ),
    ],
)
def test_wrong_input_is_named(arguments: list[str], says: str) -> None:
    done = runner.invoke(app, arguments)
    assert isinstance(done.exception, ConfigError)
    with pytest.raises(ConfigError, match=says):
        raise done.exception
