"""Fits solvers to a deployed pipeline: `python -m tuning.fit --pipeline NAME --evaluations 4 6`.

Makes exact trajectories with the deployed predictor, or with its checkpoint in float32
(`--predictor`). Then it finds a time grid and coefficients for each number of evaluations, and
trains a small refiner for the last two steps. The solvers are installed beside the pipeline, and
requests name them L4, L6. Trajectories and finished fits are kept in `--cache`: a fit that was
stopped goes on from there.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from bench.observe import hardware, in_words, write_json
from flowturbo.command import run_command
from flowturbo.errors import FlowTurboError, RepositoryError
from flowturbo.latents import noise
from flowturbo.pipeline import Pipeline, solvers_path, with_solvers
from flowturbo.solver.guidance import MAX_SCALE, Guidance
from flowturbo.solver.operator import SIDES
from flowturbo.solver.program import compile_program
from flowturbo.solver.sampler import Array, sample
from flowturbo.solver.schedule import MAX_STEPS, Schedule
from flowturbo.solvers import Fit, Solvers
from flowturbo.textfile import read_json
from research.quality.engine import Engine, Exact, distances
from research.quality.metrics import half_width, mean_without
from research.quality.subjects import Prompts
from tuning.grids import best_grid
from tuning.learned import Rollout, Step, Task, refined_grid
from tuning.refiner import refined
from tuning.trajectories import NODES, Trajectories, Velocity, gram, halvings, integrate

# The seeds of trajectories come after these: measurements and examples count from 0.
_FITTED, _HELD_OUT = 10_000_000, 20_000_000
_VERSION = 2  # of the fits and trajectories that are kept: their form and how they are made
BATCH = 32  # trajectories that are evaluated together, at one guidance scale
_BATCHES = 4  # at least, so that a range of scales has several
_CHECKED = 16  # trajectories whose steps are halved, to see how exact they are
_EXACT = 0.02  # RMS: what halved steps may change, else all trajectories take more steps
_PARTS = (1, 2, 4)  # of a step between nodes
_GRAM, _FEW = 512, 256  # trajectories for both searches of the grid
_GRIDS = 1024  # for the choice between what they found
_LINEAR = 2048  # for weights and operators: more bring 0.3%, only refiners need them
_GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples, modulo 1, are spread the most evenly
REFINED = 2  # last steps of a solver that have a refiner
UNITS, MAX_UNITS = 64, 1024  # of a refiner
T = TypeVar("T", Trajectories, Rollout)
BESIDE = "A{}@3"  # the schedule that a fit is compared with


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2, and one line on stderr, for errors that the user can fix."""
    args = _parser().parse_args(argv)
    errors = (FlowTurboError, OSError, ValueError)
    return run_command("fit", lambda: print(_run(args)), errors)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tuning.fit", description=__doc__)
    add = parser.add_argument
    add("--repository", type=Path, default=Path("model_repository"))
    add("--pipeline", help="pipeline of the repository (default: its default)")
    add("--evaluations", type=int, nargs="+", default=[3, 4, 5, 6, 8])
    add(
        "--guidance",
        type=float,
        nargs="+",
        help="one scale, or the lowest and the highest; 1 is also fitted alone (default: 1 to 4, "
        "or 1 where guidance is impossible)",
    )
    add("--trajectories", type=int, default=2048, help="per range of scales (default: 2048)")
    add("--held-out", type=int, help="more, for the errors stated (default: 256, fewer for few)")
    add(
        "--operator",
        type=int,
        default=4,
        choices=(0, *SIDES),
        help="windows of the linear operator in latent pixels, 0 for none (default: 4)",
    )
    add(
        "--units",
        type=int,
        help=f"of the refiner in the last {REFINED} steps, 0 for none (default: {UNITS}, 0 without "
        "an operator)",
    )
    add("--prompts", type=Path, help="texts to fit to, one per line (default: the scenes model's)")
    add("--predictor", type=Path, help="checkpoint (default: the deployed predictor)")
    add("--cache", type=Path, default=Path("runs/fit"), help="folder for trajectories and fits")
    add("--out", type=Path, help="solver file (default: installed beside the pipeline)")
    return parser


