"""Settings: layers, overrides, unknown keys with a suggestion, what makes a run another run."""

from __future__ import annotations

import shutil
from datetime import date
from functools import partial
from pathlib import Path

import pytest

from recspark.config import Config
from recspark.errors import ConfigError, NoSlotsError
from recspark.layers import load_config
from recspark.pipeline.run import check_settings, open_night
from tests.conftest import ROOT


def test_every_environment_loads() -> None:
    for env in ("local", "test", "cluster"):
        assert load_config(env).env == env


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("publish.mod=novel", r"unknown setting 'publish.mod'.*Did you mean 'mode'"),
        ("publish.mode=new", r"'publish.mode' = 'new'"),
        ("evaluate.horizon_days=0", r"evaluate.horizon_days.*greater than or equal to 1"),
        ("publish.model=eas", r"publish.model = 'eas' is not among models.*Did you mean 'ease'"),
        ("source=online_retial", r"unknown source.*Did you mean 'online_retail'"),
        ("pubish.k=3", r"unknown setting 'pubish'.*Did you mean 'publish'"),
        ("nothing", r"expected a.b=value"),
        ("n_candidates=5", r"n_candidates must be at least"),
    ],
)
def test_a_wrong_setting_is_named(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config("test", [override])


def test_an_unknown_environment_is_named() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'local'"):
        load_config("locla")


def test_overrides_win_and_reach_model_settings() -> None:
    config = load_config(
        "test", ["publish.k=7", "models.ease.reg=3", "models=[popular, ease, item_knn]"]
    )
    assert config.publish.k == 7
    assert config.model_settings["ease"]["reg"] == 3
    assert config.models == ("popular", "ease", "item_knn")


def test_the_fingerprint_knows_settings_from_machine() -> None:
    base = load_config("test").fingerprint()
    for same in (
        "paths.root=/elsewhere",
        "spark.shuffle_partitions=9",
        "train.threads=4",
        "train.device=cpu",
        "train.checkpoint_every_s=5",
    ):
        assert load_config("test", [same]).fingerprint() == base
    for other in (
        "models.ease.reg=3",
        "publish.k=9",
        "sessions.gap_minutes=5",
        "train.ranks=1",
        "train.precision=bfloat16",
    ):
        assert load_config("test", [other]).fingerprint() != base


def test_resolved_settings_come_back_the_same() -> None:
    config = load_config("test", ["publish.k=7"])
    assert Config.model_validate_json(config.resolved()) == config


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("models=[ease", r"--set 'models=\[ease': not YAML"),
        ("evaluate.ks=[]", "evaluate.ks"),
        ("evaluate.ks=[0]", "evaluate.ks"),
        ("models=[popular, ease, item_knn, ease]", r"models names \['ease'\] twice"),
        (
            "features.event_weights={purchase: 1, impression: 0.1}",
            r"^features\.event_weights names \['impression'\], which sessions\.impression_types says",
        ),
    ],
)
def test_what_a_typo_makes_of_a_setting_is_named(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config("test", [override])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("evaluate.metric=ndgc", "evaluate.metric = 'ndgc' is no metric. Did you mean 'ndcg'"),
        ("publish.neighbours_model=als", "'als' gives no neighbours; these do: .*item_knn"),
        ("models.easy.reg=3", "no model is called 'easy'. Did you mean 'ease'"),
    ],
)
def test_a_name_that_does_nothing_is_an_error_before_the_night(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_settings(load_config("test", [override]))


@pytest.mark.parametrize(
    ("settings", "models", "refused"),
    [
        (["train.ranks=3", "models=[popular, item_knn, ease, multvae]"], None, True),
        (["train.ranks=2", "models=[popular, item_knn, ease, multvae]"], None, False),
        (["train.ranks=3", "models=[popular, item_knn, ease, multvae]"], ("ease",), False),
        (["train.ranks=3", "models=[popular, item_knn, ease, als]"], None, False),
    ],
)
def test_more_ranks_than_slots_are_known_before_spark_starts(
    settings: list[str], models: tuple[str, ...] | None, refused: bool, tmp_path: Path
) -> None:
    """On local[2]; only a network trains on ranks."""
    started: list[str] = []
    with pytest.raises(NoSlotsError if refused else Started) as caught:
        open_night(
            "test",
            date(2024, 5, 31),
            [*settings, f"paths.root={tmp_path}"],
            trains=True,
            models=models,
            progress=partial(stop, started),
        )
    assert bool(started) != refused
    if refused:
        assert "multvae: train.ranks = 3" in str(caught.value)
        assert "set train.ranks=2" in str(caught.value)


class Started(Exception):
    """Spark would start now."""


def stop(started: list[str], text: str) -> None:
    started.append(text)
    raise Started


def test_yaml_in_another_encoding_is_named(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (tmp_path / "conf" / "models" / "ease.yaml").write_bytes(
        "# gr\u00f6\u00dfe\nreg: 3".encode("latin-1")
    )
    with pytest.raises(ConfigError, match=r"ease\.yaml: not YAML in UTF-8"):
        load_config("test", folder=tmp_path / "conf")
