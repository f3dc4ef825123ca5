"""One resumable training loop for every network here, on a CPU, a GPU, or several by Accelerate."""

import fcntl
import hashlib
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from flowturbo.nets.sit import SiT
from training.plan import Pace, PlanError, TrainingConfig


class Preview(Protocol):
    """A picture of what the averaged network makes, drawn every `every` steps."""

    every: int

    def __call__(self, network: nn.Module) -> np.ndarray:
        """[H, W, 3] uint8."""


LossOf = Callable[[Any, torch.Generator], Tensor]


def processes() -> PartialState:
    """Those that were launched together, and which this is: on GPUs, or on CPUs where none is."""
    # One may wait for hours for another that encodes or draws; one that fails ends them all.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(weeks=1))


def device() -> torch.device:
    """The device of this process: its GPU where there is one."""
    found: torch.device = processes().device
    return found


def print_error(command: str, error: Exception) -> None:
    """One line on stderr; of several processes, each says which it is.

    What is wrong for one of them alone, such as a disk, is known to no other.
    """
    state = processes()
    which = f" (process {state.process_index} of {state.num_processes})"
    print(f"{command}{which if state.num_processes > 1 else ''}: {error}", file=sys.stderr)


def local_rows(batch: Tensor) -> Tensor:
    """The rows of this process, of a tensor of the whole batch."""
    state = processes()
    return batch[state.process_index :: state.num_processes]


def fit(
    name: str,
    model: nn.Module,
    loss_of: LossOf,
    plan: TrainingConfig,
    folder: Path,
    *,
    pace: Pace = Pace(),  # noqa: B008 (it is frozen)
    identity: Mapping[str, Any] | None = None,
    preview: Preview | None = None,
) -> nn.Module:
    """Trains `model` in place; returns its exponential moving average, in evaluation mode.

    `loss_of(model, generator)` is the mean over this process's rows. It draws those of the whole
    batch from `generator`, which is seeded by (seed, step) alone, and takes its own (`local_rows`).
    So a run that was stopped and resumed takes the same steps as one that was not, on any number of
    processes. State is saved in `folder`, the loss at the end in `<name>.json`; TensorBoard's files
    are in `<name>/`, and there are the pictures of `preview`. Raises PlanError for a state of
    another plan or `identity` (what else the steps depend on). Raises it too for a `folder` that
    not all processes share or that another run is at work in, and FloatingPointError for a loss
    that is no number.
    """
    # Precision is the plan's: what `accelerate launch` may have been told is not asked.
    accelerator = Accelerator(mixed_precision="no")
    plan.check_processes(accelerator.num_processes)
    with exclusive(folder):
        model.to(accelerator.device).train()
        average = AveragedModel(model, multi_avg_fn=_average(plan.ema_decay))
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=plan.learning_rate,
            weight_decay=plan.weight_decay,
            betas=plan.betas,
        )
        run = _Run(folder, name, {"model": model, "average": average, "optimizer": optimizer}, pace)
        run.restore({**asdict(plan), **(identity or {})})
        run.check_shared()
        network = accelerator.prepare(model)
        main = accelerator.is_main_process
        with (
            run.writer() if main else nullcontext() as writer,
            tqdm(
                total=plan.steps, initial=run.step, desc=name, mininterval=5, disable=not main
            ) as bar,
        ):
            while run.step < plan.steps:
                loss, figures = _step(accelerator, network, optimizer, loss_of, plan, run.step)
                average.update_parameters(model)
                run.record(loss)
                bar.set_postfix(loss=f"{run.progress['smooth_loss']:.4f}", refresh=False)
                bar.update()
                if writer:
                    if preview and run.step % preview.every == 0:
                        run.show(writer, preview(average.module.eval()))
                    run.write(writer, figures, done=run.step == plan.steps)
        if main:
            run.report()
        accelerator.wait_for_everyone()
    averaged: nn.Module = average.module
    return averaged.eval().requires_grad_(False)


