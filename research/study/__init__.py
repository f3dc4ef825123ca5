"""Quality against time, with the paper's ablations: `python -m research.study`."""
