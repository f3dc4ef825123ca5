"""Feature networks of images: those of glyphs and of scenes, or Inception from a weights file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flowturbo.errors import FlowTurboError
from training.frechet import Reference, Statistics
from training.glyphs import classifier
from training.glyphs.pictures import IMAGE_SIZE
from training.images import Skipped, find_images, read_image, unused
from training.judging import SPATIAL_CHANNELS, Features, extract_features
from training.loop import device
from training.scenes import judge

_BATCH = 50
_READ = 500  # pictures of a folder in memory at a time
_FIDELITY = "torch_fidelity"


class Judge(Protocol):
    """Extracts features.

    `knows_subjects` tells whether its outputs are about what was asked for; `has_classes` whether
    they are class probabilities.
    """

    knows_subjects: bool
    has_classes: bool

    def __call__(self, images: np.ndarray) -> Features: ...


class Own:
    """The judge that is trained with one of our models; `weights` is the model's folder."""

    knows_subjects = True
    file: ClassVar[str]

    def __init__(self, weights: Path) -> None:
        self._model = self.build()
        self._model.load_state_dict(load_file(weights / self.file))

    def build(self) -> nn.Sequential:
        """The network without its weights."""
        raise NotImplementedError

    def __call__(self, images: np.ndarray) -> Features:
        """Features of `images` [N, 64, 64, 3] uint8; raises ValueError for other sizes."""
        if images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
            size, seen = f"{IMAGE_SIZE} x {IMAGE_SIZE}", " x ".join(map(str, images.shape[1:3]))
            raise ValueError(
                f"{self.file} reads images of {size} pixels, these have {seen}: "
                "give --inception and --reference"
            )
        return extract_features(self._model, images)


class Classifier(Own):
    """The classifier of glyphs."""

    has_classes = True
    file = "classifier.safetensors"

    def build(self) -> nn.Sequential:
        """As in the base class."""
        return classifier.build()


class SceneJudge(Own):
    """The judge of glyph scenes."""

    has_classes = False
    file = "judge.safetensors"

    def build(self) -> nn.Sequential:
        """As in the base class."""
        return judge.build()


class Inception:
    """Inception-v3 for FID, with TensorFlow's resizing, from torch-fidelity.

    `weights` is `pt_inception-2015-12-05-6726825d.pth`, the TensorFlow graph's weights. Spatial
    features are 7 channels of `mixed_6/conv`, 17 x 17. Class probabilities leave the bias out. Both
    are as in ADM's evaluator. Raises FlowTurboError without torch-fidelity or for other weights.
    """

    has_classes = True
    knows_subjects = False  # its 1008 classes have other numbers than ImageNet's

    def __init__(self, weights: Path) -> None:
        extractor = _fidelity().FeatureExtractorInceptionV3
        try:
            torch.load(
                weights, weights_only=True
            )  # refuse other pickles, which the extractor would load
            self._model = extractor("inception", ["2048", "logits_unbiased"], str(weights))
        except Exception as error:  # unpickling may raise any exception
            raise FlowTurboError(f"{weights} does not load as Inception-v3: {error}") from error
        self._model.to(device())
        self._spatial: list[Tensor] = []
        self._model.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def __call__(self, images: np.ndarray) -> Features:
        """Features of `images` [N, H, W, 3] uint8: 2048 pooled, 2023 spatial, 1008 classes."""
        starts = range(0, len(images), _BATCH)
        return Features.join(self._look(images[start : start + _BATCH]) for start in starts)

    @torch.no_grad()
    def _look(self, images: np.ndarray) -> Features:
        pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).to(device())
        pooled, logits = self._model(pixels)
        spatial = self._spatial.pop()
        found = pooled, spatial.flatten(1), logits.softmax(1)
        return Features(*(tensor.cpu().numpy() for tensor in found))

    def _keep(self, _module: Any, _inputs: Any, output: Tensor) -> None:
        # Channels last, as TensorFlow flattens them: published mu_s and sigma_s have that order.
        self._spatial.append(output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1))


