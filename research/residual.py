"""Does a small network pay beside a fitted solver? `python -m research.residual --pipeline NAME`.

FlowTurbo's refiner takes the predictor's place in the last steps. This refiner is another one: it
adds a residual to the last steps of a fitted solver L. Its output layer starts at zero. It is
trained step after step on the states that the solver and the steps before it reach, towards the
exact trajectory.

Each refined step adds its measured time to that of the predictor. In the same time a fitted solver
could have more evaluations. The refined solver is compared with that one. Its distance is
interpolated between two numbers of evaluations.
"""

import argparse
import copy
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from bench.observe import hardware, in_words, write_json
from flowturbo.command import run_command
from flowturbo.conditions.class_label import LABEL
from flowturbo.errors import FlowTurboError
from flowturbo.latents import noise
from flowturbo.runtimes import open_model
from flowturbo.solver.guidance import Guidance
from flowturbo.solver.sampler import Array
from flowturbo.solvers import Fit
from flowturbo.textfile import read_json
from research.quality.engine import BATCH, Engine, add_exact_arguments, distances, exact_of
from research.quality.evaluate import exact_latents
from research.quality.metrics import half_width, mean_without
from tuning.fit import Source
from tuning.learned import Rollout, Step, Task
from tuning.trajectories import Trajectories

REFINED = {4: 2, 6: 3}  # evaluations: the last steps that are refined
_FITTED = 2048  # trajectories for the base of a step after a refined one
_VALIDATION = 1024  # trajectories that choose the weights of a network
_DIFFERENCES = 4  # of velocities that the mixer reads
_SOFT = 0.3  # of the loss, as in the fit of solvers
_CHECKS = 8  # per training
_READ = ("states", "scale", LABEL)  # the inputs of a network, in order
_TIMED = (1, 8)  # images
_ROUNDS = 40  # of timing; predictor and network take turns


class Windows(nn.Module):
    """A perceptron over the operator's windows: 4 x 4 pixels of the state and all velocities.

    The operator is linear in them. This adds a hidden layer, and the scale as a feature.
    """

    def __init__(self, channels: int, velocities: int, labels: int, hidden: int = 192) -> None:
        super().__init__()
        self.enter = nn.Linear((velocities + 1) * channels * 16 + 1, hidden)
        self.label = nn.Embedding(max(1, labels), hidden)
        self.middle = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, channels * 4)
        for each in (self.label, self.out):
            nn.init.zeros_(each.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, states: torch.Tensor, scale: torch.Tensor, label: torch.Tensor) -> Any:
        """The residual [n, C, h, w] of `states` [n, 1 + velocities, C, h, w], the state first."""
        n, _, channels, height, width = states.shape
        windows = nn.functional.unfold(states.flatten(1, 2), 4, padding=1, stride=2)
        rows = windows.transpose(1, 2)
        scales = scale.view(n, 1, 1).expand(n, rows.shape[1], 1)
        hidden = self.enter(torch.cat([rows, scales], 2)) + self.label(label)[:, None]
        hidden = nn.functional.silu(hidden)
        hidden = hidden + nn.functional.silu(self.middle(hidden))
        return _unpatched(self.out(hidden), channels, height, width)


class Mixer(nn.Module):
    """Two blocks of depthwise convolution and perceptron on patches of 2 x 2 pixels."""

    def __init__(self, channels: int, velocities: int, labels: int, width: int = 64) -> None:
        super().__init__()
        self.differences = min(_DIFFERENCES, velocities)
        self.enter = nn.Conv2d((1 + self.differences) * channels, width, 2, stride=2)
        self.condition = nn.Linear(1, width)
        self.label = nn.Embedding(max(1, labels), width)
        self.mix = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in "12")
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in "12")
        self.adapt = nn.ModuleList(nn.Linear(width, 2 * width) for _ in "12")
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in "12")
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in "12")
        self.out = nn.Linear(width, channels * 4)
        for each in (self.out, *self.adapt):
            nn.init.zeros_(each.weight)
            nn.init.zeros_(each.bias)
        nn.init.zeros_(self.label.weight)

    def forward(self, states: torch.Tensor, scale: torch.Tensor, label: torch.Tensor) -> Any:
        """The residual [n, C, h, w] of `states` [n, 1 + velocities, C, h, w], the state first."""
        channels, height, width = states.shape[2:]
        read, velocity = [states[:, 0]], states[:, 1:]
        for k in range(self.differences):
            read.append(velocity[:, -1] if k == 0 else 3**k * velocity[:, -1])
            velocity = velocity[:, 1:] - velocity[:, :-1]
        x = self.enter(torch.cat(read, 1))
        condition = nn.functional.silu(self.condition(scale.view(-1, 1)) + self.label(label))
        for mix, norm, adapt, up, down in zip(
            self.mix, self.norm, self.adapt, self.up, self.down, strict=True
        ):
            x = x + mix(x)
            factor, shift = adapt(condition)[:, None, None].chunk(2, -1)
            rows = norm(x.permute(0, 2, 3, 1)) * (1 + factor) + shift
            rows = down(nn.functional.gelu(up(rows), approximate="tanh"))
            x = x + rows.permute(0, 3, 1, 2)
        rows = self.out(x.permute(0, 2, 3, 1).flatten(1, 2))
        return _unpatched(rows, channels, height, width)


