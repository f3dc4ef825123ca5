"""The public reference implementation's samples, in this process and through a real server."""

from pathlib import Path

import numpy as np
import pytest
import torch
from flowturbo_client import FlowTurboClient
from support import GOLDEN, GoldenCase, golden_cases

from flowturbo import LocalPipeline
from flowturbo.nets.checkpoint import build_network
from flowturbo.nets.weights import load_checkpoint
from flowturbo.serving.tritonserver import ServerAddress

CASES = pytest.mark.parametrize(
    "case", golden_cases(), ids=lambda case: f"{case.schedule}-{case.guidance_scale}"
)


@pytest.mark.parametrize("name", ["predictor", "refiner"])
def test_networks(name: str) -> None:
    arrays = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / "cases.npz").items()}
    reads_velocity = name == "refiner"
    network = build_network(
        load_checkpoint(GOLDEN / f"{name}.pt"), reads_velocity=reads_velocity, num_heads=2
    )
    x = torch.cat([arrays["net_x"], arrays["net_v"]], 1) if reads_velocity else arrays["net_x"]
    torch.testing.assert_close(
        network(x, arrays["net_t"], arrays["net_y"]), arrays[f"net_{name}"], atol=1e-6, rtol=1e-5
    )


@CASES
def test_in_process(case: GoldenCase, golden_repository: Path) -> None:
    result = LocalPipeline(golden_repository).generate(
        case.label,
        initial_noise=case.noise,
        schedule=case.schedule,
        guidance_scale=case.guidance_scale,
        variant="reference",
    )
    assert result.image is None
    np.testing.assert_allclose(result.latent, case.latent, atol=1e-4)


def test_the_paper_variant_differs(golden_repository: Path) -> None:
    case = next(case for case in golden_cases() if "R" in case.schedule)
    pipeline = LocalPipeline(golden_repository)
    start = {"initial_noise": case.noise, "schedule": case.schedule}
    reference, paper = (
        pipeline.generate(case.label, **start, variant=variant).latent
        for variant in ("reference", "paper")
    )
    assert np.abs(reference - paper).max() > 1e-4


@CASES
def test_served(case: GoldenCase, golden_server: ServerAddress) -> None:
    with FlowTurboClient(golden_server.grpc) as client:
        result = client.generate(
            case.label,
            initial_noise=case.noise,
            schedule=case.schedule,
            guidance_scale=case.guidance_scale,
            outputs=("latent",),
        )
    np.testing.assert_allclose(result.latents, case.latent, atol=1e-4)


def test_unguided_is_guidance_by_one(golden_repository: Path) -> None:
    """A scale just off 1 runs guided rows; 1.0 itself runs one row per image: nearly the same."""
    case = golden_cases()[0]
    pipeline = LocalPipeline(golden_repository)
    one, almost = (
        pipeline.generate(case.label, initial_noise=case.noise, guidance_scale=scale).latent
        for scale in (1.0, 1.0 + 1e-6)
    )
    np.testing.assert_allclose(one[:, :3], almost[:, :3], atol=1e-4)
