"""`recspark doctor`: whether this machine is ready, and what is installed."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from recspark.cli.common import Env, Json, Set, console, parse_date
from recspark.config import Config
from recspark.errors import RecsparkError, SetupError

_PACKAGES = (
    "pyspark",
    "delta-spark",
    "pyarrow",
    "numpy",
    "petastorm",
    "torch",
    "horovod",
    "pydantic",
)


Check = tuple[str, bool, str]  # what is checked, whether it is fine, what was found


def doctor(
    env: Env = "local",
    set_: Set = None,
    run_date: Annotated[
        str | None,
        typer.Option(
            "--run-date", help="whose landing to look for; only a source by night needs it"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check Java, packages, Delta jars, settings, root and source; the exit code says whether all is
    well. Nothing is started or written.
    """
    checks = [
        *_check_packages(),
        _check_java(),
        _check_jars(),
        *_check_settings(env, set_, run_date),
    ]
    if as_json:
        print(
            json.dumps(
                [{"check": name, "ok": is_ok, "found": finding} for name, is_ok, finding in checks]
            )
        )
    else:
        table = Table(title="recspark doctor")
        for column in ("check", "", "found"):
            table.add_column(column)
        for name, is_ok, finding in checks:
            table.add_row(name, Text("ok", "green") if is_ok else Text("no", "red"), finding)
        console.print(table)
    failed_checks = [name for name, is_ok, _ in checks if not is_ok]
    if failed_checks:
        raise SetupError(f"not ready: {', '.join(failed_checks)}")


def _check_packages() -> list[Check]:
    checks = [("python", platform.python_version().startswith("3.11."), platform.python_version())]
    for name in _PACKAGES:
        try:
            checks.append((name, True, metadata.version(name)))
        except metadata.PackageNotFoundError:
            checks.append((name, False, f"missing: pip install {name} -c constraints.txt"))
    return checks


def _check_java() -> Check:
    from recspark.session import check_java

    return _check_of("java", check_java)


def _check_jars() -> Check:
    import pyspark

    jar_names = sorted(p.name for p in (Path(pyspark.__file__).parent / "jars").glob("delta-*.jar"))
    return "delta jars", len(jar_names) >= 2, ", ".join(jar_names) or "missing: make setup"


def _check_settings(env: str, overrides: list[str] | None, run_date: str | None) -> list[Check]:
    """Check the settings, and the root and the source that they point to."""
    from recspark.config.load import load_config
    from recspark.pipeline.checks import check_settings

    try:
        config = load_config(env, overrides or [])
        check_settings(config)
    except RecsparkError as error:
        return [("settings", False, str(error))]
    summary = f"env {env}, source {config.source.name}, models {', '.join(config.models)}"
    return [
        ("settings", True, summary),
        _check_of("root", lambda: _check_root(config)),
        _check_of("source", lambda: _check_source(config, run_date)),
    ]


def _check_root(config: Config) -> str:
    from recspark import storage

    root = storage.absolute(config.paths.root)
    storage.check_writable(storage.nearest_folder(root))
    return root


def _check_source(config: Config, run_date: str | None) -> str:
    from recspark.sources import check_inputs

    if run_date is None and not config.source.archive:
        return f"{config.source.path}: one landing a night; --run-date looks for one"
    check_inputs(config.source, parse_date(run_date) if run_date else date.today())
    return config.source.path


def _check_of(name: str, look_up: Callable[[], str]) -> Check:
    # A check is fine if `look_up` raises no error; its result is the finding.
    from recspark.masking import mask

    try:
        return name, True, mask(look_up())
    except RecsparkError as error:
        return name, False, str(error)
