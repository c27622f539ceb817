"""Write every package of this environment, at its version, into ``constraints.txt``.

Run it after changing a package by hand, then read the diff. The comment at the head of the file is
kept; recspark itself is left out, and Horovod is written with the version of its sdist. The hashes of
all files of these versions go into ``constraints-hashes.txt``.
"""

from __future__ import annotations

import re
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

if __package__:
    from scripts import hashes
else:
    import hashes

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


def normal(name: str) -> str:
    """Return the normalised form of a distribution's name: ``Types_PyYAML`` is ``types-pyyaml``."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Return the version of every distribution in this environment but recspark."""
    # Not sys.path as it is: importing setuptools puts its own vendored packages there.
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    found = {normal(d.metadata["Name"]): d.version for d in distributions(path=places)}
    found.pop("recspark", None)
    return dict(sorted(found.items()))


def pinned(path: Path = CONSTRAINTS) -> dict[str, str]:
    """Return the pins of a constraints file."""
    pins = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)$", path.read_text(), re.M)
    return {normal(name): version for name, version in pins}


def main() -> None:
    """Rewrite the file and say what changed."""
    before, now = pinned(), installed()
    head = [line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("#")]
    body = [f"{name}=={version}" for name, version in now.items()]
    CONSTRAINTS.write_text("\n".join(head + body) + "\n")
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            print(f"{name}: {before.get(name, 'new')} -> {now.get(name, 'gone')}")
    hashes.write(CONSTRAINTS)


if __name__ == "__main__":
    main()
