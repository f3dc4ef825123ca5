"""SiT-XL/2 and an sd-vae-ft-ema decoder at real size on this machine: `python -m bench.xl_check`.

Makes checkpoints of the public shapes with random weights, exports them as a user would, builds
TensorRT engines for a GPU that need not be here, verifies the result, and writes down time, peak
memory and errors.
"""

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.networks import SIZES, random_network, random_vae
from flowturbo.nets.sit import refiner_config


@dataclass(frozen=True)
class Run:
    """One command: what it was, how long it took, and the most memory it held (resident)."""

    step: str
    precision: str
    minutes: float
    peak_gib: float


def main() -> None:
    """Runs every step; the first that fails ends it with its own message."""
    parser = argparse.ArgumentParser(prog="python -m bench.xl_check", description=__doc__)
    parser.add_argument("--size", choices=tuple(SIZES), default="xl")
    parser.add_argument("--folder", type=Path, default=Path("runs/xl"), help="14 GB are needed")
    parser.add_argument("--precision", nargs="+", default=["fp16", "bf16"])
    parser.add_argument("--compute-capability", nargs="+", default=["8.0", "8.9", "12.0"])
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/xl_export.json"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    source = _checkpoints(args.folder, args.size)
    runs: list[Run] = []

    def done(run: Run) -> None:
        runs.append(run)
        print(f"{run.precision} {run.step}: {run.minutes:.1f} min, {run.peak_gib:.2f} GiB")
        report = {"size": args.size, "cores": os.cpu_count(), "runs": [asdict(r) for r in runs]}
        args.out.write_text(json.dumps(report, indent=1) + "\n")

    for precision in args.precision:
        models = args.folder / f"models-{precision}"
        shutil.rmtree(models, ignore_errors=True)  # what is up to date takes no time
        repository = ["--repository", str(models)]
        export = ["-m", "export", *source, *repository, "--precision", precision]
        engine = ["--engine", "tensorrt", "--compute-capability"]
        for k, capability in enumerate(args.compute_capability):
            # The first makes the ONNX files too; the others add their engine to them.
            step = f"export and engine for {capability}" if k == 0 else f"engine for {capability}"
            done(_run(step, precision, [*export, *engine, capability]))
        verify = ["-m", "export", "verify", *source, *repository]
        done(_run("verify", precision, verify))


def _checkpoints(folder: Path, size: str) -> list[str]:
    """Random weights in the files that a user would download; kept for the next time."""
    config = SIZES[size].config
    predictor, refiner, vae = folder / f"{size}.pt", folder / f"{size}-refiner.pt", folder / "vae"
    folder.mkdir(parents=True, exist_ok=True)
    for k, (path, shape) in enumerate([(predictor, config), (refiner, refiner_config(config))]):
        if not path.exists():
            print(f"{path}: random weights", flush=True)
            partial = path.with_suffix(".partial")
            torch.save(random_network(shape, k).state_dict(), partial)
            partial.rename(path)
    if not (vae / "config.json").exists():
        random_vae(SIZES[size].vae_channels, config.latent_channels).save_pretrained(vae)
    source = ["--predictor", str(predictor), "--refiner", str(refiner), "--vae", str(vae)]
    return [*source, "--num-heads", str(config.num_heads)]


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
