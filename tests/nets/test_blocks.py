"""The refiner's block against its equations, written out for one image at a time."""

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.networks import SMALL, random_network
from flowturbo.nets.blocks import RefinerBlock
from flowturbo.nets.sit import ByLabel, SiT, refiner_config
from flowturbo.rows import block_inputs, interleave
from flowturbo.solver.calls import RefinerCall, Variant
from flowturbo.solver.guidance import Guidance
from flowturbo.solver.program import compile_program
from flowturbo.solver.schedule import Schedule

pytestmark = pytest.mark.unit

NULL = SMALL.num_classes


@pytest.mark.parametrize("variant", Variant)
@pytest.mark.parametrize(
    "guidance", [Guidance(2.5), Guidance(2.5, (0.0, 0.6))], ids=["all", "part"]
)
def test_refiner_step(variant: Variant, guidance: Guidance) -> None:
    """From t = 0.5 to 1; in part of the times guided, at the start of the step alone."""
    call = compile_program(Schedule.parse("E1R1"), variant=variant).calls[1]
    assert isinstance(call, RefinerCall)
    network = random_network(refiner_config(SMALL), seed=1)
    rng = np.random.default_rng(0)
    x, v = rng.standard_normal((2, 3, 4, 8, 8)).astype(np.float32)
    labels = np.array([[1], [2], [3]])
    rows = [interleave(value, value) for value in (x, v)]
    inputs = block_inputs(
        call, *rows, {"label": interleave(labels, np.array([[NULL]]))}, guidance, guided=True
    )
    found = RefinerBlock(ByLabel(network), 4)(*map(torch.from_numpy, inputs.values()))
    for image in range(3):
        for got, want in zip(
            found, refined(network, call, x[image], v[image], image + 1, guidance), strict=True
        ):
            torch.testing.assert_close(got[2 * image], want, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(got[2 * image + 1], want, atol=2e-5, rtol=1e-4)


def refined(
    network: SiT, call: RefinerCall, x: np.ndarray, v: np.ndarray, label: int, guidance: Guidance
) -> tuple[Tensor, Tensor]:
    """FlowTurbo, Eq. 7: the state after the step and the velocity that it keeps."""

    def change(x: Tensor, v: Tensor, t: float) -> Tensor:
        read, at = torch.cat([x, v])[None], torch.tensor([t])
        c, u = (network(read, at, torch.tensor([y]))[0] for y in (label, NULL))
        return u + guidance.scale * (c - u) if guidance.applies_at(t) else c

    x0, v0, h = torch.from_numpy(x), torch.from_numpy(v), call.end - call.t
    d = v0 + change(x0, v0, call.t)
    d_next = d + change(x0 + h * d, d if call.reads_refined else v0, call.end)
    return x0 + h / 2 * (d + d_next), d
