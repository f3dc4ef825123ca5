"""Presets: names that a request may give in place of a schedule.

A pipeline has its own in its record, as `tuning` chooses them on the deployed models and `export
--presets` installs them from a file: {"presets": {"fast": {"schedule": "H1P5R3"}}}. What else
stands in that file is for people to read.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowturbo.errors import RepositoryError, RequestError
from flowturbo.solver.schedule import Schedule
from flowturbo.textfile import TextFileError, read_text

# Beside a pipeline's own: three of the schedules that the paper publishes figures of, for SiT-XL/2
# (Table 1): FID 3.93 at 38 ms per image, 2.22 at 73 ms and 2.12 at 100 ms.
BUILT_IN = {"fast": "H1P5R3", "balanced": "H5P7R3", "best": "H8P9R5"}
# No schedule starts with a small letter, so none is ever taken for a preset.
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")

DEFAULT = "fast"  # what a request gets that names no schedule, where nothing says otherwise

Presets = Mapping[str, Schedule]


def built_in(*, has_refiner: bool = True) -> Presets:
    """The schedules of BUILT_IN, without their refiner steps where there is no refiner."""
    schedules = {name: Schedule.parse(text) for name, text in BUILT_IN.items()}
    if has_refiner:
        return schedules
    return {name: schedule.without_refiner() for name, schedule in schedules.items()}


def may_be_preset(text: str) -> bool:
    """Whether `text` can only be a preset's name."""
    return bool(re.fullmatch(_NAME, text))


def parsed(texts: Mapping[str, str], default_shift: float = 1.0) -> Presets:
    """Schedules by name, from their texts; raises RequestError."""
    return {name: Schedule.parse(text, default_shift) for name, text in texts.items()}


def find_schedule(text: str, presets: Presets, default_shift: float = 1.0) -> Schedule:
    """The preset of that name, or the schedule that `text` is; raises RequestError."""
    if preset := presets.get(text):
        return preset
    try:
        return Schedule.parse(text, default_shift)
    except RequestError as error:
        known = ", ".join(presets)
        raise RequestError(f"{error}; the presets here are {known or 'none'}") from None


def read_presets(path: Path, *, has_refiner: bool) -> dict[str, str]:
    """The presets in a file, as texts; raises RepositoryError for what cannot be read or served."""
    try:
        text = read_text(path)
    except TextFileError as error:
        raise RepositoryError(str(error)) from error
    return parse_presets(text, path, has_refiner=has_refiner)


def parse_presets(text: str, path: Path, *, has_refiner: bool) -> dict[str, str]:
    """The presets in the `text` of the file `path`; raises as `read_presets`."""
    try:
        stated = json.loads(text, object_pairs_hook=_without_repeats)["presets"]
        texts = {name: str(preset["schedule"]) for name, preset in stated.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RepositoryError(
            f'{path} must be JSON as {{"presets": {{"fast": {{"schedule": "H1P5R3"}}}}}}, it is '
            f"not: {type(error).__name__}: {error}"
        ) from error
    for name, schedule in texts.items():
        _check(path, name, schedule, has_refiner)
    return texts


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{repeated!r} stands there twice")
    return dict(pairs)


def _check(path: Path, name: str, text: str, has_refiner: bool) -> None:
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
            f"{path}: preset {name} is {schedule}, whose refiner steps need a refiner"
        )
