"""Choosing a schedule for a deployed model: time against quality."""