NETWORKS: dict[str, Callable[..., nn.Module]] = {"windows": Windows, "mixer": Mixer}


def _unpatched(rows: torch.Tensor, channels: int, height: int, width: int) -> torch.Tensor:
    """[n, patches, 4 C] to [n, C, h, w]."""
    parts = rows.view(-1, height // 2, width // 2, channels, 2, 2)
    return parts.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)


@dataclass(frozen=True)
class Inputs:
    """What a network reads, and `target` [n, C, h, w], what the step of the solver leaves."""

    states: Array  # [n, 1 + velocities, C, h, w] float16
    scale: Array  # [n], from -1 to 1 over the range
    label: Array  # [n]
    target: Array

    @classmethod
    def of(cls, engine: Engine, scales: tuple[float, float], rollouts: Sequence[Rollout],
           targets: Sequence[Array]) -> "Inputs":  # fmt: skip
        """The inputs of all `rollouts` together."""
        low, high = scales
        parts, scale, label = [], [], []
        for rollout in rollouts:
            each = rollout.exact
            parts.append(np.stack([rollout.x, *rollout.velocities], 1).astype(np.float16))
            at = (2 * each.scale - low - high) / (high - low) if high > low else 0.0
            scale.append(np.full(len(each), at, np.float32))
            label.append(_labels(engine, each.seeds))
        return cls(*(np.concatenate(part) for part in (parts, scale, label, targets)))

    def __len__(self) -> int:
        return len(self.target)

    def rows(self, which: Any) -> list[torch.Tensor]:
        """The inputs of some rows, as float32, and their targets."""
        states, target = (torch.from_numpy(of[which].astype(np.float32))
                          for of in (self.states, self.target))  # fmt: skip
        scale, label = (torch.from_numpy(of[which]) for of in (self.scale, self.label))
        return [states, scale, label, target]


@dataclass(frozen=True)
class Residual:
    """A trained network; its output counts `size`."""

    network: nn.Module
    size: float

    @torch.inference_mode()
    def __call__(self, given: Inputs, rows: int = 256) -> Array:
        found = [
            self.network(*given.rows(slice(k, k + rows))[:3]) for k in range(0, len(given), rows)
        ]
        return self.size * torch.cat(found).numpy()


