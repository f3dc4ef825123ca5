"""Trains a velocity refiner for a diffusers folder, from prompts alone.

`python -m training.refiner --diffusers FOLDER --prompts prompts.txt --out refiner`. The file has
one prompt per line. The predictor's guided trajectories are the data (training.trajectories). The
result is a folder that `python -m export --diffusers … --refiner` reads. A stopped run resumes from
its state in --runs.

FlowTurbo's public code has no refiner for text to image: this one is a reconstruction from the
paper's text.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from tqdm import tqdm

from flowturbo.command import image_size, natural, positive
from flowturbo.nets.families.family import (
    REFINER_NOTES,
    Family,
    FolderOptions,
    UntrainedRefiner,
)
from flowturbo.nets.families.loading import load_family
from flowturbo.nets.weights import load_exactly, read_folder
from flowturbo.solver.calls import Network
from flowturbo.solver.grid import time_grid
from flowturbo.solver.program import compile_program
from flowturbo.solver.schedule import Schedule
from flowturbo.textfile import read_lines
from training.images import DataError
from training.loop import atomic_write, device, digest_of, fit, processes
from training.objective import ANY_ATTENTION
from training.options import HelpFormatter, add_plan_options, plan_of
from training.plan import Pace, PlanError, TrainingConfig
from training.samples import PromptSheet
from training.trajectories import Conditioning, Rows, Trajectories, TrajectoryPlan

# The paper's training of 2-RF's refiner (section 4.1).
PAPER = TrainingConfig(
    steps=10_000,
    batch=16,
    learning_rate=2e-5,
    seed=0,
    warmup=100,
    decay="constant",
    betas=(0.9, 0.999),
    clip=0.01,
    ema_decay=0.9999,
)
_ENCODED = 16  # texts encoded at once
_SAMPLES = 16  # images of a sample grid


@dataclass(frozen=True)
class Texts:
    """The conditioning of all prompts, and of the null prompt as the last row."""

    tensors: tuple[np.ndarray, ...]
    prompts: tuple[str, ...]

    def __call__(self, prompt: Tensor) -> Conditioning:
        """The conditioning of `prompt` [B] int64, of which -1 is the null prompt."""
        rows = prompt.numpy()
        found = (torch.from_numpy(np.asarray(of[rows])) for of in self.tensors)
        return tuple(of.to(device()) for of in found)


def run(args: argparse.Namespace) -> None:
    """Trains, and writes the folder. Raises FlowTurboError, FloatingPointError and OSError."""
    plan = plan_of(args, PAPER)
    if processes().num_processes > 1:
        raise PlanError(f"--diffusers needs one process, got {processes().num_processes}")
    prompts = read_prompts(args.prompts)
    options = FolderOptions(
        args.diffusers,
        network_file=args.network_file,
        without_t5=args.without_t5,
        text_length=args.text_length,
        distilled=args.distilled,
        rectified_flow=args.rectified_flow,
    )
    family = load_family(options)
    usual = (1.0, 1.0) if family.distilled else (1.0, 1.5 * family.guidance_scale)
    scales = usual if args.train_guidance is None else tuple(args.train_guidance)
    if family.distilled and scales != (1.0, 1.0):
        raise PlanError(f"--train-guidance must be 1 1 for a distilled model, got {scales}")
    trajectories = TrajectoryPlan(
        (args.grid_steps[0], args.grid_steps[1]),
        (float(scales[0]), float(scales[1])),
        args.pool_batches,
        args.pool_batch,
        args.uses,
    )
    schedule = Schedule.parse(args.sample_schedule)
    torch.manual_seed(plan.seed)
    made = _untrained(family, args.start)
    texts = encode_prompts(family, prompts, args.runs)
    # From here on only the networks are needed: text encoders may be larger than all the rest.
    family = replace(family, text_encoder=nn.Identity(), parts={})
    trained, source = train(
        family,
        made,
        texts,
        trajectories,
        plan,
        args.runs,
        size=args.size,
        pace=Pace(args.save_every_s, args.log_every),
        sample_every=args.sample_every,
        schedule=schedule,
    )
    save(trained, made, args.out, notes(source, trajectories, texts, plan))
    print(f"{args.out}: averaged weights after {plan.steps} steps")


def train(
    family: Family,
    made: UntrainedRefiner,
    texts: Texts,
    trajectories: TrajectoryPlan,
    plan: TrainingConfig,
    folder: Path,
    *,
    size: tuple[int, int] | None = None,
    pace: Pace = Pace(),  # noqa: B008 (it is frozen)
    sample_every: int = 0,
    schedule: Schedule | None = None,
) -> tuple[nn.Module, Trajectories]:
    """Fits the refiner `made`; returns its averaged network and the source of its rows.

    The family's text encoder is not needed. State, losses and sample images go to `folder`
    (training.loop.fit). `size` (H, W) is in pixels.
    """
    shape = family.latent_shape(size or family.size)
    teacher = family.network.to(device()).eval().requires_grad_(False)
    tokens = shape[1] * shape[2] // family.patch**2
    source = Trajectories(
        teacher,
        texts,
        len(texts.prompts),
        shape,
        family.grid,
        tokens,
        trajectories,
        plan.seed,
        guided=not family.distilled,
    )
    lifetime = trajectories.lifetime(plan.batch, source.per_step)
    held: dict[int, Rows] = {}

    def before_step(step: int) -> None:
        number = step // lifetime
        if number not in held:
            held.clear()
            # The loop chooses an attention that is fast in the backward pass; there is none here.
            with sdpa_kernel(ANY_ATTENTION), _autocast(plan):
                held[number] = source.pool(number)

    def loss_of(network: nn.Module, generator: torch.Generator) -> Tensor:
        (pool,) = held.values()
        row = pool[torch.randint(len(pool.t), (plan.batch,), generator=generator)]
        x, v, t, change = (of.to(device()) for of in (row.x, row.v, row.t, row.change))
        made = network(torch.cat([x, v], 1), t, *texts(row.prompt)).float()
        return (made - change).square().mean()

    depends_on = {
        "trajectories": asdict(trajectories),
        "prompts": hashlib.sha256("\n".join(texts.prompts).encode()).hexdigest(),
        "teacher": digest_of(teacher.state_dict()),
        "untrained": digest_of(made.network.state_dict()),
        "shape": shape,
        "text_length": family.text_length,
    }
    preview = None
    if sample_every:
        preview = _Preview(family, texts, shape, sample_every, schedule or Schedule.parse("H1P5R3"))
    ema = fit(
        "refiner",
        made.network,
        loss_of,
        plan,
        folder,
        pace=pace,
        identity=depends_on,
        preview=preview,
        before_step=before_step,
        tokens=tokens,
    )
    return ema, source


def notes(
    source: Trajectories,
    trajectories: TrajectoryPlan,
    texts: Texts,
    plan: TrainingConfig,
) -> dict[str, object]:
    """What the refiner was trained on. The export reads its `largest_step`."""
    return {
        "largest_step": source.largest_step,
        "trajectories": asdict(trajectories),
        "prompts": len(texts.prompts),
        "plan": asdict(plan),
    }


def save(trained: nn.Module, made: UntrainedRefiner, out: Path, stated: dict[str, object]) -> None:
    """Writes the averaged weights as a folder of the predictor's class, and a file of `stated`.

    In float32: the layers that read the text must stay exactly the predictor's.
    """
    made.network.load_state_dict(trained.state_dict())
    made.saved.to("cpu").save_pretrained(out)
    with atomic_write(out / REFINER_NOTES) as file:
        file.write((json.dumps(stated, indent=1) + "\n").encode())


def read_prompts(path: Path) -> list[str]:
    """The lines of `path`. Raises DataError for an empty line, and if there is no line."""
    prompts = read_lines(path)
    if not prompts:
        raise DataError(f"{path} must have a prompt per line, it has none")
    if not all(prompts):
        raise DataError(
            f"{path} must have a prompt per line, line {prompts.index('') + 1} is empty"
        )
    return prompts


def encode_prompts(family: Family, prompts: Sequence[str], folder: Path) -> Texts:
    """The conditioning of `prompts` and of the null prompt, kept in files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = family.text_encoder.to(device()).eval()
    state = digest_of(encoder.state_dict(), "\n".join([*prompts, str(family.text_length)]))[:12]
    names = [name for name, _ in family.conditioning]
    paths = [folder / f"texts-{state}-{name}.npy" for name in names]
    if not all(path.exists() for path in paths):
        _encode(family, [*prompts, ""], paths)
    return Texts(tuple(np.load(path, mmap_mode="r") for path in paths), tuple(prompts))


