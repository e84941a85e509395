"""From image bytes to a verdict. Never imports torch."""

import sys

# OpenVINO tells Google Analytics of every start, from a fork of the process that imports it. No
# factory wants the first, and no process that uses a GPU the second. Without it a stub is taken.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
