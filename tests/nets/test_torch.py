"""The torch runtime: PyTorch within the Python backend, in this process and on a real server."""

import json
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flowturbo_client import FlowTurboClient
from google.protobuf import json_format, text_format
from support import GLYPHS_EXPORT, GOLDEN_EXPORT, ROOT, golden_cases, read_config, run_export
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tritonclient.grpc import model_config_pb2

from bench.networks import SIZES, pipeline_modules
from export.deployment import Deployment, model_config
from export.onnx_graph import ExportTarget
from export.torch_program import export_program
from flowturbo import LocalPipeline
from flowturbo.conditions.class_label import ClassLabel
from flowturbo.contract import LABEL_ROLES, Role, composed_tensors
from flowturbo.nets.torch_runtime import INPUTS, TorchModel
from flowturbo.parity import VerificationError
from flowturbo.pipeline import read_pipeline
from flowturbo.serving.installation import ServerError
from flowturbo.serving.tritonserver import running_server

REFINER = "glyphs_velocity_refiner"
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
    path = tampered / REFINER / "1" / "model.pt2"
    names = {INPUTS: ""}
    program = torch.export.load(path, extra_files=names)
    with torch.no_grad():
        program.state_dict["network.network.out.weight"].mul_(1.05)
    torch.export.save(program, path, extra_files=names)
    said = r"glyphs_velocity_refiner: output .* is off by .* This server must not be used"
    with pytest.raises(ServerError, match=said), running_server(tampered):
        pass
    (tampered / REFINER / "figures.npz").unlink()
    with pytest.raises(ServerError, match="no reference figures for glyphs_velocity_refiner"):
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


def test_any_number_of_rows(exported_decoder: ExportTarget, tmp_path: Path) -> None:
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
def exported_decoder() -> ExportTarget:
    return next(e for e in pipeline_modules(SIZES["small"]) if e.role is Role.DECODER)


def test_on_a_gpu_it_has_an_instance_on_each() -> None:
    form = Deployment(runtime="torch", provider="cuda", max_rows=8)
    assert form.on_gpu and not Deployment(runtime="torch", provider="cpu").on_gpu
    assert not Deployment(runtime="onnxruntime", provider="cuda").on_gpu
    sizes: dict[int | str, int] = {"C": 4, "h": 32, "w": 32}
    tensors = composed_tensors(Role.PREDICTOR, ClassLabel.block_inputs)
    written = text_format.MessageToString(model_config("predictor", tensors, sizes, form, {}, ""))
    config = text_format.Parse(written, model_config_pb2.ModelConfig())
    (group,) = config.instance_group
    assert group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert not config.HasField("dynamic_batching") and not config.model_warmup
    # Its process captures these graphs when it loads the model.
    assert config.parameters["graph_rows"].string_value == "1,2,4,6,8"


def test_what_the_repository_says_of_it(repository: Path) -> None:
    pipeline = read_pipeline(repository)
    for model in pipeline.models.values():
        assert (model.runtime, model.precision, model.on_gpu) == ("torch", "fp32", False)
        assert list(model.files) == ["model.pt2", "model.py"]
    assert not pipeline.on_gpu
    config = read_config(repository / pipeline.model(Role.PREDICTOR) / "config.pbtxt")
    assert config.HasField("dynamic_batching")


