"""A result that is not finite is an error to its caller; float16 is not used beyond its range."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from safetensors.torch import load_file, save_file
from support import GLYPHS, Caller, run_export
from torch import nn
from torch.nn import functional as F
from tritonclient.utils import InferenceServerException

from bench.networks import SMALL
from export import ensemble
from export.install import write_record
from export.onnx_graph import ExportTarget
from export.parity import torch_figures
from export.peaks import LARGEST, PeakOf, watched_figures
from flowturbo import LocalPipeline
from flowturbo.conditions.class_label import ClassLabel
from flowturbo.contract import LABEL_ROLES, ORCHESTRATOR, Role
from flowturbo.errors import NotFiniteError, RequestError
from flowturbo.generate import check_finite
from flowturbo.nets.blocks import PredictorBlock
from flowturbo.nets.sit import ByLabel, SiT
from flowturbo.pipeline import read_pipeline
from flowturbo.serving.tritonserver import running_server
from flowturbo.settings import Settings
from flowturbo.solver.schedule import Schedule

BAD_LABEL = 5
# What a server checks before its first request is right, and then no longer.
TURNING = """from pathlib import Path

from flowturbo.parity import Figures
from flowturbo.serving.block import TritonPythonModel as Model

class TritonPythonModel(Model):
    def initialize(self, args):
        super().initialize(args)
        right = Figures.load(Path(args["model_repository"])).batch(3)[1]
        first, then = [tuple(right.values())], {then}
        self._model = lambda tensors: first.pop() if first else then(tensors)
"""


def test_the_first_that_is_not_finite_is_named() -> None:
    values = np.zeros((3, 2, 2), np.float32)
    check_finite(values, "latent")
    for bad in (np.nan, np.inf, -np.inf):
        values[1, 0, 1] = bad
        with pytest.raises(NotFiniteError, match="the latent of image 2 of 3 is not finite"):
            check_finite(values, "latent")


def poison(model: Path, name: str, rows: slice | int) -> None:
    """Writes NaN into `rows` of a weight of an exported model."""
    graph = onnx.load(model)
    (weight,) = [w for w in graph.graph.initializer if w.name.endswith(name)]
    values = numpy_helper.to_array(weight).copy()
    values[rows] = np.nan
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(graph, model)


@pytest.fixture(scope="module")
def poisoned(glyphs_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The glyphs model with one class of NaN, and a decoder of NaN alone."""
    repository = tmp_path_factory.mktemp("poisoned") / "models"
    shutil.copytree(glyphs_repository, repository)
    pipeline = read_pipeline(repository)
    version = {role: repository / pipeline.model(role) / "1" for role in LABEL_ROLES}
    poison(version[Role.PREDICTOR] / "model.onnx", "embedding_table.weight", BAD_LABEL)
    poison(version[Role.DECODER] / "model.onnx", "decoder.conv_out.bias", slice(None))
    add_checked_ensemble(repository)
    for role, then in (
        (Role.PREDICTOR, "self._model"),
        (Role.REFINER, "lambda tensors: {}['velocity_next']"),
        (Role.DECODER, "self._model"),
    ):
        (version[role] / "model.py").write_text(TURNING.replace("{then}", then))
    return repository


def add_checked_ensemble(repository: Path) -> None:
    """E1, and no other, as for a decoder that cannot check its images itself: those on a GPU."""
    pipeline, settings = read_pipeline(repository), Settings.load(repository)
    for name in (*pipeline.ensembles.values(), *pipeline.parts):
        shutil.rmtree(repository / name)
    schedules = [Schedule.parse("E1")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ensemble, "_checks_itself", lambda _pipeline: False)
        ensemble.write_ensembles(repository, pipeline, settings, schedules)
        write_record(repository, ensemble.with_ensembles(pipeline, settings, schedules))


def test_in_process(poisoned: Path) -> None:
    pipeline = LocalPipeline(poisoned)
    networks = {role: pipeline.pipeline.models[role] for role in (Role.PREDICTOR, Role.REFINER)}
    pipeline.pipeline = replace(pipeline.pipeline, models=networks)
    assert np.isfinite(pipeline.generate([4], [1], "H1").latent).all()
    with pytest.raises(NotFiniteError, match="the latent of image 2 of 3 is not finite.*bf16"):
        pipeline.generate([4, BAD_LABEL, 6], [1, 2, 3], "H1")
    noise = np.full((1, *pipeline.pipeline.latent_shape), 3e38, np.float32)
    with pytest.raises(RequestError, match="initial_noise must be standard normal, .* 3e\\+38"):
        pipeline.generate([4], schedule="H1", initial_noise=noise)
    # Noise as it should be is not what is wrong.
    with pytest.raises(NotFiniteError, match="the latent of image 1 of 1 is not finite"):
        pipeline.generate([BAD_LABEL], schedule="H1", initial_noise=noise / 1e38)
    with pytest.raises(NotFiniteError, match="the image of image 1 of 1 is not finite"):
        LocalPipeline(poisoned).generate([4], [1], "H1")


@pytest.fixture(scope="module")
def caller(poisoned: Path) -> Iterator[Caller]:
    with running_server(poisoned) as address, Caller(address.grpc) as opened:
        yield opened


