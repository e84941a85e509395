"""`python -m workers.jobs`: take jobs until told to stop."""

import sys

from workers.jobs.worker import main

sys.exit(main())
