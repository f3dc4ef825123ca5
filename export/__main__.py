"""`python -m export`: checkpoints to a model repository that Triton serves."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export import install
from export.blocks import StepBlock
from export.onnx_graph import Exported, export_onnx, verify_onnx
from flowturbo import contract
from flowturbo.errors import FlowTurboError
from flowturbo.nets.checkpoint import Checkpoint, CheckpointError, build_network, load_checkpoint
from flowturbo.nets.sit import SiTConfig


def main() -> None:
    """Command line; a user's error is one line and exit status 2."""
    args = _arguments()
    try:
        export(args)
    except FlowTurboError as error:
        sys.exit(_fail(str(error)))
    except OSError as error:
        sys.exit(_fail(f"cannot write to {args.repository}: {error}"))


def _fail(message: str) -> int:
    print(f"export: {message}", file=sys.stderr)
    return 2


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__)
    add = parser.add_argument
    add("--predictor", type=Path, required=True, help="SiT checkpoint, .pt or .safetensors")
    add("--refiner", type=Path, help="refiner checkpoint; without it, no R steps")
    add("--vae", type=Path, help="diffusers AutoencoderKL folder; without it, latents only")
    add("--repository", type=Path, default=Path("model_repository"))
    add("--weights", choices=("model", "ema"), help="which of a .pt that holds both (model)")
    add("--num-heads", type=_positive, help="attention heads, where the width does not tell")
    add("--refiner-num-heads", type=_positive, help="the refiner's, where they differ")
    add("--class-names", type=Path, help="text file, a class name a line")
    add("--guidance-channels", type=_positive, default=3, help="channels that guidance acts on")
    add("--max-rows", type=_positive, default=64, help="most rows in one batch (2 a guided image)")
    add("--queue-delay-us", type=int, default=0, help="how long a batch waits for more rows")
    add("--force", action="store_true", help="export again although nothing has changed")
    return parser.parse_args()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def export(args: argparse.Namespace) -> None:
    """Exports, verifies and installs one pipeline; does nothing if that very one is installed."""
    checkpoints = {contract.PREDICTOR: load_checkpoint(args.predictor, args.weights)}
    if args.refiner:
        checkpoints[contract.REFINER] = load_checkpoint(args.refiner, args.weights)
    fingerprint = _fingerprint(args, checkpoints)
    if not args.force and _up_to_date(args, fingerprint):
        print(f"export: {args.repository} is up to date")
        return
    with install.staging(args.repository) as staged:
        for exported, source in _modules(args, checkpoints):
            _export_one(args, exported, source, staged / exported.model, fingerprint)
        install.install(staged, args.repository)
    print(f"export: installed in {args.repository}")


def _fingerprint(args: argparse.Namespace, checkpoints: dict[str, Checkpoint]) -> dict[str, Any]:
    """All that decides the result: sources, options, tools and code."""
    sources = {name: checkpoint.sha256() for name, checkpoint in checkpoints.items()}
    if args.vae:
        sources[contract.DECODER] = _digest_folder(args.vae)
    ignored = ("predictor", "refiner", "vae", "repository", "force", "class_names")
    options = {key: value for key, value in vars(args).items() if key not in ignored}
    return {
        "sha256": sources,
        "options": options,
        "class_names": _class_names(args),
        "versions": install.versions(),
        "code": install.source_digest(),
    }


def _digest_folder(folder: Path) -> str:
    import hashlib

    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _up_to_date(args: argparse.Namespace, fingerprint: dict[str, Any]) -> bool:
    wanted = fingerprint["sha256"].keys()
    return all(
        (install.installed_build(args.repository, model).get("fingerprint") == fingerprint)
        == (model in wanted)
        and (args.repository / model).exists() == (model in wanted)
        for model in contract.COMPOSED
    )


def _class_names(args: argparse.Namespace) -> list[str]:
    return args.class_names.read_text().split("\n")[:-1] if args.class_names else []


def _modules(
    args: argparse.Namespace, checkpoints: dict[str, Checkpoint]
) -> list[tuple[Exported, Path]]:
    predictor = build_network(
        checkpoints[contract.PREDICTOR], reads_velocity=False, num_heads=args.num_heads
    )
    config = predictor.config
    _check_options(args, config)
    made: list[tuple[Exported, Path]] = []

    def add(model: str, module: Any, source: Path) -> None:
        shape = (config.latent_channels, config.latent_size, config.latent_size)
        made.append((Exported(model, module, shape, config.num_classes), source))

    add(contract.PREDICTOR, StepBlock(predictor, args.guidance_channels), args.predictor)
    if args.refiner:
        heads = args.refiner_num_heads or args.num_heads
        refiner = build_network(checkpoints[contract.REFINER], reads_velocity=True, num_heads=heads)
        _check_refiner(refiner.config, config)
        add(contract.REFINER, StepBlock(refiner, args.guidance_channels), args.refiner)
    if args.vae:
        add(contract.DECODER, _decoder(args.vae, config), args.vae)
    return made


def _check_options(args: argparse.Namespace, config: SiTConfig) -> None:
    if args.guidance_channels > config.latent_channels:
        raise CheckpointError(
            f"--guidance-channels must be 1 to {config.latent_channels}, "
            f"got {args.guidance_channels}"
        )
    names = _class_names(args)
    if names and len(names) != config.num_classes:
        raise CheckpointError(
            f"{args.class_names} has {len(names)} names, the predictor {config.num_classes} classes"
        )


def _check_refiner(refiner: SiTConfig, predictor: SiTConfig) -> None:
    for key in ("latent_channels", "latent_size", "num_classes"):
        got, want = getattr(refiner, key), getattr(predictor, key)
        if got != want:
            raise CheckpointError(f"the refiner has {key} {got}, the predictor {want}")


def _decoder(folder: Path, config: SiTConfig) -> Any:
    from flowturbo.nets.vae import Decoder, load_vae

    vae = load_vae(folder)
    if vae.config.latent_channels != config.latent_channels:
        raise CheckpointError(
            f"the VAE has {vae.config.latent_channels} latent channels, "
            f"the predictor {config.latent_channels}"
        )
    return Decoder(vae)


def _export_one(
    args: argparse.Namespace,
    exported: Exported,
    source: Path,
    folder: Path,
    fingerprint: dict[str, Any],
) -> None:
    say: Callable[[str], None] = lambda text: print(text, end="", flush=True)  # noqa: E731
    (folder / "1").mkdir(parents=True)
    path = folder / "1" / "model.onnx"
    say(f"{exported.model}: {source} to ONNX ... ")
    export_onnx(exported, path)
    say("verify against PyTorch ... ")
    parity = verify_onnx(exported, path)
    say(", ".join(f"{name} off by {error:.1e}" for name, error in parity.items()) + "\n")
    channels, height, width = exported.latent_shape
    sizes: dict[int | str, int] = {"C": channels, "h": height, "w": width}
    if exported.model == contract.DECODER:
        sample = exported.module(exported.random_inputs(1, seed=0)["latent"])
        sizes |= {"H": sample.shape[1], "W": sample.shape[2]}
    config = install.model_config(exported.model, sizes, args.max_rows, args.queue_delay_us)
    build = {
        "source": source.name,
        "precision": "fp32",
        "latent_shape": exported.latent_shape,
        "num_classes": exported.num_classes,
        "class_names": _class_names(args),
        "max_rows": args.max_rows,
        "parity": parity,
        "fingerprint": fingerprint,
    }
    install.write_model(folder, config, build)


if __name__ == "__main__":
    main()
