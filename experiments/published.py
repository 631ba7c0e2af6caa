"""What was published beside ours: by the PagedAttention paper (https://arxiv.org/abs/2309.06180), and by a tutorial."""

import statistics
from collections.abc import Iterator
from itertools import chain

from .dense_kv import PAPER_RATES
from .fragmentation import PAPER_RUNNING, PAPER_SHARES
from .plots import SHORT
from .recovery import PAPER_RECOVERY
from .sharing import PAPER_PREFIX, PAPER_SAVED
from .tables import beside, cards, counted, median, percent, rate_at, rows_of, shown, table
from .vs_hf import TUTORIAL

Line = tuple[str, str, str, str]  # what, theirs, ours, why they differ
SHAREGPT, ALPACA = "sharegpt-like-1000", "alpaca-like-1000"
WORKLOADS = {"alpaca": "alpaca-like-1000", "sharegpt": "sharegpt-like-256"}
ORCA = {"max": "Orca (Max)", "pow2": "Orca (Pow2)", "oracle": "Orca (Oracle)", "paged": "paged"}


def borne_rates() -> tuple[float, dict[str, float]]:
    """Three times paging's seconds a token at the lowest rate, and the requests a second at which each system has
    them."""
    rows = rows_of("dense_kv", part="latency", workload="sharegpt-like-256")
    lowest = min(row["rate"] for row in rows)
    idle = [row["normalized_latency_s"]["mean"] for row in rows if (row["system"], row["rate"]) == ("paged", lowest)]
    limit = 3 * sum(idle) / len(idle)
    systems = dict.fromkeys(row["system"] for row in rows)
    return limit, {system: rate_at([r for r in rows if r["system"] == system], limit) for system in systems}


def _fragmentation() -> Iterator[Line]:
    for policy, name in ORCA.items():
        rows = rows_of("fragmentation", question="policies", workload=SHAREGPT, policy=policy)
        ours, theirs = (f"{values[0]:.1f} %" for values in (counted(rows), PAPER_SHARES[SHAREGPT][policy]))
        yield f"Fig 2, {name}: slots with token state", theirs, ours, "lengths with the paper's means, not its traces"
    for workload in (SHAREGPT, ALPACA):
        for policy, name in ORCA.items():
            rows = rows_of("fragmentation", question="policies", workload=workload, policy=policy)
            figures = shown(PAPER_RUNNING[workload][policy]), shown(median(rows, "mean_running"))
            why = "a queue that is always full; the paper's requests arrive at a rate"
            yield f"Fig 13, {name}, {workload.split('-')[0]}: requests", *figures, why


def _rates() -> Iterator[Line]:
    _, borne = borne_rates()
    for other, theirs in PAPER_RATES.items():
        why = "LLaMA-2-7B, 8 GiB, H200; OPT-13B, 12 GB, A100 there. At three times paging's latency with two a second"
        ours = f"{borne['paged'] / borne[other]:.1f}x"
        yield f"Fig 12, sharegpt: requests a second borne, to {ORCA[other]}", theirs, ours, why


def _sharing() -> Iterator[Line]:
    for (question, workload), known in PAPER_SAVED.items():
        key = {"samples": "n", "beams": "beam_width"}[question]
        why = {
            "samples": "prompts here are longer beside their outputs than the paper's",
            "beams": "random weights: beams leave their parents sooner; longer prompts",
        }[question]
        for count, theirs in known.items():
            rows = rows_of("sharing", question=question, workload=WORKLOADS[workload], **{key: count})
            yield (
                f"Fig 15, {question} of {count}, {workload}: saved",
                f"{theirs} %",
                percent(median(rows, "saved")),
                why,
            )
    for prefix, theirs in PAPER_PREFIX.items():
        ours = f"{median(rows_of('sharing', question='prefix', prefix=prefix), 'ratio'):.2f}x"
        why = "a translation task's lengths by its description; a faster card, so prefill counts for more of a request"
        yield f"Fig 16, prefix of {prefix} tokens: throughput", f"{theirs}x", ours, why


