import pytest
from pyspark.sql import functions as F

from recspark.data import ids
from recspark.sources import computed, mapping, movielens, raw, spelling, typed, values
from tests.data import test_ids as ti
from tests.sources import test_mapping as tm
from tests.sources import test_movielens as tml
from tests.sources import test_typed as tt

pytestmark = pytest.mark.spark


def breaks(call):
    with pytest.raises((AssertionError, Exception)) as e:
        call()
    print("BROKEN OK", type(e.value).__name__, str(e.value)[:100].replace("\n", " "))


def test_zone(monkeypatch, spark):
    monkeypatch.setattr(
        values,
        "_in_zone",
        lambda wall, suffix, zone: F.when(
            suffix.rlike(values._SUFFIX) | (suffix == ""), values._to_utc(wall, zone)
        ),
    )
    breaks(lambda: tt.test_every_time_of_the_grammar(spark, "Europe/Berlin"))


def test_no_times(monkeypatch, spark):
    monkeypatch.setattr(values, "_SUFFIX", r"^\s*(.*)()()$")
    breaks(lambda: tt.test_what_is_no_time_is_none(spark, "UTC"))


def test_number_time(monkeypatch, spark, tmp_path):
    monkeypatch.setattr(values, "_is_date", lambda n: F.lit(False))
    breaks(lambda: tt.test_numbers_as_times_of_every_type(spark, tmp_path))


def test_blanks(monkeypatch, spark):
    monkeypatch.setattr(values, "BLANKS", " ")
    breaks(lambda: tt.test_ids_as_they_are_spelt(spark))


def test_partition(spark, tmp_path, checked):
    spark.conf.set("spark.sql.sources.partitionColumnTypeInference.enabled", "true")
    breaks(lambda: tm.test_folder_columns_are_text(tmp_path, checked))
    spark.conf.set("spark.sql.sources.partitionColumnTypeInference.enabled", "false")


def test_types(monkeypatch, spark, tmp_path):
    monkeypatch.setattr(values, "printed", lambda c, k: c.cast("string"))
    breaks(lambda: tt.test_an_id_is_one_in_files_of_different_types(spark, tmp_path))


def test_reason(monkeypatch, spark, tmp_path):
    old = typed.with_event_id
    monkeypatch.setattr(
        typed,
        "with_event_id",
        lambda rows, content: (
            old(
                rows.withColumnRenamed("reason", "x").withColumn(
                    "reason", F.lit(None).cast("string")
                ),
                content,
            )
            .drop("reason")
            .withColumnRenamed("x", "reason")
        ),
    )
    breaks(lambda: tt.test_a_refused_row_does_not_number_a_clean_one(spark, tmp_path))


def test_encoding(monkeypatch, spark, tmp_path):
    monkeypatch.setattr(movielens, "_encoding", lambda place: "UTF-8")
    breaks(
        lambda: tml.test_titles_are_read_as_their_bytes_are_encoded(
            spark, tmp_path / "a", "dat", "latin-1"
        )
    )
    monkeypatch.setattr(movielens, "_encoding", lambda place: "ISO-8859-1")
    breaks(
        lambda: tml.test_titles_are_read_as_their_bytes_are_encoded(
            spark, tmp_path / "b", "csv", "utf-8"
        )
    )


def test_bounds(monkeypatch, spark, tmp_path, checked):
    monkeypatch.setattr(mapping, "bounds_of", lambda *a, **k: [])
    breaks(
        lambda: tm.test_values_and_quantities_beyond_all_bounds_are_quarantined(tmp_path, checked)
    )


def test_row(monkeypatch, spark, tmp_path, checked):
    monkeypatch.setattr(
        raw.RawTable,
        "row",
        lambda self: F.to_json(F.struct(*[self.column(n).alias(n) for n in self.kinds])),
    )
    breaks(lambda: tm.test_a_real_shop_needs_no_preparation(spark, tmp_path, checked))


def test_unread(monkeypatch, spark, tmp_path, checked):
    monkeypatch.setattr(mapping, "unread_numbers", lambda *a: [])
    breaks(lambda: tm.test_a_real_shop_needs_no_preparation(spark, tmp_path, checked))


def test_numbers_in_sql(monkeypatch, spark, tmp_path, checked):
    monkeypatch.setattr(computed, "_numbers", lambda *a: [])
    breaks(lambda: tm.test_sql_reads_numbers_and_text_and_never_fails_a_row(tmp_path, checked))


def test_warn(monkeypatch, spark, caplog):
    monkeypatch.setattr(ids, "_FLOAT", "^$")
    breaks(
        lambda: (
            ti.test_two_spellings_of_one_number_are_told.__wrapped__(
                spark, caplog, ["8.0"], ["8"], "8"
            )
            if hasattr(ti.test_two_spellings_of_one_number_are_told, "__wrapped__")
            else ti.test_two_spellings_of_one_number_are_told(spark, caplog, ["8.0"], ["8"], "8")
        )
    )


def test_numbers(monkeypatch, spark):
    monkeypatch.setattr(values, "_PLAIN_NUMBER", ".*")
    breaks(lambda: tt.test_numbers_as_they_are_spelt(spark, spelling.Spelling(), tt.PLAIN))
