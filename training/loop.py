"""One resumable training loop for every network: on a CPU, a GPU, or several with Accelerate."""

import fcntl
import hashlib
import io
import json
import math
import os
import re
import sys
import time
import warnings
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

# Autocast gives a norm bfloat16 inputs beside its float32 weight: slower, but right.
warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")

_FEW_TOKENS = 512


class Preview(Protocol):
    """Draws a sample image from the averaged network, every `every` steps."""

    every: int

    def __call__(self, network: nn.Module) -> np.ndarray:
        """The picture, [H, W, 3] uint8."""


LossOf = Callable[[Any, torch.Generator], Tensor]


def processes() -> PartialState:
    """The processes of this launch and the index of this one; they run on GPUs if there are any."""
    # One process may wait hours for another that encodes or draws. A failed one ends all others.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(weeks=1))


def device() -> torch.device:
    """The device of this process: its GPU if there is one, else the CPU."""
    found: torch.device = processes().device
    return found


def print_error(command: str, error: Exception) -> None:
    """Prints one line on stderr, with the process index if there are several processes.

    Every process prints its own errors, because the others do not know of them (such as a disk
    error).
    """
    state = processes()
    which = f" (process {state.process_index} of {state.num_processes})"
    print(f"{command}{which if state.num_processes > 1 else ''}: {error}", file=sys.stderr)


def local_rows(batch: Tensor) -> Tensor:
    """The rows of `batch` that belong to this process."""
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
    before_step: Callable[[int], None] | None = None,
    tokens: int = 64,
) -> nn.Module:
    """Trains `model` in place; returns its exponential moving average, in evaluation mode.

    `loss_of(model, generator)` is the mean over the rows of this process. It draws the rows of the
    whole batch from `generator`, which is seeded by (seed, step) only, and keeps its own
    (`local_rows`). So a resumed run takes the same steps as an uninterrupted one, on any number of
    processes.

    `before_step` gets the number of the step that follows, from 0, and makes what it needs.
    `tokens` is how many the attention reads.

    The state is saved in `folder`, and at the end the losses in `<name>.json`. `<name>/` has
    TensorBoard's files and the pictures of `preview`. `identity` is what the steps depend on,
    besides the plan. Raises PlanError for a state of another plan or `identity`. Raises it too if
    the processes do not share `folder`, or if another run is using it. Raises FloatingPointError
    for a loss that is not finite.
    """
    # The plan sets the precision. An option of `accelerate launch` must not change it.
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
                if before_step:
                    before_step(run.step)
                loss, figures = _step(
                    accelerator, network, optimizer, loss_of, plan, tokens, run.step
                )
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
    tokens: int,
    step: int,
) -> tuple[float, dict[str, float]]:
    """One optimizer step. Returns the loss of the whole batch, and figures to log."""
    rate = plan.rate(step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    seed = plan.seed * 1_000_003 + step
    torch.manual_seed(seed)  # dropout draws from the global generator
    optimizer.zero_grad(set_to_none=True)
    with _attention(tokens):
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
        # Compare JSON values, as in the file: tuples become lists, and enumerations text.
        self.identity = identity = json.loads(json.dumps(identity))
        if not self.path.exists():
            return
        try:
            saved = torch.load(self.path, weights_only=True, map_location="cpu")
            plan, progress = dict(saved["plan"]), saved["progress"]
            states = {key: saved[key] for key in self.holders}
            beyond = progress["step"] > identity["steps"]
        except Exception as error:  # broken bytes can raise anything in the unpickler
            reason = str(error).partition("\n")[0]
            raise PlanError(f"{self.path} is not a state of a run, remove it: {reason}") from error
        # At a constant rate, a run with more steps continues the same run.
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
        """Raises PlanError in every process unless all processes have read the same state."""
        steps = gather_object([self.step])
        if len(set(steps)) > 1:
            raise PlanError(
                f"{self.folder} must be a folder that all processes share (--runs): they found "
                f"states of steps {', '.join(map(str, steps))}"
            )

    def record(self, loss: float) -> None:
        progress = self.progress
        before = progress["smooth_loss"]
        progress["smooth_loss"] = loss if before is None else 0.98 * before + 0.02 * loss
        progress["step"] += 1
        if progress["step"] % self.pace.log_every == 0:
            progress["losses"].append([progress["step"], round(progress["smooth_loss"], 5)])

    def writer(self) -> SummaryWriter:
        # The steps of an interrupted run after its last save will be logged again.
        return SummaryWriter(str(self.folder / self.name), purge_step=self.step + 1)

    def write(self, writer: SummaryWriter, figures: Mapping[str, float], *, done: bool) -> None:
        """Writes figures to TensorBoard, and the state to its file when it is due."""
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
        # First into memory: on a full disk torch.save raises errors other than OSError.
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
    """A file that appears at `path` only when it is complete. An OSError names `path`."""
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            yield file
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()  # free the space on a full disk
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds an exclusive lock on `folder`, taken by the main process. Raises PlanError.

    It guards against the processes of a killed launcher, which continue to run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not processes().is_main_process:
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PlanError(f"{folder} is in use by another run") from None
        except OSError:
            pass  # some network file systems have no locks
        yield


def digest_of(tensors: Mapping[str, Tensor], notes: str = "") -> str:
    """Digest of the names and values of `tensors`, and of `notes`."""
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
    """Writes `model` as safetensors, with `notes` as metadata.

    The tensor shapes of a SiT do not show its heads and classes, so the metadata have these too.
    """
    stated = ("num_heads", "num_classes") if isinstance(model, SiT) else ()
    own = {name: str(getattr(model.config, name)) for name in stated}
    tensors = {key: value.cpu().to(dtype).contiguous() for key, value in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(_in_order(save(tensors, {**own, **(notes or {})})))


def _in_order(content: bytes) -> bytes:
    """A safetensors file with sorted metadata: equal weights and notes give equal files."""
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
    """The update of the averaged weights towards the current weights."""

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        # EMA warm-up: forget the initial weights quickly.
        share = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averaged, current, share)

    return update


def _attention(tokens: int) -> AbstractContextManager[None]:
    # On the CPU over 64 tokens, fused attention's backward pass takes three times as long as plain.
    # Over thousands of tokens the plain one takes gigabytes.
    plain = device().type == "cpu" and tokens <= _FEW_TOKENS
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()
