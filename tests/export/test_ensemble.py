"""Ensembles on a real Triton server: a fixed schedule's model answers as the orchestrator does."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from support import GLYPHS_EXPORT, GOLDEN, Caller, check_tensors, read_config, run_export
from tritonclient.utils import InferenceServerException

from flowturbo import LocalPipeline, contract
from flowturbo.conditions.class_label import ClassLabel
from flowturbo.contract import LABEL_ROLES, SCALAR_COLUMNS, Role
from flowturbo.ensemble import block_steps, ensemble_name, plan, read_request, runs
from flowturbo.pipeline import ModelRecord, Pipeline, read_pipeline
from flowturbo.serving.tritonserver import ServerAddress, running_server
from flowturbo.settings import Settings
from flowturbo.solver.calls import BlockCall, Network, RefinerCall, Variant
from flowturbo.solver.program import Program, compile_program
from flowturbo.solver.sampler import sample
from flowturbo.solver.schedule import Schedule

SCHEDULES = tuple(map(Schedule.parse, ("H1P5R3", "E2A2@2.5")))
H1P5R3 = "glyphs_h1p5r3"
FINISHER = "glyphs_finisher"
Infer = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def repository(glyphs_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("ensembles") / "models"
    shutil.copytree(glyphs_repository, copy)
    presets = copy.with_name("presets.json")
    presets.write_text(json.dumps({"presets": {"own": {"schedule": "H1P5R3"}}}))
    for schedules in (("H3", "H1P5R3"), tuple(map(str, SCHEDULES))):
        options = ("--ensemble", *schedules, "--presets", presets)
        done = run_export(*GLYPHS_EXPORT, *options, "--repository", copy)
        assert done.returncode == 0, done.stderr
        assert "PyTorch" not in done.stdout  # the models were there
    return copy


@pytest.fixture(scope="module")
def local(repository: Path) -> LocalPipeline:
    return LocalPipeline(repository)


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[ServerAddress]:
    with running_server(repository) as address:
        yield address


@pytest.fixture(scope="module")
def infer(server: ServerAddress) -> Iterator[Infer]:
    with Caller(server.grpc) as caller:

        def call(model: str, **tensors: Any) -> np.ndarray:
            (image,) = caller.infer(model, ["image"], **tensors)
            return image.astype(np.int64)

        yield call


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def text(value: str) -> np.ndarray:
    return np.array([value.encode()], dtype=object)


def scale(value: float) -> np.ndarray:
    return np.array([value], dtype=np.float32)


def test_repository_has_the_ensembles_asked_for_last(repository: Path) -> None:
    pipeline = read_pipeline(repository)
    composed = {pipeline.model(role) for role in (*LABEL_ROLES, Role.ENCODER)}
    every = {path.name for path in repository.iterdir() if not path.name.startswith("scenes_")}
    generated = every - {contract.ORCHESTRATOR, contract.STREAM, *composed}
    names = {ensemble_name("glyphs", schedule) for schedule in SCHEDULES}
    assert names == {H1P5R3, "glyphs_e2a2_shift2_5"}
    around = {FINISHER, *(f"{name}_planner" for name in names)}
    assert generated == {*around, *names}
    assert pipeline.ensembles == {str(s): ensemble_name("glyphs", s) for s in SCHEDULES}
    assert set(pipeline.parts) == around
    config = read_config(repository / H1P5R3 / "config.pbtxt")
    check_tensors(config.input, contract.ensemble_inputs(ClassLabel.request_inputs), {})
    outputs = (contract.ENSEMBLE_IMAGE, contract.ENSEMBLE_LATENT)
    check_tensors(config.output, outputs, {"H": 64, "W": 64, "C": 4, "h": 16, "w": 16})
    models = [step.model_name for step in config.ensemble_scheduling.step]
    blocks = [model for model in models if "velocity" in model]
    made = runs(compile_program(SCHEDULES[0]), pipeline)
    assert blocks == [pipeline.model(Role(run[0].network)) for run in made]
    assert len(blocks) < 7 + 3  # the networks are small: one execution makes several calls


@pytest.mark.parametrize(
    ("predictor", "refiner", "lengths"),
    [
        ({}, {}, [1] * 10),  # not measured
        ({"block_ms": {"8": 10.0, "64": 99.0}}, {"block_ms": {"8": 2.0}}, [7, 3]),
        ({"block_ms": {"2": 1.0, "8": 24.0}}, {"block_ms": {"8": 40.0}}, [4, 3, 2, 1]),
        ({"block_ms": {"8": 900.0}}, {"block_ms": {"8": 5.0}}, [1] * 7 + [3]),
        ({"block_ms": {"8": 5.0}, "engine": "tensorrt"}, {"engine": "tensorrt"}, [1] * 10),
    ],
)
def test_an_execution_makes_short_calls_together(
    predictor: dict[str, Any], refiner: dict[str, Any], lengths: list[int]
) -> None:
    models = {role: ModelRecord() for role in LABEL_ROLES}
    models[Role.PREDICTOR], models[Role.REFINER] = ModelRecord(**predictor), ModelRecord(**refiner)
    pipeline = Pipeline("any", ClassLabel(36), (4, 16, 16), models)
    program = compile_program(SCHEDULES[0])
    found = runs(program, pipeline)
    assert [len(run) for run in found] == lengths
    assert [call for run in found for call in run] == list(program.calls)
    # The planner has the lengths from its configuration: those of the export.
    config = [
        {"name": spec.name, "dims": list(spec.dims)}
        for spec in contract.plan_outputs(lengths, ClassLabel.block_inputs)
    ]
    assert contract.planned_calls(config) == lengths
    tensors = {"label": ids(3), "seed": ids(1)}
    planned = plan(read_request(tensors, pipeline, Settings()), pipeline, program, lengths)
    scalars = [planned[contract.plan_scalars(k)] for k in range(len(lengths))]
    assert [part.shape[1] for part in scalars] == [SCALAR_COLUMNS * count for count in lengths]
    whole = plan(read_request(tensors, pipeline, Settings()), pipeline, program, [10])
    np.testing.assert_array_equal(np.concatenate(scalars, 1), whole[contract.plan_scalars(0)])


@pytest.mark.parametrize("variant", Variant)
@pytest.mark.parametrize("most", [1, 2, 50])
@pytest.mark.parametrize(
    "schedule", ["H1P5R3", "P2R2", "E3", "A4", "E1R2P1R1A2", "H2E1P1", "H1P2Z1A1T2"]
)
def test_wiring_is_the_samplers(schedule: str, most: int, variant: Variant) -> None:
    """Any block at all gives the same, called by the sampler or by an ensemble's rules."""
    program = compile_program(Schedule.parse(schedule), variant=variant)
    noise = np.random.default_rng(0).standard_normal((2, 3))

    def block(call: BlockCall, x: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(call, RefinerCall):
            return x + np.sin(v + call.end), v + np.cos(x + call.t) * (1 + call.reads_refined)
        v_next = np.cos(3 * (x + call.euler * v) + call.t)
        return x + call.w_prev * v + call.w_next * v_next, v_next

    expected = sample(program, noise, block)
    np.testing.assert_array_equal(run_steps(program, noise, block, most), expected)


def run_steps(
    program: Program, noise: np.ndarray, block: Callable[..., Any], most: int
) -> np.ndarray:
    """An execution makes at most `most` calls."""
    models = {role: ModelRecord(block_ms={"8": 100.0 / most}) for role in LABEL_ROLES}
    pipeline = Pipeline("any", ClassLabel(36), (4, 16, 16), models)
    steps, end = block_steps(program, pipeline)
    made = runs(program, pipeline)
    longest = max(len(list(of)) for _, of in groupby(call.network for call in program.calls))
    assert max(map(len, made)) == min(most, longest)
    tensors = {contract.PLAN_NOISE: noise}
    for index, (step, run) in enumerate(zip(steps, made, strict=True)):
        assert step.model == contract.model_name("any", Role(run[0].network))
        assert step.inputs["scalars"] == contract.plan_scalars(index)
        assert (step.inputs["label"], step.inputs["pair"]) == ("label_rows", "pair_rows")
        x, v = (tensors[step.inputs[key]] for key in ("x", "velocity"))
        for call in run:
            x, v = block(call, x, v)
        results = {"x_next": x, "velocity_next": v}
        tensors |= {name: results[key] for key, name in step.outputs.items()}
    return tensors[end]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("guidance", [None, 1.0, 2.5])
def test_images_are_those_of_single_steps(
    infer: Infer, local: LocalPipeline, schedule: Schedule, guidance: float | None
) -> None:
    """Asked for by its own name and through the orchestrator."""
    labels, seeds = ids(3, 0, 35), ids(7, 8, 2**40)
    expected = local.generate(labels, seeds, str(schedule), guidance).image
    assert expected is not None
    assert expected.std() > 10
    tensors = {"label": labels, "seed": seeds}
    if guidance is not None:
        tensors["guidance_scale"] = scale(guidance)
    for found in (
        infer(ensemble_name("glyphs", schedule), **tensors),
        infer("flowturbo", schedule=text(str(schedule)), **tensors),
    ):
        assert np.abs(found - expected).max() <= 1


def test_the_orchestrator_calls_the_ensemble(infer: Infer, server: ServerAddress) -> None:
    """But where a request wants what an ensemble lacks: a part of the times guided."""
    request = {"label": ids(3), "seed": ids(1), "schedule": text("H1P5R3")}
    time.sleep(1.1)  # after company, requests are gathered for a while
    before = count_of(server, H1P5R3)
    infer("flowturbo", **request)
    assert count_of(server, H1P5R3) == before + 1
    infer("flowturbo", **request | {"schedule": text("own")})  # a preset, which is H1P5R3
    before += 1
    assert count_of(server, H1P5R3) == before + 1
    infer("flowturbo", guidance_interval=np.array([0.1, 0.8], np.float32), **request)
    assert count_of(server, H1P5R3) == before + 1


def count_of(server: ServerAddress, model: str) -> int:
    with triton.InferenceServerClient(server.grpc) as client:
        (found,) = client.get_inference_statistics(model).model_stats
    return found.inference_stats.success.count


def test_class_names(infer: Infer) -> None:
    by_name = infer(H1P5R3, class_name=text("C"), seed=ids(5))
    np.testing.assert_array_equal(by_name, infer(H1P5R3, label=ids(2), seed=ids(5)))


def test_concurrent_requests_share_batches(
    infer: Infer, server: ServerAddress, repository: Path
) -> None:
    made = runs(compile_program(SCHEDULES[0]), read_pipeline(repository))
    each = sum(run[0].network == Network.PREDICTOR for run in made)
    expected = infer(H1P5R3, label=ids(3), seed=ids(1))
    before = executions_by_rows(server)
    with ThreadPoolExecutor(32) as pool:
        jobs = [pool.submit(infer, H1P5R3, label=ids(3), seed=ids(1)) for _ in range(32)]
        for job in jobs:
            assert np.abs(job.result() - expected).max() <= 1
    new = executions_by_rows(server) - before
    assert sum(rows * count for rows, count in new.items()) == 32 * 2 * each
    assert new.total() < 32 * each  # how many fewer hangs on what else the machine does


def test_executions_of_other_lengths_are_not_joined(infer: Infer, server: ServerAddress) -> None:
    """Ensembles of other lengths and single calls of the orchestrator, at a time."""
    request = {"label": ids(3), "seed": ids(1)}
    asked = [("flowturbo", {"schedule": text("H1P6")})]
    asked += [(ensemble_name("glyphs", schedule), {}) for schedule in SCHEDULES]
    expected = [infer(model, **request, **more) for model, more in asked]
    with ThreadPoolExecutor(6) as pool:
        jobs = [
            (pool.submit(infer, model, **request, **more), image)
            for _ in range(20)
            for (model, more), image in zip(asked, expected, strict=True)
        ]
        for job, image in jobs:
            assert np.abs(job.result() - image).max() <= 1


def test_a_block_makes_calls_one_after_another(server: ServerAddress) -> None:
    chance = np.random.default_rng(0)
    rows = {
        "x": chance.standard_normal((2, 4, 16, 16), np.float32),
        "velocity": chance.standard_normal((2, 4, 16, 16), np.float32),
        "pair": np.array([[1], [-1]], np.int32),
        "label": np.array([[3], [36]]),
    }
    calls = chance.random((2, 3 * SCALAR_COLUMNS), np.float32)
    with Caller(server.grpc) as caller:

        def block(scalars: np.ndarray) -> list[np.ndarray]:
            outputs = ["x_next", "velocity_next"]
            return caller.infer("glyphs_velocity_predictor", outputs, scalars=scalars, **rows)

        together = block(calls)
        for wrong in (0, 7):
            with pytest.raises(
                InferenceServerException, match=f"5 columns for each call, got {wrong}"
            ):
                block(np.zeros((2, wrong), np.float32))
        for one in np.split(calls, 3, axis=1):
            rows["x"], rows["velocity"] = block(np.ascontiguousarray(one))
    np.testing.assert_array_equal(together, (rows["x"], rows["velocity"]))


def executions_by_rows(server: ServerAddress) -> Counter[int]:
    """How many batches of each size the predictor has evaluated."""
    with triton.InferenceServerClient(server.grpc) as client:
        (model,) = client.get_inference_statistics("glyphs_velocity_predictor").model_stats
    return Counter({batch.batch_size: batch.compute_infer.count for batch in model.batch_stats})


BAD: list[tuple[dict[str, Any], str]] = [
    ({"label": ids(36), "seed": ids(1)}, "label must be 0 to 35, got 36"),
    ({"label": ids(1)}, "needs seed"),
    ({"seed": ids(1)}, "got neither"),
    ({"label": ids(1), "seed": ids(-1)}, "seed must be 0 to"),
    ({"label": ids(1), "seed": ids(1, 2)}, "one entry per image, 1 here, got 2"),
    ({"label": ids(), "seed": ids()}, "1 to 64 images, got 0"),
    ({"label": ids(1), "seed": ids(1), "guidance_scale": scale(np.nan)}, "got nan"),
    ({"label": ids(*[1] * 33), "seed": ids(*[1] * 33)}, "at most 64 rows .* got 66"),
    ({"label": ids(1), "seed": ids(1), "schedule": text("H1")}, "unexpected inference input"),
]


@pytest.mark.parametrize(("tensors", "message"), BAD)
def test_bad_requests_are_refused(infer: Infer, tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(InferenceServerException, match=message) as caught:
        infer(H1P5R3, **tensors)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.parametrize("name", ["guidance_scal", "schedule"])
def test_unknown_parameters_are_refused(server: ServerAddress, name: str) -> None:
    """The server makes one of every member of a JSON request that is no input."""
    with triton.InferenceServerClient(server.grpc) as client:
        label, seed = (triton.InferInput(each, [1], "INT64") for each in ("label", "seed"))
        for tensor in (label, seed):
            tensor.set_data_from_numpy(ids(1))
        with pytest.raises(InferenceServerException, match=f"unknown request parameter '{name}'"):
            client.infer(H1P5R3, [label, seed], parameters={name: "7"}, client_timeout=60)


def test_rows_that_do_not_fit_their_pairs_are_told_in_a_sentence(server: ServerAddress) -> None:
    rows = np.zeros((2, 4, 16, 16), np.float32)
    with Caller(server.grpc) as caller:
        pairs = {contract.PLAN_PAIR: np.zeros((2, 1), np.int32)}
        (latent,) = caller.infer(FINISHER, ["latent"], latent_rows=rows, **pairs)
        assert latent.shape == rows.shape
        pairs = {contract.PLAN_PAIR: np.zeros((1, 1), np.int32)}
        with pytest.raises(InferenceServerException, match="IndexError") as caught:
            caller.infer(FINISHER, ["latent"], latent_rows=rows, **pairs)
        assert "\n" not in caught.value.message()


def test_largest_requests(infer: Infer) -> None:
    labels, seeds = ids(*(k % 36 for k in range(64))), ids(*range(64))
    unguided = infer(H1P5R3, label=labels, seed=seeds, guidance_scale=scale(1.0))
    guided = infer(H1P5R3, label=labels[:32], seed=seeds[:32])
    assert (len(unguided), len(guided)) == (64, 32)


def test_export_option(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    predictor = ("--predictor", GOLDEN / "predictor.pt", "--num-heads", "2")
    common = (*predictor, "--precision", "fp16", "--repository", repository)
    for schedule, message in (("H1P5R3", "needs --refiner"), ("H1X2", "unknown step 'X'")):
        done = run_export(*common, "--ensemble", schedule)
        assert done.returncode == 2
        assert message in done.stderr
    done = run_export(*common, "--ensemble", "E2", "H1P5", "EE")
    assert done.returncode == 0, done.stderr
    generated = {path.name for path in repository.iterdir()}
    models = {"sit_e2", "sit_h1p5"}
    around = {"sit_finisher", *(f"{model}_planner" for model in models)}
    kept = {contract.ORCHESTRATOR, contract.STREAM, "sit_velocity_predictor"}
    assert generated == {*kept, *models, *around}
    assert read_pipeline(repository).ensembles == {"E2": "sit_e2", "H1P5": "sit_h1p5"}
    (output,) = read_config(repository / "sit_e2" / "config.pbtxt").output
    assert output.name == "latent"
    again = run_export(*common)
    assert "PyTorch" not in again.stdout and "installed" not in again.stdout
    assert "up to date" in run_export(*common).stdout  # and the ensembles are still there
    assert {path.name for path in repository.iterdir()} == generated
    assert run_export(*common, "--ensemble").returncode == 0
    assert {path.name for path in repository.iterdir()} == kept
    pipeline = read_pipeline(repository)
    assert (pipeline.ensembles, pipeline.parts) == ({}, ())
