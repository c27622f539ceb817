"""The settings in conf/sources load, and wrong ones say what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recspark.errors import ConfigError
from recspark.layers import conf_dir, load_config

NAMES = sorted(path.stem for path in (conf_dir() / "sources").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_source_loads(name: str) -> None:
    assert load_config("test", [f"source={name}"]).source.name == name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["source.columns.user_di=x"], "user_di is no column here. Did you mean 'user_id'?"),
        (["source.timezone=Europa/Berlin"], "is no time zone. Did you mean 'Europe/Berlin'?"),
        (["source.timezone=nowhere"], "Use an IANA name such as Europe/London."),
        (["source.path=a/b"], "names no {run_date}, so every night would read the same"),
        (
            ["source.columns={user_id: u, item_id: i}", "source.min_value=null"],
            "gives no event_at: name a raw column",
        ),
        (["source.constants={}"], "gives no event_type"),
        (["source.constants.item_id=x"], "it differs by row, name its raw column"),
        (["source.columns={user_id: u, item_id: i, event_at: t}"], "min_value is set, but"),
        (["source.items_columns={}"], "items_path and source.items_columns go together"),
        (["source.items_columns={item_name: x}"], "source.items_columns gives no item_id"),
        (["source.format=xml"], "source.format"),
    ],
)
def test_wrong_settings_of_a_mapping(changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config("test", ["source=example_shop", *changes])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        (
            "online_retail",
            "source.columns.user_id=x",
            "source.columns: for kind 'mapping' only, not 'online_retail'",
        ),
        ("diginetica", "source.made_up.start=null", "an archive without times needs a first day"),
    ],
)
def test_wrong_settings_of_other_kinds(source: str, change: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config("test", [f"source={source}", change])
    assert message in str(error.value)


@pytest.mark.spark
def test_example_reads_what_it_describes(
    checked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.sources.conftest import NIGHT, write_text

    monkeypatch.chdir(tmp_path)
    head = "receipt;customer_no;article;pieces;amount;sold_at;branch\n"
    write_text(
        tmp_path / "build/landing/2024-05-31/events/a.csv",
        head + "r1;u1;A;2;19.90;2024-05-31 09:00;Ulm\nr2;u1;A;1;-9.95;2024-05-31 10:00;Ulm\n",
    )
    write_text(
        tmp_path / "build/landing/2024-05-31/articles.csv",
        "article;title;path;price\nA;Lamp;a/b;9.95\n",
    )
    rows = checked(load_config("test", ["source=example_shop"]).source, NIGHT, initial=False)
    assert {row["order_id"]: row["reason"] for row in rows} == {"r1": None, "r2": "value too small"}
    assert [r["event_at"].hour for r in rows if r["order_id"] == "r1"] == [7]
