"""Makes the scenes model from nothing: `python -m training.scenes [--out weights/scenes]`.

Stages in order: render the data, train the judge, the VAE, the predictor with its text encoders,
and the refiner. Each stage resumes where it was stopped. A finished stage is not repeated.
"""

import argparse
import hashlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from flowturbo.nets.families.family import FolderOptions
from flowturbo.nets.families.loading import load_family
from flowturbo.solver.schedule import Schedule
from training import autoencoder, folder_refiner
from training.data import encode, vae_digest
from training.judging import REFERENCE_IMAGES, reference
from training.loop import save_weights
from training.plan import TrainingConfig
from training.scenes import judge, predictor
from training.scenes.grammar import scenes, vocabulary
from training.scenes.network import LATENT_CHANNELS, make_tokenizer, save_folder
from training.scenes.pictures import load_images
from training.stages import run_stages
from training.trajectories import TrajectoryPlan

IMAGES = 80_000
# The judge must know all pairs of sign and colour; its images have another seed.
JUDGE_IMAGES, JUDGE_SEED = 40_000, 1
PROMPTS = 4_000  # of the refiner's trajectories
PLANS = {
    "judge": TrainingConfig(2000, batch=128, learning_rate=2e-3, seed=2, ema_decay=0.99),
    "vae": TrainingConfig(1600, batch=32, learning_rate=1.5e-3, seed=1, ema_decay=0.0),
    "predictor": TrainingConfig(6000, batch=64, learning_rate=1e-3, seed=3, decay="constant"),
    "predictor_decay": TrainingConfig(3000, batch=64, learning_rate=1e-3, seed=5),
    "refiner": TrainingConfig(8000, batch=64, learning_rate=1e-3, seed=4, ema_decay=0.999),
}
TRAJECTORIES = TrajectoryPlan(steps=(6, 20), scales=(2.0, 5.0), batches=16, batch=32)


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2, with one line on stderr, for errors that the user can fix."""
    return run_stages("scenes", __doc__, _run, argv)


def _run(args: argparse.Namespace) -> None:
    """Runs every stage. Refuses a state of other data, or of another earlier network."""
    _judge(args)
    images = load_images(args.runs / "data", IMAGES, args.seed)
    data = {"images": hashlib.sha256(images.data).hexdigest()}
    vae = autoencoder.train(images, LATENT_CHANNELS, PLANS["vae"], args.runs, data)
    tokenizer = make_tokenizer(vocabulary(), args.runs / "tokenizer")
    identity = {**data, "vae": vae_digest(vae)}
    name = hashlib.sha256("".join(identity.values()).encode()).hexdigest()[:12]
    latents = encode_all(vae, images, args.runs / "data" / f"latents-{name}.npy")
    drawn = scenes(IMAGES, args.seed)
    model = predictor.train(latents, drawn, tokenizer, vae, PLANS, args.runs, identity)
    save_folder(model, vae, tokenizer, args.out / "model")
    _refiner(args)
    for name in PLANS:
        shutil.copy(args.runs / f"{name}.json", args.out / f"{name}.training.json")


def _judge(args: argparse.Namespace) -> None:
    """Trains the judge, and the statistics of its features of images as the predictor's."""
    seed = args.seed + JUDGE_SEED
    images = load_images(args.runs / "judge", JUDGE_IMAGES, seed, held_out=None)
    drawn = scenes(JUDGE_IMAGES, seed, held_out=None)
    data = {"images": hashlib.sha256(images.data).hexdigest()}
    trained = judge.train(images, drawn, PLANS["judge"], args.runs, data)
    save_weights(trained, args.out / "judge.safetensors", torch.float16)
    seen = load_images(args.runs / "data", IMAGES, args.seed)
    reference(trained, seen[:REFERENCE_IMAGES]).save(args.out / "features.npz")


def _refiner(args: argparse.Namespace) -> None:
    family = load_family(FolderOptions(args.out / "model", text_length=0))
    rng = np.random.default_rng([args.seed, 2])
    prompts = [scene.prompt(rng) for scene in scenes(PROMPTS, args.seed)]
    (args.out / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    plan, made = PLANS["refiner"], family.untrained_refiner()
    schedule = Schedule.parse("H1P5R3")
    texts = folder_refiner.encode_prompts(family, prompts, args.runs)
    trained, source = folder_refiner.train(
        family, made, texts, TRAJECTORIES, plan, args.runs, sample_every=500, schedule=schedule
    )
    notes = folder_refiner.notes(source, TRAJECTORIES, texts, plan)
    folder_refiner.save(trained, made, args.out / "refiner", notes)


def encode_all(vae: AutoencoderKL, images: np.ndarray, path: Path) -> np.ndarray:
    """The means of the latents of `images`, [N, C, h, w] float16, kept in the file `path`."""
    if not path.exists():
        batches = [images[start : start + 256] for start in range(0, len(images), 256)]
        means = [encode(vae, batch)[0].half().numpy() for batch in tqdm(batches, "encode")]
        partial_path = path.with_suffix(".partial.npy")
        np.save(partial_path, np.concatenate(means))
        partial_path.rename(path)
    loaded: np.ndarray = np.load(path)
    return loaded


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
