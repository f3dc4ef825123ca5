"""What docs/architecture.md says of the modules holds."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT

from flowturbo.conditions import KINDS
from flowturbo.contract import (
    BLOCK_OUTPUTS,
    COMMON_INPUTS,
    ENCODED_IMAGE,
    MAGNITUDE,
    PAIR,
    SCALARS,
    SEED,
)

pytestmark = pytest.mark.unit

# Names that are nothing else: `schedule` or `image` may well be a key of a report.
PLAIN = {"schedule", "times", "guidance_scale", "guidance_interval", "output_format", "size"}
PLAIN |= {"image", "mix"}  # words of messages and reports
TENSORS = {spec.name for spec in (*COMMON_INPUTS, *BLOCK_OUTPUTS)} - PLAIN
TENSORS |= {spec.name for kind in KINDS.values() for spec in kind.request_inputs} - PLAIN
TENSORS |= {SEED, ENCODED_IMAGE, MAGNITUDE, PAIR, SCALARS}
FOLDERS = ("flowturbo", "export", "tuning", "bench", "research", "examples")


def modules(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The packages that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_tensor_names_are_spelled_once() -> None:
    """In the contract, in the conditions and in the client.

    The gateway has OpenAI's fields, some of which have the same names.
    """
    spelled = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.value!r}"
        for path in modules(*FOLDERS)
        if path.name not in ("contract.py", "gateway.py", "hostile.py")
        and not {"conditions", "gateway"} & set(path.parts)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in TENSORS
    ]
    assert spelled == []


def test_the_mathematics_needs_numpy_alone() -> None:
    for path in modules("flowturbo/solver"):
        needed = {name.split(".")[0] for name in imported(path)} - {*sys.stdlib_module_names}
        assert needed <= {"numpy", "flowturbo"}
        own = {name for name in imported(path) if name.startswith("flowturbo")}
        assert all(name.startswith(("flowturbo.solver", "flowturbo.errors")) for name in own), path


def test_the_core_needs_neither_torch_nor_triton() -> None:
    torch_here = {"flowturbo/runtimes.py", "flowturbo/serving/block.py"}  # where they are asked to
    triton_here = {
        f"flowturbo/serving/{name}.py"
        for name in ("block", "checker", "finisher", "metrics", "orchestrator", "planner")
    } | {"flowturbo/serving/triton_io.py"}
    for path in modules("flowturbo"):
        name = str(path.relative_to(ROOT))
        if name.startswith("flowturbo/nets/"):
            continue
        needs = imported(path)
        nets = any(each.startswith(("torch", "flowturbo.nets")) for each in needs)
        assert nets == (name in torch_here), name
        assert ("triton_python_backend_utils" in needs) == (name in triton_here), name


def test_the_record_has_one_reader() -> None:
    """Who needs to know of a pipeline asks flowturbo.pipeline."""
    users = [
        str(path.relative_to(ROOT))
        for path in modules(*FOLDERS, "training")
        if {"RECORDS", "record_path"}
        & {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    ]
    # The export writes and removes it.
    assert users == ["flowturbo/pipeline.py", "export/install.py"]
    text = (ROOT / "export/install.py").read_text()
    assert "read_json" not in text and "read_text(record" not in text
