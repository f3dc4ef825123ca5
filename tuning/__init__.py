"""Chooses schedules for a deployed pipeline: candidates, scores, presets."""
