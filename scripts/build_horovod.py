"""Build the Horovod wheel (PyTorch + Gloo, CPU) from its sdist, once per torch version.

Run with the interpreter of the virtual environment that already holds torch, setuptools,
packaging, cmake and ninja::

    .venv/bin/python scripts/build_horovod.py SDIST CACHE_DIR

The sdist's SHA-256 is checked, three small patches are applied (see ``PATCHES``), and the wheel is
kept in ``CACHE_DIR`` under a name that holds the torch version, the Python tag, the machine and a
hash of everything that decides the result, so a second clone of the project finds it there.
Its own SHA-256 is noted beside it: a wheel that is another one now is not taken, it is built again.
The last line on standard output is the path of the wheel. With ``--cached CACHE_DIR`` any Python
3.11 says where the wheel is (nothing when it must be built).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

VERSION = "0.28.1"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"

# (file, pattern, replacement). Each pattern must match exactly once: a changed sdist is an error,
# not a silent no-op.
PATCHES = (
    # torch >= 2.1 headers need C++17; upstream pull request 3998 made the same change.
    ("CMakeLists.txt", r"set\(CMAKE_CXX_STANDARD 14\)", "set(CMAKE_CXX_STANDARD 17)"),
    (
        "horovod/torch/CMakeLists.txt",
        r"set\(CMAKE_CXX_STANDARD 14\)",
        "set(CMAKE_CXX_STANDARD 17)",
    ),
    # PyPI's torch is the CUDA build. With any trace of a CUDA toolkit on the machine, CMake would
    # enable the CUDA language (and fail on half an installation) ...
    (
        "CMakeLists.txt",
        r"check_language\(CUDA\)\nif\(NOT CMAKE_CUDA_COMPILER\)(?s:.*?)\nmacro\(ADD_CUDA\)",
        "# CUDA is never looked for: this is a CPU build\n\nmacro(ADD_CUDA)",
    ),
    # ... and FindPytorch would choose the CUDA extension. Choose the CPU one, whatever is there.
    (
        "cmake/Modules/FindPytorch.cmake",
        r"if \(Pytorch_CUDA OR Pytorch_ROCM\)",
        'set(Pytorch_CUDA "FALSE")\nset(Pytorch_ROCM "FALSE")\nif (Pytorch_CUDA OR Pytorch_ROCM)',
    ),
    (
        "cmake/Modules/FindPytorch.cmake",
        r"\nif\(Pytorch_ROCM\)\n",
        '\nset(Pytorch_ROCM "FALSE")\nif(Pytorch_ROCM)\n',
    ),
    # No debug symbols: a third less work for the compiler, and a much smaller wheel.
    (
        "CMakeLists.txt",
        r'string\(REPLACE "-O2" "-O3" CMAKE_CXX_FLAGS_RELWITHDEBINFO',
        'string(REPLACE "-O2 -g" "-O3" CMAKE_CXX_FLAGS_RELWITHDEBINFO',
    ),
)

FLAGS = {
    "HOROVOD_WITH_PYTORCH": "1",
    "HOROVOD_WITHOUT_TENSORFLOW": "1",
    "HOROVOD_WITHOUT_MXNET": "1",
    "HOROVOD_WITH_GLOO": "1",
    "HOROVOD_WITHOUT_MPI": "1",
    "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # the bundled gloo asks for less than CMake 4 accepts
    "CMAKE_GENERATOR": "Ninja",  # from PyPI, so that `make` is not needed for it
}


def torch_pin() -> str:
    """Return the torch version that ``constraints.txt`` pins."""
    text = (Path(__file__).parent.parent / "constraints.txt").read_text()
    (pin,) = re.findall(r"^torch==(\S+)$", text, re.M)
    return str(pin)


def wheel_key() -> str:
    """Return the cache key: torch version, Python tag, machine, hash of patches and flags."""
    recipe = json.dumps([VERSION, SDIST_SHA256, PATCHES, FLAGS], sort_keys=True)
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return f"horovod-{VERSION}-torch{torch_pin()}-{tag}-{platform.machine()}-{digest}"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def note_of(wheel: Path) -> Path:
    """Return where the SHA-256 of a built wheel is noted."""
    return wheel.with_name(f"{wheel.name}.sha256")


def cached(folder: Path) -> Path | None:
    """Return the wheel in `folder`, None where there is none that is as it was built."""
    for wheel in sorted(folder.glob("*.whl")):
        note = note_of(wheel)
        if not note.is_file():
            why = "nobody noted its SHA-256 when it was built"
        elif note.read_text().strip() != sha256(wheel):
            why = "it is not what was built: its SHA-256 is another"
        else:
            return wheel
        print(f"{wheel} is not taken, {why}; it is built again", file=sys.stderr)
    return None


def unpack(sdist: Path, into: Path) -> Path:
    """Unpack the checked sdist and return the source folder; a wrong hash is an error."""
    found = sha256(sdist)
    if found != SDIST_SHA256:
        raise SystemExit(f"{sdist}: sha256 is {found}, expected {SDIST_SHA256}; delete it, re-run")
    with tarfile.open(sdist) as archive:
        archive.extractall(into)  # no `filter`: Python 3.11.2 lacks it, and the hash is known
    return into / f"horovod-{VERSION}"


def patch(source: Path) -> None:
    """Apply ``PATCHES`` in place; a pattern that does not match exactly once is an error."""
    for name, pattern, replacement in PATCHES:
        path = source / name
        text, count = re.subn(pattern, replacement, path.read_text())
        if count != 1:
            raise SystemExit(f"{path}: {pattern!r} matched {count} times, expected 1")
        path.write_text(text)


def build(source: Path, log: Path) -> Path:
    """Compile the wheel, with a line every 20 seconds; the compiler's output goes to `log`."""
    scripts = sysconfig.get_path("scripts")
    env = {name: value for name, value in os.environ.items() if not name.startswith("HOROVOD_")}
    env |= FLAGS
    env |= {
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "HOROVOD_CMAKE": str(Path(scripts) / "cmake"),
        "MAKEFLAGS": env.get("MAKEFLAGS") or f"-j{os.cpu_count()}",
    }
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", "dist"]
    begun = float(os.environ.get("RECSPARK_BEGUN", time.time()))
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=source, env=env, stdout=out, stderr=out, start_new_session=True
        )
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=20)
                    break
                steps = re.findall(r"^\[(\d+)/(\d+)\]", log.read_text(errors="replace"), re.M)
                done = "/".join(steps[-1]) + " files compiled" if steps else "configuring"
                print(f"[{time.time() - begun:4.0f} s] horovod: {done}", file=sys.stderr)
        finally:  # when this script is stopped, so are the compilers
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
    if process.returncode:
        # The compiler's last words stand before Python's traceback.
        words = log.read_text(errors="replace").split("Traceback (most recent call last)")[0]
        print("\n".join(words.splitlines()[-30:]), file=sys.stderr)
        raise SystemExit(f"horovod: the build failed; whole output in {log}")
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel


