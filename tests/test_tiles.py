"""Large latents are decoded in tiles: every pixel comes from its own place."""

import numpy as np
import pytest

from flowturbo.generate import awaited, decode
from flowturbo.solver.sampler import run_sync
from flowturbo.tiles import Tiles

pytestmark = pytest.mark.unit
SIDES = [(8, 8, 0), (8, 8, 8), (20, 8, 8), (29, 17, 16), (18, 100, 10), (9, 64, 8)]


@pytest.mark.parametrize(("height", "width", "largest"), SIDES)
def test_what_is_split_is_joined(height: int, width: int, largest: int) -> None:
    """A decoder that shows each latent pixel as 4 x 4 pixels of its own value."""
    rng = np.random.default_rng(0)
    latent = rng.integers(0, 256, (2, 3, height, width)).astype(np.float32)
    seen = []

    def infer(_role: object, tensors: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        (part,) = tensors.values()
        seen.append(part.shape)
        image = part.transpose(0, 2, 3, 1).repeat(4, 1).repeat(4, 2).astype(np.uint8)
        return image, np.ones((len(part), 1), np.float32)

    image = run_sync(decode(awaited(infer), latent, largest))
    want = latent.transpose(0, 2, 3, 1).repeat(4, 1).repeat(4, 2)
    np.testing.assert_array_equal(image, want)
    (shape,) = seen
    assert max(shape[2:]) <= (largest or max(height, width))


def test_tiles_overlap_and_fade() -> None:
    """Two tiles of other levels: a ramp over the quarter that both have, and no step."""
    tiles = Tiles.of(8, 14, 8)
    assert (tiles.rows, tiles.columns) == ((0,), (0, 6))
    parts = np.zeros((2, 32, 32, 3), np.uint8)
    parts[1] = 200
    row = tiles.join(parts)[0, 0, :, 0].astype(int)
    assert (row[:24] == 0).all() and (row[32:] == 200).all()
    assert (np.diff(row) >= 0).all() and np.diff(row).max() <= 200 / 8 + 1
