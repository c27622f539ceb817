"""The frame of the checks: what a check is, and what several of them use."""

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
    """One check; it applies to models of `kinds` that have all of `tags`."""

    name: str
    run: Callable[[Any], None]  # takes the case of the kind
    tags: frozenset[str]
    kinds: tuple[str, ...]


CHECKS: list[Check] = []


def check(*tags: str, kinds: tuple[str, ...] = KINDS) -> Callable[[Callable[[Any], None]], Any]:
    """Put a function into `CHECKS`, for models of `kinds` that have all of `tags`."""

    def add(run: Callable[[Any], None]) -> Callable[[Any], None]:
        CHECKS.append(Check(run.__name__, run, frozenset(tags), kinds))
        return run

    return add


@contextmanager
def job_group(spark: SparkSession, name: str) -> Iterator[Callable[[], list[int]]]:
    """Label the jobs started inside, and give a function that lists them."""
    context = spark.sparkContext
    name = f"{name} {uuid.uuid4().hex}"  # Spark remembers the jobs of a group that was used before
    context.setJobGroup(name, name)
    try:
        yield lambda: list(context.statusTracker().getJobIdsForGroup(name))
    finally:
        context.setLocalProperty(JOB_GROUP, None)  # type: ignore[arg-type]


@contextmanager
def raises(kind: type[Exception], *parts: str) -> Iterator[None]:
    """Assert that `kind` is raised inside, with all `parts` in its message."""
    message = None
    try:
        yield
    except kind as error:
        message = str(error)
    assert message is not None, f"no {kind.__name__} was raised"
    missing = [part for part in parts if part not in message]
    assert not missing, f"the message lacks {missing}: {message}"
