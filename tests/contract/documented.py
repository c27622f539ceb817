"""The models of docs/add_a_model.md as modules of their own, as if from another package."""

from __future__ import annotations

import re
from pathlib import Path

from pyspark.sql import SparkSession

from tests.conftest import ROOT


def blocks(kinds: str = "python") -> list[str]:
    """Return the page's blocks of code of these kinds, in order."""
    page = (ROOT / "docs" / "add_a_model.md").read_text(encoding="utf-8")
    return re.findall(rf"```(?:{kinds})\n(.*?)```", page, re.DOTALL)


def documented(spark: SparkSession, folder: Path, name: str) -> str:
    """Write the page's model `name` as a module that driver and executors can import; return the path
    of its class.
    """
    [source] = [block for block in blocks() if f"class {name.title()}(Algorithm[" in block]
    module = f"{name}_of_{re.sub(r'[^a-z0-9]', '_', folder.name.lower())}"
    add_module(spark, folder / f"{module}.py", source)
    return f"{module}:{name.title()}"


def add_module(spark: SparkSession, path: Path, source: str) -> None:
    """Make a module importable on the driver and in the executors."""
    path.write_text(source, encoding="utf-8")
    spark.sparkContext.addPyFile(str(path))
