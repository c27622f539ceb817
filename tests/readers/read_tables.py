"""Run in a process of its own, without Spark: opens every table with deltalake and with polars, as
where neither pyspark nor pyarrow is installed.
"""

import json
import sys
from pathlib import Path

sys.modules |= {"pyspark": None, "pyarrow": None}  # type: ignore[dict-item]

import polars as pl  # noqa: E402
from deltalake import DeltaTable  # noqa: E402

found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    table = DeltaTable(str(folder))
    rows = pl.read_delta(str(folder))
    found[folder.name] = {
        "reader": table.protocol().min_reader_version,
        "features": list(table.protocol().reader_features or []),
        "deltalake": table.count() if hasattr(table, "count") else None,
        "polars": rows.height,
        "columns": rows.columns,
    }
print(json.dumps(found))
