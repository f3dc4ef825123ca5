"""The documentation's commands, options, links, examples and tables are those of the code."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support import ROOT, run_module
from test_language import DOCUMENTS
from tritonclient.utils import np_to_triton_dtype

from flowturbo.conditions import REQUEST_INPUTS, REQUEST_OUTPUTS
from flowturbo.contract import ORCHESTRATOR, TensorSpec
from flowturbo.settings import Settings
from flowturbo.solver.steps import steps_table

SERVICES = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
# Words of the shell, or of the system: nothing of this project to check.
NOT_OURS = {"aiperf", "cd", "export", "git", "grep", "ldconfig", "mkdir", "sed"}
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in DOCUMENTS}


def blocks(kind: str) -> list[tuple[str, str]]:
    """The fenced blocks of one language, each with its document."""
    fence = re.compile(rf"^```{kind}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [(name, block) for name, text in TEXTS.items() for block in fence.findall(text)]


def commands() -> Iterator[tuple[str, str]]:
    """The commands in blocks of the shell, each with its document."""
    for name, block in blocks("sh"):
        for joined in block.replace("\\\n", " ").splitlines():
            for command in re.split(r" && | \|\| | \| ", joined):
                if command.strip() and not command.startswith("#"):
                    yield name, " ".join(command.split())


def inline_commands() -> Iterator[tuple[str, str]]:
    """Commands of this project within sentences and tables, each with its document."""
    for name, text in TEXTS.items():
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        for command in re.findall(r"`((?:make|python -m) [^`]+)`", prose):
            yield name, " ".join(command.split())


def cases(found: Iterable[tuple[str, str]]) -> list[Any]:
    """Parameters of a test, without repeats, named by document and the start of the text."""
    return [
        pytest.param(name, text, id=f"{name}: {text[:70].partition(chr(10))[0]}")
        for name, text in dict.fromkeys(found)
    ]


@pytest.mark.parametrize(("document", "command"), cases([*commands(), *inline_commands()]))
def test_commands(document: str, command: str) -> None:
    words = shlex.split(command, comments=True)
    if words[:2] == ["docker", "compose"]:
        words = compose_words(words)
    if not words or words[0] in NOT_OURS or words[1:3] == ["-m", "venv"]:
        return
    program = Path(words[0]).name
    if program == "make":
        asked = ["make", "-n", *words[1:]]
        done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    elif program == "cp":
        assert (ROOT / words[1]).exists()
    elif program == "curl":
        # Those of the gateway are run, in tests/gateway.
        assert f"/v2/models/{ORCHESTRATOR}/" in command or ":8080/v1/images/" in command
    elif program in ("pip", "pytest") or words[1:3] == ["-m", "pip"]:
        paths = [word for word in words[1:] if word.startswith(("./", "tests", "client/"))]
        assert all((ROOT / path).exists() for path in paths)
    else:
        check_options(command, module_words(words))


_WITH_ACTIONS = ("flowturbo_client", "flowturbo.gateway.keys")
_EXPORT_ACTIONS = (["verify"], ["list"], ["remove"])


def check_options(command: str, words: list[str]) -> None:
    """That a module of this project takes the options in `words`; its name is the first."""
    # The first word of what a client or an export is to do has options of its own.
    has_action = words[0] in _WITH_ACTIONS or words[1:2] in _EXPORT_ACTIONS
    given = words[1:2] if has_action else []
    if words[:2] == ["training.refiner", "--diffusers"]:
        given = ["--diffusers", "folder"]  # its refiners have options of their own
    known = options_of(words[0], *given)
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert option in known, f"{command}: no option {option}"


@cache
def options_of(module: str, *action: str) -> set[str]:
    """The options in a module's help."""
    done = run_module(module, *action, "--help")
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"--[\w-]+", done.stdout))


def module_words(words: list[str]) -> list[str]:
    """The module that a command runs, and the words after it."""
    if Path(words[0]).name == "flowturbo-client":
        return ["flowturbo_client", *words[1:]]
    if Path(words[0]).name == "accelerate":
        words = words[1:]
    assert words[0].endswith(("python", "launch")) and words[1] == "-m"
    return words[2:]


def compose_words(words: list[str]) -> list[str]:
    """What runs in the export container, as a command here; nothing for the other services."""
    profiles = [words[k + 1] for k, word in enumerate(words) if word == "--profile"]
    actions = ("run", "up", "logs", "build")
    rest = words[1 + next(k for k, word in enumerate(words) if word in actions) :]
    service = next((word for word in rest if not word.startswith("-")), "server")
    assert SERVICES[service].get("profiles", []) == profiles
    if service != "export":
        return []
    rest = rest[rest.index(service) + 1 :]
    return ["python", *(["-m", "export"] if rest[0] != "-m" else []), *rest]


def test_there_are_commands() -> None:
    found = {command.split("#")[0].strip() for name, command in commands() if name == "README.md"}
    assert {"make demo", "make test"} <= found


def links() -> Iterator[tuple[str, str]]:
    """The targets within the repository, each with its document."""
    for name, text in TEXTS.items():
        yield from ((name, link) for link in re.findall(r"\]\(([^):]+)\)", text))


@pytest.mark.parametrize(("document", "link"), cases(links()))
def test_links(document: str, link: str) -> None:
    path, _, anchor = link.partition("#")
    target = (ROOT / document).parent / path if path else ROOT / document
    assert target.exists()
    if anchor:
        assert anchor in anchors(target.read_text())


def anchors(markdown: str) -> set[str]:
    """The names under which a page's headings can be linked to."""
    headings = re.findall(r"^#+ (.+)$", markdown, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("document", "text"), cases(blocks("python")))
def test_python_is_right(document: str, text: str, tmp_path: Path) -> None:
    """Names and arguments, as far as the type checker sees."""
    (tmp_path / "example.py").write_text(text)
    command = [sys.executable, "-m", "mypy", str(tmp_path / "example.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("document", "text"), cases(blocks("json")))
def test_json_is_right(document: str, text: str) -> None:
    """Requests name tensors and types as the service does."""
    stated = json.loads(text)
    types = {spec.name: np_to_triton_dtype(np.dtype(spec.dtype)) for spec in REQUEST_INPUTS}
    for tensor in stated.get("inputs", []):
        assert types[tensor["name"]] == tensor["datatype"]
    outputs = {spec.name for spec in REQUEST_OUTPUTS}
    assert {tensor["name"] for tensor in stated.get("outputs", [])} <= outputs


TENSORS = {"input": REQUEST_INPUTS, "output": REQUEST_OUTPUTS}


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, id=f"{kind} {spec.name}")
        for kind, specs in TENSORS.items()
        for spec in specs
    ],
)
def test_the_page_of_requests_has_every_tensor(spec: TensorSpec) -> None:
    row = f"| `{spec.name}` | {np_to_triton_dtype(np.dtype(spec.dtype))} ["
    assert row in TEXTS["docs/requests.md"]


def settings() -> list[str]:
    """The settings of the service, and those of the containers."""
    containers = re.findall(r"^(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    return [*(field.name for field in fields(Settings)), *containers]


@pytest.mark.parametrize("setting", settings())
def test_the_page_of_deployment_has_every_setting(setting: str) -> None:
    assert re.search(rf"^\|.*`{setting}`.*\|", TEXTS["docs/deployment.md"], re.MULTILINE)


def test_the_table_of_steps() -> None:
    """The page of schedules has the table that the registry of steps makes."""
    assert steps_table() in TEXTS["docs/schedules.md"]
