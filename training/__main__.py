"""Makes the glyphs model from nothing: `python -m training [--out weights/glyphs]`.

Stages in order: render the data, train the VAE, the classifier, the predictor and the refiner.
Each resumes where it was stopped; a stage already written is not done again.
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn

from flowturbo.nets.sit import SiT
from training import autoencoder, classifier, predictor, refiner
from training.frechet import Reference, Statistics
from training.glyphs import CLASS_NAMES, label_of, load_or_render
from training.loop import Plan

IMAGES = 48_000
REFERENCE_IMAGES = 10_000  # whose features generated images are compared with
REFERENCE_ROWS = 5_000  # of them, whose features are kept as they are
PLANS = {
    "vae": Plan(1750, batch=32, learning_rate=1.5e-3, seed=1, restarts=(1000,), ema_decay=0.0),
    "classifier": Plan(1500, batch=128, learning_rate=2e-3, seed=2, ema_decay=0.99),
    "predictor": Plan(2600, batch=96, learning_rate=1e-3, seed=3),
    "predictor_uniform": Plan(
        5600, batch=96, learning_rate=1e-3, seed=5, restarts=(1800, 3100), ema_decay=0.995
    ),
    "refiner": Plan(2500, batch=64, learning_rate=1e-3, seed=4),
}


def main() -> None:
    """Runs every stage and writes the weights."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("weights/glyphs"))
    parser.add_argument("--runs", type=Path, default=Path("runs/glyphs"), help="data and states")
    parser.add_argument("--seed", type=int, default=0, help="of the data")
    args = parser.parse_args()
    images = load_or_render(args.runs / "data", IMAGES, args.seed)
    labels = torch.from_numpy(label_of(np.arange(len(images))))
    args.out.mkdir(parents=True, exist_ok=True)

    vae = autoencoder.train(images, PLANS["vae"], args.runs)
    vae.save_pretrained(args.out / "vae")
    judge = classifier.train(images, PLANS["classifier"], args.runs)
    _save(judge, args.out / "classifier.safetensors", torch.float16)
    reference(judge, images[:REFERENCE_IMAGES]).save(args.out / "features.npz")
    digest = _digest(args.out / "vae" / "diffusion_pytorch_model.safetensors")
    cached = args.runs / "data" / f"latents-{len(images)}-{args.seed}-{digest}.pt"
    latents = _latents(vae, images, cached)
    velocity = predictor.train(latents, labels, len(CLASS_NAMES), PLANS, args.runs)
    _save(velocity, args.out / "predictor.safetensors", torch.float16)
    change = refiner.train(latents, labels, velocity, PLANS["refiner"], args.runs)
    _save(change, args.out / "refiner.safetensors", torch.float32)
    (args.out / "classes.txt").write_text("\n".join(CLASS_NAMES) + "\n")
    for name in PLANS:
        shutil.copy(args.runs / f"{name}.json", args.out / f"{name}.training.json")
    print(json.dumps({p.name: p.stat().st_size for p in sorted(args.out.iterdir())}, indent=1))


def reference(judge: nn.Sequential, images: np.ndarray) -> Reference:
    """What the classifier sees in real `images` [N, 64, 64, 3] uint8."""
    seen = classifier.look(judge, images)
    pooled, spatial = Statistics.of(seen.pooled), Statistics.of(seen.spatial)
    return Reference(pooled, spatial, seen.pooled[:REFERENCE_ROWS])


def _latents(vae: AutoencoderKL, images: np.ndarray, path: Path) -> Tensor:
    """The latents of `images`, kept at `path`."""
    if not path.exists():
        torch.save(autoencoder.encode(vae, images), path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)
    latents: Tensor = torch.load(path, weights_only=True)
    return latents


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def _save(model: nn.Module, path: Path, dtype: torch.dtype) -> None:
    """Writes `model` as safetensors; a SiT's heads cannot be read off its shapes, so they go in."""
    metadata = {"num_heads": str(model.config.num_heads)} if isinstance(model, SiT) else {}
    tensors = {key: value.cpu().to(dtype).contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, path, metadata)


if __name__ == "__main__":
    main()
