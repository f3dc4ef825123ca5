"""What the models run in is chosen by measurement, among what computes the same."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import GOLDEN_EXPORT, run_export

from export.deployment import AUTO, Deployment
from export.onnx_graph import ExportTarget
from export.runtime import (
    Runtime,
    TrialResult,
    candidates,
    choose,
    fixed_rows,
    independent,
    is_faster,
)
from flowturbo import LocalPipeline
from flowturbo.conditions.class_label import ClassLabel
from flowturbo.contract import LABEL_ROLES, Role
from flowturbo.parity import Figures, VerificationError
from flowturbo.pipeline import read_pipeline
from flowturbo.rows import Tensors
from flowturbo.runtimes import OpenVinoModel

ORT, OPENVINO, BF16 = (
    Runtime("onnxruntime", "fp32"),
    Runtime("openvino", "fp32"),
    Runtime("openvino", "bf16"),
)


@pytest.mark.parametrize(
    ("deployment", "expected"),
    [
        (Deployment(precision=AUTO), [ORT, OPENVINO, BF16]),
        (Deployment(precision="fp32"), [ORT, OPENVINO]),
        (Deployment(precision=AUTO, runtime="openvino"), [OPENVINO, BF16]),
        (Deployment(precision="bf16"), [BF16]),
        (Deployment(precision="fp16"), [Runtime("onnxruntime", "fp16")]),
        (Deployment(precision="bf16", runtime="onnxruntime"), []),
        (Deployment(precision="fp8", runtime="openvino"), []),
        (Deployment(engine="tensorrt", precision=AUTO), []),
        (Deployment(engine="tensorrt", precision="bf16"), [BF16]),
        (Deployment(engine="onnxruntime", provider="cpu"), [ORT]),
    ],
)
def test_candidates(deployment: Deployment, expected: list[Runtime]) -> None:
    assert candidates(deployment) == expected


def test_the_fastest_that_every_model_has() -> None:
    def trial(*times: float) -> TrialResult:
        return TrialResult({}, dict(zip((2, 16), times, strict=True)))

    predictor = {ORT: trial(10, 60), OPENVINO: trial(9, 70), BF16: trial(5, 30)}
    refiner = {ORT: trial(2, 9), OPENVINO: trial(1, 8)}
    assert choose({Role.PREDICTOR: predictor}) == BF16
    # The refiner in bf16 was too far off: 76 x 447 ms against 66 x 514 ms for a request's calls.
    assert choose({Role.PREDICTOR: predictor, Role.REFINER: refiner}) == OPENVINO
    with pytest.raises(VerificationError, match="every model"):
        choose({Role.PREDICTOR: {BF16: trial(1, 1)}, Role.REFINER: {ORT: trial(1, 1)}})


def test_the_record_has_the_times_that_were_chosen_by(glyphs_repository: Path) -> None:
    models = read_pipeline(glyphs_repository, "glyphs").models
    assert set(models) == {*LABEL_ROLES, Role.ENCODER}
    (chosen,) = {Runtime(model.runtime, model.precision) for model in models.values()}
    trials = {
        role: {
            Runtime(*name.split()): TrialResult({}, {int(rows): ms for rows, ms in times.items()})
            for name, times in model.times_ms.items()
        }
        for role, model in models.items()
    }
    assert all(ORT in of_model for of_model in trials.values())
    assert chosen == choose(trials)


def test_each_runtime_gives_the_same_images(golden_repository: Path, tmp_path: Path) -> None:
    latents = []
    for runtime in ("onnxruntime", "openvino"):
        repository = tmp_path / runtime
        done = run_export(*GOLDEN_EXPORT, "--runtime", runtime, "--repository", repository)
        assert done.returncode == 0, done.stderr
        pipeline = LocalPipeline(repository)
        assert pipeline.pipeline.runtime == runtime
        latents.append(pipeline.generate([1, 2], [3, 4], "H1P2R2", 1.5).latent)
    np.testing.assert_allclose(latents[0], latents[1], atol=1e-4)


def test_a_runtime_that_lacks_the_precision_is_refused(tmp_path: Path) -> None:
    arguments = (*GOLDEN_EXPORT[:-1], "bf16", "--runtime", "onnxruntime")
    done = run_export(*arguments, "--repository", tmp_path)
    assert done.returncode == 2
    assert "--runtime onnxruntime --precision bf16" in done.stderr


@pytest.mark.parametrize("role", [Role.PREDICTOR, Role.REFINER, Role.DECODER])
def test_a_row_does_not_depend_on_its_batch(glyphs_repository: Path, role: Role) -> None:
    """In bfloat16 too, where another program would round differently."""
    pipeline = read_pipeline(glyphs_repository, "glyphs")
    folder, fixed = glyphs_repository / pipeline.model(role), pipeline.models[role].fixed_rows
    figures = Figures.load(folder)
    model = OpenVinoModel(folder / "1" / "model.onnx", "bf16", None, fixed or (1, 2, 4))
    assert independent(model, figures, (3, 6, 15, 16, 40))

    class Tired:
        """Another model for large batches."""

        on_gpu = False

        def __call__(self, inputs: Tensors) -> tuple[np.ndarray, ...]:
            rows = len(next(iter(inputs.values())))
            return tuple(each + (rows > 6) for each in model(inputs))

    assert independent(Tired(), figures, (3, 6)) and not independent(Tired(), figures, (3, 6, 8))


def test_fixed_rows_compute_the_same(glyphs_repository: Path) -> None:
    pipeline = read_pipeline(glyphs_repository, "glyphs")
    folder = glyphs_repository / pipeline.model(Role.PREDICTOR)
    inputs, _ = Figures.load(folder).batch(7)
    path = folder / "1" / "model.onnx"
    any_rows, fixed = OpenVinoModel(path, "fp32"), OpenVinoModel(path, "fp32", None, (2, 4))
    for one, other in zip(any_rows(inputs), fixed(inputs), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(one).max())


def test_the_faster_form_is_served() -> None:
    now = [0.0]

    class Stated:
        """Takes so much time for few rows, and for many."""

        on_gpu = False

        def __init__(self, few: float, many: float) -> None:
            self._few, self._many = few, many

        def __call__(self, inputs: Tensors) -> tuple[np.ndarray, ...]:
            now[0] += self._few if len(inputs["x"]) == 2 else self._many
            return ()

    batches = [{"x": np.zeros(2)}, {"x": np.zeros(16)}]
    any_rows = Stated(2.0, 8.0)
    assert is_faster(Stated(1.0, 9.0), any_rows, batches, lambda: now[0])
    assert not is_faster(Stated(1.5, 12.0), any_rows, batches, lambda: now[0])


def test_which_models_have_programs_of_fixed_rows(tmp_path: Path) -> None:
    """Small ones whose images have one size; without guidance, half the rows."""
    small, large = tmp_path / "small/model.onnx", tmp_path / "large/model.onnx"
    for path in (small, large):
        path.parent.mkdir()
        path.touch()
    with large.with_name("model.onnx.data").open("wb") as file:  # as ONNX has many weights
        file.truncate(100 << 20)
    shape, guided = (4, 16, 16), ClassLabel(10, null_class=True)
    target = ExportTarget(Role.PREDICTOR, torch.nn.Identity(), shape, guided)
    assert fixed_rows(target, small, 64) == (1, 2, 4, 8, 16)
    assert fixed_rows(target, small, 4) == (1, 2, 4)
    assert fixed_rows(target, large, 64) == ()
    assert fixed_rows(replace(target, other_shapes=((4, 8, 8),)), small, 64) == ()
    assert fixed_rows(replace(target, role=Role.ENCODER), small, 64) == ()
    assert fixed_rows(replace(target, role=Role.DECODER), small, 64) == (1,)
    unguided = replace(target, condition=ClassLabel(10, null_class=False))
    assert fixed_rows(unguided, small, 64) == (1, 2, 4, 8)
    assert fixed_rows(unguided, small, 4) == (1, 2, 4)
