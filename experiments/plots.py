"""Rows of results as figures: medians with a bar from the least trial to the most, readable in grey."""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .sharing import PAPER_PREFIX, PAPER_SAVED
from .tables import Row, rows_of, spread
from .vs_vllm import TABLE

GREYS = ["0.1", "0.4", "0.62"]
FILLS = ["0.25", "0.95", "0.6", "0.8", "1", "0.45"]
MARKERS, LINES = ["o", "s", "^", "D", "v", "P"], ["-", "--", ":", "-.", (0, (5, 1)), (0, (1, 3))]
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
        "marker": MARKERS[i % 6],
        "linestyle": LINES[i % 6 if dashes is None else dashes],
        "color": GREYS[i % 3],
    }
    axes.errorbar(xs, middle, yerr=errors, label=label, capsize=2, markersize=4, **style)


def bars(axes: Axes, groups: Sequence[str], series: dict[str, Sequence[Sequence[float]]], unit: str) -> None:
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


def page_size() -> Figure:
    rows = rows_of("page_size")
    figure, axes = panels(4, 3.0)
    parts = [
        ("kernels", "us", "us a layer, decode"),
        ("engine", "output_tokens_per_s", "output tokens/s"),
        ("engine", lambda row: 100 * row["page_waste"], "page waste, %"),
        ("prefix", lambda row: 100 * row["hit_rate"], "prefix-cache hit rate, %"),
    ]
    for panel, (part, y, unit) in zip(axes, parts, strict=True):
        kinds = dict.fromkeys((r["shape"], r["workload"]) for r in rows if r["part"] == part and r["workload"])
        for i, (shape, workload) in enumerate(kinds):
            chosen = [r for r in rows if (r["part"], r["shape"], r["workload"]) == (part, shape, workload)]
            line(panel, chosen, "page_size", y, f"{SHORT[shape][8:]}, {workload.split('-')[0]}", i)
            if part == "engine" and y == "output_tokens_per_s" and chosen[0]["limit"]:
                panel.axhline(chosen[0]["limit"], color="0.7", linewidth=0.8)
                panel.annotate("limit", (8, chosen[0]["limit"]), fontsize=7, color="0.4", va="bottom")
        panel.set_xscale("log", base=2)
        panel.set_xticks([8, 16, 32, 64, 128, 256], ["8", "16", "32", "64", "128", "256"])
        panel.set(xlabel="page size, tokens", ylabel=unit)
        panel.set_ylim(bottom=0)
    axes[1].set_yscale("log")
    axes[0].legend(fontsize=7)
    return figure


def sharing() -> Figure:
    rows = rows_of("sharing")
    figure, (left, middle, right) = panels(3)
    for axes, question, key in ((left, "samples", "n"), (middle, "beams", "beam_width")):
        for i, workload in enumerate(("alpaca-like-1000", "sharegpt-like-256")):
            chosen = [row for row in rows if row["question"] == question and row["workload"] == workload]
            name = workload.split("-")[0]
            line(axes, chosen, key, lambda row: 100 * row["saved"], name, i)
            known = PAPER_SAVED[question, name]
            axes.plot(list(known), list(known.values()), "x", color="0.5", label=f"{name}, the paper")
        axes.set_xticks([2, 4, 6])
        axes.set(xlabel={"n": "samples of a prompt", "beam_width": "beam width"}[key], ylabel="pages saved, %")
        axes.set_ylim(0, 90)
    left.legend(fontsize=7)
    prefixes = sorted({row["prefix"] for row in rows if row["question"] == "prefix"})
    series = {
        label: [[row[key] for row in rows if row.get("prefix") == prefix] for prefix in prefixes]
        for label, key in (("with prefix caching", "tokens_per_s"), ("without", "tokens_per_s_off"))
    }
    bars(right, [str(prefix) for prefix in prefixes], series, "output tokens/s")
    for at, prefix in enumerate(prefixes):
        ratio = spread(row["ratio"] for row in rows if row.get("prefix") == prefix)[0]
        known = f"\n({PAPER_PREFIX[prefix]:.2f}x)" if prefix in PAPER_PREFIX else ""
        right.annotate(f"{ratio:.2f}x{known}", (at, max(series["with prefix caching"][at])), ha="center", va="bottom")
    right.set_xlabel("common prefix, tokens (in brackets: the paper)")
    right.set_ylim(0, 1.35 * max(max(values) for values in series["with prefix caching"]))
    right.legend(fontsize=7, loc="upper right")
    return figure


def recovery() -> Figure:
    rows = rows_of("recovery")
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, axes = panels(len(shapes), 4.2)
    for panel, shape in zip(axes, shapes, strict=True):
        for i, tokens in enumerate((512, 1024, 4096)):
            chosen = [row for row in rows if row["shape"] == shape and row["tokens"] == tokens]
            swap = f"swap {tokens} tokens"
            line(panel, chosen, "page_size", lambda r: r["out_ms"] + r["in_ms"], swap, i, dashes=0)
            line(panel, chosen, "page_size", "recompute_ms", f"recompute {tokens}", i, dashes=1)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks([8, 16, 32, 64, 128, 256], ["8", "16", "32", "64", "128", "256"])
        panel.set(xlabel="page size, tokens", ylabel="ms a request", title=SHORT[shape])
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="outside right center")
    return figure


def vs_vllm() -> Figure:
    rows = {(row["shape"], row["workload"]): row for row in rows_of("vs_vllm", engine="pagedjax")}
    figure, axes = panels(len(TABLE), 4.2, 2.6)
    for panel, (shape, workloads) in zip(axes, TABLE.items(), strict=True):
        names = [name for name in workloads if (shape, name) in rows]
        found = [rows[shape, name] for name in names]
        series = {
            "pagedjax": [[run["output_tokens_per_s"] / row["limit"] for run in row["runs"]] for row in found],
            "vLLM 0.25.1": [[workloads[name].vllm / workloads[name].limit] for name in names],
        }
        labels = [" ".join(name.replace("-like", "").split("-")[: 1 + ("like" in name)]) for name in names]
        bars(panel, [label.replace(" ", "\n") for label in labels], series, "share of the card's limit")
        panel.axhline(1, color="0.5", linewidth=0.8)
        panel.set_title(SHORT[shape])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "vs_vllm": vs_vllm,
    "page_size": page_size,
    "sharing": sharing,
    "recovery": recovery,
}
