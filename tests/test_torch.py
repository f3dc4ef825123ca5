"""The torch runtime: PyTorch within the Python backend, in this process and on a real server."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from flowturbo_client import FlowTurboClient
from google.protobuf import text_format
from support import GLYPHS_EXPORT, GOLDEN_EXPORT, ROOT, golden_cases, read_config, run_export
from tritonclient.grpc import model_config_pb2

from bench.networks import SIZES, pipeline_modules
from export.deployment import Deployment, model_config
from export.onnx_graph import Exported
from export.torch_program import export_program
from flowturbo import LocalPipeline, contract
from flowturbo.nets.torch_runtime import TorchModel
from flowturbo.serving.installation import ServerError
from flowturbo.serving.tritonserver import running_server

FORM = ("--runtime", "torch", "--precision", "fp32", "--provider", "cpu")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The glyphs model, with an ensemble."""
    folder = tmp_path_factory.mktemp("torch") / "models"
    arguments = (*GLYPHS_EXPORT, *FORM, "--ensemble", "H1P5R3", "--repository", folder)
    done = run_export(*arguments)
    assert done.returncode == 0, done.stderr
    assert "up to date" in run_export(*arguments).stdout
    return folder


def test_the_reference_in_process(tmp_path: Path) -> None:
    done = run_export(*GOLDEN_EXPORT, *FORM, "--repository", tmp_path / "models")
    assert done.returncode == 0, done.stderr
    pipeline = LocalPipeline(tmp_path / "models")
    for case in golden_cases():
        found = pipeline.generate(
            case.label,
            initial_noise=case.noise,
            schedule=case.schedule,
            guidance_scale=case.guidance_scale,
        )
        np.testing.assert_allclose(found.latent, case.latent, atol=1e-4)


def test_through_the_server(repository: Path, tmp_path: Path) -> None:
    """As ONNX Runtime in float32: gathered batches, and a lone request on the ensemble."""
    done = run_export(
        *(*GLYPHS_EXPORT, "--runtime", "onnxruntime", "--precision", "fp32"),
        *("--repository", tmp_path / "models"),
    )
    assert done.returncode == 0, done.stderr
    expected = LocalPipeline(tmp_path / "models").generate([1, 2, 30], [3, 4, 5], "H1P5R3")
    with running_server(repository) as address, FlowTurboClient(address.grpc) as client:
        for alone in (False, True):
            time.sleep(1.1 * alone)
            found = client.generate([1, 2, 30], [3, 4, 5], "H1P5R3", outputs=("image", "latent"))
            largest = np.abs(expected.latent).max()
            assert np.abs(found.latents - expected.latent).max() <= 1e-4 * largest
            assert expected.image is not None
            assert np.abs(found.images.astype(int) - expected.image).max() <= 1


def test_a_server_whose_answer_is_off_refuses_to_start(repository: Path, tmp_path: Path) -> None:
    """One weight is another: the file loads, and computes something else than was exported."""
    tampered = tmp_path / "models"
    shutil.copytree(repository, tampered)
    path = tampered / contract.REFINER / "1" / "model.pt2"
    program = torch.export.load(path)
    with torch.no_grad():
        program.state_dict["network.final_layer.linear.weight"].mul_(1.05)
    torch.export.save(program, path)
    said = r"velocity_refiner: output .* is off by .* This server must not be used"
    with pytest.raises(ServerError, match=said), running_server(tampered):
        pass
    (tampered / contract.REFINER / "figures.npz").unlink()
    with pytest.raises(ServerError, match="no figures to hold velocity_refiner to"):
        with running_server(tampered):
            pass


def test_it_needs_no_other_runtime(tmp_path: Path) -> None:
    """On a machine that has PyTorch and Triton, and nothing of ONNX or OpenVINO."""
    arguments = [*GOLDEN_EXPORT, *FORM, "--repository", tmp_path / "models"]
    code = (
        "import sys\n"
        "for name in ('onnx', 'onnxscript', 'onnxruntime', 'openvino', 'scipy', 'matplotlib'):\n"
        "    sys.modules[name] = None  # an import of it fails\n"
        "from export.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert LocalPipeline(tmp_path / "models").generate([1], [2], "H1").latent.shape[0] == 1


def test_any_number_of_rows(exported_decoder: Exported, tmp_path: Path) -> None:
    """Also where diffusers takes another way, from 64 images on."""
    export_program(exported_decoder, tmp_path / "model.pt2")
    model = TorchModel(tmp_path / "model.pt2")
    one = exported_decoder.random_inputs(1, seed=0)["latent"].numpy()
    expected = model({"latent": one})[0].astype(int)
    for rows in (2, 64, 65):
        found = model({"latent": np.repeat(one, rows, 0)})[0]
        assert found.shape[0] == rows
        assert np.abs(found - expected).max() <= 1


@pytest.fixture
def exported_decoder() -> Exported:
    return next(e for e in pipeline_modules(SIZES["small"]) if e.model == contract.DECODER)


def test_on_a_gpu_it_has_an_instance_on_each() -> None:
    form = Deployment(runtime="torch", provider="cuda", max_rows=8)
    assert form.on_gpu and not Deployment(runtime="torch", provider="cpu").on_gpu
    assert not Deployment(runtime="onnxruntime", provider="cuda").on_gpu
    sizes: dict[int | str, int] = {"C": 4, "h": 32, "w": 32}
    written = text_format.MessageToString(model_config(contract.PREDICTOR, sizes, form, {}, ""))
    config = text_format.Parse(written, model_config_pb2.ModelConfig())
    (group,) = config.instance_group
    assert group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert not config.HasField("dynamic_batching") and not config.model_warmup
    # Its process captures these graphs when it loads the model.
    assert config.parameters["graph_rows"].string_value == "1,2,4,6,8"


def test_what_the_repository_says_of_it(repository: Path) -> None:
    build = json.loads((repository / contract.PREDICTOR / "build.json").read_text())
    assert (build["runtime"], build["precision"], build["on_gpu"]) == ("torch", "fp32", False)
    assert list(build["files"]) == ["model.pt2", "model.py"]
    config = read_config(repository / contract.PREDICTOR / "config.pbtxt")
    assert config.HasField("dynamic_batching")
