"""MovieLens in its three forms: small made-up files, and the real ones where they lie."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from recspark.config import Source
from recspark.data.catalogue_checks import check_items
from recspark.data.event_checks import check_events, count_verdicts
from recspark.errors import SourceError
from recspark.sources import read_landing
from tests.sources.conftest import NIGHT, rows_of, write_parquet, write_text

pytestmark = pytest.mark.spark

T = 1717149600  # 2024-05-31 10:00


def films(path: Path) -> Source:
    return Source(name="films", kind="movielens", path=str(path))


def write_csv(folder: Path) -> None:
    write_text(
        folder / "ratings.csv.gz",
        f"userId,movieId,rating,timestamp\n1,10,4.5,{T}\n2,10,0.5,{T - 86400}\n2,11,x,{T}\n",
    )
    write_text(
        folder / "movies.csv",
        'movieId,title,genres\n10,"Été, The ""6"" (1995)",Drama|War\n11,Plain,(no genres listed)\n',
    )
    write_text(
        folder / "tags.csv",
        "userId,movieId,tag,timestamp\n"
        f"1,10,Sad,{T - 86400}\n1,10,sad,{T - 86300}\n2,10,french,{T}\n2,10,later,{T + 86400}\n",
    )


def test_csv_form(
    spark: SparkSession, tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    write_csv(tmp_path)
    rows = checked(films(tmp_path))
    found = {(r["user_id"], r["item_id"]): (r["value"], r["event_at"], r["reason"]) for r in rows}
    assert found == {
        ("1", "10"): (4.5, datetime(2024, 5, 31, 10), None),
        ("2", "10"): (0.5, datetime(2024, 5, 30, 10), None),
        ("2", "11"): (None, datetime(2024, 5, 31, 10), "wrong type: rating"),
    }
    assert {(row["event_type"], str(row["attributes"])) for row in rows} == {("rating", "{}")}
    items = read_landing(spark, films(tmp_path), NIGHT, initial=True).items
    assert items is not None
    found_items = sorted((r["item_id"], r["valid_from"], r["text"]) for r in items.collect())
    name = 'Été, The "6" (1995)'
    assert found_items == [
        ("10", datetime(1970, 1, 1), f"{name} Drama War"),
        ("10", datetime(2024, 5, 30, 10, 1, 40), f"{name} Drama War sad"),
        ("10", datetime(2024, 5, 31, 10), f"{name} Drama War french sad"),
        ("11", datetime(1970, 1, 1), "Plain"),
    ]
    categories = {row["item_id"]: row["category"] for row in items.collect()}
    assert categories == {"10": ["Drama", "War"], "11": []}
    later = read_landing(spark, films(tmp_path), NIGHT, initial=False).items
    assert later is not None  # a film may be rated for the first time on any night
    assert (
        sorted((r["item_id"], r["valid_from"], r["text"]) for r in later.collect()) == found_items
    )


def test_films_and_tags_that_cannot_be_read(spark: SparkSession, tmp_path: Path) -> None:
    """Each line has a verdict; a film that is there twice is described once."""
    write_csv(tmp_path)
    with (tmp_path / "movies.csv").open("ab") as movies:
        movies.write("11,Plain,War\n,Nameless,War\n12\n13,Caf\ufffd,War\n".encode())
    with (tmp_path / "tags.csv").open("a") as tags:
        tags.write(f"1,10,,{T}\n1,10,dull,now\n1,,dull,{T}\n1,10\n")
    landing = read_landing(spark, films(tmp_path), NIGHT, initial=True)
    assert landing.items is not None
    checked = check_items(landing.items)
    counts = count_verdicts(checked, landing.items)
    counts.check()
    assert (counts.n_clean, counts.n_duplicates) == (4, 1)
    assert counts.by_reason == {
        "unreadable row": 2,
        "no item": 2,
        "no tag": 1,
        "wrong type: timestamp": 1,
        "bad encoding: title": 1,
    }


def test_double_colon_form_gives_what_csv_gives(
    spark: SparkSession, tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    write_csv(tmp_path / "csv")
    write_text(
        tmp_path / "dat/ratings.dat", f"1::10::4.5::{T}\n2::10::0.5::{T - 86400}\n2::11::x::{T}\n"
    )
    text = '10::Été, The "6" (1995)::Drama|War\n11::Plain::(no genres listed)\n'
    write_text(tmp_path / "dat/movies.dat", text.encode("latin-1"))
    dat, csv = checked(films(tmp_path / "dat")), checked(films(tmp_path / "csv"))
    for row in dat + csv:
        row.pop("row")
        row["reason"] = row["reason"] and row["reason"].lower()  # it names the column as spelt
    assert dat == csv
    items = read_landing(spark, films(tmp_path / "dat"), NIGHT, initial=True).items
    assert items is not None
    assert [(row["item_name"], row["category"]) for row in rows_of(items)] == [
        ('Été, The "6" (1995)', ["Drama", "War"]),
        ("Plain", []),
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("form", ["dat", "dat.gz", "csv"])
def test_titles_are_read_as_their_bytes_are_encoded(
    spark: SparkSession, tmp_path: Path, form: str, encoding: str
) -> None:
    """10M has the form of 1M and another encoding."""
    mark, head = ("::", "") if form.startswith("dat") else (",", "movieId,title,genres\n")
    # The first megabyte shows nothing.
    titles = ["x" * 1100] * 1000 + ["Amélie (2001)", "Mädchen in Uniform"]
    lines = [mark.join((str(i), title, "Drama")) for i, title in enumerate(titles)]
    write_text(tmp_path / f"movies.{form}", (head + "\n".join([*lines, ""])).encode(encoding))
    rating = mark.join(("1", "1001", "5", str(T)))
    head = "userId,movieId,rating,timestamp\n" if form == "csv" else ""
    write_text(tmp_path / f"ratings.{form}", f"{head}{rating}\n")
    items = read_landing(spark, films(tmp_path), NIGHT, initial=True).items
    assert items is not None
    names = {row["item_name"] for row in items.select("item_name").distinct().collect()}
    assert names == set(titles)


def test_rebuilt_form_keeps_the_exact_order(
    tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    write_parquet(
        tmp_path / "ratings.parquet",
        [
            {"user_id": 1, "movie_id": m, "rating": r, "time_rank_in_user": rank, "timestamp": T, "ts_source": s}
            for m, r, rank, s in [(9, 5, 2, "file"), (8, 0, 0, "interp"), (7, 3, 1, "file")]
        ],
    )  # fmt: skip
    rows = sorted(checked(films(tmp_path)), key=lambda row: row["event_at"])
    assert [(row["item_id"], row["value"], row["attributes"]["time"]) for row in rows] == [
        ("8", None, "interpolated"),
        ("7", 3.0, None),
        ("9", 5.0, None),
    ]
    assert rows[-1]["event_at"] == datetime(2024, 5, 31, 10, 0, 0, 2)


def test_folder_without_ratings(spark: SparkSession, tmp_path: Path) -> None:
    assert read_landing(spark, films(tmp_path), NIGHT, initial=True).events.isEmpty()
    write_text(tmp_path / "rating.csv", "userId\n")
    with pytest.raises(SourceError, match=r"none of ratings\.csv, .* which has rating\.csv; is"):
        read_landing(spark, films(tmp_path), NIGHT, initial=True)


@pytest.mark.parametrize(
    ("name", "last", "figures", "n_films"),
    [
        ("ml-latest-small", date(2018, 9, 24), (100_836, 610, 9_724), 9_742),
        pytest.param(
            "ml-1m", date(2003, 2, 28), (1_000_209, 6_040, 3_706), 3_883, marks=pytest.mark.slow
        ),
    ],
)
def test_real_releases(
    spark: SparkSession,
    shared: Path,
    name: str,
    last: date,
    figures: tuple[int, int, int],
    n_films: int,
) -> None:
    landing = read_landing(spark, films(shared / name), last, initial=True)
    checked = check_events(
        landing.events, run_date=last, max_late_days=7, initial=True, unique_ids=landing.unique_ids
    )
    counts = count_verdicts(checked)
    assert (counts.n_in, counts.n_clean) == (figures[0], figures[0])
    row = landing.events.agg(F.countDistinct("user_id"), F.countDistinct("item_id")).collect()[0]
    assert (row[0], row[1]) == figures[1:]
    assert landing.items is not None
    names = landing.items.agg(F.countDistinct("item_id"), F.count("item_name") - F.count("*"))
    assert tuple(names.collect()[0]) == (n_films, 0)
