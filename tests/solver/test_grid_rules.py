"""Pipelines' own grids are those of diffusers."""

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from flowturbo.solver.grid import GridRule, time_grid

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("tokens", "steps"), [(64, 4), (4096, 9), (4096, 50), (4300, 28), (9000, 8)]
)
def test_flux2(tokens: int, steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = compute_empirical_mu(tokens, steps)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    found = time_grid(steps, GridRule(flux2=True).shift_for(tokens, steps))
    np.testing.assert_allclose(found, 1 - scheduler.sigmas.numpy(), atol=1e-6)


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_a_line_by_tokens(tokens: int) -> None:
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    rule = GridRule(linear=(256, 0.5, 4096, 1.15))
    assert rule.shift_for(tokens, 8) == pytest.approx(np.exp(mu))
    assert not rule.is_fixed and GridRule(shift=3.0).is_fixed
    assert GridRule(shift=3.0).shift_for(tokens, 8) == 3.0
