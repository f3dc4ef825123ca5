"""A diffusers folder: model_index.json, and one folder per part."""

import inspect
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor, nn

from flowturbo.conditions.tokens import TokenizerRecord
from flowturbo.nets.families.family import Tokenizing, shared_grid
from flowturbo.nets.vae import load_vae
from flowturbo.nets.weights import (
    CheckpointError,
    load_exactly,
    read_folder,
    read_safetensors,
    refuse_unknown_fields,
)
from flowturbo.solver.grid import GridRule
from flowturbo.textfile import read_json

INDEX, CONFIG = "model_index.json", "config.json"
# Fields in transformers' configurations, of any release, that do not change an encoder's values:
# provenance, decoding, training, and old names that the library itself converts.
_NOTHING = {
    *("add_cross_attention", "architectures", "bad_words_ids", "begin_suppress_tokens"),
    *("cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty"),
    *("do_sample", "dropout", "early_stopping", "encoder_no_repeat_ngram_size"),
    *("exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id"),
    *("forced_eos_token_id", "length_penalty", "max_length", "min_length", "n_positions"),
    *("no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences"),
    *("output_past", "output_scores", "prefix", "pruned_heads", "remove_invalid_values"),
    *("repetition_penalty", "return_dict_in_generate", "rope_scaling", "rope_theta"),
    *("sep_token_id", "suppress_tokens", "task_specific_params", "temperature"),
    *("tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class"),
    *("top_k", "top_p", "torch_dtype", "torchscript", "transformers_version", "typical_p"),
    *("use_bfloat16", "use_cache"),
}
_SENTINEL = "\u00a7text\u00a7"


class DiffusersFolder:
    """Reads the parts of a pipeline's folder exactly as they are. Raises CheckpointError.

    `network_file` has the weights of the denoiser in place of the folder's own.
    """

    def __init__(self, path: Path, network_file: Path | None = None) -> None:
        if not (path / INDEX).is_file():
            raise CheckpointError(f"{path} is not a diffusers folder: no {INDEX}")
        self.path = path
        self.index = read_json(path / INDEX)
        self.pipeline = str(self.index.get("_class_name"))
        self._network_file = network_file
        self._used: set[str] = set()

    def has(self, part: str) -> bool:
        """Whether the folder has `part`; [null, null] in its index means that it has not."""
        entry = self.index.get(part)
        return isinstance(entry, list) and entry[:1] != [None]

    def _entry(self, part: str, *allowed: str) -> str:
        entry = self.index.get(part)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] not in allowed:
            raise CheckpointError(
                f"{self.path / INDEX}: {part} must be {' or '.join(allowed)}, got {entry!r}"
            )
        self._used.add(part)
        return str(entry[1])

    def unused(self) -> tuple[str, ...]:
        """The parts that nothing has read."""
        return tuple(
            name for name in self.index if self.has(name) and name not in self._used | {"scheduler"}
        )

    def network(self, part: str, cls: Any) -> Any:
        """A network of diffusers' class `cls`, in float32."""
        self._entry(part, cls.__name__)
        return load_network(self.path / part, cls, self._network_file if part != "vae" else None)

    def vae(self, channels: int) -> AutoencoderKL:
        """The folder's `AutoencoderKL`, which must have so many latent channels."""
        self._entry("vae", AutoencoderKL.__name__)
        vae = load_vae(self.path / "vae")
        if vae.config.latent_channels != channels:
            raise CheckpointError(
                f"{self.path}: the VAE has {vae.config.latent_channels} latent channels, the "
                f"network {channels}"
            )
        return vae

    def scheduler(self) -> tuple[FlowMatchEulerDiscreteScheduler, GridRule]:
        """The scheduler, and the grid that it stands for."""
        path = self.path / "scheduler" / "scheduler_config.json"
        config = read_json(path)
        return FlowMatchEulerDiscreteScheduler.from_config(config), shared_grid(config, path)

    def text_encoder(self, part: str, *classes: Any) -> Any:
        """A text encoder of one of transformers' `classes`, in float32."""
        names = {cls.__name__: cls for cls in classes}
        cls = names[self._entry(part, *names)]
        folder = self.path / part
        _check_text_config(folder / CONFIG, cls)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # Eager attention is what exports; the values are the same.
                model, told = cls.from_pretrained(
                    folder,
                    variant=_variant(folder),
                    dtype=torch.float32,
                    attn_implementation="eager",
                    local_files_only=True,
                    output_loading_info=True,
                )
        except Exception as error:  # the library raises OSError, ValueError and others
            raise CheckpointError(f"{folder} cannot be read: {error}") from error
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            # A model without its head may lie in files that have it.
            if found := sorted({*map(str, told.get(kind) or ())} - {"lm_head.weight"}):
                raise CheckpointError(f"{folder}: {kind.replace('_', ' ')}: {', '.join(found[:5])}")
        for name, value in model.state_dict().items():
            if value.is_floating_point() and not value.isfinite().all():
                raise CheckpointError(f"{folder}: {name} must be finite, it has NaN or infinity")
        return model.eval().requires_grad_(False)

    def tokenizer(
        self, part: str, length: int, *, mask: bool = False, **chat: Any
    ) -> tuple[Any, Tokenizing]:
        """A tokenizer for texts of `length` tokens: transformers' own, and its form for the server.

        `chat` are the options of its chat template; without any, the text stands alone.
        """
        from transformers import AutoTokenizer

        self._used.add(part)
        folder = self.path / part
        if not folder.is_dir():
            raise CheckpointError(f"{self.path} has no {part}")
        try:
            loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            text = loaded.backend_tokenizer.to_str()
        except Exception as error:
            raise CheckpointError(f"{folder} cannot be read: {error}") from error
        if loaded.pad_token_id is None:
            raise CheckpointError(f"{folder} has no token for padding (pad_token)")
        if getattr(loaded, "padding_side", "right") != "right":
            raise CheckpointError(f"{folder}: padding_side must be right")
        template = _template(loaded, chat, folder) if chat else None
        # What the library set for its own calls is no part of the tokenizer.
        stated = {**json.loads(text), "truncation": None, "padding": None}
        if not chat:
            _make_plain(stated["added_tokens"], loaded.pad_token_id)
        record = TokenizerRecord("", length, loaded.pad_token_id, template, mask)
        return loaded, Tokenizing(record, json.dumps(stated, ensure_ascii=False))


