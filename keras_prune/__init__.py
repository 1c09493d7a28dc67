"""Structured pruning for Keras 3."""
