"""What ingest says of a landing: too many bad rows, and event types that nobody named."""

from __future__ import annotations

from datetime import date

import pytest
from pyspark.sql import SparkSession

from recspark.config import Config
from recspark.config.load import load_config
from recspark.data.event_checks import Counts
from recspark.errors import ConservationError, SourceError
from recspark.pipeline.stages.ingest import check_share, type_warnings

NIGHT = date(2024, 5, 31)


def counts(clean: int, quarantined: int, repeats: int = 0) -> Counts:
    by_reason = {"no item": quarantined} if quarantined else {}
    n_in = clean + quarantined + repeats
    return Counts(n_in, clean, quarantined, repeats, by_reason, {"already ingested": repeats})


def test_the_share_is_of_rows_that_did_not_come_before() -> None:
    config = load_config("test", ["ingest.min_clean_fraction=0.5"])
    for fine in (counts(8, 0, 67), counts(1, 1, 98), counts(0, 0, 75), counts(0, 0)):
        check_share(config, NIGHT, "events", fine)
    with pytest.raises(SourceError, match=r"of its events only 1 of 3 new rows are clean \(quar"):
        check_share(config, NIGHT, "events", counts(1, 2, 97))
    with pytest.raises(SourceError, match=r"of its catalogue only 0 of 1 new rows are clean"):
        check_share(config, NIGHT, "catalogue", counts(0, 1))
    with pytest.raises(ConservationError, match="5 rows in"):
        check_share(config, NIGHT, "catalogue", Counts(5, 4, 0, 0, {}, {}))


def typed(*overrides: str) -> Config:
    return load_config("test", overrides)


@pytest.mark.spark
def test_types_that_nobody_named_and_types_that_never_came(spark: SparkSession) -> None:
    before = spark.createDataFrame([("view",), ("buy",)], "event_type string")
    named = typed("features.event_weights={buy: 1, wish: 2, view: 0.1}", "features.other_weight=3")
    tonight = {"Impression": 1200, "buy": 7, "impression": 5}
    other, absent = type_warnings(named, tonight, before)
    assert other.endswith("and weigh 3: 'Impression' (1,200)")
    # A view came on another night; nobody ever wished.
    assert absent.startswith("no event was ever of the type 'wish', which")
    # What the defaults name need not come: this shop shows no impressions.
    assert type_warnings(typed(), {"purchase": 1}, before) == []
    shown = typed("sessions.impression_types=[shown]")
    assert ["'shown'" in told for told in type_warnings(shown, {"purchase": 1}, before)] == [True]
