"""The load report: Markdown and plots, made only from the JSON of bench.load."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Point = dict[str, Any]
Column = tuple[str, Callable[[Point], str]]


def write(report: dict[str, Any], path: Path) -> Path:
    """Writes the report and its plots beside the JSON `path`; returns the Markdown's path."""
    written = path.with_suffix(".md")
    plots = [path.with_name(f"{path.stem}_{name}.png") for name in ("closed", "open", "cost")]
    written.write_text(markdown(report, [plot.name for plot in plots]))
    for draw, panels, plot in zip(
        (_draw_closed, _draw_open, _draw_cost), (3, 2, 2), plots, strict=True
    ):
        _figure(draw, panels, report, plot)
    return written


def in_words(point: Point) -> str:
    """The figures of one point on one line."""
    if point["error"]:
        return f"ended by a failed request: {point['error']}"
    latency, server = point["latency_ms"], point["server"]
    return (
        f"{point['images_per_s']:.1f} images/s, p50 {latency['p50']:.0f} ms, "
        f"p95 {latency['p95']:.0f} ms, {server['rows_per_execution']:.1f} rows per execution, "
        f"{point['requests']} requests"
    )


def markdown(report: dict[str, Any], plots: Sequence[str]) -> str:
    """The whole text; `plots` are the file names of the three plots."""
    sections = [_head(report)]
    if "closed_loop" in report:
        sections.append(_closed(report, plots[0]))
    if "open_loop" in report:
        sections.append(_open(report, plots[1]))
    if "overload" in report:
        sections += [_mix(report["mix"]), _overload(report["overload"])]
    if "cost" in report:
        sections.append(_cost(report, plots[2]))
    if "baseline" in report:
        sections.append("## Compared with PyTorch\n\n" + report["baseline"]["markdown"])
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _head(report: dict[str, Any]) -> str:
    machine, server, plan = report["hardware"], report["server"], report["plan"]
    forms = ", ".join(
        f"{name} {model['precision']} ({model['runtime']}, {model['engine']} engine)"
        for name, model in server["models"].items()
    )
    length = (
        f"{plan['requests']} requests" if plan["requests"] else f"{plan['seconds']:g} s per point"
    )
    return (
        "# Load\n\n"
        f"{report['date'][:10]}, {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['gib']:.0f} GiB; Triton {server['version']}; {forms}. Load from perf_analyzer "
        f"over gRPC on the same machine, {length}. Made by `python -m bench.load`.\n\n"
        "Busy: the share of time in which a model computed. The sum is 100% if the models take "
        "turns without a pause. CPU: cores used by the server's "
        "processes. Memory: resident memory in the first and in the last quarter of the point; "
        "shared pages count once."
    )


def _latency_columns() -> list[Column]:
    def column(name: str) -> Column:
        return f"{name} ms", lambda p: f"{p['latency_ms'][name]:.0f}"

    return [column(name) for name in ("p50", "p95", "p99", "max")]


_RATE: Column = ("images/s", lambda p: f"{p['images_per_s']:.1f}")
_REQUESTS: Column = ("requests", lambda p: str(p["requests"]))


def _server_columns() -> list[Column]:
    return [
        ("rows per execution", lambda p: f"{p['server']['rows_per_execution']:.1f}"),
        ("predictor busy", lambda p: _busy(p, "predictor")),
        ("refiner busy", lambda p: _busy(p, "refiner")),
        ("decoder busy", lambda p: _busy(p, "decoder")),
        ("sum", lambda p: f"{sum(m['busy_share'] for m in p['server']['models'].values()):.0%}"),
        ("CPU", lambda p: _optional(p, "cpu_cores", "{:.2f}")),
        ("memory MiB", _memory),
        ("/dev/shm MiB", lambda p: _optional(p, "shared_memory_mib", "{:.0f}")),
    ]


def _busy(point: Point, model: str) -> str:
    models = point["server"]["models"]
    return f"{models[model]['busy_share']:.0%}" if model in models else "-"


def _optional(point: Point, name: str, form: str) -> str:
    return form.format(point["server"][name]) if name in point["server"] else "-"


