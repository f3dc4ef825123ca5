"""How many GPUs a rate needs, on paper; docs/sizing.md has the model."""
