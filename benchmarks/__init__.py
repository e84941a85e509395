"""How fast Kensa serves and learns, beside anomalib on the same data in the same run."""