def _encode(family: Family, texts: Sequence[str], paths: Sequence[Path]) -> None:
    partial = [path.with_suffix(".partial.npy") for path in paths]
    files: list[Any] = []
    for start in tqdm(range(0, len(texts), _ENCODED), "prompts", unit_scale=_ENCODED):
        made = family.encode(texts[start : start + _ENCODED])
        if not files:
            files = [
                np.lib.format.open_memmap(
                    path, "w+", of.cpu().numpy().dtype, (len(texts), *of.shape[1:])
                )
                for path, of in zip(partial, made, strict=True)
            ]
        for file, of in zip(files, made, strict=True):
            file[start : start + len(of)] = of.cpu().numpy()
    for file, source, path in zip(files, partial, paths, strict=True):
        file.flush()
        source.rename(path)


class _Preview:
    """Draws images of the first prompts with the refiner in training."""

    def __init__(
        self,
        family: Family,
        texts: Texts,
        shape: tuple[int, int, int],
        every: int,
        schedule: Schedule,
    ) -> None:
        self.every, self._predictor = every, family.network
        count = min(_SAMPLES, len(texts.prompts))
        steps, tokens = len(schedule), shape[1] * shape[2] // family.patch**2
        shift = schedule.shift or family.grid.shift_for(tokens, steps)
        self._sheet = PromptSheet(
            shape,
            texts(torch.arange(count)),
            texts(torch.full((count,), -1)),
            compile_program(schedule, time_grid(steps, shift)),
            1.0 if family.distilled else family.guidance_scale,
            family.decoder,
        )

    def __call__(self, network: nn.Module) -> np.ndarray:
        """The picture, [H, W, 3] uint8."""
        return self._sheet.draw({Network.PREDICTOR: self._predictor, Network.REFINER: network})


