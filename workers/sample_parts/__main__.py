"""`python -m workers.sample_parts`."""

import sys

from workers.sample_parts.drawing import main

sys.exit(main())
