"""What came out of engines beside a trainer, in sentences that the rows fill."""

from collections.abc import Callable

from .logprob_gap import PUBLISHED
from .tables import Row, median, percent, rows_of, shown


def gap_rows() -> list[Row]:
    """Of the shape itself; of the small one like it, which a CPU runs, if there are none."""
    rows = rows_of("logprob_gap", shape="llama3.2-1b")
    return [row for row in rows if not row["small"]] or rows


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


FINDINGS: dict[str, tuple[str, Callable[[], str]]] = {
    "rl": ("Does reinforcement learning work whose rollouts are this engine's, on the trainer's parameters?", rl),
    "logprob_gap": ("By how much do sampler and trainer disagree on a token's log-probability?", logprob_gap),
}
