"""What a refiner for text to image learns from: the predictor's own guided trajectories.

The paper takes the states x_t from images and noise. The states of a trajectory are those that the
refiner meets in sampling, guided as in sampling, and need prompts only. A step of Heun's method
has all that a row needs. That is the velocity v at its start, the state x' after Eq. 6's Euler
step, and the velocity at x'. Steps are those of the model's own time grid, which may be shifted.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowturbo.solver.grid import GridRule, time_grid
from flowturbo.solver.guidance import MAX_SCALE, guide
from training.plan import PlanError

Conditioning = tuple[Tensor, ...]


@dataclass(frozen=True)
class TrajectoryPlan:
    """Which trajectories a pool has, and how often its rows are used.

    A pool has `batches` batches of `batch` trajectories. Each batch draws its number of steps from
    `steps`, and each trajectory its prompt, noise, and guidance scale from `scales`. On average a
    step is drawn `uses` times before the next pool. Raises PlanError.
    """

    steps: tuple[int, int] = (8, 30)
    scales: tuple[float, float] = (1.0, 1.0)
    batches: int = 8
    batch: int = 32
    uses: float = 4.0

    def __post_init__(self) -> None:
        if not 1 <= self.steps[0] <= self.steps[1]:
            raise PlanError(
                "the range of grid steps must be 1 <= smallest <= largest, got "
                f"{self.steps[0]} to {self.steps[1]}"
            )
        if not 0 <= self.scales[0] <= self.scales[1] <= MAX_SCALE:
            raise PlanError(
                f"the range of guidance scales must be 0 <= smallest <= largest <= {MAX_SCALE:g}, "
                f"got {self.scales[0]} to {self.scales[1]}"
            )
        for name in ("batches", "batch", "uses"):
            if not getattr(self, name) > 0:
                raise PlanError(f"{name} must be above 0, got {getattr(self, name)}")

    def lifetime(self, rows: int, per_step: int) -> int:
        """Training steps of `rows` rows per pool; a solver step gives `per_step` rows."""
        steps = self.batches * self.batch * sum(self.steps) / 2
        return max(1, round(steps * per_step * self.uses / rows))


@dataclass(frozen=True)
class Rows:
    """Rows to train on: the refiner reads [x, v] at t and learns `change`.

    `x`, `v` and `change` are [B, C, h, w], `t` [B]. `prompt` [B] says whose conditioning a row has;
    -1 is the null prompt.
    """

    x: Tensor
    v: Tensor
    t: Tensor
    change: Tensor
    prompt: Tensor

    def __getitem__(self, rows: Tensor) -> "Rows":
        return Rows(**{name: value[rows] for name, value in vars(self).items()})

    @classmethod
    def cat(cls, parts: "list[Rows]") -> "Rows":
        """The rows of all `parts`."""
        return cls(
            **{name: torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])}
        )


class Trajectories:
    """Pools of rows; pool k depends on (seed, k) alone, so a resumed run has the same ones.

    `conditioning` maps prompts [B] (-1: null) to the tensors of `teacher`, which maps (x, t,
    conditioning) to the velocity. `shape` is that of a latent, with `tokens` image tokens. Without
    `guided` the model takes no guidance.
    """

    def __init__(
        self,
        teacher: nn.Module,
        conditioning: Callable[[Tensor], Conditioning],
        prompts: int,
        shape: tuple[int, int, int],
        grid: GridRule,
        tokens: int,
        plan: TrajectoryPlan,
        seed: int,
        *,
        guided: bool,
    ) -> None:
        self._teacher, self._conditioning, self._prompts = teacher, conditioning, prompts
        self._shape, self._grid, self._tokens = shape, grid, tokens
        self._plan, self._seed, self._guided = plan, seed, guided

    @property
    def per_step(self) -> int:
        """Rows that one step of one trajectory gives: with guidance also the null prompt's."""
        return 2 if self._guided else 1

    @property
    def largest_step(self) -> float:
        """The largest Euler step that rows can have."""
        shift = self._grid.shift_for(self._tokens, self._plan.steps[0])
        times = time_grid(self._plan.steps[0], shift)
        return max(after - t for t, after in zip(times, times[1:], strict=False))

    @torch.no_grad()
    def pool(self, number: int) -> Rows:
        """Pool number `number`, from 0, on the CPU."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        return Rows.cat([part for _ in range(self._plan.batches) for part in self._run(generator)])

    def _run(self, generator: torch.Generator) -> list[Rows]:
        plan = self._plan
        low, high = plan.steps
        steps = int(torch.randint(low, high + 1, (), generator=generator))
        times = time_grid(steps, self._grid.shift_for(self._tokens, steps))
        prompt = torch.randint(self._prompts, (plan.batch,), generator=generator)
        share = torch.rand(plan.batch, generator=generator)
        scale = plan.scales[0] + (plan.scales[1] - plan.scales[0]) * share
        x = torch.randn((plan.batch, *self._shape), generator=generator)
        found = []
        conditioning = self._of(prompt)
        for t, after in zip(times, times[1:], strict=False):
            h = after - t
            first, v = self._velocity(x, t, conditioning, scale)
            moved = x + h * v
            second, v_next = self._velocity(moved, after, conditioning, scale)
            found += [
                Rows(moved, v, torch.full((len(x),), after), other - own, of)
                for own, other, of in zip(
                    first, second, (prompt, torch.full_like(prompt, -1)), strict=False
                )
            ]
            x = x + h / 2 * (v + v_next)
        return found

    def _of(self, prompt: Tensor) -> Conditioning:
        every = torch.cat([prompt, torch.full_like(prompt, -1)]) if self._guided else prompt
        return self._conditioning(every)

    def _velocity(
        self, x: Tensor, t: float, conditioning: Conditioning, scale: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The velocities with the prompt and without it, and the guided one."""
        device = conditioning[0].device
        rows = x.repeat(self.per_step, 1, 1, 1).to(device)
        at = torch.full((len(rows),), t, device=device)
        made = self._teacher(rows, at, *conditioning).float().cpu()
        if not self._guided:
            return (made,), made
        c, u = made.chunk(2)
        return (c, u), guide(c, u, scale[:, None, None, None])
