"""Every form of a composed model has the code's own contract; engines build without a GPU."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper
from support import GLYPHS, GLYPHS_SOURCE, GOLDEN, check_tensors, read_config, run_export
from tritonclient.grpc import model_config_pb2

from export.deployment import Deployment, model_config
from export.engine import EngineError, _strong_typing, build_engine, find_builder
from flowturbo import LocalPipeline, contract
from flowturbo.serving.engines import check_engines
from flowturbo.serving.installation import SetupError

SIZES: dict[int | str, int] = {"C": 4, "h": 32, "w": 32, "H": 256, "W": 256}
FORMS = [
    Deployment(engine="python"),
    Deployment(engine="onnxruntime", provider="cpu"),
    Deployment(engine="onnxruntime", provider="cuda", precision="fp16"),
    Deployment(engine="onnxruntime", provider="tensorrt", precision="bf16", max_rows=20),
    Deployment(engine="tensorrt", precision="bf16", max_rows=128),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.engine}-{form.provider}")
@pytest.mark.parametrize("model", list(contract.COMPOSED))
def test_every_form_has_the_contract(model: str, form: Deployment) -> None:
    files = {"8.9": "model.plan", "9.0": "model.sm90.plan"} if form.engine == "tensorrt" else {}
    written = text_format.MessageToString(model_config(model, SIZES, form, files, "digest"))
    config = text_format.Parse(written, model_config_pb2.ModelConfig())  # strict
    check_tensors(config.input, contract.COMPOSED[model][0], SIZES)
    check_tensors(config.output, contract.COMPOSED[model][1], SIZES)
    assert (config.name, config.backend) == (model, form.engine)
    assert config.max_batch_size == form.max_rows == form.profile[2]
    assert config.HasField("dynamic_batching")
    assert not config.dynamic_batching.HasField("default_queue_policy")
    (group,) = config.instance_group
    kinds = model_config_pb2.ModelInstanceGroup
    assert group.kind == (kinds.KIND_GPU if form.on_gpu else kinds.KIND_CPU)
    assert group.count == 1
    warmed = [sample.batch_size for sample in config.model_warmup]
    assert warmed == (list(form.graph_rows) if form.on_gpu else [])
    for sample in config.model_warmup:
        assert {n: list(i.dims) for n, i in sample.inputs.items()} == {
            i.name: list(i.dims) for i in config.input
        }
    assert dict(config.cc_model_filenames) == files
    graphs = [spec.batch_size for spec in config.optimization.cuda.graph_spec]
    assert graphs == (warmed if form.engine == "tensorrt" else [])


def test_graph_sizes_end_at_the_largest_batch() -> None:
    for most in (2, 20, 64, 128):
        rows = Deployment(max_rows=most).graph_rows
        assert rows == tuple(sorted(set(rows)))
        assert (rows[0], rows[-1]) == (1, most)


def test_onnxruntime_tensorrt_has_the_profile() -> None:
    form = Deployment(engine="onnxruntime", provider="tensorrt", max_rows=32, opt_rows=8)
    config = model_config(contract.PREDICTOR, SIZES, form, {}, "0123")
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    # TensorRT 11 takes the types of the file, and knows none of the options that chose others.
    assert not [name for name in accelerator.parameters if "precision" in name or "fp16" in name]
    assert accelerator.parameters["trt_engine_cache_prefix"] == "velocity_predictor_0123"
    for end, rows in (("min", 1), ("opt", 8), ("max", 32)):
        shapes = dict(
            shape.split(":")
            for shape in accelerator.parameters[f"trt_profile_{end}_shapes"].split(",")
        )
        assert shapes["x"] == f"{rows}x4x32x32"
        assert shapes.keys() == {spec.name for spec in contract.BLOCK_INPUTS}


def test_float32_is_not_tf32() -> None:
    for precision, said in (("fp32", {"use_tf32": "0"}), ("fp16", {})):
        form = Deployment(engine="onnxruntime", provider="cuda", precision=precision)
        config = model_config(contract.PREDICTOR, SIZES, form, {}, "")
        (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
        assert (accelerator.name, dict(accelerator.parameters)) == ("cuda", said)


def test_engines_of_several_gpus_in_one_repository(tmp_path: Path) -> None:
    """The glyphs model for three GPUs that are not here, through the code that makes a plan."""
    repository = tmp_path / "models"
    arguments = (*GLYPHS_SOURCE, "--engine", "tensorrt", "--precision", "bf16")
    for capability in ("8.0", "8.9", "12.0"):
        done = run_export(
            *arguments, "--compute-capability", capability, "--repository", repository
        )
        assert done.returncode == 0, done.stderr
    files = {"8.0": "model.plan", "8.9": "model.sm89.plan", "12.0": "model.sm120.plan"}
    for model in contract.COMPOSED:
        config = read_config(repository / model / "config.pbtxt")
        assert dict(config.cc_model_filenames) == files
        build = json.loads((repository / model / "build.json").read_text())
        for capability, file in files.items():
            engine = build["engines"][capability]
            assert engine["file"] == file
            assert engine["compute_capability"] == capability
            assert engine["tensorrt"].startswith("rtx-")
            assert engine["bytes"] == (repository / model / "1" / file).stat().st_size > 1e5
    before = {p: p.stat().st_mtime_ns for p in repository.rglob("*.plan")}
    done = run_export(*arguments, "--compute-capability", "8.9", "--repository", repository)
    assert "up to date" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in repository.rglob("*.plan")} == before
    with pytest.raises(SetupError, match=r"TensorRT rtx-.* the server has 10.14.1") as refused:
        check_engines(repository, contract.COMPOSED, "10.14.1", ["8.9"])
    assert "--engine tensorrt --precision" in str(refused.value)  # what makes it anew, for this GPU
    assert "--compute-capability" not in str(refused.value)


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_half_precision_engines(
    half_repositories: Callable[[str], Path], precision: str, tmp_path: Path
) -> None:
    """Of the very files that run elsewhere."""
    builder, models = find_builder("8.9"), half_repositories(precision)
    for model in contract.COMPOSED:
        plan = tmp_path / model / "1" / "model.plan"
        plan.parent.mkdir(parents=True)
        onnx_file = models / model / "1" / "model.onnx"
        record = build_engine(builder, onnx_file, plan, Deployment().profile, tmp_path / "cache")
        assert record["bytes"] == plan.stat().st_size > 1e5


def test_fp8_products(half_repositories: Callable[[str], Path]) -> None:
    """Those of the predictor's six blocks, four each, and not the last layer's."""
    path = half_repositories("fp8") / contract.PREDICTOR / "1" / "model.onnx"
    fed = [set(n.input) for n in onnx.load(path).graph.node if n.op_type == "MatMul"]
    assert sum(all(name.endswith("_dequantized") for name in names) for names in fed) == 24


def test_an_engine_needs_a_gpu_or_a_named_one(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run_export(*GLYPHS_SOURCE, "--engine", "tensorrt", "--repository", tmp_path / "models")
    assert done.returncode == 2
    assert "is missing here: export in the export image" in done.stderr
    assert not (tmp_path / "models").exists()


def test_a_failed_parse_names_the_node(tmp_path: Path) -> None:
    node = helper.make_node("NoSuchOperator", ["x"], ["y"], name="the_culprit")
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 4])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 4])
    model = helper.make_model(helper.make_graph([node], "graph", [value], [result]))
    onnx.save(model, tmp_path / "model.onnx")
    builder = find_builder("8.9")
    with pytest.raises(EngineError, match=r"'the_culprit' \(NoSuchOperator\)"):
        build_engine(
            builder, tmp_path / "model.onnx", tmp_path / "model.plan", (1, 2, 4), tmp_path / "cache"
        )
    assert not (tmp_path / "model.plan").exists()


@pytest.mark.parametrize(
    ("version", "capabilities", "said"),
    [
        ("10.14.1", ["8.9"], None),
        (None, ["8.9", "8.9"], None),
        ("10.15.0", ["8.9"], "was built with TensorRT 10.14.1.48, the server has 10.15.0"),
        ("10.14.1", ["8.9", "9.0"], "no engine for compute capability 9.0, only for 8.9"),
    ],
)
def test_engines_that_do_not_fit_are_refused(
    tmp_path: Path, version: str | None, capabilities: list[str], said: str | None
) -> None:
    folder = tmp_path / contract.PREDICTOR
    folder.mkdir()
    engines = {"8.9": {"file": "model.plan", "tensorrt": "10.14.1.48"}}
    build = {"engine": "tensorrt", "engines": engines, "command": "python -m export --engine x"}
    (folder / "build.json").write_text(json.dumps(build))
    models = (contract.PREDICTOR, contract.REFINER)
    if said is None:
        check_engines(tmp_path, models, version, capabilities)
        return
    with pytest.raises(SetupError, match=said) as refused:
        check_engines(tmp_path, models, version, capabilities)
    assert "python -m export --engine x" in str(refused.value)
    with pytest.raises(SetupError, match="no GPU is here"):
        check_engines(tmp_path, models, version, [])


@pytest.fixture(scope="module")
def half_repositories(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(precision: str) -> Path:
        if precision not in made:
            made[precision] = tmp_path_factory.mktemp(precision) / "models"
            done = run_export(
                *GLYPHS_SOURCE, "--precision", precision, "--repository", made[precision]
            )
            assert done.returncode == 0, done.stderr
        return made[precision]

    return make


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 1e-2), ("bf16", 5e-2), ("fp8", 0.2)])
def test_half_precision_parity(
    precision: str,
    tolerance: float,
    half_repositories: Callable[[str], Path],
    glyphs_repository: Path,
) -> None:
    """A whole trajectory in half precision lands near float32's, as does its image."""
    repository = half_repositories(precision)
    assert json.loads((repository / contract.PREDICTOR / "build.json").read_text())["parity"]
    latents = [
        LocalPipeline(where).generate([1, 2], [3, 4], "H1P5R3", 1.5).latent
        for where in (glyphs_repository, repository)
    ]
    error = np.abs(latents[0] - latents[1]).max() / np.abs(latents[0]).max()
    assert 1e-6 < error < tolerance


