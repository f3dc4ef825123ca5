"""Makes the glyphs model from nothing: `python -m training.glyphs [--out weights/glyphs]`.

Stages in order: render the data, train the VAE, the classifier, the predictor and the refiner.
Each stage resumes where it was stopped. A finished stage is not repeated.
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from flowturbo.nets.sit import SiT, refiner_config
from flowturbo.nets.vae import load_vae
from flowturbo.nets.weights import sha256
from training import autoencoder, refiner
from training.data import InMemory, vae_digest
from training.glyphs import classifier, predictor
from training.glyphs.pictures import CLASS_NAMES, GlyphImages, load_images
from training.judging import REFERENCE_IMAGES, reference
from training.latents import Storage, Writer
from training.loop import digest_of, save_weights
from training.objective import RefinerObjective
from training.plan import TrainingConfig
from training.samples import RefinerPreview
from training.shards import Shards
from training.stages import run_stages

IMAGES = 48_000
PLANS = {
    "vae": TrainingConfig(
        1750, batch=32, learning_rate=1.5e-3, seed=1, restarts=(1000,), ema_decay=0.0
    ),
    "classifier": TrainingConfig(1500, batch=128, learning_rate=2e-3, seed=2, ema_decay=0.99),
    "predictor": TrainingConfig(2600, batch=96, learning_rate=1e-3, seed=3),
    "predictor_uniform": TrainingConfig(
        5600, batch=96, learning_rate=1e-3, seed=5, restarts=(1800, 3100), ema_decay=0.995
    ),
    "refiner": TrainingConfig(2500, batch=64, learning_rate=1e-3, seed=4),
}


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2, with one line on stderr, for errors that the user can fix."""
    return run_stages("glyphs", __doc__, _run, argv)


def _run(args: argparse.Namespace) -> None:
    """Runs every stage. Refuses a state of other data, or of another earlier network."""
    images = load_images(args.runs / "data", IMAGES, args.seed)
    data = {"images": hashlib.sha256(images.data).hexdigest()}

    vae = autoencoder.train(images, 4, PLANS["vae"], args.runs, data)
    vae.save_pretrained(args.out / "vae")
    judge = classifier.train(images, PLANS["classifier"], args.runs, data)
    save_weights(judge, args.out / "classifier.safetensors", torch.float16)
    reference(judge, images[:REFERENCE_IMAGES]).save(args.out / "features.npz")
    shards = Shards(glyph_latents(args.out / "vae", args.runs, args.seed))
    source = InMemory(shards.read(torch.arange(len(shards))))
    latents = {**data, "vae": vae_digest(vae)}
    velocity = predictor.train(source.data, len(CLASS_NAMES), PLANS, args.runs, latents)
    save_weights(velocity, args.out / "predictor.safetensors", torch.float16)
    torch.manual_seed(PLANS["refiner"].seed)
    untrained = SiT(refiner_config(velocity.config))
    untrained.initialize()
    change = refiner.train(
        source,
        velocity,
        untrained,
        RefinerObjective(),
        PLANS["refiner"],
        args.runs,
        identity={**latents, "predictor": digest_of(velocity.state_dict())},
        preview=RefinerPreview(velocity, every=500, vae=vae, guidance_scale=3.0),
    )
    save_weights(change.ema, args.out / "refiner.safetensors")
    (args.out / "classes.txt").write_text("\n".join(CLASS_NAMES) + "\n")
    for name in PLANS:
        shutil.copy(args.runs / f"{name}.json", args.out / f"{name}.training.json")
    print(json.dumps({p.name: p.stat().st_size for p in sorted(args.out.iterdir())}, indent=1))


def glyph_latents(vae: Path, runs: Path, seed: int = 0) -> Path:
    """The folder of the latents of the data, encoded by the VAE in the folder `vae` if missing."""
    images = load_images(runs / "data", IMAGES, seed)
    digest = sha256(vae / "diffusion_pytorch_model.safetensors")[:12]
    folder = runs / "data" / f"latents-{IMAGES}-{seed}-{digest}"  # Writer detects other images
    storage = Storage(dtype="float32", mean_only=True)
    Writer(GlyphImages(images), load_vae(vae), folder, storage, batch=256).write()
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
