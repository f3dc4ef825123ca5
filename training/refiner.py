"""Trains a velocity refiner for a SiT: `python -m training.refiner --predictor … --data … --out …`.

The data are latents from `python -m training.latents`, or a folder of images with one subfolder
per class. Images need --vae and are encoded again each time they are read. A stopped run resumes
from its state in --runs. `accelerate launch -m training.refiner` uses several GPUs.

For text to image, give --diffusers FOLDER --prompts FILE instead: `python -m training.refiner
--diffusers FOLDER --help` has its options.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from flowturbo.command import natural, positive
from flowturbo.errors import FlowTurboError
from flowturbo.nets.checkpoint import KNOWN_HEADS, load_predictor, load_refiner
from flowturbo.nets.sit import SiT, SiTConfig, refiner_config
from flowturbo.nets.vae import latent_factor, load_vae
from flowturbo.nets.weights import WEIGHTS_KEYS, sha256
from training.data import EncodedImages, LatentSource, vae_digest
from training.images import DataError, Skipped, check_outside, list_pictures, shown, unused
from training.loop import Preview, atomic_write, device, fit, print_error, processes, save_weights
from training.objective import RefinerObjective, Rule, regression_loss
from training.options import HelpFormatter, add_plan_options, plan_of
from training.plan import Pace, PlanError, TrainingConfig
from training.samples import RefinerPreview
from training.shards import Shards, is_sharded

# Section 4.1: AdamW, 5e-5 constant, no decay, batch 18, 30,000 iterations.
PAPER = TrainingConfig(
    steps=30_000,
    batch=18,
    learning_rate=5e-5,
    seed=0,
    warmup=0,
    decay="constant",
    betas=(0.9, 0.999),
    ema_decay=0.9999,
)

UNUSED = "unused.json"  # in the folder of a run: which data it leaves out, and why
SAMPLE_SCALE = 1.5  # guidance scale of SiT's published samples


@dataclass(frozen=True)
class Trained:
    """A refiner with averaged weights, and one with the weights of the last step."""

    ema: SiT
    model: SiT


def train(
    source: LatentSource,
    predictor: SiT,
    model: SiT,
    objective: RefinerObjective,
    plan: TrainingConfig,
    folder: Path,
    *,
    pace: Pace = Pace(),  # noqa: B008 (it is frozen)
    identity: dict[str, str] | None = None,
    preview: Preview | None = None,
) -> Trained:
    """Fits the refiner `model` to `predictor` on the latents of `source`.

    State, losses and sample images go to `folder` (training.loop.fit). `identity` identifies the
    predictor and the data.
    """
    predictor = predictor.to(device()).eval().requires_grad_(False)
    null = predictor.config.num_classes if predictor.config.null_class else None

    def loss_of(network: nn.Module, generator: torch.Generator) -> Tensor:
        draws = objective.draw(plan.batch, source, generator).local()
        data = source.read(draws.row).to(device())
        return regression_loss(objective, predictor, network, null, data, draws.to(device()))

    depends_on = {
        **asdict(objective),
        **asdict(model.config),
        "rows": len(source),
        **(identity or {}),
    }
    ema = fit(
        "refiner", model, loss_of, plan, folder, pace=pace, identity=depends_on, preview=preview
    )
    assert isinstance(ema, SiT)
    return Trained(ema, model.eval().requires_grad_(False))


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2, with one line on stderr, for errors that the user can fix."""
    run: Callable[[argparse.Namespace], None] = _run
    parser = _parser
    if any(word.partition("=")[0] == "--diffusers" for word in argv):
        from training import folder_refiner  # loads the libraries of all model families

        run, parser = folder_refiner.run, folder_refiner.parser
    args = parser().parse_args(argv)
    try:
        run(args)
    except (FlowTurboError, FloatingPointError, OSError) as error:
        print_error("refiner", error)
        return 2  # no destroy_process_group: on GPUs it waits for others, which the launcher stops
    processes().destroy_process_group()
    return 0


