"""Presets: names that a request may give in place of a schedule.

A pipeline has its own presets in its record. `tuning` chooses them on the deployed models. `export
--presets` installs them from a file: {"presets": {"fast": {"schedule": "H1P5R3"}}}. A schedule that
belongs to one time grid may have another one beside it, "otherwise". Other keys in that file are
for readers.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowturbo.errors import RepositoryError, RequestError
from flowturbo.solver.schedule import Schedule
from flowturbo.textfile import TextFileError, read_text

# Presets of every pipeline: three schedules of the paper. Its figures for SiT-XL/2 (Table 1) are
# FID 3.93 at 38 ms per image, 2.22 at 73 ms and 2.12 at 100 ms.
BUILT_IN = {"fast": "H1P5R3", "balanced": "H5P7R3", "best": "H8P9R5"}
# A schedule never starts with a small letter, so it cannot be confused with a preset.
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")

_OR = " or "
DEFAULT = "fast"  # the schedule of a request that names none, if no default is set

Presets = Mapping[str, Schedule]


def built_in(*, has_refiner: bool = True) -> Presets:
    """The schedules of BUILT_IN. Without a refiner they lose their refiner steps."""
    schedules = {name: Schedule.parse(text) for name, text in BUILT_IN.items()}
    if has_refiner:
        return schedules
    return {name: schedule.without_refiner() for name, schedule in schedules.items()}


def may_be_preset(text: str) -> bool:
    """Whether `text` can be a preset's name; it is then not a schedule."""
    return bool(re.fullmatch(_NAME, text))


def parsed(texts: Mapping[str, str]) -> Presets:
    """Parses schedules by name. Raises RequestError.

    "L4 or H1P3" is L4, and H1P3 for requests that L4 cannot serve.
    """
    found = {}
    for name, text in texts.items():
        first, _, otherwise = text.partition(_OR)
        found[name] = Schedule.parse(first)
        if otherwise:
            found[name] = replace(found[name], otherwise=Schedule.parse(otherwise))
    return found


def shown(schedule: Schedule) -> str:
    """As `parsed` reads it."""
    return _OR.join(map(str, filter(None, (schedule, schedule.otherwise))))


def find_schedule(text: str, presets: Presets) -> Schedule:
    """The schedule of the preset `text`, else `text` parsed as a schedule. Raises RequestError."""
    if preset := presets.get(text):
        return preset
    try:
        return Schedule.parse(text)
    except RequestError as error:
        known = ", ".join(presets)
        raise RequestError(f"{error}; the presets here are {known or 'none'}") from None


def read_presets(path: Path, *, has_refiner: bool) -> dict[str, str]:
    """The presets in a file, as texts. Raises RepositoryError if they cannot be read or served."""
    try:
        text = read_text(path)
    except TextFileError as error:
        raise RepositoryError(str(error)) from error
    return parse_presets(text, path, has_refiner=has_refiner)


def parse_presets(text: str, path: Path, *, has_refiner: bool) -> dict[str, str]:
    """The presets in the `text` of the file `path`. Raises RepositoryError as `read_presets`."""
    try:
        stated = json.loads(text, object_pairs_hook=_without_repeats)["presets"]
        texts = {
            name: _OR.join([str(preset["schedule"]), *map(str, _other(preset))])
            for name, preset in stated.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RepositoryError(
            f'{path} must be JSON such as {{"presets": {{"fast": {{"schedule": "H1P5R3"}}}}}} '
            f"({type(error).__name__}: {error})"
        ) from error
    for name, schedule in texts.items():
        _check(path, name, schedule, has_refiner)
    return texts


def _other(preset: Mapping[str, Any]) -> list[Any]:
    return [preset["otherwise"]] if "otherwise" in preset else []


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{repeated!r} occurs twice")
    return dict(pairs)


def _check(path: Path, name: str, text: str, has_refiner: bool) -> None:
    if not may_be_preset(name):
        raise RepositoryError(
            f"{path}: a preset's name has at most 40 small letters, digits, - and _, and starts "
            f"with a letter, got {name[:60]!r}"
        )
    try:
        schedule = parsed({name: text})[name]
    except RequestError as error:
        raise RepositoryError(f"{path}: preset {name}: {error}") from error
    for each in filter(None, (schedule, schedule.otherwise)):
        if each.refines and not has_refiner:
            raise RepositoryError(
                f"{path}: preset {name} is {each}, whose refiner steps need a refiner"
            )
    if schedule.otherwise and (schedule.otherwise.alone or not schedule.alone):
        raise RepositoryError(
            f"{path}: preset {name}: otherwise {schedule.otherwise} stands beside {schedule}: it "
            "is for solvers of whole schedules, such as L4, and must be none itself"
        )
