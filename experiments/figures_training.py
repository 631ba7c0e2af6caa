"""Figures of engines beside a trainer."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .findings_training import INVARIANCE_SHAPES, ITERATION, SHAREGPT, gap_rows, invariance_rates, peak_bytes
from .logprob_gap import PUBLISHED
from .plots import FILLS, GREYS, HATCHES, LINES, SHORT, bars, legend, panels
from .tables import Row, median, rows_of, spread

PAIRS = ("decode/dense", "prefill/dense", "decode/prefill", "crowd/half")


def curve(axes: Axes, rows: list[Row], key: str, i: int, label: str = "") -> None:
    """Over steps: a thin line a seed, and the median of the seeds."""
    grey, seeds = GREYS[i], sorted({row["seed"] for row in rows})
    for seed in seeds:
        own = [row for row in rows if row["seed"] == seed]
        axes.plot([row["step"] for row in own], [row[key] for row in own], color=grey, linewidth=0.5, alpha=0.6)
    steps = sorted({row["step"] for row in rows})
    middle = [median([row for row in rows if row["step"] == step], key) for step in steps]
    axes.plot(steps, middle, color=grey, linewidth=1.8, linestyle=LINES[i], label=label)


def rl() -> Figure:
    """Exact match and reward, KL and entropy, and how far sampler and trainer are apart, over steps."""
    steps, checks = rows_of("rl", kind="step"), rows_of("rl", kind="evaluation")
    figure, (right, kl, apart) = panels(3, 3.6)
    curve(right, checks, "exact_match", 0, "greedy, held-out sums")
    curve(right, steps, "reward", 1, "sampled, reward")
    right.set(ylabel="share that is right", ylim=(0, 1))
    curve(kl, steps, "kl", 0, "KL from the supervised model")
    curve(kl, steps, "entropy", 1, "entropy")
    kl.set(ylabel="nats a token", ylim=(0, None))
    curve(apart, steps, "apart_max", 0, "most, of a step's tokens")
    apart.axhline(1e-4, color="0.5", linewidth=0.8)
    apart.set(ylabel="|sampler - trainer|, log-probability", yscale="log")
    for axes in (right, kl, apart):
        axes.set_xlabel("step")
        axes.legend(fontsize=7)
    return figure


def logprob_gap() -> Figure:
    """Mean and greatest difference, on a log axis; 0 where all bits are equal. Dashed: what others publish."""
    rows = gap_rows()
    kinds = [(dtype, invariant) for dtype in ("float32", "bfloat16") for invariant in (False, True)]
    figure, axes = panels(2, 4.4, 3.2)
    published = [p.mean for p in PUBLISHED if p.mean], [p.most for p in PUBLISHED if p.most]
    for panel, key, others in zip(axes, ("mean", "most"), published, strict=True):
        for i, pair in enumerate(PAIRS):
            found = [[r[key] for r in rows if (r["dtype"], r["invariant"], r["pair"]) == (*k, pair)] for k in kinds]
            log_bars(panel, found, (i - 1.5) * 0.2, i, pair)
        for i, value in enumerate(others):
            label = None if i else "published of others"
            panel.axhline(value, label=label, color="0.5", linewidth=0.8, linestyle="--", zorder=0)
        panel.set(yscale="log", ylim=(1e-9, 1), ylabel=f"{key} |difference of log-probabilities|")
        panel.set_xticks(
            range(len(kinds)), [f"{dtype}\n{'invariant' * invariant}" for dtype, invariant in kinds], fontsize=7
        )
    legend(figure, axes[0])
    return figure


def rollouts() -> Figure:
    """An update's time and memory, and the parts of an iteration."""
    figure, (update, memory, loop) = panels(3, 3.2)
    dtypes = ["bfloat16", "float32"]
    found = [rows_of("rollouts", part="update", trainer=dtype) for dtype in dtypes]
    bars(update, dtypes, {"": [[1e3 * row["seconds"] for row in rows] for rows in found]}, "ms an update, 8B")
    series = {
        "the trainer's tree": [[row["tree_bytes"] / 1e9 for row in rows] for rows in found],
        "the process's peak": [[max(map(peak_bytes, rows)) / 1e9] for rows in found],
    }
    bars(memory, dtypes, series, "GB")
    memory.legend(fontsize=7)
    memory.set_ylim(0, 1.35 * max(max(trials) for trials in series["the process's peak"]))
    for axes in (update, memory):
        axes.set_xlabel("dtype of the trainer's weights")
    rows = rows_of("rollouts", part="loop", trains=True)
    bars(
        loop,
        list(ITERATION),
        {"": [[row["seconds"][name] for row in rows] for name in ITERATION]},
        "s an iteration, 1B",
    )
    loop.set_yscale("log")
    loop.tick_params(axis="x", labelsize=7)
    return figure


def invariance() -> Figure:
    """Tokens per second, of what the same engine has without."""
    workloads = ["batch8-128-256", SHAREGPT]
    figure, axes = panels(2, 3.6)
    for panel, shape in zip(axes, INVARIANCE_SHAPES, strict=True):
        found = [invariance_rates(shape, workload) for workload in workloads]
        series = {
            name: [[rate / spread(rates["plain"])[0] for rate in rates[name]] for rates in found]
            for name in found[0]
            if name != "plain"
        }
        bars(panel, ["8 requests", "256 requests"], series, "tokens/s, share of plain decoding's")
        panel.axhline(1, color="0.5", linewidth=0.8)
        panel.set(title=SHORT[shape], ylim=(0, 1.1))
    legend(figure, axes[0])
    return figure


def log_bars(axes: Axes, groups: list[list[float]], shift: float, i: int, label: str) -> None:
    """The median of each group's trials, from the least to the most; a 0 for none at all."""
    style = {"color": FILLS[i], "hatch": HATCHES[i], "edgecolor": "0", "linewidth": 0.6, "label": label}
    spreads = [spread(group) for group in groups]
    middle, xs = [m for m, _, _ in spreads], [at + shift for at in range(len(groups))]
    errors = [[m - low for m, low, _ in spreads], [high - m for m, _, high in spreads]]
    axes.bar(xs, middle, 0.2, yerr=errors, capsize=2, **style)  # pyright: ignore (its styles)
    for x, value in zip(xs, middle, strict=True):
        if value == 0:
            axes.text(x, 1.2e-9, "0", ha="center", fontsize=7)
