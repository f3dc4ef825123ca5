"""The measuring commands run here, small: what they say of speed is for real machines."""

import json
import math
import os
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from support import ROOT, run_module

from bench.estimate import Chip, image_tflop, predictor_ms, request_ms
from bench.gpu_wheels import parts, slim_server
from bench.latent_size import fitted
from bench.networks import SIZES, XL, matrix_flops
from flowturbo.solver.program import compile_program
from flowturbo.solver.schedule import Schedule


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
    run("bench.gpu_check", "--size", "small", "--precisions", "fp32", "fp8", "--out", out)
    report = json.loads(out.read_text())
    forms = {(b["engine"], b["precision"]) for b in report["blocks"]}
    assert forms == {("PyTorch", "fp32"), ("OnnxRuntime", "fp32"), ("OnnxRuntime", "fp8")}
    # What could not be measured is named, with the reason.
    left_out = [line.partition(": ")[0] for line in report["left_out"]]
    assert left_out == ["TensorRT fp32", "PyTorch fp8", "TensorRT fp8"]
    assert len(report["blocks"]) == len(forms) * 3 * len(SIZES["small"].rows)
    assert len(report["schedules"]) == len(forms) * 7 * len(SIZES["small"].batches)
    assert all(b["ms"] > 0 for b in report["blocks"])
    assert {b["model"] for b in report["blocks"]} == {"predictor", "refiner", "decoder"}
    blocks = [b for b in report["blocks"] if b["model"] != "decoder"]
    assert max(b["error"] for b in blocks if b["precision"] != "fp8") < 0.1
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_gpu_check_stops_in_time(tmp_path: Path) -> None:
    """Of some models, and no form is begun once the minutes are over."""
    out = tmp_path / "report.json"
    options = ("--engines", "PyTorch", "--models", "predictor", "--precisions", "bf16", "fp32")
    run("bench.gpu_check", "--size", "small", *options, "--out", out)
    report = json.loads(out.read_text())
    assert [b["precision"] for b in report["blocks"]] == ["bf16"] * 2 + ["fp32"] * 2
    assert {b["model"] for b in report["blocks"]} == {"predictor"}
    assert report["schedules"] == [] and report["left_out"] == []
    run("bench.gpu_check", "--size", "small", *options, "--minutes", 0, "--out", out)
    report = json.loads(out.read_text())
    assert report["blocks"] == []
    assert report["left_out"] == [
        f"PyTorch {p}: time limit of 0 min reached" for p in ("bf16", "fp32")
    ]


def test_gpu_serve_check(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    options = ("--folder", tmp_path / "work", "--seconds", "0.5", "--out", out)
    printed = output_of("bench.gpu_serve_check", "--size", "small", *options)
    assert "32 clients, 1 images per request" in printed
    report = json.loads(out.read_text())
    loads = [(load["images"], load["clients"]) for load in report["loads"]]
    assert loads == [(1, 1), (8, 1), (1, 8), (1, 32)]
    assert all(load["images_per_s"] > 0 for load in report["loads"])


def test_gpu_profile(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    run("bench.gpu_profile", "--size", "small", "--rows", 4, "--out", out)
    report = json.loads(out.read_text())
    assert len(report["products"]) == 4 * 5 and len(report["attention"]) == 4 * 4
    assert all(each.get("tflops", 0) > 0 for each in report["products"] if "failed" not in each)
    # What this machine cannot do is told with its reason.
    failed = {each["kernel"] for each in report["attention"] if "failed" in each}
    assert "cudnn" in failed and "math" not in failed
    whole, *kernels = report["step"]
    assert whole["ms"] > 0 and sum(each["ms"] for each in kernels) <= whole["kernels_ms"]
    assert [each["images"] for each in report["trajectory"]] == [1, 2, 8]
    timed = report["decoder"] + report["trajectory"]
    assert all(each["ms_per_image"] > 0 for each in timed)


def test_the_servers_wheel_for_one_python(tmp_path: Path) -> None:
    """The real wheel's other stubs are left out, and pip installs what is left."""
    wheel = tmp_path / "given" / "nvidia_pytriton-0.7.0-py3-none-any.whl"
    wheel.parent.mkdir()
    installed = distribution("nvidia-pytriton")
    files = [f for f in installed.files or () if "stub" in str(f) or "libs/libpython" in str(f)]
    files += [f for f in installed.files or () if f.name in ("METADATA", "WHEEL")]
    with zipfile.ZipFile(wheel, "w") as made:
        for file in files:
            made.write(file.locate(), str(file))
        record = "nvidia_pytriton-0.7.0.dist-info/RECORD"
        made.writestr(record, "".join(f"{file},,\n" for file in [*files, record]))
    slim_server(wheel, "3.12")
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", site)
    subprocess.run([*pip, wheel], check=True, capture_output=True)
    stubs = list(site.glob("pytriton/tritonserver/python_backend_stubs/*/*_stub"))
    assert [stub.parent.name for stub in stubs] == ["3.12"]
    assert os.access(stubs[0], os.X_OK) and not list(site.rglob("libpython*"))
    slim_server(wheel, "3.12")
    with pytest.raises(SystemExit, match="no stub for Python 3.11"):
        slim_server(wheel, "3.11")


def test_wheels_in_parts(tmp_path: Path) -> None:
    for name, size in {"a": 6, "b": 5, "c": 4, "d": 1}.items():
        (tmp_path / name).write_bytes(bytes(size * 1_000_000))
    made = parts(sorted(tmp_path.iterdir()), 10)
    assert [[path.name for path in part] for part in made] == [["a", "c"], ["b", "d"]]
    with pytest.raises(SystemExit, match="a has 6.0 MB, more than --part-mb 5"):
        parts(sorted(tmp_path.iterdir()), 5)


H100, H200 = Chip(790, 3.0, 132), Chip(790, 4.3, 132)


@pytest.mark.parametrize(
    ("chip", "rows", "ms"),
    [(H100, 2, 2.1), (H100, 16, 8.2), (H100, 64, 27.0), (H200, 16, 7.9)],
)
def test_the_estimate_of_a_step(chip: Chip, rows: int, ms: float) -> None:
    """As a model of its own with other parts has it (docs/gpu.md)."""
    assert predictor_ms(chip, XL, rows) == pytest.approx(ms, rel=0.2)


def test_the_estimate_of_an_image() -> None:
    """0.237 TFLOP a row, 4.05 an image: 5.1 ms is the floor of a chip of 790 TFLOP/s."""
    program = compile_program(Schedule.parse("H1P5R3"))
    assert matrix_flops(XL, 1) / 1e12 == pytest.approx(0.237, rel=0.01)
    assert image_tflop(XL, program) == pytest.approx(4.05, rel=0.01)
    assert image_tflop(XL, program) / H100.peak * 1e3 == pytest.approx(5.1, rel=0.01)
    at_8, alone = request_ms(H100, XL, program, 8) / 8, request_ms(H100, XL, program, 1)
    assert 9.0 < at_8 < 10.5 and 18 < alone < 25


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
