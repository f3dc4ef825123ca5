"""Solvers are fitted, kept in a file, and refused where they do not belong."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import GOLDEN_EXPORT, run_export

from flowturbo import LocalPipeline, Schedule, compile_program, sample
from flowturbo.conditions.class_label import ClassLabel
from flowturbo.contract import Role
from flowturbo.ensemble import read_request
from flowturbo.errors import RepositoryError, RequestError
from flowturbo.generate import program_of
from flowturbo.pipeline import (
    ModelRecord,
    Pipeline,
    flow_of,
    read_pipeline,
    solvers_path,
    with_solvers,
)
from flowturbo.presets import parse_presets, parsed
from flowturbo.request import GenerationRequest, parse_request
from flowturbo.settings import Settings
from flowturbo.solver.calls import BlockCall, PredictorCall, Variant
from flowturbo.solver.grid import time_grid
from flowturbo.solver.sampler import Array
from flowturbo.solvers import Fit, Solvers
from tuning import fit, grids, refiner
from tuning.fit import Source, fit_steps
from tuning.learned import Rollout, Step, Task, refined_grid
from tuning.trajectories import NODES, Trajectories, gram, halvings, integrate

unit = pytest.mark.unit
MEAN, DEVIATION = 0.7, 0.4
SHAPE = (2, 4, 4)
RNG = np.random.default_rng(5)
MIX = np.linalg.qr(RNG.standard_normal((32, 32)))[0].astype(np.float32)


def turning(scale: float) -> Any:
    """A smooth flow that depends on its neighbours and on the guidance scale."""

    def velocity(x: Array, t: float) -> Array:
        variance = (1 - t) ** 2 + (t * DEVIATION) ** 2
        pull = MEAN + (t * DEVIATION**2 - (1 - t)) / variance * (x - t * MEAN)
        bend = np.sin(3 * t + scale * (x.reshape(len(x), -1) @ MIX)).reshape(x.shape)
        return np.asarray(pull + 0.3 * bend, np.float32)

    return velocity


def trajectories(count: int, scale: float, seed: int) -> Trajectories:
    start = np.random.default_rng(seed).standard_normal((count, *SHAPE)).astype(np.float32)
    return Trajectories(np.arange(count), scale, *integrate(turning(scale), start))


def rollouts(count: int, scales: list[float], seed: int) -> list[Rollout]:
    batches = [trajectories(count, scale, seed + k) for k, scale in enumerate(scales)]
    return [Rollout.start(batch, turning(batch.scale)) for batch in batches]


def run(program: Any, start: Array, scale: float) -> Array:
    def block(call: BlockCall, x: Array, v: Array) -> tuple[Array, Array]:
        assert isinstance(call, PredictorCall)
        v_next = turning(scale)(x + call.euler * v, call.t)
        return (x + call.w_prev * v + call.w_next * v_next).astype(np.float32), v_next

    return sample(program, start, block)


def rms(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


@unit
def test_the_teacher_is_exact_where_the_solution_is_known() -> None:
    start = RNG.standard_normal((8, *SHAPE)).astype(np.float32)

    def affine(x: Array, t: float) -> Array:
        variance = (1 - t) ** 2 + (t * DEVIATION) ** 2
        pull = MEAN + (t * DEVIATION**2 - (1 - t)) / variance * (x - t * MEAN)
        return np.asarray(pull, np.float32)

    found = Trajectories(np.arange(8), 1.0, *integrate(affine, start))
    assert found.x.shape == (len(NODES), 8, *SHAPE)
    assert rms(found.state(1.0) - (MEAN + DEVIATION * start)) < 2e-3
    for t in (0.0, 0.3, 0.97):
        wanted = t * MEAN + np.hypot(1 - t, t * DEVIATION) * start
        assert rms(found.state(t) - wanted) < 2e-3
    with pytest.raises(ValueError, match="not finite"):
        integrate(lambda x, t: np.full_like(x, np.nan) if t > 0.5 else x, start)


def stiff(rate: float) -> Any:
    """A flow that pulls to cos(2t), as strong guidance does; it ends near cos(2)."""
    return lambda x, t: np.asarray(-rate * (x - np.cos(2 * t)) - 2 * np.sin(2 * t), np.float32)


@unit
def test_the_teacher_is_stable_where_guidance_is_strong() -> None:
    """On this flow Adams-Bashforth 4 leaves the solution on the way to the data."""
    start = RNG.standard_normal((8, *SHAPE)).astype(np.float32)
    for rate in (6, 12):
        found = integrate(stiff(rate), start)[0][-1]
        assert rms(found - (np.cos(2) + (start - 1) * np.exp(-rate))) < 1e-3


@unit
def test_halved_steps_tell_how_far_the_teacher_is_from_exact() -> None:
    start = RNG.standard_normal((8, *SHAPE)).astype(np.float32)
    off = rms(integrate(stiff(20), start)[0][-1] - np.cos(2))
    seen: list[float] = []

    def counted(x: Any, t: float) -> Any:
        seen.append(t)
        return stiff(20)(x, t)

    found = halvings(counted, start)
    assert next(found) == pytest.approx(off, rel=0.02) and off > 0.1
    before = len(seen)
    assert next(found) < 1e-3
    assert len(seen) - before == 4 * (len(NODES) - 1) + 7  # the coarser ends are known
    assert next(halvings(stiff(60), start)) == np.inf


@unit
@pytest.mark.parametrize(("rate", "parts", "said"), [(6, 1, False), (20, 2, False), (90, 4, True)])
def test_steps_are_divided_until_trajectories_are_exact(
    rate: float, parts: int, said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it found is kept, and is said where it is too much."""
    pipeline = SimpleNamespace(latent_shape=SHAPE, flow="flow", precision="fp32")
    engine = SimpleNamespace(
        pipeline=pipeline,
        subject=SimpleNamespace(suffix=""),
        velocity=lambda seeds, guidance: stiff(guidance.scale * rate / 2),
    )
    for velocity in (engine.velocity, None):
        engine.velocity = velocity
        source = Source(engine, None, tmp_path)  # type: ignore[arg-type]
        assert source.parts(2.0, 4) == parts
        assert f"{parts * (len(NODES) - 1)} steps" in source.accuracies[0]
        assert ("more than 0.02" in capsys.readouterr().err) == said


