"""From image bytes to a verdict. Never imports torch."""
