"""What was asked and what came out, in sentences that the rows fill: the tables and pages that `report` writes."""

from collections.abc import Callable

from . import findings_training
from .published import ALPACA, SHAREGPT, borne_rates, published
from .tables import Row, beside, cards, median, percent, rows_of, shown, table, where
from .vs_hf import BATCHES
from .vs_vllm import TABLE


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
        f"Of a full pool's slots {share('max')} hold a token if requests reserve the whole context, {share('pow2')} "
        f"if the next power of two, {share('oracle')} if exactly what they will need, {share('paged')} with pages of "
        f"16 (ShareGPT-like lengths). Pages of 256 hold {of_size(256, SHAREGPT)} there, and {of_size(256, ALPACA)} "
        f"with Alpaca's short requests, where pages of 16 hold {of_size(16, ALPACA)}."
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
        f"A sequence of 2048 tokens of LLaMA-13B takes {one['token_bytes'] / 1e9:.2f} GB, "
        f"{one['bytes_per_token'] / 1024:.0f} KiB a token; LLaMA-2-70B, with 8 KV heads, {grouped / 1024:.0f} KiB. A "
        f"crowd of ShareGPT-like requests takes {crowd['pages']:.2f} times its tokens' bytes in pages of 16, and "
        f"{crowd['dense']:.2f} times in rows of 2048."
    )


def page_size() -> str:
    def of(key: str, size: int, workload: str, part: str) -> float:
        return median(rows_of("page_size", part=part, page_size=size, workload=workload), key)

    spreads = []
    for shape, name in (("llama3-8b", "8B"), ("llama3.2-1b", "1B")):
        rows = beside(
            rows_of("page_size", part="engine", shape=shape, workload="sharegpt-like-256"), "output_tokens_per_s"
        )
        sizes = sorted({row["page_size"] for row in rows})
        rates = {n: median((row for row in rows if row["page_size"] == n), "output_tokens_per_s") for n in sizes}
        best, worst = max(rates, key=lambda n: rates[n]), min(rates, key=lambda n: rates[n])
        spreads.append(f"{percent(rates[worst])} (pages of {worst}) to {percent(rates[best])} ({best}) for {name}")
    decode = rows_of("page_size", part="kernels", shape="llama3-8b", kernel="decode")
    whole = {}
    for device in cards(decode):
        for workload in ("sharegpt-like-256", "alpaca-like-1000"):
            rows = [row for row in decode if (row["device"], row["workload"]) == (device, workload)]
            more = median((row for row in beside(rows, "us") if row["page_size"] == 128), "us") - 1
            whole.setdefault(device, []).append(percent(more))
    longer = " and ".join(
        f"{shares[0]} ({shares[1]} where requests are short) on an {device}" for device, shares in whole.items()
    )
    waste = [percent(of("page_waste", size, "alpaca-like-1000", "engine")) for size in (16, 256)]
    hits = [percent(of("hit_rate", size, "sharegpt-like-256", "prefix")) for size in (16, 256)]
    return (
        f"Where memory is plenty, tokens per second are {', '.join(spreads)} of those with pages of 16 on the same "
        "card: a block's pages come in copies that are all in flight together, so the kernels hardly care as far as "
        f"32. A last page is read whole, though: with pages of 128 attention of 8B takes longer to decode by "
        f"{longer}. What page size decides is memory and reuse: from 16 to 256 tokens waste "
        f"goes from {waste[0]} to {waste[1]} of the pages of Alpaca-like requests, and the prefix-cache hit rate of "
        f"ShareGPT-like families from {hits[0]} to {hits[1]}. So use 16, the default, and 32 "
        "where prefixes are long; 8 wins little memory and costs a few per cent of prefill, and from 64 on pages "
        "lose what paging was for."
    )


def dense_kv() -> str:
    def of(system: str, key: str) -> float:
        return median(rows_of("dense_kv", part="throughput", system=system, workload="sharegpt-like-256"), key)

    systems = "dense-static", "dense-continuous", "max", "pow2", "oracle", "paged"
    rates = {system: of(system, "tokens_per_s") for system in systems}
    flying = {system: of(system, "mean_in_flight_queued") for system in systems}
    ratios = {system: f"{rates['paged'] / rate:.1f}" for system, rate in rates.items()}
    limit, borne = borne_rates()
    return (
        f"With 8 GiB for the KV cache of LLaMA-2-7B, paging has {shown(flying['paged'])} requests in flight while "
        f"some wait, dense rows and Orca (Max) {shown(flying['max'])}, Oracle {shown(flying['oracle'])}. It ends 64 "
        f"requests {ratios['dense-static']} times as soon as the dense engine with static batches, "
        f"{ratios['dense-continuous']} times as with continuous ones, and on the same kernels {ratios['max']} times "
        f"as Orca (Max), {ratios['pow2']} as Pow2 and {ratios['oracle']} as Oracle. When requests arrive at "
        f"random, latency over output length is {1e3 * limit:.0f} ms, three times paging's with two a second, at "
        f"{shown(borne['paged'])} requests a second; with Oracle at {shown(borne['oracle'])}, Pow2 "
        f"{shown(borne['pow2'])}, Orca (Max) {shown(borne['max'])}, continuous dense rows "
        f"{shown(borne['dense-continuous'])}, with static ones no more than {borne['dense-static']:g}."
    )


