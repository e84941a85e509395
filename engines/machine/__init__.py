"""What this machine has, what work needs of it, and whether a job fits."""