def test_through_the_server(caller: Caller) -> None:
    """Alone on an ensemble, in company on gathered batches, and on an ensemble by its own name."""
    good = {"label": np.array([4]), "seed": np.array([1])}
    bad = {"label": np.array([4, BAD_LABEL]), "seed": np.array([1, 2])}
    for model, text in ((ORCHESTRATOR, "E1"), (ORCHESTRATOR, "H1P5"), ("glyphs_e1", None)):
        schedule = {"schedule": text} if text else {}
        (latent,) = caller.infer(model, ["latent"], **good, **schedule)
        assert np.isfinite(latent).all()
        for outputs, tensors, said in (
            (["latent"], bad, "the latent of image 2 of 2 is not finite"),
            (["image"], good, "the image of image 1 of 1 is not finite"),
        ):
            with pytest.raises(InferenceServerException, match=said) as caught:
                caller.infer(model, outputs, **tensors, **schedule)
            assert caught.value.status() == "StatusCode.INTERNAL"
    together = [
        caller.begin(ORCHESTRATOR, ["latent"], schedule="A4", **tensors)
        for tensors in (good, bad) * 4
    ]
    for k, begun in enumerate(together):
        if k % 2:
            with pytest.raises(InferenceServerException, match="image 2 of 2 is not finite"):
                begun.result()
        else:
            assert np.isfinite(begun.result()[0]).all()


def test_a_model_that_fails_is_told_in_a_sentence(caller: Caller) -> None:
    """Without the place in the code, and for each of the requests that shared the batch."""
    begun = [
        caller.begin(ORCHESTRATOR, ["latent"], label=np.array([k]), schedule="H1P1R1")
        for k in range(4)
    ]
    for each in begun:
        with pytest.raises(InferenceServerException) as caught:
            each.result()
        assert caught.value.message() == (
            "glyphs_velocity_refiner: the server failed on this request (KeyError: "
            "'velocity_next'); its log has the details"
        )


def test_finite_images_pass_the_checker(glyphs_repository: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    shutil.copytree(glyphs_repository, repository)
    add_checked_ensemble(repository)
    label, seed = np.array([3, 4]), np.array([1, 2])
    with running_server(repository) as address, Caller(address.grpc) as caller:
        (image,) = caller.infer("glyphs_e1", ["image"], label=label, seed=seed)
    expected = LocalPipeline(repository).generate(label, seed, "E1").image
    assert np.abs(image.astype(int) - expected).max() <= 1


class Attention(nn.Module):
    """Scores are large; what comes in and goes out is not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x * 300, x * 300, x)


def test_peaks_within_attention_are_seen() -> None:
    x = torch.ones(1, 1, 4, 16)
    with PeakOf() as watch:
        Attention()(x)
    # q k = 300 * 300 * 16, of which each factor takes the fourth root of 1/16.
    assert watch.peak.magnitude == pytest.approx(300 * 300 * 16 / 4)
    assert not watch.peak.fits_half
    with PeakOf() as watch:
        Attention()(x / 100)
    assert watch.peak.fits_half
    with PeakOf() as watch:
        torch.ones(2).log().sub(torch.inf).mul(0)
    assert not watch.peak.fits_half  # neither infinity nor NaN fits


@pytest.mark.parametrize("large", ["a label", "the null class", "a weight"])
def test_peaks_of_rare_inputs_are_seen(large: str) -> None:
    """Each is beyond float16, and none comes up in the outputs that forms are compared by."""
    torch.manual_seed(0)
    block, shape = PredictorBlock(ByLabel(SiT(replace(SMALL, num_classes=100))), 4), (4, 8, 8)
    network = block.network.network
    with torch.no_grad():
        if large == "a weight":
            final = network.final_layer  # reads ones, of which the bias takes the sum away again
            final.adaLN_modulation[1].weight[:] = 0
            final.adaLN_modulation[1].bias[:] = torch.tensor([1.0, -1.0]).repeat_interleave(64)
            final.linear.weight[:], final.linear.bias[:] = -1e5 / 64, 1e5
        else:
            row = -1 if large == "the null class" else 50
            network.y_embedder.embedding_table.weight[row] *= 1e3
    exported = ExportTarget(Role.PREDICTOR, block, shape, ClassLabel(100))
    assert not watched_figures(exported)[1].fits_half
    with PeakOf() as watch:
        torch_figures(exported)
    assert watch.peak.fits_half


@pytest.fixture
def large_vae(tmp_path: Path) -> Path:
    """The glyphs VAE, its last stage scaled beyond float16; the norm behind it takes that out."""
    folder = tmp_path / "vae"
    shutil.copytree(GLYPHS / "vae", folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    for name in tensors:
        residual = "conv2" in name or "conv_shortcut" in name
        if name.startswith("decoder.up_blocks.2.resnets") and residual:
            tensors[name] *= 2e5
    save_file(tensors, weights)
    return folder


def test_a_network_beyond_float16_stays_in_float32(large_vae: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    done = run_export(
        *("--predictor", GLYPHS / "predictor.safetensors", "--vae", large_vae),
        *("--precision", "fp16", "--runtime", "onnxruntime", "--repository", repository),
    )
    assert done.returncode == 0, done.stderr
    assert "float16 ends at 65504: stays in float32" in done.stdout
    pipeline = read_pipeline(repository)
    predictor, decoder = (pipeline.models[role] for role in (Role.PREDICTOR, Role.DECODER))
    assert (predictor.precision, decoder.precision) == ("fp16", "fp32")
    assert (predictor.kept_in_float32, decoder.kept_in_float32) == (False, True)
    assert predictor.peak and decoder.peak
    assert predictor.peak < LARGEST / 2 < decoder.peak
    halves = {
        role: sum(
            weight.data_type == TensorProto.FLOAT16
            for weight in onnx.load(
                repository / pipeline.model(role) / "1" / "model.onnx"
            ).graph.initializer
        )
        for role in pipeline.models
    }
    assert halves[Role.DECODER] == 0 < halves[Role.PREDICTOR]
    assert LocalPipeline(repository).generate([1], [1], "H1").image is not None
