"""Print without control characters, and go on if nobody reads the output."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

# File names from others can contain escape sequences. Tabs, new lines and returns are kept.
CODES = {*range(32), *range(127, 160)} - set(map(ord, "\t\n\r"))
CONTROLS = {code: f"\\x{code:02x}" for code in CODES}


class Output:
    """A text stream that drops text after an error of writing, so that the app goes on.

    Such errors happen after `| head -1`, on a full disk, or if the stream is closed.
    """

    def __init__(self, stream: TextIO | None):
        """Write to a stream. None is a stream that was closed before the start."""
        self.stream = stream or io.StringIO()

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute of the stream."""
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write text with its control characters escaped."""
        coding = self.stream.encoding or "utf-8"
        plain = text.translate(CONTROLS).encode(coding, "backslashreplace").decode(coding)
        self._attempt(self.stream.write, plain)
        return len(text)

    def flush(self) -> None:
        """Write the buffered text."""
        self._attempt(self.stream.flush)

    def _attempt(self, call: Callable, *args: Any) -> None:
        """Call a function. If it fails, discard the buffered text and all later text."""
        try:
            call(*args)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


@contextmanager
def outputs(out: TextIO | None, err: TextIO | None) -> Iterator[None]:
    """Print through Output in the body."""
    streams = Output(out), Output(err)
    with redirect_stdout(cast(Any, streams[0])), redirect_stderr(cast(Any, streams[1])):
        try:
            yield
        finally:
            for stream in streams:
                stream.flush()