def _kernels() -> Iterator[Line]:
    times: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for row in rows_of("kernels", kind="decode", page_size=16, batch_invariant=False):
        if "us" in row:
            case = times.setdefault((row["case"], row["device"], row["commit"]), {})
            case.setdefault(row["impl"], []).append(row["us"])
    ratios, devices = list[float](), set[str]()
    for (_, device, _), case in times.items():
        dense = [statistics.median(case[name]) for name in ("cudnn", "torch") if name in case]
        if dense and "mosaic" in case:
            ratios.append(statistics.median(case["mosaic"]) / min(dense))
            devices.add(device)
    ours = f"{min(ratios):.2f} to {max(ratios):.2f}x, median {statistics.median(ratios):.2f}x"
    why = f"beside the faster of cuDNN's and torch's, {len(ratios)} cases; {', '.join(sorted(devices))}"
    yield "Fig 18, decode attention: pages to dense, time", "1.20 to 1.26x", ours, why
    for workload, theirs in (("sharegpt-like-256", "16 to 128"), ("alpaca-like-1000", "16 to 32")):
        rows = beside(rows_of("page_size", part="engine", workload=workload), "output_tokens_per_s")
        rates = [
            median((row for row in rows if (row["shape"], row["page_size"]) == key), "output_tokens_per_s")
            for key in dict.fromkeys((row["shape"], row["page_size"]) for row in rows)
        ]
        sizes = {row["page_size"] for row in rows}
        ours = f"{min(sizes)} to {max(sizes)}: {percent(min(rates))} to {percent(max(rates))} of the tokens/s at 16"
        why = "memory is plenty; a block's pages come in copies that are in flight together"
        yield f"Fig 18, {workload.split('-')[0]}: best page sizes", theirs, ours, why


def _recovery() -> Iterator[Line]:
    joined = "the paper copies page by page, so small ones lose; here pages are joined to copies of 256 tokens"
    fewer = "a quarter of the KV bytes a token, as much to compute"
    for shape, size, theirs, why in (
        ("llama2-7b", 8, PAPER_RECOVERY["small"], joined),
        ("llama2-7b", 16, PAPER_RECOVERY["16 to 64"], joined),
        ("llama2-7b", 256, PAPER_RECOVERY["large"], joined),
        ("llama3-8b", 16, "-", fewer),
    ):
        rows = rows_of("recovery", shape=shape, tokens=4096, page_size=size)
        ours = f"{median(rows, lambda row: row['recompute_ms'] / (row['out_ms'] + row['in_ms'])):.2f}"
        yield f"Fig 19, {SHORT[shape]}, pages of {size}: recompute / swap", theirs, ours, why


def _tutorial() -> Iterator[Line]:
    waste = {
        policy: 100 - counted(rows_of("fragmentation", question="policies", workload=SHAREGPT, policy=policy))[0]
        for policy in ("oracle", "max")
    }
    why = "reserving exactly what will be needed, and the whole context"
    yield (
        "Tutorial: KV memory wasted without pages",
        "60 to 80 %",
        f"{waste['oracle']:.0f} to {waste['max']:.0f} %",
        why,
    )
    one = rows_of("kv_memory", question="lengths", model="llama-13b", tokens=2048)[0]
    yield "Tutorial: one sequence of LLaMA-13B", "1.7 GB", f"{one['token_bytes'] / 1e9:.2f} GB", "2048 tokens"
    card = cards(rows_of("vs_hf", system="pagedjax"))[0]
    why = f"a T4 there, {card} here; transformers with a static cache, compiled"
    for what, seconds in TUTORIAL.items():
        workload = {"one prompt": "single-128-256", "a small batch": "batch8-128-256"}[what]
        ours = median(rows_of("vs_hf", system="pagedjax", workload=workload, device=card), "seconds")
        best = median(rows_of("vs_hf", system="static", workload=workload, device=card), "seconds")
        theirs = f"{seconds['transformers']} s, vLLM {seconds['vLLM']} s"
        yield f"Tutorial, {what}: transformers", theirs, f"{best:.2f} s, ours {ours:.2f} s", why


def published() -> str:
    """Its figures and ours."""
    parts = _rates(), _fragmentation(), _sharing(), _kernels(), _recovery(), _tutorial()
    return table(("what", "published", "here", "why they differ"), chain(*parts))
