"""Ctrl-C: one line that says what ended and how to go on, instead of the tracebacks of every thread."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from recspark.errors import Interrupted

if TYPE_CHECKING:
    from recspark.pipeline.context import RunContext


class Progress:
    """Told of each step of a night; passes it on, and knows which one runs.

    >>> told = Progress(lambda text: None)
    >>> told("train ease ...")
    >>> told.step
    'train ease'
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.step = ""

    def __call__(self, text: str) -> None:
        if text.endswith(" ..."):
            self.step = text.removesuffix(" ...")
        self.say(text)


@contextmanager
def opened(
    open_context: Callable[[], RunContext], progress: Progress, what: str
) -> Iterator[RunContext]:
    """Give the context of a night, whose session is stopped at the end. Ctrl-C raises Interrupted,
    which says that `what` ended in the step that ran.
    """
    key = _CtrlC()
    context: RunContext | None = None
    try:
        with key.listening():
            context = open_context()
        with key.listening():  # Spark has put its own handler in the place of ours
            yield context
    except BaseException as error:
        if not key.pressed and not isinstance(error, KeyboardInterrupt):
            raise
        # Within a call of the JVM it comes out as an error of py4j.
        where = f" in '{progress.step}'" if progress.step else ""
        raise Interrupted(
            f"{what} was ended by Ctrl-C{where}; what ended before is recorded, and nothing is half "
            "written. Run the same command again to go on"
        ) from None
    finally:
        if context is not None:
            _stop(context, quietly=key.pressed)


class _CtrlC:
    """What Ctrl-C does: once KeyboardInterrupt; after that nothing, while things are put in order."""

    def __init__(self) -> None:
        self.pressed = False

    def __call__(self, number: int, frame: object) -> None:
        if not self.pressed:
            self.pressed = True
            raise KeyboardInterrupt

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signal within the block; Spark's own handler calls the JVM from within a call of
        it, which py4j cannot. After it was pressed no other handler comes back.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, self if self.pressed else before)


def _stop(context: RunContext, *, quietly: bool) -> None:
    """Stop the session; after Ctrl-C the JVM may be gone already."""
    if not quietly:
        context.spark.stop()
        return
    with suppress(Exception):
        context.spark.stop()
