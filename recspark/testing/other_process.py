"""A Python that never saw the fits: it loads saved models and answers queries, without Spark.

Run as a module it reads one JSON list of arguments a line and says `answered`, or the traceback.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import traceback
from functools import cache

import pyarrow as pa

from recspark.data.blocks import parse_queries
from recspark.models import artifacts
from recspark.models.base import RetrieverModel
from recspark.models.registry import model_spec
from recspark.models.scoring import topk


class OtherProcess:
    """Starts once, and answers for one model after another."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self.end)

    def ask(self, *arguments: str) -> str:
        """Call `answer` there; return `answered`, or its traceback."""
        into, out = self._process.stdin, self._process.stdout
        assert into is not None
        assert out is not None
        into.write(json.dumps(arguments) + "\n")
        into.flush()
        line = out.readline()
        return str(json.loads(line)) if line else "the other process has ended"

    def end(self) -> None:
        """End the process."""
        self._process.communicate()


@cache
def other_process() -> OtherProcess:
    """Return the one of this process."""
    return OtherProcess()


def answer(folder: str, name: str, asked: str, got: str, k: str) -> None:
    """Answer the queries of Arrow file `asked` by the model saved in `folder`, into file `got`."""
    model = artifacts.load(folder, model_spec(name))
    assert isinstance(model, RetrieverModel)
    with pa.OSFile(asked) as source:
        batch = pa.ipc.open_file(source).read_all().combine_chunks().to_batches()[0]
    lists = topk.answer(parse_queries(batch), model.items, model.scorer(), int(k))
    with pa.OSFile(got, "wb") as sink, pa.ipc.new_file(sink, lists.schema) as out:
        out.write(lists)


def serve() -> None:
    """Answer until standard input ends."""
    for line in sys.stdin:
        try:
            answer(*json.loads(line))
            told = "answered"
        except Exception:
            told = traceback.format_exc()
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
