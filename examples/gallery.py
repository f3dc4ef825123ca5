"""Draws one page of what the served models can do: `make gallery`.

Each part is a grid: generation, scenes, strengths of an edit, inpainting, interpolation, previews.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from flowturbo_client import FlowTurboClient, Generation
from flowturbo_client.grid import labelled_grid, marked
from numpy.typing import NDArray
from PIL import Image

from flowturbo.serving.installation import ServerError
from flowturbo.serving.tritonserver import running_server

Images = list[NDArray[np.uint8]]
SEED = 2024
STRENGTHS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0)
BEFORE = "a red letter b left of a blue 7 on white"
AFTER = "a red letter b left of a green letter x on white"
ABOVE = "a yellow letter k above a green 4 on black"
PROMPTS = (BEFORE, ABOVE, "a blue letter t at the top right on yellow")
_GAP = 12


def generation(client: FlowTurboClient) -> Image.Image:
    """Classes by three schedules, from the same noise."""
    names, schedules = list("FLOWTURBO"), ("H8", "H1P5R3", "fast")
    seeds = [SEED + k for k in range(len(names))]
    rows = [_images(client.generate(names, seeds, schedule)) for schedule in schedules]
    return labelled_grid(rows, schedules, names)


def scenes(client: FlowTurboClient) -> Image.Image:
    """Prompts, each with four seeds."""
    seeds = [SEED + k for k in range(4)]
    rows = [
        _images(client.generate(prompts=prompt, seeds=seeds, pipeline="scenes"))
        for prompt in PROMPTS
    ]
    return labelled_grid(rows, [_lines(prompt) for prompt in PROMPTS], [f"seed {s}" for s in seeds])


def strengths(client: FlowTurboClient) -> Image.Image:
    """An edit from one class to another, by strength."""
    rows = []
    for old, new in (("A", "K"), ("8", "B")):
        image = _images(client.generate(old, SEED, "best"))[0]
        edits = [client.edit(image, new, strength=s, seeds=SEED, schedule="H8") for s in STRENGTHS]
        rows.append([image, *(_images(edit)[0] for edit in edits)])
    names = ["original", *(f"{strength:g}" for strength in STRENGTHS)]
    return labelled_grid(rows, ["A to K,\nby strength", "8 to B,\nby strength"], names)


def inpainting(client: FlowTurboClient) -> Image.Image:
    """Another sign in the right half of a scene, and half of a glyph."""
    scene = _images(client.generate(prompts=BEFORE, seeds=SEED, pipeline="scenes"))[0]
    glyph = _images(client.generate("R", SEED))[0]
    mask = np.zeros(scene.shape[:2], np.uint8)
    mask[:, mask.shape[1] // 2 :] = 255
    seeds = [SEED + k for k in range(4)]
    made = [
        client.inpaint(scene, mask, prompts=AFTER, seeds=seeds, pipeline="scenes"),
        client.inpaint(glyph, mask, ["R"] * 4, seeds=seeds),
    ]
    rows = [
        [image, marked(image, mask), *_images(each)]
        for image, each in zip((scene, glyph), made, strict=True)
    ]
    names = ["original", "masked", *(f"seed {seed}" for seed in seeds)]
    return labelled_grid(rows, [_lines(AFTER), "R"], names)


def interpolation(client: FlowTurboClient) -> Image.Image:
    """From the noise of one seed to that of another."""
    rows = [
        _images(client.interpolate(SEED, SEED + 1, 8, "G")),
        _images(client.interpolate(SEED, SEED + 1, 8, prompts=ABOVE, pipeline="scenes")),
    ]
    return labelled_grid(rows, ["G", _lines(ABOVE)], [f"{k / 7:.0%}" for k in range(8)])


def previews(client: FlowTurboClient) -> Image.Image:
    """What the stream shows after each step."""
    updates = [
        list(client.stream("S", seeds=SEED, schedule="H8")),
        list(client.stream(prompts=BEFORE, seeds=SEED, schedule="H8", pipeline="scenes")),
    ]
    rows = [[np.asarray(update.pil()[0]) for update in each] for each in updates]
    names = ["final" if update.final else f"step {update.step}" for update in updates[0]]
    return labelled_grid(rows, ["S", _lines(BEFORE)], names)


PARTS: tuple[Callable[[FlowTurboClient], Image.Image], ...] = (
    *(generation, scenes, strengths, inpainting, interpolation, previews),
)


def main() -> int:
    """Returns 0, or 1 if the server did not start."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--output", type=Path, default=Path("output/gallery.png"))
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    log = args.output.with_suffix(".log")
    try:
        with running_server(args.repository, log_path=log) as address:
            with FlowTurboClient(address.grpc) as client:
                grids = []
                for part in PARTS:
                    print(f"{part.__name__}: {part.__doc__}", flush=True)
                    grids.append(part(client))
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _page(grids).save(args.output)
    print(args.output)
    return 0


def _images(made: Generation) -> Images:
    assert made.images is not None
    return list(made.images)


def _lines(text: str) -> str:
    """`text` in lines of about four words."""
    words = text.split()
    return "\n".join(" ".join(words[k : k + 4]) for k in range(0, len(words), 4))


def _page(grids: Sequence[Image.Image]) -> Image.Image:
    """The grids one below the other."""
    width = max(grid.width for grid in grids)
    page = Image.new("RGB", (width, sum(grid.height + _GAP for grid in grids)), "white")
    top = 0
    for grid in grids:
        page.paste(grid, (0, top))
        top += grid.height + _GAP
    return page


if __name__ == "__main__":
    sys.exit(main())
