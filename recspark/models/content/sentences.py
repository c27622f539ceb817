"""Vectors of whole texts by a sentence encoder that was trained elsewhere.

The encoder is a folder that the package sentence-transformers saves and reads. recspark neither
ships nor asks for the package: it is used where it is installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field

from recspark import storage
from recspark.data.blocks import Array
from recspark.data.dataset import Dataset
from recspark.data.vector_files import folder_sha256
from recspark.errors import ConfigError, ModelError, SetupError
from recspark.models.base import NOTHING, Algorithm, FitOptions, Needed
from recspark.models.content.settings_only import SettingsOnlyEncoder
from recspark.models.content.texts import Part, TextSettings, texts_of
from recspark.models.kinds import Kind

_PACKAGE = "sentence_transformers"
_NO_WORDS = "no words"


class SentencesSettings(TextSettings):
    """Settings of `Sentences`."""

    folder: str = Field(
        "",
        description="local folder of the encoder, as sentence-transformers saves it. The driver and "
        "every executor read it under this path",
    )
    sha256: str = Field(
        "",
        pattern="^([0-9a-f]{64})?$",
        description="SHA-256 of the list of the folder's files with their checksums: `find . -type f | "
        "LC_ALL=C sort | cut -c3- | xargs -d '\\n' sha256sum | sha256sum` in it",
    )


class SentencesModel(SettingsOnlyEncoder):
    """Names a folder and its checksum, which the settings hold."""

    settings: SentencesSettings

    def coder(self) -> SentencesCoder:
        """See `EncoderModel`."""
        return SentencesCoder(self.settings.folder, self.settings.sha256, self.settings.parts)


@dataclass(frozen=True)
class SentencesCoder:
    """Each worker loads the encoder once, at its first item.

    Texts are encoded one by one, because the rounding of a network's products depends on the number
    of rows that are computed together.
    """

    folder: str
    sha256: str
    parts: tuple[Part, ...]

    def encode(self, batch: pa.RecordBatch) -> Array:
        """See `Coder`."""
        return self.encode_or_explain(batch)[0]

    def encode_or_explain(self, batch: pa.RecordBatch) -> tuple[Array, list[str | None]]:
        """See `ExplainingCoder`."""
        encoder = encoder_of(self.folder, self.sha256)
        size = int(encoder.get_sentence_embedding_dimension())
        vectors = np.full((batch.num_rows, size), np.nan, np.float32)
        problems: list[str | None] = [None] * batch.num_rows
        for row, text in enumerate(texts_of(batch, self.parts)):
            if not text.strip():
                problems[row] = _NO_WORDS
                continue
            given = encoder.encode(
                [text], batch_size=1, convert_to_numpy=True, show_progress_bar=False
            )
            vectors[row] = np.asarray(given)[0]
        return vectors, problems


@lru_cache(maxsize=1)
def encoder_of(folder: str, sha256: str) -> Any:
    """Return the sentence encoder of a folder; the last one is kept in memory.

    Raises SetupError where the package is not installed, ModelError where the folder is missing, has
    another checksum, or cannot be read by the package. Code that lies in the folder is not run. torch
    computes on one thread from then on, as a Spark task has one core.
    """
    try:
        package: Any = importlib.import_module(_PACKAGE)
    except ImportError as error:
        raise SetupError(
            f"sentences needs the package sentence-transformers ({error}): install it where the driver "
            "and the executors run, or take word_vectors, paragraph_vectors or file_vectors"
        ) from None
    path = storage.absolute(folder)
    if not storage.is_local(path) or (not storage.folders(path) and not storage.list_files(path)):
        raise ModelError(
            f"sentences: {folder} is no local folder with files; copy the encoder there, on every "
            "machine that runs the driver or an executor"
        )
    actual = folder_sha256(path)
    if actual != sha256:
        raise ModelError(
            f"sentences: {folder} has SHA-256 {actual}, the settings say {sha256 or 'none'}"
        )
    torch.set_num_threads(1)
    try:
        return package.SentenceTransformer(path, device="cpu", local_files_only=True)
    except Exception as error:  # the package and those below it raise errors of many classes
        first_line = str(error).split("\n", 1)[0]
        raise ModelError(
            f"sentences: {folder}: no encoder that sentence-transformers reads: {first_line}"
        ) from None


class Sentences(Algorithm[SentencesSettings]):
    """The vector that a sentence encoder gives the item's text, which it cuts off where it ends.

    Nothing is learned here, so a night encodes only items that are new or described anew.

    Source: Reimers and Gurevych 2019, "Sentence-BERT".
    """

    settings_class = SentencesSettings
    learns = False

    def check_needs(self, kinds: Mapping[str, Kind]) -> None:
        """See `Algorithm`. Built on no model. Raises ConfigError without a folder."""
        super().check_needs(kinds)
        if not self.settings.folder or not self.settings.sha256:
            raise ConfigError(
                "sentences needs the settings folder (of a sentence encoder) and sha256 (the checksum "
                "of its files); recspark ships none"
            )

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> SentencesModel:
        """See `Algorithm.fit`. The driver loads the encoder once, to check it."""
        self.check_needs({})
        encoder_of(self.settings.folder, self.settings.sha256)
        return SentencesModel(self.settings, data.cutoff)
