"""A diffusers folder as a source of a text-to-image pipeline."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.onnx_graph import ExportTarget
from export.source import Loaded
from flowturbo.conditions.prompt import Prompt
from flowturbo.contract import Role
from flowturbo.nets.blocks import DecoderBlock, PredictorBlock, RefinerBlock
from flowturbo.nets.families.family import (
    CONTEXT_LENGTH,
    REFINER_NOTES,
    Family,
    FolderOptions,
)
from flowturbo.nets.families.folder import DiffusersFolder
from flowturbo.nets.weights import CheckpointError
from flowturbo.rows import Tensors
from flowturbo.solver.program import LARGEST_TRAINED_STEP
from flowturbo.textfile import read_json
from flowturbo.tiles import Tiles

_PLACES = ("path", "refiner", "network_file")
_SAMPLES = 16  # texts whose conditioning the checks of the networks use
_PARTS = {
    Role.PREDICTOR: ("transformer", "unet"),
    Role.DECODER: ("vae",),
    Role.ENCODER: ("vae",),
    Role.TEXT_ENCODER: ("text_encoder",),
}
DISTILLED_STEPS, DISTILLED_DEFAULT = "E", "E4"


@dataclass(frozen=True)
class FolderSource:
    """A diffusers folder, and how to read it (see `python -m export --help`).

    `sizes` are (H, W) in pixels, first the default; empty for the size of the model.
    """

    folder: FolderOptions
    sizes: tuple[tuple[int, int], ...] = ()

    @property
    def has_refiner(self) -> bool:
        """Whether there is a refiner."""
        return self.folder.refiner is not None

    def reading(self) -> dict[str, Any]:
        """The options for reading the folder."""
        options = asdict(self.folder)
        return {
            "sizes": [list(size) for size in self.sizes],
            **{key: of for key, of in options.items() if key not in _PLACES},
        }

    def files(self) -> dict[Role, Path]:
        """The part of the folder for each role; for the text encoder all the rest."""
        path = DiffusersFolder(self.folder.path).path  # it must be one
        found = {
            role: next((path / part for part in parts if (path / part).is_dir()), path / parts[0])
            for role, parts in _PARTS.items()
        }
        found[Role.TEXT_ENCODER] = path
        if self.folder.network_file:
            found[Role.PREDICTOR] = self.folder.network_file
        return found | ({Role.REFINER: self.folder.refiner} if self.folder.refiner else {})

    def load(self, class_names: Sequence[str], *, half: bool, scratch: Path) -> Loaded:
        """Reads and checks the folder. Raises CheckpointError."""
        from transformers.utils import logging

        logging.set_verbosity_error()  # it warns that image processors lack torchvision
        logging.disable_progress_bar()
        from flowturbo.nets.families.loading import load_family

        if class_names:
            raise CheckpointError("--class-names is for models with classes, not for prompts")
        family = load_family(self.folder)
        sizes = self.sizes or (family.size,)
        shapes = [family.latent_shape(size) for size in sizes]
        files = {f"tokenizer_{k}.json": each.text for k, each in enumerate(family.tokenizers, 1)}
        for name, text in files.items():
            (scratch / name).write_text(text)
        condition = _condition(family, half, list(files), scratch)
        encoder = TextBlock(family.text_encoder, half=half)
        pool = _pool(condition, encoder)

        def target(role: Role, module: nn.Module) -> ExportTarget:
            return ExportTarget(role, module, shapes[0], condition, tuple(shapes[1:]), pool)

        channels = family.latent_channels
        found = [
            target(Role.TEXT_ENCODER, encoder),
            target(Role.PREDICTOR, PredictorBlock(family.network, channels)),
        ]
        if family.refiner:
            found.append(target(Role.REFINER, RefinerBlock(family.refiner, channels)))
        # A decoder sees tiles of large latents.
        tiles = [Tiles.of(h, w, family.largest_decode).size for _, h, w in shapes]
        seen = [(family.latent_channels, *each) for each in dict.fromkeys(tiles)]
        decoder = DecoderBlock(family.decoder)
        of_images = seen[0], condition, tuple(seen[1:])
        found.append(ExportTarget(Role.DECODER, decoder, *of_images))
        found.append(ExportTarget(Role.ENCODER, family.encoder, *of_images, factor=family.factor))
        whole = tiles == [shape[1:] for shape in shapes]
        fields = {
            "family": family.title,
            "grid": family.grid,
            "image_sizes": tuple(sizes) if len(sizes) > 1 or not whole else (),
            "patch": family.patch,
            "largest_decode": family.largest_decode,
            "solver_steps": DISTILLED_STEPS if family.distilled else "",
            "trained_step": trained_step(self.folder.refiner),
        }
        return Loaded(
            targets=tuple(found),
            fields=fields,
            guidance_scale=None if family.distilled else family.guidance_scale,
            schedule=DISTILLED_DEFAULT if family.distilled else None,
            files=files,
            family=family,
        )


def trained_step(refiner: Path | None) -> float:
    """The largest step that the refiner in a folder was trained on (training.folder_refiner).

    Raises CheckpointError for a folder whose note cannot be read. Without one it is the paper's.
    """
    path = refiner / REFINER_NOTES if refiner else None
    if path is None or not path.exists():
        return LARGEST_TRAINED_STEP
    found = read_json(path).get("largest_step")
    if not isinstance(found, float) or not 0 < found <= 1:
        raise CheckpointError(f"{path}: largest_step must be above 0 and at most 1, got {found!r}")
    return found


class TextBlock(nn.Module):
    """A text encoder whose outputs have the types of the conditioning tensors."""

    def __init__(self, encoder: nn.Module, *, half: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.kind = torch.float16 if half else torch.float32

    def forward(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        made = self.encoder(*tokens)
        return tuple(of.to(self.kind) if of.is_floating_point() else of for of in made)


def _condition(family: Family, half: bool, files: list[str], folder: Path) -> Prompt:
    kind = "float16" if half else "float32"
    return Prompt(
        tokenizers=tuple(
            replace(each.record, file=name)
            for name, each in zip(files, family.tokenizers, strict=True)
        ),
        conditioning=tuple(
            (name, "int64" if name == CONTEXT_LENGTH else kind, dims)
            for name, dims in family.conditioning
        ),
        folder=folder,
        can_guide=not family.distilled,
    )


def _pool(condition: Prompt, encoder: nn.Module) -> Tensors:
    """The conditioning of some texts. Raises CheckpointError for values beyond the type."""
    tokens = condition.sample_encoder(_SAMPLES, np.random.default_rng(0))
    with torch.inference_mode():
        made = encoder.eval()(*map(torch.from_numpy, tokens.values()))
    found = {
        name: value.numpy()
        for (name, _, _), value in zip(condition.conditioning, made, strict=True)
    }
    for name, value in found.items():
        if not np.isfinite(value).all():
            raise CheckpointError(
                f"the conditioning tensor {name} is not finite in {value.dtype}: export with "
                "--precision fp32"
            )
    return found
