"""The device side of the engine: parameters, page pool, rows, and the dispatch of one schedule."""

import math
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .adjustments import make_adjustments, row_values
from .batch import Bucket, Buckets, make_batch
from .config import ResolvedConfig, platform_defaults
from .kv_cache import KVCache, make_kv_cache
from .models.llama import Llama, Params
from .page_pool import NULL_PAGE
from .pallas_kernels.dispatch import PagedOps
from .request import Request
from .sampler import Features, Sampled
from .scheduler import Schedule
from .step import Rows, Sequences, Step, StepFunction, make_rows

PROMPT_LOGPROB_ROWS = 64  # prompt positions whose logits exist at one time
COMMON_FEATURES = Features(), Features(random=True)  # compiled before the first request
COMMON_LOGPROBS = 20  # batches that ask for no more alternatives than this share a compilation


@dataclass(frozen=True)
class PromptLogprobs:
    """Log-probabilities of prompt tokens [first, first + count) of a request, perhaps still on the device."""

    request: Request
    first: int
    count: int
    sampled: Sampled


@dataclass(frozen=True)
class InFlight:
    """A dispatched step; its results are on their way to the host."""

    schedule: Schedule
    sampled: Sampled
    prompt_logprobs: list[PromptLogprobs]


class Runner:
    """Owns the device state."""

    def __init__(self, config: ResolvedConfig, model: Llama, params: Params, ops: PagedOps):
        self.config, self.model = config, model
        self._params = tuple(params.values())
        self.compilations: Counter[str] = Counter()
        self._step, self.buckets = make_step(config, model, ops, self.compilations)
        self._adjustments: Any = None
        self._make_state()

    def _make_state(self) -> None:
        config = self.config
        self._kv = make_kv_cache(self.model.config, config.num_pages, config.page_size, self.model.dtype)
        self._rows = make_rows(config.max_num_seqs, config.pages_per_seq)

    def dispatch(self, schedule: Schedule) -> InFlight:
        """Starts one step and the copies of its results to the host; waits for neither."""
        bucket = self.buckets.pick(schedule)
        features = self._features(schedule)
        self._write_adjusted(schedule.admitted)
        packed = jnp.asarray(make_batch(schedule, bucket, self._step.null_row))
        prompt_logprobs: list[PromptLogprobs] = []
        if bucket.decode and features.plain:
            step = self._step.decode(bucket, features)
            sampled, self._kv, self._rows = step(self._params, self._kv, self._rows, packed)
        else:
            forward = self._step.forward(bucket)
            last, hidden, sequences, self._kv, self._rows = forward(self._params, self._kv, self._rows, packed)
            sampled = self._sample(last, sequences, features)
            prompt_logprobs = list(self._prompt_logprobs(schedule, hidden))
        for array in jax.tree.leaves((sampled, [p.sampled for p in prompt_logprobs])):
            array.copy_to_host_async()
        return InFlight(schedule, sampled, prompt_logprobs)

    def warm_up(self) -> Iterator[str]:
        """Compiles every bucket for greedy and for random sampling, naming each when it is there, then runs them.

        Only for an engine without requests: the pool is dropped meanwhile, for XLA tries GEMMs out on the device, in
        every thread with buffers of its own. Other sampler features compile when first used. Functions are lowered one
        after the other, since the keys of JAX's compilation cache follow that order, and compiled in threads. Each runs
        twice at the end: XLA records a CUDA graph in a function's second run, and making an executable drops the graphs
        of others.
        """
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (self._kv, self._rows))
        del self._kv, self._rows
        try:
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                lowered = self._lower_common(*state)
                compiling = {threads.submit(low.compile): (name, function) for name, function, low in lowered}
                for future in as_completed(compiling):
                    name, function = compiling[future]
                    function.use(future.result())
                    yield name
        finally:
            self._make_state()
        for _ in range(2):
            self._run_padding()
        self.wait()

    @property
    def num_common(self) -> int:
        """How many functions `warm_up` compiles."""
        sampled = {bucket.num_seqs for bucket in self.buckets.mixed}
        return len(COMMON_FEATURES) * (len(self.buckets.decode) + len(sampled)) + len(self.buckets.mixed)

    def _lower_common(self, kv: KVCache, rows: Rows) -> Iterator[tuple[str, StepFunction, Any]]:
        """Name, function and what it lowers to."""
        sampled: set[int] = set()
        for bucket in (*self.buckets.decode, *self.buckets.mixed):
            args = (self._params, kv, rows, self._empty(bucket))
            if bucket.decode:
                for features in COMMON_FEATURES:
                    function = self._step.decode(bucket, features)
                    yield f"{bucket} {_kind(features)}", function, function.lower(*args)
                continue
            forward = self._step.forward(bucket)
            lowered = forward.lower(*args)
            yield str(bucket), forward, lowered
            if bucket.num_seqs not in sampled:
                sampled.add(bucket.num_seqs)
                last, _, sequences, *_ = lowered.out_info
                for features in COMMON_FEATURES:
                    function = self._step.sample(bucket.num_seqs, features)
                    low = function.lower(self._params, last, sequences, rows, None)
                    yield f"sample-{bucket.num_seqs} {_kind(features)}", function, low

    def _run_padding(self) -> None:
        for bucket in (*self.buckets.decode, *self.buckets.mixed):
            empty = self._empty(bucket)
            if bucket.decode:
                for features in COMMON_FEATURES:
                    step = self._step.decode(bucket, features)
                    _, self._kv, self._rows = step(self._params, self._kv, self._rows, empty)
            else:
                forward = self._step.forward(bucket)
                last, _, sequences, self._kv, self._rows = forward(self._params, self._kv, self._rows, empty)
                for features in COMMON_FEATURES:
                    self._sample(last, sequences, features)

    def _empty(self, bucket: Bucket) -> jax.Array:
        return jnp.asarray(make_batch(Schedule([], []), bucket, self._step.null_row))

    def memory_analysis(self) -> Iterator[tuple[str, Any]]:
        """XLA's account of every step function: its temporaries, and the bytes it writes in place."""
        for bucket in (*self.buckets.decode, *self.buckets.mixed):
            packed = self._empty(bucket)
            functions = [self._step.forward(bucket)]
            functions += [self._step.decode(bucket, Features())] if bucket.decode else []
            for function in functions:
                compiled = function.lower(self._params, self._kv, self._rows, packed).compile()
                yield str(bucket), compiled.memory_analysis()

    def wait(self) -> None:
        """Returns when the device has finished every step dispatched so far."""
        jax.block_until_ready(self._rows)

    def _sample(self, last: jax.Array, sequences: Sequences, features: Features) -> Sampled:
        step = self._step.sample(last.shape[0], features)
        adjustments = self._adjustments if features.adjusted else None
        sampled, self._rows, adjustments = step(self._params, last, sequences, self._rows, adjustments)
        if features.adjusted:
            self._adjustments = adjustments
        return sampled

    def _features(self, schedule: Schedule) -> Features:
        """What the sampler must be able to do for this batch."""
        requests = [s.request for s in schedule.sequences if s.samples]
        random = [r.params for r in requests if not r.params.greedy]
        wanted = [k for r in requests if (k := r.params.logprobs) is not None]
        return Features(
            random=bool(random),
            truncated=any(p.truncated for p in random),
            adjusted=any(r.adjusted for r in requests),
            num_logprobs=self._num_logprobs(wanted) if wanted else None,
            processed_logprobs=bool(wanted) and self.config.logprobs_mode == "processed_logprobs",
        )

    def _num_logprobs(self, wanted: list[int]) -> int:
        vocab_size = self.model.config.vocab_size
        few = -1 not in wanted and max(wanted) <= COMMON_LOGPROBS
        return min(COMMON_LOGPROBS, vocab_size) if few else vocab_size

    def _write_adjusted(self, admitted: list[Request]) -> None:
        """Writes the rows of admitted requests that change logits; makes the state at the first of them."""
        for request in admitted:
            if request.adjusted and request.row is not None:
                vocab_size = self.model.config.vocab_size
                if self._adjustments is None:
                    self._adjustments = make_adjustments(self.config.max_num_seqs + 1, vocab_size)
                values = row_values(request, vocab_size)
                write = self._step.write_adjustments()
                self._adjustments = write(self._adjustments, np.int32(request.row), values)

    def _prompt_logprobs(self, schedule: Schedule, hidden: jax.Array) -> Iterator[PromptLogprobs]:
        """Chunks of prompt log-probabilities: the token at position p is judged by the hidden state at p - 1."""
        row = 0
        for s in schedule.sequences:
            prompt, wanted = s.request.prompt_token_ids, s.request.params.prompt_logprobs
            last = 0 if wanted is None else min(s.start + s.num_tokens + 1, len(prompt))
            for first in range(s.start + 1, last, PROMPT_LOGPROB_ROWS):
                count = min(PROMPT_LOGPROB_ROWS, last - first)
                tokens = np.zeros(PROMPT_LOGPROB_ROWS, np.int32)
                tokens[:count] = prompt[first : first + count]
                step = self._step.prompt_logprobs(hidden.shape[0], self._num_logprobs([wanted or 0]))
                at = np.int32(row + first - 1 - s.start)
                yield PromptLogprobs(s.request, first, count, step(self._params, hidden, at, tokens))
            row += s.num_tokens


