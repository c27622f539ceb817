"""What networks read of a picture or a sound: arrays of one size, and training files of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, ByteType, DataType, FloatType, IntegerType

from recspark import schema, storage
from recspark.data import media, spectrogram
from recspark.data.blocks import Array, local_index
from recspark.data.dataset import TrainingSet
from recspark.data.media import Kind, MediaError, Source
from recspark.data.training_rows import fixed_lists, spread

TABLE = "training_media"
_ROWS_PER_BATCH = 64  # rows of a batch that Spark writes


class Reader(Protocol):
    """Turns the bytes of a file into arrays of one size. It is sent to the executors."""

    @property
    def kind(self) -> Kind:
        """Which of an item's media it reads."""

    @property
    def columns(self) -> Mapping[str, DataType]:
        """The Spark type of each array in a training file: a list, or a number."""

    def read(self, data: bytes) -> dict[str, Array]:
        """Return the array of each column. Raises MediaError."""


@dataclass(frozen=True)
class ImageReader:
    """A picture squeezed into a square: `pixels` int8 (size * size * 3,), bytes less 128."""

    size: int
    max_pixels: int
    kind: Kind = "image"

    @property
    def columns(self) -> Mapping[str, DataType]:
        """See `Reader`. Spark has no unsigned bytes."""
        return {"pixels": ArrayType(ByteType())}

    def read(self, data: bytes) -> dict[str, Array]:
        """See `Reader`."""
        pixels = media.squeezed(media.decode_image(data, self.max_pixels, self.size), self.size)
        return {"pixels": (pixels.astype(np.int16) - 128).astype(np.int8).ravel()}


@dataclass(frozen=True)
class SoundReader:
    """A sound as frames: `frames` float32 (max_frames * n_bands,), padded with 0, and `n_frames`.

    Parameters
    ----------
    rate : samples per second that a sound is brought to
    n_bands : mel bands
    window, step : samples of a frame, and between two frames
    excerpt_seconds : the middle of a longer sound is read
    max_seconds : a longer sound is refused
    """

    rate: int
    n_bands: int
    window: int
    step: int
    excerpt_seconds: float
    max_seconds: float
    kind: Kind = "sound"

    @property
    def max_frames(self) -> int:
        """The number of frames of an excerpt of full length, with one more for rounding."""
        n_samples = int(np.ceil(self.excerpt_seconds * self.rate))
        return spectrogram.n_frames(n_samples, self.window, self.step) + 1

    @property
    def columns(self) -> Mapping[str, DataType]:
        """See `Reader`."""
        return {"frames": ArrayType(FloatType()), "n_frames": IntegerType()}

    def read(self, data: bytes) -> dict[str, Array]:
        """See `Reader`."""
        samples = media.decode_sound(data, self.rate, self.max_seconds, self.excerpt_seconds)
        logs = spectrogram.log_mel(samples, self.rate, self.n_bands, self.window, self.step)
        logs = logs[: self.max_frames]
        frames = np.zeros((self.max_frames, self.n_bands), np.float32)
        frames[: len(logs)] = logs
        return {"frames": frames.ravel(), "n_frames": np.array(len(logs), np.int32)}


def write_training_media(
    content: DataFrame,
    source: Source,
    reader: Reader,
    items: Array,
    targets: Array,
    folder: str,
    n_files: int,
) -> TrainingSet:
    """Write a row for each item whose picture (or sound) can be read, and return the files.

    Parameters
    ----------
    content : `schema.CONTENT` of the items to learn from; others than `items` are left out
    items : item_idx int32 (n_items,), ascending
    targets : float32 (n_items, K), in the order of `items`: what is to be predicted
    folder : URI of the folder of the files; a folder that is complete is used as it is

    The columns are item_idx, those of the reader, and `target`. Rows lie in the file that a hash of
    the item gives, sorted by item, so neither the files nor their order depend on how `content` is
    partitioned. Cost: one shuffle of the items' addresses, and one job that fetches and decodes each
    file once.
    """
    if not storage.is_complete(folder):
        columns = schema.columns(
            item_idx=schema.INT, **reader.columns, target=ArrayType(FloatType())
        )
        addresses = content.select("item_idx", "media")
        shared = content.sparkSession.sparkContext.broadcast((items, targets))
        in_order = spread(addresses, F.xxhash64("item_idx"), n_files).sortWithinPartitions(
            "item_idx"
        )

        def decode(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            known_items, target_of_item = shared.value
            for batch in batches:
                for begin in range(0, batch.num_rows, _ROWS_PER_BATCH):
                    rows = _rows(batch.slice(begin, _ROWS_PER_BATCH), source, reader, known_items)
                    if rows is not None:
                        item_idx, arrays = rows
                        local = local_index(known_items, item_idx)
                        yield pa.RecordBatch.from_arrays(
                            [
                                pa.array(item_idx),
                                *arrays.values(),
                                fixed_lists(target_of_item[local]),
                            ],
                            names=columns.names,
                        )

        storage.remove(folder)
        try:
            in_order.mapInArrow(decode, columns).write.parquet(folder)
        finally:
            shared.destroy()
        storage.mark_complete(folder)
    files = [uri for uri in storage.list_files(folder) if uri.endswith(".parquet")]
    return TrainingSet.of_files(TABLE, 0, files)


def _rows(
    batch: pa.RecordBatch, source: Source, reader: Reader, items: Array
) -> tuple[Array, dict[str, pa.Array]] | None:
    """Return the items that can be read, int32 (n,), and their columns; None where there is none."""
    item_idx = batch.column("item_idx").to_numpy()
    is_known = local_index(items, item_idx) >= 0
    item_idx = item_idx[is_known]
    media_of_items = batch.column("media").filter(pa.array(is_known)).to_pylist()
    kept, inputs = [], []
    for item, data in zip(
        item_idx, media.fetched(source, media_of_items, reader.kind), strict=True
    ):
        if isinstance(data, MediaError):
            continue
        try:
            inputs.append(reader.read(data))
        except MediaError:
            continue
        kept.append(item)
    if not kept:
        return None
    arrays = {}
    for name in reader.columns:
        values = np.stack([arrays_of_item[name] for arrays_of_item in inputs])  # (n, ...)
        arrays[name] = fixed_lists(values) if values.ndim > 1 else pa.array(values)
    return np.array(kept, np.int32), arrays
