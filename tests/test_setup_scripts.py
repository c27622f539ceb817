"""scripts/system.sh on made-up systems, and the checks of the two build scripts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from scripts import build_horovod, delta_jars, freeze, hashes

ROOT = Path(__file__).parent.parent
PYTHON = 'case "$1" in -c) echo "{version}" ;; -) echo "{lacks}" ;; esac'
JAVA = """echo 'openjdk version "{version}" 2025-01-01' >&2"""


class System:
    """A PATH with nothing on it but what a test puts there."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.bin = home / "bin"
        self.bin.mkdir()
        self.release = home / "os-release"
        self.env: dict[str, str] = {}
        self.put("sleep", "")
        self.is_root(True)
        self.is_a("debian", "12")

    def put(self, name: str, body: str) -> Path:
        path = self.bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
        return path

    def is_a(self, name: str, release: str) -> None:
        self.release.write_text(f'ID={name}\nVERSION_ID="{release}"\n')

    def is_root(self, root: bool) -> None:
        self.put("id", f"echo {0 if root else 1000}")

    def has_python(self, name: str = "python3.11", version: str = "3 11", lacks: str = "") -> None:
        body = PYTHON.format(version=version, lacks=lacks)
        self.put(name, body.replace("-c)", f"-c) [[ $2 == *executable* ]] && echo {name} ||"))

    def has_java(self, version: str = "17.0.15", name: str = "java") -> Path:
        return self.put(name, JAVA.format(version=version))

    def has_compiler(self) -> None:
        self.put("g++", "")

    def has_everything(self) -> None:
        self.has_python()
        self.has_java()
        self.has_compiler()

    def look(self, *options: str) -> subprocess.CompletedProcess[str]:
        env = {
            "PATH": str(self.bin),
            "RECSPARK_OS_RELEASE": str(self.release),
            "RECSPARK_JAVA_DIRS": "",
            **self.env,
        }
        return subprocess.run(
            ["/bin/bash", str(ROOT / "scripts" / "system.sh"), *options],
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def system(tmp_path: Path) -> System:
    return System(tmp_path)


def test_everything_is_there(system: System) -> None:
    system.has_everything()
    run = system.look()
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines() == [
        "PYTHON=python3.11",
        f"JAVA={system.bin}/java",
        f"CXX={system.bin}/g++",
    ]


def test_all_that_is_missing_is_named_at_once_with_one_command(system: System) -> None:
    system.put("apt-get", "echo must not run; exit 1")
    system.env["SYSTEM"] = "no"
    run = system.look()
    assert run.returncode == 3
    assert run.stdout == ""
    assert run.stderr.splitlines() == [
        "missing: Python 3.11 with its venv module and headers: "
        "no python3.11 that is Python 3.11 on PATH",
        "missing: Java 17 or 21: no java on PATH, JAVA_HOME not set",
        "missing: a C++ compiler (to build Horovod once): no c++, g++ or clang++ on PATH",
        "SYSTEM=no: nothing is installed into the system.",
        "Install with:",
        "    apt-get update && apt-get install -y --no-install-recommends "
        "python3.11 python3.11-venv python3.11-dev openjdk-17-jre-headless g++",
    ]


def test_a_user_who_is_not_root_is_told_the_sudo_command(system: System) -> None:
    system.has_python()
    system.has_compiler()
    system.is_root(False)
    system.put("apt-get", "echo must not run; exit 1")
    run = system.look()
    assert run.returncode == 3
    assert run.stderr.splitlines()[-1] == (
        "    sudo sh -c 'apt-get update && "
        "apt-get install -y --no-install-recommends openjdk-17-jre-headless'"
    )


def test_root_with_apt_installs_and_says_so(system: System) -> None:
    system.has_python()
    # This apt-get brings a Java and a compiler when it is asked for exactly them.
    java, compiler = system.has_java(name="../new/java"), system.put("../new/g++", "")
    wanted = "install -y --no-install-recommends openjdk-17-jre-headless g++"
    system.put(
        "apt-get",
        f'echo "apt-get $*"; [[ "$*" != *"{wanted}" ]] || /bin/cp {java} {compiler} {system.bin}',
    )
    run = system.look()
    assert run.returncode == 0, run.stderr
    assert (
        "installing with apt-get (SYSTEM=no forbids it): openjdk-17-jre-headless g++" in run.stderr
    )
    assert "update" in run.stderr
    assert f"JAVA={system.bin}/java" in run.stdout.splitlines()


def test_apt_is_tried_three_times_then_named(system: System) -> None:
    system.has_python()
    system.has_compiler()
    system.put("apt-get", "echo no answer; exit 100")
    run = system.look()
    assert run.returncode == 3
    assert run.stderr.count("no answer") == 3
    assert run.stderr.splitlines()[-1].endswith("openjdk-17-jre-headless")


def test_an_installation_that_brings_nothing_is_an_error(system: System) -> None:
    system.has_python()
    system.has_compiler()
    system.put("apt-get", "")
    run = system.look()
    assert run.returncode == 3
    assert "still missing after the installation: Java 17 or 21" in run.stderr


@pytest.mark.parametrize(
    ("manager", "release", "command"),
    [
        ("apt-get", ("debian", "13"), "openjdk-21-jre-headless g++"),
        ("apt-get", ("ubuntu", "24.04"), "openjdk-17-jre-headless g++"),
        ("dnf", ("fedora", "42"), "dnf install -y java-21-openjdk-headless gcc-c++"),
        ("apk", ("alpine", "3.20"), "apk add openjdk17-jre-headless g++"),
        ("brew", ("macos", ""), "brew install openjdk@17 gcc"),
    ],
)
def test_the_command_fits_the_system(
    system: System, manager: str, release: tuple[str, str], command: str
) -> None:
    system.has_python()
    system.is_a(*release)
    system.put(manager, "echo must not run; exit 1")
    system.env["SYSTEM"] = "no"
    run = system.look()
    assert run.returncode == 3
    assert run.stderr.splitlines()[-1].strip().endswith(command)
    assert "must not run" not in run.stderr


def test_without_a_package_manager(system: System) -> None:
    system.has_python()
    run = system.look()
    assert run.returncode == 3
    assert run.stderr.splitlines()[-1].startswith("No apt-get, dnf, apk or brew here")


@pytest.mark.parametrize("version", ["1.8.0_412", "11.0.2", "25"])
def test_java_of_another_version_is_not_taken(system: System, version: str) -> None:
    system.has_everything()
    system.has_java(version)
    system.env["SYSTEM"] = "no"
    run = system.look()
    assert run.returncode == 3
    major = version.split(".", maxsplit=1)[0]
    assert f"{system.bin}/java is Java {major}; Spark 4.0 runs on 17 and 21 only" in run.stderr


def test_a_good_java_beside_a_bad_one_is_found(system: System) -> None:
    system.has_everything()
    system.has_java("25")
    good = system.has_java("21.0.1", name="../jvm/java-21/bin/java")
    system.env["RECSPARK_JAVA_DIRS"] = str(good.parent.parent.resolve())
    assert f"JAVA={good.resolve()}" in system.look().stdout.splitlines()


def test_java_home_comes_first(system: System) -> None:
    system.has_everything()
    good = system.has_java("17", name="../home/bin/java")
    system.env["JAVA_HOME"] = str(good.parent.parent)
    assert f"JAVA={good}" in system.look().stdout.splitlines()


def test_python_without_venv_is_named(system: System) -> None:
    system.has_everything()
    system.has_python(lacks="ensurepip")
    system.env["SYSTEM"] = "no"
    system.put("apt-get", "")
    run = system.look()
    assert run.returncode == 3
    assert f"{system.bin}/python3.11 is there, but lacks: ensurepip" in run.stderr
    assert run.stderr.strip().endswith("python3.11 python3.11-venv python3.11-dev")


def test_no_package_of_python_311(system: System) -> None:
    system.has_everything()
    system.has_python(version="3 13")
    system.is_a("debian", "13")
    system.put("apt-get", "echo must not run; exit 1")
    run = system.look()
    assert run.returncode == 3
    assert "make setup RECSPARK_PYTHON=/path/to/python3.11" in run.stderr


def test_headers_and_compiler_are_not_asked_for_when_the_wheel_is_cached(system: System) -> None:
    system.has_python(lacks="Python.h")
    system.has_java()
    run = system.look("--no-compiler")
    assert (run.returncode, run.stderr) == (0, "")


# ------------------------------------------------------------------------------------ build scripts
def test_a_wrong_sdist_is_refused(tmp_path: Path) -> None:
    sdist = tmp_path / "horovod-0.28.1.tar.gz"
    with tarfile.open(sdist, "w:gz"):
        pass
    with pytest.raises(SystemExit, match="expected 92a43f5a94c4"):
        build_horovod.unpack(sdist, tmp_path)


def test_a_patch_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    for name, _, _ in build_horovod.PATCHES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("set(CMAKE_CXX_STANDARD 20)\n")
    with pytest.raises(SystemExit, match="matched 0 times"):
        build_horovod.patch(tmp_path)


def test_the_wheel_is_keyed_by_torch_python_and_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    key = build_horovod.wheel_key()
    assert f"-torch{build_horovod.torch_pin()}-" in key
    assert f"-cp{sys.version_info.major}{sys.version_info.minor}-" in key
    monkeypatch.setitem(build_horovod.FLAGS, "HOROVOD_WITH_MPI", "1")
    assert build_horovod.wheel_key() != key


# ------------------------------------------------------------------------------------------- hashes
@pytest.mark.parametrize("constraints", hashes.ALL, ids=lambda path: path.name)
def test_every_pin_has_its_hashes(constraints: Path) -> None:
    found = hashes.hashed(constraints)
    wanted = freeze.pinned(constraints)
    assert len(found) == len(wanted) > 100
    for line in hashes.requirements(constraints, None):
        assert re.search(r"--hash=sha256:[0-9a-f]{64}$", line), line
    text = hashes.file_of(constraints).read_text()
    assert "://" not in text  # files by their content, wherever they come from
    assert len(hashes.pins(text)) == len(wanted)


def test_a_pin_without_hashes_is_named(tmp_path: Path) -> None:
    pins = tmp_path / "constraints.txt"
    pins.write_text("# pins\na==1\nb==2\nc==3\n")
    one = f"--hash=sha256:{'0' * 64}"
    hashes.file_of(pins).write_text(f"# head\na==1 \\\n    {one}\nb==1 \\\n    {one}\nc==3\n")
    with pytest.raises(SystemExit, match="has no hashes of b==2, c==3: run `make hashes`"):
        hashes.hashed(pins)


def test_the_wheel_of_the_cache_is_installed_by_its_hash(tmp_path: Path) -> None:
    wheel = tmp_path / "horovod-0.28.1-x.whl"
    wheel.write_bytes(b"compiled")
    lines = [line for line in hashes.requirements(hashes.MAIN, wheel) if "horovod" in line]
    assert lines == [f"horovod @ file://{wheel} --hash=sha256:{build_horovod.sha256(wheel)}"]
    assert not [line for line in hashes.requirements(hashes.MAIN, None) if "horovod" in line]


def test_a_wheel_that_is_not_what_was_built_is_not_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = tmp_path / "horovod-0.28.1-x.whl"
    assert build_horovod.cached(tmp_path) is None
    wheel.write_bytes(b"compiled")
    assert build_horovod.cached(tmp_path) is None
    assert "nobody noted its SHA-256" in capsys.readouterr().err
    build_horovod.note_of(wheel).write_text(build_horovod.sha256(wheel))
    assert build_horovod.cached(tmp_path) == wheel
    wheel.write_bytes(b"compiled by somebody else")
    assert build_horovod.cached(tmp_path) is None
    assert "its SHA-256 is another" in capsys.readouterr().err


def test_setup_installs_nothing_without_a_hash() -> None:
    text = (ROOT / "scripts" / "setup.sh").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if re.search(r"pip (install|sync|download) ", line)]
    assert len(lines) == 4
    assert [line for line in lines if "hashes" not in line] == []