def _untrained(family: Family, start: Path | None) -> UntrainedRefiner:
    """The refiner to train: with the weights of the folder `start`, or without training."""
    made = family.untrained_refiner()
    if start:
        weights, tensors = read_folder(start)
        load_exactly(made.saved, tensors, weights)
    made.saved.requires_grad_(False)
    made.network.requires_grad_(True)
    return made


def _autocast(plan: TrainingConfig) -> AbstractContextManager[None]:
    return torch.autocast(device().type, torch.bfloat16, enabled=plan.precision == "bf16")


def parser() -> argparse.ArgumentParser:
    """The options of `python -m training.refiner --diffusers`."""
    made = argparse.ArgumentParser(
        prog="python -m training.refiner", description=__doc__, formatter_class=HelpFormatter
    )
    add, usual = made.add_argument, TrajectoryPlan()
    add("--diffusers", type=Path, required=True, help="folder of the model, as for the export")
    add("--prompts", type=Path, required=True, help="text file with one prompt per line")
    add("--out", type=Path, required=True, help="folder to write the refiner to")
    add("--runs", type=Path, default=Path("runs/refiner"), help="folder for state and samples")
    add("--network-file", type=Path, help="single-file checkpoint of the network, as for export")
    add("--without-t5", action="store_true", help="read an SD3 folder without its T5")
    add("--text-length", type=int, help="tokens of a text (default: the model's)")
    add("--distilled", action="store_true", help="the model takes no guidance")
    add("--rectified-flow", action="store_true", help="the U-Net predicts a velocity")
    add("--size", type=image_size, help="image size in pixels (default: the model's)")
    add(
        "--grid-steps",
        type=positive,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=list(usual.steps),
        help="range of the steps of the time grids that rows come from",
    )
    add(
        "--train-guidance",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="range of the guidance scales (default: 1 to 1.5 times the model's)",
    )
    add("--pool-batches", type=positive, default=usual.batches, help="batches of a pool")
    add("--pool-batch", type=positive, default=usual.batch, help="trajectories of a batch")
    add("--uses", type=float, default=usual.uses, help="times that a row is used, on average")
    add("--start", type=Path, help="refiner folder to start from")
    add_plan_options(made, PAPER)
    add("--sample-every", type=natural, default=1000, help="steps between sample grids; 0: none")
    add("--sample-schedule", default="H1P5R3", help="schedule of the samples")
    return made
