"""Tiny random folders of each model family, as diffusers writes them."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.!"
VOCABULARY = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "re", "red</w>"]
VOCABULARY += ["<|startoftext|>", "<|endoftext|>"]
LENGTH = 24
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def clip_tokenizer(scratch: Path, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    scratch.mkdir(parents=True, exist_ok=True)
    words = {word: number for number, word in enumerate(VOCABULARY)}
    (scratch / "vocab.json").write_text(json.dumps(words))
    (scratch / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    return CLIPTokenizer(
        str(scratch / "vocab.json"),
        str(scratch / "merges.txt"),
        model_max_length=LENGTH,
        pad_token=pad,
    )


def clip(kind: Any = CLIPTextModelWithProjection, width: int = 32) -> nn.Module:
    last = len(VOCABULARY) - 1
    return kind(
        CLIPTextConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            eos_token_id=last,
            bos_token_id=last - 1,
            pad_token_id=last,
            initializer_factor=30.0,  # as large as trained ones: texts matter
        )
    ).eval()


def t5_tokenizer() -> PreTrainedTokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(letter, -4.0) for letter in LETTERS] + [("\u2581a", -3.0), ("\u2581red", -3.5)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(LETTERS) + 6,
            d_model=width,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    ).eval()


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = {word: number for number, word in enumerate(sorted(alphabet))}
    words |= {"re": len(words), "red": len(words) + 1}
    tokenizer = Tokenizer(models.BPE(words, [("r", "e"), ("re", "d")]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for special in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        tokenizer.add_special_tokens([AddedToken(special, special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in ("<think>", "</think>")])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    made.chat_template = TEMPLATE
    return made


def qwen(tokenizer: Any, width: int = 32, layers: int = 4) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=512,
        )
    ).eval()


SCALE = {"scaling_factor": 1.5305, "shift_factor": 0.0609}


def vae(channels: int, kind: Any = AutoencoderKL, **options: Any) -> Any:
    return kind(
        block_out_channels=(8, 8),
        latent_channels=channels,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
        **options,
    ).eval()


def sd3_network(**options: Any) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        **{
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 96,
            "caption_projection_dim": 64,
            "pooled_projection_dim": 64,
            "out_channels": 16,
            "pos_embed_max_size": 16,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0,),
            **options,
        }
    ).eval()


def sd3(path: Path, *, with_t5: bool = False) -> Path:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(path / "scratch")
    third = t5(96) if with_t5 else None
    pipeline = StableDiffusion3Pipeline(
        transformer=sd3_network(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16, use_quant_conv=False, use_post_quant_conv=False, **SCALE),
        text_encoder=clip(),
        tokenizer=tokenizer,
        text_encoder_2=clip(),
        tokenizer_2=clip_tokenizer(path / "scratch", pad="!"),  # as SD3's
        text_encoder_3=third,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )
    pipeline.save_pretrained(path / "folder")
    return path / "folder"


def unet(**options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (16, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 32,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
            **options,
        }
    ).eval()


def rectified_flow(path: Path) -> Path:
    """As InstaFlow's: a `StableDiffusionPipeline` folder."""
    torch.manual_seed(0)
    folder = path / "folder"
    parts = {
        "unet": unet(),
        "vae": vae(4, scaling_factor=0.18215, shift_factor=None),
        "text_encoder": clip(CLIPTextModel),
        "tokenizer": clip_tokenizer(path / "scratch"),
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def klein(path: Path, *, distilled: bool = False) -> Path:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    decoder = vae(4, AutoencoderKLFlux2)
    decoder.bn.running_mean[:] = torch.randn(16) * 0.3
    decoder.bn.running_var[:] = torch.rand(16) + 0.5
    pipeline = Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=96,
            timestep_guidance_channels=32,
            guidance_embeds=False,
            axes_dims_rope=(8, 8, 8, 8),
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=decoder,
        text_encoder=qwen(tokenizer),
        tokenizer=tokenizer,
        is_distilled=distilled,
    )
    pipeline.save_pretrained(path / "folder")
    return path / "folder"


def z_image(path: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    network = ZImageTransformer2DModel(
        in_channels=4,
        dim=96,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=32,
        axes_dims=[8, 12, 12],
        axes_lens=[256, 64, 64],
    ).eval()
    for token in (network.x_pad_token, network.cap_pad_token):
        nn.init.normal_(token)
    pipeline = ZImagePipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4, **SCALE),
        text_encoder=qwen(tokenizer),
        tokenizer=tokenizer,
    )
    pipeline.save_pretrained(path / "folder")
    return path / "folder"