def trained(kind: str, given: Inputs, labels: int, steps: int, batch: int, name: str) -> Residual:
    """The network with the best validation error; the last rows are for validation."""
    torch.manual_seed(0)
    velocities, channels = given.states.shape[1] - 1, given.states.shape[2]
    network = NETWORKS[kind](channels, velocities, labels)
    held = min(_VALIDATION, len(given) // 8)
    fitted = len(given) - held
    size = float(np.sqrt(np.square(given.target[:fitted]).mean()))
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.05)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 2e-5)
    chance = np.random.default_rng(0)
    validation = replace(given, **{
        each.name: getattr(given, each.name)[fitted:] for each in fields(Inputs)
    })  # fmt: skip

    def error() -> float:
        made = Residual(average, size)(validation)
        return float(distances(made, validation.target).mean())

    best = error(), copy.deepcopy(average)
    with tqdm(total=steps, desc=name) as bar:
        order: list[Array] = []
        for step in range(steps):
            if not order:
                mixed = chance.permutation(fitted)
                order = [mixed[k : k + batch] for k in range(0, fitted - batch + 1, batch)]
            states, scale, label, target = given.rows(np.sort(order.pop()))
            off = (network(states, scale, label) - target / size).square().mean((1, 2, 3))
            weight = 1 / ((target / size).square().mean((1, 2, 3)).sqrt() + _SOFT)
            optimizer.zero_grad()
            (off * weight).mean().backward()
            optimizer.step()
            decay.step()
            with torch.no_grad():
                for mean, now in zip(average.parameters(), network.parameters(), strict=True):
                    mean.lerp_(now, max(0.01, 1 / (step + 1)))
            bar.update()
            if (step + 1) % (steps // _CHECKS) == 0 and (found := error()) < best[0]:
                best = found, copy.deepcopy(average)
                before = float(distances(0 * validation.target, validation.target).mean())
                bar.set_postfix(left=f"{found / before:.3f}")
    return Residual(best[1].eval(), size)


def _labels(engine: Engine, seeds: Array) -> Array:
    labels = engine.subject.labels(seeds)
    return np.zeros(len(seeds), np.int64) if labels is None else labels


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2, and one line on stderr, for errors that the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m research.residual", description=__doc__)
    add = parser.add_argument
    add_exact_arguments(parser)
    add("--evaluations", type=int, nargs="+", default=[4, 6], choices=list(REFINED))
    add("--guidance", type=float, nargs="+", default=[1.0], help="one scale, or a range")
    add("--at", type=float, nargs="+", help="scales that are measured (default: the first)")
    add("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    add("--trajectories", type=int, default=20_000)
    add("--steps", type=int, default=1600, help="of each training")
    add("--batch", type=int, default=256)
    add("--images", type=int, default=1024, help="for the distances, seeds from 0")
    add("--cache", type=Path, default=Path("runs/fit"), help="folder for trajectories")
    add("--work", type=Path, default=Path("runs/solvers"), help="folder for exact solutions")
    add("--json", type=Path, help="default: docs/benchmarks/residual_NAME.json; others join it")
    args = parser.parse_args(argv)
    return run_command("residual", lambda: _run(args), (FlowTurboError, OSError, ValueError))


def _run(args: argparse.Namespace) -> None:
    engine = Engine(args.repository, args.pipeline)
    low, high = args.guidance[0], args.guidance[-1]
    exact = exact_of(args.repository, args.pipeline, args.predictor)
    tests = {
        scale: exact_latents(exact, engine.subject, Guidance(scale), args.images, args.work)
        for scale in args.at or [low]
    }
    source = Source(engine, None, args.cache)
    every, _ = source.batches(low, high, args.trajectories, 1)
    solver = {scale: _solver(engine, scale, solved, (low, high)) for scale, solved in tests.items()}
    found = []
    for evaluations in args.evaluations:
        for kind in args.networks:
            ends, costs = _refined(args, engine, (low, high), evaluations, kind, source, every)
            for scale, solved in tests.items():
                apart = distances(ends[scale], solved)
                said = compared(evaluations, apart, solver[scale], costs[scale])
                found.append({"network": kind, "guidance": scale, "fitted": [low, high], **said})
                print(found[-1])
                _write(args, engine, found)


def _solver(
    engine: Engine, scale: float, solved: Array, scales: tuple[float, float]
) -> dict[int, Array]:
    """The distances [n] of each fitted solver of these scales, by its evaluations."""
    found = {}
    for fit in _fits(engine):
        if (fit.low, fit.high) != scales:
            continue
        batches, task = _tests(engine, scale, len(solved)), Task(scales, fit.side)
        for k, t in enumerate(fit.times[:-1]):
            batches = [task.moved(rollout.evaluate(t), _step(fit, k)) for rollout in batches]
        found[fit.evaluations] = distances(np.concatenate([each.x for each in batches]), solved)
    return found


def _fits(engine: Engine) -> tuple[Fit, ...]:
    return engine.pipeline.solvers.fits if engine.pipeline.solvers else ()


def _fit(engine: Engine, evaluations: int, scales: tuple[float, float]) -> Fit:
    """The fit of exactly these scales."""
    for fit in _fits(engine):
        if (fit.evaluations, fit.low, fit.high) == (evaluations, *scales):
            return fit
    raise ValueError(f"pipeline {engine.pipeline.name} has no L{evaluations} for {scales}")


def _step(fit: Fit, k: int) -> Step:
    """Step `k` of a fitted solver."""
    return Step(fit.weights[:, k, : k + 1], fit.operators[k] if fit.operators else None)


def _tests(engine: Engine, scale: float, count: int) -> list[Rollout]:
    """Seeds from 0, at the noise."""
    found, shape = [], engine.pipeline.latent_shape
    for start in range(0, count, BATCH):
        seeds = np.arange(start, min(start + BATCH, count))
        x = noise(seeds, shape)
        velocity = engine.velocity(seeds, Guidance(scale))
        found.append(Rollout.start(Trajectories(seeds, scale, x[None], x[None]), velocity))
    return found


def _refined(
    args: argparse.Namespace,
    engine: Engine,
    scales: tuple[float, float],
    evaluations: int,
    kind: str,
    source: Source,
    every: Sequence[Trajectories],
) -> tuple[dict[float, Array], dict[float, dict[int, float]]]:
    """The test latents by scale, and what all networks cost by images, in evaluations."""
    fit, last = _fit(engine, evaluations, scales), REFINED[evaluations]
    task = Task(scales, fit.side)
    rollouts = [source.start(each) for each in every]
    tests = {scale: _tests(engine, scale, args.images) for scale in args.at or scales[:1]}
    costs: dict[float, list[Mapping[int, float]]] = {scale: [] for scale in tests}
    classes = getattr(engine.subject, "count", 0)
    for k, (t, end) in enumerate(zip(fit.times[:-1], fit.times[1:], strict=True)):
        name = f"L{evaluations}, step {k + 1}"
        rollouts = [each.evaluate(t) for each in tqdm(rollouts, name, leave=False)]
        tests = {scale: [each.evaluate(t) for each in of] for scale, of in tests.items()}
        step = _step(fit, k)
        if k > evaluations - last:  # the states are nearer than those that it was fitted on
            step = task.fit(rollouts[: -(-_FITTED // len(every[0]))], end)
        moved = [task.moved(each, step) for each in rollouts]
        moved_tests = {
            scale: [task.moved(each, step) for each in of] for scale, of in tests.items()
        }
        if k >= evaluations - last:
            left = [r.exact.state(end) - m.x for r, m in zip(rollouts, moved, strict=True)]
            given = Inputs.of(engine, scales, rollouts, left)
            made = trained(kind, given, classes, args.steps, args.batch, f"{name}, {kind}")
            moved = _added(moved, made(given))
            for scale, of in moved_tests.items():
                before = tests[scale]
                zero = [np.zeros_like(each.x) for each in of]
                moved_tests[scale] = _added(of, made(Inputs.of(engine, scales, before, zero)))
                costs[scale].append(cost(engine, made, given, Guidance(scale)))
        rollouts, tests = moved, moved_tests
    ends = {scale: np.concatenate([each.x for each in of]) for scale, of in tests.items()}
    summed = {
        scale: {images: float(sum(each[images] for each in of)) for images in _TIMED}
        for scale, of in costs.items()
    }
    return ends, summed


def _added(rollouts: Sequence[Rollout], change: Array) -> list[Rollout]:
    found, start = [], 0
    for rollout in rollouts:
        stop = start + len(rollout.x)
        found.append(replace(rollout, x=(rollout.x + change[start:stop]).astype(np.float32)))
        start = stop
    return found


def cost(engine: Engine, made: Residual, given: Inputs, guidance: Guidance) -> dict[int, float]:
    """The time of a network for so many images, in parts of the predictor's; medians."""
    precision = engine.pipeline.precision
    example = tuple(given.rows(slice(0, 4))[:3])
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "residual.onnx"
        rows = torch.export.Dim("rows")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                made.network.eval(), example, dynamo=True, verbose=False,
                input_names=[*_READ],
                dynamic_shapes=({0: rows}, {0: rows}, {0: rows}),
            )  # fmt: skip
        assert program is not None
        program.save(str(path))
        runtime = engine.pipeline.runtime
        model = open_model(path, precision, runtime=runtime, fixed_rows=_TIMED)  # as the predictor
        for images in _TIMED:
            seeds = np.arange(images)
            velocity = engine.velocity(seeds, guidance)
            x = noise(seeds, engine.pipeline.latent_shape)
            read = [of.numpy() for of in given.rows(slice(0, images))[:3]]
            inputs = dict(zip(_READ, read, strict=True))
            taken: dict[str, list[float]] = {"network": [], "predictor": []}
            for _ in range(_ROUNDS):
                for name, call in (
                    ("network", lambda inputs=inputs: model(inputs)),
                    ("predictor", lambda velocity=velocity, x=x: velocity(x, 0.5)),
                ):
                    started = time.perf_counter()
                    call()
                    taken[name].append(time.perf_counter() - started)
            found[images] = float(np.median(taken["network"]) / np.median(taken["predictor"]))
    return found


def compared(
    evaluations: int, own: Array, solver: Mapping[int, Array], costs: Mapping[int, float]
) -> dict[str, Any]:
    """Mean distance, and its ratio to those of fitted solvers: at equal evaluations and time.

    Between numbers of evaluations the logarithm of a solver's mean distance is linear. Intervals
    are paired by seed.
    """
    counts = sorted(solver)
    means = {count: mean_without(solver[count]) for count in counts}
    refined = mean_without(own)

    def ratio(total: float) -> dict[str, float]:
        def beside(of: Mapping[int, Any]) -> Any:
            below = max(count for count in counts if count <= total)
            above = min((count for count in counts if count > below), default=below)
            part = (total - below) / (above - below) if above > below else 0.0
            return np.exp((1 - part) * np.log(of[below]) + part * np.log(of[above]))

        whole = own.mean() / beside({count: solver[count].mean() for count in counts})
        parts = np.array(refined) / beside({count: np.array(of) for count, of in means.items()})
        return {"ratio": float(whole), "interval": half_width(parts)}

    return {
        "evaluations": evaluations,
        "refined": REFINED[evaluations],
        "distance": float(own.mean()),
        "interval": half_width(refined),
        "solver": float(solver[evaluations].mean()),
        "equal_evaluations": ratio(evaluations),
        "at_4_percent": ratio(evaluations + 0.04 * REFINED[evaluations]),
        "equal_time": {
            str(images): {"cost": of, **ratio(evaluations + of)} for images, of in costs.items()
        },
    }


def _write(args: argparse.Namespace, engine: Engine, found: Sequence[Mapping[str, Any]]) -> None:
    path = args.json or Path("docs/benchmarks") / f"residual_{args.pipeline}.json"
    said = {"trajectories": args.trajectories, "images": args.images, "steps": args.steps}
    key = ("network", "guidance", "fitted", "evaluations")
    kept: dict[Any, Any] = {}
    if path.is_file():
        kept = {str([row[k] for k in key]): row for row in read_json(path)["found"]}
    kept |= {str([row[k] for k in key]): {**row, **said} for row in found}
    about = {"hardware": hardware(), "precision": engine.pipeline.precision}
    document = {**about, "found": list(kept.values())}
    write_json(document, path)
    path.with_suffix(".md").write_text(markdown(document, args.pipeline))


def markdown(found: Mapping[str, Any], name: str) -> str:
    """The report."""
    lines = [
        f"# A refiner on top of learned solvers, {name}",
        "",
        f"Models in {found['precision']}, {in_words(found['hardware'])}. "
        f"`python -m research.residual --pipeline {name}` measures this again.",
        "",
        "- **Distance**: of latents to the exact solution in float32, mean over the images.",
        "- **Cost**: of all networks of a request for 1 and for 8 images, in evaluations of the "
        "predictor, measured. Networks read one row per image, the predictor two with guidance.",
        "- **Ratio** to the distance of the solver without refiner: below 1 the refiner wins. At "
        "equal time the solver has as many evaluations as the refined one costs, interpolated. "
        "Intervals are 95%, paired by seed.",
        "",
        "| guidance | fitted for | solver | network, last steps | distance, solver | refined | "
        "ratio, equal evaluations | a network costs 4% | cost, 1 image | ratio | cost, 8 | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["found"]:
        low, high = row["fitted"]
        cells = [
            f"{row['guidance']:g}",
            f"{low:g}" if low == high else f"{low:g} to {high:g}",
            f"L{row['evaluations']}",
            f"{row['network']}, {row['refined']}",
            f"{row['solver']:.4f}",
            f"{row['distance']:.4f} ± {row['interval']:.4f}",
            _ratio(row["equal_evaluations"]),
            _ratio(row["at_4_percent"]),
        ]
        for images in map(str, _TIMED):
            of = row["equal_time"][images]
            cells += [f"{of['cost']:.2f}", _ratio(of)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _ratio(of: Mapping[str, float]) -> str:
    return f"{of['ratio']:.2f} ± {of['interval']:.2f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
