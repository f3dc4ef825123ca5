"""Does the refiner of fitted solvers pay? `python -m research.fitted_refiner --without FILE`.

A refiner makes a solver nearer to the exact solution, and slower. In the same time a solver without
refiner could have more evaluations. So the two are compared at equal time, whole requests measured
in turns in one process. `--without` has the solvers that were fitted with `--units 0`.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.observe import in_words, processor, write_json
from flowturbo.command import run_command
from flowturbo.errors import FlowTurboError
from flowturbo.pipeline import Pipeline, with_solvers
from flowturbo.solver.guidance import Guidance
from flowturbo.solver.sampler import Array
from flowturbo.solver.schedule import Schedule
from research.quality.engine import Engine, add_exact_arguments, distances, exact_of
from research.quality.evaluate import exact_latents
from research.quality.metrics import half_width, mean_without
from tuning.scores import latents, prepared

_IMAGES = (1, 8)  # of a request that is timed


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2, and one line on stderr, for errors that the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m research.fitted_refiner", description=__doc__)
    add = parser.add_argument
    add_exact_arguments(parser)
    add("--without", type=Path, required=True, help="solver file of fits without refiner")
    add("--evaluations", type=int, nargs="+", default=[4, 6], help="of the solvers with refiner")
    add("--guidance", type=float, nargs="+", default=[1.0, 3.0])
    add("--images", type=int, default=1024, help="for the distances, seeds from 0")
    add("--rounds", type=int, default=40, help="of the times; all solvers take turns")
    add("--work", type=Path, default=Path("runs/solvers"), help="folder for exact solutions")
    add("--json", type=Path, help="default: docs/benchmarks/fitted_refiner_NAME.json")
    args = parser.parse_args(argv)
    return run_command("fitted_refiner", lambda: _run(args), (FlowTurboError, OSError, ValueError))


def _run(args: argparse.Namespace) -> None:
    engine = Engine(args.repository, args.pipeline)
    refined = engine.pipeline
    plain = with_solvers(replace(refined, solvers=None), args.without)
    if refined.solvers is None or plain.solvers is None:
        raise ValueError(f"{args.without} or pipeline {refined.name} has no fitted solvers")
    if any(fit.refiners for fit in plain.solvers.fits):
        raise ValueError(f"{args.without} has refiners: fit it with --units 0")
    exact = exact_of(args.repository, args.pipeline, args.predictor)
    found: dict[str, Any] = {
        "hardware": processor(),
        "precision": refined.precision,
        "images": args.images,
        "rounds": args.rounds,
        "guidance": {},
    }
    path = args.json or Path("docs/benchmarks") / f"fitted_refiner_{args.pipeline}.json"
    for scale in args.guidance:
        solved = exact_latents(exact, engine.subject, Guidance(scale), args.images, args.work)
        with_refiner = _Runs.of(engine, refined, scale, args.evaluations, solved)
        without = _Runs.of(engine, plain, scale, plain.solvers.counts, solved)
        for number in tqdm(range(args.rounds), f"guidance {scale:g}, rounds"):
            _round(with_refiner, without, np.random.default_rng(number))
        found["guidance"][f"{scale:g}"] = {
            f"L{count}": {
                "units": [len(of) for of in refined.solvers.fit_for(count, scale).refiners],
                **_row(with_refiner, without, count),
            }
            for count in args.evaluations
        }
        write_json(found, path)
        path.with_suffix(".md").write_text(markdown(found, args.pipeline))
    print(markdown(found, args.pipeline))


@dataclass
class _Runs:
    """The solvers of one pipeline: distances [n] by evaluations, and how requests are timed."""

    apart: dict[int, Array]
    requests: dict[tuple[int, int], Callable[[], Array]]  # by images and evaluations
    taken: dict[tuple[int, int], list[float]]  # the same way, seconds

    @classmethod
    def of(cls, engine: Engine, pipeline: Pipeline, scale: float, counts: Sequence[int],
           solved: Array) -> "_Runs":  # fmt: skip
        engine.pipeline, guidance = pipeline, Guidance(scale)
        read = {count: Schedule.parse(f"L{count}") for count in counts}
        seeds = range(len(solved))
        apart = {
            count: distances(latents(engine, schedule, guidance, seeds), solved)
            for count, schedule in tqdm(read.items(), f"guidance {scale:g}, distances")
        }
        requests = {
            (images, count): prepared(engine, schedule, guidance, np.arange(images))
            for images in _IMAGES
            for count, schedule in read.items()
        }
        return cls(apart, requests, {key: [] for key in requests})

    def time(self, images: int, count: int) -> None:
        """One more request of the solver with `count` evaluations."""
        began = time.perf_counter()
        self.requests[images, count]()
        self.taken[images, count].append(time.perf_counter() - began)


def _round(refined: _Runs, plain: _Runs, chance: np.random.Generator) -> None:
    """Times each request once, in an order drawn anew: a request is slower after a larger one."""
    for images in _IMAGES:
        turns = [(each, count) for each in (refined, plain) for count in each.apart]
        refined.requests[images, turns[0][1]]()  # warms up: what ran before had other sizes
        for k in chance.permutation(len(turns)):
            each, count = turns[k]
            each.time(images, count)


def _row(refined: _Runs, plain: _Runs, count: int) -> dict[str, Any]:
    """The solver with so many evaluations, with a refiner beside those without."""
    own, same = refined.apart[count], {count: plain.apart[count]}
    at_equal_time = {}
    for images in _IMAGES:
        ms = {each: 1e3 * float(np.median(plain.taken[images, each])) for each in plain.apart}
        slower = np.array(refined.taken[images, count]) / np.array(plain.taken[images, count])
        factor = float(np.median(slower))
        at_equal_time[str(images)] = {
            "ms": factor * ms[count],
            "time": factor,
            "times": np.percentile(slower, [25, 75]).tolist(),
            **compared(own, plain.apart, ms, factor * ms[count]),
        }
    return {
        "distance": float(own.mean()),
        "interval": half_width(mean_without(own)),
        "without": float(plain.apart[count].mean()),
        "equal_evaluations": compared(own, same, {count: 0.0}, 0.0),
        "equal_time": at_equal_time,
    }


def compared(
    own: Array, others: Mapping[int, Array], times: Mapping[int, float], at: float
) -> dict[str, float]:
    """The ratio of the mean distance of `own` to that of the `others` in the time `at`.

    Between two of them the logarithm of the mean distance is linear in the time; beyond the last it
    is that of the last. The interval is paired by seeds.
    """
    names = sorted(others, key=lambda name: times[name])
    known = [times[name] for name in names]

    def ratio(mean: float, of: Sequence[float]) -> float:
        return float(mean / np.exp(np.interp(at, known, np.log(of))))

    without = zip(mean_without(own), *(mean_without(others[name]) for name in names), strict=True)
    return {
        "ratio": ratio(own.mean(), [float(others[name].mean()) for name in names]),
        "interval": half_width(tuple(ratio(mean, of) for mean, *of in without)),
    }


def markdown(found: Mapping[str, Any], name: str) -> str:
    """The report."""
    rows = [row for of in found["guidance"].values() for row in of.values()]
    units = sorted({count for row in rows for count in row["units"]})
    lines = [
        f"# The refiner of learned solvers, {name}",
        "",
        f"Models in {found['precision']}, {in_words(found['hardware'])}. Refiners of "
        f"{' or '.join(map(str, units))} units. `python -m research.fitted_refiner --pipeline "
        f"{name} --without FILE` measures this again; FILE is what `tuning.fit --units 0` wrote.",
        "",
        f"- **Distance**: of latents to the exact solution in float32, mean over {found['images']} "
        "images.",
        "- **Time**: of a request with refiner, in parts of the same without; the middle half of "
        f"{found['rounds']} rounds in brackets.",
        "- **Ratio** to the distance of the solver without refiner: below 1 the refiner wins. At "
        "equal time the solver without refiner has as many evaluations more as take the refiner's "
        "time, interpolated. Intervals are 95%, paired by seed.",
        "",
        "| guidance | solver | distance, without | with refiner | ratio | time, 1 image | ratio, "
        "equal time | time, 8 images | ratio, equal time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for scale, of_scale in found["guidance"].items():
        for solver, row in of_scale.items():
            cells = [
                scale,
                solver,
                f"{row['without']:.4f}",
                f"{row['distance']:.4f} ± {row['interval']:.4f}",
                _ratio(row["equal_evaluations"]),
            ]
            for images in map(str, _IMAGES):
                of = row["equal_time"][images]
                low, high = of["times"]
                cells += [f"{of['time']:.3f} ({low:.3f} to {high:.3f})", _ratio(of)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _ratio(of: Mapping[str, float]) -> str:
    return f"{of['ratio']:.2f} ± {of['interval']:.2f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