def vs_hf() -> str:
    def best(workload: str, device: str) -> dict[str, Row]:
        """Each system's best trial, the slowest system first."""
        rows = sorted(
            rows_of("vs_hf", workload=workload, device=device, outcome="ok"), key=lambda row: row["output_tokens_per_s"]
        )
        trials = {row["system"]: row for row in rows}
        return dict(sorted(trials.items(), key=lambda item: item[1]["output_tokens_per_s"]))

    def times(workload: str, other: str, device: str) -> str:
        trials = best(workload, device)
        return f"{trials['pagedjax']['output_tokens_per_s'] / trials[other]['output_tokens_per_s']:.1f}"

    card, *others = cards(rows_of("vs_hf", system="pagedjax"))
    parts = []
    for workload, name in (("single-128-256", ""), ("batch8-128-256", "eight ")):
        *_, mode = (system for system in best(workload, card) if system != "pagedjax")
        each = [
            times(workload, other, card) + "".join(f" ({times(workload, other, device)})" for device in others)
            for other in ("generate", mode)
        ]
        parts.append(f"{name}{each[0]} times as fast as by `generate` and {each[1]} as by `{mode}`")
    name = "sharegpt-like-256"
    trials, full = best(name, card), rows_of("vs_hf", workload=name, outcome="out of memory", system="generate")
    rate = shown(trials["pagedjax"]["output_tokens_per_s"], 4)
    padded, out = trials["generate"], " and ".join(str(row["batch"]) for row in full)
    where_else = "".join(f" (in brackets {device})" for device in others)
    return (
        f"On an {card}{where_else}, by each system's best trial, one prompt comes out "
        f"{'; '.join(parts)}, the best mode of transformers. All {max(BATCHES)} requests of {name} at once "
        f"come out at {rate} tokens/s, {times(name, 'continuous', card)} times as fast as by transformers' continuous "
        f"batching. Padded to one batch, {out} run out of memory; {padded['batch']} of them come out at "
        f"{shown(padded['output_tokens_per_s'])} tokens/s."
    )


def quality() -> str:
    rows = rows_of("quality", phase="prefill")
    dtypes = dict.fromkeys(row["dtype"] for row in rows if row["system"] == "paged")
    theirs = median(rows_of("quality", system="transformers"), "perplexity")
    parts = []
    for dtype in dtypes:
        paged, dense = (
            [row for row in rows if row["system"] == system and row["dtype"] == dtype] for system in ("paged", "dense")
        )
        agreement = percent(median(paged, "agreement"))
        values = f"paged {median(paged, 'perplexity'):.4f}, dense {median(dense, 'perplexity'):.4f}"
        parts.append(f"{dtype}: {values}; paged's likeliest token is transformers' in {agreement} of positions")
    return f"Perplexity of transformers in float32 {theirs:.4f}. {'. '.join(parts)}."


def sharing() -> str:
    def ratio(prefix: int) -> float:
        return median(rows_of("sharing", question="prefix", prefix=prefix), "ratio")

    cost = [1 - row["ratio"] for row in rows_of("sharing", question="cost")]
    low, high = min(cost), max(cost)
    return (
        f"512 requests that begin with the same 80 or 341 tokens come out {ratio(80):.2f} and {ratio(341):.2f} times "
        f"as fast with prefix caching. Where nothing is shared it costs between {100 * low:.1f} and {100 * high:.1f} "
        "%."
    )


def recovery() -> str:
    def ms(tokens: int, shape: str) -> tuple[str, str]:
        rows = rows_of("recovery", shape=shape, tokens=tokens, page_size=16)
        return shown(median(rows, lambda r: r["out_ms"] + r["in_ms"])), shown(median(rows, "recompute_ms"))

    def by_size(tokens: int) -> str:
        """From the quickest to the slowest page size."""
        rows = rows_of("recovery", shape="llama3-8b", tokens=tokens)
        sizes = {row["page_size"] for row in rows}
        found = [median((r for r in rows if r["page_size"] == n), lambda r: r["out_ms"] + r["in_ms"]) for n in sizes]
        return f"{shown(min(found))} to {shown(max(found))}"

    small, large = ms(1024, "llama3-8b"), ms(1024, "llama2-7b")
    sizes = sorted({row["page_size"] for row in rows_of("recovery", shape="llama3-8b")})
    return (
        f"A request of 1024 tokens of LLaMA-3-8B is out and back in {small[0]} ms and computed again in {small[1]}; "
        f"of LLaMA-2-7B, with 4 times the KV, {large[0]} and {large[1]}. Pages of {sizes[0]} to {sizes[-1]} tokens, "
        f"joined to copies of 256, take the former {by_size(1024)} ms, and 4096 tokens {by_size(4096)}."
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
    **findings_training.FINDINGS,
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


TABLES: dict[str, Callable[[], str]] = {"vs_vllm": vs_vllm, "findings": findings, "published": published}
