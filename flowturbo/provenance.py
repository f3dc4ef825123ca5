"""How an image was made, as metadata of its file: enough to make it again.

PNG, JPEG and WebP files all can have Exif, so there is one form for all. UserComment has a JSON
text, Software the program. The keys of the text are the names of request inputs.
"""

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from flowturbo.contract import (
    FEATHER,
    GUIDANCE_INTERVAL,
    GUIDANCE_SCALE,
    IMAGE,
    INITIAL_NOISE,
    MASK,
    OUTPUT_QUALITY,
    PIPELINE,
    SCHEDULE,
    SEED,
    SIZE,
    STRENGTH,
    TIMES,
)
from flowturbo.errors import RequestError
from flowturbo.pictures import Picture
from flowturbo.pipeline import Pipeline, short_digest
from flowturbo.request import GenerationRequest
from flowturbo.settings import Settings

DIGESTS, VARIANT = "digests", "variant"
DIGEST = "_sha256"  # ends a key of what the file cannot hold: an image, a mask, a given noise
_SOFTWARE, _EXIF, _COMMENT = 0x0131, 0x8769, 0x9286
_ASCII = b"ASCII\0\0\0"  # Exif names the encoding of a comment
_MOST_BYTES = 60_000  # a JPEG file has one segment of 64 KB for them
try:
    PROGRAM = f"FlowTurbo {version('flowturbo')}"
except PackageNotFoundError:  # a checkout that is not installed
    PROGRAM = "FlowTurbo"


def provenance(
    request: GenerationRequest, pipeline: Pipeline, settings: Settings
) -> list[dict[str, Any]]:
    """What made each image of `request`: the inputs that make it again, and digests."""
    common: dict[str, Any] = {
        "program": PROGRAM,
        PIPELINE: pipeline.name,
        DIGESTS: pipeline.digests | _of_solvers(request, pipeline),
        SCHEDULE: str(request.schedule),
        VARIANT: settings.variant,
        GUIDANCE_SCALE: request.guidance.scale,
        GUIDANCE_INTERVAL: request.guidance.interval,
        SIZE: request.size,
        TIMES: request.times,
        OUTPUT_QUALITY: None if request.output_format.startswith("png") else request.quality,
    }
    edit = request.edit
    if edit and edit.strength is not None:  # the times follow from it
        common |= {TIMES: None, STRENGTH: None if edit.fill else edit.strength}
    if edit and edit.masks:
        common[FEATHER] = edit.feather
    common = {name: value for name, value in common.items() if value is not None}
    conditioned = pipeline.condition.request(request.condition)
    conditioned |= pipeline.condition.answer(request.condition)
    found = []
    for k in range(request.images):
        own = {name: _plain(values[k]) for name, values in conditioned.items()}
        if request.initial_noise is None:
            own[SEED] = int(request.seeds[k])
        else:
            own[INITIAL_NOISE + DIGEST] = short_digest(request.initial_noise[k].tobytes())
        for name, given in ((IMAGE, edit.pictures), (MASK, edit.masks)) if edit else ():
            if given:
                own[name + DIGEST] = _digest_of(given[k % len(given)])
        found.append(common | own)
    return found


def exif(record: Mapping[str, Any], output_format: str) -> bytes:
    """`record` as the Exif of a file. Raises RequestError if it is too long for the format."""
    from PIL import Image

    text = _ASCII + json.dumps(record).encode()
    if output_format == "jpeg" and len(text) > _MOST_BYTES:
        raise RequestError(
            f"the metadata of a JPEG file have at most {_MOST_BYTES} bytes, here {len(text)}: ask "
            "for strip_metadata, another format or shorter texts"
        )
    made = Image.Exif()
    made[_SOFTWARE] = PROGRAM
    made.get_ifd(_EXIF)[_COMMENT] = text
    return made.tobytes()


def _of_solvers(request: GenerationRequest, pipeline: Pipeline) -> dict[str, str]:
    """The digest of fitted solvers, if they were used."""
    used = request.schedule.learned and pipeline.solvers
    return {"solvers": used.digest} if used else {}


def _digest_of(picture: Picture) -> str:
    """Of a file as it came, or of an array's bytes."""
    source = picture.source
    return short_digest(source if isinstance(source, bytes) else source.tobytes())


def _plain(value: Any) -> Any:
    """A value of a tensor as JSON has it."""
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if isinstance(value, np.generic) else value
