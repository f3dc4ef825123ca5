"""How good images are, by any sampler, beside real ones: `python -m research.quality`."""
