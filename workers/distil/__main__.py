"""`python -m workers.distil`."""

import sys

from workers.distil.teacher import main

sys.exit(main())
