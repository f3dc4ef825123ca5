"""How often the classifier reads the class asked for: `python -m training.recognition`.

Images are made in this process by the exported blocks that the server runs.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from safetensors.torch import load_file
from tqdm import tqdm

from flowturbo import LocalPipeline
from training import classifier

BATCH = 25


def recognised(
    pipeline: LocalPipeline, weights: Path, schedule: str, guidance_scale: float, count: int
) -> float:
    """The share of `count` images, classes in turn and seeds 0, 1, ..., that show their class."""
    judge = classifier.build()
    judge.load_state_dict(load_file(weights / "classifier.safetensors"))
    right = 0
    for start in tqdm(range(0, count, BATCH), f"{schedule} at guidance {guidance_scale:g}"):
        seeds = np.arange(start, min(start + BATCH, count))
        labels = seeds % pipeline.pipeline.num_classes
        result = pipeline.generate(labels, seeds, schedule, guidance_scale)
        assert result.image is not None
        right += int((classifier.recognise(judge, result.image) == labels).sum())
    return right / count


def main() -> None:
    """Prints and writes the share for each schedule."""
    parser = argparse.ArgumentParser(prog="python -m training.recognition", description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--weights", type=Path, default=Path("weights/glyphs"))
    parser.add_argument("--schedule", nargs="+", help="default: H8 and the service's own")
    parser.add_argument("--guidance-scale", type=float, help="default: the service's")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="where to write the shares as well")
    args = parser.parse_args()
    pipeline = LocalPipeline(args.repository)
    settings = pipeline.settings
    guidance_scale = args.guidance_scale
    if guidance_scale is None:
        guidance_scale = settings.default_guidance_scale
    shares = {
        schedule: recognised(pipeline, args.weights, schedule, guidance_scale, args.images)
        for schedule in args.schedule or ["H8", settings.default_schedule]
    }
    for schedule, share in shares.items():
        print(f"{schedule}: {share:.1%} of {args.images} images recognised")
    if args.json:
        record = {"guidance_scale": guidance_scale, "images": args.images, "recognised": shares}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
