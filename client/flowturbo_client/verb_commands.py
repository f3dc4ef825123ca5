"""The commands of `flowturbo-client` that start from an image, or from noise between two seeds."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .client import FlowTurboClient
from .errors import InvalidRequestError
from .pictures import padded
from .protocol import Generation
from .provenance import ROUNDING, replay
from .verbs import EDIT_STRENGTH

_Add = Callable[..., Any]


@dataclass(frozen=True)
class Verb:
    """A command: its help, its own options, and its run."""

    help: str
    options: Callable[[_Add], None]
    run: Callable[[FlowTurboClient, argparse.Namespace, dict[str, Any]], Generation]


def add_verb(
    parser: argparse.ArgumentParser, verb: Verb, server_options: Callable[..., None]
) -> None:
    """Add the options of `verb` to `parser`."""
    add = parser.add_argument
    verb.options(add)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--label", metavar="NAME", help="a class name")
    what.add_argument("--id", type=int, metavar="ID", help="a class id")
    what.add_argument("--prompt", metavar="TEXT")
    add("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    add("--pipeline", metavar="NAME", help="a pipeline of the server (default: the server's)")
    add("--size", metavar="WIDTHxHEIGHT", help="in pixels (default: the server's)")
    add("--schedule", metavar="H1P5R3", help="a schedule or preset (default: the server's)")
    add("--guidance-scale", type=float, metavar="S", help="1.0 is unguided")
    add("--output", type=Path, default=Path("images"), metavar="DIR", help="default: %(default)s")
    add("--strip-metadata", action="store_true", help="do not write into files how they were made")
    server_options(parser, default_timeout_s=60.0)

    def run(client: FlowTurboClient, args: argparse.Namespace) -> int:
        label = args.label if args.id is None else args.id
        what = {"labels": label} if args.prompt is None else {"prompts": args.prompt}
        named = ("pipeline", "size", "schedule", "guidance_scale")
        more = {name: getattr(args, name) for name in named}
        more |= {"negative_prompts": args.negative_prompt}
        more |= {"strip_metadata": args.strip_metadata or None, "output_format": "png"}
        more = {name: value for name, value in more.items() if value is not None}
        return _write(verb.run(client, args, what | more), args.output)

    parser.set_defaults(run=run)


REPLAY_HELP = "make the image of a file again, and say whether it is the same"


def add_replay(parser: argparse.ArgumentParser, server_options: Callable[..., None]) -> None:
    """Add the options of `replay` to `parser`."""
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="an image file that this service made")
    add("--image", type=Path, metavar="FILE", help="the image that an edit started from")
    add("--mask", type=Path, metavar="FILE", help="the mask of an inpainted image")
    add("--output", type=Path, metavar="FILE", help="where to write it (default: nowhere)")
    server_options(parser, default_timeout_s=60.0)
    parser.set_defaults(run=_replay)


def _replay(client: FlowTurboClient, args: argparse.Namespace) -> int:
    """Return 0 for the same picture, else 1."""
    found = replay(client, args.file, args.image, args.mask)
    if args.output:
        args.output.write_bytes(found.encoded)
        print(args.output)
    if found.largest_difference == 0:
        print("the same picture")
        return 0
    if found.largest_difference <= ROUNDING and not found.other:
        print(f"the same picture but for rounding: by {found.largest_difference} of 255 at most")
        return 0
    why = f"; other {', '.join(found.other)} than then" if found.other else ""
    print(f"not the same: colours differ by up to {found.largest_difference} of 255{why}")
    return 1


def positive(text: str) -> int:
    """Return an integer of the command line, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return int(text)


def _write(made: Generation, folder: Path) -> int:
    """Write every image, or the noise of an inversion."""
    folder.mkdir(parents=True, exist_ok=True)
    if made.latents is not None:
        path = folder / "noise.npy"
        np.save(path, made.latents)
        print(path)
        return 0
    for k, (file, seed) in enumerate(zip(made.encoded or (), made.seeds.tolist(), strict=True)):
        path = folder / f"{k:03}_seed{seed}.png"
        path.write_bytes(file)
        print(path)
    used = made.settings
    start = f", from t = {made.start_time:.2f}" if made.start_time else ""
    told = f"{used['pipeline']} {used['schedule']}, guidance {used['guidance_scale']:g}{start}"
    print(f"{told}, {made.latency_s * 1e3:.0f} ms", file=sys.stderr)
    return 0


