"""The command line: pagedjax generate | chat | serve | bench. A user's mistake is one line on stderr, exit code 2."""

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn

from .allocation import ALLOCATIONS
from .config import DTYPES, LOAD_FORMATS, PREEMPTION_MODES, EngineConfig, quiet_transformers, request_memory_fraction
from .demo import demo_model_path
from .request import RequestOutput
from .sampling_params import SamplingParams

ENGINE_FIELDS = {f.name for f in fields(EngineConfig)}
SAMPLING_FIELDS = {f.name for f in fields(SamplingParams)}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s")
    try:
        request_memory_fraction(args.gpu_memory_utilization)  # before jax starts
        quiet_transformers()
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"pagedjax: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pagedjax", description="Paged attention and continuous batching for LLaMA models in JAX.")
    commands = parser.add_subparsers(required=True, metavar="command")
    generate = commands.add_parser("generate", help="complete prompts from arguments, a file or standard input")
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="prompts; none reads standard input, one a line")
    generate.add_argument("--file", type=Path, help="a file with one prompt a line")
    generate.add_argument("--chat-template", action="store_true", help="send each prompt as a user message")
    generate.add_argument("--json", action="store_true", help="one JSON object a line instead of text")
    generate.set_defaults(run=_generate)
    chat = commands.add_parser("chat", help="talk to the model; an empty line or Ctrl-D ends")
    chat.add_argument("--system", help="a system message")
    chat.set_defaults(run=_chat)
    bench = commands.add_parser("bench", help="measure a workload: TTFT, TPOT, tokens/s, page waste, preemptions")
    bench.add_argument(
        "--workload",
        nargs="+",
        default=["batch8-128-256"],
        help="named workloads or .json files of lengths, one after the other on one engine",
    )
    bench.add_argument("--shape", help="a named shape or a config.json, with random weights, instead of a model")
    bench.add_argument("--num-requests", type=int, help="only the first so many requests")
    bench.add_argument("--request-rate", type=float, default=math.inf, help="a second, Poisson (default: all at once)")
    bench.add_argument("--repeat", type=int, default=3, help="measured runs after the warm-up (default 3)")
    bench.add_argument("--json", action="store_true", help="all figures, a JSON object a workload")
    bench.set_defaults(run=_bench)
    serve = commands.add_parser("serve", help="the OpenAI API over HTTP, for one model")
    _add_server(serve)
    for command in (generate, chat):
        _add_sampling(command)
    for command in (generate, chat, serve, bench):
        _add_engine(command)
    bench.set_defaults(enable_prefix_caching=False)
    return parser


def _add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("served", nargs="?", metavar="MODEL", help="as --model")
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="0 for a free one")
    parser.add_argument("--served-model-name", help="what clients call the model (default: MODEL as given)")
    parser.add_argument("--api-key", action="append", default=[], help="one that clients may have; may be repeated")
    parser.add_argument("--max-requests", type=int, default=1024, help="under way at a time; more are told to retry")
    parser.add_argument("--request-timeout", type=float, help="seconds that a request may take")
    parser.add_argument("--max-body-bytes", type=int, default=4 << 20)
    parser.add_argument("--chat-template", type=Path, help="a file, instead of the model's own template")
    parser.add_argument("--tool-call-parser", choices=("hermes", "llama3_json"), help="if the template does not tell")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    parser.add_argument("--log-json", action="store_true", help="lines about requests as JSON")
    parser.add_argument("--disable-log-requests", action="store_true")
    parser.set_defaults(run=_serve)


def _add_engine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--model", help="a folder, a .gguf file or a hub id (default: the demo model)")
    group.add_argument("--tokenizer", help="a folder or hub id, if not the model's own")
    group.add_argument("--load-format", choices=LOAD_FORMATS, default="auto")
    group.add_argument("--dtype", choices=DTYPES, default="auto")
    group.add_argument("--seed", type=int, default=0, help="the engine's seed")
    for name in ("max-model-len", "num-pages", "max-num-seqs", "max-num-batched-tokens", "max-mixed-tokens"):
        group.add_argument(f"--{name}", type=int)
    group.add_argument("--decode-steps", type=int, help="in one dispatch (default: several for small models on a GPU)")
    group.add_argument("--page-size", type=int, default=16)
    group.add_argument("--allocation", choices=ALLOCATIONS, default="paged", help="on demand, or one run a request")
    group.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    group.add_argument("--cpu-kv-cache-bytes", type=int, default=EngineConfig.cpu_kv_cache_bytes)
    group.add_argument("--attention-impl", default="auto")
    group.add_argument("--compilation-cache-dir", help="where compilations are kept (default: the user's cache folder)")
    group.add_argument("--lookahead", type=int, default=1)
    group.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        help="requests that begin alike share pages (default: yes, but for bench)",
    )
    group.add_argument("--swap-space", type=float, default=0, help="GiB of host memory for preempted requests' pages")
    group.add_argument("--preemption-mode", choices=PREEMPTION_MODES, help="default: what is estimated to be faster")
    group.add_argument("--batch-invariant", action="store_true", help="results do not depend on the batch, bit for bit")
    group.add_argument("--verbose", action="store_true", help="say where memory and time go")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    for name in ("n", "top-k", "max-tokens", "min-tokens", "logprobs", "prompt-logprobs"):
        group.add_argument(f"--{name}", type=int, default=None)
    group.add_argument("--sampling-seed", type=int, default=None, help="the requests' own seed")
    names = ("temperature", "top-p", "min-p", "presence-penalty", "frequency-penalty", "repetition-penalty")
    for name in names:
        group.add_argument(f"--{name}", type=float, default=None)
    group.add_argument("--stop", action="append", help="a string that ends the text; may be repeated")
    group.add_argument("--ignore-eos", action="store_true", default=None)


