"""The recspark command: what a person types, right and wrong."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pyspark.sql import functions as F
from rich.table import Table
from typer.testing import CliRunner

from recspark import __version__
from recspark.cli import app
from recspark.cli.common import console, reporter
from recspark.config.load import load_config
from recspark.data.dataset import Dataset
from recspark.errors import ConfigError, TableNotFoundError, UnknownUserError
from recspark.models.base import FitOptions
from recspark.models.items.popular import Popular, PopularModel
from recspark.pipeline import job
from recspark.pipeline.checks import check_settings
from recspark.pipeline.context import RunContext
from recspark.pipeline.tune import holds
from recspark.tables.catalog import TableCatalog
from tests.conftest import NIGHT, ROOT, small_settings

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
        "explain",
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


QUESTIONS: dict[str, list[str]] = {
    "show": ["show", "USER", "--json"],
    "show a night": ["show", "USER", "--run-date", NIGHT, "--json"],
    "show on a terminal": ["show", "USER"],
    "similar": ["similar", "ITEM", "--json"],
    "similar on a terminal": ["similar", "ITEM"],
    "runs": ["runs", "--json"],
    "runs on a terminal": ["runs", "--nights", "3"],
    "tables": ["tables", "--json"],
    "tables on a terminal": ["tables"],
    "unknown user": ["show", "nobody"],
    "unknown item": ["similar", "nothing"],
    "a night that never ran": ["show", "USER", "--run-date", "2010-12-08"],
}


def test_both_doors_give_the_same_answers(
    small_night: RunContext, place: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Spark, and by Spark as for a root on a store: letter by letter."""
    ids = {"USER": some_id(small_night, "recommendations"), "ITEM": some_id(small_night, "items")}

    def answers() -> dict[str, tuple[str, str]]:
        given = {}
        for name, words in QUESTIONS.items():
            done = runner.invoke(app, [*(ids.get(word, word) for word in words), *place])
            given[name] = (done.stdout, str(done.exception))
        return given

    without = answers()
    monkeypatch.setattr("recspark.cli.common.is_readable_without_spark", lambda root: False)
    by_spark = answers()
    assert without == by_spark
    for name, (said, error) in without.items():
        assert (error == "None") == bool(said), name
    assert (
        "never ran. Table 'recommendations' has the nights 2010-12-09;"
        in without["a night that never ran"][1]
    )


def some_id(context: RunContext, table: str) -> str:
    rows = context.catalog.read(table, context.catalog.version(table))
    column = "user_id" if "user_id" in rows.columns else "item_id"
    return str(rows.agg(F.min(column)).collect()[0][0])


