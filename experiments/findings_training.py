"""What came out of engines beside a trainer, in sentences that the rows fill."""

import statistics
from collections.abc import Callable

from .logprob_gap import PUBLISHED
from .tables import Row, median, percent, rows_of, shown

ITERATION = "rollout", "release", "train", "restore"  # of a loop with training, in order; `update` has its own part
SHAREGPT, INVARIANCE_SHAPES = "sharegpt-like-256", ("llama3-8b", "llama3.2-1b")


def gap_rows() -> list[Row]:
    return rows_of("logprob_gap", shape="llama3.2-1b")


def rl() -> str:
    checks, steps = rows_of("rl", kind="evaluation"), rows_of("rl", kind="step")
    last = max(row["step"] for row in checks)
    pairs = []
    for seed in sorted({row["seed"] for row in checks}):
        own = {row["step"]: row["exact_match"] for row in checks if row["seed"] == seed}
        pairs.append(f"{percent(own[0])} to {percent(own[last])}")
    apart = max(row["apart_max"] for row in steps)
    rollout, training = median(steps, "rollout_s"), median(steps, "train_s")
    return (
        f"In {last} steps of GRPO the share of held-out sums that a small LLaMA gets right, greedily, goes from "
        f"{', '.join(pairs[:-1])} and {pairs[-1]} ({len(pairs)} seeds). Sampler and trainer are {apart:.1e} apart at "
        f"most in the log-probability of any token. A step's rollout takes {shown(rollout)} s and its training "
        f"{shown(training)} s; the engine compiles nothing after the first."
    )


def logprob_gap() -> str:
    def of(dtype: str, pair: str, key: str, invariant: bool = False) -> float:
        wanted = dtype, pair, invariant
        return max(row[key] for row in gap_rows() if (row["dtype"], row["pair"], row["invariant"]) == wanted)

    low, most = of("bfloat16", "decode/dense", "mean"), of("bfloat16", "decode/dense", "most")
    same = of("float32", "crowd/half", "most", True), of("bfloat16", "crowd/half", "most", True)
    apart = of("float32", "crowd/half", "most")
    means = sorted(p.mean for p in PUBLISHED if p.mean)
    return (
        f"In float32 the engine's log-probabilities are at most {of('float32', 'decode/dense', 'most'):.1e} from dense "
        f"attention's; in bfloat16 {low:.1e} in the mean and {most:.1e} at most, with a KL of "
        f"{of('bfloat16', 'decode/dense', 'kl'):.1e} (others publish means of {means[0]:g} to {means[-1]:g} for vLLM "
        f"beside Megatron or FSDP, of trained and larger models). Another crowd moves a token's by up to {apart:.1e} "
        f"in float32; with batch invariance by {max(same):g}."
    )


def rollouts() -> str:
    updates = {dtype: rows_of("rollouts", part="update", trainer=dtype) for dtype in ("bfloat16", "float32")}
    after = [ms(median(rows, "seconds")) for rows in updates.values()]
    peaks = [shown(max(map(peak_bytes, rows)) / 1e9) for rows in updates.values()]
    every = [row for rows in updates.values() for row in rows]
    pages = every[0]["config"]["num_pages"] * every[0]["config"]["page_size"]
    alone, inside = (rows_of("rollouts", part="loop", trains=trains) for trains in (False, True))
    rates = [shown(median(rows, "rollouts_per_s")) for rows in (alone, inside)]
    seconds = [row["seconds"] for row in inside]
    rollout, training = ms(median(seconds, "rollout")), ms(median(seconds, "train"))
    return (
        f"LLaMA-3-8B's engine has a trainer's new weights after {after[0]} (bfloat16) or {after[1]} (float32), at most "
        f"{ms(max(row['seconds'] for row in every))}; {sum(row['compilations'] for row in every)} functions are "
        f"compiled, and the peak, trainer's tree and pages of {shown(pages)} tokens included, is {peaks[0]} or "
        f"{peaks[1]} GB. LLaMA-3.2-1B gives {rates[0]} rollouts of {alone[0]['length']} tokens a second alone and "
        f"{rates[1]} between training steps in one process: an iteration of {inside[0]['rollouts']} is {rollout} of "
        f"rollout and {training} of training."
    )


def ms(seconds: float) -> str:
    return f"{shown(1e3 * seconds)} ms"


def peak_bytes(row: Row) -> int:
    """Of an update with one tree of a trainer's."""
    return row["after"]["peak_bytes_in_use"] - (row["trees"] - 1) * row["tree_bytes"]


def invariance() -> str:
    crowds = rows_of("invariance", part="crowds", batch_invariant=True)
    counts = " and ".join(f"{r['different']} of {r['compared']} with {r['max_num_seqs']} rows a step" for r in crowds)

    def cost(shape: str, workload: str) -> str:
        rates = invariance_rates(shape, workload)
        return percent(1 - statistics.median(rates["invariant, 256 rows"]) / statistics.median(rates["plain"]))

    eight, many = ([cost(shape, name) for shape in INVARIANCE_SHAPES] for name in ("batch8-128-256", SHAREGPT))
    return (
        f"In {crowds[0]['crowds']} random crowds the outputs, tokens and log-probabilities, that are not bit for bit "
        f"what they are alone: {counts}. The price in tokens per second, of 256 rows a step: {eight[0]} (8B) and "
        f"{eight[1]} (1B) where eight run, {many[0]} and {many[1]} where 256 do."
    )


def invariance_rates(shape: str, workload: str) -> dict[str, list[float]]:
    """Tokens per second of the trials, by setting."""
    rows = rows_of("invariance", part="cost", shape=shape, workload=workload)
    settings = {"plain": (None, None), "invariant, 256 rows": (True, None), "invariant, 64 rows": (True, 64)}
    return {
        name: [r["output_tokens_per_s"] for r in rows if (r.get("batch_invariant"), r.get("max_num_seqs")) == setting]
        for name, setting in settings.items()
    }


FINDINGS: dict[str, tuple[str, Callable[[], str]]] = {
    "rl": ("Does reinforcement learning work whose rollouts are this engine's, on the trainer's parameters?", rl),
    "logprob_gap": ("By how much do sampler and trainer disagree on a token's log-probability?", logprob_gap),
    "rollouts": ("What do new weights cost, and rollouts between training steps?", rollouts),
    "invariance": ("Is an output the same whatever else runs, and what does that cost?", invariance),
}
