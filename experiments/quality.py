"""Does paging change what the model says?

Question: perplexity, the share of positions whose likeliest token is transformers' float32 one, and the difference of
log-probabilities from it, of the paged engine and of the same model over dense attention. Varied: system, dtype,
attention implementation. The kernels take KV of the weights' dtype alone, so that dtype varies for both. Held: real
weights; windows of Python's own documentation (`pydoc_data.topics`), other ones for every trial. `prefill` judges the
tokens of a window as a prompt; `decode`, for the decode kernel, continues the first half of each greedily and compares
its own tokens with dense float32 on the same tokens. Expected: in float32 all three equal to 1e-3 in log-probability,
and in perplexity to 4 digits; bfloat16 and float16 within 1 % and 0.1 % of that perplexity, paged as near as dense.

    python -m experiments.quality [--model FILE] [--dtype float32 bfloat16 float16] [--impl auto xla] [--small]

transformers' answers are stored with their windows in `results/quality_reference.npz`, for the demo model. They come of

    python -m experiments.quality --write-windows windows.npz [--model FILE]
    python -m experiments.hf_quality --model FILE --windows windows.npz --reference FILE.npz

For a model without such a file the reference is dense attention in float32. Rows go to `results/quality.jsonl`, one a
trial.
"""

import argparse
import gc
import hashlib
import json
import platform
import random
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from pagedjax import LLM, SamplingParams
from pagedjax.config import DTYPES, EngineConfig, request_memory_fraction
from pagedjax.demo import demo_model_path
from pagedjax.models.dense import causal_attend
from pagedjax.models.llama import Llama, Params
from pagedjax.models.load import load_params, open_checkpoint, read_config
from pagedjax.tokenizer import Tokenizer

from .common import RESULTS, Parser, conditions, engine_config, record

REFERENCE = RESULTS / "quality_reference.npz"
SEED = 0


class Judged(NamedTuple):
    """Of each token of some windows but their first ones: its log-probability, and the token likeliest in its place."""

    logprobs: Float[np.ndarray, "W T"]
    likeliest: Int[np.ndarray, "W T"]


class Texts(NamedTuple):
    """Windows of text, what they are of, and the reference's judgement where there is one."""

    ids: Int[np.ndarray, "trials W L"]
    about: dict[str, Any]
    judged: list[Judged] | None = None


def make_texts(tokenizer: Tokenizer, model: str, trials: int, windows: int, length: int) -> Texts:
    """Windows of topics in a seeded order, one after the other. ValueError if there is not enough text."""
    names, ids, digest = sorted(topics), [], hashlib.sha256()
    random.Random(SEED).shuffle(names)
    wanted = trials * windows * length
    while len(ids) < wanted:
        if not names:
            raise ValueError(f"trials * windows * length={wanted}; accepted: up to {len(ids)}, all topics' tokens")
        text = topics[names.pop(0)]
        digest.update(text.encode())
        ids += tokenizer.encode(text, add_special_tokens=False)
    array = np.array(ids[:wanted], np.int32).reshape(trials, windows, length)
    about = {"model": Path(model).name, "seed": SEED, "text_python": platform.python_version()}
    about |= {"text_sha256": digest.hexdigest(), "ids_sha256": hashlib.sha256(array.tobytes()).hexdigest()}
    return Texts(array, about)


def read_texts(path: Path, trials: int, windows: int, length: int) -> Texts:
    """As many of a file's windows, cut to `length`, which leaves the judgement of what remains as it is. ValueError if
    it has fewer or shorter ones."""
    with np.load(path) as file:
        ids, wanted = file["ids"], (trials, windows, length)
        if any(has < want for has, want in zip(ids.shape, wanted, strict=True)):
            raise ValueError(f"trials, windows, length={wanted}; accepted: up to {ids.shape} with {path.name}")
        part = tuple(map(slice, wanted))
        last = (*part[:2], slice(length - 1))
        judged = [Judged(*pair) for pair in zip(file["logprobs"][last], file["likeliest"][last], strict=True)]
        return Texts(ids[part], json.loads(str(file["about"])), judged)


