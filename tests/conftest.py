"""Fixtures of every test: one Spark session, a catalogue in a temporary folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pytest

# No example fails for the seconds it took: the machine may be busy.
hypothesis.settings.register_profile("recspark", deadline=None)
hypothesis.settings.load_profile("recspark")

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
for _name in ("RECSPARK_SETTINGS", "RECSPARK_SOURCE", "RECSPARK_ROOT"):  # of whoever runs the tests
    os.environ.pop(_name, None)


# Settings that a running session may change: of plans and tables.
_PLANS = ("spark.sql.", "spark.databricks.")
# Files whose tests share the fixture `small_night`, the costliest of all.
_OF_THE_SMALL_NIGHT = ("test_small_night.py", "test_cli.py", "test_secrets.py")
# Files of one to three minutes, of few tests: begun last, one worker would end alone with one of them.
_LONG = (
    "tests/faults/test_interleaved.py",
    "tests/e2e/test_small_night.py",
    "tests/e2e/test_ratings_night.py",
    "tests/e2e/test_odd_nights.py",
    "tests/e2e/test_impressions.py",
    "tests/contract/test_recommenders.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files."""
    place = {name: number for number, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(_LONG)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Keep in one worker what shares a fixture: the tests of a file, and those of the small
    night.
    """
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False  # by the order of the items, not by their number

    class ByFixture(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "the small night" if file.endswith(_OF_THE_SMALL_NIGHT) else file

    return ByFixture(config, log)


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """The session of the whole test run: local[2], two shuffle partitions, UTC."""
    from recspark.config.load import load_config
    from recspark.session import build_session

    home = tmp_path_factory.mktemp("spark")
    settings = load_config("test").spark
    java = settings.conf["spark.driver.extraJavaOptions"]
    session = build_session(
        settings,
        "recspark tests",
        {
            "spark.sql.warehouse.dir": str(home / "warehouse"),
            "spark.local.dir": str(home / "local"),
            # Workers do not look into the folder they are started in: functions of tests are here.
            "spark.executorEnv.PYTHONPATH": str(ROOT),
            "spark.driver.extraJavaOptions": f"{java} -Dderby.system.home={home}",
        },
    )
    yield session
    session.stop()


# In `runs.detail`, JSON within JSON: what names commits.
_COMMITS = re.compile(r'\\"(?:commits\\": \{[^}]*\}|identity\\": \\"\w+\\"),? ?')


def without_commits(row: str) -> str:
    """Return a row as JSON, as Spark writes it, without the ids of commits: they are drawn."""
    return _COMMITS.sub("", row)


@contextmanager
def spark_conf(spark: object, changed: dict[str, str]) -> Iterator[None]:
    """Change settings of the session within the block, and restore what they were before it."""
    conf = spark.conf  # type: ignore[attr-defined]
    before = {key: conf.get(key) for key in changed}
    try:
        for key, value in changed.items():
            conf.set(key, value)
        yield
    finally:
        for key, value in before.items():
            conf.set(key, value)


@contextmanager
def production_settings(spark: object) -> Iterator[None]:
    """Plan as installations do: by conf/env/local.yaml, and Spark's own settings where it has none.

    Adaptive plans, compiled code, statistics of files; what a running session cannot change stays.
    """
    from recspark.config.load import load_config

    test, local = load_config("test").spark, load_config("local").spark
    partitions = ("spark.sql.shuffle.partitions", f"{local.shuffle_partitions}")
    want = {**dict.fromkeys(test.conf), **local.conf, **dict([partitions])}
    changed = {key: value for key, value in want.items() if key.startswith(_PLANS)}
    conf = spark.conf  # type: ignore[attr-defined]
    before = {key: conf.get(key, None) for key in changed}

    def apply(settings: dict[str, str | None]) -> None:
        for key, value in settings.items():
            conf.unset(key) if value is None else conf.set(key, value)

    try:
        apply(changed)
        yield
    finally:
        apply(before)


@pytest.fixture
def generated_code(spark: object) -> Iterator[None]:
    """Spark compiles its plans, as in a real night: worth it where a test reads many rows."""
    compiled = {"spark.sql.codegen.wholeStage": "true", "spark.sql.codegen.factoryMode": "FALLBACK"}
    with spark_conf(spark, compiled):
        yield


@pytest.fixture
def catalog(spark: object, tmp_path: Path) -> object:
    """Empty tables of this test."""
    from recspark.tables.catalog import TableCatalog

    return TableCatalog(spark, str(tmp_path / "tables"))  # type: ignore[arg-type]


ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "data" / "online_retail_ii" / "online_retail_2009_2010.parquet"
NIGHT = "2010-12-09"


@pytest.fixture(scope="session")
def retail_slice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every tenth customer of the bundled data since October 2010, with all its dirt; a Parquet
    file."""
    import pandas as pd

    rows = pd.read_parquet(BUNDLED)
    customer = rows["Customer ID"]
    kept = (customer % 10 == 0) | (customer.isna() & (rows.index % 10 == 0))
    path = tmp_path_factory.mktemp("slice") / "retail.parquet"
    rows[kept & (rows["InvoiceDate"] >= "2010-10-01")].to_parquet(path)
    return path


# Secrets of the small nights, as settings of stores that they do not use: tests/e2e/test_secrets.py
# looks for them in everything that a night leaves.
PLANTED = {
    "spark.hadoop.fs.s3a.secret.key": "planted/Secret+Key0123456789",
    "spark.hadoop.fs.azure.sas.box.account": "sv=2024-01-01&sig=plantedSignature%3D",
    "spark.hadoop.planted.uri": "https://me:plantedPassword@store.example/x",
}


def small_settings(root: Path, source: Path) -> list[str]:
    """Settings of a night that takes seconds: the slice, two models, no Horovod."""
    return [
        *[f"spark.conf.{name}={value}" for name, value in PLANTED.items()],
        f"paths.root={root}",
        f"source.path={source}",
        "models=[popular, ease]",
        "publish={ladder: [popular], neighbours_model: ease}",
        "train.ranks=1",
        "evaluate.n_bootstrap=50",
        "n_candidates=20",
    ]


def run_night(root: Path, source: Path, night: str = NIGHT, *more: str, **options: bool) -> object:
    """Run one small night in this process, on the tests' session; return its context."""
    from recspark.cli.common import parse_date
    from recspark.pipeline.run import night as run_stages
    from recspark.pipeline.run import open_night

    context = open_night(
        "test", parse_date(night), [*small_settings(root, source), *more], **options
    )
    run_stages(context)
    return context


@pytest.fixture(scope="session")
def small_night(
    spark: object, retail_slice: Path, tmp_path_factory: pytest.TempPathFactory
) -> object:
    """The context of a finished small night; read its tables, do not write them."""
    return run_night(tmp_path_factory.mktemp("night"), retail_slice)
