"""Ctrl-C and SIGTERM during a training: the first asks for a checkpoint and a stop, the second stops at once."""

import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

logger = logging.getLogger("vlreft")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, FrameType | None], Any] | int


class Interruptions:
    """Catch SIGINT and SIGTERM inside `with`; `asked` is the first one that came.

    Signals that are ignored, as under nohup, stay so. Outside of the main thread, which alone may handle signals,
    nothing is caught.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Handler] = {}
        self._pid = os.getpid()

    def __enter__(self) -> Self:
        """Put the handlers in."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before is not None and before != signal.SIG_IGN:  # None: not Python's, it could not be put back
                    self._before[number] = before
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        """Put back those that were there."""
        while self._before:
            signal.signal(*self._before.popitem())

    def stop(self, message: str) -> None:
        """End the training: raises KeyboardInterrupt after SIGINT, SystemExit with 128 + 15 after SIGTERM."""
        logger.warning("%s", message)
        if self.asked == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt(message)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            self._handle_in_a_child(number)
            return
        first, self.asked = self.asked, signal.Signals(number)
        if first is not None:
            self.__exit__()
            self.stop("stopped at once, as asked twice; nothing was saved")
        logger.warning("%s: saving at the end of this step, then stopping; once more stops at once", self.asked.name)

    def _handle_in_a_child(self, number: int) -> None:
        """A forked process has this handler too: Ctrl-C reaches it as well, but who forked it will end it."""
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
