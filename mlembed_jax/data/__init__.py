"""Text to fixed-shape batches. Nothing in this package imports jax."""
