"""Capacity planning: how many GPUs a request rate needs. docs/sizing.md has the model."""