def _kind(features: Features) -> str:
    return "random" if features.random else "greedy"


def make_step(config: ResolvedConfig, model: Llama, ops: PagedOps, compilations: Counter[str]) -> tuple[Step, Buckets]:
    """The jitted functions and the buckets of a resolved configuration."""
    step = Step(model, ops, config.page_size, config.max_model_len, config.max_num_seqs, compilations)
    defaults = platform_defaults(jax.devices()[0].platform)
    least = defaults.min_decode_rows, defaults.min_mixed_tokens
    return step, Buckets(config.max_num_seqs, config.max_num_batched_tokens, config.page_size, *least)


def largest_step_bytes(config: ResolvedConfig, model: Llama, params: Params, ops: PagedOps) -> int:
    """What the pool must leave free: the largest step's temporaries and outputs, by compiling it, and the sampler's."""
    step, buckets = make_step(config, model, ops, Counter())
    bucket: Bucket = buckets.mixed[-1]
    kv = jax.eval_shape(lambda: make_kv_cache(model.config, NULL_PAGE + 2, config.page_size, model.dtype))
    rows = jax.eval_shape(lambda: make_rows(config.max_num_seqs, config.pages_per_seq))
    size = make_batch(Schedule([], []), bucket, config.max_num_seqs).size
    packed = jax.ShapeDtypeStruct((size,), jnp.int32)
    lowered = step.forward(bucket).lower(tuple(params.values()), kv, rows, packed)
    memory = lowered.compile().memory_analysis()
    logits = bucket.num_seqs * model.config.vocab_size * 4
    adjustments = jax.eval_shape(lambda: make_adjustments(config.max_num_seqs + 1, model.config.vocab_size))
    adjusted = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(adjustments))
    # The sampler holds logits, their adjusted and truncated forms and noise; adjustments exist twice while gathered.
    return memory.temp_size_in_bytes + memory.output_size_in_bytes + 4 * logits + 2 * adjusted
