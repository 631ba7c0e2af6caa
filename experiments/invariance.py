"""Is a request's output the same, bit for bit, whatever else runs, and what does that cost?

Questions, one a part:
  crowds  four seeded requests, alone first, then in `--crowds` random crowds that come and go at random: the outputs
          whose tokens or log-probabilities are not the bits that they are alone, and by how much these are apart where
          the tokens still agree;
  cost    output tokens per second of a workload, all at once.
Varied: batch invariance, and with it the rows of a step, all of one shape then; shape and workload in the second part.
Held: random weights, in the first part of two layers as wide as the shape's, scaled so that next tokens differ in
likelihood; prefix caching, steps ahead, a pool of 9600 tokens (a test on CPUs has one that is too small). Expected: no
output differs with invariance, some without it; where few run, steps as wide as for many cost twice as much as plain
ones or more, and a full crowd's decoding little, its prompts the rest.

    python -m experiments.invariance [--part crowds cost] [--shape llama3.2-1b llama3-8b] [--small]

The first part takes the first shape. Rows go to `results/invariance.jsonl`, one a setting of the first part, one a
trial of the second.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pagedjax import LLM, SamplingParams
from pagedjax.bench import load_workload, run_workload
from pagedjax.config import EngineConfig, request_memory_fraction
from pagedjax.engine import Engine
from pagedjax.models.config import LlamaConfig
from pagedjax.models.llama import Llama
from pagedjax.models.load import dummy_params
from pagedjax.request import Request, Status

from .common import Parser, conditions, engine_config, make_engine, record, shape_path

Row = dict[str, Any]
Outputs = list[tuple[list[int], list[float]]]  # tokens and log-probabilities of each sequence
PARTS = "crowds", "cost"
SETTINGS: dict[str, list[Row]] = {
    "crowds": [
        {"batch_invariant": True, "max_num_seqs": 256},
        {"batch_invariant": True, "max_num_seqs": 64},
        {"batch_invariant": False, "max_num_seqs": 256},
    ],
    "cost": [{}, {"batch_invariant": True}, {"batch_invariant": True, "max_num_seqs": 64}],
}
SPREAD = 4  # random weights times this
ARRIVAL = 0.4  # chance that one more request comes before a step


class Crowd(NamedTuple):
    """What runs: prompts and params of the subjects, and of the others how many at most, of which lengths at most."""

    subjects: Sequence[tuple[list[int], SamplingParams]]
    vocab_size: int
    others: int
    prompt: int
    output: int

    def add(self, engine: Engine, number: int) -> list[Request]:
        """A subject's sequences, with the log-probabilities of what they sample."""
        prompt, params = self.subjects[number]
        return engine.add_request(f"subject {number}", prompt, params, recorded=True)

    def alone(self, engine: Engine) -> list[Outputs]:
        """What each subject gives with nothing beside it and nothing cached."""
        found = []
        for number in range(len(self.subjects)):
            engine.reset_prefix_cache()
            requests = self.add(engine, number)
            while engine.has_unfinished:
                engine.step()
            found.append(outputs(requests))
        return found

    def run(self, engine: Engine, rng: np.random.Generator) -> dict[int, list[Request]]:
        """The subjects among random others, some of which begin as a subject does; all come at random times."""
        found: dict[int, list[Request]] = {}
        waiting: list[int | None] = [*range(len(self.subjects)), *[None] * int(rng.integers(1, self.others + 1))]
        rng.shuffle(waiting)  # pyright: ignore (a list too)
        while waiting or engine.has_unfinished:
            while waiting and rng.random() < ARRIVAL:
                if (who := waiting.pop()) is None:
                    prompt, params = self.other(rng)
                    engine.add_request("other", prompt, params, priority=int(rng.integers(-1, 2)))
                else:
                    found[who] = self.add(engine, who)
            engine.step()
        engine.check_integrity()
        return found

    def other(self, rng: np.random.Generator) -> tuple[list[int], SamplingParams]:
        """What it asks of the sampler changes what is compiled for the batch."""
        prompt, _ = self.subjects[int(rng.integers(len(self.subjects)))]
        start = prompt[: rng.integers(0, len(prompt))] if rng.random() < 0.5 else []
        rest = rng.integers(0, self.vocab_size, int(rng.integers(1, self.prompt))).tolist()
        more = [{}, {"top_k": 5, "repetition_penalty": 1.2}, {"logprobs": 2}, {"temperature": 0.0}]
        return [*start, *rest], SamplingParams(max_tokens=int(rng.integers(1, self.output)), **more[rng.integers(4)])


def outputs(requests: list[Request]) -> Outputs:
    """Log-probabilities to the last bit."""
    assert all(r.status is Status.FINISHED for r in requests)
    return [(r.output_token_ids, r.recorded_logprobs) for r in requests]


