"""The sampler: one pure function that runs a program over injected networks."""

from collections.abc import Callable

import numpy as np

from flowturbo.program import BlockCall, Program

Array = np.ndarray
# (call, x, v, v_net) to (x_next, v_next), all [rows, C, h, w] float32.
Block = Callable[[BlockCall, Array, Array, Array], tuple[Array, Array]]


def sample(program: Program, noise: Array, block: Block) -> Array:
    """Latents at the end of the program's time grid, from `noise` [rows, C, h, w] at its start."""
    x = noise
    v = previous = np.zeros_like(noise)
    for call in program.calls:
        v_net = previous if call.reads_previous else v
        x, v_next = block(call, x, v, v_net)
        previous = v
        v = v if call.keeps_velocity else v_next
    return x
