"""The hashes of every pinned package: ``constraints.txt`` says which, ``constraints-hashes.txt`` what.

    python scripts/hashes.py write                             ask uv for the hashes (make hashes)
    python scripts/hashes.py requirements CONSTRAINTS [WHEEL]  the lines that `make setup` installs
    python scripts/hashes.py only NAME...                      those of a few packages

The pins are for people to edit; the hashes, of all files of each version, are uv's to write. Only a file
with one of them is installed: what a registry, a mirror or a cache gives in its place is refused. The last
two commands run with any Python 3.11, before there is an environment.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

if __package__:
    from scripts import build_horovod
else:
    import build_horovod

ROOT = Path(__file__).parent.parent
MAIN = ROOT / "constraints.txt"
ALL = (MAIN, ROOT / "constraints-airflow.txt")
_HEAD = """\
# Written by `make hashes`: the SHA-256 of every file of the versions that {name} pins.
# `make setup` installs nothing else.
"""
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s\\]+)", re.M)


def file_of(constraints: Path) -> Path:
    """Return where the hashes of a constraints file are kept."""
    return constraints.with_name(f"{constraints.stem}-hashes.txt")


def pins(text: str) -> dict[str, str]:
    """Return name -> version of the pins in `text`."""
    return dict(_PIN.findall(text))


def hashed(constraints: Path) -> dict[str, str]:
    """Return name -> requirement with its hashes, of every pin, in order.

    A pin without hashes ends the program: it was changed and `make hashes` has not run.
    """
    text = file_of(constraints).read_text()
    blocks = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.M)[1:]
    lines = {(m[1], m[2]): block.rstrip() for block in blocks if (m := _PIN.match(block))}
    wanted = pins(constraints.read_text())
    lacking = [
        f"{name}=={version}"
        for name, version in wanted.items()
        if "--hash=sha256:" not in lines.get((name, version), "")
    ]
    if lacking:
        raise SystemExit(
            f"{file_of(constraints).name} has no hashes of {', '.join(lacking)}: run `make hashes`"
        )
    return {name: lines[name, version] for name, version in wanted.items()}


def requirements(constraints: Path, wheel: Path | None) -> Iterator[str]:
    """Give the requirements to install: each with its hashes, Horovod as `wheel`, or left out."""
    for name, line in hashed(constraints).items():
        if name != "horovod":
            yield line
        elif wheel is not None:
            yield f"horovod @ file://{wheel} --hash=sha256:{build_horovod.sha256(wheel)}"


def write(constraints: Path) -> None:
    """Ask uv for the hashes of every pin and write them beside it."""
    wanted = pins(constraints.read_text())
    version = wanted.pop("horovod", None)  # its sdist would be built to be looked at
    lines = [f"{name}=={pin}" for name, pin in wanted.items()]
    done = subprocess.run(
        [Path(sys.executable).parent / "uv", "pip", "compile", "-", "--generate-hashes", "--no-deps",
         "--no-annotate", "--no-header", "--python-version", "3.11", "--quiet"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"uv gave no hashes:\n{done.stderr}")
    body = done.stdout
    if version is not None:
        body += f"horovod=={version} \\\n    --hash=sha256:{build_horovod.SDIST_SHA256}\n"
    file_of(constraints).write_text(_HEAD.format(name=constraints.name) + body)
    hashed(constraints)


def main() -> None:
    """Do what the first word on the command line says."""
    command, *words = sys.argv[1:] or [""]
    if command == "write":
        for constraints in ALL:
            write(constraints)
    elif command == "requirements" and words:
        wheel = Path(words[1]) if len(words) > 1 and words[1] else None
        print("\n".join(requirements(ROOT / words[0], wheel)))
    elif command == "only" and words:
        found = hashed(MAIN)
        print("\n".join(found[name] for name in words))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