def test_a_wrong_jar_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spark = tmp_path / "pyspark"
    (spark / "jars").mkdir(parents=True)
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(delta_jars, "jars_folder", lambda: spark / "jars")

    def ivy(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        (home,) = [word for word in command if word.startswith("spark.jars.ivy=")]
        jars = Path(home.removeprefix("spark.jars.ivy=")) / "jars"
        jars.mkdir()
        for name in delta_jars.SHA256:
            (jars / f"io.delta_{name}").write_bytes(b"not it")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", ivy)
    with pytest.raises(SystemExit, match="expected a1e76860b19f"):
        delta_jars.resolve(cache)
    assert sorted(delta_jars.wrong(cache)) == sorted(delta_jars.SHA256)
    assert list((spark / "jars").iterdir()) == []


def test_names_are_normalised() -> None:
    assert freeze.normal("Types_PyYAML") == "types-pyyaml"


def test_what_make_starts_writes_its_bytecode() -> None:
    """Images of containers forbid it; then every process of a night compiles torch anew."""
    run = subprocess.run(
        ["make", "-s", "-C", str(ROOT), "--eval", "seen: ; @env", "seen"],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "SEEN": "yes"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "SEEN=yes" in run.stdout
    assert "PYTHONDONTWRITEBYTECODE" not in run.stdout
