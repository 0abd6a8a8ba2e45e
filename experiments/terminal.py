"""What the apps print: without what would steer a terminal, and going on where nobody reads it."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

# Names in files of others may hold escape sequences. Tabs, new lines and returns (of bars) stay.
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
CONTROLS = {code: text for code, text in CONTROLS.items() if chr(code) not in "\t\n\r"}


class Output:
    """A text stream whose words are lost, and no more, where they cannot be written.

    After `| head -1`, on a full disk, or with the stream closed, the work goes on.
    """

    def __init__(self, stream: TextIO | None):
        """Write to a stream; None is one that was closed before the start."""
        self.stream = stream or io.StringIO()

    def __getattr__(self, name: str) -> Any:
        """All else is the stream's own."""
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write printable text."""
        coding = self.stream.encoding or "utf-8"
        plain = text.translate(CONTROLS).encode(coding, "backslashreplace").decode(coding)
        try:
            self.stream.write(plain)
        except OSError:
            self._lose()
        return len(text)

    def flush(self) -> None:
        """Write what is held back."""
        try:
            self.stream.flush()
        except OSError:
            self._lose()

    def _lose(self) -> None:
        """Send to nowhere what is held back and what follows, so that no end of it fails again."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)


@contextmanager
def outputs(out: TextIO | None, err: TextIO | None) -> Iterator[None]:
    """Print by Output in the body."""
    streams = Output(out), Output(err)
    with redirect_stdout(cast(Any, streams[0])), redirect_stderr(cast(Any, streams[1])):
        try:
            yield
        finally:
            for stream in streams:
                stream.flush()
