"""From image bytes to a verdict. Never imports torch."""

import os
import sys

# numpy's OpenBLAS would take a thread for each core, of those that the search in a memory bank and
# the engine have taken. A search in a process without this computed ten times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy is loaded

# OpenVINO tells Google Analytics of every start, from a fork of the process that imports it. No
# factory wants the first, and no process that uses a GPU the second. Without it a stub is taken.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
