"""`python -m export`: checkpoints to a model repository that Triton serves."""

import argparse
import sys
from pathlib import Path

from export.pipeline import Options, export_pipeline
from flowturbo.errors import FlowTurboError


def main() -> int:
    """Returns the exit status: 2, and one line on stderr, for what the user can put right."""
    options = Options(**vars(_parser().parse_args()))
    try:
        export_pipeline(options)
    except (FlowTurboError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__)
    add = parser.add_argument
    add("--predictor", type=Path, required=True, help="SiT checkpoint, .pt or .safetensors")
    add("--refiner", type=Path, help="refiner checkpoint; without it, no R steps")
    add("--vae", type=Path, help="diffusers AutoencoderKL folder; without it, latents only")
    add("--repository", type=Path, default=Path("model_repository"))
    both = "of a .pt that holds both (default: model)"
    add("--weights", choices=("model", "ema"), help=f"the predictor's, {both}")
    add("--refiner-weights", choices=("model", "ema"), help=f"the refiner's, {both}")
    add("--num-heads", type=_positive, help="attention heads, where the width does not tell")
    add("--refiner-num-heads", type=_positive, help="the refiner's, where they differ")
    add("--class-names", type=Path, help="text file, a class name a line")
    add("--guidance-channels", type=_positive, default=3, help="channels that guidance acts on")
    add("--max-rows", type=_pair, default=64, help="most rows in one batch (2 a guided image)")
    add("--queue-delay-us", type=_natural, default=0, help="how long Triton holds a batch for more")
    add("--force", action="store_true", help="export again although nothing has changed")
    return parser


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not _natural(text):
        raise argparse.ArgumentTypeError("must be at least 1, got 0")
    return int(text)


def _pair(text: str) -> int:
    if _natural(text) < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, a guided image's rows, got {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
