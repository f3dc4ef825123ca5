"""One replica: the calls per image, and latency and throughput in closed form."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.capacity.block_times import OVERHEAD_MS, BlockTimes
from flowturbo.contract import Role
from flowturbo.generate import roles_called
from flowturbo.solver.program import outline
from flowturbo.solver.schedule import Schedule


@dataclass(frozen=True)
class Replica:
    """One device behind one orchestrator, and the `calls` (model, rows) per image.

    `times_ms` are execution times per model at 0 to `max_rows` rows. `overhead_ms` passes before
    each execution. `max_inflight` is the service's setting. With `turns` one model runs at a time,
    as on a CPU.
    """

    calls: tuple[tuple[str, int], ...]
    times_ms: Mapping[str, tuple[float, ...]]
    overhead_ms: float = OVERHEAD_MS
    max_rows: int = 64
    max_inflight: int = 64
    turns: bool = False

    def __post_init__(self) -> None:
        needed = max(rows for _, rows in self.calls)
        if self.max_rows < needed:
            raise ValueError(f"max_rows is {self.max_rows}, an image needs {needed}")

    @classmethod
    def of(
        cls,
        times: BlockTimes,
        schedule: str = "H1P5R3",
        guidance_scale: float = 1.5,
        **settings: Any,
    ) -> "Replica":
        """For images of `schedule`; includes the decoder if its times are known."""
        rows = 1 if guidance_scale == 1.0 else 2
        program = outline(Schedule.parse(schedule))
        calls = [(model, rows) for model in roles_called(program)]
        calls += [(Role.DECODER, 1)] if Role.DECODER in times.times_ms else []
        max_rows = settings.pop("max_rows", 64)
        tables: dict[str, tuple[float, ...]] = {
            role: times.table(role, max_rows) for role in dict(calls)
        }
        return cls(tuple(calls), tables, times.overhead_ms, max_rows, **settings)

    def lone_ms(self) -> float:
        """Latency of a single request: the sum of its calls."""
        return sum(self.times_ms[model][rows] + self.overhead_ms for model, rows in self.calls)

    def image_ms(self, images: int) -> float:
        """Device time per image, if `images` images share all batches."""
        return sum(self.times_ms[model][rows * images] for model, rows in self.calls) / images

    def full(self) -> int:
        """The number of images that fit in one batch of every call."""
        return min(self.max_rows // max(rows for _, rows in self.calls), self.max_inflight)

    def saturation(self) -> tuple[float, int]:
        """The maximum images/s of the device, and the images per batch that reach it."""
        best = min(range(1, self.full() + 1), key=self.image_ms)
        return 1e3 / self.image_ms(best), best
