"""The report of `bench.compare` as a table and as a plot."""

from pathlib import Path
from typing import Any

SERVICE = "service"


def markdown(report: dict[str, Any]) -> str:
    """The summary as a table, after a paragraph on hardware and settings."""
    s = report["settings"]
    text = [
        f"{s['threads']} cores of {s['processor']}, PyTorch {s['torch']}, the service in "
        f"{s['service_precision']}, guidance {s['guidance_scale']:g}, decoder included; medians of "
        f"{s['rounds']} rounds. Every contender has all cores while it runs. The mean image "
        f"difference is at most {s['mean_difference_levels']:.2f} of 255 levels.",
        "",
        "| case | contender | ms/image | images/s | p50 ms | p95 ms | service is faster by |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["summary"]:
        text.append(
            f"| {row['case']} | {row['contender']} | {row['ms_per_image']:.1f} "
            f"| {row['images_per_s']:.1f} | {row['p50_ms']:.0f} | {row['p95_ms']:.0f} "
            f"| {faster(row)} |"
        )
    return "\n".join(text) + "\n"


def faster(row: dict[str, Any]) -> str:
    """By how much the service is faster than a row's contender; empty for the service itself."""
    ratio = row["ratio"]
    text = f"{ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f})"
    return "" if row["contender"] == SERVICE else text


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars: ms per image of a single client, images per second of concurrent clients."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lone = [row for row in report["summary"] if row["compared"] == "median latency"]
    many = [row for row in report["summary"] if row["compared"] != "median latency"]
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    # Legends avoid the service's bar: it is the lowest on the left, the first on the right.
    for axis, rows, key, label, corner in (
        (axes[0], lone, "ms_per_image", "ms per image (lower is better)", "upper left"),
        (axes[1], many, "images_per_s", "images per second (higher is better)", "upper right"),
    ):
        cases = list(dict.fromkeys(row["case"] for row in rows))
        names = list(dict.fromkeys(row["contender"] for row in rows))
        width = 0.8 / len(names)
        for k, name in enumerate(names):
            heights = [row[key] for row in rows if row["contender"] == name]
            places = [place + (k - (len(names) - 1) / 2) * width for place in range(len(cases))]
            bars = axis.bar(places, heights, width, label=name)
            axis.bar_label(bars, fmt="%.3g", fontsize=8)
        axis.set_xticks(range(len(cases)), [case.replace(", ", "\n") for case in cases])
        axis.set(ylabel=label)
        axis.margins(y=0.3)  # room for the legend above the bars
        axis.legend(fontsize=8, loc=corner)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
