"""A version in memory: opened, warm, in batches, compared with another one."""
