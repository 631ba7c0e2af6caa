"""How figures look: medians of trials with a bar from the least to the most, readable in grey."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pagedjax.bench import Lengths
from pagedjax.models.load import open_checkpoint, read_config

from .common import shape_path
from .limit import Ceilings, limit
from .tables import Row, spread
from .timeline import PEAK_TFLOPS

GREYS = ["0.1", "0.4", "0.62"]
FILLS = ["0.25", "0.95", "0.6", "0.8", "1", "0.45"]
MARKERS, LINES = "os^DvPX", ["-", "--", ":", "-.", (0, (5, 1)), (0, (1, 3)), (0, (8, 2, 1, 2))]
HATCHES = ["", "///", "...", "xxx", "\\\\\\", "++"]
SHORT = {"llama2-7b": "LLaMA-2 7B", "llama3-8b": "LLaMA-3 8B", "llama3.2-1b": "LLaMA-3.2 1B"}
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})


def panels(count: int, width: float = 3.4, height: float = 2.9) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(1, count, figsize=(width * count, height), layout="constrained", squeeze=False)
    return figure, list(axes[0])


def line(
    axes: Axes,
    rows: Sequence[Row],
    x: str,
    y: str | Callable[[Row], float],
    label: str,
    i: int,
    dashes: int | None = None,
) -> None:
    """y over x, with what trials differ by. Line i has its own grey and marker, and its own dashes unless given."""
    get = y if callable(y) else lambda row: row[y]
    groups: dict[Any, list[float]] = {}
    for row in rows:
        groups.setdefault(row[x], []).append(get(row))
    xs = sorted(groups)
    spreads = [spread(groups[value]) for value in xs]
    middle = [m for m, _, _ in spreads]
    errors = [[m - low for m, low, _ in spreads], [high - m for m, _, high in spreads]]
    style: dict[str, Any] = {
        "marker": MARKERS[i % 7],
        "linestyle": LINES[i % 7 if dashes is None else dashes],
        "color": GREYS[i % 3],
    }
    axes.errorbar(xs, middle, yerr=errors, label=label, capsize=2, markersize=4, **style)


def bars(axes: Axes, groups: Sequence[str], series: Mapping[str, Sequence[Sequence[float]]], unit: str) -> None:
    """Of each series a bar a group: the median of its trials, which may be none."""
    width = 0.8 / len(series)
    for i, (label, values) in enumerate(series.items()):
        kept = [(at, spread(trials)) for at, trials in enumerate(values) if trials]
        errors = [[m - low for _, (m, low, _) in kept], [high - m for _, (m, _, high) in kept]]
        xs = [at + (i - (len(series) - 1) / 2) * width for at, _ in kept]
        style: dict[str, Any] = {"color": FILLS[i % 6], "hatch": HATCHES[i % 6], "edgecolor": "0", "linewidth": 0.6}
        axes.bar(xs, [m for _, (m, _, _) in kept], width, yerr=errors, label=label, capsize=2, **style)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(unit)


def stacks(
    axes: Axes, groups: Sequence[str], series: Mapping[str, Sequence[float]], unit: str, shift: float = 0
) -> None:
    """One bar a group, of parts."""
    below = [0.0] * len(groups)
    for i, (label, values) in enumerate(series.items()):
        style: dict[str, Any] = {"color": FILLS[i % 6], "hatch": HATCHES[i % 6], "edgecolor": "0", "linewidth": 0.6}
        axes.bar([at + shift for at in range(len(groups))], values, 0.38, bottom=below, label=label, **style)
        below = [low + value for low, value in zip(below, values, strict=True)]
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(unit)


def card_limit(shape: str, row: Row, lengths: Lengths) -> float:
    """Output tokens per second that a row's card allows a shape, with memory for all requests at once."""
    config = read_config(open_checkpoint(shape_path(shape))[0])
    return limit(config, lengths, Ceilings(row["copy_tb_s"], PEAK_TFLOPS))


def page_sizes(axes: Axes, unit: str) -> None:
    """An axis of page sizes below, a unit beside."""
    axes.set_xscale("log", base=2)
    axes.set_xticks([8, 16, 32, 64, 128, 256], ["8", "16", "32", "64", "128", "256"])
    axes.set(xlabel="page size, tokens", ylabel=unit)


def legend(figure: Figure, axes: Axes) -> None:
    """Beside all panels."""
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside right center")
