"""Random bad rows and malformed files: every row gets a verdict, every error has a name.

The rows of each landing are counted here by another reader: Python's `csv` and `json`, or pyarrow.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import random
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark.config import Source
from recspark.data.event_checks import Counts, check_events, count_verdicts
from recspark.errors import SourceError
from recspark.sources import read_landing
from tests.sources.conftest import NIGHT

pytestmark = pytest.mark.spark

FORMATS = ("csv", "jsonl", "parquet", "delta", "sessions")
NAMES = ("id", "user", "item", "what", "at", "value", "n", "tag")
JSON_BLANKS = b" \t\r\n"
STRANGE: tuple[Any, ...] = (
    None, "", " ", "\t", "u1", "U1 ", "null", "NaN", "None", "\\N", "\ufeff", "\u200b", "\u0085x", "\x00",
    "\x1f", "é", "e\u0301", "\u202eabc", "😀", "a\\", '"', "'", '""', ',"', "a,b", "a;b", "[1]", "{}", "[", "{",
    '{"$oid": 1}', "0", "-0", "1e3", "1e400", "-1", "٣", "1,5", "1_000", "0x10", "9" * 30, "1" * 5000, "inf",
    "2024-05-31", "2024-05-31T10:00Z", "2024-02-30", "31.05.2024", "20240531", "1717149600", "1717149600000",
    "9" * 18, "-62135596801", "99999-01-01", "0001-01-01", "2024-05-31 10:00:00 Europe/Berlin", "now", "T10:00",
    "#x", "=1+1", "x" * 3000, "%s{}", "\\u0041", "//", "<b>",
)  # fmt: skip


def shop(path: Path, kind: str) -> Source:
    """Return a source whose landing of the night is at `path`, which names the night: of an archive,
    the rows after it would be no part of it.
    """
    landing = str(path).replace(str(NIGHT), "{run_date}")
    if kind == "sessions":
        return Source(name="clicks", kind="session_files", path=landing, archive=False)
    columns = {
        "event_id": "id", "user_id": "user", "item_id": "item", "event_type": "what", "event_at": "at",
        "value": "value", "quantity": "n",
    }  # fmt: skip
    return Source(
        name="shop",
        kind="mapping",
        format=kind,  # type: ignore[arg-type]
        path=landing,
        archive=False,
        columns=columns,
        attributes={"tag": "tag"},
    )


def verdicts(spark: SparkSession, source: Source) -> Counts:
    landing = read_landing(spark, source, NIGHT, initial=True)
    checked = check_events(
        landing.events,
        run_date=NIGHT,
        max_late_days=7,
        initial=True,
        unique_ids=landing.unique_ids,
    )
    counts = count_verdicts(checked, landing.events)
    counts.check()
    return counts


def outcomes(spark: SparkSession, sources: dict[Path, Source]) -> dict[Path, int | SourceError]:
    """Return the rows of each landing, or its named error; any other error fails the test.

    Landings that can be read are counted together: by the path that it names, an error is that of
    one of them, and the others are counted again without it.
    """
    found: dict[Path, int | SourceError] = {}
    events: dict[Path, DataFrame] = {}
    for path, source in sources.items():
        try:
            events[path] = read_landing(spark, source, NIGHT, initial=True).events
        except SourceError as error:
            found[path] = error
    while events:
        all_events = reduce(DataFrame.unionByName, events.values())
        checked = check_events(all_events, run_date=NIGHT, max_late_days=7, initial=True)
        try:
            count_verdicts(checked, all_events).check()
        except SourceError as error:
            [path] = [path for path in events if str(path) in str(error)]
            found[path] = error
            del events[path]
            continue
        rows = [
            frame.agg(F.lit(str(path)), F.count("*"), F.max(F.length("item_id")))
            for path, frame in events.items()
        ]
        found |= {Path(row[0]): row[1] for row in reduce(DataFrame.union, rows).collect()}
        break
    return found


# ------------------------------------------------------------------------------------------- rows


def a_row(dice: random.Random) -> dict[str, Any]:
    """Return a good row with one to all of its values changed for strange ones."""
    row: dict[str, Any] = dict(
        zip(NAMES, (f"e{dice.random()}", "u1", "i1", "buy", "2024-05-31T10:00:00", "1.5", "2", "t"))
    )
    for name in dice.sample(NAMES, dice.randint(1, len(NAMES))):
        row[name] = dice.choice(STRANGE)
    return row


def bad_csv(folder: Path, dice: random.Random, n: int) -> int:
    """Return the number of rows in three files: quoted, in pieces, and of random bytes."""
    whole = io.StringIO()
    writer = csv.DictWriter(whole, NAMES, lineterminator="\n")
    writer.writeheader()
    writer.writerows(a_row(dice) for _ in range(n // 2))
    quoted = whole.getvalue()
    header = ",".join(NAMES)
    pieces = [
        dice.choice((",", ";", '"', "\t", "")).join(str(v) for v in a_row(dice).values())
        for _ in range(n // 4)
    ]
    noise = [dice.randbytes(dice.randint(1, 80)) for _ in range(n - n // 2 - n // 4)]
    files = {
        "quoted.csv": quoted.encode(),
        "pieces.csv": "\n".join([header, *pieces]).encode(),
        "noise.csv.gz": gzip.compress(b"\n".join([header.encode(), *noise])),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    records = list(csv.reader(io.StringIO(quoted)))[1:]
    lines = [lines_of("\n".join(pieces).encode()), lines_of(b"\n".join(noise))]
    return sum(1 for record in records if record) + sum(map(len, lines))


def lines_of(text: bytes, blanks: bytes = bytes(range(33))) -> list[bytes]:
    """Return the lines of a text that are not blank, a mark at its start left out."""
    lines = re.split(rb"\r\n|\n|\r", text.removeprefix(b"\xef\xbb\xbf"))
    return [line for line in lines if line.strip(blanks)]


def bad_jsonl(folder: Path, dice: random.Random, n: int) -> int:
    values = (*STRANGE, 1, 1.5, True, float("nan"), [1], {"a": 1}, [[]], 10**30)
    lines = []
    for _ in range(n):
        row = a_row(dice)
        row[dice.choice(NAMES)] = dice.choice(values)
        line = json.dumps(row, ensure_ascii=dice.random() < 0.5).encode()
        change = dice.random()
        if change < 0.2:
            line = line[: dice.randint(1, len(line))]
        elif change < 0.4:
            line += dice.choice((b" x", b"{}", b",{}", b"]", b"}", b"\x00", b"\xff", b"],[]]"))
        elif change < 0.5:
            at = dice.randint(0, len(line) - 1)
            line = line[:at] + bytes([dice.choice((0, 34, 91, 123, 255))]) + line[at + 1 :]
        lines.append(line)
    (folder / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return len(lines_of(b"\n".join(lines), JSON_BLANKS))


def bad_table(dice: random.Random, n: int) -> pa.Table:
    floats = (0.0, -1.0, 1.5, float("nan"), float("inf"), 1e300, 13085.0, None)
    times = (
        datetime(2024, 5, 31, 10),
        datetime(1, 1, 1),
        datetime(9999, 12, 31),
        datetime(1970, 1, 1),
        None,
    )
    rows = [
        {**a_row(dice), "value": dice.choice(floats), "n": dice.choice((None, -1, 0, 2, 2**62)),
         "at": dice.choice(times), "item": dice.choice((None, -5, 0, 2**63 - 1))}
        for _ in range(n)
    ]  # fmt: skip
    fields = {"value": pa.float64(), "n": pa.int64(), "at": pa.timestamp("us"), "item": pa.int64()}
    return pa.Table.from_pylist(
        rows, schema=pa.schema([(name, fields.get(name, pa.string())) for name in NAMES])
    )


def bad_parquet(folder: Path, dice: random.Random, n: int) -> int:
    for i, share in enumerate((n // 2, n - n // 2)):
        table = bad_table(dice, share)
        if i:  # the same columns in other types
            table = table.set_column(2, "item", table["item"].cast(pa.string()))
        pq.write_table(table, folder / f"{i}.parquet", compression=("snappy", "zstd")[i])
    return sum(pq.read_metadata(file).num_rows for file in folder.glob("*.parquet"))


def bad_sessions(folder: Path, dice: random.Random, n: int) -> int:
    signs = ["1", "22", " ", "  ", "\t", "é", "\x00", "\x0b", "x" * 500, "😀", "\u2028", "-", '"']
    lines = ["".join(dice.choices(signs, k=dice.randint(0, 5))) for _ in range(n)]
    (folder / "a.txt").write_text("\n".join(lines) + "\n", newline="")
    pieces = [re.split("[ \t\n\x0b\f\r]+", line.strip(" ")) for line in lines]
    return sum(map(len, pieces))


@pytest.mark.parametrize(
    "seed", [1, *[pytest.param(s, marks=pytest.mark.slow) for s in range(2, 22)]]
)
def test_every_bad_row_gets_a_verdict(spark: SparkSession, tmp_path: Path, seed: int) -> None:
    makers: dict[str, Callable[[Path, random.Random, int], int]] = {
        "csv": bad_csv,
        "jsonl": bad_jsonl,
        "parquet": bad_parquet,
        "sessions": bad_sessions,
    }
    dice = random.Random(seed)
    for kind in FORMATS:
        folder = tmp_path / str(NIGHT) / kind
        if kind == "delta":
            pq.write_table(bad_table(dice, 400), tmp_path / "rows.parquet")
            frame = spark.read.parquet(str(tmp_path / "rows.parquet"))
            frame.write.format("delta").save(str(folder))
            want = sum(pq.read_metadata(file).num_rows for file in folder.glob("*.parquet"))
        else:
            folder.mkdir(parents=True)
            want = makers[kind](folder, dice, 400)
        counts = verdicts(spark, shop(folder, kind))
        assert counts.n_in == want, (kind, seed)
        assert counts.n_quarantined > 0, (kind, seed)


# ------------------------------------------------------------------------------------------ files


def damages(dice: random.Random) -> list[Callable[[bytes], bytes]]:
    """Return ways to change the bytes of a file."""

    def place(data: bytes) -> tuple[int, int]:
        start = dice.randint(0, max(len(data) - 1, 0))
        return start, min(len(data), start + dice.choice((1, 4, 50, 500)))

    def flipped(data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(dice.choice((1, 3, 30))):
            changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
        return bytes(changed)

    def zeroed(data: bytes) -> bytes:
        start, end = place(data)
        return data[:start] + bytes(end - start) + data[end:]

    def without(data: bytes) -> bytes:
        start, end = place(data)
        return data[:start] + data[end:]

    def twice(data: bytes) -> bytes:
        start, end = place(data)
        return data[:end] + data[start:]

    return [
        lambda data: data[: place(data)[0]],
        lambda data: data[place(data)[0] :],
        lambda data: data[: -dice.randint(1, 8)],
        flipped, zeroed, without, twice,
        lambda data: data + dice.randbytes(100),
        lambda data: dice.randbytes(100) + data,
        lambda data: dice.randbytes(len(data)),
        lambda data: data.replace(b"\n", b"\r"),
        lambda data: b"\xff\xfe" + data,
        lambda data: b"\xef\xbb\xbf\n\n" + data,
        gzip.compress,
        lambda data: b"\n" + data + b'"',
    ]  # fmt: skip


GOOD_ROWS = [
    {"id": f"e{i}", "user": f"u{i % 7}", "item": f"i{i % 11}", "what": "buy", "at": "2024-05-31T10:00:00",
     "value": str(i / 4), "n": "1", "tag": "t" * (i % 50)}
    for i in range(300)
]  # fmt: skip


def good_files(folder: Path) -> dict[str, Path]:
    """Return a good landing of each form, by the name of the file that is to be damaged."""
    text = io.StringIO()
    writer = csv.DictWriter(text, NAMES, lineterminator="\n")
    writer.writeheader()
    writer.writerows(GOOD_ROWS)
    as_csv = text.getvalue().encode()
    as_jsonl = "".join(json.dumps(row) + "\n" for row in GOOD_ROWS).encode()
    as_sessions = "".join(f"{i} {i % 5} {i % 3}\n" for i in range(300)).encode()
    contents = {}
    for stem, data in (("csv", as_csv), ("jsonl", as_jsonl), ("sessions", as_sessions)):
        contents[stem] = data
        contents[f"{stem}.gz"] = gzip.compress(data)
        contents[f"{stem}.bz2"] = bz2.compress(data)
        contents[f"{stem}.deflate"] = zlib.compress(data)
    files = {}
    for name, data in contents.items():
        files[name] = folder / f"a.{name}"
        files[name].write_bytes(data)
    for codec in ("none", "snappy", "gzip", "zstd"):
        files[f"parquet.{codec}"] = folder / f"{codec}.parquet"
        pq.write_table(
            pa.Table.from_pylist(GOOD_ROWS), folder / f"{codec}.parquet", compression=codec
        )
    return files


def rows_by_another_reader(path: Path, kind: str) -> int | None:
    """Return the rows of a file as Python or pyarrow counts them; None where they cannot."""
    data = path.read_bytes()
    try:
        if kind == "parquet":
            return int(pq.ParquetFile(path).metadata.num_rows)
        unpacked = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".deflate": zlib.decompress}
        text = unpacked.get(path.suffix, bytes)(data)
    except Exception:  # whatever the reader says of bytes that are not what they should be
        return None
    if kind == "sessions":
        lines = re.split(rb"\r\n|\n|\r", text.removeprefix(b"\xef\xbb\xbf"))
        lines = lines[:-1] if not lines[-1] else lines
        return sum(len(re.split(rb"[ \t\n\x0b\f\r]+", line.strip(b" "))) for line in lines)
    if kind == "jsonl":
        return len(lines_of(text, JSON_BLANKS))
    return len(lines_of(text)[1:])


@pytest.mark.parametrize(
    ("seed", "each"), [(1, 9), *[pytest.param(s, 15, marks=pytest.mark.slow) for s in range(2, 12)]]
)
def test_every_malformed_file_is_read_or_named(
    spark: SparkSession, tmp_path: Path, seed: int, each: int
) -> None:
    dice = random.Random(seed)
    (tmp_path / "good").mkdir()
    (tmp_path / str(NIGHT)).mkdir()
    found: dict[Path, int | SourceError] = {}
    kinds: dict[Path, str] = {}
    for form, good in good_files(tmp_path / "good").items():
        kind = form.partition(".")[0]
        sources = {}
        for i, damage in enumerate(dice.sample(damages(dice), each)):
            path = tmp_path / str(NIGHT) / f"{i}-{good.name}"
            path.write_bytes(damage(good.read_bytes()))
            sources[path] = shop(path, kind)
            kinds[path] = kind
        found |= outcomes(spark, sources)
    errors = {path: error for path, error in found.items() if isinstance(error, SourceError)}
    for path, error in errors.items():
        assert path.name in str(error)
        assert len(str(error)) < 3000
    for path in found.keys() - errors.keys():
        want = rows_by_another_reader(path, kinds[path])
        assert want is None or found[path] == want, (path, seed)
    assert len(found) == len(kinds) == 16 * each
    assert len(errors) > len(found) / 4


def damaged_tables(good: Path, to: Path, dice: random.Random, n: int) -> Iterator[Path]:
    """Yield copies of a Delta table with one file of it damaged, or gone."""
    files = sorted(path.relative_to(good) for path in good.rglob("*") if path.is_file())
    ways = damages(dice)
    for i in range(n):
        table = to / f"table-{i}-"
        shutil.copytree(good, table)
        name = files[i % len(files)]
        if dice.random() < 0.2:
            (table / name).unlink()
        else:
            (table / name).write_bytes(dice.choice(ways)((good / name).read_bytes()))
        yield table


@pytest.mark.parametrize(
    ("seed", "n"), [(1, 12), *[pytest.param(s, 120, marks=pytest.mark.slow) for s in range(2, 7)]]
)
def test_every_damaged_delta_table_is_read_or_named(
    spark: SparkSession, tmp_path: Path, seed: int, n: int
) -> None:
    dice = random.Random(seed)
    good = tmp_path / "good"
    rows = spark.createDataFrame(GOOD_ROWS).coalesce(1)
    for _ in range(2):
        rows.write.format("delta").mode("append").save(str(good))
    tables = list(damaged_tables(good, tmp_path / str(NIGHT), dice, n))
    found = outcomes(spark, {table: shop(table, "delta") for table in tables})
    assert found.keys() == {*tables}
    errors = {table: error for table, error in found.items() if isinstance(error, SourceError)}
    assert all(str(table) in str(error) for table, error in errors.items())
    counted = {found[table] for table in tables if table not in errors}
    assert counted <= {len(GOOD_ROWS), 2 * len(GOOD_ROWS)}
    assert len(errors) > n / 5
