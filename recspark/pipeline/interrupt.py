"""Ctrl-C: print one line that says what was ended and how to go on, not the tracebacks of all
threads.
"""

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
    """Receives the text of each step of a night, passes it on, and remembers the step that runs.

    A text that ends in " ..." begins a step.

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
    open_context: Callable[[], RunContext], progress: Progress, command: str
) -> Iterator[RunContext]:
    """Yield the context of a night, and stop its session at the end.

    Ctrl-C raises Interrupted. The message says that `command` was ended, and in which step.

    Parameters
    ----------
    open_context : returns the context; Ctrl-C is handled while it runs, too
    progress : knows the step that runs
    command : what the user started, such as "stage train of the night of 2024-05-31"
    """
    ctrl_c = _CtrlC()
    context: RunContext | None = None
    try:
        with ctrl_c.listening():
            context = open_context()
        with ctrl_c.listening():  # Spark has replaced the handler meanwhile
            yield context
    except BaseException as error:
        if not ctrl_c.pressed and not isinstance(error, KeyboardInterrupt):
            raise
        # During a call of the JVM, Ctrl-C shows up as an error of py4j, not as KeyboardInterrupt.
        in_step = f" in '{progress.step}'" if progress.step else ""
        raise Interrupted(
            f"{command} was ended by Ctrl-C{in_step}; what ended before is recorded, and nothing "
            "is half written. Run the same command again to go on"
        ) from None
    finally:
        if context is not None:
            _stop(context, quietly=ctrl_c.pressed)


class _CtrlC:
    """A handler of Ctrl-C: the first press raises KeyboardInterrupt, further presses do nothing.

    Further presses come while tables and session are put in order, which they must not disturb.
    """

    def __init__(self) -> None:
        self.pressed = False

    def __call__(self, number: int, frame: object) -> None:
        if not self.pressed:
            self.pressed = True
            raise KeyboardInterrupt

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle Ctrl-C by this object within the block.

        Spark installs a handler of its own, which calls the JVM. Where Ctrl-C arrives during a call
        of the JVM, that fails, since py4j cannot make a call within a call. After the block the
        handler of before comes back, unless Ctrl-C was pressed: then this one stays.

        Only the main thread may set handlers; in another thread nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handler_before = signal.signal(signal.SIGINT, self)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, self if self.pressed else handler_before)


def _stop(context: RunContext, *, quietly: bool) -> None:
    """Stop the session. After Ctrl-C the JVM may be gone already, so errors are ignored then."""
    if not quietly:
        context.spark.stop()
        return
    with suppress(Exception):
        context.spark.stop()
