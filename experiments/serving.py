"""What does the server cost?

Question: output tokens per second through `pagedjax serve`'s own stack, over loopback, with `--streams` streamed
completions at a time, as a share of what the same engine gives offline; and the latencies that clients see. Varied:
shape. Held: workload, random weights, prompts of random token ids, greedy, exact output lengths, no prefix caching, the
engine's defaults; a byte-level tokenizer of the shape's vocabulary, made up. The best of `--repeat` runs after one that
warms up; in each of them the workload runs offline as `pagedjax bench` runs it, then by `LLM.generate` with text, then
through the server. Clients run in processes of their own. Expected: at least 0.92 of `pagedjax bench`'s figure.

    python -m experiments.serving [--shape llama3-8b] [--workload sharegpt-like-256] [--streams 256] [--small]

TTFT counts from before a connection is made, ITL between a stream's events: an event has several tokens where the
engine takes several steps in a dispatch, and where text has waited for the event loop. Rows go to
`results/serving.jsonl`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pagedjax import LLM, SamplingParams
from pagedjax.bench import Workload, load_workload, run_workload
from pagedjax.config import EngineConfig, request_memory_fraction
from pagedjax.models.load import open_checkpoint, read_config
from pagedjax.server.guard import Limits
from pagedjax.server.serve import make_server

from .common import Parser, conditions, record, shape_path, small_shape

GOAL = 0.92
LEAD = 1.0  # seconds in which clients read their jobs


def make_tokenizer(folder: str, vocab_size: int) -> None:
    """A byte-level tokenizer: all bytes, then words of four letters, every other one behind a space. No merges: it only
    decodes as a trained one would."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ("Ġ" * (i % 2) + "".join(word) for i, word in enumerate(product(ascii_lowercase, repeat=4)))
    tokens = [*letters, *islice(words, vocab_size - len(letters))]
    assert len(tokens) == vocab_size, f"no {vocab_size} tokens of that form"
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save(f"{folder}/tokenizer.json")
    Path(folder, "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def prompts_of(workload: Workload, vocab_size: int, seed: int) -> list[list[int]]:
    """The prompts of `run_workload`."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, prompt).tolist() for prompt, _ in workload.lengths]


def make_llm(args: argparse.Namespace, workload: Workload, folder: str, warm_up: bool = True) -> LLM:
    make_tokenizer(folder, read_config(open_checkpoint(shape_path(args.shape))[0]).vocab_size)
    crowded = len(workload.lengths) > args.streams  # then the engine has no more rows offline either
    llm = LLM(
        model=shape_path(args.shape),
        tokenizer=folder,
        load_format="dummy",
        max_model_len=workload.max_len,
        max_num_seqs=args.streams if crowded or args.small else None,
        enable_prefix_caching=False,
    )
    if warm_up:
        llm.engine.warm_up(progress=False)
    return llm


class Clients:
    """Processes that read `args.streams` streams between them."""

    def __init__(self, args: argparse.Namespace):
        self._streams = args.streams
        command, pipe = [sys.executable, "-m", "experiments.stream_client"], subprocess.PIPE
        root = Path(__file__).parent.parent
        self._all = [
            subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=root) for _ in range(args.clients)
        ]

    def run(self, port: int, prompts: list[list[int]], workload: Workload) -> dict[str, Any]:
        """The workload once. `cpu` shares are of one core: of the busiest client, and of this process."""
        requests = [(prompt, output) for prompt, (_, output) in zip(prompts, workload.lengths, strict=True)]
        start, num = time.monotonic() + LEAD, len(self._all)
        for i, client in enumerate(self._all):
            streams = len(range(i, self._streams, num))
            job = {"port": port, "start": start, "streams": streams, "requests": requests[i::num]}
            assert client.stdin is not None
            client.stdin.write(json.dumps(job) + "\n")
            client.stdin.flush()
        time.sleep(max(0.0, start - time.monotonic()))
        cpu = time.process_time()
        results = [json.loads(client.stdout.readline()) for client in self._all if client.stdout]
        cpu, seconds = time.process_time() - cpu, max(result["ended"] for result in results) - start
        ttft, gaps = ([x for result in results for x in result[name]] for name in ("ttft", "gaps"))
        num_tokens = sum(result["num_tokens"] for result in results)
        assert num_tokens == sum(output for _, output in workload.lengths), "outputs have the wrong lengths"
        return {
            "output_tokens_per_s": num_tokens / seconds,
            "seconds": seconds,
            "ttft_ms": percentiles(ttft),
            "itl_ms": percentiles(gaps),
            "tokens_per_event": num_tokens / (len(ttft) + len(gaps)),
            "client_cpu": max(result["cpu"] for result in results) / seconds,
            "server_cpu": cpu / seconds,
        }

    def close(self) -> None:
        for client in self._all:
            client.communicate()  # ends their input, and so them


def percentiles(seconds: list[float]) -> dict[str, float]:
    """In milliseconds."""
    return {f"p{q}": float(np.percentile(seconds, q)) * 1e3 for q in (50, 90, 99)} if seconds else {}


def generate(llm: LLM, prompts: list[list[int]], workload: Workload) -> float:
    """Output tokens per second of `LLM.generate`, with text."""
    items = [{"prompt_token_ids": prompt} for prompt in prompts]
    params = [SamplingParams(temperature=0, max_tokens=output, ignore_eos=True) for _, output in workload.lengths]
    start = time.perf_counter()
    outputs = llm.generate(items, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert num_tokens == sum(output for _, output in workload.lengths), "outputs have the wrong lengths"
    return num_tokens / seconds


def measure(llm: LLM, port: int, clients: Clients, workload: Workload, repeat: int) -> dict[str, Any]:
    """The three in turns; the engine is idle while the server waits."""
    runs: dict[str, list[Any]] = {"offline": [], "text": [], "served": []}
    vocab_size = llm.engine.runner.model.config.vocab_size
    for trial in range(repeat + 1):  # the first one warms up
        prompts = prompts_of(workload, vocab_size, trial)
        runs["offline"].append(run_workload(llm.engine, workload, trial))
        runs["text"].append(generate(llm, prompts, workload))
        runs["served"].append(clients.run(port, prompts, workload))
        shown = runs["offline"][-1]["output_tokens_per_s"], runs["text"][-1], runs["served"][-1]["output_tokens_per_s"]
        offline, text, served = shown
        print(
            f"{trial or 'warm':>4}: offline {offline:8.0f}, with text {text:8.0f}, served {served:8.0f} tokens/s, "
            f"{served / offline:.3f} of offline",
            flush=True,
        )
    served = max(runs["served"][1:], key=lambda run: run["output_tokens_per_s"])
    offline = max(runs["offline"][1:], key=lambda run: run["output_tokens_per_s"])
    return {
        "ratio": served["output_tokens_per_s"] / offline["output_tokens_per_s"],
        "offline_tokens_per_s": offline["output_tokens_per_s"],
        "text_tokens_per_s": max(runs["text"][1:]),
        "served_tokens_per_s": served["output_tokens_per_s"],
        "offline": offline,
        "served": served,
        "runs": {
            "offline": [run["output_tokens_per_s"] for run in runs["offline"][1:]],
            "text": runs["text"][1:],
            "served": [run["output_tokens_per_s"] for run in runs["served"][1:]],
        },
    }


def installed(name: str) -> str | None:
    """A package's version; None if it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def show(row: dict[str, Any]) -> None:
    served, offline = row["served"], row["offline"]
    for name in ("ttft_ms", "itl_ms"):
        for label, run in (("served", served), ("offline", offline)):
            values = ", ".join(f"{p} {value:.1f}" for p, value in run[name].items())
            print(f"{name.removesuffix('_ms').upper()} {label:8} {values} ms")
    print(f"tokens an event {served['tokens_per_event']:.2f}")
    print(
        f"CPU: server {served['server_cpu']:.2f} cores, busiest of {row['clients']} clients {served['client_cpu']:.2f}"
    )
    rates = (f"{row[f'{name}_tokens_per_s']:.0f}" for name in ("offline", "text", "served"))
    print("output tokens/s: offline {}, with text {}, served {}".format(*rates))
    print(f"served/offline {row['ratio']:.3f}, goal {GOAL}: {'met' if row['ratio'] >= GOAL else 'missed'}", flush=True)


def main() -> None:
    parser = Parser("serving", __doc__, small="a few short requests of a tiny shape")
    parser.add_argument("--shape", default="llama3-8b", help="a named shape, or a config.json")
    parser.add_argument("--workload", default="sharegpt-like-256")
    parser.add_argument("--streams", type=int, default=256, help="at a time")
    parser.add_argument("--clients", type=int, default=4, help="processes that read them")
    parser.add_argument("--loop", default="asyncio", choices=("asyncio", "uvloop"), help="the server's event loop")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    workload = load_workload(args.workload)
    if args.small:
        args.streams, args.clients, args.shape = 8, 1, small_shape(args.shape)
        workload = Workload("small", [(min(prompt, 64), 40) for prompt, _ in workload.lengths[:12]])
    request_memory_fraction(EngineConfig.gpu_memory_utilization)
    held = conditions()
    held |= {"shape": args.shape, "workload": workload.name, "requests": len(workload.lengths)}
    held |= {"streams": args.streams, "clients": args.clients, "loop": args.loop}
    held |= {name: installed(name) for name in ("uvicorn", "uvloop", "httptools")}
    print(f"{held['device']}, {args.shape}, {workload.name}, {args.streams} streams", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        llm = make_llm(args, workload, folder)
    clients = Clients(args)
    server, _ = make_server(llm, "shape", Limits(), max_requests=args.streams)
    server.config.loop = args.loop
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        row = measure(llm, server.port(), clients, workload, args.repeat)
    finally:
        server.should_exit = True
        thread.join()
        clients.close()
    llm.engine.check_integrity()
    show(row | held)
    record(args.results, row | held)


if __name__ == "__main__":
    main()
