"""Missing, empty, torn and hidden files."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import random
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from functools import reduce
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark.config import Source
from recspark.data.event_checks import check_events, count_verdicts
from recspark.errors import MissingLandingError, SourceError, suggest
from recspark.sources import landing_digest, read_landing
from recspark.sources.files import delta_version, find_input
from recspark.sources.options import CSV_OPTIONS, SUPPORTED, reader_options
from recspark.sources.raw import csv_header
from tests.sources.conftest import NIGHT, write_parquet, write_text

pytestmark = pytest.mark.spark


def shop(path: Path | str, **settings: Any) -> Source:
    defaults: dict[str, Any] = {
        "name": "shop",
        "kind": "mapping",
        "format": "csv",
        "columns": {"user_id": "user", "item_id": "item", "event_at": "at"},
        "constants": {"event_type": "click"},
    }
    return Source(path=str(path), **{**defaults, **settings})


@pytest.mark.parametrize("archive", [True, False])
def test_missing_landing_is_an_error_that_says_what_to_do(
    spark: SparkSession, tmp_path: Path, archive: bool
) -> None:
    source = shop(tmp_path / "{run_date}", archive=archive)
    with pytest.raises(MissingLandingError) as error:
        read_landing(spark, source, NIGHT, initial=False)
    assert f"nothing is at {tmp_path}/2024-05-31" in str(error.value)
    advice = "point source.path" if archive else "make an empty folder there"
    assert advice in str(error.value)
    assert landing_digest(source, NIGHT) is None


def test_empty_landing_of_any_format_has_no_rows(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write_text(tmp_path / "file.csv", "")
    write_text(tmp_path / "in/a.csv", "")
    write_text(tmp_path / "header.csv", "user,item,at\n")
    write_text(tmp_path / "hidden/_SUCCESS", "x")
    # What pandas writes for an empty frame: columns of no type.
    write_parquet(tmp_path / "a.parquet", [], pa.schema([("user", pa.null())]))
    sources = [
        shop(tmp_path / name) for name in ("folder", "file.csv", "in", "header.csv", "hidden")
    ]
    sources.append(shop(tmp_path / "a.parquet", format="parquet"))
    sources += [shop(tmp_path / "folder", format=kind) for kind in ("parquet", "jsonl", "delta")]
    landings = [read_landing(spark, source, NIGHT, initial=True) for source in sources]
    events = reduce(DataFrame.union, [landing.events for landing in landings])
    counts = count_verdicts(
        check_events(events, run_date=NIGHT, max_late_days=7, initial=True), events
    )
    counts.check()
    assert counts.n_in == 0


def test_wrong_format_and_torn_files_are_named(spark: SparkSession, tmp_path: Path) -> None:
    text = write_text(tmp_path / "a.parquet", "user,item,at\n")
    with pytest.raises(SourceError, match=r"a\.parquet is not a Parquet file, or not all of it"):
        read_landing(spark, shop(text, format="parquet"), NIGHT, initial=True)
    with pytest.raises(SourceError, match=r"is no Delta table \(it has no _delta_log\)"):
        read_landing(spark, shop(tmp_path, format="delta"), NIGHT, initial=True)
    lines = "user,item,at\n" + "".join(f"u{i},{i * 7919},2024-05-31\n" for i in range(400_000))
    whole = write_text(tmp_path / "b.csv.gz", lines)
    whole.write_bytes(whole.read_bytes()[:1000])
    with pytest.raises(
        SourceError, match=r"b\.csv\.gz cannot be read: .* was it delivered in full"
    ):
        read_landing(spark, shop(whole), NIGHT, initial=True)


def test_times_in_nanoseconds_are_named(spark: SparkSession, tmp_path: Path) -> None:
    frame = pd.DataFrame({"user": ["u"], "item": ["i"], "at": [pd.Timestamp("2024-05-31 10:00")]})
    frame["at"] = frame["at"].astype("datetime64[ns]")
    frame.to_parquet(tmp_path / "a.parquet", version="2.6", coerce_timestamps=None)
    source = shop(tmp_path / "a.parquet", format="parquet")
    with pytest.raises(SourceError, match=r"a\.parquet: column 'at' counts nanoseconds"):
        read_landing(spark, source, NIGHT, initial=True)
    frame.to_parquet(tmp_path / "a.parquet", coerce_timestamps="us")
    assert read_landing(spark, source, NIGHT, initial=True).events.count() == 1


def test_a_file_without_rows_may_count_nanoseconds(spark: SparkSession, tmp_path: Path) -> None:
    frame = pd.DataFrame({"user": ["u"], "item": ["i"], "at": [pd.Timestamp("2024-05-31 10:00")]})
    (tmp_path / "in").mkdir()
    empty = frame[:0].astype({"at": "datetime64[ns]"})
    empty.to_parquet(tmp_path / "in/a.parquet", version="2.6", coerce_timestamps=None)
    source = shop(tmp_path / "in", format="parquet")
    assert read_landing(spark, source, NIGHT, initial=True).events.isEmpty()
    frame.to_parquet(tmp_path / "in/b.parquet", coerce_timestamps="us")
    assert read_landing(spark, source, NIGHT, initial=True).events.count() == 1


def test_file_torn_behind_its_head_is_named_when_rows_are_read(
    spark: SparkSession, tmp_path: Path
) -> None:
    dice = random.Random(1)
    lines = "user,item,at\n" + "".join(
        f"{dice.random()},{dice.random()},2024-05-31\n" for _ in range(60_000)
    )
    whole = write_text(tmp_path / "b.csv.gz", lines)
    data = whole.read_bytes()
    whole.write_bytes(data[: len(data) - 1000])
    landing = read_landing(spark, shop(whole), NIGHT, initial=True)
    checked = check_events(landing.events, run_date=NIGHT, max_late_days=7, initial=True)
    with pytest.raises(SourceError, match=r"b\.csv\.gz cannot be read to its end"):
        count_verdicts(checked)


def test_row_with_more_fields_than_the_parser_takes_is_named(
    spark: SparkSession, tmp_path: Path
) -> None:
    path = write_text(tmp_path / "c.csv", "user,item,at\nu,1,2024-05-31\n" + "," * (1 << 20) + "\n")
    landing = read_landing(spark, shop(path), NIGHT, initial=True)
    checked = check_events(landing.events, run_date=NIGHT, max_late_days=7, initial=True)
    with pytest.raises(SourceError, match=r"c\.csv cannot be read to its end"):
        count_verdicts(checked)


def test_digest_knows_every_file_and_no_hidden_one(tmp_path: Path) -> None:
    source = shop(tmp_path)
    write_text(tmp_path / "a.csv", "user,item,at\nu,1,2024-05-31\n")
    one = landing_digest(source, NIGHT)
    (tmp_path / "_SUCCESS").write_text("")
    (tmp_path / ".a.csv.crc").write_text("x")
    assert landing_digest(source, NIGHT) == one
    write_text(tmp_path / "b.csv", "user,item,at\n")
    two = landing_digest(source, NIGHT)
    write_text(tmp_path / "b.csv", "user,item,at\nu,1,2024-05-31\n")
    assert len({one, two, landing_digest(source, NIGHT)}) == 3


HEADERS: list[tuple[bytes, dict[str, str], list[str]]] = [
    (b'\xef\xbb\xbf"a,b";c\td\r\n1;2\n', {"sep": ";"}, ["a,b", "c\td"]),
    (b'"a,b";c\td\n', {"delimiter": "\\t", "quote": ""}, ['"a,b";c', "d"]),
    (b"a::b\n", {"sep": "::"}, ["a", "b"]),
    (b"\n  \n\r\n\ta,b\n1,2\n", {}, ["\ta", "b"]),
    (b"#made by x\n\n# y\na,b\n", {"comment": "#"}, ["a", "b"]),
    (b"K\xf6ln,\x80\n", {"charset": "windows-1252"}, ["Köln", "€"]),
    (b"K\xf6ln,b\n", {"encoding": "ISO-8859-1"}, ["Köln", "b"]),
    (
        b" a , b \n",
        {"ignoreLeadingWhiteSpace": "true", "ignoreTrailingWhiteSpace": "true"},
        ["a", "b"],
    ),
    (b" a , b \n", {}, [" a ", " b "]),
    (b"'a,b','it''s'\n", {"quote": "'", "escape": "'"}, ["a,b", "it's"]),
    (b'"a\\"b",c\n', {"escape": "\\"}, ['a"b', "c"]),
    (b"a,b|1,2|", {"lineSep": "|"}, ["a", "b"]),
    (b'"a\nb",c\n1,2\n', {"MultiLine": "true"}, ["a\nb", "c"]),
    (b"a\x0bb\xc2\x85,c\r1,2\r", {}, ["a\x0bb\x85", "c"]),
    (b"x" * 300_000 + b",b\n", {}, ["x" * 300_000, "b"]),
    (b"a,,b\n", {}, ["a", "", "b"]),
    ("a,b\n".encode("utf-16"), {"encoding": "UTF-16", "multiLine": "true"}, ["a", "b"]),
    (b"", {}, []),
    (b"\xef\xbb\xbf", {}, []),
]


@pytest.mark.parametrize(("content", "given", "fields"), HEADERS)
def test_header_is_read_as_the_rows_are(
    spark: SparkSession, tmp_path: Path, content: bytes, given: dict[str, str], fields: list[str]
) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    options = {**CSV_OPTIONS, **reader_options("shop", "csv", given)}
    assert csv_header(spark, "shop", str(tmp_path / "a.csv"), options) == fields


@pytest.mark.parametrize(
    "content",
    [b"\n \n\t\r\n", b"#a\n#b\n", b"x" * (1 << 20) + b",b\n1,2\n", b"\n" * (1 << 20) + b"a,b\n"],
)
def test_content_without_a_header_is_an_error(
    spark: SparkSession, tmp_path: Path, content: bytes
) -> None:
    path = write_text(tmp_path / "a.csv", content)
    with pytest.raises(SourceError, match=r"a\.csv has no header: every line of its first MB"):
        read_landing(spark, shop(path, options={"comment": "#"}), NIGHT, initial=True)


def test_a_blank_first_line_loses_no_row(
    tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    write_text(tmp_path / "a.csv", "\n \nuser,item,at\nu1,1,2024-05-31\n\nu2,2,2024-05-31\n")
    write_text(tmp_path / "b.csv", "user,item,at\nu3,3,2024-05-31\n")
    rows = checked(shop(tmp_path))
    assert sorted((row["user_id"], row["verdict"]) for row in rows) == [
        ("u1", "clean"), ("u2", "clean"), ("u3", "clean")
    ]  # fmt: skip


NAMES = [
    "x1", "x[1]", "x2", "x?", "a*", "ab", "{a,b}", "a", "b", "[!x]", "back\\slash", "a b%20", "é#",
    "n\nl", "~", "a::b",
]  # fmt: skip


def test_every_file_is_read_once_whatever_its_name(spark: SparkSession, tmp_path: Path) -> None:
    def rows(name: str) -> list[dict[str, str]]:
        user = name.replace("\n", "↵")  # CSV has a row on each line
        return [{"user": f"{user}|{i}", "item": "1", "at": "2024-05-31"} for i in range(len(name))]

    want: Counter[str] = Counter()
    for name in NAMES:
        for folder in ("csv", f"p{name}"):  # a folder's name is a pattern too
            path = tmp_path / folder / (f"{name}/f" if ":" in name else name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{path}.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, ["user", "item", "at"], lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows(name))
            want[f"{folder}: {name}"] = len(rows(name))
        if ":" not in name:
            text = "".join(json.dumps(row) + "\n" for row in rows(name))
            write_text(tmp_path / "jsonl" / f"{name}.jsonl", text)
            write_parquet(tmp_path / "parquet" / f"{name}.parquet", rows(name))
            want[f"jsonl: {name}"] = want[f"parquet: {name}"] = len(rows(name))
    spark.createDataFrame(rows("xyz")).write.format("delta").save(str(tmp_path / "delta[1]*{a}"))
    want["delta[1]*{a}: xyz"] = 3
    frames = []
    for folder in sorted(os.listdir(tmp_path)):
        kind = folder if folder in ("jsonl", "parquet") else "csv"
        source = shop(tmp_path / folder, format="delta" if folder.startswith("delta") else kind)
        events = read_landing(spark, source, NIGHT, initial=True).events
        label = F.concat(
            F.lit(f"{folder}: ".replace("\n", "↵")), F.substring_index("user_id", "|", 1)
        )
        frames.append(events.select(label.alias("label"), "user_id"))
    counted = reduce(DataFrame.union, frames).groupBy("label")
    found = counted.agg(
        F.count("*").alias("n"), F.countDistinct("user_id").alias("users")
    ).collect()
    assert {row["label"]: (row["n"], row["users"]) for row in found} == {
        label.replace("\n", "↵"): (n, n) for label, n in want.items()
    }


def test_a_file_that_spark_cannot_read_is_named(spark: SparkSession, tmp_path: Path) -> None:
    def says(folder: str, message: str, **settings: Any) -> None:
        with pytest.raises(SourceError, match=message):
            read_landing(spark, shop(tmp_path / folder, **settings), NIGHT, initial=True)

    text = "user,item,at\nu,1,2024-05-31\n"
    write_text(tmp_path / "colon/10:30.csv", text)
    says("colon", r"10:30\.csv: Spark cannot read a file of a local disk whose name has a ':'")
    (tmp_path / "bytes").mkdir()
    (tmp_path / os.fsdecode(b"bytes/a\xff.csv")).write_text(text)
    says("bytes", r"the name is not UTF-8, and Spark cannot read the file; rename it")
    write_text(tmp_path / "copying/a.csv._COPYING_", text)
    says("copying", r"of 1 files Spark reads 0, without \['.*a\.csv\._COPYING_'\]")
    for name, target in (("dangling", "nowhere"), ("folder", tmp_path / "colon")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.csv").symlink_to(target)
        says(name, r"a\.csv is no file \(a link that leads nowhere or to a folder, or a pipe\)")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe/a.csv")
    says("pipe", r"a\.csv is no file")


def test_a_delta_table_is_read_as_one(spark: SparkSession, tmp_path: Path) -> None:
    rows = spark.createDataFrame([("u", "1", "2024-05-31")], "user string, item string, at string")
    rows.write.format("delta").option("delta.checkpointPolicy", "v2").save(str(tmp_path / "t"))
    log = tmp_path / "t/_delta_log"
    # What checkpoints of the second form, and compacted logs, leave there.
    (log / "00000000000000000000.checkpoint.80a083e8-7026-4e79-81be-64bd76c43a11.json").write_text(
        ""
    )
    (log / "00000000000000000000.00000000000000000009.compacted.json").write_text("")
    place = find_input(shop("t"), str(tmp_path / "t"), NIGHT)
    assert delta_version(place) == 0
    for kind in ("parquet", "jsonl"):
        with pytest.raises(SourceError, match=rf"is a Delta table .* but is read as {kind}"):
            read_landing(spark, shop(tmp_path / "t", format=kind), NIGHT, initial=True)
    with pytest.raises(SourceError, match=r"/t is a Delta table below the landing"):
        read_landing(spark, shop(tmp_path, format="parquet"), NIGHT, initial=True)
    for commit in log.glob("0*"):
        commit.unlink()
    (log / "x.json").write_text("")
    with pytest.raises(SourceError, match=r"_delta_log has no commit"):
        read_landing(spark, shop(tmp_path / "t", format="delta"), NIGHT, initial=True)


TEXT = "user,item,at\n" + "".join(f"u{i},{i},2024-05-31\n" for i in range(50))


def test_text_is_read_in_every_compression_of_the_list(spark: SparkSession, tmp_path: Path) -> None:
    data = TEXT.encode()
    half = len(data) // 2
    packed = {
        "a.csv": data,
        "a.csv.gz": gzip.compress(data),
        "two.csv.gz": gzip.compress(data[:half]) + gzip.compress(data[half:]),
        "a.csv.bz2": bz2.compress(data),
        "two.csv.bz2": bz2.compress(data[:half]) + bz2.compress(data[half:]),
        "a.csv.deflate": zlib.compress(data),
        "b.csv.GZ": gzip.compress(data),
        "b.csv.Bz2": bz2.compress(data),
    }
    for name, content in packed.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "empty.csv.gz").write_bytes(gzip.compress(b""))
    events = read_landing(spark, shop(tmp_path), NIGHT, initial=True).events
    counted = events.groupBy("user_id").count().collect()
    assert {row["user_id"]: row["count"] for row in counted} == {
        f"u{i}": len(packed) for i in range(50)
    }


def test_text_in_another_compression_is_named(spark: SparkSession, tmp_path: Path) -> None:
    data = TEXT.encode()
    with zipfile.ZipFile(tmp_path / "zipped", "w") as file:
        file.writestr("a.csv", data)
    zipped, packed = (tmp_path / "zipped").read_bytes(), pa.compress(data, "zstd", asbytes=True)
    by_name = {
        "xz": lzma.compress(data), "lzma": data, "zip": zipped, "zst": packed, "lz4": data, "br": data,
        "snappy": data, "Z": data, "7z": data, "tgz": gzip.compress(data), "ZIP": zipped,
        "gzip": gzip.compress(data), "xlsx": zipped,
    }  # fmt: skip
    by_content = {
        "a.csv": [gzip.compress(data), bz2.compress(data), lzma.compress(data), zipped, packed],
        "a.csv.gz": [data, bz2.compress(data), zipped, gzip.compress(gzip.compress(data))],
        "a.csv.bz2": [data, gzip.compress(data)],
        "a.csv.deflate": [data, gzip.compress(data)],
    }
    files = [(f"a.csv.{ending}", content) for ending, content in by_name.items()]
    files += [(name, content) for name, contents in by_content.items() for content in contents]
    for name, content in files:
        (tmp_path / name).write_bytes(content)
        for kind in ("csv", "jsonl"):
            with pytest.raises(SourceError, match=re.escape(f"{tmp_path}/{name} is ")):
                read_landing(spark, shop(tmp_path / name, format=kind), NIGHT, initial=True)
        (tmp_path / name).unlink()


def test_options_are_those_of_the_list(spark: SparkSession, tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.csv", TEXT)

    def says(message: str, **options: str) -> None:
        with pytest.raises(SourceError, match=message):
            read_landing(spark, shop(path, options=options), NIGHT, initial=True)

    says(r"source\.options\.ignoreCorruptFiles is not supported", ignoreCorruptFiles="true")
    says(r"source\.options\.pathGlobFilter is not supported", pathGlobFilter="b*")
    says(r"source\.options\.mode is not supported", mode="DROPMALFORMED")
    says(r"encodng is not supported\. Did you mean 'encoding'", encodng="x")
    says(
        r"source\.options\.sep and source\.options\.Delimiter say the same", sep=";", Delimiter=";"
    )
    says(r"source\.options\.encoding = 'nonsense' is no encoding", charset="nonsense")
    says(r"encoding = 'UTF-16': the end of a line cannot be found", encoding="UTF-16")
    for name, value in {
        "sep": "", "quote": "ab", "escape": "ab", "comment": "//", "maxColumns": "many",
        "multiLine": "maybe", "header": "perhaps", "lineSep": "", "unescapedQuoteHandling": "x",
    }.items():  # fmt: skip
        says(rf"of source\.options \{{.*{name}: '{value}'.* Spark says: ", **{name: value})
    known = {name for names in SUPPORTED.values() for name in names}
    assert not known & {"mode", "columnNameOfCorruptRecord", "recursiveFileLookup", "basePath"}


def test_text_in_windows_1252_is_read(spark: SparkSession, tmp_path: Path) -> None:
    lines = ["K\u00f6hler,\u20ac5,2024-05-31", "\u2019,2,2024-05-31"]
    jsonl = [json.dumps({"user": u, "item": i, "at": at}, ensure_ascii=False) for u, i, at in
             (line.split(",") for line in lines)]  # fmt: skip
    texts = {
        "csv": "\n".join(["user,item,at", *lines, ""]).encode("cp1252") + b"\x81,3,2024-05-31\n",
        "jsonl": "\n".join([*jsonl, ""]).encode("cp1252")
        + b'{"user": "\x81", "item": "3", "at": "2024-05-31"}\n',
    }
    for kind, text in texts.items():
        (tmp_path / kind).write_bytes(text)
        source = shop(tmp_path / kind, format=kind, options={"encoding": "windows-1252"})
        events = read_landing(spark, source, NIGHT, initial=True).events
        found = {(row["user_id"], row["item_id"], row["reason"]) for row in events.collect()}
        assert found == {
            ("K\u00f6hler", "\u20ac5", None),
            ("\u2019", "2", None),
            ("\ufffd", "3", "bad encoding: user"),
        }


def test_parquet_that_spark_cannot_read_is_named(spark: SparkSession, tmp_path: Path) -> None:
    big = pa.array([Decimal(10) ** 60], pa.decimal256(70, 0))
    columns = {"user": ["u"], "item": ["1"], "at": ["2024-05-31"]}
    for name, values in {"decimal256": big, "time": pa.array([1], pa.time32("ms"))}.items():
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({**columns, "x": values}), path)
        with pytest.raises(SourceError, match=rf"{name}\.parquet: column 'x' is "):
            read_landing(spark, shop(path, format="parquet"), NIGHT, initial=True)


def test_changed_bytes_of_parquet_are_named_when_rows_are_read(
    spark: SparkSession, tmp_path: Path
) -> None:
    path = tmp_path / "in/a.parquet"
    rows = [{"user": f"u{i}", "item": str(i), "at": "2024-05-31"} for i in range(2000)]
    write_parquet(path, rows)
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    landing = read_landing(spark, shop(path.parent, format="parquet"), NIGHT, initial=True)
    checked = check_events(landing.events, run_date=NIGHT, max_late_days=7, initial=True)
    with pytest.raises(SourceError, match=r"a\.parquet cannot be read to its end"):
        count_verdicts(checked, landing.events)


def test_a_hostile_header_makes_no_long_message(spark: SparkSession, tmp_path: Path) -> None:
    names = [f"{i:05}{'x' * 200}" for i in range(4000)]
    path = write_text(tmp_path / "a.csv", ",".join(names) + "\n1\n")
    with pytest.raises(SourceError) as error:
        read_landing(spark, shop(path), NIGHT, initial=True)
    assert len(str(error.value)) < 6000
    assert len(suggest("x" * 10_000, ["y" * 1_000_000] * 1000)) < 2000


def test_relative_path_with_dots_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    write_text(tmp_path / "there/x/a.csv", "user\n")
    monkeypatch.chdir(tmp_path / "here")
    place = find_input(shop("../there"), "../there", NIGHT)
    assert place.files == [str(tmp_path / "there/x/a.csv")]
