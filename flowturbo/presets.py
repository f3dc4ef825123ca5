"""Presets: names that a request may give in place of a schedule.

A repository keeps its own in the orchestrator's folder, as `tuning` chooses them on the
deployed models and `export --presets` installs them: {"presets": {"fast": {"schedule": "H1P5R3"}}}.
What else stands there is for people to read.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowturbo import contract
from flowturbo.errors import RepositoryError, RequestError
from flowturbo.solver.schedule import Schedule
from flowturbo.textfile import TextFileError, read_text

PRESETS_FILE = "presets.json"
# Until a repository has its own: three of the schedules that the paper publishes figures of, for
# SiT-XL/2 (Table 1): FID 3.93 at 38 ms an image, 2.22 at 73 ms and 2.12 at 100 ms.
BUILT_IN = {"fast": "H1P5R3", "balanced": "H5P7R3", "best": "H8P9R5"}
# No schedule starts with a small letter, so none is ever taken for a preset.
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")

DEFAULT = "fast"  # what a request gets that names no schedule, where no setting says otherwise

Presets = Mapping[str, Schedule]


def built_in(*, has_refiner: bool = True) -> Presets:
    """The schedules of BUILT_IN, without their refiner steps where there is no refiner."""
    parsed = {name: Schedule.parse(text) for name, text in BUILT_IN.items()}
    if has_refiner:
        return parsed
    return {name: schedule.without_refiner() for name, schedule in parsed.items()}


def may_be_preset(text: str) -> bool:
    """Whether `text` can only be a preset's name."""
    return bool(re.fullmatch(_NAME, text))


def find_schedule(text: str, presets: Presets) -> Schedule:
    """The preset's of that name, or the one that `text` is; raises RequestError."""
    if preset := presets.get(text):
        return preset
    try:
        return Schedule.parse(text)
    except RequestError as error:
        known = ", ".join(presets)
        raise RequestError(f"{error}; the presets here are {known or 'none'}") from None


def presets_path(repository: Path) -> Path:
    """Where `repository` keeps its presets, if it has any of its own."""
    return repository / contract.ORCHESTRATOR / PRESETS_FILE


def load_presets(repository: Path, *, has_refiner: bool) -> Presets:
    """Those of `repository`, and the built-in ones of other names; raises as `read_presets`."""
    path = presets_path(repository)
    own = read_presets(path, has_refiner=has_refiner) if path.exists() else {}
    return {**built_in(has_refiner=has_refiner), **own}


def read_presets(path: Path, *, has_refiner: bool) -> Presets:
    """The presets in a file; raises RepositoryError for what cannot be read or served."""
    try:
        text = read_text(path)
    except TextFileError as error:
        raise RepositoryError(str(error)) from error
    return parse_presets(text, path, has_refiner=has_refiner)


def parse_presets(text: str, path: Path, *, has_refiner: bool) -> Presets:
    """The presets in the `text` of the file `path`; raises as `read_presets`."""
    try:
        stated = json.loads(text, object_pairs_hook=_without_repeats)["presets"]
        texts = {name: str(preset["schedule"]) for name, preset in stated.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RepositoryError(
            f'{path} must be JSON as {{"presets": {{"fast": {{"schedule": "H1P5R3"}}}}}}, it is '
            f"not: {type(error).__name__}: {error}"
        ) from error
    return {name: _checked(path, name, text, has_refiner) for name, text in texts.items()}


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{repeated!r} stands there twice")
    return dict(pairs)


def _checked(path: Path, name: str, text: str, has_refiner: bool) -> Schedule:
    if not may_be_preset(name):
        raise RepositoryError(
            f"{path}: a preset's name is small letters, digits, - and _, a letter first and 40 at "
            f"most, got {name[:60]!r}"
        )
    try:
        schedule = Schedule.parse(text)
    except RequestError as error:
        raise RepositoryError(f"{path}: preset {name}: {error}") from error
    if schedule.refines and not has_refiner:
        raise RepositoryError(
            f"{path}: preset {name} is {schedule}, whose refiner steps need a {contract.REFINER}"
        )
    return schedule
