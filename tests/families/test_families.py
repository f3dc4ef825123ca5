"""Every model family against diffusers' own pipeline: tiny random folders, exported in float32."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from families.conftest import GOLDEN, NAMES, Case

from flowturbo import LocalPipeline
from flowturbo.latents import noise
from flowturbo.nets.families.family import Family, Wanted
from flowturbo.nets.families.loading import load_family
from flowturbo.solver.calls import BlockCall
from flowturbo.solver.program import compile_program
from flowturbo.solver.sampler import sample
from flowturbo.solver.schedule import Schedule

PROMPTS = ["a red b on 7!", "k left of 9, blue"]
SIZE = (16, 16)


def wanted(family: Family, guidance: float, size: tuple[int, int] = SIZE) -> Wanted:
    start = noise(np.arange(2), family.latent_shape(size))
    return Wanted(PROMPTS, start, 4, guidance, size, family.text_length)


def close(found: np.ndarray, want: np.ndarray) -> bool:
    return bool(np.abs(found - want).max() < 1e-4 * np.abs(want).max())


@pytest.mark.parametrize("size", [SIZE, (16, 24)])
@pytest.mark.parametrize("name", NAMES)
def test_the_pipeline_of_diffusers(
    name: str, size: tuple[int, int], cases: dict[str, Case], repository: Path
) -> None:
    """With its own times; its decoder's pixels, and its encoder's latents."""
    family = load_family(cases[name].options)
    vae = load_vae(cases[name].options.path / "vae")
    pipeline = LocalPipeline(repository, name)
    for guidance in (1.0, 4.0):
        asked = wanted(family, guidance, size)
        want, times = family.reference(asked)
        made = pipeline.generate(
            prompt=PROMPTS,
            schedule="E4",
            times=times,
            guidance_scale=guidance,
            initial_noise=asked.noise,
            size=size[::-1],
        )
        assert close(made.latent, want)
        with torch.inference_mode():
            pixels = decoded(vae, torch.from_numpy(made.latent))
        assert made.image is not None and made.image.shape == (2, *size, 3)
        assert np.abs(made.image.astype(int) - pixels).max() <= 1
        # A step that hardly moves: the latent of the image.
        known = pipeline.generate(
            prompt=PROMPTS[0],
            schedule="E1",
            guidance_scale=1.0,
            image=made.image,
            times=[1.0, 0.999999],
            invert=True,
            size=size[::-1],
        )
        with torch.inference_mode():
            want = encoded(vae, torch.from_numpy(made.image)).numpy()
        assert np.abs(known.latent - want).max() < 1e-3 * np.abs(want).max()


def load_vae(folder: Path) -> Any:
    """The VAE as diffusers reads it."""
    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    return getattr(diffusers, kind).from_pretrained(folder, torch_dtype=torch.float32).eval()


def encoded(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """As diffusers' pipelines for editing do it, with the mean of the posterior."""
    config = vae.config
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    z: torch.Tensor = vae.encode(pixels).latent_dist.mean
    if "batch_norm_eps" not in config:
        return (z - (config.shift_factor or 0)) * config.scaling_factor
    rows, channels, high, wide = z.shape
    z = z.view(rows, channels, high // 2, 2, wide // 2, 2).permute(0, 1, 3, 5, 2, 4)
    z = z.reshape(rows, channels * 4, high // 2, wide // 2)
    std = (vae.bn.running_var + config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    return (z - vae.bn.running_mean.view(1, -1, 1, 1)) / std


def decoded(vae: Any, latent: torch.Tensor) -> np.ndarray:
    """As diffusers' pipelines do it, from the configuration of the VAE."""
    config = vae.config
    if "batch_norm_eps" in config:
        std = (vae.bn.running_var + config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
        z = latent * std + vae.bn.running_mean.view(1, -1, 1, 1)
        rows, channels, high, wide = z.shape
        z = z.reshape(rows, channels // 4, 2, 2, high, wide).permute(0, 1, 4, 2, 5, 3)
        z = z.reshape(rows, channels // 4, high * 2, wide * 2)
    else:
        z = latent / config.scaling_factor + (config.shift_factor or 0)
    image = (vae.decode(z).sample / 2 + 0.5).clamp(0, 1) * 255
    levels: np.ndarray = image.round().permute(0, 2, 3, 1).numpy().astype(int)
    return levels


@pytest.mark.parametrize("schedule", ["E3", "H2P2", "A4@3", "H1P1Z1@1"])
@pytest.mark.parametrize("name", NAMES)
def test_solvers_are_a_plain_loop_over_the_network(
    name: str, schedule: str, cases: dict[str, Case], repository: Path
) -> None:
    """The same network in PyTorch, with guidance, on the grid that the schedule names."""
    family = load_family(cases[name].options)
    pipeline = LocalPipeline(repository, name)
    shape = family.latent_shape(SIZE)
    start = noise(np.arange(2), shape)
    made = pipeline.generate(
        prompt=PROMPTS, schedule=schedule, guidance_scale=3.0, initial_noise=start
    )
    condition = pipeline.pipeline.condition
    parsed = condition.parse({"prompt": np.array(PROMPTS, object)}, 2, guided=True)
    with torch.inference_mode():
        encoded = family.text_encoder(*map(torch.from_numpy, parsed.tokens.values()))  # type: ignore[attr-defined]
        of = [[each[list(rows)] for each in encoded] for rows in (parsed.rows, [2, 2])]  # type: ignore[attr-defined]

        def block(call: BlockCall, x: torch.Tensor, v: torch.Tensor | float) -> tuple:
            read = x + call.euler * v
            t = torch.full((2,), call.t)
            c, u = (family.network(read, t, *each) for each in of)
            v_next = u + 3.0 * (c - u)
            return x + call.w_prev * v + call.w_next * v_next, v_next

        own, times = pipeline.pipeline.on_own_grid(Schedule.parse(schedule), shape)
        want = sample(compile_program(own, times), torch.from_numpy(start), block)
    assert close(made.latent, want.numpy())


def test_golden_figures(repository: Path) -> None:
    """Made by a plain loop over diffusers' network; ours agree to 1e-5."""
    pipeline = LocalPipeline(repository, "golden")
    figures = np.load(GOLDEN / "cases.npz")
    for case in json.loads((GOLDEN / "cases.json").read_text())["cases"]:
        made = pipeline.generate(
            prompt=case["prompt"],
            negative_prompt=case.get("negative_prompt"),
            schedule=case["schedule"],
            guidance_scale=case["guidance_scale"],
            initial_noise=figures["noise"],
        )
        want = figures[f"latent_{case['case']}"]
        assert np.abs(made.latent - want).max() < 1e-5 * np.abs(want).max()
        if f"image_{case['case']}" in figures:
            assert made.image is not None
            assert np.abs(made.image.astype(int) - figures["image_1"]).max() <= 1
