"""A model's name is its user's: the settings say which algorithm it is, of recspark or from outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from recspark.config.load import load_config
from recspark.errors import ConfigError
from recspark.models.base import Algorithm
from recspark.models.items.popular import Popular
from recspark.models.registry import MODELS, make, model_spec, spec_of
from recspark.pipeline.checks import check_settings
from recspark.report.algorithms import algorithms, with_settings

OUTSIDE = """
from recspark.models.items.popular import Popular, PopularModel

class Mine(Popular):
    model_class = PopularModel
    tags = frozenset({"cold_users"})

class Bare(Popular):
    pass

text = "no class"
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "mine_of_a_shop.py").write_text(OUTSIDE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "mine_of_a_shop"


def test_two_settings_of_one_algorithm() -> None:
    config = load_config(
        "test",
        [
            "models=[popular, slow, item_knn]",
            "models.slow={algorithm: popular, half_life_days: 300}",
        ],
    )
    check_settings(config)
    slow = make("slow", config.settings_of("slow"))
    assert isinstance(slow, Popular)
    assert slow.settings.half_life_days == 300
    assert make("popular", config.settings_of("popular")).settings.half_life_days < 300
    assert spec_of("slow", config.settings_of("slow")) is MODELS["popular"]


def test_neighbours_are_of_an_algorithm_that_has_some() -> None:
    config = load_config("test", ["models=[popular, wide]", "models.wide={algorithm: item_knn}"])
    assert config.publish.neighbours_model == "wide"
    check_settings(config)


def test_a_class_from_outside(outside: str) -> None:
    spec = model_spec(f"{outside}:Mine")
    assert issubclass(spec.load(), Algorithm)
    assert spec.load_model().__name__ == "PopularModel"
    assert (spec.tags, spec.training) == (frozenset({"cold_users"}), ())
    check_settings(
        load_config("test", ["models=[popular, mine]", f"models.mine.algorithm={outside}:Mine"])
    )


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ("poplar", r"model 'mine': no model is called 'poplar'\. Did you mean 'popular'\?"),
        ("no_such_package:Mine", "cannot be imported: No module named 'no_such_package'"),
        ("mine_of_a_shop:Yours", "cannot be imported: .* has no attribute 'Yours'"),
        ("mine_of_a_shop:text", "no subclass of recspark.models.base.Algorithm"),
        ("mine_of_a_shop:Bare", "its class needs `model_class`"),
        (":Mine", "cannot be imported"),
        ("[popular]", "algorithm = .*is no name"),
    ],
)
def test_an_algorithm_that_there_is_not_is_named(
    outside: str, algorithm: str, message: str
) -> None:
    config = load_config("test", ["models=[popular, mine]", f"models.mine.algorithm={algorithm}"])
    with pytest.raises(ConfigError, match=message):
        check_settings(config)


@pytest.mark.parametrize("name", ["published", "als.wide", "a/b", "-x", "x" * 101])
def test_a_name_that_cannot_be_a_file_or_a_task_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="models: "):
        load_config("test", [f"models=[popular, '{name}']"])


def test_the_algorithms_are_listed_with_all_their_settings() -> None:
    listed = [with_settings(row) for row in algorithms()]
    assert [row["algorithm"] for row in listed] == list(MODELS)
    for row in listed:
        spec = MODELS[row["algorithm"]]
        fields = spec.load().settings_class.model_fields
        assert [setting["setting"] for setting in row["settings"]] == list(fields)
        assert row["source"]
        assert set(row["tags"]) == spec.tags
        assert all(setting["value"] and setting["meaning"] for setting in row["settings"])
