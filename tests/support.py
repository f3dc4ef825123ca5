"""What several test modules share: the golden cases and the export command."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"


@dataclass(frozen=True)
class GoldenCase:
    """A sample of the public reference implementation."""

    schedule: str
    guidance_scale: float
    label: np.ndarray
    noise: np.ndarray
    latent: np.ndarray


def golden_cases() -> list[GoldenCase]:
    arrays = np.load(GOLDEN / "cases.npz")
    return [
        GoldenCase(
            case["schedule"],
            case["guidance_scale"],
            *(arrays[f"{name}_{case['case']}"] for name in ("label", "noise", "latent")),
        )
        for case in json.loads((GOLDEN / "cases.json").read_text())["cases"]
    ]


def run_export(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`python -m export` as a user runs it."""
    command = [sys.executable, "-m", "export", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
