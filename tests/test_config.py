"""Settings: layers, overrides, unknown keys with a suggestion, what makes a run another run."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import suppress
from datetime import date
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from recspark.cli.nightly import DEMO_SETTINGS
from recspark.config import ENCODER_MODELS, NEIGHBOUR_MODELS, Config, Paths, PublishedList, lists_of
from recspark.config.load import load_config, tuned_file
from recspark.config.section import _types_in
from recspark.errors import ConfigError, NoSlotsError, RecsparkError
from recspark.models.registry import MODELS
from recspark.pipeline.checks import check_settings
from recspark.pipeline.run import open_night
from recspark.report.settings_page import _sections, settings_page
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


# ------------------------------------------------------------------------------------------- numbers
SIGNED = {
    "source.min_value",
    "models.item2vec.ns_exponent",
    "models.prod2vec.ns_exponent",
    "models.meta_prod2vec.ns_exponent",
    "models.user2vec.ns_exponent",
    "models.word_vectors.ns_exponent",
    "models.paragraph_vectors.ns_exponent",
}


def fields() -> Iterator[tuple[str, type[BaseModel], str, FieldInfo]]:
    """Give every setting there is: its dotted name, its class, its name there, its field."""
    for _, prefix, section in _sections():
        for name, field in section.model_fields.items():
            if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
                yield f"{prefix}{name}", section, name, field


def in_shape(field: FieldInfo, number: Any) -> Any:
    """Return `number` as the setting takes it: alone, in a list, in a map."""
    text = str(field.annotation)
    return (number,) if "tuple" in text else {"x": number} if "dict" in text else number


def refuses(section: type[BaseModel], name: str, value: Any) -> bool:
    try:
        section.model_validate({name: value})
    except ValidationError as error:
        return any(item["loc"][:1] == (name,) for item in error.errors())
    return False


def test_no_number_may_be_endless_negative_or_true() -> None:
    numbers = [
        row
        for row in fields()
        if _types_in(row[3].annotation) & {int, float}
        and not _types_in(row[3].annotation) & {bool, Any}
    ]
    assert len(numbers) > 100
    passed = [
        (dotted, bad)
        for dotted, section, name, field in numbers
        for bad in (math.nan, math.inf, -math.inf, "nan", "-inf", True, -1, -0.5)
        if not (dotted in SIGNED and bad in (-1, -0.5))
        if not refuses(section, name, in_shape(field, bad))
    ]
    assert passed == []
    whole = [row for row in numbers if float not in _types_in(row[3].annotation)]
    assert [row[0] for row in whole if not refuses(row[1], row[2], in_shape(row[3], 2**31))] == []


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "-1", "true"])
def test_a_number_that_is_none_is_named(value: str) -> None:
    with pytest.raises(ConfigError, match=r"setting 'features\.other_weight' = .*: "):
        load_config("test", [f"features.other_weight={value}"])
    with pytest.raises(ConfigError, match="conf of Ease: setting 'reg' = "):
        check_settings(load_config("test", [f"models.ease.reg={value}"]))


# ---------------------------------------------------------------------------------------------- root
@pytest.mark.parametrize(
    "root",
    ["", "/", "//", "file:///", "file:", "s3a://", " x", "x ", "~/x", "a[1]", "a/{b}", "x*", "x?", "a\\b",
     "s3://b::x", "a\nb"],
)  # fmt: skip
def test_a_root_that_is_no_folder_is_refused(root: str) -> None:
    with pytest.raises(ConfigError, match=r"'paths\.root' = .*: "):
        load_config("test", [f"paths.root={json.dumps(root)}"])


@given(st.text(min_size=1, max_size=20))
@example("build/recspark/")
@example("s3a://lake/recspark/")
def test_a_root_that_passes_is_a_plain_name(root: str) -> None:
    """No pattern of Hadoop's, no chain of fsspec's; never the root of the machine."""
    try:
        taken = Paths(root=root)
    except ValidationError:
        return
    assert not set(taken.tables) & set("[]{}*?\\")
    assert "::" not in taken.tables
    assert not taken.tables.startswith(("/tables", "//tables", "~"))
    assert "//" not in taken.tables.replace("://", "").removesuffix("/tables")[-1:]


def test_no_root_given_on_the_command_line_is_not_the_machines() -> None:
    with pytest.raises(ConfigError, match="paths.root.*name a folder"):
        load_config("test", ["paths.root="])


# ---------------------------------------------------------------------------------------------- keys
TENFOLD = ", ".join(f"&{b} [" + f"*{a}, " * 10 + "]" for a, b in pairwise("abcdefghi"))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("&a [*a]", "nested too deeply"),
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
        (f"[&a [x], {TENFOLD}]", "too many values"),
        ("2020-13-45", "a value is none: month must be in"),
        ("9" * 5000, "a value is none"),
    ],
    ids=["itself", "deep", "tenfold", "date", "digits"],
)  # fmt: skip
def test_a_value_that_is_none_is_named(value: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config("test", [f"publish.ladder={value}"])


VALUES = (
    "", "null", "[]", "{}", "[1, 2]", "[[a]]", "{a: 1}", "x", "5", "-1", "1e400", ".nan", "true", "[null]",
    "[popular, popular]", "[popular, {}]", "!!python/object/apply:os.getcwd []", "'\\0'", "{1: 2}", "? ", "a: b: c",
    "%", "`", "!!binary aGk=", "!!set {a, b}", "12:30:45", "{ladder: null}", "{model: {}}", "{baseline: []}",
    "{<<: 5}", "2020-01-01",
)  # fmt: skip
ODD_KEYS = (
    "source",
    "publish",
    "spark",
    "a",
    ".",
    "models.x",
    "models..x",
    "publish.k.x",
    "spark.conf.",
    "",
)


# What the layers read before anything has checked it: every value of each, not a sample.
READ_BEFORE_THE_CHECKS = (
    "models", "model_settings", "model_settings.ease", "model_settings.ease.algorithm", "publish", "evaluate",
    "publish.ladder", "publish.model", "publish.neighbours_model", "evaluate.baseline", "source", "source.name",
    "source.path", "publish.lists", "publish.lists.x", "publish.lists.x.model", "publish.lists.x.ladder",
)  # fmt: skip


@pytest.mark.parametrize("key", READ_BEFORE_THE_CHECKS)
def test_what_is_read_before_the_checks_is_taken_or_refused_by_name(key: str) -> None:
    for value in VALUES:
        with suppress(RecsparkError):  # any other error fails the test
            config = load_config("test", [f"{key}={value}"])
            check_settings(config)
            assert len(config.fingerprint()) == 16


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted({dotted for dotted, *_ in fields()} | {*ODD_KEYS})),
            st.sampled_from(VALUES) | st.text(max_size=20),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_whatever_is_set_is_taken_or_refused_by_name(changes: list[tuple[str, str]]) -> None:
    with suppress(RecsparkError):  # any other error fails the test
        config = load_config("test", [f"{key}={value}" for key, value in changes])
        check_settings(config)
        assert json.loads(config.resolved())
        assert len(config.fingerprint()) == 16


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("reg: 3\nreg: 4\n", "key 'reg' is there twice, in lines 1 and 2"),
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", "key 'b' is there twice, in lines 2 and 4"),
        ("a: {b: 1, b: 2}\n", "key 'b' is there twice, in line 1"),
        ("l:\n- {x: 1}\n- {y: 1, 'y': 2}\n", "key 'y' is there twice, in line 3"),
        ("on: 1\n", "line 1: key on is no text; put it in quotes"),
        ("a: {1: 2}\n", "line 1: key 1 is no text; put it in quotes"),
        ("? [a, b]\n: 1\n", "line 1: key of several values is no text"),
    ],
)
def test_a_key_is_a_text_and_there_once(tmp_path: Path, text: str, says: str) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(ROOT / "conf", conf)
    (conf / "models" / "ease.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"ease\.yaml: {says}"):
        load_config("test", folder=conf)


def test_keys_of_an_override_are_looked_at_too() -> None:
    with pytest.raises(ConfigError, match="--set .*: key 'k' is there twice, in line 1"):
        load_config("test", ["publish={k: 10, k: 20}"])


def test_merge_keys_of_yaml_still_work(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("features:\n  event_weights: &w {a: 1}\n  <<: {other_weight: 0.5}\n")
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (tmp_path / "conf" / "env" / "mine.yaml").write_text(own.read_text())
    assert load_config("mine", folder=tmp_path / "conf").features.other_weight == 0.5


# ------------------------------------------------------------------------- what follows from `models`
@pytest.mark.parametrize(
    ("overrides", "champion", "ladder", "neighbours", "baseline"),
    [
        ([], "lambdamart", ("ease", "popular"), "item_knn", "popular"),
        (["models=[popular]"], "popular", (), None, "popular"),
        (["models=[popular, als]"], "als", ("popular",), None, "popular"),
        (["models=[als, ease]"], "ease", (), "ease", "als"),
        (["models=[multvae]"], "multvae", (), None, "multvae"),
        (["models=[popular, item_knn]"], "item_knn", ("popular",), "item_knn", "popular"),
        (["models=[popular, als]", "publish.model=popular"], "popular", (), None, "popular"),
        (["models=[popular, ease]", "publish={ladder: [popular], neighbours_model: ease}"],
         "ease", ("popular",), "ease", "popular"),
        (["publish.neighbours_model=null"], "lambdamart", ("ease", "popular"), None, "popular"),
        (["models=[popular, ease, als]", "publish.ladder=[als, popular]"], "ease", ("als", "popular"),
         "ease", "popular"),
        (["models=[popular, item_knn, ease, als]"], "ease", ("popular",), "item_knn", "popular"),
    ],
)  # fmt: skip
def test_what_nobody_chose_follows_from_the_models(
    overrides: list[str],
    champion: str,
    ladder: tuple[str, ...],
    neighbours: str | None,
    baseline: str,
) -> None:
    config = load_config("test", overrides)
    check_settings(config)
    publish = config.publish
    assert (publish.model, publish.ladder, publish.neighbours_model, config.evaluate.baseline) == (
        champion,
        ladder,
        neighbours,
        baseline,
    )


def needs_in_conf(model: str) -> list[str]:
    path = ROOT / "conf" / "models" / f"{model}.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    return list((settings or {}).get("needs", []))


# An encoder gives no lists: a night of encoders alone publishes nothing.
CHOICES = sorted(name for name, spec in MODELS.items() if spec.kind != "encoder")


@given(st.lists(st.sampled_from(CHOICES), min_size=1, unique=True))
def test_any_choice_of_models_is_enough(models: list[str]) -> None:
    """With the models that a model needs, which its error names."""
    rankers = [name for name in models if MODELS[name].kind == "ranker"]
    others = [name for name in models if name not in rankers]
    needs = {need for name in models for need in needs_in_conf(name)}
    if lacking := sorted(needs - {*models}):
        with pytest.raises(ConfigError, match=r"\.needs names '\w+', which is not among"):
            load_config("test", [f"models=[{', '.join(models)}]"])
    models = [*lacking, *others, *rankers]  # encoders may come first
    config = load_config("test", [f"models=[{', '.join(models)}]"])
    check_settings(config)
    assert {config.publish.model, *config.publish.ladder, config.evaluate.baseline} <= set(models)
    two_lists = load_config("local", [f"models=[{', '.join(models)}]"])
    check_settings(two_lists)
    assert len(two_lists.publish.published_lists) == 2


def test_what_is_chosen_and_not_there_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(
            "test",
            ["models=[popular, als]", "publish.model=ease", "publish.ladder=[item_knn, sasrec]",
             "publish.neighbours_model=item_knn", "evaluate.baseline=mf", "n_candidates=1"],
        )  # fmt: skip
    for name in ("publish.model", "ladder' = 'x", "neighbours_model", "baseline", "n_candidates"):
        assert name.partition("'")[0] in str(caught.value)
    assert str(caught.value).count("publish.ladder") == 2


def test_a_misspelt_model_is_not_offered_as_known() -> None:
    with pytest.raises(ConfigError, match="no model is called 'eaze'. Did you mean 'ease'") as one:
        check_settings(load_config("test", ["models=[popular, eaze]"]))
    assert "mean 'eaze'" not in str(one.value)
    with pytest.raises(ConfigError) as other:
        load_config("test", ["models=[popular, eaze]", "publish.model=ease"])
    assert "mean 'eaze'" not in str(other.value)
    assert "Known: popular" in str(other.value)


def test_models_with_neighbours_are_those_of_the_registry() -> None:
    tagged = {name for name, spec in MODELS.items() if "neighbours" in spec.tags}
    assert set(NEIGHBOUR_MODELS) == tagged
    encoders = {name for name, spec in MODELS.items() if spec.kind == "encoder"}
    assert set(ENCODER_MODELS) == encoders


# ------------------------------------------------------------------------------------ several lists
def lists(*overrides: str, env: str = "test") -> dict[str, PublishedList]:
    return {one.name: one for one in load_config(env, overrides).publish.published_lists}


RULES = "rules={a: {kind: cap, at_most: 2}, c: {kind: cap, at_most: 3}}"


def test_without_lists_there_is_one_as_the_section_says() -> None:
    for value in ("null", "{}"):
        (one,) = lists(
            f"publish.lists={value}", "publish.mode=repeat", "publish.rules=[a]", RULES
        ).values()
        assert (one.name, one.model, one.ladder, one.mode, one.k, one.rules, one.backtest_model) == (
            "main", "lambdamart", ("ease", "popular"), "repeat", 10, ("a",), "published",
        )  # fmt: skip


def test_a_list_is_the_section_but_for_what_it_says() -> None:
    found = lists(
        "publish.k=7",
        "publish.min_coverage=0.5",
        "publish.rules=[a]",
        RULES,
        "publish.lists={again: {mode: repeat, ladder: [], rules: []}, b: {model: als, k: 3, rules: [c]}}",
    )
    again, b = found["again"], found["b"]
    assert (again.model, again.mode, again.k, again.rules) == ("lambdamart", "repeat", 7, ())
    assert again.steps == ("lambdamart",)
    assert (b.model, b.mode, b.k, b.rules, b.min_coverage) == ("als", "novel", 3, ("c",), 0.5)
    assert b.steps == ("als", "ease", "popular")
    # Without `main`, the first by name is the one that the backtest calls `published`.
    assert [one.backtest_model for one in (again, b)] == ["published", "published_b"]
    with_main = lists("publish.lists={a: {}, main: {}}")
    assert {n: one.backtest_model for n, one in with_main.items()} == {
        "a": "published_a",
        "main": "published",
    }
    # The settings of a night in `runs`, also of one that knew no lists.
    config = load_config("test", ["publish.lists={b: {k: 3}, a: {mode: repeat}}"])
    stored = json.loads(config.resolved())["publish"]
    assert {*lists_of(stored)} == {*config.publish.published_lists}
    for unknown_then in ("lists", "rules"):
        stored.pop(unknown_then)
    assert [(one.name, one.k) for one in lists_of(stored)] == [("main", 10)]


@pytest.mark.parametrize(
    ("overrides", "main", "again"),
    [
        ([], ("lambdamart", "ease", "popular"), ("lambdamart", "own_items", "popular")),
        (["models=[popular, ease, own_items]"], ("ease", "popular"), ("ease", "own_items", "popular")),
        (["models=[popular, als]"], ("als", "popular"), ("als", "popular")),
        (["models=[own_items, popular]"], ("own_items", "popular"), ("own_items", "popular")),
        (["models=[popular]"], ("popular",), ("popular",)),
        (["publish.model=als"], ("als", "ease", "popular"), ("als", "own_items", "popular")),
        (["models=[popular, als, ease]", "publish.lists.buy_again.model=als"],
         ("ease", "popular"), ("als", "popular")),
    ],
)  # fmt: skip
def test_lists_that_nobody_chose_follow_the_models(
    overrides: list[str], main: tuple[str, ...], again: tuple[str, ...]
) -> None:
    found = lists(*overrides, env="local")
    check_settings(load_config("local", overrides))
    assert {name: one.steps for name, one in found.items()} == {"main": main, "buy_again": again}
    assert [one.mode for one in found.values()] == ["novel", "repeat"]


def test_a_later_file_replaces_all_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("publish:\n  k: 5\n  lists:\n    mine:\n    other: {model: als}\n")
    monkeypatch.setenv("RECSPARK_SETTINGS", str(own))
    assert {n: (o.k, o.model) for n, o in lists(env="local").items()} == {
        "mine": (5, "lambdamart"),
        "other": (5, "als"),
    }
    assert lists("publish.lists.mine.k=4", env="local")["mine"].k == 4
    # A model that the file chose is not replaced.
    with pytest.raises(ConfigError, match=r"publish\.lists\.other\.model = 'als' is not among"):
        lists("models=[popular]", env="local")
    own.write_text("publish: {lists: null}\n")
    assert [*lists(env="local")] == ["main"]


def test_what_is_wrong_with_lists_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        lists(
            "models=[popular, ease]",
            "publish.lists={a: {model: eas, ladder: [popular, als], k: 101}, b/c: {}}",
        )
    for text in (
        "publish.lists.a.model = 'eas' is not among models ['popular', 'ease']. Did you mean 'ease'?",
        "publish.lists.a.ladder = 'als' is not among",
        "publish.lists: ['b/c']: a name is of letters",
        "n_candidates must be at least publish.lists.a.k = 101",
    ):
        assert text in str(caught.value)
    for override, text in (
        ("publish.lists.a.mod=novel", "'publish.lists.a.mod'. Did you mean 'mode'"),
        ("publish.lists.a.k=0", "'publish.lists.a.k' = 0"),
        ("publish.lists.a.k=true", "'publish.lists.a.k' = True"),
        ("publish.lists=[a]", "'publish.lists' = ['a']"),
    ):
        with pytest.raises(ConfigError) as caught:
            lists(override)
        assert text in str(caught.value)


def test_names_of_lists_in_the_backtest_are_no_names_of_models() -> None:
    with pytest.raises(ConfigError, match=r"models: \['published_again'\]: .* published lists"):
        lists("models=[popular, published_again]", "models.published_again.algorithm=ease")


# ---------------------------------------------------------------------------------------- one's own
def test_a_file_and_variables_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(
        "source: movielens_small\npaths: {root: /own}\npublish: {k: 5}\nmodels: [popular]\n"
    )
    monkeypatch.setenv("RECSPARK_SETTINGS", str(own))
    config = load_config("local")
    assert (config.source.name, config.paths.root, config.publish.k) == (
        "movielens_small",
        "/own",
        5,
    )
    assert config.publish.mode == "novel"  # what the file does not say is as below it
    assert config.publish.model == "popular"
    monkeypatch.setenv("RECSPARK_SOURCE", "movielens_1m")
    monkeypatch.setenv("RECSPARK_ROOT", "/root/of/the/shell")
    config = load_config("local")
    assert (config.source.name, config.paths.root) == ("movielens_1m", "/root/of/the/shell")
    config = load_config("local", ["source=online_retail", "paths.root=/said", "publish.k=6"])
    assert (config.source.name, config.paths.root, config.publish.k) == (
        "online_retail",
        "/said",
        6,
    )
    assert load_config("local", DEMO_SETTINGS).source.name == "online_retail"
    monkeypatch.setenv("RECSPARK_SETTINGS", str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="none.yaml: no such file"):
        load_config("local")


@pytest.mark.parametrize("ending", ["yaml", "yml"])
def test_a_source_of_ones_own_is_any_file(ending: str, tmp_path: Path) -> None:
    mine = tmp_path / f"corner_shop.{ending}"
    shutil.copy(ROOT / "conf" / "sources" / "online_retail.yaml", mine)
    assert load_config("test", [f"source={mine}"]).source.name == "corner_shop"
    with pytest.raises(ConfigError, match="other.yaml: no such file"):
        load_config("test", [f"source={tmp_path / 'other.yaml'}"])


def test_the_bundled_data_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(load_config("local", ["source=online_retail"]).source.path).is_file()


def test_what_was_tuned_for_one_source_is_not_anothers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    monkeypatch.setenv("RECSPARK_CONF", str(tmp_path / "conf"))
    shipped = load_config("test").model_settings["ease"]
    for source, reg in (("online_retail", 5), ("movielens_small", 7)):
        file = tuned_file(source, "ease")
        file.parent.mkdir(parents=True)
        file.write_text(f"reg: {reg}\n")
    for source, reg in (("online_retail", 5), ("movielens_small", 7), ("movielens_1m", None)):
        found = load_config("test", [f"source={source}"]).model_settings["ease"]
        assert found == ({**shipped, "reg": reg} if reg else shipped)
    assert load_config("test", ["models.ease.reg=9"]).model_settings["ease"]["reg"] == 9


def test_settings_of_spark_have_names_with_dots_and_texts() -> None:
    conf = load_config(
        "test", ["spark.conf.spark.ui.enabled=true", "spark.conf.spark.x=1", "spark.conf.a.b=c d"]
    ).spark.conf
    assert conf["spark.ui.enabled"] == "true"
    assert conf["spark.x"] == "1"
    assert conf["a.b"] == "c d"


# ---------------------------------------------------------------------------------------------- page
def test_the_reference_page_is_that_of_the_classes() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == settings_page(), "run: recspark settings --markdown > docs/settings.md"
    for dotted, *_ in fields():
        assert f"| `{dotted}` |" in page


def test_every_setting_says_what_it_means() -> None:
    assert [dotted for dotted, _, _, field in fields() if not field.description] == []


RULE = "rules.r={kind: cap, at_most: 2}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["rules.r={kind: capp}"], r"'rules\.r\.kind' = 'capp' is no kind .* Did you mean 'cap'"),
        (["rules.r={at_most: 2}"], r"'rules\.r\.kind' is missing: one of leave_out, pin, cap"),
        (["rules.r={kind: cap}"], r"'rules\.r\.at_most' is missing"),
        (["rules.r={kind: cap, at_most: 0}"], r"'rules\.r\.at_most' = 0: .*greater than or equal"),
        (["rules.r={kind: cap, at_most: true}"], r"'rules\.r\.at_most' = True: expected a number"),
        (
            ["rules.r={kind: cap, at_most: 2, lvel: 1}"],
            r"unknown setting 'rules\.r\.lvel'\. Did you mean 'level'",
        ),
        (
            ["rules.r={kind: cap, at_most: 2, segments: [lite]}"],
            r"no segment is called 'lite'\. Did you mean 'light'",
        ),
        (["rules.r={kind: pin, places: 1}"], r"rules\.r: the rule names no items, categories"),
        (["rules.r={kind: diversity, relevance: 2}"], r"'rules\.r\.relevance' = 2: "),
        (
            ["rules.r={kind: diversity, relevance: 0.5, by: eas}"],
            r"rules\.r\.by = 'eas' is neither .* Did you mean 'ease'",
        ),
        ([RULE, "publish.rules=[q]"], r"publish\.rules names 'q', which is no rule"),
        ([RULE, "publish.rules=[rr]"], r"'rr', which is no rule\. Did you mean 'r'|Known: r"),
        (["rules={}", "publish.rules=[q]"], r"names 'q', but there are no rules"),
        ([RULE, "publish.rules=[r, r]"], r"publish\.rules names a rule twice"),
        (["publish.pool=9"], r"publish\.pool must be at least publish\.k"),
    ],
)
def test_wrong_rules_are_named(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("test", settings)


def test_rules_of_the_file_and_of_the_layers_above(tmp_path: Path) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(ROOT / "conf", conf)
    (conf / "rules.yaml").write_text(
        "family: {kind: cap, by: name, at_most: 3}\nred: {kind: leave_out, words: [red]}\n"
    )
    config = load_config("test", ["rules.family.at_most=2", "publish.rules=[red]"], folder=conf)
    assert {name: rule.kind for name, rule in config.rules.items()} == {
        "family": "cap",
        "red": "leave_out",
    }
    assert config.rules["family"].at_most == 2
    assert config.publish.rules == ("red",)
    without = load_config("test", ["publish.rules=[]"], folder=conf)
    assert without.fingerprint() != config.fingerprint()
