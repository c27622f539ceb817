"""A second Python process, which loads saved models and answers queries without Spark.

It has never seen the fits of the models. Run as a module it reads lines from standard input. Each
line is a JSON list with the arguments of one call of `answer`. For each it prints one line, also
JSON: the text `answered`, or the traceback.
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
    """The second process, as seen from the first one. It serves one model after another."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self.end)

    def ask(self, *arguments: str) -> str:
        """Call `answer(*arguments)` in the other process; return `answered`, or the traceback."""
        requests, replies = self._process.stdin, self._process.stdout
        assert requests is not None
        assert replies is not None
        requests.write(json.dumps(arguments) + "\n")
        requests.flush()
        line = replies.readline()
        return str(json.loads(line)) if line else "the other process has ended"

    def end(self) -> None:
        """End the process."""
        self._process.communicate()


@cache
def other_process() -> OtherProcess:
    """Return the second process of this process. The first call starts it."""
    return OtherProcess()


def answer(folder: str, name: str, queries_path: str, lists_path: str, k: str) -> None:
    """Answer queries with the saved model `name` of `folder`.

    Reads the queries from the Arrow file `queries_path`, and writes the lists of `k` items to the
    Arrow file `lists_path`.
    """
    model = artifacts.load(folder, model_spec(name))
    assert isinstance(model, RetrieverModel)
    with pa.OSFile(queries_path) as source:
        batch = pa.ipc.open_file(source).read_all().combine_chunks().to_batches()[0]
    lists = topk.answer(parse_queries(batch), model.items, model.scorer(), int(k))
    with pa.OSFile(lists_path, "wb") as sink, pa.ipc.new_file(sink, lists.schema) as writer:
        writer.write(lists)


def serve() -> None:
    """Answer requests until standard input ends."""
    for line in sys.stdin:
        try:
            answer(*json.loads(line))
            reply = "answered"
        except Exception:
            reply = traceback.format_exc()
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
