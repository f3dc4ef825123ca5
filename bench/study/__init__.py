"""Quality against time, with the paper's ablations: `python -m bench.study`."""
