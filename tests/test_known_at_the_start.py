"""What is known at the start is told at the start: before Spark, and before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from recspark import session
from recspark.cli import app
from recspark.config.load import load_config
from recspark.errors import ConfigError, MissingLandingError, RecsparkError, SetupError
from recspark.pipeline import run
from recspark.pipeline.job import run_job
from recspark.pipeline.tune import tune
from tests.conftest import NIGHT, ROOT

MAPPING = (
    "source={name: shop, kind: mapping, format: csv, archive: false, path: 'PLACE/{run_date}', "
    "columns: {user_id: u, item_id: i, event_at: t}, constants: {event_type: purchase}}"
)


RANKED = (
    "models=[popular, ease, lambdamart]",
    "models.lambdamart.needs=[popular, ease]",
    "publish={model: ease, ladder: [lambdamart, popular]}",
)


class SparkWasStarted(Exception):
    pass


@pytest.fixture(autouse=True)
def no_spark(monkeypatch: pytest.MonkeyPatch) -> None:
    def build_session(*_: object) -> None:
        raise SparkWasStarted

    monkeypatch.setattr(run, "build_session", build_session)


def outcome(*words: str) -> BaseException | None:
    return CliRunner().invoke(app, list(words)).exception


def settings(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.mark.parametrize("command", [["nightly"], ["stage", "ingest"]])
@pytest.mark.parametrize("source", ["source.path=PLACE/gone.parquet", MAPPING])
def test_a_landing_that_is_not_there(
    command: list[str], source: str, root: Path, tmp_path: Path
) -> None:
    options = settings(f"paths.root={root}", source.replace("PLACE", str(tmp_path)))
    error = outcome(*command, "--run-date", NIGHT, "--env", "test", *options)
    assert isinstance(error, MissingLandingError)
    assert not root.exists()
    if len(command) == 1:  # a night that has begun may have taken it in
        (root / "tables" / "runs" / f"run_date={NIGHT}").mkdir(parents=True)
        error = outcome(*command, "--run-date", NIGHT, "--env", "test", *options)
        assert isinstance(error, SparkWasStarted)


def test_stages_that_read_no_landing_do_not_ask_for_it(root: Path) -> None:
    options = settings(f"paths.root={root}", "source.path=gone.parquet")
    for words in (["stage", "publish"], ["tune", "ease"]):
        error = outcome(*words, "--run-date", NIGHT, "--env", "test", *options)
        assert isinstance(error, SparkWasStarted)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stage", "train", "--model", "eas"], "'eas' is not among this night's. Did you mean 'ease'"),
        (["tune", "eas"], "no model is called 'eas'. Did you mean 'ease'"),
        (["nightly", *settings("models=[popular, eaze]")], "called 'eaze'. Did you mean 'ease'"),
        (["nightly", *settings("models.ease.reg=-1", "models.als.reg=.nan", "evaluate.metric=ndgc")],
         "conf of Ease: .*; conf of Als: .*; .*Did you mean 'ndcg'"),
        (["nightly", *settings("examples.modes=[novel, novel]")], "examples.modes.* names novel twice"),
        (["nightly", *settings("examples.features=[orders, catalogue, orders]")], "names orders twice"),
        (["nightly", *settings(*RANKED, "examples.modes=[repeat]")],
         r"'lambdamart' is a ranker and lists in mode novel, but examples.modes = \['repeat'\]"),
        (["nightly", *settings(*RANKED, "examples.honest_features=[pair_deu]")],
         "honest_features names 'pair_deu'.* Did you mean 'pair_due'"),
        (["nightly", *settings(*RANKED, "examples.vectors=[eas]")],
         "examples.vectors names 'eas', which none of .*'lambdamart'.* needs: .*Did you mean 'ease'"),
    ],
)  # fmt: skip
def test_a_name_that_is_wrong(words: list[str], says: str, root: Path) -> None:
    options = settings(f"paths.root={root}")
    error = outcome(*words, "--run-date", NIGHT, "--env", "test", *options)
    with pytest.raises(ConfigError, match=says):
        raise error or AssertionError
    assert not root.exists()


@pytest.mark.parametrize("model", ["own_items", "mine"])
def test_own_items_are_not_tuned_in_mode_novel(model: str) -> None:
    """Every trial would be 0. In mode repeat the search begins: it reads the night's cutoffs."""

    def search(mode: str) -> None:
        overrides = ["models.mine.algorithm=own_items", f"publish.mode={mode}"]
        context: Any = SimpleNamespace(config=load_config("test", overrides))
        tune(context, model, 1, lambda _settings, _value: None)

    with pytest.raises(ConfigError, match=r"only items that .* --set publish.mode=repeat"):
        search("novel")
    with pytest.raises(AttributeError, match="cutoffs"):
        search("repeat")


