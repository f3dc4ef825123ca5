"""The measuring commands run here, small: what they say of speed is for real machines."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, run_module

from bench.latent_size import fitted
from bench.networks import SIZES, XL, matrix_flops


def run(module: str, *arguments: str | Path | int) -> None:
    done = run_module(module, *arguments)
    assert done.returncode == 0, done.stderr


def output_of(module: str, *arguments: str | Path) -> str:
    """Of a command that starts others."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_gpu_check(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    run("bench.gpu_check", "--size", "small", "--precisions", "bf16", "fp8", "--out", out)
    report = json.loads(out.read_text())
    forms = {(b["engine"], b["precision"]) for b in report["blocks"]}
    assert {("PyTorch", "fp32"), ("PyTorch", "bf16"), ("OnnxRuntime", "fp8")} <= forms
    assert not [form for form in forms if "fp16" in form]
    assert len(report["blocks"]) == len(forms) * 3 * len(SIZES["small"].rows)
    assert len(report["schedules"]) == len(forms) * 7 * len(SIZES["small"].batches)
    assert all(b["ms"] > 0 for b in report["blocks"])
    blocks = [b for b in report["blocks"] if b["model"] != "vae_decoder"]
    assert max(b["error"] for b in blocks if b["precision"] != "fp8") < 0.1
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_latent_size(glyphs_repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    run("bench.latent_size", "--repository", glyphs_repository, "--side", 4, 8, "--out", out)
    report = json.loads(out.read_text())
    assert [point["tokens"] for point in report["points"]] == [4, 16]
    assert all(math.isfinite(figure) for figure in report["line"].values())


def test_the_line_through_latent_sizes() -> None:
    """Times that rise by 3 ms for each token, from 5 ms on."""
    report = fitted({side: 5 + 3.0 * (side // 2) ** 2 for side in (4, 8, 16)})
    assert report["line"]["slope_ms"] == pytest.approx(3)
    assert report["line"]["intercept_ms"] == pytest.approx(5)
    assert [point["tokens"] for point in report["points"]] == [4, 16, 64]


def test_xl_check_small(tmp_path: Path) -> None:
    """A part after the other: the report has the steps of both."""
    out = tmp_path / "report.json"
    command = ("bench.xl_check", "--size", "small", "--folder", tmp_path / "work", "--out", out)
    options = ("--precision", "bf16", "--compute-capability", "8.9")
    assert "trajectory H1P5R3" in output_of(*command, "--part", "export", *options)
    said = output_of(*command, "--part", "train")
    assert "8 images (0 skipped) of 2 classes" in said
    assert "ema weights after 10 steps" in said
    steps = {r["step"]: r for r in json.loads(out.read_text())["runs"]}
    training = {"encode 8 pictures", "train 10 steps of 4 rows"}
    assert steps.keys() == {"export and engine for 8.9", "verify", *training}
    assert all(0.1 < r["peak_gib"] < 12 for r in steps.values())


def test_operations_of_the_public_model() -> None:
    """118.6 billion multiply-adds: DiT-XL/2 (arXiv 2212.09748, table 4), whose shape SiT keeps."""
    assert matrix_flops(XL, 1) / 2 == pytest.approx(118.6e9, rel=0.02)
