"""Package metadata. Ranges are wide here; the exact versions tested are in ``constraints.txt``."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION_FILE = (ROOT / "recspark" / "version.py").read_text()
VERSION = re.findall(r'^__version__ = "(.+)"$', VERSION_FILE, re.M)[0]

RUNTIME = [
    "delta-spark>=4.0.1,<4.1",
    "deltalake>=1.6,<2",  # `recspark show` and the like read the tables without Spark; no pyarrow
    "fsspec>=2024.2",
    "numba>=0.60",  # the inner loops of als and item2vec
    "numpy>=1.26,<2",  # petastorm 0.12 and its pyarrow
    "pandas>=2.2,<3",
    "polars>=2,<3",
    "psutil>=5.9",
    "pyarrow>=14,<15",  # petastorm uses the dataset interface removed in 15
    "pydantic>=2.6,<3",
    "pyspark>=4.0.1,<4.1",
    "pyyaml>=6",
    "rich>=13.7",
    "scipy>=1.12",
    "typer>=0.12",
]
EXTRAS = {
    "train": [
        "torch>=2.5",
        "torchvision>=0.20",  # the networks of the encoder of images; it decodes no file
        "petastorm==0.12.1",  # 0.13 loses rows (docs/architecture.md)
        "horovod>=0.28.1,<0.29",  # built by scripts/build_horovod.py
        "xgboost-cpu>=3.2,<4",  # the trees of lambdamart; without the GPU libraries of xgboost
    ],
    "tune": ["optuna>=4"],
    "report": ["matplotlib>=3.8"],
    "bench": ["gensim>=4.3", "implicit>=0.7.2"],  # the peers that benchmarks measure against
    "dev": [
        "codespell>=2.3",
        "hypothesis>=6.100",
        "import-linter>=2.1",
        "ipykernel>=6.29",
        "mypy>=1.14",
        "nbclient>=0.10",
        "nbformat>=5.10",
        "pandas-stubs>=2.2,<2.3",
        "polars>=2,<3",  # another team's reader of the tables
        "pre-commit>=4",
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.9",
        "threadpoolctl>=3.5",
        "types-psutil>=5.9",
        "types-PyYAML>=6",
    ],
}
EXTRAS["all"] = sorted({name for extra in EXTRAS.values() for name in extra})


class BuildWithConf(build_py):
    """Put the top-level ``conf/`` into the wheel as ``recspark/_conf``.

    An editable install does not need the copy: the code finds ``conf/`` beside the package.
    """

    def run(self) -> None:
        """Build the modules, then copy the configuration files."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "recspark" / "_conf"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "conf", target)


setup(
    name="recspark",
    version=VERSION,
    description="A nightly recommender on Spark: raw events to fresh top-N lists in Delta tables",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.12",
    packages=find_packages(include=["recspark", "recspark.*"]),
    package_data={"recspark": ["py.typed"]},
    cmdclass={"build_py": BuildWithConf},
    install_requires=RUNTIME,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["recspark = recspark.cli:main"]},
    zip_safe=False,
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Typing :: Typed",
    ],
)
