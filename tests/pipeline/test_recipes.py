"""What a model's recipe holds: every setting that its data depends on, and no other."""

from __future__ import annotations

from typing import Any

import pytest

from recspark.config import Config, Examples, Features, Sessions, Train
from recspark.config.load import load_config
from recspark.models.registry import MODELS
from recspark.pipeline.fitted import recipe, slice_recipe
from recspark.pipeline.reuse import SETTINGS_READ

# Another value of a setting need not make sense: only its digest counts.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")


@pytest.fixture(scope="module")
def config() -> Config:
    """A night of all models of recspark; the ranker is built on one of them."""
    names = ", ".join(MODELS)
    return load_config("test", [f"models=[{names}]", "models.lambdamart.needs=[own_items]"])


def changed(config: Config, section: str, name: str) -> Config:
    """The same night with another value of one setting."""
    settings = getattr(config, section)
    other = settings.model_copy(update={name: [getattr(settings, name), "other"]})
    return config.model_copy(update={section: other})


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("section", "settings"), [("features", Features), ("sessions", Sessions)])
def test_the_settings_that_decide_the_data_are_in_the_recipe_of_all_that_learn(
    config: Config, model: str, section: str, settings: Any
) -> None:
    """`build_features` makes all that models learn from: histories, features and training sets. A
    model that learns nothing, and is built on none that does, reads none of it: the vectors of such an
    encoder stay where these settings change.
    """
    assert section in SETTINGS_READ["build_features"]
    before = recipe(config, model)
    learns = any(MODELS[name].learns for name in (model, *config.needs_of(model)))
    for name in settings.model_fields:
        differs = recipe(changed(config, section, name), model) != before
        assert differs == learns, name


def test_no_other_section_decides_the_data() -> None:
    whole = {name for name in SETTINGS_READ["build_features"] if "." not in name}
    assert whole == {"features", "sessions"}
    single = {name for name in SETTINGS_READ["build_features"] if "." in name}
    assert single == {  # which cutoffs there are, and the number of files
        "evaluate.horizon_days", "evaluate.every_days", "train.ranks",
    }  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_a_recipe_has_of_train_what_changes_the_model(config: Config, model: str) -> None:
    spec, before = MODELS[model], recipe(config, model)
    expected = {
        "seed": True, "ranks": spec.depends_on_ranks, "threads": model == "lambdamart",
        "accumulate": spec.depends_on_ranks, "precision": spec.depends_on_ranks,
        "compression": spec.depends_on_ranks,
    }  # fmt: skip
    for name in Train.model_fields:
        differs = recipe(changed(config, "train", name), model) != before
        assert differs == expected.get(name, False), name


def test_a_slice_of_examples_has_in_its_key_what_changes_that_slice(config: Config) -> None:
    """The grid of cutoffs decides which slices a ranker reads, so it is in the ranker's recipe."""
    before = slice_recipe(config), recipe(config, "lambdamart")
    for name in Examples.model_fields:
        other = changed(config, "examples", name)
        is_of_grid = name in ("every_days", "n_cutoffs")
        assert (slice_recipe(other) == before[0]) == is_of_grid, name
        assert recipe(other, "lambdamart") != before[1], name
        assert recipe(other, "own_items") == recipe(config, "own_items"), name
