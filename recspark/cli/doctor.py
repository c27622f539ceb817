"""`recspark doctor`: is this machine ready, and what is installed."""

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


Check = tuple[str, bool, str]  # what is looked at, whether it is well, what was found


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
    checks = [*_packages(), _java(), _jars(), *_settings(env, set_, run_date)]
    if as_json:
        print(json.dumps([{"check": n, "ok": ok, "found": text} for n, ok, text in checks]))
    else:
        table = Table(title="recspark doctor")
        for column in ("check", "", "found"):
            table.add_column(column)
        for name, ok, text in checks:
            table.add_row(name, Text("ok", "green") if ok else Text("no", "red"), text)
        console.print(table)
    bad = [name for name, ok, _ in checks if not ok]
    if bad:
        raise SetupError(f"not ready: {', '.join(bad)}")


def _packages() -> list[Check]:
    out = [("python", platform.python_version().startswith("3.11."), platform.python_version())]
    for name in _PACKAGES:
        try:
            out.append((name, True, metadata.version(name)))
        except metadata.PackageNotFoundError:
            out.append((name, False, f"missing: pip install {name} -c constraints.txt"))
    return out


def _java() -> Check:
    from recspark.session import check_java

    return _tried("java", check_java)


def _jars() -> Check:
    import pyspark

    found = sorted(p.name for p in (Path(pyspark.__file__).parent / "jars").glob("delta-*.jar"))
    return "delta jars", len(found) >= 2, ", ".join(found) or "missing: make setup"


def _settings(env: str, overrides: list[str] | None, run_date: str | None) -> list[Check]:
    """Look at the settings, and at what they point to."""
    from recspark.layers import load_config
    from recspark.pipeline.checks import check_settings

    try:
        config = load_config(env, overrides or [])
        check_settings(config)
    except RecsparkError as error:
        return [("settings", False, str(error))]
    said = f"env {env}, source {config.source.name}, models {', '.join(config.models)}"
    return [
        ("settings", True, said),
        _tried("root", lambda: _root(config)),
        _tried("source", lambda: _source(config, run_date)),
    ]


def _root(config: Config) -> str:
    from recspark import storage

    root = storage.absolute(config.paths.root)
    storage.check_writable(storage.nearest_folder(root))
    return root


def _source(config: Config, run_date: str | None) -> str:
    from recspark.sources import check_places

    if run_date is None and not config.source.archive:
        return f"{config.source.path}: one landing a night; --run-date looks for one"
    check_places(config.source, parse_date(run_date) if run_date else date.today())
    return config.source.path


def _tried(name: str, look: Callable[[], str]) -> Check:
    from recspark.masking import mask

    try:
        return name, True, mask(look())
    except RecsparkError as error:
        return name, False, str(error)
