"""Every form of a composed model has the code's own contract; engines build without a GPU."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper
from support import (
    GLYPHS,
    GLYPHS_SOURCE,
    GOLDEN,
    GOLDEN_EXPORT,
    check_tensors,
    read_config,
    run_export,
)
from tritonclient.grpc import model_config_pb2

import export.__main__
import export.engine
import export.pipeline
from export.deployment import Deployment, model_config
from export.engine import EngineError, _strong_typing, build_engine, find_builders
from flowturbo import LocalPipeline
from flowturbo.conditions.class_label import ClassLabel
from flowturbo.contract import (
    LABEL_ROLES,
    SCALAR_COLUMNS,
    Role,
    composed_tensors,
    model_name,
    run_inputs,
)
from flowturbo.gpu import Gpu, GpuError, usable_gpus
from flowturbo.pipeline import ModelRecord, Pipeline, read_pipeline
from flowturbo.rows import Tensors
from flowturbo.runtimes import open_model
from flowturbo.serving.engines import check_engines, check_gpus, check_memory
from flowturbo.serving.installation import SetupError

SIZES: dict[int | str, int] = {"C": 4, "h": 32, "w": 32, "H": 256, "W": 256}
ROLES = (*LABEL_ROLES, Role.ENCODER)
TENSORS = {role: composed_tensors(role, ClassLabel.block_inputs) for role in ROLES}
PREDICTOR, REFINER = "sit_velocity_predictor", "sit_velocity_refiner"
FORMS = [
    Deployment(engine="python"),
    Deployment(engine="onnxruntime", provider="cpu"),
    Deployment(engine="onnxruntime", provider="cuda", precision="fp16"),
    Deployment(engine="onnxruntime", provider="tensorrt", precision="bf16", max_rows=20),
    Deployment(engine="tensorrt", precision="bf16", max_rows=128),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.engine}-{form.provider}")
@pytest.mark.parametrize("role", ROLES)
def test_every_form_has_the_contract(role: Role, form: Deployment) -> None:
    model, (inputs, outputs) = model_name("glyphs", role), TENSORS[role]
    files = {"8.9": "model.plan", "9.0": "model.sm90.plan"} if form.engine == "tensorrt" else {}
    made = model_config(model, TENSORS[role], SIZES, form, files, "digest")
    written = text_format.MessageToString(made)
    config = text_format.Parse(written, model_config_pb2.ModelConfig())  # strict
    inputs = run_inputs(inputs) if form.engine == "python" else inputs
    check_tensors(config.input, inputs, SIZES)
    check_tensors(config.output, outputs, SIZES)
    assert (config.name, config.backend) == (model, form.engine)
    assert config.max_batch_size == form.max_rows == form.profile[2]
    # What the orchestrator shares out among GPUs is not to be joined again.
    assert config.HasField("dynamic_batching") != form.on_gpu
    assert not config.dynamic_batching.HasField("default_queue_policy")
    (group,) = config.instance_group
    kinds = model_config_pb2.ModelInstanceGroup
    assert group.kind == (kinds.KIND_GPU if form.on_gpu else kinds.KIND_CPU)
    assert group.count == 1
    # Kernels for a lone image, for usual and for full batches; each profile takes every batch.
    assert list(group.profile) == (["0", "1", "2"] if form.engine == "tensorrt" else [])
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
    tensors = TENSORS[Role.PREDICTOR]
    config = model_config("glyphs_velocity_predictor", tensors, SIZES, form, {}, "0123")
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    # TensorRT 11 takes the types of the file, and knows none of the options that chose others.
    assert not [name for name in accelerator.parameters if "precision" in name or "fp16" in name]
    assert accelerator.parameters["trt_engine_cache_prefix"] == "glyphs_velocity_predictor_0123"
    for end, rows in (("min", 1), ("opt", 8), ("max", 32)):
        shapes = dict(
            shape.split(":")
            for shape in accelerator.parameters[f"trt_profile_{end}_shapes"].split(",")
        )
        assert shapes["x"] == f"{rows}x4x32x32"
        assert shapes.keys() == {spec.name for spec in tensors[0]}


def test_float32_is_not_tf32() -> None:
    for precision, said in (("fp32", {"use_tf32": "0"}), ("fp16", {})):
        form = Deployment(engine="onnxruntime", provider="cuda", precision=precision)
        config = model_config(PREDICTOR, TENSORS[Role.PREDICTOR], SIZES, form, {}, "")
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
    pipeline = read_pipeline(repository)
    assert set(pipeline.models) == {*LABEL_ROLES, Role.ENCODER}
    for role, record in pipeline.models.items():
        model = pipeline.model(role)
        config = read_config(repository / model / "config.pbtxt")
        assert dict(config.cc_model_filenames) == files
        for capability, file in files.items():
            engine = record.engines[capability]
            assert engine["file"] == file
            assert engine["compute_capability"] == capability
            assert engine["tensorrt"].startswith("rtx-")
            # Triton captures CUDA graphs only where no input is a shape.
            assert engine["shape_inputs"] == []
            assert engine["bytes"] == (repository / model / "1" / file).stat().st_size > 1e5
    before = {p: p.stat().st_mtime_ns for p in repository.rglob("*.plan")}
    done = run_export(*arguments, "--compute-capability", "8.9", "--repository", repository)
    assert "up to date" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in repository.rglob("*.plan")} == before
    with pytest.raises(SetupError, match=r"TensorRT rtx-.* the server has 10.14.1") as refused:
        check_engines(pipeline, "10.14.1", [Gpu(0, "any of 8.9", "8.9")])
    assert "--engine tensorrt --precision" in str(refused.value)  # what makes it anew, for this GPU
    assert "--compute-capability" not in str(refused.value)


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_half_precision_engines(
    half_repositories: Callable[[str], Path], precision: str, tmp_path: Path
) -> None:
    """Of the very files that run elsewhere."""
    (builder,), models = find_builders("8.9"), half_repositories(precision)
    for model in map(read_pipeline(models).model, LABEL_ROLES):
        plan = tmp_path / model / "1" / "model.plan"
        plan.parent.mkdir(parents=True)
        onnx_file = models / model / "1" / "model.onnx"
        record = build_engine(builder, onnx_file, plan, Deployment().profiles, tmp_path / "cache")
        assert record["bytes"] == plan.stat().st_size > 1e5


def test_fp8_products(half_repositories: Callable[[str], Path]) -> None:
    """Those of the predictor's six blocks, four each, and not the last layer's."""
    path = half_repositories("fp8") / PREDICTOR / "1" / "model.onnx"
    fed = [set(n.input) for n in onnx.load(path).graph.node if n.op_type == "MatMul"]
    assert sum(all(name.endswith("_dequantized") for name in names) for names in fed) == 24


def test_an_engine_needs_a_gpu_or_a_named_one(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run_export(*GLYPHS_SOURCE, "--engine", "tensorrt", "--repository", tmp_path / "models")
    assert done.returncode == 2
    assert "the tensorrt package is missing here. Export in the export image" in done.stderr
    assert not (tmp_path / "models").exists()


def test_a_failed_parse_names_the_node(tmp_path: Path) -> None:
    node = helper.make_node("NoSuchOperator", ["x"], ["y"], name="the_culprit")
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 4])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 4])
    model = helper.make_model(helper.make_graph([node], "graph", [value], [result]))
    onnx.save(model, tmp_path / "model.onnx")
    (builder,), plan = find_builders("8.9"), tmp_path / "model.plan"
    with pytest.raises(EngineError, match=r"'the_culprit' \(NoSuchOperator\)"):
        build_engine(
            builder,
            tmp_path / "model.onnx",
            tmp_path / "model.plan",
            [(1, 2, 4)],
            tmp_path / "cache",
        )
    assert not plan.exists()


def with_engines(engines: dict[str, dict[str, Any]], command: str = "") -> Pipeline:
    """A pipeline `sit` whose predictor alone has `engines`."""
    record = ModelRecord(engine="tensorrt", on_gpu=True, engines=engines)
    models = {Role.PREDICTOR: record}
    return Pipeline("sit", ClassLabel(10), (4, 8, 8), models, command=command)


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
    version: str | None, capabilities: list[str], said: str | None
) -> None:
    engines = {"8.9": {"file": "model.plan", "tensorrt": "10.14.1.48", "gpu": "L4"}}
    pipeline = with_engines(engines, "python -m export --engine x")
    gpus = [Gpu(k, "L4", capability) for k, capability in enumerate(capabilities)]
    if said is None:
        assert check_engines(pipeline, version, gpus) == []
        return
    with pytest.raises(SetupError, match=said) as refused:
        check_engines(pipeline, version, gpus)
    assert "python -m export --engine x" in str(refused.value)


def test_an_engine_of_another_gpu_of_the_same_capability_is_noted() -> None:
    engines = {"9.0": {"file": "model.plan", "tensorrt": "11.1.0.106", "gpu": "H100"}}
    gpus = [Gpu(0, "H100", "9.0"), Gpu(1, "H200", "9.0")]
    (note,) = check_engines(with_engines(engines), "11.1.0", gpus)
    assert note.startswith(f"{PREDICTOR}'s engine for compute capability 9.0 was built on H100")
    assert "also runs on H200 here" in note


class Driver:
    """Stands in for NVIDIA's library: a `version` of CUDA, cuInit's result, and GPUs."""

    def __init__(self, version: int, result: int, gpus: list[tuple[str, int, int]]) -> None:
        self._version, self._result, self._gpus = version, result, gpus

    def cuInit(self, _flags: int) -> int:
        return self._result

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self._version
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self._gpus)
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = ordinal
        return 0

    def cuDeviceGetName(self, name: Any, _size: int, device: Any) -> int:
        name.value = self._gpus[device.value][0].encode()
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = self._gpus[device.value][{75: 1, 76: 2}[attribute]]
        return 0


def test_gpus_are_found() -> None:
    found = usable_gpus(Driver(13000, 0, [("H100", 9, 0), ("L4", 8, 9)]))
    assert found == [Gpu(0, "H100", "9.0"), Gpu(1, "L4", "8.9")]


def test_pipelines_must_fit_into_device_memory() -> None:
    """All of them together: each GPU has all models."""
    gib = 2**30
    made = [
        Pipeline(name, ClassLabel(3), (4, 8, 8), {Role.PREDICTOR: ModelRecord(device_bytes=size)})
        for name, size in (("one", 3 * gib), ("two", 2 * gib))
    ]
    gpus = [Gpu(0, "H100", "9.0", 80 * gib), Gpu(1, "L4", "8.9", 24 * gib)]
    (note,) = check_memory(made, gpus)
    assert note == "weights and largest batches: 5.0 GiB of device memory (one 3.0, two 2.0)"
    assert check_memory(made, [Gpu(0, "H100", "9.0")]) == []  # unknown
    with pytest.raises(SetupError, match=r"need at least 5.0 GiB .* T4 has 4.0: remove a pipeline"):
        check_memory(made, [*gpus, Gpu(2, "T4", "7.5", 4 * gib)])


@pytest.mark.parametrize(
    ("driver", "said"),
    [
        (
            Driver(12040, 0, [("H100", 9, 0)]),
            "too old: it supports CUDA 12.4, but CUDA 13 is needed",
        ),
        (Driver(13000, 100, []), "no GPU is visible"),
        (Driver(13000, 0, []), "no GPU is visible"),
        (Driver(13000, 804, []), "its driver is too old"),
        (Driver(13000, 803, []), "restart the host"),
        (Driver(13000, 999, []), r"an error of the driver \(cuInit: 999\)"),
    ],
)
def test_why_no_gpu_can_be_used(driver: Driver, said: str) -> None:
    with pytest.raises(GpuError, match=said):
        usable_gpus(driver)


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
def test_what_was_exported_for_a_gpu_needs_one() -> None:
    on_gpu = with_engines({})
    on_cpu = replace(on_gpu, name="other", models={Role.PREDICTOR: ModelRecord()})
    said = "pipeline sit was exported for a GPU, but no NVIDIA driver was found"
    with pytest.raises(SetupError, match=said):
        check_gpus([on_cpu, on_gpu], None)
    assert check_gpus([on_cpu], None) == []


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
    assert read_pipeline(repository).predictor.parity
    latents = [
        LocalPipeline(where).generate([1, 2], [3, 4], "H1P5R3", 1.5).latent
        for where in (glyphs_repository, repository)
    ]
    error = np.abs(latents[0] - latents[1]).max() / np.abs(latents[0]).max()
    assert 1e-6 < error < tolerance


def test_verify_prints_a_table(half_repositories: Callable[[str], Path]) -> None:
    done = run_export("verify", *GLYPHS_SOURCE, "--repository", half_repositories("bf16"))
    assert done.returncode == 0, done.stderr
    for row in (r"PyTorch bf16 +predictor x_next .* ok", r"OpenVino bf16 +trajectory H1P5R3 .* ok"):
        assert re.search(row, done.stdout)


def test_verify_fails_loudly(golden_repository: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    shutil.copytree(golden_repository, repository)
    networks = ("--predictor", GOLDEN / "predictor.pt", "--refiner", GOLDEN / "refiner.pt")
    common = ("verify", *networks, "--num-heads", "2", "--repository", repository)
    done = run_export(*common, "--schedule", "fast")
    assert done.returncode == 0, done.stderr
    assert "trajectory fast" in done.stdout
    path = repository / REFINER / "1" / "model.onnx"
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight.raw_data = (np.frombuffer(weight.raw_data, np.float32) * 1.01).tobytes()
    onnx.save(model, path)
    done = run_export(*common)
    assert done.returncode == 2
    assert "OnnxRuntime fp32: refiner x_next" in done.stderr
    assert "FAILED" in done.stdout
    swapped = [GOLDEN / "predictor.pt" if a == GOLDEN / "refiner.pt" else a for a in common]
    done = run_export(*swapped)
    assert done.returncode == 2
    assert f"{REFINER} was made from another checkpoint" in done.stderr
    for change, said in [
        (("--guidance-channels", "4"), "exported with --guidance-channels 3, here it is 4"),
        (("--reverse-time",), "exported with --reverse-time not given, here it is given"),
        (("--vae", GLYPHS / "vae"), "pipeline sit has no decoder: omit --vae"),
        (("--schedule", "X1"), "unknown step 'X'"),
    ]:
        done = run_export(*common, *change)
        assert done.returncode == 2
        assert said in done.stderr
    alone = [word for word in common if word not in ("--refiner", GOLDEN / "refiner.pt")]
    done = run_export(*alone)
    assert done.returncode == 2
    assert "pipeline sit has a refiner: give --refiner" in done.stderr


def test_a_bad_label_is_its_own_rows_affair(glyphs_repository: Path) -> None:
    """Rows of other callers share the batch: theirs must come out as ever."""
    pipeline = LocalPipeline(glyphs_repository)
    rng = np.random.default_rng(0)
    shape = (2, *pipeline.pipeline.latent_shape)
    inputs = {
        "x": rng.standard_normal(shape, dtype=np.float32),
        "velocity": np.zeros(shape, dtype=np.float32),
        "label": np.array([[3], [4]]),
        "scalars": rng.random((2, SCALAR_COLUMNS), dtype=np.float32),
        "pair": np.zeros((2, 1), dtype=np.int32),
    }
    good, _ = pipeline._infer(Role.PREDICTOR, inputs)
    mixed, _ = pipeline._infer(Role.PREDICTOR, inputs | {"label": np.array([[3], [10**9]])})
    assert np.allclose(good[0], mixed[0], atol=1e-5)
    assert np.isfinite(mixed).all()


def test_profile_never_exceeds_the_largest_batch() -> None:
    assert replace(Deployment(), max_rows=8).profile == (1, 8, 8)


def test_what_tensorrt_drops_is_not_asked_for() -> None:
    """TensorRT 11 has the flag of strong typing still, a later one need not."""
    today = SimpleNamespace(NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1))
    later = SimpleNamespace(NetworkDefinitionCreationFlag=SimpleNamespace())
    assert (_strong_typing(today), _strong_typing(later)) == (2, 0)
    rtx = find_builders("8.9")[0].trt
    assert _strong_typing(rtx) == 1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


class FakeEngine:
    """Of the interface of `TensorRtModel`: ONNX Runtime, with an error in large batches."""

    def __init__(self, path: Path, error: float) -> None:
        self._model, self._error = open_model(path), error
        self.rows: list[int] = []

    def __call__(self, inputs: Tensors) -> tuple[np.ndarray, ...]:
        self.rows.append(len(inputs["x"]))
        outputs = self._model(inputs)
        wrong = self._error if self.rows[-1] == 16 else 0.0
        return tuple(output * (1 + wrong) for output in outputs)

    def fused_attentions(self) -> int:
        return 2


@pytest.mark.parametrize("error", [0.0, 0.3])
def test_a_wrong_engine_is_not_installed(
    error: float, golden_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is held to PyTorch's figures at every number of rows, also when added to another GPU's."""
    repository, engines = tmp_path / "models", []

    class Builder(export.engine.Builder):
        def load(self, plan: Path) -> Any:
            engines.append(FakeEngine(plan.with_name("model.onnx"), error * (self.gpu == "wrong")))
            return engines[-1]

    def build(
        _builder: Any, _onnx: Path, plan: Path, profiles: Any, _cache: Path, _sides: Any
    ) -> Any:
        plan.write_bytes(b"plan")
        return {
            "file": plan.name,
            "tensorrt": "11.1.0",
            "gpu": _builder.gpu,
            "bytes": 4,
            "seconds": 0,
        }

    found = [Builder(SimpleNamespace(), "11.1.0", "9.0", "right", 0)]
    monkeypatch.setattr(export.pipeline, "build_engine", build)
    monkeypatch.setattr(export.pipeline, "find_builders", lambda _capability: found)
    arguments = [*map(str, GOLDEN_EXPORT), "--engine", "tensorrt", "--repository", str(repository)]
    assert export.__main__.main(arguments) == 0
    assert [engine.rows for engine in engines] == [[1, 2, 7, 16, 64]] * 2
    engine = read_pipeline(repository).predictor.engines["9.0"]
    assert engine["fused_attentions"] == 2
    assert 0 < engine["parity"]["x_next"] < 1e-4

    # A second GPU on the same machine, of another capability: its engine is checked too.
    found.append(Builder(SimpleNamespace(), "11.1.0", "8.9", "wrong", 1))
    status = export.__main__.main(arguments)
    config = read_config(repository / PREDICTOR / "config.pbtxt")
    recorded = read_pipeline(repository).predictor.engines
    assert dict(config.cc_model_filenames) == {key: of["file"] for key, of in recorded.items()}
    if error:
        assert status == 2
        assert dict(config.cc_model_filenames) == {"9.0": "model.plan"}
    else:
        assert status == 0
        expected = {"9.0": "model.plan", "8.9": "model.sm89.plan"}
        assert dict(config.cc_model_filenames) == expected


