"""What was asked and what came out, in sentences that the rows fill: the tables and pages that `report` writes."""

from collections.abc import Callable

from .tables import median, rows_of, shown, table, where
from .vs_vllm import TABLE

SHAREGPT, ALPACA = "sharegpt-like-1000", "alpaca-like-1000"


def percent(value: float) -> str:
    return f"{shown(100 * value)} %"


def vs_vllm() -> str:
    """README's table: the best run of each workload's latest rows."""
    rows = {(row["shape"], row["workload"]): row for row in rows_of("vs_vllm", engine="pagedjax")}
    lines = []
    for shape, workloads in TABLE.items():
        for name, figures in workloads.items():
            row = rows[shape, name]
            rate = row["best"]["output_tokens_per_s"]
            shares = f"{rate / row['limit']:.2f}", f"{figures.vllm / figures.limit:.2f}"
            lines.append((shape, name, shown(rate, 4), shares[0], shown(figures.vllm, 4), shares[1], row["commit"]))
    header = "shape", "workload", "tokens/s", "of the card's limit", "vLLM 0.25.1", "of its card's limit", "commit"
    return table(header, lines)


def fragmentation() -> str:
    def share(policy: str, workload: str = SHAREGPT) -> str:
        return percent(median(rows_of("fragmentation", question="policies", policy=policy, workload=workload), "used"))

    def of_size(size: int, workload: str) -> str:
        rows = rows_of("fragmentation", question="page_sizes", page_size=size, workload=workload)
        return percent(median(rows, "used"))

    return (
        f"Of a full pool's slots {share('max')} hold a token if requests reserve the whole context, {share('pow2')} if "
        f"the next power of two, {share('oracle')} if exactly what they will need, {share('paged')} with pages of 16 "
        f"(ShareGPT-like lengths). Pages of 256 hold {of_size(256, SHAREGPT)} there, and {of_size(256, ALPACA)} with "
        f"Alpaca's short requests, where pages of 16 hold {of_size(16, ALPACA)}."
    )


def kv_memory() -> str:
    one = rows_of("kv_memory", question="lengths", model="llama-13b", tokens=2048)[0]
    grouped = rows_of("kv_memory", model="llama2-70b")[0]["bytes_per_token"]
    crowd = {
        layout: median(
            rows_of("kv_memory", question="crowd", model="llama-13b", layout=layout),
            lambda row: row["wanted_bytes"] / row["token_bytes"],
        )
        for layout in ("pages", "dense")
    }
    return (
        f"A sequence of 2048 tokens of LLaMA-13B takes {one['token_bytes'] / 1e9:.2f} GB, {one['bytes_per_token'] / 1024:.0f} "
        f"KiB a token; LLaMA-2-70B, with 8 KV heads, {grouped / 1024:.0f} KiB. A crowd of ShareGPT-like requests takes "
        f"{crowd['pages']:.2f} times its tokens' bytes in pages of 16, and {crowd['dense']:.2f} times in rows of 2048."
    )


def page_size() -> str:
    def rate(size: int, shape: str = "llama3-8b") -> float:
        rows = rows_of("page_size", part="engine", shape=shape, page_size=size, workload="sharegpt-like-256")
        return median(rows, "output_tokens_per_s")

    def of(part: str, key: str, size: int, workload: str) -> float:
        return median(rows_of("page_size", part=part, shape="llama3-8b", page_size=size, workload=workload), key)

    sizes = sorted({row["page_size"] for row in rows_of("page_size", part="engine", shape="llama3-8b")})
    rates = {size: rate(size) for size in sizes}
    best, worst = max(rates, key=lambda s: rates[s]), min(rates, key=lambda s: rates[s])
    waste = [percent(of("engine", "page_waste", size, "alpaca-like-1000")) for size in (16, 256)]
    hits = [percent(of("prefix", "hit_rate", size, "sharegpt-like-256")) for size in (16, 256)]
    return (
        f"With room for all, LLaMA-3-8B's throughput differs by {100 * (rates[best] / rates[worst] - 1):.1f} % between "
        f"the best size ({best}) and the worst ({worst}): the kernels do not care, for a block's pages come in copies "
        f"that are all in flight together. What page size decides is memory and reuse: from 16 to 256 waste goes from "
        f"{waste[0]} to {waste[1]} of the pages of Alpaca-like requests, and the prefix-cache hit rate from {hits[0]} to "
        f"{hits[1]} (ShareGPT-like families). So use 16, the default; 32 where prompts are long and the host is the bound."
    )


