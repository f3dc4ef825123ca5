"""The predictor of glyph scenes: a small Stable Diffusion 3, whose two CLIPs are trained with it.

All networks are the library's own, so the saved folder is one that StableDiffusion3Pipeline reads.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from flowturbo.nets.families.sd3 import Network, TextEncoder

LATENT_CHANNELS, LATENT_SIZE = 8, 16
TEXT_LENGTH = 24  # tokens, with those of the start and the end
_WIDTH, _HEADS, _DEPTH = 192, 6, 6
_CLIP_WIDTH, _CLIP_LAYERS, _CLIP_HEADS, _POOLED = 96, 2, 4, 128
_START, _END = "<|startoftext|>", "<|endoftext|>"
SHIFT = 1.0  # of the time grid: the images are small


def make_tokenizer(prompts: Sequence[str], scratch: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose tokens are the words of `prompts`. Other words fall into pieces."""
    scratch.mkdir(parents=True, exist_ok=True)
    backend = CLIPTokenizer().backend_tokenizer  # CLIP's own normalizer and splitting
    learned = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=_END))
    learned.normalizer, learned.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    alphabet = sorted(ByteLevel.alphabet())  # letters that stand for the 256 bytes
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        show_progress=False,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
    )
    learned.train_from_iterator(sorted(set(prompts)), trainer)
    merges = json.loads(learned.to_str())["model"]["merges"]
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    tokens += ["".join(pair) for pair in merges]
    vocabulary = {token: number for number, token in enumerate([*tokens, _START, _END])}
    (scratch / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (scratch / "merges.txt").write_text("\n".join(lines) + "\n")
    return CLIPTokenizer(
        str(scratch / "vocab.json"),
        str(scratch / "merges.txt"),
        model_max_length=TEXT_LENGTH,
        pad_token=_END,
    )


class TextToImage(nn.Module):
    """Token ids to the velocity: the CLIPs and the transformer, as the service runs them."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.clips = nn.ModuleList(_clip(tokenizer) for _ in range(2))
        self.transformer = transformer()

    def text_encoder(self) -> TextEncoder:
        """Token ids [B, 24], twice, to the context and the pooled text."""
        return TextEncoder(list(self.clips), None, self.transformer, 0)

    def velocity(self) -> Network:
        """The transformer, which shares its weights with this module."""
        return Network(self.transformer)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        context, pooled = self.text_encoder()(ids, ids)
        made: Tensor = self.velocity()(x, t, context, pooled)
        return made


def transformer(in_channels: int = LATENT_CHANNELS, layers: int = _DEPTH) -> SD3Transformer2DModel:
    """An untrained transformer whose output is zero: every block is an identity at first."""
    made = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=in_channels,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        attention_head_dim=_WIDTH // _HEADS,
        num_attention_heads=_HEADS,
        joint_attention_dim=2 * _CLIP_WIDTH,
        caption_projection_dim=_WIDTH,
        pooled_projection_dim=2 * _POOLED,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
    )
    initialize(made)
    return made


def initialize(network: nn.Module) -> None:
    """DiT's random weights (adaLN-Zero). The library leaves modulation and output random."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if "timestep_embedder" in name:
                nn.init.normal_(module.weight, std=0.02)
            if name == "proj_out" or ".norm1" in name or name.startswith("norm_out"):
                nn.init.zeros_(module.weight)
    patches: Any = network.get_submodule("pos_embed.proj")
    nn.init.xavier_uniform_(patches.weight.view(patches.weight.shape[0], -1))
    nn.init.zeros_(patches.bias)


def _clip(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    end = tokenizer.eos_token_id
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_CLIP_WIDTH,
        intermediate_size=4 * _CLIP_WIDTH,
        projection_dim=_POOLED,
        num_hidden_layers=_CLIP_LAYERS,
        num_attention_heads=_CLIP_HEADS,
        max_position_embeddings=TEXT_LENGTH,
        # The pooled text is the state at this token. At 2, its default, the library would look for
        # the largest id instead.
        eos_token_id=end,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=end,
        attn_implementation="eager",
    )
    model = CLIPTextModelWithProjection(config)
    # CLIP's own 0.02 would make the text invisible beside image tokens of size 1.
    for name, value in model.named_parameters():
        if "token_embedding" in name:
            nn.init.normal_(value, std=1.0)
        if "position_embedding" in name:
            nn.init.normal_(value, std=0.5)
    return model


def encode_prompts(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> np.ndarray:
    """Token ids [n, 24] int64 of `prompts`, with padding."""
    made = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=TEXT_LENGTH)
    return np.array(made.input_ids, dtype=np.int64)


def save_folder(
    model: TextToImage, vae: AutoencoderKL, tokenizer: CLIPTokenizer, folder: Path
) -> None:
    """Writes `model` as a StableDiffusion3Pipeline in float16, without T5."""
    vae.register_to_config(shift_factor=0.0)  # the pipeline adds it, and fails at none
    pipe = StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=model.clips[0],
        tokenizer=tokenizer,
        text_encoder_2=model.clips[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.to(torch.float16).save_pretrained(folder)
