"""What the examples of the modules behind the commands say is so."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name",
    [
        "config.publishing",
        "report.answers",
        "tables.added_columns",
        "tables.reader",
        "tables.spark_reader",
        "terminal",
        "pipeline.interrupt",
    ],
)
def test_examples_hold(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"recspark.{name}"))
    assert found.attempted > 0
    assert found.failed == 0
