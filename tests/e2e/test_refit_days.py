"""Nights in turn with an encoder that is fitted every second night: in between, only what is new or
changed is encoded.
"""

from __future__ import annotations

import csv
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import functions as F

from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import folder_of
from recspark.pipeline.run import night, open_night

pytestmark = [pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(1800)]

FIRST = date(2024, 5, 30)
WORDS = ("rose", "pine", "lime", "plum", "soap", "cream", "oil", "balm")


class Shop:
    """Delivers its whole catalogue every night, and the purchases of that day."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names = {
            f"i{n:02}": f"{WORDS[n % 4]} {WORDS[4 + n // 4]} {WORDS[n % 4]}" for n in range(16)
        }

    def night(self, run_date: date, **options: Any) -> RunContext:
        day = self.root / "inbox" / f"{run_date}"
        day.mkdir(parents=True, exist_ok=True)
        n_days = 20 if run_date == FIRST else 1
        sales = [
            {
                "user": f"u{user}",
                "item": f"i{(user % 4 + 4 * ((user + back) % 4)):02}",
                "at": datetime(run_date.year, run_date.month, run_date.day, 12)
                - timedelta(days=back, minutes=user),
            }
            for back in range(n_days)
            for user in range(24)
        ]
        items = [
            {"item": item, "name": name, "since": "2024-01-01"} for item, name in self.names.items()
        ]
        for name, rows in (("items", items), ("events", sales)):
            with (day / f"{name}.csv").open("w", encoding="utf-8", newline="") as lines:
                writer = csv.DictWriter(lines, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        inbox = f"{self.root}/inbox/{{run_date}}"
        settings = [
            f"source={{name: shop, kind: mapping, path: '{inbox}/events.csv', archive: false, "
            f"format: csv, items_path: '{inbox}/items.csv', "
            "items_columns: {item_id: item, item_name: name, valid_from: since}, "
            "columns: {user_id: user, item_id: item, event_at: at}, "
            "constants: {event_type: purchase}}",
            f"paths.root={self.root}/lake",
            "models=[popular, words, alike]",
            "models.words={algorithm: word_vectors, embedding_size: 8, epochs: 2, refit_days: 2}",
            "models.alike={algorithm: content_knn, needs: [words]}",
            "publish={model: alike, ladder: [popular], k: 3, neighbours_model: alike}",
            "evaluate={horizon_days: 7, ks: [3], n_bootstrap: 20}",
        ]
        context = open_night("test", run_date, settings, **options)
        night(context)
        return context


def encoded(context: RunContext) -> int:
    row = context.runlog.find("encode", "words")
    assert row is not None
    return int(row.detail["encoded"])


def fitted_for(context: RunContext) -> dict[str, str]:
    """Cutoff of this night -> the day of the cutoff that its encoder was fitted at."""
    cutoffs = {"tonight": context.cutoffs.tonight, "backtest": context.cutoffs.backtest}
    return {
        name: folder_of(context, "words", cutoff).split("/")[1] for name, cutoff in cutoffs.items()
    }


def test_between_two_fits_a_night_encodes_what_is_new_or_changed(
    spark: object, tmp_path: Path
) -> None:
    shop = Shop(tmp_path)
    first = shop.night(FIRST)
    assert fitted_for(first) == {"tonight": "2024-05-31", "backtest": "2024-05-24"}
    assert encoded(first) == 2 * 16  # by two encoders

    shop.names |= {"i16": "rose oil", "i00": "pine soap"}
    second = shop.night(FIRST + timedelta(days=1))
    assert fitted_for(second) == {"tonight": "2024-05-31", "backtest": "2024-05-24"}
    vectors = second.catalog.read("item_vectors", second.catalog.version("item_vectors"))
    is_of_tonight = F.col("artifact").startswith("2024-05-31/")
    n_of_date = dict(
        vectors.where(is_of_tonight).groupBy("encoded_date").count().collect()  # type: ignore[arg-type]
    )
    assert n_of_date == {FIRST: 15, FIRST + timedelta(days=1): 2}

    forced = shop.night(FIRST + timedelta(days=1), force=True)
    assert fitted_for(forced) == {"tonight": "2024-06-01", "backtest": "2024-05-25"}

    fourth = shop.night(FIRST + timedelta(days=3))  # the encoder of 06-01 is two days old
    assert fitted_for(fourth) == {"tonight": "2024-06-03", "backtest": "2024-05-27"}
    assert encoded(fourth) == 2 * 17
