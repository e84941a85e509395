"""How fast Kensa serves and learns, beside anomalib on the same data in the same run."""

import engines  # noqa: F401 (numpy takes one thread, as in the server, if it is loaded later)