def test_reading_needs_neither_spark_nor_torch(small_night: RunContext, tmp_path: Path) -> None:
    """In a process of its own: what a command imports decides how long a person waits."""
    root = f"paths.root={Path(small_night.catalog.root).parent}"
    options = ["--env", "test", "--set", root]
    user = some_id(small_night, "recommendations")
    commands = [
        ["show", user, *options],
        ["explain", user, "22423", *options],
        ["similar", "22423", *options],
        ["runs", *options],
        ["tables", *options],
        ["export", "events", str(tmp_path / "events"), "--format", "json", *options],
    ]
    script = (
        "import json, sys; from typer.testing import CliRunner; from recspark.cli import app\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    done = CliRunner().invoke(app, words)\n"
        "    assert done.exit_code == 0, (words, done.output, done.exception)\n"
        "    if words[0] != 'export': assert 'pyarrow' not in sys.modules\n"
        "heavy = {'pyspark', 'py4j', 'torch', 'pandas', 'numba', 'scipy'} & set(sys.modules)\n"
        "assert not heavy - ({'pandas'} if words[0] == 'export' else set()), heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_an_id_that_looks_like_an_option_is_explained(place: list[str]) -> None:
    for command in ("show", "similar"):
        done = runner.invoke(app, [command, "-5", *place])
        said = " ".join(done.output.replace("│", " ").split())
        assert done.exit_code == 2
        assert f"goes after --, behind all options: recspark {command} -- -5" in said
    done = runner.invoke(app, ["show", *place, "--", "-5"])
    assert isinstance(done.exception, UnknownUserError)
    assert "user '-5'" in str(done.exception)


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
        small_night.cutoffs.backtest.replace(tzinfo=None) - horizon
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
    assert lines[0].startswith('"run_date","list","user_id","rank"')
    assert len(lines) > 1000


@pytest.mark.parametrize("form", ["csv", "json", "parquet"])
def test_an_export_is_the_same_whoever_reads(
    place: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Without Spark, and by Spark's tasks: the same rows, written by one writer."""
    table = "recommendations" if form == "csv" else "events"  # a map, times and dates
    words = [table, "--format", form]

    def rows(folder: Path, *more: str) -> list[Any]:
        done = runner.invoke(app, ["export", words[0], str(folder), *words[1:], *more, *place])
        assert done.exit_code == 0, (done.output, done.exception)
        files = sorted(folder.glob(f"part-*.{form}"))
        assert (folder / "_SUCCESS").exists()
        assert files
        if form == "parquet":
            import pyarrow.parquet as pq

            tables = [pq.read_table(file) for file in files]
            assert len({str(t.schema.remove_metadata()) for t in tables}) == 1
            return sorted(str(row) for t in tables for row in [t.schema, *t.to_pylist()])
        lines = [line for f in files for line in f.read_bytes().split(b"\n") if line]
        return sorted({*lines}) if form == "csv" else sorted(lines)  # a header in each file

    first = rows(tmp_path / "without")
    assert len(first) > 1000
    assert first == rows(tmp_path / "condition", "--where", "true")  # Spark's to say
    monkeypatch.setattr("recspark.cli.export.is_readable_without_spark", lambda root: False)
    assert first == rows(tmp_path / "by_spark")
    assert len(rows(tmp_path / "none", "--where", "false")) == (0 if form == "json" else 1)


def test_spark_reads_an_exported_csv_back(small_night: RunContext, tmp_path: Path) -> None:
    """Ids of every ugly kind come back as they were, through Spark's own reader."""
    import pyarrow as pa

    from tests.report.test_export import HARD, export

    export(tmp_path / "ids")
    assert pa.array(HARD).null_count == 0
    read = (
        small_night.spark.read.option("header", "true")
        .option("multiLine", "true")
        .option("escape", '"')
        .option("lineSep", "\r\n")  # else it takes one within an id for \n
        .csv(str(tmp_path / "ids"))
    )
    rows = read.orderBy(F.col("n").cast("int")).collect()
    assert [row["user_id"] or "" for row in rows] == HARD  # Spark takes empty text for null


def test_export_refuses_what_it_cannot_or_must_not_write(place: list[str], tmp_path: Path) -> None:
    precious = tmp_path / "precious" / "file.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    for arguments, says in (
        (["recommendations", str(precious.parent)], "holds files that no export of recspark wrote"),
        (["recommendations", str(tmp_path / "x"), "--where", "no_such = 1"], "--where .*no_such"),
        (["recommendations", str(tmp_path / "x"), "--run-date", "2010-13-45"], "is not a date"),
        (["gates", str(tmp_path / "x"), "--run-date", "2010-12-08"], f"has the nights {NIGHT}"),
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


def test_ctrl_c_ends_a_night_in_one_line(retail_slice: Path, tmp_path: Path) -> None:
    """A real one, to the whole group as a terminal sends it, while a job of Spark runs; twice."""
    settings = [word for text in small_settings(tmp_path, retail_slice) for word in ("--set", text)]
    night = subprocess.Popen(
        [Path(sys.executable).with_name("recspark"), "nightly", "--env", "test"]
        + ["--run-date", NIGHT, *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert night.stdout is not None
    try:
        for line in night.stdout:
            if "ingest ..." in line:
                break
        wait_for_a_job(tmp_path / "tables")
        os.killpg(night.pid, signal.SIGINT)
        os.killpg(night.pid, signal.SIGINT)
        _, errors = night.communicate(timeout=120)
    finally:
        night.kill()
    assert night.returncode == 130
    assert errors.startswith(f"Interrupted: the night of {NIGHT} was ended by Ctrl-C in 'ingest'")
    assert errors.count("\n") == 1
    assert "Run the same command again to go on" in errors
    (log,) = (tmp_path / "logs").glob("*.log")
    assert errors.strip() in log.read_text()


def wait_for_a_job(tables: Path) -> None:
    """Wait until the first rows of a stage are in files."""
    while not list((tables / "quarantine").glob("*/*.parquet")):
        time.sleep(0.05)


def test_a_night_says_what_next_and_keeps_its_log(
    small_night: RunContext, retail_slice: Path, place: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """A second run of the night: as recorded, so it takes seconds."""
    root = Path(small_night.catalog.root).parent
    settings = [word for text in small_settings(root, retail_slice) for word in ("--set", text)]
    logging.getLogger("recspark").setLevel(logging.WARNING)
    before = set((root / "logs").glob("*")) if (root / "logs").exists() else set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recspark.report.night.example_users", warned(["-5", "12360"]))
        with console.capture() as said:
            done = runner.invoke(app, ["nightly", "--env", "test", "--run-date", NIGHT, *settings])
    assert done.exit_code == 0, (done.output, done.exception)
    text = said.get()
    next_ = text.split("what next")[1].splitlines()
    commands = [shlex.split(line, comments=True) for line in next_ if "recspark" in line][:3]
    assert [words[1] for words in commands] == ["show", "runs", "tables"]
    for words in commands:
        again = runner.invoke(app, words[1:])
        if words[1] == "show":
            assert words[-2:] == ["--", "-5"]
            assert "user '-5'" in str(again.exception)
        else:
            assert again.exit_code == 0
    (log,) = set((root / "logs").glob("*")) - before
    kept = log.read_text()
    assert f"log: {log}" in text
    assert "publish: as recorded" in kept
    assert "a warning\n  item \\x1b[2J is odd (2 times)" in text
    assert kept.count("WARNING: item \\x1b[2J is odd") == 2
    assert "odd" not in capfd.readouterr().err  # in one place


def warned(users: list[str]) -> Any:
    def find(*_: object) -> list[str]:
        for _ in range(2):
            logging.getLogger("recspark").warning("item %s is odd", "\x1b[2J")
        return users

    return find


# What takes minutes is noted, to be checked; everything else of README.md runs as it stands.
STUBS = """
set -euo pipefail
note() { printf '%s\\0' "$@" "" >> "$NOTES"; }
git() { :; }
make() { command make -n -C "$ROOT" "$@" > /dev/null; }
uvx() { note uvx "$@"; }
spark-submit() { note spark-submit "$@"; }
recspark() { case $1 in nightly|tune) note recspark "$@" ;; *) command recspark "$@" ;; esac; }
"""


def test_every_command_of_the_readme_works(small_night: RunContext, tmp_path: Path) -> None:
    """Copied in order into one shell, in a clone whose nights have run already."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    assert len(blocks) >= 7
    clone, notes = tmp_path / "recspark", tmp_path / "notes"
    clone.mkdir()
    for name in (".venv", "data", "jobs", "recspark"):
        (clone / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "conf", clone / "conf")
    (clone / "build" / "my_shop").mkdir(parents=True)
    for night in ("build/demo", "build/my_shop/recspark"):
        (clone / night).symlink_to(Path(small_night.catalog.root).parent)
    kept = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    kept["PATH"] = os.pathsep.join(
        p for p in kept["PATH"].split(os.pathsep) if "venv" not in p
    )  # nothing is activated yet
    done = subprocess.run(
        ["bash", "-c", STUBS + "\n".join(blocks)],
        cwd=tmp_path,
        env={
            **kept,
            "ROOT": str(ROOT),
            "NOTES": str(notes),
            "RECSPARK_URL": "x",
            "RECSPARK_CONF": str(clone / "conf"),
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "user 12360, night of" in done.stdout
    assert list((clone / "build" / "lists").glob("*.csv"))
    commands = [text.split("\0") for text in notes.read_text().strip("\0").split("\0\0")]
    assert {words[0] for words in commands} == {"uvx", "spark-submit", "recspark"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECSPARK_CONF", str(clone / "conf"))
        for words in commands:
            check_slow(words, clone)


def check_slow(words: list[str], clone: Path) -> None:
    """Assert that a command of minutes is understood: its options, and its settings."""
    if words[0] == "uvx":
        assert (ROOT / words[-1]).exists()
        return
    if words[0] == "recspark":
        group = typer.main.get_command(app)
        command = group.get_command(None, words[1])  # type: ignore[attr-defined]
        given = command.make_context(words[1], words[2:]).params
        env, overrides = given["env"], given["set_"]
    else:
        (script,) = [word for word in words if word.startswith("jobs/")]
        assert Path(script).name in {path.name for path in (ROOT / "jobs").iterdir()}
        arguments = job.parser(Path(script).stem).parse_args(words[words.index(script) + 1 :])
        env, overrides = arguments.env, arguments.set
        jars = words[words.index("--jars") + 1].split(",")
        assert len(jars) == 2
        assert all(map(os.path.exists, [*jars, clone / words[words.index("--py-files") + 1]]))
    config = load_config(env, overrides)
    check_settings(config)
    (landing,) = (clone / config.source.path.replace("{run_date}", NIGHT)).iterdir()
    first = json.loads(landing.read_text().splitlines()[0])
    assert {*config.source.columns.values()} <= {*first}