def _fidelity() -> Any:
    """The module of torch-fidelity that has Inception.

    Its package imports torchvision for other extractors, and torchvision has no build for this
    torch. This module does not need torchvision: an empty package in place of torch-fidelity allows
    its import.
    """
    if _FIDELITY not in sys.modules:
        spec = importlib.util.find_spec(_FIDELITY)
        if spec is None or spec.submodule_search_locations is None:
            raise FlowTurboError("Inception needs: pip install --no-deps torch-fidelity==0.4.0")
        package = ModuleType(_FIDELITY)
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules[_FIDELITY] = package
    return importlib.import_module(f"{_FIDELITY}.feature_extractor_inceptionv3")


def load_reference(path: Path, judge: Judge) -> Reference:
    """Features of real images: a folder, images [N, H, W, 3] in an .npz, or statistics in an .npz.

    An .npz has ADM's layout: mu and sigma (mu_s and sigma_s), else arr_0. If it has both, precision
    and recall come from the images. Raises ValueError for any other file, for a folder of fewer
    than 2 pictures, and for pictures of different sizes.
    """
    if path.is_dir():
        return _reference_of(Features.join(map(judge, _pictures(path))))
    if not zipfile.is_zipfile(path):
        path.stat()  # raises the usual error if the file is missing
        raise ValueError(f"{path} is neither a folder of images nor an .npz")
    try:
        with np.load(path) as file:
            images = file.get("arr_0")
            known = Reference.load(path) if images is None or "mu" in file else None
    except (zipfile.BadZipFile, EOFError, KeyError) as error:
        raise ValueError(f"{path} is not a complete .npz of a reference: {error}") from error
    if images is None:
        assert known
        return known
    fits = images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == 3
    if not fits or len(images) < 2:
        raise ValueError(
            f"{path}: arr_0 must be 2 images or more, [N, H, W, 3] of uint8, it is "
            f"{list(images.shape)} of {images.dtype}"
        )
    seen = judge(images)
    return Reference(known.pooled, known.spatial, seen.pooled) if known else _reference_of(seen)


def check_reference(path: Path, reference: Reference, judge: Judge) -> None:
    """Raises ValueError unless `reference`, from `path`, has as many features as `judge`."""
    seen = judge(np.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8))
    for name, known, found in (
        ("mu", reference.pooled, seen.pooled),
        ("mu_s", reference.spatial, seen.spatial),
    ):
        if known and len(known.mean) != found.shape[1]:
            raise ValueError(
                f"{path} has {name} of {len(known.mean)} features, this judge has {found.shape[1]}"
            )


def _reference_of(seen: Features) -> Reference:
    return Reference(Statistics.of(seen.pooled), Statistics.of(seen.spatial), seen.pooled)


def _pictures(folder: Path) -> Iterator[np.ndarray]:
    """All pictures below `folder`, [n, H, W, 3] uint8, at most _READ at a time.

    Finds and reads them as training does (training.images). Prints files that are not images.
    """
    skipped = Skipped()
    paths = find_images(folder, skipped)
    for line in unused([], skipped):
        print(f"{folder}: {line}", file=sys.stderr)
    if len(paths) < 2:
        raise ValueError(f"{folder} must have 2 images or more, it has {len(paths)}")
    size = read_image(paths[0]).size
    for start in range(0, len(paths), _READ):
        yield np.stack([_picture(path, size, paths[0]) for path in paths[start : start + _READ]])


def _picture(path: Path, size: tuple[int, int], first: Path) -> np.ndarray:
    picture = read_image(path)
    if picture.size != size:
        raise ValueError(
            f"pictures must be of one size, {path} has {picture.width} x {picture.height} "
            f"pixels and {first} {size[0]} x {size[1]}"
        )
    return np.asarray(picture)
