"""One run: its inputs, one update, its state, checkpoints and metrics."""
