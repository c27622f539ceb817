"""Secrets are hidden in texts, settings, errors and logs; nothing else is changed."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recspark import masking
from recspark.config.load import load_config
from recspark.errors import ConfigError, SetupError
from recspark.masking import mask
from recspark.pipeline.run import error_line
from tests.conftest import ROOT

# Where a secret stands in what people write: settings, options of the JVM, URIs, headers.
PLACES = (
    "spark.hadoop.fs.s3a.secret.key={}",
    "spark.hadoop.fs.s3a.access.key = {}",
    "fs.azure.account.key.box.dfs.core.windows.net={}",
    "fs.azure.sas.box.account: {}",
    "-Djavax.net.ssl.trustStorePassword={} -Dx=y",
    '{{"fs.s3a.session.token": "{}", "a": 1}}',
    "password='{}'",
    "AWSAccessKeyId={}&Expires=1",
    "s3a://AKIA:{}@lake/folder",
    "error at ftp://me:{}@host/x: refused",
    "https://{}@host/x",
    "https://lake/x.csv?sv=2024&sig={}&se=1",
    "https://lake/x?X-Amz-Signature={}",
    "https://lake/x?X-Amz-Security-Token={}",
    "https://lake/x?api_key={}",
    "jdbc:postgresql://host/db?user=a&password={}",
    "Authorization: Bearer {}",
)
SECRETS = st.text("abcXYZ0189_.~+-", min_size=8, max_size=40).map(lambda text: f"q7{text}z")


@pytest.mark.parametrize("place", PLACES)
@given(secret=SECRETS)
def test_a_secret_is_hidden_wherever_it_stands(place: str, secret: str) -> None:
    text = place.format(secret)
    hidden = mask(text)
    assert secret not in hidden
    assert "***" in hidden
    before, _, after = place.format("\0").partition("\0")
    assert hidden.endswith(after)  # and nothing but the secret
    assert mask(hidden) == hidden
    assert len(hidden) >= len(before)


@given(st.text("abc/@:+=%", min_size=8, max_size=30).filter(lambda t: not re.match(r"\d{1,5}/", t)))
def test_a_password_nobody_quoted_is_hidden_whole(password: str) -> None:
    assert mask(f"s3a://user:{password}@lake/x").endswith("@lake/x")
    assert mask(f"s3a://user:{password}@lake/x") == "s3a://user:***@lake/x"
    assert quote(password, safe="") not in mask(f"s3a://user:{quote(password, safe='')}@lake/x")


@pytest.mark.parametrize(
    "part",
    [
        "a",
        "a.",
        "s3a://u:",
        "https://",
        "token=",
        "access_key",
        "sig.",
        "secret = ",
        "a@",
        "bearer ",
    ],
)
def test_a_long_text_is_read_once(part: str) -> None:
    """A pattern that begins anew at every letter would take hours, and end by the test's time limit."""
    assert mask(part * (300_000 // len(part)) + " password=planted").endswith(" password=***")


@pytest.mark.parametrize(
    "text",
    [
        "hdfs://namenode:8020/lake/events",
        "spark://master:7077",
        "abfss://container@account.dfs.core.windows.net/x",
        "hdfs://namenode:8020/user@corp/x",
        "table 'events': key event_id occurs twice",
        "publish.k = 10, n_tokens stay",
        "columns: {session_key: visit, user_id: customer}",
        "C:\\data",
    ],
)
def test_what_is_no_secret_stays_to_the_letter(text: str) -> None:
    assert mask(text) == text


def test_the_projects_own_words_are_no_secrets() -> None:
    for page in ("docs/runbook.md", "docs/bad_input.md", "docs/tables.md", "docs/architecture.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert mask(text) == text


PLANTED = "planted+Secret/0123456789=="
SETTINGS = [
    f"spark.conf.spark.hadoop.fs.s3a.secret.key={PLANTED}",
    f"spark.conf.spark.hadoop.fs.azure.sas.box.account=sv=1&sig={PLANTED}",
    f"spark.conf.spark.driver.extraJavaOptions=-Dfs.token={PLANTED} -Da=b",
    f"source.options.password={PLANTED}",
    f"paths.root=s3a://me:{PLANTED}@lake/x",
    f"source.path=https://lake/x.parquet?sig={PLANTED}",
]


def test_what_is_stored_shows_no_secret() -> None:
    config = load_config("test", SETTINGS)
    text = config.resolved()
    assert PLANTED not in text
    assert "planted" not in text
    stored = json.loads(text)
    assert stored["spark"]["conf"]["spark.hadoop.fs.s3a.secret.key"] == "***"
    assert stored["spark"]["conf"]["spark.driver.extraJavaOptions"].endswith("=*** -Da=b")
    assert stored["paths"]["root"] == "s3a://me:***@lake/x"
    assert config.spark.conf["spark.hadoop.fs.s3a.secret.key"] == PLANTED  # Spark gets it


def test_secrets_are_no_part_of_the_fingerprint() -> None:
    base = load_config("test").fingerprint()
    assert load_config("test", SETTINGS[:3]).fingerprint() == base
    one, other = (
        load_config("test", [f"source.options.password={text}"]) for text in ("one", "other")
    )
    assert one.fingerprint() == other.fingerprint()
    a, b = (load_config("test", [f"source.options.sep={text}"]) for text in ("a", "b"))
    assert a.fingerprint() != b.fingerprint()


def test_a_fingerprint_does_not_depend_on_what_else_is_secret() -> None:
    before = load_config("test").fingerprint()
    masking.remember_secret("token", "online_retail")
    try:
        assert load_config("test").fingerprint() == before
    finally:
        masking._known_secrets.discard("online_retail")


@pytest.mark.parametrize(
    "override",
    [
        f"spark.conf.spark.my.key=[{PLANTED}",
        f"spark.conf={{spark.my.token: [{PLANTED}]}}",
        f"paths.root=s3a://me:{PLANTED}@lake/{{x}}",
        f"source.timezone=https://me:{PLANTED}@host/",
        f"spark.conf.my.password={PLANTED}: {PLANTED}: x",
    ],
)
def test_an_error_about_a_secret_does_not_show_it(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("test", [override])
    assert "planted" not in str(caught.value)


def test_a_secret_known_by_its_name_is_hidden_where_it_is_repeated() -> None:
    load_config("test", ["spark.conf.spark.hadoop.fs.s3a.secret.key=correct-horse-battery"])
    assert str(SetupError("server said: correct-horse-battery is wrong")) == (
        "server said: *** is wrong"
    )


def test_words_of_settings_are_not_learnt() -> None:
    load_config(
        "test",
        ["spark.conf.spark.a.key.enabled=enabled", "spark.conf.fs.aws.credentials.provider=org.apache.X",
         "spark.conf.spark.key=true"],
    )  # fmt: skip
    assert mask("true org.apache.X enabled") == "true org.apache.X enabled"


def test_logs_and_tracebacks_show_no_secret(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(
        "import logging\n"
        "from recspark import masking\n"
        "logging.basicConfig(level='INFO')\n"
        "masking.guard_output()\n"
        "masking.remember_secret('token', 'known-by-name')\n"
        f"logging.info('at %s', 's3a://me:{PLANTED}@lake')\n"
        "try:\n"
        f"    raise ValueError('password={PLANTED}')\n"
        "except ValueError:\n"
        "    logging.exception('known-by-name failed')\n"
        f"raise RuntimeError('https://x/?sig={PLANTED} known-by-name')\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    said = run.stdout + run.stderr
    assert run.returncode == 1
    assert said.count("***") >= 5
    # The lines of the script itself are in a traceback: they are masked like all else.
    assert PLANTED not in said
    assert "known-by-name" not in said


def test_a_record_is_masked_once_and_keeps_its_words() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(masking._Masked())
    logger = logging.getLogger("recspark.test.masking")
    logger.addHandler(handler)
    logger.warning("%d rows at %s", 3, "x")
    logger.removeHandler(handler)
    assert stream.getvalue() == "3 rows at x\n"


def test_an_error_of_another_library_is_said_without_its_secrets() -> None:
    line = error_line(ValueError(f"s3a://me:{PLANTED}@lake/x\nnot found"))
    assert line == "ValueError: s3a://me:***@lake/x not found"
    assert masking.presentable(f"\x1b[2Jtoken={PLANTED}\n", keep="\n") == "\\x1b[2Jtoken=***\n"
