"""Checkpoints to a model repository: `python -m export`."""
