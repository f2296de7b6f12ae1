"""Hugging Face folders in both directions. Nothing in this package imports torch."""
