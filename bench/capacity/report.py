"""Prints and plots a plan and its check."""

import math
import statistics
from pathlib import Path

from bench.capacity.plan import Checked, FleetPlan
from bench.capacity.simulation import Point

_HEAD = "images/s   made  rows  busy  device ms/img  refused   p50 ms   p95 ms"


def _image_ms(point: Point) -> float:
    return point.busy / point.images_per_s * 1e3


def _row(point: Point) -> str:
    return (
        f"{point.load:8.2f} {point.images_per_s:6.1f} {point.rows:5.1f} {point.busy:5.0%} "
        f"{_image_ms(point):14.2f} {point.refused:8.1%} "
        f"{point.p50_ms:8.1f} {point.p95_ms:8.1f}"
    )


def _best(found: FleetPlan) -> str:
    best = f"{found.saturation_per_s:.2f} images/s, {found.saturation_images} per batch"
    if found.saturation_images == found.full_images:
        return best
    return f"{best} (full batches, {found.full_images}: {found.full_per_s:.2f})"


def print_plan(found: FleetPlan, schedule: str) -> None:
    """Prints the load curve of one GPU and, if a rate was given, the fleets."""
    print(f"{schedule}: a single request takes {found.lone_ms:.1f} ms; saturation: {_best(found)}")
    print(f"\n{_HEAD}")
    for point in sorted((*found.points, found.limit), key=lambda p: p.load):
        print(_row(point) + ("  <- largest within the SLO" if point is found.limit else ""))
    print(f"\np95 <= {found.slo_p95_ms:g} ms up to {found.limit.load:.2f} images/s per GPU")
    if found.gpus is None:
        return
    print(f"{found.rate:g} images/s: {found.gpus} GPUs, {found.gpus + 1} to survive one failure\n")
    print(f"  GPUs  {_HEAD}")
    for gpus, point in found.fleets:
        print(f"{gpus:6}  {_row(point)}")
    first, last = (_image_ms(point) for _, point in (found.fleets[0], found.fleets[-1]))
    print(f"\n4 times the GPUs: {last / first:.2f} times the device time per image. Latency falls,")
    print("but batches are emptier; docs/sizing.md explains why few full replicas are better.")


def print_check(checked: list[Checked]) -> None:
    """Prints measured and predicted figures per point, and the median errors."""
    print("\nschedule  load               images/s: measured  predicted   error"
          "   p95 ms: measured  predicted   error")  # fmt: skip
    for c in checked:
        print(
            f"{c.schedule:<9} {c.load:<18} {c.images_per_s:18.2f} {c.predicted_per_s:10.2f} "
            f"{c.rate_error:+7.1%} {c.p95_ms:18.1f} {c.predicted_p95_ms:10.1f} {c.p95_error:+7.1%}"
        )
    for name in ("rate_error", "p95_error"):
        errors = [abs(getattr(c, name)) for c in checked]
        print(f"median of |{name}|: {statistics.median(errors):.1%}")


def plot(found: FleetPlan, schedule: str, path: Path) -> None:
    """Plots latency percentiles against load to the image file `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = sorted((*found.points, found.limit), key=lambda p: p.load)
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name in ("p95_ms", "p50_ms"):
        # A percentile is infinite if too many requests are refused: leave it out.
        drawn = [(p.load, y) for p in points if math.isfinite(y := getattr(p, name))]
        axes.plot(*zip(*drawn, strict=True), marker="o", label=name.removesuffix("_ms"))
    axes.axhline(found.slo_p95_ms, color="red", linestyle="--", label="SLO")
    axes.axvline(found.saturation_per_s, color="grey", linestyle=":", label="saturation")
    axes.set(xlabel="images/s offered to one GPU", ylabel="latency, ms", ylim=(0, None))
    axes.set_title(f"{schedule}: {found.limit.load:.1f} images/s within {found.slo_p95_ms:g} ms")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
