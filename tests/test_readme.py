"""The README's commands exist and its pictures are there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import ROOT, run_module

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line
    for kind, text in BLOCKS
    if kind == "sh"
    for joined in text.replace("\\\n", " ").splitlines()
    for line in re.split(r" && | \|\| ", joined)
    if line and not line.startswith(("#", "git ", "cd ", "mkdir "))
]
SERVICES = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str) -> None:
    words = shlex.split(command, comments=True)
    if words[:3] == ["python3", "-m", "venv"]:
        return
    if words[0] == "cp" or words[1] == "install":
        assert (ROOT / words[1 if words[0] == "cp" else 2]).exists()
        return
    if words[:2] == ["docker", "compose"]:
        words = compose_words(words)
    if not words:
        return
    if words[0] == "make":
        asked = ["make", "-n", *words[1:]]
        done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return
    if words[0].endswith("flowturbo-client"):
        done = run_module("flowturbo_client", words[1], "--help")
    else:
        assert words[0].endswith("python") and words[1] == "-m"
        done = run_module(words[2], *words[3:4] * ("verify" in words), "--help")
    assert done.returncode == 0, done.stderr
    for option in (word for word in words if word.startswith("--")):
        assert option in re.findall(r"--[\w-]+", done.stdout), f"{command}: no option {option}"


def compose_words(words: list[str]) -> list[str]:
    """What runs in the export container, as a command here; nothing for the other services."""
    profiles = [words[k + 1] for k, word in enumerate(words) if word == "--profile"]
    actions = ("run", "up", "logs", "build")
    rest = words[1 + next(k for k, word in enumerate(words) if word in actions) :]
    service = next((word for word in rest if not word.startswith("-")), "server")
    assert SERVICES[service].get("profiles", []) == profiles
    if service != "export":
        return []
    return ["python", "-m", "export", *rest[rest.index(service) + 1 :]]


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
