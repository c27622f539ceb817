"""Settings of the machine: where things are kept, the Spark session, how networks train."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from recspark.config.section import Section

_NO_FOLDER = frozenset("[]{}*?\\")  # Hadoop's patterns


class Paths(Section):
    """Where things are kept. Every value is a URI or a path; a relative one starts at the working
    folder.
    """

    root: str = Field(
        "build/recspark",
        description="folder or URI; everything of one installation lives below it. A relative one "
        "starts at the working folder",
    )

    @field_validator("root")
    @classmethod
    def _is_a_folder_for_all(cls, root: str) -> str:
        """Return the root without a `/` at its end; refuse what Spark, Delta or fsspec read as
        something else than a folder's name.
        """
        folder = root.rstrip("/")
        if root != root.strip() or not folder.removeprefix("file:").removesuffix(":"):
            raise ValueError(
                "name a folder: nothing, blanks around it or the root of the machine are none"
            )
        if re.fullmatch(r"[A-Za-z][\w+.-]*:", folder):
            raise ValueError("a URI of nothing: name a bucket or a folder")
        if odd := sorted({c for c in folder if c in _NO_FOLDER or ord(c) < 32}):
            raise ValueError(
                f"{' '.join(map(repr, odd))} cannot stand in it: Spark reads it as a pattern"
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
    """What the machine or cluster decides; never part of a run's identity."""

    master: str | None = Field(
        None, description="such as local[*] or spark://host:7077; null = whatever spark-submit says"
    )
    shuffle_partitions: int = Field(
        8, ge=1, le=1_000_000, description="upper bound; AQE coalesces below it. Guess: few cores"
    )
    driver_memory: str = Field(
        "2g",
        pattern=r"^[1-9]\d*[kKmMgGtT]$",
        description="of the JVM; only for a session started by the recspark command. Guess: enough for "
        "the bundled data",
    )
    conf: dict[str, str] = Field(
        default_factory=dict,
        description="any further Spark conf, name to text; `spark.executor.pyspark.memory` limits the Python "
        "workers of an executor. Values of secrets are never stored or shown",
    )


class Train(Section):
    """What the machine decides about training; the model's own settings are not here."""

    ranks: int = Field(
        2, ge=1, le=100_000, description="Horovod ranks; 1 needs no Horovod. Guess: two cores"
    )
    threads: int = Field(
        1, ge=1, le=1024, description="torch threads per rank. A task owns one core"
    )
    start_timeout_s: int = Field(
        120, ge=1, le=86_400, description="seconds to find a slot for every rank. Guess"
    )
    timeout_s: int = Field(
        1800,
        ge=1,
        le=604_800,
        description="seconds without an exchange between ranks, of which a step has one or more, "
        "until a training counts as hung and is ended. Guess",
    )
    seed: int = Field(
        1, ge=1, lt=2**31, description="of initial weights and of the order of rows; any number"
    )
    accumulate: int = Field(
        1,
        ge=1,
        le=100_000,
        description="parts in which a rank reads its share of a step: more need less memory. Source: "
        "none is needed for the models here",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of a network's products; parameters stay float32"
    )
    compression: Literal["none", "float16"] = Field(
        "none",
        description="of dense gradients between ranks: float16 sends half as much, and rounds",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where networks train; auto = a GPU where the rank sees one"
    )
    checkpoint_every_s: float = Field(
        30, ge=0, le=604_800, description="seconds between two checkpoints; 0 = each epoch. Guess"
    )

    def arithmetic(self) -> dict[str, Any]:
        """Return the settings that change a trained weight; the others change only where and when
        it is computed.
        """
        return self.model_dump(
            include={"ranks", "seed", "accumulate", "precision", "compression"}, mode="json"
        )
