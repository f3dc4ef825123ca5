"""Trains the refiners of the study's last section: `python -m research.study.refiners`.

Trains every refiner of REFINERS for the glyphs predictor, on the predictor's training data. Exports
each refiner with the rest of the pipeline to its own repository, where `python -m research.study`
finds it. Skips finished refiners and resumes interrupted training.
"""

import argparse
import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from flowturbo.command import run_command
from flowturbo.errors import FlowTurboError
from flowturbo.nets.weights import sha256
from flowturbo.pipeline import read_pipeline
from training.glyphs.__main__ import glyph_latents
from training.shards import Shards

FOLDER = Path("runs/study/refiners")
_ALL = "--batch 64 --decay cosine --warmup 50 --ema-decay 0.995"
_SHORT = f"{_ALL} --learning-rate 1e-3 --steps 1000 --seed 4"
_ON = f"{_ALL} --learning-rate 5e-4 --start refiner.safetensors"

# Options of `python -m training.refiner`. --start is relative to the folder of the glyphs weights.
REFINERS = {
    "paper": _SHORT,
    "reference": f"{_SHORT} --objective reference",
    "to 0.2": f"{_SHORT} --step-range 0 0.2",
    "from 0.06": f"{_SHORT} --step-range 0.06 0.12",
    "deep": f"{_SHORT} --depth 2",
    "narrow": f"{_SHORT} --width 96 --heads 3",
    "guided": f"{_ON} --steps 2200 --train-guidance 1 4",
    "wide": f"{_ON} --steps 1250 --step-range 0 0.4",
}


def main(argv: Sequence[str]) -> int:
    """Trains and exports the missing refiners.

    Returns the exit status: 2, with one line on stderr, for an error that the user can correct.
    """
    parser = argparse.ArgumentParser(prog="python -m research.study.refiners", description=__doc__)
    parser.add_argument("--weights", type=Path, default=Path("weights/glyphs"))
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument(
        "--data", type=Path, help="training latents; default: encode those of glyphs"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/glyphs"), help="glyphs data")
    parser.add_argument("--out", type=Path, default=FOLDER, help="repositories and training states")
    args = parser.parse_args(argv)
    errors = (FlowTurboError, OSError, subprocess.CalledProcessError)
    return run_command("refiners", lambda: _train(args), errors)


def _train(args: argparse.Namespace) -> None:
    weights, out = args.weights, args.out
    pipeline = read_pipeline(args.repository)
    data = args.data or glyph_latents(weights / "vae", args.runs)
    shards = Shards(data)
    for name, options in REFINERS.items():
        # The digest names the refiner's sources: other options, weights or latents, another file.
        refiner = out / f"{name}_{_digest(options, weights, shards.digest)}.safetensors"
        if not refiner.exists():
            training = ["--predictor", weights / "predictor.safetensors", "--data", data]
            training += ["--runs", refiner.with_suffix(".run"), "--out", refiner]
            _run("training.refiner", *training, "--sample-every=0", *_options(options, weights))
        # The same precision and runtime as the main pipeline, so that times can be compared.
        form = ["--precision", pipeline.precision, "--runtime", pipeline.runtime]
        parts = ["--predictor", weights / "predictor.safetensors", "--refiner", refiner]
        parts += ["--vae", weights / "vae", "--class-names", weights / "classes.txt"]
        _run("export", *parts, *form, "--repository", out / name)


def _digest(options: str, weights: Path, latents: str) -> str:
    read = (sha256(weights / f"{network}.safetensors") for network in ("predictor", "refiner"))
    return hashlib.sha256("".join([options, latents, *read]).encode()).hexdigest()[:8]


def _options(text: str, weights: Path) -> Sequence[str]:
    words = text.split()
    if "--start" in words:
        at = words.index("--start") + 1
        words[at] = str(weights / words[at])
    return words


def _run(module: str, *words: object) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, words)], check=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