def _llm(args: argparse.Namespace, **more: Any) -> Any:
    from .llm import LLM

    settings = {name: value for name, value in vars(args).items() if name in ENGINE_FIELDS} | more
    if settings["model"] is None:
        settings["model"] = str(demo_model_path())
    return LLM(**settings)


def _sampling(args: argparse.Namespace, **defaults: Any) -> SamplingParams:
    given = {name: value for name, value in vars(args).items() if name in SAMPLING_FIELDS and value is not None}
    given.pop("seed", None)  # the engine's
    if args.sampling_seed is not None:
        given["seed"] = args.sampling_seed
    return SamplingParams(**defaults | given)


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.file and args.prompts:
        raise ValueError(f"--file {args.file} and prompts were both given; accepted: one of them")
    if args.prompts:
        return args.prompts
    text = args.file.read_text(encoding="utf-8") if args.file else sys.stdin.read()
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError("no prompts: give them as arguments, with --file, or one a line on standard input")
    return prompts


def _generate(args: argparse.Namespace) -> int:
    prompts, params = _prompts(args), _sampling(args, temperature=0.0, max_tokens=64)
    llm = _llm(args)
    items: Any = prompts
    if args.chat_template:
        items = [llm.chat_prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
    outputs = llm.generate(items, params, use_tqdm=sys.stderr.isatty())
    for prompt, output in zip(prompts, outputs, strict=True):
        if args.json:
            print(json.dumps(_json_output(prompt, output), ensure_ascii=False))
        elif output.error:
            print(f"pagedjax: error: {prompt[:60]!r}: {output.error}", file=sys.stderr)
        else:
            for completion in output.outputs:
                print(completion.text if args.chat_template else prompt + completion.text)
    return 2 if any(output.error for output in outputs) else 0


def _json_output(prompt: str, output: RequestOutput) -> dict[str, Any]:
    return {**asdict(output), "prompt": prompt}


def _chat(args: argparse.Namespace) -> int:
    params = _sampling(args, max_tokens=512)
    llm = _llm(args)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt)
        except EOFError:
            return 0
        if not line.strip():
            return 0
        messages.append({"role": "user", "content": line})
        shown = ""
        for output in llm.stream(llm.chat_prompt(messages), params):
            text = output.outputs[0].text
            print(text[len(shown) :], end="", flush=True)
            shown = text
        print()
        messages.append({"role": "assistant", "content": shown})


def _serve(args: argparse.Namespace) -> int:
    try:
        from .server.guard import Limits
        from .server.serve import serve
        from .server.serving import ChatSettings
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing; install pagedjax[serve]") from error
    _check_server(args)
    args.model = args.served or args.model
    logging.getLogger().setLevel(args.log_level.upper())
    name = args.served_model_name or args.model or "demo"
    llm = _llm(args)
    llm.engine.warm_up(progress=sys.stderr.isatty())
    limits = Limits(tuple(args.api_key), max_body=args.max_body_bytes, timeout=args.request_timeout)
    template = args.chat_template.read_text(encoding="utf-8") if args.chat_template else None
    chat = ChatSettings(template, args.tool_call_parser)
    options = {"host": args.host, "port": args.port, "max_requests": args.max_requests, "log_json": args.log_json}
    return serve(llm, name, limits, chat=chat, log_requests=not args.disable_log_requests, **options)


def _check_server(args: argparse.Namespace) -> None:
    if args.served and args.model:
        raise ValueError(f"MODEL {args.served} and --model {args.model} were both given; accepted: one of them")
    if not 0 <= args.port <= 65535:
        raise ValueError(f"port={args.port}; accepted: 0 to 65535")
    for name in ("max_requests", "max_body_bytes"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)}; accepted: at least 1")
    if args.request_timeout is not None and not args.request_timeout > 0:
        raise ValueError(f"request_timeout={args.request_timeout}; accepted: seconds above 0")
    if "" in args.api_key:
        raise ValueError("api_key=''; accepted: a key")


def _bench(args: argparse.Namespace) -> int:
    from .bench import bench, load_workload, package_data, table

    if not args.request_rate > 0:
        raise ValueError(f"request_rate={args.request_rate}; accepted: a number above 0")
    workloads = [load_workload(name, args.num_requests) for name in args.workload]
    if args.shape:
        if args.model:
            raise ValueError(f"--shape {args.shape} and --model {args.model} were both given; accepted: one of them")
        args.model = args.shape if args.shape.endswith(".json") else str(package_data("shapes", args.shape))
        args.load_format = "dummy"
    if args.max_model_len is None:
        args.max_model_len = max(workload.max_len for workload in workloads)
    llm = _llm(args, skip_tokenizer_init=True)
    progress = sys.stderr.isatty()
    for result in bench(llm.engine, workloads, args.repeat, args.seed, args.request_rate, progress):
        print(json.dumps(result) if args.json else table(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