def _variant(folder: Path) -> str | None:
    """The variant of a text encoder's weights, such as fp16; None for plain files."""
    names = [path.name for path in folder.iterdir()]
    if any(
        re.fullmatch(r"(model|pytorch_model)\.(safetensors|bin)(\.index\.json)?", n) for n in names
    ):
        return None
    forms = (
        r"(?:model|pytorch_model)\.(\w+)\.(?:safetensors|bin)",
        r"(?:model|pytorch_model)\.(?:safetensors|bin)\.index\.(\w+)\.json",
    )
    matches = (re.fullmatch(form, name) for form in forms for name in names)
    found = sorted({match[1] for match in matches if match})
    if len(found) > 1:
        raise CheckpointError(f"{folder} has several sets of weights, keep one: {', '.join(found)}")
    return found[0] if found else None


def _make_plain(added: list[dict[str, Any]], pad: int) -> None:
    """Makes a padding token that people write an ordinary token: SD3's second CLIP pads with `!`.

    In a text it has the same id as in transformers. Special tokens in a text are split.
    """
    for token in added:
        if token["id"] == pad and not re.fullmatch(r"<.+>|\[.+\]", token["content"]):
            token["special"] = False


def load_network(folder: Path, cls: Any, file: Path | None = None) -> Any:
    """A network of diffusers' class `cls` in `folder`, in float32. Raises CheckpointError.

    `file` is a checkpoint of the makers in place of the folder's weights.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}")
    config = read_json(path)
    if (found := config.get("_class_name")) != cls.__name__:
        raise CheckpointError(f"{path}: _class_name must be {cls.__name__}, got {found!r}")
    known = inspect.signature(cls.__init__).parameters
    refuse_unknown_fields(path, config, known, cls.__name__)
    try:
        with torch.device("meta"):
            network = cls.from_config({key: of for key, of in config.items() if key in known})
    except Exception as error:  # bad values can raise anything in the constructor
        raise CheckpointError(f"{path} describes no {cls.__name__}: {error}") from error
    weights, tensors = _single_file(file, network, cls) if file else read_folder(folder)
    load_exactly(network, tensors, weights, assign=True)
    made: nn.Module = network.eval().requires_grad_(False)
    return made


def _single_file(path: Path, network: Any, cls: Any) -> tuple[Path, dict[str, Tensor]]:
    """The tensors of a single-file checkpoint, under the names that diffusers has for them."""
    tensors, _ = read_safetensors(path)
    known = SINGLE_FILE_LOADABLE_CLASSES.get(cls.__name__)
    if known is None:
        raise CheckpointError(f"{path}: diffusers reads no single file of a {cls.__name__}")
    try:
        made = known["checkpoint_mapping_fn"](config=dict(network.config), checkpoint=dict(tensors))
    except Exception as error:  # names that are not there
        raise CheckpointError(
            f"{path} is no single-file checkpoint of a {cls.__name__} ({type(error).__name__}: "
            f"{error})"
        ) from error
    return path, made


def _check_text_config(path: Path, cls: Any) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {CONFIG}")
    stated = read_json(path)
    kind = cls.config_class
    if (found := stated.get("model_type")) not in (
        kind.model_type,
        getattr(kind, "base_config_key", None),
    ):
        raise CheckpointError(f"{path}: model_type must be {kind.model_type}, got {found!r}")
    known = {*kind().to_dict(), *inspect.signature(kind.__init__).parameters, *_NOTHING}
    refuse_unknown_fields(path, stated, known, cls.__name__)


def _template(tokenizer: Any, chat: dict[str, Any], folder: Path) -> tuple[str, str]:
    """What the chat template puts before and after a text."""

    def rendered(text: str) -> str:
        shown: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, **chat
        )
        return shown

    try:
        before, after = rendered(_SENTINEL).split(_SENTINEL)
    except Exception as error:
        raise CheckpointError(f"{folder} has no usable chat template: {error}") from error
    for text in ("a cat", " two\nlines ", 'a "quoted" word', "{{ braces }}", ""):
        if rendered(text) != before + text + after:
            raise CheckpointError(
                f"{folder}: the chat template changes the text {text!r}, which is not supported"
            )
    return before, after
