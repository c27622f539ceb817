"""`recspark doctor`: is this machine ready, and what is installed."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from rich.table import Table
from rich.text import Text

from recspark.cli.common import Env, Json, Set, console
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


def doctor(env: Env = "local", set_: Set = None, as_json: Json = False) -> None:
    """Check Java, packages, Delta jars and settings; the exit code says whether all is well."""
    checks = [*_packages(), _java(), _jars(), _settings(env, set_)]
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


def _packages() -> list[tuple[str, bool, str]]:
    out = [("python", platform.python_version().startswith("3.11."), platform.python_version())]
    for name in _PACKAGES:
        try:
            out.append((name, True, metadata.version(name)))
        except metadata.PackageNotFoundError:
            out.append((name, False, f"missing: pip install {name} -c constraints.txt"))
    return out


def _java() -> tuple[str, bool, str]:
    from recspark.session import find_java

    java = find_java()
    if java is None:
        return "java", False, "missing: apt-get install -y openjdk-17-jre-headless"
    text = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    first = text.splitlines()[0] if text else "?"
    return "java", any(f'"{v}' in first for v in ("17", "21")), first


def _jars() -> tuple[str, bool, str]:
    import pyspark

    found = sorted(p.name for p in (Path(pyspark.__file__).parent / "jars").glob("delta-*.jar"))
    return "delta jars", len(found) >= 2, ", ".join(found) or "missing: make setup"


def _settings(env: str, overrides: list[str] | None) -> tuple[str, bool, str]:
    from recspark.layers import load_config
    from recspark.pipeline.run import check_settings

    try:
        config = load_config(env, overrides or [])
        check_settings(config)
    except RecsparkError as error:
        return "settings", False, str(error)
    return (
        "settings",
        True,
        f"env {env}, source {config.source.name}, models {', '.join(config.models)}",
    )
