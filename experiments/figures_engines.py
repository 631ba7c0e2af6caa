"""Figures of whole engines."""

from argparse import Namespace

from matplotlib.figure import Figure

from pagedjax.bench import Lengths, load_workload

from .dense_kv import drawn
from .plots import SHORT, bars, card_limit, legend, line, panels
from .tables import Row, rows_of
from .vs_vllm import TABLE


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
    legend(figure, axes[0])
    return figure


def drawn_lengths(row: Row) -> Lengths:
    """A dense_kv row's requests."""
    wanted = Namespace(workload=row["workload"], longest=None, max_len=2048)
    return drawn(wanted, row["seed"], row["requests"]).lengths


def dense_kv() -> Figure:
    """Tokens per second with a queue, requests in flight, and latency against the rate of arrivals."""
    rows = rows_of("dense_kv", workload="sharegpt-like-256")
    systems = ["dense-static", "dense-continuous", "max", "pow2", "oracle", "paged"]
    figure, (left, middle, right) = panels(3, 3.4)
    at_once = {system: [r for r in rows if r["system"] == system and r["part"] == "throughput"] for system in systems}
    for axes, key, unit in (
        (left, "tokens_per_s", "output tokens/s, 64 requests"),
        (middle, "mean_in_flight_queued", "requests in flight"),
    ):
        names = [system.replace("-", "\n").replace("continuous", "contin.") for system in systems]
        bars(axes, names, {"": [[row[key] for row in at_once[system]] for system in systems]}, unit)
        axes.tick_params(axis="x", labelsize=7)
    for i, system in enumerate(systems):
        chosen = [row for row in rows if row["system"] == system and row["part"] == "latency"]
        line(right, chosen, "rate", lambda row: 1e3 * row["normalized_latency_s"]["mean"], system, i)
    right.set_yscale("log")
    right.set(xlabel="requests a second", ylabel="latency / output length, ms a token")
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("{x:g}")
    limits = [card_limit(row["shape"], row, drawn_lengths(row)) for row in at_once["paged"]]
    left.axhline(sum(limits) / len(limits), color="0.5", linewidth=0.8)
    left.annotate("the card's limit, any memory", (0, max(limits)), fontsize=7, color="0.4", va="bottom")
    left.set_ylim(0, 1.15 * max(limits))
    legend(figure, right)
    return figure


def vs_hf() -> Figure:
    """Of each batch and card the systems' rates; none where memory ran out."""
    rows = rows_of("vs_hf", outcome="ok")
    systems = list(dict.fromkeys(row["system"] for row in rows))
    groups = sorted(
        dict.fromkeys((row["workload"], row["device"]) for row in rows), key=lambda group: list(NAMES).index(group[0])
    )
    figure, (axes,) = panels(1, 7, 3)
    labels = []
    series: dict[str, list[list[float]]] = {system: [] for system in systems}
    for at, (workload, device) in enumerate(groups):
        found = [row for row in rows if (row["workload"], row["device"]) == (workload, device)]
        for system in systems:
            series[system].append([row["output_tokens_per_s"] for row in found if row["system"] == system])
        most = max(row["batch"] for row in found)
        cut = {f"\n({row['system']}: {row['batch']})" for row in found if row["batch"] < most}
        labels.append(f"{NAMES[workload]}\n{device.removeprefix('NVIDIA ').split()[0]}" + "".join(sorted(cut)))
        ours = next(row for row in found if row["system"] == "pagedjax")
        rate = card_limit("llama2-7b", ours, load_workload(workload).lengths)
        axes.hlines(rate, at - 0.45, at + 0.45, color="0.5", linewidth=0.8)
        axes.annotate("the card's limit", (at - 0.45, rate), fontsize=7, color="0.4", va="bottom")
    bars(axes, labels, series, "output tokens/s")
    axes.set_yscale("log")
    legend(figure, axes)
    return figure


NAMES = {"single-128-256": "one prompt", "batch8-128-256": "eight", "sharegpt-like-256": "sharegpt-like-256"}