def make_crowd(vocab_size: int, scale: float) -> Crowd:
    """Prompts of up to 300 tokens times `scale`, outputs of up to 90."""
    rng = np.random.default_rng(1)

    def size(length: int) -> int:
        return max(round(length * scale), 2)

    def subject(prompt: int, output: int, **params: Any) -> tuple[list[int], SamplingParams]:
        tokens = rng.integers(0, vocab_size, size(prompt)).tolist()
        return tokens, SamplingParams(max_tokens=size(output), ignore_eos=True, **params)

    subjects = [
        subject(300, 60, temperature=0.9, seed=3),
        subject(17, 90, n=3, seed=8),
        subject(90, 40, top_p=0.9, seed=4),
        subject(40, 80, temperature=0),
    ]
    return Crowd(subjects, vocab_size, size(120), size(200), size(100))


def crowds(path: str, args: argparse.Namespace) -> Iterator[Row]:
    config = replace(LlamaConfig.from_hf(json.loads(Path(path).read_text())), num_layers=2)
    model = Llama(config, dtype=jnp.bfloat16)
    params = {k: v if k.endswith("norm.weight") else v * SPREAD for k, v in dummy_params(model, 0).items()}
    crowd = make_crowd(config.vocab_size, 0.1 if args.small else 1)
    for setting in SETTINGS["crowds"]:
        sizes: Row = {"max_model_len": 1024, "num_pages": 600, "lookahead": 2} | setting
        if args.small:
            sizes |= {"max_model_len": 128, "num_pages": 30, "max_num_seqs": sizes["max_num_seqs"] // 16}
        engine = LLM.from_params(params, config, dtype="bfloat16", **sizes).engine
        alone, rng, start = crowd.alone(engine), np.random.default_rng(2), time.perf_counter()
        compared, different, apart = 0, 0, 0.0
        for _ in range(args.crowds):
            for who, requests in crowd.run(engine, rng).items():
                for now, then in zip(outputs(requests), alone[who], strict=True):
                    compared, different = compared + 1, different + (now != then)
                    if now[0] == then[0]:
                        apart = max(apart, float(np.abs(np.subtract(now[1], then[1])).max()))
        counts = {"compared": compared, "different": different, "apart": apart, "seconds": time.perf_counter() - start}
        counts |= {"preemptions": engine.scheduler.stats.num_preemptions}
        held = {"max_num_seqs": sizes["max_num_seqs"], "crowds": args.crowds, "seed": 2}
        yield setting | held | counts | {"config": engine_config(engine)}
        del engine
        gc.collect()


def cost(path: str, args: argparse.Namespace) -> Iterator[Row]:
    loads = [load_workload(name, 2 if args.small else None) for name in args.workload]
    for setting in SETTINGS["cost"]:
        sizes: Row = {"num_pages": 400, "max_num_seqs": 8} if args.small else {"gpu_memory_utilization": 0.8}
        longest = max(load.max_len for load in loads) + 1
        engine = make_engine(path, enable_prefix_caching=False, max_model_len=longest, **sizes | setting)
        for load in loads:
            for trial in range(args.repeat + 1):  # the first one compiles what is needed
                found = run_workload(engine, load, seed=trial)
                if trial:
                    about = {"workload": load.name, "requests": len(load.lengths), "seed": trial}
                    yield setting | about | found | {"config": engine_config(engine)}
        del engine
        gc.collect()


RUN: dict[str, Callable[[str, argparse.Namespace], Iterator[Row]]] = {"crowds": crowds, "cost": cost}


def main() -> None:
    parser = Parser("invariance", __doc__, small="two crowds of few, and two requests")
    parser.add_argument("--shape", nargs="+", default=["llama3.2-1b", "llama3-8b"], help="named shapes")
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--workload", nargs="+", default=["batch8-128-256", "sharegpt-like-256"])
    parser.add_argument("--crowds", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    if args.small:
        args.shape, args.workload, args.crowds, args.repeat = args.shape[:1], args.workload[:1], 2, 1
    request_memory_fraction(EngineConfig.gpu_memory_utilization)  # before the device is asked for anything
    small = args.small or jax.default_backend() == "cpu"
    held = conditions()
    for part in args.part:
        for shape in args.shape[:1] if part == "crowds" else args.shape:
            for found in RUN[part](shape_path(shape, small), args):
                row = {"part": part, "shape": shape, "small": small} | found
                record(args.results, row | held)
                shown = "batch_invariant", "max_num_seqs", "workload", "compared", "different", "output_tokens_per_s"
                print(part, shape, " ".join(f"{name}={row[name]}" for name in shown if name in row), flush=True)


if __name__ == "__main__":
    main()
