"""Signals that ask a loop to end after its current step."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Request:
    """The signal that has asked for the end, or None."""

    by: signal.Signals | None = None


@contextmanager
def on_signals() -> Iterator[Request]:
    """Record the first SIGINT or SIGTERM within the body; a second one ends the process.

    The exit code is then 128 + the signal's number. Python's own handlers would wait until the main
    thread has finished a compilation or a dispatch.
    """
    request = Request()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] in SIGNALS and request.by:
                os._exit(128 + number[0])
            elif number[0] in SIGNALS:
                request.by = signal.Signals(number[0])
        os.close(reader)

    before = {each: signal.signal(each, lambda *_: None) for each in SIGNALS}
    others = signal.set_wakeup_fd(writer)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(others)
        os.close(writer)
        for each, handler in before.items():
            signal.signal(each, handler)