def main() -> None:
    """Build the wheel unless the cache has it, and print its path."""
    parser = argparse.ArgumentParser(description="Build the Horovod wheel, or say where it is.")
    parser.add_argument("--requirement", action="store_true", help="print the sdist as a pip line")
    parser.add_argument("--cached", action="store_true", help="only say what is there")
    parser.add_argument("paths", type=Path, nargs="*", help="SDIST CACHE, or CACHE with --cached")
    options = parser.parse_args()
    if options.requirement:
        print(f"horovod=={VERSION} --hash=sha256:{SDIST_SHA256}")
        return
    cache: Path = options.paths[-1]
    folder = cache / wheel_key()
    found = cached(folder)
    if options.cached or found:
        print(found or "")
        return
    if version("torch").split("+")[0] != torch_pin():
        raise SystemExit(f"torch {version('torch')} is installed, {torch_pin()} is pinned")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="horovod-build-") as scratch:
        source = unpack(options.paths[0], Path(scratch))
        patch(source)
        wheel = build(source, cache / f"{wheel_key()}.log")
        # Two clones may build at once: write beside, then rename.
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
        partial.chmod(0o755)
        built = Path(shutil.copy(wheel, partial))
        note_of(built).write_text(f"{sha256(built)}\n")
        if not cached(folder):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            partial.rename(folder)
        except OSError:  # the other one was first; its wheel is the same
            shutil.rmtree(partial)
    print(cached(folder))


if __name__ == "__main__":
    main()
