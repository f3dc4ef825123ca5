"""Pictures of a file of prompts, with a manifest from which an interrupted run goes on."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .client import FlowTurboClient
from .errors import InvalidRequestError
from .gallery import file_part

MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class Wanted:
    """Image number `index` of a run: its text and seed."""

    index: int
    prompt: str
    seed: int

    @property
    def file(self) -> str:
        """The name of its picture."""
        return f"{self.index:05d}_{file_part(self.prompt)}_seed{self.seed}.png"


def read_prompts(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file that are not blank; InvalidRequestError without any."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{path} must be UTF-8 text: {error}") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise InvalidRequestError(f"{path} has no prompt: one per line is needed")
    return found


def generate_file(
    client: FlowTurboClient,
    wanted: Sequence[Wanted],
    folder: Path,
    batch: int,
    progress: Callable[[str], None],
    **options: Any,
) -> int:
    """Make the pictures of `wanted` that `folder` lacks; return how many were made.

    Each line of the manifest has a picture's file, prompt and seed, whether its text was cut, and
    the settings that the server used. Raises InvalidRequestError if the folder has a manifest of
    other options.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / MANIFEST
    asked = {name: value for name, value in options.items() if value is not None}
    there = _read(manifest, asked)
    missing = [each for each in wanted if each not in there or not (folder / each.file).is_file()]
    for start in range(0, len(missing), batch):
        part = missing[start : start + batch]
        made = client.generate(
            prompts=[each.prompt for each in part],
            seeds=[each.seed for each in part],
            output_format="png",
            **options,
        )
        with manifest.open("a", encoding="utf-8") as lines:
            for each, file, cut in zip(part, made.encoded or (), made.truncated, strict=True):
                (folder / each.file).write_bytes(file)
                entry = {
                    "index": each.index,
                    "prompt": each.prompt,
                    "seed": each.seed,
                    "file": each.file,
                    "truncated": cut,
                    "asked": asked,
                    "settings": made.settings,
                }
                lines.write(json.dumps(entry, ensure_ascii=False) + "\n")
        progress(f"{len(wanted) - len(missing) + start + len(part)}/{len(wanted)} images")
    return len(missing)


def _read(manifest: Path, asked: dict[str, Any]) -> set[Wanted]:
    """Return the images that a manifest has. A last line that was cut off is dropped."""
    if not manifest.is_file():
        return set()
    text = manifest.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        manifest.write_text(whole, encoding="utf-8")
    found = set()
    for number, line in enumerate(whole.split("\n")[:-1], 1):
        try:
            entry = json.loads(line)
            found.add(Wanted(entry["index"], entry["prompt"], entry["seed"]))
            had = entry["asked"]
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRequestError(
                f"{manifest}, line {number}, cannot be read: {error}"
            ) from None
        if had != asked:
            raise InvalidRequestError(
                f"{manifest} has pictures of other options: {had} there, {asked} now. Give another "
                "--output"
            )
    return found