def _step(
    accelerator: Accelerator,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: LossOf,
    plan: TrainingConfig,
    step: int,
) -> tuple[float, dict[str, float]]:
    """One step of the optimizer: the loss of the whole batch, and figures to note."""
    rate = plan.rate(step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    seed = plan.seed * 1_000_003 + step
    torch.manual_seed(seed)  # dropout draws from the global generator
    optimizer.zero_grad(set_to_none=True)
    with _attention():
        with torch.autocast(device().type, torch.bfloat16, enabled=plan.precision == "bf16"):
            loss = loss_of(network, torch.Generator().manual_seed(seed))
        accelerator.backward(loss)
    norm = nn.utils.clip_grad_norm_(network.parameters(), plan.clip or math.inf)
    whole = float(accelerator.reduce(loss.detach(), "mean"))
    if not math.isfinite(whole + float(norm)):
        raise FloatingPointError(f"loss is {whole}, gradient norm {float(norm)} at step {step}")
    optimizer.step()
    return whole, {"learning_rate": rate, "gradient_norm": float(norm)}


class _Run:
    """The state of a run and its files; only the main process writes."""

    def __init__(self, folder: Path, name: str, holders: dict[str, Any], pace: Pace) -> None:
        self.folder, self.name, self.holders, self.pace = folder, name, holders, pace
        self.path = folder / f"{name}.state.pt"
        self.progress: dict[str, Any] = {
            "step": 0,
            "smooth_loss": None,
            "losses": [],
            "seconds": 0.0,
        }
        self.identity: dict[str, Any] = {}
        self.saved_at = time.monotonic()

    @property
    def step(self) -> int:
        return int(self.progress["step"])

    def restore(self, identity: dict[str, Any]) -> None:
        # As the file has it: tuples are lists there, and enumerations their text.
        self.identity = identity = json.loads(json.dumps(identity))
        if not self.path.exists():
            return
        try:
            saved = torch.load(self.path, weights_only=True, map_location="cpu")
            plan, progress = dict(saved["plan"]), saved["progress"]
            states = {key: saved[key] for key in self.holders}
            beyond = progress["step"] > identity["steps"]
        except Exception as error:  # the unpickler raises whatever the bytes make it do
            reason = str(error).partition("\n")[0]
            raise PlanError(f"{self.path} is not a state of a run, remove it: {reason}") from error
        # At a constant rate, more steps are the same run gone on with.
        longer = {"steps": identity["steps"]} if identity["decay"] == "constant" else {}
        if {**plan, **longer} != identity or beyond:
            keys = sorted({*plan, *identity})
            differ = [key for key in keys if plan.get(key) != identity.get(key)]
            found = ", ".join(_difference(key, plan.get(key), identity.get(key)) for key in differ)
            raise PlanError(f"{self.path} was trained with {found}: remove it")
        for key, holder in self.holders.items():
            holder.load_state_dict(states[key])
        self.progress = progress

    def check_shared(self) -> None:
        """Raises PlanError, in every process, unless all have read the same state."""
        steps = gather_object([self.step])
        if len(set(steps)) > 1:
            raise PlanError(
                f"{self.folder} must be a folder that all processes share (--runs), the states "
                f"that they found there are of steps {', '.join(map(str, steps))}"
            )

    def record(self, loss: float) -> None:
        progress = self.progress
        before = progress["smooth_loss"]
        progress["smooth_loss"] = loss if before is None else 0.98 * before + 0.02 * loss
        progress["step"] += 1
        if progress["step"] % self.pace.log_every == 0:
            progress["losses"].append([progress["step"], round(progress["smooth_loss"], 5)])

    def writer(self) -> SummaryWriter:
        # What an interrupted run wrote after its last save is written again.
        return SummaryWriter(str(self.folder / self.name), purge_step=self.step + 1)

    def write(self, writer: SummaryWriter, figures: Mapping[str, float], *, done: bool) -> None:
        """Figures to TensorBoard and, where it is time, the state to its file."""
        if self.step % self.pace.log_every == 0:
            for tag, value in {"loss": self.progress["smooth_loss"], **figures}.items():
                writer.add_scalar(tag, value, self.step)
        if done or time.monotonic() - self.saved_at > self.pace.save_every_s:
            writer.flush()
            self.save()

    def report(self) -> None:
        text = json.dumps({**self.progress, "plan": self.identity}, indent=1)
        with atomic_write(self.folder / f"{self.name}.json") as file:
            file.write(text.encode())

    def show(self, writer: SummaryWriter, picture: np.ndarray) -> None:
        Image.fromarray(picture).save(self.folder / self.name / f"{self.step:07d}.png")
        writer.add_image("samples", picture, self.step, dataformats="HWC")

    def save(self) -> None:
        now = time.monotonic()
        self.progress["seconds"] += now - self.saved_at
        self.saved_at = now
        state = {key: holder.state_dict() for key, holder in self.holders.items()}
        # Not into the file: what a full disk makes of torch.save is not an OSError.
        content = io.BytesIO()
        torch.save({**state, "progress": self.progress, "plan": self.identity}, content)
        with atomic_write(self.path) as file:
            file.write(content.getbuffer())


def _difference(key: str, then: Any, now: Any) -> str:
    digest = re.compile(r"[0-9a-f]{64}")
    if all(isinstance(value, str) and digest.fullmatch(value) for value in (then, now)):
        return f"{key} of other content"
    return f"{key} {then!r}, not {now!r}"


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which is at `path` when all of it is written; OSError names it."""
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            yield file
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()  # on a full disk it is in the way
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Nobody else works in `folder` meanwhile; the main process sees to it. Raises PlanError.

    A launcher that is killed leaves its processes behind, and they go on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not processes().is_main_process:
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PlanError(f"{folder} is in use: another run is at work there") from None
        except OSError:
            pass  # some network file systems have no locks
        yield


def digest_of(tensors: Mapping[str, Tensor], notes: str = "") -> str:
    """Of the names and values of `tensors`, and of `notes`."""
    digest = hashlib.sha256(notes.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_weights(
    model: nn.Module,
    path: Path,
    dtype: torch.dtype = torch.float32,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Writes `model` as safetensors with `notes` as metadata.

    A SiT's heads and classes cannot be read off its shapes, so they are noted too.
    """
    stated = ("num_heads", "num_classes") if isinstance(model, SiT) else ()
    own = {name: str(getattr(model.config, name)) for name in stated}
    tensors = {key: value.cpu().to(dtype).contiguous() for key, value in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(_in_order(save(tensors, {**own, **(notes or {})})))


def _in_order(content: bytes) -> bytes:
    """A safetensors file whose metadata are sorted: equal weights and notes make equal files."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = (
        json.dumps(header, separators=(",", ":"), ensure_ascii=False)
        .encode()
        .ljust(-(-size // 8) * 8)
    )
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _average(decay: float) -> Callable[..., None]:
    """Moves averaged weights towards the current ones."""

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        # Early on a shorter average: of the first weights, which are no use, nothing is to stay.
        share = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averaged, current, share)

    return update


def _attention() -> AbstractContextManager[None]:
    # On the CPU, fused attention over 64 tokens takes three times as long backwards as plain.
    return sdpa_kernel(SDPBackend.MATH) if device().type == "cpu" else nullcontext()
