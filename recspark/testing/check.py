"""What a check is, how it is registered, and helpers that several checks use."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pyspark.sql import SparkSession

from recspark.models.kinds import KINDS
from recspark.session import JOB_GROUP


@dataclass(frozen=True)
class Check:
    """One check. It applies to models whose kind is among `kinds`, and that have all of `tags`."""

    name: str
    run: Callable[[Any], None]  # takes the case of a model, and raises AssertionError
    tags: frozenset[str]
    kinds: tuple[str, ...]


CHECKS: list[Check] = []


def check(*tags: str, kinds: tuple[str, ...] = KINDS) -> Callable[[Callable[[Any], None]], Any]:
    """Return a decorator that adds a function to `CHECKS` under its name; see `Check`."""

    def add(run: Callable[[Any], None]) -> Callable[[Any], None]:
        CHECKS.append(Check(run.__name__, run, frozenset(tags), kinds))
        return run

    return add


@contextmanager
def job_group(spark: SparkSession, name: str) -> Iterator[Callable[[], list[int]]]:
    """Label the Spark jobs started in the block. Yields a function that returns their ids."""
    context = spark.sparkContext
    name = (
        f"{name} {uuid.uuid4().hex}"  # a new name, as Spark remembers the jobs of names used before
    )
    context.setJobGroup(name, name)
    try:
        yield lambda: list(context.statusTracker().getJobIdsForGroup(name))
    finally:
        context.setLocalProperty(JOB_GROUP, None)  # type: ignore[arg-type]


@contextmanager
def raises(error_class: type[Exception], *expected_parts: str) -> Iterator[None]:
    """Assert that the block raises `error_class`, with all `expected_parts` in its message."""
    message = None
    try:
        yield
    except error_class as error:
        message = str(error)
    assert message is not None, f"no {error_class.__name__} was raised"
    missing_parts = [part for part in expected_parts if part not in message]
    assert not missing_parts, f"the message lacks {missing_parts}: {message}"
