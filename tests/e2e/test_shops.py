"""Four shops that deliver as shops do: a rolling window, a full dump, a change feed of the catalogue,
late corrections. Events, names and quarantine are as counted by hand, night after night."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import functions as F

from recspark.data.features import items_as_of
from recspark.errors import SourceError
from recspark.pipeline.context import RunContext
from recspark.pipeline.plan import STAGES
from recspark.pipeline.run import execute, open_night
from recspark.pipeline.runlog import StageResult

pytestmark = [pytest.mark.spark, pytest.mark.timeout(900)]
FIRST = date(2024, 5, 1)
COLUMNS = "{user_id: user, item_id: item, event_at: at, quantity: n}"
NAMED = "{event_id: id, user_id: user, item_id: item, event_at: at, quantity: n}"


def day(number: int) -> date:
    """The day of night `number`, from 1."""
    return FIRST + timedelta(days=number - 1)


@dataclass
class Shop:
    """One installation whose nights only ingest."""

    root: Path
    format: str
    columns: str
    settings: tuple[str, ...] = ()
    catalogue: bool = False
    landed: Counter[str] = field(default_factory=Counter)

    def folder(self, number: int, name: str) -> Path:
        path = self.root / "inbox" / str(day(number)) / f"{name}.{self.format}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def deliver(self, number: int, name: str, rows: list[dict[str, Any]]) -> int:
        """Write the landing; return its rows, counted by a reader that is not Spark."""
        path = self.folder(number, name)
        if self.format == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            return len([json.loads(line) for line in path.read_text("utf-8").splitlines()])
        with path.open("w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        with path.open(encoding="utf-8", newline="") as lines:
            return len(list(csv.DictReader(lines)))

    def open(self, number: int, **options: bool) -> RunContext:
        inbox = f"{self.root}/inbox/{{run_date}}"
        items = f"items_path: '{inbox}/items.{self.format}', " if self.catalogue else ""
        named = "item_id: item, item_name: name, price: price"
        items_columns = f"items_columns: {{{named}}}, " if self.catalogue else ""
        source = (
            f"source={{name: shop, kind: mapping, path: '{inbox}/events.{self.format}', "
            f"archive: false, format: {self.format}, {items}{items_columns}"
            f"columns: {self.columns}, constants: {{event_type: purchase}}}}"
        )
        return open_night(
            "test",
            day(number),
            [source, f"paths.root={self.root}/lake", "models=[popular, item_knn]", "publish.model=popular",
             "publish.ladder=[popular]", *self.settings],
            **options,
        )  # fmt: skip

    def run(self, number: int, **options: bool) -> tuple[RunContext, StageResult]:
        context = self.open(number, **options)
        return context, execute(context, STAGES[0])

    def night(self, number: int, events: list[dict[str, Any]]) -> tuple[RunContext, StageResult]:
        """Deliver and ingest; every row has one verdict."""
        n_rows = self.deliver(number, "events", events)
        context, result = self.run(number)
        detail = result.detail
        n_refused = sum(detail["quarantined"].values())
        assert n_rows == result.rows_in == detail["clean"] + n_refused + detail["duplicates"]
        return context, result


def rows(context: RunContext, table: str) -> list[Any]:
    return context.catalog.read(table, context.catalog.version(table)).collect()


def sale(number: int, place: int, **changes: Any) -> dict[str, Any]:
    """One of the sales of a day."""
    at = datetime.combine(day(number), datetime.min.time()) + timedelta(hours=9, minutes=place)
    made = {"id": f"{number}-{place}", "user": f"u{place}", "item": f"i{place}"}
    return {**made, "at": at.isoformat(), "n": 1, **changes}


def five(number: int) -> list[dict[str, Any]]:
    """A day: four sales and a line without an item."""
    return [*(sale(number, n) for n in range(4)), sale(number, 4, item="")]


def nights(few: int) -> pytest.MarkDecorator:
    """Ten nights, and a few for a quick look."""
    return pytest.mark.parametrize("nights", [few, pytest.param(10, marks=pytest.mark.slow)])


@nights(2)
def test_a_rolling_window(spark: object, tmp_path: Path, nights: int) -> None:
    """Each night the last seven days again; the ids are made of the rows. A night without news is
    one too."""
    shop = Shop(tmp_path, "csv", COLUMNS)
    for number in range(1, nights + 1):
        window = [row for d in range(max(1, number - 6), number + 1) for row in five(d)]
        context, result = shop.night(number, window)
        before = min(number - 1, 6)
        assert result.detail["clean"] == 4
        assert result.detail["repeats"] == {
            k: n
            for k, n in {"already ingested": 4 * before, "already refused": before}.items()
            if n
        }
    assert len(rows(context, "events")) == 4 * nights
    assert Counter(row["reason"] for row in rows(context, "quarantine")) == {"no item": nights}
    _, result = shop.night(nights + 1, window)
    assert (result.detail["clean"], result.detail["quarantined"]) == (0, {})


@nights(3)
def test_a_full_dump(spark: object, tmp_path: Path, nights: int) -> None:
    """Everything since the beginning, every night; on night 3 a sale of night 1 turns up, too late."""
    shop = Shop(tmp_path, "jsonl", NAMED, ("ingest.max_late_days=1",))
    ancient = sale(-1000, 0)  # fine on a first night, and known ever after
    for number in range(1, nights + 1):
        dump = [ancient, *(row for d in range(1, number + 1) for row in five(d))]
        dump += [sale(1, 9)] if number >= 3 else []
        context, result = shop.night(number, dump)
        assert result.detail["clean"] == 4 + (number == 1)
    assert len(rows(context, "events")) == 4 * nights + 1
    refused = rows(context, "quarantine")
    assert Counter(row["reason"] for row in refused) == {"no item": nights, "event too late": 1}
    [late] = [row for row in refused if row["reason"] == "event too late"]
    assert (json.loads(late["row"])["user"], late["ingest_date"]) == ("u9", day(3))


@nights(2)
def test_a_change_feed_of_the_catalogue(spark: object, tmp_path: Path, nights: int) -> None:
    """Every item is described on night 1 and first sold on a later night; night 2 renames one and
    brings rows that cannot be read; then night 2 is corrected."""
    shop = Shop(tmp_path, "jsonl", NAMED, catalogue=True)
    feeds: dict[int, list[dict[str, Any]]] = {
        1: [{"item": f"i{n}", "name": f"Item {n}", "price": "1.5"} for n in range(1, 11)],
        2: [
            {"item": "i1", "name": "Item one", "price": "2"},
            {"item": "i2", "name": "Item two", "price": "a bit"},
            {"item": "i3", "name": "Item three", "price": "-3"},
            {"item": "", "name": "Nothing", "price": "1"},
            {"item": "i3", "name": "Item 3", "price": "1.5"},
        ],
    }
    names = {f"i{n}": f"Item {n}" for n in range(1, nights + 1)}

    def names_of(context: RunContext) -> dict[str, str]:
        items = context.catalog.read("items", context.catalog.version("items"))
        sold = context.catalog.read("events", context.catalog.version("events")).select("item_id")
        known = items_as_of(items, context.cutoffs.tonight).join(
            sold.distinct(), "item_id", "right"
        )
        return {row["item_id"]: row["item_name"] for row in known.collect()}

    for number in range(1, nights + 1):
        n_rows = shop.deliver(number, "items", feeds.get(number, feeds[2][-1:]))
        context, result = shop.night(number, [sale(number, number)])
        told = result.detail["catalogue"]
        n_refused = sum(told["quarantined"].values())
        assert n_rows == told["in"] == told["clean"] + n_refused + told["duplicates"]
    names["i1"] = "Item one"
    assert names_of(context) == names
    refused = [row for row in rows(context, "quarantine") if row["input"] == "catalogue"]
    assert Counter(row["reason"] for row in refused) == {
        "wrong type: price": 1,
        "price negative": 1,
        "no item": 1,
    }
    assert len(rows(context, "items")) == 10 + 1

    # The corrected feed replaces what night 2 said: i1 keeps its first name.
    shop.deliver(2, "items", [{"item": "i2", "name": "Item two", "price": "2"}])
    shop.run(2, repin=True)
    assert names_of(context) == {**names, "i1": "Item 1", "i2": "Item two"}
    assert not [row for row in rows(context, "quarantine") if row["input"] == "catalogue"]

    # A catalogue that cannot be read, or of which too little can, stops the night before any write.
    before = context.catalog.versions()
    bad = [{"item": f"i{n}", "name": "x", "price": "NaN"} for n in range(9)]
    shop.deliver(nights + 1, "events", [sale(nights + 1, 1)])
    shop.deliver(nights + 1, "items", bad)
    with pytest.raises(SourceError, match=r"of its catalogue only 0 of 9 new rows are clean"):
        shop.run(nights + 1)
    assert {**context.catalog.versions(), "runs": 0} == {**before, "runs": 0}


@nights(3)
def test_late_corrections(spark: object, tmp_path: Path, nights: int) -> None:
    """An event comes again with another quantity and a newer time, or late, or too late; then the
    landing of night 2 is corrected."""
    shop = Shop(tmp_path, "jsonl", NAMED, ("ingest.max_late_days=1",))
    n_events, n_late = 0, 0
    for number in range(1, nights + 1):
        landing = [sale(number, n) for n in range(3)]
        n_events += 3
        if number > 1:
            landing.append(sale(number, 7, id=f"{number - 1}-0", n=5))  # a duplicate
            landing.append(sale(number - 1, 8))  # late, but in time
            n_events += 1
        if number > 2:
            # The id of the first night, with tonight's time; and an event of a day long gone.
            landing += [sale(number, 6, id="1-2"), sale(number - 2, 9)]
            n_late += 1
        context, result = shop.night(number, landing)
        assert result.detail["duplicates"] == min(number - 1, 2)
    found = rows(context, "events")
    assert len(found) == len({row["event_id"] for row in found}) == n_events
    assert {row["quantity"] for row in found} == {1.0}
    assert Counter(row["reason"] for row in rows(context, "quarantine")) == (
        {"event too late": n_late}
    )
    mended = [sale(2, 0, n=4), sale(2, 1), sale(2, 5), sale(1, 8)]
    shop.deliver(2, "events", mended)
    shop.run(2, repin=True)
    events = context.catalog.read("events", context.catalog.version("events"))
    mine = events.where(F.col("ingest_date") == F.lit(day(2))).select("event_id", "quantity")
    assert {tuple(row) for row in mine.collect()} == {
        ("2-0", 4.0), ("2-1", 1.0), ("2-5", 1.0), ("1-8", 1.0)
    }  # fmt: skip
    assert events.count() == n_events