class Dense:
    """The model over plain causal attention, a window at a time."""

    def __init__(self, path: str, dtype: str):
        checkpoint, _ = open_checkpoint(path)
        self.model = Llama(read_config(checkpoint), dtype=jnp.dtype(dtype))
        self.params, self.precision = load_params(self.model, checkpoint.tensors()), precision(dtype)
        attend, caches = causal_attend(self.model.config), (None,) * self.model.config.num_layers

        def judge(params: Params, tokens: Int[jax.Array, "T"]) -> tuple[jax.Array, jax.Array]:
            hidden, _ = self.model.hidden(params, tokens, jnp.arange(tokens.size), caches, attend)
            logprobs = jax.nn.log_softmax(self.model.logits(params, hidden[:-1]))
            return logprobs[jnp.arange(tokens.size - 1), tokens[1:]], logprobs.argmax(axis=-1)

        self._judge = jax.jit(judge)

    def judge(self, windows: Int[np.ndarray, "W L"]) -> Judged:
        with jax.default_matmul_precision(self.precision):
            found = [jax.device_get(self._judge(self.params, window)) for window in windows]
        return Judged(*map(np.stack, zip(*found, strict=True)))


class Paged:
    """The engine, with pages for so many windows at once."""

    def __init__(self, path: str, dtype: str, impl: str, windows: int, length: int):
        pages = -(-(length + 1) // EngineConfig.page_size)
        sizes: dict[str, Any] = {"max_num_seqs": windows, "max_model_len": length + 1, "num_pages": windows * pages + 1}
        jax.config.update("jax_default_matmul_precision", precision(dtype))  # the engine compiles in other threads
        self.llm = LLM(path, dtype=dtype, attention_impl=impl, skip_tokenizer_init=True, max_logprobs=1, **sizes)

    def judge(self, windows: Int[np.ndarray, "W L"]) -> Judged:
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, prompt_logprobs=1)
        outputs = self.llm.generate(windows.tolist(), params, use_tqdm=False)
        entries = [[entry for entry in output.prompt_logprobs or () if entry] for output in outputs]
        logprobs = [[next(iter(entry.values())).logprob for entry in window] for window in entries]
        likeliest = [[next(reversed(entry)) for entry in window] for window in entries]
        return Judged(np.array(logprobs, np.float32), np.array(likeliest, np.int32))

    def decode(self, prompts: Int[np.ndarray, "W P"], count: int) -> tuple[np.ndarray, np.ndarray]:
        """So many greedy tokens after each, and their log-probabilities, [W, count] both."""
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, logprobs=0)
        outputs = [output.outputs[0] for output in self.llm.generate(prompts.tolist(), params, use_tqdm=False)]
        logprobs = [[next(iter(entry.values())).logprob for entry in output.logprobs or ()] for output in outputs]
        return np.array([output.token_ids for output in outputs], np.int32), np.array(logprobs, np.float32)


def precision(dtype: str) -> str | None:
    """Of products: GPUs take float32 operands as TF32 unless told otherwise."""
    return "highest" if dtype == "float32" else None


def compared(found: Judged, reference: Judged) -> dict[str, float]:
    difference = np.abs(found.logprobs - reference.logprobs)
    return {
        "agreement": float((found.likeliest == reference.likeliest).mean()),
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
    }


def perplexity(judged: Judged) -> dict[str, float]:
    return {"perplexity": float(np.exp(-judged.logprobs.mean(dtype=np.float64)))}


def trials(args: argparse.Namespace, texts: Texts) -> Iterator[dict[str, Any]]:
    """A row of each system, dtype, implementation and trial."""
    exact = Dense(args.model, "float32")
    reference = texts.judged or [exact.judge(ids) for ids in texts.ids]
    if texts.judged:
        for trial, judged in enumerate(reference):
            yield {"system": "transformers", "trial": trial, **texts.about["judged_by"], **perplexity(judged)}
    for dtype in args.dtype:
        if "dense" in args.system:
            dense = exact if dtype == "float32" else Dense(args.model, dtype)
            for trial, ids in enumerate(texts.ids):
                judged = dense.judge(ids)
                measured = perplexity(judged) | compared(judged, reference[trial])
                yield {"system": "dense", "phase": "prefill", "dtype": dtype, "trial": trial, **measured}
            del dense
        done = set[str]()
        for impl in args.impl if "paged" in args.system else ():
            if impl not in done:
                paged = Paged(args.model, dtype, impl, *texts.ids.shape[1:])
                config = engine_config(paged.llm.engine)
                done.add(config["attention_impl"])
                for row in paged_trials(paged, texts.ids, exact, reference, args.decoded):
                    yield {"system": "paged", "dtype": dtype, "impl": config["attention_impl"], **row, "config": config}
                del paged
                gc.collect()  # an engine is a cycle, whose pool would stay beside the next one's


