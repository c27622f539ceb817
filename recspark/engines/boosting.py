"""Gradient-boosted trees, grown by xgboost on several Spark tasks that work together."""

from __future__ import annotations

import json
import logging
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from py4j.protocol import Py4JJavaError
from pyspark import BarrierTaskContext
from pyspark.errors.exceptions.captured import CapturedException
from pyspark.sql import DataFrame
from pyspark.sql.types import BinaryType

from recspark import schema
from recspark.config import Train
from recspark.data.blocks import Array
from recspark.data.feature_encoding import Encoding, parse_encoded
from recspark.errors import RankFailedError, java_message
from recspark.train.launch import await_slots

log = logging.getLogger(__name__)
_SPARK_ERRORS = (Py4JJavaError, CapturedException)
# The driver hears of a lost executor a moment after the tasks that needed it have failed. Without a
# pause, the second try could be sent to the executor that is gone.
_SETTLING_S = 5
_TREES = schema.columns(trees=BinaryType())
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Boosting:
    """How trees are grown.

    Parameters
    ----------
    params : parameters of xgboost
    n_trees : rounds of boosting, one tree each
    train : `ranks` is the number of workers: Spark tasks that grow the trees together, each on its
        share of the groups. `threads` is the number of threads of each. A worker that waits for
        another one for `timeout_s` ends with an error
    """

    params: Mapping[str, Any]
    n_trees: int
    train: Train