@unit
def test_a_found_grid_errs_less_than_the_shifted_one() -> None:
    products = gram([trajectories(64, 1.0, 0)])
    for evaluations in (3, 5):
        grid = grids.best_grid(evaluations, products)
        assert len(grid) == evaluations + 1 and grid[0] == 0 and grid[-1] == 1
        assert min(np.diff(grid)) > 0
        shifted = grids.error(time_grid(evaluations, 3.0), products)
        assert grids.error(grid, products) < 0.95 * shifted


@unit
def test_a_refined_grid_leads_nearer_and_evaluates_no_more_than_changed() -> None:
    scales, fitted = (1.0, 1.0), rollouts(64, [1.0, 1.0], 0)
    start = grids.best_grid(4, gram([rollout.exact for rollout in fitted]))
    seen: list[int] = []
    grid = refined_grid(start, fitted, scales, seen.append)
    assert all(count == 128 for count in seen)

    def apart(times: Any) -> float:
        _, ends = fit_steps(times, Task(scales, 0), fitted, len(fitted))
        return float(np.concatenate([rollout.distances for rollout in ends]).mean())

    assert apart(grid) < apart(start) and min(np.diff(grid)) > 0


@unit
@pytest.mark.parametrize(("side", "units"), [(0, 0), (1, 0), (4, 0), (1, 6), (4, 6)])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (1.0, 3.0)])
def test_what_is_served_is_what_was_fitted(
    side: int, units: int, scales: tuple[float, float]
) -> None:
    """The table's program reaches the states of the fit, and they are nearer than AB2's."""
    drawn = [1.0, 1.0] if scales[0] == scales[1] else [1.2, 2.0, 2.8]
    fitted, held = rollouts(96, drawn, 0), rollouts(48, [drawn[-1]], 50)
    times = (0.0, 0.1, 0.3, 0.6, 1.0)
    starts = held[0].x
    steps, ends = fit_steps(times, Task(scales, side, units), [*fitted, *held], len(fitted))
    held = ends[len(fitted) :]
    weights = np.zeros((len(steps[0].weights), 4, 4))
    for k, step in enumerate(steps):
        weights[:, k, : k + 1] = step.weights
    matrices = tuple(step.matrix for step in steps if step.matrix is not None)
    assert len(matrices) == (4 if side else 0)
    refiners = tuple(step.refiner for step in steps if step.refiner is not None)
    assert len(refiners) == (2 if units else 0)
    if side == 1:  # windows of 4 x 4 are too few here
        assert all(len(of) == units for of in refiners)
    made = Fit(*scales, times, weights, matrices, refiners, side or 1)
    program = compile_program(Schedule.parse("L4"), fitted=made.table(drawn[-1]))
    found = run(program, starts, drawn[-1])
    np.testing.assert_allclose(found, held[0].x, atol=1e-4)
    exact = held[0].exact.state(1.0)
    beside = run(compile_program(Schedule.parse("A4@3")), starts, drawn[-1])
    assert rms(found - exact) < 0.75 * rms(beside - exact)


