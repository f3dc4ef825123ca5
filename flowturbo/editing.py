"""Requests with an image: editing (SDEdit), inpainting, inversion.

Editing starts between noise and the image, at x = (1 - t0) n + t0 z (SDEdit, arXiv 2108.01073).
Here z is the image's latent, n the noise. Inpainting solves the same flow inside the mask. Outside,
the path is known: the straight line from n to z, with the velocity z - n. Both the state and the
cached velocity are set to it after each block call, so every schedule keeps its order of
convergence. Inversion runs the schedule from the image to noise.

A hole is filled before it is repainted, unless the request gives a strength. The colours beside the
hole are continued into it, and the flow starts with a share of FILL_NOISE noise. A flow that starts
from noise alone has chosen its colours before it can see those around it. The new pixels are also
moved by the difference that remains beside the mask, where both images are known.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flowturbo.contract import (
    EDIT_INPUTS,
    FEATHER,
    IMAGE,
    IMAGE_FILE,
    INITIAL_NOISE,
    INVERT,
    MASK,
    MASK_FILE,
    SEED,
    STRENGTH,
    TIMES,
    check_entries,
)
from flowturbo.errors import RequestError
from flowturbo.holes import continued
from flowturbo.pictures import Picture
from flowturbo.solver.calls import BlockCall
from flowturbo.solver.sampler import After, Array

MAX_FEATHER = 256  # pixels
# Of the outermost new pixels in a filled hole. Its borders are then as sharp as the image's own
# (docs/editing.md).
EDGE_WEIGHT = 0.9
MIN_STRENGTH = 0.001  # shorter steps vanish in float32
FILL_NOISE = 0.8


@dataclass(frozen=True)
class Edit:
    """The image of a request, and what to do with it.

    `pictures` and `masks` have one entry, or one per image; without a mask there is none. `size`
    is (H, W) of the images to make. `strength` is the share of the unshifted time grid that is run;
    None if the request gave times. With `fill` the masked part of an image is not used, but filled
    from around it. The share of noise is then FILL_NOISE on every grid. The result is pasted into
    the image over `feather` pixels inside the mask; None for a filled hole. A latent pixel is
    `factor` pixels wide.
    """

    pictures: tuple[Picture, ...]
    masks: tuple[Picture, ...]
    size: tuple[int, int]
    strength: float | None
    fill: bool
    invert: bool
    feather: int | None
    factor: int

    def open(self, check: Callable[[], None] = lambda: None) -> "OpenEdit":
        """Decodes the files, which can take a second each. `check` is called before each.

        Raises RequestError for a file that cannot be read, and what `check` raises.
        """

        def read(of: Callable[[tuple[int, int]], Array]) -> Array:
            check()
            return of(self.size)

        images = np.stack([read(picture.image) for picture in self.pictures])
        if not self.masks:
            return OpenEdit(images, None, self.feather, self.factor)
        masks = np.stack([read(picture.mask) for picture in self.masks])
        if self.fill and masks.all((1, 2)).any():
            raise RequestError(
                f"{self.masks[0].name} is white everywhere, so no part of the image is left to "
                f"continue: give {STRENGTH}, or no image"
            )
        if self.fill:
            check()
            count = max(len(images), len(masks))
            pairs = ((images[k % len(images)], masks[k % len(masks)]) for k in range(count))
            images = np.stack([_filled(*pair) for pair in pairs])
        return OpenEdit(images, masks, self.feather, self.factor)


@dataclass(frozen=True)
class OpenEdit:
    """The images [1 or n, H, W, 3] uint8 to encode, and their masks [1 or n, H, W] bool or None.

    The images have filled holes if the edit says so.
    """

    images: Array
    masks: Array | None
    feather: int | None
    factor: int

    @cached_property
    def latent_masks(self) -> Array:
        """Where latents are repainted, [1 or n, 1, h, w] bool: each cell the mask touches.

        And their neighbours, so that the VAE shows no seam.
        """
        assert self.masks is not None
        (count, height, width), side = self.masks.shape, self.factor
        cells = self.masks.reshape(count, height // side, side, width // side, side)
        return _grown(cells.any((2, 4)))[:, None]

    def pasted(self, made: Array) -> Array:
        """The images `made` [n, H, W, 3] uint8 inside the masks, the edit's outside.

        The weight of `made` rises from 0 at the mask's border to 1 over `feather` pixels. A filled
        hole needs no feather: EDGE_WEIGHT is that of its outermost pixels.
        """
        assert self.masks is not None
        found = []
        for k, image in enumerate(made):
            mask, own = self.masks[k % len(self.masks)], self.images[k % len(self.images)]
            found.append(self._pasted(image.astype(np.float32), own.astype(np.float32), mask))
        return np.stack(found)

    def _pasted(self, made: Array, own: Array, mask: Array) -> Array:
        # Pixels beside the mask were repainted too: the difference there is the seam to be seen.
        moved = made + continued(own - made, _grown(mask[None])[0] & ~mask)
        weights = inner_weights(mask, self.feather)[..., None]
        mixed = own + weights * (moved.clip(0, 255) - own)
        return np.asarray(mixed.round().astype(np.uint8))


def _filled(image: Array, mask: Array) -> Array:
    """`image` [H, W, 3] uint8 with the hole `mask` [H, W] bool filled from around it."""
    smooth = continued(image, ~mask).round().astype(np.uint8)
    return np.where(mask[..., None], smooth, image)


def inner_weights(mask: Array, feather: int | None) -> Array:
    """The weight of each pixel of `mask` [H, W] bool: 0 outside, 1 deep inside.

    Pixels have the distance 1, 2, ... from the nearest one outside (the largest of its row's and
    column's distance). A mask thinner than twice `feather` reaches 1 at its deepest pixels. The
    edge of the image is no border. Without `feather` only the outermost pixels have another weight.
    """
    if feather is None:
        return np.where(_shrunk(mask), 1, EDGE_WEIGHT * mask).astype(np.float32)
    inner, weights, rounds = mask, np.zeros(mask.shape, dtype=np.float32), 0
    while rounds <= feather and inner.any():
        weights += inner
        inner = _shrunk(inner)
        rounds += 1
    return weights / max(rounds, 1)


def _shrunk(mask: Array) -> Array:
    return np.asarray(~_grown(~mask[None])[0])


def _grown(cells: Array) -> Array:
    """`cells` [k, h, w] bool and their eight neighbours."""
    padded = np.pad(cells, ((0, 0), (1, 1), (1, 1)))
    height, width = cells.shape[1:]
    return np.logical_or.reduce(
        [padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    )


def repainting(masks: Array, noise: Array, data: Array) -> After[Array]:
    """Keeps state and velocity outside `masks` [rows, 1, h, w] bool on the path from noise to data.

    Blending the state alone, as is usual, leaves a cached velocity that belongs to another state.
    """
    known_velocity = data - noise

    async def blended(call: BlockCall, x: Array, v: Array) -> tuple[Array, Array]:
        known = (1 - call.lands_at) * noise + call.lands_at * data
        return np.where(masks, x, known), np.where(masks, v, known_velocity)

    return blended


def parse_edit(
    tensors: Mapping[str, np.ndarray],
    images: int,
    size: tuple[int, int] | None,
    factor: int,
    *,
    fills: bool = True,
) -> Edit | None:
    """The checked edit of a request for so many `images`; None without one.

    Only headers of files are read. A `factor` is the pixels per latent pixel. Without `fills` a
    hole is repainted from noise alone. Raises RequestError.
    """
    given = [spec.name for spec in EDIT_INPUTS if spec.name in tensors]
    if not given:
        return None
    if not {IMAGE, IMAGE_FILE} & set(given):
        raise RequestError(f"{given[0]} needs an image: give {IMAGE} or {IMAGE_FILE}")
    assert size  # a pipeline with an encoder has a size
    pictures = _pictures(tensors, IMAGE, IMAGE_FILE, images)
    masks = _pictures(tensors, MASK, MASK_FILE, images)
    for k in range(max(len(pictures), len(masks)) if masks else 0):
        mask, picture = masks[k % len(masks)], pictures[k % len(pictures)]
        if mask.size != picture.size:
            raise RequestError(
                f"{mask.name} must have the size of its image, {_shown(picture.size)}, got "
                f"{_shown(mask.size)} (width x height)"
            )
    fill = fills and bool(masks) and not {STRENGTH, TIMES} & tensors.keys()
    strength = float(tensors[STRENGTH][0]) if STRENGTH in tensors else 1.0
    if not MIN_STRENGTH <= strength <= 1:
        raise RequestError(f"{STRENGTH} must be {MIN_STRENGTH:g} to 1, got {strength:g}")
    if STRENGTH in tensors and TIMES in tensors:
        raise RequestError(f"give either {STRENGTH} or {TIMES}, got both")
    feather: int | None = None if fill else factor
    if FEATHER in tensors:
        feather = int(tensors[FEATHER][0])
    if feather is not None and not 0 <= feather <= MAX_FEATHER:
        raise RequestError(f"{FEATHER} must be 0 to {MAX_FEATHER} pixels, got {feather}")
    if FEATHER in tensors and not masks:
        raise RequestError(f"{FEATHER} needs {MASK} or {MASK_FILE}")
    invert = inverts(tensors)
    if invert:
        _refuse(tensors, (STRENGTH, MASK, MASK_FILE, SEED, INITIAL_NOISE))
    share = None if TIMES in tensors else strength
    return Edit(pictures, masks, size, share, fill, invert, feather, factor)


def inverts(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether a request leads from its image to noise."""
    return INVERT in tensors and bool(tensors[INVERT][0])


def _refuse(tensors: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
    if found := [name for name in names if name in tensors]:
        raise RequestError(f"{INVERT} leads from the image to noise and takes no {found[0]}")


def _pictures(
    tensors: Mapping[str, np.ndarray], array: str, file: str, images: int
) -> tuple[Picture, ...]:
    if array in tensors and file in tensors:
        raise RequestError(f"give either {array} or {file}, got both")
    name = array if array in tensors else file
    if name not in tensors:
        return ()
    entries = tensors[name]
    check_entries(name, entries, images)
    make = Picture.of_array if name == array else Picture.of_file
    return tuple(make(name, entry) for entry in entries)


def _shown(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"
