"""Everything that learns or converts. torch and anomalib live here only."""