def test_verify_prints_a_table(half_repositories: Callable[[str], Path]) -> None:
    done = run_export("verify", *GLYPHS_SOURCE, "--repository", half_repositories("bf16"))
    assert done.returncode == 0, done.stderr
    for row in (r"PyTorch bf16 +velocity_predictor", r"OpenVino bf16 +trajectory H1P5R3 .* ok"):
        assert re.search(row, done.stdout)


def test_verify_fails_loudly(golden_repository: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    shutil.copytree(golden_repository, repository)
    networks = ("--predictor", GOLDEN / "predictor.pt", "--refiner", GOLDEN / "refiner.pt")
    common = ("verify", *networks, "--num-heads", "2", "--repository", repository)
    done = run_export(*common, "--schedule", "fast")
    assert done.returncode == 0, done.stderr
    assert "trajectory fast" in done.stdout
    path = repository / contract.REFINER / "1" / "model.onnx"
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight.raw_data = (np.frombuffer(weight.raw_data, np.float32) * 1.01).tobytes()
    onnx.save(model, path)
    done = run_export(*common)
    assert done.returncode == 2
    assert "OnnxRuntime fp32: velocity_refiner x_next" in done.stderr
    assert "FAILED" in done.stdout
    swapped = [GOLDEN / "predictor.pt" if a == GOLDEN / "refiner.pt" else a for a in common]
    done = run_export(*swapped)
    assert done.returncode == 2
    assert "was made from another checkpoint" in done.stderr
    for change, said in [
        (("--guidance-channels", "4"), "exported with --guidance-channels 3, here it is 4"),
        (("--reverse-time",), "exported with --reverse-time not given, here it is given"),
        (("--vae", GLYPHS / "vae"), "has no vae_decoder: leave --vae out"),
        (("--schedule", "X1"), "unknown step 'X'"),
    ]:
        done = run_export(*common, *change)
        assert done.returncode == 2
        assert said in done.stderr
    alone = [word for word in common if word not in ("--refiner", GOLDEN / "refiner.pt")]
    done = run_export(*alone)
    assert done.returncode == 2
    assert "has a velocity_refiner: give --refiner" in done.stderr


def test_a_bad_label_is_its_own_rows_affair(glyphs_repository: Path) -> None:
    """Rows of other callers share the batch: theirs must come out as ever."""
    pipeline = LocalPipeline(glyphs_repository)
    rng = np.random.default_rng(0)
    shape = (2, *pipeline.pipeline.latent_shape)
    inputs = {
        "x": rng.standard_normal(shape, dtype=np.float32),
        "velocity": np.zeros(shape, dtype=np.float32),
        "label": np.array([[3], [4]]),
        "scalars": rng.random((2, contract.SCALARS), dtype=np.float32),
        "pair": np.zeros((2, 1), dtype=np.int32),
    }
    good, _ = pipeline._infer(contract.PREDICTOR, inputs)
    mixed, _ = pipeline._infer(contract.PREDICTOR, inputs | {"label": np.array([[3], [10**9]])})
    assert np.allclose(good[0], mixed[0], atol=1e-5)
    assert np.isfinite(mixed).all()


def test_profile_never_exceeds_the_largest_batch() -> None:
    assert replace(Deployment(), max_rows=8).profile == (1, 8, 8)


def test_what_tensorrt_drops_is_not_asked_for() -> None:
    """TensorRT 11 has the flag of strong typing still, a later one need not."""
    today = SimpleNamespace(NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1))
    later = SimpleNamespace(NetworkDefinitionCreationFlag=SimpleNamespace())
    assert (_strong_typing(today), _strong_typing(later)) == (2, 0)
    rtx = find_builder("8.9").trt
    assert _strong_typing(rtx) == 1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
