"""The HTTP process. Never imports torch."""