def _seeds(add: _Add) -> None:
    add("--seed", type=int, nargs="+", metavar="N", help="one image each (default: random)")


def _image(add: _Add) -> None:
    add("image", type=Path, metavar="IMAGE", help="a PNG, JPEG or WebP file")


def _strength(add: _Add, default: float) -> None:
    add(
        "--strength",
        type=float,
        default=default,
        metavar="S",
        help="share of the noise that is added, in (0, 1] (default: %(default)s)",
    )


def _edit_options(add: _Add) -> None:
    _image(add)
    _strength(add, EDIT_STRENGTH)
    _seeds(add)


def _vary_options(add: _Add) -> None:
    _image(add)
    _strength(add, 0.7)
    add("--count", type=positive, default=4, metavar="N", help="default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="variation i has seed N + i")


def _inpaint_options(add: _Add) -> None:
    _image(add)
    add(
        "mask",
        nargs="?",
        metavar="MASK",
        help="an image that is white where to repaint; alpha: where IMAGE is transparent; leave it "
        "out with --pad",
    )
    add("--pad", type=int, nargs=4, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"), help="outpainting")
    add("--feather", type=int, metavar="PIXELS", help="over which the new image fades in")
    add(
        "--strength",
        type=float,
        metavar="S",
        help="start from what is masked, with this share of noise (default: fill the hole)",
    )
    _seeds(add)


def _edit(client: FlowTurboClient, args: argparse.Namespace, what: dict[str, Any]) -> Generation:
    given = _per_seed(what, args.seed)
    made: Generation = client.edit(args.image, strength=args.strength, **given)
    return made


def _vary(client: FlowTurboClient, args: argparse.Namespace, what: dict[str, Any]) -> Generation:
    given = _per_seed(what, [args.seed + k for k in range(args.count)])
    made: Generation = client.vary(args.image, strength=args.strength, **given)
    return made


def _inpaint(client: FlowTurboClient, args: argparse.Namespace, what: dict[str, Any]) -> Generation:
    image: Any = args.image
    mask: Any = args.mask
    if (args.pad is None) == (mask is None):
        raise InvalidRequestError("give either MASK or --pad")
    if args.pad:
        image, mask = padded(image, *args.pad)
    given = _per_seed(what, args.seed)
    made: Generation = client.inpaint(
        image, mask, feather=args.feather, strength=args.strength, **given
    )
    return made


def _invert(client: FlowTurboClient, args: argparse.Namespace, what: dict[str, Any]) -> Generation:
    made: Generation = client.invert(args.image, **what)
    return made


def _interpolate(
    client: FlowTurboClient, args: argparse.Namespace, what: dict[str, Any]
) -> Generation:
    if args.prompt_to is not None:
        what["prompts_to"] = args.prompt_to
    return client.interpolate(args.first, args.last, args.count, **what)


def _interpolate_options(add: _Add) -> None:
    add("first", type=int, metavar="SEED")
    add("last", type=int, metavar="SEED")
    add("--prompt-to", metavar="TEXT", help="the text that --prompt changes to on the way")
    add("--count", type=int, default=8, metavar="N", help="default: %(default)s")


def _per_seed(what: dict[str, Any], seeds: list[int] | None) -> dict[str, Any]:
    """`what` once per seed: a prompt serves all seeds, a class does not."""
    if seeds is None:
        return dict(what)
    labels = {"labels": [what["labels"]] * len(seeds)} if "labels" in what else {}
    return {**what, **labels, "seeds": seeds}


VERBS = {
    "edit": Verb("change an image towards a class or a text", _edit_options, _edit),
    "inpaint": Verb("repaint a part of an image", _inpaint_options, _inpaint),
    "vary": Verb("make variations of an image", _vary_options, _vary),
    "invert": Verb("write the noise of an image", _image, _invert),
    "interpolate": Verb(
        "make the images between those of two seeds", _interpolate_options, _interpolate
    ),
}
