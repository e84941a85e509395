"""From a picture to a verdict, and which version gives it."""