def _memory(point: Point) -> str:
    found = point["server"].get("resident_mib")
    return f"{found['first_quarter']:.0f}, {found['last_quarter']:.0f}" if found else "-"


def _table(points: Iterable[Point], columns: Sequence[Column]) -> str:
    lines = [
        "| " + " | ".join(name for name, _ in columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for point in points:
        if point.get("error"):
            cells = [columns[0][1](point), f"ended by: {point['error']}"]
            cells += [""] * (len(columns) - len(cells))
        else:
            cells = [value(point) for _, value in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _closed(report: dict[str, Any], plot: str) -> str:
    points = report["closed_loop"]
    name: Column = ("load", lambda p: f"{p['schedule']}, {p['concurrency']} at a time")
    tables = [
        _table(points, [name, _REQUESTS, _RATE, *_latency_columns()]),
        _table(points, [name, *_server_columns()]),
    ]
    alone = [
        f"- {p['schedule']}: {p['orchestration']['ms_per_request']:.1f} ms, "
        f"{p['orchestration']['share']:.1%} of a single request; "
        f"{p['orchestration']['queue_ms']:.1f} ms of it in the models' queues"
        for p in points
        if "orchestration" in p
    ]
    return "\n\n".join(
        [
            "## Closed loop\n\nOne image per request, default guidance. Each caller sends its "
            "next request as soon as it has an answer. "
            f"Capacity: {report['capacity_images_per_s']:.1f} images/s.",
            *tables,
            "Time of a single request outside the networks and the decoder (orchestration, "
            "batching, gRPC, queues):\n\n" + "\n".join(alone),
            "Shares of the time at each model:",
            _shares_table([p for p in points if not p["error"]]),
            f"![Throughput, latency and rows per execution against concurrency]({plot})",
        ]
    )


def _shares_table(points: Sequence[Point]) -> str:
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    rows = [
        {"load": f"{p['schedule']}, {p['concurrency']} at a time", "model": name} | model["shares"]
        for p in (points[0], max(points, key=lambda p: p["concurrency"]))
        for name, model in p["server"]["models"].items()
    ]
    columns: list[Column] = [("load", lambda r: r["load"]), ("model", lambda r: r["model"])]
    columns += [(part.replace("_", " "), _percentage(part)) for part in parts]
    return _table(rows, columns)


def _percentage(name: str) -> Callable[[Point], str]:
    return lambda point: f"{point[name]:.1%}"


def _open(report: dict[str, Any], plot: str) -> str:
    columns: list[Column] = [
        ("of capacity", lambda p: f"{p['share']:.0%}"),
        ("offered/s", lambda p: f"{p['rate']:.1f}"),
    ]
    columns += [_REQUESTS, _RATE, *_latency_columns(), *_server_columns()[:2]]
    return (
        f"## Open loop\n\nPoisson arrivals of {report['open_loop'][0]['schedule']}, one image per "
        "request, at shares of the capacity above.\n\n"
        f"{_table(report['open_loop'], columns)}\n\n![Latency against offered rate]({plot})"
    )


def _mix(points: Sequence[Point]) -> str:
    columns: list[Column] = [("at a time", lambda p: str(p["concurrency"]))]
    columns += [_REQUESTS, _RATE, *_latency_columns(), *_server_columns()]
    return (
        f"## Mixed requests\n\n{points[0]['kinds']} kinds of request in turn: schedules, image "
        f"counts, with and without guidance.\n\n{_table(points, columns)}"
    )


def _overload(point: Point) -> str:
    total = sum(point["requests"].values())
    rows = [
        {"outcome": name, "count": point["requests"][name], "latency_ms": latency}
        for name, latency in point["latency_ms"].items()
    ]
    columns: list[Column] = [
        ("outcome", lambda r: r["outcome"]),
        ("requests", lambda r: str(r["count"])),
        ("share", lambda r: f"{r['count'] / total:.1%}"),
        *_latency_columns(),
    ]
    held = ""
    if memory := point["server"].get("resident_mib"):
        held = (
            f"\n\nServer memory: {memory['first_quarter']:.0f} MiB in the first quarter of the "
            f"time, {memory['last_quarter']:.0f} in the last, {memory['peak']:.0f} at the peak."
        )
    return (
        f"## Overload\n\nPoisson arrivals of {point['schedule']} at {point['rate']:.1f} per second "
        f"for {point['seconds']:g} s. The capacity is {point['capacity']:.1f} per second. Clients "
        f"do not retry.\n\n{_table(rows, columns)}{held}"
    )


def _cost(report: dict[str, Any], plot: str) -> str:
    parts = ["## Time against work\n\nOne request at a time. The lines are fitted to the medians."]
    for variable, data in report["cost"].items():
        columns: list[Column] = [
            ("schedule", lambda p: p["schedule"]),
            ("images", lambda p: str(p["images"])),
            ("p50 ms", lambda p: f"{p['latency_ms']['p50']:.1f}"),
            ("ms per image", lambda p: f"{p['latency_ms']['p50'] / p['images']:.1f}"),
        ]
        line = data["line"]
        parts += [
            _table(data["points"], columns),
            f"{line['intercept_ms']:.1f} ms + {line['slope_ms']:.2f} ms x {variable}, largest "
            f"error {line['largest_relative_error']:.0%}.",
        ]
    return "\n\n".join([*parts, f"![Time against steps and against images]({plot})"])


def _figure(
    draw: Callable[[dict[str, Any], Any], None], panels: int, report: dict[str, Any], path: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(5.5 * panels, 4), layout="constrained")
    draw(report, axes)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_closed(report: dict[str, Any], axes: Any) -> None:
    rate, latency, rows = axes
    points = [p for p in report["closed_loop"] if not p["error"]]
    for k, name in enumerate(dict.fromkeys(p["schedule"] for p in points)):
        of_it = [p for p in points if p["schedule"] == name]
        x = [p["concurrency"] for p in of_it]
        rate.plot(x, [p["images_per_s"] for p in of_it], f"C{k}o-", label=name)
        for percentile, style in (("p50", "-"), ("p95", ":")):
            y = [p["latency_ms"][percentile] for p in of_it]
            latency.plot(x, y, f"C{k}o{style}", label=f"{name} {percentile}")
        rows.plot(x, [p["server"]["rows_per_execution"] for p in of_it], f"C{k}o-", label=name)
    for axis, what in ((rate, "images/s"), (latency, "latency, ms"), (rows, "rows per execution")):
        axis.set(xlabel="requests at a time", ylabel=what, ylim=(0, None))
        axis.legend(fontsize=8)


def _draw_open(report: dict[str, Any], axes: Any) -> None:
    left, right = axes
    points = [p for p in report.get("open_loop", []) if not p["error"]]
    for percentile in ("p50", "p95", "p99"):
        y = [p["latency_ms"][percentile] for p in points]
        left.plot([p["rate"] for p in points], y, "o-", label=percentile)
    left.set(xlabel="offered requests/s", ylabel="latency, ms", ylim=(0, None))
    left.legend(fontsize=8)
    memory = report.get("overload", {}).get("memory", [])
    right.plot([m["at_s"] for m in memory], [m["resident_mib"] for m in memory])
    right.set(xlabel="seconds of overload", ylabel="server's resident memory, MiB", ylim=(0, None))


def _draw_cost(report: dict[str, Any], axes: Any) -> None:
    for axis, (variable, data) in zip(axes, report.get("cost", {}).items(), strict=False):
        x = [p[variable] for p in data["points"]]
        axis.plot(x, [p["latency_ms"]["p50"] for p in data["points"]], "o")
        line = data["line"]
        ends = [0, max(x)]
        axis.plot(ends, [line["intercept_ms"] + line["slope_ms"] * end for end in ends], "--")
        axis.set(xlabel=f"{variable} per request", ylabel="ms per request", ylim=(0, None))
        axis.set_title(f"{line['intercept_ms']:.1f} ms + {line['slope_ms']:.2f} ms x {variable}")
