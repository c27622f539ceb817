"""The examples in the documentation of functions are right."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["metrics", "next_item", "significance", "gates"])
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"recspark.eval.{name}"))
    assert found.attempted > 0
    assert found.failed == 0