def _run(args: argparse.Namespace) -> str:
    """Fits and installs; returns the report."""
    engine = Engine(args.repository, args.pipeline, solvers=False)
    if args.prompts:
        engine.subject = Prompts.of_file(args.prompts)
    pipeline = engine.pipeline
    ranges = scale_ranges(args.guidance, can_guide=pipeline.condition.can_guide)
    units = (UNITS if args.operator else 0) if args.units is None else args.units
    _check(args, units, pipeline)
    held_out = args.held_out or max(1, min(256, args.trajectories // 8))
    path = args.out or solvers_path(args.repository, pipeline.name)
    exact = args.predictor and Exact.of_repository(args.predictor, args.repository, pipeline.name)
    source = Source(engine, exact, args.cache)
    former = _former(pipeline, path)
    began, done = time.monotonic(), []
    for low, high in ranges:
        batches = source.batches(low, high, args.trajectories, held_out)
        for count in args.evaluations:
            task = Task((low, high), args.operator, units)
            done.append(source.fit(count, task, *batches))
            former.joined(done).write(path)
    lines = [report(done), f"{in_words(hardware())}. {time.monotonic() - began:.0f} s in all"]
    lines += source.accuracies
    if source.seconds:
        lines.append(f"{source.seconds / source.made:.2f} s per trajectory ({source.made} made)")
    return "\n".join([*lines, f"written to {path}: start the service again to use it"])


def _former(pipeline: Pipeline, path: Path) -> Solvers:
    """The solvers in the file, which others join; none if it has none of this model."""
    nothing = Solvers(pipeline.flow, pipeline.latent_shape, ())
    try:
        return with_solvers(pipeline, path).solvers or nothing
    except RepositoryError as error:
        print(f"fit: {path} is replaced: {error}", file=sys.stderr)
        return nothing


def scale_ranges(given: Sequence[float] | None, *, can_guide: bool) -> list[tuple[float, float]]:
    """The ranges of guidance scales to fit; scale 1 is one of its own.

    Raises ValueError.
    """
    scales = list(given or ([1.0, 4.0] if can_guide else [1.0]))
    low, high = scales[0], scales[-1]
    if len(scales) > 2 or not all(0 <= s <= MAX_SCALE for s in scales) or low > high:
        raise ValueError(
            f"--guidance must be one scale, or the lowest and the highest, 0 to {MAX_SCALE:g}, got "
            f"{' '.join(f'{scale:g}' for scale in scales)}"
        )
    if set(scales) != {1.0} and not can_guide:
        raise ValueError("--guidance must be 1: the pipeline cannot be guided")
    alone = [(1.0, 1.0)] if low <= 1 <= high else []
    return alone if low == high == 1 else [*alone, (low, high)]


def _check(args: argparse.Namespace, units: int, pipeline: Pipeline) -> None:
    if pipeline.solver_steps:
        raise ValueError(
            f"pipeline {pipeline.name} is step-distilled, its steps are {pipeline.solver_steps}"
        )
    for count in args.evaluations:
        if not 2 <= count <= MAX_STEPS:
            raise ValueError(f"--evaluations must be 2 to {MAX_STEPS}, got {count}")
    _, height, width = pipeline.latent_shape
    if args.operator == 4 and (height % 2 or width % 2):
        raise ValueError(f"--operator 4 needs even latents, these are {height} x {width}: take 1")
    if not 0 <= units <= MAX_UNITS:
        raise ValueError(f"--units must be 0 to {MAX_UNITS}, got {units}")
    if units and not args.operator:
        raise ValueError(f"--units must be 0 without an operator, got {units}")
    if args.trajectories < 2 or (args.held_out is not None and args.held_out < 1):
        raise ValueError("--trajectories must be 2 or more, --held-out 1 or more")


@dataclass
class Source:
    """Trajectories and fits of one pipeline; both are kept in `cache`."""

    engine: Engine
    exact: Exact | None
    cache: Path
    made: int = 0
    seconds: float = 0.0
    accuracies: list[str] = field(default_factory=list)  # of the trajectories of each range

    def batches(
        self, low: float, high: float, count: int, held_out: int
    ) -> tuple[list[Trajectories], list[Trajectories]]:
        """`count` trajectories at scales from `low` to `high`, and `held_out` others."""
        found: list[list[Trajectories]] = []
        name = f"trajectories, guidance {low:g}" + (f" to {high:g}" if high > low else "")
        parts = self.parts(high, min(_CHECKED, max(1, count // 8)))
        with tqdm(total=count + held_out, desc=name) as bar:
            for last, total in ((_FITTED, count), (_HELD_OUT, held_out)):
                found.append([])
                sizes = _sizes(total)
                for size, scale in zip(sizes, _scales(low, high, len(sizes)), strict=True):
                    seeds = np.arange(last + 1, last + 1 + size)
                    found[-1].append(self._kept(seeds, scale, parts))
                    last += size
                    bar.update(size)
        return found[0], found[1]

    @property
    def _folder(self) -> Path:
        kind = f"{self.exact.digest}_float32" if self.exact else self.engine.pipeline.precision
        pipeline, suffix = self.engine.pipeline, self.engine.subject.suffix
        shape = "x".join(map(str, pipeline.latent_shape))
        return self.cache / f"v{_VERSION}_{pipeline.flow}_{shape}_{kind}{suffix}"

    def parts(self, scale: float, count: int) -> int:
        """Into how many parts steps of trajectories are divided, so that they are exact enough."""
        path = self._folder / f"parts_{count}_g{scale!r}.json"
        if path.is_file():
            kept = read_json(path)
        else:
            parts, off = self._exact_enough(np.arange(_FITTED, _FITTED + count), scale)
            kept = {"parts": parts, "off": off}
            write_json(kept, path)
        said = (
            f"trajectories at guidance {scale:g}: {kept['parts'] * (len(NODES) - 1)} steps; halved "
            f"steps move their ends by {kept['off']:.4f}"
        )
        if kept["off"] > _EXACT:
            said += f", more than {_EXACT}: solvers cannot be nearer to exact than about that"
            print(f"fit: {said}", file=sys.stderr)
        self.accuracies.append(said)
        return int(kept["parts"])

    def _exact_enough(self, seeds: Array, scale: float) -> tuple[int, float]:
        """So many parts, and how far halved steps move the ends of these trajectories."""
        velocity = self._velocity(seeds, scale)
        start = noise(seeds, self.engine.pipeline.latent_shape)
        with tqdm(desc=f"steps at guidance {scale:g}, evaluations", leave=False) as bar:

            def shown(x: Array, t: float) -> Array:
                bar.update(len(x))
                return velocity(x, t)

            tried = zip(_PARTS, halvings(shown, start), strict=False)
            return next((k, off) for k, off in tried if off <= _EXACT or k == _PARTS[-1])

    def _kept(self, seeds: Array, scale: float, parts: int) -> Trajectories:
        folder = self._folder
        path = folder / f"{seeds[0]}_{len(seeds)}_{parts}_g{scale!r}.npz"
        if path.is_file():
            return Trajectories.read(path)
        began = time.monotonic()
        shape = self.engine.pipeline.latent_shape
        velocity = self._velocity(seeds, scale)
        made = Trajectories(seeds, scale, *integrate(velocity, noise(seeds, shape), parts))
        self.seconds += time.monotonic() - began
        self.made += len(seeds)
        folder.mkdir(parents=True, exist_ok=True)
        made.write(path)
        return made

    def _velocity(self, seeds: Array, scale: float) -> Velocity:
        if self.exact:
            return self.exact.velocity(self.engine.subject, seeds, Guidance(scale))
        return self.engine.velocity(seeds, Guidance(scale))

    def start(self, batch: Trajectories) -> Rollout:
        """The rollout of a batch, at the noise."""
        return Rollout.start(batch, self._velocity(batch.seeds, batch.scale))

    def fit(
        self,
        evaluations: int,
        task: Task,
        fitted: Sequence[Trajectories],
        others: Sequence[Trajectories],
    ) -> Fit:
        """The solver for so many evaluations, with its error on `others`."""
        low, high = task.scales
        counts = f"{sum(map(len, fitted))}_{sum(map(len, others))}"
        kind = f"{task.side}_{task.units}"
        path = self._folder / f"L{evaluations}_g{low!r}to{high!r}_{kind}_{counts}.npz"
        pipeline = self.engine.pipeline
        if path.is_file():
            return Solvers.read(path).fits[0]
        made = self._fitted(evaluations, task, fitted, others)
        Solvers(pipeline.flow, pipeline.latent_shape, (made,)).write(path)
        return made

    def _fitted(
        self,
        evaluations: int,
        task: Task,
        fitted: Sequence[Trajectories],
        others: Sequence[Trajectories],
    ) -> Fit:
        def rollouts(batches: Sequence[Trajectories]) -> list[Rollout]:
            return [self.start(each) for each in batches]

        name, few = f"L{evaluations}", rollouts(_first(fitted, _FEW))
        coarse = best_grid(evaluations, gram(_first(fitted, _GRAM)))
        with tqdm(desc=f"{name}, grid, evaluations", leave=False) as bar:
            grids = coarse, refined_grid(coarse, few, task.scales, bar.update)
        some = rollouts(_first(fitted, _GRIDS))
        every = rollouts([*fitted, *others])
        counts = len(grids) * sum(map(len, some)) + sum(map(len, every))
        with tqdm(total=evaluations * counts, desc=f"{name}, fit, evaluations", leave=False) as bar:

            def on(times: Sequence[float], of: Sequence[Rollout], count: int, units: int) -> Any:
                return fit_steps(times, replace(task, units=units), of, count, bar.update)

            # The refined grid is the better one without operators, not always with them.
            errors = [_mean_distance(on(times, some, len(some), 0)[1]) for times in grids]
            times = grids[int(np.argmin(errors))]
            steps, ends = on(times, every, len(fitted), task.units)
        held = ends[len(fitted) :]
        weights = np.zeros((len(steps[0].weights), evaluations, evaluations))
        for k, step in enumerate(steps):
            weights[:, k, : k + 1] = step.weights
        matrices = tuple(step.matrix for step in steps if step.matrix is not None)
        refiners = tuple(step.refiner for step in steps if step.refiner is not None)
        apart = np.concatenate([rollout.distances for rollout in held])
        beside = np.concatenate([self._beside(evaluations, rollout) for rollout in held])
        figures = {"trajectories": sum(map(len, fitted)), **_compared(apart, beside)}
        return Fit(*task.scales, times, weights, matrices, refiners, task.side or 1, figures)

    def _beside(self, evaluations: int, rollout: Rollout) -> Array:
        """The distances of the schedule to compare with."""
        program = compile_program(Schedule.parse(BESIDE.format(evaluations)))

        def block(call: Any, x: Array, v: Array) -> tuple[Array, Array]:
            v_next = rollout.velocity(x, call.t)
            return (x + call.w_prev * v + call.w_next * v_next).astype(np.float32), v_next

        start = rollout.exact.x[0].astype(np.float32)
        return distances(sample(program, start, block), rollout.exact.state(1.0))


def fit_steps(
    times: Sequence[float],
    task: Task,
    rollouts: Sequence[Rollout],
    fitted: int,
    progress: Callable[[int], object] = lambda count: None,
) -> tuple[list[Step], list[Rollout]]:
    """The steps on the grid `times`, and all `rollouts` at the end of it; they start at the noise.

    The first `fitted` of them determine the steps: all of them refiners, _LINEAR trajectories the
    linear parts. The last REFINED steps have a refiner if the task has units. `progress` is called
    with the trajectories that were evaluated.
    """
    steps: list[Step] = []
    moved, last = list(rollouts), len(times) - 1 - REFINED
    for number, (t, end) in enumerate(zip(times[:-1], times[1:], strict=True)):
        for k, rollout in enumerate(moved):
            moved[k] = rollout.evaluate(t)
            progress(len(rollout))
        step = task.fit(_first(moved[:fitted], _LINEAR), end)
        if task.units and number >= last:
            name = f"refiner of step {number + 1}"
            step = refined(moved[:fitted], step, task, end, name)
        steps.append(step)
        moved = [task.moved(rollout, steps[-1]) for rollout in moved]
    return steps, moved


def _mean_distance(rollouts: Sequence[Rollout]) -> float:
    return float(np.concatenate([rollout.distances for rollout in rollouts]).mean())


def _sizes(count: int) -> list[int]:
    """The sizes of batches of `count` trajectories together: several, for several scales."""
    most = min(BATCH, max(1, count // _BATCHES))
    return [min(most, count - k) for k in range(0, count, most)]


def _scales(low: float, high: float, count: int) -> list[float]:
    """`count` scales evenly over the range, the first ones too: a larger fit goes on with more."""
    return [low + (high - low) * (_GOLDEN * (k + 1) % 1) for k in range(count)]


def _first(batches: Sequence[T], count: int) -> list[T]:
    """So many batches that they have `count` trajectories, if there are as many."""
    before = np.cumsum([0, *(len(batch) for batch in batches)])
    return [batch for batch, taken in zip(batches, before, strict=False) if taken < count]


def _compared(off: Array, beside: Array) -> dict[str, Any]:
    """Mean distances of held-out trajectories, with 95% intervals where there are enough."""
    change = off - beside
    enough = len(off) >= 20
    return {
        "held_out": len(off),
        "distance": float(off.mean()),
        "interval": half_width(mean_without(off)) if enough else None,
        "beside": float(beside.mean()),
        "change": float(change.mean()),
        "change_interval": half_width(mean_without(change)) if enough else None,
    }


def report(fits: Sequence[Fit]) -> str:
    """What was fitted, as a table in Markdown."""
    rows = [
        "| solver | guidance | distance | A@3 | ratio | change, paired | times |",
        "|---|---|---|---|---|---|---|",
    ]
    for fit in fits:
        of = fit.figures
        scales = f"{fit.low:g}" if fit.low == fit.high else f"{fit.low:g} to {fit.high:g}"
        times = " ".join(f"{t:.3f}" for t in fit.times)
        rows.append(
            f"| L{fit.evaluations} | {scales} | {of['distance']:.4f}{_plus(of['interval'])} | "
            f"{of['beside']:.4f} | {of['distance'] / of['beside']:.2f} | "
            f"{of['change']:+.4f}{_plus(of['change_interval'])} | {times} |"
        )
    return "\n".join(rows)


def _plus(interval: float | None) -> str:
    return "" if interval is None or not math.isfinite(interval) else f" ± {interval:.4f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