def test_a_job_says_it_by_its_exit_code(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--run-date", NIGHT, "--env", "test", *settings(f"paths.root={root}")]
    assert run_job("train", [*options, "--model", "eas"]) == ConfigError.exit_code
    gone = run_job("ingest", [*options, *settings("source.path=gone.parquet")])
    assert gone == MissingLandingError.exit_code
    assert "gone.parquet" in capsys.readouterr().err
    assert not root.exists()


def doctor(*overrides: str, more: tuple[str, ...] = ()) -> tuple[dict[str, tuple[bool, str]], int]:
    """Return what the doctor found, by check, and the exit code of its error."""
    run = CliRunner().invoke(
        app, ["doctor", "--env", "test", "--json", *settings(*overrides), *more]
    )
    found = json.loads(run.stdout.splitlines()[0])
    code = run.exception.exit_code if isinstance(run.exception, RecsparkError) else run.exit_code
    return {row["check"]: (row["ok"], row["found"]) for row in found}, code


def test_the_doctor_finds_all_well(root: Path) -> None:
    found, code = doctor(f"paths.root={root}")
    assert [name for name, (ok, _) in found.items() if not ok] == []
    assert code == 0
    assert not root.exists()


def test_the_doctor_reports_each(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a_file"
    file.write_text("")
    found, code = doctor(f"paths.root={file}", "source.path=gone.parquet")
    assert code == SetupError.exit_code
    assert not found["root"][0]
    assert "nothing can be written there" in found["root"][1]
    assert not found["source"][0]
    assert "gone.parquet" in found["source"][1]
    found, code = doctor("models=[popular, eaze]", f"paths.root={root}")
    assert (found["settings"][0], code) == (False, SetupError.exit_code)
    assert "eaze" in found["settings"][1]
    mapping = MAPPING.replace("PLACE", str(tmp_path))
    found, code = doctor(mapping, f"paths.root={root}")
    assert (found["source"][0], code) == (True, 0)
    assert "--run-date looks for one" in found["source"][1]
    found, code = doctor(mapping, f"paths.root={root}", more=("--run-date", NIGHT))
    assert (found["source"][0], code) == (False, SetupError.exit_code)
    notes = Path(session.pyspark.__file__).parent / "conf" / "spark-env.sh"
    if not notes.exists():  # else `make setup` chose the Java
        monkeypatch.setenv("JAVA_HOME", str(tmp_path / "gone"))
        found, code = doctor(f"paths.root={root}")
        assert (found["java"][0], code) == (False, SetupError.exit_code)
        assert "JAVA_HOME says" in found["java"][1]
    assert not root.exists()


def test_the_settings_that_hold_are_printed_without_secrets(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECSPARK_ROOT", str(root))
    overrides = settings("spark.conf.fs.secret.key=planted-here", "publish.k=7")
    run = CliRunner().invoke(app, ["settings", "--env", "test", *overrides])
    found = yaml.safe_load(run.stdout)
    assert (found["paths"]["root"], found["publish"]["k"]) == (str(root), 7)
    assert found["spark"]["conf"]["fs.secret.key"] == "***"
    assert "planted-here" not in run.output
    page = CliRunner().invoke(app, ["settings", "--markdown"])
    assert page.stdout == (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")


def test_a_broken_conf_is_a_finding_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (tmp_path / "conf" / "models" / "ease.yaml").write_text("reg: 1\nreg: 2\n")
    monkeypatch.setenv("RECSPARK_CONF", str(tmp_path / "conf"))
    found, code = doctor()
    assert (found["settings"][0], code) == (False, SetupError.exit_code)
    assert "there twice, in lines 1 and 2" in found["settings"][1]
