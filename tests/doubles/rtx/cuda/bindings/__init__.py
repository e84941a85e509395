"""A double of cuda-bindings: what of it Kensa uses."""
