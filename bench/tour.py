"""Pictures of the web page for the docs, on a phone and on a wide screen: `python -m bench.tour`.

Each picture shows what a visitor sees after some steps: an image, a comparison, a repainted part.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowturbo_client import FlowTurboError

from bench.browser import chromium
from bench.downloads import DownloadError
from bench.faults import served
from bench.gateway import running_gateway
from flowturbo.command import run_command
from flowturbo.errors import FlowTurboError as ServiceError

WIDTHS = {390: 844, 1280: 900}  # pixels, and the heights of such screens
PROMPT = "a red letter b left of a blue 7 on white"
_MADE_MS = 60_000


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2, and one line on stderr, for errors that the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m bench.tour", description=__doc__)
    add = parser.add_argument
    add("--repository", type=Path, default=Path("model_repository"))
    add("--output", type=Path, default=Path("docs"))
    args = parser.parse_args(argv)
    errors = (FlowTurboError, ServiceError, DownloadError, OSError, ValueError)
    return run_command("tour", lambda: _run(args), errors)


def _run(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(served(args.repository, scratch / "server.log"))
        gateway = stack.enter_context(running_gateway(server.grpc))
        browser = stack.enter_context(chromium())
        for width, height in WIDTHS.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(gateway.address)
            for path in tour(page, args.output, width):
                print(path)
            page.close()


def tour(page: Any, folder: Path, width: int) -> list[Path]:
    """Takes the steps on `page` and a picture after each; returns the pictures' paths."""
    found = []

    def picture(name: str) -> None:
        found.append(folder / f"page_{name}{width}.png")
        page.screenshot(path=found[-1], full_page=True)

    page.get_by_label("Model").select_option("scenes")
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Seed").fill("7")
    _make(page)
    picture("")
    page.get_by_label("Compare schedules").check()
    _make(page)
    picture("compare_")
    page.get_by_label("Create").check()
    _make(page)
    page.get_by_role("button", name="Start from this").click()
    page.get_by_label("Brush size").fill("40")
    box = page.locator("#canvas").bounding_box()
    x = box["x"] + 0.28 * box["width"]
    page.mouse.move(x, box["y"] + 0.35 * box["height"])
    page.mouse.down()
    page.mouse.move(x, box["y"] + 0.65 * box["height"], steps=8)
    page.mouse.up()
    page.get_by_label("Prompt", exact=True).fill("a green letter k left of a blue 7 on white")
    _make(page)
    picture("inpaint_")
    page.get_by_label("Create").check()
    page.get_by_label("Prompt", exact=True).fill("")
    page.get_by_role("button", name="Make it").click()
    page.get_by_role("alert").wait_for()
    picture("error_")
    return found


def _make(page: Any) -> None:
    page.get_by_role("button", name="Make it").click()
    page.get_by_text("Done.", exact=True).wait_for(timeout=_MADE_MS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