@unit
def test_a_refiner_mends_what_a_linear_operator_cannot() -> None:
    """Its step leads nearer to the exact one, on trajectories that it was not trained on, too."""
    task = Task((1.0, 3.0), 1, units=32)

    def evaluated(count: int, scale: float, seed: int) -> Rollout:
        def velocity(x: Array, t: float) -> Array:
            return np.asarray(np.sin(2 * x) + scale * np.cos(x), np.float32)

        start = np.random.default_rng(seed).standard_normal((count, *SHAPE)).astype(np.float32)
        batch = Trajectories(np.arange(count), scale, *integrate(velocity, start))
        return Rollout.start(batch, velocity).evaluate(0.0)

    fitted = [evaluated(128, scale, seed) for seed, scale in enumerate((1.2, 2.8, 2.0, 1.6, 2.4))]
    held = [evaluated(64, scale, 50) for scale in (1.5, 2.5)]
    step = task.fit(fitted, 0.6)
    made = refiner.refined(fitted, step, task, 0.6)
    assert step.matrix is not None and made.matrix is not None and made.refiner is not None
    np.testing.assert_array_equal(made.matrix[..., :2], step.matrix)
    assert made.refiner.shape == (32, 2) and made.matrix.shape == (2, 5, 34)

    def off(step: Step) -> float:
        left = [each.exact.state(0.6) - task.moved(each, step).x for each in held]
        return rms(np.concatenate(left))

    assert off(made) < 0.5 * off(step)
    for trained in (made.matrix[..., 2:], made.refiner):
        np.testing.assert_array_equal(trained, trained.astype(np.float16))
    again = refiner.refined(fitted, step, task, 0.6)
    np.testing.assert_array_equal(made.refiner, again.refiner)


@unit
def test_a_refiner_that_cannot_help_is_left_out() -> None:
    """What is left is chance, so training makes images worse that it does not see."""
    task, start = Task((1.0, 1.0), 1, units=8), rollouts(256, [1.0, 1.0], 0)
    rng = np.random.default_rng(3)
    fitted = [
        replace(
            each,
            x=rng.standard_normal(each.x.shape).astype(np.float32),
            velocities=(rng.standard_normal(each.x.shape).astype(np.float32),),
        )
        for each in start
    ]
    step = task.fit(fitted, 1.0)
    made = refiner.refined(fitted, step, task, 1.0)
    assert made.refiner is not None and made.refiner.shape == (0, 2)
    for each in fitted:
        np.testing.assert_array_equal(task.moved(each, made).x, task.moved(each, step).x)


