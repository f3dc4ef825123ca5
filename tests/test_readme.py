"""The README's commands exist and its pictures are there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line
    for kind, text in BLOCKS
    if kind == "sh"
    for line in text.replace("\\\n", " ").splitlines()
    if line and not line.startswith(("#", "git ", "cd "))
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        asked = ["make", "-n", *words[1:]]
    elif words[0].endswith("flowturbo-client"):
        asked = [sys.executable, "-m", "flowturbo_client", words[1], "--help"]
    else:
        assert words[0].endswith("python")
        asked = [sys.executable, *words[1:3], "--help"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for option in (word for word in words if word.startswith("--") and "--help" in asked):
        assert option in done.stdout, f"{command}: no option {option}"


def test_there_are_commands() -> None:
    assert {"make demo", "make test"} <= {command.split("#")[0].strip() for command in COMMANDS}


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("text", [text for kind, text in BLOCKS if kind == "python"])
def test_python_is_right(text: str, tmp_path: Path) -> None:
    """Names and arguments, as far as the type checker sees."""
    (tmp_path / "example.py").write_text(text)
    command = [sys.executable, "-m", "mypy", str(tmp_path / "example.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