def _run(args: argparse.Namespace) -> None:
    if args.out.suffix != ".safetensors" or args.out.is_dir():
        raise PlanError(f"--out must be a file that ends in .safetensors, got {args.out}")
    (low, high), (least, most) = args.step_range, args.train_guidance
    objective = RefinerObjective(
        Rule(args.objective), low, high, least, most, args.guidance_channels
    )
    plan = plan_of(args, PAPER)
    plan.check_processes(processes().num_processes)
    predictor = load_predictor(
        args.predictor,
        args.weights,
        args.num_heads,
        num_classes=args.num_classes,
        reverse_time=args.reverse_time,
    )
    if args.guidance_channels > (channels := predictor.config.latent_channels):
        raise PlanError(
            f"--guidance-channels must be 1 to {channels}, got {args.guidance_channels}"
        )
    scale = _sample_scale(args, predictor.config)
    model = _model(args, predictor.config)
    vae = _load_vae(args.vae, predictor.config) if args.vae else None
    source = _open_data(args, predictor.config, vae)
    preview = RefinerPreview(
        predictor,
        args.sample_every,
        vae=vae,
        schedule=args.sample_schedule,
        guidance_scale=scale,
        precision=plan.precision,
        guided_channels=objective.guided_channels,
    )
    if processes().is_main_process:
        args.runs.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.runs / UNUSED) as file:
            unused_data = {"left_out": source.left_out, **source.unused}
            file.write(json.dumps(unused_data, indent=1).encode())
    trained = train(
        source,
        predictor,
        model,
        objective,
        plan,
        args.runs,
        pace=Pace(args.save_every_s, args.log_every),
        identity=_identity(args, source),
        preview=preview if args.sample_every else None,
    )
    if processes().is_main_process:
        names = (
            *("objective", "step_range", "train_guidance", "guidance_channels"),
            *("start", "steps", "out_weights"),
        )
        notes = {name: str(getattr(args, name)) for name in names}
        save_weights(getattr(trained, args.out_weights), args.out, notes=notes)
        print(f"{args.out}: {args.out_weights} weights after {plan.steps} steps")


def _identity(args: argparse.Namespace, source: Shards | EncodedImages) -> dict[str, str]:
    """What the steps of a run depend on, besides its plan and objective."""
    files = {name: getattr(args, name) for name in ("predictor", "start")}
    return {
        **{name: sha256(path) if path else "" for name, path in files.items()},
        "weights": str(args.weights),
        "start_weights": str(args.start_weights),
        "predictor_heads": str(args.num_heads),
        "predictor_classes": str(args.num_classes),
        "reverse_time": str(args.reverse_time),
        "data": source.digest,
    }


def _sample_scale(args: argparse.Namespace, predictor: SiTConfig) -> float:
    """The guidance scale of the samples. Raises PlanError for guidance without a null class."""
    asked = {"--train-guidance": args.train_guidance, "--guidance-scale": [args.guidance_scale]}
    for option, scales in asked.items():
        if not predictor.null_class and any(scale not in (None, 1.0) for scale in scales):
            shown = " ".join(f"{scale:g}" for scale in scales)
            raise PlanError(f"{args.predictor} has no null class: {option} must be 1, got {shown}")
    default = SAMPLE_SCALE if predictor.null_class else 1.0
    return default if args.guidance_scale is None else float(args.guidance_scale)


def _model(args: argparse.Namespace, predictor: SiTConfig) -> SiT:
    """The refiner to train: the one of --start, or one with random weights."""
    if args.start and (args.width or args.depth != 1):
        raise PlanError("--start has its own depth and width: omit --depth and --width")
    if args.start:
        model = load_refiner(args.start, predictor, args.start_weights, args.heads)
        return model.requires_grad_(True)
    torch.manual_seed(args.seed)
    model = SiT(_architecture(args, predictor))
    model.initialize()
    return model


def _architecture(args: argparse.Namespace, predictor: SiTConfig) -> SiTConfig:
    config = refiner_config(predictor)
    width = args.width or config.width
    heads = args.heads or (config.num_heads if width == config.width else KNOWN_HEADS.get(width))
    if not heads:
        known = ", ".join(map(str, KNOWN_HEADS))
        raise PlanError(f"--width {width} needs --heads: heads are known only for {known}")
    if width % heads or width % 4:
        raise PlanError(
            f"--width must be a multiple of 4 and of --heads, got width {width}, heads {heads}"
        )
    return replace(config, width=width, num_heads=heads, depth=args.depth)


def _load_vae(folder: Path, model: SiTConfig) -> AutoencoderKL:
    vae = load_vae(folder)
    if vae.config.latent_channels != model.latent_channels:
        raise DataError(
            f"{folder} has {vae.config.latent_channels} latent channels, "
            f"the predictor has {model.latent_channels}"
        )
    return vae