def some_fit(evaluations: int, low: float = 1.0, high: float = 1.0, seed: int = 0) -> Fit:
    rng = np.random.default_rng(seed)
    terms = 1 if low == high else 2
    times = time_grid(evaluations, 2.0)
    weights = np.tril(rng.standard_normal((terms, evaluations, evaluations)))
    matrices = tuple(
        rng.standard_normal((terms, (k + 2) * 4 * 16 + 1, 16 + 3 * (k >= evaluations - 2)))
        for k in range(evaluations)
    )
    matrices = tuple(matrix.astype(np.float32) for matrix in matrices)
    refiners = tuple(rng.standard_normal((3, 16)).astype(np.float32) for _ in range(2))
    return Fit(low, high, times, weights, matrices, refiners, 4, {"distance": 0.1})


def some_pipeline(**fields: Any) -> Pipeline:
    models = {
        role: ModelRecord(sizes={"C": 4, "h": 8, "w": 8, "H": 64, "W": 64})
        for role in (Role.PREDICTOR, Role.DECODER, Role.ENCODER)
    }
    made_from = {"sha256": {"predictor": "abc"}, "options": {"guidance_channels": 3}}
    made: dict[str, Any] = {"fingerprint": made_from, **fields}
    return Pipeline("sit", ClassLabel(3), (4, 8, 8), models, **made)


def some_solvers(pipeline: Pipeline, *fits: Fit) -> Solvers:
    return Solvers(pipeline.flow, pipeline.latent_shape, fits)


SETTINGS = Settings()
FITS = (some_fit(4), some_fit(4, 1.0, 4.0, seed=1), some_fit(6, 2.0, 4.0, seed=2))


def learned_pipeline(**fields: Any) -> Pipeline:
    pipeline = some_pipeline(**fields)
    return replace(pipeline, solvers=some_solvers(pipeline, *FITS))


def parse(pipeline: Pipeline, outputs: tuple[str, ...] = ("latent",), **given: Any) -> Any:
    tensors = {"label": np.array([1], np.int64), "seed": np.array([3], np.int64)}
    tensors["guidance_scale"] = np.array([1.0], np.float32)
    for name, value in given.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    return parse_request(tensors, outputs, pipeline, SETTINGS)


def text(schedule: str) -> Array:
    return np.array([schedule.encode()], object)


IMAGE = np.zeros((1, 64, 64, 3), np.uint8)
MASK = np.zeros((1, 64, 64), np.uint8)
MASK[:, :32] = 255


@unit
def test_a_file_keeps_everything(tmp_path: Path) -> None:
    pipeline = some_pipeline()
    solvers = some_solvers(pipeline, *FITS)
    solvers.write(tmp_path / "s.npz")
    read = with_solvers(pipeline, tmp_path / "s.npz").solvers
    assert read == solvers and read.counts == [4, 6] and read.ranges(4) == "1 to 4"
    for before, after in zip(FITS, read.fits, strict=True):
        assert (before.low, before.high, before.times) == (after.low, after.high, after.times)
        np.testing.assert_array_equal(before.weights, after.weights)
        for name in ("operators", "refiners"):
            for one, other in zip(getattr(before, name), getattr(after, name), strict=True):
                np.testing.assert_array_equal(one, other)
        assert after.figures == {"distance": 0.1}
    assert with_solvers(pipeline, tmp_path / "none.npz") is pipeline
    assert solvers != some_solvers(pipeline, *FITS[:2])
    changed = tuple(2 * of for of in FITS[0].refiners)
    assert solvers != some_solvers(pipeline, replace(FITS[0], refiners=changed), *FITS[1:])


