"""Exports a text-to-image model at real size, or trains its refiner: time and memory, no GPU.

The weights are random.
`--model rectified-flow` is InstaFlow's 2-RF (860M parameters, Stable Diffusion 1.5's networks).
`--model sd35-medium` is SD3.5-M without T5 (2.2B); `--layers` cuts its transformer.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

_TORCH = ("--runtime", "torch", "--provider", "cpu")
_OPTIONS = {"rectified-flow": ["--rectified-flow"], "sd35-medium": ["--without-t5"]}
_STEPS = 10
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_VAE_CHANNELS = (128, 256, 512, 512)
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}


def main(argv: Sequence[str]) -> int:
    """Prints a line per stage, and a summary; returns the export's exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.folder_check", description=__doc__)
    parser.add_argument("--model", choices=tuple(_MODELS), default="rectified-flow")
    parser.add_argument(
        "--part",
        choices=tuple(_COMMANDS),
        default="export",
        help=f"refiner trains {_STEPS} steps of its refiner (default: %(default)s)",
    )
    parser.add_argument("--layers", type=int, help="layers of SD3.5-M's transformer (default: 24)")
    parser.add_argument("--size", default="512x512", help="WIDTHxHEIGHT (default: %(default)s)")
    parser.add_argument("--precision", default="fp32", help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="keep the folder and the repository here")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        path = args.folder or Path(scratch)
        folder = path / "folder"
        if not (folder / "model_index.json").is_file():
            print(f"random weights for {args.model} ...", flush=True)
            _MODELS[args.model](folder, args.layers)
        command = _COMMANDS[args.part](folder, path, args)
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-m", *map(str, command)])
        minutes = (time.monotonic() - started) / 60
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    if done.returncode:
        print(f"failed with {done.returncode}", file=sys.stderr)
        return done.returncode if done.returncode > 0 else 1
    how = f"{args.model}, {args.part}, {args.size}, {args.precision}"
    print(f"{how}: {minutes:.1f} minutes, {peak:.1f} GiB")
    return 0


def _export(folder: Path, path: Path, args: argparse.Namespace) -> list[object]:
    return [
        *("export", "--diffusers", folder, "--name", args.model, *_OPTIONS[args.model]),
        *("--size", args.size, "--precision", args.precision),
        # OpenVINO's bfloat16 would round the embeddings of times too.
        *(_TORCH if args.precision == "bf16" else ("--runtime", "onnxruntime")),
        *("--repository", path / "models"),
    ]


def _refiner(folder: Path, path: Path, args: argparse.Namespace) -> list[object]:
    """A short run on one short trajectory: a pool of the default size takes a GPU."""
    prompts = path / "prompts.txt"
    prompts.write_text("a red bicycle\n")
    return [
        *("training.refiner", "--diffusers", folder, *_OPTIONS[args.model], "--size", args.size),
        *("--prompts", prompts, "--out", path / "refiner", "--runs", path / "runs"),
        *("--steps", _STEPS, "--grid-steps", 2, 2, "--pool-batches", 1, "--pool-batch", 1),
        *("--uses", 4 * _STEPS, "--sample-every", 0, "--log-every", 1),
        *("--precision", args.precision),
    ]


_COMMANDS: dict[str, Callable[[Path, Path, argparse.Namespace], list[object]]] = {
    "export": _export,
    "refiner": _refiner,
}


def _rectified_flow(folder: Path, layers: int | None) -> None:
    """Stable Diffusion 1.5's networks."""
    unet = UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, layers_per_block=2
    )
    _save(unet, folder / "unet")
    _save(_vae(4, scaling_factor=0.18215), folder / "vae")
    _save(_clip(CLIPTextModel, _CLIP_L, 12), folder / "text_encoder")
    _tokenizer(folder).save_pretrained(folder / "tokenizer")
    _index(
        folder,
        "StableDiffusionPipeline",
        text_encoder=["transformers", "CLIPTextModel"],
        tokenizer=["transformers", "CLIPTokenizer"],
        unet=["diffusers", "UNet2DConditionModel"],
    )


def _sd35_medium(folder: Path, layers: int | None) -> None:
    """SD3.5-M: 24 layers of width 1536, dual attention in the first 13."""
    depth = layers or 24
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(
            sample_size=128,
            in_channels=16,
            out_channels=16,
            num_layers=depth,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=384,
            qk_norm="rms_norm",
            dual_attention_layers=tuple(range(min(13, depth))),
        )
    _save(_random(transformer), folder / "transformer")
    vae = _vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False)
    _save(vae, folder / "vae")
    _save(_clip(CLIPTextModelWithProjection, _CLIP_L, 12), folder / "text_encoder")
    _save(_clip(CLIPTextModelWithProjection, _CLIP_G, 20), folder / "text_encoder_2")
    for name in ("tokenizer", "tokenizer_2"):
        _tokenizer(folder).save_pretrained(folder / name)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    clip, words = (
        ["transformers", name] for name in ("CLIPTextModelWithProjection", "CLIPTokenizer")
    )
    _index(
        folder,
        "StableDiffusion3Pipeline",
        scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"],
        text_encoder=clip,
        text_encoder_2=clip,
        text_encoder_3=[None, None],
        tokenizer=words,
        tokenizer_2=words,
        tokenizer_3=[None, None],
        transformer=["diffusers", "SD3Transformer2DModel"],
    )


_MODELS: dict[str, Callable[[Path, int | None], None]] = {
    "rectified-flow": _rectified_flow,
    "sd35-medium": _sd35_medium,
}


def _random(module: nn.Module) -> nn.Module:
    """Small random weights in half the memory, for a module on the meta device."""
    generator = torch.Generator().manual_seed(0)
    for owner in module.modules():
        for name, value in [*owner._parameters.items(), *owner._buffers.items()]:
            if value is None:
                continue
            made = torch.randn(value.shape, generator=generator, dtype=torch.bfloat16) * 0.02
            if name == "weight" and value.ndim == 1:  # a norm
                made += 1
            if name in owner._parameters:
                owner._parameters[name] = nn.Parameter(made, requires_grad=False)
            else:
                owner._buffers[name] = made
    return module


def _vae(channels: int, **options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=_VAE_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=channels,
        sample_size=512,
        **{"use_post_quant_conv": options.get("use_quant_conv", True), **options},
    )


def _clip(kind: Any, sizes: dict[str, int], heads: int) -> nn.Module:
    words = 2 * len(_LETTERS) + 2
    config = CLIPTextConfig(
        vocab_size=49408,
        projection_dim=sizes["hidden_size"],
        num_attention_heads=heads,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=words - 1,
        **sizes,
    )
    made: nn.Module = kind(config)
    return made


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """Letters and digits: as large a vocabulary as random weights need."""
    words = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    scratch = folder / "words"
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (scratch / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(scratch / "vocab.json"), str(scratch / "merges.txt"), model_max_length=77
    )


def _save(module: Any, folder: Path) -> None:
    module.save_pretrained(folder)


def _index(folder: Path, pipeline: str, **parts: Sequence[str | None]) -> None:
    index = {"_class_name": pipeline, "vae": ["diffusers", "AutoencoderKL"], **parts}
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
