"""The contract of models: all checks, and the class of the case that the checks of each kind run
on.

To check a model outside recspark, do as `tests/contract/test_recommenders.py` does: get the model's
registry line (`recspark.models.registry.model_spec`), make a case of the class `case_class(spec)`,
and run every check of `checks_for(spec)` on the case.
"""

from __future__ import annotations

from recspark.models.registry import ModelSpec
from recspark.testing import checks, encoder_checks, ranker_checks
from recspark.testing.case import BaseCase, Case
from recspark.testing.check import CHECKS, Check
from recspark.testing.encoder_checks import EncoderCase
from recspark.testing.ranker_checks import RankerCase

__all__ = ["CHECKS", "Case", "Check", "case_class", "checks_for"]
_MODULES = (checks, ranker_checks, encoder_checks)  # their import adds their checks to CHECKS
_CASES: dict[str, type[BaseCase]] = {
    "retriever": Case,
    "ranker": RankerCase,
    "encoder": EncoderCase,
}


def case_class(spec: ModelSpec) -> type[BaseCase]:
    """Return the class of the case for models of this kind."""
    return _CASES[spec.kind]


def checks_for(spec: ModelSpec) -> list[Check]:
    """Return the checks that apply to the model of `spec`.

    A model that learns has the tag `learns` too.
    """
    tags = spec.tags | ({"learns"} if spec.learns else set())
    return [c for c in CHECKS if spec.kind in c.kinds and c.tags <= tags]