def test_fused_attentions_are_counted_by_their_kernels() -> None:
    layers = [
        {"Name": "_gemm_mha_v2_myl0_17", "TacticName": "_gemm_mha_v2_0x957a2fe2"},
        {"Name": "/mha/attn/MatMul_myl0_16", "TacticName": "sm80_xmma_gemm_f16f16_f16f16"},
        {"Name": "wait"},
    ]
    assert export.engine.count_fused(json.dumps({"Layers": layers})) == 1


def test_profiles_as_triton_chooses_them() -> None:
    profiles = Deployment(engine="tensorrt").profiles
    assert profiles == [(1, 2, 64), (1, 16, 64), (1, 64, 64)]
    chosen = {rows: export.engine.nearest_profile(profiles, rows) for rows in (1, 8, 16, 33, 64)}
    assert chosen == {1: 0, 8: 0, 16: 1, 33: 1, 64: 2}
    with pytest.raises(EngineError, match="no profile of the engine takes 65 rows"):
        export.engine.nearest_profile(profiles, 65)


def test_the_decoder_of_an_engine_computes_in_fp16_where_it_verifies() -> None:
    tensorrt = Deployment(engine="tensorrt", precision="bf16")
    precisions = export.pipeline._precisions
    assert precisions(Role.DECODER, tensorrt) == ["fp16", "bf16"]
    assert precisions(Role.PREDICTOR, tensorrt) == ["bf16"]
    assert precisions(Role.DECODER, replace(tensorrt, precision="fp32")) == ["fp32"]
    assert precisions(Role.DECODER, Deployment(precision="bf16")) == ["bf16"]
