"""Refiners for text to image learn from the predictor's trajectories, in every family."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families.conftest import NAMES, Case
from support import ROOT
from torch import Tensor, nn

from export.folder_source import trained_step
from flowturbo.errors import FlowTurboError
from flowturbo.nets.families.family import REFINER_NOTES, FolderOptions
from flowturbo.nets.families.loading import load_family
from flowturbo.nets.weights import CheckpointError
from flowturbo.solver.grid import GridRule
from training import refiner
from training.plan import PlanError
from training.trajectories import Trajectories, TrajectoryPlan

pytest_plugins = ["families.conftest"]

FEW = ("--steps", "12", "--batch", "8", "--grid-steps", "3", "5", "--pool-batches", "1")
FEW += ("--pool-batch", "2", "--uses", "1", "--sample-every", "0", "--log-every", "1")


class Growing(nn.Module):
    """dx/dt = x with the prompt, and 0 without: all figures of a step are known."""

    def forward(self, x: Tensor, t: Tensor, sign: Tensor) -> Tensor:
        return torch.where(sign[:, None, None, None] > 0, x, torch.zeros_like(x))


def growing(plan: TrajectoryPlan, *, guided: bool = True) -> Trajectories:
    def conditioning(prompt: Tensor) -> tuple[Tensor, ...]:
        return ((prompt >= 0).float(),)

    shape, grid = (2, 4, 4), GridRule(shift=3.0)
    return Trajectories(Growing(), conditioning, 5, shape, grid, 4, plan, seed=1, guided=guided)


def test_rows_are_the_euler_steps_of_the_guided_trajectory() -> None:
    """With v = s x, x' is (1 + h s) x. The prompt's row learns h s x, the null row 0."""
    plan = TrajectoryPlan(steps=(4, 4), scales=(2.0, 2.0), batches=1, batch=3)
    pool = growing(plan).pool(0)
    assert len(pool.t) == 4 * 3 * 2
    null = pool.prompt == -1
    assert null.sum() == 12
    assert not pool.change[null].any()
    np.testing.assert_allclose(sorted({round(float(t), 4) for t in pool.t}), [0.1, 0.25, 0.5, 1])
    h = {0.1: 0.1, 0.25: 0.15, 0.5: 0.25, 1.0: 0.5}
    for row in range(len(pool.t)):
        size = h[round(float(pool.t[row]), 4)]
        x = pool.v[row] / 2
        torch.testing.assert_close(pool.x[row], (1 + 2 * size) * x)
        wanted = torch.zeros_like(x) if null[row] else 2 * size * x
        torch.testing.assert_close(pool.change[row], wanted)


def test_pools_are_drawn_from_their_number_alone() -> None:
    plan = TrajectoryPlan(steps=(3, 6), scales=(1.0, 4.0), batches=2, batch=2)
    first, again, other = growing(plan).pool(0), growing(plan).pool(0), growing(plan).pool(1)
    assert all(torch.equal(a, vars(again)[name]) for name, a in vars(first).items())
    assert first.x.shape != other.x.shape or not torch.equal(first.x, other.x)


def test_a_model_without_guidance_has_no_null_rows() -> None:
    pool = growing(TrajectoryPlan(steps=(4, 4), batches=1, batch=3), guided=False).pool(0)
    assert len(pool.t) == 12
    assert (pool.prompt >= 0).all()


def test_the_largest_step_is_that_of_the_shortest_grid() -> None:
    assert growing(TrajectoryPlan(steps=(4, 9))).largest_step == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": (0, 4)}, "grid steps must be 1 <= smallest <= largest, got 0 to 4"),
        ({"scales": (2.0, 1.0)}, "guidance scales must be .* got 2.0 to 1.0"),
        ({"uses": 0.0}, "uses must be above 0, got 0.0"),
    ],
)
def test_refuses_impossible_trajectories(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        TrajectoryPlan(**wrong)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("red a\nb, c d\nthe red e\n")
    return path


def arguments(case: Case, prompts: Path, out: Path, *more: str) -> list[str]:
    size = ("--size", "16x16") if "--size" not in more else ()
    return [
        *("--diffusers", str(case.folder), "--prompts", str(prompts)),
        *("--out", str(out / "made"), "--runs", str(out / "run")),
        *(*case.arguments, *size, *FEW, *more),
    ]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "golden"])
def test_every_family_trains_a_refiner_that_the_export_reads(
    cases: dict[str, Case], prompts: Path, name: str, tmp_path: Path
) -> None:
    case = cases[name]
    family = load_family(case.options)
    untrained = family.untrained_refiner()
    channels, rows = family.latent_channels, 2
    x = torch.randn(rows, 2 * channels, *family.latent_shape((16, 16))[1:])
    words = [torch.zeros(rows, *dims) for _, dims in family.conditioning]
    words = [
        w.long() + 3 if n == "context_length" else w
        for (n, _), w in zip(family.conditioning, words, strict=True)
    ]
    with torch.inference_mode():
        change = untrained.network(x, torch.full((rows,), 0.5), *words)
    assert change.shape == (rows, channels, *x.shape[2:])
    assert not change.any()  # at the start it keeps the velocity
    assert refiner.main(arguments(case, prompts, tmp_path, "--learning-rate", "1e-3")) == 0
    options = FolderOptions(**{**vars(case.options), "refiner": tmp_path / "made"})
    read = load_family(options).refiner
    assert read is not None
    with torch.inference_mode():
        assert read(x, torch.full((rows,), 0.5), *words).abs().max() > 0
    notes = json.loads((tmp_path / "made" / REFINER_NOTES).read_text())
    assert trained_step(tmp_path / "made") == notes["largest_step"] > 0.2


def test_a_killed_run_continues_with_the_same_losses(
    cases: dict[str, Case], prompts: Path, tmp_path: Path
) -> None:
    """Also across pools, of which there are several here."""
    case = cases["rectified"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert refiner.main(arguments(case, prompts, whole)) == 0
    killing = (
        "import os, sys; from training import loop, refiner\n"
        "step = loop._step\n"
        "def killed(*a):\n"
        "    if a[-1] == 7: os.kill(os.getpid(), 9)\n"
        "    return step(*a)\n"
        "loop._step = killed\n"
        "refiner.main(sys.argv[1:])\n"
    )
    save = ("--save-every-s", "0")
    command = [sys.executable, "-c", killing, *arguments(case, prompts, parts, *save)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -9
    assert (parts / "run" / "refiner.state.pt").exists()
    assert refiner.main(arguments(case, prompts, parts, *save)) == 0
    losses = [
        json.loads((path / "run" / "refiner.json").read_text())["losses"] for path in (whole, parts)
    ]
    assert len(losses[0]) == 12
    assert losses[0] == losses[1]


def test_a_run_is_not_continued_with_other_trajectories(
    cases: dict[str, Case], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = cases["rectified"]
    assert refiner.main(arguments(case, prompts, tmp_path)) == 0
    assert refiner.main(arguments(case, prompts, tmp_path, "--uses", "2")) == 2
    assert "was trained with trajectories" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "has none"), ("red a\n\nb\n", "line 2 is empty")],
)
def test_refuses_prompts_that_are_not_there(
    cases: dict[str, Case],
    content: str,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(content)
    assert refiner.main(arguments(cases["rectified"], path, tmp_path)) == 2
    assert said in capsys.readouterr().err


def test_refuses_a_note_that_cannot_be_right(tmp_path: Path) -> None:
    assert trained_step(None) == trained_step(tmp_path) == 0.12
    (tmp_path / REFINER_NOTES).write_text('{"largest_step": 7}')
    with pytest.raises(CheckpointError, match="largest_step must be above 0 and at most 1, got 7"):
        trained_step(tmp_path)
    assert issubclass(CheckpointError, FlowTurboError)
