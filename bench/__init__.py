"""Benchmarks: how fast the service is, and how close it comes to the hardware's limits."""
