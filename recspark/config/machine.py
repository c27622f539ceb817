"""Settings of the machine: where files are kept, the Spark session, and how networks train."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from recspark.config.section import Section

_PATTERN_SIGNS = frozenset("[]{}*?\\")  # Hadoop reads a path with one of them as a pattern


class Paths(Section):
    """Where tables, artifacts, checkpoints and reports are kept."""

    root: str = Field(
        "build/recspark",
        description="folder or URI. Everything that belongs to one installation is below it. A "
        "relative path starts at the working folder",
    )

    @field_validator("root")
    @classmethod
    def _is_a_folder_for_all(cls, root: str) -> str:
        """Return the root without a `/` at its end.

        Refuse a text that Spark, Delta or fsspec would not read as the name of a folder.
        """
        folder = root.rstrip("/")
        if root != root.strip() or not folder.removeprefix("file:").removesuffix(":"):
            raise ValueError(
                "name a folder: nothing, blanks around it or the root of the machine are none"
            )
        if re.fullmatch(r"[A-Za-z][\w+.-]*:", folder):
            raise ValueError("a URI of nothing: name a bucket or a folder")
        if bad_signs := sorted({c for c in folder if c in _PATTERN_SIGNS or ord(c) < 32}):
            raise ValueError(
                f"{' '.join(map(repr, bad_signs))} cannot stand in it: Spark reads it as a pattern"
            )
        if "::" in folder:
            raise ValueError("'::' cannot stand in it: it chains file systems")
        if folder.startswith("~"):
            raise ValueError("'~' is no folder here: write the home folder out")
        return folder

    @property
    def tables(self) -> str:
        return f"{self.root}/tables"

    @property
    def artifacts(self) -> str:
        return f"{self.root}/artifacts"

    @property
    def checkpoints(self) -> str:
        return f"{self.root}/checkpoints"

    @property
    def reports(self) -> str:
        return f"{self.root}/reports"


class Spark(Section):
    """The Spark session on this machine or cluster; never part of a run's identity."""

    master: str | None = Field(
        None,
        description="the Spark master, such as local[*] or spark://host:7077; null = the one that "
        "spark-submit names",
    )
    shuffle_partitions: int = Field(
        8,
        ge=1,
        le=1_000_000,
        description="partitions of a shuffle, at most; Spark's adaptive query execution (AQE) "
        "merges small ones. Guess: for few cores",
    )
    driver_memory: str = Field(
        "2g",
        pattern=r"^[1-9]\d*[kKmMgGtT]$",
        description="memory of the driver's JVM. It applies only to a session that the command "
        "`recspark` starts. Guess: enough for the bundled data",
    )
    conf: dict[str, str] = Field(
        default_factory=dict,
        description="further settings of Spark, name -> text. `spark.executor.pyspark.memory` "
        "limits the memory of an executor's Python workers. Values of secrets are never stored or "
        "shown",
    )


class Train(Section):
    """How networks train on this machine or cluster. The settings of each model are not here."""

    ranks: int = Field(
        2,
        ge=1,
        le=100_000,
        description="Horovod ranks that train together; 1 needs no Horovod. Guess: two cores",
    )
    threads: int = Field(
        1, ge=1, le=1024, description="torch threads per rank. 1, because a Spark task has one core"
    )
    start_timeout_s: int = Field(
        120,
        ge=1,
        le=86_400,
        description="seconds, at most, to find a free slot for every rank. Guess",
    )
    timeout_s: int = Field(
        1800,
        ge=1,
        le=604_800,
        description="seconds without an exchange between the ranks, after which a training counts "
        "as hung and is ended. Every step has at least one exchange. Guess",
    )
    seed: int = Field(
        1,
        ge=1,
        lt=2**31,
        description="seed of the initial weights and of the order of rows; any number",
    )
    accumulate: int = Field(
        1,
        ge=1,
        le=100_000,
        description="parts in which a rank reads its rows of one step. More parts need less "
        "memory. Source: none; the models here need no more than one part",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="number type of the products in a network; the parameters stay float32",
    )
    compression: Literal["none", "float16"] = Field(
        "none",
        description="number type in which ranks send dense gradients: float16 sends half the "
        "bytes, and rounds; none sends them as they are",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="where networks train; auto = a GPU where the rank sees one, else the CPU",
    )
    checkpoint_every_s: float = Field(
        30,
        ge=0,
        le=604_800,
        description="seconds between two checkpoints; 0 = a checkpoint after each epoch. Guess",
    )

    def arithmetic(self) -> dict[str, Any]:
        """Return the settings that change a trained weight.

        The other settings change only where and when the weight is computed.
        """
        return self.model_dump(
            include={"ranks", "seed", "accumulate", "precision", "compression"}, mode="json"
        )
