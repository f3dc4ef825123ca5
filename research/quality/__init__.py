"""Image quality of any sampler, against real images: `python -m research.quality`."""
