"""The worker: takes jobs from the queue, and gives each a process of its own."""
