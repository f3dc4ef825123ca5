"""Training resumes exactly, and the committed weights are good."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import ROOT
from torch import Tensor, nn

from flowturbo.nets.checkpoint import build_network
from flowturbo.nets.weights import load_checkpoint
from research.quality.engine import Engine, SamplingSpec
from research.quality.judges import Classifier
from training.fonts import font_paths
from training.frechet import Statistics, frechet_distance
from training.glyphs import __main__ as stages
from training.loop import fit
from training.plan import Pace, TrainingConfig

WEIGHTS = ROOT / "weights" / "glyphs"


def regression(model: nn.Module, generator: torch.Generator) -> Tensor:
    x = torch.randn(8, 4, generator=generator)
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 1)


def test_a_resumed_run_takes_the_same_steps(tmp_path: Path) -> None:
    plan = TrainingConfig(steps=12, batch=8, learning_rate=0.1, seed=3, warmup=2, restarts=(6,))
    whole = fit("whole", linear(), regression, plan, tmp_path)
    pace = Pace(save_every_s=0.0)
    calls = 0

    def interrupted(model: nn.Module, generator: torch.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return regression(model, generator)

    with pytest.raises(KeyboardInterrupt):
        fit("parts", linear(), interrupted, plan, tmp_path, pace=pace)
    parts = fit("parts", linear(), regression, plan, tmp_path)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    losses = [
        json.loads((tmp_path / f"{n}.json").read_text())["smooth_loss"] for n in ("whole", "parts")
    ]
    assert losses[0] == losses[1]


def test_a_run_is_not_resumed_with_another_plan(tmp_path: Path) -> None:
    fit("run", linear(), regression, TrainingConfig(2, 8, 0.1, seed=3), tmp_path)
    with pytest.raises(ValueError, match="was trained with"):
        fit("run", linear(), regression, TrainingConfig(2, 8, 0.2, seed=3), tmp_path)


def test_a_stage_is_not_resumed_after_another_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of `python -m training.glyphs`, a step a stage, on noise in place of glyphs."""
    plans = {name: replace(p, steps=1, batch=2, restarts=()) for name, p in stages.PLANS.items()}
    monkeypatch.setattr(stages, "PLANS", plans)
    monkeypatch.setattr(stages, "IMAGES", 72)
    rng, runs, out = np.random.default_rng(0), tmp_path / "runs", tmp_path / "out"
    images = rng.integers(0, 256, (2, 72, 64, 64, 3), dtype=np.uint8)
    monkeypatch.setattr(stages, "load_images", lambda _folder, _count, seed: images[seed])
    command = ["--runs", str(runs), "--out", str(out)]
    assert stages.main(command) == 0
    made = {path: path.read_bytes() for path in out.glob("*.safetensors")}
    assert len(made) == 3
    assert stages.main(command) == 0  # nothing is left to train
    assert all(path.read_bytes() == content for path, content in made.items())

    def refused(state: str, key: str, *more: str) -> bool:
        status, said = stages.main([*command, *more]), capsys.readouterr().err
        return status == 2 and f"{state}.state.pt was trained with {key} of other content" in said

    assert refused("vae", "images", "--seed", "1")
    # A stage that was removed and done otherwise, and the one after it.
    for before, after, key in (
        ("predictor_uniform", "refiner", "predictor"),
        ("predictor", "predictor_uniform", "start"),
        ("vae", "predictor", "vae"),
    ):
        (runs / f"{before}.state.pt").unlink()
        plans[before] = replace(plans[before], learning_rate=1e-4)
        assert refused(after, key)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="at step 0"):
        fit(
            "run",
            linear(),
            lambda m, g: regression(m, g) * np.nan,
            TrainingConfig(2, 8, 0.1, 3),
            tmp_path,
        )


def test_missing_fonts_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="apt-get install .*fonts-dejavu-core"):
        font_paths(tmp_path)


def test_the_refiner_beats_the_velocity_kept_as_it_is() -> None:
    """Over the whole way from noise to an image, in steps of 0.1."""
    predictor, network = (
        build_network(load_checkpoint(WEIGHTS / f"{name}.safetensors"), reads_velocity=reads)
        for name, reads in (("predictor", False), ("refiner", True))
    )
    label = torch.arange(36)
    x = torch.randn(36, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    kept = refined = 0.0
    for step in range(10):
        v = predictor(x, torch.full((36,), 0.1 * step), label)
        x, t = x + 0.1 * v, torch.full((36,), 0.1 * (step + 1))
        change = predictor(x, t, label) - v
        kept += float(change.square().mean())
        refined += float((network(torch.cat([x, v], 1), t, label) - change).square().mean())
    assert refined < 0.6 * kept


def test_glyphs_are_recognised(glyphs_repository: Path) -> None:
    """A small part of what README states for 1,000 images."""
    engine, labels = Engine(glyphs_repository), np.arange(72) % 36
    scale = engine.pipeline.default_guidance_scale(engine.settings)  # as README's figures
    spec = SamplingSpec(str(engine.default_schedule), scale)
    made = [engine.make(spec, np.arange(k, k + 24)) for k in (0, 24, 48)]
    seen = Classifier(WEIGHTS)(np.concatenate([part.image for part in made]))
    assert (seen.probability.argmax(1) == labels).mean() >= 0.94


def test_frechet_distance() -> None:
    """Between normal distributions: (m1 - m2)^2 + (s1 - s2)^2 a dimension."""
    rng = np.random.default_rng(0)
    one, other = (
        Statistics.of(mean + scale * rng.standard_normal((200_000, 3)))
        for mean, scale in ((0.0, 1.0), (2.0, 3.0))
    )
    assert frechet_distance(one, other) == pytest.approx(3 * (4 + 4), rel=0.02)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_weights_are_small() -> None:
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
