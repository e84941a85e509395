"""What both ends of the queue agree on: the server that asks, the worker that does."""