def paged_trials(
    paged: Paged, texts: Int[np.ndarray, "trials W L"], exact: Dense, reference: list[Judged], decoded: int
) -> Iterator[dict[str, Any]]:
    for trial, ids in enumerate(texts):
        judged = paged.judge(ids)
        measured = perplexity(judged) | compared(judged, reference[trial])
        yield {"phase": "prefill", "trial": trial, **measured}
        prompts = ids[:, : ids.shape[1] // 2]
        tokens, logprobs = paged.decode(prompts, decoded)
        again = exact.judge(np.concatenate([prompts, tokens], axis=1))
        beside = Judged(*(part[:, -decoded:] for part in again))
        yield {"phase": "decode", "trial": trial, "decoded": decoded, **compared(Judged(logprobs, tokens), beside)}


def main() -> None:
    parser = Parser("quality", __doc__, small="few short windows in float32")
    parser.add_argument("--model", help="a GGUF file or a folder, with its tokenizer (the demo model)")
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES[:0:-1]), choices=DTYPES[1:])
    parser.add_argument("--system", nargs="+", default=["dense", "paged"], choices=["dense", "paged"])
    parser.add_argument("--impl", nargs="+", default=["auto", "xla"], choices=["auto", "xla", "mosaic"])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--windows", type=int, default=16, help="of a trial")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--decoded", type=int, default=128, help="tokens, at most half a window's")
    parser.add_argument("--reference", type=Path, help="what hf_quality.py wrote of this model")
    parser.add_argument("--write-windows", type=Path, help="only writes the windows to this file, for hf_quality.py")
    args = parser.parse_args()
    if args.model is None:
        args.model, args.reference = str(demo_model_path()), args.reference or REFERENCE
    if args.small:
        args.dtype, args.repeat, args.windows, args.length, args.decoded = ["float32"], 2, 2, 48, 8
    if args.decoded > args.length // 2:
        parser.error(f"--decoded={args.decoded}; accepted: at most half of --length, {args.length // 2}")
    if args.write_windows:
        texts = make_texts(Tokenizer.load(args.model), args.model, args.repeat, args.windows, args.length)
        np.savez_compressed(args.write_windows, ids=texts.ids, about=json.dumps(texts.about))
        return
    request_memory_fraction(EngineConfig.gpu_memory_utilization)
    run(args)


def run(args: argparse.Namespace) -> None:
    """Prints and records all rows."""
    sizes, name = (args.repeat, args.windows, args.length), Path(args.model).name
    known = args.reference
    texts = read_texts(known, *sizes) if known else make_texts(Tokenizer.load(args.model), args.model, *sizes)
    if texts.about["model"] != name:
        raise ValueError(f"reference={str(known)!r} is of {texts.about['model']}; accepted: one of {name}")
    held = conditions() | {"windows": args.windows, "length": args.length, **texts.about}
    held["reference"] = known.name if known else "dense float32"
    print(f"{held['device']}, {name}, {args.repeat} trials of {args.windows} windows of {args.length} tokens")
    print(f"{'system':12} {'phase':8} {'dtype':9} {'impl':7} perplexity  agreement  max, mean difference")
    for row in trials(args, texts):
        record(args.results, row | held)
        words = f"{row['system']:12} {row.get('phase', ''):8} {row['dtype']:9} {row.get('impl', ''):7}"
        values = [f"{row[key]:{form}}" if key in row else " " * 10 for key, form in FORMS.items()]
        print(words, *values, flush=True)


FORMS = {"perplexity": "10.4f", "agreement": "10.5f", "max_difference": "10.6f", "mean_difference": "10.7f"}

if __name__ == "__main__":
    main()