class RecordedGraph:
    """Stands for a CUDA graph: its operations, run again on the same tensors in the same order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple, dict, Any]] = []

    def replay(self) -> None:
        for operation, arguments, options, outputs in self.calls:
            again = operation(*arguments, **options)
            for held, made in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                if isinstance(held, torch.Tensor) and held.data_ptr() != made.data_ptr():
                    held.copy_(made)  # else a view of what is there already


class Recorder(TorchDispatchMode):
    """What `torch.cuda.graph` is for a CUDA graph."""

    active = False

    def __init__(self, graph: RecordedGraph, pool: object) -> None:
        super().__init__()
        self.graph = graph

    def __enter__(self) -> Any:
        Recorder.active = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Recorder.active = False
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, outputs))
        return outputs


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraph]:
    """The CUDA graphs that are captured: PyTorch here has no CUDA, and records them itself."""
    made: list[RecordedGraph] = []

    def graph() -> RecordedGraph:
        made.append(RecordedGraph())
        return made[-1]

    for name, stand_in in {
        "graph_pool_handle": lambda: None,
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": graph,
        "graph": Recorder,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return made


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows for which the network is compiled: really traced, by a backend that only counts."""
    made: list[int] = []
    torch_compile = torch.compile

    def backend(module: Any, inputs: list[Any]) -> Any:
        made.append(len(next(each for each in inputs if isinstance(each, torch.Tensor))))
        return module.forward

    def compile_network(module: Any, **options: Any) -> Any:
        fast = torch_compile(module, backend=backend, **options)
        # What is compiled cannot be recorded by a mode of PyTorch.
        return lambda *inputs: (module if Recorder.active else fast)(*inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", compile_network)
    return made


@pytest.mark.parametrize("role", LABEL_ROLES)
def test_a_graph_for_each_batch_size(
    role: Role, recorded: list[RecordedGraph], compiled: list[int], tmp_path: Path
) -> None:
    """The code of a GPU, on a CPU: which graph takes a batch, and what its padding does."""
    exported = next(e for e in pipeline_modules(SIZES["small"]) if e.role is role)
    export_program(exported, tmp_path / "model.pt2")
    plain = TorchModel(tmp_path / "model.pt2", threads=1)
    # As many rows as the latent has channels, and as it has rows of pixels: no special cases.
    graphs = TorchModel(tmp_path / "model.pt2", threads=1, graph_rows=(2, 4, 8, 10))
    assert len(compiled) == 1
    replays: list[int] = []
    for size, graph in zip((10, 8, 4, 2), recorded, strict=True):  # the largest comes first

        def counted(size: int = size, replay: Any = graph.replay) -> None:
            replays.append(size)
            replay()

        graph.replay = counted  # type: ignore[method-assign]
    taken = {10: 10, 1: 2, 2: 2, 3: 4, 4: 4, 7: 8, 8: 8, 11: None}
    for rows, size in taken.items():
        replays.clear()
        inputs = {k: v.numpy() for k, v in exported.random_inputs(rows, seed=rows).items()}
        for found, want in zip(graphs(inputs), plain(inputs), strict=True):
            largest = 1 if want.dtype == np.uint8 else 1e-4 * np.abs(want).max()
            np.testing.assert_allclose(found.astype(float), want, rtol=0, atol=largest)
        assert replays == ([size] if size else [])
    assert len(compiled) == 1


def test_a_model_on_a_gpu_is_checked_before_it_is_ready(
    recorded: list[RecordedGraph],
    compiled: list[int],
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was verified at the export was neither compiled nor captured."""
    folder = tmp_path / REFINER
    shutil.copytree(repository / REFINER, folder)
    devices: list[str] = []

    def model(path: Path, device: str, **options: Any) -> TorchModel:
        devices.append(device)
        return TorchModel(path, threads=1, **options)

    monkeypatch.setattr("flowturbo.nets.torch_runtime.TorchModel", model)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", ModuleType("pb_utils"))
    monkeypatch.delitem(sys.modules, "flowturbo.serving.block", raising=False)
    block = import_module("flowturbo.serving.block").TritonPythonModel()
    config = json_format.MessageToDict(
        read_config(folder / "config.pbtxt"), preserving_proto_field_name=True
    )
    config["parameters"]["graph_rows"] = {"string_value": "1,2,4,8,16"}
    arguments = {
        "model_config": json.dumps(config),
        "model_repository": str(folder),
        "model_version": "1",
        "model_instance_kind": "GPU",
        "model_instance_device_id": "3",
    }
    block.initialize(arguments)
    assert devices == ["cuda:3"] and len(recorded) == 5
    names = {INPUTS: ""}
    program = torch.export.load(folder / "1/model.pt2", extra_files=names)
    with torch.no_grad():
        program.state_dict["network.network.out.weight"].mul_(1.05)
    torch.export.save(program, folder / "1/model.pt2", extra_files=names)
    with pytest.raises(VerificationError, match="glyphs_velocity_refiner: output .* is off by"):
        block.initialize(arguments)