@unit
def test_trained_units_take_half_of_the_space(tmp_path: Path) -> None:
    """They are rounded when they are trained, so the file changes nothing."""
    pipeline, path, made = some_pipeline(), tmp_path / "s.npz", FITS[1]
    half = tuple(of.astype(np.float16).astype(np.float32) for of in made.refiners)
    operators = [matrix.copy() for matrix in made.operators]
    for matrix in operators[2:]:
        matrix[..., 16:] = matrix[..., 16:].astype(np.float16)
    made = replace(made, refiners=half, operators=tuple(operators))
    some_solvers(pipeline, made).write(path)
    with np.load(path) as kept:
        kinds = {name: kept[name].dtype for name in kept.files}
    for name in ("0.units.2", "0.units.3", "0.refiner.0", "0.refiner.1"):
        assert kinds[name] == np.float16
    assert kinds["0.operator.3"] == np.float32
    (read,) = Solvers.read(path).fits
    for one, other in zip((*made.operators, *half), (*read.operators, *read.refiners), strict=True):
        assert other.dtype == np.float32
        np.testing.assert_array_equal(one, other)


@unit
def test_solvers_of_another_model_are_refused(tmp_path: Path) -> None:
    some_solvers(some_pipeline(), *FITS).write(tmp_path / "s.npz")
    made_from = {"sha256": {"predictor": "other"}, "options": {"guidance_channels": 3}}
    with pytest.raises(RepositoryError, match="another model than that of pipeline sit"):
        with_solvers(some_pipeline(fingerprint=made_from), tmp_path / "s.npz")


@unit
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no archive"),
        lambda path: path.write_bytes(path.read_bytes()[:-200]),
        lambda path: np.savez(path, about=np.zeros(3, np.uint8)),
    ],
)
def test_damaged_files_are_refused(damage: Any, tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    some_solvers(some_pipeline(), *FITS).write(path)
    damage(path)
    with pytest.raises(RepositoryError, match=r"s\.npz is no file of fitted solvers"):
        Solvers.read(path)


@unit
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"times": (0.0, 0.6, 0.5, 0.8, 1.0)}, "must rise from 0 to 1"),
        ({"times": (0.1, 0.3, 0.5, 0.8, 1.0)}, "must rise from 0 to 1"),
        ({"weights": np.full((1, 4, 4), np.nan)}, "wanted are finite"),
        ({"weights": np.zeros((2, 4, 4))}, "shape"),
        ({"side": 3}, "windows of 3"),
        ({"operators": FITS[0].operators[:2]}, "2 operators and 2 refiners for 4"),
        ({"operators": ()}, "0 operators and 2 refiners for 4"),
        (
            {"refiners": FITS[0].refiners[:1]},
            r"shape \(1, 257, 19\), wanted are finite \(1, 257, 16\)",
        ),
        ({"refiners": (np.zeros((3, 9)), FITS[0].refiners[1])}, r"wanted are finite \(3, 16\)"),
        ({"refiners": (np.full((3, 16), np.inf), FITS[0].refiners[1])}, "wanted are finite"),
    ],
)
def test_impossible_fits_are_refused(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    some_solvers(some_pipeline(), replace(FITS[0], **fields)).write(tmp_path / "s.npz")
    with pytest.raises(RepositoryError, match=said):
        Solvers.read(tmp_path / "s.npz")


@unit
def test_a_request_takes_the_fit_of_its_guidance() -> None:
    """The one for scale 1 alone there, else the range's, with coefficients for the scale."""
    pipeline = learned_pipeline()

    def weights(scale: float) -> Array:
        request = parse(pipeline, schedule=text("L4"), guidance_scale=np.array([scale], np.float32))
        program = program_of(request, pipeline, Variant.REFERENCE)
        assert program is program_of(request, pipeline, Variant.REFERENCE)  # compiled once
        return np.array([call.w_next for call in program.calls])  # type: ignore[union-attr]

    diagonal = [fit.weights[:, range(4), range(4)] for fit in FITS[:2]]
    np.testing.assert_allclose(weights(1.0), diagonal[0][0])
    for scale, share in ((2.5, 0.0), (4.0, 1.0), (3.25, 0.5)):
        np.testing.assert_allclose(weights(scale), diagonal[1][0] + share * diagonal[1][1])


@unit
@pytest.mark.parametrize("scale", [1.4, 2.2])
def test_a_scale_that_float32_rounds_is_within_its_own_range(scale: float) -> None:
    pipeline = some_pipeline()
    pipeline = replace(pipeline, solvers=some_solvers(pipeline, some_fit(4, scale, scale)))
    given = {"schedule": text("L4"), "guidance_scale": np.array([scale], np.float32)}
    assert program_of(parse(pipeline, **given), pipeline, Variant.REFERENCE)


@unit
def test_a_flow_depends_on_every_option_that_changes_it() -> None:
    def flow(**options: Any) -> str:
        return flow_of({"sha256": {"predictor": "abc"}, "options": options})

    values = [{}, {"text_length": 0}, {"text_length": 256}, {"reverse_time": True}]
    assert len({flow(**each) for each in values}) == len(values)
    assert flow() == flow(text_length=None, reverse_time=False) == flow(precision="fp32")


@unit
def test_gaps_between_ranges_are_told() -> None:
    solvers = some_solvers(some_pipeline(), some_fit(4), some_fit(4, 2.0, 4.0, seed=1))
    assert solvers.ranges(4) == "1, 2 to 4"
    assert some_solvers(some_pipeline(), *FITS).ranges(4) == "1 to 4"


@unit
def test_what_a_missing_solver_stands_for() -> None:
    """A preset goes on with its other schedule; without one it is an error."""
    pipeline = some_pipeline(own_presets={"fast": "L5 or H1P3", "slow": "L5"})
    assert str(pipeline.find_schedule("fast")) == "H1P3"
    assert str(pipeline.default_schedule(SETTINGS)) == "H1P3"
    stated = pipeline.described(SETTINGS)["presets"]
    assert (stated["fast"], stated["slow"]) == ("L5 or H1P3", "L5")
    with pytest.raises(RequestError, match="no fitted solver L5, fitted: none"):
        pipeline.find_schedule("slow")


@unit
@pytest.mark.parametrize(("fast", "inverts"), [("U6", "A6"), ("L4 or H1P3", "H1P3")])
def test_inversions_by_default_need_no_schedule(fast: str, inverts: str) -> None:
    pipeline = learned_pipeline(own_presets={"fast": fast})
    request = parse(pipeline, image=IMAGE, seed=None, invert=np.array([True]))
    assert str(request.schedule) == inverts


@unit
@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ({"schedule": "H8", "otherwise": "H4"}, "must be none itself"),
        ({"schedule": "L4", "otherwise": "U4"}, "must be none itself"),
        ({"otherwise": "A8"}, "KeyError: 'schedule'"),
        ({"schedule": "N3"}, "N3: NeuralSolver"),
        ({"schedule": "L4", "otherwise": "H1R1"}, "need a refiner"),
    ],
)
def test_presets_that_no_request_could_use(
    preset: dict[str, str], said: str, tmp_path: Path
) -> None:
    text = json.dumps({"presets": {"fast": preset}})
    with pytest.raises(RepositoryError, match=said):
        parse_presets(text, tmp_path / "p.json", has_refiner=False)


