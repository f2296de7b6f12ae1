"""Held-out quality of every slice of a model."""
