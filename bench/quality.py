"""How good the glyphs are: `python -m bench.quality`.

Images are made in this process by the exported blocks that the server runs. A classifier reads
them, and its features are compared with those of the training images.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import load_file
from tqdm import tqdm

from flowturbo import LocalPipeline
from training import classifier
from training.frechet import Statistics, frechet_distance

BATCH = 25


@dataclass(frozen=True)
class Quality:
    """Of `images` images from `schedule`.

    `recognised` is the share in which the classifier reads the class asked for;
    `frechet_distance` compares its features with those of the training images.
    """

    schedule: str
    precision: str
    guidance_scale: float
    images: int
    recognised: float
    frechet_distance: float


def measure(
    pipeline: LocalPipeline, weights: Path, schedule: str, guidance_scale: float, count: int
) -> Quality:
    """Quality of `count` images, classes in turn and seeds 0, 1, ..."""
    judge = classifier.build()
    judge.load_state_dict(load_file(weights / "classifier.safetensors"))
    right, features = 0, []
    for labels, images in _images(pipeline, schedule, guidance_scale, count):
        right += int((classifier.recognise(judge, images) == labels).sum())
        features.append(classifier.features(judge, images))
    found, real = (
        Statistics.of(np.concatenate(features)),
        Statistics.load(weights / "features.npz"),
    )
    return Quality(
        schedule,
        pipeline.pipeline.precision,
        guidance_scale,
        count,
        right / count,
        frechet_distance(found, real),
    )


def _images(
    pipeline: LocalPipeline, schedule: str, guidance_scale: float, count: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in tqdm(range(0, count, BATCH), f"{schedule} at guidance {guidance_scale:g}"):
        seeds = np.arange(start, min(start + BATCH, count))
        labels = seeds % pipeline.pipeline.num_classes
        result = pipeline.generate(labels, seeds, schedule, guidance_scale)
        assert result.image is not None
        yield labels, result.image


def main() -> None:
    """Prints and writes the quality of each schedule in each repository."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("--repository", type=Path, nargs="+", default=[Path("model_repository")])
    parser.add_argument("--weights", type=Path, default=Path("weights/glyphs"))
    parser.add_argument("--schedule", nargs="+", help="default: H8 and the service's own")
    parser.add_argument("--guidance-scale", type=float, help="default: the service's")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="where to write the figures as well")
    args = parser.parse_args()
    found = []
    for repository in args.repository:
        pipeline = LocalPipeline(repository)
        settings = pipeline.settings
        scale = args.guidance_scale
        if scale is None:
            scale = settings.default_guidance_scale
        for schedule in args.schedule or ["H8", settings.default_schedule]:
            found.append(measure(pipeline, args.weights, schedule, scale, args.images))
    print(f"schedule  precision  recognised  Fréchet distance   ({args.images} images each)")
    for q in found:
        print(f"{q.schedule:<9} {q.precision:<10} {q.recognised:10.1%}  {q.frechet_distance:10.3f}")
    if args.json:
        args.json.write_text(json.dumps([asdict(q) for q in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