@unit
def test_an_ensemble_checks_its_own_schedule() -> None:
    """And not the pipeline's default, which may not serve the request."""
    pipeline = learned_pipeline(own_presets={"fast": "L4"})
    tensors = {
        "label": np.array([1], np.int64),
        "seed": np.array([3], np.int64),
        "guidance_scale": np.array([7.0], np.float32),
    }
    settings = replace(SETTINGS, default_schedule="H1P5")
    assert str(read_request(tensors, pipeline, settings).schedule) == "H1P5"


@unit
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"schedule": text("L5")}, "has no fitted solver L5, fitted: L4, L6"),
        ({"guidance_scale": np.array([4.5], np.float32)}, "guidance scales 1 to 4, got 4.5"),
        ({"schedule": text("L6")}, "L6 was fitted for guidance scales 2 to 4, got 1"),
        ({"times": np.linspace(0, 1, 5, dtype=np.float32)}, "give no times"),
        ({"image": IMAGE, "strength": np.array([0.5], np.float32)}, "strength must be 1, got 0.5"),
        ({"image": IMAGE, "seed": None, "invert": np.array([True])}, "an inversion takes other"),
        (
            {
                "guidance_scale": np.array([2.0], np.float32),
                "guidance_interval": np.array([0.2, 1.0], np.float32),
            },
            "guidance at all times: give no guidance_interval",
        ),
    ],
)
def test_what_a_fit_cannot_serve_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        parse(learned_pipeline(), **{"schedule": text("L4"), **given})


