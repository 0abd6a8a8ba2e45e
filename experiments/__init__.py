"""Apps turn flags into files. No other package imports absl."""

import os
import sys

# Set these before the imports of Matplotlib and tqdm, which read them.
os.environ["MPLBACKEND"] = "agg"  # the backend of a notebook cannot be imported here
if not (sys.stderr and sys.stderr.isatty()):
    os.environ.setdefault("TQDM_MININTERVAL", "60")  # seconds between lines in a log
