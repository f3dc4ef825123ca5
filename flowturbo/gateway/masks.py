"""OpenAI's masks: transparent where to repaint. The service's are white there."""

import io

import numpy as np
from PIL import Image

from flowturbo.gateway.answers import Refused
from flowturbo.pictures import Picture

_LEVEL = 128  # of alpha, below which a pixel is repainted


def white_where_transparent(data: bytes) -> np.ndarray:
    """The mask [H, W] uint8 as the service takes it: 255 where the file is transparent.

    Raises Refused and RequestError.
    """
    Picture.of_file("mask", data)  # bounds the size before anything is decoded
    try:
        with Image.open(io.BytesIO(data)) as opened:
            alpha = np.asarray(opened.convert("RGBA"))[:, :, 3]
    except (OSError, SyntaxError, ValueError) as error:
        raise Refused(400, f"mask cannot be read: {error}", param="mask") from None
    if not (alpha < _LEVEL).any():
        raise Refused(
            400,
            "mask must be transparent where to repaint, got a mask that is opaque everywhere",
            param="mask",
        )
    return np.asarray(255 - alpha, dtype=np.uint8)
