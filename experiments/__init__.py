"""Apps: flags in, files out. The only place that knows absl."""

import os
import sys

# Set before Matplotlib and tqdm are imported, which read them then.
os.environ["MPLBACKEND"] = "agg"  # a notebook's own cannot be imported here
if not (sys.stderr and sys.stderr.isatty()):
    os.environ.setdefault("TQDM_MININTERVAL", "60")  # seconds between lines in a log
