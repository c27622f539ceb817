"""The settings in conf/sources load, and wrong ones say what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recspark.config.load import conf_dir, load_config
from recspark.errors import ConfigError

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
            ["source.columns={user_id: u, item_id: i}", "source.bounds={}"],
            "gives no event_at: name a raw column",
        ),
        (["source.constants={}"], "gives no event_type"),
        (["source.constants.item_id=x"], "it differs by row, name its raw column"),
        (["source.expressions={}"], "min_value is set, but"),
        (["source.items_columns={}"], "items_path and source.items_columns go together"),
        (["source.items_columns={item_name: x}"], "source.items_columns gives no item_id"),
        (["source.format=xml"], "source.format"),
        (
            ["source.expressions.amount=x"],
            "source.expressions.amount is no column here.",
        ),
        (
            ["source.columns.value=x"],
            "source.columns and source.expressions both give ['value']",
        ),
        (["source.bounds.price=[0, 1]"], "source.bounds.price is no column here"),
        (["source.bounds.value=[0, 1]"], "min_value and source.bounds.value: keep one"),
        (["source.null_values.user=[0]"], "null_values.user is no column here."),
        (["source.whole_number_ids=[usr_id]"], "usr_id is no column here. Did you mean 'user_id'?"),
        (["source.decimal=;;"], "source.decimal"),
        (["source.decimal='1'"], "source.decimal = '1' can be a part of a number itself"),
        (["source.thousands=','"], "12,345 has to be one number"),
        (["source.currency=[E1]"], "source.currency: ['E1'] is no sign of a currency"),
        (["source.max_value=0"], "source.max_value"),
        (["source.earliest=yesterday"], "source.earliest"),
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
        ("online_retail", "source.where={a: b}", "source.where: for kind 'mapping' only"),
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
    head = "receipt;customer_no;article;pieces;unit_price;sold_at;branch;status\n"
    lines = {
        "r1": "u1;A;2;9,95 €;2024-05-31 09:00;Ulm;",
        "r2": "u1;A;-1;9,95 €;2024-05-31 10:00;Ulm;paid",
        "r3": "0;A;1;1.009,95 €;2024-05-31 10:00;Ulm;paid",
        "r4": "u1;TEST1;1;9,95;2024-05-31 10:00;Ulm;paid",
        "r5": "u1;A;1;9,95;2024-05-31 10:00;Ulm;void",
        "r6": "u1;A;20000;9,95;2024-05-31 10:00;Ulm;paid",
    }
    write_text(
        tmp_path / "build/landing/2024-05-31/events/a.csv",
        head + "".join(f"{receipt};{line}\n" for receipt, line in lines.items()),
    )
    write_text(
        tmp_path / "build/landing/2024-05-31/articles.csv",
        "article;title;path;price\nA;Lamp;a/b;9,95 €\n",
    )
    rows = checked(load_config("test", ["source=example_shop"]).source, NIGHT, initial=False)
    assert {row["order_id"]: row["reason"] for row in rows} == {
        "r1": None,
        "r2": "value too small",
        "r3": "no user",
        "r4": "not a product",
        "r5": "a void receipt",
        "r6": "quantity too large",
    }
    assert [(r["event_at"].hour, r["value"]) for r in rows if r["order_id"] == "r1"] == [(7, 19.9)]
