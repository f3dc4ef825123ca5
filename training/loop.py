"""One resumable training loop for every network here."""

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

SAVE_EVERY_S = 60.0
LOG_EVERY = 50  # steps


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train.

    The learning rate falls along a cosine, and starts again from its height at the steps in
    `restarts` (SGDR, arXiv 1608.03983).
    """

    steps: int
    batch: int
    learning_rate: float
    seed: int
    warmup: int = 100
    restarts: tuple[int, ...] = ()
    weight_decay: float = 0.0
    ema_decay: float = 0.998


LossOf = Callable[[Any, torch.Generator], Tensor]


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fit(name: str, model: nn.Module, loss_of: LossOf, plan: Plan, folder: Path) -> nn.Module:
    """Trains `model` and returns its exponential moving average, in evaluation mode.

    `loss_of(model, generator)` draws its batch from `generator`, which is seeded by (seed, step)
    alone: a run that was stopped and resumed takes the same steps as one that was not. State is
    saved in `folder` once a minute and at the end, the loss in `<name>.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.to(device()).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(plan.ema_decay))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=plan.learning_rate, weight_decay=plan.weight_decay, betas=(0.9, 0.99)
    )
    state: dict[str, Any] = {"model": model, "average": average, "optimizer": optimizer}
    path = folder / f"{name}.state.pt"
    progress = _restore(path, state, plan)
    saved_at = started_at = time.monotonic()
    generator = torch.Generator()
    with tqdm(total=plan.steps, initial=progress["step"], desc=name, mininterval=5) as bar:
        while progress["step"] < plan.steps:
            step = progress["step"]
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate * _rate(step, plan)
            seed = plan.seed * 1_000_003 + step
            torch.manual_seed(seed)  # dropout draws from the global generator
            optimizer.zero_grad(set_to_none=True)
            with _attention():
                loss = loss_of(model, generator.manual_seed(seed))
                loss.backward()
            nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            average.update_parameters(model)
            _record(progress, float(loss.detach()))
            bar.set_postfix(loss=f"{progress['smooth_loss']:.4f}", refresh=False)
            bar.update()
            if time.monotonic() - saved_at > SAVE_EVERY_S or progress["step"] == plan.steps:
                progress["seconds"] += time.monotonic() - started_at
                saved_at = started_at = time.monotonic()
                _save(path, state, progress, plan)
    (folder / f"{name}.json").write_text(json.dumps({**progress, "plan": asdict(plan)}, indent=1))
    averaged: nn.Module = average.module
    return averaged.eval().requires_grad_(False)


def _attention() -> AbstractContextManager[None]:
    # On the CPU, fused attention over 64 tokens takes three times as long backwards as plain.
    return sdpa_kernel(SDPBackend.MATH) if device().type == "cpu" else nullcontext()


def _rate(step: int, plan: Plan) -> float:
    starts = (0, *plan.restarts, plan.steps)
    begin, end = next((a, b) for a, b in pairwise(starts) if a <= step < b)
    cosine = 0.5 * (1 + math.cos(math.pi * (step - begin) / (end - begin)))
    return min(1.0, (step + 1) / max(plan.warmup, 1)) * (0.01 + 0.99 * cosine)


def _record(progress: dict[str, Any], loss: float) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(f"loss is {loss} at step {progress['step']}")
    before = progress["smooth_loss"]
    progress["smooth_loss"] = loss if before is None else 0.98 * before + 0.02 * loss
    progress["step"] += 1
    if progress["step"] % LOG_EVERY == 0:
        progress["losses"].append([progress["step"], round(progress["smooth_loss"], 5)])


def _restore(path: Path, state: dict[str, Any], plan: Plan) -> dict[str, Any]:
    if not path.exists():
        return {"step": 0, "smooth_loss": None, "losses": [], "seconds": 0.0}
    saved = torch.load(path, weights_only=True, map_location=device())
    if saved["plan"] != asdict(plan):
        raise ValueError(f"{path} was trained with {saved['plan']}, not {asdict(plan)}: remove it")
    for key, holder in state.items():
        holder.load_state_dict(saved[key])
    progress: dict[str, Any] = saved["progress"]
    return progress


def _save(path: Path, state: dict[str, Any], progress: dict[str, Any], plan: Plan) -> None:
    saved = {key: holder.state_dict() for key, holder in state.items()}
    partial = path.with_suffix(".partial")
    torch.save({**saved, "progress": progress, "plan": asdict(plan)}, partial)
    os.replace(partial, path)