def grow_trees(
    rows: DataFrame, group: Sequence[str], order: Sequence[str], encoding: Encoding, how: Boosting
) -> bytes:
    """Return the trees that rank the rows of each group by `label`, as the JSON text of xgboost.

    Parameters
    ----------
    rows : the columns `group` and `order`, label float, and the features as `encoding` encodes them
    group : the columns whose values name a group; only rows of one group are compared
    order : columns that give the rows of a group a unique order

    A group goes whole to one worker. Which worker that is, and the order of its rows, follow from
    the values alone. So the trees have the same bits in whatever order and partitions the rows
    come; another number of workers or threads may give other trees. One shuffle by group; one
    barrier stage, whose tasks all run at once and exchange histograms of gradients. Memory of a
    worker, for each feature of each of its rows, measured by `benchmarks/trees_memory.py`: 10 to 14
    bytes while the rows are read and put into bins, 2 to 4 bytes after that, while trees grow.

    Where a worker is lost, the others cannot go on, and Spark does not run a barrier stage again
    whose results go to the driver. So the trees are grown anew, once. A machine that was taken away
    is a matter of chance, and a second try then succeeds. After a second failure the cause is most
    likely one that returns, such as too little memory, and each further try would cost as much.

    An error in the code that a worker runs would return in every try. It is raised at once, as
    Spark's error with the traceback of the worker.

    Raises RankFailedError after the second failure, NoSlotsError where the cluster has too few task
    slots for all workers at once.
    """
    spark = rows.sparkSession
    sorted_rows = rows.repartition(how.train.ranks, *group).sortWithinPartitions(*group, *order)

    def grow(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        yield from _grow(batches, group, encoding, how)

    def grown() -> bytes:
        # A new DataFrame for each try: an adaptive plan keeps the failure of its last stage, and
        # would raise it again without running anything (Spark 4.0, SPARK-51008).
        [row] = sorted_rows.mapInArrow(grow, _TREES, barrier=True).collect()
        return bytes(row["trees"])

    await_slots(spark, how.train)
    try:
        return grown()
    except _SPARK_ERRORS as error:
        if _is_code_error(error):
            raise
        log.warning("growing the trees failed, and is tried once more: %s", java_message(error))
        time.sleep(_SETTLING_S)
        await_slots(spark, how.train, after_a_loss=True)
        try:
            return grown()
        except _SPARK_ERRORS as second_error:
            if _is_code_error(second_error):
                raise
            raise RankFailedError(
                f"growing the trees on {how.train.ranks} workers failed twice, at last by: "
                f"{java_message(second_error)}. If a worker was lost both times, it probably ran "
                "out of memory: give the executors more of it (spark.conf: "
                "spark.executor.memoryOverhead), spread the examples over more workers "
                "(train.ranks), or make fewer of them (examples.max_users, examples.n_negatives). "
                f"If workers waited in vain for {how.train.timeout_s} s, raise train.timeout_s. "
                "The logs of the executors say which it was; then run the stage again"
            ) from second_error


def feature_matrix(numbers: Array, fields: Array) -> Array:
    """Return what trees read of n pairs: float32 (n, n_numbers + n_fields).

    The codes of fields come after the numbers; infinite numbers become the largest finite ones.
    """
    return np.concatenate([np.clip(numbers, -_LARGEST, _LARGEST), fields], axis=1, dtype=np.float32)


def feature_types(encoding: Encoding) -> list[str]:
    """Return xgboost's type of each column of `feature_matrix`: q = number, c = category."""
    return ["q"] * len(encoding.numbers) + ["c"] * len(encoding.fields)


def _grow(
    batches: Iterable[pa.RecordBatch], group: Sequence[str], encoding: Encoding, how: Boosting
) -> Iterator[pa.RecordBatch]:
    """Grow the trees together with the other workers; the first worker yields them."""
    with _code_errors_marked(n_workers=1):  # nothing is exchanged yet
        share = read_share(batches, group, encoding)
    context = BarrierTaskContext.get()
    with _meeting(context, how.train), _code_errors_marked(how.train.ranks):
        trees = grow_on_share(share, encoding, how)
    context.barrier()
    if context.partitionId() == 0:
        yield pa.RecordBatch.from_arrays([pa.array([trees], pa.binary())], names=_TREES.names)


class WorkerCodeError(Exception):
    """The code of a worker raised an error that no lost worker explains.

    The message is the traceback of that error: Spark hands the driver no cause of an error.
    """


@contextmanager
def _code_errors_marked(n_workers: int) -> Iterator[None]:
    """Raise WorkerCodeError from any error that is not the sign of a lost worker.

    Too little memory is such a sign. So is an error of xgboost where there are several workers:
    each of the others gets one when it waits for the worker that was lost. Such an error is raised
    after a pause, so that the driver hears first of the failure that is its cause, if there is one.
    """
    from xgboost.core import XGBoostError

    try:
        yield
    except MemoryError:
        raise
    except XGBoostError as error:
        if n_workers == 1:
            raise WorkerCodeError(traceback.format_exc()) from error
        time.sleep(_SETTLING_S)
        raise
    except Exception as error:
        raise WorkerCodeError(traceback.format_exc()) from error


def _is_code_error(error: Exception) -> bool:
    """Return whether the failure of a job began with WorkerCodeError in one of its tasks."""
    return WorkerCodeError.__name__ in str(error)


def read_share(
    batches: Iterable[pa.RecordBatch], group: Sequence[str], encoding: Encoding
) -> list[Array]:
    """Return what a worker reads of its n rows: the `feature_matrix`, the labels, float32 (n,), and
    the number of each row's group, int64 (n,), ascending.
    """
    features, labels, groups = [], [], []
    n_groups = -1
    last_group: dict[str, Any] | None = None
    for batch in batches:
        features.append(feature_matrix(*parse_encoded(batch, encoding)))
        labels.append(batch.column("label").to_numpy())
        is_first, last_group = _group_starts(batch, group, last_group)
        groups.append(n_groups + np.cumsum(is_first))
        n_groups += int(is_first.sum())
    n_columns = len(encoding.numbers) + len(encoding.fields)
    return [
        np.concatenate([np.empty((0, n_columns), np.float32), *features]),
        np.concatenate([np.empty(0, np.float32), *labels]),
        np.concatenate([np.empty(0, np.int64), *groups]),
    ]


def grow_on_share(share: list[Array], encoding: Encoding, how: Boosting) -> bytes:
    """Return the trees that this worker grows with the workers that it has met.

    `share` : as `read_share` returns it. It is empty afterwards: the matrix is let go as soon as
    xgboost has put its numbers into bins.
    """
    import xgboost

    matrix, label, group = share
    share.clear()
    with xgboost.config_context(verbosity=1):
        data = xgboost.QuantileDMatrix(
            matrix,
            label=label,
            qid=group,
            feature_types=feature_types(encoding),
            enable_categorical=True,
            max_bin=how.params["max_bin"],
            nthread=how.train.threads,
        )
        del matrix
        params = {**how.params, "nthread": how.train.threads}
        return bytes(xgboost.train(params, data, how.n_trees).save_raw("json"))


def _group_starts(
    batch: pa.RecordBatch, group: Sequence[str], last_group: dict[str, Any] | None
) -> tuple[Array, dict[str, Any] | None]:
    """Return which rows are the first of their group, bool (n,), and the group of the last row.

    `last_group` : the group of the row before the batch; None = there is none.
    """
    if batch.num_rows == 0:
        return np.zeros(0, bool), last_group
    is_first = np.zeros(batch.num_rows, bool)
    for name in group:
        codes = batch.column(name).dictionary_encode().indices.to_numpy(zero_copy_only=False)
        is_first[1:] |= codes[1:] != codes[:-1]
    first, last = (
        {name: batch.column(name)[row].as_py() for name in group} for row in (0, batch.num_rows - 1)
    )
    is_first[0] = first != last_group
    return is_first, last


def _meeting(context: BarrierTaskContext, train: Train) -> AbstractContextManager[Any]:
    """Return the context in which this task exchanges sums with the other workers.

    The first worker runs the tracker, through which the others find each other. An exchange that
    takes longer than `train.timeout_s` is an error, so that no worker waits for ever for one that
    was lost.
    """
    if train.ranks == 1:
        return nullcontext()
    from xgboost.collective import CommunicatorContext
    from xgboost.tracker import RabitTracker

    arguments: dict[str, Any] = {}
    if context.partitionId() == 0:
        host = context.getTaskInfos()[0].address.rpartition(":")[0]
        tracker = RabitTracker(
            n_workers=train.ranks, host_ip=host, sortby="task", timeout=train.timeout_s
        )
        tracker.start()
        threading.Thread(target=tracker.wait_for, daemon=True).start()
        arguments = {**tracker.worker_args(), "dmlc_timeout": train.timeout_s}
    [text, *_] = context.allGather(json.dumps(arguments))
    return CommunicatorContext(**json.loads(text), dmlc_task_id=str(context.partitionId()))
