"""What was published beside ours: by the PagedAttention paper (https://arxiv.org/abs/2309.06180), and by a tutorial."""

from .dense_kv import PAPER_RATES
from .fragmentation import PAPER_RUNNING, PAPER_SHARES
from .sharing import PAPER_PREFIX, PAPER_SAVED
from .tables import cards, counted, median, percent, rate_at, rows_of, shown, table
from .vs_hf import TUTORIAL

SHAREGPT, ALPACA = "sharegpt-like-1000", "alpaca-like-1000"


def borne_rates() -> tuple[float, dict[str, float]]:
    """Three times paging's seconds a token at the lowest rate, and the requests a second at which each system has
    them."""
    rows = rows_of("dense_kv", part="latency", workload="sharegpt-like-256")
    lowest = min(row["rate"] for row in rows)
    idle = [row["normalized_latency_s"]["mean"] for row in rows if (row["system"], row["rate"]) == ("paged", lowest)]
    limit = 3 * sum(idle) / len(idle)
    systems = dict.fromkeys(row["system"] for row in rows)
    return limit, {system: rate_at([r for r in rows if r["system"] == system], limit) for system in systems}


def published() -> str:
    """The paper's figures beside ours."""
    lines = []
    for policy, name in (
        ("max", "Orca (Max)"),
        ("pow2", "Orca (Pow2)"),
        ("oracle", "Orca (Oracle)"),
        ("paged", "paged"),
    ):
        rows = rows_of("fragmentation", question="policies", workload=SHAREGPT, policy=policy)
        ours, theirs = (f"{values[0]:.1f} %" for values in (counted(rows), PAPER_SHARES[SHAREGPT][policy]))
        lines.append((f"Fig 2, {name}: slots with token state", theirs, ours, SAME))
    for workload, why in ((SHAREGPT, ARRIVALS), (ALPACA, ARRIVALS)):
        for policy in ("max", "oracle", "paged"):
            rows = rows_of("fragmentation", question="policies", workload=workload, policy=policy)
            theirs = shown(PAPER_RUNNING[workload][policy])
            ours = shown(median(rows, "mean_running"))
            lines.append((f"Fig 13, {policy}, {workload.split('-')[0]}: requests", theirs, ours, why))
    _, borne = borne_rates()
    for other, theirs in PAPER_RATES.items():
        ours = f"{borne['paged'] / borne[other]:.1f}x"
        lines.append((f"Fig 12, sharegpt: rate of requests borne, to {other}'s", theirs, ours, RATES))
    for (question, workload), known in PAPER_SAVED.items():
        key = {"samples": "n", "beams": "beam_width"}[question]
        for count, theirs in known.items():
            rows = rows_of("sharing", question=question, workload=WORKLOADS[workload], **{key: count})
            ours = percent(median(rows, "saved")) if rows else "-"
            lines.append((f"Fig 15, {question} of {count}, {workload}: saved", f"{theirs} %", ours, SAVED[question]))
    for prefix, theirs in PAPER_PREFIX.items():
        ours = f"{median(rows_of('sharing', question='prefix', prefix=prefix), 'ratio'):.2f}x"
        lines.append((f"Fig 16, prefix of {prefix} tokens: throughput", f"{theirs}x", ours, PREFIX))
    for tokens in (512, 4096):
        rows = rows_of("recovery", shape="llama2-7b", tokens=tokens, page_size=16)
        ours = median(rows, lambda row: row["recompute_ms"] / (row["out_ms"] + row["in_ms"])) if rows else 0
        lines.append((f"Fig 19, page 16, {tokens} tokens: recompute / swap", "under 1", f"{ours:.2f}", SWAP))
    card = cards(rows_of("vs_hf", system="pagedjax"))[0]
    tutor = f"a T4 there, {card} here; transformers with a static cache, compiled"
    for what, seconds in TUTORIAL.items():
        workload = {"one prompt": "single-128-256", "a small batch": "batch8-128-256"}[what]
        ours = median(rows_of("vs_hf", system="pagedjax", workload=workload, device=card), "seconds")
        best = median(rows_of("vs_hf", system="static", workload=workload, device=card), "seconds")
        theirs = f"{seconds['transformers']} s, vLLM {seconds['vLLM']} s"
        lines.append((f"Tutorial, {what}: transformers", theirs, f"{best:.2f} s, ours {ours:.2f} s", tutor))
    return table(("what", "published", "here", "why they differ"), lines)


WORKLOADS = {"alpaca": "alpaca-like-1000", "sharegpt": "sharegpt-like-256"}
SAME = "lengths drawn with the paper's means, not its traces"
ARRIVALS = "a queue that is always full; the paper's requests arrive at a rate"
RATES = (
    "LLaMA-2-7B, 8 GiB, H200 here, OPT-13B, 12 GB, A100 there; at three times paging's latency with two a second here"
)
SAVED = {
    "samples": "prompts here are longer beside their outputs than the paper's",
    "beams": "random weights: beams leave their parents sooner; longer prompts",
}
PREFIX = "a translation task's lengths by its description; a faster card, so prefill counts for more of a request"
SWAP = "the paper copies page by page; here pages are joined to copies of 256 tokens"