def _open_data(
    args: argparse.Namespace, model: SiTConfig, vae: AutoencoderKL | None
) -> Shards | EncodedImages:
    """Opens latents if there is an index of them, else images. Prints what was skipped."""
    source: Shards | EncodedImages
    skipped: Skipped | None
    empty: Sequence[str]
    skipped, empty = None, ()
    if not args.data.is_dir():
        raise DataError(f"{args.data} is not a folder")
    for option, path in (("--runs", args.runs), ("--out", args.out)):
        check_outside(option, path, args.data)
    if is_sharded(args.data):
        for option in ("flip", "ignore_orientation"):
            if getattr(args, option):
                raise PlanError(
                    f"--{option.replace('_', '-')} is for images, but {args.data} has latents: "
                    "give it to training.latents instead"
                )
        source = Shards(args.data, model, skip_bad=args.skip_bad)
        if vae and vae_digest(vae) != source.vae:
            raise DataError(f"{args.data} was encoded with another VAE than {args.vae}")
    elif vae is None:
        raise DataError(f"{args.data} has no index of latents: to encode images, give --vae")
    else:
        size = model.latent_size * latent_factor(vae)
        pictures = list_pictures(
            args.data,
            size,
            flip=args.flip,
            skip_bad=args.skip_bad,
            as_stored=args.ignore_orientation,
        )
        source = EncodedImages(pictures, vae, model, skip_bad=args.skip_bad)
        skipped, empty = pictures.skipped, pictures.empty
    if processes().is_main_process:
        for line in unused(source.left_out, skipped, empty):
            print(line, file=sys.stderr)
        counted = f", {len(empty)} of them empty" if empty else ""
        print(
            f"{len(source)} images ({source.skipped} skipped) of {shown(source.class_names)}"
            f"{counted}; the predictor has {model.num_classes}"
        )
    return source


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.refiner",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--predictor", type=Path, required=True, help="SiT checkpoint, .pt or .safetensors")
    both = "weights to read from a .pt that holds both"
    add("--weights", choices=WEIGHTS_KEYS, help=f"predictor {both} (default: ema)")
    add("--num-heads", type=positive, help="heads of the predictor; needed for an unusual width")
    add(
        "--num-classes",
        type=positive,
        help="classes of the predictor, if its file does not state them",
    )
    add(
        "--reverse-time",
        action="store_true",
        help="the predictor has noise at t = 1, as REPA's models do",
    )
    add("--data", type=Path, required=True, help="folder of latents, or of images")
    add("--vae", type=Path, help="AutoencoderKL folder, to encode images and to decode samples")
    add("--flip", action="store_true", help="also train on mirrored images; for images only")
    add(
        "--ignore-orientation",
        action="store_true",
        help="read images as stored, without the rotation of their EXIF data",
    )
    add("--skip-bad", action="store_true", help="leave out and count data that cannot be used")
    add("--out", type=Path, required=True, help="safetensors file to write the refiner to")
    add(
        "--out-weights",
        choices=("ema", "model"),
        default="ema",
        help="weights to write: averaged, or of the last step",
    )
    add(
        "--runs",
        type=Path,
        default=Path("runs/refiner"),
        help="folder for state, losses and samples; all nodes must share it",
    )
    add(
        "--objective",
        choices=tuple(Rule),
        default=Rule.PAPER,
        help="objective of the paper's text, or of the public code",
    )
    add(
        "--step-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=[RefinerObjective().smallest_step, RefinerObjective().largest_step],
        help="range of the Euler steps to train on",
    )
    add(
        "--train-guidance",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=[RefinerObjective().smallest_scale, RefinerObjective().largest_scale],
        help="range of the guidance scales of the velocities to train on",
    )
    add(
        "--guidance-channels",
        type=positive,
        default=RefinerObjective().guided_channels,
        help="channels that guidance acts on, in training and in samples",
    )
    add("--start", type=Path, help="refiner checkpoint to start from, instead of random weights")
    add("--start-weights", choices=WEIGHTS_KEYS, help=f"--start {both} (default: model)")
    add("--depth", type=positive, default=1, help="blocks of the refiner")
    add("--width", type=positive, help="width of the refiner (default: the predictor's)")
    add("--heads", type=positive, help="heads of the refiner; needed for an unusual width")
    add_plan_options(parser, PAPER)
    add("--sample-every", type=natural, default=1000, help="steps between sample grids; 0: none")
    add("--sample-schedule", default="H1P5R3", help="schedule of the samples, such as H1P5R3@2")
    add(
        "--guidance-scale",
        type=float,
        help=f"guidance scale of the samples (default: {SAMPLE_SCALE}, or 1 without a null class)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
