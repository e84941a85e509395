"""One file per model kind, each reading straight down: train, update, graph."""
