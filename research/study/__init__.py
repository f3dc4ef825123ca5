"""Image quality against time, and the paper's ablations: `python -m research.study`."""
