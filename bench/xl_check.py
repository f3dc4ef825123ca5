"""Exports SiT-XL/2, trains its refiner and fits a solver at full size: `python -m bench.xl_check`.

Makes checkpoints of SiT-XL/2 and sd-vae-ft-ema with random weights and exports them as a user
would. Builds TensorRT engines, which needs no GPU, and verifies the result. Encodes a few pictures
and trains a refiner on them for ten steps. Fits a solver to a few trajectories. Records time and
peak memory.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.networks import SIZES, random_network, random_vae
from flowturbo.nets.sit import refiner_config
from flowturbo.textfile import read_json

Source = dict[str, str]  # checkpoints, as options of the commands that read them
PICTURES, STEPS, BATCH = 8, 10, 4  # of the training
TRAJECTORIES = 8  # of the fit


@dataclass(frozen=True)
class Run:
    """One command: its step and precision, its duration, and its peak resident memory."""

    step: str
    precision: str
    minutes: float
    peak_gib: float


def main() -> None:
    """Runs every step; stops at the first failure, after that step's own message."""
    parser = argparse.ArgumentParser(prog="python -m bench.xl_check", description=__doc__)
    parser.add_argument("--size", choices=tuple(SIZES), default="xl")
    parser.add_argument("--folder", type=Path, default=Path("runs/xl"), help="needs 15 GB")
    parser.add_argument("--part", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--precision", nargs="+", default=["fp16", "bf16"])
    parser.add_argument("--compute-capability", nargs="+", default=["8.0", "8.9", "12.0"])
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/xl_export.json"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # In a separate process: its peak memory would otherwise count for the commands started here.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        source = pool.submit(checkpoints, args.folder, args.size).result()
    report = _report(args.out, {"size": args.size, "cores": os.cpu_count()})
    for part in args.part:
        for run in PARTS[part](args, source):
            print(f"{run.precision} {run.step}: {run.minutes:.1f} min, {run.peak_gib:.2f} GiB")
            again = (run.precision, run.step)
            others = [r for r in report["runs"] if (r["precision"], r["step"]) != again]
            report["runs"] = [*others, asdict(run)]
            args.out.write_text(json.dumps(report, indent=1) + "\n")


def _report(path: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """The report in `path` if it is from this machine, to add runs to it; else an empty one."""
    if path.exists():
        report: dict[str, Any] = read_json(path)
        if machine.items() <= report.items():
            return report
    return {**machine, "runs": []}


def _export(args: argparse.Namespace, source: Source) -> Iterator[Run]:
    """Exports ONNX files per precision, builds an engine per kind of GPU, and verifies both."""
    given = [word for option in source.items() for word in option]
    for precision in args.precision:
        models = args.folder / f"models-{precision}"
        shutil.rmtree(models, ignore_errors=True)  # an export that is up to date would take no time
        repository = ["--repository", str(models)]
        export = ["-m", "export", *given, *repository, "--precision", precision]
        engine = ["--engine", "tensorrt", "--compute-capability"]
        for k, capability in enumerate(args.compute_capability):
            # The first command also makes the ONNX files; the others only add an engine.
            step = f"export and engine for {capability}" if k == 0 else f"engine for {capability}"
            yield _run(step, precision, [*export, *engine, capability])
        yield _run("verify", precision, ["-m", "export", "verify", *given, *repository])


def _train(args: argparse.Namespace, source: Source) -> Iterator[Run]:
    """Encodes pictures to latents and trains a refiner on them."""
    folder, size = args.folder / "training", SIZES[args.size]
    shutil.rmtree(folder, ignore_errors=True)  # a finished run would take no more steps
    side = size.config.latent_size * 2 ** (len(size.vae_channels) - 1)
    rng = np.random.default_rng(0)
    for k in range(PICTURES):
        path = folder / "images" / f"class-{k % 2}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    images, latents = ["--images", str(folder / "images")], str(folder / "latents")
    encode = [*images, "--vae", source["--vae"], "--out", latents, "--image-size", str(side)]
    step = f"encode {PICTURES} pictures"
    yield _run(step, "fp32", ["-m", "training.latents", *encode])
    options = {
        **{name: source[name] for name in ("--predictor", "--num-heads")},
        **{"--data": latents, "--out": str(folder / "refiner.safetensors")},
        **{"--runs": str(folder / "runs"), "--sample-every": "0", "--precision": "bf16"},
        **{"--steps": str(STEPS), "--batch": str(BATCH)},
    }
    given = [word for option in options.items() for word in option]
    step = f"train {STEPS} steps of {BATCH} rows"
    yield _run(step, "bf16", ["-m", "training.refiner", *given])


def _fit(args: argparse.Namespace, source: Source) -> Iterator[Run]:
    """Exports for this CPU and fits L4 to few trajectories of guided images."""
    given = [word for option in source.items() for word in option]
    models, cache = args.folder / "models-cpu", args.folder / "fit"
    for folder in (models, cache):  # what is there would take no time
        shutil.rmtree(folder, ignore_errors=True)
    repository = ["--repository", str(models)]
    export = ["-m", "export", *given, *repository, "--precision", "bf16", "--runtime", "openvino"]
    yield _run("export for this CPU", "bf16", export)
    fit = ["-m", "tuning.fit", *repository, "--evaluations", "4", "--guidance", "4", "4"]
    fit += ["--trajectories", str(TRAJECTORIES), "--held-out", "1", "--cache", str(cache)]
    yield _run(f"fit L4 to {TRAJECTORIES} trajectories", "bf16", fit)


PARTS = {"export": _export, "train": _train, "fit": _fit}


def checkpoints(folder: Path, size: str) -> Source:
    """Writes random weights to the files that a user would download; keeps existing files."""
    config = SIZES[size].config
    predictor, refiner = folder / f"{size}.pt", folder / f"{size}-refiner.pt"
    vae = folder / f"{size}-vae"
    folder.mkdir(parents=True, exist_ok=True)
    for k, (path, shape) in enumerate([(predictor, config), (refiner, refiner_config(config))]):
        if not path.exists():
            print(f"{path}: random weights", flush=True)
            partial = path.with_suffix(".partial")
            torch.save(random_network(shape, k).state_dict(), partial)
            partial.rename(path)
    if not vae.exists():
        partial = vae.with_suffix(".partial")
        random_vae(SIZES[size].vae_channels, config.latent_channels).save_pretrained(partial)
        partial.rename(vae)
    source = {"--predictor": str(predictor), "--refiner": str(refiner), "--vae": str(vae)}
    return {**source, "--num-heads": str(config.num_heads)}


def _run(step: str, precision: str, arguments: list[str]) -> Run:
    print(f"== {precision}: {step}", flush=True)
    started = time.monotonic()
    process = os.posix_spawn(sys.executable, [sys.executable, *arguments], os.environ)
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(os.waitstatus_to_exitcode(status))
    minutes = (time.monotonic() - started) / 60
    return Run(step, precision, round(minutes, 2), round(usage.ru_maxrss / 2**20, 2))


if __name__ == "__main__":
    main()