def dense_kv() -> str:
    def of(system: str, key: str) -> float:
        return median(rows_of("dense_kv", part="throughput", system=system), key)

    rates = {s: of(s, "tokens_per_s_queued") for s in ("dense-static", "dense-continuous", "max", "oracle", "paged")}
    flying = {s: of(s, "mean_in_flight_queued") for s in rates}
    ratios = {system: f"{rates['paged'] / rate:.1f}" for system, rate in rates.items()}
    return (
        f"With 8 GiB for the KV cache of LLaMA-2-7B, paging has {shown(flying['paged'])} requests in flight where dense rows "
        f"have {shown(flying['dense-continuous'])} and Oracle's runs {shown(flying['oracle'])}. It gives "
        f"{ratios['dense-static']} times the tokens per second of the dense engine with static batches, "
        f"{ratios['dense-continuous']} times of that with continuous ones, {ratios['max']} times of Orca (Max) and "
        f"{ratios['oracle']} times of Orca (Oracle) on the same kernels."
    )


def vs_hf() -> str:
    def rate(system: str, workload: str) -> float:
        return median(rows_of("vs_hf", system=system, workload=workload, outcome="ok"), "output_tokens_per_s")

    lines = []
    for workload, name in (("single-128-256", "One prompt"), ("batch8-128-256", "eight")):
        ours, theirs = rate("pagedjax", workload), rate("generate", workload)
        best = max(rate(system, workload) for system in ("generate", "static", "continuous"))
        lines.append(
            f"{name}: {ours / theirs:.1f} times transformers' `generate`, {ours / best:.1f} times its best mode"
        )
    failed = [row for row in rows_of("vs_hf") if row["outcome"] != "ok"]
    ended = f" The crowd of 256: {failed[0]['system']} ended with {failed[0]['outcome']}." if failed else ""
    return "; ".join(lines) + "." + ended


def quality() -> str:
    def of(system: str, key: str, **more: str) -> float:
        return median(rows_of("quality", system=system, phase="prefill", **more), key)

    theirs = median(rows_of("quality", system="transformers"), "perplexity")
    exact = of("paged", "perplexity", dtype="float32")
    low = {d: percent(of("paged", "agreement", dtype=d)) for d in ("bfloat16", "float16")}
    return (
        f"Perplexity in float32: paged {exact:.4f}, dense {of('dense', 'perplexity', dtype='float32'):.4f}, transformers "
        f"{theirs:.4f}. The likeliest token is transformers' in {percent(of('paged', 'agreement', dtype='float32'))} of "
        f"positions, {low['float16']} in float16, {low['bfloat16']} in bfloat16."
    )


def sharing() -> str:
    def ratio(prefix: int) -> float:
        return median(rows_of("sharing", question="prefix", prefix=prefix), "ratio")

    cost = [1 - row["ratio"] for row in rows_of("sharing", question="cost")]
    low, high = min(cost), max(cost)
    return (
        f"512 requests that begin with the same 80 or 341 tokens come out {ratio(80):.2f} and {ratio(341):.2f} times as "
        f"fast with prefix caching. Where nothing is shared it costs between {100 * low:.1f} and {100 * high:.1f} %."
    )


def recovery() -> str:
    def ms(tokens: int, shape: str) -> tuple[str, str]:
        rows = rows_of("recovery", shape=shape, tokens=tokens, page_size=16)
        return shown(median(rows, lambda r: r["out_ms"] + r["in_ms"])), shown(median(rows, "recompute_ms"))

    small, large = ms(1024, "llama3-8b"), ms(1024, "llama2-7b")
    return (
        f"A request of 1024 tokens of LLaMA-3-8B is out and back in {small[0]} ms and computed again in {small[1]}; of "
        f"LLaMA-2-7B, with 4 times the KV, {large[0]} and {large[1]}. Page size makes no difference, since pages are joined "
        f"to copies of 256 tokens."
    )


FINDINGS: dict[str, tuple[str, Callable[[], str]]] = {
    "fragmentation": ("Where are the slots of a full pool lost, and how many requests run?", fragmentation),
    "kv_memory": ("How many bytes does the KV cache take?", kv_memory),
    "page_size": ("Which page size should one use?", page_size),
    "dense_kv": ("What does paging buy beside dense rows and reservations with the same bytes?", dense_kv),
    "vs_hf": ("How much faster than transformers is it, in the terms of the tutorial?", vs_hf),
    "quality": ("Does paging change what the model says?", quality),
    "sharing": ("What do shared pages save, and what does looking for them cost?", sharing),
    "recovery": ("Is a preempted request sooner back by swapping, or computed again?", recovery),
}
NO_FIGURE = {"quality"}


def findings() -> str:
    """A section an experiment."""
    sections = []
    for name, (asked, came_out) in FINDINGS.items():
        figure = "" if name in NO_FIGURE else f"\n\n![{name}](figures/{name}.png)"
        made = f"`python -m experiments.{name}`; {where(rows_of(name))}."
        sections.append(f"### {name}\n\n*{asked}* {came_out()}\n\n{made}{figure}")
    return "\n\n".join(sections)
