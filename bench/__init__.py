"""Measurements: how fast, and how close to what the hardware can do."""
