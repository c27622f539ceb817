"""Put the Delta jars into the pyspark of this virtual environment.

Run with its interpreter::

    .venv/bin/python scripts/delta_jars.py CACHE_DIR

Spark's own Ivy resolves them once, their SHA-256 is checked, and they are kept in ``CACHE_DIR``. A
copy in ``pyspark/jars`` puts Delta on the class path of every driver and executor that this
environment starts, so that no later start needs ``--packages``, ``--jars`` or the network.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

VERSION = "4.0.1"
COORDINATES = f"io.delta:delta-spark_2.13:{VERSION}"
# Spark ships this one itself, in the same version.
EXCLUDED = "org.antlr:antlr4-runtime"
SHA256 = {
    f"delta-spark_2.13-{VERSION}.jar": (
        "a1e76860b19fe1e6b205a4ea7a9099a2f9575d39bb71d49b3e679b299d0efb91"
    ),
    f"delta-storage-{VERSION}.jar": (
        "ecc42c5aaa51c423312d9e4e48aa4a12b34740bf2c37de0e8f279277ec3d12e4"
    ),
}
TRIES = 3


def jars_folder() -> Path:
    """Return the ``jars`` folder of the installed pyspark, without importing it."""
    spec = find_spec("pyspark")
    if spec is None or spec.origin is None:
        raise SystemExit(f"pyspark is not installed in {sys.prefix}")
    return Path(spec.origin).parent / "jars"


def sha256(path: Path) -> str:
    """Return the file's SHA-256 in hex, "missing" when there is no such file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"


def wrong(folder: Path) -> dict[str, str]:
    """Return the jars that `folder` lacks or holds with another sum: name to what was found."""
    found = {name: sha256(folder / name) for name in SHA256}
    return {name: found[name] for name in SHA256 if found[name] != SHA256[name]}


def resolve(cache: Path) -> None:
    """Let Spark's Ivy download the jars into `cache`; a wrong sum is an error."""
    spark_home = jars_folder().parent
    env = os.environ | {"SPARK_HOME": str(spark_home), "PYSPARK_PYTHON": sys.executable}
    with tempfile.TemporaryDirectory(prefix=".ivy-", dir=cache) as scratch:
        script = Path(scratch) / "nothing.py"
        script.write_text("")
        command = [str(spark_home / "bin" / "spark-submit"), "--packages", COORDINATES]
        command += ["--exclude-packages", EXCLUDED, "--conf", f"spark.jars.ivy={scratch}"]
        command.append(str(script))
        for attempt in range(1, TRIES + 1):
            run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            if run.returncode == 0:
                break
            print(f"resolving {COORDINATES} failed (try {attempt} of {TRIES})", flush=True)
            if attempt == TRIES:
                print(run.stdout[-2000:], run.stderr[-4000:], file=sys.stderr)
                raise SystemExit("the Delta jars could not be resolved: is a registry reachable?")
            time.sleep(5 * attempt)
        for name, expected in SHA256.items():
            source = Path(scratch) / "jars" / f"io.delta_{name}"
            found = sha256(source)
            if found != expected:
                raise SystemExit(
                    f"{name}: sha256 is {found}, expected {expected}; nothing was installed"
                )
            source.rename(cache / name)


def main() -> None:
    """Fill the cache if need be, then copy the jars into pyspark."""
    cache = Path(sys.argv[1])
    cache.mkdir(parents=True, exist_ok=True)
    if wrong(cache):
        resolve(cache)
    target = jars_folder()
    for old in target.glob("delta-*.jar"):
        if old.name not in SHA256:
            old.unlink()
    for name in wrong(target):
        partial = target / f".{name}.partial"
        shutil.copy(cache / name, partial)
        partial.rename(target / name)
    print(f"Delta {VERSION} in {target}")


if __name__ == "__main__":
    main()
