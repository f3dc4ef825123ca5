"""Large latents in overlapping tiles: a decoder's memory grows with the area of its image."""

from dataclasses import dataclass

import numpy as np

OVERLAP = 0.25  # of a tile's side, as in diffusers


@dataclass(frozen=True)
class Tiles:
    """Where the tiles of a latent [h, w] start, and how large they are. One tile is the whole."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    size: tuple[int, int]

    @classmethod
    def of(cls, height: int, width: int, largest: int) -> "Tiles":
        """Tiles of at most `largest` on a side that overlap by OVERLAP or more; 0: one tile."""
        high, wide = (min(side, largest or side) for side in (height, width))
        return cls(_starts(height, high), _starts(width, wide), (high, wide))

    def split(self, latent: np.ndarray) -> np.ndarray:
        """[n, C, h, w] to its tiles, [n * tiles, C, high, wide]: those of an image are adjacent."""
        return self._cut(latent, 1, rows_at=2)

    def split_images(self, images: np.ndarray, factor: int) -> np.ndarray:
        """[n, H, W, 3] to the images of its tiles; a latent pixel is `factor` pixels wide."""
        return self._cut(images, factor, rows_at=1)

    def _cut(self, whole: np.ndarray, factor: int, rows_at: int) -> np.ndarray:
        """The tiles of `whole`, whose axis number `rows_at` is its height, the next its width."""
        if self.count == 1:
            return whole
        high, wide = (side * factor for side in self.size)
        before = (slice(None),) * rows_at
        found = [
            whole[(*before, slice(y, y + high), slice(x, x + wide))]
            for y in (row * factor for row in self.rows)
            for x in (column * factor for column in self.columns)
        ]
        return np.stack(found, 1).reshape(-1, *found[0].shape[1:])

    def join(self, parts: np.ndarray) -> np.ndarray:
        """The images of all tiles, [n * tiles, H, W, 3] uint8, to images [n, ., ., 3] uint8.

        Each tile fades out linearly where it overlaps others.
        """
        if self.count == 1:
            return parts
        return self._joined(parts).round().astype(np.uint8)

    def join_latents(self, parts: np.ndarray) -> np.ndarray:
        """The latents of all tiles, [n * tiles, C, h, w] float32, to latents [n, C, ., .]."""
        if self.count == 1:
            return parts
        return self._joined(parts.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)

    @property
    def count(self) -> int:
        """The number of tiles."""
        return len(self.rows) * len(self.columns)

    def _joined(self, parts: np.ndarray) -> np.ndarray:
        """Tiles [n * tiles, ., ., k] to the whole, [n, ., ., k] float32."""
        count = self.count
        tiles = parts.reshape(-1, count, *parts.shape[1:])
        factor = parts.shape[1] // self.size[0]
        down, across = (
            _weights(starts, side, factor)
            for starts, side in zip((self.rows, self.columns), self.size, strict=True)
        )
        height = (self.rows[-1] + self.size[0]) * factor
        width = (self.columns[-1] + self.size[1]) * factor
        joined = np.zeros((len(tiles), height, width, parts.shape[3]), dtype=np.float32)
        for k, (i, j) in enumerate(np.ndindex(len(self.rows), len(self.columns))):
            y, x = self.rows[i] * factor, self.columns[j] * factor
            weight = (down[i][:, None] * across[j])[:, :, None]
            joined[:, y : y + len(down[i]), x : x + len(across[j])] += weight * tiles[:, k]
        return joined


def _starts(side: int, tile: int) -> tuple[int, ...]:
    """Evenly spaced tiles from the first to the last place."""
    if tile == side:
        return (0,)
    count = 1 + int(np.ceil((side - tile) / (tile * (1 - OVERLAP))))
    return tuple(int(start) for start in np.linspace(0, side - tile, count).round())


def _weights(starts: tuple[int, ...], tile: int, factor: int) -> list[np.ndarray]:
    """The weight of each pixel of each tile along one side; the weights of a pixel add up to 1."""
    pixels = tile * factor
    found = [np.ones(pixels, dtype=np.float32) for _ in starts]
    for k, (start, after) in enumerate(zip(starts, starts[1:], strict=False)):
        shared = (start + tile - after) * factor
        rise = (np.arange(shared, dtype=np.float32) + 0.5) / shared
        found[k][pixels - shared :] *= 1 - rise
        found[k + 1][:shared] *= rise
    total = np.zeros((starts[-1] + tile) * factor, dtype=np.float32)
    for start, weights in zip(starts, found, strict=True):
        total[start * factor :][:pixels] += weights
    return [of / total[start * factor :][:pixels] for start, of in zip(starts, found, strict=True)]
