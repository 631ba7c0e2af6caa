"""Figures of what pages, their size and their sharing do."""

from matplotlib.figure import Figure

from .fragmentation import PAPER_RUNNING, PAPER_SHARES
from .plots import GREYS, SHORT, bars, card_limit, legend, line, page_sizes, panels, stacks
from .sharing import PAPER_PREFIX, PAPER_SAVED, own_lengths
from .tables import Row, beside, cards, counted, median, rows_of, spread

SHAREGPT = "sharegpt-like-1000"
ORCA = {"max": "Orca (Max)", "pow2": "Orca (Pow2)", "oracle": "Orca (Oracle)"}
KINDS = "token state", "reserved", "internal", "external, free"


def fragmentation() -> Figure:
    """Figures 2 and 13 of the paper: of each policy that has rows ours, and the paper's to the right if it has one."""
    figure, (left, middle, right) = panels(3, 3.8)
    policies = [str(name) for name in dict.fromkeys(r["policy"] for r in rows_of("fragmentation", question="policies"))]
    groups = [ORCA.get(policy, policy.split(":")[-1]) for policy in policies]
    shares = [counted(rows_of("fragmentation", question="policies", workload=SHAREGPT, policy=p)) for p in policies]
    paper = [(*PAPER_SHARES[SHAREGPT].get(policy, ()), 0, 0, 0, 0)[:4] for policy in policies]
    for shift, columns in ((-0.2, shares), (0.2, paper)):
        values = map(list, zip(*columns, strict=True))
        stacks(left, groups, dict(zip(KINDS, values, strict=True)), "% of slots, ShareGPT", shift)
    left.legend(*(found[: len(KINDS)] for found in left.get_legend_handles_labels()), fontsize=7, loc="upper left")
    left.set_ylim(0, 150)
    left.set_title("ours, the paper's (Fig 2)")
    bars(middle, groups, running(policies), "requests at a time")
    middle.set_yscale("log")
    middle.legend(fontsize=7)
    middle.set_title("requests batched (Fig 13)")
    for axes in (left, middle):
        axes.tick_params(axis="x", labelsize=7)
    for i, workload in enumerate(PAPER_RUNNING):
        rows = rows_of("fragmentation", question="page_sizes", workload=workload)
        line(right, rows, "page_size", lambda row: 100 * row["used"], workload.split("-")[0], i)
    page_sizes(right, "token state, % of slots")
    right.set_ylim(0, 100)
    right.legend(fontsize=7)
    return figure


def running(policies: list[str]) -> dict[str, list[list[float]]]:
    """Requests at a time of each policy: ours and the paper's, by workload."""
    series: dict[str, list[list[float]]] = {}
    for workload, known in PAPER_RUNNING.items():
        rows = rows_of("fragmentation", question="policies", workload=workload)
        name = workload.split("-")[0]
        series[name] = [[row["mean_running"] for row in rows if row["policy"] == policy] for policy in policies]
        series[f"{name}, the paper"] = [[known[policy]] if policy in known else [] for policy in policies]
    return series


def kv_memory() -> Figure:
    """Bytes of one sequence, and of a crowd in pages and in dense rows."""
    rows = rows_of("kv_memory")
    figure, (left, right) = panels(2, 4.2)
    models = list(dict.fromkeys(row["model"] for row in sorted(rows, key=lambda row: -row["bytes_per_token"])))
    for i, model in enumerate(models):
        lengths = [row for row in rows if row["question"] == "lengths" and row["model"] == model]
        line(left, lengths, "tokens", lambda row: row["wanted_bytes"] / 1e9, model, i)
    left.set_xscale("log")
    left.set_yscale("log")
    left.set(xlabel="tokens of a sequence", ylabel="GB of keys and values")
    legend(figure, left)
    crowd = {
        label: [
            [r[key] / 1e9 for r in rows if (r["question"], r["model"], r["layout"]) == ("crowd", model, layout)]
            for model in models
        ]
        for label, layout, key in (
            ("tokens", "pages", "token_bytes"),
            ("pages of 16", "pages", "wanted_bytes"),
            ("rows of 2048", "dense", "wanted_bytes"),
        )
    }
    bars(right, models, crowd, "GB, 256 requests, ShareGPT")
    right.tick_params(axis="x", rotation=30, labelsize=7)
    right.legend(fontsize=7)
    return figure


def _headroom(row: Row) -> float:
    return row["limit"] / row["output_tokens_per_s"]


def page_size() -> Figure:
    """Times and rates beside those with pages of 16 on the same card; waste and hits, which no card changes."""
    rows = rows_of("page_size")
    figure, axes = panels(4, 3.0)
    parts = [
        ("kernels", "us", "decode time, ratio to pages of 16"),
        ("engine", "output_tokens_per_s", "tokens/s, ratio to pages of 16"),
        ("engine", lambda row: 100 * row["page_waste"], "page waste, %"),
        ("prefix", lambda row: 100 * row["hit_rate"], "prefix-cache hit rate, %"),
    ]
    for panel, (part, y, unit) in zip(axes, parts, strict=True):
        own = [row for row in rows if row["part"] == part and row["workload"]]
        if part == "kernels":  # the same on two cards are bound by different things
            own = [row for row in own if row["device"] == cards(own)[0]]
            panel.set_title(own[0]["device"], fontsize=8)
        for i, (shape, workload) in enumerate(dict.fromkeys((row["shape"], row["workload"]) for row in own)):
            chosen = [row for row in own if (row["shape"], row["workload"]) == (shape, workload)]
            shown = beside(chosen, y) if isinstance(y, str) else chosen
            name = f"{SHORT[shape].split()[-1] if shape else 'any'}, {workload.split('-')[0]}"
            line(panel, shown, "page_size", y, name, i)
            if y == "output_tokens_per_s":
                limit = median([row for row in chosen if row["page_size"] == 16], _headroom)
                panel.axhline(limit, color="0.7", linewidth=0.8)
                panel.annotate(f"limit, {name}", (8 if i % 2 else 60, limit), fontsize=6, color="0.4", va="bottom")
        page_sizes(panel, unit)
        panel.set_ylim(bottom=0)
    axes[3].legend(fontsize=7)
    legend(figure, axes[0])
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
            axes.plot(list(known), list(known.values()), "x+"[i], color=GREYS[i], label=f"{name}, the paper")
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
    limits = []
    for at, prefix in enumerate(prefixes):
        row = next(row for row in rows if row.get("prefix") == prefix)
        lengths = own_lengths(row["seed"], row["requests"])
        for side, count in ((-0.2, 0), (0.2, prefix)):  # a prefix is computed once, or with each prompt
            limits.append(card_limit(row["shape"], row, [(count + prompt, output) for prompt, output in lengths]))
            right.hlines(limits[-1], at + side - 0.2, at + side + 0.2, color="0.5", linewidth=0.8)
        ratio = spread(row["ratio"] for row in rows if row.get("prefix") == prefix)[0]
        known = f"\n({PAPER_PREFIX[prefix]:.2f}x)" if prefix in PAPER_PREFIX else ""
        right.annotate(f"{ratio:.2f}x{known}", (at, max(series["with prefix caching"][at])), ha="center", va="bottom")
    right.annotate("the card's limit", (-0.4, limits[0]), fontsize=7, color="0.4", va="bottom")
    right.set_xlabel("tokens of common prefix (paper)")
    right.set_ylim(0, 1.3 * max(limits))
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
        page_sizes(panel, "ms a request")
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}")
        panel.tick_params(axis="y", which="minor", labelsize=6)
        panel.set_title(SHORT[shape])
    legend(figure, axes[0])
    return figure