@unit
def test_other_sizes_than_the_fitted_are_refused() -> None:
    pipeline = replace(learned_pipeline(), image_sizes=((64, 64), (64, 128)))
    assert parse(pipeline, schedule=text("L4"), size=np.array([64, 64]))
    with pytest.raises(RequestError, match="default size of pipeline sit"):
        parse(pipeline, schedule=text("L4"), size=np.array([64, 128]))


@unit
def test_inpainting_with_a_fit_starts_from_noise() -> None:
    request = parse(learned_pipeline(), schedule=text("L4"), image=IMAGE, mask=MASK)
    assert request.edit and not request.edit.fill and request.start_time == 0


@unit
@pytest.mark.parametrize(
    ("given", "schedule"),
    [
        ({}, "L4"),
        ({"image": IMAGE, "strength": np.array([0.5], np.float32)}, "H1P3"),
        ({"image": IMAGE, "mask": MASK}, "H1P3"),
        ({"image": IMAGE, "seed": None, "invert": np.array([True])}, "H1P3"),
        ({"guidance_scale": np.array([9.0], np.float32)}, "H1P3"),
        ({"times": np.linspace(0, 1, 5, dtype=np.float32)}, "H1P3"),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_a_preset_may_name_another_schedule(
    given: dict[str, Any], schedule: str, named: bool
) -> None:
    """For requests that the learned one cannot serve; the answer's settings say which ran."""
    pipeline = learned_pipeline(own_presets={"fast": "L4 or H1P3"})
    if named:
        given = {"schedule": text("fast"), **given}
    request: GenerationRequest = parse(pipeline, **given)
    assert str(request.schedule) == schedule
    assert request.settings(pipeline, SETTINGS)["schedule"] == schedule
    assert str(parsed(pipeline.own_presets)["fast"].otherwise) == "H1P3"


@unit
@pytest.mark.parametrize("count", [4, 64, 640])
def test_scales_are_even_and_a_larger_fit_goes_on_with_more(count: int) -> None:
    scales = fit._scales(1.0, 4.0, count)
    assert scales == fit._scales(1.0, 4.0, 2 * count)[:count]
    gaps = np.diff(np.sort([1.0, *scales, 4.0]))
    assert len(scales) == count and max(gaps) < 3 * 2 / count


@unit
@pytest.mark.parametrize(
    ("given", "can_guide", "ranges"),
    [
        (None, True, [(1, 1), (1, 4)]),
        (None, False, [(1, 1)]),
        ([3.0], True, [(3, 3)]),
        ([1.0], True, [(1, 1)]),
        ([2.0, 5.0], True, [(2, 5)]),
    ],
)
def test_ranges_of_scales(given: Any, can_guide: bool, ranges: list[tuple[float, float]]) -> None:
    assert fit.scale_ranges(given, can_guide=can_guide) == ranges


@unit
@pytest.mark.parametrize(
    ("given", "can_guide", "said"),
    [
        ([4.0, 1.0], True, "lowest and the highest, .* got 4 1"),
        ([1.0, 2.0, 3.0], True, "got 1 2 3"),
        ([float("nan")], True, "got nan"),
        ([3.0], False, "cannot be guided"),
    ],
)
def test_impossible_ranges(given: list[float], can_guide: bool, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fit.scale_ranges(given, can_guide=can_guide)


def test_fits_installs_and_serves(golden_repository: Path, tmp_path: Path) -> None:
    """The whole command on a small real network; a second run finds everything done."""
    repository = tmp_path / "models"
    shutil.copytree(golden_repository, repository)
    base = ["--repository", str(repository), "--cache", str(tmp_path / "cache")]
    few = ["--trajectories", "24", "--held-out", "20", "--guidance", "1", "3"]
    assert fit.main([*base, *few, "--evaluations", "3", "4", "--operator", "4"]) == 0
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npz")}
    assert len(made) == 2 * (4 + 4) + 4  # batches of both kinds at both scales, and fits
    pipeline = read_pipeline(repository)
    path = solvers_path(repository, pipeline.name)
    assert pipeline.solvers and pipeline.solvers.counts == [3, 4]
    engine = LocalPipeline(repository)
    start = np.random.default_rng(0).standard_normal((2, *pipeline.latent_shape))
    noise = start.astype(np.float32)
    for scale in (1.0, 2.0):
        asked: dict[str, Any] = {"initial_noise": noise, "guidance_scale": scale}
        exact = engine.generate([0, 1], schedule="H64", **asked).latent
        found = engine.generate([0, 1], schedule="L4", **asked).latent
        beside = engine.generate([0, 1], schedule="E4", **asked).latent
        assert rms(found - exact) < rms(beside - exact)
    before = path.read_bytes()
    assert fit.main([*base, *few, "--evaluations", "3", "4", "--operator", "4"]) == 0
    assert path.read_bytes() == before
    assert made == {path: path.stat().st_mtime_ns for path in made}
    assert pipeline.described(Settings())["solvers"] == {"L3": "1 to 3", "L4": "1 to 3"}


def test_an_export_installs_solvers(golden_repository: Path, tmp_path: Path) -> None:
    """Keeps them, refuses those of other models, and needs those that presets name."""
    repository = tmp_path / "models"
    shutil.copytree(golden_repository, repository)
    pipeline = read_pipeline(repository, solvers=False)
    presets = tmp_path / "presets.json"
    presets.write_text('{"presets": {"fast": {"schedule": "L3", "otherwise": "H3"}}}')
    alone = tmp_path / "alone.json"
    alone.write_text('{"presets": {"fast": {"schedule": "L3"}}}')
    rng = np.random.default_rng(0)
    weights = np.tril(rng.standard_normal((1, 3, 3)))
    made = some_solvers(pipeline, Fit(1.0, 1.0, time_grid(3), weights))
    made.write(tmp_path / "s.npz")

    def export(*words: Any) -> tuple[int, str]:
        done = run_export(*GOLDEN_EXPORT, *words, "--repository", repository)
        return done.returncode, done.stdout + done.stderr

    status, said = export("--presets", alone)
    assert status and "there is no such fitted solver: give --solvers" in said
    assert export("--presets", presets, "--solvers", tmp_path / "s.npz")[0] == 0
    assert read_pipeline(repository).solvers == made
    assert export()[0] == 0
    installed = read_pipeline(repository)
    assert installed.solvers == made and str(installed.find_schedule("fast")) == "L3"
    status, said = export("--ensemble", "L3")
    assert status and "cannot be an ensemble" in said
    replace(made, flow="other").write(tmp_path / "s.npz")
    status, said = export("--solvers", tmp_path / "s.npz")
    assert status and "was fitted to another model than sit" in said
    path = solvers_path(repository, pipeline.name)
    path.write_bytes(b"")
    with pytest.raises(RepositoryError, match="no file of fitted solvers"):
        read_pipeline(repository)
    status, said = export()
    assert not status and "the fitted solvers are dropped" in said
    assert not path.exists() and str(read_pipeline(repository).find_schedule("fast")) == "H3"


def test_the_command_refuses_what_it_cannot_fit(
    golden_repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--repository", str(golden_repository)]
    for given, said in (
        (["--evaluations", "1"], "--evaluations must be 2 to 250, got 1"),
        (["--trajectories", "1"], "--trajectories must be 2 or more"),
        (["--units", "-1"], "--units must be 0 to 1024, got -1"),
        (["--units", "8", "--operator", "0"], "--units must be 0 without an operator, got 8"),
        (["--pipeline", "other"], "has no pipeline 'other'"),
    ):
        assert fit.main([*base, *given]) == 2
        assert said in capsys.readouterr().err
