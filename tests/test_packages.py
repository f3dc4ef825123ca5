"""The packages state what they work with; constraints.txt states what is tested."""

import importlib.metadata
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support import ROOT

pytestmark = pytest.mark.unit

CONSTRAINTS = {
    canonicalize_name(line.split("==")[0]): line.split("==")[1]
    for line in (ROOT / "constraints.txt").read_text().splitlines()
}


def stated(folder: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
    extras = project.get("optional-dependencies", {}).values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("folder", ["", "client"])
def test_requirements_are_ranges_that_hold_what_is_tested(folder: str) -> None:
    for requirement in stated(folder):
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators and operators <= {">=", "<"}, requirement
        tested = CONSTRAINTS[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(tested), requirement


def test_constraints_are_exact_and_those_that_are_installed() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert lines == sorted(lines, key=str.lower)
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    for name in ("numpy", "torch", "tritonclient", "onnxruntime", "diffusers"):
        assert importlib.metadata.version(name).partition("+")[0] == CONSTRAINTS[name]
