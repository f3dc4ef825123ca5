"""Exports checkpoints to a model repository: `python -m export`."""
