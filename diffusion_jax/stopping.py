"""Signals that ask a loop to end in its own time."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Request:
    """Which signal has asked for the end, if any."""

    by: signal.Signals | None = None


@contextmanager
def on_signals() -> Iterator[Request]:
    """Take note of the first SIGINT or SIGTERM within the body; a second one ends the process."""
    request = Request()

    def note(number: int, frame: FrameType | None) -> None:
        request.by = signal.Signals(number)
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    before = {each: signal.signal(each, note) for each in SIGNALS}
    try:
        yield request
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
