"""Trains multilingual text encoders that can be cut in dimension, depth and embedding rank."""

__version__ = "0.1.0"
