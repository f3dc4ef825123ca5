"""The sampler: one pure function that runs a program over injected networks."""

from collections.abc import Callable

import numpy as np

from flowturbo.program import BlockCall, Program

Array = np.ndarray
# (call, x, v) to (x_next, v_next), all [rows, C, h, w] float32.
Block = Callable[[BlockCall, Array, Array], tuple[Array, Array]]


def sample(program: Program, noise: Array, block: Block) -> Array:
    """Latents at the end of the program's time grid, from `noise` [rows, C, h, w] at its start."""
    x, v = noise, np.zeros_like(noise)
    for call in program.calls:
        x, v = block(call, x, v)
    return x
