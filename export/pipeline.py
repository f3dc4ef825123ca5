"""One pipeline's checkpoints to verified models, installed in a repository together."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export import install
from export.blocks import StepBlock
from export.onnx_graph import Exported, export_onnx, verify_onnx
from flowturbo import contract
from flowturbo.nets.checkpoint import CheckpointError, build_network, load_checkpoint
from flowturbo.nets.sit import SiT, SiTConfig
from flowturbo.nets.vae import Decoder, load_vae


@dataclass(frozen=True)
class Options:
    """What to export; the command line's arguments (`python -m export --help`)."""

    predictor: Path
    refiner: Path | None
    vae: Path | None
    repository: Path
    weights: str | None
    refiner_weights: str | None
    num_heads: int | None
    refiner_num_heads: int | None
    class_names: Path | None
    guidance_channels: int
    max_rows: int
    queue_delay_us: int
    force: bool

    def names(self) -> list[str]:
        """The classes' names, none if none were given."""
        if not self.class_names:
            return []
        try:
            return self.class_names.read_text("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.class_names} is not a text file: {error}") from error


def export_pipeline(options: Options) -> None:
    """Exports, verifies and installs; does nothing if this very pipeline is installed.

    Raises CheckpointError or VerificationError, and then leaves the repository as it was.
    """
    fingerprint = _fingerprint(options)
    if not options.force and _is_installed(options.repository, fingerprint):
        print(f"export: {options.repository} is up to date")
        return
    with install.staging(options.repository) as staged:
        for exported in _modules(options):
            _write(exported, options, fingerprint, staged / exported.model)
        install.install(staged, options.repository)
    print(f"export: installed in {options.repository}")


def _sources(options: Options) -> dict[str, Path]:
    """The file or folder that each composed model is made from."""
    given = {
        contract.PREDICTOR: options.predictor,
        contract.REFINER: options.refiner,
        contract.DECODER: options.vae,
    }
    return {model: path for model, path in given.items() if path}


def _fingerprint(options: Options) -> dict[str, Any]:
    """All that decides the result: sources, options, tools and code."""
    undecisive = {"predictor", "refiner", "vae", "repository", "class_names", "force"}
    decisive = {key: value for key, value in vars(options).items() if key not in undecisive}
    return {
        "sha256": {model: _sha256(path) for model, path in _sources(options).items()},
        "options": decisive,
        "class_names": options.names(),
        "versions": install.versions(),
        "code": install.source_digest(),
    }


def _sha256(path: Path) -> str:
    """Digest of a file, or of the names and contents of a folder's files."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if path.is_dir():
            digest.update(file.name.encode())
        with file.open("rb") as content:
            while chunk := content.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _is_installed(repository: Path, fingerprint: dict[str, Any]) -> bool:
    """Whether `repository` has the models of this fingerprint and no others."""
    if not (repository / contract.ORCHESTRATOR / "config.pbtxt").is_file():
        return False
    present = [model for model in contract.COMPOSED if (repository / model).exists()]
    found = {model: install.installed_fingerprint(repository, model) for model in present}
    return found == dict.fromkeys(fingerprint["sha256"], fingerprint)


def _modules(options: Options) -> Iterator[Exported]:
    """What is to be exported, each checked against the predictor."""
    predictor = _network(options, options.predictor, reads_velocity=False)
    config = predictor.config
    _check_options(options, config)
    shape = (config.latent_channels, config.latent_size, config.latent_size)
    channels = options.guidance_channels
    # All checkpoints are read before the first is exported: a wrong one is found at once.
    found = [Exported(contract.PREDICTOR, StepBlock(predictor, channels), shape, config)]
    if options.refiner:
        refiner = _network(options, options.refiner, reads_velocity=True)
        _check_refiner(refiner.config, config)
        found.append(Exported(contract.REFINER, StepBlock(refiner, channels), shape, config))
    if options.vae:
        found.append(Exported(contract.DECODER, _decoder(options.vae, config), shape, config))
    yield from found


def _network(options: Options, path: Path, *, reads_velocity: bool) -> SiT:
    heads, weights = options.num_heads, options.weights
    if reads_velocity:
        heads, weights = options.refiner_num_heads or heads, options.refiner_weights
    checkpoint = load_checkpoint(path, weights)
    return build_network(checkpoint, reads_velocity=reads_velocity, num_heads=heads)


def _check_options(options: Options, config: SiTConfig) -> None:
    if options.guidance_channels > config.latent_channels:
        raise CheckpointError(
            f"--guidance-channels must be 1 to {config.latent_channels}, "
            f"got {options.guidance_channels}"
        )
    names = options.names()
    if names and len(names) != config.num_classes:
        raise CheckpointError(
            f"{options.class_names} has {len(names)} names, "
            f"the predictor {config.num_classes} classes"
        )
    twice = [name for name in names if names.count(name) > 1 or not name.strip()]
    if twice:
        raise CheckpointError(
            f"{options.class_names}: names must be unique, got {twice[0]!r} twice"
        )


def _check_refiner(refiner: SiTConfig, predictor: SiTConfig) -> None:
    for key in ("latent_channels", "latent_size", "num_classes"):
        got, want = getattr(refiner, key), getattr(predictor, key)
        if got != want:
            raise CheckpointError(f"the refiner has {key} {got}, the predictor {want}")


def _decoder(folder: Path, config: SiTConfig) -> Decoder:
    vae = load_vae(folder)
    channels = vae.config.latent_channels
    if channels != config.latent_channels:
        raise CheckpointError(
            f"the VAE has {channels} latent channels, the predictor {config.latent_channels}"
        )
    return Decoder(vae)


def _write(exported: Exported, options: Options, fingerprint: dict[str, Any], folder: Path) -> None:
    """Exports one model into `folder`, verified and complete."""
    (folder / "1").mkdir(parents=True)
    source = _sources(options)[exported.model]
    print(f"{exported.model}: {source} to ONNX ... ", end="", flush=True)
    export_onnx(exported, folder / "1" / "model.onnx")
    print("verify against PyTorch ... ", end="", flush=True)
    parity = verify_onnx(exported, folder / "1" / "model.onnx")
    print(", ".join(f"{name} off by {error:.1e}" for name, error in parity.items()))
    config = install.model_config(
        exported.model, exported.sizes(), options.max_rows, options.queue_delay_us
    )
    build = {
        "source": source.name,
        "precision": "fp32",
        "device": "CPU",
        "latent_shape": exported.latent_shape,
        "num_classes": exported.config.num_classes,
        "class_names": options.names(),
        "max_rows": options.max_rows,
        "parity": parity,
        "fingerprint": fingerprint,
    }
    install.write_model(folder, config, build)
